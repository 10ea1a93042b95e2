"""Rules from a file, and rules that follow the file: a typo is refused and the old rules stay in force."""

import logging
import threading
from pathlib import Path

from atoll.errors import Invalid, NotFound
from atoll.policy.rules import Rules
from atoll.spec.policy import Decision, Policy, Request

log = logging.getLogger(__name__)
_LARGEST = 1 << 20  # bytes; a policy is written by hand


def load(path: Path, party: str) -> Rules:
    """Read and check a policy file; raise `NotFound`, or `Invalid` with the file, line, rule and mend."""
    return _rules(_read(path), path, party)


class LivePolicy:
    """The rules in a file, read anew when its content changes. Threads may share it.

    The first reading raises as `load` does: there is nothing to fall back to. After that a file that is gone,
    unreadable or wrong leaves the last good rules in force, and `problem` says what is wrong with it.
    """

    def __init__(self, path: Path, party: str) -> None:
        self.path = path
        self.party = party
        self.problem: str | None = None
        self._lock = threading.Lock()
        content = _read(path)
        self._rules = _rules(content, path, party)
        self._content: bytes | None = content

    def rules(self) -> Rules:
        """Return the rules now in force, after a look at the file."""
        with self._lock:
            self._look()
            return self._rules

    def decide(self, request: Request) -> Decision:
        """Answer by the rules now in force."""
        return self.rules().decide(request)

    def _look(self) -> None:
        try:
            content = _read(self.path)
            # Compared by content: two edits within one tick of the clock, or of equal size, are both seen.
            if content == self._content:
                return
            self._content = content
        except Invalid as problem:
            self._content = None  # so that it is read anew when it is back
            self._note(f"{problem}; the rules before this stay in force")
            return
        try:
            self._rules = _rules(content, self.path, self.party)
            self.problem = None
        except Invalid as problem:
            self._note(f"{problem}; the rules before this change stay in force")

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.error("%s", problem)
        self.problem = problem


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such policy file; check the path") from None
    except OSError as error:
        raise Invalid(f"{path}: cannot be read ({error.strerror}); give a text file that this user may read") from error
    if len(content) > _LARGEST:
        raise Invalid(f"{path}: more than {_LARGEST} bytes; a policy is a short text, check the path")
    return content


def _rules(content: bytes, path: Path, party: str) -> Rules:
    try:
        return Rules(Policy(party=party, text=content.decode()))
    except UnicodeDecodeError:
        raise Invalid(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except Invalid as problem:
        raise Invalid("\n".join(f"{path}: {line}" for line in str(problem).splitlines())) from problem
