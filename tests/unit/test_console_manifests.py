"""What `atoll cluster manifest` writes: a RayJob as KubeRay's own schema has it, and a script that Slurm could run."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from atoll.console.manifests import Nodes, kuberay, slurm
from atoll.errors import Invalid
from atoll.spec.job import parse_job
from atoll.spec.model import Bundle

SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.json").read_text())
NODES = Nodes(count=2, cpus=8, gpus=1, image="example.org/atoll:1")
BUNDLE = Bundle(files={"task.py": "class Fit: ...\n"})


def job(name="heart_risk.v2"):
    fields = {"kind": "train", "name": name, "purpose": "care", "task": {"file": "task.py", "name": "Fit"}}
    return parse_job({**fields, "data": {"dataset": "rows"}, "layout": {"data": 2}}, "job")


def checked(document):
    validator = pytest.importorskip("jsonschema", reason="comes with Ray: pip install 'atoll[ray]'")
    validator.Draft202012Validator.check_schema(SCHEMA)
    return sorted(error.json_path for error in validator.Draft202012Validator(SCHEMA).iter_errors(document))


def test_a_rayjob_fits_kuberays_schema_and_brings_the_jobs_files():
    files, ray_job = yaml.safe_load_all(kuberay(job(), BUNDLE, NODES))
    assert checked(ray_job) == []
    assert files["data"]["task.py"] == "class Fit: ...\n"
    assert parse_job(yaml.safe_load(files["data"]["job.yaml"]), "job") == job()
    spec = ray_job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    [ranks] = spec["workerGroupSpecs"]
    assert (ranks["replicas"], ranks["minReplicas"], ranks["maxReplicas"]) == (2, 2, 2)
    [container] = ranks["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}
    assert {"name": "job", "configMap": {"name": files["metadata"]["name"]}} in ranks["template"]["spec"]["volumes"]


def test_the_schema_finds_a_field_that_kuberay_does_not_know():
    _, ray_job = yaml.safe_load_all(kuberay(job(), BUNDLE, NODES))
    ray_job["spec"]["rayClusterSpec"]["authOption"] = {}
    del ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    ray_job["metadata"]["name"] = "Heart"
    assert checked(ray_job) == ["$.metadata.name", "$.spec.rayClusterSpec", "$.spec.rayClusterSpec.workerGroupSpecs[0]"]


@pytest.mark.parametrize("name", ["a" * 60, "9.-_x-", "risk"])
def test_any_jobs_name_becomes_one_that_kubernetes_takes(name):
    _, ray_job = yaml.safe_load_all(kuberay(job(name), None, NODES))
    assert checked(ray_job) == []


def test_what_kubernetes_could_not_take_is_told():
    with pytest.raises(Invalid, match=r"^--image: a RayJob needs a container image"):
        kuberay(job(), BUNDLE, Nodes(count=1, cpus=1, gpus=0))
    with pytest.raises(Invalid, match=r"'täsk\.py' cannot be in a ConfigMap"):
        kuberay(job(), Bundle(files={"täsk.py": ""}), NODES)


PROGRAMS = {  # what a node of a Slurm cluster has, writing down how it is called
    "scontrol": "echo one; echo two",
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 192.0.2.1 fe80::1",
    "ray": 'echo "ray $* $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$CALLS"; [[ "$*" != *--block* ]] || exec sleep 60',
    "atoll": 'echo "atoll $*" >> "$CALLS"; until grep -q "block --address" "$CALLS"; do sleep 0.02; done; exit 4',
}


def test_a_slurm_script_starts_ray_with_a_token_runs_the_job_and_ends_both(tmp_path):
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o700)
    script = slurm(job(), tmp_path / "my jobs" / "job.yaml", tmp_path / "home", NODES)
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --gpus-per-node=1\n" in script
    calls = tmp_path / "calls"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment |= {"SLURM_JOB_NODELIST": "[one-two]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 4, done.stderr
    told = calls.read_text().splitlines()
    started = "ray start --head --block --node-ip-address=192.0.2.1 --port=6379 --num-cpus=8 --include-dashboard=false"
    assert f"{started} token 64" in told
    assert "ray health-check --address 192.0.2.1:6379 token 64" in told
    assert "ray start --block --address=192.0.2.1:6379 --num-cpus=8 token 64" in told
    assert f"atoll --home {tmp_path}/home run {tmp_path}/my jobs/job.yaml" in told
