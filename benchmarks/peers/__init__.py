"""Other frameworks, each in a virtual environment of its own in this folder, driven by a script."""

import json
import subprocess
from pathlib import Path

PEERS = {"Flower": "flower", "NVFLARE": "nvflare"}
_HERE = Path(__file__).parent
_PATIENCE = 1500.0  # seconds for one measurement; a script ends by itself before, and leaves no process


def measure(name: str, size: int, sites: int, rounds: int, home: Path) -> dict[str, object] | None:
    """Return what ``NAME_rounds.py`` says of null rounds of ``size`` bytes each way; None where the peer is not there.

    Raises `RuntimeError` with its last words where it is there and fails.
    """
    python = _HERE / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        return None
    command = [str(python), str(_HERE / f"{name}_rounds.py"), *map(str, (size, sites, rounds)), str(home / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
