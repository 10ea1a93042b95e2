"""Ranks that are lost while they train: the round goes on, to the losses of one that lost none, and no step is lost."""

import time

import numpy as np
import pytest

from atoll.errors import Unavailable
from atoll.runtime.local import LocalExecutor
from atoll.spec.compute import Compute
from atoll.spec.plan import Layout
from atoll.spec.saved import saved_name
from tests.system.processes import alive
from tests.system.rounds import Site, check_same

pytestmark = pytest.mark.system
SILENCE = 1.0


@pytest.fixture
def sites(tmp_path, eventually):
    made = []
    executor = LocalExecutor(SILENCE)

    def make(compute=None, **degrees):
        folder = tmp_path / f"site-{len(made)}"
        folder.mkdir()
        made.append(Site(folder, Layout(**degrees), compute or Compute(), executor))
        return made[-1]

    yield make
    pids = {pid for site in made for pid in site.pids()}
    for site in made:
        site.group.close()
    executor.close()
    assert eventually(lambda: not any(alive(pid) for pid in pids), 5)


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP", "SIGTERM"])
@pytest.mark.parametrize("rank", [0, 1])
def test_copies_go_on_without_a_rank_and_take_another_in(sites, kind, rank):
    site = sites(data=2)
    site.fault(kind, rank, 4)
    check_same(site, sites(data=2))
    assert len({pid for pid, _, _ in site.seen()}) >= 2


@pytest.mark.parametrize(
    ("degrees", "compute"),
    [
        ({"shard": 2}, Compute()),
        pytest.param({"tensor": 2}, Compute(), marks=pytest.mark.slow),
        ({"pipeline": 2}, Compute(microbatches=2)),
        pytest.param({"context": 2}, Compute(), marks=pytest.mark.slow),
        pytest.param({"data": 2, "shard": 2}, Compute(), marks=pytest.mark.slow),
    ],
)
def test_a_lost_part_is_in_its_mirror_and_no_step_is_lost(sites, degrees, compute):
    site = sites(compute, **degrees)
    site.fault("SIGKILL", 1, 5)
    found, expected = check_same(site, sites(compute, **degrees))
    assert np.array_equal(found, expected)  # by the same layout, so to the bit


def test_who_waits_for_others_longer_than_silence_is_not_lost(sites):
    site = sites(shard=2)
    site.fault("SIGSTOP", 1, 5)  # its peer waits for it, and then for the one in its place
    site.train()
    pids = {(pid, rank) for pid, rank, _ in site.seen()}
    assert len([pid for pid, rank in pids if rank == 0]) == 1
    assert len([pid for pid, rank in pids if rank == 1]) == 2


def test_the_only_rank_is_lost(sites):
    site = sites(data=1)
    site.fault("SIGKILL", 0, 5)
    found, expected = check_same(site, sites(data=1))
    assert np.array_equal(found, expected)


def test_all_ranks_are_lost_at_once(sites):
    site = sites(data=2)
    site.fault("SIGKILL", 0, 5)
    site.fault("SIGKILL", 1, 5)
    check_same(site, sites(data=2))


def test_a_rank_that_is_lost_while_its_peers_meet_again(sites):
    site = sites(data=4)
    site.fault("SIGKILL", 3, 4)
    site.fault("SIGKILL", 1, 5)  # the next loss, by ranks that were just renumbered
    check_same(site, sites(data=4))


def test_a_ring_is_broken_for_those_who_are_not_neighbours_of_the_lost(sites):
    site = sites(shard=4)
    site.fault("SIGKILL", 2, 3)
    began = time.monotonic()
    found, expected = check_same(site, sites(shard=4))
    assert np.array_equal(found, expected)
    assert time.monotonic() - began < 60  # where a sum's own limit is two minutes


def test_a_notice_costs_no_step_and_no_example(sites):
    site = sites(data=2)
    site.fault("SIGTERM", 1, 4)  # nothing is broken, so nothing is done twice
    (site.folder / "slow").touch()  # so that the other is there before the last step
    site.train()
    told = site.seen()
    assert len({pid for pid, _, _ in told}) == 3
    seen = sorted(number for _, _, numbers in told for number in numbers)
    whole = sites(data=1)
    whole.train()
    assert seen == sorted(number for _, _, numbers in whole.seen() for number in numbers)


def test_code_that_ends_itself_again_and_again_is_given_up(sites):
    site = sites(data=1)
    for count in range(0, 40):
        site.fault("SIGKILL", 0, count)
    with pytest.raises(Unavailable, match="a rank ended by signal SIGKILL"):
        site.train()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"shard": 2}, {"pipeline": 2}),
        pytest.param({"shard": 2}, {"data": 1}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2}, {"shard": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_group_that_is_given_up_leaves_its_mirrors_to_the_next_of_any_layout(sites, before, after):
    site, whole, ranks = sites(**before), sites(data=1), Layout(**before).ranks
    doom = site.folder / f"doomed-{ranks - 1}"
    doom.write_text(str(8 * ranks))  # each that takes the place is lost at once, too
    slow = site.folder / "slow"
    slow.touch()  # so that there is time for mirrors on a busy machine
    folder = site.folder / "round"
    with pytest.raises(Unavailable):
        site.train(checkpoint=str(folder))
    assert not folder.exists(), "no checkpoint was due"
    site.group.close()
    steps = {saved_name(path.name).step for path in folder.iterdir()}
    assert len(steps) == 1
    assert min(steps) > 0
    doom.unlink()
    slow.unlink()
    lost = len(site.seen())
    site.begin(Layout(**after), Compute())
    found = site.train(checkpoint=str(folder))
    expected = whole.train()
    first = set(whole.seen()[0][2])
    assert set(site.seen()[0][2]) <= first
    assert not set(site.seen()[lost][2]) <= first, "it went on from a step that was mirrored"
    assert site.reply.loss == pytest.approx(whole.reply.loss, abs=1e-5)
    assert np.median(np.abs(found - expected)) < 1e-5


@pytest.mark.parametrize(
    "degrees",
    [
        {"shard": 2},
        {"pipeline": 2},
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "shard": 2}, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_hold_parts_write_the_update_of_one_that_holds_all(sites, degrees):
    whole = sites(data=1)
    expected = whole.train()
    found = sites(Compute(microbatches=2) if "pipeline" in degrees else None, **degrees).train()
    assert found.shape == expected.shape
    # AdamW divides by a gradient's size: rounding of one near zero turns a step of 0.01.
    assert np.median(np.abs(found - expected)) < 1e-5
    assert np.abs(expected).max() > 0.01
