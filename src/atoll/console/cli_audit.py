"""Commands about the record: prove journals, and tell what happened, what crossed each border, what was live."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.console.terminal import Json, of, say

if TYPE_CHECKING:
    from atoll.spec.run import Verdict

PANEL = "The record"
_QUIET = 2.0  # seconds after which a person is told that it goes on, and then as often
Whose = Annotated[str, typer.Option("--site", metavar="SITE", help="A site of this home; by default the hub.")]

app = typer.Typer(no_args_is_help=True, help="Prove the journals; see what happened and what crossed each border.")


@contextmanager
def _patience(words: Callable[[], str]) -> Iterator[None]:
    """Tell a person now and then how far it is, on standard error, once it has taken more than two seconds."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(_QUIET):
            say(f"{words()}, {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=tell, name="patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_QUIET)


@app.command("verify")
def verify(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="An export, or a proof; by default this home's journals."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The key of a file's owner, known from elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify that no entry of a journal was changed, removed or put in; names the first that was.

    Each hash is made again, and the roots are held against what the owner signed and what witnesses cosigned. A file
    is verified alone, without a hub. Without --key it is only known that nobody but the holder of the key that the
    file names wrote it: compare that key with one that you have from its owner.

    Example: atoll audit verify

    Example: atoll audit verify hub.jsonl
    """
    from atoll.console import records
    from atoll.errors import Corrupt, Invalid

    if file is None and key is not None:
        raise Invalid("key: is for a file, and none is given; name the export or the proof")
    found = _journals(context) if file is None else [_file(file, key)]
    of(context).emit(found, records.verdicts(found), as_json)
    if not all(verdict.intact for verdict in found):
        raise typer.Exit(Corrupt.exit_code)


def _journals(context: typer.Context) -> "list[Verdict]":
    """Verify by the running hub, which knows what it wrote; without one by the files, so that none has to start."""
    from atoll.console.client import Client
    from atoll.console.host import find
    from atoll.runtime.record import verified

    home, far = of(context).home, ["the journals"]
    with _patience(lambda: f"verifying {far[0]}"):
        running = find(home)
        if running is not None:
            with Client(running) as hub:
                return hub.verify()

        def watch(owner: str, seq: int) -> None:
            far[0] = f"the journal of {owner}: {seq:,} entries are good"

        return verified(home, watch)


def _file(file: Path, key: str | None) -> "Verdict":
    from atoll.journal import export
    from atoll.journal.key import PublicKey

    named = PublicKey.read(key) if key is not None else None
    with _patience(lambda: f"verifying {file}"):
        return export.verify_proof(file, named) if export.is_proof(file) else export.verify(file, named)


@app.command("prove")
def prove(
    context: typer.Context,
    seq: Annotated[int, typer.Argument(metavar="ENTRY", help="The entry's number.", min=1, show_default=False)],
    owner: Whose = "hub",
    as_json: Json = False,
) -> None:
    """Prove that an entry is in a journal: its text, the path to the root, and the signed checkpoint.

    What --json prints, put into a file, is checked alone by `atoll audit verify FILE`, wherever it is taken.

    Example: atoll audit prove 12 --json
    """
    from atoll.console.show import text
    from atoll.journal import proofs
    from atoll.runtime.record import opened

    with opened(of(context).home, owner) as journal:
        proof = proofs.prove(journal, seq)
    checkpoint = proofs.check(proof)
    names = ", ".join(witness.split("/")[1] for witness in proof.witnesses) or "nobody yet"
    words = (
        f"{proof.entry}\n\nis entry {seq} of the {checkpoint.size} under this checkpoint, by {len(proof.path)} hashes; "
        f"cosigned by {names}:\n\n{proof.checkpoint}"
    )
    of(context).emit(proof, text(words.rstrip()), as_json)


@app.command("explain")
def explain(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Tell what happened in a run: who did what, under which rule.

    Example: atoll audit explain heart-1
    """
    from atoll.console import records

    with of(context).hub() as hub:
        lines = hub.explain(run)
    of(context).emit(lines, records.journal(lines), as_json)


@app.command("traffic")
def traffic(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Of one run; by default of all.")] = None,
    as_json: Json = False,
) -> None:
    """Show what crossed each site's border, by kind and in bytes, and what was refused.

    Example: atoll audit traffic heart-1
    """
    from atoll.console import records

    with of(context).hub() as hub:
        found = hub.traffic(run)
    of(context).emit(found, records.traffic(found), as_json)


@app.command("what-was-live")
def what_was_live(
    context: typer.Context,
    at: Annotated[str, typer.Option("--at", metavar="TIME", help="A time, as 2026-11-23T14:00Z.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Tell which models were deployed at a time, and which bore an alias: since when, and by whom.

    A deployment is live from its start until somebody stops it, also while its hub is not running.

    Example: atoll audit what-was-live --at 2026-11-23T14:00Z
    """
    from atoll.console import records
    from atoll.runtime.record import what_was_live as asked

    with _patience(lambda: "reading the journal"):
        found = asked(of(context).home, _moment(at, "at"))
    of(context).emit(found, records.live(found), as_json)


@app.command("export")
def export(
    context: typer.Context,
    to: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; nothing is there yet.")],
    owner: Whose = "hub",
    as_json: Json = False,
) -> None:
    """Write a journal as signed JSON Lines, which `atoll audit verify FILE` checks without this home.

    Example: atoll audit export hub.jsonl
    """
    from itertools import chain

    from atoll.console.show import text
    from atoll.errors import Invalid
    from atoll.journal import export as exporting
    from atoll.runtime.record import opened

    count, size = 0, 0
    with opened(of(context).home, owner) as journal, _patience(lambda: f"{count:,} lines are written"):
        lines = exporting.lines(journal)
        header = next(lines)  # before there is a file: an empty one would stand in the way of the next export
        try:
            file = to.open("xb")
        except FileExistsError:
            raise Invalid(f"{to}: is there already; give another name, or remove it") from None
        with file:
            for line in chain((header,), lines):
                count, size = count + 1, size + file.write(line)
    told = {"file": str(to), "journal": owner, "lines": count, "bytes": size, "key": str(journal.key)}
    words = (
        f"{to}: the journal of {owner} in {count:,} lines. Verify it by: atoll audit verify {to} --key {journal.key}"
    )
    of(context).emit(told, text(words), as_json)


@app.command("retain")
def retain(
    context: typer.Context,
    until: Annotated[str, typer.Option(metavar="DATE", help="The last day, as 2036-12-31.", show_default=False)],
    owner: Whose = "hub",
    as_json: Json = False,
) -> None:
    """Promise that a journal keeps its entries until a day; the day can be put off, and never brought forward.

    No command of Atoll drops entries. The promise is an entry itself, so that it is signed and witnessed.

    Example: atoll audit retain --until 2036-12-31
    """
    from atoll.console.show import text
    from atoll.console.terms import end_of
    from atoll.runtime.record import retain as promised

    end = end_of(until)
    promised(of(context).home, owner, end.timestamp(), "local")
    told = {"journal": owner, "until": end.isoformat()}
    of(context).emit(told, text(f"The journal of {owner} is kept until {end:%Y-%m-%d %H:%M %Z}."), as_json)


def _moment(given: str, field: str) -> float:
    """Return a time as seconds since the epoch; without a zone it is UTC, as all times are shown."""
    from datetime import UTC, datetime

    from atoll.errors import Invalid

    try:
        found = datetime.fromisoformat(given)
    except ValueError:
        raise Invalid(f"{field}: {given!r} is no time; give one as 2026-11-23T14:00Z") from None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
