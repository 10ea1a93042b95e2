"""From what a person writes to what the hub takes: a job file and its task file, an SQL line, and JSON Schemas out."""

import getpass
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from atoll.errors import Invalid, NotFound
from atoll.spec.document import near_miss, override, parse, read_yaml
from atoll.spec.event import Result
from atoll.spec.fleet import Dataset, Fleet, Site, SiteFile
from atoll.spec.job import JOBS, Job, QueryJob, TaskRef, TrainJob, parse_job
from atoll.spec.model import Bundle, Deployment, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Crossing, Decision, Policy
from atoll.spec.run import DeploymentView, RunView, SiteView, Traffic, Verdict
from atoll.spec.sweep import Sweep
from atoll.spec.sync import Sync

if TYPE_CHECKING:
    from atoll.journal.key import Key

TASK_LIMIT = 1_000_000  # bytes: source text a person wrote is far below it, a data file renamed .py is not

DOCUMENTS: dict[str, type[BaseModel]] = {
    **JOBS,
    "sync": Sync,
    "sweep": Sweep,
    "plan": Plan,
    "fleet": Fleet,
    "site": Site,
    "dataset": Dataset,
    "policy": Policy,
    "crossing": Crossing,
    "decision": Decision,
    "run": RunView,
    "result": Result,
    "model": Model,
    "deployment": Deployment,
    "deployment-view": DeploymentView,
    "site-view": SiteView,
    "traffic": Traffic,
    "verdict": Verdict,
}

_FROM = re.compile(r'\bfrom\s+"?([A-Za-z0-9_.-]+)"?', re.IGNORECASE)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Job, Bundle | None]:
    """Read a job file, apply ``a.b=c`` overrides and, for a train job, read the task file that lies beside it.

    Raises `NotFound` when a file is missing and `Invalid` for each wrong field or an unusable task file.
    """
    path = Path(path)
    job = parse_job(override(read_yaml(path), list(overrides)), str(path))
    if not isinstance(job, TrainJob):
        return job, None
    return job, _signed(read_bundle(job.task, path.parent, str(path)))


def _signed(bundle: Bundle) -> Bundle:
    key = user_key()
    if key is None:
        return bundle
    from atoll.registry.signed import sign

    return sign(bundle, key)


def user_key(make: bool = False) -> "Key | None":
    """Return the key of whoever runs this, which signs code; None where there is none and none is to be made.

    Raises `Denied` where others can read it, `Corrupt`, `Unavailable`.
    """
    path = Path.home() / ".config" / "atoll" / "key"
    if not make and not path.exists():
        return None
    from atoll.journal.key import Key

    path.parent.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9_.-]", "-", getpass.getuser().lower())
    return Key.kept(path, name if re.match(r"[a-z0-9]", name) else "user", make)


def read_bundle(task: TaskRef, folder: Path, source: str) -> Bundle:
    """Read the one task file from ``folder``; raise `Invalid` or `NotFound` when it cannot travel as code."""
    name = task.file
    if name != Path(name).name or "\\" in name or name.startswith(".") or not name.endswith(".py"):
        raise Invalid(
            f"{source}: task.file: {name!r} is not a plain .py file name; put the file beside the job document"
        )
    file = folder / name
    if not file.is_file():
        known = sorted(other.name for other in folder.glob("*.py"))
        raise NotFound(
            f"{source}: task.file: there is no file {name!r} beside the job document{near_miss(name, known)}"
        )
    try:
        if file.stat().st_size > TASK_LIMIT:
            raise Invalid(
                f"{source}: task.file: {name!r} is above {TASK_LIMIT:,} bytes; keep data out of the task file"
            )
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(
            f"{source}: task.file: {name!r} is not UTF-8 text at byte {error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise Invalid(
            f"{source}: task.file: {name!r} cannot be read ({error.strerror}); check its permissions"
        ) from None
    return Bundle(files={name: text})


def query_job(sql: str, purpose: str, dataset: str | None = None, sites: Sequence[str] | None = None) -> QueryJob:
    """Make the query job of an SQL line; the dataset is the table after FROM unless it is given."""
    if dataset is None:
        found = _FROM.search(sql)
        if found is None:
            raise Invalid(f"query: {sql!r} names no dataset after FROM; name one")
        dataset = found[1].lower()
    chosen = list(sites) if sites else None
    return parse(
        QueryJob, {"name": "query", "purpose": purpose, "sql": sql, "dataset": dataset, "sites": chosen}, "query"
    )


def schemas(kind: str | None = None) -> dict[str, Any]:
    """Return the JSON Schema of one kind of document, or of all of them by kind (JSON Schema 2020-12)."""
    if kind is None:
        return {name: document.model_json_schema() for name, document in DOCUMENTS.items()}
    if kind not in DOCUMENTS:
        raise NotFound(f"schema: there is no document kind {kind!r}{near_miss(kind, list(DOCUMENTS))}")
    return DOCUMENTS[kind].model_json_schema()


def site_folder(home: Path, name: str | None, laptop: bool = False) -> Path:
    """Return the folder of one of this home's own sites, of the only one without a name; raise `NotFound`.

    With ``laptop`` a home that has no site gets one, `local`: nobody with a single machine has to make it.
    """
    known = site_folders(home)
    if laptop and not known and name in (None, "local"):
        from atoll.runtime import site

        return site.laptop(home / "sites")
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    if name is None:
        what = f"one of {', '.join(known)}; add --site" if known else "none; make one by: atoll site add NAME"
        raise NotFound(f"site: {home} has {what}")
    if name not in known:
        hint = near_miss(name, list(known)) or f"; make it by: atoll site add {name}"
        raise NotFound(f"site: {home} has no site {name!r}{hint}")
    return known[name]


def local_fleet(home: Path) -> Fleet:
    """Return this home's own sites with their datasets, read from their files: no hub is asked."""
    from atoll.data.catalogue import Catalogue

    told: list[Site] = []
    for folder in site_folders(home).values():
        site = parse(SiteFile, read_yaml(folder / "site.yaml"), str(folder / "site.yaml"))
        told.append(site.told.model_copy(update={"datasets": Catalogue(folder).datasets()}))
    return Fleet(sites=tuple(told))


def site_folders(home: Path) -> dict[str, Path]:
    """Return the folders of this home's own sites by name."""
    return {file.parent.name: file.parent for file in sorted((home / "sites").glob("*/site.yaml"))}


def read_text(path: Path) -> str:
    """Return a file's UTF-8 text; raise `NotFound` or `Invalid`."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path}: cannot be read as text ({error}); give a UTF-8 file") from None
