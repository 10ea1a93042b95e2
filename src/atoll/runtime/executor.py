"""The seam that starts the ranks of a layout and reports what becomes of them: `local` and `actors` are its forms."""

from pathlib import Path
from typing import Protocol

from atoll.runtime.member import OnStep
from atoll.runtime.sandbox import Grant
from atoll.spec.order import Order, Reply
from atoll.spec.plan import Layout


class Group(Protocol):
    """The ranks of one layout, alive and waiting for orders."""

    def order(self, order: Order, timeout: float, on_step: OnStep | None = None) -> Reply:
        """Give every rank the order and return rank 0's reply.

        Raises `TaskFailed` in the words of the rank that failed, and `Unavailable` when a rank died or fell silent and
        the others could not go on, with or without another in its place, as they do while they train.
        The group is unusable after the latter, and after the former when it has several ranks. Never waits longer than
        ``timeout`` seconds, whatever the ranks do. A `Train` order with a checkpoint may then go to another
        group, which goes on where this one stood.
        """
        ...

    @property
    def whole(self) -> bool:
        """Whether none of its ranks is lost: one that is not takes no other order than the one under way."""
        ...

    def rest(self) -> None:
        """Hold no more than who waits for another run has to."""
        ...

    def close(self) -> None:
        """End every rank, also from another thread than the one at an order; returns when they are gone."""
        ...


class Executor(Protocol):
    confined: bool  # whether its groups live in sandboxes
    refuses: str  # why it must not be asked for any; "" where it may

    def warm(self) -> None:
        """Begin what a first group would wait for; returns at once. Nobody has to ask for it."""
        ...

    def start(self, layout: Layout, folder: Path, grant: Grant | None = None) -> Group:
        """Start a layout's ranks with ``folder`` for their logs. Returns before they are ready for work.

        Where they are ``confined`` the ``grant`` is all that they see.
        """
        ...

    def close(self) -> None:
        """End what it holds besides its groups, which are closed before."""
        ...
