"""What a hub is told of a failed order: nothing that user code, or a worker that lies for it, can fill with rows."""

import json

import pytest

from atoll.errors import AtollError, TaskFailed
from atoll.inner.task import fault_of, load_task
from atoll.runtime.sentences import KEPT, Known
from atoll.spec.order import Fault, Initialise, Ready, TaskName
from tests.opening import opening

ROWS = json.dumps([{"name": "Ada Lovelace", "hiv": True, "x": 1.25}])
TASK = """\
from atoll import AtollError


class Heart:
    def model(self): ...
    def examples(self, rows):
        age = rows
        raise age
"""


@pytest.fixture
def known(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "task.py").write_text(TASK)
    return Known.of(opening(tmp_path, "Heart", "code"))


def told(known, **fault):
    return known.told(Fault(**{"kind": "TaskFailed", **fault}), Ready())


@pytest.mark.parametrize("error", [ValueError(ROWS), AtollError(ROWS), type(ROWS, (Exception,), {})()])
def test_of_what_user_code_raises_the_class_and_the_line_leave(known, tmp_path, error):
    task = load_task(tmp_path / "code", TaskName(file="task.py", name="Heart"))
    try:
        task.examples(error)
    except Exception as caught:  # noqa: BLE001 - one of them is of a class of its own
        fault = fault_of(caught, tmp_path / "code")
    kind = type(error).__name__ if type(error).__name__ != ROWS else "an error of its own class"
    assert known.told(fault, Ready()) == f"task.py: line 8: {kind}: {KEPT}"


@pytest.mark.parametrize(
    "fault",
    [
        {"words": ROWS},
        {"kind": "Ada Lovelace"},
        {"file": "Ada Lovelace", "line": 3},
        {"file": "task.py", "line": 9},
        {"file": "task.py", "line": 8, "words": ROWS, "kind": ROWS[:100]},
        {"words": f"loss is nan at step {ROWS} of the run; lower the optimiser's rate or look at the data"},
        {"words": "loss is nan at step 12345678 of the run; lower the optimiser's rate or look at the data"},
        {"words": "examples: 'Ada Lovelace' is one value; give an array with one entry per example"},
        {"words": "examples: 'Lovelace' is one value; give an array with one entry per example"},
        {"words": f"model() returned a {ROWS}; return a torch.nn.Module"},
        {"words": "model() returned a Lovelace; return a torch.nn.Module"},
        {"file": "task.py", "line": 8, "kind": "NameError", "words": "name 'Lovelace' is not defined"},
        {"words": f"task.py: line 8: {ROWS}"},
    ],
)
def test_a_worker_that_lies_says_nothing_of_a_row(known, fault):
    words = told(known, **fault)
    assert not any(part in words for part in ("Ada", "Lovelace", "hiv", "1.25", "12345678", "line 9"))


def test_as_many_words_as_it_may_choose_it_chooses_and_no_more(known):
    names = ", ".join(["'age'"] * 8)
    words = "loss is nan at step 3 of the run; {} hold values that are not finite: fill or drop them in examples()"
    assert told(known, words=words.format(", ".join(["'age'"] * 4))) == words.format("'age', 'age', 'age', 'age'")
    assert "age" not in told(known, words=words.format(names))  # two more stand before them


@pytest.mark.parametrize(
    "words",
    [
        "loss is nan at step 41 of the run; lower the optimiser's rate or look at the data",
        "loss is nan at step 3 of the run; 'age' holds values that are not finite: fill or drop them in examples()",
        "loss at step 3 of the run is a tensor of shape [4, 2]; return the mean over the batch, a scalar tensor",
        "task.py: Heart has no method 'predict'; write it as atoll.spec.task.Task shows",
        "task.py: there is no class 'age'; did you mean 'Heart'?",
        "loss is nan at step 3 of the run at rank 1, and the last good checkpoint is of step 2; lower the optimiser's "
        "rate or look at the data",
        "batch: 2 examples cannot be shared by 4 ranks; raise batch",
        "examples() returned no examples; look at the dataset and at what the task filters out",
    ],
)
def test_a_sentence_of_atolls_own_leaves_whole_where_the_hub_knows_all_of_it(known, words):
    assert told(known, words=words) == words


def test_where_a_promise_hides_the_data_neither_a_line_nor_a_word_that_is_chosen_leaves(known):
    def bare(**fault):
        return known.failure(Fault(**{"kind": "TaskFailed", **fault}), Ready()).bare

    assert bare(words="loss is nan at step 41 of the run; lower the optimiser's rate or look at the data") == (
        "…; lower the optimiser's rate or look at the data"
    )
    assert bare(file="task.py", line=8, kind="KeyError") == bare(words=ROWS) == ""


def test_words_that_are_made_to_be_looked_through_for_long_are_not(known):
    words = "loss is nan at step " + "; 1, and the last good checkpoint is of step " * 40 + " of the run; raise batch"
    assert len(told(known, words=words)) < 2000


def test_python_s_own_word_on_a_mistake_leaves_with_its_line(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "task.py").write_text("import torhc_\n\nclass Heart: ...\n")
    order = opening(tmp_path, "Heart", "code")
    with pytest.raises(TaskFailed) as caught:
        load_task(tmp_path / "code", order.task)
    words = Known.of(order).told(fault_of(caught.value, tmp_path / "code"), order)
    assert words == "task.py: line 1: ModuleNotFoundError: No module named 'torhc_'"
    (tmp_path / "code" / "task.py").write_text("x = 1\n\ndef f(:\n")
    with pytest.raises(TaskFailed) as caught:
        load_task(tmp_path / "code", order.task)
    words = Known.of(order).told(fault_of(caught.value, tmp_path / "code"), order)
    assert words == "task.py: line 3: SyntaxError: invalid syntax"


def test_the_names_of_a_model_s_tensors_are_the_hub_s_too(known):
    spec = {"name": "trunk.0.weight", "shape": [2], "dtype": "float32"}
    words = "tensor trunk.0.weight, which stays at its site, is not finite; lower the optimiser's rate"
    order = Initialise.model_construct(seed=0, output="", keep_local=("trunk.*",))
    assert spec["name"] in known.told(Fault(kind="TaskFailed", words=words), order)
    assert spec["name"] not in told(known, words=words)


def test_what_user_code_raises_is_told_whatever_its_class_does(tmp_path):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    assert fault_of(Odd("\udcff"), tmp_path).words == ""
    assert fault_of(ValueError("\udcff" * 3000), tmp_path).words == "?" * 2000
