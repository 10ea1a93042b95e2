"""Atoll: one distributed AI system over machines of different owners.  Job -> Plan -> Run -> Model -> Deployment.

The names below are loaded when first used, so that `import atoll` brings neither torch nor a network stack.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ArraysTask": "atoll.spec.task",
    "AtollError": "atoll.errors",
    "Budget": "atoll.spec.task",
    "Fitted": "atoll.spec.task",
    "Mean": "atoll.spec.task",
    "Rows": "atoll.spec.task",
    "Scores": "atoll.spec.task",
    "Task": "atoll.spec.task",
    "TrainJob": "atoll.spec.job",
    "Sync": "atoll.spec.sync",
    "connect": "atoll.console.client",
}
__all__ = [
    "ArraysTask",
    "AtollError",
    "Budget",
    "Fitted",
    "Mean",
    "Rows",
    "Scores",
    "Sync",
    "Task",
    "TrainJob",
    "connect",
]

if TYPE_CHECKING:
    from atoll.console.client import connect
    from atoll.errors import AtollError
    from atoll.spec.job import TrainJob
    from atoll.spec.sync import Sync
    from atoll.spec.task import ArraysTask, Budget, Fitted, Mean, Rows, Scores, Task


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'atoll' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
