"""What happened. Append-only and hash-chained."""

from atoll.journal.chain import Entry
from atoll.journal.sqlite import Journal

__all__ = ["Entry", "Journal"]
