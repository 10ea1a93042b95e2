"""Owners' rules and grants in whole runs: one that ends in mid-run, what is foretold of a job, rules on the past."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from atoll.data.catalogue import Catalogue
from atoll.errors import Denied, NotFound
from atoll.journal import Journal
from atoll.policy.defaults import HUB_POLICY, SITE_POLICY
from atoll.policy.replay import replay
from atoll.policy.rules import Rules
from atoll.spec.job import parse_job
from atoll.spec.policy import Policy
from atoll.spec.user import LOCAL
from atoll.spec.wire import Transform
from tests.scenarios.worlds import BUNDLE, ROUNDS, started
from tests.unit.places import eventually, job

NAMES = ("ada", "bob")
SHORT = 0.1  # seconds that a grant still holds
QUORUM = {"kind": "quorum", "count": 1, "deadline": 15.0}


@pytest.fixture
def world(tmp_path):
    with started(tmp_path, NAMES) as made:
        yield made


def catalogue(world, name):
    return Catalogue(world.home / "sites" / name)


def site_journal(world, name, *kinds):
    with Journal(world.home / "sites" / name / "journal.db", name, read_only=True) as journal:
        return [entry.event for entry in journal.entries(kinds=kinds)]


def ends_in_round(world, name, round_):
    """Have a site's grant end while its workers are at a round."""
    train = world.workers[name].answers["train"]

    def trains(order, group):
        if order.version == round_:
            end = datetime.now(UTC) + timedelta(seconds=SHORT)
            catalogue(world, name).grant("rows", "care", until=end)
            while datetime.now(UTC) <= end:
                time.sleep(SHORT / 4)
        return train(order, group)

    world.workers[name].answers["train"] = trains


def updates(world, name):
    found = site_journal(world, name, "crossing")
    return [(one.crossing.round, one.decision.allowed) for one in found if one.crossing.kind == "update"]


def test_a_grant_that_ends_in_mid_run_keeps_the_update_under_way_and_ends_the_run_in_the_owners_words(world):
    ends_in_round(world, "ada", 1)
    run = world.submit()
    view = world.end(run)
    assert (view.state, view.error) == ("failed", "Denied")
    assert "ada refuses: the grant of 'rows' for purpose 'care' ended on" in view.words
    assert "(rule terms.ended)" in view.words
    assert updates(world, "ada") == [(0, True), (1, False)]
    assert world.hub.models() == []
    crossed = [one.crossing for one in world.journalled("crossing", run) if one.crossing.kind == "update"]
    assert not [one for one in crossed if (one.site, one.round) == ("ada", 1)]


def test_others_go_on_without_a_site_whose_grant_ended_where_the_rule_lets_them(world):
    ends_in_round(world, "ada", 1)
    view = world.end(world.submit(wait=QUORUM))
    assert view.state == "finished", view.words
    assert updates(world, "ada") == [(0, True), (1, False)]
    assert [allowed for _, allowed in updates(world, "bob")] == [True] * ROUNDS


def test_a_purpose_that_is_withdrawn_is_refused_before_the_next_round_is_computed(world):
    world.may_train["bob"].clear()  # so that the round ends after the grant did
    run = world.submit()
    assert eventually(lambda: updates(world, "ada"))
    catalogue(world, "ada").withdraw("rows", "care")
    world.may_train["bob"].set()
    view = world.end(run)
    assert (view.state, view.error) == ("failed", "Denied")
    assert "purpose 'care' is not granted" in view.words
    assert len(world.workers["ada"].did("train")) == 1  # the second round was not begun
    last = site_journal(world, "ada", "decision")[-1]
    assert (last.action, last.run, last.decision.allowed) == ("plan", run, False)
    assert last.request.dataset.purposes == ()


def test_what_a_dataset_asks_of_updates_is_in_the_plan_and_crosses(world):
    catalogue(world, "ada").require("rows", (Transform(kind="clip", value=0.5),))
    assert eventually(lambda: any(site.dataset("rows").wire for site in world.hub.fleet().sites))
    run = world.submit()
    view = world.end(run)
    assert view.state == "finished", view.words
    assert [(step.kind, step.value) for step in view.plan.sync.wire] == [("clip", 0.5)]
    assert ("terms of ada", "updates pass through clip 0.5") in [(one.by, one.words) for one in view.plan.reasons]
    crossed = [one.crossing for one in site_journal(world, "ada", "crossing") if one.crossing.kind == "update"]
    assert {(one.wire, one.clip) for one in crossed} == {(("clip",), 0.5)}


def test_what_is_learned_does_not_go_to_a_hub_in_another_region(world):
    catalogue(world, "ada").keep_in("rows", ["ch"])
    view = world.end(world.submit(data={"sites": ["ada"]}))
    assert (view.state, view.error) == ("failed", "Denied")
    assert "the receiver's region 'here' is not among the dataset's regions 'ch'" in view.words
    catalogue(world, "ada").keep_in("rows", ["ch", "here"])
    view = world.end(world.submit(data={"sites": ["ada"]}))
    assert view.state == "finished", view.words
    crossed = [one.crossing for one in site_journal(world, "ada", "crossing") if one.crossing.direction == "out"]
    assert {one.region for one in crossed} == {"here"}


# --- the hub's own points


NO_PLAN = (
    '\n@id("hub.ada")\n@reason("ada is audited")\nforbid (principal, action == Action::"plan", resource is Dataset)'
)
NO_RESULTS = (
    '\n@id("hub.sealed")\n@reason("sealed until Monday")\n'
    'forbid (principal, action == Action::"release", resource is Job);'
)


def hub_rules(world, text):
    (world.home / "hub" / "policy.cedar").write_text(HUB_POLICY + text, encoding="utf-8")


def test_the_hubs_rules_are_asked_about_the_plan_at_each_site_and_stay_on_record_where_no_plan_comes_of_it(world):
    hub_rules(world, NO_PLAN + ' when { resource.site == "ada" };')
    run = world.submit()
    view = world.end(run)
    assert view.state == "finished", view.words
    assert [one.words for one in view.plan.reasons if "hub.ada" in one.by] == [
        "ada does not train: hub refuses: ada is audited (rule hub.ada)"
    ]
    hub_rules(world, NO_PLAN + ";")
    run = world.submit()
    assert (world.end(run).state, world.end(run).error) == ("failed", "Denied")
    said = [one for one in world.journalled("decision", run) if one.action == "plan"]
    assert [(one.subject, one.decision.rules) for one in said] == [
        ("ada/job", ("hub.ada",)),
        ("bob/job", ("hub.ada",)),
    ]


def test_results_leave_their_run_by_the_hubs_rules(world):
    assert world.end(world.submit()).state == "finished"
    asked = parse_job({"kind": "query", "name": "count", "purpose": "care", "dataset": "rows"} | {"sql": SQL}, "job")
    run = world.hub.submit(asked, None, LOCAL)
    assert world.end(run).state == "finished"
    assert [one.action for one in world.journalled("decision", run)][-1] == "release"
    hub_rules(world, NO_RESULTS)
    run = world.hub.submit(asked, None, LOCAL)
    view = world.end(run)
    assert (view.state, view.error, view.result) == ("failed", "Denied", None)
    assert "sealed until Monday (rule hub.sealed)" in view.words


SQL = "SELECT count(*) AS n FROM rows"


def test_who_may_not_submit_may_not_have_sites_run_the_code_for_a_plan_either(world):
    hub_rules(world, '\n@id("hub.no")\nforbid (principal, action == Action::"submit", resource);')
    with pytest.raises(Denied, match=r"rule hub\.no"):
        world.hub.plan(job(layout={"data": 1}), BUNDLE, LOCAL)
    assert not any(world.workers[name].started for name in NAMES)


# --- what is foretold, and what would have been


def foreseen(world, **fields):
    assert eventually(lambda: len(world.hub.fleet().sites) == len(NAMES))
    return world.hub.foresee(job(**{"data": {"dataset": "rows"}, **fields}), BUNDLE, LOCAL)


def test_what_would_happen_to_a_job_is_told_at_every_point_and_nothing_is_done(world):
    found = foreseen(world)
    assert found[0].point == "submit"
    assert [one.point for one in found[-5:]] == ["release", "release", "promote", "deploy", "export"]
    at_ada = [one for one in found if one.subject.startswith("ada: ")]
    assert [one.point for one in at_ada if one.party == "ada"] == ["plan", "open", *["cross"] * 6]
    assert [one.point for one in at_ada if one.party == "hub"] == ["plan", *["cross"] * 6]
    refused = {(one.party, one.subject) for one in found if not one.decision.allowed}
    assert refused == {(party, f"{name}: letting rows out") for name in NAMES for party in (name, "hub")}
    plan = next(one for one in found if one.point == "plan")
    came_under = [("site.purpose", True), ("terms.ended", False), ("terms.budget", False)]
    assert [(one.rule, one.applies) for one in plan.rules] == came_under
    assert not any(world.workers[name].started for name in NAMES)
    assert site_journal(world, "ada", "decision", "crossing") == []
    assert world.journalled("decision") == []


def test_a_job_for_another_purpose_is_told_where_it_would_be_refused_and_why(world):
    found = foreseen(world, purpose="marketing")
    plans = [one for one in found if one.point == "plan" and one.party == "ada"]
    [rule] = [one for one in plans[0].rules if one.rule == "site.purpose"]
    assert (plans[0].decision.allowed, rule.applies) == (False, False)
    assert rule.words == "purpose 'marketing' is not among the granted 'care'"


def test_a_job_without_data_anywhere_is_told_so(world):
    with pytest.raises(NotFound, match="no site has a dataset 'other'"):
        foreseen(world, data={"dataset": "other"})


def tried(world, name, text):
    party = "hub" if name == "hub" else name
    folder = world.home / "hub" if name == "hub" else world.home / "sites" / name
    with Journal(folder / "journal.db", party, read_only=True) as journal:
        entries = journal.entries(kinds=("decision", "crossing"))
        rules = Rules(Policy(party=party, text=text))
        return replay(((entry.time, entry.event) for entry in entries), rules)


def test_rules_tried_on_the_past_name_the_runs_that_they_would_have_refused(world):
    first, second = world.submit(), None
    assert world.end(first).state == "finished"
    second = world.submit(wire=[{"kind": "clip", "value": 1.0}])
    assert world.end(second).state == "finished"
    assert tried(world, "ada", SITE_POLICY).turned == ()
    strict = SITE_POLICY.replace(
        "// Only updates",
        '@id("ada.clip")\nforbid (principal, action == Action::"cross", resource) when '
        '{ context.kind == "update" && !context.wire.contains("clip") };\n// Only updates',
    )
    found = tried(world, "ada", strict)
    assert found.runs == (first, second)
    assert (found.refused, found.allowed, found.unknown) == ((first,), (), 0)
    [turned] = found.turned
    assert (turned.what, turned.count, turned.rules) == ("update out", ROUNDS, ("ada.clip",))
    assert "an update must pass through clip" in turned.words


def test_rules_tried_on_the_hubs_past_are_asked_about_what_it_decided(world):
    run = world.submit()
    assert world.end(run).state == "finished"
    assert tried(world, "hub", HUB_POLICY).turned == ()
    found = tried(
        world,
        "hub",
        HUB_POLICY + NO_RESULTS + '\n@id("h.s")\nforbid (principal, action == Action::"submit", resource);',
    )
    assert found.refused == (run,)
    assert {one.what: one.rules for one in found.turned} == {"submit job": ("h.s",), "release job": ("hub.sealed",)}


def test_an_end_of_a_grant_counts_by_the_time_of_the_past(world):
    run = world.submit()
    assert world.end(run).state == "finished"
    catalogue(world, "ada").grant("rows", "care", until=datetime.now(UTC))
    assert tried(world, "ada", SITE_POLICY).turned == ()


def test_what_was_refused_and_would_be_allowed_is_told_too(world):
    world.home.joinpath("sites", "ada", "policy.cedar").write_text(
        SITE_POLICY + '\n@id("ada.closed")\nforbid (principal, action == Action::"plan", resource);', encoding="utf-8"
    )
    run = world.submit(data={"sites": ["ada"]})
    assert world.end(run).error == "Denied"
    found = tried(world, "ada", SITE_POLICY)
    assert (found.refused, found.allowed) == ((), ("job",))
    assert found.turned[0].what == "plan rows"
