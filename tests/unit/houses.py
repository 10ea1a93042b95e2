"""A hub's desk with journal, conductor and files behind it, and nobody who performs: the tests merge themselves."""

import numpy as np

from atoll.boundary.gate import Gate
from atoll.journal import Journal
from atoll.outer.wire import encode
from atoll.policy.defaults import HUB_POLICY
from atoll.policy.rules import Rules
from atoll.registry.blobs import Blobs
from atoll.runtime.conductor import Conductor
from atoll.runtime.desk import Desk
from atoll.runtime.files import RunFiles
from atoll.runtime.roster import Roster
from atoll.spec.event import Answer, Joined, Merged, Planned, Submitted
from atoll.spec.fleet import Dataset, Site
from atoll.spec.job import parse_job
from atoll.spec.message import Hello, Parcel
from atoll.spec.model import TensorSpec
from atoll.spec.plan import Layout, Plan, Sync
from atoll.spec.policy import Policy

SIGNATURE = (TensorSpec(name="w", shape=(8,)),)
SECRET = "s" * 32
ZERO = "sha256:" + 64 * "0"
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


class House:
    """A desk with everything behind it but a performer: the tests merge, and the commands are kept."""

    def __init__(self, home, policy=HUB_POLICY):
        self.journal, self.roster = Journal(home / "journal.db", "hub"), Roster()
        self.performed = []
        self.conductor = Conductor(
            self.journal, lambda state, command: self.performed.append(command), self.roster.seen
        )
        self.conductor.start()
        self.blobs, self.home = Blobs(home / "blobs"), home
        self.held = {}
        rules = Rules(Policy(party="hub", text=policy))
        gate = Gate("hub", lambda: rules, self.conductor.record)
        self.desk = Desk(gate, self.conductor, self.blobs, self.files)
        self.desk.model_of = lambda state: (state.weights, state.signature)
        self.desk.enrolled = lambda *asked: self.conductor.record(self.roster.enrolment(*asked), actor=asked[0])
        self.sent = {}

    def files(self, run):
        return self.held.setdefault(run, RunFiles(self.home / "runs" / run))

    def connect(self, *names):
        for name in names:
            self.sent[name] = []
            self.desk.opened(name, self.sent[name].append)
            rows = Dataset(name="rows", rows=50, fingerprint=ZERO, purposes=("care",))
            self.desk.heard(name, Hello(site=Site(name=name, datasets=(rows,))))

    def run(self, run="run", sites=("ada", "bob"), **sync):
        """Start a run and bring it into its first train round; return its first weights."""
        code = self.blobs.put(f"code of {run}".encode())
        layouts = {site: Layout() for site in sites}
        plan = Plan(sites=sites, layouts=layouts, sync=Sync.model_validate(sync), rounds=2)
        self.conductor.here.add(run)
        self.conductor.record(Submitted(run=run, user="ada", job=JOB, code=code))
        self.conductor.record(*(Joined(run=run, site=site) for site in sites), Planned(run=run, plan=plan))
        self.bring(sites[0], self.parcel(run, sites[0], signature=SIGNATURE))
        digest = self.files(run).put_weights(vector(), SIGNATURE)
        return self.merge(run, digest)

    def merge(self, run, weights):
        state = self.conductor.states[run]
        sites = tuple(answer.site for answer in state.merging)
        merged = Merged(run=run, position=state.position, sites=sites, weights=weights, signature=SIGNATURE)
        self.conductor.record(merged)
        return weights

    def answer(self, run, site, **more):
        state = self.conductor.states[run]
        place = {"position": state.position, "epoch": state.epoch, "version": state.version}
        return Answer.model_validate({"site": site, **place, **more})

    def parcel(self, run, site, size=8, wire=(), **more):
        return Parcel(run=run, purpose="update", size=size, wire=wire, answer=self.answer(run, site, **more))

    def bring(self, site, parcel, data=None):
        self.desk.take(site, parcel, encode(vector() if data is None else data, ()))

    def settled(self):
        return [entry.event for entry in self.conductor.record(Joined(run="nobody", site="nobody"))]

    def crossings(self):
        return [entry.event for entry in self.journal.entries(kinds=("crossing",))]

    def close(self):
        self.conductor.close()
        self.journal.close()


def vector(seed=1):
    return np.random.default_rng(seed).normal(size=8).astype(np.float32)
