"""The vocabulary of a policy: who asks, of what, and everything a rule may look at.

Every action has the same context and every attribute is always there. Cedar skips a rule that looks at something
missing, and a skipped `forbid` would let a crossing through, so nothing here is optional.
"""

from functools import cache

import cedarpy

ENTITIES: dict[str, dict[str, str]] = {
    "User": {"name": "String", "roles": "Set<String>", "projects": "Set<String>"},
    "Dataset": {
        "name": "String",
        "site": "String",
        "owner": "String",
        "region": "String",
        "purposes": "Set<String>",  # what the owner grants it for now
        "ended": "Set<String>",  # what it was granted for until a time that is past
        "wire": "Set<String>",  # what its updates must pass through before they leave
        "regions": "Set<String>",  # where what is learned from it may go; none: anywhere
        "budget": "String",  # the unit of its privacy budget, "record" or "site"; "" where it has none
        "rows": "Long",
        "min_group": "Long",  # groups of fewer rows do not leave the site
    },
    "Model": {"name": "String"},  # without its version; Model::"heart@3" names one version
    "Job": {"name": "String", "kind": "String", "project": "String"},
    "Hub": {"part": "String"},  # "runs", "sites" or "users" where it is administered
}

CONTEXT: dict[str, str] = {
    "purpose": "String",  # what the job says it uses the data for
    "kind": "String",  # of a crossing: update, metric, ...; else the job's: train, query, ...
    "direction": "String",  # "out" of the site or "in" to it; "" where nothing crosses
    "to": "String",  # who receives what crosses; "" where nothing crosses
    "region": "String",  # where that receiver is, as it says; "" where nothing crosses or it did not say
    "code": "String",  # digest of the code bundle, "" where there is none
    "approved": "Bool",  # whether the site's owner has approved that code; at a hub false
    "signer": "String",  # by what name the site's owner trusts the key that signed it; "" for any other, and at a hub
    "sandbox": "Bool",  # whether the site would run it in a sandbox; at a hub false
    "wire": "Set<String>",  # what the agent does to an update before it leaves
    "lacks": "Set<String>",  # what the dataset's owner wants done to it and is not, or not as strictly
    "bytes": "Long",
    "rows": "Long",  # how many rows the smallest group in it stands for; 0 where that has no meaning
    "privacy": "String",  # the unit that a run which trains on the dataset hides, "record" or "site"; "" for none
    "epsilon": "decimal",  # of all of that run, rounded up; the largest decimal without a promise
    "delta_one_in": "Long",  # its delta as one in so many, 100000 for 1e-5; 1 without a promise
    "overdraws": "Set<String>",  # what of it does not fit into what is left of the dataset's budget
    "by": "String",  # who asked for what is to be approved, or whose run is to be cancelled; "" elsewhere
}

ACTIONS: dict[str, tuple[str, ...]] = {
    "view": ("Hub",),
    "submit": ("Job",),
    "cancel": ("Job",),
    "plan": ("Dataset",),
    "open": ("Dataset",),
    "cross": ("Dataset", "Model", "Job"),
    "release": ("Model", "Job"),
    "promote": ("Model",),
    "deploy": ("Model",),
    "export": ("Model",),
    "erase": ("Model",),
    "approve": ("Model", "Job"),
    "administer": ("Hub",),
    "audit": ("Hub",),
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
