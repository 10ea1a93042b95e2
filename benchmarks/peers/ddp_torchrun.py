"""A bare script of distributed data parallel training, started by torchrun: DDP over gloo, one thread a rank.

python -m torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 --master-port PORT ddp_torchrun.py JOB.json
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from training import train


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist.init_process_group("gloo")
    train(job, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
