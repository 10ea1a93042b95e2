"""How documents look in a terminal: the words are there, and no word can act on the terminal."""

import io

from rich.console import Console, RenderableType

from atoll.console import paces, records, show
from atoll.console.terminal import exit_code
from atoll.planner.capacity import Outlook
from atoll.registry.lineage import LineageTree, RunOrigin
from atoll.spec.event import Result
from atoll.spec.fleet import Dataset, Fleet, Site
from atoll.spec.model import Lineage, Model
from atoll.spec.pace import Pace
from atoll.spec.plan import Candidate, Layout, Plan, Price, Reason
from atoll.spec.run import DeploymentView, RunView, SiteProgress, SiteView, Traffic, Verdict
from atoll.spec.sync import Sync

DIGEST = "sha256:" + 64 * "a"
PRICE = Price(seconds=3.25, compute_seconds=1.0, transfer_seconds=2.25, bytes=1_234_567, memory_bytes=1 << 20)
PLAN = Plan(
    sites=("zurich", "basel"),
    layouts={"zurich": Layout(data=2), "basel": Layout()},
    sync=Sync(period=10),
    rounds=20,
    reasons=(Reason(by="price", words="the cheapest that is allowed"),),
    considered=(
        Candidate(
            name="gather the data",
            price=PRICE,
            rejected=(Reason(by="policy of zurich (rule hospital.no-rows)", words="rows do not leave"),),
        ),
        Candidate(name="fedavg, period 10", sync=Sync(period=10), price=PRICE),
    ),
)
MODEL = Model(
    name="heart",
    version=3,
    weights=DIGEST,
    code=DIGEST,
    task="Heart",
    file="task.py",
    signature=(),
    metrics={"auc": 0.9},
    lineage=Lineage(run="heart-1", job=DIGEST, plan=DIGEST, code=DIGEST),
)


def view(**fields: object) -> RunView:
    known = {"run": "heart-1", "name": "heart", "job_kind": "train", "purpose": "research", "user": "local"}
    return RunView.model_validate({**known, "state": "running", **fields})


def printed(shown: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=160, markup=False, highlight=False, emoji=False).print(shown)
    return out.getvalue()


def test_what_a_run_found_and_is_for_others_is_said_to_be():
    others = view(
        state="finished", user="ada", result=Result(metrics={"auc": 0.9}), losses=(0.5, 0.4)
    ).without_results()
    for shown in (show.outcome(others), show.progress(others), show.run(others)):
        assert "what it found is for ada, and for whom the hub's rules let release it" in printed(shown)
    assert "What 1 of them found is for others" in printed(show.runs([others, view()]))
    assert "found" not in printed(show.runs([view()]))


def test_a_plan_shows_prices_the_choice_and_who_removed_the_rest():
    text = printed(show.plan(PLAN))
    assert "✗  gather the data    3.25 s  1.23 MB" in text
    assert "rows do not leave [policy of zurich (rule hospital.no-rows)]" in text
    assert "✓  fedavg, period 10" in text
    assert "zurich (2), basel (1)" in text
    assert "20 of 10 steps" in text
    assert "- the cheapest that is allowed\n" in text


def test_a_plan_shows_how_updates_go_up_and_weights_down():
    wire = [{"kind": "topk", "share": 0.1}, {"kind": "int8"}]
    coded = Sync.model_validate({"period": 10, "wire": wire, "down": [{"kind": "int8"}]})
    assert "delta exchanged, up as topk + int8, down as int8\n" in printed(
        show.plan(PLAN.model_copy(update={"sync": coded}))
    )
    assert "delta exchanged\n" in printed(show.plan(PLAN))


def test_a_plan_shows_every_coordinate_that_is_not_as_where_nothing_is_said():
    def rounds(**sync):
        text = printed(show.plan(PLAN.model_copy(update={"sync": Sync.model_validate(sync)})))
        return next(line for line in text.splitlines() if line.startswith("Rounds: ")).removeprefix("Rounds: 20 of ")

    assert rounds(period=10) == "10 steps, delta exchanged"
    assert rounds(preset="streaming_diloco") == (
        "12 steps, delta exchanged, one of 4 fragments in turn, mixed in 5 steps later, 50% of a site's own staying"
    )
    assert rounds(preset="scaffold", seconds=30, keep_local=["head.*", "*.running_*"]) == (
        "10 steps or 30 s, delta exchanged, with control variates, head.* *.running_* staying at each site"
    )


SWEEP = {
    "objective": "auc",
    "direction": "maximise",
    "asked": 4,
    "best": 2,
    "trials": [
        {"number": 1, "run": "t1", "parameters": {"batch": 8}, "state": "finished", "objective": 0.7, "round": 3}
        | {"rounds": 3, "loss": 0.5, "words": "not registered"},
        {"number": 2, "run": "t2", "parameters": {"batch": 16}, "state": "finished", "objective": 0.8, "model": "m@1"},
        {"number": 3, "run": "t3", "parameters": {"optimiser.rate": 0.0123456}, "state": "running", "loss": 0.4},
    ],
}


def test_a_sweep_shows_its_trials_and_the_best_of_them():
    now = view(sweep=SWEEP, work="search", round=2, rounds=4)
    for text in (printed(show.progress(now)), show.progress_line(now)):
        assert "trials 2/4" in text
        assert "best auc 0.8 in trial 2" in text
    lines = printed(show.progress(now)).splitlines()
    rows = [" ".join(line.split()) for line in lines if line.strip()[:1].isdigit()]
    assert rows == [
        "1 batch 8 finished 3/3 0.5 0.7 t1 not registered",
        "2 batch 16 finished - - 0.8 t2 best, registered as m@1",
        "3 optimiser.rate 0.01235 running - 0.4 - t3",
    ]
    assert lines[-1] == "best so far  ▁█"
    ended = printed(show.outcome(view(state="finished", sweep=SWEEP, words="trial 2 is the best")))
    assert "trial 2 is the best\n" in ended
    assert "best, registered as m@1" in ended
    assert " sweep " in printed(show.runs([now]))


def test_a_live_frame_has_the_newest_trials_and_the_best_one():
    trials = [
        {"number": n, "run": f"t{n}", "parameters": {}, "state": "finished", "objective": 1 / n} for n in range(1, 31)
    ]
    now = view(sweep={"objective": "loss", "direction": "maximise", "asked": 30, "trials": trials, "best": 1})
    shown = printed(show.progress(now))
    assert [n for n in range(1, 31) if f" t{n} " in shown + " "] == [1, *range(21, 31)]
    assert all(f" t{n} " in printed(show.progress(now, most=0)) for n in range(1, 31))


def test_progress_shows_round_loss_bytes_and_each_site():
    sites = {"zurich": SiteProgress(connected=True, state="training", step=3, steps=10), "basel": SiteProgress()}
    now = view(work="train", round=4, rounds=20, loss=0.51, losses=(0.7, 0.51), sites=sites, bytes_up=2000)
    for text in (printed(show.progress(now)), show.progress_line(now)):
        for word in ("train", "round 4/20", "loss 0.5100", "up 2 kB", "zurich", "basel", "lost"):
            assert word in text, word
    assert "3/10" in printed(show.progress(now))


PACE = Pace(
    steps=64,
    examples_per_second=96.0,
    tokens_per_second=24_576.0,
    mfu=0.314,
    memory_bytes=412_000_000,
    memory_peak_bytes=430_000_000,
    step_seconds=(0.012, 0.0251),
    loss=0.51,
    straggler="rank 1 on b takes 2.1 times the median for an example",
)


def test_a_pace_is_shown_live_with_rate_mfu_memory_each_ranks_step_and_who_is_slow():
    site = SiteProgress(connected=True, state="training", step=3, steps=10, pace=PACE)
    now = view(work="train", sites={"zurich": site, "basel": site})
    shown = printed(show.progress(now))
    assert "24.6 k tokens/s, MFU 31.4%, 412 MB (most 430 MB), 12 / 25.1 ms" in shown
    assert "basel: rank 1 on b takes 2.1 times the median for an example" in shown
    assert "49.2 k tokens/s" in show.progress_line(now)


def test_the_pace_of_the_newest_round_is_shown_when_the_run_is_over():
    shown = printed(show.run(view(state="finished", paces={"zurich": PACE})))
    for words in ("Pace", "24.6 k tokens/s", "31.4%", "12 / 25.1 ms", "loss 0.5100", "zurich: rank 1 on b takes 2.1"):
        assert shown.count(words) == 1, words
    assert "Pace" not in printed(show.run(view(state="finished")))


def test_a_pace_leaves_out_what_is_not_known_and_sums_up_many_ranks():
    plain = Pace(examples_per_second=999.6, memory_bytes=1, memory_peak_bytes=2, step_seconds=(1.5, 2.0, 0.5, 1.0, 1.0))
    assert paces.words(plain) == "1 k examples/s, 1 B (most 2 B), 0.5 to 2 s in 5 ranks"
    assert paces.together([plain, PACE]) == "24.6 k tokens/s"
    assert paces.together([]) == ""


def test_words_of_others_cannot_act_on_the_terminal():
    hostile = "\x1b]0;owned\x07\x1b[31m[bold]red[/bold]\r:smile:"
    for text in (
        printed(show.runs([view(words=hostile, name=hostile)])),
        printed(show.outcome(view(state="failed", words=hostile))),
        printed(show.progress(view(sites={hostile: SiteProgress(state=hostile, connected=True)}))),
        show.progress_line(view(work=hostile)),
        printed(show.run(view(state="finished", paces={"a": Pace(straggler=hostile)}))),
        printed(show.sites([SiteView(name=hostile, owner=hostile, region="x", connected=True)])),
    ):
        assert not {"\x1b", "\x07", "\r"} & set(text)
        assert "[bold]red" in text, "markup of others is text"


def test_a_site_in_quarantine_is_shown_with_the_words_that_say_how_it_leaves():
    words = "ada: nan; 3 in a row: in quarantine until `atoll site release ada`"
    for connected, shown in ((True, "quarantine"), (False, "quarantine, away")):
        site = SiteView(name="ada", owner="me", region="x", connected=connected, words="killed", quarantine=words)
        text = " ".join(printed(show.sites([site])).split())
        assert f" {shown} " in text
        assert "killed" not in text
    assert "`atoll site release ada`" in text


def test_a_spark_keeps_the_last_value_and_the_width():
    assert show.spark([1.0]) == ""
    assert show.spark([3.0, 2.0, 1.0, 0.0])[0] == "█"
    assert show.spark([3.0, 2.0, 1.0, 0.0])[-1] == "▁"
    long = show.spark([float(value) for value in range(1000)], width=60)
    assert len(long) <= 60
    assert long[-1] == "█"
    assert set(show.spark([2.0, 2.0])) == {"▁"}


def test_an_outcome_shows_every_site_and_all_together():
    result = Result(metrics={"auc": 0.9, "accuracy": 0.8}, by_site={"basel": {"auc": 0.85}}, model="heart@3")
    text = printed(show.outcome(view(state="finished", seconds=12.0, result=result)))
    assert "basel      0.85         -" in text
    assert "all sites   0.9       0.8" in text
    assert "atoll models show heart@3" in text


def test_an_outcome_names_who_did_not_answer_in_time():
    result = Result(metrics={"auc": 0.9}, by_site={"basel": {"auc": 0.9}}, missing=("lyon", "oslo"))
    text = printed(show.outcome(view(state="finished", result=result)))
    assert "No answer outside training: lyon, oslo" in text
    whole = result.model_copy(update={"missing": ()})
    assert "in time" not in printed(show.outcome(view(state="finished", result=whole)))


def test_a_query_shows_its_rows_and_what_was_held_back():
    result = Result(columns=("sex", "count"), rows=((0, 12345), (None, 3)), suppressed=True)
    text = printed(show.outcome(view(state="finished", job_kind="query", result=result)))
    assert "12,345" in text
    assert "groups were held back" in text


def test_a_failed_run_says_why():
    assert "loss is not finite at step 3" in printed(
        show.outcome(view(state="failed", words="zurich: loss is not finite at step 3"))
    )


def test_exit_codes_tell_how_a_run_ended():
    ends = {state: exit_code(view(state=state)) for state in ("finished", "failed", "cancelled", "interrupted")}
    assert ends == {"finished": 0, "failed": 4, "cancelled": 130, "interrupted": 5}


def test_lists_show_what_they_list():
    traffic = [Traffic(site="basel", direction="out", kind="update", count=20, bytes=20_000, refused=1)]
    verdicts = [
        Verdict(journal="hub", entries=9, intact=True),
        Verdict(journal="basel", entries=4, intact=False, bad=2),
        Verdict(journal="geneva", entries=4, intact=False, words="is no journal"),
    ]
    dataset = Dataset(name="heart", rows=1234, fingerprint=DIGEST, purposes=("research",))
    shown = {
        "20 kB": records.traffic(traffic),
        "BROKEN at entry 2": records.verdicts(verdicts),
        "1,234": show.datasets(Fleet(sites=(Site(name="basel", datasets=(dataset,)),))),
        "http://127.0.0.1:9": show.deployments(
            [DeploymentView(name="heart", model="heart@3", url="http://127.0.0.1:9", state="answering")]
        ),
        "production": show.models([MODEL], {"heart": {"production": 3, "old": 1}}),
        "2023-11-14 22:13:20Z": records.journal(
            [{"seq": 1, "time": 1.7e9, "actor": "hub", "kind": "run.submitted", "words": "by local"}]
        ),
        "4 more sites": show.capacity([Outlook(change="4 more sites", now=PRICE, then=PRICE)]),
        "heart@3": show.prediction({"model": "heart", "version": 3, "digest": DIGEST, "answers": [{"risk": 0.25}]}),
        "none yet": show.runs([]),
    }
    for words, renderable in shown.items():
        assert words in printed(renderable)
    assert "None" not in printed(records.verdicts(verdicts))
    assert "old" not in printed(show.models([MODEL], {"heart": {"production": 3, "old": 1}}))


def test_lineage_is_a_tree_down_to_the_job():
    origin = RunOrigin(run="heart-1", user="ann", plan_digest=DIGEST, plan=PLAN, job_digest=DIGEST)
    lines = printed(
        show.lineage(LineageTree(model=MODEL, entry=7, published=1.0, origin=origin, code=DIGEST))
    ).splitlines()
    assert lines[0].startswith("model heart@3")
    assert [line.lstrip("│├└─ ").split()[0] for line in lines[1:4]] == ["run", "plan", "job"]
