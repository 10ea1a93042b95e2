"""What workers write: ordered into the one folder that they may write to, and taken out of it once they have answered.

User code runs where these files are made. This process follows no link there, which would lead it to a file that only
it may read, and looks at nothing there that could change after it was looked at.
"""

import errno
import os
import shutil
import stat
from pathlib import Path

from atoll.errors import TaskFailed
from atoll.spec.model import elements
from atoll.spec.order import Ahead, Order, Train

_PATHS = ("output", "state_out", "control_out", "local_out")
_FLOAT = 4  # bytes
_HEAD, _ENTRY = 1 << 20, 1 << 10  # bytes of what a file of tensors says of them: of all, and of each
# What is no file that can be read, and is not waited for: a link, a socket, one of rights or a lease that nobody wants.
_NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EAGAIN)
_NOT_WITHIN = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # copy_file_range(2)


def ordered_into(folder: Path, order: Order) -> Order:
    """Return an order that has all of its files written in ``folder``, under the names that they are to have."""
    if isinstance(order, Ahead):
        return order.model_copy(update={"round": ordered_into(folder, order.round)})
    return order.model_copy(update={name: str(folder / Path(path).name) for name, path in _paths(order).items()})


def take(asked: Order, given: Order, confined: bool) -> None:
    """Bring what was written as ``given`` to where it was ``asked`` for, where there is anything.

    Where its writers are ``confined`` it is copied: a link, or a file that one of them has open to be read, leads to
    the file that they wrote for as long as they live, and this process clips, and adds noise, after it was taken.
    Without a sandbox they write wherever this process does, and it is moved. Raises `OSError`, and `TaskFailed` for
    what is no plain file, or larger than it can be.
    """
    lies = _paths(given)
    for name, path in _paths(asked).items():
        source = Path(lies[name])
        if not os.path.lexists(source):
            continue  # whoever looks for it says so
        if confined:
            _copy(source, Path(path), _most(asked, name))
        else:
            _move(source, Path(path))


def _paths(order: Order) -> dict[str, str]:
    found = {name: getattr(order, name, None) for name in _PATHS}
    return {name: path for name, path in found.items() if path}


def _most(order: Order, name: str) -> int | None:
    """Return how large a file can be; None where that is the code's own to say."""
    if not isinstance(order, Train) or name == "local_out":
        return None
    size = elements(order.signature)
    if name == "output":
        return _FLOAT * size
    if order.sync.keep_local:  # whose tensors no signature names
        return None
    # Two moments and the weights, of numbers up to float64, and what is said of each tensor.
    return 3 * 2 * _FLOAT * size + _HEAD + _ENTRY * len(order.signature)


def _copy(source: Path, path: Path, most: int | None) -> None:
    """Copy a plain file to one that no other process has ever had open, and remove it."""
    part = path.with_name(path.name + ".part")
    try:
        number = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise _left(path) from None
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise _left(path)
        if found.st_size > (shutil.disk_usage(path.parent).free if most is None else most):
            raise _left(path)
        part.unlink(missing_ok=True)  # of a process that was killed
        target = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not _copied(number, target, found.st_size):
                raise _left(path)
            try:
                source.unlink()
            except (IsADirectoryError, FileNotFoundError):  # it was another's place a moment later
                raise _left(path) from None
            os.replace(part, path)
        finally:
            os.close(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(number)


def _copied(number: int, target: int, size: int) -> bool:
    """Copy so many bytes, within the kernel; tell whether there were that many."""
    at, within = 0, True
    while at < size:
        if within:
            try:
                done = os.copy_file_range(number, target, size - at)
            except OSError as error:
                if error.errno not in _NOT_WITHIN:
                    raise
                within = False  # this file system, or these two
                continue
        else:
            done = os.sendfile(target, number, None, size - at)
        if not done:
            return False
        at += done
    return True


def _move(source: Path, path: Path) -> None:
    if not stat.S_ISREG(source.lstat().st_mode):
        raise _left(path)
    os.replace(source, path)


def _left(path: Path) -> TaskFailed:
    return TaskFailed(f"{path.name}: is no file that its worker wrote and closed; the task must leave files alone")
