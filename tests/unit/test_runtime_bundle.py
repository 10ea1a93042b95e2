"""Code as it is laid out: to the byte, and never from under a worker that runs it."""

import os

import pytest

from atoll.runtime.bundle import laid_out, read_bundle, write_bundle
from atoll.spec.document import canonical, sha256
from atoll.spec.model import Bundle


@pytest.mark.parametrize("text", ["a = 1\n", "a = 1\r\n", "a = 1\r", "a = '\u2028'\n", ""])
def test_code_is_found_again_as_it_was_laid_out(tmp_path, text):
    bundle = Bundle(files={"task.py": text})
    folder = write_bundle(bundle, tmp_path / "code")
    assert (folder / "task.py").read_bytes() == text.encode()
    assert laid_out(folder, sha256(canonical(bundle)))
    assert read_bundle(folder, sha256(canonical(bundle))) == bundle


def test_what_lay_there_stays_for_whoever_has_it_open_until_another_process_comes_by(tmp_path):
    folder = write_bundle(Bundle(files={"task.py": "a = 1\n"}), tmp_path / "code")
    held = os.open(folder, os.O_RDONLY)  # as a sandbox has it
    try:
        gone = tmp_path / "code.old-0-12345678"
        gone.mkdir()
        write_bundle(Bundle(files={"task.py": "a = 2\n"}), folder)
        assert (folder / "task.py").read_text() == "a = 2\n"
        assert os.listdir(held) == ["task.py"]
        assert not gone.exists()
    finally:
        os.close(held)
