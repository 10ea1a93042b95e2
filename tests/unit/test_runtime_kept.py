"""What a site keeps of a run on disk: fence, weights, updates, states. Whole and verified, or not there."""

import shutil

import numpy as np
import pytest

from atoll.errors import Corrupt, Invalid
from atoll.runtime.disk import BOOT, appearing, file_crc, mapped
from atoll.runtime.kept import Kept, RunFolder, kept_runs


def vector(size=8, seed=1):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".spare")


def opened(tmp_path, epoch=0, position=0):
    folder = RunFolder(tmp_path / "run")
    folder.open(epoch, position)
    return folder


def kept(folder, position, state=False, residual=False):
    """Keep an update as a round does; with a ``residual``, as one with feedback does."""
    sent = folder.wire(position) if residual else folder.update(position)
    vector().tofile(folder.update(position))
    vector().tofile(sent)
    if state:
        folder.state(position).write_bytes(f"state {position}".encode())
    if residual:
        vector(position).tofile(folder.residual(position))
    made = Kept(
        "sha256:w",
        32,
        0.5,
        1.25,
        state_crc=file_crc(folder.state(position)) if state else None,
        residual_crc=file_crc(folder.residual(position)) if residual else None,
    )
    folder.keep(position, made)
    return made


def reopened(folder):
    """What the next agent finds."""
    return RunFolder(folder.path)


# --- the fence


def test_nothing_is_made_before_the_first_assignment(tmp_path):
    RunFolder(tmp_path / "run")
    assert names(tmp_path) == []


def test_an_assignment_older_than_one_already_seen_is_refused(tmp_path):
    folder = opened(tmp_path, 1, 4)
    folder.open(1, 4)  # the hub may repeat itself
    folder.open(1, 5)
    for epoch, position in [(0, 9), (1, 4), (0, 0)]:
        with pytest.raises(Invalid, match=f"epoch {epoch}, stage {position} came after epoch 1, stage 5"):
            folder.open(epoch, position)
    folder.open(2, 0)


def test_the_epoch_outlives_the_agent(tmp_path):
    opened(tmp_path, 3, 7)
    again = RunFolder(tmp_path / "run")
    with pytest.raises(Invalid, match="out of date"):
        again.open(2, 9)
    again.open(3, 0)


def test_an_epoch_that_is_no_number_is_told(tmp_path):
    opened(tmp_path, 3, 7)
    (tmp_path / "run" / "epoch").write_text("")
    with pytest.raises(Corrupt, match="run is no number"):
        opened(tmp_path, 3, 7)


# --- updates


def test_a_kept_update_is_found_by_the_next_agent_for_as_long_as_the_machine_runs(tmp_path):
    folder = opened(tmp_path)
    made = kept(folder, 4)
    assert reopened(folder).kept(4) == folder.kept(4) == made
    assert np.array_equal(mapped(folder.update(4)), vector())
    assert folder.kept(5) is None
    mark = folder.path / "update-4.json"
    text = mark.read_text()
    mark.write_text(text.replace(BOOT, "another start of the machine"))
    assert folder.kept(4) is reopened(folder).kept(4) is None
    mark.write_text(text)
    assert folder.kept(4) == made
    folder.update(4).unlink()
    assert folder.kept(4) is None


def test_each_update_has_a_name_of_its_own_also_when_its_round_is_done_again(tmp_path):
    folder = opened(tmp_path)
    tokens = {kept(folder, position).token for position in (4, 4, 5)}
    assert len(tokens) == 3
    assert reopened(folder).kept(4).token in tokens


def test_an_update_in_doubt_is_made_again_and_what_lies_beside_it_is_looked_through(tmp_path):
    folder = opened(tmp_path)
    for position in (3, 4):
        kept(folder, position, state=True)
    folder.state(3).write_bytes(b"changed")
    folder.doubt(4)
    assert folder.kept(4) is None
    with pytest.raises(Corrupt, match="after stage 3"):
        folder.last_state(4)


def test_a_round_that_begins_anew_has_no_mark_of_an_earlier_try(tmp_path):
    folder = opened(tmp_path)
    kept(folder, 4, residual=True)
    folder.begin(4)
    assert names(folder.path) == []
    kept(folder, 4)
    vector(7).tofile(folder.update(4))  # as another one is about to be marked
    folder.begin(4)
    assert (folder.kept(4), reopened(folder).kept(4)) == (None, None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weights": "x"}', "null"])
def test_a_mark_that_is_no_mark_counts_for_nothing(tmp_path, text):
    folder = opened(tmp_path)
    kept(folder, 4)
    (folder.path / "update-4.json").write_text(text)
    assert folder.kept(4) is None


def test_settling_drops_what_only_earlier_rounds_needed(tmp_path):
    folder = opened(tmp_path)
    for position in (2, 3, 7):
        kept(folder, position, state=True)
    folder.checkpoint(6).mkdir(parents=True)
    (folder.checkpoint(6) / "part").write_bytes(b"of a round that ended without us")
    folder.settle(7)
    folder.work.rmdir()  # nothing is left in it
    assert names(folder.path) == [
        "state-3.safetensors",
        "state-7.safetensors",
        "update-3.json",
        "update-7.f32",
        "update-7.json",
    ]


# --- the inner optimiser's state


def test_a_round_begins_from_the_newest_state_before_it_whichever_rounds_were_missed(tmp_path):
    folder = opened(tmp_path)
    for position in (2, 3, 7):
        kept(folder, position, state=True)
    assert folder.last_state(8) == folder.state(7)
    assert folder.last_state(7) == folder.state(3)  # the round done again begins where it began
    assert folder.last_state(2) is None
    folder.state(9).write_bytes(b"of a round that was not finished")
    assert folder.last_state(10) == folder.state(7)


def test_a_state_that_was_changed_or_is_gone_is_no_state_to_begin_from(tmp_path):
    folder = opened(tmp_path)
    for position in (2, 3):
        kept(folder, position, state=True)
    folder.state(3).write_bytes(b"state 2")
    with pytest.raises(Corrupt, match="after stage 3 is not what was kept"):
        reopened(folder).last_state(4)
    folder.state(3).unlink()
    for found in (folder, reopened(folder)):
        with pytest.raises(Corrupt, match="after stage 3"):
            found.last_state(4)
        assert found.last_state(3) == folder.state(2)


# --- what updates lost on the wire


def test_an_update_with_feedback_is_kept_as_it_is_sent_with_what_it_lost(tmp_path):
    folder = opened(tmp_path)
    made = kept(folder, 4, residual=True)
    assert names(folder.path) == ["residual-4.f32", "update-4.json", "update-4.wire"]
    assert reopened(folder).kept(4) == made
    for found in (folder, reopened(folder)):
        assert np.array_equal(found.last_residual(4, 8), vector(4))
        assert np.array_equal(found.last_residual(None, 8), np.zeros(8, np.float32))
    folder.residual(4).write_bytes(b"torn")
    assert reopened(folder).kept(4) is None  # it is made again before the hub may count on it


def test_a_residual_that_was_changed_or_is_gone_is_never_taken_for_zeros(tmp_path):
    folder = opened(tmp_path)
    kept(folder, 4, residual=True)
    kept(folder, 5)  # of a wire without feedback
    vector(7).tofile(folder.residual(4))
    for base in (4, 5, 9):
        with pytest.raises(Corrupt, match=f"stage {base} lost on the wire is not what was kept"):
            reopened(folder).last_residual(base, 8)
    folder.residual(4).unlink()
    with pytest.raises(Corrupt, match="submit the job again"):
        folder.last_residual(4, 8)


@pytest.mark.parametrize(
    ("base", "later", "left"),
    [(3, False, [3]), (3, True, [3, 5, 6]), (None, True, [2, 3, 5, 6]), (None, False, []), (6, True, [6])],
)
def test_only_residuals_that_may_still_be_counted_stay(tmp_path, base, later, left):
    folder = opened(tmp_path)
    for position in (2, 3, 5, 6):
        kept(folder, position, residual=True)
    folder.drop_uncounted(base, later)
    assert names(folder.path) == sorted(
        [f"residual-{number}.f32" for number in left]
        + [f"update-{number}.{kind}" for number in (2, 3, 5, 6) for kind in ("json", "wire")]
    )


def test_settling_keeps_the_marks_of_residuals_that_a_later_round_may_begin_from(tmp_path):
    folder = opened(tmp_path)
    for position in (2, 3, 7):
        kept(folder, position, residual=True)
    folder.drop_uncounted(2, later=False)
    kept(folder, 7, residual=True)
    folder.settle(7)
    assert names(folder.path) == [
        "residual-2.f32",
        "residual-7.f32",
        "update-2.json",
        "update-3.json",
        "update-7.json",
        "update-7.wire",
    ]
    assert np.array_equal(reopened(folder).last_residual(2, 8), vector(2))


# --- files


def test_a_file_appears_when_it_is_whole_and_half_of_it_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), appearing(path) as file:
        file.write(b"half")
    assert names(tmp_path) == []
    with appearing(path, durable=True) as file:
        file.write(b"12345678")
        assert names(tmp_path) == ["file.part"]
    assert names(tmp_path) == ["file"]
    assert file_crc(path) == 0x9AE0DAAF


def test_a_mapped_vector_stays_what_it_was_when_another_takes_its_name(tmp_path):
    path = tmp_path / "vector"
    vector().tofile(path)
    found = mapped(path)
    with appearing(path) as file:
        file.write(vector(2).data)
    assert np.array_equal(found, vector())
    assert not found.flags.writeable
    path.write_bytes(b"")
    assert mapped(path).shape == (0,)


# --- weights


def test_only_the_newest_weights_are_kept_and_only_those_fetched_here_count(tmp_path):
    folder = opened(tmp_path)
    one, two = "sha256:" + 64 * "1", "sha256:" + 64 * "2"
    for digest, seed in ((one, 1), (two, 2)):
        with folder.new_weights(digest, 32) as file:
            file.write(vector(seed=seed).data)
    with pytest.raises(ZeroDivisionError), folder.new_weights(one, 32):
        raise ZeroDivisionError
    assert names(folder.path) == [folder.weights(two).name]
    assert folder.fetched == two
    assert RunFolder(tmp_path / "run").fetched is None
    assert np.array_equal(np.fromfile(folder.weights(two), np.float32), vector(seed=2))


# --- room, and whose folders there are


def test_room_is_what_the_disk_still_takes_and_asking_takes_none(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.has_room(1 << 20)
    assert not folder.has_room(shutil.disk_usage(tmp_path).total + 1)
    assert names(folder.path) == []


def test_only_folders_named_as_runs_are_are_listed(tmp_path):
    assert kept_runs(tmp_path / "runs") == ()
    for name in ("job-2", "job-1", "Job", ".hidden", "a b", "x" * 64):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "file").write_text("")
    (tmp_path / "runs" / "elsewhere").symlink_to(tmp_path)
    assert kept_runs(tmp_path / "runs") == ("job-1", "job-2")


def test_what_an_update_lost_is_written_over_what_an_earlier_one_did(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(1, 1)
    inodes = []
    for position in (1, 2, 3, 4):
        folder.drop_uncounted(position - 1, later=False)
        with folder.new_memory(folder.residual(position), 8) as file:
            file.write(bytes([position]) * 8)
        inodes.append(folder.residual(position).stat().st_ino)
    assert inodes[2:] == inodes[:2]
    assert folder.residual(4).read_bytes() == bytes([4]) * 8
    assert names(tmp_path) == ["epoch", "residual-3.f32", "residual-4.f32"]
