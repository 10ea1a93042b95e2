"""Sweeps as documents: what is refused before anything starts, in words with field, value and mend."""

import pytest

from atoll.errors import Invalid
from atoll.spec.job import TrainJob, parse_job

RATE = {"optimiser.rate": {"low": 0.001, "high": 1.0, "log": True}}


def job(parameters=RATE, **sweep):
    fields = {"kind": "train", "name": "job", "purpose": "care", "data": {"dataset": "rows"}}
    fields |= {"task": {"file": "task.py", "name": "Task", "params": {"hidden": 8}}, "batch": 8}
    made = parse_job({**fields, "sweep": {"parameters": parameters, **sweep}}, "job.yaml")
    assert isinstance(made, TrainJob)
    return made


def test_a_sweep_has_defaults_that_search():
    sweep = job().sweep
    assert (sweep.trials, sweep.concurrent, sweep.objective, sweep.direction) == (20, 2, "loss", "minimise")
    assert (sweep.sampler, sweep.pruner.kind, sweep.pruner.factor) == ("tpe", "asha", 3)


def test_a_trial_is_the_job_with_its_values_and_no_sweep():
    made = job().trial({"optimiser.rate": 0.5, "task.params.hidden": 16, "sync.period": 4, "sync": "diloco"})
    assert (made.sweep, made.optimiser.rate, made.task.params) == (None, 0.5, {"hidden": 16})
    assert (made.sync.preset, made.sync.period, made.sync.outer.nesterov) == ("diloco", 4, True)
    assert made.model_copy(update={"sync": None, "optimiser": job().optimiser, "task": job().task}) == job().model_copy(
        update={"sweep": None}
    )


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"optimiser.rat": {"low": 0.1, "high": 1}}, "optimiser.rat: unknown field; did you mean 'rate'?"),
        (
            {"optimizer.rate": {"low": 0.1, "high": 1}},
            "'optimizer.rate' is no field that trials may differ in; did you",
        ),
        ({"seed": {"choice": [1, 2]}}, "'seed' is no field that trials may differ in"),
        ({"data.holdout": {"choice": [0.1, 0.2]}}, "'data.holdout' is no field that trials may differ in"),
        ({"sweep.trials": {"choice": [1, 2]}}, "'sweep.trials' is no field that trials may differ in"),
        ({"optimiser.rate": {"low": -1.0, "high": 1.0}}, "optimiser.rate: -1.0: Input should be greater than 0"),
        ({"optimiser.momentum": {"low": 0.0, "high": 1.0}}, "optimiser.momentum: 1.0: Input should be less than 1"),
        ({"batch": {"low": 1.0, "high": 9.5}}, "batch: 9.5"),
        ({"batch": {"choice": [4, "four"]}}, "batch: 'four'"),
        ({"batch": {"low": 1}}, "batch.range.high: required and missing"),
        ({"batch": {"low": 1, "hihg": 4}}, "batch.range.hihg: unknown field; did you mean 'high'?"),
        ({"batch": [1, 2]}, "batch.range: a list"),
        ({"batch.size": {"choice": [4, 8]}}, "'batch.size': 'batch' has no fields"),
        ({"sync": {"choice": ["fedavg", "fedavgg"]}}, "there is no preset 'fedavgg'; did you mean 'fedavg'?"),
        ({"layout.data": {"choice": [1, 16]}}, "batch: 8: the layout's data x shard x expert make 16 shares"),
        ({"steps": {"choice": [4, 4]}}, "a value is there twice"),
        ({"optimiser.rate": {"low": 1.0, "high": 0.1}}, "high: 0.1 is not above low: 1; set high: 2"),
        ({"optimiser.rate": {"low": 0.0, "high": 1.0, "log": True}}, "low: 0 has no logarithm; set low: 0.001"),
        ({"optimiser.rate": {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, "step: 0.1 says nothing where log"),
        ({"batch": {"low": 1.5, "high": 4, "integer": True}}, "low, high and step are to be whole"),
        (
            {"optimiser.rate": {"low": 0.0, "high": 1.0, "step": 0.3}},
            "no whole number of steps above low; set high: 0.9",
        ),
    ],
)
def test_a_field_or_value_that_makes_no_job_is_told_before_the_start(parameters, words):
    with pytest.raises(Invalid) as error:
        job(parameters)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"trials": 2, "concurrent": 3}, "concurrent: 3: of 2 trials; set concurrent: 2"),
        ({"direction": "maximise"}, "a loss is to be small"),
        ({"sampler": "grid"}, "'optimiser.rate' has no points for a grid"),
        ({"parameters": {}}, "at least 1 item"),
        ({"sampler": "grid", "parameters": {"batch": {"choice": [4, 8]}}}, "trials: 20: the grid has 2 points"),
        ({"pruner": {"factor": 1}}, "pruner.factor: 1"),
        ({"sampler": "tpee"}, "sweep.sampler: 'tpee'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, words):
    with pytest.raises(Invalid) as error:
        job(**{"parameters": RATE, **sweep})
    assert words in str(error.value)


def test_both_ends_of_every_range_are_tried_out_also_where_there_are_many():
    few = job({**RATE, "batch": {"choice": [4, 8]}}).sweep
    assert len(list(few.corners())) == 4
    ranges = {f"task.params.p{number}": {"low": 0, "high": 1} for number in range(9)}
    corners = list(job(ranges).sweep.corners())
    assert len(corners) == 18
    assert all({corner[path] for corner in corners} == {0.0, 1.0} for path in ranges)


def test_the_points_of_a_grid_are_exact():
    grid = {"optimiser.rate": {"low": 0.1, "high": 0.5, "step": 0.1}, "steps": {"low": 2, "high": 8, "integer": True}}
    sweep = job(grid, sampler="grid", trials=35).sweep
    assert sweep.parameters["optimiser.rate"].points == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert sweep.parameters["steps"].points == (2, 3, 4, 5, 6, 7, 8)
