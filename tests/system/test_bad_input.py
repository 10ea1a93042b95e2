"""What a person gets for a mistake, a full disk or an impatient hand: one sentence, an exit code, nothing left."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess

import pytest

from atoll.errors import Denied, Invalid, TaskFailed, Unavailable

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
CANCELLED = 130


@pytest.fixture(scope="module")
def place(make_home, tmp_path_factory):
    """A hub that runs, with one site berlin which stands still when told to."""
    home = make_home(tmp_path_factory.mktemp("place"))
    home.site("berlin", slow=1.0)
    home.start("hub", "start")
    home.seen("site.connected")
    yield home
    assert home.started[0].process.poll() is None, home.started[0].said  # no mistake of a user's ends a hub
    assert home.started[0].end() == 128 + signal.SIGTERM
    assert home.empty()


# --- documents and code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 3}, ["stepz", "unknown field", "did you mean 'steps'?"]),
        ({"steps": "many"}, ["steps: 'many'", "integer"]),
        ({"batch": 0}, ["batch: 0", "greater than 0"]),
        ({"sync__preset": "fedavgg"}, ["sync", "'fedavgg'", "did you mean 'fedavg'?"]),
        ({"kind": "trian"}, ["kind: 'trian'", "did you mean 'train'?"]),
        ({"task__file": "tusk.py"}, ["task.file", "'tusk.py'", "did you mean 'task.py'?"]),
        ({"data__holdout": 1.5}, ["data.holdout: 1.5", "less than 1"]),
    ],
)
def test_a_wrong_field_is_told_with_its_path_its_value_and_the_mend(place, changes, words):
    said = place.atoll("run", place.job(**changes), code=Invalid.exit_code)
    assert all(word in said for word in words), said
    assert len(said.strip().splitlines()) == 1


def test_a_file_that_is_no_document_is_told_with_the_place(place):
    said = place.atoll("run", str(place.path / "missing.yaml"), code=Invalid.exit_code)
    assert "missing.yaml: there is no such file; check the path" in said
    (place.path / "broken.yaml").write_text("kind: train\nname: [heart\n")
    said = place.atoll("run", str(place.path / "broken.yaml"), code=Invalid.exit_code)
    assert "line 3, column 1" in said


LINE = "import torch\nimport torchh\n"


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (LINE, {}, r"berlin: task\.py: line 2: ModuleNotFoundError: No module named 'torchh'"),
        ("", {"task__name": "Rysk"}, r"berlin: task\.py: there is no class 'Rysk'; did you mean 'Risk'\?"),
        ("", {"task__params": {"paus": 1}}, r"berlin: task\.params\.paus: .*did you mean 'pause'\?"),
        ("", {"task__params": {"fault": "nan"}}, r"berlin: loss is nan at step \d+ of the run; "),
        (
            "",
            {"task__params": {"fault": "vector", "after": 0}},
            r"berlin: loss at step 1 of the run is a tensor of shape \[16, 1\]",
        ),
        (
            "",
            {"task__params": {"fault": "number"}},
            r"berlin: loss at step \d+ of the run is float; return .* a scalar tensor",
        ),
        (
            "",
            {"task__params": {"fault": "constant"}},
            r"berlin: loss at step \d+ of the run does not depend on the model",
        ),
    ],
)
def test_a_task_that_breaks_is_told_with_its_site_and_place_and_publishes_nothing(place, task, changes, words):
    job = place.job(**changes, **({"task": task} if task else {}))
    said = place.atoll("run", job, code=TaskFailed.exit_code)
    assert re.search(words, said), said
    assert place.asked("models")["models"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__dataset": "patientz"}, ["data.dataset", "'patientz'", "did you mean 'patients'?"]),
        ({"data__statistics": ["aeg"]}, ["data.statistics", "'aeg'", "did you mean 'age'?"]),
        ({"data__statistics": ["sex"]}, ["data.statistics", "'sex'", "string"]),
        ({"data__sites": ["munich"]}, ["data.sites", "'munich'"]),
    ],
)
def test_a_missing_dataset_or_column_is_told_before_anything_runs(place, changes, words):
    said = place.atoll("run", place.job(**changes), code=Invalid.exit_code)
    assert all(word in said for word in words), said


# --- policies -------------------------------------------------------------------------------------------------------


def test_a_refusing_policy_is_told_in_words(place):
    said = place.atoll("run", place.job(purpose="marketing"), code=Denied.exit_code)
    words = "berlin refuses: purpose 'marketing' is not among the granted 'cardiology-research' (rule site.purpose)"
    assert words in " ".join(said.split())


def test_a_policy_with_a_typo_leaves_the_old_one_in_force_and_is_told(place):
    rules = place.path / "sites" / "berlin" / "policy.cedar"
    good = rules.read_text()
    rules.write_text(good.replace("permit (", "permitt (", 1))
    said = place.atoll("policy", "check", str(rules), code=Invalid.exit_code)
    typo = "line 28, rule site.purpose: invalid policy effect: permitt; did you mean 'permit'?"
    assert typo in said
    place.asked("run", place.job(name="still"))
    log = (place.path / "sites" / "berlin" / "agent.log").read_text()
    assert typo in log
    assert "stay in force" in log
    rules.write_text(good + '\n@id("berlin.closed")\nforbid (principal, action, resource);\n')
    said = place.atoll("run", place.job(), code=Denied.exit_code)
    assert "berlin refuses" in said
    assert "berlin.closed" in said
    rules.write_text(good)
    place.asked("run", place.job(name="again"))


# --- ports, tokens, two of a kind -----------------------------------------------------------------------------------


def test_a_port_in_use_is_told(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = f"port {port}: cannot be used (Address already in use); choose another with --port"
        assert words in home.atoll("hub", "start", "--port", port, code=Unavailable.exit_code)
        said = home.atoll("hub", "start", "--site-port", port, code=Unavailable.exit_code)
        assert f"port {port} for sites: cannot be used at 127.0.0.1 (Address already in use)" in said
    assert home.empty()


def test_a_second_hub_of_one_home_is_refused(place):
    said = place.atoll("hub", "start", code=Unavailable.exit_code)
    assert f"hub: one runs for {place.path} already, at http://127.0.0.1:" in said


def test_a_token_is_good_once_and_garbage_is_none(place, make_home, tmp_path):
    first, second = make_home(tmp_path / "first"), make_home(tmp_path / "second")
    token = place.asked("site", "invite", "oslo")["token"]
    for home in (first, second):
        home.site("oslo")
    joined = first.start("join", token)
    place.seen("site.connected", site__name="oslo")
    said = second.atoll("join", token, code=Denied.exit_code)
    assert "site 'oslo': this token was used, by another key; ask for another invitation" in said
    assert not (second.path / "sites" / "oslo" / "identity.json").exists()
    for garbage in ("garbage", token[:-9], "%%%", ""):
        said = second.atoll("join", garbage, code=Invalid.exit_code)
        assert "token: this is no join token; paste what `atoll site invite` printed, whole" in said
    head = place.head()
    assert joined.end(signal.SIGINT) == 0
    place.seen("site.disconnected", after=head, site="oslo")
    assert first.empty()
    assert second.empty()


# --- an impatient hand ----------------------------------------------------------------------------------------------


@pytest.fixture
def slow(home):
    """A home whose site stands still in the second round of its runs."""
    home.site("berlin", slow=1.0)
    (home.path / "hold").touch()
    return home


@pytest.mark.parametrize("when", ["run.submitted", "run.answered"])  # planning, working
def test_ctrl_c_cancels_the_run_and_leaves_no_process(slow, when):
    command = slow.start("run", slow.job(task__params={"hold": str(slow.path / "hold")}))
    run = slow.seen(when)[0].event.run
    assert command.end(signal.SIGINT) == CANCELLED, command.said
    assert "Traceback" not in command.said
    assert "cancelled" in command.said
    assert slow.empty(), slow.pids()
    assert [entry.event.run for entry in slow.journal("run.cancelled")] == [run]
    assert slow.journal("run.published") == []


def test_a_polite_kill_ends_cleanly_and_the_run_can_be_resumed(slow):
    command = slow.start("run", slow.job(task__params={"hold": str(slow.path / "hold")}))
    run = slow.seen("run.answered", answer__position=2)[0].event.run
    assert command.end(signal.SIGTERM) == 128 + signal.SIGTERM, command.said
    assert "Traceback" not in command.said
    assert slow.empty(), slow.pids()
    (slow.path / "hold").unlink()
    assert [(view["run"], view["state"]) for view in slow.asked("resume")] == [(run, "finished")]


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(slow):
    """The home's hub folder on a disk of its own; yields a function that fills it up, and one that empties it."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk: what a full one does was not tried")
    folder = slow.path / "hub"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no disk can be mounted here: what a full one does was not tried")
    filler = folder / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass

    yield fill, filler.unlink
    slow.close()
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(slow, small_disk, eventually):
    fill, empty = small_disk
    hold = slow.path / "hold"
    command = slow.start("run", slow.job(task__params={"hold": str(hold)}))
    run = slow.seen("run.merged", position=2)[0].event.run
    fill()
    hold.unlink()
    assert eventually(lambda: re.search("no space left|no room", slow.asked("runs", "show", run)["words"]))
    empty()
    assert command.process.wait(60) == 0, command.said
    assert len(slow.published(run)) == 1
    slow.verify()
