"""Logs of a home: long ones are set aside by whoever starts the processes that write them."""

from pathlib import Path

import pytest

from atoll.console.host import attach
from atoll.console.logs import LIMIT, trim_home, trim_site


def write(file: Path, size: int) -> Path:
    """Write a log of so many bytes whose last line tells that it is the last."""
    file.parent.mkdir(parents=True, exist_ok=True)
    last = b"the last line\n"
    with file.open("wb") as out:
        out.truncate(size - len(last))
        out.seek(0, 2)
        out.write(last)
    return file


@pytest.mark.parametrize("name", ["hub/logs/heart.log", "sites/bonn/agent.log", "sites/bonn/workers/worker-0.log"])
def test_of_a_long_log_the_end_is_kept_beside_a_new_one(tmp_path: Path, name: str):
    log = write(tmp_path / name, 2 * LIMIT)
    old = write(log.with_name(f"{log.name}.1"), 100)
    trim_home(tmp_path)
    assert not log.exists()
    kept = old.read_bytes()
    assert len(kept) == LIMIT
    assert kept.endswith(b"the last line\n")


def test_a_short_log_and_what_is_no_log_of_ours_stay(tmp_path: Path):
    short = write(tmp_path / "sites" / "bonn" / "agent.log", LIMIT)
    elsewhere = write(tmp_path / "elsewhere.log", LIMIT + 1)
    link = tmp_path / "sites" / "bonn" / "workers" / "worker-0.log"
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    trim_home(tmp_path)
    trim_site(tmp_path / "sites" / "bonn")
    assert (short.stat().st_size, elsewhere.stat().st_size) == (LIMIT, LIMIT + 1)
    assert link.is_symlink()


def test_a_site_that_joins_trims_its_own(tmp_path: Path):
    log = write(tmp_path / "workers" / "worker-1.log", LIMIT + 1)
    trim_site(tmp_path)
    assert [file.name for file in log.parent.iterdir()] == ["worker-1.log.1"]


def test_a_hub_that_starts_trims_the_logs_of_its_home(tmp_path: Path):
    log = write(tmp_path / "hub" / "logs" / "heart.log", LIMIT + 1)
    attach(tmp_path, sites=False).close()
    assert not log.exists()
    assert log.with_name("heart.log.1").stat().st_size == LIMIT
