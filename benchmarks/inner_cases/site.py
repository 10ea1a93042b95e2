"""Atoll's side: a dataset and a task, and groups of ranks that are driven as a site's agent drives them."""

import shutil
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atoll.data.batches import batch
from atoll.runtime.executor import Executor, Group
from atoll.spec.compute import Compute
from atoll.spec.job import Data, Optimiser
from atoll.spec.order import Initialise, Open, Reply, TaskName, Train
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from inner_cases import PATIENCE, Bench, Ran
from inner_cases.notes import Call, read, steps_of

ROWS = 4096  # windows: no case takes as many, so that a row tells its step
SEED = 0
OPTIMISER = Optimiser(kind="adamw", rate=1e-3, weight_decay=0.1)
_HERE = Path(__file__).parent


class Site:
    """Where the data and the code lie, for Atoll and for its peers."""

    def __init__(self, bench: Bench) -> None:
        self.size, self.home = bench.size, bench.home
        self.windows, self.rows = self.home / "windows.npy", self.home / "windows.parquet"
        self.code, self._bench = self.home / "code", bench
        windows = _windows(self.size.length + 1)
        np.save(self.windows, windows)
        pq.write_table(pa.table({"window": [bytes(row) for row in windows]}), self.rows)
        self.code.mkdir()
        shutil.copy(_HERE / "task.py", self.code)
        shutil.copy(_HERE.parent / "peers" / "gpt.py", self.code)

    def order(self, size: int) -> np.ndarray:
        """Return the rows as batches of so many take them, one after the other."""
        return np.concatenate([batch(SEED, ROWS, at, size) for at in range(0, ROWS - size + 1, size)])

    def train(self, executor: Executor, layout: Layout, steps: int, asked: float | None = None) -> Ran:
        """Do one run from the start of its ranks to its end."""
        asked = asked or time.monotonic()
        with self.training(executor, layout) as training:
            training.begin(steps + 1)  # the beginning of one more is the last one's end
            reply = training.reply()
            calls = [call for call in training.calls() if call.rank == 0]
        assert reply.loss is not None
        return Ran(asked, tuple(call.at for call in calls[1:]), reply.loss)

    @contextmanager
    def training(
        self, executor: Executor, layout: Layout, size: int = 0, microbatches: int = 1, **more: bool
    ) -> Iterator["Training"]:
        """Start ranks and open the data; the group is gone afterwards. ``more`` is the task's."""
        folder = self._bench.folder("ranks")
        notes = folder / "notes"
        notes.mkdir()
        task = TaskName(
            file="task.py",
            name="Windows",
            params={"notes": str(notes), "shape": dict(self.size.shape), **more},
        )
        opened = Open(
            bundle=str(self.code),
            task=task,
            path=str(self.rows),
            format="parquet",
            fingerprint="sha256:" + 64 * "0",
            data=Data(dataset="windows", holdout=0.0),
            seed=SEED,
            layout=layout,
            compute=Compute(microbatches=microbatches),
        )
        group = executor.start(layout, folder)
        taken = size or self.size.batch
        training = Training(group, folder, opened, taken, steps_of(self.order(taken), taken))
        try:
            yield training
        finally:
            group.close()
            training.ended()
            for path in folder.glob("*.f32"):
                path.unlink()


@dataclass(slots=True)
class Training:
    """A group at work, one order after the other in a thread of its own."""

    group: Group
    folder: Path
    opened: Open
    batch: int
    steps_by_row: dict[int, int]
    done: int = 0
    _signature: Any = None
    _thread: threading.Thread | None = None
    _reply: Reply | None = None
    _error: BaseException | None = None

    @property
    def weights(self) -> str:
        return str(self.folder / "weights.f32")

    def begin(self, steps: int, **more: Any) -> None:
        """Order so many steps, after those ordered before; returns at once."""
        self._reply = self._error = None
        self._thread = threading.Thread(target=self._order, args=(steps, more), daemon=True)
        self._thread.start()

    def reply(self) -> Reply:
        """Wait for the order's end. Raises what it raised, and `TimeoutError`."""
        assert self._thread is not None, "an order was begun"
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError(f"an order has not ended in {PATIENCE:g} s")
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply

    def calls(self) -> list[Call]:
        """Return what all ranks have noted so far, in the order of its time."""
        return read(self.folder / "notes", self.steps_by_row)

    def until(self, true: Callable[[list[Call]], bool]) -> list[Call]:
        """Wait until what was noted is as it shall be, and return it. Raises what the order raised meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not true(calls := self.calls()):
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline or self._reply is not None:
                raise TimeoutError("the ranks never came to what was waited for")
            time.sleep(0.01)
        return calls

    def ended(self) -> None:
        """Wait for the thread, whose group is closed."""
        if self._thread is not None:
            self._thread.join(10)

    def _order(self, steps: int, more: dict[str, Any]) -> None:
        try:
            if self._signature is None:
                self.group.order(self.opened, PATIENCE)
                self._signature = self.group.order(Initialise(seed=SEED, output=self.weights), PATIENCE).signature
            order = Train(
                seed=SEED,
                weights=self.weights,
                signature=self._signature,
                output=str(self.folder / "update.f32"),
                done=self.done,
                steps=steps,
                batch=self.batch,
                optimiser=OPTIMISER,
                sync=Sync(period=steps),
                **more,
            )
            self.done += steps
            self._reply = self.group.order(order, PATIENCE)
        except BaseException as error:  # noqa: BLE001 - of a thread: whoever waits for it raises it there
            self._error = error


def _windows(length: int) -> np.ndarray:
    """Return uint8 ``(ROWS, length)`` of the standard library's source; the same Python gives the same."""
    found, wanted = bytearray(), ROWS * length
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= wanted:
            return np.frombuffer(bytes(found[:wanted]), np.uint8).reshape(ROWS, length)
    raise RuntimeError(f"this Python's library has {len(found)} bytes of source, and {wanted} are needed")
