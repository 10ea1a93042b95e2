"""From a job to its plan: ask every site's policy, let the allowed sites measure the task, then choose (purely)."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from atoll.boundary.gate import Gate, decided
from atoll.errors import AtollError, Unavailable
from atoll.planner import allowed, ask
from atoll.planner.choose import choose, choose_sites
from atoll.runtime.desk import Desk
from atoll.spec.budget import Guarantee
from atoll.spec.event import Answer, Decided
from atoll.spec.fleet import Dataset, Fleet, Profile, Site
from atoll.spec.job import Job, QueryJob, TrainJob
from atoll.spec.message import Assign, Release
from atoll.spec.order import TaskName
from atoll.spec.plan import Plan
from atoll.spec.policy import Account, Action, Decision, Request
from atoll.spec.sync import Sync
from atoll.spec.user import User

ASK = 10.0  # seconds a site's policy has to answer
_AT_ONCE = 32  # sites that are asked
_COUNT = 60.0  # and where it has to find what a promise costs, for which it may have to import what counts it
_PROBE = 180.0  # seconds a site has to start a worker, import the task and time three steps
BACK = 20.0  # seconds within which a site that died while its run was planned is expected back


class Planning:
    """One job on its way to a plan; `answers` and `said` are kept for the record of who allowed what."""

    def __init__(
        self, parties: tuple[Desk, Gate], run: str, job: Job, code: tuple[str | None, int], user: User
    ) -> None:
        self._desk, self._gate = parties
        self._run, self._job, self._user = run, job, user
        self._code, self._code_bytes = code
        self.fleet: Fleet = self._desk.presence.fleet()
        self.answers: dict[str, dict[ask.Role, Decision]] = {}
        self._said: dict[str, Decided] = {}
        self.profiles: dict[str, Profile] = {}
        self._counted: dict[str, Guarantee | None] = {}  # by each site that would train, of its own data

    def plan(self) -> Plan:
        """Return the plan. Raises `Denied`, `NotFound`, `Invalid`, `TaskFailed` or `Unavailable` in words."""
        self._ask()
        if not isinstance(self._job, TrainJob):
            return choose_sites(self._job, self.answers, self.fleet)
        self._probe(self._job)
        while True:
            plan = choose(self._job, self.fleet, self.answers, self.profiles)
            if self._agreed(self._job, plan):
                promises = {site: one for site in plan.sites if (one := self._counted[site]) is not None}
                return plan.model_copy(update={"promises": promises})

    @property
    def said(self) -> list[Decided]:
        """Of each site that was asked, whether the job may be planned with its dataset."""
        return list(self._said.values())

    def held(self, plan: Plan) -> Fleet:
        """Return the plan's sites as they were when it was made, with their links and no dataset but the job's."""
        names = {*plan.sites, *plan.evaluators}
        name = dataset_of(self._job)
        sites = [site for site in self.fleet.sites if site.name in names]
        return Fleet(
            sites=tuple(site.model_copy(update={"datasets": _only(name, site)}) for site in sites),
            links=tuple(link for link in self.fleet.links if link.site in names),
        )

    def _ask(self) -> None:
        if not self.fleet.sites:
            raise Unavailable("no site is connected; add one with: atoll site add NAME")
        questions = ask.requests(self._job, self.fleet, self._user, self._code, self._desk.presence.region)
        self.answers = self._answered(questions)

    def _agreed(self, job: TrainJob, plan: Plan) -> bool:
        """Ask each site again whose promise is another than was asked about, now that its rounds are known and what all
        owners want of the wire; False where one refuses, without which is to be planned again."""
        questions = ask.requests(job, self.fleet, self._user, self._code, self._desk.presence.region)
        again: dict[str, tuple[ask.Question, ...]] = {}
        for site in plan.sites:
            about = next(one for one in questions[site] if one.role == "plan")
            held = about.request.dataset
            assert held is not None
            promise = ask.promised(job, plan.sync, held)
            if promise != about.request.promise:
                again[site] = (ask.Question("plan", about.request.model_copy(update={"promise": promise})),)
        for site, answers in self._answered(again).items():
            self.answers[site] = {**self.answers[site], **answers}
        return all(self.answers[site]["plan"].allowed for site in plan.sites)

    def _answered(self, questions: Mapping[str, tuple[ask.Question, ...]]) -> dict[str, dict[ask.Role, Decision]]:
        """Put questions to sites, all at once, for each may count for seconds what a run costs its data."""
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(questions)))) as pool:
            accounts = list(pool.map(self._accounts, questions, questions.values()))
        told = zip(questions.items(), accounts, strict=True)
        return {site: self._decisions(site, asked, found) for (site, asked), found in told}

    def _accounts(self, site: str, asked: tuple[ask.Question, ...]) -> tuple[Account, ...]:
        if quarantined := self._desk.quarantine.words(site):
            return (Account(decision=Decision(allowed=False, party="hub", reasons=(quarantined,))),) * len(asked)
        requests = tuple(question.request for question in asked)
        return self._desk.questions.ask(site, requests, patience(requests))

    def _decisions(
        self, site: str, asked: tuple[ask.Question, ...], accounts: tuple[Account, ...]
    ) -> dict[ask.Role, Decision]:
        """Return a site's answers, with the hub's own rules put to what it allows."""
        counted = next((account.guarantee for account in accounts if account.guarantee is not None), None)
        self._counted[site] = counted
        # The hub's rules see what the site has counted; of what lies there it is the one that knows.
        known = [replace(one, request=one.request.model_copy(update={"guarantee": counted})) for one in asked]
        said = ask.paired(site, asked, tuple(account.decision for account in accounts))
        answers: dict[ask.Role, Decision] = {one.role: self._both(one, said[one.role]) for one in known}
        for one in known:
            if one.role == "plan":
                self._said[site] = decided(one.request, f"{site}/{self._job.name}", answers["plan"], self._run)
        return answers

    def _both(self, question: ask.Question, said: Decision) -> Decision:
        """Return a site's answer, unless the hub's own rules refuse what the site allows. What a site opens for its
        own workers is no affair of the hub's."""
        if not said.allowed or question.role == "open":
            return said
        ours = self._gate.decide(question.request)
        return said if ours.allowed else ours

    def _probe(self, job: TrainJob) -> None:
        sites = allowed.trainers(job, self.fleet, self.answers).sites
        waiting = {site: self._desk.questions.expect_probe(self._run, site, self._code) for site in sites}
        try:
            for site in sites:
                self._desk.presence.send(site, self._assignment(job))
            self.profiles = dict(_gathered(waiting))
        finally:
            self._desk.questions.abandon("the plan is made", run=self._run)

    def _assignment(self, job: TrainJob) -> Assign:
        task = TaskName.of(job.task)
        return Assign(
            run=self._run,
            epoch=0,
            position=0,
            work="probe",
            job=job,
            sync=job.sync or Sync(),
            layout=job.layout or Assign.model_fields["layout"].default,
            code=self._code,
            code_bytes=self._code_bytes,
            user=self._user.name,
            roles=self._user.roles,
            task=task,
        )

    def release(self) -> None:
        """Let the sites that were probed for nothing (no run follows) put their workers away."""
        for site in self.answers:
            self._desk.presence.send(site, Release(run=self._run, words="the plan was only asked for"))


def patience(requests: Iterable[Request]) -> float:
    """Return how many seconds a site has to answer these."""
    return _COUNT if any(request.promise and not request.promise.empty for request in requests) else ASK


def asking(action: Action, user: User, about: Job | str) -> Request:
    """Return the question whether this user may do something with a job or, by its reference, with a model."""
    who = {"action": action, "user": user.name, "roles": user.roles, "projects": user.projects}
    if isinstance(about, str):
        return Request.model_validate({**who, "model": about})
    what = {"job": about.name, "job_kind": about.kind, "purpose": about.purpose, "project": about.project}
    return Request.model_validate({**who, **what})


def holders(job: Job, fleet: Fleet) -> tuple[str, ...]:
    """Return the sites that have the job's dataset."""
    return tuple(site.name for site in fleet.sites if site.dataset(dataset_of(job)) is not None)


def dataset_of(job: Job) -> str:
    return job.dataset if isinstance(job, QueryJob) else job.data.dataset


def _only(name: str, site: Site) -> tuple[Dataset, ...]:
    return tuple(dataset for dataset in site.datasets if dataset.name == name)


def _gathered(waiting: Mapping[str, "Future[Answer]"]) -> Iterable[tuple[str, Profile]]:
    deadline = time.monotonic() + _PROBE
    for site, future in waiting.items():
        try:
            answer = future.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Unavailable(f"{site}: measured nothing in {_PROBE:g} s; look at that site's worker log") from None
        except AtollError as error:
            raise type(error)(f"{site}: {error}" if not str(error).startswith(site) else str(error)) from None
        if answer.profile is not None:
            yield site, answer.profile
