"""Three answers in a row that cannot be taken put a site in quarantine, over all runs and all lives of the hub."""

import pytest

from atoll.errors import LinkLost, NotFound
from atoll.spec.event import Cancelled, Restarted
from atoll.spec.message import Failure, Notice, Refusal
from atoll.spec.run import SiteProgress
from tests.unit.houses import QUORUM, SIGNATURE, House, assigned, bring_badly, unread, vector


def quarantine(house, **sync):
    house.run(**sync)
    for _ in range(3):
        bring_badly(house)
        house.settled()
    house.settled()
    house.settled()


WORDS = (
    "ada: tensor w: nan at element 3 of the model: chunk at 0: data: not finite somewhere; send finite values; "
    "3 in a row: in quarantine until `atoll site release ada`"
)


def test_three_in_a_row_end_a_run_that_waits_for_all_in_words_that_say_what_to_do(house):
    quarantine(house)
    state = house.conductor.states["run"]
    assert (state.phase, state.words, state.error) == ("failed", WORDS, "Invalid")
    assert [event.words for event in house.happened("site.quarantined")] == [WORDS]
    assert house.sent["ada"][-1] == Notice(words=WORDS)


def bring_thrice(house):
    """Bring ada into quarantine by three rounds of a quorum run, one bad update in each."""
    house.run(wait=QUORUM, period=20)
    for number in range(3):
        bring_badly(house)
        if number < 2:
            house.bring("bob", house.parcel("run", "bob"))
            house.settled()
            house.merge("run", house.files("run").put_weights(vector(seed=number), SIGNATURE))
    for _ in range(3):
        house.settled()


def test_a_quorum_goes_on_without_a_site_in_quarantine_until_it_is_released(house):
    bring_thrice(house)
    state = house.conductor.states["run"]
    assert (state.phase, state.live) == ("running", {"bob"})
    assert house.desk.presence.progress("run")["ada"] == SiteProgress(connected=True, state="in quarantine")
    house.desk.take("ada", house.parcel("run", "ada"), unread)  # this round has no need of another one from it
    house.desk.heard("ada", Failure(run="run", position=state.position, words="it broke"))
    assert len(house.happened("run.rejected")) == 3
    assert house.conductor.states["run"].phase == "running"
    house.performed.clear()
    house.bring("bob", house.parcel("run", "bob"))
    house.conductor.record(house.expired("run"))
    house.merge("run", house.files("run").put_weights(vector(seed=8), SIGNATURE))
    assert assigned(house) == ["bob"]
    with pytest.raises(LinkLost, match="until `atoll site release ada`"):
        house.desk.take("ada", house.parcel("run", "ada"), unread)
    house.desk.release("ada", "eve")
    house.settled()
    assert house.conductor.states["run"].live == {"ada", "bob"}
    assert assigned(house) == ["bob", "ada"]
    house.bring("ada", house.parcel("run", "ada"))


def test_a_site_in_quarantine_that_comes_back_stays_in_it_and_a_new_run_is_told(house):
    bring_thrice(house)
    house.desk.closed("ada", house.sent["ada"].append, "killed")
    house.connect("ada")
    house.settled()
    assert house.conductor.states["run"].live == {"bob"}
    assert house.sent["ada"][-1] == Notice(words=WORDS)
    house.start("other")
    house.settled()
    assert (house.conductor.states["other"].phase, house.conductor.states["other"].words) == ("failed", WORDS)


def test_the_next_hub_knows_of_the_quarantine_and_journals_it_no_second_time(house, tmp_path):
    bring_thrice(house)
    house.close()
    again = House(tmp_path)
    again.connect("ada", "bob")
    assert again.desk.quarantine.words("ada") == WORDS
    again.conductor.record(Restarted(run="run"))
    for _ in range(3):
        again.settled()
    assert again.conductor.states["run"].live == {"bob"}
    assert len(again.happened("site.quarantined")) == 1
    again.desk.release("ada", "eve")
    again.settled()
    assert again.conductor.states["run"].live == {"ada", "bob"}
    again.close()


def test_the_count_goes_on_with_the_next_hub(house, tmp_path):
    house.run()
    for _ in range(2):
        bring_badly(house)
        house.settled()
    house.close()
    again = House(tmp_path)
    again.connect("ada", "bob")
    again.conductor.record(Restarted(run="run"))
    again.settled()
    bring_badly(again)
    assert len(again.happened("site.quarantined")) == 1
    again.close()


def test_a_good_answer_in_any_run_begins_the_count_anew_and_rejections_in_several_runs_add_up(house):
    house.run("one", wait=QUORUM)
    house.run("two")
    house.run("three")
    bring_badly(house, run="one")
    bring_badly(house, run="two")
    house.bring("ada", house.parcel("two", "ada"))
    house.settled()
    for _ in range(2):
        bring_badly(house, run="three")
        house.settled()
    assert house.happened("site.quarantined") == []
    house.run("four", sites=("bob", "ada"), wait=QUORUM)
    bring_badly(house, run="four")
    assert [event.site for event in house.happened("site.quarantined")] == ["ada"]
    house.settled()
    assert [house.conductor.states[run].phase for run in ("one", "three", "four")] == ["running", "failed", "running"]


def test_nobody_is_released_who_is_not_in_quarantine(house):
    with pytest.raises(NotFound, match="'ada' is not in quarantine"):
        house.desk.release("ada", "eve")
    bring_thrice(house)
    house.desk.release("ada", "eve")
    with pytest.raises(NotFound):
        house.desk.release("ada", "eve")
    assert [event.user for event in house.happened("site.released")] == ["eve"]


def test_a_rejection_that_is_journalled_after_the_end_of_its_run_still_counts(house):
    house.run("other", wait=QUORUM)
    house.run()
    for _ in range(2):
        bring_badly(house)
        house.settled()
    last = house.happened("run.rejected")[-1]
    house.conductor.record(Cancelled(run="run", user="eve"), last)
    assert [event.site for event in house.happened("site.quarantined")] == ["ada"]
    house.settled()
    assert house.conductor.states["other"].live == {"bob"}


def test_what_a_site_says_again_and_again_stands_in_the_journal_once(house):
    house.run(sites=("ada", "bob", "eve"), wait={"kind": "quorum", "count": 1})
    for _ in range(3):
        house.desk.heard("bob", Failure(run="run", position=1, words="loss is nan", error="TaskFailed"))
        house.desk.heard("eve", Refusal(run="run", words="no more"))
        house.settled()
    assert (len(house.happened("run.broken")), len(house.happened("run.refused"))) == (1, 1)
    state = house.conductor.states["run"]
    assert (state.phase, state.failed, state.gone) == ("running", {"bob"}, {"eve"})
