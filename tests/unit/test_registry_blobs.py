"""Blobs: content-addressed, whole or absent, verified when read, closed to names that are no digests."""

import resource
from pathlib import Path

import pytest

from atoll.errors import Corrupt, Invalid, NotFound, Unavailable
from atoll.registry.blobs import Blobs
from atoll.spec.document import sha256


@pytest.fixture(params=["folder", "memory"])
def blobs(request, tmp_path):
    return Blobs(tmp_path / "store" if request.param == "folder" else f"memory://{tmp_path.name}-{request.node.name}")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_blob_comes_back_under_its_digest(blobs):
    digest = blobs.put(b"weights")
    assert digest == sha256(b"weights")
    assert blobs.get(digest) == b"weights"
    assert blobs.has(digest)
    assert blobs.size(digest) == 7


def test_a_memoryview_gives_the_same_blob_as_its_bytes(blobs):
    data = bytes(range(256)) * 10_000
    assert blobs.put(memoryview(data)) == blobs.put(data) == sha256(data)
    assert blobs.get(sha256(data)) == data


def test_a_missing_blob_is_not_found(blobs):
    digest = sha256(b"never stored")
    assert not blobs.has(digest)
    for ask in (blobs.get, blobs.size):
        with pytest.raises(NotFound, match=digest):
            ask(digest)


def test_a_removed_blob_is_gone_and_to_remove_it_again_is_no_error(blobs):
    digest, other = blobs.put(b"one"), blobs.put(b"other")
    for _ in range(2):
        blobs.remove(digest)
        assert (blobs.has(digest), blobs.get(other)) == (False, b"other")
    assert blobs.put(b"one") == digest


@pytest.mark.parametrize("name", ["sha256:../../etc/passwd", "sha256:" + "A" * 64, "../x", "sha256:" + "a" * 64 + "\n"])
def test_what_is_no_digest_never_becomes_a_path(blobs, name):
    for ask in (blobs.get, blobs.has, blobs.size, blobs.remove):
        with pytest.raises(Invalid, match="64 hex digits"):
            ask(name)


def test_the_folder_holds_the_blob_and_nothing_else(tmp_path):
    digest = Blobs(tmp_path / "store").put(b"one")
    assert files(tmp_path / "store") == [f"{digest[7:9]}/{digest[9:]}"]


def test_damaged_bytes_are_refused_by_name_and_mended_by_the_next_put(tmp_path):
    blobs = Blobs(tmp_path)
    digest = blobs.put(b"one")
    blobs.local(digest).write_bytes(b"two")
    for ask in (blobs.get, blobs.local):
        with pytest.raises(Corrupt, match=digest):
            ask(digest)
    assert blobs.put(b"one") == digest
    assert blobs.local(digest).read_bytes() == b"one"


def test_a_store_that_is_no_folder_has_no_local_path():
    blobs = Blobs("memory://remote")
    with pytest.raises(Invalid, match="not a folder"):
        blobs.local(blobs.put(b"x"))


def test_an_unknown_kind_of_store_is_refused():
    with pytest.raises(Invalid, match="nosuch"):
        Blobs("nosuch://bucket")


def test_no_space_is_said_in_words_and_leaves_nothing_behind(tmp_path):
    blobs = Blobs(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(Unavailable, match=r"no space left to keep 1,000,000 bytes; free some"):
            blobs.put(bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "store") == []
    assert not blobs.has(sha256(bytes(1_000_000)))


def test_a_folder_that_is_a_file_is_unavailable(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(Unavailable, match="store"):
        Blobs(tmp_path / "store").put(b"x")
