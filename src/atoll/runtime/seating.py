"""A group's ranks as Ray's driver has them: their room in the cluster, a seat for each, and the lines to and from it.

A rank's process may end while its seat lives: another is started there, with what the lost one mirrored. A seat may be
lost, alone or with its node: another is made in the same bundle of the placement group, which Ray moves to a node that
has room. Either is the agent's to ask for (`Group.again`), and is done beside all else.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from atoll.errors import AtollError, Unavailable
from atoll.runtime.seat import Berth, Seat
from atoll.spec.fleet import Executor

END = 8.0  # seconds that the ranks and Ray have to end once the agent is gone
_PLACED = (
    120.0  # seconds that a cluster has to find room for a group, and to bring nodes where it can; then to start it
)
_AGAIN = 30.0  # and to find it for one rank that takes another's place: the others may be waiting for it
_STEP = 0.5  # seconds between two looks at whether a group that waits for room is still wanted
_SEATS = 3  # actors that a place is given in a row, where each is gone before its worker is started
_CALLS = 10  # at once, of an actor: two for each worker, of which one may be about to leave, and a few that are short
_PIECE = 1 << 16
_WORDS = 2000  # bytes of a sentence: a pipe takes it whole


class Seated(Seat):
    """A seat that knows its node's address, which ranks on other nodes meet it at."""

    def begin(self, life: int, berth: Berth, more: Mapping[str, str], apart: bool) -> None:
        node = ray.get_runtime_context().get_node_id()
        self.start(life, berth, more, ray.util.get_node_ip_address() if apart else "", node if apart else "")


@dataclass(slots=True)
class Line:
    """A worker's three pipes, whose other ends the agent has. ``words`` tells how it ended; its end, that all is over.

    Whoever reads or writes a pipe closes it: its number can be another file's at once.
    """

    place: int
    life: int
    orders: int
    replies: int
    words: int
    seat: Any = field(init=False, default=None)
    turn: threading.Lock = field(init=False, default_factory=threading.Lock)

    def tell(self, **said: Any) -> None:
        with self.turn, contextlib.suppress(BrokenPipeError):  # nobody listens
            if self.words >= 0:
                _write(self.words, json.dumps(said).encode() + b"\n")

    def fail(self, error: Exception, hopeless: bool = False) -> None:
        self.tell(ended=" ".join(_sentence(error).split())[:_WORDS], hopeless=hopeless)

    def shut(self) -> None:
        """Close the pipes of a rank that nobody carries anything for."""
        os.close(self.orders)
        os.close(self.replies)

    def close(self) -> None:
        with self.turn:
            os.close(self.words)
            self.words = -1


class Group:
    """The ranks of one layout, in one placement group."""

    def __init__(self, asked: dict[str, Any], choice: Executor, pipes: list[tuple[int, ...]]) -> None:
        """``pipes`` are, for each rank, where orders come from, where replies go, and where it is told how it ended."""
        self._asked, self._choice = asked, choice
        self._over, self._turn, self._left = threading.Event(), threading.Lock(), False
        self._lines = [Line(place, place, *three) for place, three in enumerate(pipes)]
        self._seats: dict[int, Any] = {}  # place -> the actor that has it
        self._made: list[Any] = []  # all actors, the lost ones too
        self._carrying: list[threading.Thread] = []
        self._room: Any = None
        self.thread = thread(self._live)

    def end(self) -> None:
        """Let it end; returns at once."""
        self._over.set()

    def again(self, asked: dict[str, Any], pipes: tuple[int, ...]) -> None:
        """Have another rank at a place; returns at once. Its pipes tell when it is there, or why it is not."""
        line = Line(asked["place"], asked["life"], *pipes)
        with self._turn:
            if not self._left:
                self._lines.append(line)
                self._carrying.append(thread(self._carry, line, asked["fault"], _AGAIN))
                return
        line.shut()
        line.close()

    def computed(self, life: int) -> None:
        """Find out what a rank has computed, and tell it; returns at once."""
        thread(self._tell_computed, self._line(life))

    def kill(self, life: int) -> None:
        """End a rank by force; returns at once."""
        line = self._line(life)
        if line is not None and line.seat is not None:
            line.seat.kill.remote(life)

    def rest(self) -> None:
        """Hold no memory for a round; returns at once."""
        with self._turn:
            for seat in self._seats.values():
                seat.rest.remote()

    def _line(self, life: int) -> Line | None:
        return next((line for line in self._lines if line.life == life), None)

    def _tell_computed(self, line: Line | None) -> None:
        if line is not None and line.seat is not None:
            with contextlib.suppress(RayError):  # it is gone, or its node hangs: Ray sees to that
                line.tell(computed=ray.get(line.seat.computed.remote(line.life), timeout=_AGAIN))

    def _live(self) -> None:
        try:
            self._make_room()
        except (AtollError, RayError) as error:
            for line in self._lines:
                line.fail(error)
                line.shut()
        else:
            fault = self._asked["fault"]
            with self._turn:
                self._carrying += [
                    thread(self._carry, line, {} if line.place else fault, _PLACED) for line in self._lines
                ]
            self._over.wait()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Give the room back. The last pipes that close tell the agent that nothing is left."""
        with self._turn:
            self._left, seats = True, {line.seat for line in self._lines if line.seat is not None}
        deadline = time.monotonic() + END
        if ending := [seat.end.remote() for seat in seats]:
            ray.wait(ending, num_returns=len(ending), timeout=END)  # of one that is gone nothing is left to end
        for carrying in self._carrying:
            carrying.join(max(0.0, deadline - time.monotonic()))
        for seat in self._made:
            with contextlib.suppress(RayError):
                ray.kill(seat)
        if self._room is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(self._room)
        for line in self._lines:
            line.close()

    def _make_room(self) -> None:
        """Get room for all ranks at once, or none. Raises `Unavailable` and Ray's errors."""
        ranks, choice = len(self._lines), self._choice
        labels: dict[str, Any] = {"bundle_label_selector": [choice.labels] * ranks} if choice.labels else {}
        self._room = placement_group([self._need()] * ranks, strategy="PACK", **labels)
        deadline = time.monotonic() + _PLACED
        while not self._room.wait(_STEP):
            if self._over.is_set():
                raise Unavailable("its group was ended before the Ray cluster had room for it")
            if time.monotonic() > deadline:
                raise self._no_room(f"{ranks} ranks", " each", _PLACED)

    def _need(self) -> dict[str, float]:
        return {"CPU": self._choice.cpus, **({"GPU": self._choice.gpus} if self._choice.gpus else {})}

    def _no_room(self, ranks: str, each: str, seconds: float) -> Unavailable:
        takes = ", ".join(f"{amount:g} {name}" for name, amount in self._need().items())
        on = f" on nodes labelled {json.dumps(self._choice.labels)}" if self._choice.labels else ""
        return Unavailable(
            f"the Ray cluster had no room in {seconds:g} s for {ranks} with {takes}{each}{on}; "
            "add nodes, or ask for less in the job's layout or the site's executor"
        )

    def _carry(self, line: Line, fault: dict[str, str], seconds: float) -> None:
        """Have a rank at a line's place, and carry what it says until it ends."""
        try:
            line.seat = self._seated(line, fault, seconds)
        except (AtollError, RayError) as error:
            line.fail(error, hopeless=True)
            line.shut()
            return
        thread(self._order, line)
        self._answer(line)

    def _seated(self, line: Line, fault: dict[str, str], seconds: float) -> Any:
        """Start a worker in the seat of its place, in another one when that is gone. Raises as `_make_room` does."""
        began, berth = time.monotonic(), Berth(**self._asked["berth"], place=line.place)
        for more in reversed(range(_SEATS)):
            seat = self._seats.get(line.place) or self._seat(line.place)
            started = seat.begin.remote(line.life, berth, fault, self._choice.address != "local")
            while not ray.wait([started], timeout=_STEP)[0]:
                if self._over.is_set():
                    raise Unavailable("its group was ended before it had a seat")
                waited = time.monotonic() - began
                if waited > seconds and not self._room.wait(_STEP):
                    raise self._no_room("a rank", "", seconds)
                if waited > _PLACED:
                    raise Unavailable(f"a rank did not start in {_PLACED:g} s where the Ray cluster had room for it")
            try:
                ray.get(started)
                return seat
            except RayActorError:
                with self._turn:
                    self._seats.pop(line.place, None)
                ray.kill(seat)  # its place may be free though Ray only lost sight of it
                if not more:
                    raise
        raise AssertionError("unreachable")

    def _seat(self, place: int) -> Any:
        """Ask for an actor in a place's bundle, wherever that is by then."""
        strategy = PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=place)
        choice = self._choice
        takes: dict[str, Any] = {"num_cpus": choice.cpus, "num_gpus": choice.gpus, "max_concurrency": _CALLS}
        actor: Any = ray.remote(**takes)(Seated)
        with self._turn:
            if self._left:
                raise Unavailable("its group was ended before it had a seat")
            seat = self._seats[place] = actor.options(scheduling_strategy=strategy).remote()
            self._made.append(seat)
        return seat

    def _order(self, line: Line) -> None:
        """Carry what the agent writes to a rank, until it closes the pipe: then the group is of no more use."""
        try:
            while data := os.read(line.orders, _PIECE):
                ray.get(line.seat.write.remote(line.life, data))
        except RayActorError as error:
            line.fail(error)
            return
        except RayError as error:
            line.fail(error)
        finally:
            os.close(line.orders)
        self._over.set()

    def _answer(self, line: Line) -> None:
        """Carry what a rank says to the agent; when it has ended, say how."""
        try:
            while data := cast("bytes", ray.get(line.seat.read.remote(line.life))):
                _write(line.replies, data)
            line.tell(ended=f"a rank ended {ray.get(line.seat.how.remote(line.life))}; its log is in the site's folder")
        except RayError as error:
            line.fail(error)
            line.seat.kill.remote(line.life)  # if it lives: what it said is lost, and another may have its place
        except BrokenPipeError:
            self._over.set()  # the agent does not listen any more
        finally:
            os.close(line.replies)


def thread(work: Callable[..., None], *arguments: Any) -> threading.Thread:
    made = threading.Thread(target=work, args=arguments, daemon=True)
    made.start()
    return made


def _write(pipe: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _sentence(error: Exception) -> str:
    """Say what happened in one sentence, also for one of Ray's errors, which quote whole tracebacks."""
    cause = getattr(error, "cause", error)  # of one that was raised in an actor
    if isinstance(cause, AtollError):
        return str(cause)
    if isinstance(error, RayActorError):
        return "a rank ended with its Ray actor, which was killed or whose node went away"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"Ray: {first[:300]}; the site's ray.log has all of it"
