"""Code that a site's owner has to decide about: what came in to be read, what was approved, and whose keys are trusted.

What was decided is the fold of the site's journal, to which the owner's commands write from processes of their own. The
texts lie in a folder, by digest: those that wait, of which there are so many at most, and those that were decided.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol

from atoll.durable import sync_folder
from atoll.errors import AtollError, Invalid, NotFound
from atoll.journal import Entry
from atoll.journal.key import PublicKey
from atoll.registry.signed import signer
from atoll.runtime.bundle import read_bundle
from atoll.runtime.disk import appearing
from atoll.spec.code import CodeEvent, CodeKept, CodeReviewed, CodeTrusted, CodeView
from atoll.spec.document import canonical, near_miss, parse, parse_json, sha256
from atoll.spec.model import Bundle

KINDS = ("code.kept", "code.reviewed", "code.trusted")
_WAITING, _BYTES = 50, 32 << 20  # texts that wait, and all of them together: others submit them


class Reading(Protocol):
    """A journal."""

    def entries(self, after: int = 0, kinds: Collection[str] = ()) -> Iterator[Entry]: ...


class Reviews:
    """Any thread may ask. ``record`` writes an event to the journal, and returns once it is on the disk."""

    def __init__(self, home: Path, journal: Reading, record: Callable[[CodeEvent], object]) -> None:
        self._texts, self._code = home / "review", home / "code"
        self._journal, self._record, self._turn = journal, record, threading.Lock()
        self._folded = 0
        self._kept: dict[str, CodeKept] = {}  # in the order that they came in
        self._reviewed: dict[str, CodeReviewed] = {}  # the newest word last
        self._trusted: dict[str, str] = {}  # key -> the name that rules know it by
        self._keys: dict[str, str] = {}  # code -> the key that signed it

    # --- what rules ask

    def approved(self, code: str) -> bool:
        with self._turn:
            self._fold()
            said = self._reviewed.get(code)
            return said is not None and said.approved

    def signer(self, code: str) -> str:
        """Return the name under which the owner trusts who signed code that is here; "" for any other."""
        with self._turn:
            self._fold()
            if code and self._trusted and code not in self._keys:
                bundle = self._found(code)
                if bundle is not None:
                    self._keys[code] = _key(bundle)
            return self._trusted.get(self._keys.get(code, ""), "")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all trusted keys."""
        with self._turn:
            self._fold()
            return tuple(dict.fromkeys(self._trusted.values()))

    # --- what comes in

    def meet(self, bundle: Bundle) -> None:
        """Learn who signed code, before rules are asked whether it may run."""
        with self._turn:
            self._keys[sha256(canonical(bundle))] = _key(bundle)

    def keep(self, bundle: Bundle, task: str, job: str, user: str) -> None:
        """Keep code to be read. Where there is too much of it, what came first is let go: it comes in again."""
        data = canonical(bundle)
        code = sha256(data)
        with self._turn:
            self._fold()
            if not self._path(code).is_file():
                self._texts.mkdir(exist_ok=True)
                with appearing(self._path(code)) as file:
                    file.write(data)
                sync_folder(self._texts)
            if code not in self._kept:
                self._record(CodeKept(code=code, task=task[:200], job=job, user=user, key=_key(bundle)))
                self._fold()
            waiting = [one for one in self._kept if one not in self._reviewed and self._path(one).is_file()]
            waiting.sort(key=lambda one: (one == code, self._path(one).stat().st_mtime_ns))
            sizes = {one: self._path(one).stat().st_size for one in waiting}
            while len(waiting) > _WAITING or (sum(sizes[one] for one in waiting) > _BYTES and len(waiting) > 1):
                self._path(waiting.pop(0)).unlink()

    # --- what the owner sees and says

    def views(self) -> list[CodeView]:
        """Return what waits and can be read, and what was decided, the newest last."""
        with self._turn:
            self._fold()
            found = [
                CodeView(code=kept.code, task=kept.task, state="waiting", job=kept.job, user=kept.user)
                for kept in self._kept.values()
                if kept.code not in self._reviewed and self._path(kept.code).is_file()
            ]
            for said in self._reviewed.values():
                state = "approved" if said.approved else "rejected"
                job = self._kept[said.code].job if said.code in self._kept else ""
                found.append(CodeView(code=said.code, task=said.task, state=state, job=job, user=said.user))
            keys = {kept.code: kept.key for kept in self._kept.values()}
            return [
                one.model_copy(update={"signer": self._trusted.get(key, key)})
                for one in found
                for key in (keys.get(one.code, ""),)
            ]

    def named(self, words: str) -> str:
        """Return the whole digest of which a person gave the beginning. Raises `NotFound`, `Invalid`."""
        whole = words if words.startswith("sha256:") else f"sha256:{words}"
        known = [one.code for one in self.views()]
        found = [code for code in known if code.startswith(whole)]
        if len(found) > 1:
            raise Invalid(f"code: {words!r} begins {len(found)} digests; give more of it")
        if not found:
            raise NotFound(f"code: none here is {words!r}{near_miss(whole, known) or '; list it by: atoll site code'}")
        return found[0]

    def text(self, code: str) -> Bundle:
        """Return code that is here. Raises `NotFound`."""
        found = self._found(code)
        if found is None:
            raise NotFound(f"code: {code[:19]}... is not kept any more; submit its job again")
        return found

    def before(self, code: str) -> tuple[str, Bundle] | None:
        """Return the digest and text of the last code of the same task that was approved, where it is still here."""
        with self._turn:
            self._fold()
            task = self._task(code)
            for said in reversed(self._reviewed.values()):
                if said.approved and said.task == task and said.code != code:
                    found = self._found(said.code)
                    return (said.code, found) if found is not None else None
            return None

    def review(self, code: str, approved: bool, user: str) -> CodeReviewed:
        """Say that code may run here, or may not. Raises `NotFound` for code that nobody can have read."""
        self.text(code)
        with self._turn:
            said = CodeReviewed(code=code, task=self._task(code), approved=approved, user=user)
            self._record(said)
        return said

    def trust(self, key: str, name: str, trusted: bool, user: str) -> CodeTrusted:
        """Trust who has a key, or do so no more. Raises `Invalid` for what is no key, or no name."""
        fields = {"key": str(PublicKey.read(key)), "name": name, "trusted": trusted, "user": user}
        said = parse(CodeTrusted, fields, "trust")
        with self._turn:
            self._record(said)
        return said

    def _task(self, code: str) -> str:
        known = self._kept.get(code) or self._reviewed.get(code)
        return known.task if known is not None else ""

    def _fold(self) -> None:
        for entry in self._journal.entries(after=self._folded, kinds=KINDS):
            self._folded = entry.seq
            match entry.event:
                case CodeKept() as kept:
                    self._kept[kept.code] = kept
                case CodeReviewed() as said:
                    self._reviewed.pop(said.code, None)
                    self._reviewed[said.code] = said
                case CodeTrusted(trusted=True) as said:
                    self._trusted[said.key] = said.name
                case CodeTrusted() as said:
                    self._trusted.pop(said.key, None)
                case _:
                    pass

    def _found(self, code: str) -> Bundle | None:
        """Return code that lies here, to be read or because it ran, if it is what its digest says."""
        try:
            data = self._path(code).read_bytes()
        except FileNotFoundError:
            return read_bundle(self._code / code.removeprefix("sha256:"), code)
        return parse_json(Bundle, data, "code") if sha256(data) == code else None

    def _path(self, code: str) -> Path:
        return self._texts / f"{code.removeprefix('sha256:')}.json"


def _key(bundle: Bundle) -> str:
    try:
        key = signer(bundle)
    except AtollError:  # a hub lets none such through; to its reader it is code that nobody signed
        return ""
    return "" if key is None else str(key)
