"""What owners ask of updates is in every plan with their data, whatever the job says, or there is no plan."""

from typing import Any

import pytest

from atoll.errors import Denied
from atoll.planner import ask
from atoll.planner.terms import with_terms
from atoll.spec.fleet import Fleet
from atoll.spec.job import TrainJob
from atoll.spec.user import LOCAL
from atoll.spec.wire import Transform, Wire
from tests.unit.test_planner_choose import fleet, plan, train

CLIP, LOOSE, STRICT = (Transform(kind="clip", value=value) for value in (1.0, 5.0, 0.5))
INT8, BFLOAT, ZSTD = Transform(kind="int8"), Transform(kind="bfloat16"), Transform(kind="zstd")


def asking(**wires: Wire) -> Fleet:
    """Return the hospitals, of which these want something of updates."""
    sites = [
        site.model_copy(
            update={"datasets": tuple(d.model_copy(update={"wire": wires.get(site.name, ())}) for d in site.datasets)}
        )
        for site in fleet().sites
    ]
    return fleet().model_copy(update={"sites": tuple(sites)})


def job(*wire: Transform, **sync: Any) -> TrainJob:
    return train(sync={"preset": "fedavg", "wire": [step.model_dump() for step in wire], **sync})


@pytest.mark.parametrize(
    ("wire", "asked", "found"),
    [
        ((), (CLIP,), (CLIP,)),
        ((INT8, ZSTD), (CLIP,), (CLIP, INT8, ZSTD)),
        ((LOOSE,), (CLIP,), (LOOSE, CLIP)),
        ((STRICT, INT8), (CLIP, INT8), (STRICT, INT8)),
        ((ZSTD,), (INT8,), (INT8, ZSTD)),
    ],
)
def test_a_wire_gets_what_it_lacks_in_its_place(wire: Wire, asked: Wire, found: Wire):
    assert with_terms(wire, asked) == found


@pytest.mark.parametrize("asked", [job(), job(INT8), job(LOOSE, INT8), train()])
def test_a_job_cannot_do_without_what_an_owner_asks_for(asked: TrainJob):
    chosen = plan(asked, asking(oslo=(CLIP,)))
    assert min(step.value or 0 for step in chosen.sync.wire if step.kind == "clip") == 1.0
    assert [(one.by, one.words) for one in chosen.reasons if "terms" in one.by] == [
        ("terms of oslo", "updates pass through clip 1")
    ]


def test_a_job_that_is_stricter_by_itself_is_left_as_it_is():
    asked = job(STRICT)
    chosen = plan(asked, asking(oslo=(CLIP,)))
    assert asked.sync is not None
    assert chosen.sync.wire == asked.sync.wire
    assert not [one for one in chosen.reasons if "terms" in one.by]


def test_of_several_owners_each_has_its_way():
    chosen = plan(train(), asking(oslo=(CLIP,), rome=(INT8,)))
    assert [step.kind for step in chosen.sync.wire] == ["clip", "int8"]


def test_owners_of_sites_that_do_not_train_ask_for_nothing():
    chosen = plan(train(data={"sites": ["berlin", "rome"]}), asking(oslo=(CLIP,)))
    assert chosen.sync.wire == ()


@pytest.mark.parametrize(
    ("asked", "terms", "words"),
    [
        (job(BFLOAT), (INT8,), "sync: oslo asks for int8 on updates: int8 follows bfloat16"),
        (job(preset="scaffold"), (CLIP,), "sync: oslo asks for clip 1 on updates: control: clip cuts off"),
    ],
)
def test_a_pinned_sync_that_cannot_have_it_is_refused_in_words(asked: TrainJob, terms: Wire, words: str):
    with pytest.raises(Denied, match=words):
        plan(asked, asking(oslo=terms))


def test_two_owners_who_contradict_each_other_leave_no_way_and_are_told():
    with pytest.raises(Denied, match="no way to train is left: rome asks for bfloat16 on updates"):
        plan(train(), asking(oslo=(INT8,), rome=(BFLOAT,)))


def test_a_site_is_asked_about_the_update_as_the_plan_will_have_it():
    questions = ask.requests(job(LOOSE), asking(oslo=(CLIP, INT8)), LOCAL, None)
    crossing = {
        site: next(q for q in asked if q.role == "update").request.crossing for site, asked in questions.items()
    }
    assert crossing["oslo"] is not None
    assert crossing["rome"] is not None
    assert (set(crossing["oslo"].wire), crossing["oslo"].clip) == ({"clip", "int8"}, 1.0)
    assert (crossing["rome"].wire, crossing["rome"].clip) == (("clip",), 5.0)
