"""The API asked in all ways that its own document allows, and in some that it does not: answers are as it says."""

import asyncio

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from atoll.console.api import create_app
from atoll.runtime.hub import Hub
from atoll.serving.deployments import Deployments

URL, TOKEN = "http://127.0.0.1:8123", "t" * 43
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
GOOD = GenerationMode.POSITIVE
EVENTS = ("/v1/events", "/v1/runs/{run}/events")  # streams, which end when their reader goes


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Return what asks the app of a hub without sites."""
    home = tmp_path_factory.mktemp("home")
    hub = Hub(home, Deployments(home / "hub" / "logs"))
    transport = httpx.ASGITransport(create_app(hub, TOKEN), raise_app_exceptions=False)

    async def asked(method, url, **more):
        async with httpx.AsyncClient(transport=transport) as client:
            return await client.request(method, url, **more)

    yield lambda *words, **more: asyncio.run(asked(*words, **more))
    hub.close()


@pytest.fixture(scope="module")
def operations(ask):
    document = ask("GET", f"{URL}/openapi.json", headers=BEARER).json()
    schema = schemathesis.openapi.from_dict(document)
    return [found.ok() for found in schema.get_all_operations() if found.ok().path not in EVENTS]


def asked(ask, case):
    about = case.as_transport_kwargs(base_url=URL, headers=BEARER)
    about.pop("cookies", None)
    if isinstance(about.get("data"), bytes | str):
        about["content"] = about.pop("data")
    return ask(**about)


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_asked_is_answered_as_the_document_says(ask, operations, data):
    for operation in data.draw(st.lists(st.sampled_from(operations), max_size=20, unique_by=str)):
        mode = data.draw(st.sampled_from(GenerationMode)) if operation.body or operation.path_parameters else GOOD
        case = data.draw(operation.as_strategy(generation_mode=mode))
        response = asked(ask, case)
        assert response.status_code != 500, f"{case.method} {case.path}: {response.text}"
        case.validate_response(response, checks=CHECKS)
