"""What a sandbox is built of, and what is taken out of the one folder that may be written to in it."""

import os
import stat
import sys
from contextlib import ExitStack

import pytest

from atoll.errors import Denied, Invalid, TaskFailed, Unavailable
from atoll.runtime import sandbox, undialled
from atoll.runtime.cells import Cells
from atoll.runtime.local import LocalExecutor
from atoll.runtime.sandbox import Grant, arguments
from atoll.runtime.written import ordered_into, take
from atoll.spec.document import parse, parse_json, read_yaml
from atoll.spec.fleet import SiteFile
from atoll.spec.job import Optimiser
from atoll.spec.model import TensorSpec
from atoll.spec.order import Ahead, Evaluate, Initialise, Train
from atoll.spec.sandbox import Limits
from atoll.spec.sync import Sync
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
    assert words[words.index("--cap-add") + 1] == "CAP_KILL", "more than whoever goes in has"
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
        assert words[-3:] == ["-", "dials", "json.tool"]
        assert parse_json(Limits, words[-4].encode(), "limits") == Limits(nice=3)
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


@pytest.mark.parametrize("confined", [True, False])
def test_an_orders_files_are_written_in_one_folder_and_brought_to_where_they_belong(orders, tmp_path, confined):
    asked, given = orders
    assert given.output == str(tmp_path / "work" / "initial.f32")
    take(asked, given, confined)  # nothing was written: whoever looks for it says so
    for data in (b"weights", b"", os.urandom(3 << 20)):
        (tmp_path / "work" / "initial.f32").write_bytes(data)
        (tmp_path / "initial.f32.part").write_bytes(b"of a process that was killed")
        take(asked, given, confined)
        assert (tmp_path / "initial.f32").read_bytes() == data
        assert list((tmp_path / "work").iterdir()) == []


def test_an_order_that_writes_nothing_is_left_as_it_is(tmp_path):
    order = Evaluate(weights=str(tmp_path / "weights.f32"), signature=())
    assert ordered_into(tmp_path, order) == order
    assert "round" in Ahead.model_fields


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "socket"])
def test_what_is_no_file_is_taken_by_nobody(orders, tmp_path, kind, confined):
    asked, given = orders
    path, key = tmp_path / "work" / "initial.f32", tmp_path / "journal.key"
    key.write_bytes(b"of the site")
    match kind:
        case "link":
            path.symlink_to(key)
        case "folder":
            path.mkdir()
            (path / "more").touch()
        case "pipe":
            os.mkfifo(path)
        case _:
            os.mknod(path, stat.S_IFSOCK)
    with pytest.raises(TaskFailed, match=r"initial\.f32: is no file that its worker wrote and closed"):
        take(asked, given, confined)
    assert not os.path.lexists(asked.output)
    assert not os.path.lexists(asked.output + ".part")
    assert key.read_bytes() == b"of the site"


@pytest.mark.parametrize("how", ["link", "written", "read"])
def test_what_was_taken_out_of_a_sandbox_is_written_to_by_nobody_who_had_it_there(orders, tmp_path, how):
    asked, given = orders
    path, other = tmp_path / "work" / "initial.f32", tmp_path / "work" / "other"
    path.write_bytes(b"weights")
    with ExitStack() as held:
        match how:
            case "link":
                os.link(path, other)
            case "written":
                other = held.enter_context(path.open("r+b")).fileno()
            case _:
                other = f"/proc/self/fd/{held.enter_context(path.open('rb')).fileno()}"
        take(asked, given, confined=True)
        with open(other, "r+b", closefd=not isinstance(other, int)) as file:
            file.write(b"changed")
    assert (tmp_path / "initial.f32").read_bytes() == b"weights"
    assert (tmp_path / "initial.f32").stat().st_mode & 0o777 == 0o600


def trained(folder, **sync):
    files = {name: str(folder / name) for name in ("output", "state_out", "control_out", "local_out")}
    signature = (TensorSpec(name="weight", shape=(1000,)),)
    more = {"seed": 0, "weights": None, "done": 0, "steps": 2, "batch": 8, "optimiser": Optimiser()}
    return Train(signature=signature, sync=Sync(period=2, **sync), **files, **more)


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("output", 4000, True),
        ("output", 4001, False),
        ("state_out", 24_000, True),
        ("state_out", 1 << 40, False),
        ("control_out", 1 << 40, False),
        ("local_out", 1 << 20, True),
        ("local_out", 1 << 43, False),
    ],
)
def test_a_file_that_is_larger_than_it_can_be_is_not_copied(tmp_path, name, size, fits):
    (tmp_path / "work").mkdir()
    asked = trained(tmp_path)
    given = ordered_into(tmp_path / "work", asked)
    lies = tmp_path / "work" / name
    lies.touch()
    os.truncate(lies, size)  # takes no room
    if fits:
        take(asked, given, confined=True)
        assert (tmp_path / name).stat().st_size == size
    else:
        with pytest.raises(TaskFailed, match=f"{name}: is no file that its worker wrote"):
            take(asked, given, confined=True)
        assert not (tmp_path / name).exists()


def test_a_state_with_tensors_that_no_signature_names_may_be_as_large_as_the_disk_takes(tmp_path):
    (tmp_path / "work").mkdir()
    asked = trained(tmp_path, keep_local=("head.*",))
    (tmp_path / "work" / "state_out").write_bytes(bytes(3 << 20))
    take(asked, ordered_into(tmp_path / "work", asked), confined=True)
    assert (tmp_path / "state_out").stat().st_size == 3 << 20


def test_on_a_machine_whose_system_calls_are_not_known_there_is_no_filter_of_them(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    undialled.missing.cache_clear()
    try:
        assert undialled.missing() == "the numbers of this machine's system calls (riscv64) are not known here"
    finally:
        undialled.missing.cache_clear()
