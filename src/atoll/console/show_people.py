"""How people look in a terminal: users, projects, and what waits for a second person."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import RenderableType

from atoll.console.show import number, table, text
from atoll.spec.user import ApprovalView, ProjectView, UserView

_STATES = {"waiting": "yellow", "approved": "green", "rejected": "red", "expired": "dim"}


def users(found: Sequence[UserView]) -> RenderableType:
    rows = [
        (
            view.user.name,
            ", ".join(view.user.roles),
            ", ".join(view.user.projects),
            "\n".join(f"{one.token} ({' '.join(one.scope)}) until {_at(one.expires)}" for one in view.tokens),
        )
        for view in found
    ]
    return table("Users", ("user", "roles", "projects", "tokens"), rows)


def projects(found: Sequence[ProjectView]) -> RenderableType:
    rows = [
        (
            view.project.name,
            _of(view.running, view.project.runs_at_once),
            _of(view.runs, view.project.runs_per_day),
            _of(round(view.site_seconds), view.project.site_seconds),
        )
        for view in found
    ]
    return table("Projects", ("project", ">runs at once", ">runs in 24 h", ">site seconds in 24 h"), rows)


def approvals(found: Sequence[ApprovalView]) -> RenderableType:
    rows = [
        (
            view.approval,
            text(view.state, _STATES[view.state]),
            view.user,
            view.words,
            view.by or " or ".join(view.roles),
            _at(view.expires),
        )
        for view in found
    ]
    return table("Approvals", ("id", "state", "asked by", "what", "by", "until"), rows, "nothing waits for any")


def _of(used: int, bound: float | None) -> str:
    return number(used) if bound is None else f"{number(used)} of {bound:,g}"


def _at(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}Z"
