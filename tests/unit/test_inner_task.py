"""Loading a task: its own folder, its own siblings, compiled from source, every failure a sentence."""

import sys

import pytest

from atoll.errors import TaskFailed
from atoll.inner.task import load_task
from atoll.spec.order import TaskName

GOOD = """\
from dataclasses import dataclass

from helper import WIDTH


@dataclass
class Heart:
    hidden: int = WIDTH

    def model(self): ...
    def examples(self, rows): ...
"""


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "task.py").write_text(GOOD)
    (folder / "helper.py").write_text("WIDTH = 8\n")
    return folder


def name(file="task.py", kind="Heart", **params):
    return TaskName(file=file, name=kind, params=params)


def test_the_class_is_made_with_its_params_and_may_import_its_siblings(bundle):
    assert load_task(bundle, name()).hidden == 8
    assert load_task(bundle, name(hidden=3)).hidden == 3


def test_nothing_is_left_on_the_import_path_or_in_the_folder(bundle):
    path, finders, files = list(sys.path), list(sys.meta_path), sorted(bundle.iterdir())
    load_task(bundle, name())
    assert (sys.path, sys.meta_path, sorted(bundle.iterdir())) == (path, finders, files)


def test_each_bundle_has_its_own_sibling(bundle, tmp_path):
    load_task(bundle, name())
    other = tmp_path / "other"
    other.mkdir()
    (other / "task.py").write_text(GOOD)
    (other / "helper.py").write_text("WIDTH = 99\n")
    assert load_task(other, name()).hidden == 99
    assert load_task(bundle, name()).hidden == 8


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (name(file="tsak.py"), "the bundle has no 'tsak.py'; did you mean 'task.py'?"),
        (name(file="../bundle/task.py"), "'../bundle/task.py' is not a plain Python file name"),
        (name(file="/etc/passwd"), "not a plain Python file name"),
        (name(file=".py"), "not a plain Python file name"),
        (name(kind="Haert"), "there is no class 'Haert'; did you mean 'Heart'?"),
        (name(kind="WIDTH"), "there is no class 'WIDTH'"),
        (name(hiden=3), "task.params.hiden: Heart has no such argument; did you mean 'hidden'?"),
    ],
)
def test_a_wrong_reference_is_told(bundle, task, words):
    with pytest.raises(TaskFailed) as caught:
        load_task(bundle, task)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("task.py", "x = 1\n\ndef f(:\n", "task.py: line 3: SyntaxError: invalid syntax"),
        ("task.py", "\nnp.zeros(3)\n", "task.py: line 2: NameError: name 'np' is not defined"),
        ("task.py", "raise SystemExit('bye')\n", "task.py: line 1: SystemExit: bye"),
        ("helper.py", "\n\n1 / 0\n", "helper.py: line 3: ZeroDivisionError: division by zero"),
        ("helper.py", "WITDH = 8\n", "task.py: line 3: ImportError: cannot import name 'WIDTH'"),
        ("task.py", "class Heart:\n    def __init__(self, width): ...\n", "missing a required argument: 'width'"),
        ("task.py", "class Heart:\n    def __init__(self): self.x = {}['y']\n", "task.py: line 2: KeyError: 'y'"),
        ("task.py", "class Heart:\n    def model(self): ...\n", "Heart has no method 'examples'"),
    ],
)
def test_a_task_that_does_not_load_is_told_with_its_line(bundle, file, text, words):
    (bundle / file).write_text(text)
    with pytest.raises(TaskFailed) as caught:
        load_task(bundle, name())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cached_compilation_beside_the_source_is_not_believed(bundle):
    import importlib.util
    import py_compile

    (bundle / "helper.py").write_text("WIDTH = 66\n")
    cache = importlib.util.cache_from_source(str(bundle / "helper.py"))
    py_compile.compile(
        str(bundle / "helper.py"), cache, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    (bundle / "helper.py").write_text("WIDTH = 8\n")
    assert load_task(bundle, name()).hidden == 8
