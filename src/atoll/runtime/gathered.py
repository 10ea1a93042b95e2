"""What a relay has of one stage: whose updates the hub asked it to sum, and which of them are here."""

import threading
from dataclasses import dataclass, field

from atoll.errors import LinkLost
from atoll.runtime.summing import Brought
from atoll.spec.event import Answer
from atoll.spec.message import Assign, Branch


@dataclass(slots=True)
class Gathered:
    """One stage of a run as its relay sees it; `news` guards all that changes."""

    assign: Assign
    branch: Branch
    closes: float  # by `time.monotonic`: then it goes on with what is here
    brought: dict[str, Brought] = field(default_factory=dict[str, Brought])  # by their names in the spool
    coming: dict[str, object] = field(default_factory=dict[str, object])  # the newest stream of each
    without: set[str] = field(default_factory=set[str])  # sites that bring nothing to this stage any more
    closed: bool = False  # the sum is being made, or was: what comes now is passed on by itself
    done: bool = False  # the sum was passed on, or there was none
    over: bool = False  # another stage began, or the run ended
    news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def place(self) -> tuple[int, int]:
        return self.assign.epoch, self.assign.position

    @property
    def sites(self) -> set[str]:
        return {site for one in self.brought.values() for site in _sites(one.answers)}

    @property
    def whole(self) -> bool:
        return self.sites | self.without >= {*self.branch.sites}

    def asks(self, answers: tuple[Answer, ...]) -> bool:
        """Tell whether the sum waits for these answers' update."""
        ours = all((one.epoch, one.position) == self.place for one in answers)
        return ours and not self.closed and _sites(answers) <= {*self.branch.sites}

    def begin(self, child: str, name: str, answers: tuple[Answer, ...]) -> object | None:
        """Return what `add` wants to know of an update that begins to come as ``name``; None where it is here already,
        and only its receipt was lost. Raises `LinkLost` where a part of it came in another way: no site counts twice.
        """
        sites, stream = _sites(answers), object()
        with self.news:
            for known, one in self.brought.items():
                here = _sites(one.answers)
                if known == name and sites <= here:
                    return None
                if sites & here:
                    raise LinkLost(f"{child}: a part of it is here already; sent again it is passed on")
            self.coming[name] = stream
        return stream

    def check(self, child: str, name: str, stream: object, answers: tuple[Answer, ...]) -> None:
        """Raise `LinkLost` where the sum cannot have an update any more, which is before it is in the spool and after:
        what is in there is to be this one."""
        with self.news:
            if self.coming.get(name) is not stream or not self.asks(answers) or self.sites & _sites(answers):
                raise LinkLost(f"{child}: the sum goes on without this; sent again it is passed on")

    def add(self, child: str, name: str, stream: object, brought: Brought) -> None:
        """Take an update that is in the spool. Raises as `check`."""
        with self.news:
            self.check(child, name, stream, brought.answers)
            self.brought[name] = brought
            self.news.notify_all()

    def leave_out(self, site: str) -> None:
        with self.news:
            self.without.add(site)
            self.news.notify_all()

    def renew(self, branch: Branch) -> set[str]:
        """Take the hub's newest word on whose updates to sum. Return who is to bring theirs anew: those that are in one
        with an update that is not to count."""
        with self.news:
            self.branch, asked, before = branch, {*branch.sites}, self.sites
            self.without -= asked
            self.brought = {name: one for name, one in self.brought.items() if _sites(one.answers) <= asked}
            self.news.notify_all()
            return (before - self.sites) & asked

    def to_sum(self) -> tuple[Branch, dict[str, Brought]]:
        """Return whose sum it is to be, and of what, in an order that is nobody's arrival."""
        with self.news:
            return self.branch, dict(sorted(self.brought.items()))

    def wait(self, seconds: float) -> None:
        """Wait for so long, or until nobody needs this stage any more."""
        with self.news:
            self.news.wait_for(lambda: self.over, seconds)

    def end(self) -> None:
        with self.news:
            self.over = self.closed = True
            self.news.notify_all()


def _sites(answers: tuple[Answer, ...]) -> set[str]:
    return {answer.site for answer in answers}
