"""The stated cost model, term by term, and what-if on top of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atoll.errors import Invalid
from atoll.outer.wire import encode
from atoll.planner import capacity, explain, step
from atoll.planner import price as model
from atoll.spec.document import parse
from atoll.spec.fleet import Device, Fleet, Link, ModelShape, Node, Profile, Site
from atoll.spec.job import Optimiser, TrainJob
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync

PLACE = model.Place(
    profile=Profile(parameters=1_000_000, step_seconds=0.1),
    link=Link(site="rome", bandwidth=1e7, latency=0.02),
    layout=Layout(),
    nodes=(Node(devices=(Device(),) * 4),),
)
JOB = TrainJob.model_validate(
    {
        "name": "heart",
        "purpose": "research",
        "task": {"file": "task.py", "name": "Heart"},
        "data": {"dataset": "heart"},
        "steps": 100,
    }
)


def sync(**fields: Any) -> Sync:
    return Sync.model_validate({"preset": "fedavg", "period": 10, **fields})


def test_the_price_is_the_stated_formula():
    cost = model.price(JOB, sync(), [PLACE, PLACE])
    link = 3 * 0.02 + 8e6 / 1e7
    assert cost.compute_seconds == pytest.approx(100 * 0.1)
    assert cost.transfer_seconds == pytest.approx(10 * (link + model.ROUND_SECONDS))
    assert cost.seconds == pytest.approx(cost.compute_seconds + cost.transfer_seconds)
    assert cost.bytes == 10 * 2 * 8_000_000 + 4_000_000


def test_fragments_are_more_rounds_of_less_and_a_delay_hides_what_it_takes_of_a_transfer():
    def cost(**fields: Any) -> Any:
        return model.price(JOB, sync(keep_optimiser=True, **fields), [PLACE, PLACE])

    parts = cost(fragments=2)
    size = model.round_bytes(1_000_000, sync(keep_optimiser=True, fragments=2))
    link = 3 * 0.02 + size / 1e7
    assert model.wire_bytes(500_000, sync()) < size < model.round_bytes(1_000_000, sync())
    assert parts.transfer_seconds == pytest.approx(20 * (link + model.ROUND_SECONDS))
    hidden = cost(fragments=2, delay=2)
    assert hidden.transfer_seconds == pytest.approx(20 * (link - 2 * 0.1 + model.ROUND_SECONDS))
    assert hidden.bytes == parts.bytes
    far = cost(delay=9).transfer_seconds
    assert far == pytest.approx(10 * model.ROUND_SECONDS), "a transfer takes no less than nothing"


@pytest.mark.parametrize(
    ("fields", "looks"),
    [
        ({"merge": "median"}, 0),
        ({"merge": "multi_krum", "hostile": 1}, 10),
        ({"merge": "geometric_median"}, 20),
        ({"merge": "mean", "bound": {"norm": 1.0}}, 5),
        ({"merge": "geometric_median", "bound": {"times": 1.0}}, 25),
    ],
)
def test_a_merge_that_looks_at_whole_updates_is_priced_by_site_and_by_pair(fields: dict[str, Any], looks: int):
    costs = [model.price(JOB, sync(**more), [PLACE] * 5).transfer_seconds for more in ({}, fields)]
    assert costs[1] - costs[0] == pytest.approx(10 * looks * 1_000_000 * model.LOOK_SECONDS)


def test_the_slowest_site_and_the_slowest_link_set_the_pace():
    slow = replace(PLACE, profile=Profile(parameters=1_000_000, step_seconds=0.3))
    far = replace(PLACE, link=Link(site="oslo", bandwidth=1e6, latency=0.02))
    cost = model.price(JOB, sync(), [PLACE, slow, far])
    assert cost.compute_seconds == pytest.approx(30)
    assert cost.transfer_seconds == pytest.approx(10 * (0.06 + 8.0 + model.ROUND_SECONDS))


def test_many_sites_on_fast_links_wait_for_the_hubs_shared_link():
    near = replace(PLACE, link=Link(site="rome", bandwidth=1e9, latency=0.0))
    cost = model.price(JOB, sync(), [near] * 50)
    assert cost.transfer_seconds == pytest.approx(10 * (50 * 8e6 / model.HUB_BANDWIDTH + model.ROUND_SECONDS))


def test_int8_cuts_an_update_about_four_times():
    plain, packed = model.wire_bytes(1_000_000, sync()), model.wire_bytes(1_000_000, sync(wire=[{"kind": "int8"}]))
    assert plain / packed == pytest.approx(4, rel=0.01)
    assert model.wire_bytes(1025, sync(wire=[{"kind": "int8"}])) == 1025 + 2 * 4
    assert model.price(JOB, sync(wire=[{"kind": "int8"}]), [PLACE]).bytes < model.price(JOB, sync(), [PLACE]).bytes


PARTS: dict[str, Any] = {"period": 10, "fragments": 5, "keep_optimiser": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 4_000_000),
        ({"down": [{"kind": "int8"}]}, 1_000_000 + 4 * 977),
        (PARTS, 800_000),
        ({**PARTS, "down": [{"kind": "int8"}]}, 200_000 + 4 * 196),
        ({"down": [{"kind": "int8"}], "wait": {"kind": "buffer", "count": 2}}, 4_000_000),
    ],
)
def test_weights_go_down_whole_or_as_what_has_changed(fields: dict[str, Any], expected: int):
    point = sync(**fields)
    assert model.down_bytes(1_000_000, point) == expected
    assert model.round_bytes(1_000_000, point) == expected + 4_000_000 // point.fragments


def test_clipping_does_not_shrink_an_update():
    assert model.wire_bytes(1000, sync(wire=[{"kind": "clip", "value": 1.0}])) == 4000


SPARSE = {"kind": "topk", "share": 0.01}


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ([{"kind": "bfloat16"}], 200_000),
        ([{"kind": "int4"}], 50_000 + 2 * 1563),
        ([SPARSE], 2 * 1000 + 4 * 1000),
        ([SPARSE, {"kind": "int8"}], 2 * 1000 + 1000 + 4),
        ([{"kind": "topk", "share": 0.5}, {"kind": "int8"}], 12_500 + 50_000 + 4 * 49),
        ([{"kind": "int8"}, {"kind": "zstd"}], 100_000 + 4 * 98),
    ],
)
def test_a_smaller_wire_is_priced_by_its_numbers_scales_and_places(wire: list[dict[str, Any]], expected: int):
    assert model.wire_bytes(100_000, sync(wire=wire)) == expected


def test_the_price_of_a_wire_is_what_its_encoding_takes_and_little_more():
    vector = np.random.default_rng(1).normal(size=300_000).astype(np.float32)
    for wire in ([{"kind": "int4"}], [SPARSE], [SPARSE, {"kind": "int8"}], [{"kind": "topk", "share": 0.3}]):
        point = sync(wire=wire)
        sent = sum(len(chunk.data) + len(chunk.scales) for chunk in encode(vector, point.wire))
        assert 0.999 * sent <= model.wire_bytes(vector.size, point) <= 1.4 * sent  # near places take one byte, not two


def test_a_longer_period_costs_proportionally_fewer_bytes():
    short, long = (model.price(JOB, sync(period=period), [PLACE]) for period in (1, 20))
    assert (short.bytes - 4_000_000) == 20 * (long.bytes - 4_000_000)
    assert short.compute_seconds == long.compute_seconds


def test_ranks_divide_a_step_up_to_the_devices_and_pay_for_their_all_reduce():
    two, eight = (replace(PLACE, layout=Layout(data=ranks)).step_seconds(JOB) for ranks in (2, 8))
    assert two == pytest.approx(0.05 + step.START_SECONDS + 4e6 / step.LOCAL_BANDWIDTH)
    assert eight > 0.1 / 4


def test_a_buffer_fills_as_often_as_sites_deliver():
    waiting = model.price(JOB, sync(), [PLACE] * 4)
    buffered = model.price(JOB, sync(wait={"kind": "buffer", "count": 2}), [PLACE] * 4)
    assert buffered.compute_seconds == pytest.approx(waiting.compute_seconds / 2)
    assert buffered.bytes < waiting.bytes


@pytest.mark.parametrize(
    ("optimiser", "copies"),
    [(Optimiser(), 4), (Optimiser(momentum=0.9), 5), (Optimiser(kind="adam"), 6), (Optimiser(kind="adamw"), 6)],
)
def test_memory_counts_weights_gradient_moments_start_and_delta(optimiser: Optimiser, copies: int):
    job = JOB.model_copy(update={"optimiser": optimiser})
    assert model.rank_memory(Profile(parameters=1000, step_seconds=1), job) == 4 * 1000 * copies


def test_measured_memory_stands_where_it_is_more_than_the_model_explains():
    profile = Profile(parameters=1000, step_seconds=1, memory_bytes=1_000_000)
    assert model.rank_memory(profile, JOB) == 1_000_000 + 2 * 4000


def test_ranks_that_share_a_model_hold_a_part_of_it_and_each_builds_all_of_it():
    adam = JOB.model_copy(update={"optimiser": Optimiser(kind="adam")})
    shape = ModelShape(layers=10, block_parameters=1000)
    profile = Profile(parameters=1000, step_seconds=1, shape=shape)
    block = 100 * (4 + 4 + 4)  # two blocks are whole at once, and one of them has a gradient
    assert model.rank_memory(profile, adam, Layout(shard=4)) == 4 * 1000 * 6 // 4 + block
    assert model.rank_memory(profile, adam, Layout(shard=4, data=2)) == 4 * 1000 * 6 // 4 + block
    assert model.rank_memory(profile, adam, Layout(data=4)) == 4 * 1000 * 7, "and what of the gradient is on its way"
    assert model.rank_memory(profile, adam, Layout(shard=100)) == 4000, "which is what building it takes"
    alone = Profile(parameters=1000, step_seconds=1)
    assert model.rank_memory(alone, adam, Layout(shard=4)) == 4 * 1000 * 6 // 4 + 8 * 1000, "one unit, made whole"


def test_control_variates_are_of_the_whole_model():
    profile = Profile(parameters=1000, step_seconds=1)
    assert model.rank_memory(profile, JOB, control=True) == 4 * 1000 * (4 + 5)


FLEET = Fleet(
    sites=(Site(name="oslo"), Site(name="rome")),
    links=(Link(site="oslo", bandwidth=1e6), Link(site="rome", bandwidth=1e8)),
)
PROFILES = {name: Profile(parameters=100_000, step_seconds=0.01, memory_bytes=50_000_000) for name in ("oslo", "rome")}
PLAN = Plan(sites=("oslo", "rome"), layouts={"oslo": Layout(), "rome": Layout()}, sync=sync(), rounds=10)


def test_no_change_costs_the_same():
    outlook = capacity.what_if(JOB, PLAN, FLEET, PROFILES, capacity.Change())
    assert outlook.then == outlook.now
    assert outlook.change == "no change"


def test_more_sites_send_more_bytes_at_the_pace_of_the_slowest():
    outlook = capacity.what_if(JOB, PLAN, FLEET, PROFILES, capacity.Change(sites=2))
    assert outlook.then.bytes - 400_000 == 2 * (outlook.now.bytes - 400_000)
    assert outlook.then.seconds == pytest.approx(outlook.now.seconds)
    assert outlook.change == "2 more sites like the slowest"


def test_faster_links_change_transfer_only():
    outlook = capacity.what_if(JOB, PLAN, FLEET, PROFILES, capacity.Change(bandwidth=10))
    assert outlook.then.compute_seconds == outlook.now.compute_seconds
    assert outlook.then.transfer_seconds < outlook.now.transfer_seconds / 4
    assert outlook.then.bytes == outlook.now.bytes


def test_a_bigger_model_grows_seconds_bytes_and_its_own_share_of_memory():
    outlook = capacity.what_if(JOB, PLAN, FLEET, PROFILES, capacity.Change(parameters=3))
    assert outlook.then.compute_seconds == pytest.approx(3 * outlook.now.compute_seconds)
    assert outlook.then.bytes == 3 * outlook.now.bytes
    assert outlook.then.memory_bytes - outlook.now.memory_bytes == 2 * 100_000 * 4 * 4


def test_a_bigger_model_is_cut_anew_and_one_that_fits_nowhere_is_told():
    of = Fleet(sites=(Site(name="oslo", nodes=(Node(devices=(Device(memory_bytes=10**9),) * 4),)),))
    shape = ModelShape(layers=20, block_parameters=10_000_000)
    profiles = {"oslo": Profile(parameters=10_000_000, step_seconds=1.0, shape=shape)}
    plan = Plan(sites=("oslo",), layouts={"oslo": Layout(data=4)}, sync=sync(), rounds=10)
    changes = {times: capacity.Change(parameters=times) for times in (2, 10, 30)}
    told = {times: capacity.what_if(JOB, plan, of, profiles, change) for times, change in changes.items()}
    assert told[2].change == "a model 2 times as big"
    assert told[10].change == "a model 10 times as big (by shard 4)"
    assert "a model 30 times as big (does not fit: " in told[30].change
    pinned = JOB.model_copy(update={"layout": Layout(data=4)})
    kept = capacity.what_if(pinned, plan, of, profiles, changes[10])
    assert "(does not fit: data 4: needs 2 GB a rank where a device has 1 GB)" in kept.change


def test_more_nodes_take_a_step_that_is_worth_splitting():
    slow = {name: Profile(parameters=100_000, step_seconds=5.0) for name in ("oslo", "rome")}
    outlook = capacity.what_if(JOB, PLAN, FLEET, slow, capacity.Change(nodes=3))
    assert outlook.change == "3 more nodes at each site (by data 4)"
    assert outlook.then.compute_seconds < 0.3 * outlook.now.compute_seconds


def test_the_table_has_a_row_for_each_usual_question():
    changes = [row.change for row in capacity.table(JOB, PLAN, FLEET, PROFILES)]
    assert changes[0] == "1 more site like the slowest"
    assert changes[3].startswith("1 more node at each site")
    assert "links 10 times as fast" in changes
    assert changes[-1] == "a model 10 times as big"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("sites", -1, "greater than or equal to 0"), ("bandwidth", 0, "greater than 0"), ("parameters", float("nan"), "")],
)
def test_senseless_changes_are_refused(field: str, value: float, words: str):
    with pytest.raises(Invalid, match=f"{field}: .*{words}"):
        parse(capacity.Change, {field: value}, "capacity")


def test_numbers_are_told_in_units_that_fit():
    assert [explain.volume(size) for size in (0, 999, 999_999, 4_000_000)] == ["0 B", "999 B", "1 MB", "4 MB"]
    assert [explain.duration(s) for s in (0.5, 42, 900, 36_000)] == ["0.50 s", "42 s", "15 min", "10.0 h"]
