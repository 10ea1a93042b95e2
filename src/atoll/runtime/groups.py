"""Worker groups that stay warm between runs of the same code, so that a short run does not pay for importing torch."""

import threading
from pathlib import Path

from atoll.runtime.executor import Executor, Group
from atoll.runtime.sandbox import Grant
from atoll.spec.plan import Layout


class Groups:
    """At most one idle group, and only for the very code, layout and user it was started for.

    One in a sandbox is of one run, and is not kept: what that run was granted is all that is in there.
    """

    def __init__(self, executor: Executor, folder: Path) -> None:
        self._executor, self._folder = executor, folder
        self._turn = threading.Lock()
        self._idle: tuple[str, Group] | None = None
        self._closed = False

    def warm(self) -> None:
        """Begin what a first group would wait for; returns at once."""
        self._executor.warm()

    @property
    def confined(self) -> bool:
        """Whether groups live in sandboxes."""
        return self._executor.confined

    @property
    def refuses(self) -> str:
        """Why no worker may be started here, or ""."""
        return self._executor.refuses

    def take(self, key: str, layout: Layout, grant: Grant | None = None) -> Group:
        """Return the idle group of this key, or start one with this grant."""
        with self._turn:
            idle, self._idle = self._idle, None
        if idle is not None and idle[0] == key:
            return idle[1]
        if idle is not None:
            idle[1].close()
        return self._executor.start(layout, self._folder, grant)

    def give_back(self, key: str, group: Group) -> Group | None:
        """Keep a group that has nothing to do for the next run of its key. Returns at once.

        The return value is the group kept before, or this one after `close`: the caller has to end it.
        """
        with self._turn:
            if self._closed or self._executor.confined:
                return group
            previous, self._idle = self._idle, (key, group)
            group.rest()
        return previous[1] if previous is not None else None

    def close(self) -> None:
        with self._turn:
            self._closed = True
            idle, self._idle = self._idle, None
        if idle is not None:
            idle[1].close()
        self._executor.close()
