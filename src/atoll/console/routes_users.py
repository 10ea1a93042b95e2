"""Routes about people: users and their tokens, projects, and what waits for a second person."""

import time

from fastapi import APIRouter
from pydantic import Field

from atoll.console.routes import Door, Here, Passed, Who
from atoll.errors import Unavailable
from atoll.spec.document import Digest, Document, Name
from atoll.spec.user import ApprovalView, Kinds, Project, ProjectView, User, UserName, UserView

people = APIRouter(prefix="/v1")


class Standing(Document):
    """What a user may do, and in which projects."""

    roles: Kinds
    projects: tuple[Name, ...] = ("default",)


class TokenWanted(Document):
    hours: float = Field(default=12.0, gt=0, le=720)
    scope: tuple[Name, ...] = ("all",)


class Revocation(Document):
    what: UserName  # a token's id, or a user, all of whose tokens end


class Answer(Document):
    """A word on what another user asked for, which the digest says to have been looked at."""

    approve: bool
    digest: Digest


class Me(Document):
    """Whom a token lets in."""

    user: User
    scope: tuple[str, ...]
    expires: float | None = None  # seconds since the epoch


@people.get("/me")
async def me(passed: Passed) -> Me:
    ends = None if passed.expires == float("inf") else passed.expires
    return Me(user=passed.user, scope=passed.scope, expires=ends)


@people.get("/users")
def users(hub: Here) -> list[UserView]:
    return hub.users.views()


@people.put("/users/{name}")
def put_user(hub: Here, who: Who, name: Name, body: Standing) -> User:
    return hub.users.put(User(name=name, roles=body.roles, projects=body.projects), who.name)


@people.delete("/users/{name}")
def remove_user(hub: Here, who: Who, name: Name) -> dict[str, str]:
    hub.users.remove(name, who.name)
    return {"removed": name}


@people.post("/users/{name}/tokens")
def issue(keys: Door, who: Who, name: Name, body: TokenWanted) -> dict[str, str]:
    """Make a token. This answer is the only place where it is ever told."""
    if keys.tokens is None:
        raise Unavailable("tokens: this hub makes none")
    return {"token": keys.tokens.issue(name, body.hours, body.scope, who.name)}


@people.post("/revocations")
def revoke_tokens(hub: Here, who: Who, body: Revocation) -> dict[str, list[str]]:
    return {"revoked": list(hub.users.revoke(body.what, who.name))}


@people.get("/projects")
def projects(hub: Here) -> list[ProjectView]:
    return hub.quotas.views(time.time())


@people.put("/projects/{name}")
def put_project(hub: Here, who: Who, name: Name, body: Project) -> Project:
    return hub.quotas.put(body.model_copy(update={"name": name}), who.name)


@people.get("/approvals")
def approvals(hub: Here) -> list[ApprovalView]:
    return hub.approvals.views()


@people.post("/approvals/{name}")
def answer(hub: Here, who: Who, name: Name, body: Answer) -> ApprovalView:
    """Say yes, and have it carried out; or no."""
    if body.approve:
        return hub.approve(name, body.digest, who)
    return hub.approvals.reject(name, body.digest, who)
