"""The outer space: presets are points of it and nothing more, and points that mean nothing are refused."""

from typing import Any

import pytest
import yaml

from atoll.errors import Invalid
from atoll.spec.document import canonical, parse, parse_json, write_yaml
from atoll.spec.plan import Layout
from atoll.spec.presets import PRESETS
from atoll.spec.sync import Outer, Sync, Wait


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_by_its_name_by_its_table_and_written_out(name: str) -> None:
    by_name = parse(Sync, name, "sync")
    assert by_name.preset == name
    assert parse(Sync, {"preset": name}, "sync") == by_name
    assert parse(Sync, {**PRESETS[name], "preset": name}, "sync") == by_name
    assert parse(Sync, PRESETS[name], "sync") == by_name.model_copy(update={"preset": None})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_and_yaml(name: str) -> None:
    sync = parse(Sync, name, "sync")
    assert parse_json(Sync, canonical(sync), "sync") == sync
    assert parse(Sync, yaml.safe_load(write_yaml(sync)), "sync") == sync


def test_the_named_algorithms_are_where_their_papers_put_them() -> None:
    diloco = parse(Sync, "diloco", "sync")
    assert (diloco.exchange, diloco.period, diloco.merge, diloco.keep_optimiser) == ("delta", 50, "mean", True)
    assert diloco.outer == Outer(kind="sgd", rate=0.7, momentum=0.9, nesterov=True)
    fedavg = parse(Sync, "fedavg", "sync")
    assert (fedavg.merge, fedavg.outer, fedavg.wait) == ("weighted_mean", Outer(), Wait())
    assert parse(Sync, "data_parallel", "sync").exchange == "gradient"
    scaffold = parse(Sync, "scaffold", "sync")
    assert (scaffold.control, scaffold.merge, scaffold.outer) == (True, "mean", Outer())
    assert parse(Sync, "fedbuff", "sync").wait.kind == "buffer"
    assert parse(Sync, "fedprox", "sync").proximal > 0
    assert {parse(Sync, name, "sync").outer.kind for name in ("fedadam", "fedyogi")} == {"adam", "yogi"}


def test_own_fields_lie_over_the_presets_at_every_depth() -> None:
    sync = parse(Sync, {"preset": "diloco", "period": 20, "outer": {"rate": 0.5}}, "sync")
    assert (sync.period, sync.merge, sync.keep_optimiser) == (20, "mean", True)
    assert sync.outer == Outer(rate=0.5, momentum=0.9, nesterov=True)


def test_reading_a_preset_leaves_the_presets_as_they_were() -> None:
    before = canonical(PRESETS)
    parse(Sync, {"preset": "fedadam", "outer": {"rate": 9.0}}, "sync")
    assert canonical(PRESETS) == before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("dilocco", "there is no preset 'dilocco'; did you mean 'diloco'?"),
        ({"preset": "zzz"}, "there is no preset 'zzz'; there is data_parallel, diloco, fedadam"),
        ({"wait": {"kind": "quorum"}}, "quorum needs a count of sites; set count: 2"),
        ({"wait": {"kind": "all", "count": 2}}, "all waits for every site; remove count, or use kind: quorum"),
        ({"outer": {"nesterov": True}}, "nesterov needs a momentum above 0; set momentum: 0.9"),
        ({"wire": [{"kind": "clip"}]}, "clip needs a bound; set value: 1.0"),
        ({"wire": [{"kind": "int8", "value": 1.0}]}, "int8 takes no value; remove it"),
        ({"preset": "fedprox", "exchange": "gradient"}, "use exchange: delta"),
        ({"preset": "scaffold", "exchange": "gradient"}, "control bends local steps"),
        ({"preset": "scaffold", "wait": {"kind": "buffer", "count": 2}}, "and a buffer may not; use quorum"),
        ({"preset": "scaffold", "fragments": 2, "keep_optimiser": True}, "control belongs to the weights of a whole"),
        ({"preset": "scaffold", "merge": "median"}, "where merge: median has another; use merge: mean"),
        ({"control": True}, "where merge: weighted_mean has another; use merge: mean"),
        ({"preset": "scaffold", "wire": [{"kind": "clip", "value": 1.0}]}, "remove it from the wire"),
        ({"preset": "scaffold", "wire": [{"kind": "int8", "feedback": False}]}, "remove feedback: false"),
        ({"keep_local": ["head*"], "exchange": "gradient"}, "steps outside only, and so never what stays; use delta"),
        ({"keep_local": ["h*"], "period": 4, "fragments": 2, "keep_optimiser": True}, "goes with whole rounds only"),
        ({"keep_local": ["a/../b"]}, "sync: keep_local.0: 'a/../b': String should match pattern"),
        ({"seconds": 600}, "seconds: 600: a round fails after wait.patience (600); raise that one"),
        ({"seconds": 9, "period": 4, "fragments": 2, "keep_optimiser": True}, "seconds: fragments take turns by steps"),
        ({"seconds": 0}, "sync: seconds: 0: Input should be greater than 0"),
        ({"preset": "streaming_diloco", "fragments": 5}, "must be a multiple of fragments (5), which take turns in it"),
        ({"preset": "streaming_diloco", "delay": 12}, "delay: 12: must be below the 12 steps between two exchanges"),
        ({"period": 4, "blend": 0.5}, "set keep_optimiser: true"),
        ({"preset": "streaming_diloco", "proximal": 0.1}, "pulls to the round's start, which is not there yet"),
        ({"preset": "streaming_diloco", "wait": {"kind": "buffer", "count": 2}}, "which here are of other parts"),
        ({"preset": "streaming_diloco", "exchange": "gradient"}, "steps outside only, so nothing can go on meanwhile"),
        ({"merge": "multi_krum"}, "merge: multi_krum: needs to know how many sites may be hostile; set hostile: 1"),
        ({"merge": "median", "hostile": 1}, "hostile: 1: is of merge: multi_krum, and median takes none; remove it"),
        ({"bound": {"norm": 1.0}}, "weighs by what a site says of itself, which nothing bounds; use merge: mean"),
        ({"merge": "mean", "bound": {}}, "a bound is a norm or so many times the median norm; set norm: 1.0"),
        ({"merge": "mean", "bound": {"norm": 1.0, "times": 1.0}}, "a bound is a norm or so many times the median norm"),
        ({"merge": "mean", "bound": {"norm": 0}}, "sync: bound.norm: 0: Input should be greater than 0"),
        ({"preset": "scaffold", "bound": {"norm": 1.0}}, "bound: would cut off what hub and sites must count alike"),
        ({"preset": "scaffold", "merge": "geometric_median"}, "where merge: geometric_median has another"),
        ({"preset": "fedbuff", "merge": "median"}, "merge: median: compares the updates of one round, and a buffer's"),
        ({"preset": "fedbuff", "merge": "mean", "bound": {"times": 2}}, "bound.times: compares the updates of one"),
        ({"merge": "median", "wait": {"kind": "quorum", "count": 2}}, "needs 3 updates to tell which are odd, and a"),
        (
            {"merge": "multi_krum", "hostile": 2, "wait": {"kind": "quorum", "count": 5}},
            "merge: multi_krum: needs 7 updates to tell which are odd, and a round may have 5; lower hostile to 1",
        ),
        ({"trim": 0.5}, "sync: trim: 0.5: Input should be less than 0.5"),
        ({"period": 0}, "sync: period: 0: Input should be greater than 0"),
        (3, "sync: (document): 3: "),
    ],
)
def test_a_point_that_means_nothing_is_refused_with_its_mend(data: Any, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(Sync, data, "sync")
    assert words in str(caught.value)


def test_fragments_take_turns_and_together_are_the_model() -> None:
    sync = parse(Sync, "streaming_diloco", "sync")
    assert (sync.stride, sync.streaming) == (12, True)
    for size in (4, 10, 1_000_003):
        spans = [sync.span(size, version) for version in range(8)]
        assert spans[:4] == spans[4:]
        assert [first for first, _ in spans[:4]] == [0, *(last for _, last in spans[:3])]
        assert spans[3][1] == size
        assert all(last > first for first, last in spans)


def test_a_layouts_ranks_are_the_product_of_its_degrees() -> None:
    assert Layout(data=3).ranks == 3


@pytest.mark.parametrize(
    "data",
    [
        {"preset": "fedavg", "period": 1},
        {"preset": "diloco", "outer": {"rate": 1.0}},
        {"preset": "fedprox", "proximal": 0},
    ],
)
def test_a_preset_with_a_field_set_back_to_the_default_survives_yaml(data: dict[str, Any]) -> None:
    sync = parse(Sync, data, "sync")
    assert parse(Sync, yaml.safe_load(write_yaml(sync)), "sync") == sync


def test_a_preset_that_is_no_text_is_told_like_any_other() -> None:
    with pytest.raises(Invalid, match="preset"):
        parse(Sync, {"preset": ["fedavg"]}, "sync")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, None),
        ({"merge": "mean"}, None),
        ({"merge": "median"}, "merge: median: compares single updates, which a sum hides; use merge: mean"),
        ({"merge": "multi_krum", "hostile": 1}, "merge: multi_krum: compares single updates"),
        ({"merge": "geometric_median"}, "merge: geometric_median: compares single updates"),
        ({"merge": "mean", "bound": {"norm": 1.0}}, "bound: is of single updates, which a sum hides; remove it"),
        ({"preset": "scaffold"}, "control: variates are counted one by one, which a sum hides"),
    ],
)
def test_a_sync_says_why_no_sum_may_stand_for_single_updates(fields: Any, words: str | None) -> None:
    said = parse(Sync, fields, "sync").singles
    assert said is None if words is None else said is not None and said.startswith(words)


def test_a_bound_by_norm_goes_with_a_buffer_and_one_site() -> None:
    sync = parse(Sync, {"preset": "fedbuff", "merge": "mean", "bound": {"norm": 1.0}}, "sync")
    assert not sync.compares
    assert sync.unfit(1) is None
