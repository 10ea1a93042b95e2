"""Private steps in whole runs over the memory channel with real workers: the model is there, and no loss ever left."""

import json

import numpy as np
import pyarrow as pa
import pytest

from atoll.registry.weights import load
from atoll.spec.model import Bundle
from tests import memory
from tests.laws.net import task
from tests.undeployed import NothingDeployed

ROWS, BATCH, STEPS, ROUNDS = 200, 32, 5, 4
MIXING = task(columns=3, hidden=8).replace('"y": table["y"].to_numpy()', '"y": (table["y"].to_numpy() - x.mean())')
BUNDLES = {
    "net": Bundle(files={"task.py": task(columns=3, hidden=8)}),
    "mixing": Bundle(files={"task.py": MIXING}),
}


def rows(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 3))
    return pa.table({**{f"x{i}": column for i, column in enumerate(x.T)}, "y": x @ [1.0, -1.0, 0.5]})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("private")
    with memory.world(home, {"ada": rows(0)}, NothingDeployed()) as made:
        yield made


def job(**fields):
    known = {"name": "net", "task": {"file": "task.py", "name": "Net"}, "steps": STEPS * ROUNDS, "batch": BATCH}
    known |= {"optimiser": {"kind": "sgd", "rate": 0.1}, "sync": {"preset": "fedavg", "period": STEPS}}
    known |= {"privacy": {"clip": 1.0, "noise": 1.0, "delta": 1e-3, "accountant": "rdp"}}
    return memory.job("train", **{**known, **fields})


def trained(hub):
    view = memory.finished(hub, job(), BUNDLES["net"])
    model = hub.model(view.result.model)
    return view, load(hub._blobs.get(model.weights), model.signature)[0]


def test_a_private_run_makes_a_model_and_says_nothing_of_its_losses_and_samples(hub):
    view, weights = trained(hub)
    heard = list(hub._journal.entries(run=view.run))
    updates = [e.event.answer for e in heard if e.event.kind == "run.answered" and e.event.answer.examples]
    rounds = [one for one in updates if one.steps]
    assert len(rounds) == ROUNDS
    assert {(one.loss, one.pace, one.examples) for one in rounds} == {(None, None, STEPS * BATCH)}
    assert view.loss is None
    assert "loss" not in json.dumps([e.event.model_dump(mode="json", exclude_none=True) for e in heard])
    assert np.isfinite(weights).all()
    _, again = trained(hub)
    assert not np.array_equal(weights, again)  # of the same job: what is drawn is secret


def test_a_task_whose_examples_are_made_of_other_rows_too_is_refused(hub):
    view = memory.ended(hub, job(), BUNDLES["mixing"])
    assert (view.state, view.error) == ("failed", "TaskFailed")
    assert "examples: … is another for a row when the others are not there, and privacy is of each" in view.words
