"""What a lost group had mirrored is written where the next one looks for it, and nothing that is not whole."""

import hashlib
import itertools
import logging
import os

import pytest
import torch

from atoll.durable import copied
from atoll.inner.mirror import Mirror
from atoll.inner.parts import Part
from atoll.inner.saved import complete, read, saved
from atoll.runtime.rescue import rescue
from atoll.spec.plan import Layout


@pytest.fixture
def places():
    made = [[os.memfd_create("mirror") for _ in range(2)] for _ in range(3)]
    yield made
    for file in itertools.chain(*made):
        os.close(file)


def write(files, steps, part, parts, folder="round"):
    mirror = Mirror(files)
    for step in steps:
        value = Part(torch.tensor([10.0 * step + part]), (part,), (parts,))
        mirror.write({"step": step, "part": [part, parts], "round": "r", "folder": folder}, {"x": value})


def test_the_newest_step_that_all_parts_have_is_written(places, tmp_path):
    write(places[0], [3, 4], 0, 2)
    write(places[1], [4, 5], 1, 2)
    write(places[2], [3, 4], 0, 2)  # a copy of the first
    assert rescue(places, tmp_path / "round", tmp_path) == 4
    ((first, second),) = complete(saved(tmp_path / "round"))
    assert sorted(float(read(one)[0]["x"].value) for one in (first, second)) == [40.0, 41.0]
    assert read(first)[1]["round"] == "r"
    assert len(list((tmp_path / "round").iterdir())) == 2


def test_what_is_left_of_an_earlier_round_is_not_taken_for_this_ones(places, tmp_path):
    write(places[0], [90, 2], 0, 1, folder="round")
    write(places[1], [90], 0, 1, folder="round-before")
    Mirror(places[2]).write({"step": 91, "part": [0, 1]}, {})  # of no round that has a folder
    assert rescue(places[1:], tmp_path / "round", tmp_path) is None
    write(places[0], [1, 2], 0, 1)
    assert rescue(places, tmp_path / "round", tmp_path) == 2


def test_without_a_step_of_all_parts_nothing_is_written(places, tmp_path):
    write(places[0], [3, 4], 0, 2)
    write(places[1], [5, 6], 1, 2)
    assert rescue(places, tmp_path / "round", tmp_path) is None
    assert rescue([], tmp_path / "round", tmp_path) is None
    assert not (tmp_path / "round").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x40" + bytes(7) + b"no words of ours",
        b"\xff" * 16,
        b"\x02" + bytes(7) + b"{}",
        (40000).to_bytes(8, "little") + b"[" * 40000,
        bytes(16),
    ],
)
def test_what_is_no_mirror_is_left_alone(places, tmp_path, data):
    os.pwrite(places[0][0], data, 0)
    assert rescue(places, tmp_path / "round", tmp_path) is None


@pytest.mark.parametrize(
    "about", [{"step": -1}, {"step": 10**12}, {"part": [2, 2]}, {"part": ["../x", 2]}, {"part": 7}]
)
def test_a_mirror_that_says_what_no_rank_says_names_no_file(places, tmp_path, about):
    Mirror(places[0]).write({"step": 1, "part": [0, 1], "folder": "round", **about}, {})
    assert rescue(places, tmp_path / "round", tmp_path) is None


def test_a_disk_without_room_costs_a_line_in_the_log(places, tmp_path, caplog):
    write(places[0], [1], 0, 1, folder="file")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert rescue(places, tmp_path / "file", tmp_path) is None
    assert "what the lost group had done since its last checkpoint is lost, too" in caplog.text


@pytest.mark.parametrize("where", ["round/rescued-0.part", "round", "rescued-0.part"])
def test_no_link_that_user_code_left_leads_what_is_written_elsewhere(places, tmp_path, where):
    write(places[0], [1], 0, 1)
    (tmp_path / "victim").mkdir()
    (tmp_path / "round").mkdir() if "/" in where else None
    (tmp_path / where).symlink_to(tmp_path / "victim" / ("" if where == "round" else "keys"))
    assert rescue(places, tmp_path / "round", tmp_path) == 1
    assert list((tmp_path / "victim").iterdir()) == []
    assert len(complete(saved(tmp_path / "round"))) == 1
    assert not (tmp_path / "rescued-0.part").exists()


def test_what_stands_where_a_file_was_to_begin_keeps_nothing_from_being_written(places, tmp_path):
    write(places[0], [1], 0, 1)
    (tmp_path / "round" / "rescued-0.part" / "more").mkdir(parents=True)
    assert rescue(places, tmp_path / "round", tmp_path) == 1


def test_a_mirror_that_only_says_how_large_it_is_fills_no_disk(places, tmp_path):
    write(places[0], [1], 0, 1)
    for file in places[0]:
        os.ftruncate(file, 1 << 40)
    assert rescue(places, tmp_path / "round", tmp_path) is None


def test_a_copy_follows_no_link_and_is_its_owners_alone(places, tmp_path):
    os.pwrite(places[0][0], b"data", 0)
    (tmp_path / "victim").write_bytes(b"keys")
    (tmp_path / "copy").symlink_to(tmp_path / "victim")
    assert copied(places[0][0], tmp_path / "copy") == hashlib.sha256(b"data").hexdigest()
    assert (tmp_path / "victim").read_bytes() == b"keys"
    assert (tmp_path / "copy").read_bytes() == b"data"
    assert (tmp_path / "copy").lstat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("layout", "fewer"),
    [
        ({"data": 3}, {"data": 2}),
        ({"data": 2, "tensor": 2}, {"tensor": 2}),
        ({"shard": 4}, {"shard": 3}),
        ({"shard": 2, "pipeline": 2}, {"pipeline": 2}),
        ({"tensor": 6}, {"tensor": 3}),
        ({"expert": 4, "pipeline": 3}, {"expert": 2, "pipeline": 3}),
        ({"pipeline": 3}, {}),
    ],
)
def test_the_next_smaller_layout_divides_what_this_one_divides(layout, fewer):
    assert Layout(**layout).fewer == Layout(**fewer)
    assert Layout().fewer is None
