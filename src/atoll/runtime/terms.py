"""What a site's policy is asked about an assignment: the request for each crossing, out of the run's own facts."""

from pathlib import Path

from atoll.data.catalogue import Catalogue
from atoll.spec.fleet import Dataset, Site
from atoll.spec.job import QueryJob
from atoll.spec.message import Assign
from atoll.spec.policy import Crossing, CrossingKind, Request


class Terms:
    """Requests for one site. The dataset is read anew each time: its owner may take a purpose back in mid-run."""

    def __init__(self, site: Site, home: Path) -> None:
        self._site, self._catalogue = site, Catalogue(home)

    def dataset(self, a: Assign) -> Dataset:
        name = a.job.dataset if isinstance(a.job, QueryJob) else a.job.data.dataset
        return self._catalogue.entry(name).dataset

    def request(self, a: Assign, action: str = "cross", crossing: Crossing | None = None) -> Request:
        return Request.model_validate(
            {
                "action": action,
                "user": a.user,
                "site": self._site.name,
                "owner": self._site.owner,
                "region": self._site.region,
                "dataset": self.dataset(a),
                "job": a.job.name,
                "job_kind": a.job.kind,
                "purpose": a.job.purpose,
                "code": a.code or "",
                "crossing": crossing,
            }
        )

    def crossing(self, a: Assign, kind: CrossingKind, out: bool, size: int, **more: object) -> Request:
        crossing = Crossing.model_validate(
            {
                "kind": kind,
                "direction": "out" if out else "in",
                "site": self._site.name,
                "run": a.run,
                "round": a.version if a.work == "train" else None,
                "dataset": self.dataset(a).name,
                "purpose": a.job.purpose,
                "bytes": size,
                **more,
            }
        )
        return self.request(a, "cross", crossing)
