"""Random walks through the state machine: whatever happens in whatever order, runs end, and nothing counts twice."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from atoll.runtime.machine import Alarm, AssignTo, Merge, Publish, begin, step
from atoll.runtime.quarantine import IN_A_ROW
from atoll.runtime.state import expects
from atoll.spec.event import (
    Answer,
    Answered,
    Barred,
    Broken,
    Expired,
    Joined,
    Lost,
    Merged,
    Planned,
    Published,
    Refused,
    Rejected,
    Restarted,
    Result,
    Submitted,
)
from atoll.spec.job import parse_job
from atoll.spec.model import Lineage, Model
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync

ZERO = "sha256:" + 64 * "0"
ROUNDS = 3
JOB = parse_job(
    {
        "kind": "train",
        "name": "job",
        "purpose": "care",
        "task": {"file": "task.py", "name": "Task"},
        "data": {"dataset": "rows", "statistics": ["age"]},
    },
    "job",
)


class World:
    """The machine with everything around it: what was commanded, what is under way, what has happened."""

    def __init__(self, sites, wait):
        self.sites = sites
        self.state, _ = begin(Submitted(run="run", user="ada", job=JOB))
        self.events, self.work, self.given = [], {}, []
        self.merge = self.publish = None
        self.alarms = []  # in the order in which they will ring: soonest first
        self.taken, self.merged = [], Counter()
        self.rejected, self.barred, self.bars = Counter(), set(), False  # bars: three in a row have their consequence
        self.buffered = wait["kind"] == "buffer"
        sync = Sync.model_validate({"wait": wait})
        layouts = {site: Layout() for site in sites}
        plan = Plan(sites=sites, evaluators=sites[:2], layouts=layouts, sync=sync, rounds=ROUNDS)
        self.tell(Planned(run="run", plan=plan))

    def tell(self, event):
        before = self.state
        self.events.append(event)
        self.state, commands = step(before, event)
        if isinstance(event, Merged) and self.state.position != before.position:
            self.merged[before.position] += 1
            self.taken += [(answer.site, answer.position) for answer in before.merging]
        if isinstance(event, Answered):
            self.rejected[event.answer.site] = 0
        if isinstance(event, Restarted):
            self.merge = self.publish = None  # whatever the hub was doing died with it
            self.alarms = []
        for command in commands:
            match command:
                case AssignTo():
                    place = {"position": self.state.position, "version": self.state.version}
                    answer = Answer(site=command.site, epoch=self.state.epoch, **place)
                    self.work[command.site] = answer
                    self.given.append(answer)
                case Merge():
                    sites = [answer.site for answer in command.answers]
                    assert len(set(sites)) == len(sites), "two answers of one site in one merge"
                    told = Result(missing=self.state.missing) if self.state.work in ("measure", "evaluate") else None
                    self.merge = Merged(
                        run="run", position=self.state.position, sites=tuple(sites), weights=ZERO, result=told
                    )
                case Alarm():
                    alarm = Expired(run="run", position=command.position, final=command.final)
                    self.alarms = sorted([*self.alarms, alarm], key=lambda one: (one.position, one.final))
                case Publish():
                    lineage = Lineage(run="run", job=ZERO, plan=ZERO, code=ZERO)
                    model = Model(
                        name="m", version=1, weights=ZERO, code=ZERO, task="T", file="t", signature=(), lineage=lineage
                    )
                    self.publish = Published(run="run", model=model)
        assert self.awaited(), f"wedged: nothing will ever happen to {self.state}"
        assert not self.forgotten(), f"nobody gave work to {self.forgotten()}"

    def awaited(self):
        """Tell whether the run is over or will go on by itself, even if no site ever says another word."""
        if self.state.over or self.merge is not None or self.publish is not None:
            return True
        return any(alarm.final and alarm.position == self.state.position for alarm in self.alarms)

    def forgotten(self):
        """Return the sites that are here and needed, and whose newest work is not the current stage's."""
        state = self.state
        if state.phase != "running" or (state.merging and not (self.buffered and state.work == "train")):
            return []
        idle = [site for site in state.silent if site in state.live and site not in state.spoiled | state.failed]
        return [site for site in idle if site not in self.work or not expects(state, self.work[site])]

    def wander(self, what, who):
        """Let one thing happen, if it can."""
        site = self.sites[who % len(self.sites)]
        match what:
            case "join" if site not in self.barred:
                self.tell(Joined(run="run", site=site))
            case "lose":
                self.tell(Lost(run="run", site=site))
            case "answer" if self.given:  # any assignment ever given, answered or not
                self.tell(Answered(run="run", answer=self.given[who % len(self.given)]))
            case "spoil" | "fail" if self.given:
                spoil = self.spoil if what == "spoil" else self.fail
                spoil(self.given[who % len(self.given)])
            case "late" if self.given:
                before = self.state
                self.tell(rejected(self.given[who % len(self.given)], late=True))
                assert self.state == before
            case "newest" if site in self.work:
                self.tell(Answered(run="run", answer=self.work[site]))
            case "deadline":
                self.tell(Expired(run="run", position=self.state.position))
            case "restart":
                held = [answer.site for answer in (*self.state.merging, *self.state.arrived)]
                self.tell(Restarted(run="run", missing=tuple(held[: who % (len(held) + 1)])))
            case "refuse":
                self.tell(Refused(run="run", site=site, words=f"{site} refuses"))
            case _:
                self.go_on(what)

    def spoil(self, answer):
        """Reject an answer to any assignment that was ever given; three in a row bar its site."""
        site = answer.site
        if self.rejected[site] == IN_A_ROW - 1 and not self.bars:
            return
        if self.work.get(site) == answer:
            del self.work[site]
        self.rejected[site] += 1
        self.tell(rejected(answer))
        if self.rejected[site] == IN_A_ROW:
            self.barred.add(site)
            self.tell(Barred(run="run", site=site, words=f"atoll site release {site}"))

    def fail(self, answer):
        """The task fails in any assignment that was ever given; whoever fails in what it was given last has no more."""
        if self.work.get(answer.site) == answer:
            del self.work[answer.site]
        before = self.state
        self.tell(Broken(run="run", site=answer.site, position=answer.position, words=f"{answer.site} fails"))
        if self.state.phase == "failed" and before.phase != "failed" and before.rule != "all":
            assert before.sound <= before.plan.sync.wait.count or before.work in ("initialise", "evaluate")

    def go_on(self, what):
        """Let the hub do one of the things that it does by itself, if it can."""
        if what == "merge":
            self.finish_merge()
        elif what == "ring" and self.alarms:
            self.tell(self.alarms.pop(0))
        elif what == "publish" and self.publish is not None:
            self.tell(self.publish)

    def finish_merge(self):
        if self.merge is not None:
            done, self.merge = self.merge, None
            self.tell(done)

    def abandon(self):
        """No site ever says another word; that must be enough to end any run."""
        for _ in range(200):
            if self.state.over:
                return
            for what in ("merge", "publish", "ring"):
                self.go_on(what)

    def settle(self):
        """Everybody is let in and answers what it was given last; that must be enough to end any run."""
        self.barred.clear()
        for _ in range(200):
            if self.state.over:
                return
            self.finish_merge()
            if self.publish is not None:
                self.tell(self.publish)
            for site in self.sites:
                if site not in self.state.live:
                    self.tell(Joined(run="run", site=site))
                if site in self.work and site in self.state.live:
                    self.tell(Answered(run="run", answer=self.work[site]))

    def go_with(self, bad):
        """Everybody who is not barred joins and answers, one of them badly, and every deadline passes."""
        for _ in range(200):
            if self.state.over:
                return
            self.finish_merge()
            self.go_on("publish")
            for site in self.sites:
                if site not in self.state.live and site not in self.barred:
                    self.tell(Joined(run="run", site=site))
                if site in self.work and site in self.state.live:
                    answer = self.work[site]
                    self.spoil(answer) if site == bad else self.tell(Answered(run="run", answer=answer))
            if self.merge is None:
                self.tell(Expired(run="run", position=self.state.position))


def rejected(answer, late=False):
    place = {"site": answer.site, "position": answer.position, "epoch": answer.epoch}
    return Rejected(run="run", words=f"{answer.site}: not finite", late=late, **place)


WAITS = st.sampled_from(
    [
        {"kind": "all"},
        {"kind": "quorum", "count": 1},
        {"kind": "quorum", "count": 2},
        {"kind": "buffer", "count": 1},
        {"kind": "buffer", "count": 2},
    ]
)
HAPPENINGS = st.sampled_from(
    ["join", "join", "lose", "answer", "newest", "newest", "spoil", "late", "merge", "deadline", "restart"]
)
WALKS = st.lists(st.tuples(HAPPENINGS, st.integers(0, 30)), max_size=60)
# Sites refuse and vanish, and every alarm rings that was set, patience included.
ROUGH = st.lists(
    st.tuples(
        HAPPENINGS | st.sampled_from(["ring", "refuse", "lose", "spoil", "fail", "merge", "publish"]),
        st.integers(0, 30),
    ),
    max_size=80,
)


def check(world):
    counted = Counter(world.taken)
    assert all(count == 1 for count in world.merged.values()), "a stage was merged twice"
    assert all(count == 1 for count in counted.values()), "an answer was merged twice"
    again, _ = begin(Submitted(run="run", user="ada", job=JOB))
    for event in world.events:
        again, _ = step(again, type(event).model_validate_json(event.model_dump_json()))
    assert again == world.state, "folding the journal again gives another state"


@given(count=st.integers(2, 5), wait=WAITS, walk=WALKS)
def test_no_order_of_events_wedges_a_run_or_counts_anything_twice(count, wait, walk):
    world = World(tuple("abcde"[:count]), wait)
    for what, who in walk:
        world.wander(what, who)
    world.settle()
    assert (world.state.phase, world.state.version) == ("finished", ROUNDS)
    check(world)


@given(count=st.integers(2, 5), wait=WAITS, walk=WALKS, at=st.integers(0, 60), who=st.integers(0, 4))
def test_with_refusals_every_run_still_ends_and_says_who_refused(count, wait, walk, at, who):
    world = World(tuple("abcde"[:count]), wait)
    for what, one in [*walk[:at], ("refuse", who), *walk[at:], ("refuse", who + 1)]:
        world.wander(what, one)
    world.settle()
    assert world.state.over
    assert world.state.phase == "finished" or world.state.words.endswith("refuses")
    check(world)


@given(count=st.integers(1, 5), wait=WAITS, walk=ROUGH)
def test_any_order_of_events_ends_the_run_or_leaves_an_alarm_pending(count, wait, walk):
    world = World(tuple("abcde"[:count]), wait)
    world.bars = True
    for what, who in walk:
        world.wander(what, who)  # each step asserts that it wedges nothing
    world.abandon()
    assert world.state.over
    assert world.state.phase == "finished" or world.state.error in ("Denied", "Unavailable", "Invalid", "AtollError")
    check(world)


@given(wait=WAITS.filter(lambda wait: wait["kind"] != "all"), lost=st.integers(0, 4), walk=WALKS)
def test_a_run_that_may_go_on_without_a_site_never_needs_one_that_is_lost_for_good(wait, lost, walk):
    world = World(tuple("abcde"), wait)
    name = world.sites[lost]
    for what, who in walk:
        if what != "restart" and world.sites[who % 5] != name:
            world.wander(what, who)
    world.work.pop(name, None)
    for _ in range(200):
        if world.state.over:
            break
        world.finish_merge()
        for site in world.sites:
            if site != name:
                world.tell(Joined(run="run", site=site))
                if site in world.work:
                    world.tell(Answered(run="run", answer=world.work[site]))
        if world.merge is None:
            world.tell(Expired(run="run", position=world.state.position))
        world.go_on("publish")
    assert (world.state.phase, world.state.version) == ("finished", ROUNDS)
    assert name in world.state.result.missing
    check(world)


@given(count=st.integers(1, 5), wait=WAITS, walk=WALKS, who=st.integers(0, 4), at=st.integers(0, 60))
def test_a_site_that_brings_nothing_good_ends_a_run_of_all_in_words_and_no_other(count, wait, walk, who, at):
    world = World(tuple("abcde"[:count]), wait)
    world.bars = True
    for what, one in walk[:at]:
        world.wander(what, one)
    world.go_with(bad=world.sites[who % count])
    if wait["kind"] == "all":
        assert world.state.phase == "finished" or world.state.words.startswith("atoll site release")
    elif len(set(world.sites) - world.barred) >= wait["count"] and not world.barred >= set(world.sites[:2]):
        assert (world.state.phase, world.state.version) == ("finished", ROUNDS)
    check(world)


@given(wait=WAITS.filter(lambda wait: wait["kind"] != "all"), bad=st.integers(0, 4), walk=WALKS)
def test_a_site_that_always_fails_ends_no_run_that_may_go_on_without_it(wait, bad, walk):
    world = World(tuple("abcde"), wait)
    name = world.sites[bad]
    for what, who in walk:
        if world.sites[who % 5] != name and what not in ("answer", "spoil"):
            world.wander(what, who)
    failed = 0
    for _ in range(200):
        if world.state.over:
            break
        world.finish_merge()
        world.go_on("publish")
        for site in world.sites:
            world.tell(Joined(run="run", site=site))
            if site in world.work and site == name:
                failed += 1
                world.fail(world.work[site])
            elif site in world.work:
                world.tell(Answered(run="run", answer=world.work[site]))
    assert (world.state.phase, world.state.version) == ("finished", ROUNDS)
    assert name not in {site for site, _ in world.taken}
    assert (name in world.state.result.failed) == (failed > 0)
    check(world)
