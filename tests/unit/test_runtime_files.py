"""What hub and sites keep of a run on disk: spool, weights, fence. Whole and verified, or not there."""

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Corrupt, Invalid, LinkLost
from atoll.outer.optimiser import State as OuterState
from atoll.outer.wire import CHUNK, encode
from atoll.runtime.files import RunFiles
from atoll.runtime.kept import Kept, RunFolder, file_digest
from atoll.runtime.spool import Spool
from atoll.spec.document import sha256
from atoll.spec.model import TensorSpec
from atoll.spec.plan import Transform

SIZE = CHUNK + 1000  # two frames
INT8 = (Transform(kind="clip", value=1.0), Transform(kind="int8"))
WIRE = ("clip", "int8")


def vector(size=SIZE, seed=1):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def received(spool, name=(1, "lyon"), size=SIZE):
    found = np.full(size, np.nan, np.float32)
    for offset, values in spool.windows(name, (), size):
        found[offset : offset + len(values)] = values
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the spool


def test_an_update_comes_back_as_it_was_in_as_many_passes_as_wanted(tmp_path):
    spool = Spool(tmp_path)
    digest = spool.receive((1, "lyon"), encode(vector(), ()), (), SIZE)
    assert np.array_equal(received(spool), vector())
    assert np.array_equal(received(spool), vector())
    assert spool.holds((1, "lyon"), digest)
    assert names(tmp_path) == ["1-lyon.update"]


def test_a_quantised_update_is_kept_as_it_came_and_decoded_when_it_is_read(tmp_path):
    spool = Spool(tmp_path)
    spool.receive((1, "lyon"), encode(vector(), INT8), WIRE, SIZE)
    windows = dict(spool.windows((1, "lyon"), WIRE, SIZE))
    assert list(windows) == [0, CHUNK]
    assert (tmp_path / "1-lyon.update").stat().st_size < SIZE * 1.1


def broken(kind):
    first, second = encode(vector(), ())
    spoiled = vector()
    spoiled[5] = np.nan
    nan = Frame(0, CHUNK, spoiled[:CHUNK].tobytes())
    return {
        "truncated": [first],
        "empty": [],
        "oversized": [first, second, Frame(2 * CHUNK, 1000, bytes(4000))],
        "twice": [first, first, second],
        "wrong order": [second, first],
        "wrong offset": [first, Frame(CHUNK + 1, 999, bytes(3996))],
        "negative offset": [Frame(-CHUNK, CHUNK, first.data)],
        "short data": [Frame(0, CHUNK, bytes(first.data)[:-4])],
        "long data": [Frame(0, CHUNK, bytes(first.data) + bytes(4))],
        "scales": [Frame(0, CHUNK, first.data, bytes(4))],
        "not finite": [nan, second],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "oversized",
        "twice",
        "wrong order",
        "wrong offset",
        "negative offset",
        "short data",
        "long data",
        "scales",
        "not finite",
    ],
)
def test_a_wrong_stream_is_invalid_and_leaves_no_trace(tmp_path, kind):
    spool = Spool(tmp_path)
    with pytest.raises(Invalid):
        spool.receive((1, "lyon"), iter(broken(kind)), (), SIZE)
    assert names(tmp_path) == []


def test_an_update_in_another_encoding_than_the_plans_is_invalid(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(Invalid):
        spool.receive((1, "lyon"), encode(vector(), ()), WIRE, SIZE)
    with pytest.raises(Invalid):
        spool.receive((1, "lyon"), encode(vector(), INT8), (), SIZE)
    assert names(tmp_path) == []


def test_a_link_that_breaks_leaves_no_trace_and_what_was_whole_before_stays(tmp_path):
    def breaking():
        yield next(encode(vector(seed=2), ()))
        raise LinkLost("the stream broke off")

    spool = Spool(tmp_path)
    digest = spool.receive((1, "lyon"), encode(vector(), ()), (), SIZE)
    with pytest.raises(LinkLost):
        spool.receive((1, "lyon"), breaking(), (), SIZE)
    assert spool.holds((1, "lyon"), digest)
    assert names(tmp_path) == ["1-lyon.update"]


def test_changed_bytes_and_a_missing_file_are_told_from_the_digest(tmp_path):
    spool = Spool(tmp_path)
    digest = spool.receive((1, "lyon"), encode(vector(), ()), (), SIZE)
    spool.check((1, "lyon"), digest)
    with (tmp_path / "1-lyon.update").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01")
    assert not spool.holds((1, "lyon"), digest)
    with pytest.raises(Corrupt, match="update of lyon for stage 1 is not what was received"):
        spool.check((1, "lyon"), digest)
    assert not spool.holds((2, "lyon"), digest)


def test_only_what_is_spent_is_dropped_whatever_dots_and_dashes_a_site_is_called_by(tmp_path):
    spool = Spool(tmp_path)
    for name in [(1, "lyon"), (2, "lyon"), (1, "saint-denis.north"), (11, "oslo")]:
        spool.receive(name, encode(vector(8), ()), (), 8)
    asked = []
    spool.drop(lambda position, site: asked.append((position, site)) or (position, site) == (1, "saint-denis.north"))
    assert sorted(asked) == [(1, "lyon"), (1, "saint-denis.north"), (2, "lyon"), (11, "oslo")]
    assert names(tmp_path) == ["1-lyon.update", "11-oslo.update", "2-lyon.update"]


# --- the hub's files of a run


SIGNATURE = (TensorSpec(name="w", shape=(4, 2)),)


def test_weights_are_named_by_their_digest_and_verified_when_read(tmp_path):
    files = RunFiles(tmp_path)
    digest = files.put_weights(vector(8), SIGNATURE)
    again = RunFiles(tmp_path)
    assert np.array_equal(again.vector(digest, SIGNATURE), vector(8))
    assert sha256(files.get(digest)) == digest
    path = tmp_path / f"{digest.removeprefix('sha256:')}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Corrupt, match="the stored bytes are others"):
        RunFiles(tmp_path).vector(digest, SIGNATURE)
    path.unlink()
    with pytest.raises(Corrupt, match="not among the run's files"):
        files.get(digest)


def test_the_outer_state_comes_back_and_a_file_that_is_none_is_corrupt(tmp_path):
    files = RunFiles(tmp_path)
    state = OuterState(3, {"momentum": vector(8)})
    back = files.outer(files.put_outer(state))
    assert back.step == 3
    assert np.array_equal(back.moments["momentum"], vector(8))
    digest = sha256(b"rubbish")
    (tmp_path / f"{digest.removeprefix('sha256:')}.safetensors").write_bytes(b"rubbish")
    with pytest.raises(Corrupt):
        files.outer(digest)


def test_tidying_keeps_this_rounds_and_the_last_rounds_files_and_what_is_not_spent(tmp_path):
    files = RunFiles(tmp_path)
    kept = []
    for number in range(5):
        kept.append(files.put_weights(vector(8, seed=number), SIGNATURE))
        kept.append(files.put_outer(OuterState(number, {"momentum": vector(8, seed=number)})))
        files.spool.receive((number, "lyon"), encode(vector(8), ()), (), 8)
    files.tidy(lambda position, site: position < 3)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {
        name.removeprefix("sha256:") for name in kept[-4:]
    }
    assert names(tmp_path / "spool") == ["3-lyon.update", "4-lyon.update"]
    assert np.array_equal(RunFiles(tmp_path).vector(kept[-2], SIGNATURE), vector(8, seed=4))
    files.remove()
    assert not tmp_path.exists()


# --- what a site keeps


def test_an_assignment_older_than_one_already_seen_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.fence(1, 4)
    folder.fence(1, 4)  # the hub may repeat itself
    folder.fence(1, 5)
    for epoch, position in [(0, 9), (1, 4), (0, 0)]:
        with pytest.raises(Invalid, match=f"epoch {epoch}, stage {position} came after epoch 1, stage 5"):
            folder.fence(epoch, position)
    folder.fence(2, 0)


def test_the_epoch_outlives_the_agent(tmp_path):
    RunFolder(tmp_path / "run").fence(3, 7)
    again = RunFolder(tmp_path / "run")
    with pytest.raises(Invalid, match="out of date"):
        again.fence(2, 9)
    again.fence(3, 0)


def kept(folder, position, data=b"update"):
    folder.update(position).write_bytes(data)
    made = Kept("sha256:w", file_digest(folder.update(position)), 32, 0.5, 1.25)
    folder.keep(position, made)
    return made


def test_a_kept_update_is_found_by_the_next_agent_only_if_it_is_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    made = kept(folder, 4)
    assert RunFolder(tmp_path / "run").kept(4) == made
    assert folder.kept(5) is None
    folder.update(4).write_bytes(b"updat")
    assert folder.kept(4) is None
    folder.update(4).unlink()
    assert folder.kept(4) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weights": "x"}', "null"])
def test_a_mark_that_is_no_mark_counts_for_nothing(tmp_path, text):
    folder = RunFolder(tmp_path / "run")
    kept(folder, 4)
    (folder.path / "update-4.json").write_text(text)
    assert folder.kept(4) is None


def test_settling_drops_what_only_earlier_rounds_needed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for position in (2, 3, 4):
        kept(folder, position)
        folder.state(position).write_bytes(b"state")
    folder.settle(4)
    assert names(folder.path) == ["state-3.safetensors", "state-4.safetensors", "update-4.f32", "update-4.json"]
    assert folder.last_state(5) == folder.state(4)
    assert folder.last_state(4) == folder.state(3)  # the round done again begins where it began
    assert folder.last_state(3) is None


def test_only_the_newest_weights_are_kept_and_only_those_fetched_here_count(tmp_path):
    folder = RunFolder(tmp_path / "run")
    one, two = "sha256:" + 64 * "1", "sha256:" + 64 * "2"
    folder.put_weights(one, vector(8))
    folder.put_weights(two, vector(8, seed=2))
    assert names(folder.path) == [folder.weights(two).name]
    assert (folder.has_weights(two), folder.has_weights(one)) == (True, False)
    assert not RunFolder(tmp_path / "run").has_weights(two)
    assert np.array_equal(np.fromfile(folder.weights(two), np.float32), vector(8, seed=2))
