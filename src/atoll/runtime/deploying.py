"""What of the registry answers requests: replicas started, started again and stopped, each asked of the hub's rules."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from atoll.data.catalogue import Catalogue
from atoll.errors import AtollError, Invalid, NotFound, Unavailable
from atoll.runtime.approvals import Approvals
from atoll.runtime.bundle import laid_out, write_bundle
from atoll.runtime.desk import Parts
from atoll.runtime.planning import asking
from atoll.runtime.roster import Roster
from atoll.spec.document import near_miss
from atoll.spec.model import Bundle, Deployed, Deployment, Model, Undeployed
from atoll.spec.pretrained import Pretrained
from atoll.spec.run import DeploymentView
from atoll.spec.user import Deploying as Wanted
from atoll.spec.user import User


class Deployer(Protocol):
    """Who runs replicas. Serving and the runtime do not know each other; whoever hosts the hub brings them together."""

    def start(
        self,
        deployment: Deployment,
        model: Model,
        bundle: Path,
        weights: Path,
        columns: Mapping[str, str],
        pretrained: Pretrained | None = None,
    ) -> DeploymentView: ...
    def stop(self, name: str) -> DeploymentView: ...
    def views(self) -> tuple[DeploymentView, ...]: ...
    def close(self) -> None: ...


class Deploying:
    """One hub's deployments. In its ``folder`` their models' code is laid out, and pretrained files are listed."""

    def __init__(self, deployer: Deployer, folder: Path, parts: Parts, roster: Roster, approvals: Approvals) -> None:
        self._deployer, self._folder, self._roster = deployer, folder / "code", roster
        self._approvals = approvals
        self._catalogue = Catalogue(folder)
        self._gate, self._conductor, self._models, self._blobs = parts.gate, parts.conductor, parts.models, parts.blobs

    def deploy(self, deployment: Deployment, user: User) -> DeploymentView:
        """Start a replica of a model; blocks until it answers or has failed. Raises as `Approvals.need`."""
        model = self._models.get(deployment.model)
        if model.keep_local:
            raise Invalid(
                f"deployment: tensors of {model.reference} stayed at its sites ({', '.join(model.keep_local)}), so no "
                "replica has the whole model; submit a predict job, which answers at a site with its own"
            )
        deployment = deployment.model_copy(update={"model": model.reference})
        wanted = Wanted(deployment=deployment)
        self._approvals.need(user, wanted, f"{model.reference} as {deployment.name}")
        with self.launched(deployment) as view:
            self._conductor.record(Deployed(deployment=deployment, user=user.name), actor=user.name)
        return view

    @contextmanager
    def launched(self, deployment: Deployment) -> Iterator[DeploymentView]:
        """Start what may be deployed, for a caller that journals it meanwhile: what is not journalled answers nobody.

        Raises `Unavailable`.
        """
        view = self._launch(deployment)
        if view.state == "failed":
            raise Unavailable(view.words)
        try:
            yield view
        except BaseException:
            with suppress(NotFound):  # somebody was quicker
                self._deployer.stop(deployment.name)
            raise

    def known(self) -> dict[str, str]:
        """Return name -> model of what is deployed, and of replicas that start, or failed to."""
        there = {view.name: view.model for view in self._deployer.views()}
        return there | {one.name: one.model for one in self._roster.deployments.values()}

    def _launch(self, deployment: Deployment) -> DeploymentView:
        model = self._models.get(deployment.model)
        bundle = Bundle.model_validate_json(self._blobs.get(model.code))
        folder = self._folder / model.code.removeprefix("sha256:")
        if not laid_out(folder, model.code):
            write_bundle(bundle, folder)
        weights = self._blobs.local(model.weights)
        return self._deployer.start(deployment, model, folder, weights, model.columns, self._pretrained(model))

    def _pretrained(self, model: Model) -> Pretrained | None:
        """Return the files that a model needs besides its own weights; raise `NotFound` where none such are listed."""
        if model.pretrained is None:
            return None
        found = self._catalogue.find_pretrained(model.pretrained)
        if found is None:
            raise NotFound(
                f"deployment: {model.reference} needs the pretrained files {model.pretrained}, and the hub lists none "
                "such; add their folder here by: atoll pretrained add NAME FOLDER --hub"
            )
        return found

    def redeploy(self, user: User) -> list[DeploymentView]:
        """Start what an earlier hub of this home had deployed; blocks until each answers or has failed."""
        return [self._again(deployment, user) for deployment in self._resting()]

    def _again(self, deployment: Deployment, user: User) -> DeploymentView:
        try:  # the rules may be others by now
            subject = f"{deployment.model} as {deployment.name}"
            self._gate.ask(asking("deploy", user, deployment.model), subject, alone=False)  # two agreed to it before
            return self._launch(deployment)
        except AtollError as error:  # of one deployment: the others start all the same
            return DeploymentView(
                name=deployment.name, model=deployment.model, url="", state="failed", words=str(error)
            )

    def _resting(self) -> list[Deployment]:
        """Return what is deployed by the journal and was not started in this process."""
        started = {view.name for view in self._deployer.views()}
        return [deployment for name, deployment in sorted(self._roster.deployments.items()) if name not in started]

    def undeploy(self, name: str, user: User) -> None:
        """Stop a deployment. Whoever may deploy a model may end that, alone."""
        known = self.known()
        if name not in known:
            raise NotFound(
                f"deployment: there is no {name!r}{near_miss(name, list(known)) or '; start one with `atoll deploy`'}"
            )
        self._gate.ask(asking("deploy", user, known[name]), f"end of {name}", alone=False)
        if all(deployment.name != name for deployment in self._resting()):
            self._deployer.stop(name)
        self._conductor.record(Undeployed(name=name, user=user.name), actor=user.name)

    def views(self) -> list[DeploymentView]:
        """Return what was deployed here, and what an earlier hub had deployed and nobody has started again."""
        words = "ended with its hub; `atoll hub start` starts it again"
        resting = [
            DeploymentView(name=deployment.name, model=deployment.model, url="", state="stopped", words=words)
            for deployment in self._resting()
        ]
        return [*self._deployer.views(), *resting]

    def close(self) -> None:
        """End every replica."""
        self._deployer.close()
