"""Two sites that joined a hub, two ranks at each, the model cut by `shard`: each rank hands in its own part.

The task looks at what it is given: how much of the model lies at its rank and, by torch's own dispatch, what each
exchange with its peer brings it.
"""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from atoll.registry.blobs import Blobs
from atoll.registry.weights import load

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
TASK = '''\
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atoll import Mean


class Ears(TorchDispatchMode):
    """Tells how many numbers each exchange between ranks brings to this one; some are told more than once."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # a tensor in parts says by itself what it has its ranks exchange
        made = function(*arguments, **(named or {}))
        if "c10d" in function.namespace:
            sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            HEARING.say("given", function._opname, sum(sizes))
        return made


HEARING = threading.local()  # a thread has ears of its own, once; they tell whichever task is trained in it


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 32), nn.Linear(32, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(5))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)[:, 0]


class Risk:
    def __init__(self, folder):
        self.folder, self.steps = Path(folder), 0

    def model(self):
        return Net()

    def examples(self, rows):
        self.site = "oslo" if rows.table["slow"][0].as_py() else "berlin"
        x = np.stack([rows.table["age"].to_numpy() / 100, rows.table["dose"].to_numpy()], 1)
        return {"x": x.astype(np.float32), "y": rows.table["ill"].to_numpy().astype(np.float32)}

    @property
    def rank(self):
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def say(self, kind, *words):
        with open(self.folder / f"{self.site}-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps([os.getpid(), kind, *words]) + "\\n")

    def loss(self, model, batch):
        if not hasattr(HEARING, "say"):
            Ears().__enter__()  # for as long as this thread lives
        HEARING.say = self.say
        parts = [one.to_local() if hasattr(one, "to_local") else one for one in model.parameters()]
        self.say("step", sum(part.numel() for part in parts), sum(one.numel() for one in model.parameters()))
        self.steps += 1
        fault = self.folder / f"{self.site}-{self.rank}-{self.steps}"
        if fault.exists():
            fault.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.binary_cross_entropy_with_logits(model(batch["x"]), batch["y"])

    def metrics(self, model, batch):
        self.say("gathers")
        whole = [one.full_tensor() for one in model.parameters() if hasattr(one, "full_tensor")]
        self.say("answers", len(whole))
        right = (model(batch["x"]) > 0) == (batch["y"] > 0.5)
        return {"accuracy": Mean(right.sum().item(), len(right))}
'''
NAMES = ("berlin", "oslo")
PERIOD, ROUNDS = 3, 4


@pytest.fixture(scope="module")
def fleet(make_home, tmp_path_factory):
    """A hub, the sites berlin and oslo as processes that joined it over TLS, and a run of each layout."""
    path = tmp_path_factory.mktemp("fleet")
    hub = make_home(path / "hub")
    daemon = hub.start("hub", "start")
    hub.seen("site.connected", site__name="local")
    sites, agents = {}, {}
    for number, name in enumerate(NAMES):
        sites[name] = make_home(path / name)
        sites[name].site(name, slow=float(number), rows=60 + 30 * number)
        agents[name] = sites[name].start("join", hub.asked("site", "invite", name)["token"])
    for name in NAMES:
        hub.seen("site.connected", site__name=name)
    made = SimpleNamespace(hub=hub, sites=sites, path=path, runs={})
    made.runs = {"sharded": run(made, "sharded", {"shard": 2}), "alone": run(made, "alone", {"data": 1})}
    yield made
    assert daemon.end() == 128 + signal.SIGTERM
    for agent in agents.values():
        agent.end()
    assert all(home.empty() for home in (hub, *sites.values()))


def run(fleet, kind, layout, *faults):
    """Return a run's view once it has ended well."""
    folder = fleet.path / kind
    folder.mkdir()
    for fault in faults:
        (folder / fault).touch()
    job = fleet.hub.job(
        name=kind,
        task=TASK,
        task__params={"folder": str(folder)},
        layout=layout,
        steps=ROUNDS * PERIOD,
        optimiser={"kind": "sgd", "rate": 0.1, "momentum": 0.9},
        sync={"preset": "fedavg", "period": PERIOD, "outer": {"momentum": 0.9}},
    )
    view = fleet.hub.asked("run", job)
    assert view["state"] == "finished", view
    return view


def weights(fleet, view):
    """Return what the run's model came to be, as one vector."""
    (model,) = fleet.hub.published(view["run"])
    return load(Blobs(fleet.hub.path / "hub" / "blobs").get(model.weights))[0]


def told(fleet, kind, site, rank):
    """Return what a rank told, a part from each step and each batch of metrics on: [pid, what it is, numbers], ..."""
    parts = []
    for line in (fleet.path / kind / f"{site}-{rank}.jsonl").read_text().splitlines():
        pid, what, *numbers = json.loads(line)
        if what != "given":
            parts.append([])
        parts[-1].append((pid, what, *numbers))
    return parts


def steps_of(parts):
    """Return the steps of a run's rounds: those of the probe were before them."""
    return [part for part in parts if part[0][1] == "step"][-ROUNDS * PERIOD :]


def given(part):
    return [line[3] for line in part if line[1] == "given"]


def after_the_last_gradients(step):
    """Return how many numbers a rank was given between a step's last sum of gradients and the next step."""
    last = max(number for number, line in enumerate(step) if line[2] == "_reduce_scatter_base_")
    return sum(given(step[last + 1 :]))


def test_two_sharded_sites_train_what_one_process_at_each_does(fleet):
    sharded, alone = fleet.runs["sharded"], fleet.runs["alone"]
    assert sharded["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert len(sharded["losses"]) == ROUNDS
    assert sharded["losses"][-1] < sharded["losses"][0]
    np.testing.assert_allclose(weights(fleet, sharded), weights(fleet, alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("site", NAMES)
def test_each_rank_hands_in_its_own_part_and_none_is_given_the_whole(fleet, site):
    size = len(weights(fleet, fleet.runs["sharded"]))
    ranks = [told(fleet, "sharded", site, rank) for rank in (0, 1)]
    for parts in ranks:
        steps = steps_of(parts)
        for step in steps:
            assert 0.4 * size < step[0][2] < 0.6 * size  # what lies here
            assert step[0][3] == size
            assert sum(given(step)) > size, "each block is gathered while it computes, and that is heard"
            assert max(given(step)) < size / 2, "one block after the other"
        # The end of a round adds a few numbers to a step's own: counts and flags, and nothing of the weights.
        ends = [after_the_last_gradients(step) for step in steps[PERIOD - 1 :: PERIOD]]
        assert max(ends) < 32, ends
        (gathers,) = (part for part in parts if part[0][1] == "gathers")
        assert sum(given(gathers)) >= size, "a rank that gathers the whole is heard to do so"
    lying = [[step[0][2] for step in steps_of(parts)] for parts in ranks]
    assert [sum(both) for both in zip(*lying, strict=True)] == [size] * ROUNDS * PERIOD


def test_a_sharded_rank_killed_in_mid_round_costs_no_bit(fleet):
    """Rank 1 of oslo, at the second step of the second round."""
    killed = run(fleet, "killed", {"shard": 2}, f"oslo-1-{PERIOD + 2}")
    assert not (fleet.path / "killed" / f"oslo-1-{PERIOD + 2}").exists(), "it was"
    expected = fleet.runs["sharded"]
    assert (killed["losses"], fleet.hub.weights(killed["run"])) == (
        expected["losses"],
        fleet.hub.weights(expected["run"]),
    )
    pids = [part[0][0] for part in told(fleet, "killed", "oslo", 1) if part[0][1] == "step"]
    assert len(set(pids)) == 2
    # The other goes on from its mirror: with the step that was broken, or with the round where none was written yet.
    assert pids.count(pids[-1]) - ROUNDS * PERIOD in (-PERIOD - 1, -PERIOD)
    for site, rank in (("berlin", 0), ("berlin", 1), ("oslo", 0)):
        assert len({part[0][0] for part in told(fleet, "killed", site, rank)}) == 1
