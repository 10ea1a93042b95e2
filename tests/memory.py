"""A hub and its sites in this one process, over the memory channel. Agents, gates and workers are the real ones."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from atoll.data.catalogue import Catalogue
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.deploying import Deployer
from atoll.runtime.hub import Hub
from atoll.spec.fleet import Site
from atoll.spec.job import Job, parse_job
from atoll.spec.model import Bundle
from atoll.spec.run import RunView
from atoll.spec.user import LOCAL, User

PURPOSE, DATASET = "care", "rows"
WAIT = 90.0  # seconds after which something that should happen has not


@contextmanager
def world(home: Path, rows: Mapping[str, pa.Table], deployer: Deployer) -> Iterator[Hub]:
    """Yield a hub with a site for each table of rows, all connected; end all of it afterwards."""
    for name, table in rows.items():
        folder = home / "sites" / name
        sites.create(folder, Site(name=name, owner=name), SITE_POLICY)
        pq.write_table(table, folder / "rows.parquet")
        Catalogue(folder).add(DATASET, folder / "rows.parquet", purposes=(PURPOSE,))
    hub = Hub(home, deployer)
    agents = [sites.agent(home / "sites" / name) for name in rows]
    threads = [threading.Thread(target=agent.serve_desk, args=(hub._desk,)) for agent in agents]
    try:
        for thread in threads:
            thread.start()
        until = time.monotonic() + WAIT
        while len(hub.fleet().sites) < len(rows):
            assert time.monotonic() < until, "the sites never connected"
            time.sleep(0.01)
        yield hub
    finally:
        for agent in agents:
            agent.stop()
        for thread in threads:
            thread.join(20)
        hub.close()


def job(kind: str = "train", **fields: object) -> Job:
    """Return a job on the rows; what is left out is as in every job here."""
    known = {"kind": kind, "name": "job", "purpose": PURPOSE, "data": {"dataset": DATASET}}
    return parse_job({**known, **fields}, "job")


def ended(hub: Hub, asked: Job, bundle: Bundle | None, user: User = LOCAL) -> RunView:
    """Submit a job and return its run once it is over, whatever came of it."""
    name, news = hub.submit(asked, bundle, user), threading.Event()
    until = time.monotonic() + WAIT
    with hub.watch(name, news.set):
        while (view := hub.run(name)).state in ("planning", "running"):
            assert time.monotonic() < until, f"the run never ended: {view}"
            news.wait(1.0)
            news.clear()
    return view


def finished(hub: Hub, asked: Job, bundle: Bundle | None) -> RunView:
    """Submit a job and return its run once it has finished well."""
    view = ended(hub, asked, bundle)
    assert view.state == "finished", view.words
    return view
