"""What a stage's answers become: pooled statistics, the next weights, metrics, a query's rows."""

from collections.abc import Sequence
from contextlib import ExitStack, closing

import numpy as np

from atoll.data import query as sql
from atoll.data.statistics import pool
from atoll.outer.advance import Advance
from atoll.outer.merge import Update, stale
from atoll.outer.metrics import merge_totals
from atoll.outer.optimiser import State as OuterState
from atoll.outer.wire import CHUNK
from atoll.runtime.files import RunFiles
from atoll.runtime.state import State
from atoll.spec.event import Answer, Merged, Result
from atoll.spec.job import QueryJob


def merged(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    """Combine a stage's answers into the event that opens the next one. A pure function but for ``files``."""
    assert state.work is not None
    made = _MERGES[state.work](state, answers, files)
    sites = tuple(answer.site for answer in answers)
    return made.model_copy(update={"run": state.run, "position": state.position, "sites": sites})


def _merged(**fields: object) -> Merged:
    return Merged.model_validate({"run": "run", "position": 0, "sites": (), **fields})


def _measure(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    result = Result(missing=state.missing) if state.missing else None
    return _merged(statistics=pool([answer.sums for answer in answers]), result=result)


def _initialise(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    [answer] = answers
    vector = np.empty(sum(spec.size for spec in answer.signature), dtype=np.float32)
    with files.spool.reading((answer.position, answer.site), (), len(vector)) as window:
        for offset in range(0, len(vector), CHUNK):
            vector[offset : offset + CHUNK] = window(offset)
    return _merged(weights=files.put_weights(vector, answer.signature), signature=answer.signature)


def _train(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    assert state.plan is not None
    assert state.weights is not None
    sync = state.plan.sync
    start = files.vector(state.weights, state.signature)
    before = files.outer(state.outer) if state.outer else OuterState()
    with ExitStack() as open_updates:
        updates = [_update(state, answer, len(start), files, open_updates) for answer in answers]
        step = Advance(sync, start, updates, before)
        pieces = open_updates.enter_context(closing(step.pieces()))  # its threads end before the updates are closed
        digest = files.put_weights(step.weights, state.signature, pieces)
    losses = [(answer.loss, answer.examples) for answer in answers if answer.loss is not None and answer.examples]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses) if losses else None
    return _merged(weights=digest, outer=files.put_outer(step.state), loss=loss)


def _update(state: State, answer: Answer, size: int, files: RunFiles, until: ExitStack) -> Update:
    """Return a site's update, verified and open ``until`` its round is merged."""
    assert state.plan is not None
    assert answer.update is not None
    sync, name, behind = state.plan.sync, (answer.position, answer.site), state.version - answer.version
    files.spool.check(name, answer.update)
    window = until.enter_context(files.spool.reading(name, sync.wire, size))
    discount = stale(1.0, behind, sync.wait.staleness) if behind else 1.0
    return Update(answer.site, float(answer.examples), window, discount)


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
