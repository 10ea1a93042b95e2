"""The hub's side of every session: who is there, what they say, what they bring and what they fetch.

Everything here comes from another party. A site is known by its secret, may speak only for itself, and may bring only
what its run is waiting for.
"""

import hmac
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from atoll.boundary.channel import HEARTBEAT, Frame, FrameLike, Send
from atoll.boundary.gate import Gate
from atoll.errors import AtollError, Denied, Invalid, LinkLost, NotFound, Unavailable, named
from atoll.outer.wire import encode, encoded_bytes
from atoll.registry.blobs import Blobs
from atoll.runtime.brought import expected, late, own, smallest
from atoll.runtime.conductor import Conductor
from atoll.runtime.files import RunFiles
from atoll.runtime.machine import State, expects
from atoll.spec.document import sha256
from atoll.spec.event import Answer, Answered, Broken, Connected, Crossed, Disconnected, Joined, Lost, Refused
from atoll.spec.fleet import Fleet, Link, Site
from atoll.spec.message import Ask, Decisions, Done, Failure, Hello, Message, Parcel, Progress, Refusal, Welcome
from atoll.spec.model import Signature
from atoll.spec.policy import Crossing, CrossingKind, Decision, Request
from atoll.spec.run import SiteProgress

_PROBE_LIMIT = 8 << 20  # bytes that a link probe may ask for
_PIECE = 1 << 20
log = logging.getLogger(__name__)


class Desk:
    """Implements `atoll.boundary.channel.Desk` for one hub."""

    def __init__(self, gate: Gate, conductor: Conductor, blobs: Blobs, files: Callable[[str], RunFiles]) -> None:
        self._gate, self._conductor, self._blobs, self._files = gate, conductor, blobs, files
        self._turn = threading.Lock()
        self._sessions: dict[str, Send] = {}
        self._present: dict[str, tuple[Site, Link]] = {}
        self._known: dict[str, tuple[Site, Link]] = {}  # also who has just left: its last words are still judged
        self._secrets: dict[str, str] = {}  # site -> digest of its secret
        self._asked: dict[tuple[int, str], Future[tuple[Decision, ...]]] = {}
        self._probes: dict[tuple[str, str], tuple[Future[Answer], str | None]] = {}
        self._number = 0
        self.progress: dict[str, dict[str, SiteProgress]] = {}
        # Set by the hub: (site, token, digest of the secret).
        self.enrolled: Callable[[str, str, str], object] = _closed
        self.changed: Callable[[str], None] = lambda run: None

    # --- who may come in ----------------------------------------------------------------------------------------

    def trust(self, site: str, secret_digest: str) -> None:
        """Admit a site by the digest of its secret."""
        self._secrets[site] = secret_digest

    def admits(self, site: str, secret: str) -> bool:
        known = self._secrets.get(site)
        return known is not None and hmac.compare_digest(known, sha256(secret.encode()))

    def enrol(self, site: str, token: str, secret: str) -> None:
        if len(secret) < 32:
            raise Denied(f"site {site!r}: its secret has {len(secret)} characters; make one of at least 32")
        digest = sha256(secret.encode())
        self.enrolled(site, token, digest)
        self.trust(site, digest)

    # --- sessions -----------------------------------------------------------------------------------------------

    def opened(self, site: str, send: Send) -> None:
        with self._turn:
            if site in self._sessions:  # not known to be dead yet: its work is given to this one
                self._present.pop(site, None)
            self._sessions[site] = send
        send(Welcome(heartbeat=HEARTBEAT))

    def closed(self, site: str, send: Send, words: str) -> None:
        with self._turn:
            if self._sessions.get(site) != send:
                return  # a newer session took its place
            del self._sessions[site]
            known = self._present.pop(site, None)
        self.abandon(f"{site}: left ({words}); try again once it is back", site=site)
        if known is None or self._conductor.closing:
            return
        lost = [Lost(run=state.run, site=site) for state in self._active(site)]
        for event in lost:
            self._note(event.run, site, connected=False, state="lost")
        self._conductor.post(Disconnected(site=site, words=words), *lost, actor=site)

    def fleet(self) -> Fleet:
        with self._turn:
            present = [self._present[name] for name in sorted(self._present)]
        return Fleet(sites=tuple(site for site, _ in present), links=tuple(link for _, link in present))

    def here(self, site: str) -> bool:
        return site in self._present

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._present))

    def send(self, site: str, message: Message) -> None:
        """Push a message; a site that is gone gets it again when it comes back, so a lost link is not an error."""
        send = self._sessions.get(site)
        if send is not None:
            try:
                send(message)
            except LinkLost:
                log.info("%s went away before a %s reached it", site, message.kind)

    def heard(self, site: str, message: Message) -> None:  # noqa: C901 - one arm for each message
        match message:
            case Hello():
                self._hello(site, message)
            case Decisions():
                waiting = self._asked.pop((message.number, site), None)
                if waiting is not None:
                    waiting.set_result(tuple(own(site, decision) for decision in message.decisions))
            case Progress():
                if self._takes_part(site, message.run):
                    self._note(message.run, site, True, message.state, message.step, message.steps)
            case Done():
                self._done(site, message)
            case Refusal():
                if not self._fail_probe(message.run, site, Denied(message.words)):
                    self._told(site, Refused(run=message.run, site=site, words=message.words))
            case Failure():
                if not self._fail_probe(message.run, site, named(message.error, message.words)):
                    self._told(site, Broken(run=message.run, site=site, words=message.words, error=message.error))
            case _:
                raise Invalid(f"{site}: a message of kind {message.kind!r} is the hub's to send, not a site's")

    def _takes_part(self, site: str, run: str) -> bool:
        state = self._conductor.states.get(run)
        return state is not None and (site in _sites(state) or state.phase == "planning")

    def _told(self, site: str, event: Refused | Broken) -> None:
        """Take a site's word on a run that it has a part in; on another it has no say."""
        if self._takes_part(site, event.run) and event.run in self._conductor.here:
            self._conductor.post(event, actor=site)
        else:
            log.warning("%s speaks of run %s, in which it has no part", site, event.run)

    def _hello(self, site: str, message: Hello) -> None:
        if message.site.name != site:
            raise Denied(f"{site}: says it is {message.site.name!r}; a site speaks for itself only")
        link = message.link and message.link.model_copy(update={"site": site})
        link = link or self._present.get(site, (message.site, Link(site=site)))[1]
        new = site not in self._present
        self._present[site] = self._known[site] = (message.site, link)
        joined = [Joined(run=state.run, site=site) for state in self._active(site)] if new else []
        for event in joined:
            self._note(event.run, site, connected=True, state="waiting")
        self._conductor.post(Connected(site=message.site, link=link), *joined, actor=site)

    def rejoin(self, run: str) -> None:
        """Tell a run that goes on which of its sites are here already."""
        state = self._conductor.states[run]
        self._conductor.post(*(Joined(run=run, site=site) for site in _sites(state) if self.here(site)))

    def _active(self, site: str) -> list[State]:
        """Return the runs under way here that this site has a part in; one left by another hub waits for `resume`."""
        states = [self._conductor.states[run] for run in list(self._conductor.here)]
        return [state for state in states if state.phase == "running" and site in _sites(state)]

    def _note(self, run: str, site: str, connected: bool, state: str, step: int = 0, steps: int = 0) -> None:
        self.progress.setdefault(run, {})[site] = SiteProgress(
            connected=connected, state=state[:40], step=step, steps=steps
        )
        self.changed(run)

    # --- questions and probes -----------------------------------------------------------------------------------

    def ask(self, site: str, requests: tuple[Request, ...], timeout: float) -> tuple[Decision, ...]:
        """Put questions to a site's policy. Raises `Unavailable` when no answer comes in time."""
        future: Future[tuple[Decision, ...]] = Future()
        with self._turn:
            self._number += 1
            key = (self._number, site)
            self._asked[key] = future
        self.send(site, Ask(number=key[0], requests=requests))
        try:
            return future.result(timeout)
        except TimeoutError:
            raise Unavailable(f"{site}: its policy did not answer in {timeout:g} s; look at that site") from None
        finally:
            self._asked.pop(key, None)

    def expect_probe(self, run: str, site: str, code: str | None) -> "Future[Answer]":
        """Return where the answer to a probe of this run will be; until then the site may fetch ``code``."""
        future: Future[Answer] = Future()
        self._probes[run, site] = (future, code)
        return future

    def abandon(self, words: str, run: str | None = None, site: str | None = None) -> None:
        """Let nobody wait any longer for what this run, this site, or with neither anybody, was asked."""
        probes = [key for key in list(self._probes) if run in (None, key[0]) and site in (None, key[1])]
        asked = [key for key in list(self._asked) if run is None and site in (None, key[1])]
        gone = [self._probes.pop(key, (None, None))[0] for key in probes]
        futures = gone + [self._asked.pop(key, None) for key in asked]
        for future in futures:
            if future is not None and not future.done():
                future.set_exception(Unavailable(words))

    def _fail_probe(self, run: str, site: str, error: AtollError) -> bool:
        future, _ = self._probes.pop((run, site), (None, None))
        if future is not None:
            future.set_exception(error)
        return future is not None

    # --- what sites bring ---------------------------------------------------------------------------------------

    def _done(self, site: str, message: Done) -> None:
        answer = message.answer
        if answer.site != site:
            raise Denied(f"{site}: answers for {answer.site!r}; a site speaks for itself only")
        probe, _ = self._probes.pop((message.run, site), (None, None))
        if probe is not None:
            probe.set_result(answer)
            return
        state = self._state(site, message.run, answer)
        if message.run not in self._conductor.here:
            log.info("%s answers for run %s, which waits to be resumed", site, message.run)
            return
        if answer.profile is not None or state.work in ("initialise", "train"):
            log.info("%s: sent a probe's answer or no tensors where stage '%s' has others", site, state.work)
            return
        if not expects(state, answer):
            log.info("%s", late(state, answer))
            return
        kind: CrossingKind = "query" if state.work in ("measure", "query") else "metric"
        size = len(message.model_dump_json())
        try:
            crossing = self._decided(state, site, kind, "out", size, rows=smallest(answer))
        except Denied as error:  # by the hub's own rules: the run ends in their words, and the session goes on
            self._conductor.post(Refused(run=message.run, site=site, words=str(error)), actor=site)
            return
        self._note(message.run, site, True, "answered")
        self._conductor.post(crossing, Answered(run=message.run, answer=answer), actor=site)

    def _state(self, site: str, run: str, answer: Answer) -> State:
        state = self._conductor.states.get(run)
        if state is None:
            raise NotFound(f"{site}: there is no run {run!r}")
        if answer.site != site:
            raise Denied(f"{site}: answers for {answer.site!r}; a site speaks for itself only")
        return state

    def take(self, site: str, parcel: Parcel, frames: Iterator[FrameLike]) -> None:
        if parcel.purpose != "update" or parcel.answer is None:
            raise Invalid(f"{site}: a parcel that is brought is an update with its answer; this is {parcel.purpose!r}")
        answer = parcel.answer
        state = self._state(site, parcel.run, answer)
        if parcel.run not in self._conductor.here:
            raise LinkLost(f"{site}: run {parcel.run} waits to be resumed; its next assignment asks for this again")
        if not expects(state, answer):
            # Sent again because its receipt was lost, or for a round that went on without it. A receipt tells the site
            # that nobody waits for it; an error would fail the run.
            log.info("%s", late(state, answer))
            return
        wire, size = expected(state, answer, parcel)
        files = self._files(parcel.run)
        count = encoded_bytes(size, wire)
        kind: CrossingKind = "model" if state.work == "initialise" else "update"
        crossed = self._decided(state, site, kind, "out", count, wire=wire)  # before the first byte is taken
        with self._room(parcel.run):
            digest = files.spool.receive((answer.position, site), frames, wire, size)
            crossed = crossed.model_copy(update={"crossing": crossed.crossing.model_copy(update={"digest": digest})})
            answer = answer.model_copy(update={"update": digest, "bytes": count})
            self._note(parcel.run, site, True, "answered")
            # Returning is the receipt, so the answer is durable first.
            self._conductor.record(crossed, Answered(run=parcel.run, answer=answer), actor=site)

    @contextmanager
    def _room(self, run: str) -> Iterator[None]:
        """Where our disk has no room, the run shows it and the site tries again as after a lost link: nothing fails."""
        try:
            yield
        except Unavailable as error:
            if not isinstance(error, LinkLost):
                self._conductor.trouble = str(error)
                self.changed(run)
            raise LinkLost(str(error)) from None

    # --- what sites fetch ---------------------------------------------------------------------------------------

    def give(self, site: str, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]:
        if parcel.purpose == "probe":
            size = min(parcel.size, _PROBE_LIMIT)
            return parcel, (Frame(start, 0, bytes(min(_PIECE, size - start))) for start in range(0, size, _PIECE))
        if parcel.digest is None:
            raise Invalid(f"{site}: what is fetched is named by its digest; give one")
        state = self._conductor.states.get(parcel.run)
        with self._room(parcel.run):
            if parcel.purpose == "code":
                return self._code(site, parcel, state)
            if state is None or site not in _sites(state) or state.over:
                raise Denied(f"{site}: has no part in run {parcel.run!r}, so its weights are not given out to it")
            return self._weights(site, parcel, state)

    def _code(self, site: str, parcel: Parcel, state: State | None) -> tuple[Parcel, Iterator[FrameLike]]:
        assert parcel.digest is not None
        _, probed = self._probes.get((parcel.run, site), (None, None))
        given = state.code if state is not None and site in _sites(state) else None
        if parcel.digest not in (probed, given):
            raise Denied(f"{site}: code {parcel.digest[:19]}... belongs to no work that it was given")
        data = self._blobs.get(parcel.digest)
        if state is not None:
            crossing = self._decided(state, site, "code", "in", len(data), digest=parcel.digest)
            self._conductor.record(crossing)
        header = parcel.model_copy(update={"size": len(data)})
        return header, (Frame(at, 0, data[at : at + _PIECE]) for at in range(0, len(data), _PIECE))

    def _weights(self, site: str, parcel: Parcel, state: State) -> tuple[Parcel, Iterator[FrameLike]]:
        assert parcel.digest is not None
        files = self._files(parcel.run)
        weights, signature = self.model_of(state)
        if parcel.digest != weights:
            if state.plan is not None and state.plan.sync.wait.kind == "buffer":
                # The version it was given is old already, and a buffer sends it no other by itself.
                self._conductor.post(Joined(run=state.run, site=site), actor=site)
            raise LinkLost(f"{site}: weights {parcel.digest[:19]}... are old; its next assignment names others")
        vector = files.vector(weights, signature, files.get if state.weights else self._blobs.get)
        crossing = self._decided(state, site, "model", "in", vector.nbytes, digest=weights)
        self._conductor.record(crossing)
        return parcel.model_copy(update={"size": len(vector)}), encode(vector, ())

    model_of: Callable[[State], tuple[str, Signature]]  # set by the hub: weights and signature a stage works with

    # --- the hub's own record of crossings ----------------------------------------------------------------------

    def _decided(
        self, state: State, site: str, kind: CrossingKind, direction: str, size: int, **more: object
    ) -> Crossed:
        """Put a crossing to the hub's rules; raise `Denied`, journalled, or return the event to journal."""
        known = self._known.get(site)
        job = state.job
        name = job.dataset if job.kind == "query" else job.data.dataset
        crossing = Crossing.model_validate(
            {
                "kind": kind,
                "direction": direction,
                "site": site,
                "run": state.run,
                "round": state.version if state.work == "train" else None,
                "dataset": name,
                "purpose": job.purpose,
                "bytes": size,
                **more,
            }
        )
        request = Request(
            action="cross",
            user=state.user,
            site=site,
            owner=known[0].owner if known else "",
            region=known[0].region if known else "",
            dataset=known[0].dataset(name) if known else None,
            job=job.name,
            job_kind=job.kind,
            purpose=job.purpose,
            code=state.code or "",
            crossing=crossing,
        )
        crossing, decision = self._gate.judge(request)
        event = Crossed(crossing=crossing, decision=decision)
        if not decision.allowed:
            self._conductor.record(event)
            raise Denied(str(decision))
        return event


def _sites(state: State) -> tuple[str, ...]:
    if state.plan is None:
        return ()
    return tuple(dict.fromkeys((*state.plan.sites, *state.plan.evaluators)))


def _closed(site: str, token: str, secret: str) -> None:
    raise Denied(f"site {site!r}: this hub takes no tokens")
