"""What sites bring: taken and journalled, or refused in words and journalled, so that the run goes on by its rule.

All of it comes from another party, and is held to the hub's own state of the run. Nothing in here ends a run: what
cannot be taken is an event like any other (`atoll.runtime.machine`), and so are three of them (`quarantine`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

from atoll.boundary.channel import FrameLike, Wanted
from atoll.errors import Denied, Invalid, LinkLost, NotFound, Unfit
from atoll.outer.wire import encoded_bytes
from atoll.runtime import faults
from atoll.runtime.border import Border
from atoll.runtime.branches import has_sum, summable
from atoll.runtime.brought import Watched, checked, expected, kinds, out_of_turn, smallest, span
from atoll.runtime.conductor import Conductor
from atoll.runtime.files import Folders
from atoll.runtime.presence import Presence
from atoll.runtime.quarantine import Quarantine
from atoll.runtime.reports import shortened
from atoll.runtime.state import State, expects, spooled, unexpected
from atoll.spec.event import Answer, Answered, Crossed, Refused, Rejected
from atoll.spec.message import Done, Notice, Parcel, Unusable
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
            except LinkLost as error:
                log.info("%s", error)
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
        _check_single(answer)
        if state.work in ("initialise", "train"):
            raise Invalid(f"{site}: an answer without tensors to stage '{state.work}', which has some; send them")
        checked(state, answer, self._presence.known(site))
        kind: CrossingKind = "query" if state.work in ("measure", "query") else "metric"
        crossed = self._border.decided(state, site, kind, "out", size, rows=smallest(answer))
        if self._border.first(run, answer):
            self._note(run, site, "answered")
            self._conductor.post(crossed, Answered(run=run, answer=answer), actor=site)

    def take(self, site: str, parcel: Parcel, frames: Wanted) -> None:
        """Take an update, as `atoll.boundary.channel.Desk.take`; a relay's is of several sites, which all answer with
        it or none. Raises `Unfit`, journalled, for one that cannot be taken, `Denied` for a relay's sum that is to be
        made anew, `LinkLost` where nothing is wrong with it and it may come again."""
        answers = parcel.answers or ((parcel.answer,) if parcel.answer is not None else ())
        if parcel.purpose != "update" or not answers or (parcel.answers and parcel.answer is not None):
            raise Invalid(f"{site}: a parcel that is brought is an update with its answer; this is {parcel.purpose!r}")
        run = parcel.run
        state = self._state(site if parcel.answer is not None else answers[0].site, run, answers[0])
        if not state.over and run not in self._conductor.here:
            raise LinkLost(f"{site}: run {run} waits to be resumed; its next assignment asks for this again")
        self._check_quarantine(state, site, answers)
        try:
            # What is not wanted was sent again because its receipt was lost, or for a round that went on without it. A
            # receipt tells the site that nobody waits for it.
            if self._all_wanted(state, site, answers):
                try:
                    self._receive(state, parcel, site, answers, frames)
                except LinkLost:  # as often as not because nobody waits for it any more
                    if self._all_wanted(self._conductor.states[run], site, answers):
                        raise
        except Invalid as error:
            rejected = self._rejected(state, answers[0], str(error), by=site)
            with self._room(run):
                self._conductor.record(rejected)  # before the site hears of it
            raise Unfit(rejected.words) from None

    def _receive(self, state: State, parcel: Parcel, site: str, answers: tuple[Answer, ...], frames: Wanted) -> None:
        """Take an update that is waited for. Raises `Invalid` in words that name site, tensor and reason."""
        run, answer = state.run, answers[0]
        if parcel.answers:
            _check_sum(state, site, answers)
        else:
            _check_single(answer)
        wire, size = expected(state, answer, parcel)
        for one in answers:
            checked(state, one, self._presence.known(one.site))
        most = encoded_bytes(size, wire)
        kind: CrossingKind = "model" if state.work == "initialise" else "update"
        # Before the first byte is taken: what is compressed may turn out smaller, and is journalled as what it was.
        crossed = [self._decided(state, one, kind, most if one is answer else 0, kinds(wire)) for one in answers]
        signature = answer.signature if state.work == "initialise" else state.signature
        plain, (first, _) = set(kinds(wire)) <= {"clip", "noise"}, span(state, answer)
        work = str(state.work)

        def coming(offset: int) -> Iterator[FrameLike]:
            return faults.along("hub", "receiving", work, frames(offset))

        watched = Watched(coming, site, signature, plain, first)
        with self._room(run), ExitStack() as turn:
            spool = self._folders.of(run).spool

            def ready() -> None:
                self._begin_turn(turn, run, site, answers)

            try:
                digest, count = spool.receive(spooled(answer), watched, wire, size, parcel.content, ready)
            except Invalid as error:
                raise Invalid(watched.told(error)) from None
            faults.reached("hub", "spooled", work)
            # Of a sum the bytes are counted once, with the first of its sites.
            sizes = [count, *(0 for _ in answers[1:])]
            crossed = [_brought(one, digest, size) for one, size in zip(crossed, sizes, strict=True)]
            received = [
                one.model_copy(update={"update": digest, "bytes": size})
                for one, size in zip(answers, sizes, strict=True)
            ]
            for one in answers:
                self._note(run, one.site, "answered")
            # Returning is the receipt, so the answer is durable first.
            answered = Answered(run=run, answer=received[0], others=tuple(received[1:]))
            self._conductor.record(*crossed, answered, actor=site)

    def _begin_turn(self, turn: ExitStack, run: str, site: str, answers: tuple[Answer, ...]) -> None:
        """Hold off whatever else comes of these answers' sites and relays until theirs is journalled.

        Raises `LinkLost` where they do not count any more: a stream that broke may have been whole and both are here,
        or a site and its relay bring the same. Only the first counts, and its file stays.
        """
        turn.enter_context(self._border.turn(site, *(name for one in answers for name in (one.site, *one.via))))
        state = self._conductor.states[run]
        counts = all(expects(state, one) and not self._quarantine.words(one.site) for one in answers)
        if not counts or (answers[0].via and has_sum(state, answers[0].via[0])):
            raise LinkLost(out_of_turn(state, answers[0], "is not waited for as it came"))

    def _decided(self, state: State, answer: Answer, kind: CrossingKind, size: int, wire: tuple[str, ...]) -> Crossed:
        """Put an update to the hub's rules, in its site's name. A relay cannot tell whom they refused: the run is."""
        try:
            return self._border.decided(state, answer.site, kind, "out", size, wire=wire)
        except Denied as error:
            if answer.via:
                self._conductor.post(Refused(run=state.run, site=answer.site, words=str(error)), actor=answer.site)
            raise

    def unusable(self, site: str, message: Unusable) -> None:
        """Journal that a relay did not take what this site brought, as if it had been brought here: from quarantine
        nothing more of it is."""
        if self._quarantine.words(site):
            log.info("run %s: from quarantine, and not taken by a relay: %s", message.run, message.words)
            return
        state = self._conductor.states[message.run]
        answer = Answer(site=site, position=message.position, epoch=message.epoch)
        self._conductor.post(self._rejected(state, answer, message.words))

    def _check_quarantine(self, state: State, site: str, answers: tuple[Answer, ...]) -> None:
        """Raise `LinkLost` for what comes from quarantine: nothing of it is looked at, and nothing is known to be wrong
        with it. `Denied` where one of those in a sum is in quarantine.

        What counts already, or comes too late, has its receipt all the same: else the site would believe that a merged
        update never was.
        """
        if all(not expects(state, one) and unexpected(state, one) != "wrong" for one in answers):
            return
        if quarantined := self._quarantine.words(site):
            raise LinkLost(quarantined)
        if barred := ", ".join(one.site for one in answers if self._quarantine.words(one.site)):
            raise Denied(f"{site}: its sum holds {barred}, in quarantine; make another of the others")

    def _all_wanted(self, state: State, site: str, answers: tuple[Answer, ...]) -> bool:
        """Tell whether a run waits for these answers, as `_wanted`. A sum cannot be divided: where only some of its
        sites are waited for, `Denied` has its relay make another one of theirs."""
        wanted = [expects(state, answer) for answer in answers]
        if any(wanted) and not all(wanted):
            others = ", ".join(one.site for one, is_wanted in zip(answers, wanted, strict=True) if not is_wanted)
            raise Denied(f"{site}: its sum holds {others}, not waited for any more; make another of the others")
        return all([self._wanted(state, answer) for answer in answers])  # each is looked at, and told

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

    def _rejected(self, state: State, answer: Answer, words: str, late: bool = False, by: str = "") -> Rejected:
        """Return what to journal of an answer that is not taken; ``by`` a relay, it is the relay's fault."""
        log.info("run %s: not taken: %s", state.run, words)
        site = by or answer.site
        if not late and site == answer.site:
            self._note(state.run, site, "rejected")
        place = {"run": state.run, "site": site, "position": answer.position, "epoch": answer.epoch}
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


def _check_single(answer: Answer) -> None:
    """Raise `Invalid` for an answer that says it is part of a sum, and came alone."""
    if answer.via:
        raise Invalid(f"{answer.site}: via: {list(answer.via)}: only a relay's sum comes by relays; send it without")


def _check_sum(state: State, relay: str, answers: tuple[Answer, ...]) -> None:
    """Raise `Invalid` for a sum that the hub did not ask this relay for, `Denied` for a second one in a stage: it may
    have made that before it knew that the first one counts, and each of these sites may still bring its own."""
    if has_sum(state, relay):
        raise Denied(f"{relay}: a stage takes one update in its name, which is here; pass the others on by themselves")
    if not summable(state):
        raise Invalid(f"{relay}: a sum of several updates, where stage '{state.work}' waits for single ones")
    if len({(one.position, one.epoch, one.version) for one in answers}) > 1:
        raise Invalid(f"{relay}: a sum of updates of several stages, which have nothing in common; update the relay")


def _brought(crossed: Crossed, digest: str, size: int) -> Crossed:
    brought = crossed.crossing.model_copy(update={"digest": digest, "bytes": size})
    return crossed.model_copy(update={"crossing": brought})
