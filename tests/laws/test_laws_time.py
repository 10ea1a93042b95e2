"""The laws of rounds by time: one step at least, never more than the period, and every rank stops at the same one."""

import numpy as np
import pytest

from atoll.spec.job import Optimiser
from atoll.spec.order import Train
from atoll.spec.sync import Sync
from tests.laws.test_laws_inner import Ranks, folder

__all__ = ["folder"]
LITTLE, MUCH = 1e-9, 500.0


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def ranks(request, folder):
    made = Ranks(folder, request.param)
    yield made
    made.group.close()
    made.executor.close()


def train(ranks, steps, **sync):
    output = ranks.folder / "update.f32"
    order = Train(
        seed=3,
        weights=ranks.weights,
        signature=ranks.signature,
        output=str(output),
        done=0,
        steps=steps,
        batch=16,
        optimiser=Optimiser(kind="adam", rate=0.01),
        sync=Sync.model_validate({"period": steps, **sync}),
    )
    reply = ranks.group.order(order, 120)
    return reply.steps, reply.examples, np.fromfile(output, np.float32)


@pytest.mark.parametrize("exchange", ["delta", "gradient"])
def test_no_time_at_all_is_one_step_and_the_ranks_go_on_together(ranks, exchange):
    steps, examples, update = train(ranks, 5, seconds=LITTLE, exchange=exchange)
    assert (steps, examples) == (1, 16)
    alone = train(ranks, 1, exchange=exchange)
    np.testing.assert_array_equal(update, alone[2])


def test_time_enough_is_the_round_by_steps(ranks):
    by_time, by_steps = train(ranks, 5, seconds=MUCH), train(ranks, 5)
    assert by_time[:2] == by_steps[:2] == (5, 80)
    np.testing.assert_array_equal(by_time[2], by_steps[2])
