"""Job documents: every mistake is told with its path, its value and a mend; every example is a valid job."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from atoll.errors import Invalid
from atoll.spec.document import canonical, override
from atoll.spec.job import EvaluateJob, PredictJob, QueryJob, TrainJob, parse_job

ROOT = Path(__file__).parents[2]
HEART: dict[str, Any] = {
    "kind": "train",
    "name": "heart",
    "purpose": "cardiology-research",
    "task": {"file": "task.py", "name": "Heart"},
    "data": {"dataset": "patients"},
}


def test_the_shortest_train_job_leaves_the_rest_to_the_planner() -> None:
    job = parse_job(HEART, "job.yaml")
    assert isinstance(job, TrainJob)
    assert (job.sync, job.layout, job.model, job.data.sites) == (None, None, None, None)
    assert (job.steps, job.batch, job.seed, job.data.holdout) == (100, 32, 0, 0.2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepz": 3}, "job.yaml: stepz: unknown field; did you mean 'steps'?"),
        ({"steps": 0}, "job.yaml: steps: 0: Input should be greater than 0"),
        ({"steps": "many"}, "job.yaml: steps: 'many': Input should be a valid integer"),
        (
            {"data": {"dataset": "patients", "holdou": 0.1}},
            "job.yaml: data.holdou: unknown field; did you mean 'holdout'?",
        ),
        ({"data": {"dataset": "patients", "holdout": 1.0}}, "job.yaml: data.holdout: 1.0: Input should be less than 1"),
        ({"data": {"dataset": "patients", "sites": ["lyon", "../x"]}}, "job.yaml: data.sites.1: '../x': "),
        ({"task": {"file": "task.py"}}, "job.yaml: task.name: required and missing; add it"),
        ({"sync": "fedavgg"}, "job.yaml: sync: 'fedavgg': there is no preset 'fedavgg'; did you mean 'fedavg'?"),
        ({"sync": {"periood": 3}}, "job.yaml: sync.periood: unknown field; did you mean 'period'?"),
        (
            {"sync": {"outer": {"mometum": 0.9}}},
            "job.yaml: sync.outer.mometum: unknown field; did you mean 'momentum'?",
        ),
        ({"optimiser": {"rate": float("inf")}}, "job.yaml: optimiser.rate: inf: Input should be a finite number"),
        (
            {"optimiser": {"kind": "adamm"}},
            "job.yaml: optimiser.kind: 'adamm': Input should be 'sgd', 'adam' or 'adamw'",
        ),
        (
            {"layout": {"shard": 4, "expert": 3}, "batch": 8},
            "job.yaml: (document): a table: batch: 8: the layout's data x shard x expert make 12 shares",
        ),
        ({"layout": {"tensor": 0}}, "job.yaml: layout.tensor: 0: Input should be greater than 0"),
        ({"kind": "trian"}, "job.yaml: kind: 'trian'; did you mean 'train'?"),
    ],
)
def test_a_wrong_field_is_told_with_its_path_its_value_and_the_mend(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_job({**HEART, **change}, "job.yaml")
    assert str(caught.value).startswith(words)
    assert caught.value.exit_code == 2


def test_all_mistakes_are_told_at_once_one_line_each() -> None:
    with pytest.raises(Invalid) as caught:
        parse_job({**HEART, "stepz": 3, "batch": -1, "seed": -1}, "job.yaml")
    assert sorted(line.split(": ")[1] for line in str(caught.value).splitlines()) == ["batch", "seed", "stepz"]


def test_a_long_value_is_told_short() -> None:
    with pytest.raises(Invalid) as caught:
        parse_job({**HEART, "name": "x" * 5000}, "job.yaml")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("data", [None, [], "train", 3])
def test_a_job_that_is_no_table_is_told_how_to_begin(data: Any) -> None:
    with pytest.raises(Invalid, match=r"job\.yaml: a job is a table of fields; begin it with kind: train"):
        parse_job(data, "job.yaml")


def test_a_job_without_a_kind_is_told_to_add_one() -> None:
    with pytest.raises(Invalid, match=r"job\.yaml: kind: required and missing; add kind: train"):
        parse_job({"name": "heart"}, "job.yaml")


def test_set_reaches_into_a_job() -> None:
    job = parse_job(override({**HEART, "sync": "fedavg"}, ["sync.period=20", "steps=7", "task.params.hidden=16"]), "j")
    assert isinstance(job, TrainJob)
    assert job.sync is not None
    assert (job.sync.preset, job.sync.period, job.steps, job.task.params) == ("fedavg", 20, 7, {"hidden": 16})


@pytest.mark.parametrize(
    ("rest", "kind"),
    [
        ({"kind": "evaluate", "model": "heart@1", "data": {"dataset": "patients"}}, EvaluateJob),
        ({"kind": "predict", "model": "heart@best", "data": {"dataset": "patients"}}, PredictJob),
        ({"kind": "query", "sql": "SELECT count(*) FROM patients", "dataset": "patients"}, QueryJob),
    ],
)
def test_each_kind_of_job_is_read_back_from_json_as_itself(rest: dict[str, Any], kind: type) -> None:
    job = parse_job({"name": "ask", "purpose": "cardiology-research", **rest}, "job.yaml")
    assert type(job) is kind
    assert parse_job(json.loads(canonical(job)), "job.yaml") == job


def example_jobs() -> list[Path]:
    documents = sorted((ROOT / "examples").glob("**/*.yaml"))
    return [path for path in documents if "kind" in (yaml.safe_load(path.read_text(encoding="utf-8")) or {})]


def test_there_are_example_jobs_where_there_are_examples() -> None:
    assert example_jobs() or not (ROOT / "examples").exists()


@pytest.mark.parametrize("path", example_jobs(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_job_is_valid_and_its_task_file_is_there(path: Path) -> None:
    job = parse_job(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)
    if isinstance(job, TrainJob):
        assert (path.parent / job.task.file).is_file()


def fenced_jobs() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = path.read_text(encoding="utf-8").split("```yaml\n")[1:]
        found += [(path.name, block.split("```")[0]) for block in blocks if "\nkind:" in f"\n{block}"]
    return found


def test_the_documentation_shows_jobs() -> None:
    assert {name for name, _ in fenced_jobs()} >= {"README.md", "tutorial.md"}


@pytest.mark.parametrize(("name", "text"), fenced_jobs())
def test_every_job_shown_in_the_documentation_is_valid(name: str, text: str) -> None:
    assert parse_job(yaml.safe_load(text), name).name


def test_a_kind_that_is_no_text_is_told_like_any_other() -> None:
    with pytest.raises(Invalid, match=r"job\.yaml: kind: "):
        parse_job({**HEART, "kind": ["train"]}, "job.yaml")
