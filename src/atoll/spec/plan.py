"""What was decided: an inner layout per site, one outer sync, its price, and why."""

from pydantic import Field, PositiveInt

from atoll.spec.budget import Guarantee
from atoll.spec.document import Document, Name
from atoll.spec.sync import Sync


class Layout(Document):
    """How one site computes: the degrees of its device mesh. Their product is the number of ranks.

    data: whole models, each with its share of a batch. shard: shares of a batch, too, but each rank keeps a part of
    every tensor only. tensor: matrices cut within a layer. pipeline: layers in stages. context: positions of a
    sequence. expert: a mixture's experts, which tokens travel to; here, too, each rank has its share of a batch.
    """

    data: PositiveInt = 1
    shard: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1

    @property
    def ranks(self) -> int:
        return self.shares * self.tensor * self.pipeline * self.context

    @property
    def shares(self) -> int:
        """Into how many shares a batch is cut: the ranks of a share see the same examples."""
        return self.data * self.shard * self.expert

    @property
    def plain(self) -> bool:
        """Whether each rank holds the whole model, which is all that data parallelism asks of one."""
        return self.ranks == self.data

    @property
    def fewer(self) -> "Layout | None":
        """The next smaller layout, for a site that has not as many ranks any more; None of one rank.

        It cuts nothing that this one leaves whole, and what it cuts divides what it is cut from, as this one does.
        """
        for axis in ("data", "shard"):  # any number of these will do
            if (degree := getattr(self, axis)) > 1:
                return self.model_copy(update={axis: degree - 1})
        for axis in ("expert", "context", "tensor", "pipeline"):
            if (degree := getattr(self, axis)) > 1:
                prime = next(number for number in range(2, degree + 1) if degree % number == 0)
                return self.model_copy(update={axis: degree // prime})
        return None


class Price(Document):
    """What a candidate is predicted to cost, by the stated model in `atoll.planner.price`."""

    seconds: float
    compute_seconds: float
    transfer_seconds: float
    bytes: int  # over all links and rounds, both ways
    memory_bytes: int  # of the largest rank


class Reason(Document):
    """Why a candidate was chosen or rejected: by whom or what, and in words."""

    by: str  # "policy of zurich (rule hospital.no-rows)", "price", "the job", "capability"
    words: str


class Candidate(Document):
    """One point that was considered."""

    name: str  # "gather the data", "exchange every step", "fedavg, period 20"
    sync: Sync | None = None  # None: rows would move to one place
    layouts: dict[Name, Layout] = {}
    price: Price | None = None
    rejected: tuple[Reason, ...] = ()


class Plan(Document):
    """How a run will be carried out. `sites` train in this order; `evaluators` hold examples to evaluate on."""

    sites: tuple[Name, ...]
    evaluators: tuple[Name, ...] = ()
    initialiser: Name | None = None  # the site that builds the first weights; the first of `sites` when left out
    layouts: dict[Name, Layout]
    sync: Sync
    rounds: int = Field(ge=0)
    price: Price | None = None
    reasons: tuple[Reason, ...] = ()
    considered: tuple[Candidate, ...] = ()
    promises: dict[Name, Guarantee] = {}  # of each site that trains, what it says the run costs its data's privacy
