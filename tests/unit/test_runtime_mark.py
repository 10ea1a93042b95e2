"""Of what an update is made: whatever shapes it makes it another one, and whoever asks for it again does not."""

import pytest

from atoll.runtime.mark import origin_of
from atoll.spec.fleet import Dataset
from atoll.spec.model import TensorSpec
from atoll.spec.order import TaskName
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.unit.places import SIGNATURE, STEPS, WAIT, assign, job

DIGEST, OTHER = "sha256:" + 64 * "a", "sha256:" + 64 * "b"
ROWS = Dataset(name="rows", rows=50, fingerprint=DIGEST)
CLIP, NOISE = {"kind": "clip", "value": 1.0}, {"kind": "noise", "value": 2.0}
ASKED = {"together": ("lyon", "oslo", "rome"), "sync": {"wire": [CLIP, NOISE, {"kind": "mask"}]}}


def asked(sync=None, **fields):
    known = {"period": STEPS, "merge": "mean", "wait": {"patience": WAIT}, **ASKED["sync"], **(sync or {})}
    return assign(**{"together": ASKED["together"], **fields, "sync": Sync.model_validate(known)})


def origin(a=None, base=None, dataset=ROWS, ledger="rows", unit="site"):
    return origin_of(a or asked(), base, dataset, ledger, unit)


@pytest.mark.parametrize(
    "fields",
    [
        {"epoch": 7},
        {"user": "ada", "roles": ("scientist",)},
        {"layout": Layout(data=2)},
        {"together": ("lyon", "oslo", "bern")},
        {"fingerprint": OTHER},
        {"counted": 1},
        {"sync": {"wait": {"patience": 2 * WAIT}}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_who_asks_again_asks_for_the_same_update(fields):
    assert origin(asked(**fields)) == origin()


@pytest.mark.parametrize(
    "fields",
    [
        {"sync": {"wire": [CLIP, NOISE]}},
        {"sync": {"wire": [CLIP, {**NOISE, "value": 1.0}, {"kind": "mask"}]}},
        {"sync": {"wire": []}},
        {"sync": {"proximal": 0.1}},
        {"job": job(seed=8)},
        {"job": job(privacy={"noise": 1.1, "delta": 1e-3})},
        {"code": OTHER},
        {"task": TaskName(file="task.py", name="Other")},
    ],
)
def test_another_job_wire_or_code_is_another_run(fields):
    assert origin(asked(**fields)).run != origin().run
    assert origin(asked(**fields)).made != origin().made


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset": ROWS.model_copy(update={"name": "open"})},
        {"dataset": ROWS.model_copy(update={"fingerprint": OTHER})},
        {"ledger": "open"},
        {"unit": "record"},
    ],
)
def test_another_dataset_or_promise_is_another_run_by_what_the_site_knows(fields):
    assert origin(**fields).run != origin().run
    assert origin(**fields).made != origin().made


@pytest.mark.parametrize(
    "a",
    [
        asked(steps=STEPS - 1),
        asked(done=1),
        asked(version=1),
        asked(weights=OTHER),
        asked(signature=(*SIGNATURE, TensorSpec(name="c", shape=(1,)))),
        asked(statistics={"age": {"count": 1, "mean": 2.0, "std": 3.0}}),
        asked(together=("lyon", "oslo", "rome", "bern")),
    ],
)
def test_another_round_or_other_parts_of_noise_make_another_update(a):
    assert origin(a).made != origin().made


def test_what_was_lost_before_and_where_a_site_goes_on_make_another_update():
    assert origin(base=3).made != origin().made
    streaming = {"wire": [], "fragments": 3, "keep_optimiser": True}
    first, second = (origin(asked(streaming, together=(), counted=counted)) for counted in (None, 1))
    assert first.run == second.run
    assert first.made != second.made
