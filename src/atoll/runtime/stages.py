"""What a site does in each stage of a run: orders to its workers, and their results as crossings.

A worker's reply is the word of user code. It is held to what the order can have given before it goes anywhere, and
what needs no user code (sums over columns, queries) is computed here.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from atoll.boundary.channel import FrameLike, Source
from atoll.data.answered import Answered, selected
from atoll.data.batches import split
from atoll.data.catalogue import read_table, require_columns
from atoll.data.query import answer, parse
from atoll.data.statistics import column_sums
from atoll.errors import Denied, Invalid, TaskFailed
from atoll.outer.secret import ring_of
from atoll.outer.wire import recalls
from atoll.runtime import faults, personal
from atoll.runtime.balances import Balances
from atoll.runtime.concealing import weight_of
from atoll.runtime.disk import file_crc
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import RunFolder
from atoll.runtime.mark import Kept, Origin
from atoll.runtime.outgoing import (
    check_vector,
    content,
    encode_with_feedback,
    outgoing,
    outgoing_kept,
    outgoing_masked,
    privatise,
    span,
)
from atoll.runtime.pacing import fitting, rebalanced, told
from atoll.runtime.place import Place
from atoll.runtime.private import silent, steps_at
from atoll.runtime.ranks import Ranks
from atoll.runtime.reports import Reports
from atoll.spec import order as orders
from atoll.spec.event import Answer, ColumnSums, Totals
from atoll.spec.fleet import Dataset
from atoll.spec.job import EvaluateJob, PredictJob, QueryJob, TrainJob
from atoll.spec.message import Assign, Done, Parcel
from atoll.spec.model import elements, without_control
from atoll.spec.pace import Pace
from atoll.spec.policy import CrossingKind, Request
from atoll.spec.wire import noised

_NOTHING = ColumnSums(count=0, total=0.0, squares=0.0)
log = logging.getLogger(__name__)


class Stages:
    """One run's stages at one site. Everything computed for the hub lies in the run's folder until the hub has it."""

    def __init__(
        self,
        place: Place,
        folder: RunFolder,
        incoming: Incoming,
        ranks: Ranks,
        reports: Reports,
        wanted: Callable[[], bool],
    ) -> None:
        """``wanted`` tells, to who waits for other sites, whether the assignment at work is still the newest."""
        self._place, self._folder, self._incoming, self._wanted = place, folder, incoming, wanted
        self._ranks, self._reports, self._balances = ranks, reports, Balances(folder.path)
        self._answered = Answered(place.home, place.site.name)

    def do(self, a: Assign) -> None:
        """Do one assignment, once the owner's rules allow it. Returning means that the hub has its answer."""
        self._place.admit(a)
        self._place.reserve(a)
        _DO[a.work](self, a)

    def probe(self, a: Assign) -> None:
        """A worker times its own code, so what it says is as much user code's word as a metric is, and crosses as one.

        An owner who lets no metric out lets no profile out: the hub is told that there is none, and plans without us.
        """
        assert isinstance(a.job, TrainJob)
        memory = min((one.memory_bytes for node in self._place.site.nodes for one in node.devices), default=None)
        asked = {"seed": a.job.seed, "batch": a.job.batch, "optimiser": a.job.optimiser, "memory": memory}
        order = orders.Probe.model_validate({**asked, "private": a.job.privacy is not None})
        reply = self._ranks.order(a, order)
        if reply.profile is None:
            raise TaskFailed("the probe measured nothing; the task must not answer for its worker")
        try:
            self._say(a, "metric", self._place.entry(a).dataset.rows, profile=reply.profile)
        except Denied as error:
            log.warning("run %s: the probe's answer stays here, so this site is not planned with: %s", a.run, error)
            self._place.gate.say(Done(run=a.run, answer=self._answer(a)))

    def measure(self, a: Assign) -> None:
        assert isinstance(a.job, TrainJob)
        self._reports.progress(a, "measuring")
        entry, columns = self._place.opened(a), tuple(dict.fromkeys(a.job.data.statistics))
        if entry.dataset.columns:
            require_columns(columns, tuple(entry.dataset.columns), "data.statistics")
        table = read_table(entry.path, entry.format, columns)
        rows, _ = split(table.num_rows, a.job.data.holdout, a.job.seed)
        if columns and len(rows) >= entry.dataset.min_group:
            words = f"all but {a.job.data.holdout} drawn by {a.job.seed}"
            self._answered.admit(entry.dataset, selected(table.num_rows, rows, words))
        # A column that only a few rows have is told as one that no row has: its sum would be those rows' values.
        least = entry.dataset.min_group
        found = column_sums(table, columns, rows).items()
        sums = {name: column if column.count >= least else _NOTHING for name, column in found}
        self._say(a, "query", min((c.count for c in sums.values() if c.count), default=len(rows)), sums=sums)

    def initialise(self, a: Assign) -> None:
        assert isinstance(a.job, TrainJob)
        output = self._folder.path / f"initial-{a.position}.f32"
        order = orders.Initialise(seed=a.job.seed, output=str(output), keep_local=a.sync.keep_local)
        reply = self._ranks.order(a, order)
        personal.check_stays(a, reply.signature)
        check_vector(output, reply.signature, "the first weights")
        made = self._answer(a, signature=reply.signature)
        size = elements(reply.signature)
        parcel = Parcel(run=a.run, purpose="update", size=size, content=content(file_crc(output)), answer=made)
        request = self._place.crossing(a, "model", out=True, size=4 * size)
        faults.reached("site", "computed", "initialise")
        self._send(a, parcel, outgoing(output, ()), request)
        output.unlink(missing_ok=True)

    def train(self, a: Assign) -> None:
        origin = self._origin(a)
        kept = self._folder.kept(a.position)
        if kept is not None and kept.made != origin.made:  # of other data or another promise: it must not lie about
            self._folder.begin(a.position)
            kept = None
        terms = self._place.concealing.begin(a) if a.sync.masked else None  # the others' keys come while it trains
        kept = kept or self._train(a, origin)
        self._go_ahead(a)
        frames, size = outgoing_kept(self._folder, a, kept)
        name = ""
        if terms is not None:
            self._reports.progress(a, "waiting for the others' keys", a.steps, a.steps)
            weight = weight_of(a.sync, kept.examples)
            made = content(kept.token, [step.model_dump(mode="json") for step in a.sync.wire], weight)
            masks, name = self._place.concealing.masks(terms, made, self._wanted)
            frames = outgoing_masked(self._folder, a, ring_of(terms), weight, masks)
        self._reports.progress(a, "sending", a.steps, a.steps)
        first, last = span(a)
        kinds = tuple(transform.kind for transform in a.sync.wire)
        wire = [transform.model_dump(mode="json") for transform in a.sync.wire]
        parcel = Parcel(
            run=a.run,
            purpose="update",
            size=last - first,
            content=content(kept.token, wire, name),
            wire=kinds,
            answer=self._answer(
                a,
                examples=kept.examples,
                steps=kept.steps,
                loss=kept.loss if not silent(a) else None,
                seconds=kept.seconds,
                pace=kept.pace if self._reports.may_tell_paces(a) else None,
            ),
        )
        request = self._place.crossing(a, "update", out=True, size=size, wire=kinds, rows=kept.examples)
        if kept.private:
            self._place.charge(a, kept)
        self._send(a, parcel, frames, request)
        self._folder.settle(a.position)
        faults.reached("site", "settled", "train")

    def _origin(self, a: Assign) -> Origin:
        """Return of what a round's update is to be made. Raises `Denied` where it would go on from what was made of
        something else: by its name of one dataset, it would tell of another."""
        origin = self._place.origin(a, a.counted if recalls(a.sync.wire) or a.sync.control else None)
        foreign = self._folder.foreign(origin.run)
        if foreign is not None:
            raise Denied(
                f"{self._place.site.name} refuses: stage {foreign} of the run was of another job, dataset or promise, "
                "and this one would go on from what it left; submit the job again"
            )
        return origin

    def _train(self, a: Assign, origin: Origin) -> Kept:
        assert isinstance(a.job, TrainJob)
        assert a.weights is not None
        base = origin.base
        personal.check_stays(a, without_control(a.signature) if a.sync.control else a.signature)
        self._folder.begin(a.position)
        weights, output = self._incoming.weights(a), self._folder.update(a.position)
        faults.reached("site", "fetched", "train")
        control_in = self._folder.last_control(base) if a.sync.control else None
        control_out = self._folder.control(a.position) if a.sync.control else None
        if a.sync.control or recalls(a.sync.wire):  # now, so that no third one needs room
            self._folder.drop_uncounted(base, later=a.sync.wait.kind == "buffer")
        local_in = self._folder.last_local(a.position) if a.sync.keep_local else None
        local_out = self._folder.local(a.position) if a.sync.keep_local else None
        here = {
            "weights": str(weights),
            "local_in": str(local_in) if local_in else None,
            "local_out": str(local_out) if local_out else None,
            "control_in": str(control_in) if control_in else None,
            "control_out": str(control_out) if control_out else None,
            "checkpoint": str(self._folder.checkpoint(a.position)),
        }
        order = self._round(a).model_copy(update=here)
        state_in = Path(order.state_in) if order.state_in else None
        order = order.model_copy(update={"inputs": self._folder.inputs(a.weights, state_in, control_in, local_in)})
        self._reports.progress(a, "training", 0, a.steps)
        self._reports.balance = self._balances.of(a.position)
        began = time.monotonic()
        reply = self._ranks.order(a, order, a.steps)
        seconds = time.monotonic() - began
        where = f"the update of steps {a.done + 1} to {a.done + a.steps} of the run"
        # A task of arrays takes its steps by itself and may end early; more examples than these would be more weight.
        steps = min(reply.steps, a.steps) if a.sync.seconds is not None else a.steps
        if reply.loss is None or not 0 < reply.examples <= steps * a.job.batch:
            raise TaskFailed(
                f"{where}: no loss, or not as many examples as {steps} steps of {a.job.batch} can have; the task must "
                "not answer for its worker"
            )
        check_vector(output, a.signature, where, span(a))
        if noised(a.sync.wire):
            privatise(self._folder, a)
        faults.reached("site", "computed", "train")
        state = file_crc(Path(order.state_out)) if order.state_out else None
        residual = encode_with_feedback(self._folder, a) if recalls(a.sync.wire) else None
        control = file_crc(control_out) if control_out else None
        local = file_crc(local_out) if local_out else None
        pace = self._paced(a, reply.pace)
        kept = Kept(a.weights, reply.examples, reply.loss, seconds, state, base, residual, control, local, steps, pace)
        whose = {"run": origin.run, "made": origin.made, "ledger": origin.ledger, "unit": origin.unit}
        kept = replace(kept, private=self._place.steps(a, self._folder.private()), **whose)
        faults.reached("site", "encoded", "train")
        self._folder.keep(a.position, kept)
        faults.reached("site", "marked", "train")
        return kept

    def _paced(self, a: Assign, pace: Pace | None) -> dict[str, Any] | None:
        """Write down how the next round's batches are cut; return what is told of this one's pace."""
        assert isinstance(a.job, TrainJob)
        before = self._balances.of(a.position)
        after = rebalanced(before, a.layout, a.job.batch, pace)
        if a.job.compute.shares == "even":
            after = after.model_copy(update={"shares": ()})
        self._balances.keep(a.position + 1, after)
        if after.straggler not in ("", before.straggler):
            log.warning("run %s: %s", a.run, after.straggler)
        left = told(pace, after)
        return left.model_dump() if left is not None else None

    def _round(self, a: Assign) -> orders.Train:
        """Return the round's order without what there is of it only when its weights are here.

        A site's own weights go on when the hub has merged the round just before with this site's update, and the site
        has kept what it made of it; any other site begins again from the weights it is given.
        """
        assert isinstance(a.job, TrainJob)
        state_in = self._folder.last_state(a.position) if a.sync.keep_optimiser else None
        keeps = a.sync.keep_optimiser and a.sync.exchange == "delta"
        goes_on = a.counted == a.position - 1 and state_in == self._folder.state(a.position - 1)
        return orders.Train(
            seed=a.job.seed,
            weights=None,
            signature=a.signature,
            output=str(self._folder.update(a.position)),
            state_in=str(state_in) if state_in else None,
            state_out=str(self._folder.state(a.position)) if keeps else None,
            version=a.version,
            goes_on=goes_on and a.sync.streaming,
            done=a.done,
            steps=a.steps,
            place=a.place,
            places=a.places,
            batch=a.job.batch,
            shares=fitting(self._balances.of(a.position), a.layout, a.job.batch),
            optimiser=a.job.optimiser,
            private=steps_at(a.job, self._place.entry(a).dataset.rows),
            sync=a.sync,
        )

    def _go_ahead(self, a: Assign) -> None:
        """Have the workers begin the next round while this one's update travels and is merged, as far as it needs no
        weights. A guess: should the hub go on without the update, what was done is dropped."""
        assert isinstance(a.job, TrainJob)
        done = a.done + a.steps
        steps = min(a.sync.stride, a.job.steps - done)
        if min(a.sync.delay, steps - 1) < 1:
            return
        after = {"position": a.position + 1, "version": a.version + 1, "counted": a.position}
        following = self._round(a.model_copy(update={**after, "done": done, "steps": steps}))
        self._ranks.ahead(a, orders.Ahead(round=following))

    def evaluate(self, a: Assign) -> None:
        assert isinstance(a.job, TrainJob | EvaluateJob)
        weights = self._incoming.weights(a)
        faults.reached("site", "fetched", "evaluate")
        held = len(split(self._place.entry(a).dataset.rows, a.job.data.holdout, a.job.seed)[1])
        self._reports.progress(a, "evaluating")
        own = {"control": a.sync.control, **self._own(a)}
        reply = self._ranks.order(a, orders.Evaluate(weights=str(weights), signature=a.signature, **own))
        if not held and (reply.examples or reply.totals):
            raise TaskFailed("metrics over examples where no row is held out; raise data.holdout")
        # A task may make several examples of a row, so its counts can be more than there are rows; what it says of
        # how many rows a number stands for is believed only as far as there are that many.
        rows = min((_fewest(total) for total in reply.totals.values()), default=reply.examples)
        self._say(a, "metric", min(rows, held), totals=reply.totals, examples=reply.examples)

    def predict(self, a: Assign) -> None:
        """Answers stay here, as a dataset under the source's terms; only their number leaves."""
        assert isinstance(a.job, PredictJob)
        source = self._place.entry(a).dataset
        self._check_output(a.job.output, source)
        weights = self._incoming.weights(a)
        output = self._place.home / "data" / f"{a.job.output}-{a.run}.parquet"
        output.parent.mkdir(exist_ok=True)
        order = orders.Predict(weights=str(weights), signature=a.signature, output=str(output), **self._own(a))
        self._ranks.order(a, order)
        made = self._place.catalogue.add(a.job.output, output, like=source)
        self._say(a, "metric", made.rows, examples=made.rows)

    def _own(self, a: Assign) -> dict[str, Any]:
        """Return what orders say of this site's personal tensors: of the run so far, or of the registered model."""
        patterns = a.sync.keep_local or a.keep_local
        path = self._folder.last_local(a.position) if a.sync.keep_local else personal.find(self._place.home, a)
        return {"keep_local": patterns, "local_in": str(path) if path is not None else None}

    def _check_output(self, name: str, source: Dataset) -> None:
        """A job may write its answers anew, but never in place of a dataset that the owner added, or of its source."""
        listed = {one.name for one in self._place.catalogue.datasets()}
        ours = (self._place.home / "data").absolute()
        if name == source.name or (name in listed and Path(self._place.catalogue.entry(name).path).parent != ours):
            whose = "the job's own source" if name == source.name else f"a dataset of {self._place.site.name}'s owner"
            raise Invalid(f"output: {name!r} is {whose}; choose another name")

    def query(self, a: Assign) -> None:
        assert isinstance(a.job, QueryJob)
        query = parse(a.job.sql)
        if query.dataset != a.job.dataset:
            raise Invalid(f"query: the FROM names {query.dataset!r} where the job's dataset is {a.job.dataset!r}")
        entry = self._place.opened(a)
        table = read_table(entry.path, entry.format)
        groups, suppressed = answer(
            query, table, entry.dataset.min_group, lambda one: self._answered.admit(entry.dataset, one)
        )
        smallest = min((group.rows for group in groups), default=entry.dataset.min_group)
        self._say(a, "query", smallest, groups=groups, suppressed=suppressed)

    def _answer(self, a: Assign, **more: object) -> Answer:
        place = {"site": self._place.site.name, "position": a.position, "epoch": a.epoch, "version": a.version}
        return Answer.model_validate({**place, **more})

    def _say(self, a: Assign, kind: CrossingKind, rows: int, **more: object) -> None:
        """Let an answer without tensors out; ``rows`` is how many the smallest number in it stands for."""
        done = Done(run=a.run, answer=self._answer(a, **more))
        size = len(done.model_dump_json())
        faults.reached("site", "computed", a.work)
        self._place.gate.say(done, self._place.crossing(a, kind, out=True, size=size, rows=rows))
        faults.reached("site", "sent", a.work)

    def _send(self, a: Assign, parcel: Parcel, frames: Source, request: Request) -> None:
        """Let tensors out. Returning means that the hub has them."""

        def sent(offset: int) -> Iterable[FrameLike]:
            return faults.along("site", "sending", a.work, frames(offset))

        self._place.gate.send(parcel, sent, request)
        faults.reached("site", "sent", a.work)


_DO: dict[str, Callable[[Stages, Assign], None]] = {
    "probe": Stages.probe,
    "measure": Stages.measure,
    "initialise": Stages.initialise,
    "train": Stages.train,
    "evaluate": Stages.evaluate,
    "predict": Stages.predict,
    "query": Stages.query,
}


def _fewest(total: Totals) -> int:
    """Return how many rows the smallest group in a metric stands for: a histogram tells each class apart."""
    classes = [sum(total.positives), sum(total.negatives)] if total.positives or total.negatives else [total.count]
    return min(classes)
