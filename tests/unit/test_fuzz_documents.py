"""Documents that strangers write: each is what it says, or is refused in words, whatever its bytes."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.data.query import merge
from atoll.data.query import parse as parse_sql
from atoll.errors import AtollError, Invalid
from atoll.policy.defaults import HUB_POLICY, SITE_POLICY
from atoll.policy.rules import Rules
from atoll.runtime.bundle import write_bundle
from atoll.serving.http import _Refused, _rows
from atoll.serving.rows import Columns
from atoll.spec.document import canonical, parse, parse_json, read_yaml
from atoll.spec.event import Answer, Group
from atoll.spec.job import parse_job
from atoll.spec.message import MESSAGE
from atoll.spec.model import Bundle, Model
from atoll.spec.order import Reply
from atoll.spec.policy import Policy
from tests.unit.mutations import mutated, outcome

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
JOB = b"""kind: train
name: risk
purpose: care
task: {file: task.py, name: Risk, params: {rate: 0.1, names: [a, b]}}
data: {dataset: rows, statistics: [age], holdout: 0.2}
steps: 12
batch: 16
sync: {preset: fedavg, period: 3, wire: [{kind: clip, value: 1.0}, {kind: int8}]}
"""


@SAME_FOLDER
@given(mutated(JOB) | mutated(JOB.replace(b"name: Risk", b"name: &x Risk")))
def test_a_job(tmp_path, data):
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    job = outcome(lambda: parse_job(read_yaml(path), "job.yaml"))
    assert isinstance(job, AtollError) or canonical(job)


ANSWER = Answer(site="lyon", position=2, epoch=1, groups=(Group(key=("f", 3), rows=20, partials={"n": (20, 1.5)}),))
SAID = [
    json.dumps({"kind": "done", "run": "run", "answer": ANSWER.model_dump(mode="json")}).encode(),
    b'{"kind":"progress","run":"run","position":0,"state":"training","step":1,"steps":9}',
    b'{"kind":"attested","seen":3,"key":"atoll/lyon/0123456789abcdef+00112233+AQ==","checkpoint":"x","proof":["AA=="]}',
    b'{"kind":"release","run":"run","words":"zo\xc3\xab"}',
]


@given(st.sampled_from(SAID).flatmap(mutated))
def test_a_message_of_a_site_or_of_the_hub(data):
    try:
        message = MESSAGE.validate_json(data)
    except ValueError:  # which the session tells in words of its own
        return
    assert MESSAGE.validate_json(MESSAGE.dump_json(message)) == message


QUERY = parse_sql("SELECT sex, age, sum(dose) AS n FROM rows GROUP BY sex, age")


@given(mutated(ANSWER.model_dump_json().encode()))
def test_a_sites_answer_to_a_query(data):
    answer = outcome(parse_json, Answer, data, "answer")
    if isinstance(answer, Answer):
        outcome(merge, QUERY, [(answer.groups, answer.suppressed), (ANSWER.groups, False)])


@SAME_FOLDER
@given(mutated(b'{"files":{"task.py":"class Task: pass","a/b.py":"","..":"x"}}'), st.text(max_size=300))
def test_a_bundle_of_code(tmp_path, data, name):
    for bundle in (outcome(parse_json, Bundle, data, "code"), outcome(parse, Bundle, {"files": {name: "x"}}, "code")):
        if isinstance(bundle, Bundle):
            outcome(write_bundle, bundle, tmp_path / "code" / "folder")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["code"])
    assert {path.name for path in tmp_path.glob("code/*")} <= {"folder"}


@given(mutated(Reply(examples=3, loss=0.5, signature=({"name": "w", "shape": [2, 3]},)).model_dump_json().encode()))
def test_a_workers_reply(data):
    assert isinstance(outcome(parse_json, Reply, data, "worker"), Reply | Invalid)


MODEL = (
    b'{"name":"heart","version":1,"signature":[{"name":"w","shape":[2]}],"weights":"sha256:'
    + 64 * b"0"
    + b'","run":"r"}'
)


@given(mutated(MODEL))
def test_a_models_card(data):
    outcome(parse_json, Model, data, "model")


SQL = [
    b"SELECT sex AS s, count(*), avg(CAST(age AS INT)) FROM rows r WHERE r.age BETWEEN 3 AND 9 GROUP BY s ORDER BY 2",
    b"SELECT upper(sex) AS u, stddev(dose) AS d FROM \"rows\" WHERE NOT (ill IS NULL OR age IN (1, 2.5e3, 'a''b')) "
    b"GROUP BY ALL LIMIT 3",
]


@given(st.sampled_from(SQL).flatmap(mutated) | st.binary(max_size=200))
def test_a_query(data):
    query = outcome(parse_sql, data.decode(errors="surrogateescape"))
    assert isinstance(query, AtollError) or outcome(parse_sql, data.decode()) == query


@given(st.sampled_from([SITE_POLICY, HUB_POLICY]).map(str.encode).flatmap(mutated))
def test_a_policy(data):
    rules = outcome(lambda: Rules(Policy(party="lyon", text=data.decode(errors="replace"))))
    assert isinstance(rules, Rules | AtollError)


COLUMNS = Columns(
    {"age": "int64", "chol": "double", "sex": "string", "at": "timestamp[ns, tz=UTC]", "pixels": "list<item: float>"}
)
BODY = b'{"rows":[{"age":54,"chol":2.5,"sex":"f","at":"2026-11-02T08:00:00+00:00","pixels":[0,0.5]},{"age":null}]}'


@pytest.mark.parametrize("columns", [COLUMNS, Columns({})], ids=["typed", "free"])
@given(data=mutated(BODY))
def test_rows_to_predict_of(columns, data):
    try:
        rows = _rows(data)
        for number, row in enumerate(rows):
            columns.check(row, f"rows.{number}")
    except (Invalid, _Refused):
        return
    table = outcome(columns.table, rows)
    assert isinstance(table, Invalid) or table.num_rows == len(rows)
