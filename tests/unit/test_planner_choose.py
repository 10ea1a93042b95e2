"""The choice of a plan: what policy removes, what price prefers, what a pin fixes."""

import re
from typing import Any

import pytest

from atoll.errors import Denied, Invalid, TaskFailed, Unavailable
from atoll.planner import allowed, ask, explain
from atoll.planner.choose import choose, choose_sites
from atoll.spec.fleet import Dataset, Device, Fleet, Link, ModelShape, Node, Profile, Site
from atoll.spec.job import EvaluateJob, QueryJob, TrainJob
from atoll.spec.plan import Candidate, Layout, Plan
from atoll.spec.policy import Decision
from atoll.spec.user import LOCAL

Refused = dict[tuple[str, str], Decision]  # (site, role) -> what its policy says instead of yes

HOSPITALS = ("berlin", "oslo", "rome", "zurich")
ROWS = Decision(
    allowed=False, party="zurich", rules=("hospital.no-rows",), reasons=("patients' rows never leave the hospital",)
)


def fleet(names: tuple[str, ...] = HOSPITALS, bandwidth: float = 1e9, latency: float = 1e-3, devices: int = 1) -> Fleet:
    held = Dataset(name="heart", rows=200, bytes=20_000, fingerprint="sha256:" + "0" * 64)
    nodes = (Node(devices=(Device(),) * devices),)
    return Fleet(
        sites=tuple(Site(name=name, datasets=(held,), nodes=nodes) for name in names),
        links=tuple(Link(site=name, bandwidth=bandwidth, latency=latency) for name in names),
    )


def train(**fields: Any) -> TrainJob:
    data = {"dataset": "heart", **fields.pop("data", {})}
    task = {"file": "task.py", "name": "Heart"}
    return TrainJob.model_validate({"name": "heart", "purpose": "research", "task": task, "data": data, **fields})


def answers(
    job: TrainJob | EvaluateJob | QueryJob,
    of: Fleet,
    refused: Refused | None = None,
) -> dict[str, dict[ask.Role, Decision]]:
    """Everything is allowed but rows, and what is in `refused` by (site, role)."""
    refused = refused or {}
    given: dict[str, dict[ask.Role, Decision]] = {}
    for site, questions in ask.requests(job, of, LOCAL, None).items():
        words = f"{site} refuses: {ROWS.reasons[0]} (rule hospital.no-rows)"
        default = {"data": Decision(allowed=False, party=site, rules=("hospital.no-rows",), reasons=(words,))}
        given[site] = {
            q.role: refused.get((site, q.role)) or default.get(q.role) or Decision(allowed=True, party=site)
            for q in questions
        }
    return given


def profiles(of: Fleet, parameters: int = 1000, step: float = 0.01, memory: int = 0) -> dict[str, Profile]:
    shape = ModelShape(layers=20, block_parameters=parameters)
    measured = Profile(parameters=parameters, step_seconds=step, memory_bytes=memory, shape=shape)
    return {site.name: measured for site in of.sites}


def plan(job: TrainJob, of: Fleet, refused: Refused | None = None, **measured: Any) -> Plan:
    return choose(job, of, answers(job, of, refused), profiles(of, **measured))


def candidate(chosen: Plan, name: str) -> Candidate:
    return next(one for one in chosen.considered if one.name == name)


def refuses(site: str, words: str, rule: str = "hospital.purpose") -> Decision:
    return Decision(allowed=False, party=site, rules=(rule,), reasons=(words,))


def test_policy_removes_gathering_in_each_owners_own_words():
    chosen = plan(train(), fleet())
    gather = candidate(chosen, "gather the data")
    assert [reason.by for reason in gather.rejected] == [f"policy of {n} (rule hospital.no-rows)" for n in HOSPITALS]
    words = "refuses: patients' rows never leave the hospital (rule hospital.no-rows)"
    assert [reason.words for reason in gather.rejected] == [f"{name} {words}" for name in HOSPITALS]
    assert gather.price is not None
    line = (
        "gather the data: removed: berlin, oslo, rome and zurich refuse: "
        "patients' rows never leave the hospital (rule hospital.no-rows)"
    )
    assert line in explain.lines(chosen)


def test_gathering_that_every_policy_permits_is_beyond_this_version():
    permitted = {(name, "data"): Decision(allowed=True, party=name) for name in HOSPITALS}
    gather = candidate(plan(train(), fleet(), permitted), "gather the data")
    assert [(r.by, r.words) for r in gather.rejected] == [("capability", "this version moves no rows between sites")]


def test_one_refusal_does_not_settle_gathering_because_rows_could_move_there():
    permitted = {(name, "data"): Decision(allowed=True, party=name) for name in HOSPITALS if name != "zurich"}
    gather = candidate(plan(train(), fleet(), permitted), "gather the data")
    assert [r.by for r in gather.rejected] == ["policy of zurich (rule hospital.no-rows)", "capability"]


def test_a_slow_link_prefers_a_long_period():
    chosen = plan(train(steps=400), fleet(bandwidth=1e6, latency=0.05), parameters=1_000_000)
    assert chosen.sync.period == 50
    every_step = candidate(chosen, "exchange every step")
    assert every_step.price is not None
    assert chosen.price is not None
    assert every_step.price.seconds > 20 * chosen.price.seconds
    assert every_step.rejected[0].by == "price"


def test_a_fast_link_and_a_slow_step_exchange_every_step():
    job = train(steps=400, optimiser={"kind": "sgd", "rate": 0.3, "momentum": 0.9})
    chosen = plan(job, fleet(), step=0.5)
    assert (chosen.sync.exchange, chosen.sync.period, chosen.rounds) == ("gradient", 1, 400)
    assert (chosen.sync.outer.kind, chosen.sync.outer.rate, chosen.sync.outer.momentum) == ("sgd", 0.3, 0.9)
    assert "nearer to centralised training" in chosen.reasons[0].words


def test_adam_jobs_consider_diloco_and_exchange_with_outer_adam():
    job = train(steps=400, optimiser={"kind": "adamw", "rate": 0.001})
    chosen = plan(job, fleet(bandwidth=1e6), parameters=1_000_000)
    assert chosen.sync.preset == "diloco"
    assert chosen.sync.keep_optimiser
    every_step = candidate(chosen, "exchange every step").sync
    assert every_step is not None
    assert (every_step.outer.kind, every_step.outer.rate) == ("adam", 0.001)
    assert all(one.sync.keep_optimiser for one in chosen.considered if one.sync and one.sync.exchange == "delta")
    sgd = plan(train(steps=400), fleet(bandwidth=1e6), parameters=1_000_000)
    assert not any(one.name.startswith("diloco") for one in sgd.considered)


def test_weight_decay_cannot_be_exchanged_every_step():
    chosen = plan(train(optimiser={"kind": "adamw", "rate": 0.001, "weight_decay": 0.1}), fleet(), step=0.5)
    assert candidate(chosen, "exchange every step").rejected[0].by == "capability"
    assert chosen.sync.exchange == "delta"


@pytest.mark.parametrize(("steps", "period", "expected"), [(100, 30, 4), (90, 30, 3), (1, 30, 1), (31, 30, 2)])
def test_rounds_cover_every_step(steps: int, period: int, expected: int):
    assert plan(train(steps=steps, sync={"preset": "fedavg", "period": period}), fleet()).rounds == expected


@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_short_jobs_have_a_plan_and_sites_agree_more_than_once_where_they_can(steps: int):
    chosen = plan(train(steps=steps, optimiser={"weight_decay": 0.1}), fleet(bandwidth=1e4))
    assert chosen.rounds >= min(steps, 4)


def test_a_pinned_sync_is_taken_and_all_others_are_priced_and_set_aside():
    chosen = plan(train(sync={"preset": "fedadam", "period": 7}), fleet())
    assert chosen.sync.preset == "fedadam"
    assert chosen.reasons[0].by == "the job"
    others = [one for one in chosen.considered if one.name not in ("fedadam, period 7", "gather the data")]
    assert len(others) >= 3
    assert {reason.words for one in others for reason in one.rejected} == {"the job pins sync to fedadam, period 7"}
    assert all(one.price is not None for one in chosen.considered)
    assert "exchange every step: set aside: the job pins sync to fedadam, period 7" in explain.lines(chosen)


def test_one_site_trains_without_outer_exchange():
    chosen = plan(train(steps=95), fleet(names=("rome",)))
    assert candidate(chosen, "one site: no outer exchange").rejected == ()
    assert chosen.reasons[0].words.startswith("one site has nobody to exchange with")
    assert (chosen.sync.period, chosen.rounds, chosen.sync.keep_optimiser) == (10, 10, True)
    assert "gather the data" not in [one.name for one in chosen.considered]


def test_a_refusing_site_is_left_out_with_its_words():
    words = "zurich refuses: purpose 'research' is not among the granted 'care'"
    chosen = plan(train(), fleet(), {("zurich", "open"): refuses("zurich", words)})
    assert chosen.sites == ("berlin", "oslo", "rome")
    assert chosen.evaluators == chosen.sites
    assert set(chosen.layouts) == set(chosen.sites)
    left_out = [reason for reason in chosen.reasons if reason.by == "policy of zurich (rule hospital.purpose)"]
    assert [reason.words for reason in left_out] == [f"zurich does not train: {words}"]


def test_a_refusing_site_that_is_pinned_denies_the_job():
    job = train(data={"sites": ["rome", "zurich"]})
    with pytest.raises(Denied, match=r"data\.sites: zurich may not train: .*no updates leave .*hospital\.purpose"):
        plan(job, fleet(), {("zurich", "update"): refuses("zurich", "no updates leave")})


def test_when_every_site_refuses_all_their_words_are_told():
    of = fleet(names=("oslo", "rome"))
    refused = {(name, "plan"): refuses(name, f"{name} says no") for name in ("oslo", "rome")}
    with pytest.raises(Denied, match=r"no site may train: .*oslo says no.*rome says no"):
        plan(train(), of, refused)


def test_a_question_without_an_answer_is_a_refusal():
    job, of = train(), fleet()
    given = answers(job, of)
    del given["rome"]["update"]
    chosen = choose(job, of, given, profiles(of))
    assert "rome" not in chosen.sites
    assert any(r.words == "rome does not train: it gave no answer about letting updates out" for r in chosen.reasons)


def test_statistics_need_the_query_to_be_allowed():
    refused = {("oslo", "query"): refuses("oslo", "no sums")}
    assert "oslo" in plan(train(), fleet(), refused).sites
    job = train(data={"statistics": ["age"]})
    assert "oslo" not in plan(job, fleet(), refused).sites


def test_the_first_site_that_lets_a_model_out_makes_the_first_weights():
    of = fleet(names=("oslo", "rome"))
    closed: Refused = {("oslo", "model_out"): refuses("oslo", "no weights leave")}
    chosen = plan(train(), of, closed)
    assert (chosen.sites, chosen.initialiser) == (("oslo", "rome"), "rome")
    closed["rome", "model_out"] = refuses("rome", "nor ours")
    with pytest.raises(Denied, match=r"first weights: .*no weights leave.*nor ours"):
        plan(train(), of, closed)


def test_evaluators_are_the_named_sites_or_each_trainer_that_lets_metrics_out():
    silent: Refused = {("oslo", "metric"): refuses("oslo", "no metrics leave")}
    chosen = plan(train(), fleet(), silent)
    assert chosen.sites == HOSPITALS
    assert chosen.evaluators == ("berlin", "rome", "zurich")
    assert any(reason.words == "oslo is not evaluated: no metrics leave" for reason in chosen.reasons)
    elsewhere = plan(train(data={"sites": ["rome"], "evaluate": ["zurich"]}), fleet())
    assert (elsewhere.sites, elsewhere.evaluators) == (("rome",), ("zurich",))
    with pytest.raises(Denied, match=r"data\.evaluate: oslo may not evaluate"):
        plan(train(data={"evaluate": ["oslo"]}), fleet(), silent)


def test_a_site_that_lets_no_metric_out_and_so_no_profile_is_priced_like_the_slowest_other():
    silent: Refused = {("oslo", "metric"): refuses("oslo", "no metrics leave")}
    job, of = train(), fleet()
    speeds = {
        name: Profile(parameters=100, step_seconds=seconds)
        for name, seconds in zip(HOSPITALS, (1, 9, 3, 2), strict=True)
    }
    del speeds["oslo"]
    chosen = choose(job, of, answers(job, of, silent), speeds)
    assert chosen.sites == HOSPITALS
    assert any("priced like the slowest other one, rome" in reason.words for reason in chosen.reasons)
    allowed_to = choose(job, of, answers(job, of), speeds)
    assert allowed_to.sites == ("berlin", "rome", "zurich")


def test_ranks_are_used_where_the_step_is_worth_splitting():
    long = plan(train(), fleet(devices=4), step=0.5)
    assert {layout.ranks for layout in long.layouts.values()} == {4}
    short = plan(train(), fleet(devices=4), step=0.0005)
    assert {layout.ranks for layout in short.layouts.values()} == {1}
    others = [one for one in short.considered if one.name.endswith("ranks a site")]
    assert [one.layouts["rome"].ranks for one in others] == [2, 3, 4]
    assert all(one.rejected[0].by == "price" for one in others)


def test_what_does_not_fit_as_copies_is_cut_and_the_plan_says_why_and_what_else_there_was():
    chosen = plan(train(), fleet(names=("oslo", "rome"), devices=4), step=9.0, parameters=100_000_000)
    assert {layout.shard for layout in chosen.layouts.values()} == {4}
    why = next(reason for reason in chosen.reasons if "computes" in reason.words)
    assert (why.by, why.words) == (
        "capability",
        "oslo, rome: computes by shard 4, for copies do not fit: data 4: needs 2 GB a rank where a device has 1.07 GB",
    )
    others = {one.name.rpartition(", ")[2]: one.rejected[0] for one in chosen.considered if one.name.endswith("a site")}
    assert others["2 ranks a site"].words == (
        "does not fit at oslo: data 2: needs 2 GB a rank where a device has 1.07 GB"
    )
    assert {"1 rank a site", "2 ranks a site", "4 ranks a site", "shard 2 a site"} <= set(others)
    assert sum(not one.rejected for one in chosen.considered) == 1


def test_a_site_whose_devices_are_larger_copies_what_another_cuts():
    of = fleet(names=("oslo", "rome"), devices=4)
    large = of.sites[1].model_copy(update={"nodes": (Node(devices=(Device(memory_bytes=8 << 30),) * 4),)})
    mixed = of.model_copy(update={"sites": (of.sites[0], large)})
    chosen = plan(train(), mixed, step=9.0, parameters=100_000_000)
    assert (chosen.layouts["oslo"], chosen.layouts["rome"]) == (Layout(shard=4), Layout(data=4))
    assert any(reason.words.startswith("oslo: computes by shard 4") for reason in chosen.reasons)


def test_a_pinned_layout_is_the_last_word_but_for_a_model_that_does_not_fit():
    words = r"under data 4 and its device has 1\.07 GB; set layout: {shard: [234]}, or leave it out$"
    with pytest.raises(Unavailable, match=words):
        plan(train(layout={"data": 4}), fleet(names=("oslo",), devices=4), parameters=100_000_000)


def test_a_pinned_layout_is_kept_and_a_batch_of_one_is_not_split():
    assert plan(train(layout={"data": 2}), fleet()).layouts["rome"].ranks == 2
    assert plan(train(batch=1), fleet(devices=4), step=0.5).layouts["rome"].ranks == 1


def test_a_model_that_does_not_fit_is_told_before_it_starts():
    with pytest.raises(Unavailable, match=r"no site can train: berlin does not train: a rank needs 4 GB .* 1\.07 GB"):
        plan(train(), fleet(), parameters=250_000_000)


def test_a_site_that_measured_nothing_is_left_out_unless_it_is_named():
    of = fleet()
    measured = profiles(of)
    del measured["oslo"]
    job = train()
    chosen = choose(job, of, answers(job, of), measured)
    assert "oslo" not in chosen.sites
    assert any(reason.words.startswith("oslo does not train: it did not measure") for reason in chosen.reasons)
    named = train(data={"sites": ["oslo", "rome"]})
    with pytest.raises(Unavailable, match=r"data\.sites: oslo does not train"):
        choose(named, of, answers(named, of), measured)


def test_sites_that_build_different_models_fail_the_task():
    of = fleet(names=("oslo", "rome"))
    measured = {"oslo": Profile(parameters=10, step_seconds=1), "rome": Profile(parameters=12, step_seconds=1)}
    with pytest.raises(TaskFailed, match=r"10 at oslo, 12 at rome"):
        choose(train(), of, answers(train(), of), measured)


def test_a_wait_for_more_sites_than_train_is_refused():
    with pytest.raises(Invalid, match=r"sync\.wait\.count: 5 sites, and 4 can train; set it to at most 4"):
        plan(train(sync={"preset": "fedavg", "wait": {"kind": "quorum", "count": 5}}), fleet())


@pytest.mark.parametrize(
    ("sync", "sites", "words"),
    [
        (
            {"merge": "multi_krum", "hostile": 1},
            4,
            "sync.merge: multi_krum: needs 5 updates to tell which are odd, and a",
        ),
        ({"merge": "multi_krum", "hostile": 2}, 6, "a round may have 6; lower hostile to 1"),
        ({"merge": "median"}, 2, "sync.merge: median: needs 3 updates to tell which are odd, and a round may have 2"),
        ({"merge": "mean", "bound": {"times": 1.0}}, 2, "sync.bound.times: needs 3 updates"),
    ],
)
def test_a_merge_that_needs_more_sites_than_train_is_refused(sync, sites, words):
    names = ("bern", "kiel", "lyon", "nice", "oslo", "rome")[:sites]
    with pytest.raises(Invalid, match=re.escape(words)):
        plan(train(sync=sync), fleet(names=names))


def test_a_merge_that_has_enough_sites_is_planned():
    of = fleet(names=("bern", "kiel", "lyon", "oslo", "rome"))
    for sync in ({"merge": "multi_krum", "hostile": 1}, {"merge": "median"}, {"merge": "mean", "bound": {"norm": 1.0}}):
        assert plan(train(sync=sync), of).sync.merge == sync["merge"]
    assert plan(train(sync={"merge": "mean", "bound": {"norm": 1.0}}), fleet(names=("rome",))).sites == ("rome",)


def test_the_same_inputs_in_another_order_make_the_same_plan():
    job, of = train(steps=300), fleet(devices=2)
    turned = Fleet(sites=of.sites[::-1], links=of.links[::-1])
    given, measured = answers(job, of), profiles(of)
    again = choose(job, turned, dict(reversed(given.items())), dict(reversed(measured.items())))
    assert again.model_dump_json() == choose(job, of, given, measured).model_dump_json()


def test_a_plan_survives_its_json():
    chosen = plan(train(), fleet(devices=2))
    assert Plan.model_validate_json(chosen.model_dump_json()) == chosen


def test_every_reason_is_by_someone_and_in_words():
    words = "oslo refuses: purpose 'research' is not among the granted 'care'"
    plans = [
        plan(train(), fleet(devices=4), {("oslo", "open"): refuses("oslo", words)}),
        plan(train(sync="fedprox", layout={"data": 2}), fleet(devices=2)),
        plan(train(optimiser={"kind": "adamw", "weight_decay": 0.1}), fleet(names=("oslo",))),
    ]
    reasons = [r for p in plans for r in (*p.reasons, *(r for one in p.considered for r in one.rejected))]
    assert len(reasons) > 20
    for reason in reasons:
        assert reason.by.split()[0] in ("policy", "price", "the", "capability")
        assert len(reason.words.split()) >= 5
        assert not reason.words.endswith((":", " ", ";"))
    for one in plans:
        assert explain.lines(one)[0].startswith("chosen: ")
        assert sum(not considered.rejected for considered in one.considered) == 1


def test_other_jobs_run_where_they_may():
    of = fleet(names=("oslo", "rome"))
    evaluate = EvaluateJob.model_validate(
        {"name": "check", "purpose": "research", "model": "heart@1", "data": {"dataset": "heart"}}
    )
    silent: Refused = {("oslo", "metric"): refuses("oslo", "no metrics leave")}
    chosen = choose_sites(evaluate, answers(evaluate, of, silent), of)
    assert (chosen.sites, chosen.evaluators, chosen.rounds) == (("rome",), ("rome",), 0)
    assert explain.lines(chosen) == [
        "sites: rome",
        "oslo does not evaluate: no metrics leave [policy of oslo (rule hospital.purpose)]",
    ]
    query = QueryJob(name="count", purpose="research", sql="select 1", dataset="heart", sites=("oslo", "rome"))
    closed: Refused = {("oslo", "query"): refuses("oslo", "no sums")}
    with pytest.raises(Denied, match="sites: oslo may not answer: oslo does not answer: no sums"):
        choose_sites(query, answers(query, of, closed), of)
    assert choose_sites(query, answers(query, of), of).evaluators == ()


def test_the_hub_can_learn_whom_to_measure_before_it_chooses():
    job, of = train(), fleet()
    closed: Refused = {("rome", "code"): refuses("rome", "unknown code")}
    assert allowed.trainers(job, of, answers(job, of, closed)).sites == ("berlin", "oslo", "zurich")
