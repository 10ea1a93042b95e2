"""A site whose disk is full in the middle of a run: it says so, and goes on to the same bits once there is room."""

import contextlib
import os
import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture
def small(make_home, tmp_path):
    """A home whose site has its runs on a disk of its own, and functions that fill it up and empty it."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk: what a full one does was not tried")
    home = make_home(tmp_path)
    home.site("berlin", slow=1.0)
    folder = home.path / "sites" / "berlin" / "runs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no disk can be mounted here: what a full one does was not tried")
    filler = folder / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    yield home, fill, filler.unlink
    home.close()
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_run_waits_for_room_at_a_site_and_ends_as_if_there_had_been_room(small, eventually):
    home, fill, empty = small
    undisturbed = home.asked("run", home.job())
    hold = home.path / "hold"
    hold.touch()
    command = home.start("run", home.job(task__params={"hold": str(hold)}), "--json")
    run = home.seen("run.submitted", count=2)[-1].event.run
    home.seen("run.merged", run=run, position=2)
    fill()  # the worker stands in its second round: it will find no room for its update
    hold.unlink()

    def waits() -> bool:
        return home.asked("runs", "show", run)["sites"]["berlin"]["state"] == "waiting: no disk space"

    assert eventually(waits)
    empty()
    assert command.process.wait(60) == 0, command.said
    assert home.weights(run) == home.weights(undisturbed["run"])
    home.verify()
