"""How the files of a round's checkpoint are named: a rank's part of it, after a step, by its digest."""

import re
from typing import NamedTuple

_NAME = re.compile(r"(\d{1,12})-(\d{1,6})-(\d{1,6})-([0-9a-f]{64})\.safetensors")


class SavedName(NamedTuple):
    """After how many steps of the round, whose part it is of how many, and the SHA-256 of the file's bytes."""

    step: int
    part: int
    parts: int
    digest: str

    def __str__(self) -> str:
        return f"{self.step}-{self.part}-{self.parts}-{self.digest}.safetensors"


def saved_name(name: str) -> SavedName | None:
    """Return what a file's name tells; None of any other file."""
    told = _NAME.fullmatch(name)
    return SavedName(int(told[1]), int(told[2]), int(told[3]), told[4]) if told else None
