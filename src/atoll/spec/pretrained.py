"""A pretrained model's files where a party keeps them: named by what they hold, verified when they are read."""

from pathlib import Path

from atoll.errors import Corrupt, NotFound, Unavailable
from atoll.spec.document import Digest, Document, Name, canonical, near_miss, sha256


class Pretrained(Document):
    """A folder as its owner listed it. Jobs name it by `digest`, so `name` and `path` stay at the party that has it."""

    name: Name
    path: str  # absolute
    files: dict[str, Digest]  # plain name -> digest of the file's bytes

    @property
    def digest(self) -> Digest:
        """Of the files' names and digests: the same wherever the same files lie."""
        return sha256(canonical(self.files))

    def read(self, name: str) -> bytes:
        """Return the bytes of one of the files. What is returned was verified, not what lies there afterwards.

        Raises `NotFound` for a file that is not of the list, `Unavailable` for one that cannot be read, and `Corrupt`
        when it is not the one that was listed. No message holds the path: it may travel to another party.
        """
        if name not in self.files:
            raise NotFound(f"pretrained: it has no file {name!r}{near_miss(name, list(self.files))}")
        try:
            data = (Path(self.path) / name).read_bytes()
        except OSError as error:
            raise Unavailable(f"pretrained: {name} cannot be read ({error.strerror}); bring it back") from None
        if sha256(data) != self.files[name]:
            raise Corrupt(f"pretrained: {name} has changed since the folder was listed; bring it back or add it again")
        return data
