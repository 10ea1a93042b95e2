"""Privacy budgets in whole runs: reserved before anything opens, charged before anything leaves, and given back."""

from threading import Event

import pytest

from atoll.console.terms import required
from atoll.data.catalogue import Catalogue
from atoll.journal import Journal
from atoll.policy.ledger import folded
from atoll.policy.promises import so_far
from atoll.runtime.ledger import KINDS
from atoll.spec.budget import Budget
from atoll.spec.user import LOCAL
from tests.scenarios.worlds import ROUNDS, started
from tests.unit.places import WAIT, eventually

NAMES = ("ada", "bob")
NOISED = [{"kind": "clip", "value": 1.0}, {"kind": "noise", "value": 4.0}]
BUDGET = Budget(epsilon=3.0, delta=1e-5)  # three rounds with that noise need 1.85


@pytest.fixture
def world(tmp_path):
    with started(tmp_path, NAMES) as made:
        for name in NAMES:
            Catalogue(tmp_path / "sites" / name).set_budget("rows", BUDGET)
        assert eventually(lambda: all(site.datasets[0].budget for site in made.hub.fleet().sites))
        yield made


def journal(world, site):
    return Journal(world.home / "sites" / site / "journal.db", site, read_only=True)


def ledger(world, site):
    with journal(world, site) as written:
        return folded(entry.event for entry in written.entries() if entry.event.kind in KINDS)


def over(world, run):
    assert eventually(lambda: all(ledger(world, name).accounts["rows", run].over for name in NAMES))


def test_runs_use_a_budget_up_and_the_model_states_what_is_promised(world):
    view = world.end(run := world.submit(merge="mean", wire=NOISED))
    assert view.state == "finished", view.words
    over(world, run)
    found = ledger(world, "ada").accounts["rows", run]
    assert (found.steps, found.epsilon, found.delta) == (ROUNDS, found.reserved.epsilon, found.reserved.delta)
    assert found.epsilon / BUDGET.epsilon == pytest.approx(found.delta / BUDGET.delta, rel=0.15)
    model = world.hub.model(view.result.model)
    assert [(one.site, one.guarantee) for one in model.promises] == [(name, found.reserved) for name in NAMES]
    [line] = [one.text for one in world.hub.lineage(model.reference).branch().below if "privacy" in one.text]
    assert line.startswith("privacy: site-level (epsilon ")
    assert line.endswith("3 steps of noise 4, no sampling, PLD accountant at 2 sites")

    with journal(world, "bob") as written:
        told = [entry.event for entry in written.entries(run=run)]
    kinds = [one.kind for one in told if one.kind.startswith("privacy.") or _left(one)]
    assert kinds == ["privacy.reserved", *["privacy.charged", "crossing"] * ROUNDS, "privacy.released"]
    assert kinds[0] == next(one.kind for one in told if one.kind == "privacy.reserved" or _left(one))

    view = world.end(world.submit(merge="mean", wire=NOISED))
    assert (view.state, view.error) == ("failed", "Denied")
    assert "of 3 there is 1." in view.words
    assert "(rule terms.budget)" in view.words
    view = world.end(world.submit(merge="mean", wire=NOISED[:1]))
    assert (view.state, view.error) == ("failed", "Denied")
    assert "it has a budget of epsilon 3, and job promises nothing" in view.words
    assert len(ledger(world, "ada").accounts) == 1


def holding(train, go):
    """Return what workers answer who wait in every round but the first."""

    def held(order, group):
        assert order.version == 0 or go.wait(WAIT)
        return train(order, group)

    return held


def test_a_cancelled_run_gives_back_what_it_was_not_charged(world):
    """Its noise is what the owners ask for, and not the job: each site counts what the strictest of them wants."""
    for name, noise in zip(NAMES, ("noise=4", "noise=5"), strict=True):
        Catalogue(world.home / "sites" / name).require("rows", required(["clip=1.0", noise]))
    assert eventually(lambda: all(site.datasets[0].wire for site in world.hub.fleet().sites))
    go = Event()
    for workers in world.workers.values():
        workers.answers["train"] = holding(workers.answers["train"], go)
    run = world.submit(merge="mean")
    assert eventually(lambda: world.hub.run(run).round == 1)
    assert ledger(world, "ada").used("rows")[0] == ledger(world, "ada").accounts["rows", run].reserved.epsilon
    world.hub.cancel(run, LOCAL)
    over(world, run)
    go.set()
    found = ledger(world, "ada")
    account = found.accounts["rows", run]
    assert (account.steps, account.reserved.mechanism.multiplier) == (1, 5.0)
    assert world.hub.run(run).plan.promises == {name: account.reserved for name in NAMES}
    assert found.used("rows") == (so_far(account.reserved, account.steps), account.reserved.delta)


def _left(event):
    return event.kind == "crossing" and event.crossing.kind == "update"
