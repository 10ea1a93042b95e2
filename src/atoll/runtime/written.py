"""What workers write: ordered into the one folder that they may write to, and taken out of it once they have answered.

User code runs where these files are made. Nothing there is opened by this process as it lies: a link would lead it to a
file that only this process may read, and whoever still holds a file open could change it after it was looked at.
"""

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

from atoll.errors import TaskFailed
from atoll.spec.order import Ahead, Order

_PATHS = ("output", "state_out", "control_out", "local_out")


def ordered_into(folder: Path, order: Order) -> Order:
    """Return an order that has all of its files written in ``folder``, under the names that they are to have."""
    if isinstance(order, Ahead):
        return order.model_copy(update={"round": ordered_into(folder, order.round)})
    return order.model_copy(update={name: str(folder / Path(path).name) for name, path in _paths(order).items()})


def take(asked: Order, given: Order) -> None:
    """Move what was written as ``given`` to where it was ``asked`` for, where there is anything.

    Raises `TaskFailed` for what is no plain file, or is still open for writing.
    """
    lies = _paths(given)
    for name, path in _paths(asked).items():
        try:
            os.replace(lies[name], path)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise _left(path) from None
        _settle(Path(path))


def _paths(order: Order) -> dict[str, str]:
    found = {name: getattr(order, name, None) for name in _PATHS}
    return {name: path for name, path in found.items() if path is not None}


def _settle(path: Path) -> None:
    """See that a file is one and that nobody can write to it any more; where that cannot be seen, take a copy."""
    if not stat.S_ISREG(path.lstat().st_mode):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
        raise _left(str(path))
    number = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # given only where no one has it open for writing
    except BlockingIOError:
        path.unlink()
        raise _left(str(path)) from None
    except OSError:  # this file system, or another owner's file, has no leases
        copy = path.with_name(path.name + ".part")
        shutil.copyfile(path, copy)
        os.replace(copy, path)
    finally:
        os.close(number)


def _left(path: str) -> TaskFailed:
    name = Path(path).name
    return TaskFailed(f"{name}: is no file that its worker wrote and closed; the task must leave files alone")
