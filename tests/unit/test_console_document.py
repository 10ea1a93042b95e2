"""What a person writes: job files with their task files, SQL lines, rows, schemas."""

import io
from pathlib import Path

import pytest

from atoll.console.document import DOCUMENTS, TASK_LIMIT, load_job, query_job, schemas
from atoll.console.rows import read_rows
from atoll.errors import Invalid, NotFound
from atoll.spec.job import TrainJob

JOB = """\
kind: train
name: heart
purpose: cardiology-research
task: {file: task.py, name: Heart}
data: {dataset: heart}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "task.py").write_text("class Heart: ...\n")
    return tmp_path


def test_a_train_job_travels_with_its_one_task_file(folder: Path):
    job, bundle = load_job(folder / "job.yaml", ["sync=diloco", "sync.period=7", "steps=70"])
    assert isinstance(job, TrainJob)
    assert job.sync is not None
    assert (job.sync.preset, job.sync.period, job.steps) == ("diloco", 7, 70)
    assert bundle is not None
    assert bundle.files == {"task.py": "class Heart: ...\n"}


def test_other_jobs_have_no_bundle(tmp_path: Path):
    path = tmp_path / "query.yaml"
    path.write_text("kind: query\nname: ages\npurpose: p\nsql: SELECT count(*) FROM heart\ndataset: heart\n")
    assert load_job(path)[1] is None


@pytest.mark.parametrize("name", ["../task.py", "/etc/hosts", "sub/task.py", "..\\\\task.py", "task.txt", ".py", ""])
def test_a_task_file_elsewhere_is_refused(folder: Path, name: str):
    with pytest.raises(Invalid, match=r"task\.file: .* is not a plain \.py file name"):
        load_job(folder / "job.yaml", [f'task.file="{name}"'])


def test_a_missing_task_file_suggests_the_near_miss(folder: Path):
    with pytest.raises(NotFound, match=r"no file 'tsk\.py' .*did you mean 'task\.py'\?"):
        load_job(folder / "job.yaml", ["task.file=tsk.py"])


def test_a_task_file_must_be_small_text(folder: Path):
    (folder / "task.py").write_bytes(b"x = '\xff'")
    with pytest.raises(Invalid, match="not UTF-8 text at byte 5"):
        load_job(folder / "job.yaml")
    (folder / "task.py").write_bytes(b"#" * (TASK_LIMIT + 1))
    with pytest.raises(Invalid, match="above 1,000,000 bytes"):
        load_job(folder / "job.yaml")


def test_a_query_finds_its_dataset_after_from():
    job = query_job('SELECT avg(age) FROM "heart" GROUP BY sex', "research", sites=["zurich"])
    assert (job.dataset, job.sites, job.purpose) == ("heart", ("zurich",), "research")
    assert query_job("select count(*)\nfrom Heart", "research").dataset == "heart"
    with pytest.raises(Invalid, match="names no dataset"):
        query_job("SELECT 1", "research")


def test_every_document_kind_has_a_closed_schema():
    everything = schemas()
    assert set(everything) == set(DOCUMENTS)
    for kind in DOCUMENTS:
        assert everything[kind]["additionalProperties"] is False, kind
        assert schemas(kind) == everything[kind]
    with pytest.raises(NotFound, match="did you mean 'deployment'"):
        schemas("deploymnt")


def test_rows_come_from_csv_json_and_lines(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("age,name,smokes,chol\n63,ann,true,\n41.5,bob,false,nan\n")
    (tmp_path / "rows.json").write_text('[{"age": 63}, {"age": null}]')
    (tmp_path / "rows.jsonl").write_text('{"age": 63}\n\n{"age": 41}\n')
    assert read_rows(str(tmp_path / "rows.csv"), ['{"age": 1}']) == [
        {"age": 63, "name": "ann", "smokes": True, "chol": None},
        {"age": 41.5, "name": "bob", "smokes": False, "chol": None},
        {"age": 1},
    ]
    assert read_rows(str(tmp_path / "rows.json"), []) == [{"age": 63}, {"age": None}]
    assert read_rows(str(tmp_path / "rows.jsonl"), []) == [{"age": 63}, {"age": 41}]


def test_rows_come_from_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"age": 63}'))
    assert read_rows("-", []) == [{"age": 63}]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("rows.csv", "a,b\n1\n", "line 2 has another number of cells"),
        ("rows.csv", "a,b\n1,2,3\n", "line 2 has another number of cells"),
        ("rows.json", "[1]", "row 1: 1 is no row"),
        ("rows.json", '{"a": 1}\n{', "line 2: not JSON"),
        ("rows.csv", "a\n", "none given"),
    ],
)
def test_what_is_no_row_is_named(tmp_path: Path, file: str, text: str, words: str):
    (tmp_path / file).write_text(text)
    with pytest.raises(Invalid, match=words):
        read_rows(str(tmp_path / file), [])
