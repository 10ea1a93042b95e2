"""What happened. Append-only and hash-chained."""
