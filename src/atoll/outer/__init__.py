"""Many sites agree: delta, merge, outer optimiser, wire. numpy only; no torch, no network."""
