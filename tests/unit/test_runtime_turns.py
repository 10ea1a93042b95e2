"""Of what sites and their relays bring, each answer counts once, in its own name, and its file stays as it counted."""

import threading
import time

import numpy as np
import pytest

from atoll.errors import AtollError, Denied, LinkLost, Unfit
from atoll.outer.wire import encode
from atoll.runtime.border import Border
from atoll.runtime.branches import on_way
from atoll.runtime.merging import merged
from atoll.spec.document import sha256
from atoll.spec.event import Joined, Quarantined, Refused
from atoll.spec.message import Done, Opened, Parcel, Progress, Relayed
from tests.unit.houses import QUORUM, SIGNATURE, House, hello, unread, vector
from tests.unit.test_runtime_relay import LINKS, RELAYS, parcel, running, taken_up

WAIT = 20.0
HONEST, OTHER = np.ones(8, np.float32), np.full(8, 1000, np.float32)


class Held(House):
    """A house whose journal can be stopped, so that several wait for it at once."""

    def __init__(self, home):
        self.open = threading.Event()
        self.open.set()
        super().__init__(home)

    def seen(self, entry):
        super().seen(entry)
        assert self.open.wait(WAIT)

    def stop(self):
        self.open.clear()
        self.conductor.post(Joined(run="nobody", site="nobody"))

    def begin(self, site, parcel, data):
        """Bring an update in a thread, until it waits for the journal or for another who does; return what to wait for
        and what came of it."""
        sent, told = threading.Event(), []

        def frames(offset):
            yield from encode(data, ())
            sent.set()

        def bring():
            try:
                self.desk.take(site, parcel, frames)
            except AtollError as error:
                told.append(error)
            else:
                told.append("receipt")

        thread = threading.Thread(target=bring)
        thread.start()
        assert sent.wait(WAIT)
        time.sleep(0.05)  # to where it waits; the outcome is to be the same wherever it is by then
        return thread, told


@pytest.fixture
def house(tmp_path):
    made = Held(tmp_path)
    yield made
    made.close()


def behind(house, **sync):
    for site, relay in LINKS.items():
        house.conductor.record(*taken_up(site, relay, site in RELAYS))
    house.connect("alps", "dan")
    for site in ("ada", "bob", "jura"):
        house.desk.heard("alps", Relayed(site=site, message=Opened()))
    for site in ("ada", "bob"):
        house.desk.heard("alps", Relayed(site=site, message=hello(site)))
    running(house, **sync)


def after(house):
    """Return the weights that what waits to be merged makes of the run's own."""
    state, files = house.conductor.states["run"], house.files("run")
    made = merged(state, state.merging, files)
    return files.vector(made.weights, SIGNATURE)


def test_who_says_that_its_update_came_by_another_brings_nothing_and_replaces_nothing(house):
    house.connect("ada", "bob", "eve")
    house.run(sites=("ada", "bob", "eve"))
    for site in ("ada", "bob"):
        house.bring(site, house.parcel("run", site), HONEST)
    with pytest.raises(Unfit, match="only a relay's sum comes by relays"):
        house.desk.take("eve", house.parcel("run", "eve", via=("ada",)), unread)
    [rejected] = house.happened("run.rejected")
    assert (rejected.site, rejected.late) == ("eve", False)
    house.bring("eve", house.parcel("run", "eve"), HONEST)
    assert np.array_equal(after(house), vector() + HONEST)


def test_a_sum_that_comes_with_an_answer_of_its_own_is_none(house):
    behind(house)
    both = parcel(house, "ada", "bob").model_copy(update={"answer": house.answer("run", "ada")})
    with pytest.raises(AtollError, match="a parcel that is brought is an update with its answer"):
        house.desk.take("alps", both, unread)
    assert house.conductor.states["run"].arrived == ()


def test_an_answer_without_tensors_comes_by_no_relay_either(house):
    house.connect("ada", "bob")
    house.start(sites=("ada", "bob"))
    house.desk.heard("ada", Done(run="run", answer=house.answer("run", "ada", via=("bob",))))
    [rejected] = house.happened("run.rejected")
    assert (rejected.site, "via: ['bob']" in rejected.words) == ("ada", True)


def test_a_site_s_own_update_and_a_sum_that_holds_it_at_once_are_not_both_receipted(house):
    behind(house)
    house.stop()
    brought = [
        house.begin("alps", house.parcel("run", "ada"), HONEST),
        house.begin("alps", parcel(house, "ada", "bob"), OTHER),
    ]
    house.open.set()
    for thread, _ in brought:
        thread.join(WAIT)
    [single], [both] = (told for _, told in brought)
    counted = [one.site for one in house.conductor.states["run"].arrived]
    assert counted == (["ada", "bob"] if both == "receipt" else ["ada"])
    assert (single, both).count("receipt") == 1


def test_of_two_sums_of_one_relay_at_once_one_counts_and_its_file_stays(house):
    behind(house)
    house.stop()
    brought = [
        house.begin("alps", parcel(house, "ada"), HONEST),
        house.begin("alps", parcel(house, "bob"), OTHER),
    ]
    house.open.set()
    for thread, _ in brought:
        thread.join(WAIT)
    assert [told for _, told in brought].count(["receipt"]) == 1
    [counted] = house.conductor.states["run"].arrived
    assert house.files("run").spool.holds((1, "alps"), counted.update)


def test_a_second_stream_of_other_content_does_not_replace_what_is_being_journalled(house):
    house.connect("ada", "bob")
    house.run()
    house.bring("bob", house.parcel("run", "bob"), HONEST)
    named = house.parcel("run", "ada")
    house.stop()
    first = house.begin("ada", named.model_copy(update={"content": sha256(b"1")}), HONEST)
    second = house.begin("ada", named.model_copy(update={"content": sha256(b"2")}), OTHER)
    house.open.set()
    for thread, told in (first, second):
        thread.join(WAIT)
        assert told == ["receipt"]  # the second is told that nobody waits for it
    assert np.array_equal(after(house), vector() + HONEST)


def test_whoever_takes_the_turns_of_several_waits_for_nobody_who_waits_for_it(house):
    border, passed = Border(None, house.conductor, house.desk.presence), []

    def take(*sites):
        for _ in range(200):
            with border.turn(*sites):
                passed.append(sites)

    threads = [threading.Thread(target=take, args=sites, daemon=True) for sites in (("a", "b"), ("b", "a"), ("a", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(passed) == 600


def test_a_sum_that_a_refusal_made_void_is_made_anew_under_the_same_name(house):
    behind(house, wait=QUORUM)
    house.bring("alps", parcel(house, "ada", "bob"), HONEST)
    house.conductor.record(Refused(run="run", site="bob", words="bob takes no part"))
    assert house.conductor.states["run"].arrived == ()
    house.bring("alps", parcel(house, "ada"), OTHER)
    [counted] = house.conductor.states["run"].arrived
    assert house.files("run").spool.holds((1, "alps"), counted.update)


# --- quarantine


def test_a_round_that_counts_has_its_receipt_also_in_quarantine_and_another_waits(house):
    house.connect("ada", "bob")
    house.run(wait=QUORUM)
    sent = house.parcel("run", "ada")
    house.bring("ada", sent)
    house.conductor.record(Quarantined(site="ada", words="ada: in quarantine"))
    house.desk.take("ada", sent, unread)
    house.conductor.record(house.expired("run"))
    weights = house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    house.desk.take("ada", sent, unread)
    with pytest.raises(LinkLost, match="ada: in quarantine"):
        house.desk.take("ada", house.parcel("run", "ada"), unread)
    house.desk.heard("ada", Progress(run="run", position=2, state="sending"))
    assert house.desk.presence.progress("run")["ada"].state == "in quarantine"
    with pytest.raises(LinkLost, match="ada: in quarantine"):
        house.desk.give("ada", Parcel(run="run", purpose="weights", size=8, digest=weights))
    assert not house.happened("run.rejected")


def test_who_is_in_quarantine_does_not_count_within_a_sum_either(house):
    behind(house, wait=QUORUM)
    house.conductor.record(Quarantined(site="bob", words="bob: in quarantine"))
    [branch] = on_way(house.desk.tree, house.conductor.states["run"], "ada", house.desk.quarantine)
    assert branch.sites == ("ada",)
    with pytest.raises(Denied, match="holds bob, in quarantine; make another of the others"):
        house.desk.take("alps", parcel(house, "ada", "bob"), unread)
    house.bring("alps", parcel(house, "ada"))
    assert [one.site for one in house.conductor.states["run"].arrived] == ["ada"]
    assert not house.happened("run.rejected")
