"""Relays as the hub sees them: who is behind whom, in whose name one speaks, and sums that count whole or not."""

from dataclasses import replace

import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Denied, Invalid, LinkLost, NotFound, Unfit
from atoll.journal import Journal
from atoll.runtime.branches import on_way
from atoll.runtime.machine import AssignTo, Merge, step
from atoll.runtime.shelf import Shelf
from atoll.runtime.tree import Tree
from atoll.spec.document import sha256
from atoll.spec.event import Answered, Certified, Invited, Merged, Refused, Revoked
from atoll.spec.message import Admitted, Closed, Opened, Parcel, Relayed, Unusable, Welcome
from tests.unit.houses import QUORUM, SIGNATURE, House, hello, source, unread, vector, whole
from tests.unit.runs import answer, assigned, fold, merges, plan, training

LINKS = {"alps": None, "jura": "alps", "ada": "alps", "bob": "alps", "cy": "jura", "dan": None}
RELAYS = ("alps", "jura")


def key(site, number=0):
    return sha256(f"key {number} of {site}".encode())


def taken_up(site, behind, relay=False, number=0):
    token = sha256(f"token {number} of {site}".encode())
    address = f"tls://{site}@here:1" if relay else ""
    invited = Invited(site=site, token=token, expires=0.0, relay=address, behind=behind)
    return [invited, Certified(site=site, key=key(site, number), serial="1", expires=0.0, token=token)]


@pytest.fixture
def tree(tmp_path):
    """A tree, and what has it see events."""
    made = Tree()
    with Journal(tmp_path / "tree.db", "hub") as journal:

        def see(*events):
            return set().union(*(made.seen(entry) for entry in journal.append(*events, actor="hub")))

        for site, behind in LINKS.items():
            see(*taken_up(site, behind, site in RELAYS))
        yield made, see


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    for site, behind in LINKS.items():
        made.conductor.record(*taken_up(site, behind, site in RELAYS))
    made.connect("alps", "dan")
    for site in ("ada", "bob", "jura"):
        made.desk.heard("alps", Relayed(site=site, message=Opened()))
    for site in ("ada", "bob"):
        made.desk.heard("alps", Relayed(site=site, message=hello(site)))
    yield made
    made.close()


def running(house, **sync):
    """Bring a run of ada, bob and dan into its first train round."""
    house.start(sites=("dan", "ada", "bob"), **sync)
    house.bring("dan", house.parcel("run", "dan", signature=SIGNATURE))
    house.merge("run", house.files("run").put_weights(vector(), SIGNATURE))


def parcel(house, *sites, via=("alps",)):
    answers = tuple(house.answer("run", site, via=via) for site in sites)
    return Parcel(run="run", purpose="update", size=8, answers=answers)


def told(house, kind):
    return [message for message in house.sent["alps"] if isinstance(message, kind)]


# --- the tree


def test_a_place_is_that_of_the_invitation_that_was_taken_up(tree):
    made, see = tree
    assert made.way("cy") == ("alps", "jura")
    assert made.way("dan") == ()
    assert made.is_relay("jura")
    assert not made.is_relay("cy")
    invited, certified = taken_up("cy", None, number=1)
    see(invited)
    assert (made.way("cy"), made.way("cy", invited=True)) == (("alps", "jura"), ())
    assert see(certified) == {"jura"}
    assert made.way("cy") == ()


def test_a_relay_is_told_whom_to_admit_and_whom_no_more(tree):
    made, see = tree
    assert made.admitted("alps").sites == {"jura": key("jura"), "ada": key("ada"), "bob": key("bob")}
    assert see(Revoked(site="bob", user="me")) == {"alps"}
    assert made.admitted("alps") == Admitted(sites={"jura": key("jura"), "ada": key("ada")}, out=(key("bob"),))
    assert made.behind("bob") is None


def test_a_list_too_long_to_tell_a_relay_of_ends_neither_the_hub_nor_its_session(house, caplog):
    def send(message):
        if isinstance(message, Admitted):
            raise Invalid("message: over the limit")

    house.desk.opened("alps", send)
    house.conductor.record(Revoked(site="ada", user="me"))
    assert house.happened("site.revoked")
    assert caplog.text.count("alps: cannot be told whom to let in (message: over the limit)") == 2


def test_no_relay_is_behind_itself_and_nobody_behind_what_is_none(tree):
    made, see = tree
    for site, relay in (("alps", "alps"), ("alps", "jura")):
        with pytest.raises(Invalid, match="behind 'alps' itself"):
            made.check_behind(site, relay)
    for number, (site, relay) in enumerate((("x", "y"), ("y", "z"))):  # not taken up yet
        made.check_behind(site, relay)
        see(taken_up(site, relay, relay=True, number=number)[0])
    with pytest.raises(Invalid, match="behind 'z' itself"):
        made.check_behind("z", "x")
    with pytest.raises(NotFound, match="'dan' is no relay"):
        made.address("dan")
    assert made.address("jura") == "tls://jura@here:1"


# --- who speaks for whom


def test_a_site_behind_a_relay_is_here_by_it_and_lost_with_it(house):
    assert set(house.desk.presence.names()) >= {"alps", "ada", "bob", "dan"}
    assert [site.name for site in house.desk.presence.fleet().sites] == ["ada", "bob", "dan"]
    assert any(one == Relayed(site="ada", message=Welcome(heartbeat=2.0, region="here")) for one in house.sent["alps"])
    house.desk.closed("alps", house.sent["alps"].append, "gone")
    assert not house.desk.presence.here("ada")


def test_a_relay_speaks_for_nobody_who_is_not_behind_it(house):
    for site in ("dan", "cy", "eve"):
        house.desk.heard("alps", Relayed(site=site, message=Opened()))
        [refused] = [one for one in told(house, Relayed) if one.site == site]
        assert isinstance(refused.message, Closed)
    running(house)
    with pytest.raises(Denied, match="answers for 'dan'"):
        house.desk.take("alps", house.parcel("run", "dan"), unread)
    with pytest.raises(Denied, match="dan's update came by"):
        house.desk.take("alps", parcel(house, "ada", "dan"), unread)
    with pytest.raises(Denied, match="ada's update came by"):
        house.desk.take("dan", parcel(house, "ada", "bob"), unread)
    with pytest.raises(Denied, match="answers for 'dan'"):
        house.desk.give("alps", Parcel(run="run", purpose="weights", size=8, digest=key("x"), site="dan"))


def test_a_site_behind_a_relay_does_not_come_in_by_the_hub_s_own_port(house):
    with pytest.raises(Denied, match="invited to be behind alps"):
        house.desk.opened("ada", print)


def test_what_is_wrong_with_one_site_ends_its_session_and_not_its_relay_s(house):
    house.desk.heard("alps", Relayed(site="ada", message=hello("bob")))
    assert not house.desk.presence.here("ada")
    assert house.desk.presence.here("bob")


def test_a_revoked_site_is_out_at_once_and_its_relay_told(house):
    house.conductor.record(Revoked(site="ada", user="me"))
    assert not house.desk.presence.here("ada")
    assert told(house, Admitted)[-1].out == (key("ada"),)


# --- sums


def test_a_sum_is_journalled_with_all_its_answers_as_one(house):
    running(house)
    house.desk.take("alps", parcel(house, "ada", "bob"), source([whole()]))
    [answered] = [event for event in house.happened("run.answered") if event.others]
    assert [one.site for one in answered.answers] == ["ada", "bob"]
    assert len({one.update for one in answered.answers}) == 1
    assert [one.bytes for one in answered.answers] == [32, 0]
    out = [one.crossing.site for one in house.crossings() if one.crossing.kind == "update"]
    assert out == ["ada", "bob"]


def test_a_sum_of_which_a_part_is_not_waited_for_is_to_be_made_anew_and_is_nobody_s_fault(house):
    running(house)
    house.desk.take("alps", house.parcel("run", "ada"), source([whole()]))
    with pytest.raises(Denied, match="holds ada"):
        house.desk.take("alps", parcel(house, "ada", "bob"), unread)
    assert not house.happened("run.rejected")


def test_a_second_sum_in_a_stage_is_nobody_s_fault_and_its_sites_bring_their_own(house):
    running(house)
    house.desk.take("alps", parcel(house, "ada"), source([whole()]))
    house.desk.take("alps", parcel(house, "ada"), unread)  # its receipt was lost
    for _ in range(4):
        with pytest.raises(Denied, match="alps: a stage takes one update in its name, which is here"):
            house.desk.take("alps", parcel(house, "bob"), unread)
    house.desk.take("alps", house.parcel("run", "bob"), source([whole()]))
    assert not house.happened("run.rejected", "site.quarantined")
    assert [one.via for one in house.conductor.states["run"].arrived] == [("alps",), ()]


def test_a_site_that_becomes_a_relay_has_its_sums_counted_apart_from_what_it_brought_itself(house):
    running(house)
    house.bring("dan", house.parcel("run", "dan"))
    house.conductor.record(*taken_up("dan", None, relay=True, number=1))
    for site in ("ada", "bob"):
        house.conductor.record(*taken_up(site, "dan", number=1))
        house.desk.heard("dan", Relayed(site=site, message=Opened()))
        house.desk.heard("dan", Relayed(site=site, message=hello(site)))
    assert on_way(house.desk.tree, house.conductor.states["run"], "ada", house.desk.quarantine) == ()
    with pytest.raises(Denied, match="a stage takes one update in its name"):
        house.desk.take("dan", parcel(house, "ada", "bob", via=("dan",)), unread)
    for site in ("ada", "bob"):
        house.desk.take("dan", house.parcel("run", site), source([whole()]))
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    [branch] = on_way(house.desk.tree, house.conductor.states["run"], "ada", house.desk.quarantine)
    assert (branch.sites, branch.counted) == (("ada", "bob"), None)
    with pytest.raises(Denied, match="dan: is a relay, which has no part of its own in a run"):
        house.desk.take("dan", house.parcel("run", "dan"), unread)
    house.desk.take("dan", parcel(house, "ada", "bob", via=("dan",)), source([whole()]))
    state = house.conductor.states["run"]
    merged = Merged(run="run", position=2, sites=("ada", "bob"))
    after, _ = step(replace(state, arrived=(), merging=state.arrived), merged)
    assert (after.taken, after.sums) == ({"dan": 1, "ada": 2, "bob": 2}, {"dan": 2})


def test_a_sum_that_cannot_be_taken_is_its_relay_s_fault(house):
    running(house)
    for _ in range(3):
        with pytest.raises(Unfit):
            house.desk.take("alps", parcel(house, "ada", "bob"), source([whole(vector() * float("nan"))]))
    assert [event.site for event in house.happened("run.rejected")] == ["alps"] * 3
    assert [event.site for event in house.happened("site.quarantined")] == ["alps"]
    assert not house.desk.presence.here("ada")
    house.desk.heard("alps", Relayed(site="ada", message=Opened()))
    assert not house.desk.presence.here("ada")


def test_what_a_relay_did_not_take_counts_against_the_site_that_brought_it(house):
    running(house)
    words = "ada: tensor w: not finite"
    house.desk.heard("alps", Relayed(site="ada", message=Unusable(run="run", position=1, epoch=0, words=words)))
    [rejected] = house.happened("run.rejected")
    assert (rejected.site, rejected.words) == ("ada", words)


def test_of_a_site_in_quarantine_nothing_is_journalled_that_a_relay_did_not_take(house):
    running(house, wait=QUORUM)
    for _ in range(5):
        unusable = Unusable(run="run", position=1, epoch=0, words="ada: tensor w: not finite")
        house.desk.heard("alps", Relayed(site="ada", message=unusable))
        house.settled()
    assert len(house.happened("run.rejected")) == 3
    assert [event.site for event in house.happened("site.quarantined")] == ["ada"]


@pytest.mark.parametrize(
    "sync", [{"merge": "median"}, {"merge": "mean", "bound": {"norm": 1.0}}, {"wait": {"kind": "buffer", "count": 2}}]
)
def test_what_does_not_compose_is_in_no_branch_and_is_not_taken_as_a_sum(house, sync):
    house.start(sites=("ada", "bob"), **sync)
    house.desk.take("alps", house.parcel("run", "ada", signature=SIGNATURE), source([whole()]))
    house.merge("run", house.files("run").put_weights(vector(), SIGNATURE))
    assert on_way(house.desk.tree, house.conductor.states["run"], "ada", house.desk.quarantine) == ()
    with pytest.raises(Unfit, match="waits for single ones"):
        house.desk.take("alps", parcel(house, "ada", "bob"), unread)


def test_branches_are_of_all_members_behind_a_relay_until_its_sum_is_here(house):
    running(house)
    tree, state = house.desk.tree, house.conductor.states["run"]
    [branch] = on_way(tree, state, "ada", house.desk.quarantine)
    assert (branch.relay, branch.sites, branch.counted) == ("alps", ("ada", "bob"), None)
    assert on_way(tree, state, "dan", house.desk.quarantine) == ()
    house.desk.take("alps", parcel(house, "ada", "bob"), source([whole()]))
    assert on_way(tree, house.conductor.states["run"], "ada", house.desk.quarantine) == ()


def test_no_merge_sees_a_part_of_a_sum():
    state, _ = training(plan("abc", **QUORUM | {"count": 2, "deadline": 5}))
    one, other = (answer(state, site, via=("alps",)).answer for site in "ab")
    together, commands = fold(state, Answered(run="run", answer=one, others=(other,)), answer(state, "c"))
    assert merges(commands) == [("a", "b", "c")]
    assert {one.site for one in together.merging} == {"a", "b", "c"}
    left, commands = fold(state, answer(state, "b"), Answered(run="run", answer=one, others=(other,)))
    assert [one.site for one in left.arrived] == ["b"]
    assert not [one for one in commands if isinstance(one, Merge)]


def test_a_refusal_undoes_the_sum_that_the_site_is_in_and_has_the_others_asked_again():
    state, _ = training(plan("abc", kind="quorum", count=2))
    one, other = (answer(state, site, via=("alps",)).answer for site in "ab")
    state, commands = fold(
        state, Answered(run="run", answer=one, others=(other,)), Refused(run="run", site="a", words="no")
    )
    assert state.arrived == ()
    assert assigned(commands) == ["b"]
    assert [one for one in commands if isinstance(one, AssignTo)]


# --- the shelf


def test_what_is_not_what_its_digest_says_is_not_kept_nor_given(tmp_path):
    data = b"code"
    asked = []

    def fetch(parcel):
        asked.append(parcel)
        given = data if len(asked) > 1 else b"other"
        return parcel.model_copy(update={"size": len(given)}), iter([] if parcel.held else [Frame(0, 0, given)])

    shelf = Shelf(tmp_path / "shelf", fetch)
    wanted = Parcel(run="run", purpose="code", size=0, digest=sha256(data))
    _, frames = shelf.give("ada", wanted, ())
    with pytest.raises(LinkLost, match="what came to the relay is not it"):
        list(frames)
    for site in ("ada", "bob"):
        header, frames = shelf.give(site, wanted, ())
        assert (b"".join(bytes(frame.data) for frame in frames), header.site, header.held) == (data, None, False)
    assert [(one.site, one.held) for one in asked] == [("ada", False), ("ada", False), ("bob", True)]


def test_what_the_hub_refuses_a_site_is_not_given_though_it_is_here(tmp_path):
    data = b"code"

    def fetch(parcel):
        if parcel.site == "bob":
            raise Denied("hub: bob gets nothing")
        return parcel, iter([Frame(0, 0, data)])

    shelf = Shelf(tmp_path / "shelf", fetch)
    wanted = Parcel(run="run", purpose="code", size=0, digest=sha256(data))
    shelf.give("ada", wanted, ())
    with pytest.raises(Denied, match="bob gets nothing"):
        shelf.give("bob", wanted, ())
