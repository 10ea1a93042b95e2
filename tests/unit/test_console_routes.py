"""Each route of the API is listed with its action, and what is not listed is nobody's."""

import asyncio

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware import Middleware

from atoll.console import api
from atoll.console.guard import OPEN, Guard, Keys, failure
from atoll.console.routes import ROUTES, authorise
from atoll.console.routes_users import people as people_routes
from atoll.console.tokens import SCOPES, Tokens
from atoll.errors import AtollError
from atoll.spec.user import User
from tests.unit.people import ADA, People

NAMES = {"{run}": "run-1", "{site}": "oslo", "{name}": "ada", "{reference}": "heart@1"}


def listed(router: APIRouter) -> set[str]:
    return {f"{method} {route.path}" for route in router.routes for method in route.methods}


def test_every_route_is_in_the_table_and_the_table_has_no_other():
    assert listed(api.v1) | listed(api.page) | listed(people_routes) == set(ROUTES)


def test_what_asks_for_no_token_is_what_the_guard_lets_pass():
    assert {name for name, (action, _) in ROUTES.items() if action == "open"} == {f"GET {path}" for path in OPEN}


def test_a_token_of_each_scope_opens_the_actions_of_that_scope_only():
    actions = {action for action, _ in ROUTES.values()} - {"open"}
    assert actions == set(SCOPES["all"])


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The API's routes and its guard, over users alone: whatever gets past both fails for want of a hub's other parts.

    Returns what asks a route in the name of a user with these roles and a token of this scope."""
    home = tmp_path_factory.mktemp("bare")
    people = People(home)
    tokens = Tokens(home, people.users)
    app = FastAPI(
        openapi_url=None,
        dependencies=[Depends(authorise)],
        middleware=[Middleware(Guard, keys=Keys("t" * 43, tokens))],
    )
    forgotten = APIRouter()
    forgotten.add_api_route("/v1/forgotten", lambda: "secret")
    app.state.hub, app.state.keys, app.state.streams = people, Keys("t" * 43, tokens), None
    app.add_exception_handler(AtollError, lambda request, error: failure(error))
    for router in (api.v1, api.page, people_routes, forgotten):
        app.include_router(router)

    def ask(name, roles, scope="all"):
        people.users.put(User(name="ada", roles=roles), "local")
        token = tokens.issue("ada", 1.0, (scope,), "local")
        method, path = name.split()
        for placeholder, value in NAMES.items():
            path = path.replace(placeholder, value)

        async def call():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8123") as http:
                return await http.request(method, path, headers={"Authorization": f"Bearer {token}"}, json={})

        return asyncio.run(call())

    yield ask
    people.journal.close()


def test_a_route_that_nobody_listed_is_refused_to_everybody(bare):
    answer = bare("GET /v1/forgotten", ADA.roles)
    assert (answer.status_code, "so nobody may" in answer.text) == (403, True)


LOOKED_AT = sorted(name for name, (action, _) in ROUTES.items() if action in ("view", "audit", "administer"))
ASKED = sorted(name for name, (action, _) in ROUTES.items() if action not in ("open", "view"))


@pytest.mark.parametrize("name", ASKED)
def test_a_token_to_read_with_changes_nothing_whoever_has_it(bare, name):
    answer = bare(name, ("owner",), "read")
    assert (answer.status_code == 403) == (ROUTES[name][0] != "audit"), answer.text
    if answer.status_code == 403:
        assert "its scope leaves view, audit" in answer.text


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_viewer_sees_and_neither_audits_nor_administers(bare, name):
    answer = bare(name, ("viewer",))
    assert (answer.status_code == 403) == (ROUTES[name][0] != "view"), answer.text
