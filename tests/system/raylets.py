"""Several nodes of a Ray cluster on this machine, which a test adds one by one and kills.

    python -m tests.system.raylets FOLDER

It tells its address and its first node, which has one CPU. Each line on stdin is `add CPUS`, or `late CPUS` for a node
that takes its time to start an actor; the answer is the process id of its raylet. `rooms` answers how many placement
groups have all their room. With stdin all nodes end.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from ray.cluster_utils import Cluster

_STORE = 80 << 20  # bytes of a node's object store, nearly the least it takes
_DELAY = "RAY_testing_asio_delay_us"
_LATE = "NodeManagerService.grpc_server.RequestWorkerLease=20000000:20000000"  # microseconds


def _add(cluster: Cluster, cpus: str) -> int:
    settings: dict[str, Any] = {"include_log_monitor": False, "node_ip_address": "127.0.0.1"}
    if cluster.head_node is None:
        settings |= {"include_dashboard": False, "no_monitor": True, "temp_dir": sys.argv[1]}
    node = cluster.add_node(num_cpus=int(cpus), object_store_memory=_STORE, **settings)
    return node.all_processes["raylet"][0].process.pid


def _late(cluster: Cluster, cpus: str) -> int:
    os.environ[_DELAY] = _LATE
    try:
        return _add(cluster, cpus)
    finally:
        del os.environ[_DELAY]


def _rooms(cluster: Cluster) -> int:
    table = cluster.global_state.placement_group_table().values()
    return sum(group["state"] == "CREATED" for group in table)


_DO: dict[str, Callable[..., int]] = {"add": _add, "late": _late, "rooms": _rooms}


def main() -> None:
    cluster = Cluster()
    head = _add(cluster, "1")
    print(cluster.address, head, flush=True)
    for line in sys.stdin:
        what, *words = line.split()
        print(_DO[what](cluster, *words), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
