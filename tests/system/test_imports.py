"""What a fresh process loads: a command answers at once, and hub, agent and router stay small."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "ray", "fastapi", "uvicorn", "pyarrow", "duckdb", "httpx", "pydantic", "numpy")
HELP = "from atoll.console.cli import execute\ntry: execute(['--help'])\nexcept SystemExit: pass"
# where tensors or Ray are
COMPUTING = ("inner", "tasks", "runtime/worker.py", "runtime/nursery.py", "serving/engine.py")
COMPUTING += ("runtime/ray.py", "runtime/seating.py")
SEARCHING = ("runtime/study.py",)  # where Optuna is


def loaded_by(program, heavy):
    """Run a program in an interpreter of its own; return which of these packages it has loaded in the end."""
    ending = f"import sys; print('loaded:', *(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{program}\n{ending}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    mark, *found = done.stdout.splitlines()[-1].split()
    assert mark == "loaded:"
    return found


@pytest.mark.parametrize("program", ["import atoll", HELP], ids=["import", "help"])
def test_importing_atoll_and_its_help_load_nothing_heavy(program):
    assert loaded_by(program, HEAVY) == []


def test_batches_need_only_numpy():
    assert loaded_by("import atoll.data.batches", ("numpy", "pyarrow", "duckdb", "torch")) == ["numpy"]


def test_hub_agent_router_and_command_line_load_no_torch_no_ray_and_no_optuna():
    """All modules but those that exist for either, in one interpreter."""
    paths = [path.relative_to(SOURCE / "atoll") for path in SOURCE.rglob("*.py")]
    names = [
        ".".join(("atoll", *path.with_suffix("").parts)).removesuffix(".__init__")
        for path in paths
        if path.parts[0] not in COMPUTING and str(path) not in COMPUTING + SEARCHING
    ]
    assert {"atoll.runtime.hub", "atoll.runtime.agent", "atoll.runtime.site", "atoll.console.cli"} <= set(names)
    assert loaded_by(f"import {', '.join(names)}", ("torch", "ray", "optuna", "numpy")) == ["numpy"]
