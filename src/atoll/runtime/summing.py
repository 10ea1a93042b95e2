"""One update of several, as a relay makes it: their mean by the plan's rule, encoded as a site encodes its own."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from atoll.boundary.channel import Source
from atoll.outer.merge import Rule, Update, merging
from atoll.outer.wire import CHUNK, recalls
from atoll.runtime.brought import kinds
from atoll.runtime.disk import appearing
from atoll.runtime.kept import Kept, RunFolder
from atoll.runtime.outgoing import content, encode_with_feedback, outgoing_kept, span
from atoll.runtime.spool import Spool
from atoll.spec.document import canonical, sha256
from atoll.spec.event import Answer
from atoll.spec.message import Assign, Branch, Parcel


@dataclass(frozen=True, slots=True)
class Brought:
    """One update in the spool, of the child that brought it: a site's own, or another relay's sum."""

    answers: tuple[Answer, ...]
    digest: str


def summed(
    folder: RunFolder, spool: Spool, a: Assign, branch: Branch, brought: Mapping[str, Brought]
) -> tuple[Parcel, Source]:
    """Return the sum of what was brought, with all its answers; made once, for the same updates the same bits.

    ``a`` is any of the stage's assignments. Raises as `Spool.check` and `encode_with_feedback`, `Invalid` for updates
    that cannot be summed.
    """
    a = a.model_copy(update={"counted": branch.counted})
    folder.open(a.epoch, a.position)
    base = a.counted if recalls(a.sync.wire) else None
    named = sha256(canonical({child: one.digest for child, one in brought.items()}))
    kept = folder.kept(a.position)
    if kept is None or (kept.weights, kept.base) != (named, base):
        kept = _made(folder, spool, a, brought, named)
    (first, last), order = span(a), {site: number for number, site in enumerate(branch.sites)}
    answers = [answer for one in brought.values() for answer in one.answers]
    parcel = Parcel(
        run=a.run,
        purpose="update",
        size=last - first,
        content=content(kept.token, [step.model_dump(mode="json") for step in a.sync.wire]),
        wire=kinds(a.sync.wire),
        answers=tuple(
            answer.model_copy(update={"via": (branch.relay, *answer.via)})
            for answer in sorted(answers, key=lambda answer: order[answer.site])
        ),
    )
    return parcel, outgoing_kept(folder, a, kept)[0]


def _made(folder: RunFolder, spool: Spool, a: Assign, brought: Mapping[str, Brought], named: str) -> Kept:
    """Write the sum as a site writes its update, and mark it as whole. Memory: O(CHUNK)."""
    folder.begin(a.position)
    first, last = span(a)
    with ExitStack() as until:
        updates: list[Update] = []
        for child, one in brought.items():
            name, weight = (a.position, child), float(sum(answer.examples for answer in one.answers))
            spool.check(name, one.digest)
            window = until.enter_context(spool.reading(name, a.sync.wire, last - first))
            updates.append(Update(child, weight, window, sites=len(one.answers)))
        rule: Rule = "weighted_mean" if a.sync.merge == "weighted_mean" else "mean"  # sums of others are not asked for
        at = merging(rule, last - first, updates)
        with appearing(folder.update(a.position)) as file:
            for offset in range(0, last - first, CHUNK):
                file.write(at(offset).data)
    examples = sum(answer.examples for one in brought.values() for answer in one.answers)
    base, lost = None, None
    if recalls(a.sync.wire):
        folder.drop_uncounted(a.counted, later=False)
        base, lost = a.counted, encode_with_feedback(folder, a)
    kept = Kept(named, examples, 0.0, 0.0, base=base, residual_crc=lost)
    folder.keep(a.position, kept)
    return kept
