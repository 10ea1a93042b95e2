"""Models: a view of the journal that finds versions, never registers twice, and walks lineage."""

from dataclasses import dataclass

import pytest

from atoll.errors import Corrupt, NotFound
from atoll.registry.lineage import LineageTree, columns, sources
from atoll.registry.models import Models
from atoll.spec.budget import Guarantee, Mechanism
from atoll.spec.document import digest, parse_json, sha256
from atoll.spec.event import Decided, Event, Expired, Merged, Planned, Published, Result, Submitted
from atoll.spec.fleet import Dataset, Fleet, Site
from atoll.spec.job import TrainJob
from atoll.spec.model import Aliased, Erased, Lineage, Model, Promised, Source, TensorSpec
from atoll.spec.plan import Layout, Plan
from atoll.spec.policy import Decision
from atoll.spec.sync import Sync

JOB = TrainJob.model_validate(
    {"name": "heart", "purpose": "research", "task": {"file": "t.py", "name": "T"}, "data": {"dataset": "d"}}
)
PLAN = Plan(sites=("lyon",), layouts={"lyon": Layout()}, sync=Sync(), rounds=3)
CODE = sha256(b"code")
ROWS = Dataset(name="d", rows=303, fingerprint=sha256(b"rows"), columns={"age": "int64", "chol": "null"})
FLEET = Fleet(sites=(Site(name="lyon", datasets=(ROWS,)),))


@dataclass(frozen=True)
class Line:
    seq: int
    time: float
    event: Event


def model(version: int = 1, run: str = "run-1", name: str = "heart", parents: tuple[str, ...] = ()) -> Model:
    return Model(
        name=name,
        version=version,
        weights=sha256(f"{name}{version}".encode()),
        code=CODE,
        task="T",
        file="t.py",
        signature=(TensorSpec(name="w", shape=(1,)),),
        lineage=Lineage(
            run=run,
            job=digest(JOB),
            plan=digest(PLAN),
            code=CODE,
            sources=(Source(site="lyon", dataset="d", fingerprint=sha256(b"rows"), rows=303),),
            decisions=("lyon allows it",),
            parents=parents,
        ),
    )


def journal(*events: Event) -> list[Line]:
    return [Line(number, 100.0 + number, event) for number, event in enumerate(events, 1)]


def road(made: Model) -> list[Event]:
    run = made.lineage.run
    return [
        Submitted(run=run, user="ana", job=JOB, code=CODE),
        Decided(action="submit", subject="heart", run=run, decision=Decision(allowed=True, party="hub")),
        Planned(run=run, plan=PLAN, fleet=FLEET),
        Expired(run=run, position=1),
        Published(run=run, model=made),
    ]


TWO = [*road(model(1)), *road(model(2, "run-2")), Aliased(model="heart", alias="champion", version=1, user="ana")]


def test_a_reference_is_a_version_an_alias_or_the_latest():
    models = Models.fold(journal(*TWO))
    assert models.get("heart@2").version == 2
    assert models.get("heart@champion").version == 1
    assert models.get("heart").version == 2
    assert models.aliases("heart") == {"champion": 1}


def test_an_alias_moves_with_the_last_word():
    models = Models.fold(journal(*TWO, Aliased(model="heart", alias="champion", version=2, user="ana")))
    assert models.get("heart@champion").version == 2


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("haert", "there is no 'haert'; did you mean 'heart'"),
        ("heart@3", "no version or alias '3'; there is 1, 2, champion"),
        ("heart@champ", "did you mean 'champion'"),
        ("heart@", "no version or alias ''"),
        ("heart@\u0662", "no version or alias"),
        ("heart@" + "9" * 5000, "no version or alias"),
    ],
)
def test_a_reference_that_nothing_answers_to_is_told(reference, words):
    with pytest.raises(NotFound, match=words):
        Models.fold(journal(*TWO)).get(reference)


def test_without_any_model_the_sentence_says_what_to_do():
    with pytest.raises(NotFound, match="train one first"):
        Models().get("heart")


def test_versions_are_listed_in_order_and_counted():
    models = Models.fold(journal(*TWO, *road(model(1, "run-3", name="digits"))))
    assert [one.reference for one in models.all()] == ["digits@1", "heart@1", "heart@2"]
    assert [one.version for one in models.versions("heart")] == [1, 2]
    assert models.versions("none") == ()
    assert models.next_version("heart") == 3
    assert models.next_version("none") == 1


def test_a_run_knows_what_it_published():
    models = Models.fold(journal(*TWO))
    assert models.of_run("run-2") == model(2, "run-2")
    assert models.of_run("run-9") is None


def test_the_same_publication_again_changes_nothing():
    models = Models.fold(journal(*TWO, Published(run="run-1", model=model(1))))
    assert len(models.all()) == 2


def test_a_version_published_with_other_content_is_corrupt():
    with pytest.raises(Corrupt, match=r"entry 12: publishes heart@1, which entry 5"):
        Models.fold(journal(*TWO, Published(run="run-9", model=model(1, "run-9"))))


def test_one_by_one_and_all_at_once_are_the_same_view():
    models = Models()
    for line in journal(*TWO):
        models.apply(line)
    assert models.all() == Models.fold(journal(*TWO)).all()


def test_lineage_walks_to_run_plan_job_code_data_and_decisions():
    tree = Models.fold(journal(*TWO)).lineage("heart@champion")
    assert tree.doubts == ()
    assert (tree.entry, tree.published, tree.aliases) == (5, 105.0, ("champion",))
    assert (tree.origin.run, tree.origin.user, tree.origin.submitted) == ("run-1", "ana", 101.0)
    assert (tree.origin.job, tree.origin.plan) == (JOB, PLAN)
    assert [decided.action for decided in tree.origin.decided] == ["submit"]
    assert tree.sources[0].fingerprint == sha256(b"rows")
    assert tree.decisions == ("lyon allows it",)
    assert parse_json(LineageTree, tree.model_dump_json(), "tree") == tree


def test_lineage_follows_parents():
    tree = Models.fold(journal(*TWO, *road(model(3, "run-3", parents=("heart@2",))))).lineage("heart@3")
    assert [parent.model.reference for parent in tree.parents] == ["heart@2"]
    assert tree.doubts == ()


def test_lineage_doubts_a_dataset_that_the_plan_did_not_know():
    other = FLEET.model_copy(update={"sites": (Site(name="lyon", datasets=(ROWS.model_copy(update={"rows": 9}),)),)})
    for fleet in (Fleet(), other):
        events = [Planned(run="run-1", plan=PLAN, fleet=fleet) if e.kind == "run.planned" else e for e in road(model())]
        [doubt] = Models.fold(journal(*events)).lineage("heart").doubts
        assert doubt == f"the plan's record has no lyon/d of 303 rows and {sha256(b'rows')}"


def test_what_a_model_saw_is_told_by_the_plans_fleet_and_only_for_the_sites_named():
    late = Dataset(name="d", rows=7, fingerprint=CODE, columns={"age": "double", "chol": "double"})
    fleet = Fleet(sites=(*FLEET.sites, Site(name="oslo", datasets=(late,)), Site(name="rome")))
    assert [(one.site, one.rows) for one in sources(fleet, ["oslo", "lyon", "rome", "away"], "d")] == [
        ("oslo", 7),
        ("lyon", 303),
    ]
    assert sources(fleet, ["lyon"], "d") == model().lineage.sources
    assert columns(fleet, ["lyon", "oslo"], "d") == {"age": "int64", "chol": "double"}
    assert columns(fleet, ["lyon"], "d") == {"age": "int64", "chol": "null"}
    assert (sources(fleet, ["lyon"], "e"), columns(fleet, ["rome"], "d")) == ((), {})


def test_lineage_names_the_sites_that_did_not_answer_in_time():
    made = model().model_copy(update={"metrics": {"auc": 0.90214}})
    *road_so_far, published = road(made)
    told = Merged(run="run-1", position=4, sites=("lyon",), result=Result(missing=("oslo", "rome")))
    tree = Models.fold(journal(*road_so_far, told, published)).lineage("heart")
    assert tree.origin.missing == ("oslo", "rome")
    [metrics] = [branch for branch in tree.branch().below if branch.text.startswith("metrics")]
    assert metrics.text == "metrics: auc 0.9021"
    assert [below.text for below in metrics.below] == ["no answer in time outside training: oslo, rome"]
    plain = Models.fold(journal(*road(model()))).lineage("heart").branch()
    assert not any(branch.text.startswith("metrics") for branch in plain.below)


def test_lineage_says_what_the_journal_does_not_bear_out():
    loop = model(1, "run-1", parents=("heart@1", "lost@4"))
    tree = Models.fold(journal(Published(run="run-1", model=loop))).lineage("heart@1")
    assert tree.parents == ()
    assert [words.split(" ")[0:4] for words in tree.doubts] == [
        ["the", "journal", "has", "no"],
        ["the", "journal", "has", "no"],
        ["its", "parent", "heart@1", "was"],
        ["its", "parent", "lost@4", "was"],
    ]


def test_an_erased_version_is_no_answer_to_any_reference_and_its_lineage_is_kept():
    made = [model(version, f"run-{version}") for version in (1, 2)]
    events = [event for one in made for event in road(one)]
    alias = Aliased(model="heart", alias="champion", version=2, user="ada")
    models = Models.fold(journal(*events, alias, Erased(model="heart", version=2, user="ada")))
    assert models.all() == (made[0],)
    assert models.erased() == (made[1],)
    assert models.aliases("heart") == {}
    assert models.get("heart") == made[0]
    assert models.next_version("heart") == 3, "a number is never given twice"
    with pytest.raises(NotFound, match=r"heart@2 was erased by ada on \d{4}-"):
        models.get("heart@2")
    assert (models.same("heart", made[0]), models.same("heart@2", made[1])) == (True, False)
    tree = models.lineage("heart@2")
    assert (tree.model, tree.doubts) == (made[1], ())
    assert tree.branch().text == f"model heart@2 ({tree.erased})"


def test_lineage_doubts_code_that_was_not_submitted():
    events = road(model(1))
    events[0] = Submitted(run="run-1", user="ana", job=JOB, code=sha256(b"other"))
    assert sha256(b"other") in Models.fold(journal(*events)).lineage("heart").doubts[0]


def test_a_models_card_states_what_its_run_promises_and_what_left_beside_that():
    mechanism = Mechanism(multiplier=1.1, steps=300, sampling=0.12)
    counted = Guarantee(unit="record", epsilon=3.97503, delta=1e-5, mechanism=mechanism, accountant="pld")
    known = {site: Promised(site=site, dataset="d", guarantee=counted) for site in ("lyon", "oslo")}
    bare = Promised(site="rome", dataset="d")
    made = model().model_copy(update={"promises": (*known.values(), bare), "metrics": {"auc": 0.9}})
    told = [b for b in Models.fold(journal(*road(made))).lineage("heart").branch().below if "privacy" in b.text]
    words = "record-level (epsilon 3.9751, delta 1e-05): 300 steps of noise 1.1, Poisson sampling 0.12, PLD accountant"
    [privacy] = told
    assert [one.text for one in privacy.below] == [
        f"{words} at 2 sites",
        "no privacy promise at rome",
        "not under it, for they have no noise: metrics",
    ]
    alike = model().model_copy(update={"promises": tuple(known.values())})
    assert alike.stated(brief=True) == ("record-level (epsilon 3.9751, delta 1e-05) at 2 sites",)
    assert model().stated() == ("no privacy promise",)


def test_the_branch_names_every_part():
    branch = Models.fold(journal(*TWO)).lineage("heart@1").branch()
    texts = [branch.text, *(below.text for below in branch.below)]
    assert texts[0] == "model heart@1 (champion)"
    assert texts[1] == "run run-1 (by ana)"
    assert texts[2] == "privacy: no privacy promise"
    assert texts[4] == "data: 303 rows at 1 sites"
    assert branch.below[0].below[0].below[0].text == f"job {digest(JOB)} (train heart, purpose research)"
