"""A site's own list of datasets, and of pretrained models: where each lies, which stays there, and what may be told."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from atoll.data.pretrained import inspected
from atoll.durable import sync_folder
from atoll.errors import Corrupt, Invalid, NotFound, Unavailable
from atoll.spec.budget import Budget
from atoll.spec.document import Document, Name, near_miss, parse, read_yaml, write_yaml
from atoll.spec.fleet import Dataset
from atoll.spec.pretrained import Pretrained
from atoll.spec.wire import Wire

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Format = Literal["parquet", "csv", "arrow"]
FORMATS: dict[str, Format] = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".feather": "arrow"}


class Entry(Document):
    """One dataset as the site knows it. `path` is absolute and never leaves the site; `dataset` may."""

    path: str
    format: Format
    dataset: Dataset
    origin: Name | None = None  # the dataset that a job made it from, whose privacy budget its runs use


class Listing(Document):
    """The whole file."""

    entries: tuple[Entry, ...] = ()
    pretrained: tuple[Pretrained, ...] = ()


class Catalogue:
    """The datasets of the site that lives in `home`, as its file has them now: one process may add while another
    serves. Writers take turns under a lock, and the file is replaced whole."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file = home / "catalogue.yaml"
        self._read: tuple[tuple[int, int, int], Listing] | None = None  # which file it was, and what it said

    def add(
        self,
        name: str,
        path: str | Path,
        purposes: Iterable[str] = (),
        min_group: int = 10,
        like: Dataset | None = None,
    ) -> Dataset:
        """List the file as dataset `name`, in place of one of that name; return what others may know of it.

        It has the terms of ``like``, where that is given, or else is granted for these purposes.

        Raises `Invalid` for a wrong name, suffix or file, and for a file without rows or with two columns of one name.
        """
        place = Path(path).expanduser().absolute()
        known = {"name": name, "rows": 0, "fingerprint": "sha256:" + 64 * "0"}
        terms: dict[str, object] = {"purposes": tuple(purposes), "min_group": min_group}
        if like is not None:
            terms = like.model_dump(exclude={*known, "bytes", "columns"}, exclude_unset=True)
        draft = parse(Dataset, {**known, **terms}, "dataset")
        format = FORMATS.get(place.suffix.lower())
        if format is None:
            raise Invalid(f"{place}: suffix {place.suffix!r} is not read; give one of {', '.join(FORMATS)}")
        if not place.is_file():
            raise NotFound(f"{place}: there is no such file; check the path")
        rows, columns = _inspected(place, format)
        found = {"rows": rows, "bytes": place.stat().st_size, "columns": columns, "fingerprint": _fingerprint(place)}
        dataset = draft.model_copy(update=found)
        with self._turn():
            listed = self._listed()
            origin = self._origin(like.name) if like is not None else None
            entry = Entry(path=str(place), format=format, dataset=dataset, origin=origin)
            others = (one for one in listed.entries if one.dataset.name != name)
            self._write(listed.model_copy(update={"entries": (*others, entry)}))
        return dataset

    def grant(self, name: str, purpose: str, until: datetime | None = None) -> Dataset:
        """Grant a dataset for a purpose, in place of an earlier grant for it. Raises `NotFound`."""

        def granted(before: Dataset) -> dict[str, object]:
            purposes = tuple(dict.fromkeys((*before.purposes, purpose)))
            ends = {one: end for one, end in before.until.items() if one != purpose}
            return {"purposes": purposes, "until": {**ends, purpose: until} if until else ends}

        return self._amended(name, granted)

    def withdraw(self, name: str, purpose: str) -> Dataset:
        """Take a purpose back: runs for it are refused from the next thing that they ask for. Raises `NotFound`."""

        def withdrawn(before: Dataset) -> dict[str, object]:
            if purpose not in before.purposes:
                known = list(before.purposes)
                raise NotFound(f"purpose: {name!r} is not granted for {purpose!r}{near_miss(purpose, known)}")
            ends = {one: end for one, end in before.until.items() if one != purpose}
            return {"purposes": tuple(one for one in before.purposes if one != purpose), "until": ends}

        return self._amended(name, withdrawn)

    def require(self, name: str, wire: Wire) -> Dataset:
        """Say what a dataset's updates must pass through, in place of what was said before. Raises `NotFound`."""
        return self._amended(name, lambda before: {"wire": wire})

    def keep_in(self, name: str, regions: Iterable[str]) -> Dataset:
        """Say to which regions what is learned from a dataset may go; to any for none. Raises `NotFound`."""
        return self._amended(name, lambda before: {"regions": tuple(regions)})

    def set_budget(self, name: str, budget: Budget | None) -> Dataset:
        """Say how much of a dataset's privacy training may use in all; None for no budget. Raises `NotFound`, and
        `Invalid` for a dataset that was made from another, whose budget it is."""
        if (origin := self._origin(name)) != name:
            raise Invalid(f"budget: {name!r} was made from {origin!r}, and uses its budget; set that one's")
        return self._amended(name, lambda before: {"budget": budget})

    def counted(self, name: str) -> tuple[str, Budget | None]:
        """Return under which name a dataset's use is in the ledger, and its budget. Raises `NotFound`."""
        entry, origin = self.entry(name), self._origin(name)
        listed = {one.dataset.name: one.dataset for one in self._listing().entries}
        return origin, (listed.get(origin) or entry.dataset).budget

    def _origin(self, name: str) -> str:
        """Return the dataset that a dataset was made from in the end; itself where its owner added it."""
        listed = {one.dataset.name: one.origin for one in self._listing().entries}
        return listed.get(name) or name

    def _amended(self, name: str, terms: Callable[[Dataset], dict[str, object]]) -> Dataset:
        with self._turn():
            listed, entry = self._listed(), self.entry(name)
            fields = {**entry.dataset.model_dump(exclude_unset=True), **terms(entry.dataset)}
            dataset = parse(Dataset, fields, "dataset")
            amended = entry.model_copy(update={"dataset": dataset})
            entries = tuple(amended if one.dataset.name == name else one for one in listed.entries)
            self._write(listed.model_copy(update={"entries": entries}))
        return dataset

    def remove(self, name: str) -> None:
        """Take the dataset off the list; its file stays. Raises `NotFound`."""
        with self._turn():
            listed = self._listed()
            self.entry(name)
            left = tuple(one for one in listed.entries if one.dataset.name != name)
            self._write(listed.model_copy(update={"entries": left}))

    def add_pretrained(self, name: str, folder: str | Path) -> Pretrained:
        """List a folder with a pretrained model, in place of one of that name; whoever may run code here may use it.

        Raises `Invalid` and `NotFound` for a folder that holds none.
        """
        made = inspected(name, folder)
        with self._turn():
            listed = self._listed()
            others = (one for one in listed.pretrained if one.name != name)
            self._write(listed.model_copy(update={"pretrained": (*others, made)}))
        return made

    def remove_pretrained(self, name: str) -> None:
        """Take a pretrained model off the list; its folder stays. Raises `NotFound`."""
        with self._turn():
            listed = self._listed()
            left = tuple(one for one in listed.pretrained if one.name != name)
            if len(left) == len(listed.pretrained):
                names = [one.name for one in left]
                raise NotFound(f"pretrained: there is no {name!r} here{near_miss(name, names) if names else ''}")
            self._write(listed.model_copy(update={"pretrained": left}))

    def pretrained(self) -> tuple[Pretrained, ...]:
        return self._listing().pretrained

    def find_pretrained(self, digest: str) -> Pretrained | None:
        """Return the pretrained model of this digest, whatever it is called here."""
        return next((one for one in self.pretrained() if one.digest == digest), None)

    def datasets(self) -> tuple[Dataset, ...]:
        return tuple(entry.dataset for entry in self._listing().entries)

    def entry(self, name: str) -> Entry:
        """Return the entry of that name; raise `NotFound` with a near miss."""
        entries = {entry.dataset.name: entry for entry in self._listing().entries}
        if name not in entries:
            hint = near_miss(name, list(entries)) or "; add one by: atoll data add NAME FILE"
            raise NotFound(f"dataset: this site has no {name!r}{hint}")
        return entries[name]

    def table(self, name: str, columns: Sequence[str] | None = None) -> "pa.Table":
        """Read the dataset, or only some of its columns. Raises what `entry` and `read_table` raise."""
        entry = self.entry(name)
        return read_table(entry.path, entry.format, columns)

    def verify(self, name: str) -> Entry:
        """Return the entry. Raises `Corrupt` when its file is not the one that was added, `Unavailable` without one."""
        entry = self.entry(name)
        try:
            found = _fingerprint(Path(entry.path))
        except OSError:
            raise Unavailable(f"dataset {name!r}: its file cannot be read now; bring it back or add it again") from None
        if found != entry.dataset.fingerprint:
            raise Corrupt(f"dataset {name!r}: its file changed since it was added; add it again")
        return entry

    def _listing(self) -> Listing:
        """Return the list that answers are given from."""
        return self._listed()

    def _listed(self) -> Listing:
        """Return the list as the file has it now; raise `Invalid` where that is wrong."""
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            return Listing()
        # The file is only ever replaced, never written into: another content is another inode or another time.
        which = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if self._read is None or self._read[0] != which:
            self._read = (which, parse(Listing, read_yaml(self._file) or {}, str(self._file)))
        return self._read[1]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            lock = (self._home / "catalogue.lock").open("w")
        except OSError as error:
            raise Unavailable(f"{self._home}: cannot be written ({error.strerror}); choose another home") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by closing, also when the process dies
            yield

    def _write(self, listing: Listing) -> None:
        """Replace the file in one step: a reader or a crash sees the old list or the new one, never a part."""
        text = write_yaml(listing)
        try:
            handle, draft = tempfile.mkstemp(dir=self._home, prefix=".catalogue-")  # mode 0600: paths are private
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, self._file)
            except BaseException:
                os.unlink(draft)
                raise
            sync_folder(self._home)
        except OSError as error:
            raise Unavailable(f"{self._file}: cannot be written ({error.strerror}); make room and try again") from error


def read_table(path: str | Path, format: str, columns: Sequence[str] | None = None) -> "pa.Table":
    """Read a dataset's file, or only `columns`, in that order.

    Raises `Invalid` naming a missing column and the near miss, and when the file is not what `format` says;
    `Unavailable` when it cannot be opened. No message holds the path or a value: it may travel to another party.
    """
    import pyarrow as pa

    try:
        table = _read(Path(path), format, columns)
    except OSError:
        raise Unavailable("dataset: its file cannot be opened at this site; bring it back or add it again") from None
    except pa.ArrowException:
        raise Invalid(f"dataset: its file does not read as {format}; mend the file and add it again") from None
    return table


def rows_of(table: "pa.Table", rows: "np.ndarray") -> "pa.Table":
    """Return these rows (int64 indices) of a table.

    Their numbers are given as memory: of an array Arrow would import pandas, 0.2 s, to see whether it is of it.
    """
    import pyarrow as pa

    return table.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows.data)]))


def require_columns(wanted: Iterable[str], there: Sequence[str], field: str) -> None:
    """Raise `NotFound` for the first wanted column that is not there, with its near miss."""
    for name in wanted:
        if name not in there:
            raise NotFound(f"{field}: there is no column {name!r}{near_miss(name, list(there))}")


def _read(path: Path, format: str, columns: Sequence[str] | None) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv, parquet

    if format not in get_args(Format):
        raise Invalid(f"format: {format!r}{near_miss(format, list(get_args(Format)))}")
    if format == "csv":
        # Unquoted text of a missing value (NA, an empty field) is missing in text columns too, as in numeric ones.
        convert = csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
        table = csv.read_csv(path, convert_options=convert)
        names = table.column_names
    elif format == "parquet":
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require_columns(columns or (), names, "columns")
            # A list of columns in a Parquet read also matches nested fields, so the choice is made again below.
            table = file.read(columns=None if columns is None else list(columns))
    else:
        with pa.OSFile(str(path)) as source:  # not mapped: a file cut short under a map would kill the process
            table = pa.ipc.open_file(source).read_all()
        names = table.column_names
    if columns is None:
        return table
    require_columns(columns, names, "columns")
    return table.select(list(columns))


def _inspected(path: Path, format: Format) -> tuple[int, dict[str, str]]:
    """Return row count and column types; the owner is told what Arrow says, for the file is the owner's own."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if format == "parquet":
            with parquet.ParquetFile(path) as file:
                rows, schema = file.metadata.num_rows, file.schema_arrow
        else:
            table = _read(path, format, None)
            rows, schema = table.num_rows, table.schema
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise Invalid(f"{path}: does not read as {format} ({reason}); mend the file") from error
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise Invalid(f"{path}: column {twice[0]!r} is there twice; give each column its own name")
    if not rows or not schema.names:
        raise Invalid(f"{path}: has no rows; a dataset needs at least one")
    names = cast("list[str]", schema.names)
    return rows, {name: str(schema.field(name).type) for name in names}


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
