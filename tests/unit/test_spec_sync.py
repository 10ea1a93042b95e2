"""The outer space: presets are points of it and nothing more, and points that mean nothing are refused."""

from typing import Any

import pytest
import yaml

from atoll.errors import Invalid
from atoll.spec.document import canonical, parse, parse_json, write_yaml
from atoll.spec.plan import PRESETS, Layout, Outer, Sync, Wait


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
        ({"trim": 0.5}, "sync: trim: 0.5: Input should be less than 0.5"),
        ({"period": 0}, "sync: period: 0: Input should be greater than 0"),
        (3, "sync: (document): 3: "),
    ],
)
def test_a_point_that_means_nothing_is_refused_with_its_mend(data: Any, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(Sync, data, "sync")
    assert words in str(caught.value)


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
