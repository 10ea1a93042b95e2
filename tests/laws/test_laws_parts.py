"""Laws of parts: whatever a round hands in or keeps, each rank writes its own part of, and none is given another's.

The task listens to what its rank exchanges with others, by torch's own dispatch.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from atoll.errors import TaskFailed
from atoll.inner.checkpoint import read_tensors
from tests.laws.sites import STEPS, Site

TASK = """\
import json
import threading
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atoll.tasks.gpt import GPT, Shape


class Ears(TorchDispatchMode):
    # Tells which exchange between ranks brings how many floating numbers to this one; some are told more than once.
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # a tensor in parts says by itself what it has its ranks exchange
        made = function(*arguments, **(named or {}))
        if "c10d" in function.namespace:
            leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            HEARING.say(function._opname, sum(leaf.numel() for leaf in leaves if leaf.is_floating_point()))
        return made


HEARING = threading.local()  # a thread has ears of its own, once; they tell whichever task is trained in it


class Words:
    def __init__(self, experts=0, fault="", heard=""):
        self.experts, self.heard = experts, heard

    def model(self):
        shape = Shape(vocabulary=32, width=32, layers=4, heads=4, length=8, experts=self.experts)
        return GPT(shape)

    def examples(self, rows):
        return {"tokens": np.stack([rows.table[f"t{i}"].to_numpy() for i in range(9)], axis=1)}

    def say(self, *words):
        if self.heard:
            with open(f"{self.heard}-{torch.distributed.get_rank()}", "a") as file:
                file.write(json.dumps(words) + "\\n")

    def loss(self, model, batch):
        if self.heard and not hasattr(HEARING, "say"):
            Ears().__enter__()  # for as long as this thread lives
        HEARING.say = self.say
        self.say("loss", 0)
        answers = model(batch["tokens"][:, :-1])
        return nn.functional.cross_entropy(answers.flatten(0, 1), batch["tokens"][:, 1:].flatten())
"""
# What a layout has ranks exchange while they compute: blocks that are sharded, and what goes between stages.
COMPUTING = {"_allgather_base_", "_reduce_scatter_base_", "send", "recv_"}
STREAMING = {"period": 3 * STEPS, "fragments": 3, "delay": 2, "blend": 0.5, "keep_optimiser": True}
KINDS = {
    "gradient": {"exchange": "gradient"},
    "control": {"control": True, "merge": "mean"},
    "optimiser": {"keep_optimiser": True},
    "streaming": STREAMING,
}
CUT = [{"shard": 2}, {"pipeline": 2}]
PRODUCTS = [
    {"data": 2, "shard": 2},
    {"shard": 2, "tensor": 2},
    {"shard": 2, "pipeline": 2},
    {"shard": 2, "context": 2},
    {"shard": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2},
    {"data": 2, "pipeline": 2},
    {"expert": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "task.py").write_text(TASK)
    tokens = (np.random.default_rng(1).integers(0, 32, (80, 1)) + 3 * np.arange(9)) % 32
    pq.write_table(pa.table({f"t{i}": column for i, column in enumerate(tokens.T)}), folder / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def sites(folder):
    """Return a function that gives the site of so many ranks."""
    made = {}

    def site(ranks):
        if ranks not in made:
            made[ranks] = Site(folder, ranks)
        return made[ranks]

    yield site
    for one in made.values():
        one.group.close()
        one.executor.close()


def rounds(site, opened, kind, home, batch=8):
    """Return the updates of two rounds, and the files that they left: the second goes on from what the first kept."""
    home.mkdir()
    sync, updates, begun = KINDS[kind], [], site.begin(opened)  # which reads all of a model
    for number in (0, 1):
        kept = {}
        for word, there in (("state", sync.get("keep_optimiser")), ("control", sync.get("control"))):
            if there:
                kept[f"{word}_out"] = str(home / f"{word}-{number}")
                kept |= {f"{word}_in": str(home / f"{word}-0")} if number else {}
        going = {"version": number, "done": number * STEPS, "goes_on": bool(number) and kind == "streaming"}
        rule = "sgd" if kind == "control" else "adamw"
        update, _ = site.train(opened, rule, batch=batch, sync=dict(sync), begun=begun, **kept, **going)
        updates.append(update)
    return updates, {path.name: read_tensors(path)[0] for path in sorted(home.iterdir())}


def assert_alike(found, expected, kind):
    near = 2e-5 if kind in ("gradient", "control") else 1e-4  # the least bit of a small gradient decides AdamW's step
    for mine, theirs in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=near, rtol=0)
        assert np.abs(theirs).max() > 1e-3
    assert found[1].keys() == expected[1].keys()
    for name, tensors in expected[1].items():
        assert found[1][name].keys() == tensors.keys()
        for tensor, value in tensors.items():
            torch.testing.assert_close(found[1][name][tensor], value, atol=near, rtol=0)


def heard(path, ranks):
    """Return what each rank heard: (exchange, numbers), in order."""
    lines = [Path(f"{path}-{rank}").read_text().splitlines() for rank in range(ranks)]
    return [[tuple(json.loads(line)) for line in told] for told in lines]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degrees", CUT, ids=json.dumps)
def test_ranks_hand_in_and_keep_what_one_process_does_and_none_is_given_the_whole(
    folder, sites, tmp_path, degrees, kind
):
    expected = rounds(sites(1), sites(1).open({}), kind, tmp_path / "alone")
    two, path = sites(2), folder / f"{kind}-{next(iter(degrees))}"  # there as long as the ears are
    assert_alike(rounds(two, two.open(degrees, heard=str(path)), kind, tmp_path / "parts"), expected, kind)
    size = expected[0][0].size * (3 if kind == "streaming" else 1)
    for told in heard(path, 2):
        taken = [number for number, (what, _) in enumerate(told) if what == "_reduce_scatter_base_"]
        if "shard" in degrees:
            assert sum(numbers for what, numbers in told if what == "_allgather_base_") > size, "blocks are"
            assert not any(what in COMPUTING for what, _ in told[taken[-1] + 1 :]), "after the last gradients"
        else:
            assert any(what == "recv_" for what, _ in told)
            assert not taken
        others = Counter[str]()
        for what, numbers in told:
            others[what] += 0 if what in COMPUTING else numbers
        assert 0 < sum(others.values()) < size / 10, others  # counts and flags


@pytest.mark.parametrize("degrees", CUT, ids=json.dumps)
def test_a_rank_that_is_given_the_whole_is_heard(folder, sites, degrees):
    two, path = sites(2), folder / f"whole-{next(iter(degrees))}"
    opened = two.open(degrees, heard=str(path))
    update, _ = two.train(opened)
    for rank in (0, 1):
        Path(f"{path}-{rank}").unlink()
    two.begin(opened)  # which reads all of a model
    for told in heard(path, 2):
        assert sum(numbers for what, numbers in told if what not in COMPUTING) >= update.size


def test_a_file_that_cannot_be_made_fails_the_order_at_all_ranks_and_they_go_on(sites, tmp_path):
    two = sites(2)
    opened = two.open({"shard": 2})
    with pytest.raises(TaskFailed, match="FileNotFoundError"):
        two.train(opened, "adamw", sync=dict(KINDS["optimiser"]), state_out=str(tmp_path / "gone" / "state"))
    two.train(opened, "adamw", sync=dict(KINDS["optimiser"]), state_out=str(tmp_path / "state"))
    assert two.killed == 0
    assert (tmp_path / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degrees", PRODUCTS, ids=json.dumps)
def test_in_every_product_of_layouts_what_is_written_is_what_one_process_writes(sites, tmp_path, degrees, kind):
    experts = 4 if "expert" in degrees else 0
    expected = rounds(sites(1), sites(1).open({}, experts), kind, tmp_path / "alone")
    assert_alike(rounds(sites(4), sites(4).open(degrees, experts), kind, tmp_path / "parts"), expected, kind)
