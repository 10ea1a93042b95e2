"""A site as its errands see it: folder, door, warm workers and datasets, and what its policy is asked about a run."""

from dataclasses import dataclass
from pathlib import Path

from atoll.boundary.gate import SiteGate
from atoll.data.catalogue import Entry
from atoll.data.live import LiveCatalogue
from atoll.errors import Denied
from atoll.runtime.groups import Groups
from atoll.spec.fleet import Site
from atoll.spec.job import QueryJob
from atoll.spec.message import Assign
from atoll.spec.policy import Crossing, CrossingKind, Request
from atoll.spec.pretrained import Pretrained


@dataclass(frozen=True, slots=True)
class Place:
    """What all errands of one site share."""

    site: Site
    home: Path
    gate: SiteGate
    groups: Groups
    catalogue: LiveCatalogue

    def entry(self, a: Assign) -> Entry:
        """Return the assignment's dataset, read anew each time: its owner may take a purpose back in mid-run.

        Raises `NotFound` when it is gone, `Denied` when it is not the one that the run was planned for.
        """
        return self._planned(a, self.catalogue.entry(_name(a)))

    def opened(self, a: Assign) -> Entry:
        """Return the dataset with its file verified, once the owner's rules let it be opened. Raises also `Denied`."""
        name = _name(a)
        self.gate.ask(self._request(a, "open"), f"{self.site.name}/{name}", run=a.run)
        return self._planned(a, self.catalogue.verify(name))

    def check_ranks(self, a: Assign) -> None:
        """Raise `Denied` for a layout of more ranks than this site starts, before any is."""
        most = self.site.most_ranks
        if a.layout.ranks > most:
            raise Denied(
                f"{self.site.name} refuses: layout: {a.layout.ranks} ranks, and its machines take {most} at most; "
                "set smaller degrees"
            )

    def pretrained(self, a: Assign) -> Pretrained | None:
        """Return the pretrained files that the assignment's task names. Raises `Denied` where none such are listed.

        They are verified by whoever reads them, in the very bytes that it reads.
        """
        wanted = a.task.pretrained if a.task is not None else None
        if wanted is None:
            return None
        found = self.catalogue.find_pretrained(wanted)
        if found is None:
            raise Denied(
                f"{self.site.name} refuses: task.pretrained: it has none that is {wanted}; "
                "its owner adds the folder there by: atoll pretrained add NAME FOLDER"
            )
        return found

    def crossing(self, a: Assign, kind: CrossingKind, out: bool, size: int, **more: object) -> Request:
        """Return the question whether ``size`` bytes of this kind may leave (or enter) for this run."""
        crossing = Crossing.model_validate(
            {
                "kind": kind,
                "direction": "out" if out else "in",
                "site": self.site.name,
                "run": a.run,
                "round": a.version if a.work == "train" else None,
                "dataset": _name(a),
                "purpose": a.job.purpose,
                "bytes": size,
                **more,
            }
        )
        return self._request(a, "cross", crossing)

    def _planned(self, a: Assign, entry: Entry) -> Entry:
        now = entry.dataset.fingerprint
        if a.fingerprint is not None and a.fingerprint != now:
            # A refusal, not a fault: a run that may go on without this site does.
            raise Denied(
                f"{self.site.name} refuses: dataset {entry.dataset.name!r} is {now[:19]}... now, and the run was "
                f"planned for {a.fingerprint[:19]}...; submit the job again"
            )
        return entry

    def _request(self, a: Assign, action: str, crossing: Crossing | None = None) -> Request:
        return Request.model_validate(
            {
                "action": action,
                "user": a.user,
                "site": self.site.name,
                "owner": self.site.owner,
                "region": self.site.region,
                "dataset": self.entry(a).dataset,
                "job": a.job.name,
                "job_kind": a.job.kind,
                "purpose": a.job.purpose,
                "code": a.code or "",
                "crossing": crossing,
            }
        )


def _name(a: Assign) -> str:
    return a.job.dataset if isinstance(a.job, QueryJob) else a.job.data.dataset
