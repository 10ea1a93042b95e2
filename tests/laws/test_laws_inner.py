"""Laws of the inner plane: two local ranks compute what one does, with real worker processes."""

import numpy as np
import pytest

from atoll.errors import TaskFailed
from atoll.outer.wire import CHUNK
from atoll.runtime.local import LocalExecutor
from atoll.spec import order as orders
from atoll.spec.job import Optimiser
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.laws.net import task, write_rows
from tests.opening import opening

ROWS = 61  # odd, so that batches cross the border of an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inner")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "task.py").write_text(task(columns=5, hidden=8))
    x = np.random.default_rng(1).normal(size=(ROWS, 5))
    write_rows(folder / "rows.parquet", x, np.sin(x[:, 0]) + 0.3 * x[:, 1])
    return folder


class Ranks:
    """A layout's worker processes with the task open, and the first weights."""

    def __init__(self, folder, ranks):
        self.folder = folder / f"ranks-{ranks}"
        self.executor = LocalExecutor()
        self.group = self.executor.start(Layout(data=ranks), self.folder)
        opened = opening(folder, "Net")
        self.group.order(opened, 120)
        self.weights = str(self.folder / "initial.f32")
        self.signature = self.group.order(orders.Initialise(seed=3, output=self.weights), 120).signature

    def train(self, batch=16, steps=4, done=0, kind="adamw", **sync):
        output = self.folder / "update.f32"
        order = orders.Train(
            seed=3,
            weights=self.weights,
            signature=self.signature,
            output=str(output),
            done=done,
            steps=steps,
            batch=batch,
            optimiser=Optimiser(kind=kind, rate=0.01),
            sync=Sync.model_validate({"period": steps, **sync}),
        )
        reply = self.group.order(order, 120)
        return np.fromfile(output, np.float32), reply


@pytest.fixture(scope="module")
def one(folder):
    ranks = Ranks(folder, 1)
    yield ranks
    ranks.group.close()
    ranks.executor.close()


@pytest.fixture(scope="module")
def two(folder, one):  # after it: both start on few cores
    ranks = Ranks(folder, 2)
    yield ranks
    ranks.group.close()
    ranks.executor.close()


def test_every_layout_begins_with_the_same_weights(one, two):
    first = np.fromfile(one.weights, np.float32)
    assert np.array_equal(first, np.fromfile(two.weights, np.float32))
    assert 0 < first.size < CHUNK
    assert np.ptp(first) > 0


@pytest.mark.parametrize("batch", [16, 7, 3])  # 7 and 3 give the ranks unequal shares
def test_two_ranks_equal_one_process_over_four_adamw_steps(one, two, batch):
    alone, said = one.train(batch)
    together, also = two.train(batch)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    assert np.abs(alone).max() > 1e-3
    assert (said.examples, also.examples) == (4 * batch, 4 * batch)
    assert also.loss == pytest.approx(said.loss, abs=1e-6)


def test_two_ranks_equal_one_process_across_the_border_of_an_epoch(one, two):
    alone, _ = one.train(batch=15, done=2)  # examples 30 to 90 of 61
    together, _ = two.train(batch=15, done=2)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


def test_two_ranks_sum_the_gradient_that_one_process_has(one, two):
    alone, _ = one.train(batch=9, exchange="gradient")
    together, _ = two.train(batch=9, exchange="gradient")
    np.testing.assert_allclose(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_round_done_again_gives_the_same_bits(request, which):
    ranks = request.getfixturevalue(which)
    first, _ = ranks.train()
    assert np.array_equal(ranks.train()[0], first)


def test_a_batch_too_small_for_its_ranks_is_told_and_the_workers_stay_fit(two):
    with pytest.raises(TaskFailed, match="batch: 1 examples cannot be shared by 2 ranks"):
        two.train(batch=1)
    assert two.train(batch=2)[1].examples == 8
