"""The HTTP API of a hub: each route is one call of `Hub`, behind `atoll.console.guard`; and the dashboard's page."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from pydantic import Field, StringConstraints
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import atoll
from atoll.console.guard import SESSION_SECONDS, Guard, Keys, cookie_name, failure
from atoll.console.oidc import Provider
from atoll.console.problems import PROBLEMS
from atoll.console.routes import Door, Here, Open, Passed, Who, authorise
from atoll.console.routes_users import people
from atoll.console.streams import Stream, Streams
from atoll.console.tokens import Tokens
from atoll.errors import AtollError, Invalid, NotFound
from atoll.planner.capacity import Change, Outlook
from atoll.registry.lineage import LineageTree
from atoll.runtime.hub import Hub
from atoll.spec.document import Document, Name
from atoll.spec.fleet import Fleet
from atoll.spec.job import Job
from atoll.spec.model import Bundle, Deployment, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Foreseen
from atoll.spec.run import DeploymentView, RunView, SiteView, Traffic, Verdict

Reference = Annotated[str, StringConstraints(max_length=130)]  # looked up, never part of a path


class Submission(Document):
    """A job and, when it trains, the code it needs."""

    job: Job
    bundle: Bundle | None = None


class Order(Submission):
    """A job to carry out. Under one name it is one run, however often it is sent."""

    run: Name | None = None


class WhatIf(Submission):
    """A job, and what would be otherwise."""

    change: Change = Change()


class Promotion(Document):
    alias: Name


class Invitation(Document):
    hours: float = Field(default=24.0, gt=0, le=24 * 30)
    relay: str = ""
    behind: Name | None = None


v1 = APIRouter(prefix="/v1")
page = APIRouter(include_in_schema=False)


def create_app(hub: Hub, token: str) -> FastAPI:
    """Make the ASGI app of ``hub``. Whoever holds ``token`` may do all; users have their own. Raises as `Tokens`."""
    folder = hub.home / "hub"
    keys = Keys(token, Tokens(folder, hub.users), Provider.of(folder))
    app = FastAPI(
        title="Atoll",
        version=atoll.__version__,
        docs_url=None,  # the stock pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # it is a route like the others
        responses=PROBLEMS,
        dependencies=[Depends(authorise)],
        middleware=[Middleware(Guard, keys=keys)],
    )
    app.state.hub, app.state.keys, app.state.streams = hub, keys, Streams(hub, keys)
    app.add_exception_handler(AtollError, _tell)
    app.add_exception_handler(RequestValidationError, _tell_fields)
    app.add_exception_handler(HTTPException, _tell_route)
    app.add_exception_handler(Exception, _tell_inner)
    app.include_router(v1)
    app.include_router(people)
    app.include_router(page)
    return app


# --- jobs and runs --------------------------------------------------------------------------------------------------


@v1.get("/health")
def health(keys: Door, challenge: Annotated[str, Field(max_length=100)] = "") -> dict[str, str]:
    """Say that a hub answers here, and prove to the caller that it is the one whose token it holds."""
    return {"version": atoll.__version__, "proof": keys.proof(challenge), **keys.signed(challenge)}


@v1.post("/jobs")
def submit(hub: Here, who: Who, body: Order) -> dict[str, str]:
    return {"run": hub.submit(body.job, body.bundle, who, body.run)}


@v1.post("/plan")
def plan(hub: Here, who: Who, body: Submission) -> Plan:
    return hub.plan(body.job, body.bundle, who)


@v1.post("/policy/explain")
def foresee(hub: Here, who: Who, body: Submission) -> list[Foreseen]:
    return hub.foresee(body.job, body.bundle, who)


@v1.post("/capacity")
def capacity(hub: Here, who: Who, body: WhatIf) -> list[Outlook]:
    return list(hub.capacity(body.job, body.bundle, who, body.change))


@v1.get("/runs")
def runs(hub: Here, who: Who) -> list[RunView]:
    return hub.disclosing.runs(hub.runs(), who)


@v1.get("/runs/{run}")
def run(hub: Here, who: Who, run: Name) -> RunView:
    return hub.disclosing.run(hub.run(run), who)


@v1.get("/runs/{run}/events")
async def run_events(hub: Here, streams: Open, passed: Passed, run: Name) -> Stream:
    """Server-sent events: the run's view at once and after each change, until it is over; its plan is told once."""
    await asyncio.to_thread(hub.run, run)  # an unknown run is a 404, which a stream that has begun could not say
    return streams.of_run(run, passed)


@v1.post("/runs/{run}/cancel")
def cancel(hub: Here, who: Who, run: Name) -> RunView:
    hub.cancel(run, who)
    return hub.disclosing.run(hub.run(run), who)


@v1.get("/runs/{run}/traffic")
def run_traffic(hub: Here, run: Name) -> list[Traffic]:
    return hub.record.traffic(run)


@v1.get("/runs/{run}/explain")
def explain(hub: Here, run: Name) -> JSONResponse:
    return JSONResponse([line.model_dump(mode="json") for line in hub.record.explain(run)])


@v1.post("/resume")
def resume(hub: Here) -> dict[str, list[str]]:
    return {"runs": hub.resume()}


@v1.get("/events")
async def events(streams: Open, passed: Passed) -> Stream:
    """Server-sent events: all runs, without plans, losses and results, whenever one of them changed."""
    return streams.of_all(passed)


# --- sites, models, deployments, the record -------------------------------------------------------------------------


@v1.get("/fleet")
def fleet(hub: Here) -> Fleet:
    return hub.fleet()


@v1.get("/sites")
def sites(hub: Here) -> list[SiteView]:
    return hub.sites()


@v1.post("/sites/{site}/revoke")
def revoke(hub: Here, who: Who, site: Name) -> dict[str, bool]:
    hub.revoke(site, who.name)
    return {"revoked": True}


@v1.post("/sites/{site}/release")
def release(hub: Here, who: Who, site: Name) -> dict[str, bool]:
    hub.release(site, who.name)
    return {"released": True}


@v1.post("/sites/{site}/invites")
def invite(hub: Here, who: Who, site: Name, body: Invitation) -> dict[str, str]:
    return {"token": hub.invite(site, body.hours, body.relay, body.behind, who.name)}


@v1.get("/models")
def models(hub: Here, who: Who) -> list[Model]:
    return hub.disclosing.models(hub.models(), who)


@v1.get("/aliases")
def aliases(hub: Here) -> dict[str, dict[str, int]]:
    return hub.aliases()


@v1.get("/models/{reference}")
def model(hub: Here, who: Who, reference: Reference) -> Model:
    return hub.disclosing.model(hub.model(reference), who)


@v1.get("/models/{reference}/lineage")
def lineage(hub: Here, who: Who, reference: Reference) -> LineageTree:
    return hub.disclosing.lineage(hub.lineage(reference), who)


@v1.post("/models/{reference}/promote")
def promote(hub: Here, who: Who, reference: Reference, body: Promotion) -> Model:
    return hub.disclosing.model(hub.holdings.promote(reference, body.alias, who), who)


@v1.get("/models/{reference}/weights", response_class=FileResponse)
def weights(hub: Here, who: Who, reference: Reference) -> FileResponse:
    """Give the weights as safetensors; their SHA-256 is the model's `weights`."""
    return FileResponse(hub.holdings.weights(reference, who), media_type="application/octet-stream")


@v1.get("/models/{reference}/code")
def code(hub: Here, who: Who, reference: Reference) -> Bundle:
    return hub.holdings.code(reference, who)


@v1.delete("/models/{reference}")
def erase(hub: Here, who: Who, reference: Reference) -> Model:
    return hub.disclosing.model(hub.holdings.erase(reference, who), who)


@v1.get("/deployments")
def deployments(hub: Here) -> list[DeploymentView]:
    return hub.deploying.views()


@v1.post("/deployments")
def deploy(hub: Here, who: Who, body: Deployment) -> DeploymentView:
    return hub.deploying.deploy(body, who)


@v1.post("/redeploy")
def redeploy(hub: Here, who: Who) -> list[DeploymentView]:
    return hub.deploying.redeploy(who)


@v1.delete("/deployments/{name}")
def undeploy(hub: Here, who: Who, name: Name) -> dict[str, str]:
    hub.deploying.undeploy(name, who)
    return {"stopped": name}


@v1.get("/audit/verify")
def verify(hub: Here) -> list[Verdict]:
    return hub.record.verify()


@v1.get("/traffic")
def traffic(hub: Here) -> list[Traffic]:
    return hub.record.traffic(None)


# --- the page -------------------------------------------------------------------------------------------------------

_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@v1.post("/login")
def ticket(request: Request, keys: Door, passed: Passed) -> dict[str, str]:
    """Give the holder of a token a link that logs one browser in as that user."""
    return {"url": f"{request.base_url}login?token={keys.ticket(passed)}"}


@page.get("/login")
def login(request: Request, keys: Door, token: str = "") -> Response:
    answer = RedirectResponse("/", 303, headers=_HEADERS)
    answer.set_cookie(
        cookie_name(request.scope["server"][1]),
        keys.session(token),
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
    )
    return answer


@page.get("/openapi.json")
def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@page.get("/")
def index() -> Response:
    return _file("index.html", "text/html")


@page.get("/app.js")
def script() -> Response:
    return _file("app.js", "text/javascript")


@page.get("/style.css")
def style() -> Response:
    return _file("style.css", "text/css")


def _file(name: str, kind: str) -> Response:
    return Response((_PAGE / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=_HEADERS)


# --- errors ---------------------------------------------------------------------------------------------------------


_LINES = 50  # of what is wrong in a body


def _tell(request: Request, error: Exception) -> Response:
    return failure(error if isinstance(error, AtollError) else AtollError(str(error)))


def _tell_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return failure(Invalid("\n".join(_wrong_field(item) for item in error.errors()[:_LINES])))


def _wrong_field(item: dict[str, Any]) -> str:
    """One line for one field; tables and long values are left out of it."""
    path = ".".join(str(part) for part in item["loc"][1:]) or str(item["loc"][0])
    value = item.get("input")
    shown = "" if isinstance(value, dict | list) else f"{str(value)[:80]!r}: "
    return f"{path}: {shown}{item['msg']}"


def _tell_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = failure(NotFound(f"{request.method} {request.url.path}: {error.detail}; see /openapi.json"))
    answer.status_code = error.status_code
    return answer


def _tell_inner(request: Request, error: Exception) -> Response:
    """A fault of our own: the caller gets a sentence, the hub's log (`--debug` shows it) the traceback."""
    return failure(AtollError(f"the hub failed inside ({type(error).__name__}: {error}); run again with --debug"))
