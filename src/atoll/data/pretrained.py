"""A folder with a pretrained model, as its owner lists it: which files count, and what each holds."""

import hashlib
from pathlib import Path

from atoll.errors import Invalid, NotFound
from atoll.spec.document import parse
from atoll.spec.pretrained import Pretrained

# Numbers and descriptions only. What is neither is no part of the model: a pickle would run code when it is loaded.
_TAKEN = (".safetensors", ".json")


def inspected(name: str, folder: str | Path) -> Pretrained:
    """Return the folder as it is now, under `name`; reads every byte of its .safetensors and .json files.

    Folders in it are left out, and so are files whose names begin with a dot. Raises `NotFound` and `Invalid`.
    """
    place = Path(folder).expanduser().absolute()
    if not place.is_dir():
        raise NotFound(f"{place}: there is no such folder; check the path")
    try:
        found = sorted(path for path in place.iterdir() if path.suffix in _TAKEN and not path.name.startswith("."))
        files = {path.name: _digest(path) for path in found if path.is_file()}
    except OSError as error:
        raise Invalid(f"{place}: cannot be read ({error.strerror}); let this user read it") from None
    if not any(file.endswith(".safetensors") for file in files):
        raise Invalid(
            f"{place}: has no .safetensors file; convert the weights first, for pickled ones (.bin, .pt) are not loaded"
        )
    return parse(Pretrained, {"name": name, "path": str(place), "files": files}, "pretrained")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
