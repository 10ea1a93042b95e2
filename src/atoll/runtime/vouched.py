"""What else in a home tells whether a journal there is the one it was: the key beside it, and what witnesses saw of it.

A journal names the key that signs it, and so does another one in its place. Whoever puts it there has to know of each
file in which the first one was seen, and to change all of them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.errors import Corrupt, Denied, Invalid, NotFound, Unavailable
from atoll.journal import Journal
from atoll.journal.audit import Word
from atoll.journal.key import Key
from atoll.journal.witness import Seen
from atoll.spec.run import Verdict


def verify(home: Path, journal: Journal, watch: Callable[[int], None] | None = None) -> Verdict:
    """Verify a journal of a home by itself, by the key beside it, and by what the home's witnesses saw of it.

    Raises `Corrupt` where another key lies beside it.
    """
    _check_key(journal)
    others, words = list[str](), list[Word]()
    for witness, seen, its_own in _seen(home, journal.owner):  # before the journal is read: it only grows meanwhile
        if seen.key == journal.key:
            words.append(Word(seen.checkpoint.size, seen.checkpoint.root, f"the witness {witness}"))
        elif its_own:
            others.append(f"{witness} saw {seen.checkpoint.size} entries that {seen.key.name} signed")
    found = journal.verify(watch, words)
    if not others or not found.intact:
        return found
    told = f"signed by {journal.key.name}, and the witness {'; '.join(others)}: restore it, and its key, from a copy"
    return found.model_copy(update={"intact": False, "witnesses": {}, "words": told})


def _check_key(journal: Journal) -> None:
    try:
        beside = Key.kept(journal.path.with_suffix(".key"), journal.owner, make=False)
    except (NotFound, Denied, Unavailable):  # a copy without it, and one that others can read, are told elsewhere
        return
    if beside.public != journal.key:
        raise Corrupt(f"{journal.path}: another key signs it than the one beside it; restore both from one copy")


def _seen(home: Path, owner: str) -> Iterator[tuple[str, Seen, bool]]:
    """Yield what each witness in a home saw of a journal, and whether it can only be this home's: the hub's own sites
    call it "hub", those that joined by its name, and a site that joined is perhaps another hub's."""
    if owner == "hub":
        notes = [(path.parent.parent, path) for path in sorted((home / "sites").glob("*/witness/*"))]
        found = [(folder.name, path, path.name == "hub") for folder, path in notes]
    else:
        joined = (home / "sites" / owner / "identity.json").exists()
        found = [("hub", home / "hub" / "witness" / owner, not joined)]
    for witness, path, its_own in found:
        try:
            seen = Seen.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, Invalid, Corrupt) as error:
            raise Corrupt(f"{path}: what was seen of {owner}'s journal cannot be read ({error}); mend it") from None
        if seen.key.owner == owner:
            yield witness, seen, its_own
