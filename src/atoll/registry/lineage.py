"""Where a model came from, as one document: model <- run <- plan <- job, with code, data, decisions and parents."""

from __future__ import annotations

from pydantic import NonNegativeInt

from atoll.spec.document import Digest, Document, Name
from atoll.spec.event import Decided
from atoll.spec.job import Job
from atoll.spec.model import Model, Source
from atoll.spec.plan import Plan


class RunOrigin(Document):
    """The run that made a model, as the journal tells it; `job` and `plan` are None where the journal lacks them."""

    run: Name
    user: str = ""
    submitted: float | None = None  # seconds since the epoch
    plan_digest: Digest
    plan: Plan | None = None
    job_digest: Digest
    job: Job | None = None
    decided: tuple[Decided, ...] = ()  # what a policy said about the run as a whole, in journal order


class LineageTree(Document):
    """A model version with everything that it rests on. `doubts`: where the journal does not bear it out."""

    model: Model
    aliases: tuple[Name, ...] = ()
    entry: NonNegativeInt  # the journal's entry that published it
    published: float  # seconds since the epoch
    origin: RunOrigin
    code: Digest
    sources: tuple[Source, ...] = ()
    decisions: tuple[str, ...] = ()
    parents: tuple[LineageTree, ...] = ()
    doubts: tuple[str, ...] = ()

    def branch(self) -> Branch:
        """Return the same as nested lines of text, for a terminal."""
        run = self.origin
        plan = run.plan
        sync = (
            f"{plan.sync.preset or plan.sync.exchange}, period {plan.sync.period}, {plan.rounds} rounds" if plan else ""
        )
        job = f"{run.job.kind} {run.job.name}, purpose {run.job.purpose}" if run.job else ""
        below = [
            Branch(
                text=_line("run", run.run, f"by {run.user}" if run.user else ""),
                below=(
                    Branch(
                        text=_line("plan", run.plan_digest, sync),
                        below=(Branch(text=_line("job", run.job_digest, job)),),
                    ),
                    *(Branch(text=_line("decision", d.action, f"{d.subject}: {d.decision}")) for d in run.decided),
                ),
            ),
            Branch(text=_line("code", self.code, f"{self.model.file}: {self.model.task}")),
            Branch(
                text=f"data: {sum(source.rows for source in self.sources):,} rows at {len(self.sources)} sites",
                below=tuple(
                    Branch(text=f"{one.site}/{one.dataset}: {one.rows:,} rows, {one.fingerprint}")
                    for one in self.sources
                ),
            ),
            *(Branch(text=f"allowed: {words}") for words in self.decisions),
            *(Branch(text="parent", below=(parent.branch(),)) for parent in self.parents),
            *(Branch(text=f"doubt: {words}") for words in self.doubts),
        ]
        names = ", ".join(self.aliases)
        return Branch(text=_line("model", self.model.reference, names), below=tuple(below))


class Branch(Document):
    """A line of text and the lines under it."""

    text: str
    below: tuple[Branch, ...] = ()


def _line(noun: str, name: str, more: str) -> str:
    return f"{noun} {name} ({more})" if more else f"{noun} {name}"
