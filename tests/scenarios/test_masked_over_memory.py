"""Secure sums in whole runs: the model is the one of plain sums, and the hub holds nothing that tells an update."""

import numpy as np
import pytest

from atoll.console.terms import required
from atoll.data.catalogue import Catalogue
from atoll.outer.ring import Ring
from atoll.registry import weights
from atoll.spec.event import Restarted
from atoll.spec.sync import Sync
from tests.scenarios.worlds import ROUNDS, started
from tests.unit.places import BATCH, SIZE, STEPS, eventually

NAMES = ("ada", "bob", "cyd", "dee")
CLIP = {"kind": "clip", "value": 10.0}
MASK = [CLIP, {"kind": "mask"}]
QUORUM = {"kind": "quorum", "count": 3, "deadline": 3.0}


@pytest.fixture
def world(tmp_path):
    with started(tmp_path, NAMES) as made:
        yield made


def model_of(world, run):
    view = world.end(run)
    assert view.state == "finished", view.words
    model = world.hub.model(view.result.model)
    return weights.load(world.hub._blobs.get(model.weights), model.signature)[0]


def waiting_for_dee(world, **sync):
    """Return a masked run that has all updates of its first round but dee's, and the hub's folder of it."""
    world.may_train["dee"].clear()
    run = world.submit(wire=MASK, **sync)
    folder = world.home / "hub" / "runs" / run
    assert eventually(lambda: len(list(folder.rglob("1-*.update"))) == 3)
    return run, folder


def leave(world, name):
    world.agents[name].stop()
    assert eventually(lambda: not world.hub._desk.presence.here(name))


def began_anew(world, run):
    return [event for event in world.journalled("run.restarted", run) if isinstance(event, Restarted)]


@pytest.mark.parametrize("merge", ["mean", "weighted_mean"])
def test_a_masked_run_ends_with_the_model_of_a_plain_one(world, merge):
    plain = model_of(world, world.submit(merge=merge, wire=[CLIP]))
    run = world.submit(merge=merge, wire=MASK)
    masked = model_of(world, run)
    assert np.abs(plain - masked).max() < 1e-6
    assert np.abs(plain).max() > 0.01
    crossed = [one.crossing for one in world.journalled("crossing", run) if one.crossing.kind == "update"]
    assert {one.wire for one in crossed} == {("clip", "mask")}
    assert len(crossed) == ROUNDS * len(NAMES)
    assert began_anew(world, run) == []


def test_what_the_hub_has_of_a_site_tells_nothing_of_its_update(world):
    made = {}
    for name in NAMES[:3]:
        train = world.workers[name].answers["train"]

        def kept(order, group, name=name, train=train):
            reply = train(order, group)
            made.setdefault(name, np.fromfile(order.output, np.float32))
            return reply

        world.workers[name].answers["train"] = kept
    run, folder = waiting_for_dee(world)
    there = {name: np.frombuffer(next(folder.rglob(f"1-{name}.update")).read_bytes(), np.uint32) for name in NAMES[:3]}
    world.may_train["dee"].set()
    model_of(world, run)
    ring = Ring(len(NAMES), CLIP["value"], STEPS * BATCH)
    for name, words in there.items():
        told = ring.lowered(words[-SIZE:].copy())
        assert np.abs(told - made[name]).min() > 1e-4
    added = ring.lowered(sum((words[-SIZE:] for words in there.values()), np.zeros(SIZE, np.uint32)))
    assert np.abs(added - sum(made.values())).min() > 1e-4, "the mask that each has with dee is on their sum"


def test_a_site_that_leaves_in_mid_sum_is_left_out_of_it(world):
    run, _ = waiting_for_dee(world, wait=QUORUM)
    leave(world, "dee")  # its masks are on the others' updates
    world.may_train["dee"].set()
    model_of(world, run)
    assert next(e.sites for e in world.journalled("run.merged", run) if e.position == 1) == NAMES[:3]
    assert began_anew(world, run) == []


def test_a_site_that_begins_anew_has_the_sum_begun_anew_and_nobody_trains_again(world):
    plain = model_of(world, world.submit(wire=[CLIP]))
    trained = {name: len(world.workers[name].did("train")) for name in NAMES}
    run, _ = waiting_for_dee(world)
    leave(world, "dee")
    world.may_train["dee"].set()
    world.start("dee")
    assert np.abs(model_of(world, run) - plain).max() < 1e-6
    assert len(began_anew(world, run)) == 1
    for name in NAMES[:3]:
        assert len(world.workers[name].did("train")) - trained[name] == ROUNDS


def test_a_site_whose_key_is_another_than_before_is_not_believed(world):
    model_of(world, world.submit(wire=MASK))
    path = world.home / "sites" / "ada" / "sites.json"
    path.write_text(path.read_text().replace("atoll/bob/", "atoll/bob/0"))
    view = world.end(world.submit(wire=MASK))
    assert (view.state, view.error) == ("failed", "Denied")
    assert view.words.startswith("ada refuses: secure sum: bob signs with another key than before")


def test_an_owner_asks_for_masks_and_no_job_takes_them_away(world):
    terms = required(["clip=2.0", "mask"])
    Catalogue(world.home / "sites" / "cyd").require("rows", terms)
    assert eventually(lambda: any(one.wire for one in world.hub.fleet().site("cyd").datasets))
    run = world.submit(wire=[])
    model_of(world, run)
    crossed = [one.crossing for one in world.journalled("crossing", run) if one.crossing.kind == "update"]
    assert {one.wire for one in crossed} == {("clip", "mask")}
    view = world.end(world.submit(merge="median"))
    assert (view.state, view.error) == ("failed", "Denied")
    assert "cyd asks for" in view.words
    assert "merge: median: compares single updates, which a sum hides" in view.words


def test_a_quorum_that_is_too_small_to_hide_an_update_is_refused_before_anything_runs(world):
    view = world.end(world.submit(wire=MASK, wait={**QUORUM, "count": 3, "deadline": 3.0}))
    assert view.state == "finished"
    sync = Sync.model_validate({"merge": "mean", "wire": MASK, "wait": QUORUM})
    assert sync.unfit(4) is None
    assert sync.unfit(10) == (
        "wait.count: 3 of 10 sites: a sum that hides each one's update is of 7 at least; raise it to 7"
    )
    assert sync.unfit(100) is not None
    assert sync.unfit(100).endswith("is of 85 at least; raise it to 85")


def test_more_sites_than_a_sum_may_have_are_refused_before_anything_runs():
    sync = Sync.model_validate({"merge": "mean", "wire": MASK})
    assert sync.unfit(1001) == "wire: mask: 1001 sites are too many for one sum, which 1000 may share; ask fewer"
    assert sync.unfit(1000) is None


NOISE = {"kind": "noise", "value": 0.05}


@pytest.mark.parametrize("wire", [[CLIP, NOISE], [*MASK[:1], NOISE, MASK[1]]], ids=["plain", "masked"])
def test_noise_is_on_what_leaves_and_the_loss_stays(world, wire):
    plain = model_of(world, world.submit(merge="mean", wire=[CLIP]))
    run = world.submit(merge="mean", wire=wire)
    noised = model_of(world, run)
    # The noise of three rounds' means, which later rounds halve: of one round without masks half the deviation, with
    # them a quarter, for four sites' parts.
    off = np.abs(noised - plain)
    assert 1e-3 < off.max() < 10 * NOISE["value"] * CLIP["value"]
    crossed = [one.crossing for one in world.journalled("crossing", run) if one.crossing.kind == "update"]
    assert {one.noise for one in crossed} == {NOISE["value"]}
    answers = [one.answer for one in world.journalled("run.answered", run) if one.answer.update and one.answer.examples]
    assert len(answers) == ROUNDS * len(NAMES)
    assert {one.loss for one in answers} == {None}
    assert {one.pace for one in answers} == {None}


def test_an_owner_asks_for_noise_and_gets_no_less(world):
    Catalogue(world.home / "sites" / "cyd").require("rows", required(["clip=2.0", "noise=0.1"]))
    assert eventually(lambda: any(one.wire for one in world.hub.fleet().site("cyd").datasets))
    run = world.submit(merge="mean", wire=[CLIP, NOISE])
    model_of(world, run)
    crossed = [one.crossing for one in world.journalled("crossing", run) if one.crossing.kind == "update"]
    assert {(one.clip, one.noise) for one in crossed} == {(2.0, 0.1)}
    view = world.end(world.submit(merge="weighted_mean"))
    assert (view.state, view.error) == ("failed", "Denied")
    assert "cyd asks for clip 2, noise 0.1 on updates: " in view.words


def test_two_sites_have_no_sum_that_hides_them(tmp_path):
    with started(tmp_path, NAMES[:2]) as small:
        view = small.end(small.submit(wire=MASK))
    assert view.state == "failed"
    assert "wire: mask hides an update among 3 or more, and a round may have 2" in view.words
