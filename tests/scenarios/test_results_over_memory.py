"""Who reads what a run found: its user, and those whom the hub's rules let release it, by whichever route."""

import asyncio
import json
from dataclasses import replace

import httpx
import pyarrow as pa
import pytest

from atoll.console.api import create_app
from atoll.console.tokens import OWN
from atoll.policy.defaults import HUB_POLICY
from atoll.spec.job import parse_job
from atoll.spec.user import Project, User
from tests.memory import DATASET, PURPOSE, WAIT, ended, world
from tests.undeployed import NothingDeployed

URL, OWNER = "http://127.0.0.1:8123", "o" * 43
USERS = (
    User(name="ada", roles=("scientist",), projects=("heart",)),
    User(name="bea", roles=("scientist",), projects=("heart", "lung")),
    User(name="eve", roles=("scientist",), projects=("lung",)),
    User(name="vic", roles=("viewer",), projects=("heart",)),
    User(name="aud", roles=("auditor",), projects=("heart",)),
    User(name="bob", roles=("operator",), projects=()),
    User(name="zoe", roles=("owner",), projects=()),
)
READERS = {"ada": True, "bea": True, "eve": False, "vic": False, "aud": False, "bob": True, "zoe": True, "local": True}
OF_BEFORE = """
@id("before") permit (principal, action == Action::"release", resource)
when { principal.roles.containsAny(["scientist", "operator", "owner"]) };
"""
ANSWER = [[60, 49.5]]


def query(name, project="default"):
    fields = {"kind": "query", "name": name, "purpose": PURPOSE, "dataset": DATASET, "project": project}
    return parse_job({**fields, "sql": "SELECT count(*) AS n, avg(age) AS a FROM rows"}, "job")


class Asked:
    """A hub where ada has asked a query, and its API."""

    def __init__(self, hub):
        self.hub, self.app = hub, create_app(hub, OWNER)
        self.tokens, self.streams = self.app.state.keys.tokens, self.app.state.streams
        self.held = {"local": OWNER}
        hub.quotas.put(Project(name="heart"), "local")
        for user in USERS:
            hub.users.put(user, "local")
            self.held[user.name] = self.tokens.issue(user.name, 1.0, ("all",), "local")
        view = ended(hub, query("ask", "heart"), None, USERS[0])
        assert [list(row) for row in view.result.rows] == ANSWER, view.words
        self.run = view.run

    def get(self, name, path):
        async def call():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=URL) as http:
                return await http.get(path, headers={"Authorization": f"Bearer {self.held[name]}"})

        answer = asyncio.run(call())
        assert answer.status_code == 200, answer.text
        return answer

    def passed(self, name):
        return OWN if name == "local" else self.tokens.check(self.held[name])


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    rows = {"lyon": pa.table({"id": range(60), "age": [20 + age for age in range(60)]})}
    with world(tmp_path_factory.mktemp("home"), rows, NothingDeployed()) as hub:
        yield Asked(hub)


def told(data):
    return [json.loads(line.removeprefix("data: ")) for line in data.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(("name", "reads"), READERS.items())
def test_an_answer_is_read_by_its_asker_and_by_those_who_may_release_it(asked, name, reads):
    [stream] = told(asked.get(name, f"/v1/runs/{asked.run}/events").text)
    views = [asked.get(name, f"/v1/runs/{asked.run}").json(), *asked.get(name, "/v1/runs").json(), stream]
    for view in views:
        assert (view["run"], view["state"], view["user"]) == (asked.run, "finished", "ada")
        assert (view["result"]["rows"] if view["result"] else None) == (ANSWER if reads else None)
        assert ("for ada, and for whom the hub's rules let" in view["withheld"]) == (not reads)


def test_readers_of_one_stream_each_get_their_own_and_nothing_of_it_is_journalled(asked):
    before = list(asked.hub._journal.entries())
    texts = {name: asked.get(name, f"/v1/runs/{asked.run}/events").text for name in ("eve", "bea", "vic", "bob", "eve")}
    assert {name: "49.5" in text for name, text in texts.items()} == {
        "eve": False, "bea": True, "vic": False, "bob": True,
    }  # fmt: skip
    assert list(asked.hub._journal.entries()) == before


def test_a_rule_of_the_hub_that_lets_more_people_release_shows_it_to_them(asked):
    file = asked.hub.home / "hub" / "policy.cedar"
    try:
        file.write_text(HUB_POLICY + OF_BEFORE)
        assert asked.get("eve", f"/v1/runs/{asked.run}").json()["result"]["rows"] == ANSWER
        assert asked.get("vic", f"/v1/runs/{asked.run}").json()["result"] is None
    finally:
        file.write_text(HUB_POLICY)
    assert asked.get("eve", f"/v1/runs/{asked.run}").json()["result"] is None


async def read(stream, then):
    """Return what a stream tells from its first event on, with `then` done after that, to its end."""
    found = []
    async with asyncio.timeout(WAIT):
        async for piece in stream.body_iterator:
            found.append(piece)
            if len(found) == 1:
                then()
    return found


@pytest.fixture
def gone(asked):
    """Return what makes a user, and hands out what she comes in with."""

    def come(name):
        asked.hub.users.put(User(name=name, roles=("viewer",)), "local")
        return asked.tokens.check(asked.tokens.issue(name, 1.0, ("all",), "local"))

    return come


ENDS = {
    "her token is revoked": lambda hub: hub.users.revoke("pat", "local"),
    "she is removed": lambda hub: hub.users.remove("pat", "local"),
    "her roles see nothing any more": lambda hub: (hub.home / "hub" / "policy.cedar").write_text(
        HUB_POLICY.replace('["viewer", "scientist"', '["scientist"')
    ),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("kind", ["all", "run"])
def test_a_stream_ends_once_its_reader_could_not_open_it_any_more(asked, gone, kind, end):
    passed = gone("pat")
    if kind == "run":  # one that goes on: nobody approves it
        waits = '@id("two.submit") @approval("owner") permit (principal, action == Action::"submit", resource);'
        file = asked.hub.home / "hub" / "policy.cedar"
        file.write_text(HUB_POLICY + waits)
        run = asked.hub.submit(query("waits"), None, passed.user)
        assert asked.hub.run(run).state == "waiting"
    try:
        stream = asked.streams.of_all(passed) if kind == "all" else asked.streams.of_run(run, passed)
        found = asyncio.run(read(stream, lambda: end(asked.hub)))
        assert found[0].startswith(b"data: ")
        assert len(found) <= 3, "it went on"
    finally:
        (asked.hub.home / "hub" / "policy.cedar").write_text(HUB_POLICY)
        if kind == "run":
            asked.hub.cancel(run, passed.user)


def test_a_stream_ends_with_the_session_it_was_opened_in(asked):
    keys = asked.app.state.keys
    passed = keys.remembered(keys.session(keys.ticket(OWN)))
    assert passed.expires < float("inf")
    over = replace(passed, expires=0.0)
    for stream in (asked.streams.of_all(over), asked.streams.of_run(asked.run, over)):
        assert asyncio.run(read(stream, lambda: None)) == []
