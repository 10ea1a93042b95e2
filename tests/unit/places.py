"""A site's side of a run with everything real but its workers and its hub, which do as the test says."""

import threading
import time
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atoll.boundary.channel import Frame
from atoll.boundary.gate import SiteGate
from atoll.data.catalogue import Catalogue
from atoll.data.live import LiveCatalogue
from atoll.errors import LinkLost, Unavailable, Unfit
from atoll.journal import Journal
from atoll.journal.key import Key
from atoll.outer.wire import encode
from atoll.policy.defaults import SITE_POLICY
from atoll.policy.rules import Rules
from atoll.registry.weights import save
from atoll.runtime.concealing import Concealing
from atoll.runtime.groups import Groups
from atoll.runtime.ledger import LiveLedger
from atoll.runtime.peers import Peers
from atoll.runtime.place import Place
from atoll.runtime.reviews import Reviews
from atoll.spec.document import canonical, sha256
from atoll.spec.fleet import Profile, Site
from atoll.spec.job import parse_job
from atoll.spec.message import Assign, Done
from atoll.spec.model import Bundle, TensorSpec
from atoll.spec.order import Reply, TaskName
from atoll.spec.policy import Policy
from atoll.spec.sync import Sync

WAIT = 20.0  # seconds after which something that should happen has not
SIGNATURE = (TensorSpec(name="w", shape=(2, 3)), TensorSpec(name="b", shape=(2,)))
SIZE, STEPS, BATCH, ROWS = 8, 3, 4, 50
WEIGHTS = np.arange(SIZE, dtype=np.float32)
DIGEST = sha256(save(WEIGHTS, SIGNATURE))
CODE = canonical(Bundle(files={"task.py": "class Task: pass"}))
AGES = [float(20 + row) for row in range(ROWS)]
PROFILE = Profile(parameters=SIZE, step_seconds=0.5)


@cache
def rules(text):
    """Return the site's rules by this text: parsed once, as an agent does, and not for each question."""
    return Rules(Policy(party="lyon", text=text))


def update(seed=1):
    return np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)


def job(kind="train", **fields):
    known = {"kind": kind, "name": "job", "purpose": "care"}
    if kind == "query":
        known |= {"sql": "SELECT count(*) AS n FROM rows", "dataset": "rows"}
    else:
        known["data"] = {"dataset": "rows", "statistics": ["age", "rare"]} if kind == "train" else {"dataset": "rows"}
    if kind == "train":
        known |= {"task": {"file": "task.py", "name": "Task"}, "batch": BATCH}
    if kind in ("evaluate", "predict"):
        known["model"] = "job@1"
    return parse_job({**known, **fields}, "job")


def assign(work="train", position=2, **fields):
    known = {
        "run": "run",
        "epoch": 0,
        "position": position,
        "work": work,
        "job": fields.pop("job", None) or job(work if work in ("evaluate", "predict", "query") else "train"),
        "sync": Sync(period=STEPS, wait={"patience": WAIT}),
        "version": position - 2 if work == "train" else 0,
        "steps": STEPS,
        "done": (position - 2) * STEPS if work == "train" else 0,
        "code": sha256(CODE),
        "code_bytes": len(CODE),
        "weights": DIGEST,
        "signature": SIGNATURE,
        "task": TaskName(file="task.py", name="Task"),
    }
    return Assign.model_validate({**known, **fields})


class Workers:
    """An executor: `answer(order)` says what its groups reply, `orders` what they were told."""

    confined, refuses = False, ""

    def __init__(self):
        self.answers, self.orders, self.started, self.closed = {}, [], 0, 0
        self.may_close = threading.Event()  # how long ending a group takes
        self.may_close.set()

    def warm(self):
        pass

    def start(self, layout, folder, grant=None):
        self.started += 1
        return WorkerGroup(self)

    def close(self):
        pass

    def did(self, kind):
        return [order for order in self.orders if order.kind == kind]


class WorkerGroup:
    whole = True

    def __init__(self, workers):
        self.workers, self.ended = workers, threading.Event()

    def order(self, order, timeout, on_step=None):
        self.workers.orders.append(order)
        if self.ended.is_set():
            raise Unavailable("worker: a rank ended")
        return self.workers.answers.get(order.kind, honest)(order, self)

    def rest(self):
        pass

    def close(self):
        self.workers.closed += 1
        assert self.workers.may_close.wait(WAIT)
        self.ended.set()


def honest(order, group=None):
    """Reply as a worker does whose task is a good one."""
    match order.kind:
        case "train":
            update().tofile(order.output)
            if order.state_out:
                with open(order.state_out, "wb") as file:
                    file.write(f"state after {order.done + order.steps}".encode())
            return Reply(examples=STEPS * BATCH, loss=0.5)
        case "initialise":
            WEIGHTS.tofile(order.output)
            return Reply(signature=SIGNATURE)
        case "probe":
            return Reply(profile=PROFILE)
        case "evaluate":
            return Reply(examples=10, totals={"accuracy": {"total": 8.0, "count": 10}})
        case "predict":
            pq.write_table(pa.table({"risk": [0.5] * ROWS}), order.output)
            return Reply(rows=10**6)
    return Reply(rows=ROWS)


def until_closed(order, group):
    """Stand in the middle of an order until the group is ended."""
    assert group.ended.wait(WAIT)
    raise Unavailable("worker: its group was ended")


class Hub:
    """A desk that keeps what it is told. While `broken`, the next so many streams or answers break off; while `picky`,
    the next so many updates are not taken."""

    def __init__(self):
        self.heard_, self.taken, self.given, self.broken, self.picky = [], [], [], 0, 0
        self.refused = []
        self.news = threading.Condition()
        self.send = None

    def opened(self, site, send):
        self.send = send

    def closed(self, site, send, words):
        pass

    def _break(self):
        if self.broken:
            self.broken -= 1
            raise LinkLost("the link broke")

    def heard(self, site, message):
        if isinstance(message, Done):
            self._break()
        self._tell(self.heard_, message)

    def take(self, site, parcel, frames):
        self._break()
        if self.picky:
            self._tell(self.refused, parcel)
            self.picky -= 1
            raise Unfit("lyon: tensor w: nan at element 0 of the model")
        found = np.concatenate([np.frombuffer(frame.data, np.float32) for frame in frames(0)])
        self._tell(self.taken, (parcel, found))

    def give(self, site, parcel):
        if parcel.purpose == "probe":
            return parcel, iter(())
        self._break()
        self._tell(self.given, parcel.purpose)
        if parcel.purpose == "code":
            return parcel.model_copy(update={"size": len(CODE)}), iter([Frame(0, 0, CODE)])
        return parcel.model_copy(update={"size": SIZE}), encode(WEIGHTS, ())

    def _tell(self, list_, what):
        with self.news:
            list_.append(what)
            self.news.notify_all()

    def wait(self, kind, count=1, **fields):
        """Return the last of `count` messages of this kind, with these fields, once they are here."""

        def found():
            said = [one for one in self.heard_ if one.kind == kind]
            return [one for one in said if all(getattr(one, name) == want for name, want in fields.items())]

        with self.news:
            assert self.news.wait_for(lambda: len(found()) >= count, WAIT), (kind, fields, self.heard_)
            return found()[count - 1]

    def wait_taken(self, count=1):
        with self.news:
            assert self.news.wait_for(lambda: len(self.taken) >= count, WAIT), self.heard_
            return self.taken[count - 1]


class House:
    """A site `lyon` with 50 rows, its journal and its own rules."""

    def __init__(self, home, policy=SITE_POLICY):
        self.home, self.policy = home, policy
        self.workers, self.hub = Workers(), Hub()
        self.file = home / "rows.parquet"
        self.write(AGES)
        self.dataset = Catalogue(home).add("rows", self.file, purposes=("care",), min_group=10)
        self.journal = Journal(home / "journal.db", "lyon")
        self.gate = SiteGate("lyon", lambda: rules(self.policy), self.record)
        self.gate.attach(self.hub)
        groups = Groups(self.workers, home / "workers")
        concealing = Concealing("lyon", Key.new("lyon"), Peers(home), home / "runs", self.gate.say)
        ledger = LiveLedger(self.journal, self.record)
        known = LiveCatalogue(home), concealing, ledger, Reviews(home, self.journal, self.record)
        self.place = Place(Site(name="lyon"), home, self.gate, groups, *known)

    def record(self, *events):
        return self.journal.append(*events, actor="lyon")

    def write(self, ages):
        rare = [1.0 if row < 3 else None for row in range(len(ages))]
        pq.write_table(pa.table({"age": ages, "rare": rare}), self.file)

    def crossings(self, kind):
        found = [entry.event for entry in self.journal.entries(kinds=("crossing",))]
        return [event for event in found if event.crossing.kind == kind]

    def decisions(self):
        return [entry.event for entry in self.journal.entries(kinds=("decision",))]

    @property
    def runs(self):
        return self.home / "runs"


def eventually(holds):
    until = time.monotonic() + WAIT
    while not holds() and time.monotonic() < until:
        time.sleep(0.005)
    return holds()
