"""Laws of layouts in rounds, for the ready-made task: what a site's workers send is what one process would."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.pretrained import inspected
from atoll.runtime.local import LocalExecutor
from atoll.spec import order as orders
from atoll.spec.job import Optimiser
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.opening import opening
from tests.unit.folders import NEEDED, TEXT, save

pytestmark = [NEEDED, pytest.mark.timeout(300)]
PARAMS = {"block": 17, "new": 4}
LORA, DROPPED, FULL = {"lora": {"rank": 2}}, {"lora": {"rank": 2, "dropout": 0.2}}, {"full": True}
CASES = [
    (degrees, params)
    for degrees in ({"tensor": 2}, {"shard": 2}, {"pipeline": 2}, {"context": 2})
    for params in (LORA, FULL)
]
CASES += [({"expert": 2}, LORA), ({"expert": 2}, FULL)]
CASES.append(({"tensor": 2}, DROPPED))  # elsewhere it is drawn for each share of a batch, or micro-batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "task.py").write_text("from atoll.tasks import CausalLM\n")
    pq.write_table(pa.table({"text": [TEXT + str(number) for number in range(20)]}), folder / "rows.parquet")
    save(folder / "model")
    save(folder / "mixture", "mixtral", initializer_range=0.1)  # so wide that no last bit chooses an expert
    return folder


@pytest.fixture(scope="module")
def groups(folder):
    executor = LocalExecutor()
    made = {ranks: executor.start(Layout(data=ranks), folder / f"ranks-{ranks}") for ranks in (1, 2)}
    yield made
    for group in made.values():
        group.close()
    executor.close()


def opened(folder, params, degrees, mixed):
    files = inspected("tiny", folder / ("mixture" if mixed else "model"))
    task = orders.TaskName(file="task.py", name="CausalLM", params={**PARAMS, **params}, pretrained=files.digest)
    return opening(folder, task=task, pretrained=files, holdout=0.25, layout=Layout(**degrees))


def round_of(groups, folder, params, degrees, mixed):
    """Return the update of a round, its loss, what is told of the held-out texts, and how some are completed."""
    about, layout = opened(folder, params, degrees, mixed), Layout(**degrees)
    group, home = groups[layout.ranks], folder / f"ranks-{layout.ranks}"
    group.order(about, 120)
    weights, update, answers = home / "initial.f32", home / "update.f32", home / "answers.parquet"
    answers.unlink(missing_ok=True)
    signature = group.order(orders.Initialise(seed=3, output=str(weights)), 60).signature
    drawn = np.random.default_rng(2).normal(0, 0.02, weights.stat().st_size // 4).astype(np.float32)
    (np.fromfile(weights, np.float32) + drawn).tofile(weights)  # or half of an adapter would be zeros
    given = {"seed": 3, "weights": str(weights), "signature": signature}
    train = orders.Train(
        **given,
        output=str(update),
        done=0,
        steps=4,
        batch=4,
        optimiser=Optimiser(kind="sgd", rate=0.1),
        sync=Sync(period=4),
    )
    said = group.order(train, 60)
    given.pop("seed")
    told = group.order(orders.Evaluate(**given), 60).totals
    if not {"pipeline", "context"} & set(degrees):  # which make no completions
        group.order(orders.Predict(**given, output=str(answers)), 60)
    return np.fromfile(update, np.float32), said, told, pq.read_table(answers) if answers.exists() else None


@pytest.mark.parametrize(("degrees", "params"), CASES, ids=json.dumps)
def test_a_layouts_update_and_answers_are_those_of_one_process(groups, folder, degrees, params):
    mixed = "expert" in degrees
    alone, said, told, completed = round_of(groups, folder, params, {}, mixed)
    together, also, heard, answered = round_of(groups, folder, params, degrees, mixed)
    assert np.abs(alone).max() > 1e-3
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    assert also.loss == pytest.approx(said.loss, abs=1e-5)
    assert heard["loss"].total == pytest.approx(told["loss"].total, rel=1e-5)
    assert answered is None or answered.equals(completed)
