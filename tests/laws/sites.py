"""A site's workers without a site: they are given one layout after another, and orders by hand."""

import numpy as np
import pyarrow.parquet as pq

from atoll.errors import Unavailable
from atoll.runtime.local import LocalExecutor
from atoll.spec import order as orders
from atoll.spec.compute import Compute
from atoll.spec.job import Optimiser
from atoll.spec.model import with_control
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.opening import opening

STEPS = 5


class Site:
    """A group of workers that is given one layout after another, and replaced when one was killed."""

    def __init__(self, folder, ranks):
        self.folder, self.home, self.ranks, self.killed = folder, folder / f"ranks-{ranks}", ranks, 0
        self.executor = LocalExecutor()
        self.group = self.executor.start(Layout(data=ranks), self.home)

    def order(self, opened, order):
        try:
            self.group.order(opened, 120)
            return self.group.order(order, 120)
        except Unavailable:
            self.group.close()
            self.group, self.killed = self.executor.start(Layout(data=self.ranks), self.home), self.killed + 1
            assert self.killed < 9
            return self.order(opened, order)

    def open(self, degrees, experts=0, fault="", compute=None, **params):
        return opening(
            self.folder,
            "Words",
            holdout=0.25,
            params={"experts": experts, "fault": fault, **params},
            layout=Layout(**degrees),
            compute=Compute(**(compute or {})),
        )

    def begin(self, opened):
        """Return the first weights and their signature."""
        weights = self.home / "initial.f32"
        said = self.order(opened, orders.Initialise(seed=3, output=str(weights)))
        return weights, said.signature

    def train(self, opened, kind="sgd", batch=6, **more):
        weights, signature = more.pop("begun", None) or self.begin(opened)
        sync = {"period": STEPS, **more.pop("sync", {})}
        if sync.get("control"):
            started = np.fromfile(weights, np.float32)
            weights = weights.with_name("controlled.f32")
            np.concatenate([started, np.full_like(started, 0.01)]).tofile(weights)
            signature = with_control(signature)
        order = orders.Train(
            seed=3,
            weights=str(weights),
            signature=signature,
            output=str(self.home / "update.f32"),
            done=more.pop("done", 0),
            steps=STEPS,
            batch=batch,
            optimiser=Optimiser(kind=kind, rate=0.1 if kind == "sgd" else 0.01),
            sync=Sync.model_validate(sync),
            **more,
        )
        said = self.order(opened, order)
        return np.fromfile(self.home / "update.f32", np.float32), said

    def answers(self, opened):
        weights, signature = self.begin(opened)
        said = self.order(opened, orders.Evaluate(weights=str(weights), signature=signature))
        output = self.home / "answers.parquet"
        self.order(opened, orders.Predict(weights=str(weights), signature=signature, output=str(output)))
        return said.totals, pq.read_table(output)
