"""A request as Cedar sees it: principal, action, resource, and a context without gaps."""

import json
from dataclasses import dataclass
from typing import Any

import cedarpy

from atoll.errors import Invalid
from atoll.policy.schema import ACTIONS, parsed
from atoll.spec.policy import Request

Uid = dict[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What Cedar answered. `matched` and `errors` go by Cedar's own rule names (policy0, policy1, ...)."""

    allowed: bool
    matched: tuple[str, ...]
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A translated request; `attributes` are those of the principal and the resource, as the rules see them.

    It is all that a rule can look at, so questions with one `text` have one answer.
    """

    action: str
    principal: Uid
    resource: Uid
    context: dict[str, Any]
    attributes: dict[str, dict[str, Any]]

    @property
    def text(self) -> str:
        return json.dumps([self.action, self.principal, self.resource, self.context, self.attributes])

    @property
    def entities(self) -> cedarpy.Entities:
        """The principal and the resource as Cedar holds them. Raises `Invalid` for what does not fit the schema."""
        of = ((self.principal, "principal"), (self.resource, "resource"))
        entities: list[dict[str, Any]] = [
            {"uid": uid, "attrs": self.attributes[part], "parents": []} for uid, part in of
        ]
        try:
            return cedarpy.Entities.from_json_str(  # pyright: ignore[reportUnknownMemberType] - bare dict in its signature
                json.dumps(entities), parsed()
            )
        except ValueError as error:
            kind, name = self.resource["type"], self.resource["id"]
            raise Invalid(f"{kind} {name!r} does not fit the policy schema ({error}); mend its document") from error

    def put(self, policies: cedarpy.PolicySet) -> Outcome:
        """Ask `policies`; allowed means that Cedar says Allow and that no rule failed on the way. Raises as
        `entities`."""
        entities = self.entities
        request = {
            "principal": self.principal,
            "action": {"type": "Action", "id": self.action},
            "resource": self.resource,
            "context": self.context,
        }
        try:
            result = cedarpy.is_authorized(  # pyright: ignore[reportUnknownMemberType] - its signature has bare dicts
                request, policies, entities, schema=parsed()
            )
        except ValueError as error:
            return Outcome(False, (), (str(error),))
        errors = tuple(result.diagnostics.errors)
        allowed = result.decision == cedarpy.Decision.Allow and not errors
        return Outcome(allowed, tuple(result.diagnostics.reasons), errors)


def translate(request: Request) -> Question:
    """Return the question that `request` asks.

    Raises `Invalid` for one that contradicts itself: the crossing and the request around it come from different
    places in the code, and a rule must never see the purpose of one with the dataset of the other.
    """
    _consistent(request)
    crossing = request.crossing
    kind, name, attributes = _resource(request)
    resource = {"type": kind, "id": name}
    principal = {"type": "User", "id": request.user}
    user: dict[str, Any] = {"roles": list(request.roles)}
    context: dict[str, Any] = {
        "purpose": request.purpose or (crossing.purpose if crossing else ""),
        "kind": crossing.kind if crossing else request.job_kind,
        "direction": crossing.direction if crossing else "",
        "to": "" if crossing is None else crossing.peer if crossing.direction == "out" else crossing.site,
        "code": request.code,
        "wire": list(crossing.wire) if crossing else [],
        "bytes": crossing.bytes if crossing else 0,
        "rows": crossing.rows if crossing else 0,
    }
    return Question(request.action, principal, resource, context, {"principal": user, "resource": attributes})


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


def _resource(request: Request) -> tuple[str, str, dict[str, Any]]:
    """Return type, id and attributes of the first of dataset, model and job that the action can be about."""
    possible = ACTIONS[request.action]
    if request.dataset is not None and "Dataset" in possible:
        dataset = request.dataset
        attributes: dict[str, Any] = {
            "name": dataset.name,
            "site": request.site,
            "owner": request.owner,
            "region": request.region,
            "purposes": list(dataset.purposes),
            "rows": dataset.rows,
            "min_group": dataset.min_group,
        }
        return "Dataset", dataset.name, attributes
    if request.model is not None and "Model" in possible:
        return "Model", request.model, {"name": request.model.partition("@")[0]}
    if "Job" in possible:
        name = request.job or ""
        return "Job", name, {"name": name, "kind": request.job_kind}
    raise Invalid(f"action {request.action!r}: is about a {possible[0].lower()} and the question names none; add it")
