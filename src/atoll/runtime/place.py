"""A site as its errands see it: folder, door, warm workers and datasets, and what its policy is asked about a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atoll.boundary.gate import SiteGate
from atoll.data.batches import held_out
from atoll.data.catalogue import Entry
from atoll.data.live import LiveCatalogue
from atoll.errors import Denied, Invalid, NotFound, Unavailable
from atoll.planner.price import rounds
from atoll.planner.terms import with_terms
from atoll.policy.ledger import Account as Spent
from atoll.policy.promises import guaranteed
from atoll.runtime.concealing import Concealing
from atoll.runtime.groups import Groups
from atoll.runtime.ledger import LiveLedger
from atoll.runtime.mark import Kept, Origin, origin_of
from atoll.runtime.reviews import Reviews
from atoll.spec.budget import Guarantee
from atoll.spec.fleet import Dataset, Site
from atoll.spec.job import QueryJob, TrainJob
from atoll.spec.message import Assign
from atoll.spec.policy import Account, Crossing, CrossingKind, Decision, Promise, Request
from atoll.spec.pretrained import Pretrained
from atoll.spec.wire import clipped, noised

_OPENING = ("measure", "initialise", "train")  # stages of a run that trains here


@dataclass(frozen=True, slots=True)
class Place:
    """What all errands of one site share."""

    site: Site
    home: Path
    gate: SiteGate
    groups: Groups
    catalogue: LiveCatalogue
    concealing: Concealing
    ledger: LiveLedger
    reviews: Reviews

    def entry(self, a: Assign) -> Entry:
        """Return the assignment's dataset, read anew each time: its owner may take a purpose back in mid-run.

        Raises `NotFound` when it is gone, `Denied` when it is not the one that the run was planned for.
        """
        return self._planned(a, self.catalogue.entry(_name(a)))

    def admit(self, a: Assign) -> None:
        """Put an assignment to the owner's rules as they are now, whatever the hub was told when it planned: whether
        the run may be planned with this dataset, and have it open. Raises `Denied`, and `NotFound` without it.

        A hub need not have asked, and a grant may have ended since.
        """
        self.gate.admit(self._request(a, "plan"), self._subject(a), a.run)
        self.gate.allow(self._request(a, "open"), self._subject(a), a.run)

    def reserve(self, a: Assign) -> None:
        """Have what a run that trains costs the dataset's privacy reserved, before anything is opened for it. Raises
        `Denied` in words that tell what is left."""
        request = self._request(a, "open")
        if a.work in _OPENING and request.guarantee is not None:
            name, budget = self.catalogue.counted(_name(a))
            with self._refusing():
                self.ledger.reserve(name, a.run, request.guarantee, budget)

    def steps(self, a: Assign, kept: int) -> int:
        """Return how many steps of a run's private mechanism its round brings it to, after those that it was charged
        for and those that what is ``kept`` of it can rest on; 0 for a run that promises nothing."""
        account = self._account(a)[1]
        if account is None:
            return 0
        # Also of one that was released meanwhile: what it made is refused when it is to be charged.
        return max(account.steps, kept) + (1 if account.reserved.unit == "site" else a.steps)

    def origin(self, a: Assign, base: int | None) -> Origin:
        """Return of what a round's update is made here. Raises as `entry` does."""
        name, account = self._account(a)
        return origin_of(a, base, self.entry(a).dataset, name, account.reserved.unit if account is not None else "")

    def _account(self, a: Assign) -> tuple[str, Spent | None]:
        name = self.catalogue.counted(_name(a))[0]
        return name, self.ledger.ledger.accounts.get((name, a.run))

    def charge(self, a: Assign, kept: Kept) -> None:
        """Have a run charged for the steps that a kept update can rest on, at the dataset that it was made from.
        Returning means that it may leave. Raises `Denied`."""
        with self._refusing():
            self.ledger.charge(kept.ledger, a.run, kept.private, kept.unit)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Denied as error:
            raise Denied(f"{self.site.name} refuses: {error}") from None

    def allow_code(self, a: Assign) -> None:
        """Put code that lies here already to the owner's rules, as if it came in now. Raises `Denied`."""
        self.gate.allow(self.crossing(a, "code", out=False, size=0, digest=a.code), self._subject(a), a.run)

    def to_be_read(self, request: Request) -> bool:
        """Tell whether code may not run here, and might once its owner has read it, or it is known who signed it."""
        if self.gate.decide(request).allowed:
            return False
        wanted = [{"approved": True}, *({"signer": name} for name in self.reviews.names)]
        return any(self.gate.decide(request.model_copy(update=one)).allowed for one in wanted)

    def _known_of(self, code: str) -> dict[str, object]:
        """Return what rules see of code at this site."""
        return {
            "approved": self.reviews.approved(code),
            "signer": self.reviews.signer(code),
            "sandbox": self.groups.confined,
        }

    def answer(self, request: Request) -> Account:
        """Say by the owner's rules whether what a hub asks about may be done, and what a run is counted to cost. Of the
        dataset, and of whose it is, only what is known here counts."""
        try:
            here = self._here(request)
        except NotFound as error:
            return Account(decision=self._refusal(error))
        decision = self.gate.answer(here, f"{self.site.name}/{request.job or ''}")
        code = here.crossing is not None and here.crossing.kind == "code"
        if code and not decision.allowed and self.to_be_read(here):
            # Else it would never come in, and nobody here could read it. It is refused when it has.
            decision = Decision(allowed=True, party=self.site.name, reasons=(f"{self.site.name} takes it to be read",))
        return Account(decision=decision, guarantee=here.guarantee)

    def account(self, request: Request) -> Account:
        """Answer as `answer` does, rule by rule, and journal nothing: nobody has asked for it to be done yet."""
        try:
            here = self._here(request)
        except NotFound as error:
            return Account(decision=self._refusal(error))
        return self.gate.account(here).model_copy(update={"guarantee": here.guarantee})

    def _refusal(self, error: NotFound) -> Decision:
        return Decision(allowed=False, party=self.site.name, reasons=(f"{self.site.name} refuses: {error}",))

    def _here(self, request: Request) -> Request:
        known: dict[str, object] = {"site": self.site.name, "owner": self.site.owner, "region": self.site.region}
        known |= {"guarantee": None, "overdrawn": {}, **self._known_of(request.code)}
        if request.dataset is not None:
            dataset = self.catalogue.entry(request.dataset.name).dataset
            known["dataset"] = dataset
            if request.promise is not None:
                known |= self._counted(dataset, request.promise, request.promise.job.name)
        if request.crossing is not None:
            region = self.gate.beyond if request.crossing.direction == "out" else self.site.region
            known["crossing"] = request.crossing.model_copy(update={"region": region})
        return request.model_copy(update=known)

    def opened(self, a: Assign) -> Entry:
        """Return the dataset with its file verified, once the owner's rules let it be opened. Raises also `Denied`."""
        self.gate.ask(self._request(a, "open"), self._subject(a), run=a.run)
        return self._planned(a, self.catalogue.verify(_name(a)))

    def check_ranks(self, a: Assign) -> None:
        """Raise `Denied` for a layout of more ranks than this site starts, before any is, and where it starts none."""
        if self.groups.refuses:
            raise Denied(f"{self.site.name} refuses: {self.groups.refuses}")
        most = self.site.most_ranks
        if a.layout.ranks > most:
            raise Denied(
                f"{self.site.name} refuses: layout: {a.layout.ranks} ranks, and its machines take {most} at most; "
                "set smaller degrees"
            )

    def pretrained(self, a: Assign) -> Pretrained | None:
        """Return the pretrained files that the assignment's task names. Raises `Denied` where none such are listed.

        They are verified by whoever reads them, in the very bytes that it reads.
        """
        wanted = a.task.pretrained if a.task is not None else None
        if wanted is None:
            return None
        found = self.catalogue.find_pretrained(wanted)
        if found is None:
            raise Denied(
                f"{self.site.name} refuses: task.pretrained: it has none that is {wanted}; "
                "its owner adds the folder there by: atoll pretrained add NAME FOLDER"
            )
        return found

    def crossing(self, a: Assign, kind: CrossingKind, out: bool, size: int, **more: object) -> Request:
        """Return the question whether ``size`` bytes of this kind may leave (or enter) for this run."""
        crossing = Crossing.model_validate(
            {
                "kind": kind,
                "direction": "out" if out else "in",
                "site": self.site.name,
                "run": a.run,
                "round": a.version if a.work == "train" else None,
                "dataset": _name(a),
                "purpose": a.job.purpose,
                "bytes": size,
                "region": self.gate.beyond if out else self.site.region,
                "clip": clipped(a.sync.wire) if kind == "update" else 0.0,
                "noise": noised(a.sync.wire) if kind == "update" else 0.0,
                **more,
            }
        )
        return self._request(a, "cross", crossing)

    def _subject(self, a: Assign) -> str:
        return f"{self.site.name}/{_name(a)}"

    def _planned(self, a: Assign, entry: Entry) -> Entry:
        now = entry.dataset.fingerprint
        if a.fingerprint is not None and a.fingerprint != now:
            # A refusal, not a fault: a run that may go on without this site does.
            raise Denied(
                f"{self.site.name} refuses: dataset {entry.dataset.name!r} is {now[:19]}... now, and the run was "
                f"planned for {a.fingerprint[:19]}...; submit the job again"
            )
        return entry

    def _counted(self, dataset: Dataset, promise: Promise, run: str) -> dict[str, object]:
        """Return what a question says of a run's promise: what it costs here, and what of that does not fit."""
        name, budget = self.catalogue.counted(dataset.name)
        rows = dataset.rows - held_out(dataset.rows, promise.job.data.holdout)
        try:
            asked = guaranteed(promise, rows, budget)
        except (Invalid, Unavailable) as error:  # what cannot be counted is refused, here only
            return {"overdrawn": {"promise": f"privacy of {name}: {error}"}}
        if asked is None and budget is None:
            return {}
        ledger = self.ledger.ledger
        reserved = ledger.reserved(name, run)
        # Its delta was chosen by the budget of then, which may be another one by now.
        if reserved is not None and asked is not None and _same(reserved, asked):
            return {"guarantee": reserved}
        return {"guarantee": asked, "overdrawn": ledger.overdrawn(name, run, asked, budget)}

    def _promised(self, a: Assign, dataset: Dataset) -> dict[str, object]:
        """Return the same of an assignment, by its plan; of who only evaluates, what the run has reserved if it trained
        here."""
        if not isinstance(a.job, TrainJob):
            return {}
        if a.work not in (*_OPENING, "probe"):
            return {"guarantee": self.ledger.ledger.reserved(self.catalogue.counted(dataset.name)[0], a.run)}
        probing = a.work == "probe"  # before there is a plan, which will have what the owner asks for
        wire = with_terms(a.sync.wire, dataset.wire) if probing else a.sync.wire
        planned = 0 if probing else rounds(a.job.steps, a.sync.stride)
        return self._counted(dataset, Promise(job=a.job, noise=noised(wire), rounds=planned), a.run)

    def _request(self, a: Assign, action: str, crossing: Crossing | None = None) -> Request:
        dataset = self.entry(a).dataset
        return Request.model_validate(
            {
                "action": action,
                "user": a.user,
                "roles": a.roles,
                "projects": (a.job.project,),
                "site": self.site.name,
                "owner": self.site.owner,
                "region": self.site.region,
                "dataset": dataset,
                "job": a.job.name,
                "job_kind": a.job.kind,
                "project": a.job.project,
                "purpose": a.job.purpose,
                "code": a.code or "",
                **self._known_of(a.code or ""),
                "crossing": crossing,
                **self._promised(a, dataset),
            }
        )


def _same(one: Guarantee, other: Guarantee) -> bool:
    return (one.unit, one.mechanism) == (other.unit, other.mechanism)


def _name(a: Assign) -> str:
    return a.job.dataset if isinstance(a.job, QueryJob) else a.job.data.dataset
