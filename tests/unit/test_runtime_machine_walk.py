"""Random walks through the state machine: whatever happens in whatever order, runs end, and nothing counts twice."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.runtime.machine import AssignTo, Merge, Publish, begin, step
from atoll.spec.event import (
    Answer,
    Answered,
    Expired,
    Joined,
    Lost,
    Merged,
    Planned,
    Published,
    Refused,
    Restarted,
    Submitted,
)
from atoll.spec.job import parse_job
from atoll.spec.model import Lineage, Model
from atoll.spec.plan import Layout, Plan, Sync

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
        self.taken, self.merged = [], Counter()
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
        if isinstance(event, Restarted):
            self.merge = self.publish = None  # whatever the hub was doing died with it
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
                    self.merge = Merged(run="run", position=self.state.position, sites=tuple(sites), weights=ZERO)
                case Publish():
                    lineage = Lineage(run="run", job=ZERO, plan=ZERO, code=ZERO)
                    model = Model(
                        name="m", version=1, weights=ZERO, code=ZERO, task="T", file="t", signature=(), lineage=lineage
                    )
                    self.publish = Published(run="run", model=model)

    def wander(self, what, who):
        """Let one thing happen, if it can."""
        site = self.sites[who % len(self.sites)]
        match what:
            case "join":
                self.tell(Joined(run="run", site=site))
            case "lose":
                self.tell(Lost(run="run", site=site))
            case "answer" if self.given:  # any assignment ever given, answered or not
                self.tell(Answered(run="run", answer=self.given[who % len(self.given)]))
            case "newest" if site in self.work:
                self.tell(Answered(run="run", answer=self.work[site]))
            case "merge":
                self.finish_merge()
            case "deadline":
                self.tell(Expired(run="run", position=self.state.position))
            case "restart":
                held = [answer.site for answer in (*self.state.merging, *self.state.arrived)]
                self.tell(Restarted(run="run", missing=tuple(held[: who % (len(held) + 1)])))
            case "refuse":
                self.tell(Refused(run="run", site=site, words=f"{site} refuses"))

    def finish_merge(self):
        if self.merge is not None:
            done, self.merge = self.merge, None
            self.tell(done)

    def settle(self):
        """Everybody joins and answers what it was given last; that must be enough to end any run."""
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


WAITS = st.sampled_from(
    [
        {"kind": "all"},
        {"kind": "quorum", "count": 1},
        {"kind": "quorum", "count": 2},
        {"kind": "buffer", "count": 1},
        {"kind": "buffer", "count": 2},
    ]
)
HAPPENINGS = st.sampled_from(["join", "join", "lose", "answer", "newest", "newest", "merge", "deadline", "restart"])
WALKS = st.lists(st.tuples(HAPPENINGS, st.integers(0, 30)), max_size=60)


def check(world):
    counted = Counter(world.taken)
    assert all(count == 1 for count in world.merged.values()), "a stage was merged twice"
    assert all(count == 1 for count in counted.values()), "an answer was merged twice"
    again, _ = begin(Submitted(run="run", user="ada", job=JOB))
    for event in world.events:
        again, _ = step(again, type(event).model_validate_json(event.model_dump_json()))
    assert again == world.state, "folding the journal again gives another state"


@settings(max_examples=120, deadline=None, derandomize=True)
@given(count=st.integers(2, 5), wait=WAITS, walk=WALKS)
def test_no_order_of_events_wedges_a_run_or_counts_anything_twice(count, wait, walk):
    world = World(tuple("abcde"[:count]), wait)
    for what, who in walk:
        world.wander(what, who)
    world.settle()
    assert (world.state.phase, world.state.version) == ("finished", ROUNDS)
    check(world)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(count=st.integers(2, 5), wait=WAITS, walk=WALKS, at=st.integers(0, 60), who=st.integers(0, 4))
def test_with_refusals_every_run_still_ends_and_says_who_refused(count, wait, walk, at, who):
    world = World(tuple("abcde"[:count]), wait)
    for what, one in [*walk[:at], ("refuse", who), *walk[at:], ("refuse", who + 1)]:
        world.wander(what, one)
    world.settle()
    assert world.state.over
    assert world.state.phase == "finished" or world.state.words.endswith("refuses")
    check(world)
