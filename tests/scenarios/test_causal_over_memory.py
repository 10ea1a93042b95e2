"""A causal language model fine-tuned at two sites, by LoRA and whole: what crosses, what is refused, what answers."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.catalogue import Catalogue
from atoll.errors import NotFound
from atoll.journal import Journal
from atoll.serving.deployments import Deployments
from atoll.spec.model import Bundle, Deployment
from atoll.spec.user import LOCAL
from tests.memory import WAIT, ended, finished, job, world
from tests.system.processes import descendants
from tests.unit.folders import NEEDED, TEXT, save

pytestmark = [NEEDED, pytest.mark.timeout(300)]
BUNDLE = Bundle(files={"task.py": "from atoll.tasks import CausalLM\n"})
SITES = {"ada": TEXT[:40], "bob": TEXT[40:]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A hub with two sites that list one folder each, copies of the same one."""
    home = tmp_path_factory.mktemp("causal")
    rows = {name: pa.table({"text": [text + str(number) for number in range(30)]}) for name, text in SITES.items()}
    with world(home, rows, Deployments(home / "logs")) as hub:
        for name in SITES:
            save(home / name / "model")
            listed = Catalogue(home / "sites" / name).add_pretrained("tiny", home / name / "model")
        yield home, hub, listed.digest


ONE = {"layout": {"data": 1}}  # rank: another number of them adds in another order


def tune(digest, **params):
    task = {"file": "task.py", "name": "CausalLM", "pretrained": digest, "params": {"block": 16, "new": 4, **params}}
    optimiser = {"kind": "adam", "rate": 0.01}
    return job(
        name="tuned", task=task, steps=8, batch=4, optimiser=optimiser, sync={"preset": "fedavg", "period": 4}, **ONE
    )


LORA = {"lora": {"rank": 2, "dropout": 0.1}}


@pytest.fixture(scope="module")
def tuned(place):
    _, hub, digest = place
    return finished(hub, tune(digest, **LORA), BUNDLE)


def crossed(home, run):
    """Return the bytes of updates and models that crossed a site's border, as its own journal has them."""
    with Journal(home / "sites" / "ada" / "journal.db", "ada") as journal:
        found = [entry.event.crossing for entry in journal.entries(kinds=("crossing",))]
    tensors = [one for one in found if one.run == run and one.kind in ("update", "model")]
    assert {one.direction for one in tensors} == {"in", "out"}
    return sum(one.bytes for one in tensors)


def test_only_the_adapter_crosses_by_the_sites_own_journal(place, tuned):
    home, hub, digest = place
    model = hub.model(tuned.result.model)
    assert all(".lora_" in spec.name for spec in model.signature)
    adapter = 4 * sum(spec.size for spec in model.signature)
    whole = finished(hub, tune(digest, full=True), BUNDLE)
    frozen = (home / "ada" / "model" / "model.safetensors").stat().st_size
    few, many = crossed(home, tuned.run), crossed(home, whole.run)
    streams = many / frozen  # the first weights, then for each round down and up, then down to be evaluated
    assert streams == pytest.approx(few / adapter, rel=0.2)
    assert few < frozen < many
    assert hub.model(whole.result.model).pretrained == model.pretrained == digest


def test_it_learns_and_tells_its_loss_and_perplexity(tuned):
    assert tuned.losses[-1] < tuned.losses[0]
    assert set(tuned.result.metrics) == {"loss", "perplexity"}
    assert 1 < tuned.result.metrics["perplexity"] < 257


def test_the_same_job_with_a_worker_killed_in_the_middle_gives_the_same_bits(place, tuned):
    _, hub, digest = place
    killed, over = [], threading.Event()

    def kill():
        until = time.monotonic() + WAIT
        while not over.is_set() and not killed and time.monotonic() < until:
            if any(view.run not in before and view.losses for view in hub.runs()):
                for pid in workers()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.005)

    before = {view.run for view in hub.runs()}
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        again = finished(hub, tune(digest, **LORA), BUNDLE)
    finally:
        over.set()
        thread.join()
    assert killed
    assert hub.model(again.result.model).weights == hub.model(tuned.result.model).weights


def workers():
    """Return the worker processes that there are below this one."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if b"atoll.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


def test_it_is_evaluated_and_completes_texts_where_they_lie(place, tuned):
    home, hub, _ = place
    again = finished(hub, job("evaluate", model=tuned.result.model), None)
    assert again.result.metrics == pytest.approx(tuned.result.metrics)
    told = finished(hub, job("predict", model=tuned.result.model, output="completed"), None)
    assert told.result.metrics == {"rows": 60.0}
    table = pq.read_table(Catalogue(home / "sites" / "ada").entry("completed").path)
    assert table.column_names == ["completion"]


def test_it_answers_at_the_hub_once_that_has_the_folder_too(place, tuned):
    home, hub, digest = place
    asked = Deployment(name="writer", model=tuned.result.model)
    with pytest.raises(NotFound, match=f"needs the pretrained files {digest}.*atoll pretrained add NAME FOLDER --hub"):
        hub.deploying.deploy(asked, LOCAL)
    Catalogue(home / "hub").add_pretrained("tiny", home / "ada" / "model")
    view = hub.deploying.deploy(asked, LOCAL)
    assert view.state == "answering", view.words
    body = {"rows": [{"text": "the quick"}, {"text": "pack my"}]}
    answer = httpx.post(f"{view.url}/predict", json=body, timeout=60, trust_env=False).json()
    assert [set(one) for one in answer["answers"]] == [{"completion"}, {"completion"}]
    hub.deploying.undeploy("writer", LOCAL)


def test_a_site_without_the_folder_refuses_and_a_changed_file_is_not_loaded(place, tuned):
    home, hub, digest = place
    catalogue = Catalogue(home / "sites" / "bob")
    catalogue.remove_pretrained("tiny")
    view = ended(hub, tune(digest, **LORA), BUNDLE)
    assert (view.state, view.error) == ("failed", "Denied")
    assert f"bob refuses: task.pretrained: it has none that is {digest}" in view.words
    catalogue.add_pretrained("tiny", home / "bob" / "model")
    weights = home / "bob" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    view = ended(hub, tune(digest, **LORA), BUNDLE)
    assert view.state == "failed"
    assert "model.safetensors has changed since the folder was listed" in view.words
