"""A request as Cedar sees it: principal, action, resource, and a context without gaps."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cedarpy
from pydantic_core import to_json

from atoll.errors import Invalid
from atoll.policy.schema import ACTIONS, parsed
from atoll.spec.budget import Guarantee
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Crossing, Request
from atoll.spec.wire import clipped, noised

Uid = dict[str, str]
_MOST, _FOURTH = 2**63 - 1, 10_000  # of Cedar's integers; its decimals have four digits of them behind the point
_HELD = 256  # principals and resources as Cedar holds them: making them takes as long as the decision itself


@dataclass(frozen=True, slots=True)
class Outcome:
    """What Cedar answered. `matched` and `errors` go by Cedar's own rule names (policy0, policy1, ...)."""

    allowed: bool
    matched: tuple[str, ...]
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A translated request; `attributes` are those of the principal and the resource, as the rules see them.

    It is all that a rule can look at, so questions with one `text` have one answer. `notes` say of values among it,
    by attribute and value, what only people want to know.
    """

    action: str
    principal: Uid
    resource: Uid
    context: dict[str, Any]
    attributes: dict[str, dict[str, Any]]
    notes: dict[str, dict[str, str]]
    parties: str  # principal and resource with their attributes, as JSON for Cedar
    around: str  # the context likewise

    @property
    def text(self) -> str:
        notes = json.dumps(self.notes) if self.notes else ""
        return f"{self.action}\n{self.parties}\n{self.around}\n{notes}"

    def put(self, policies: cedarpy.PolicySet) -> Outcome:
        """Ask `policies`; allowed means that Cedar says Allow and that no rule failed on the way.

        Raises `Invalid` for a principal or a resource that does not fit the schema.
        """
        try:
            entities = _held(self.parties)
        except ValueError as error:
            kind, name = self.resource["type"], self.resource["id"]
            raise Invalid(f"{kind} {name!r} does not fit the policy schema ({error}); mend its document") from error
        request = {
            "principal": self.principal,
            "action": {"type": "Action", "id": self.action},
            "resource": self.resource,
            "context": self.around,
        }
        try:
            # Without the schema, of which the context may be a part only: a rule that looks at what is not there fails.
            result = cedarpy.is_authorized(  # pyright: ignore[reportUnknownMemberType] - its signature has bare dicts
                request, policies, entities
            )
        except ValueError as error:
            return Outcome(False, (), (str(error),))
        told = result.diagnostics
        errors = tuple(told.errors)
        allowed = result.decision == cedarpy.Decision.Allow and not errors
        return Outcome(allowed, tuple(told.reasons), errors)


@lru_cache(_HELD)
def _held(entities: str) -> cedarpy.Entities:
    """Return entities in JSON as Cedar holds them; raise `ValueError`."""
    return cedarpy.Entities.from_json_str(entities, parsed())  # pyright: ignore[reportUnknownMemberType] - bare dict inside


def _json(value: Any) -> str:
    """Return JSON by pydantic's writer, which takes a quarter of the standard library's time. Raises `Invalid`."""
    try:
        return to_json(value).decode()
    except ValueError as error:
        raise Invalid(f"question: holds text that is none ({error}); mend the name or the purpose in it") from error


def translate(request: Request, at: float, seen: frozenset[str] | None = None) -> Question:
    """Return the question that `request` asks at this time (seconds since the epoch), by which grants end.

    Of the context only what is ``seen`` by the rules is written out for Cedar, or all of it: writing and reading what
    nobody looks at takes as long as the decision itself.

    Raises `Invalid` for one that contradicts itself: the crossing and the request around it come from different
    places in the code, and a rule must never see the purpose of one with the dataset of the other.
    """
    _consistent(request)
    crossing = request.crossing
    kind, name, attributes = _resource(request, at)
    resource = {"type": kind, "id": name}
    principal = {"type": "User", "id": request.user}
    user: dict[str, Any] = {
        "name": request.user,
        "roles": list(request.roles),
        "projects": list(request.projects),
    }
    context: dict[str, Any] = {
        "purpose": request.purpose or (crossing.purpose if crossing else ""),
        "kind": crossing.kind if crossing else request.job_kind,
        "direction": crossing.direction if crossing else "",
        "to": "" if crossing is None else crossing.peer if crossing.direction == "out" else crossing.site,
        "region": crossing.region if crossing else "",
        "code": request.code,
        "approved": request.approved,
        "signer": request.signer,
        "sandbox": request.sandbox,
        "wire": list(crossing.wire) if crossing else [],
        "lacks": _lacks(request.dataset, crossing) if crossing and request.dataset else [],
        "bytes": crossing.bytes if crossing else 0,
        "rows": crossing.rows if crossing else 0,
        **_privacy(request.guarantee),
        "overdraws": list(request.overdrawn),
        "by": request.by,
    }
    notes = _notes(request.dataset, at) if request.dataset is not None else {}
    if request.overdrawn:
        notes = {**notes, "overdraws": request.overdrawn}
    parties: list[dict[str, Any]] = [
        {"uid": principal, "attrs": user, "parents": []},
        {"uid": resource, "attrs": attributes, "parents": []},
    ]
    known = {"principal": user, "resource": attributes}
    around = context if seen is None else {name: value for name, value in context.items() if name in seen}
    return Question(request.action, principal, resource, context, known, notes, _json(parties), _json(around))


def _privacy(promised: Guarantee | None) -> dict[str, Any]:
    """Return what a run promises as rules see it: rounded to what looks worse, and the worst where it promises nothing,
    so that a cap holds for that, too."""
    epsilon = _MOST if promised is None else min(_MOST, math.ceil(promised.epsilon * _FOURTH))
    delta = 1.0 if promised is None else promised.delta
    return {
        "privacy": promised.unit if promised is not None else "",
        "epsilon": {"__extn": {"fn": "decimal", "arg": f"{epsilon // _FOURTH}.{epsilon % _FOURTH:04d}"}},
        "delta_one_in": min(_MOST, math.floor((1 + 1e-9) / delta)) if delta else _MOST,
    }


def _lacks(dataset: Dataset, crossing: Crossing) -> list[str]:
    """Return which of the transforms that a dataset's owner wants are not, or more loosely, in an update's wire."""
    if not dataset.wire or (crossing.kind, crossing.direction) != ("update", "out"):
        return []
    missing = {step.kind for step in dataset.wire if step.kind not in crossing.wire}
    bound = clipped(dataset.wire)
    loose = {"clip"} if bound and not 0 < crossing.clip <= bound else set[str]()
    little = {"noise"} if crossing.noise < noised(dataset.wire) else set[str]()
    return sorted(missing | loose | little)


def _notes(dataset: Dataset, at: float) -> dict[str, dict[str, str]]:
    """Return when each grant that has ended did, and how strictly each transform that is wanted is."""
    if not (dataset.until or dataset.wire):
        return {}
    ends = {purpose: f"{dataset.until[purpose]:%Y-%m-%d %H:%M %Z}" for purpose in dataset.ended(at)}
    wanted = {step.kind: "" for step in dataset.wire}
    if bound := clipped(dataset.wire):
        wanted["clip"] = f" at {bound:g} or less"
    if multiple := noised(dataset.wire):
        wanted["noise"] = f" of {multiple:g} or more times the clip"
    return {"ended": ends, "lacks": wanted}


def _consistent(request: Request) -> None:
    crossing = request.crossing
    if (request.action == "cross") != (crossing is not None):
        raise Invalid(f"action {request.action!r}: a crossing is asked about with 'cross' and only there; set both")
    if crossing is None:
        return
    dataset = request.dataset.name if request.dataset else None
    if crossing.dataset is not None and crossing.dataset != dataset:
        raise Invalid(
            f"crossing of dataset {crossing.dataset!r}: the question describes {dataset!r}; give that dataset"
        )
    for field, inside, around in (
        ("purpose", crossing.purpose, request.purpose),
        ("site", crossing.site, request.site),
    ):
        if inside and around and inside != around:
            raise Invalid(f"crossing.{field} {inside!r}: the question around it says {around!r}; make them the same")


def _resource(request: Request, at: float) -> tuple[str, str, dict[str, Any]]:
    """Return type, id and attributes of the first of dataset, model and job that the action can be about."""
    possible = ACTIONS[request.action]
    if request.dataset is not None and "Dataset" in possible:
        dataset = request.dataset
        attributes: dict[str, Any] = {
            "name": dataset.name,
            "site": request.site,
            "owner": request.owner,
            "region": request.region,
            "purposes": list(dataset.granted(at)),
            "ended": list(dataset.ended(at)),
            "wire": [step.kind for step in dataset.wire],
            "regions": list(dataset.regions),
            "budget": dataset.budget.unit if dataset.budget is not None else "",
            "rows": dataset.rows,
            "min_group": dataset.min_group,
        }
        return "Dataset", dataset.name, attributes
    if request.model is not None and "Model" in possible:
        return "Model", request.model, {"name": request.model.partition("@")[0]}
    if "Job" in possible:
        name = request.job or ""
        return "Job", name, {"name": name, "kind": request.job_kind, "project": request.project}
    if "Hub" in possible:
        return "Hub", "hub", {"part": request.part or ""}
    raise Invalid(f"action {request.action!r}: is about a {possible[0].lower()} and the question names none; add it")
