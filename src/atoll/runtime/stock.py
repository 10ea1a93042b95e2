"""What sites fetch: their runs' code and weights, by digest, each to those whose work needs it and to nobody else."""

from collections.abc import Iterator

from atoll.boundary.channel import Frame, FrameLike
from atoll.errors import Denied, Invalid, LinkLost
from atoll.outer.wire import CHUNK
from atoll.registry.blobs import Blobs
from atoll.registry.models import Models
from atoll.runtime.border import Border
from atoll.runtime.conductor import Conductor
from atoll.runtime.files import Folders
from atoll.runtime.state import State
from atoll.spec.event import Joined
from atoll.spec.job import EvaluateJob, PredictJob
from atoll.spec.message import Parcel
from atoll.spec.model import Signature

_PIECE = 1 << 20
Stream = tuple[Parcel, Iterator[FrameLike]]


class Stock:
    """Gives a header and frames, once the hub's rules have allowed it and the journal knows of it."""

    def __init__(self, conductor: Conductor, border: Border, blobs: Blobs, models: Models, folders: Folders) -> None:
        self._conductor, self._border, self._blobs = conductor, border, blobs
        self._models, self._folders = models, folders

    def code(self, site: str, parcel: Parcel, digest: str, probed: str | None) -> Stream:
        """Give the code of a run that this site has a part in, or the code ``probed`` of a probe under way there."""
        state = self._conductor.states.get(parcel.run)
        given = state.code if state is not None and site in state.everyone else None
        if digest not in (probed, given):
            if state is not None and state.phase == "planning":  # perhaps for a probe that a hub before this one asked
                raise LinkLost(f"{site}: run {parcel.run} is being planned; its next assignment asks for this again")
            raise Denied(f"{site}: code {digest[:19]}... belongs to no work that it was given")
        data = self._blobs.get(digest)
        if state is not None:
            self._border.given(self._border.decided(state, site, "code", "in", len(data), digest=digest))
        header = parcel.model_copy(update={"size": len(data)})
        return header, (Frame(at, 0, data[at : at + _PIECE]) for at in range(0, len(data), _PIECE))

    def weights(self, site: str, parcel: Parcel, digest: str) -> Stream:
        """Give the weights that the run's stage works with: as a change to those that the site has, where it is here.

        `LinkLost` tells who asks for older ones to wait.
        """
        state = self._conductor.states.get(parcel.run)
        if state is None or site not in state.everyone or state.over:
            raise Denied(f"{site}: has no part in run {parcel.run!r}, so its weights are not given out to it")
        files = self._folders.of(parcel.run)
        weights, signature = self._model_of(state)
        if digest != weights:
            if state.plan is not None and state.plan.sync.wait.kind == "buffer":
                # The version it was given is old already, and a buffer sends it no other by itself.
                self._conductor.post(Joined(run=state.run, site=site), actor=site)
            raise LinkLost(f"{site}: weights {digest[:19]}... are old; its next assignment names others")
        if parcel.base is not None and state.plan is not None and state.weights is not None:
            change = files.changes.find(parcel.base, weights)
            if change is not None:
                wire = tuple(step.kind for step in state.plan.sync.down)
                crossed = self._border.decided(state, site, "model", "in", change.bytes, digest=weights, wire=wire)
                self._border.given(crossed)
                return parcel.model_copy(update={"size": change.size}), change.frames
        vector = files.vector(weights, signature, None if state.weights else self._blobs.get)
        self._border.given(self._border.decided(state, site, "model", "in", vector.nbytes, digest=weights))
        # Not encoded, which would look through all of it for each site: weights were found finite when they were made.
        pieces = ((at, vector[at : at + CHUNK]) for at in range(0, len(vector), CHUNK))
        frames = (Frame(at, len(piece), piece.data.cast("B")) for at, piece in pieces)
        return parcel.model_copy(update={"size": len(vector), "base": None}), frames

    def _model_of(self, state: State) -> tuple[str, Signature]:
        """Return the weights a stage works with: the run's own, or those of the registered model it names."""
        if isinstance(state.job, EvaluateJob | PredictJob):
            model = self._models.get(state.job.model)
            return model.weights, model.signature
        if state.weights is None:
            raise Invalid(f"run {state.run} has no weights yet; wait for its first ones")
        return state.weights, state.signature
