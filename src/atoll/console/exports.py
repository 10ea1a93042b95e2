"""A model taken out of Atoll: a folder that says what it is, and that other tools read.

model.safetensors   the weights; what model.json names their SHA-256
model.json          its document: signature, metrics, privacy, where it came from
lineage.json        the same with run, plan, job, data, decisions and parents
code/               what it was trained by and answers with
SHA256SUMS          of all of these, for `sha256sum -c`
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from atoll.console.client import Client
from atoll.errors import Corrupt, Invalid, Unavailable
from atoll.runtime.bundle import write_bundle
from atoll.spec.document import canonical, sha256
from atoll.spec.model import Model

WEIGHTS = "model.safetensors"
Watch = Callable[[int, int], None]  # bytes of the weights that are here, and of all


def export(hub: Client, reference: str, folder: Path, watch: Watch = lambda done, size: None) -> Model:
    """Write a model to a folder that is made for it, whole or not at all; its weights and code are verified.

    Raises `Invalid` where there is such a folder, `Denied`, `NotFound`, `Corrupt`, `Unavailable`.
    """
    if folder.exists():
        raise Invalid(f"--out: {folder} is there already; name a new folder")
    model = hub.model(reference)
    with ExitStack() as ending:
        try:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
            ending.callback(shutil.rmtree, part, ignore_errors=True)
            _weights(hub, model, part / WEIGHTS, watch)
            code = hub.code(model.reference)
            if sha256(canonical(code)) != model.lineage.code:
                raise Corrupt(f"code of {model.reference}: it is not what its document names; restore the blob")
            write_bundle(code, part / "code")
            (part / "model.json").write_text(model.model_dump_json(indent=2) + "\n")
            (part / "lineage.json").write_text(hub.lineage(model.reference).model_dump_json(indent=2) + "\n")
            (part / "SHA256SUMS").write_text(_sums(part))
            part.chmod(0o755)
            part.rename(folder)
        except OSError as error:
            raise Unavailable(f"{folder}: cannot be written ({error.strerror}); check space and permissions") from None
    return model


def _weights(hub: Client, model: Model, path: Path, watch: Watch) -> None:
    digest, done = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece, size in hub.weights(model.reference):
            file.write(piece)
            digest.update(piece)
            done += len(piece)
            watch(done, size)
    if f"sha256:{digest.hexdigest()}" != model.weights:
        raise Corrupt(f"weights of {model.reference}: they are not what its document names; export it again")


def _sums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in files
    )
