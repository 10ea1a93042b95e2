"""What a stage's answers become: pooled statistics, the next weights, metrics, a query's rows."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from itertools import groupby

import numpy as np

from atoll.data import query as sql
from atoll.data.statistics import pool
from atoll.outer.advance import Advance
from atoll.outer.down import in_changes
from atoll.outer.merge import Update, stale
from atoll.outer.metrics import merge_totals
from atoll.outer.optimiser import State as OuterState
from atoll.outer.secret import Hidden
from atoll.outer.wire import CHUNK
from atoll.runtime import faults
from atoll.runtime.concealing import weight_of
from atoll.runtime.files import RunFiles
from atoll.runtime.state import State, spooled
from atoll.spec.event import Answer, Merged, Result
from atoll.spec.job import QueryJob
from atoll.spec.model import elements, with_control


def merged(state: State, answers: Sequence[Answer], files: RunFiles, hidden: Hidden | None = None) -> Merged:
    """Combine a stage's answers into the event that opens the next one. A pure function but for ``files``.

    ``hidden`` is what a train stage's sum is under; raises `Corrupt` when it is no sum then.
    """
    assert state.work is not None
    made = _train(state, answers, files, hidden) if hidden is not None else _MERGES[state.work](state, answers, files)
    sites = tuple(answer.site for answer in answers)
    return made.model_copy(update={"run": state.run, "position": state.position, "sites": sites})


def _merged(**fields: object) -> Merged:
    return Merged.model_validate({"run": "run", "position": 0, "sites": (), **fields})


def _measure(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    result = Result(missing=state.missing) if state.missing else None
    return _merged(statistics=pool([answer.sums for answer in answers]), result=result)


def _initialise(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    [answer] = answers
    assert state.plan is not None
    assert answer.update is not None
    name = spooled(answer)
    files.spool.check(name, answer.update)
    size = elements(answer.signature)
    control = state.plan.sync.control
    signature = with_control(answer.signature) if control else answer.signature
    vector = np.zeros(2 * size if control else size, dtype=np.float32)  # control variates begin at nothing
    with files.spool.reading(name, (), size) as window:
        for offset in range(0, size, CHUNK):
            piece = window(offset)
            vector[offset : offset + len(piece)] = piece
    return _merged(weights=files.put_weights(vector, signature), signature=signature)


def _train(state: State, answers: Sequence[Answer], files: RunFiles, hidden: Hidden | None = None) -> Merged:
    assert state.plan is not None
    assert state.weights is not None
    sync = state.plan.sync
    start = files.vector(state.weights, state.signature)
    before = files.outer(state.outer) if state.outer else OuterState()
    with ExitStack() as open_updates:
        low, high = sync.span(len(start), state.version)
        shared = [list(together) for _, together in groupby(sorted(answers, key=spooled), key=spooled)]
        if hidden is None:
            updates = [_update(state, together, high - low, files, open_updates) for together in shared]
        else:
            updates = [_sum(state, answers, high - low, files, open_updates, hidden)]
        step = Advance(sync, start, updates, before, len(answers) / len(state.plan.sites))
        change = open_updates.enter_context(files.changes.writing()) if in_changes(sync) else None
        # Its threads end before the updates are closed.
        pieces = open_updates.enter_context(closing(step.pieces(change=change.add if change else None)))
        digest = files.put_weights(step.weights, state.signature, pieces)
        if change is not None:
            files.changes.keep(change, state.weights, digest)
    losses = [(answer.loss, answer.examples) for answer in answers if answer.loss is not None and answer.examples]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses) if losses else None
    faults.reached("hub", "merging", "weights")
    return _merged(weights=digest, outer=files.put_outer(step.state), loss=loss, outliers=step.outliers)


def _update(state: State, together: Sequence[Answer], size: int, files: RunFiles, until: ExitStack) -> Update:
    """Return the one update of these answers, verified and open ``until`` its round is merged: a site's own, or the
    mean of several, by the same rule, that a relay made of theirs and that counts as much as they would."""
    answer = together[0]
    assert state.plan is not None
    assert answer.update is not None
    sync, name, behind = state.plan.sync, spooled(answer), state.version - answer.version
    files.spool.check(name, answer.update)
    window = until.enter_context(files.spool.reading(name, sync.wire, size))
    discount = stale(1.0, behind, sync.wait.staleness) if behind else 1.0
    return Update(name[1], float(sum(one.examples for one in together)), window, discount, len(together))


def _sum(
    state: State, answers: Sequence[Answer], size: int, files: RunFiles, until: ExitStack, hidden: Hidden
) -> Update:
    """Return the mean of the updates that these answers brought under masks, as one update of all of them."""
    assert state.plan is not None
    sync, windows = state.plan.sync, list[Callable[[int], np.ndarray]]()
    for answer in answers:
        assert answer.update is not None
        files.spool.check(spooled(answer), answer.update)
        windows.append(until.enter_context(files.spool.reading(spooled(answer), sync.wire, size)))
    total = float(sum(weight_of(sync, answer.examples) for answer in answers))

    def window(offset: int) -> np.ndarray:
        words = windows[0](offset).view(np.uint32).copy()
        for other in windows[1:]:
            words += other(offset).view(np.uint32)
        return hidden.mean(offset, words, total)

    return Update("sum", total, window, sites=len(answers))


def _evaluate(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    by_site = {answer.site: merge_totals([answer.totals]) for answer in answers}
    metrics = merge_totals([answer.totals for answer in answers])
    return _merged(result=Result(metrics=metrics, by_site=by_site, missing=state.missing))


def _predict(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    by_site = {answer.site: {"rows": float(answer.examples)} for answer in answers}
    return _merged(result=Result(metrics={"rows": float(sum(a.examples for a in answers))}, by_site=by_site))


def _query(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    assert isinstance(state.job, QueryJob)
    parts = [(answer.groups, answer.suppressed) for answer in answers]
    return _merged(result=sql.merge(sql.parse(state.job.sql), parts))


_MERGES = {
    "measure": _measure,
    "initialise": _initialise,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "query": _query,
}
