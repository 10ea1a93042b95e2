"""What a stage's answers become: pooled statistics, the next weights, metrics, a query's rows."""

from collections.abc import Sequence

import numpy as np

from atoll.data import query as sql
from atoll.data.statistics import pool
from atoll.errors import Invalid
from atoll.outer import optimiser
from atoll.outer.merge import Update, merge, stale
from atoll.outer.metrics import merge_totals
from atoll.runtime.files import RunFiles
from atoll.runtime.machine import State
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
    return _merged(statistics=pool([answer.sums for answer in answers]))


def _initialise(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    [answer] = answers
    vector = np.zeros(sum(spec.size for spec in answer.signature), dtype=np.float32)
    for offset, values in files.spool.windows((answer.position, answer.site), (), len(vector)):
        vector[offset : offset + len(values)] = values
    return _merged(weights=files.put_weights(vector, answer.signature), signature=answer.signature)


def _train(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    assert state.plan is not None
    assert state.weights is not None
    sync = state.plan.sync
    wire = tuple(transform.kind for transform in sync.wire)
    start = files.vector(state.weights, state.signature)
    updates: list[Update] = []
    for answer in answers:
        assert answer.update is not None
        name = (answer.position, answer.site)
        files.spool.check(name, answer.update)
        behind = state.version - answer.version
        updates.append(
            Update(
                answer.site,
                float(answer.examples),
                lambda name=name: files.spool.windows(name, wire, len(start)),
                stale(1.0, behind, sync.wait.staleness) if behind else 1.0,
            )
        )
    update = merge(sync.merge, len(start), updates, sync.trim)
    before = files.outer(state.outer) if state.outer else optimiser.State()
    gradient = optimiser.pseudo_gradient(sync.exchange, update)
    weights, after = optimiser.step(sync.outer, start, gradient, before)
    if not np.isfinite(weights).all():
        raise Invalid(f"weights after round {state.version + 1} are not finite; lower sync.outer.rate")
    losses = [(answer.loss, answer.examples) for answer in answers if answer.loss is not None and answer.examples]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses) if losses else None
    digest = files.put_weights(weights, state.signature)
    return _merged(weights=digest, outer=files.put_outer(after), loss=loss)


def _evaluate(state: State, answers: Sequence[Answer], files: RunFiles) -> Merged:
    by_site = {answer.site: merge_totals([answer.totals]) for answer in answers}
    return _merged(result=Result(metrics=merge_totals([answer.totals for answer in answers]), by_site=by_site))


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
