"""The questions put to each site's policy: which sites, in which order, with what in them."""

from typing import Any

import pytest

from atoll.errors import Invalid, NotFound
from atoll.planner import ask
from atoll.spec.fleet import Dataset, Fleet, Site
from atoll.spec.job import Job, parse_job
from atoll.spec.policy import Decision
from atoll.spec.user import User

USER = User(name="ada", roles=("scientist",))
PRINT = "sha256:" + "0" * 64


def site(name: str, rows: int = 100, dataset: str = "heart") -> Site:
    held = Dataset(
        name=dataset, rows=rows, bytes=rows * 50, columns={"age": "double", "ward": "string"}, fingerprint=PRINT
    )
    return Site(name=name, owner=f"{name}-hospital", region="eu", datasets=(held,))


FLEET = Fleet(sites=(site("zurich"), site("berlin", rows=300), site("oslo", dataset="lungs")))


def train(**fields: Any) -> Job:
    data = {"dataset": "heart", **fields.pop("data", {})}
    task = {"file": "task.py", "name": "Heart"}
    return parse_job(
        {"kind": "train", "name": "heart", "purpose": "research", "task": task, "data": data, **fields}, "job"
    )


def asked(job: Job) -> dict[str, tuple[ask.Question, ...]]:
    return ask.requests(job, FLEET, USER, PRINT)


def roles(questions: tuple[ask.Question, ...]) -> list[str]:
    return [question.role for question in questions]


def test_a_train_job_asks_each_holder_in_the_stated_order():
    questions = asked(train())
    assert list(questions) == ["berlin", "zurich"]
    order = ["plan", "open", "code", "model_in", "metric", "update", "model_out", "data"]
    assert roles(questions["zurich"]) == order


def test_statistics_add_a_query_before_metrics():
    order = roles(asked(train(data={"statistics": ["age"]}))["zurich"])
    assert order[order.index("query") + 1] == "metric"


def test_a_request_says_who_asks_where_and_what_for():
    plan = asked(train())["berlin"][0].request
    assert (plan.action, plan.user, plan.site, plan.owner) == ("plan", "ada", "berlin", "berlin-hospital")
    assert (plan.purpose, plan.job, plan.job_kind, plan.model, plan.code) == (
        "research",
        "heart",
        "train",
        "heart",
        PRINT,
    )
    assert plan.dataset is not None
    assert plan.dataset.name == "heart"


def test_crossings_carry_rows_bytes_and_the_pinned_wire():
    job = train(sync={"preset": "fedavg", "wire": [{"kind": "clip", "value": 1.0}, {"kind": "int8"}]})
    crossings = {q.role: q.request.crossing for q in asked(job)["berlin"] if q.request.crossing}
    assert crossings["metric"].rows == 300
    assert crossings["update"].wire == ("clip", "int8")
    assert (crossings["data"].kind, crossings["data"].bytes, crossings["data"].rows) == ("data", 15000, 1)
    assert (crossings["code"].direction, crossings["model_out"].direction) == ("in", "out")
    assert crossings["metric"].wire == ()


def test_a_site_that_only_evaluates_is_not_asked_for_updates_or_rows():
    questions = asked(train(data={"sites": ["berlin"], "evaluate": ["zurich"]}))
    assert roles(questions["zurich"]) == ["plan", "open", "code", "model_in", "metric"]
    assert "update" in roles(questions["berlin"])


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"kind": "evaluate", "model": "heart@1", "data": {"dataset": "heart"}}, ask.EVALUATE),
        ({"kind": "predict", "model": "heart@1", "data": {"dataset": "heart"}}, ask.PREDICT),
        ({"kind": "query", "sql": "select count(*) from heart", "dataset": "heart"}, ask.QUERY),
    ],
)
def test_jobs_that_train_nothing_ask_only_what_they_need(document: dict[str, Any], expected: tuple[str, ...]):
    job = parse_job({"name": "look", "purpose": "research", **document}, "job")
    questions = ask.requests(job, FLEET, USER, None)
    assert {name: tuple(roles(asked)) for name, asked in questions.items()} == {"berlin": expected, "zurich": expected}
    assert questions["zurich"][0].request.code == ""


def test_an_unknown_dataset_suggests_one_of_the_fleet():
    with pytest.raises(NotFound, match=r"data\.dataset: no site has a dataset 'hart'; did you mean 'heart'\?"):
        asked(train(data={"dataset": "hart"}))


def test_an_empty_fleet_says_how_to_register_a_dataset():
    with pytest.raises(NotFound, match="atoll data add"):
        ask.requests(train(), Fleet(), USER, None)


def test_a_named_site_must_exist_and_hold_the_dataset():
    with pytest.raises(NotFound, match=r"data\.sites: there is no site 'zurch'; did you mean 'zurich'\?"):
        asked(train(data={"sites": ["zurch"]}))
    with pytest.raises(NotFound, match=r"data\.evaluate: site 'oslo' has no dataset 'heart'; berlin, zurich has it"):
        asked(train(data={"evaluate": ["oslo"]}))
    with pytest.raises(Invalid, match=r"data\.sites: names no site"):
        asked(train(data={"sites": []}))


def test_statistics_need_a_numeric_column_that_is_there():
    with pytest.raises(NotFound, match=r"data\.statistics: dataset 'heart' of berlin has no column 'aeg'"):
        asked(train(data={"statistics": ["aeg"]}))
    with pytest.raises(Invalid, match=r"column 'ward' in dataset 'heart' of berlin is string, not a number"):
        asked(train(data={"statistics": ["ward"]}))


def test_decisions_are_matched_by_position_and_a_short_answer_is_refused():
    questions = asked(train())["zurich"]
    decisions = [Decision(allowed=question.role != "data", party="zurich") for question in questions]
    assert [role for role, said in ask.paired("zurich", questions, decisions).items() if not said.allowed] == ["data"]
    with pytest.raises(Invalid, match="zurich: answered 7 of 8 questions"):
        ask.paired("zurich", questions, decisions[:-1])
