"""A run's workers at a site: which of them the next run may be given."""

import threading

import pytest

from atoll.errors import Denied, TaskFailed, Unavailable
from atoll.runtime.executor import Group
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import RunFolder
from atoll.runtime.ranks import Ranks
from atoll.runtime.reports import Reports
from atoll.spec.job import Optimiser
from atoll.spec.order import Probe, Reply, Train
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.unit.places import SIGNATURE, House, assign


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    yield made
    made.journal.close()


def ranks_of(house):
    reports = Reports(house.place)
    return Ranks(house.place, Incoming(house.place, RunFolder(house.runs / "run"), reports), reports, threading.Event())


ORDER = Probe(seed=0, batch=1, optimiser=Optimiser())


def test_a_group_with_a_dead_rank_is_dropped_before_its_run_could_leave_it_to_the_next(house):
    ranks, busy = ranks_of(house), []

    def dies(order, group):
        group.close = lambda: busy.append(ranks._busy.is_set())
        raise Unavailable("worker: a rank ended")

    house.workers.answers["probe"] = dies
    with pytest.raises(Unavailable):
        ranks.order(assign(), ORDER)
    assert busy == [True] * 3


@pytest.mark.parametrize(("data", "stays"), [(1, True), (2, False)])
def test_a_task_that_failed_leaves_one_rank_warm_and_of_several_none(house, data, stays):
    def fails(order, group):
        raise TaskFailed("loss is nan")

    house.workers.answers["probe"] = fails
    ranks, a = ranks_of(house), assign(layout=Layout(data=data))
    with pytest.raises(TaskFailed):
        ranks.order(a, ORDER)
    assert house.workers.closed == (0 if stays else 1)
    assert ranks.leave() is None
    found: Group = house.place.groups.take(f"{a.code} {a.layout.model_dump_json()} {a.user}", a.layout)
    assert house.workers.started == (1 if stays else 2)
    found.close()


def test_the_probes_ranks_are_not_taken_for_those_of_another_layout(house):
    ranks = ranks_of(house)
    ranks.order(assign(), ORDER)
    ranks.order(assign(layout=Layout(data=2)), ORDER)
    assert (house.workers.started, house.workers.closed) == (2, 1)
    ranks.order(assign(layout=Layout(data=2)), ORDER)
    assert (house.workers.started, house.workers.closed) == (2, 1)


def test_a_layout_of_more_ranks_than_the_site_takes_starts_none_of_them(house):
    most = house.place.site.most_ranks
    with pytest.raises(Denied, match=f"lyon refuses: layout: {most + 1} ranks, and its machines take {most} at most"):
        ranks_of(house).order(assign(layout=Layout(data=most + 1)), ORDER)
    with pytest.raises(Denied, match="set smaller degrees"):
        ranks_of(house).order(assign(layout=Layout(tensor=10**9, pipeline=10**9)), ORDER)
    assert house.workers.started == 0
    ranks_of(house).order(assign(layout=Layout(data=most)), ORDER)
    assert house.workers.started == 1


def train(**more):
    sync = Sync(period=2)
    made = {"seed": 0, "weights": None, "signature": SIGNATURE, "output": "", "done": 0, "steps": 2, "batch": 4}
    return Train.model_validate({**made, "optimiser": Optimiser(), "sync": sync, **more})


def tried(house):
    """The layouts of the groups that were told to open a dataset, and the orders that follow."""
    return [(order.layout.ranks if order.kind == "open" else order.kind) for order in house.workers.orders]


def only(ranks):
    """What a site replies that has no more ranks than these."""

    def replies(order, group):
        if order.kind == "open" and order.layout.ranks > ranks:
            raise Unavailable("no room")
        return Reply(rows=1) if order.kind == "open" else Reply(examples=8, loss=0.5)

    return replies


def test_a_round_goes_on_by_fewer_ranks_where_not_all_can_be_had_and_by_all_once_they_can(house):
    ranks, a = ranks_of(house), assign(layout=Layout(shard=2, tensor=2))
    house.workers.answers |= {"open": only(2), "train": only(2)}

    def rounds(count):
        house.workers.orders.clear()
        for _ in range(count):
            ranks.order(a, train(shares=(3, 1)))
        return tried(house)

    assert rounds(1) == [4, 4, 2, "train"]
    assert house.workers.orders[-1].shares == ()
    assert rounds(1) == [4, 2, "train"]  # asked for again at once, then after one round, two, four
    assert rounds(2) == [2, "train", 4, 2, "train"]
    assert rounds(3) == [2, "train", 2, "train", 4, 2, "train"]
    house.workers.answers["open"] = only(4)
    assert rounds(5) == [2, "train"] * 4 + [4, "train"]
    assert house.workers.orders[-1].shares == (3, 1)
    assert rounds(1) == [4, "train"]


def test_a_site_comes_down_step_by_step_and_fails_where_even_one_rank_is_none(house):
    ranks, a = ranks_of(house), assign(layout=Layout(data=3))
    house.workers.answers |= {"open": only(0)}
    with pytest.raises(Unavailable):
        ranks.order(a, train())
    assert tried(house) == [3, 3, 2]
    house.workers.answers |= {"open": only(2), "train": only(2)}
    ranks.order(a, train())
    house.workers.answers |= {"open": only(1)}
    house.workers.orders.clear()
    ranks.order(a, train())
    assert tried(house) == [3, 2, 1, "train"]


def test_what_is_measured_is_measured_with_all_that_is_planned(house):
    ranks, a = ranks_of(house), assign(layout=Layout(data=2))
    house.workers.answers |= {"open": only(1)}
    with pytest.raises(Unavailable):
        ranks.order(a, ORDER)
    assert tried(house) == [2, 2, 2]
