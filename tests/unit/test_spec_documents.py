"""Documents: what they refuse and in which words, and that nothing is lost on the way out and back in."""

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import atoll.spec
from atoll.errors import Invalid, NotFound
from atoll.spec.document import (
    Document,
    canonical,
    digest,
    near_miss,
    override,
    parse,
    parse_json,
    read_yaml,
    sha256,
    write_yaml,
)
from atoll.spec.fleet import Device, Fleet, Profile, Site, SiteFile
from atoll.spec.job import EvaluateJob, PredictJob, QueryJob, TrainJob
from atoll.spec.model import Deployment, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Policy
from atoll.spec.sync import Sync


def every_document() -> list[type[Document]]:
    for module in pkgutil.iter_modules(atoll.spec.__path__):
        importlib.import_module(f"atoll.spec.{module.name}")
    found: list[type[Document]] = []
    waiting = Document.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("atoll.spec.") and not kind.__name__.startswith("_"):
            found.append(kind)
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__name__}")


EVERY = every_document()
TITLES = [kind.__name__ for kind in EVERY]
WRITTEN_BY_PEOPLE = [TrainJob, EvaluateJob, PredictJob, QueryJob, Fleet, Site, Policy, Sync, Plan, Model, Deployment]
# Fields that one another constrain, where the first allowed value of each would not be a document.
AGREEING: dict[str, dict[str, Any]] = {
    "Dataset": {"until": {"a": "2027-01-31T00:00:00Z"}},
    "Wait": {"kind": "quorum", "count": 2},
    "Transform": {"kind": "clip", "share": None, "level": None},
    "Sync": {"preset": None, "exchange": "delta", "blend": 0.0, "control": False, "seconds": None}
    | {"keep_local": [], "down": [], "hostile": None},
    "Bound": {"norm": 1.0, "times": None},
    "Mechanism": {"sampling": 0.5},
    "Privacy": {"epsilon": 4.0, "noise": None},
    "PrivateSteps": {"sampling": 0.5},
    "Compute": {"checkpointing": False, "compile": False},
    "Range": {"low": 1.0, "high": 3.0, "log": False, "step": 0.5, "integer": False},
    "Sweep": {"parameters": {"optimiser.rate": {"low": 1.0, "high": 3.0}}},
}


def filled(schema: dict[str, Any], defs: dict[str, Any]) -> Any:
    """Return a value that ``schema`` describes, with every field of every table filled in."""
    if "examples" in schema:
        return schema["examples"][0]
    if "$ref" in schema:
        return filled(defs[schema["$ref"].rsplit("/", 1)[-1]], defs)
    if choices := schema.get("anyOf", schema.get("oneOf")):
        return filled(choices[0], defs)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if schema.get("type") == "object":
        return filled_table(schema, defs)
    if schema.get("type") == "array":
        return [filled(schema["items"], defs)] if "items" in schema else []
    scalars = {
        "string": "sha256:" + "0" * 64 if "sha256" in schema.get("pattern", "") else "a",
        "integer": schema.get("minimum", 1),
        "number": schema.get("exclusiveMaximum", 3.0) / 2,
        "boolean": True,
    }
    return scalars.get(schema.get("type", ""), "anything")


def filled_table(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    table = {name: filled(field, defs) for name, field in schema.get("properties", {}).items()}
    if not table and isinstance(schema.get("additionalProperties"), dict):
        table = {"a": filled(schema["additionalProperties"], defs)}
    return {**table, **AGREEING.get(schema.get("title", ""), {})}


@cache
def example(kind: type[Document]) -> Document:
    schema = kind.model_json_schema()
    return parse(kind, filled(schema, schema.get("$defs", {})), kind.__name__)


@pytest.mark.parametrize("kind", EVERY, ids=TITLES)
def test_a_value_made_from_a_documents_own_schema_is_accepted_and_survives_json(kind: type[Document]) -> None:
    document = example(kind)
    assert parse_json(kind, canonical(document), "again") == document


@pytest.mark.parametrize("kind", EVERY, ids=TITLES)
def test_every_document_is_immutable_and_closed(kind: type[Document]) -> None:
    document = example(kind)
    with pytest.raises(Invalid, match="no_such_field: unknown field"):
        parse(kind, {**document.model_dump(mode="json"), "no_such_field": 1}, "x")
    for name in kind.model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(document, name, None)


@pytest.mark.parametrize("kind", WRITTEN_BY_PEOPLE, ids=lambda kind: kind.__name__)
def test_documents_that_people_write_survive_yaml(kind: type[Document], tmp_path: Path) -> None:
    document = example(kind)
    path = tmp_path / "document.yaml"
    path.write_text(write_yaml(document), encoding="utf-8")
    assert parse(kind, read_yaml(path), str(path)) == document


def test_yaml_leaves_defaults_out_and_keeps_the_order_of_the_class() -> None:
    text = write_yaml(Site(name="lyon", region="eu"))
    assert text == "name: lyon\nregion: eu\n"


def test_canonical_bytes_and_digests_never_change() -> None:
    # Chains, lineage and policies hold these digests: if this test fails, old journals no longer verify.
    device = Device(kind="cpu", flops=2e9, memory_bytes=1024)
    assert canonical(device) == b'{"flops":2000000000.0,"kind":"cpu","memory_bytes":1024}'
    assert digest(device) == "sha256:4a4f9e7aa574948f40fa4dc1c4d40c62e36556542aa5c6c5bd34e4a98019a880"
    assert canonical({"b": "é", "a": [1, None, True]}) == '{"a":[1,null,true],"b":"é"}'.encode()
    assert sha256(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_canonical_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"loss": float("nan")})


def test_a_site_of_several_nodes_starts_its_ranks_by_ray() -> None:
    document = {"name": "lyon", "nodes": [{"devices": [{}]}, {"devices": [{}]}]}
    with pytest.raises(Invalid, match="ranks on several nodes are started by Ray; set executor"):
        parse(SiteFile, document, "site.yaml")
    assert len(parse(SiteFile, {**document, "executor": {"kind": "ray"}}, "site.yaml").told.nodes) == 2


@pytest.mark.parametrize("text", ['{"parameters": 1, "step_seconds": NaN}', '{"parameters": -1, "step_seconds": 1}'])
def test_numbers_from_another_party_are_checked(text: str) -> None:
    with pytest.raises(Invalid, match=r"^a site: "):
        parse_json(Profile, text, "a site")


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "a\\b", "", ".", "..", ".hidden", "-flag", "Upper", "a b", "a\n", "a\0", "x" * 64, "é"]
)
def test_a_name_can_never_be_part_of_a_path_or_a_line(name: str) -> None:
    with pytest.raises(Invalid, match=r"^site: name: "):
        parse(Site, {"name": name}, "site")


@pytest.mark.parametrize("name", ["a", "7b", "heart-disease_v2.1", "x" * 63])
def test_plain_names_are_accepted(name: str) -> None:
    assert parse(Site, {"name": name}, "site").name == name


@pytest.mark.parametrize("text", ["sha256:" + "0" * 63, "sha256:" + "G" * 64, "md5:" + "0" * 64, "0" * 64, ""])
def test_a_digest_has_one_spelling(text: str) -> None:
    dataset = {"name": "patients", "rows": 1, "fingerprint": text}
    with pytest.raises(Invalid, match=r"site: datasets\.0\.fingerprint: "):
        parse(Site, {"name": "lyon", "datasets": [dataset]}, "site")


def test_an_unreadable_yaml_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(NotFound, match=r"job\.yaml: there is no such file; check the path"):
        read_yaml(path)
    path.write_text("name: heart\nsteps: [1, 2\n", encoding="utf-8")
    with pytest.raises(Invalid, match=r"job\.yaml: line 3, column 1: not valid YAML"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Invalid, match="cannot be read as text"):
        read_yaml(path)
    with pytest.raises(Invalid, match="cannot be read as text"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("text", [100_000 * "[", 50_000 * "{a: ", 20_000 * "- " + "a", 10_000 * "? " + "a"])
def test_yaml_that_is_nested_without_end_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Invalid, match="not valid YAML: more than 100 tables and lists in each other"):
        read_yaml(path)


NINE = ",".join(9 * ["*a{0}"])  # of the one before
BOMB = f"a0: &a0 [{9 * '1,'}]\n" + "".join(f"a{i + 1}: &a{i + 1} [{NINE.format(i)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a: "\\ud800"\n', "found invalid Unicode character escape code|surrogates"),
        (BOMB, "more than 1,000,000 values, with what its aliases repeat"),
        ("a: &x {b: [1, *x]}\n", "alias 'x' stands inside of what it repeats"),
        ("a: b: c\n", "line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: 1\nb: @c\n", "line 2, column 4: not valid YAML: found character '@' that cannot start any token"),
        ("a: *c\n", "line 1, column 4: not valid YAML: found undefined alias 'c'"),
        ("a: 2026-13-45\n", r"job\.yaml: not valid YAML: month must be in 1..12"),
    ],
)
def test_a_mistake_in_yaml_is_told_with_its_place_and_what_stands_there(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Invalid, match=words):
        read_yaml(path)


def test_yaml_never_builds_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(Invalid, match="not valid YAML"):
        read_yaml(path)


def test_set_changes_a_copy_and_makes_the_tables_it_needs() -> None:
    data = yaml.safe_load("steps: 3\nsync: {period: 5, outer: {rate: 0.5}}\n")
    changed = override(data, ["sync.outer.rate=0.7", "optimiser.kind=adam", "data.sites=[lyon, basel]"])
    assert changed == {
        "steps": 3,
        "sync": {"period": 5, "outer": {"rate": 0.7}},
        "optimiser": {"kind": "adam"},
        "data": {"sites": ["lyon", "basel"]},
    }
    assert data == {"steps": 3, "sync": {"period": 5, "outer": {"rate": 0.5}}}
    assert override(None, ["a.b=1"]) == {"a": {"b": 1}}


def test_set_keeps_a_preset_that_was_given_by_name_alone() -> None:
    assert override({"sync": "diloco"}, ["sync.period=20"]) == {"sync": {"preset": "diloco", "period": 20}}
    assert override({"sync": "diloco"}, ["sync=fedavg"]) == {"sync": "fedavg"}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("sync.period", "needs the form field.field=value"),
        ("=3", "needs the form field.field=value"),
        ("steps=[1", r"'\[1' is not a YAML value"),
        ("steps.more=1", "'more' is inside a value that is not a table"),
    ],
)
def test_set_tells_what_is_wrong_with_it(assignment: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        override({"steps": 3}, [assignment])


def test_a_near_miss_names_the_close_one_and_otherwise_lists_all() -> None:
    assert near_miss("cleveland1", ["cleveland", "hungary"]) == "; did you mean 'cleveland'?"
    assert near_miss("xyz", ["lyon", "basel"]) == "; there is basel, lyon"
    assert near_miss("xyz", []) == ""
