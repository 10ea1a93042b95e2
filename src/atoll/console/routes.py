"""Which action each route of the API is, and the one question that stands before all of them.

A route that is not listed here is refused to everybody, so that none can be forgotten.
"""

import asyncio
from typing import Annotated, Literal

from fastapi import Depends, Request

from atoll.console.guard import Keys
from atoll.console.streams import Streams
from atoll.console.tokens import Pass
from atoll.errors import Denied
from atoll.runtime.hub import Hub
from atoll.spec.policy import Action, Part
from atoll.spec.user import User

Point = Action | Literal["open"]  # open: asks for no token, and tells nothing that needs one

ROUTES: dict[str, tuple[Point, Part | None]] = {
    "GET /": ("open", None),
    "GET /app.js": ("open", None),
    "GET /style.css": ("open", None),
    "GET /login": ("open", None),
    "GET /v1/health": ("open", None),
    "GET /openapi.json": ("view", None),
    "POST /v1/login": ("view", None),
    "GET /v1/me": ("view", None),
    "POST /v1/jobs": ("submit", None),
    "POST /v1/plan": ("submit", None),
    "POST /v1/capacity": ("submit", None),
    "POST /v1/policy/explain": ("view", None),
    "GET /v1/runs": ("view", None),
    "GET /v1/runs/{run}": ("view", None),
    "GET /v1/runs/{run}/events": ("view", None),
    "POST /v1/runs/{run}/cancel": ("cancel", None),
    "GET /v1/runs/{run}/traffic": ("audit", None),
    "GET /v1/runs/{run}/explain": ("audit", None),
    "POST /v1/resume": ("administer", "runs"),
    "GET /v1/events": ("view", None),
    "GET /v1/fleet": ("view", None),
    "GET /v1/sites": ("view", None),
    "POST /v1/sites/{site}/revoke": ("administer", "sites"),
    "POST /v1/sites/{site}/release": ("administer", "sites"),
    "POST /v1/sites/{site}/invites": ("administer", "sites"),
    "GET /v1/models": ("view", None),
    "GET /v1/aliases": ("view", None),
    "GET /v1/models/{reference}": ("view", None),
    "GET /v1/models/{reference}/lineage": ("view", None),
    "POST /v1/models/{reference}/promote": ("promote", None),
    "GET /v1/models/{reference}/weights": ("export", None),
    "GET /v1/models/{reference}/code": ("export", None),
    "DELETE /v1/models/{reference}": ("erase", None),
    "GET /v1/deployments": ("view", None),
    "POST /v1/deployments": ("deploy", None),
    "POST /v1/redeploy": ("deploy", None),
    "DELETE /v1/deployments/{name}": ("deploy", None),
    "GET /v1/audit/verify": ("audit", None),
    "GET /v1/traffic": ("audit", None),
    "GET /v1/users": ("administer", "users"),
    "PUT /v1/users/{name}": ("administer", "users"),
    "DELETE /v1/users/{name}": ("administer", "users"),
    "POST /v1/users/{name}/tokens": ("administer", "users"),
    "POST /v1/revocations": ("administer", "users"),
    "GET /v1/projects": ("view", None),
    "PUT /v1/projects/{name}": ("administer", "users"),
    "GET /v1/approvals": ("view", None),
    "POST /v1/approvals/{name}": ("approve", None),
}


# These are async although they wait for nothing: others would be called in a thread each, one more for every request.
async def _hub(request: Request) -> Hub:
    return request.app.state.hub


async def _keys(request: Request) -> Keys:
    return request.app.state.keys


async def _streams(request: Request) -> Streams:
    return request.app.state.streams


async def _passed(request: Request) -> Pass:
    """Return whom the guard let in."""
    return request.state.passed


async def _user(request: Request) -> User:
    return request.state.passed.user


Here = Annotated[Hub, Depends(_hub)]
Door = Annotated[Keys, Depends(_keys)]
Open = Annotated[Streams, Depends(_streams)]
Passed = Annotated[Pass, Depends(_passed)]
Who = Annotated[User, Depends(_user)]


async def authorise(request: Request) -> None:
    """Hold a caller to the scope of the token, and to the hub's rules; raise `Denied`.

    Rules about a job, a model or a run are asked by the hub itself, which knows it; all others are asked here.
    """
    name = f"{request.method} {request.scope['route'].path}"
    action, part = ROUTES.get(name, (None, None))
    if action == "open":
        return
    if action is None:
        raise Denied(f"{name}: it is not listed who may do this, so nobody may")
    found: Pass = request.state.passed
    if action not in found.scope:
        raise Denied(f"token: its scope leaves {', '.join(found.scope) or 'nothing'} to it, and this is {action}")
    users = request.app.state.hub.users
    if action not in ("view", "audit", "administer"):
        return
    if part is not None or not users.sees(found.user, action):
        await asyncio.to_thread(users.may, found.user, action, part)  # it is journalled, which takes a moment
