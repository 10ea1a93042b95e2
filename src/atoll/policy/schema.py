"""The vocabulary of a policy: who asks, of what, and everything a rule may look at.

Every action has the same context and every attribute is always there. Cedar skips a rule that looks at something
missing, and a skipped `forbid` would let a crossing through, so nothing here is optional.
"""

from functools import cache

import cedarpy

ENTITIES: dict[str, dict[str, str]] = {
    "User": {"roles": "Set<String>"},
    "Dataset": {
        "name": "String",
        "site": "String",
        "owner": "String",
        "region": "String",
        "purposes": "Set<String>",  # what the owner grants it for
        "rows": "Long",
        "min_group": "Long",  # groups of fewer rows do not leave the site
    },
    "Model": {"name": "String"},  # without its version; Model::"heart@3" names one version
    "Job": {"name": "String", "kind": "String"},
}

CONTEXT: dict[str, str] = {
    "purpose": "String",  # what the job says it uses the data for
    "kind": "String",  # of a crossing: update, metric, ...; else the job's: train, query, ...
    "direction": "String",  # "out" of the site or "in" to it; "" where nothing crosses
    "to": "String",  # who receives what crosses; "" where nothing crosses
    "code": "String",  # digest of the code bundle, "" where there is none
    "wire": "Set<String>",  # what the agent does to an update before it leaves
    "bytes": "Long",
    "rows": "Long",  # how many rows the smallest group in it stands for; 0 where that has no meaning
}

ACTIONS: dict[str, tuple[str, ...]] = {
    "submit": ("Job",),
    "plan": ("Dataset",),
    "open": ("Dataset",),
    "cross": ("Dataset", "Model", "Job"),
    "release": ("Model",),
    "promote": ("Model",),
    "deploy": ("Model",),
    "export": ("Model",),
}


def _record(attributes: dict[str, str]) -> str:
    return "{ " + ", ".join(f"{name}: {kind}" for name, kind in attributes.items()) + " }"


def _text() -> str:
    lines = [f"entity {name} = {_record(attributes)};" for name, attributes in ENTITIES.items()]
    lines.append(f"type Context = {_record(CONTEXT)};")
    for action, resources in ACTIONS.items():
        of = ", ".join(resources)
        lines.append(f"action {action} appliesTo {{ principal: User, resource: [{of}], context: Context }};")
    return "\n".join(lines) + "\n"


SCHEMA: str = _text()


@cache
def parsed() -> cedarpy.Schema:
    """Return the schema as Cedar holds it, parsed once."""
    return cedarpy.Schema.from_str(SCHEMA)
