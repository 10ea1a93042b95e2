"""What a cluster's own scheduler is given to start a Ray and run a job on it: a KubeRay RayJob, a Slurm script.

The site lies on a volume that every node sees, and its document names the Ray beside it: `executor: {kind: ray,
address: 127.0.0.1:6379}`. Both forms start Ray with a token that is made for this one job.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atoll.errors import Invalid
from atoll.spec.document import write_yaml
from atoll.spec.job import Job
from atoll.spec.model import Bundle

PORT = 6379  # that Ray's head listens on
_HOME, _JOB = "/srv/atoll", "/srv/job"  # where pods have the site's volume, and the job's files
_CLAIM = "atoll"  # a PersistentVolumeClaim that all pods can write
_MEMORY = 4  # GiB for each processor of a pod
_NAME = 47  # letters of a RayJob's name: KubeRay makes longer ones of it
_KEPT = 600  # seconds that a finished job's cluster stays, for its logs
_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")  # of a ConfigMap


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes that are asked for; the image is Kubernetes' alone."""

    count: int
    cpus: int
    gpus: int
    image: str = ""


def kuberay(job: Job, bundle: Bundle | None, nodes: Nodes) -> str:
    """Return a ConfigMap with the job's files and the RayJob that runs it, as YAML (KubeRay 1.5.1 or newer)."""
    if not nodes.image:
        raise Invalid("--image: a RayJob needs a container image with Ray and Atoll; name one")
    files = {"job.yaml": write_yaml(job), **(bundle.files if bundle is not None else {})}
    for name in files:
        if not _KEY.fullmatch(name):
            raise Invalid(f"task.file: {name!r} cannot be in a ConfigMap; use letters, digits, '.', '_' and '-'")
    name = re.sub(r"[^a-z0-9]+", "-", job.name)[:_NAME].strip("-")
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-files"}, "data": files}
    none = {"cpu": "2", "memory": "4Gi"}  # of the head, on which no rank is
    each = {"cpu": str(nodes.cpus), "memory": f"{nodes.cpus * _MEMORY}Gi"}
    each |= {"nvidia.com/gpu": str(nodes.gpus)} if nodes.gpus else {}
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"atoll --home {_HOME} run {_JOB}/job.yaml",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEPT,
            "rayClusterSpec": {
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "port": str(PORT)},
                    "template": _pod("head", none, name, nodes),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "ranks",
                        "replicas": nodes.count,
                        "minReplicas": nodes.count,
                        "maxReplicas": nodes.count,
                        "rayStartParams": {},
                        "template": _pod("ranks", each, name, nodes),
                    }
                ],
            },
        },
    }
    return yaml.safe_dump_all([config, ray_job], sort_keys=False, allow_unicode=True)


def _pod(container: str, resources: dict[str, str], name: str, nodes: Nodes) -> dict[str, Any]:
    return {
        "spec": {
            "containers": [
                {
                    "name": f"ray-{container}",
                    "image": nodes.image,
                    "resources": {"limits": resources, "requests": resources},
                    "volumeMounts": [
                        {"name": "home", "mountPath": _HOME},
                        {"name": "job", "mountPath": _JOB, "readOnly": True},
                    ],
                }
            ],
            "volumes": [
                {"name": "home", "persistentVolumeClaim": {"claimName": _CLAIM}},
                {"name": "job", "configMap": {"name": f"{name}-files"}},
            ],
        }
    }


_SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={count}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --exclusive
# Starts a Ray of this job alone on its nodes, runs the job, and ends both. Send it by: sbatch
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

# Who has no token is turned away: anybody in the network could otherwise run code on these nodes.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d ' ' -f 1)
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
    ray start --head --block --node-ip-address="$address" --port={port} --num-cpus={cpus} --include-dashboard=false &
for attempt in $(seq 60); do
    if ray health-check --address "$address:{port}" >/dev/null 2>&1; then break; fi
    if [ "$attempt" = 60 ]; then echo "Ray did not start in two minutes" >&2; exit 5; fi
    sleep 2
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" \\
        ray start --block --address="$address:{port}" --num-cpus={cpus} &
fi
atoll --home {home} run {job}
"""


def slurm(job: Job, file: Path, home: Path, nodes: Nodes) -> str:
    """Return a batch script; ``file`` and ``home`` lie where every node sees them."""
    return _SLURM.format(
        name=job.name,
        count=nodes.count,
        cpus=nodes.cpus,
        gpus=f"#SBATCH --gpus-per-node={nodes.gpus}\n" if nodes.gpus else "",
        port=PORT,
        home=shlex.quote(str(home.resolve())),
        job=shlex.quote(str(file.resolve())),
    )
