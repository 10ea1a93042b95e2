"""What the hub keeps of a run on disk: weights and outer state, whole and verified or not there."""

import os
import threading

import numpy as np
import pytest

from atoll.errors import Corrupt, Invalid, Unavailable
from atoll.outer.optimiser import State as OuterState
from atoll.outer.wire import encode
from atoll.registry.weights import save
from atoll.runtime.files import Folders, RunFiles
from atoll.spec.document import sha256
from atoll.spec.model import TensorSpec

SIGNATURE = (TensorSpec(name="w", shape=(4, 2)),)


def vector(size=8, seed=1):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def brought(files, position):
    files.spool.receive((position, "lyon"), lambda offset: encode(vector(), ()), (), 8)


def test_weights_are_named_by_their_digest_and_verified_when_read(tmp_path):
    files = RunFiles(tmp_path)
    digest = files.put_weights(vector(), SIGNATURE)
    again = RunFiles(tmp_path)
    assert np.array_equal(again.vector(digest, SIGNATURE), vector())
    assert sha256(files.get(digest)) == digest
    path = tmp_path / f"{digest.removeprefix('sha256:')}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Corrupt, match="the stored bytes are others"):
        RunFiles(tmp_path).vector(digest, SIGNATURE)
    path.unlink()
    with pytest.raises(Corrupt, match="not among the run's files"):
        files.get(digest)


def test_a_file_is_the_safetensors_one_and_written_from_pieces_the_very_same(tmp_path):
    files, big = RunFiles(tmp_path), (TensorSpec(name="w", shape=(700_000,)), TensorSpec(name="b", shape=()))
    whole = vector(700_001)
    digest = files.put_weights(whole, big)
    assert bytes(files.get(digest)) == save(whole, big)
    growing = np.empty_like(whole)

    def pieces():
        for start in range(0, whole.size, 300_000):
            growing[start : start + 300_000] = whole[start : start + 300_000]
            yield growing[start : start + 300_000]

    assert RunFiles(tmp_path / "again").put_weights(growing, big, pieces()) == digest
    assert names(tmp_path / "again") == [f"{digest.removeprefix('sha256:')}.safetensors", "spool"]


@pytest.mark.parametrize("size", [7, 9])
def test_weights_that_are_not_the_signatures_are_refused(tmp_path, size):
    with pytest.raises(Invalid, match="the signature has 8"):
        RunFiles(tmp_path).put_weights(vector(size), SIGNATURE)
    assert names(tmp_path) == ["spool"]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    def failing(error):
        yield vector()
        raise error

    files = RunFiles(tmp_path)
    with pytest.raises(ZeroDivisionError):
        files.put_weights(vector(), SIGNATURE, failing(ZeroDivisionError()))
    with pytest.raises(Unavailable, match="free some space"):
        files.put_weights(vector(), SIGNATURE, failing(OSError(28, "No space left on device")))
    assert names(tmp_path) == ["spool"]


def test_given_weights_cannot_be_changed_and_are_read_once_whoever_asks(tmp_path):
    digest = RunFiles(tmp_path).put_weights(vector(), SIGNATURE)
    files, found = RunFiles(tmp_path), []
    threads = [threading.Thread(target=lambda: found.append(files.vector(digest, SIGNATURE))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 8
    assert all(one is found[0] for one in found)
    with pytest.raises(ValueError, match="read-only"):
        found[0][0] = 1


def test_a_registered_models_weights_are_read_from_where_they_lie(tmp_path):
    files = RunFiles(tmp_path)
    data = save(vector(), SIGNATURE)
    assert np.array_equal(files.vector(sha256(data), SIGNATURE, {sha256(data): data}.__getitem__), vector())


def test_the_outer_state_comes_back_and_a_file_that_is_none_is_corrupt(tmp_path):
    files = RunFiles(tmp_path)
    state = OuterState(3, {"momentum": vector()})
    digest = files.put_outer(state)
    assert files.outer(digest) is state  # whose it is from now on
    for back in (files.outer(digest), RunFiles(tmp_path).outer(digest)):
        assert back.step == 3
        assert np.array_equal(back.moments["momentum"], vector())
        back.moments["momentum"][0] = 0  # a step is taken in place, and what is on disk stays
    path = tmp_path / f"{digest.removeprefix('sha256:')}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Corrupt, match="the stored bytes are others"):
        files.outer(digest)
    path.unlink()
    with pytest.raises(Corrupt, match="not among the run's files"):
        files.outer(digest)
    digest = sha256(b"rubbish")
    (tmp_path / f"{digest.removeprefix('sha256:')}.safetensors").write_bytes(b"rubbish")
    with pytest.raises(Corrupt):
        files.outer(digest)


def test_tidying_keeps_this_rounds_and_the_last_rounds_files_and_what_is_not_spent(tmp_path):
    files = RunFiles(tmp_path)
    kept = []
    for number in range(5):
        kept.append(files.put_weights(vector(seed=number), SIGNATURE))
        kept.append(files.put_outer(OuterState(number, {"momentum": vector(seed=number)})))
        brought(files, number)
    files.tidy(lambda position, site: position < 3, ())
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {
        name.removeprefix("sha256:") for name in kept[-4:]
    }
    spool = [path.name for path in (tmp_path / "spool").glob("*.update")]
    assert sorted(spool) == ["3-lyon.update", "4-lyon.update"]
    assert np.array_equal(RunFiles(tmp_path).vector(kept[-2], SIGNATURE), vector(seed=4))


def test_tidying_keeps_what_the_run_works_with_also_where_a_clock_was_set_back(tmp_path):
    kept = [RunFiles(tmp_path).put_weights(vector(seed=number), SIGNATURE) for number in range(8)]
    files = RunFiles(tmp_path)
    kept.append(files.put_weights(vector(seed=8), SIGNATURE))
    for number, digest in enumerate(kept):  # the last ones are the oldest
        os.utime(tmp_path / f"{digest.removeprefix('sha256:')}.safetensors", (100 - number, 100 - number))
    files.tidy(lambda position, site: False, (kept[7], None))
    left = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert left == {digest.removeprefix("sha256:") for digest in (*kept[:4], kept[7], kept[8])}


def test_a_sweep_drops_runs_that_are_over_or_unknown_and_half_written_files_of_the_others(tmp_path):
    folders = Folders(tmp_path / "runs")
    digest = folders.of("open-1").put_weights(vector(), SIGNATURE)
    brought(folders.of("open-1"), 1)
    folders.of("over-1").put_weights(vector(), SIGNATURE)
    folders.of("unknown-1")
    (tmp_path / "runs" / "open-1" / "content.part-77").write_bytes(b"half")
    (tmp_path / "runs" / "open-1" / "spool" / "2-a.part-b.update").write_bytes(b"of a site with such a name")
    (tmp_path / "runs" / "open-1" / "spool" / f"2-lyon.{32 * 'a'}.part").write_bytes(b"gone on with, perhaps")
    stranger = tmp_path / "elsewhere"
    stranger.mkdir()
    (tmp_path / "runs" / "Not a run").mkdir()
    (tmp_path / "runs" / "link-1").symlink_to(stranger)
    Folders(tmp_path / "runs").sweep({"open-1"})
    assert names(tmp_path / "runs") == ["Not a run", "link-1", "open-1"]
    assert stranger.exists()
    assert names(tmp_path / "runs" / "open-1") == [f"{digest.removeprefix('sha256:')}.safetensors", "spool"]
    left = ["1-lyon.update", "2-a.part-b.update", f"2-lyon.{32 * 'a'}.part"]
    assert names(tmp_path / "runs" / "open-1" / "spool") == left
    assert np.array_equal(Folders(tmp_path / "runs").of("open-1").vector(digest, SIGNATURE), vector())


def test_a_run_that_is_over_leaves_nothing(tmp_path):
    folders = Folders(tmp_path)
    folders.of("run").put_weights(vector(), SIGNATURE)
    folders.remove("run")
    folders.remove("run")
    assert names(tmp_path) == []
