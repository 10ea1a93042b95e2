"""A scikit-learn model's whole road over the memory channel: trained at two sites, registered, evaluated, asked."""

import httpx
import numpy as np
import pyarrow as pa
import pytest

from atoll.serving.deployments import Deployments
from atoll.spec.model import Bundle, Deployment
from atoll.spec.user import LOCAL
from tests.memory import ended, finished, job, world

TASK = """\
import numpy as np
from sklearn.linear_model import SGDClassifier

from atoll import Fitted, Mean, Scores


class Risk:
    def __init__(self, explode=False):
        self.explode = explode

    def arrays(self):
        return {"coef": np.zeros((1, 2)), "intercept": np.zeros(1)}

    def estimator(self, arrays):
        made = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.05, random_state=0)
        made.classes_, made.coef_, made.intercept_ = np.array([0, 1]), arrays["coef"], arrays["intercept"]
        return made

    def examples(self, rows):
        found = {"x": np.stack([rows.table[name].to_numpy() for name in ("age", "dose")], axis=1)}
        if "ill" in rows.table.column_names:
            found["y"] = rows.table["ill"].to_numpy()
        return found

    def fit(self, arrays, examples, budget):
        if self.explode and budget.round == 2 and budget.steps > 1:  # the probe takes single steps
            raise RuntimeError(str(examples["x"][0]))
        made = self.estimator(arrays)
        for batch in budget.batches:
            made.partial_fit(batch["x"], batch["y"], classes=[0, 1])
        chances = made.predict_proba(examples["x"])[np.arange(len(examples["y"])), examples["y"]]
        return Fitted({"coef": made.coef_, "intercept": made.intercept_}, -np.log(chances).mean())

    def predict(self, arrays, examples):
        return {"risk": self.estimator(arrays).predict_proba(examples["x"])[:, 1]}

    def metrics(self, arrays, examples):
        risk = self.predict(arrays, examples)["risk"]
        right = (risk > 0.5) == examples["y"]
        return {"accuracy": Mean(right.sum(), len(right)), "auc": Scores(risk, examples["y"])}
"""
BUNDLE = Bundle(files={"task.py": TASK})


def table(seed, rows):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 2))
    return pa.table({"age": x[:, 0], "dose": x[:, 1], "ill": (x @ [2, 1] + rng.normal(0, 0.5, rows) > 0).astype(int)})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("arrays")
    with world(home, {"ada": table(1, 90), "bob": table(2, 140)}, Deployments(home / "logs")) as hub:
        yield hub


def train(**params):
    sync = {"preset": "fedavg", "period": 10, "keep_optimiser": True}  # there is none, and nothing is kept
    task = {"file": "task.py", "name": "Risk", "params": params}
    return job(name="risk", task=task, steps=40, batch=16, sync=sync)


@pytest.fixture(scope="module")
def trained(hub):
    return finished(hub, train(), BUNDLE)


def test_it_is_trained_and_registered_with_its_lineage(hub, trained):
    model = hub.model(trained.result.model)
    assert [(spec.name, spec.shape) for spec in model.signature] == [("coef", (1, 2)), ("intercept", (1,))]
    assert {source.site for source in model.lineage.sources} == {"ada", "bob"}
    assert trained.losses[-1] < 0.75 * trained.losses[0]
    assert trained.result.metrics["accuracy"] > 0.8


def test_it_is_evaluated_again_and_predicts_where_the_rows_lie(hub, trained):
    again = finished(hub, job("evaluate", model="risk@1"), None)
    assert again.result.metrics == pytest.approx(trained.result.metrics)
    told = finished(hub, job("predict", model="risk@1", output="risks"), None)
    assert told.result.metrics == {"rows": 230.0}


def test_it_answers_once_it_is_deployed(hub, trained):
    view = hub.deploying.deploy(Deployment(name="heart", model="risk@1"), LOCAL)
    assert view.state == "answering", view.words
    rows = {"rows": [{"age": 2.0, "dose": 1.0}, {"age": -2.0, "dose": -1.0}]}
    answer = httpx.post(f"{view.url}/predict", json=rows, timeout=30, trust_env=False).json()
    high, low = (one["risk"] for one in answer["answers"])
    assert high > 0.9 > 0.1 > low
    assert answer["model"] == "risk"
    hub.deploying.undeploy("heart", LOCAL)


def test_a_fit_that_raises_ends_the_run_with_its_line_and_without_its_words(hub, trained):
    view = ended(hub, train(explode=True), BUNDLE)
    assert (view.state, view.error) == ("failed", "TaskFailed")
    line = TASK[: TASK.index("raise RuntimeError")].count("\n") + 1
    assert f"task.py: line {line}: RuntimeError" in view.words
    assert "[" not in view.words.partition("RuntimeError")[2]  # a row, which is what it said
