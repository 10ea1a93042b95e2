"""Famous names for points of the outer space, and how a document's own fields lie over a preset's."""

from typing import Any, cast


def overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `under` with what `over` says instead, tables within tables alike; neither is changed."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = overlay(cast("dict[str, Any]", below), cast("dict[str, Any]", value)) if both else value
    return merged


_FEDOPT = {"rate": 0.03, "beta2": 0.99, "epsilon": 1e-3}

# Each line is all there is to it.
PRESETS: dict[str, dict[str, Any]] = {
    "data_parallel": {"exchange": "gradient", "period": 1, "outer": {"rate": 0.1}},
    "parameter_server": {
        "exchange": "gradient",
        "period": 1,
        "wait": {"kind": "buffer", "count": 1},
        "outer": {"rate": 0.1},
    },
    "fedavg": {"period": 10},  # McMahan et al., 2017
    "fedavgm": {"period": 10, "outer": {"momentum": 0.9}},  # Hsu et al., 2019
    "fedprox": {"period": 10, "proximal": 0.01},  # Li et al., 2020
    "fedadam": {
        "period": 10,
        "outer": {"kind": "adam", **_FEDOPT},
    },  # Reddi et al., 2021
    "fedyogi": {
        "period": 10,
        "outer": {"kind": "yogi", **_FEDOPT},
    },  # Reddi et al., 2021
    "fedbuff": {"period": 10, "wait": {"kind": "buffer", "count": 2}},  # Nguyen et al., 2022
    "scaffold": {"period": 10, "merge": "mean", "control": True},  # Karimireddy et al., 2020
    "diloco": {  # Douillard et al., 2023
        "period": 50,
        "merge": "mean",
        "outer": {"rate": 0.7, "momentum": 0.9, "nesterov": True},
        "keep_optimiser": True,
    },
    "streaming_diloco": {  # Douillard et al., 2025
        "period": 48,
        "fragments": 4,
        "delay": 5,
        "blend": 0.5,
        "merge": "mean",
        "outer": {"rate": 0.7, "momentum": 0.9, "nesterov": True},
        "keep_optimiser": True,
    },
}
