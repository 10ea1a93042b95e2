"""What cannot be taken: refused in words with site, tensor and reason, journalled, and the run goes on by its rule."""

import numpy as np
import pytest

from atoll.errors import Invalid, LinkLost, Unfit
from atoll.outer.wire import CHUNK, encode
from atoll.runtime.brought import Watched, tensors
from atoll.runtime.machine import Merge
from atoll.spec.event import Cancelled, Restarted
from atoll.spec.message import Done, Notice
from atoll.spec.model import TensorSpec
from tests.unit.houses import QUORUM, SIGNATURE, assigned, bring_badly, source, spoiled, unread, vector, whole

# --- what is refused, and how it is told


WRONG = {
    "not a number": ([whole(spoiled())], "ada: tensor w: nan at element 3 of the model: chunk at 0: data: not finite"),
    "infinite": ([whole(spoiled(0, np.inf))], "ada: tensor w: inf at element 0 of the model: "),
    "nothing": ([], "ada: tensor w: ended after 0 of 8 elements; send it whole"),
    "cut short": ([whole(length=4)], "ada: tensor w: chunk.length: 4: must be 8 at offset 0"),
    "too few bytes": ([whole(data=vector()[:7])], "ada: tensor w: chunk.data: 28 bytes: must be 32"),
    "of doubles": ([whole(vector().astype(np.float64))], "ada: tensor w: chunk.data: 64 bytes: must be 32"),
    "with scales": ([whole(scales=b"1234")], "ada: tensor w: chunk.scales: 4 bytes: must be 0"),
    "the same chunk twice": ([whole(), whole()], "ada: tensor w: frame at 0 where 8 was due"),
    "off the grid": ([whole(offset=1)], "ada: tensor w: chunk.offset: 1: must be a multiple"),
    "beyond the model": ([whole(), whole(offset=CHUNK)], f"ada: chunk.offset: {CHUNK}: must be a multiple"),
    "before it": ([whole(offset=-CHUNK)], f"ada: chunk.offset: {-CHUNK}: must be a multiple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_stream_is_told_by_site_tensor_and_reason_and_journalled_so(house, name):
    frames, words = WRONG[name]
    house.run()
    with pytest.raises(Unfit) as told:
        house.desk.take("ada", house.parcel("run", "ada"), lambda offset: iter(frames))
    assert str(told.value).startswith(words)
    [rejected] = house.happened("run.rejected")
    assert (rejected.site, rejected.position, rejected.epoch, rejected.late) == ("ada", 1, 0, False)
    assert rejected.words == str(told.value)
    assert house.conductor.states["run"].arrived == ()
    house.bring("ada", house.parcel("run", "ada"))
    assert len(house.conductor.states["run"].arrived) == 1


def test_first_weights_that_are_wrong_are_told_by_the_tensors_that_they_say_they_have(house):
    names = (
        TensorSpec(name="none", shape=(0, 9)),
        TensorSpec(name="first", shape=(3,)),
        TensorSpec(name="w", shape=(5,)),
    )
    house.start("run")
    parcel = house.parcel("run", "ada", signature=names)
    for at, name in ((2, "first"), (3, "w")):
        with pytest.raises(Unfit, match=f"ada: tensor {name}: nan at element {at} of the model"):
            house.desk.take("ada", parcel, source([whole(spoiled(at))]))


@pytest.mark.parametrize("change", [{"size": 9}, {"size": 1 << 40}, {"size": 0}, {"wire": ("int8",)}])
def test_another_size_or_wire_than_the_plans_is_journalled_unread(house, change):
    house.run()
    parcel = house.parcel("run", "ada").model_copy(update=change)
    with pytest.raises(Unfit, match="where the plan has 8"):
        house.desk.take("ada", parcel, unread)
    assert len(house.happened("run.rejected")) == 1


def test_a_lie_of_any_length_is_journalled_in_a_sentence(house):
    house.run()
    parcel = house.parcel("run", "ada").model_copy(update={"wire": ("x" * 100_000,)})
    with pytest.raises(Unfit):
        house.desk.take("ada", parcel, unread)
    [rejected] = house.happened("run.rejected")
    assert len(rejected.words) == 2000


@pytest.mark.parametrize("place", [{"epoch": 7}, {"position": 3}, {"position": 9}, {"version": 1}])
def test_an_answer_that_was_never_asked_for_is_refused_and_counts_against_its_site(house, place):
    house.run()
    with pytest.raises(Unfit, match="was never asked for; run run is at stage 1 of epoch 0"):
        house.desk.take("ada", house.parcel("run", "ada", **place), unread)
    assert [event.late for event in house.happened("run.rejected")] == [False]


def test_a_round_answered_without_tensors_is_refused_and_asked_for_again(house):
    house.run()
    house.performed.clear()
    house.desk.heard("ada", Done(run="run", answer=house.answer("run", "ada")))
    [rejected] = house.happened("run.rejected")
    assert rejected.words == "ada: an answer without tensors to stage 'train', which has some; send them"
    assert assigned(house) == ["ada"]
    assert isinstance(house.sent["ada"][-1], Notice)


def test_a_stream_that_only_broke_off_is_nobodys_fault(house):
    def breaking(offset):
        raise LinkLost("the stream broke off")
        yield

    house.run()
    with pytest.raises(LinkLost):
        house.desk.take("ada", house.parcel("run", "ada"), breaking)
    assert house.happened("run.rejected") == []


def test_tensors_are_named_by_their_place_in_the_vector():
    signature = (
        TensorSpec(name="a", shape=(2, 2)),
        TensorSpec(name="gone", shape=(0,)),
        TensorSpec(name="b", shape=()),
    )
    said = [tensors(signature, start, start + 1) for start in range(-1, 6)]
    assert said == ["", *["tensor a"] * 4, "tensor b", ""]
    assert tensors(signature, 1, 4) == "tensor a"
    assert tensors(signature, 1, 900) == "tensors a to b"
    assert tensors((), 0, 1) == tensors(signature, 3, 3) == ""


def test_of_what_is_no_frame_the_tensor_after_the_last_good_one_is_named():
    signature = (TensorSpec(name="a", shape=(8,)), TensorSpec(name="b", shape=(8,)))

    def frames(offset):
        yield whole()
        raise Invalid("stream: an item of 999999999 and 0 bytes is over the limit; send less")

    watched = Watched(frames, "ada", signature, plain=True)
    with pytest.raises(Invalid) as raised:
        list(watched(0))
    assert watched.told(raised.value).startswith("ada: tensor b: stream: an item of 999999999")


def test_in_what_is_encoded_all_tensors_of_the_frame_are_named():
    signature = (TensorSpec(name="a", shape=(4,)), TensorSpec(name="b", shape=(4,)), TensorSpec(name="c", shape=(9,)))
    watched = Watched(source([whole()]), "ada", signature, plain=False)
    next(watched(0))
    assert (
        watched.told(Invalid("scales: outside 0 to 1 somewhere"))
        == "ada: tensors a to b: scales: outside 0 to 1 somewhere"
    )


# --- how the run goes on


def test_a_quorum_goes_on_without_the_site_and_gives_it_the_next_round(house):
    house.run(wait=QUORUM)
    bring_badly(house)
    house.performed.clear()
    house.bring("bob", house.parcel("run", "bob"))
    house.settled()
    [merge] = [command for command in house.performed if isinstance(command, Merge)]
    assert [answer.site for answer in merge.answers] == ["bob"]  # with no deadline to wait for
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    assert assigned(house) == ["ada", "bob"]


def test_what_the_site_sends_again_to_that_round_is_not_taken_any_more(house):
    house.run(wait=QUORUM)
    bring_badly(house)
    house.desk.take("ada", house.parcel("run", "ada"), unread)
    assert len(house.happened("run.rejected")) == 1


def test_where_all_are_waited_for_the_site_is_asked_again_and_a_good_update_mends_it(house):
    house.run()
    house.bring("bob", house.parcel("run", "bob"))
    house.performed.clear()
    bring_badly(house)
    assert assigned(house) == ["ada"]
    house.bring("ada", house.parcel("run", "ada"))
    house.settled()
    assert [len(command.answers) for command in house.performed if isinstance(command, Merge)] == [2]


def test_a_buffer_gives_the_site_the_newest_version(house):
    house.run(wait={"kind": "buffer", "count": 1})
    parcel = house.parcel("run", "ada")
    house.bring("bob", house.parcel("run", "bob"))
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    house.performed.clear()
    with pytest.raises(Unfit):
        house.desk.take("ada", parcel, source([whole(spoiled())]))
    assert assigned(house) == ["ada"]


def test_a_view_shows_whose_answer_was_rejected(house):
    house.run(wait=QUORUM)
    bring_badly(house)
    assert house.desk.presence.progress("run")["ada"].state == "rejected"


# --- what comes too late


def late_run(house):
    """Bring a run into its second round, to the first of which ada did not answer; return ada's answer to that."""
    house.run(wait=QUORUM)
    parcel = house.parcel("run", "ada")
    house.bring("bob", house.parcel("run", "bob"))
    house.conductor.record(house.expired("run"))
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    return parcel


def test_a_late_update_gets_a_receipt_unread_and_is_journalled_once(house):
    parcel = late_run(house)
    for _ in range(3):
        house.desk.take("ada", parcel, unread)
    [rejected] = house.happened("run.rejected")
    words = "ada: an answer to stage 1 of epoch 0 came too late; run run is at stage 2 of epoch 0"
    assert (rejected.words, rejected.late, rejected.position) == (words, True, 1)


def test_late_answers_of_any_number_put_nobody_in_quarantine(house):
    house.run(wait=QUORUM)
    parcels = [house.parcel("run", "ada")]
    for epoch in range(1, 6):
        house.conductor.record(Restarted(run="run"))
        house.settled()
        parcels.append(house.parcel("run", "ada", position=1, epoch=epoch))
    for parcel in parcels[:-1]:
        house.desk.take("ada", parcel, unread)
    assert [event.late for event in house.happened("run.rejected")] == [True]  # all of one stage
    assert house.desk.quarantine.words("ada") == ""
    house.bring("ada", parcels[-1])


def test_a_round_that_ends_while_the_update_is_on_its_way_makes_it_late(house):
    def slow(offset):
        yield from encode(vector(), ())
        house.bring("bob", bobs)
        house.conductor.record(house.expired("run"))
        house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))

    house.run(wait=QUORUM)
    parcel, bobs = house.parcel("run", "ada"), house.parcel("run", "bob")
    house.desk.take("ada", parcel, slow)
    assert [(event.site, event.late) for event in house.happened("run.rejected")] == [("ada", True)]


def test_what_counts_already_and_what_nobody_asked_this_site_for_is_not_journalled(house):
    house.run()
    parcel = house.parcel("run", "ada")
    house.bring("ada", parcel)
    house.desk.take("ada", parcel, unread)
    house.desk.take("mallory", house.parcel("run", "mallory"), unread)
    house.conductor.record(Cancelled(run="run", user="ada"))
    house.desk.take("bob", house.parcel("run", "bob"), unread)
    assert house.happened("run.rejected") == []
