"""One site computes: torch, an untouched model, a mesh of ranks, steps."""
