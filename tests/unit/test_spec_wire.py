"""What a wire may be: fields that belong to their transform, and an order that can be carried out."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from atoll.errors import Invalid
from atoll.spec.document import parse
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform, Wire

WHOLE = [
    {"kind": "clip", "value": 1.0},
    {"kind": "topk", "share": 0.01},
    {"kind": "int8"},
    {"kind": "zstd", "level": 3},
]


def wire(*kinds: str) -> list[dict[str, Any]]:
    whole = {"clip": {"value": 1.0}, "topk": {"share": 0.1}}
    return [{"kind": kind, **whole.get(kind, {})} for kind in kinds]


def test_a_wire_of_every_kind_comes_back_from_its_document():
    sync = parse(Sync, {"wire": WHOLE}, "sync")
    assert [step.kind for step in sync.wire] == ["clip", "topk", "int8", "zstd"]
    assert parse(Sync, sync.model_dump(mode="json"), "sync") == sync


@pytest.mark.parametrize("kinds", [(), ("clip", "clip"), ("topk", "bfloat16"), ("int4", "zstd"), ("clip", "zstd")])
def test_parts_of_the_order_are_an_order(kinds: tuple[str, ...]):
    assert len(TypeAdapter(Wire).validate_python(wire(*kinds))) == len(kinds)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (("int8", "clip"), "clip cannot follow int8; put clip before int8"),
        (("int8", "topk"), "topk cannot follow int8; put topk before int8"),
        (("zstd", "int4"), "int4 cannot follow zstd; put int4 before zstd"),
        (("bfloat16", "int8"), "int8 follows bfloat16, and a wire takes one of bfloat16, int8, int4, mask; remove one"),
        (("topk", "topk"), "topk follows topk, and a wire takes one of topk; remove one"),
        (("zstd", "zstd"), "zstd follows zstd, and a wire takes one of zstd; remove one"),
    ],
)
def test_another_order_is_refused_with_its_mend(kinds: tuple[str, ...], words: str):
    with pytest.raises(Invalid) as caught:
        parse(Sync, {"wire": wire(*kinds)}, "sync")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"kind": "clip"}, "clip needs a bound; set value: 1.0"),
        ({"kind": "topk"}, "topk needs the share to keep; set share: 0.01"),
        ({"kind": "topk", "share": 0}, "share: 0: Input should be greater than 0"),
        ({"kind": "topk", "share": 1.0}, "share: 1.0: Input should be less than 1"),
        ({"kind": "topk", "share": 0.1, "value": 1.0}, "topk takes no value; remove it"),
        ({"kind": "int4", "share": 0.1}, "int4 takes no share; remove it"),
        ({"kind": "int8", "level": 1}, "int8 takes no level; remove it"),
        ({"kind": "zstd", "level": 20}, "level: 20: Input should be less than or equal to 19"),
        ({"kind": "zstd", "feedback": False}, "zstd has nothing to feed back; remove feedback"),
        ({"kind": "int5"}, "int5"),
    ],
)
def test_a_transform_takes_the_fields_of_its_kind(step: dict[str, Any], words: str):
    with pytest.raises(Invalid) as caught:
        parse(Transform, step, "wire")
    assert words in str(caught.value)
