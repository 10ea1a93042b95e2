"""The room that a run's workers live in: built empty by bubblewrap, with what the run was granted and nothing more.

In the room runs `cat` and nothing else. Workers are forked outside, where everything is imported already, and go in
(`atoll.runtime.entering`). `cat` is its first process: when that ends the kernel kills whatever is in it. It is killed,
or reads the end of a pipe of the agent's, however the agent ended. It has a capability that nobody who went in has: so
nobody can look at its files, of which one is that pipe.
"""

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atoll.errors import Unavailable
from atoll.runtime.member import GRACE
from atoll.spec.sandbox import Limits

log = logging.getLogger(__name__)
_READY = 20.0  # seconds to make the namespaces and mounts
_GONE = 30.0  # seconds until what was killed is taken for what the kernel cannot end: its disk does not answer
# What a Linux program needs besides its own files. Links such as /lib -> usr/lib are made again.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/alternatives")
_SYSTEM += ("/etc/localtime", "/sys/devices/system/cpu")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_ACCELERATORS = ("nvidia*", "kfd", "dri")
_WORDS = 500  # characters of what bwrap says


@dataclass(frozen=True, slots=True)
class Grant:
    """What of this machine one run at one site is given."""

    hidden: Path  # the party's own folder: keys, journal, other runs
    readable: tuple[Path, ...]  # code, dataset, what the run keeps here
    folder: Path | None  # the only one that it may write to, besides /tmp in memory


def homeless() -> dict[str, str]:
    """Return what the environment of a process says where it can see no home of anybody's."""
    return {"HOME": "/tmp", "TMPDIR": "/tmp"}  # noqa: S108 - the room's own, in memory


def command(module: str, room: int | None, limits: Limits, dials: bool = True) -> list[str]:
    """Return the command line of a module that goes into the room of this pidfd, where there is one, within limits.

    Who goes in with a socket of another network must be one that never ``dials``.
    """
    python = [sys.executable, "-P", "-m"]
    if room is None and limits == Limits():
        return [*python, module]
    within = ["-", "dials"] if room is None else [str(room), "dials" if dials else "listens"]
    return [*python, "atoll.runtime.entering", limits.model_dump_json(), *within, module]


class Room:
    """One sandbox. `pidfd` stands for it; any number of processes may enter until it is closed."""

    def __init__(self, grant: Grant, limits: Limits) -> None:
        """Build it; returns when processes can enter. Raises `Unavailable`; what bubblewrap says is in the log, for it
        tells where a site keeps its files."""
        self._turn, self._open, self._gone = threading.Lock(), True, False
        try:
            with tempfile.TemporaryFile() as said, ExitStack() as ends:
                told, tell = os.pipe()
                ends.callback(os.close, told)
                try:
                    self._process = subprocess.Popen(
                        [*_bwrap(), "--info-fd", str(tell), *arguments(grant, limits), "--", "cat"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=said,
                        pass_fds=(tell,),
                        env={name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ},
                        start_new_session=True,
                    )
                finally:
                    os.close(tell)
                try:
                    self.pidfd = self._met(told)
                except (OSError, ValueError, KeyError):
                    self._process.kill()
                    self._process.communicate()
                    said.seek(0)
                    words = said.read(_WORDS).decode(errors="replace").strip().replace("\n", "; ")
                    log.error("sandbox: bubblewrap makes none: %s", words or "it says nothing")
                    raise Unavailable("sandbox: bubblewrap makes none; the site's log says why") from None
        except OSError as error:
            raise Unavailable(f"sandbox: {error.strerror}; free memory, files or processes") from None
        except subprocess.SubprocessError:  # it says a whole command line
            raise Unavailable("sandbox: Python does not say where it imports from; look at this machine") from None

    def _met(self, told: int) -> int:
        """Return the pidfd of the room's first process, once all its mounts are made."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _READY)[0] or not self._process.stdout.read(1):
            raise ValueError("it was not built")
        return os.pidfd_open(int(json.loads(os.read(told, 1 << 16))["child-pid"]))

    def close(self) -> bool:
        """End it, and every process that is in it, whatever became of who started that.

        Return whether nothing is left of it. False: something in it waits for a disk, and may write once that answers.
        """
        with self._turn:
            if self._open:
                self._open = False
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                ended = select.poll()
                ended.register(self.pidfd, select.POLLIN)
                self._gone = bool(ended.poll(_GONE * 1000))  # it ends when all others have (pid_namespaces(7))
                os.close(self.pidfd)
                for pipe in (self._process.stdin, self._process.stdout):
                    assert pipe is not None
                    pipe.close()
                try:
                    self._process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            return self._gone


def arguments(grant: Grant, limits: Limits) -> list[str]:
    """Return how bubblewrap is to build a room: what comes later lies over what came before."""
    size = ["--size", str(limits.memory_bytes)] if limits.memory_bytes is not None else []
    words = ["--unshare-all", "--unshare-user", "--as-pid-1", "--new-session", "--hostname", "worker"]
    words += ["--cap-add", "CAP_KILL"]  # in the room alone, where it lets `cat` do nothing that it could not do
    words += ["--proc", "/proc", *size, "--tmpfs", "/tmp", "--dir", "/dev", *size, "--tmpfs", "/dev/shm"]  # noqa: S108
    for at, name in enumerate(("stdin", "stdout", "stderr")):
        words += ["--symlink", f"/proc/self/fd/{at}", f"/dev/{name}"]
    words += ["--symlink", "/proc/self/fd", "/dev/fd"]
    accelerators = sorted(str(path) for name in _ACCELERATORS for path in Path("/dev").glob(name))
    for device in (*_DEVICES, *accelerators):
        words += ["--dev-bind-try", device, device]
    words += _shown([Path(path) for path in (*_SYSTEM, *(["/sys"] if accelerators else ()))])
    words += _shown(_importable())
    words += ["--tmpfs", str(_whole(grant.hidden)), "--dir", os.getcwd()]  # relative paths mean the same inside
    for path in grant.readable:
        words += ["--ro-bind", str(path.absolute()), str(path.absolute())]
    if grant.folder is not None:
        words += ["--bind", str(grant.folder.absolute()), str(grant.folder.absolute())]
    return [*words, "--remount-ro", "/"]


def _shown(paths: Iterable[Path]) -> list[str]:
    words: list[str] = []
    for path in paths:
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    return words


def _whole(home: Path) -> Path:
    """Return the folder of all that a home holds, where this is one of its sites: a hub has its keys beside them."""
    home = home.absolute()
    return home.parent.parent if home.parent.name == "sites" else home


@cache
def _importable() -> tuple[Path, ...]:
    """Return the folders that a worker's Python is read from: of this process's own path a worker has not all."""
    asked = [sys.executable, "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=_READY, env={"PATH": os.defpath})
    found = [Path(sys.prefix), Path(sys.base_prefix), *map(Path, filter(None, said.stdout.splitlines()))]
    outer: list[Path] = []
    for path in sorted({path for path in found if path.exists()}):
        if not any(path.is_relative_to(one) for one in (*outer, Path("/usr"))):
            outer.append(path)
    return tuple(outer)


def _bwrap() -> list[str]:
    return [shutil.which("bwrap") or "bwrap"]


@cache
def missing() -> str:
    """Return why there can be no sandbox on this machine, or "". Asked once in a process's life: it takes 10 ms."""
    if not hasattr(os, "pidfd_open"):
        return "it takes Linux 5.8"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed; install it from the distribution (apt-get install bubblewrap)"
    with tempfile.TemporaryDirectory(prefix="atoll-") as folder:
        home = Path(folder) / "home"
        home.mkdir()  # in a folder that is shown read-only, such as Python's own, bubblewrap can make none
        try:
            Room(Grant(home, (), Path(folder)), Limits()).close()
        except (Unavailable, OSError, subprocess.SubprocessError) as error:
            return str(error)
    return ""
