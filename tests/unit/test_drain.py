"""What is written to a drain lies in its log: all of it, up to a bound, and nobody waits for it."""

import os

import pytest

from atoll.drain import Drain


def write(number, data):
    while data:
        data = data[os.write(number, data) :]


@pytest.mark.parametrize("size", [0, 1, 99_999, 100_000])
def test_all_that_is_written_up_to_the_bound_is_kept_behind_what_was_there(tmp_path, size):
    log = tmp_path / "worker-0.log"
    log.write_bytes(b"before\n")
    drain, data = Drain(log, most=100_000), os.urandom(size)
    write(drain.pipe, data)
    drain.close()
    assert log.read_bytes() == b"before\n" + data
    drain.close()


def test_what_is_too_much_is_let_go_and_said_so_once(tmp_path):
    drain, data = Drain(tmp_path / "log", most=100_000), os.urandom(1 << 20)
    write(drain.pipe, data)
    drain.close()
    kept = (tmp_path / "log").read_bytes()
    assert kept == data[:100_000] + b"\n... 100000 bytes of it are kept here, and no more\n"


def test_the_last_words_of_another_writer_are_kept_after_this_process_let_its_end_go(tmp_path):
    drain = Drain(tmp_path / "log")
    other = os.dup(drain.pipe)
    drain.shut()
    write(other, b"last words")
    os.close(other)
    drain.close()
    assert (tmp_path / "log").read_bytes() == b"last words"


def test_a_disk_that_is_full_costs_a_line_and_keeps_nobody_waiting(tmp_path, caplog):
    full = tmp_path / "log"
    full.symlink_to("/dev/full")
    drain = Drain(full)
    write(drain.pipe, bytes(1 << 20))
    drain.close()
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "the rest of it is lost: No space left on device"
    ]


def test_a_log_that_cannot_be_opened_leaves_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Drain(tmp_path / "away" / "log")
    assert len(os.listdir("/proc/self/fd")) == before
