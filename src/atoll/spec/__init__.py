"""The documents: what is asked, what exists, what was decided, what happened. No torch, no ray, no network."""
