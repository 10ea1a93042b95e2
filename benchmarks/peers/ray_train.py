"""Ray Train v2's TorchTrainer with the same loop as the bare script; prints when training was asked for and done.

    python ray_train.py JOB.json FOLDER

Ray is up before that: what is timed is `fit`. It listens with a token of its own and ends with this process.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The ranks at the niceness of everything else, and nobody else's code.
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}


def loop(job: dict[str, Any]) -> None:
    from ray.train import get_context
    from training import train

    context = get_context()
    train(job, context.get_world_rank(), context.get_world_size())


def main() -> None:
    job, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    os.environ |= {**ENVIRONMENT, "RAY_AUTH_TOKEN": os.urandom(32).hex()}
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Short, for the sockets in it: their paths are at most 107 bytes long.
    scratch = tempfile.mkdtemp(prefix="peer-ray-", dir="/tmp")
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    try:
        ray.init(
            address="local",
            num_cpus=job["ranks"] + 1,  # its controller takes one
            include_dashboard=False,
            object_store_memory=80 << 20,
            _temp_dir=scratch,
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
        time.sleep(job["settle"])
        asked = time.monotonic()
        trainer = TorchTrainer(
            loop,
            train_loop_config=job,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=job["ranks"], resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(folder), name="run"),
        )
        trainer.fit()
        print(json.dumps({"asked": asked, "ended": time.monotonic(), "version": ray.__version__}), flush=True)
        ray.shutdown()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
