"""The part of the client that is about people: users, tokens, projects, approvals; and how answers become documents."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from atoll.errors import Invalid, NotFound, Unavailable
from atoll.spec.document import near_miss
from atoll.spec.user import ApprovalView, Project, ProjectView, User, UserView

M = TypeVar("M", bound=BaseModel)
Call = Callable[..., Any]  # (method, path, body) -> the JSON of the answer


class People:
    """What `Client.people` does. Every method raises the `AtollError` that the hub raised."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def me(self) -> dict[str, Any]:
        """Whom the token lets in: user, scope, and when it ends."""
        return self._call("GET", "/v1/me")

    def users(self) -> list[UserView]:
        return many(UserView, self._call("GET", "/v1/users"))

    def put(self, name: str, roles: Sequence[str], projects: Sequence[str] = ("default",)) -> User:
        """Add a user, or give one other roles and projects."""
        asked = {"roles": list(roles), "projects": list(projects)}
        return one(User, self._call("PUT", f"/v1/users/{part(name)}", asked))

    def remove(self, name: str) -> None:
        self._call("DELETE", f"/v1/users/{part(name)}")

    def token(self, name: str, hours: float = 12.0, scope: Sequence[str] = ("all",)) -> str:
        """Return a new token of a user; it is told this once."""
        asked = {"hours": hours, "scope": list(scope)}
        return self._call("POST", f"/v1/users/{part(name)}/tokens", asked)["token"]

    def revoke(self, what: str) -> list[str]:
        """End a token by its id, or all of a user; returns their ids."""
        return self._call("POST", "/v1/revocations", {"what": what})["revoked"]

    def projects(self) -> list[ProjectView]:
        return many(ProjectView, self._call("GET", "/v1/projects"))

    def put_project(self, project: Project) -> Project:
        return one(Project, self._call("PUT", f"/v1/projects/{part(project.name)}", project.model_dump(mode="json")))

    def approvals(self) -> list[ApprovalView]:
        return many(ApprovalView, self._call("GET", "/v1/approvals"))

    def approval(self, name: str) -> ApprovalView:
        """What waits under this name, or did. Raises `NotFound`."""
        found = {view.approval: view for view in self.approvals()}
        if name not in found:
            raise NotFound(f"approval: there is no {name!r}{near_miss(name, list(found)) or '; nothing waits for any'}")
        return found[name]

    def answer(self, asked: ApprovalView, approve: bool) -> ApprovalView:
        """Say yes or no to what was looked at; by its digest the hub knows that it was this."""
        said = {"approve": approve, "digest": asked.digest}
        return one(ApprovalView, self._call("POST", f"/v1/approvals/{part(asked.approval)}", said))


def part(text: str) -> str:
    """One segment of a path: what a user typed must not reach into another route."""
    if not text or "/" in text or text in (".", ".."):
        raise Invalid(f"name: {text!r} is no name; use lower-case letters, digits, '.', '_' and '-'")
    return quote(text, safe="@")


def one(kind: type[M], data: Any) -> M:
    """Return a document of an answer; raise `Unavailable` for fields that this version does not know."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise Unavailable(
            f"hub: its answer has {error.error_count()} fields this version does not know; update one of the two"
        ) from error


def many(kind: type[M], data: Any) -> list[M]:
    return [one(kind, item) for item in data]
