"""Which sites take part, by what their policies answered; those left out keep their policies' words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from atoll.errors import Denied
from atoll.planner.ask import (
    EVALUATE,
    Answers,
    Role,
    evaluating_sites,
    needed_to_train,
    needed_to_work,
    training_sites,
    working_sites,
)
from atoll.planner.explain import told
from atoll.spec.fleet import Fleet
from atoll.spec.job import EvaluateJob, PredictJob, QueryJob, TrainJob
from atoll.spec.plan import Reason

ABOUT: dict[Role, str] = {
    "plan": "planning this job",
    "open": "opening the dataset",
    "code": "letting the code in",
    "model_in": "letting the model in",
    "query": "letting sums over columns out",
    "metric": "letting metrics out",
    "update": "letting updates out",
    "model_out": "letting the first weights out",
    "data": "letting rows out",
}


@dataclass(frozen=True, slots=True)
class Admission:
    """The sites that take part, sorted by name, and why each of the others does not."""

    sites: tuple[str, ...]
    left_out: tuple[Reason, ...] = ()


def trainers(job: TrainJob, fleet: Fleet, answers: Answers) -> Admission:
    """Return the sites whose policies allow all that training needs.

    Raises `Denied`, with every refusing party's words, when a site named in `data.sites` refuses or when no site
    is left; `NotFound` as `atoll.planner.ask.requests` does.
    """
    named = "data.sites" if job.data.sites is not None else None
    return _admit(training_sites(job, fleet), answers, needed_to_train(job), "train", named)


def evaluators(job: TrainJob, fleet: Fleet, answers: Answers, training: Sequence[str]) -> Admission:
    """Return the sites that evaluate: those in `data.evaluate`, else each training site that lets metrics out.

    Raises `Denied` when a site named in `data.evaluate` refuses.
    """
    if job.data.evaluate is not None:
        names = evaluating_sites(job, fleet)
        return _admit(names, answers, EVALUATE, "evaluate", "data.evaluate") if names else Admission(())
    refusing = {site: refusals(site, answers, ("metric",), "is not evaluated") for site in training}
    return Admission(tuple(site for site in training if not refusing[site]), _joined(refusing.values()))


def workers(job: EvaluateJob | PredictJob | QueryJob, fleet: Fleet, answers: Answers) -> Admission:
    """Return the sites that may do a job which trains nothing; raise `Denied` as `trainers` does."""
    field = "sites" if isinstance(job, QueryJob) else "data.sites"
    named = job.sites if isinstance(job, QueryJob) else job.data.sites
    if isinstance(job, EvaluateJob) and job.data.evaluate is not None:
        field, named = "data.evaluate", job.data.evaluate
    verb = "answer" if isinstance(job, QueryJob) else job.kind
    needed = needed_to_work(job)
    return _admit(working_sites(job, fleet), answers, needed, verb, field if named is not None else None)


def initialiser(training: Sequence[str], answers: Answers) -> str:
    """Return the first training site that lets a model out, which makes the first weights; raise `Denied`."""
    for site in training:
        if not refusals(site, answers, ("model_out",), ""):
            return site
    reasons = _joined(refusals(site, answers, ("model_out",), "does not give the first weights") for site in training)
    raise Denied(f"no training site may send out the first weights: {_said(reasons)}")


def refusals(site: str, answers: Answers, roles: Sequence[Role], outcome: str) -> tuple[Reason, ...]:
    """Return why `site` refuses any of `roles`, each reason once; no answer to a question is a refusal."""
    given = answers.get(site, {})
    lead = f"{site} {outcome}: " if outcome else ""
    reasons: list[Reason] = []
    said: set[str] = set()
    for role in roles:
        decision = given.get(role)
        if decision is None:
            reasons.append(Reason(by=f"site {site}", words=f"{lead}it gave no answer about {ABOUT[role]}"))
        elif not decision.allowed:
            rules = f" (rule {', '.join(decision.rules)})" if decision.rules else ""
            words = str(decision)
            # One ground, such as the purpose, may fail a rule for each thing asked; the first rule stands for all.
            if words.replace(rules, "") not in said:
                said.add(words.replace(rules, ""))
                reasons.append(Reason(by=f"policy of {decision.party}{rules}", words=f"{lead}{words}"))
    return tuple(dict.fromkeys(reasons))


def _admit(names: Sequence[str], answers: Answers, needed: Sequence[Role], verb: str, named: str | None) -> Admission:
    refusing = {site: refusals(site, answers, needed, f"does not {verb}") for site in names}
    kept = tuple(site for site in names if not refusing[site])
    left_out = _joined(refusing.values())
    if left_out and (named is not None or not kept):
        who = f"{named}: {', '.join(s for s in names if refusing[s])}" if named else "no site"
        raise Denied(f"{who} may {'not ' if named else ''}{verb}: {_said(left_out)}")
    return Admission(kept, left_out)


def _joined(reasons: Iterable[tuple[Reason, ...]]) -> tuple[Reason, ...]:
    return tuple(reason for group in reasons for reason in group)


def _said(reasons: Sequence[Reason]) -> str:
    return "; ".join(told(reasons))
