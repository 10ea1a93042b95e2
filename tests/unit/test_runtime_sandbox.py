"""What a sandbox is built of, and what is taken out of the one folder that may be written to in it."""

import os
import sys

import pytest

from atoll.errors import Denied, Invalid, TaskFailed, Unavailable
from atoll.runtime import sandbox
from atoll.runtime.cells import Cells
from atoll.runtime.local import LocalExecutor
from atoll.runtime.sandbox import Grant, arguments
from atoll.runtime.written import ordered_into, take
from atoll.spec.document import parse, parse_json, read_yaml
from atoll.spec.fleet import SiteFile
from atoll.spec.order import Ahead, Evaluate, Initialise
from atoll.spec.sandbox import Limits
from tests.unit.places import assign


def triples(words, option):
    return [words[at + 1 : at + 3] for at, word in enumerate(words) if word == option]


def test_a_room_shows_what_was_granted_over_a_home_that_is_hidden_whole(tmp_path):
    home = tmp_path / "sites" / "lyon"
    grant = Grant(home, (home / "code", tmp_path / "rows.parquet"), home / "work")
    words = arguments(grant, Limits(memory_bytes=1 << 30))
    hidden = words.index(str(tmp_path))
    assert words[hidden - 1] == "--tmpfs", "its hub's keys lie beside it"
    for path in (*grant.readable, grant.folder):
        assert words.index(str(path)) > hidden, "what comes later lies over what came before"
    assert [str(one) for one, _ in triples(words, "--bind")] == [str(grant.folder)]
    assert {"--unshare-all", "--unshare-user", "--as-pid-1", "--new-session"} <= set(words)
    assert "--share-net" not in words
    assert words[-2:] == ["--remount-ro", "/"]
    assert [words[at + 2 : at + 4] for at, word in enumerate(words) if word == "--size"] == [
        ["--tmpfs", "/tmp"],
        ["--tmpfs", "/dev/shm"],
    ]


def test_where_no_sandbox_can_be_had_workers_go_without_or_not_at_all(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.missing.cache_clear()
    try:
        on, required = LocalExecutor(mode="on"), LocalExecutor(mode="required")
    finally:
        sandbox.missing.cache_clear()
    assert (on.confined, on.refuses, required.confined) == (False, "", False)
    assert caplog.messages == [
        "sandbox: workers run without one: bubblewrap is not installed; "
        "install it from the distribution (apt-get install bubblewrap)"
    ]
    assert required.refuses.startswith("sandbox: it is required here, and there is none: bubblewrap is not installed")


def test_replicas_go_without_or_not_at_all_where_their_hub_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub" / "replicas.yaml"
    sandbox.missing.cache_clear()
    try:
        bare = Cells.of(tmp_path)([])
        assert bare.command("json.tool") == [sys.executable, "-P", "-m", "json.tool"]
        assert (bare.fds, dict(bare.environment)) == ((), {})
        assert caplog.messages == [
            "sandbox: replicas run without one: bubblewrap is not installed; "
            "install it from the distribution (apt-get install bubblewrap)"
        ]
        file.write_text("sandbox: required")
        with pytest.raises(Unavailable, match="requires one, and there is none: bubblewrap is not installed"):
            Cells.of(tmp_path)([])
        file.write_text("{sandbox: off, limits: {nice: 3}}")
        words = Cells.of(tmp_path)([]).command("json.tool")
        assert words[-2:] == ["-", "json.tool"]
        assert parse_json(Limits, words[-3].encode(), "limits") == Limits(nice=3)
    finally:
        sandbox.missing.cache_clear()
    file.write_text("limits: {order_seconds: 3}")
    with pytest.raises(Invalid, match=r"replicas\.yaml: limits: .*order_seconds is for who takes orders"):
        Cells.of(tmp_path)


def test_a_site_that_requires_one_and_has_none_refuses_a_run_before_any_worker(lyon):
    lyon.workers.refuses = "sandbox: it is required here, and there is none: bubblewrap is not installed"
    with pytest.raises(Denied, match="lyon refuses: sandbox: it is required here"):
        lyon.place.check_ranks(assign())


def test_rules_can_ask_for_a_sandbox(lyon):
    lyon.policy += '@id("in.one") forbid (principal, action, resource) when { !context.sandbox };'
    with pytest.raises(Denied, match=r"in\.one"):
        lyon.place.allow_code(assign())
    lyon.workers.confined = True
    lyon.place.allow_code(assign())


@pytest.mark.parametrize("field", [{"sandbox": "required"}, {"sandbox": "on"}, {"limits": {"nice": 3}}])
def test_what_ray_starts_can_be_in_no_sandbox_and_says_so(field):
    with pytest.raises(Invalid, match="Ray's own processes start its ranks, and none of them is in a sandbox"):
        parse(SiteFile, {"name": "lyon", "executor": {"kind": "ray", **field}}, "site.yaml")
    assert SiteFile.model_validate({"name": "lyon", "executor": {"kind": "ray", "sandbox": "off"}})


@pytest.mark.parametrize("word", ["off", "on", "required"])
def test_a_site_says_in_yaml_whether_it_wants_one(tmp_path, word):
    (tmp_path / "site.yaml").write_text(f"name: lyon\nexecutor: {{sandbox: {word}}}")
    assert parse(SiteFile, read_yaml(tmp_path / "site.yaml"), "site.yaml").executor.sandbox == word


@pytest.fixture
def orders(tmp_path):
    (tmp_path / "work").mkdir()
    asked = Initialise(seed=0, output=str(tmp_path / "initial.f32"))
    return asked, ordered_into(tmp_path / "work", asked)


def test_an_orders_files_are_written_in_one_folder_and_moved_to_where_they_belong(orders, tmp_path):
    asked, given = orders
    assert given.output == str(tmp_path / "work" / "initial.f32")
    take(asked, given)  # nothing was written: whoever looks for it says so
    (tmp_path / "work" / "initial.f32").write_bytes(b"weights")
    take(asked, given)
    assert (tmp_path / "initial.f32").read_bytes() == b"weights"
    assert list((tmp_path / "work").iterdir()) == []


def test_an_order_that_writes_nothing_is_left_as_it_is(tmp_path):
    order = Evaluate(weights=str(tmp_path / "weights.f32"), signature=())
    assert ordered_into(tmp_path, order) == order
    assert "round" in Ahead.model_fields


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "open"])
def test_what_is_no_file_that_was_written_and_closed_is_taken_by_nobody(orders, tmp_path, kind):
    asked, given = orders
    path, key = tmp_path / "work" / "initial.f32", tmp_path / "journal.key"
    key.write_bytes(b"of the site")
    held = None
    match kind:
        case "link":
            path.symlink_to(key)
        case "folder":
            path.mkdir()
            (path / "more").touch()
        case "pipe":
            os.mkfifo(path)
        case _:
            held = path.open("wb")
    with pytest.raises(TaskFailed, match=r"initial\.f32: is no file that its worker wrote and closed"):
        take(asked, given)
    assert not os.path.lexists(asked.output)
    assert key.read_bytes() == b"of the site"
    if held is not None:
        held.close()
