"""How many of a stage's answers open the next one: the plan's `wait`, stage by stage.

Under `all` every stage waits for every one of its sites. Under `quorum` and `buffer` it does so until its deadline, and
then goes on with fewer, so that a site which is lost for good ends no run that was planned to do without it:

    measure      `count` sites (as many as there are, when some have refused)
    initialise   one site makes the first weights; at each deadline the next one is asked as well, and the first answer
                 is taken (the same seed makes the same weights anywhere)
    train        quorum: `count` sites; buffer: `count` updates at any time, with no deadline
    evaluate     one site: metrics of fewer sites say so, and are better than no model

An answer that was rejected is nobody's: the stage goes on without its site while enough others are left, and otherwise
asks it again. A buffer always asks again.

A site that failed (its task raised, its loss was not finite, its workers died too often) sits the stage out in the same
way, and the next stage, or a buffer's next version, asks it again. Where too few have not failed the run ends: what
fails at so many sites is the task's own mistake.

Predictions and queries always wait for every site: an answer without some of the rows is a wrong answer.
"""

from typing import Literal

from atoll.spec.event import Work
from atoll.spec.plan import Plan

Rule = Literal["all", "quorum", "buffer"]


def rule(plan: Plan, work: Work | None) -> Rule:
    """Return how a stage of this kind waits under the plan."""
    kind = plan.sync.wait.kind
    if kind == "all" or work not in ("measure", "initialise", "train", "evaluate"):
        return "all"
    return kind if work == "train" else "quorum"


def needed(plan: Plan, work: Work | None, members: int, lapsed: bool) -> int:
    """Return how many answers end a stage of so many members, before its deadline has lapsed or after."""
    if work == "initialise":
        return 1
    how = rule(plan, work)
    if how == "all" or (how == "quorum" and not lapsed):
        return members
    return 1 if work == "evaluate" else min(plan.sync.wait.count or 1, members)


def suffice(plan: Plan, work: Work | None, members: int) -> bool:
    """Tell whether a stage can go on with the members that are left after one has refused."""
    if rule(plan, work) == "all":
        return False
    return members >= (1 if work == "evaluate" else plan.sync.wait.count or 1)


def dispensable(plan: Plan, work: Work | None, members: int, able: int) -> bool:
    """Tell whether a stage goes on without those of its members whose answers were rejected, when so many others are
    here or have answered. Where it does not, they are asked again."""
    return rule(plan, work) == "quorum" and able >= needed(plan, work, members, lapsed=True)


def initialisers(plan: Plan, without: frozenset[str]) -> tuple[str, ...]:
    """Return the sites that may make the first weights, the planned one first; under `all` there is no other."""
    first = plan.initialiser or plan.sites[0]
    others = () if rule(plan, "initialise") == "all" else tuple(site for site in plan.sites if site != first)
    return tuple(site for site in (first, *others) if site not in without)
