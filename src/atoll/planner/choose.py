"""Choose the plan: drop what is forbidden or impossible, price the rest, take the best, keep every reason.

Which is best: of all points left, those predicted within 10 % or one second of the cheapest count as equally fast;
among these the one that exchanges most often is chosen, because it is nearest to centralised training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atoll.errors import Invalid, TaskFailed, Unavailable
from atoll.planner import allowed
from atoll.planner.ask import Answers, Role
from atoll.planner.explain import duration, spelled
from atoll.planner.layouts import TIE_SHARE, Choice, candidates, choose_layout, misfit, unfit
from atoll.planner.points import Point, points
from atoll.planner.price import Place, gather_price, places, price, rounds
from atoll.planner.step import nodes_of
from atoll.planner.terms import bound, reasons, wanted
from atoll.spec.fleet import Fleet, Profile
from atoll.spec.job import EvaluateJob, PredictJob, QueryJob, TrainJob
from atoll.spec.plan import Candidate, Layout, Plan, Price, Reason
from atoll.spec.sync import Sync
from atoll.spec.task import beyond_arrays

TIE_SECONDS = 1.0
MOST_OTHERS = 8  # layouts that are told beside the chosen one, the cheapest


@dataclass(frozen=True, slots=True)
class _Considered:
    """A candidate whose price is known; the public document allows none."""

    candidate: Candidate
    price: Price


def choose(job: TrainJob, fleet: Fleet, answers: Answers, profiles: Mapping[str, Profile]) -> Plan:
    """Return the plan for a train job: the same plan for the same arguments, whatever order they came in.

    `answers` are the sites' decisions on `ask.requests`; `profiles` were measured at the sites that
    `allowed.trainers` admits. Raises `Denied` when policies leave no way to train, `Unavailable` when no site (or
    not every named one) can, `TaskFailed` when sites built different models, `Invalid` for a wait that cannot end.
    """
    admitted = allowed.trainers(job, fleet, answers)
    profiles, guessed = _guessed(admitted.sites, answers, profiles)
    sites, unable = _able(job, fleet, admitted.sites, profiles)
    _check_same_model(sites, profiles)
    _check_wait(job.sync, len(sites))
    _check_fragments(job.sync, min(profiles[site].parameters for site in sites))
    gradients = _check_gradients(job, [profiles[site] for site in sites])
    initialiser = allowed.initialiser(sites, answers)
    evaluating = allowed.evaluators(job, fleet, answers, sites)
    _check_personal(job.sync, sites, evaluating.sites)
    choices = {site: choose_layout(job, nodes_of(fleet.site(site)), profiles[site]) for site in sites}
    layouts = {site: choice.layout for site, choice in choices.items()}
    at = places(layouts, fleet, profiles)
    gather = _gather(job, fleet, answers, layouts, at)
    terms = wanted(fleet, sites, job.data.dataset)
    open_points = bound(points(job, len(sites), gradients), terms, len(sites), pinned=job.sync is not None)
    synced = [_candidate(job, point, layouts, at) for point in open_points]
    chosen, considered = _take(job, synced)
    others = _other_layouts(job, fleet, layouts, profiles, chosen)
    sync = chosen.candidate.sync
    assert sync is not None  # only "gather the data" has none, and it is never chosen
    return Plan(
        sites=sites,
        evaluators=evaluating.sites,
        initialiser=initialiser,
        layouts=layouts,
        sync=sync,
        rounds=rounds(job.steps, sync.stride),
        price=chosen.price,
        reasons=(
            _why(job, chosen, synced),
            *reasons(sync, terms, job.sync),
            *_unpromised(job),
            *_why_layouts(job, choices),
            *admitted.left_out,
            *guessed,
            *unable,
            *evaluating.left_out,
        ),
        considered=(*gather, *considered, *others),
    )


def choose_sites(job: EvaluateJob | PredictJob | QueryJob, answers: Answers, fleet: Fleet) -> Plan:
    """Return the plan of a job that trains nothing: where it runs, and who is left out and why; raise `Denied`."""
    admitted = allowed.workers(job, fleet, answers)
    return Plan(
        sites=admitted.sites,
        evaluators=admitted.sites if isinstance(job, EvaluateJob) else (),
        layouts={site: Layout() for site in admitted.sites},
        sync=Sync(),
        rounds=0,
        reasons=admitted.left_out,
    )


def _guessed(
    sites: Sequence[str], answers: Answers, profiles: Mapping[str, Profile]
) -> tuple[Mapping[str, Profile], tuple[Reason, ...]]:
    """Fill in the profile of a site whose owner lets no metric out: a profile is one, and stays there with the rest."""
    if not profiles:
        return profiles, ()
    slowest = max(sorted(profiles), key=lambda site: profiles[site].step_seconds)
    silent = [site for site in sites if site not in profiles and _refuses(answers, site, "metric")]
    words = "lets no metric out, so nobody was told how fast it is; it is priced like the slowest other one,"
    reasons = tuple(Reason(by="capability", words=f"{site} {words} {slowest}") for site in silent)
    return {**profiles, **dict.fromkeys(silent, profiles[slowest])}, reasons


def _refuses(answers: Answers, site: str, role: Role) -> bool:
    decision = answers.get(site, {}).get(role)
    return decision is not None and not decision.allowed


def _able(
    job: TrainJob, fleet: Fleet, sites: Sequence[str], profiles: Mapping[str, Profile]
) -> tuple[tuple[str, ...], tuple[Reason, ...]]:
    unable: dict[str, Reason] = {}
    for name in sites:
        words = _inability(job, fleet, name, profiles.get(name))
        if words:
            unable[name] = Reason(by="capability", words=f"{name} does not train: {words}")
    able = tuple(site for site in sites if site not in unable)
    if unable and (job.data.sites is not None or not able):
        said = "; ".join(reason.words for reason in unable.values())
        raise Unavailable(f"{'data.sites' if able else 'no site can train'}: {said}")
    return able, tuple(unable.values())


def _inability(job: TrainJob, fleet: Fleet, name: str, profile: Profile | None) -> str | None:
    if profile is None:
        return "it did not measure the task; see its log and try again"
    return unfit(job, nodes_of(fleet.site(name)), profile)


def _check_same_model(sites: Sequence[str], profiles: Mapping[str, Profile]) -> None:
    sizes = {site: profiles[site].parameters for site in sites}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{size} at {site}" for site, size in sizes.items())
        raise TaskFailed(f"task.model: builds different models ({said} parameters); make it independent of the site")


def _check_wait(sync: Sync | None, sites: int) -> None:
    if sync and sync.wait.count is not None and sync.wait.count > sites:
        wait = sync.wait
        raise Invalid(f"sync.wait.count: {wait.count} sites, and {sites} can train; set it to at most {sites}")
    if sync and (words := sync.unfit(sites)):
        raise Invalid(f"sync.{words}")


def _check_fragments(sync: Sync | None, parameters: int) -> None:
    if sync and sync.fragments > parameters:
        raise Invalid(
            f"sync.fragments: {sync.fragments}: the model has {parameters} parameters, and each fragment needs one; "
            f"set it to at most {parameters}"
        )


def _check_personal(sync: Sync | None, sites: Sequence[str], evaluating: Sequence[str]) -> None:
    if sync and sync.keep_local and (others := [site for site in evaluating if site not in sites]):
        raise Invalid(
            f"data.evaluate: {', '.join(others)}: does not train, so it has no tensors of its own to evaluate with "
            "(sync.keep_local); name sites that train"
        )


def _check_gradients(job: TrainJob, profiles: Sequence[Profile]) -> bool:
    """Return whether the task has gradients to share; raise `Invalid` for what a job pins that needs them."""
    if all(profile.gradients for profile in profiles):
        return True
    if job.sync and (words := beyond_arrays(job.sync)):
        raise Invalid(f"sync.{words}")
    if job.layout and job.layout.ranks > 1:
        raise Invalid(f"layout: {job.layout.ranks} ranks share gradients, and a task of arrays has none; remove it")
    if job.privacy:
        raise Invalid(
            "privacy: is of a step's gradients, and a task of arrays has none; remove it, or put noise on the wire"
        )
    return False


def _candidate(job: TrainJob, point: Point, layouts: Mapping[str, Layout], at: Sequence[Place]) -> _Considered:
    cost = price(job, point.sync, at)
    candidate = Candidate(name=point.name, sync=point.sync, layouts=dict(layouts), price=cost, rejected=point.rejected)
    return _Considered(candidate, cost)


def _gather(
    job: TrainJob, fleet: Fleet, answers: Answers, layouts: Mapping[str, Layout], at: Sequence[Place]
) -> tuple[Candidate, ...]:
    """Return "gather the data" with who refuses it; nothing for one site, whose rows are in one place already."""
    if len(layouts) == 1:
        return ()
    refusing = [allowed.refusals(site, answers, ("data",), "") for site in layouts]
    reasons = tuple(reason for refused in refusing for reason in refused)
    if sum(1 for refused in refusing if refused) < 2:
        # One refusal does not settle it: the others' rows could move to that site.
        reasons = (*reasons, Reason(by="capability", words="this version moves no rows between sites"))
    held = [site.dataset(job.data.dataset) for site in map(fleet.site, layouts) if site]
    datasets = [dataset for dataset in held if dataset]
    return (Candidate(name="gather the data", price=gather_price(job, datasets, at), rejected=reasons),)


def _take(job: TrainJob, synced: Sequence[_Considered]) -> tuple[_Considered, list[Candidate]]:
    """Return the chosen one, and all candidates with a reason on each other one."""
    if job.sync is not None:
        chosen = synced[0]
    else:
        free = [one for one in synced if not one.candidate.rejected]
        limit = _tie_limit(min(one.price.seconds for one in free))
        chosen = next(one for one in free if one.price.seconds <= limit)
    return chosen, [one.candidate if one is chosen else _passed_over(job, one, chosen) for one in synced]


def _tie_limit(seconds: float) -> float:
    return max(seconds * (1 + TIE_SHARE), seconds + TIE_SECONDS)


def _passed_over(job: TrainJob, one: _Considered, chosen: _Considered) -> Candidate:
    if one.candidate.rejected:
        return one.candidate
    if job.sync is not None:
        reason = Reason(by="the job", words=f"the job pins sync to {chosen.candidate.name}")
    else:
        reason = _by_price(one.price, chosen, "to let sites drift longer between exchanges")
    return one.candidate.model_copy(update={"rejected": (reason,)})


def _by_price(cost: Price, chosen: _Considered, gain: str) -> Reason:
    mine, best = duration(cost.seconds), duration(chosen.price.seconds)
    name = chosen.candidate.name
    if cost.seconds > chosen.price.seconds:
        return Reason(by="price", words=f"predicted {mine}, and {name} takes {best}")
    return Reason(by="price", words=f"predicted {mine}, which saves too little against {best} of {name} {gain}")


def _other_layouts(
    job: TrainJob,
    fleet: Fleet,
    layouts: Mapping[str, Layout],
    profiles: Mapping[str, Profile],
    chosen: _Considered,
) -> list[Candidate]:
    """Return the chosen sync under every other layout that was considered, each with its price and reason.

    Of those that are not data parallel the cheapest, and only where the chosen one is not.
    """
    sync = chosen.candidate.sync
    assert sync is not None
    offered = {site: candidates(job, nodes_of(fleet.site(site)), profiles[site]) for site in layouts}
    copies_only = all(layout.plain for layout in layouts.values())
    names = dict.fromkeys(layout for options in offered.values() for layout in options)
    found: dict[tuple[Layout, ...], _Considered] = {}
    for layout in names:
        if copies_only and not layout.plain:
            continue
        other = {site: _nearest(layout, options, layouts[site]) for site, options in offered.items()}
        key = tuple(other.values())
        if other == dict(layouts) or key in found:
            continue
        cost = price(job, sync, places(other, fleet, profiles))
        reason = _why_not(job, fleet, other, profiles, cost, chosen)
        label = f"{chosen.candidate.name}, {_ranks(layout)} a site"
        candidate = Candidate(name=label, sync=sync, layouts=other, price=cost, rejected=(reason,))
        found[key] = _Considered(candidate, cost)
    copies = [one.candidate for key, one in found.items() if all(layout.plain for layout in key)]
    cut = [one for key, one in found.items() if not all(layout.plain for layout in key)]
    cut.sort(key=lambda one: one.price.seconds)
    return [*copies, *(one.candidate for one in cut[:MOST_OTHERS])]


def _nearest(layout: Layout, options: Sequence[Layout], chosen: Layout) -> Layout:
    """Return a layout where it is offered; else of copies as many as there may be, and otherwise what was chosen."""
    if layout in options:
        return layout
    return max((one for one in options if one.plain), key=lambda one: one.data) if layout.plain else chosen


def _why_not(
    job: TrainJob,
    fleet: Fleet,
    layouts: Mapping[str, Layout],
    profiles: Mapping[str, Profile],
    cost: Price,
    chosen: _Considered,
) -> Reason:
    if job.layout is not None:
        return Reason(by="the job", words=f"the job pins the layout to {_ranks(job.layout)} a site")
    for site, layout in layouts.items():
        if words := misfit(job, nodes_of(fleet.site(site)), profiles[site], layout):
            return Reason(by="capability", words=f"does not fit at {site}: {words}")
    return _by_price(cost, chosen, "for more ranks")


def _ranks(layout: Layout) -> str:
    if not layout.plain:
        return spelled(layout)
    return "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"


def _unpromised(job: TrainJob) -> tuple[Reason, ...]:
    """Return what of a job's data leaves beside its promise about rows."""
    if job.privacy is None or not job.data.statistics:
        return ()
    words = "privacy: data.statistics leave the sites without noise, beside what is promised of each row"
    return (Reason(by="the job", words=words),)


def _why_layouts(job: TrainJob, choices: Mapping[str, Choice]) -> tuple[Reason, ...]:
    """Return why sites compute by something else than copies: those of one layout and one reason together."""
    if job.layout is not None:
        return ()
    told: dict[str, list[str]] = {}
    for site, choice in choices.items():
        copies = [words for layout, words in choice.too_big if layout.plain]
        if copies and not choice.layout.plain:
            told.setdefault(f"by {spelled(choice.layout)}, for copies do not fit: {copies[-1]}", []).append(site)
    return tuple(
        Reason(by="capability", words=f"{', '.join(sites)}: computes {words}") for words, sites in told.items()
    )


def _why(job: TrainJob, chosen: _Considered, synced: Sequence[_Considered]) -> Reason:
    name, cost = chosen.candidate.name, duration(chosen.price.seconds)
    if job.sync is not None:
        return Reason(by="the job", words=f"the job pins sync to {name}, predicted at {cost}")
    if len(chosen.candidate.layouts) == 1:
        words = f"one site has nobody to exchange with; its rounds only report and save, predicted at {cost}"
        return Reason(by="capability", words=words)
    free = [one for one in synced if not one.candidate.rejected]
    cheapest = min(free, key=lambda one: one.price.seconds)
    if len(free) == 1:
        return Reason(by="capability", words=f"{name} is the only point left, predicted at {cost}")
    if cheapest.price.seconds >= chosen.price.seconds:
        return Reason(by="price", words=f"{name} is predicted at {cost}, the least of {len(free)} points")
    words = (
        f"{name} is predicted at {cost}, close to the least ({cheapest.candidate.name}, "
        f"{duration(cheapest.price.seconds)}), and exchanges more often, nearer to centralised training"
    )
    return Reason(by="price", words=words)
