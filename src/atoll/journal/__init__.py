"""What happened. Append-only, a Merkle tree, signed by its owner and witnessed by the others."""

from atoll.journal.entry import Entry
from atoll.journal.sqlite import Journal

__all__ = ["Entry", "Journal"]
