"""What every policy would say to a job, at each point that can be known before. No code runs, nothing is journalled.

What a site does later is decided anew by its rules of then, about what it is then: sizes, and the rows that a number
stands for, are those of the whole dataset here.
"""

from collections.abc import Iterator

from atoll.boundary.gate import Gate
from atoll.errors import Unavailable
from atoll.planner import ask
from atoll.planner.allowed import ABOUT
from atoll.runtime.desk import Desk
from atoll.runtime.performing import release
from atoll.runtime.planning import asking, patience
from atoll.spec.job import Job, TrainJob
from atoll.spec.policy import Account, Decision, Foreseen, Request
from atoll.spec.user import User


def foreseen(desk: Desk, gate: Gate, job: Job, code: str | None, user: User) -> tuple[Foreseen, ...]:
    """Return the answers point by point, sites by name. ``code`` is the digest of the job's bundle.

    Raises `NotFound` and `Invalid` as planning does, `Unavailable` when a site's policy gives no answer.
    """
    fleet = desk.presence.fleet()
    if not fleet.sites:
        raise Unavailable("no site is connected; add one with: atoll site add NAME")
    told = [_told(asking("submit", user, job), f"{job.kind} {job.name}", gate)]
    for site, questions in ask.requests(job, fleet, user, code, desk.presence.region).items():
        told += _at(site, questions, desk, gate)
    return (*told, *_after(job, code, user, gate))


def _at(site: str, questions: tuple[ask.Question, ...], desk: Desk, gate: Gate) -> Iterator[Foreseen]:
    """Yield what the site's rules say to each question, and then what the hub's do."""
    if quarantined := desk.quarantine.words(site):
        refusal = Decision(allowed=False, party="hub", reasons=(quarantined,))
        accounts = (Account(decision=refusal),) * len(questions)
    else:
        requests = tuple(question.request for question in questions)
        accounts = desk.questions.accounts(site, requests, patience(requests))
    for question, account in zip(questions, accounts, strict=True):
        subject = f"{site}: {ABOUT[question.role]}"
        yield _foreseen(question.request, subject, account)
        if question.role != "open":
            yield _told(question.request.model_copy(update={"guarantee": account.guarantee}), subject, gate)


def _after(job: Job, code: str | None, user: User, gate: Gate) -> Iterator[Foreseen]:
    """Yield what becomes of the results, and of the model where the job makes one."""
    yield _told(release(job, user, code, None), f"results of {job.name}", gate)
    if isinstance(job, TrainJob):
        name = job.model or job.name
        yield _told(release(job, user, code, name), f"model {name}", gate)
        yield _told(asking("promote", user, name), f"model {name}, by the same user", gate)
        yield _told(asking("deploy", user, name), f"model {name}, by the same user", gate)
        yield _told(asking("export", user, name), f"model {name}, by the same user", gate)


def _told(request: Request, subject: str, gate: Gate) -> Foreseen:
    return _foreseen(request, subject, gate.account(request))


def _foreseen(request: Request, subject: str, account: Account) -> Foreseen:
    decision = account.decision
    return Foreseen(point=request.action, party=decision.party, subject=subject, decision=decision, rules=account.rules)
