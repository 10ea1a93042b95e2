"""The user's class, imported from a verified bundle: every way that can fail ends in one sentence.

Only processes made for it (workers, replicas) call this: importing is running the user's code.
"""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeGuard

from atoll.errors import AtollError, TaskFailed
from atoll.spec.document import WORDS_LIMIT, near_miss, sha256
from atoll.spec.order import Fault, TaskName
from atoll.spec.pretrained import Pretrained
from atoll.spec.task import ArraysTask, Task

Doing = Literal["hold", "train", "evaluate", "predict"]
# The methods that each kind of task has for what is asked of it; all are asked to hold a model.
_OF_MODULES: dict[Doing, tuple[str, ...]] = {
    "hold": ("model", "examples"),
    "train": ("loss",),
    "evaluate": ("metrics",),
    "predict": ("predict",),
}
_OF_ARRAYS: dict[Doing, tuple[str, ...]] = {**_OF_MODULES, "hold": ("arrays", "examples"), "train": ("fit",)}
_PRETRAINED = "pretrained"  # the argument by which a class takes the files that its job names
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.py")


def hands_arrays(task: object) -> TypeGuard[ArraysTask]:
    """Tell an `ArraysTask` from a `Task`: whoever has `arrays` and `fit` is one. Nothing else decides this."""
    return callable(getattr(task, "arrays", None)) and callable(getattr(task, "fit", None))


def load_task(bundle: Path, task: TaskName, *also: Doing, pretrained: Pretrained | None = None) -> Task | ArraysTask:
    """Import ``task.file`` from the folder ``bundle`` and make ``task.name(**task.params)``.

    Where the task names ``pretrained`` files, the class is given them by that word.

    The folder's other ``.py`` files can be imported while that happens, by their plain names. Raises `TaskFailed`
    when the file does not import, the class is missing or lacks a method to hold a model or do what is asked ``also``,
    or the params do not fit.
    """
    path = _file_in(bundle, task.file)
    with _siblings(bundle):
        module = _run(bundle, path)
        kind = _class_in(module, task)
        given = _given(kind, task, pretrained)
        try:
            made = kind(**given)
        except (Exception, SystemExit) as error:
            raise task_failure(error, bundle, f"{task.file}: {task.name}(...)") from error
    require(made, task, "hold", *also)
    return made


def require(made: object, task: TaskName, *doing: Doing) -> None:
    """Raise `TaskFailed` unless the task has the methods for all of this."""
    methods, shown = (_OF_ARRAYS, "ArraysTask") if hands_arrays(made) else (_OF_MODULES, "Task or ArraysTask")
    needed = [name for one in doing for name in methods[one]]
    lacking = next((name for name in needed if not callable(getattr(made, name, None))), None)
    if lacking is not None:
        words = f"{task.file}: {task.name} has no method '{lacking}'"
        raise TaskFailed(f"{words}; write it as atoll.spec.task.{shown} shows")


def task_failure(error: BaseException, bundle: Path, doing: str) -> AtollError:
    """Turn what the user's code raised into one sentence with the last line of the bundle it passed through.

    Reads like ``task.py: line 12: NameError: name 'torhc' is not defined``; an `AtollError` that Atoll raised is
    returned as it is. The sentence quotes the code, which may quote a row: `fault_of` is for what leaves a site.
    """
    file, line = _place(error, bundle)
    if isinstance(error, AtollError) and not file:
        return error
    words = error.msg if isinstance(error, SyntaxError) else " ".join(_words(error).split())
    words = words if len(words) <= 300 else words[:297] + "..."
    place = f"{file}: line {line}" if file else doing
    return TaskFailed(f"{place}: {type(error).__name__}: {words}" if words else f"{place}: {type(error).__name__}")


def fault_of(error: BaseException, bundle: Path) -> Fault:
    """Return what a worker tells of an error: with a place where user code raised it, also an `AtollError`."""
    if isinstance(error, TaskFailed) and error.__cause__ is not None:  # as `task_failure` tells what user code raised
        error = error.__cause__
    file, line = _place(error, bundle)
    words = error.msg if isinstance(error, SyntaxError) else _words(error)
    words = str(words)[:WORDS_LIMIT].encode("utf-8", "replace").decode()
    kind = type(error).__name__[:100].encode("utf-8", "replace").decode()
    return Fault(kind=kind, words=words, file=file, line=line)


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the class is user code's, and so is how it is spelt
        return ""


def _place(error: BaseException, bundle: Path) -> tuple[str, int]:
    """Return the file and line of the bundle that an error comes from; none for one that Atoll raised by itself."""
    if isinstance(error, SyntaxError) and isinstance(error.filename, str) and isinstance(error.lineno, int):
        path = Path(error.filename)
        if path.parent == bundle:
            return path.name[:100], max(0, min(error.lineno, 10_000_000))
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AtollError):
        frames = frames[-1:]
    inside = [frame for frame in frames if Path(frame.filename).parent == bundle]
    return (Path(inside[-1].filename).name[:100], inside[-1].lineno or 0) if inside else ("", 0)


def _file_in(bundle: Path, name: str) -> Path:
    if not _FILE.fullmatch(name):
        raise TaskFailed(f"task.file: {name!r} is not a plain Python file name; give one like task.py")
    path = bundle / name
    if not path.is_file():
        known = sorted(found.name for found in bundle.glob("*.py"))
        raise TaskFailed(f"task.file: the bundle has no {name!r}{near_miss(name, known)}")
    return path


def _run(bundle: Path, path: Path) -> ModuleType:
    # The name carries the code's digest, so two versions of one file never share a module.
    name = f"atoll_task_{sha256(path.read_bytes())[7:23]}_{path.stem.replace('.', '_').replace('-', '_')}"
    module = importlib.util.module_from_spec(_spec(name, path))
    sys.modules[name] = module  # dataclasses and typing look their own module up there
    loader = module.__loader__
    assert isinstance(loader, _Source)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise task_failure(error, bundle, path.name) from error
    return module


def _class_in(module: ModuleType, task: TaskName) -> type:
    kind = getattr(module, task.name, None)
    if isinstance(kind, type):
        return kind
    own = [
        name for name, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    raise TaskFailed(f"{task.file}: there is no class {task.name!r}{near_miss(task.name, own)}")


def _given(kind: type, task: TaskName, pretrained: Pretrained | None) -> dict[str, object]:
    """Return the arguments of the class; raise `TaskFailed` for those that it does not take."""
    given = dict[str, object](task.params)
    if task.pretrained is not None:
        assert pretrained is not None, "whoever loads a task has looked for the files that it names"
        if _PRETRAINED in given:
            raise TaskFailed(f"task.params.{_PRETRAINED}: is what task.pretrained gives; remove it from the params")
        given[_PRETRAINED] = pretrained
    _check_params(kind, task, given)
    return given


def _check_params(kind: type, task: TaskName, given: dict[str, object]) -> None:
    try:
        signature = inspect.signature(kind)
    except (ValueError, TypeError):  # a class made in C tells nothing; the call itself will
        return
    takes = signature.parameters
    for name in given:
        if name not in takes and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            known = near_miss(name, list(takes)) if takes else "; it takes none"
            field = f"task.{name}" if name == _PRETRAINED else f"task.params.{name}"
            raise TaskFailed(f"{field}: {task.name} has no such argument{known}")
    try:
        signature.bind(**given)
    except TypeError as error:
        raise TaskFailed(f"task.params: {task.name}: {error}; set it under task.params") from None


class _Source(SourceLoader):
    """Compiles from source only: a cached .pyc beside a verified file was never verified."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str | bytes) -> bytes:
        if str(path) != str(self._path):
            raise OSError(f"{path!r} is not the source")
        return self._path.read_bytes()

    def source_to_code(self, data: Any, path: Any, *_: Any, **more: Any) -> Any:
        """Compile it as the UTF-8 that it was reviewed as: a coding cookie would have it say something else."""
        text = bytes(data).decode("utf-8-sig")
        return super().source_to_code(text, path, **more)


class _Folder(MetaPathFinder):
    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self._bundle / f"{fullname}.py"
        return _spec(fullname, source) if "." not in fullname and source.is_file() else None


def _spec(name: str, path: Path) -> ModuleSpec:
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(path))
    assert spec is not None
    return spec


@contextmanager
def _siblings(bundle: Path) -> Iterator[None]:
    """Let the bundle's files import each other, and forget the siblings that another bundle left behind."""
    for name, module in list(sys.modules.items()):
        loader = getattr(module, "__loader__", None)
        if isinstance(loader, _Source) and Path(loader.get_filename(name)).parent != bundle:
            del sys.modules[name]
    finder = _Folder(bundle)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
