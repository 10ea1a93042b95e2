"""An unmodified Flower `NumPyClient` as a site's step. Duck-typed: nothing of Flower is imported here, or needed.

What Flower's server and strategy did, a job's `sync` does: FedAvg is `preset: fedavg`, and a round is a call of the
client's `fit`. Interface: Beutel et al. (2020), Flower: A Friendly Federated Learning Research Framework.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atoll.errors import TaskFailed
from atoll.spec.task import Arrays, Budget, Fitted, Mean

_LOSSES = ("loss", "train_loss")  # what clients call it among what `fit` tells


class FlowerTask:
    """Derive from it, and write `client` and `examples`; to deploy the model, `predict` as in `atoll.ArraysTask`.

    Arrays are named by their place in Flower's list: "0", "1", ... A client is made anew for each call, so what it
    keeps for itself does not outlive a round.
    """

    def client(self, examples: Arrays | None) -> Any:
        """Return the client over these examples of the site: all it trains on, or all that it is evaluated on.

        None: only `get_parameters` will be called. What `to_client()` made of a client is taken, too.
        """
        raise TaskFailed(f"{type(self).__name__} has no method 'client'; write it as atoll.tasks.flower shows")

    def parameters(self) -> Sequence[Any]:
        """Return the first values, by default a client's; write it where the server gave `initial_parameters`."""
        return _numpy(self.client(None), "get_parameters").get_parameters({})

    def config(self, budget: Budget) -> dict[str, Any]:
        """Return what `fit` is told of the round, in the place of the strategy's `on_fit_config_fn`."""
        return {"server_round": budget.round, "local_epochs": budget.steps}

    def arrays(self) -> dict[str, Any]:
        found = self.parameters()
        if not isinstance(found, Sequence) or not found:
            raise TaskFailed("get_parameters() returned no list of arrays; write the task's parameters(), which does")
        return {str(place): value for place, value in enumerate(found)}

    def fit(self, arrays: Arrays, examples: Arrays, budget: Budget) -> Fitted:
        """Let the client fit, and weigh it as Flower does: by the number of examples that it gives."""
        client = _numpy(self.client(examples), "fit")
        found, used, told = _three(client.fit(list(arrays.values()), self.config(budget)), "fit", "parameters")
        if not isinstance(found, Sequence) or len(found) != len(arrays):
            had = f"{len(found)} parameters" if isinstance(found, Sequence) else f"a {type(found).__name__}"
            raise TaskFailed(f"fit() of the client returned {had} where it was given a list of {len(arrays)}; keep it")
        loss = next((told[name] for name in _LOSSES if name in told), None)
        if loss is None:  # a client need not tell one
            loss = _three(_numpy(client, "evaluate").evaluate(list(found), {}), "evaluate", "loss")[0]
        return Fitted(dict(zip(arrays, found, strict=True)), loss, used)

    def metrics(self, arrays: Arrays, examples: Arrays) -> dict[str, Mean]:
        """Return the client's loss and those of its metrics that are numbers, as means over its examples."""
        client = _numpy(self.client(examples), "evaluate")
        loss, used, told = _three(client.evaluate(list(arrays.values()), {}), "evaluate", "loss")
        found = {name: value for name, value in {"loss": loss, **told}.items() if isinstance(value, numbers.Real)}
        return {name: Mean(float(value) * used, used) for name, value in found.items()}


def _numpy(client: Any, needed: str) -> Any:
    client = getattr(client, "numpy_client", client)  # where Flower's `to_client()` keeps it
    if not callable(getattr(client, needed, None)):
        raise TaskFailed(f"client() returned a {type(client).__name__} without {needed}(); return a NumPyClient")
    return client


def _three(told: object, method: str, first: str) -> tuple[Any, int, Mapping[str, Any]]:
    """Return (parameters or loss, number of examples, metrics) as the client gave them."""
    if isinstance(told, tuple) and len(told) == 3:
        of, used, metrics = told
        if isinstance(used, int | np.integer) and isinstance(metrics, Mapping):
            if used < 1:  # what a NumPyClient says whose method nobody wrote
                raise TaskFailed(
                    f"{method}() of the client used {used} examples; write the method, or give it examples"
                )
            return of, int(used), metrics
    raise TaskFailed(f"{method}() of the client returned a {type(told).__name__}; return ({first}, examples, metrics)")
