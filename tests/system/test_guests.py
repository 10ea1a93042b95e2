"""Ranks on several nodes, of which one is lost with its memory: its part is at a rank of another node.

The nodes are of one machine here: what makes each one is its name, and memory that goes with its rank.
"""

import uuid

import numpy as np
import pytest

from atoll.runtime.local import Mirrors, start
from atoll.runtime.piped import PipedGroup
from atoll.spec.compute import Compute
from atoll.spec.plan import Layout
from tests.system.processes import alive
from tests.system.rounds import Site, check_same

pytestmark = pytest.mark.system


class Nodes:
    """An executor that gives every rank memory of its own, two mirrors, which no other rank ever sees."""

    def __init__(self, apart=True):
        self.apart, self.groups, self.memory = apart, [], []

    def start(self, layout, folder):
        folder.mkdir(parents=True, exist_ok=True)

        def begin(place):
            self.memory.append(Mirrors(2))
            files = (*self.memory[-1].of(0), *self.memory[-1].of(1))
            return start((), folder / f"worker-{place}.log", {"ATOLL_NODE": f"n{place if self.apart else 0}"}, files)

        ranks = [begin(place) for place in range(layout.ranks)]
        self.groups.append(PipedGroup(ranks, folder / f"meeting-{uuid.uuid4().hex}", 2.0, begin))
        return self.groups[-1]

    def close(self):
        for group in self.groups:
            group.close()
        for memory in self.memory:
            memory.close()


@pytest.fixture
def site(tmp_path, eventually):
    made, executors = [], []

    def make(apart=True, compute=None, **degrees):
        folder = tmp_path / f"site-{len(made)}"
        folder.mkdir()
        executors.append(Nodes(apart))
        made.append(Site(folder, Layout(**degrees), compute or Compute(), executors[-1]))
        return made[-1]

    yield make
    for executor in executors:
        executor.close()
    pids = {pid for one in made for pid in one.pids()}
    assert eventually(lambda: not [pid for pid in pids if alive(pid)])


def taken_again(site):
    """How many examples were computed more than once."""
    seen = [number for _, _, numbers in site.seen() for number in numbers]
    return len(seen) - 12 * 8


@pytest.mark.parametrize(
    ("degrees", "compute"),
    [
        ({"shard": 2}, None),
        pytest.param({"data": 2, "shard": 2}, None, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, Compute(microbatches=2), marks=pytest.mark.slow),
    ],
)
def test_a_part_whose_node_is_lost_is_at_another_one(site, degrees, compute):
    lossy = site(compute=compute, **degrees)
    lossy.fault("SIGKILL", 1, 9)
    (lossy.folder / "slow").touch()  # so that there is time for mirrors on a busy machine
    found, expected = check_same(lossy, site(compute=compute, **degrees))
    assert np.array_equal(found, expected)  # by the same layout, so to the bit
    if "pipeline" not in degrees:
        assert taken_again(lossy) < 9 * 8, "it went on from a step"


@pytest.mark.slow
def test_without_another_node_the_part_is_lost_and_the_round_begins_anew(site):
    lossy = site(apart=False, shard=2)
    lossy.fault("SIGKILL", 1, 9)
    found, expected = check_same(lossy, site(apart=False, shard=2))
    assert np.array_equal(found, expected)
    assert taken_again(lossy) >= 9 * 8
