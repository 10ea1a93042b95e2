"""A relay at work: what it takes for a sum and of whom, whom it tells of what is wrong, and what goes up."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from atoll.errors import Denied, Invalid, LinkLost, Unfit
from atoll.outer.wire import encode
from atoll.runtime.relay import Relay
from atoll.spec.event import Answer
from atoll.spec.fleet import Site
from atoll.spec.message import Branch, Failure, Parcel, Relayed, Unusable
from atoll.spec.sync import Sync
from tests.unit.houses import source, spoiled, unread, whole
from tests.unit.places import DIGEST, SIZE, assign, eventually

QUORUM = {"merge": "mean", "wait": {"kind": "quorum", "count": 1, "deadline": 600.0}}
WAYS = {"a": ("a",), "b": ("b",), "c": ("low", "c"), "d": ("low", "deep", "d")}


class Above:
    """The hub's desk: keeps what it is told and brought, unless it refuses that."""

    def __init__(self):
        self.said, self.sums, self.refuses = [], [], []

    def opened(self, site, send):
        pass

    def closed(self, site, send, words):
        pass

    def heard(self, site, message):
        self.said.append(message)

    def take(self, site, parcel, frames):
        if self.refuses:
            raise self.refuses.pop()
        found = np.concatenate([np.frombuffer(frame.data, np.float32) for frame in frames(0)])
        self.sums.append((parcel, found))

    def give(self, site, parcel):
        return parcel, iter(())


@pytest.fixture
def place(tmp_path):
    """The relay top with a hub above it; ``begin`` assigns the first round to sites behind it."""
    above, relay = Above(), Relay(Site(name="top"), tmp_path)
    relay._gate.attach(above)

    def begin(*sites, asked=None, **sync):
        branch = Branch(relay="top", sites=sites)
        given = assign(sync=Sync.model_validate(sync or {"merge": "mean"}), branches=(branch,))
        for site in asked or sites:
            told = given
            for hop in reversed(WAYS[site]):
                told = Relayed(site=hop, message=told)
            relay._told(told)

    yield SimpleNamespace(above=above, relay=relay, begin=begin, home=tmp_path)
    relay.close()


def parcel(*sites, via=(), several=False, **more):
    about = {"position": 2, "epoch": 0, "version": 0, "examples": 1, "loss": 0.5, "via": via}
    answers = tuple(Answer.model_validate({"site": site, **about, **more}) for site in sites)
    several = several or len(sites) > 1
    own = {"answers": answers} if several else {"answer": answers[0]}
    return Parcel.model_validate({"run": "run", "purpose": "update", "size": SIZE, **own})


def bring(place, child, brought, value=1.0):
    place.relay.take(child, brought, source(list(encode(np.full(SIZE, value, np.float32), ()))))


def the_sum(place):
    assert eventually(lambda: place.above.sums)
    [(made, values)] = place.above.sums
    return [answer.site for answer in made.answers], float(values[0])


def unusable(place):
    found = [one for one in place.above.said if isinstance(one, Relayed)]
    return [one.site for one in found if isinstance(one.message, Unusable)]


# --- who is at fault


@pytest.mark.parametrize("wrong", [{"loss": 1e300}, {"examples": 13}, {"examples": 0}, {"version": 1}], ids=str)
def test_what_the_hub_would_not_take_the_relay_does_not_and_it_is_the_site_s_fault(place, wrong):
    place.begin("a", "b")
    with pytest.raises(Unfit, match="a: "):
        place.relay.take("a", parcel("a", **wrong), unread)
    assert unusable(place) == ["a"]
    bring(place, "a", parcel("a"))
    bring(place, "b", parcel("b"))
    assert the_sum(place) == (["a", "b"], 1.0)


def test_steps_that_no_round_by_time_has_are_the_site_s_fault_too(place):
    place.begin("a", merge="mean", seconds=5.0, period=3)
    for steps in (0, 4):
        with pytest.raises(Unfit, match="a: steps"):
            place.relay.take("a", parcel("a", steps=steps), unread)


def test_what_a_site_says_besides_its_numbers_stays_at_the_relay(place):
    place.begin("a")
    sums = {"x" * 1000: {"count": 1, "total": 1.0, "squares": 1.0}}
    bring(place, "a", parcel("a", sums=sums, groups=({"rows": 1},), suppressed=True, totals={"m": {}}, bytes=5))
    the_sum(place)
    [answer] = place.above.sums[0][0].answers
    assert answer == parcel("a", via=("top",)).answer


@pytest.mark.parametrize(
    ("child", "brought"),
    [
        ("a", parcel("a", via=("nobody",))),
        ("a", parcel("a", several=True)),
        ("a", parcel("a", via=("a",), several=True)),
        ("a", parcel("a", "a", via=("low",))),
        ("low", parcel("c", via=("low",))),
        ("low", parcel("c", via=("deep",), several=True)),
        ("low", parcel("d", "c", via=("low", "deep"))),
    ],
)
def test_a_way_that_is_not_the_one_it_came_by_is_refused_and_the_others_go_on(place, child, brought):
    place.begin("a", "b", "c", "d", **QUORUM)
    with pytest.raises(Unfit, match=r"did not|twice"):
        place.relay.take(child, brought, unread)
    assert unusable(place) == [child]


def test_a_sum_of_sums_keeps_the_way_of_each_site(place):
    place.begin("c", "d")
    answers = (parcel("c", via=("low",)).answer, parcel("d", via=("low", "deep")).answer)
    bring(place, "low", parcel("c", "d").model_copy(update={"answers": answers}))
    the_sum(place)
    assert [answer.via for answer in place.above.sums[0][0].answers] == [("top", "low"), ("top", "low", "deep")]


def test_a_single_update_that_is_wrong_counts_against_its_site_and_not_the_relay_that_passed_it_on(place):
    place.begin("a", "c")
    with pytest.raises(Unfit, match="c: tensor"):
        place.relay.take("low", parcel("c"), source([whole(spoiled())]))
    [told] = [one for one in place.above.said if isinstance(one, Relayed)]
    assert (told.site, told.message.site, told.message.message.kind) == ("low", "c", "unusable")


def test_a_site_cannot_end_another_s_part_of_a_sum(place):
    place.begin("a", "b", **QUORUM)
    place.relay.heard("a", Relayed(site="b", message=Failure(run="run", position=2, words="x")))
    place.relay.heard("b", Failure(run="run", position=1, words="late"))
    bring(place, "a", parcel("a"))
    bring(place, "b", parcel("b"), 3.0)
    assert the_sum(place) == (["a", "b"], 2.0)


def test_a_site_that_fails_is_not_waited_for_under_a_quorum(place):
    place.begin("a", "b", **QUORUM)
    bring(place, "a", parcel("a"))
    place.relay.heard("b", Failure(run="run", position=2, words="b: no"))
    assert the_sum(place) == (["a"], 1.0)


# --- what becomes of a sum


def test_updates_that_cannot_be_summed_end_the_run_in_the_words_that_name_the_site(place):
    place.begin("a")
    bring(place, "a", parcel("a"), 1e13)
    assert eventually(lambda: [one for one in place.above.said if isinstance(one, Failure)])
    [failed] = place.above.said
    assert "update of a" in failed.words
    assert failed.error == "Invalid"


def test_a_sum_that_the_hub_does_not_take_is_made_anew(place):
    place.above.refuses = [Denied("top: its sum holds b"), Invalid("top: no")]
    for _ in range(2):
        place.begin("a")
        place.relay.opened("a", lambda message: None)
        before = len(place.above.said)
        bring(place, "a", parcel("a"))
        assert eventually(lambda before=before: len(place.above.said) == before + 2)
        assert [one.message.kind for one in place.above.said[before:]] == ["closed", "opened"]
    place.begin("a")
    bring(place, "a", parcel("a"))
    assert the_sum(place) == (["a"], 1.0)


def test_a_late_single_update_does_not_take_the_place_of_the_sum_of_the_relay_that_it_came_by(place):
    place.begin("a", "c", "d")
    bring(place, "a", parcel("a"), 1.0)
    bring(place, "low", parcel("d", via=("deep",), several=True), 2.0)
    bring(place, "low", parcel("c"), 6.0)
    assert the_sum(place) == (["a", "c", "d"], 3.0)


def test_no_site_counts_twice_and_what_is_here_is_receipted_unread(place):
    place.begin("a", "c", "d")
    bring(place, "low", parcel("c"))
    place.relay.take("low", parcel("c"), unread)
    with pytest.raises(LinkLost, match="sent again"):
        place.relay.take("low", parcel("c", via=("low",), several=True), unread)
    bring(place, "low", parcel("d"), 3.0)
    bring(place, "a", parcel("a"), 5.0)
    assert the_sum(place) == (["a", "c", "d"], 3.0)


def test_what_the_hub_does_not_wait_for_any_more_is_in_no_sum(place):
    place.begin("a", "b", "c")
    place.relay.opened("low", lambda message: None)
    bring(place, "a", parcel("a"), 5.0)
    bring(place, "low", parcel("c", via=("low",), several=True), 3.0)
    place.begin("b", "c", asked=("b",))
    bring(place, "b", parcel("b"), 1.0)
    assert the_sum(place) == (["b", "c"], 2.0)


def test_who_was_in_one_update_with_a_site_that_does_not_count_is_asked_again(place):
    place.begin("a", "b", "c", "d")
    place.relay.opened("low", lambda message: None)
    answers = (parcel("c", via=("low",)).answer, parcel("d", via=("low", "deep")).answer)
    bring(place, "low", parcel("a", "b").model_copy(update={"answers": answers}))
    place.begin("a", "b", "c", asked=("a",))
    assert [(one.site, one.message.kind) for one in place.above.said] == [("low", "closed"), ("low", "opened")]


def test_rounds_that_take_longer_than_a_sum_waits_are_told_of_once(place, caplog):
    caplog.set_level(logging.WARNING)
    place.begin("a", wait={"kind": "quorum", "count": 1, "deadline": 0.001})
    assert eventually(lambda: "raise sync.wait.deadline" in caplog.text)
    bring(place, "a", parcel("a"))
    assert place.above.sums[0][0].answer.site == "a"


# --- a disk without room


def test_a_disk_without_room_makes_sites_wait_and_ends_nothing(place):
    (place.home / "runs").write_text("")  # no folder can be made
    place.begin("a")
    with pytest.raises(LinkLost, match="top: cannot store"):
        bring(place, "a", parcel("a"))
    (place.home / "runs").unlink()
    bring(place, "a", parcel("a"))
    assert the_sum(place) == (["a"], 1.0)


def test_where_nothing_can_be_kept_what_is_fetched_is_fetched_later(place):
    place.begin("a")
    (place.home / "shelf").write_text("")
    asked = Parcel(run="run", purpose="weights", size=SIZE, digest=DIGEST)
    with pytest.raises(LinkLost, match="top: cannot store"):
        place.relay.give("a", asked)
    (place.home / "shelf").unlink()
    assert place.relay.give("a", asked)[0].digest == DIGEST


def test_a_session_that_a_disk_breaks_is_lost_and_begun_anew(place):
    (place.home / "runs").write_text("")
    with pytest.raises(LinkLost, match="the disk of this relay"):
        place.relay._session(calm=lambda: (place.home / "runs" / "x").read_text())
