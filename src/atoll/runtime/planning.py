"""From a job to its plan: ask every site's policy, let the allowed sites measure the task, then choose (purely)."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from atoll.errors import AtollError, Unavailable
from atoll.planner import allowed, ask
from atoll.planner.choose import choose, choose_sites
from atoll.runtime.desk import Desk
from atoll.spec.event import Answer
from atoll.spec.fleet import Dataset, Fleet, Profile, Site
from atoll.spec.job import Job, QueryJob, TrainJob
from atoll.spec.message import Assign, Release, TaskName
from atoll.spec.plan import Plan, Sync
from atoll.spec.policy import Decision

_ASK = 10.0  # seconds a site's policy has to answer
_PROBE = 180.0  # seconds a site has to start a worker, import the task and time three steps
BACK = 20.0  # seconds within which a site that died while its run was planned is expected back
ROLES = ("scientist",)


class Planning:
    """One job on its way to a plan; `answers` are kept for the record of who allowed what."""

    def __init__(self, desk: Desk, run: str, job: Job, code: tuple[str | None, int], user: str) -> None:
        self._desk, self._run, self._job, self._user = desk, run, job, user
        self._code, self._code_bytes = code
        self.fleet: Fleet = desk.presence.fleet()
        self.answers: dict[str, dict[ask.Role, Decision]] = {}
        self.profiles: dict[str, Profile] = {}

    def plan(self) -> Plan:
        """Return the plan. Raises `Denied`, `NotFound`, `Invalid`, `TaskFailed` or `Unavailable` in words."""
        self._ask()
        if not isinstance(self._job, TrainJob):
            return choose_sites(self._job, self.answers, self.fleet)
        self._probe(self._job)
        return choose(self._job, self.fleet, self.answers, self.profiles)

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
        questions = ask.requests(self._job, self.fleet, self._user, ROLES, self._code)
        for site, asked in questions.items():
            if quarantined := self._desk.quarantine.words(site):
                decisions = (Decision(allowed=False, party="hub", reasons=(quarantined,)),) * len(asked)
            else:
                decisions = self._desk.questions.ask(site, tuple(question.request for question in asked), _ASK)
            self.answers[site] = ask.paired(site, asked, decisions)

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
            user=self._user,
            task=task,
        )

    def release(self) -> None:
        """Let the sites that were probed for nothing (no run follows) put their workers away."""
        for site in self.answers:
            self._desk.presence.send(site, Release(run=self._run, words="the plan was only asked for"))


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
