"""The hub's side of every session: what sites say, what they bring and what they fetch.

Everything here comes from another party. A site has proven at the port who it is, may speak only for itself, and may
bring only what its run is waiting for.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from atoll.boundary.channel import FrameLike, Send, Wanted
from atoll.boundary.gate import Gate, probed
from atoll.errors import Denied, Invalid, LinkLost, NotFound, Unavailable, named
from atoll.journal import Entry
from atoll.registry.blobs import Blobs
from atoll.registry.models import Models
from atoll.runtime import faults
from atoll.runtime.border import Border
from atoll.runtime.branches import Branches
from atoll.runtime.conductor import Conductor
from atoll.runtime.files import Folders
from atoll.runtime.intake import Intake
from atoll.runtime.presence import Presence
from atoll.runtime.quarantine import Quarantine
from atoll.runtime.questions import Questions
from atoll.runtime.state import State, spent
from atoll.runtime.stock import Stock
from atoll.runtime.sums import Sums
from atoll.runtime.tree import Tree
from atoll.runtime.witnessing import Witness
from atoll.spec.event import (
    Broken,
    Certified,
    Disputed,
    Expired,
    Planned,
    Quarantined,
    Refused,
    Rejected,
    Restarted,
    Revoked,
    SiteReleased,
)
from atoll.spec.message import (
    Decisions,
    Done,
    Failure,
    Hello,
    Message,
    Parcel,
    Progress,
    Refusal,
    Relayed,
    Release,
    SumSaid,
    Unusable,
)
from atoll.spec.record import Attest, Attested, Cosigned
from atoll.spec.run import SiteProgress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What of its hub a desk works with."""

    gate: Gate
    conductor: Conductor
    blobs: Blobs
    models: Models
    folders: Folders
    changed: Callable[[str], None]  # this run's view has news
    witness: Witness
    tree: Tree = field(default_factory=Tree)
    region: str = "here"  # where the hub is


class Desk:
    """Implements `atoll.boundary.channel.Desk` for one hub. `seen` is to be fed every journal entry in order."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._conductor = parts, parts.conductor
        self.quarantine = Quarantine()
        self.tree = parts.tree
        self.presence = Presence(parts.conductor, self.quarantine, parts.tree, parts.changed, parts.region)
        self._branches = Branches(parts.tree, self.presence.send, self)
        self.questions = Questions(self.presence)
        self.sums = Sums(self.presence.send, self.presence.here, parts.conductor.post)
        self._border = Border(parts.gate, parts.conductor, self.presence)
        self._intake = Intake(parts.conductor, parts.folders, self._border, self.presence, self.quarantine, self._room)
        self._stock = Stock(parts.conductor, self._border, parts.blobs, parts.models, parts.folders)
        self._disputed: set[str] = set()  # sites in quarantine for their journals

    def seen(self, entry: Entry) -> None:
        self._border.seen(entry)
        for relay in self.tree.seen(entry):
            self._admit(relay)
        quarantined = self.quarantine.seen(entry)
        match entry.event:
            case Planned() | Restarted() as event:
                self.presence.gather(event.run)
            case Rejected() if quarantined and not self._conductor.replaying:
                self._conductor.post(quarantined)
            case Expired(final=False) as event:
                self.sums.lapsed(event.run, event.position)
            case Quarantined() as event:
                self.presence.bar(event)
                self._branches.lost(event.site, event.words)
            case Revoked() as event:
                self._branches.close(event.site, "it was revoked")
            case SiteReleased() as event:
                self._forget(event.site, event.site in self._disputed)
                self.presence.release(event.site)
            case Disputed() as event:
                self._disputed.add(event.party)
            case Certified() as event:
                self._forget(event.site, event.token is not None)
            case _:
                pass

    def _forget(self, site: str, journal: bool) -> None:
        """Believe the next that is seen of a site's ``journal``: a person looked into it, or the site joined anew."""
        self._disputed.discard(site)
        if journal and not self._conductor.replaying:
            self._parts.witness.forget(site)

    def release(self, site: str, user: str) -> None:
        """Let a site out of quarantine. Raises `NotFound` for one that is not in it."""
        if not self.quarantine.words(site):
            raise NotFound(f"site: {site!r} is not in quarantine; `atoll sites` tells which are")
        self._conductor.record(SiteReleased(site=site, user=user), actor=user)

    # --- sessions -----------------------------------------------------------------------------------------------

    def admits(self, site: str, secret: str) -> bool:
        return self.presence.admits(site, secret)

    def opened(self, site: str, send: Send) -> None:
        if (relay := self.tree.behind(site)) is not None and not self._branches.carries(site, send):
            raise Denied(f"{site}: was invited to be behind {relay}; dial that one, or ask for another invitation")
        self._branches.lost(site, "it began another session")
        if self.presence.opened(site, send):
            self.questions.abandon(f"{site}: began another session; try again", site=site)
        if self.tree.is_relay(site):
            self._admit(site)

    def _admit(self, relay: str) -> None:
        """Tell a relay whom to let in. It goes on as it is where its list is too long for a message, and so do we."""
        try:
            self.presence.send(relay, self.tree.admitted(relay))
        except Invalid as error:
            log.error("%s: cannot be told whom to let in (%s); have some sites dial another relay", relay, error)

    def closed(self, site: str, send: Send, words: str) -> None:
        if self.presence.closed(site, send, words):
            self._branches.lost(site, words)
            self.questions.abandon(f"{site}: left ({words}); try again once it is back", site=site)

    # --- what sites say -----------------------------------------------------------------------------------------

    def heard(self, site: str, message: Message) -> None:
        match message:
            case Hello():
                self.presence.hello(site, message)
                self._release(site, message.runs)
            case Decisions():
                self.questions.decided(site, message)
            case Progress():
                if self._takes_part(site, message.run) and not self.quarantine.words(site):  # it tries on meanwhile
                    self._note(
                        message.run, site, message.state, step=message.step, steps=message.steps, pace=message.pace
                    )
            case Done():
                self._done(site, message)
            case Refusal():
                if not self.questions.failed(message.run, site, Denied(message.words)):
                    self._told(site, Refused(run=message.run, site=site, words=message.words))
            case Failure():
                if not self.questions.failed(message.run, site, named(message.error, message.words)):
                    self._failed(site, message)
            case _:
                self._heard_of(site, message)

    def _heard_of(self, site: str, message: Message) -> None:
        """Take what is said of journals, and what a relay says of those behind it."""
        match message:
            case Attest() | Attested() | Cosigned():
                self._witness(site, message)
            case SumSaid():
                self.sums.heard(site, message)
            case Relayed():
                self._branches.heard(site, message, self.quarantine.words(site))
            case Unusable() if self._takes_part(site, message.run) and message.run in self._conductor.here:
                self._intake.unusable(site, message)
            case Unusable():
                log.info("%s: brought a relay something for run %s, in which it has no part", site, message.run)
            case _:
                raise Invalid(f"{site}: a message of kind {message.kind!r} is the hub's to send, not a site's")

    def _witness(self, site: str, message: Attest | Attested | Cosigned) -> None:
        """Show a site our journal and look at its own in turn. One that was changed has it given no more work."""
        barred, witness = self.quarantine.words(site), self._parts.witness
        judged = witness.heard(site, site, message)
        asked = witness.ask(site) if isinstance(message, Attest) and not barred else None
        for answer in (judged.answer, asked):
            if answer is not None:
                self.presence.send(site, answer)
        if judged.dispute is not None and not barred:
            words = f"{judged.dispute.words}; in quarantine until `atoll site release {site}`"
            self._conductor.post(judged.dispute, Quarantined(site=site, words=words))

    def _takes_part(self, site: str, run: str) -> bool:
        state = self._conductor.states.get(run)
        if state is None or state.over:
            return False
        return state.phase == "planning" or any(site in (one, *self.tree.way(one)) for one in state.everyone)

    def _told(self, site: str, event: Refused | Broken) -> None:
        """Take a site's word on a run that it has a part in; on another, in quarantine, and once it has refused for
        good, it has no say."""
        state = self._conductor.states.get(event.run)
        if state is not None and site in state.gone:
            log.info("%s, which has left run %s, says: %s", site, event.run, event.words)
        elif self.quarantine.words(site):
            log.warning("%s, in quarantine, says of run %s: %s", site, event.run, event.words)
        elif self._takes_part(site, event.run) and event.run in self._conductor.here:
            self._conductor.post(event, actor=site)
        else:
            log.warning("%s speaks of run %s, in which it has no part", site, event.run)

    def _failed(self, site: str, message: Failure) -> None:
        """Hand on that a site failed, to end the run or not; in a stage that went on without it, it is nobody's any
        more, and however often it says so the journal has it once."""
        state = self._conductor.states.get(message.run)
        if state is not None and state.phase == "running" and _no_news(state, site, message.position):
            log.info("%s: failed in stage %d of run %s, again or too late", site, message.position, state.run)
            return
        if self._takes_part(site, message.run) and not self.quarantine.words(site):
            self._note(message.run, site, "failed")
        said = {"position": message.position, "words": message.words, "error": message.error}
        self._told(site, Broken.model_validate({"run": message.run, "site": site, **said}))

    def _release(self, site: str, runs: tuple[str, ...]) -> None:
        """Let a site drop what it keeps of runs that ended while it was away, or that this hub has never heard of."""
        for run in runs:
            if not self._takes_part(site, run) and not self.questions.probing(run, site):
                made = self._parts.models.of_run(run) is not None
                self.presence.send(site, Release(run=run, words="the run is over", made=made))

    def _note(self, run: str, site: str, state: str, **more: Any) -> None:
        self.presence.note(run, site, SiteProgress(connected=True, state=state[:40], **more))

    # --- what sites bring and fetch -----------------------------------------------------------------------------

    def _done(self, site: str, message: Done) -> None:
        if message.answer.site != site:
            raise Denied(f"{site}: answers for {message.answer.site!r}; a site speaks for itself only")
        if not self.questions.measured(message.run, site, message.answer):
            self._intake.said(site, message)

    def take(self, site: str, parcel: Parcel, frames: Wanted) -> None:
        if parcel.answers:
            by = self._branches.maker(site, parcel.answers)
        else:
            by = self._branches.speaker(site, parcel.answer and parcel.answer.site)
        self._check_relay(site, by)
        self._intake.take(by, parcel, frames)

    def _check_relay(self, relay: str, site: str) -> None:
        """Nothing comes or goes through a relay in quarantine; its sites wait, as for a lost link."""
        if site != relay and (quarantined := self.quarantine.words(relay)):
            raise LinkLost(quarantined)

    def give(self, site: str, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]:
        if parcel.purpose == "probe":
            return probed(parcel)
        digest = parcel.digest
        if digest is None:
            raise Invalid(f"{site}: what is fetched is named by its digest; give one")
        caller, site, held = site, self._branches.speaker(site, parcel.site), parcel.held
        self._check_relay(caller, site)
        parcel = parcel.model_copy(update={"site": None, "held": False})
        if quarantined := self.quarantine.words(site):
            raise LinkLost(quarantined)
        with self._room(parcel.run):
            if parcel.purpose == "code":
                header, frames = self._stock.code(site, parcel, digest, self.questions.code(parcel.run, site))
            else:
                header, frames = self._stock.weights(site, parcel, digest)
        if held:  # what a relay has is asked for like the rest, and given by the relay
            return header, iter(())
        return header, faults.along("hub", "giving", parcel.purpose, frames)

    @contextmanager
    def _room(self, run: str) -> Iterator[None]:
        """Where our disk has no room, the run shows it and the site tries again as after a lost link: nothing fails."""
        try:
            yield
        except Unavailable as error:
            if not isinstance(error, LinkLost):
                self._conductor.trouble = str(error)
                self._parts.changed(run)
            raise LinkLost(str(error)) from None


def _no_news(state: State, site: str, position: int) -> bool:
    """Tell whether the run knows of this failure, or has gone on from its stage."""
    return site in state.failed or spent(state, position, site)
