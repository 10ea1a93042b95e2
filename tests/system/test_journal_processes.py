"""The journal under several processes at once, and under one that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import atoll
from atoll.journal.sqlite import Journal
from atoll.spec.event import Joined

pytestmark = pytest.mark.system

_WRITER = """
import sys
from pathlib import Path
from atoll.journal.sqlite import Journal
from atoll.spec.event import Joined
with Journal(Path(sys.argv[1]), "hub", patience=30) as journal:
    for number in range(int(sys.argv[2])):
        entries = journal.append(Joined(run=f"run-{number}", site="berlin"),
                                 Joined(run=f"run-{number}", site="zurich"), actor=sys.argv[3])
        print(entries[-1].seq, flush=True)
"""


def writer(path: Path, count: int, actor: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(atoll.__file__).parents[1])}
    command = [sys.executable, "-c", _WRITER, str(path), str(count), actor]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("after", [1, 17])
def test_a_writer_killed_in_the_middle_leaves_an_intact_chain(tmp_path: Path, after: int):
    path = tmp_path / "journal.db"
    process = writer(path, 1_000_000, "hub")
    assert process.stdout is not None
    promised = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    promised += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    with Journal(path, "hub") as journal:
        found = journal.verify()
        assert found.intact, found.words
        assert found.entries >= promised[-1]
        assert found.entries % 2 == 0  # each call's two events, or neither
        assert journal.append(Joined(run="run-1", site="berlin"), actor="hub")[0].seq == found.entries + 1
        assert journal.verify().intact


def test_processes_that_begin_one_journal_at_once_write_one_chain(tmp_path: Path):
    path = tmp_path / "journal.db"
    processes = [writer(path, 20, f"process:{number}") for number in range(3)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    with Journal(path, "hub", read_only=True) as journal:
        assert journal.verify().intact
        entries = list(journal.entries())
    assert len(entries) == 120
    assert {entry.actor for entry in entries} == {"process:0", "process:1", "process:2"}
