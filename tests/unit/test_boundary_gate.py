"""The gate: a crossing is decided and journalled before a byte of it moves, and what is denied carries nothing."""

import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.gate import Gate, SiteGate
from atoll.errors import Denied, LinkLost, Unavailable
from atoll.policy.defaults import SITE_POLICY
from atoll.spec.event import Answer, Crossed, Decided
from atoll.spec.fleet import Dataset
from atoll.spec.message import Done, Parcel
from atoll.spec.policy import Crossing, Request
from tests.unit.places import rules

DATASET = Dataset(name="rows", rows=50, fingerprint="sha256:" + 64 * "0", purposes=("care",), min_group=10)
PARCEL = Parcel(run="run", purpose="update", size=1)
FETCH = Parcel(run="run", purpose="weights", size=1, digest="sha256:" + 64 * "1")
DONE = Done(run="run", answer=Answer(site="lyon", position=0, epoch=0))


class Hub:
    """A desk that notes what reaches it, into the same list as the journal does."""

    def __init__(self, happened):
        self.happened = happened

    def opened(self, site, send):
        pass

    def closed(self, site, send, words):
        pass

    def heard(self, site, message):
        self.happened.append(message.kind)

    def take(self, site, parcel, frames):
        for frame in frames(0):
            self.happened.append(f"frame {frame.offset}")

    def give(self, site, parcel):
        self.happened.append(f"gave {parcel.purpose}")
        return parcel, iter([Frame(0, parcel.size, bytes(parcel.size))])


class Door:
    def __init__(self, policy=SITE_POLICY):
        self.happened, self.policy, self.full = [], policy, False
        self.gate = SiteGate("lyon", lambda: rules(self.policy), self.record)
        self.gate.attach(Hub(self.happened))

    def record(self, *events):
        if self.full:
            raise Unavailable("journal: no space left on its disk")
        self.happened += events


def crossing(kind="update", direction="out", purpose="care", rows=20):
    known = {"kind": kind, "direction": direction, "site": "lyon", "run": "run", "dataset": "rows", "purpose": purpose}
    crossed = Crossing.model_validate({**known, "rows": rows, "bytes": 4})
    return Request(action="cross", site="lyon", dataset=DATASET, purpose=purpose, job_kind="train", crossing=crossed)


def frames(happened, count=2):
    def made(offset):
        for number in range(offset, count):
            happened.append(f"made {number}")
            yield Frame(number, 1, b"1234")

    return made


CROSSINGS = {
    "tensors out": lambda door, request: door.gate.send(PARCEL, frames(door.happened), request),
    "tensors in": lambda door, request: door.gate.fetch(FETCH, request),
    "a message": lambda door, request: door.gate.say(DONE, request),
}


def test_what_is_allowed_is_journalled_before_the_first_frame_is_even_made():
    door = Door()
    door.gate.send(PARCEL, frames(door.happened), crossing())
    first, *rest = door.happened
    assert isinstance(first, Crossed)
    assert (first.crossing.kind, first.crossing.bytes, first.decision.allowed) == ("update", 4, True)
    assert rest == ["made 0", "frame 0", "made 1", "frame 1"]


@pytest.mark.parametrize("what", CROSSINGS)
def test_what_is_denied_is_journalled_with_its_reason_and_carries_nothing(what):
    door = Door()
    with pytest.raises(Denied, match="marketing"):
        CROSSINGS[what](door, crossing(direction="in" if what == "tensors in" else "out", purpose="marketing"))
    [entry] = door.happened
    assert isinstance(entry, Crossed)
    assert not entry.decision.allowed
    assert "marketing" in str(entry.decision)


@pytest.mark.parametrize("what", CROSSINGS)
def test_what_cannot_be_journalled_does_not_cross(what):
    door = Door()
    door.full = True
    with pytest.raises(Unavailable, match="no space left"):
        CROSSINGS[what](door, crossing())
    assert door.happened == []


def test_rows_never_leave_and_small_groups_do_not():
    door = Door()
    for request in (crossing("data"), crossing("query", rows=9), crossing("prediction"), crossing("log")):
        with pytest.raises(Denied):
            door.gate.send(PARCEL, frames(door.happened), request)
    assert [entry.decision.allowed for entry in door.happened] == [False] * 4
    door.gate.say(DONE, crossing("query", rows=10))
    assert door.happened[-1] == "done"


def test_edited_rules_hold_from_the_next_crossing_on():
    door = Door()
    door.gate.say(DONE, crossing())
    door.policy += '@id("lyon.none")\nforbid (principal, action == Action::"cross", resource);\n'
    with pytest.raises(Denied):
        door.gate.say(DONE, crossing())
    assert [entry.decision.allowed for entry in door.happened if isinstance(entry, Crossed)] == [True, False]


def sent(door):
    return [entry for entry in door.happened if isinstance(entry, Crossed)]


def test_what_is_tried_again_is_decided_again_and_counted_once():
    door = Door()
    parcel = PARCEL.model_copy(update={"answer": Answer(site="lyon", position=3, epoch=1)})
    for _ in range(3):
        door.gate.send(parcel, frames(door.happened), crossing())
        door.gate.say(DONE, crossing("metric"))
        door.gate.fetch(FETCH, crossing("model", "in"))
    assert [(entry.crossing.kind, entry.crossing.bytes) for entry in sent(door)] == [
        ("update", 4),
        ("metric", 4),
        ("model", 4),
    ]
    assert door.happened.count("frame 0") == 3
    door.policy += '@id("lyon.more")\npermit (principal, action, resource);\n'
    door.gate.send(parcel, frames(door.happened), crossing())
    assert sent(door)[-1].crossing.bytes == 0  # by another rule, and its bytes are in the entry before
    assert sent(door)[-1].decision.rules != sent(door)[0].decision.rules
    door.policy += '@id("lyon.none")\nforbid (principal, action == Action::"cross", resource);\n'
    for _ in range(2):
        with pytest.raises(Denied):
            door.gate.send(parcel, frames(door.happened), crossing())
    assert [entry.decision.allowed for entry in sent(door)] == [True, True, True, True, False]


@pytest.mark.parametrize("other", [{"position": 4}, {"epoch": 2}])
def test_another_stage_or_another_hubs_epoch_is_another_crossing(other):
    door = Door()
    for place in ({}, other):
        answer = Answer.model_validate({"site": "lyon", "position": 3, "epoch": 1, **place})
        door.gate.say(DONE.model_copy(update={"answer": answer}), crossing("metric"))
    assert [entry.crossing.bytes for entry in sent(door)] == [4, 4]


def test_what_could_not_be_journalled_is_journalled_when_it_is_tried_again():
    door = Door()
    door.full = True
    with pytest.raises(Unavailable):
        door.gate.say(DONE, crossing("metric"))
    door.full = False
    door.gate.say(DONE, crossing("metric"))
    assert len(sent(door)) == 1


def test_a_message_without_data_needs_no_crossing():
    door = Door()
    door.gate.say(DONE)
    assert door.happened == ["done"]


def test_measuring_the_link_crosses_nothing():
    door = Door()
    link = door.gate.measure()
    assert (link.site, door.happened) == ("lyon", ["gave probe"] * 3)


@pytest.mark.parametrize("what", CROSSINGS)
def test_without_a_session_nothing_can_cross(what):
    door = Door()
    door.gate.hang_up()
    with pytest.raises(LinkLost, match="there is no session"):
        CROSSINGS[what](door, crossing(direction="in" if what == "tensors in" else "out", kind="model"))
    assert all(isinstance(entry, Crossed) for entry in door.happened)


def test_a_point_that_is_no_crossing_is_journalled_too_whichever_way_it_is_decided():
    happened = []
    gate = Gate("lyon", lambda: rules(SITE_POLICY), lambda *events: happened.extend(events))
    opened = Request(action="open", site="lyon", dataset=DATASET, purpose="care", job_kind="train")
    assert gate.ask(opened, "lyon/rows", run="run").allowed
    with pytest.raises(Denied):
        gate.ask(opened.model_copy(update={"purpose": "marketing"}), "lyon/rows")
    assert [(type(entry), entry.subject, entry.run, entry.decision.allowed) for entry in happened] == [
        (Decided, "lyon/rows", "run", True),
        (Decided, "lyon/rows", None, False),
    ]
    assert gate.decide(opened).allowed
    assert len(happened) == 2  # planning asks many questions of which few come true


OPENED = Request(action="open", site="lyon", dataset=DATASET, purpose="care", job_kind="train")


def test_a_decision_is_journalled_with_what_its_rules_looked_at_and_no_column():
    door = Door()
    door.gate.ask(OPENED.model_copy(update={"dataset": DATASET.model_copy(update={"columns": {"age": "double"}})}), "x")
    [said] = door.happened
    assert said.request == OPENED


def test_work_that_goes_on_is_decided_each_time_and_journalled_when_question_or_answer_is_another():
    door = Door()
    other = OPENED.model_copy(update={"dataset": DATASET.model_copy(update={"rows": 51})})
    for asked in (OPENED, OPENED, other, other):
        door.gate.admit(asked, "lyon/rows", "run")
    door.gate.admit(other, "lyon/rows", "other")
    door.policy = SITE_POLICY + '@id("lyon.closed") forbid (principal, action, resource);'
    for _ in range(2):
        with pytest.raises(Denied, match=r"rule lyon\.closed"):
            door.gate.admit(other, "lyon/rows", "run")
    assert [(said.run, said.request.dataset.rows, said.decision.allowed) for said in door.happened] == [
        ("run", 50, True),
        ("run", 51, True),
        ("other", 51, True),
        ("run", 51, False),
    ]


@pytest.mark.parametrize("asked", [OPENED, crossing(kind="code", direction="in")])
def test_what_was_done_before_is_decided_again_and_only_a_refusal_is_journalled(asked):
    door = Door()
    door.gate.allow(asked, "lyon/rows", "run")
    assert door.happened == []
    door.policy = SITE_POLICY + '@id("lyon.closed") forbid (principal, action, resource);'
    with pytest.raises(Denied, match=r"rule lyon\.closed"):
        door.gate.allow(asked, "lyon/rows", "run")
    [said] = door.happened
    assert not said.decision.allowed
    assert not isinstance(said, Crossed) or said.crossing.bytes == 0


def test_an_account_is_journalled_by_nobody():
    door = Door()
    account = door.gate.account(crossing(kind="data"))
    assert (account.decision.rules, door.happened) == (("rows.stay",), [])
