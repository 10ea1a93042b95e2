"""A node that aggregates for others: to the sites below it a hub, to the hub a site with all of these behind it.

What passes is the sites' own: their messages go up wrapped in their names and come down so, and the hub decides all
that there is to decide. A relay keeps what its sites fetch, and makes one update of theirs where an assignment asks.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atoll.boundary.channel import Desk, FrameLike, Send, Wanted
from atoll.boundary.gate import RelayGate, probed
from atoll.boundary.identity import Identity
from atoll.errors import AtollError, Invalid, LinkLost, Unavailable, Unfit
from atoll.runtime import heap
from atoll.runtime.dialling import keep_dialling
from atoll.runtime.gathering import Gathering
from atoll.runtime.kept import RunFolder, kept_runs
from atoll.runtime.reports import shortened
from atoll.runtime.routes import Routes, maker, unwrapped, wrapped
from atoll.runtime.shelf import Shelf
from atoll.spec.fleet import Site
from atoll.spec.message import (
    Admitted,
    Assign,
    Closed,
    Failure,
    Hello,
    Message,
    Notice,
    Opened,
    Parcel,
    Refusal,
    Relayed,
    Release,
    Unusable,
    Welcome,
)

_POLL = 1.0  # seconds the relay listens before it looks whether it should stop
_RUNS = 10_000  # that a hello may name
log = logging.getLogger(__name__)


class Relay:
    """Implements `atoll.boundary.channel.Desk` for those below. ``home`` is its folder: site.yaml, runs, shelf.

    ``admitted`` is told whom the hub would have let in, ``turned_away`` whose session it does not take.
    """

    def __init__(
        self,
        site: Site,
        home: Path,
        admitted: Callable[[Admitted], None] = lambda _: None,
        turned_away: Callable[[str], None] = lambda _: None,
    ) -> None:
        heap.keep_freed()
        self._site, self._home = site, home
        self._admitted, self._turned_away = admitted, turned_away
        self._gate = RelayGate(site.name)
        self._shelf = Shelf(home / "shelf", self._gate.fetch)
        self._turn = threading.RLock()  # over who is below and which runs there are; held while they are announced
        self._below: dict[str, Send] = {}
        self._up = False  # the hub has said welcome
        self._routes = Routes()
        self._runs: dict[str, Gathering] = {}
        self._stop = threading.Event()

    # --- above

    def serve(self, address: str, proof: Callable[[], Identity], calm: Callable[[], None] = lambda: None) -> None:
        """Dial ``address`` and pass on until `stop`, as `atoll.runtime.agent.Agent.serve`. Raises `Denied`."""
        keep_dialling(self._gate, address, proof, lambda: self._session(calm), self._stop)
        self.close()

    def serve_desk(self, desk: Desk) -> None:
        """Pass on to a hub in this process until `stop`."""
        self._gate.attach(desk)
        try:
            self._session()
        finally:
            self.close()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._stop.set()
        self._up = False
        with self._turn:
            runs = list(self._runs.values())
        for run in runs:
            run.end(keep=True)
        self._gate.hang_up()

    def _session(self, calm: Callable[[], None] = lambda: None) -> None:
        try:
            while not self._stop.is_set():
                calm()
                message = self._gate.listen(_POLL)
                if message is not None:
                    self._told(message)
        except OSError as error:  # a disk of ours; whatever this message was for is told anew in the next session
            log.error("%s; mend it, everything behind this relay waits", error)
            raise LinkLost(f"the disk of this relay: {error.strerror}") from None
        finally:
            self._up = False

    def _told(self, message: Message) -> None:
        match message:
            case Welcome():
                runs = kept_runs(self._home / "runs")[:_RUNS]
                self._gate.say(Hello(site=self._site, link=self._gate.measure(), runs=runs))
                with self._turn:  # whoever comes later is announced by `opened`
                    self._up = True
                    for child in self._below:
                        self._gate.say(Relayed(site=child, message=Opened()))
            case Admitted():
                self._admitted(message)
            case Relayed():
                self._pass_down(message)
            case Release():
                self._release(message.run)
            case Notice():
                log.error("the hub says: %s", message.words)
            case _:
                log.warning("a message of kind %s is not for a relay", message.kind)

    def _pass_down(self, message: Relayed) -> None:
        child, (way, said) = message.site, unwrapped(message)
        if isinstance(message.message, Closed):
            log.info("%s: %s", child, message.message.words)
            self._turned_away(child)
            return
        if isinstance(said, Assign):
            self._assigned(way, said)
        elif isinstance(said, Release) and self._routes.forget(said.run, way[-1]):
            self._shelf.release(said.run)
        with self._turn:
            send = self._below.get(child)
        if send is not None:
            with suppress(LinkLost):  # the hub hears of its end, and says it again when it is back
                send(message.message)

    def _assigned(self, way: tuple[str, ...], assign: Assign) -> None:
        self._routes.note(way, assign)
        with self._turn:
            run = self._runs.get(assign.run)
            if run is None and any(one.relay == self._site.name for one in assign.branches):
                folder = self._home / "runs" / assign.run
                run = Gathering(self._site.name, folder, self._gate.send, self._again, self._broken)
                self._runs[assign.run] = run
        if run is not None:
            run.assigned(assign)

    def _release(self, run: str) -> None:
        """The run is over. One that this process has not worked on has a folder only to be dropped."""
        self._routes.forget(run)
        self._shelf.release(run)
        with self._turn:
            gathering = self._runs.pop(run, None)
        if gathering is not None:
            gathering.end(keep=False)
        elif run in kept_runs(self._home / "runs"):
            RunFolder(self._home / "runs" / run).remove()

    def _again(self, sites: set[str]) -> None:
        """Have the hub ask these sites once more, by telling it that they began another session."""
        with self._turn:
            for child in self._routes.children(sites) & self._below.keys():
                self._say(child, Closed(words="the relay could not pass its update on"))
                self._say(child, Opened())

    def _broken(self, assign: Assign, error: Exception) -> None:
        """Tell the hub that no sum can be made here: it would wait for one in vain."""
        known = isinstance(error, AtollError)
        words = f"{self._site.name}: {error if known else f'fault in the relay ({type(error).__name__}); see its log'}"
        kind = type(error).__name__ if known else "AtollError"
        with suppress(LinkLost):  # then all are lost to the hub, and assigned again
            self._gate.say(Failure(run=assign.run, position=assign.position, words=shortened(words), error=kind))

    def _say(self, child: str, message: Message) -> None:
        with suppress(LinkLost):  # at the next welcome all who are below are announced
            self._gate.say(Relayed(site=child, message=message))

    # --- below

    def admits(self, site: str, secret: str) -> bool:
        """Nobody is started by a relay."""
        return False

    def opened(self, site: str, send: Send) -> None:
        with self._turn:
            self._below[site] = send
            if self._up:
                self._say(site, Opened())

    def closed(self, site: str, send: Send, words: str) -> None:
        with self._turn:
            if self._below.get(site) == send:
                del self._below[site]
                self._say(site, Closed(words=shortened(words)))

    def heard(self, site: str, message: Message) -> None:
        way, said = unwrapped(onward := Relayed(site=site, message=message))
        if isinstance(said, Refusal | Failure) and self._routes.goes(way, said.run):  # else it is not its own to say
            run = self._runs.get(said.run)
            if run is not None:
                run.without(way[-1], said.position if isinstance(said, Failure) else None)
        self._gate.say(onward)

    def take(self, site: str, parcel: Parcel, frames: Wanted) -> None:
        """Take an update for a sum; or pass it on as it is, and then the receipt is the hub's own."""
        answers = parcel.answers or ((parcel.answer,) if parcel.answer is not None else ())
        if not answers:
            raise Invalid(f"{site}: a parcel that is brought is an update with its answer; this is {parcel.purpose!r}")
        run, way = self._runs.get(parcel.run), (site,)
        try:
            self._routes.check(site, parcel, answers)
            way = self._routes.up_to(parcel.run, answers[0].site, maker(answers))
            with self._room():
                taken = run is not None and run.take(site, parcel, answers, frames)
        except Unfit as error:
            if run is not None:
                run.without(way[-1])
            place = {"run": parcel.run, "position": answers[0].position, "epoch": answers[0].epoch}
            unusable = Unusable.model_validate({**place, "words": shortened(str(error))})
            self._gate.say(wrapped(way, unusable))  # before the site hears of it
            raise
        if not taken:
            self._gate.send(parcel, frames)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Where our disk has no room, whoever sends or fetches tries again as after a lost link: nothing fails."""
        try:
            yield
        except LinkLost:
            raise
        except (Unavailable, OSError) as error:
            log.error("%s; those behind this relay wait until it is mended", error)
            raise LinkLost(f"{self._site.name}: cannot store anything now; try again") from None

    def give(self, site: str, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]:
        if parcel.purpose == "probe":
            return probed(parcel)
        named = parcel.site or site
        signature = self._routes.assigned(site, parcel.run, named).signature
        with self._room():
            header, frames = self._shelf.give(named, parcel.model_copy(update={"held": False}), signature)
        return header, iter(()) if parcel.held else frames
