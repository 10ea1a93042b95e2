"""Builders of runs for the tests of the state machine: jobs, plans, answers, and a fold over events."""

from atoll.runtime.machine import AssignTo, Merge, begin, step
from atoll.spec.event import (
    Answer,
    Answered,
    Joined,
    Merged,
    Planned,
    Submitted,
)
from atoll.spec.job import parse_job
from atoll.spec.model import Lineage, Model
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync

ZERO = "sha256:" + 64 * "0"
ONE = "sha256:" + 64 * "1"
QUORUM = {"kind": "quorum", "count": 2}
BUFFER = {"kind": "buffer", "count": 2}


def train_job(**data):
    task = {"file": "task.py", "name": "Task"}
    return parse_job(
        {"kind": "train", "name": "job", "purpose": "care", "task": task, "data": {"dataset": "rows", **data}}, "job"
    )


def query_job():
    job = {"kind": "query", "name": "ask", "purpose": "care", "sql": "select count(*) from rows", "dataset": "rows"}
    return parse_job(job, "job")


def plan(sites="abc", rounds=2, evaluators="", initialiser=None, **wait):
    sync = Sync.model_validate({"preset": "fedavg", "wait": {"patience": 60, "deadline": 5, **wait}})
    layouts = {site: Layout() for site in sites}
    names = {"sites": tuple(sites), "evaluators": tuple(evaluators), "initialiser": initialiser}
    return Plan(layouts=layouts, sync=sync, rounds=rounds, **names)


def fold(state, *events):
    """Fold events and return the last state with the commands of all of them."""
    commands = []
    for event in events:
        state, more = step(state, event)
        commands += more
    return state, commands


def submitted(job=None):
    return begin(Submitted(run="run", user="ada", job=job or train_job()))


def joined(*sites):
    return [Joined(run="run", site=site) for site in sites]


def running(made, *sites, job=None):
    """Return a run under this plan with these sites there, in its first stage."""
    state, _ = submitted(job)
    return fold(state, *joined(*(sites or made.sites)), Planned(run="run", plan=made))


def answer(state, site, **more):
    place = {"position": state.position, "epoch": state.epoch, "version": state.version}
    return Answered(run="run", answer=Answer(site=site, **{**place, **more}))


def merged(state, *sites, **more):
    return Merged(run="run", position=state.position, sites=sites or tuple(a.site for a in state.merging), **more)


def training(made, *sites):
    """Return a run in its first train round: its first weights are merged."""
    state, _ = running(made, *sites)
    state, _ = fold(state, answer(state, made.initialiser or made.sites[0]))
    return fold(state, merged(state, weights=ZERO))


def assigned(commands):
    return [command.site for command in commands if isinstance(command, AssignTo)]


def merges(commands):
    return [tuple(answer.site for answer in command.answers) for command in commands if isinstance(command, Merge)]


def model():
    lineage = Lineage(run="run", job=ZERO, plan=ZERO, code=ZERO)
    return Model(name="job", version=1, weights=ONE, code=ZERO, task="T", file="t.py", signature=(), lineage=lineage)
