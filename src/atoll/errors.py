"""Every error Atoll raises on purpose. A user's mistake is told in one sentence: the field, the value, the mend.

    AtollError
    ├── Invalid            a document, an argument or a file is wrong           (exit code 2)
    │   ├── NotFound       a name that nothing answers to
    │   └── Unfit          what a site brought was not taken; its run goes on without it, or asks again
    ├── Denied             a policy refused; carries the party and the rules    (exit code 3)
    │   └── Unapproved     it waits for another user's approval, or did not get it
    ├── TaskFailed         the user's task broke: import, shape, non-finite loss (exit code 4)
    ├── Unavailable        a port, a disk, a hub, a site cannot be used now     (exit code 5)
    │   └── LinkLost       the other end of a channel went away; try again
    └── Corrupt            stored or received bytes are not what their digest says (exit code 6)

A Python traceback that reaches a user for the user's own mistake is a bug.
"""


class AtollError(Exception):
    """Root of the tree; `exit_code` is what the CLI exits with."""

    exit_code = 1


class Invalid(AtollError):
    exit_code = 2


class NotFound(Invalid):
    pass


class Unfit(Invalid):
    pass


class Denied(AtollError):
    exit_code = 3


class Unapproved(Denied):
    pass


class TaskFailed(AtollError):
    exit_code = 4
    bare = ""  # what may be said of it where a promise hides the data


class Unavailable(AtollError):
    exit_code = 5


class LinkLost(Unavailable):
    pass


class Corrupt(AtollError):
    exit_code = 6


def named(kind: str, words: str) -> AtollError:
    """Return the error of this class name, as another process told it; an unknown name is a plain `AtollError`."""
    kinds = (AtollError, Invalid, NotFound, Unfit, Denied, Unapproved, TaskFailed, Unavailable, LinkLost, Corrupt)
    return next((known for known in kinds if known.__name__ == kind), AtollError)(words)
