"""Breaking in from inside: what a hub, a scientist, another site or a file of theirs tries on a site and its data.

Each test is one attack, and says in a line what must come of it; docs/break-in.md lists them all.
"""

import pickle
import struct

import cedarpy
import pyarrow as pa
import pytest
import torch

from atoll.errors import Corrupt, Denied
from atoll.inner.checkpoint import read_tensors
from atoll.policy.defaults import SITE_POLICY
from atoll.policy.question import translate
from atoll.policy.rules import Rules
from atoll.registry.weights import load
from atoll.runtime.errand import Errand
from atoll.spec.fleet import Dataset
from atoll.spec.job import parse_job
from atoll.spec.policy import Crossing, Policy, Request
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform
from tests.memory import DATASET, PURPOSE, ended, world
from tests.undeployed import NothingDeployed
from tests.unit.houses import SIGNATURE, unread, vector
from tests.unit.places import STEPS, WAIT, assign, job

pytestmark = pytest.mark.system

# --- a hub that lies


FORGED = {
    "nobody asked to plan with it": (
        SITE_POLICY + '\n@id("lyon.closed")\nforbid (principal, action == Action::"plan", resource);',
        {},
        "rule lyon.closed",
    ),
    "another purpose": (SITE_POLICY, {"purpose": "marketing"}, "purpose 'marketing' is not among the granted 'care'"),
}


@pytest.mark.parametrize("work", ["probe", "measure", "initialise", "train", "evaluate", "predict", "query"])
@pytest.mark.parametrize("what", FORGED)
def test_a_forged_plan_is_refused_by_the_sites_own_rules_before_anything_is_done(lyon, errand, work, what):
    """Whatever stage the hub says that a run is at, the site asks its owner's rules anew, and journals that it did."""
    lyon.policy, fields, words = FORGED[what]
    kind = work if work in ("evaluate", "predict", "query") else "train"
    errand.assign(assign(work, job=job(kind, **fields)))
    assert words in lyon.hub.wait("refusal").words
    assert (lyon.workers.started, lyon.hub.given, lyon.hub.taken) == (0, [], [])
    assert [(one.action, one.decision.allowed) for one in lyon.decisions()] == [("plan", False)]


NOISE = (Transform(kind="clip", value=1.0), Transform(kind="noise", value=1.0))
DROPPED = {
    "the clip": (NOISE[:1], (), "must pass through clip at 1 or less before it leaves"),
    "most of the clip": (NOISE[:1], (Transform(kind="clip", value=5.0),), "must pass through clip at 1 or less"),
    "the noise": (NOISE, NOISE[:1], "must pass through noise of 1 or more times the clip"),
    "most of the noise": (
        NOISE,
        (NOISE[0], Transform(kind="noise", value=0.5)),
        "must pass through noise of 1 or more",
    ),
}


@pytest.mark.parametrize("what", DROPPED)
def test_a_plan_that_drops_a_required_clip_or_noise_brings_the_hub_nothing(lyon, errand, what):
    """The update is computed and stays: the crossing is refused, by the terms of the dataset, and journalled so."""
    required, wire, words = DROPPED[what]
    lyon.place.catalogue.require("rows", required)
    errand.assign(assign(sync=Sync(period=STEPS, merge="mean", wait={"patience": WAIT}, wire=wire)))
    told = lyon.hub.wait("refusal").words
    assert words in told
    assert "by the terms of 'rows'" in told
    assert lyon.hub.taken == []
    assert [crossed.decision.allowed for crossed in lyon.crossings("update")] == [False]


def test_an_attribute_that_is_gone_under_a_forbid_denies_although_cedar_allows():
    """Cedar skips a rule that cannot be evaluated; for Atoll there is no decision without all of them."""
    text = (
        '@id("all")\npermit (principal, action, resource);\n@id("cap.bytes")\nforbid (principal, action, resource)\n'
        "when { context.bytes + 9223372036854775807 > 9223372036854775806 };"
    )
    dataset = Dataset(name="patients", rows=9, fingerprint="sha256:" + 64 * "0", purposes=("care",))
    asked = Request(
        action="cross", dataset=dataset, crossing=Crossing(kind="update", direction="out", site="berlin", bytes=7)
    )
    question = translate(asked, 0.0)
    cedar = cedarpy.is_authorized(
        {
            "principal": question.principal,
            "action": {"type": "Action", "id": "cross"},
            "resource": question.resource,
            "context": question.context,
        },
        text,
        question.parties,
    )
    assert cedar.decision == cedarpy.Decision.Allow  # this is what must not get through
    decision = Rules(Policy(party="berlin", text=text)).decide(asked)
    assert (decision.allowed, decision.rules) == (False, ("cap.bytes",))
    assert "rule cap.bytes could not be evaluated" in str(decision)


# --- a site that lies


def test_a_replayed_update_counts_once_and_only_for_who_made_it(house):
    """The same answer again is neither read nor counted nor journalled, and nobody sends another's."""
    house.run()
    parcel = house.parcel("run", "ada")
    house.bring("ada", parcel)
    house.desk.take("ada", parcel, unread)
    with pytest.raises(Denied, match="a site speaks for itself only"):
        house.desk.take("mallory", parcel, unread)
    house.bring("bob", house.parcel("run", "bob"))
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    before = house.conductor.states["run"]
    house.desk.take("ada", parcel, unread)  # of the round before
    assert house.conductor.states["run"].arrived == before.arrived == ()
    assert len([event for event in house.happened("run.answered") if event.answers[0].site == "ada"]) == 2


# --- a scientist who asks too much


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Return what asks a hub with two sites by SQL, and gives the run once it is over."""
    rows = {
        name: pa.table(
            {"id": range(60), "age": [20 + row for row in range(60)], "sex": ["f"] * 30 + ["m"] * 29 + ["x"]}
        )
        for name in ("lyon", "oslo")
    }
    with world(tmp_path_factory.mktemp("asked"), rows, NothingDeployed()) as hub:

        def ask(sql, **more):
            known = {"kind": "query", "name": "ask", "purpose": PURPOSE, "dataset": DATASET, "sql": sql}
            return ended(hub, parse_job({**known, **more}, "job"), None)

        yield ask


READS = {
    "a file by a function": "SELECT count(*) FROM read_csv('/etc/passwd')",
    "a file by its name": "SELECT count(*) FROM '/etc/passwd'",
    "a setting": "SELECT count(*) FROM rows WHERE current_setting('home_directory') = 'x'",
    "the environment": "SELECT count(*) FROM rows WHERE getenv('HOME') = 'x'",
    "another dataset": "SELECT count(*) FROM rows WHERE id IN (SELECT id FROM others)",
    "a catalogue": "SELECT count(*) FROM information_schema.tables",
    "a database that it attaches": "ATTACH '/tmp/other.db' AS other",
    "an extension": "INSTALL httpfs",
    "by writing": "COPY rows TO '/tmp/rows.csv'",
    "a second statement": "SELECT count(*) FROM rows; ATTACH 'x'",
}


@pytest.mark.parametrize("what", READS)
def test_a_query_reads_nothing_but_its_dataset(asked, what):
    """Refused by name before an engine has seen it: only what is known to be harmless is written anew and run."""
    view = asked(READS[what])
    assert (view.state, view.error) == ("failed", "Invalid")
    assert "sql: " in view.words
    assert "is not allowed" in view.words or "is no dataset's name" in view.words


def test_a_query_returns_no_row_and_no_group_under_the_minimum(asked):
    """Rows are refused by form; a group of fewer rows than the dataset's minimum is held back at its site."""
    assert "rows never leave a site" in asked("SELECT * FROM rows").words
    assert "rows never leave a site" in asked("SELECT id, age FROM rows").words
    view = asked("SELECT sex, count(*) AS n FROM rows WHERE id > 9 GROUP BY sex")
    assert view.result.rows == (("f", 40), ("m", 58))
    assert asked("SELECT count(*), avg(age) FROM rows WHERE id = 17").result.rows == ()


def test_an_aggregate_of_an_expression_that_picks_one_person_is_refused(asked):
    """One query is enough where a sum may be of anything: aggregates are of columns as they are."""
    for what in ("sum(age * CAST(id = 17 AS INT))", "max(age / (1 + 1e9 * abs(id - 17)))", "min(coalesce(age, id))"):
        view = asked(f"SELECT {what} AS a FROM rows")
        assert (view.state, "could tell of one row" in view.words) == ("failed", True), what


def test_a_key_that_puts_one_person_by_a_value_among_others_who_are_known_is_refused(asked):
    """One query, in which the target is the tenth of the group that its age numbers."""
    view = asked(
        "SELECT CAST(id <> 17 AS INT) * (id // 9) + CAST(id = 17 AS INT) * age AS k, count(*) FROM rows GROUP BY k"
    )
    assert (view.state, "the key 'k' is made of id, age" in view.words) == ("failed", True)


def test_some_groups_of_one_answer_less_one_person_are_not_told_after_them(asked):
    """They are near none of its groups and not all of them together, but near two of the three."""
    assert len(asked("SELECT id % 4 AS k, sum(age) AS a FROM rows WHERE id % 4 < 3 GROUP BY k").result.rows) == 3
    view = asked("SELECT sum(age) AS a FROM rows WHERE id % 4 < 2 AND id <> 17")
    assert (view.state, view.error) == ("failed", "Denied")
    assert "could be subtracted" in view.words


def test_two_queries_whose_difference_is_one_person_are_not_both_answered(asked):
    """The second is refused, in the same words whether or not there is such a person."""
    assert asked("SELECT count(*) AS n, sum(age) AS a FROM rows").result.rows[0][0] == 120
    told = set()
    for where in ("id <> 17", "NOT (id = 17 AND sex = 'f')", "NOT (id = 17 AND sex = 'm')", "id < 59"):
        view = asked(f"SELECT count(*) AS n, sum(age) AS a FROM rows WHERE {where}")
        assert (view.state, view.error) == ("failed", "Denied")
        told.add(view.words.partition(" refuses: ")[2])
    assert len(told) == 1
    assert "or none, so the two answers could be subtracted" in told.pop()
    assert asked("SELECT count(*) AS n, avg(age) AS a FROM rows").state == "finished"


def test_pooled_statistics_with_and_without_a_holdout_of_one_row_are_not_both_told(lyon, errand):
    """What a train job pools goes through the same as a query: the second job is refused before a sum leaves."""
    errand.assign(assign("measure"))
    lyon.hub.wait("done")
    other = Errand(lyon.place, "other")
    try:
        data = {"dataset": "rows", "statistics": ["age"], "holdout": 0.02}
        other.assign(assign("measure", run="other", job=job(data=data)))
        assert "so the two answers could be subtracted" in lyon.hub.wait("refusal", run="other").words
    finally:
        other.end(keep=False)
        assert other.wait(WAIT)
    assert [one.crossing.run for one in lyon.crossings("query")] == ["run"]


# --- a file that bites


def test_a_poisoned_checkpoint_with_a_pickle_inside_is_refused_and_nothing_of_it_runs(tmp_path):
    """Weights and kept tensors are read by a format without code; whatever else is in the file, it is `Corrupt`."""
    ran = tmp_path / "ran"

    class Poison:
        def __reduce__(self):
            return ran.touch, ()

    path = tmp_path / "model.safetensors"
    torch.save({"weight": Poison()}, path)
    for poison in (path.read_bytes(), pickle.dumps(Poison()), struct.pack("<Q", 500) + pickle.dumps(Poison()) * 20):
        path.write_bytes(poison)
        with pytest.raises(Corrupt):
            load(poison)
        with pytest.raises(Corrupt):
            read_tensors(path)
    assert not ran.exists()
