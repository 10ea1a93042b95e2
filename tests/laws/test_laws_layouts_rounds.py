"""Laws of layouts in rounds: a site's workers give the same update however the model lies over them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import TaskFailed
from tests.laws.sites import STEPS, Site

TASK = """\
import os
import signal

import numpy as np
import torch
from torch import nn

from atoll import Mean
from atoll.tasks.gpt import GPT, Shape


class Words:
    def __init__(self, experts=0, fault=""):
        self.experts, self.fault, self.steps = experts, fault, 0

    def model(self):
        return GPT(Shape(vocabulary=32, width=16, layers=2, heads=4, length=8, experts=self.experts))

    def examples(self, rows):
        return {"tokens": np.stack([rows.table[f"t{i}"].to_numpy() for i in range(9)], axis=1)}

    def loss(self, model, batch):
        if os.path.exists(self.fault) and model.training and torch.is_grad_enabled():
            self.steps += 1
            if self.steps == 4 and torch.distributed.get_rank() == 1:
                os.remove(self.fault)
                os.kill(os.getpid(), signal.SIGKILL)
        answers = model(batch["tokens"][:, :-1])
        return nn.functional.cross_entropy(answers.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def predict(self, model, batch):
        return {"next": model(batch["tokens"][:, :-1])[:, -1].argmax(-1)}

    def metrics(self, model, batch):
        answers = model(batch["tokens"][:, :-1])
        losses = nn.functional.cross_entropy(answers.flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="none")
        return {"loss": Mean(losses.sum().item(), len(losses))}
"""
LAYOUTS = [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"expert": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "task.py").write_text(TASK)
    tokens = (np.random.default_rng(1).integers(0, 32, (40, 1)) + 3 * np.arange(9)) % 32
    pq.write_table(pa.table({f"t{i}": column for i, column in enumerate(tokens.T)}), folder / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    site = Site(folder, 1)
    yield site
    site.group.close()
    site.executor.close()


@pytest.fixture(scope="module")
def two(folder):
    site = Site(folder, 2)
    yield site
    site.group.close()
    site.executor.close()


def experts(degrees):
    return 4 if "expert" in degrees else 0


@pytest.mark.parametrize("degrees", LAYOUTS, ids=json.dumps)
def test_a_layouts_update_is_that_of_one_process(one, two, degrees):
    alone, said = one.train(one.open({}, experts(degrees)))
    together, also = two.train(two.open(degrees, experts(degrees)))
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    assert np.abs(alone).max() > 1e-3
    assert (also.examples, also.steps) == (said.examples, said.steps) == (30, STEPS)
    assert also.loss == pytest.approx(said.loss, abs=1e-5)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=json.dumps)
def test_a_layout_answers_as_one_process_does(one, two, degrees):
    alone, answers = one.answers(one.open({}, experts(degrees)))
    together, also = two.answers(two.open(degrees, experts(degrees)))
    assert together["loss"].total == pytest.approx(alone["loss"].total, rel=1e-5)
    assert also.equals(answers)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=json.dumps)
@pytest.mark.parametrize("sync", [{"exchange": "gradient"}, {"control": True, "merge": "mean"}], ids=json.dumps)
def test_what_is_summed_over_a_round_is_what_one_process_sums(one, two, degrees, sync):
    batch = 6 if "pipeline" in degrees else 5
    alone, _ = one.train(one.open({}, experts(degrees)), sync=dict(sync), batch=batch)
    together, _ = two.train(two.open(degrees, experts(degrees)), sync=dict(sync), batch=batch)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("degrees", "sync"),
    [
        ({"shard": 2}, {"keep_optimiser": True}),
        ({"pipeline": 2}, {"exchange": "gradient"}),
        ({"shard": 2}, {"control": True, "merge": "mean"}),
        slow({"shard": 2}, {"exchange": "gradient"}),
        slow({"pipeline": 2}, {"control": True, "merge": "mean"}),
        slow({"pipeline": 2}, {"keep_optimiser": True}),
        slow({"tensor": 2}, {"keep_optimiser": True}),
        slow({"context": 2}, {"keep_optimiser": True}),
        slow({"expert": 2}, {"keep_optimiser": True}),
    ],
    ids=json.dumps,
)
def test_a_round_that_loses_a_rank_is_the_undisturbed_one(two, tmp_path, degrees, sync):
    fault, killed, out = tmp_path / "fault", two.killed, tmp_path / "state.safetensors"
    kept = {"kind": "adamw", "sync": sync, "control_out" if "control" in sync else "state_out": str(out)}
    opened = two.open(degrees, experts(degrees), str(fault))
    undisturbed, said = two.train(opened, **kept)
    state = out.read_bytes() if out.exists() else None
    out.unlink(missing_ok=True)
    fault.touch()
    again, also = two.train(opened, **kept, checkpoint=str(tmp_path / "checkpoint-1"), checkpoint_steps=2)
    assert two.killed == killed, "the group went on"
    assert not fault.exists()
    assert np.array_equal(again, undisturbed)
    assert (also.loss, also.steps, also.examples) == (said.loss, said.steps, said.examples)
    assert (out.read_bytes() if out.exists() else None) == state


@pytest.mark.parametrize(
    ("before", "after", "sync"),
    [
        ({"shard": 2}, {}, {}),
        ({}, {"shard": 2}, {}),
        ({"pipeline": 2}, {"tensor": 2}, {}),
        ({"tensor": 2}, {"pipeline": 2}, {"exchange": "gradient"}),
        ({"pipeline": 2}, {}, {"control": True, "merge": "mean"}),
    ],
    ids=json.dumps,
)
def test_a_round_goes_on_from_the_checkpoint_of_another_layout(one, two, tmp_path, before, after, sync):
    fault, folder = tmp_path / "fault", tmp_path / "round"
    kept = {"kind": "sgd" if sync else "adamw", "checkpoint": str(folder), "checkpoint_steps": 2}
    first, second = (one if not degrees else two for degrees in (before, after))
    expected, said = first.train(first.open(before, fault=str(fault)), **kept, sync=dict(sync))
    parts = first.ranks
    assert sorted(path.name.split("-")[:3] for path in folder.iterdir()) == [
        [str(step), str(part), str(parts)] for step in (2, 4) for part in range(parts)
    ]
    fault.touch()  # who takes four steps in place of the one that is left is killed
    found, also = second.train(second.open(after, fault=str(fault)), **kept, sync=dict(sync))
    assert fault.exists()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert (also.steps, also.examples) == (said.steps, said.examples)
    assert also.loss == pytest.approx(said.loss, abs=1e-5)


@pytest.mark.parametrize("degrees", [{"shard": 2}, {"pipeline": 2}], ids=json.dumps)
def test_the_optimisers_state_goes_on_from_one_layout_to_another(one, two, tmp_path, degrees):
    kept = {"kind": "adamw", "sync": {"keep_optimiser": True}}
    state = tmp_path / "state.safetensors"
    two.train(two.open(degrees), **kept, state_out=str(state))
    alone, _ = one.train(one.open({}), **kept, done=STEPS, state_in=str(state))
    fresh, _ = one.train(one.open({}), **kept, done=STEPS)
    for other in ({"tensor": 2}, {"pipeline": 2}):
        together, _ = two.train(two.open(other), **kept, done=STEPS, state_in=str(state))
        np.testing.assert_allclose(together, alone, atol=1e-4, rtol=0)
    assert np.abs(fresh - alone).max() > 1e-3


@pytest.mark.parametrize(
    ("degrees", "made", "words"),
    [
        ({"tensor": 2}, {"experts": 3, "expert": 2}, "layout: data x shard .* is 4, and there are 2 ranks"),
        ({"expert": 2}, {"experts": 3}, "layout.expert: 2 does not divide the model's 3 experts; set it to [13]"),
        ({"expert": 2}, {}, "layout.expert: GPT has no module in its expert_plan; set expert to 1"),
        (
            {"pipeline": 2},
            {"sync": {"keep_local": ["head.*"]}},
            "layout.pipeline: does not go with sync.keep_local",
        ),
        ({"pipeline": 2}, {"batch": 3}, "batch: a share of 3 examples makes no 2 or more equal micro-batches"),
    ],
)
def test_a_layout_that_cannot_be_is_told_with_its_mend(two, degrees, made, words):
    made = dict(made)
    degrees = {**degrees, "expert": made.pop("expert", degrees.get("expert", 1))}
    with pytest.raises(TaskFailed, match=words):
        two.train(two.open(degrees, made.pop("experts", 0)), **made)
