"""What a hub's replicas live in: a sandbox each, in which user code finds the model, and neither keys nor a network.

A replica's door is opened outside and handed in: who asks comes in by it. It is of the hub's network, so that nothing
inside may dial at all (`atoll.runtime.undialled`).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from atoll.errors import Unavailable
from atoll.runtime import sandbox, undialled
from atoll.runtime.sandbox import Grant, Room
from atoll.spec.document import parse, read_yaml
from atoll.spec.sandbox import Limits, ReplicasFile

_log = logging.getLogger(__name__)
_FILE = "replicas.yaml"


class Cell:
    """Where one replica lives: a room or, where there is none, only its limits."""

    def __init__(self, room: Room | None, limits: Limits) -> None:
        self._room, self._limits = room, limits
        self.confined = room is not None
        self.fds: tuple[int, ...] = () if room is None else (room.pidfd,)
        self.environment: Mapping[str, str] = {} if room is None else sandbox.homeless()

    def command(self, module: str) -> list[str]:
        """Return how a module of ours is started there, by a process that inherits ``fds``."""
        return sandbox.command(module, self._room.pidfd if self._room is not None else None, self._limits, dials=False)

    def close(self) -> None:
        """End whatever is left in it."""
        if self._room is not None:
            self._room.close()


class Cells:
    """One hub's: of its ``home`` a replica sees nothing but what it is shown."""

    def __init__(self, home: Path, chosen: ReplicasFile) -> None:
        self._home, self._chosen = home, chosen
        self._told = False

    @staticmethod
    def of(home: Path) -> "Cells":
        """Return them as the hub's folder says it wants them. Raises `Invalid`."""
        path = home / "hub" / _FILE
        return Cells(home, parse(ReplicasFile, read_yaml(path), str(path)) if path.exists() else ReplicasFile())

    def __call__(self, readable: Sequence[Path]) -> Cell:
        """Make one in which these paths can be read. Raises `Unavailable`, also where none can be had and one must."""
        limits, why = self._chosen.limits, ""
        if self._chosen.sandbox != "off":
            why = sandbox.missing() or undialled.missing()
        if why and self._chosen.sandbox == "required":
            raise Unavailable(f"sandbox: {_FILE} of the hub requires one, and there is none: {why}")
        if why and not self._told:
            self._told = True
            _log.warning("sandbox: replicas run without one: %s", why)
        if why or self._chosen.sandbox == "off":
            return Cell(None, limits)
        return Cell(Room(Grant(self._home, tuple(readable), None), limits), limits)
