"""What sites bring: taken and journalled, or refused in words and journalled, so that the run goes on by its rule.

All of it comes from another party, and is held to the hub's own state of the run. Nothing in here ends a run: what
cannot be taken is an event like any other (`atoll.runtime.machine`), and so are three of them (`quarantine`).
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from atoll.boundary.channel import Wanted
from atoll.errors import Denied, Invalid, LinkLost, NotFound, Unfit
from atoll.outer.wire import encoded_bytes
from atoll.runtime.border import Border
from atoll.runtime.brought import Watched, checked, expected, kinds, out_of_turn, smallest
from atoll.runtime.conductor import Conductor
from atoll.runtime.files import Folders
from atoll.runtime.presence import Presence
from atoll.runtime.quarantine import Quarantine
from atoll.runtime.reports import shortened
from atoll.runtime.state import State, expects, unexpected
from atoll.spec.event import Answer, Answered, Refused, Rejected
from atoll.spec.message import Done, Notice, Parcel
from atoll.spec.policy import CrossingKind
from atoll.spec.run import SiteProgress

log = logging.getLogger(__name__)


class Intake:
    """Every method may be called from any thread. ``room`` is where a run's files are written: a full disk is told in
    it as a lost link, so that the site tries again."""

    def __init__(
        self,
        conductor: Conductor,
        folders: Folders,
        border: Border,
        presence: Presence,
        quarantine: Quarantine,
        room: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._conductor, self._folders, self._border = conductor, folders, border
        self._presence, self._quarantine, self._room = presence, quarantine, room

    def said(self, site: str, message: Done) -> None:
        """Take an answer without tensors. What is not taken the site is told in a notice."""
        answer, run = message.answer, message.run
        state = self._state(site, run, answer)
        if not state.over and run not in self._conductor.here:
            log.info("%s answers for run %s, which waits to be resumed", site, run)
        elif answer.profile is not None or self._quarantine.words(site):
            log.info("%s: an answer to a probe that is over, or one from quarantine, in run %s", site, run)
        else:
            try:
                self._said(state, answer, len(message.model_dump_json()))
            except Denied as error:  # by the hub's own rules: the run ends in their words, and the session goes on
                self._conductor.post(Refused(run=run, site=site, words=str(error)), actor=site)
            except Invalid as error:  # a site that told it by a stream would hear of it there
                rejected = self._rejected(state, answer, str(error))
                self._conductor.post(rejected)
                self._presence.send(site, Notice(words=shortened(f"run {run}: not taken: {rejected.words}")))

    def _said(self, state: State, answer: Answer, size: int) -> None:
        """Take an answer without tensors, of so many bytes. Raises as `_wanted` does, and for wrong numbers in it."""
        run, site = state.run, answer.site
        if not self._wanted(state, answer):
            return
        if state.work in ("initialise", "train"):
            raise Invalid(f"{site}: an answer without tensors to stage '{state.work}', which has some; send them")
        checked(state, answer, self._presence.known(site))
        kind: CrossingKind = "query" if state.work in ("measure", "query") else "metric"
        crossed = self._border.decided(state, site, kind, "out", size, rows=smallest(answer))
        if self._border.first(run, answer):
            self._note(run, site, "answered")
            self._conductor.post(crossed, Answered(run=run, answer=answer), actor=site)

    def take(self, site: str, parcel: Parcel, frames: Wanted) -> None:
        """Take an update, as `atoll.boundary.channel.Desk.take`. Raises `Unfit` for one that cannot be taken."""
        if parcel.purpose != "update" or parcel.answer is None:
            raise Invalid(f"{site}: a parcel that is brought is an update with its answer; this is {parcel.purpose!r}")
        answer, run = parcel.answer, parcel.run
        state = self._state(site, run, answer)
        if not state.over and run not in self._conductor.here:
            raise LinkLost(f"{site}: run {run} waits to be resumed; its next assignment asks for this again")
        if quarantined := self._quarantine.words(site):
            raise Unfit(quarantined)
        try:
            # What is not wanted was sent again because its receipt was lost, or for a round that went on without it. A
            # receipt tells the site that nobody waits for it.
            if self._wanted(state, answer):
                self._receive(state, parcel, answer, frames)
        except Invalid as error:
            rejected = self._rejected(state, answer, str(error))
            with self._room(run):
                self._conductor.record(rejected)  # before the site hears of it
            raise Unfit(rejected.words) from None

    def _receive(self, state: State, parcel: Parcel, answer: Answer, frames: Wanted) -> None:
        """Take an update that is waited for. Raises `Invalid` in words that name site, tensor and reason."""
        run, site = state.run, answer.site
        wire, size = expected(state, answer, parcel)
        checked(state, answer, self._presence.known(site))
        most = encoded_bytes(size, wire)
        kind: CrossingKind = "model" if state.work == "initialise" else "update"
        # Before the first byte is taken: what is compressed may turn out smaller, and is journalled as what it was.
        crossed = self._border.decided(state, site, kind, "out", most, wire=kinds(wire))
        signature = answer.signature if state.work == "initialise" else state.signature
        watched = Watched(frames, site, signature, plain=set(kinds(wire)) <= {"clip"})
        with self._room(run):
            spool = self._folders.of(run).spool
            try:
                digest, count = spool.receive((answer.position, site), watched, wire, size, parcel.content)
            except Invalid as error:
                raise Invalid(watched.told(error)) from None
            brought = crossed.crossing.model_copy(update={"digest": digest, "bytes": count})
            crossed = crossed.model_copy(update={"crossing": brought})
            answer = answer.model_copy(update={"update": digest, "bytes": count})
            with self._border.turn(site):
                # The stream that broke may have been whole, and both are here: only the first of them counts.
                counts = expects(self._conductor.states[run], answer)
                if counts:
                    self._note(run, site, "answered")
                    # Returning is the receipt, so the answer is durable first.
                    self._conductor.record(crossed, Answered(run=run, answer=answer), actor=site)
        if not counts:
            self._wanted(self._conductor.states[run], answer)  # in words, why it is not any more

    def _wanted(self, state: State, answer: Answer) -> bool:
        """Tell whether a run waits for an answer; one that comes too late is journalled, the first time.

        Raises `Invalid` for one that no assignment can have asked for.
        """
        if expects(state, answer):
            return True
        match unexpected(state, answer):
            case "wrong":
                raise Invalid(out_of_turn(state, answer, "was never asked for"))
            case "late" if self._border.late(state.run, answer):
                words = out_of_turn(state, answer, "came too late")
                self._conductor.post(self._rejected(state, answer, words, late=True))
            case _:  # its receipt was lost, or it is of a site that has no part in the run
                log.info("%s", out_of_turn(state, answer, "is not waited for"))
        return False

    def _rejected(self, state: State, answer: Answer, words: str, late: bool = False) -> Rejected:
        """Return what to journal of an answer that is not taken."""
        log.info("run %s: not taken: %s", state.run, words)
        if not late:
            self._note(state.run, answer.site, "rejected")
        place = {"run": state.run, "site": answer.site, "position": answer.position, "epoch": answer.epoch}
        return Rejected.model_validate({**place, "words": shortened(words), "late": late})

    def _state(self, site: str, run: str, answer: Answer) -> State:
        state = self._conductor.states.get(run)
        if state is None:
            raise NotFound(f"{site}: there is no run {run!r}")
        if answer.site != site:
            raise Denied(f"{site}: answers for {answer.site!r}; a site speaks for itself only")
        return state

    def _note(self, run: str, site: str, state: str) -> None:
        self._presence.note(run, site, SiteProgress(connected=True, state=state))
