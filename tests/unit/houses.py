"""A hub's desk with journal, conductor and files behind it, and nobody who performs: the tests merge themselves."""

from functools import cache

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.gate import Gate
from atoll.errors import Unfit
from atoll.journal import Journal
from atoll.outer.wire import encode
from atoll.policy.defaults import HUB_POLICY
from atoll.policy.rules import Rules
from atoll.registry.blobs import Blobs
from atoll.registry.models import Models
from atoll.runtime.conductor import Conductor
from atoll.runtime.desk import Desk, Parts
from atoll.runtime.files import Folders
from atoll.runtime.machine import AssignTo
from atoll.runtime.roster import Roster
from atoll.runtime.state import spooled
from atoll.runtime.witnessing import Witness
from atoll.spec.event import Answer, Expired, Joined, Merged, Planned, Submitted
from atoll.spec.fleet import Dataset, Site
from atoll.spec.job import parse_job
from atoll.spec.message import Hello, Parcel
from atoll.spec.model import TensorSpec
from atoll.spec.plan import Layout, Plan
from atoll.spec.policy import Policy
from atoll.spec.sync import Sync

SIGNATURE = (TensorSpec(name="w", shape=(8,)),)
ZERO = "sha256:" + 64 * "0"
QUORUM = {"kind": "quorum", "count": 1, "deadline": 600.0}
JOB = parse_job(
    {
        "kind": "train",
        "name": "job",
        "purpose": "care",
        "task": {"file": "task.py", "name": "Task"},
        "data": {"dataset": "rows"},
    },
    "job",
)


@cache
def rules(text):
    """Return the hub's rules by this text; they do not change, so all tests share them."""
    return Rules(Policy(party="hub", text=text))


class House:
    """A desk with everything behind it but a performer: the tests merge, and the commands are kept."""

    def __init__(self, home, policy=HUB_POLICY, desk=Desk):
        self.journal, self.roster = Journal(home / "journal.db", "hub"), Roster()
        self.performed, self.sent = [], {}
        self.conductor = Conductor(self.journal, self.perform, self.seen)
        self.blobs, self.folders = Blobs(home / "blobs"), Folders(home / "runs")
        self.desk = desk(
            Parts(
                gate=Gate("hub", lambda: rules(policy), self.conductor.record),
                conductor=self.conductor,
                blobs=self.blobs,
                models=Models(),
                folders=self.folders,
                changed=lambda run: None,
                witness=Witness(home / "witness", self.journal),
            )
        )
        self.conductor.start()

    def perform(self, state, command):
        self.performed.append(command)

    def seen(self, entry):
        self.roster.seen(entry)
        self.desk.seen(entry)

    def files(self, run):
        return self.folders.of(run)

    def connect(self, *names, runs=()):
        for name in names:
            self.sent[name] = []
            self.desk.opened(name, self.sent[name].append)
            self.desk.heard(name, hello(name, runs))

    def start(self, run="run", sites=("ada", "bob"), **sync):
        """Start a run and bring it to its first stage."""
        code = self.blobs.put(f"code of {run}".encode())
        layouts = {site: Layout() for site in sites}
        plan = Plan(sites=sites, layouts=layouts, sync=Sync.model_validate(sync), rounds=5)
        self.conductor.here.add(run)
        self.conductor.record(Submitted(run=run, user="ada", job=JOB, code=code))
        self.conductor.record(Planned(run=run, plan=plan))
        self.settled()

    def run(self, run="run", sites=("ada", "bob"), **sync):
        """Start a run and bring it into its first train round; return its first weights."""
        self.start(run, sites, **sync)
        self.bring(sites[0], self.parcel(run, sites[0], signature=SIGNATURE))
        digest = self.files(run).put_weights(vector(), SIGNATURE)
        return self.merge(run, digest)

    def merge(self, run, weights):
        state = self.conductor.states[run]
        sites = tuple(answer.site for answer in state.merging)
        merged = Merged(run=run, position=state.position, sites=sites, weights=weights, signature=SIGNATURE)
        self.conductor.record(merged)
        return weights

    def expired(self, run):
        return Expired(run=run, position=self.conductor.states[run].position)

    def answer(self, run, site, **more):
        state = self.conductor.states[run]
        place = {"position": state.position, "epoch": state.epoch, "version": state.version}
        examples = 1 if state.work == "train" else 0
        return Answer.model_validate({"site": site, "examples": examples, **place, **more})

    def parcel(self, run, site, size=8, wire=(), **more):
        return Parcel(run=run, purpose="update", size=size, wire=wire, answer=self.answer(run, site, **more))

    def bring(self, site, parcel, data=None):
        self.desk.take(site, parcel, source(encode(vector() if data is None else data, ())))

    def settled(self):
        return [entry.event for entry in self.conductor.record(Joined(run="nobody", site="nobody"))]

    def happened(self, *kinds):
        """Return the events of these kinds, once all that was posted is journalled."""
        self.settled()
        return [entry.event for entry in self.journal.entries(kinds=kinds)]

    def crossings(self):
        return [entry.event for entry in self.journal.entries(kinds=("crossing",))]

    def check(self):
        """See that each update that counts is in one name, by relays that are there, and is in the spool as it came."""
        for event in (entry.event for entry in self.journal.entries(kinds=("run.answered",))):
            assert all(answer.via for answer in event.answers) or not event.others
            for answer in event.answers:
                assert not answer.via or answer.via[0] in self.desk.tree.way(answer.site)
        for state in self.conductor.states.values():
            held = {(spooled(one), one.update) for one in (*state.arrived, *state.merging) if one.update is not None}
            assert len({name for name, _ in held}) == len(held)
            assert all(self.files(state.run).spool.holds(*one) for one in held)

    def close(self):
        if not self.conductor.closing:
            self.check()
        self.conductor.close()
        self.journal.close()


def source(frames):
    """Return what brings these frames, from an element on."""
    return lambda offset: (frame for frame in frames if frame.offset >= offset)


def hello(site, runs=()):
    rows = Dataset(name="rows", rows=50, fingerprint=ZERO, purposes=("care",))
    return Hello(site=Site(name=site, datasets=(rows,)), runs=runs)


def vector(seed=1):
    return np.random.default_rng(seed).normal(size=8).astype(np.float32)


def whole(data=None, **change):
    fields = {"offset": 0, "length": 8, "data": (vector() if data is None else data).tobytes(), **change}
    return Frame(**fields)


def spoiled(at=3, value=np.nan):
    data = vector()
    data[at] = value
    return data


def bring_badly(house, site="ada", run="run", words="nan at element 3"):
    with pytest.raises(Unfit, match=words):
        house.desk.take(site, house.parcel(run, site), source([whole(spoiled())]))


def unread(offset):
    raise AssertionError("a byte was taken")
    yield


def assigned(house):
    house.settled()
    return [command.site for command in house.performed if isinstance(command, AssignTo)]
