"""What becomes of registered models: names that others rely on, copies that leave Atoll, and an end.

Each is asked of the hub's rules. An erasure is journalled before anything is removed, so a hub that is killed between
the two goes on with it when it starts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from atoll.errors import Invalid
from atoll.runtime.approvals import Approvals
from atoll.runtime.desk import Parts
from atoll.runtime.planning import asking
from atoll.spec.job import EvaluateJob, PredictJob
from atoll.spec.model import Aliased, Bundle, Erased, Model
from atoll.spec.user import Erasure, Promotion, User


class Holdings:
    """One hub's. ``publishing`` is held while a model becomes one: the same weights may be kept and erased at once.

    ``deployed`` returns name -> model of what answers.
    """

    def __init__(
        self,
        parts: Parts,
        approvals: Approvals,
        publishing: AbstractContextManager[object],
        deployed: Callable[[], Mapping[str, str]],
    ) -> None:
        self._gate, self._conductor, self._models, self._blobs = parts.gate, parts.conductor, parts.models, parts.blobs
        self._approvals, self._publishing, self._deployed = approvals, publishing, deployed
        for model in self._models.erased():
            self._remove(model)

    def promote(self, reference: str, alias: str, user: User) -> Model:
        """Give a version an alias, such as champion; the alias moves from whichever had it. Raises `Unapproved` once
        the request is kept for another user."""
        model = self._models.get(reference)
        self._approvals.need(user, Promotion(model=model.reference, alias=alias), f"{model.reference} as {alias}")
        self._conductor.record(self.aliased(model.reference, alias, user), actor=user.name)
        return model

    def aliased(self, reference: str, alias: str, user: User) -> Aliased:
        """Return the entry of a promotion. Raises `NotFound`."""
        model = self._models.get(reference)
        return Aliased(model=model.name, alias=alias, version=model.version, user=user.name)

    def weights(self, reference: str, user: User) -> Path:
        """Return the file of a version's weights, verified, for whoever may take it along."""
        return self._blobs.local(self._given(reference, user).weights)

    def code(self, reference: str, user: User) -> Bundle:
        """Return the code that a version was trained by and answers with, likewise."""
        return Bundle.model_validate_json(self._blobs.get(self._given(reference, user).code))

    def _given(self, reference: str, user: User) -> Model:
        model = self._models.get(reference)
        self._gate.ask(asking("export", user, model.reference), model.reference)
        return model

    def erase(self, reference: str, user: User) -> Model:
        """Remove a version's weights and its aliases. Raises `Invalid` while it answers or a run works with it, and
        `Unapproved` once the request is kept for another user."""
        model = self._models.get(reference)
        self._approvals.need(user, Erasure(model=model.reference), f"erasure of {model.reference}")
        with self.erasing(model.reference, user) as event:
            self._conductor.record(event, actor=user.name)
        return model

    @contextmanager
    def erasing(self, reference: str, user: User) -> Iterator[Erased]:
        """Give the entry of an erasure to a caller that journals it, and remove the weights after that.

        Raises `NotFound`, and `Invalid` while the version is in use.
        """
        with self._publishing:
            model = self._models.get(reference)
            self._check_idle(model)
            yield Erased(model=model.name, version=model.version, user=user.name)
            self._remove(model)

    def _check_idle(self, model: Model) -> None:
        for name, deployed in self._deployed().items():
            if deployed == model.reference:
                raise Invalid(f"model: {model.reference} answers as {name!r}; stop it first: atoll undeploy {name}")
        for state in self._conductor.states.values():
            job = state.job
            if not state.over and isinstance(job, EvaluateJob | PredictJob) and self._models.same(job.model, model):
                raise Invalid(f"model: run {state.run} works with {model.reference}; wait for its end, or cancel it")

    def _remove(self, model: Model) -> None:
        """Remove the weights of an erased version, unless another one has the very same."""
        if all(other.weights != model.weights for other in self._models.all()):
            self._blobs.remove(model.weights)
