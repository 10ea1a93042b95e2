"""The Python client of a hub, for scripts and notebooks; the command line is written with it.

with atoll.connect() as hub:
    view = hub.run_job("job.yaml")
    print(view.result.metrics)
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import JsonValue

from atoll import errors
from atoll.console.document import load_job
from atoll.console.host import Address, attach
from atoll.console.login import given_token
from atoll.console.people import People, many, one, part
from atoll.errors import AtollError, Invalid, LinkLost, NotFound, Unavailable
from atoll.planner.capacity import Change, Outlook
from atoll.registry.lineage import LineageTree
from atoll.spec.document import near_miss, parse_json
from atoll.spec.fleet import Fleet
from atoll.spec.job import Job, run_name
from atoll.spec.model import Bundle, Deployment, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Foreseen
from atoll.spec.run import DeploymentView, RunView, SiteView, Traffic, Verdict

Watch = Callable[[RunView], None]
_ERRORS = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AtollError)
}
# Planning may first build and time a model at every site; a stream says something at least every second.
_TIMEOUT = httpx.Timeout(60.0, connect=5.0, read=600.0)
_STREAM = httpx.Timeout(60.0, connect=5.0, read=30.0)
_NO_CHANGE = Change()


def connect(home: str | Path = ".atoll", sites: bool = True, token: str | None = None) -> "Client":
    """Reach the hub of ``home``; with none running, start one inside this process (and, with ``sites``, its sites).

    With a user's ``token`` (or one in the environment's ATOLL_TOKEN) it is reached as that user. Close the client to
    end an embedded hub; its state stays under ``home``. Raises `Unavailable`.
    """
    return Client(attach(Path(home), sites, token=token or given_token(None)))


class Client:
    """One hub, seen from a program. Every method raises the `AtollError` that the hub raised."""

    def __init__(self, address: Address) -> None:
        self.address = address
        # Loopback only: a proxy of the environment must not see the token.
        self._http = httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.token}"},
            timeout=_TIMEOUT,
            trust_env=False,
        )
        self.people = People(self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; an embedded hub and its sites end with it."""
        self._http.close()
        self.address.close()

    # --- jobs and runs

    def submit(self, job: Job, bundle: Bundle | None = None, run: str | None = None) -> str:
        """Hand in a job; returns the run's id. Raises `Invalid`, `NotFound` or `Denied`.

        Who may miss the answer gives the id, made by `run_name`: the same one twice is one run.
        """
        return self._call("POST", "/v1/jobs", {**_submission(job, bundle), "run": run})["run"]

    def withdraw(self, job: Job, bundle: Bundle | None, run: str, watch: Watch | None = None) -> RunView:
        """Cancel a run whose submission was interrupted, and return its last view.

        Nobody knows whether the hub has the job, will yet have it, or never: so it is submitted once more, which makes
        no second run, and cancelled. Raises as `submit` does: then there is no run.
        """
        return self.stop(self.submit(job, bundle, run), watch)

    def plan(self, job: Job, bundle: Bundle | None = None) -> Plan:
        """Plan a job without running it."""
        return one(Plan, self._call("POST", "/v1/plan", _submission(job, bundle)))

    def foresee(self, job: Job, bundle: Bundle | None = None) -> list[Foreseen]:
        """What every policy would say to a job, rule by rule, at each point that can be known before."""
        return many(Foreseen, self._call("POST", "/v1/policy/explain", _submission(job, bundle)))

    def capacity(self, job: Job, bundle: Bundle | None = None, change: Change = _NO_CHANGE) -> list[Outlook]:
        """What a plan would cost under a change. With none named: one answer for each usual question."""
        asked = {**_submission(job, bundle), "change": change.model_dump()}
        return many(Outlook, self._call("POST", "/v1/capacity", asked))

    def run_job(
        self,
        job: str | Path | Job,
        overrides: Sequence[str] = (),
        watch: Watch | None = None,
        bundle: Bundle | None = None,
    ) -> RunView:
        """Load (when given a path), submit and follow a job to its end; ``watch`` sees each view.

        An interrupt (Ctrl-C) cancels the run, waits until it has ended, and is raised again.
        """
        if isinstance(job, str | Path):
            job, bundle = load_job(job, overrides)
        elif overrides:
            raise Invalid("overrides: need a job file; change the job itself with model_copy")
        run = run_name(job)
        try:
            return self.wait(self.submit(job, bundle, run), watch)
        except KeyboardInterrupt:
            self.withdraw(job, bundle, run, watch)
            raise

    def wait(self, run: str, watch: Watch | None = None) -> RunView:
        """Follow a run to its end and return its last view."""
        view: RunView | None = None
        for view in self.follow(run):
            if watch is not None:
                watch(view)
        return view or self.run(run)

    def follow(self, run: str) -> Iterator[RunView]:
        """Yield the run's view now and after each change, until it is over; raise `LinkLost` when the hub goes away."""
        plan: Plan | None = None  # told once in each stream: it is the long part of a view, and never changes
        while True:
            view: RunView | None = None
            for data in self._events(f"/v1/runs/{part(run)}/events"):
                view = parse_json(RunView, data, "hub")
                plan = view.plan or plan
                yield view.model_copy(update={"plan": plan})
            if view is None or view.over:
                return

    def runs(self) -> list[RunView]:
        return many(RunView, self._call("GET", "/v1/runs"))

    def run(self, run: str) -> RunView:
        return one(RunView, self._call("GET", f"/v1/runs/{part(run)}"))

    def cancel(self, run: str) -> RunView:
        return one(RunView, self._call("POST", f"/v1/runs/{part(run)}/cancel"))

    def stop(self, run: str, watch: Watch | None = None) -> RunView:
        """Cancel a run unless it is over, wait until its sites have let go, and return its last view."""
        if not self.run(run).over:
            self.cancel(run)
        return self.wait(run, watch)

    def resume(self) -> list[str]:
        """Go on with the runs that an ended hub left behind; returns their ids."""
        return list(self._call("POST", "/v1/resume")["runs"])

    def explain(self, run: str) -> list[dict[str, Any]]:
        """The run's journal in words: one table (seq, time, actor, kind, words) for each entry."""
        return self._call("GET", f"/v1/runs/{part(run)}/explain")

    def traffic(self, run: str | None = None) -> list[Traffic]:
        path = "/v1/traffic" if run is None else f"/v1/runs/{part(run)}/traffic"
        return many(Traffic, self._call("GET", path))

    # --- sites

    def fleet(self) -> Fleet:
        return one(Fleet, self._call("GET", "/v1/fleet"))

    def sites(self) -> list[SiteView]:
        return many(SiteView, self._call("GET", "/v1/sites"))

    def invite(self, site: str, hours: float = 24.0, relay: str = "", behind: str | None = None) -> str:
        """Return a token with which one site may join, once, within ``hours``: as a ``relay`` that is dialled there,
        or ``behind`` one."""
        asked = {"hours": hours, "relay": relay, "behind": behind}
        return self._call("POST", f"/v1/sites/{part(site)}/invites", asked)["token"]

    def revoke(self, site: str) -> None:
        """Shut a site out: its session ends, and its certificate opens nothing any more. Raises `NotFound`."""
        self._call("POST", f"/v1/sites/{part(site)}/revoke")

    def release(self, site: str) -> None:
        """Let a site out of quarantine. Raises `NotFound` for one that is not in it."""
        self._call("POST", f"/v1/sites/{part(site)}/release")

    def verify(self) -> list[Verdict]:
        """Verify the hub's journal and those of the home's own sites."""
        return many(Verdict, self._call("GET", "/v1/audit/verify"))

    # --- models and deployments

    def models(self) -> list[Model]:
        return many(Model, self._call("GET", "/v1/models"))

    def aliases(self) -> dict[str, dict[str, int]]:
        """Model name -> alias -> version."""
        return self._call("GET", "/v1/aliases")

    def model(self, reference: str) -> Model:
        """The model of ``name@version`` or ``name@alias``."""
        return one(Model, self._call("GET", f"/v1/models/{part(reference)}"))

    def lineage(self, reference: str) -> LineageTree:
        """The tree a model came from: model <- run <- plan <- job, code, data, decisions."""
        return one(LineageTree, self._call("GET", f"/v1/models/{part(reference)}/lineage"))

    def promote(self, reference: str, alias: str) -> Model:
        return one(Model, self._call("POST", f"/v1/models/{part(reference)}/promote", {"alias": alias}))

    def weights(self, reference: str) -> Iterator[tuple[bytes, int]]:
        """Yield the pieces of a model's safetensors file, each with the bytes of the whole. Nothing is verified."""
        with self._opened(f"/v1/models/{part(reference)}/weights", _TIMEOUT) as response:
            size = int(response.headers.get("content-length", 0))
            for piece in response.iter_bytes(1 << 20):
                yield piece, size

    def code(self, reference: str) -> Bundle:
        """The code that a model was trained by and answers with."""
        return one(Bundle, self._call("GET", f"/v1/models/{part(reference)}/code"))

    def erase(self, reference: str) -> Model:
        """Remove a version's weights for good."""
        return one(Model, self._call("DELETE", f"/v1/models/{part(reference)}"))

    def deployments(self) -> list[DeploymentView]:
        return many(DeploymentView, self._call("GET", "/v1/deployments"))

    def deploy(self, deployment: Deployment) -> DeploymentView:
        return one(DeploymentView, self._call("POST", "/v1/deployments", deployment.model_dump(mode="json")))

    def redeploy(self) -> list[DeploymentView]:
        """Start what an earlier hub of this home had deployed; returns how each of them is now."""
        return many(DeploymentView, self._call("POST", "/v1/redeploy"))

    def undeploy(self, name: str) -> None:
        self._call("DELETE", f"/v1/deployments/{part(name)}")

    def predict(self, name: str, rows: Sequence[Mapping[str, JsonValue]]) -> dict[str, Any]:
        """Ask a deployment about ``rows`` (column -> value) over HTTP.

        Returns its answer with the model's name, version and digest.

        Raises `NotFound` for an unknown deployment and `Unavailable` when it does not answer or its queue is full.
        """
        known = {deployment.name: deployment for deployment in self.deployments()}
        if name not in known:
            raise NotFound(
                f"deployment: there is no {name!r}{near_miss(name, list(known))}; start one with `atoll deploy`"
            )
        if known[name].state != "answering":
            raise Unavailable(
                f"deployment {name}: is {known[name].state}; start it with `atoll deploy {known[name].model}`"
            )
        url = known[name].url.rstrip("/") + "/predict"
        with httpx.Client(timeout=_TIMEOUT, trust_env=False) as http:  # another server: our token is not for it
            asked = http.build_request("POST", url, json={"rows": [dict(row) for row in rows]})
            return _prediction(name, _send(http, asked))

    # --- the wire

    def login_url(self) -> str:
        """A link that logs one browser in to the dashboard; good once, for two minutes."""
        return self._call("POST", "/v1/login")["url"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        return _answer(_send(self._http, self._http.build_request(method, path, json=body)))

    def _events(self, path: str) -> Iterator[str]:
        with self._opened(path, _STREAM) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    @contextmanager
    def _opened(self, path: str, timeout: httpx.Timeout) -> Iterator[httpx.Response]:
        """Have a good answer that is read piece by piece."""
        request = self._http.build_request("GET", path, timeout=timeout)
        try:
            response = self._http.send(request, stream=True)
            try:
                if response.is_error:
                    response.read()
                    _answer(response)
                yield response
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise _lost(error) from error


def _submission(job: Job, bundle: Bundle | None) -> dict[str, Any]:
    return {
        "job": job.model_dump(mode="json"),
        "bundle": None if bundle is None else bundle.model_dump(mode="json"),
    }


def _send(http: httpx.Client, request: httpx.Request) -> httpx.Response:
    try:
        return http.send(request)
    except httpx.HTTPError as error:
        raise _lost(error) from error


def _lost(error: httpx.HTTPError) -> LinkLost:
    return LinkLost(f"hub: stopped answering ({type(error).__name__}); what was submitted is kept, run `atoll resume`")


def _answer(response: httpx.Response) -> Any:
    """Return the JSON of a good answer; raise the error of a bad one as the class it was at the other end."""
    try:
        said: Any = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Unavailable(
            f"{response.url}: answered {response.status_code} with no JSON; is it an Atoll hub?"
        ) from None
    if not response.is_error:
        return said
    told = said.get("error") if isinstance(said, dict) else None
    if isinstance(told, dict):
        raise _ERRORS.get(str(told.get("type")), AtollError)(str(told.get("message")))
    raise Unavailable(f"{response.url}: answered {response.status_code}: {json.dumps(said)[:300]}")


def _prediction(name: str, response: httpx.Response) -> dict[str, Any]:
    """Return a replica's answer; its refusals are words alone, and the status says of which kind they are."""
    said: Any = response.json() if "json" in response.headers.get("content-type", "") else {}
    if not response.is_error:
        return said
    kind = Invalid if response.status_code in (400, 413, 415, 422) else Unavailable
    raise kind(f"deployment {name}: {said.get('error', f'answered {response.status_code}')}")
