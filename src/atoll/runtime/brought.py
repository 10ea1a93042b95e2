"""What a site may bring, by the hub's own state of the run and never by what the site says of it."""

from atoll.errors import Invalid
from atoll.runtime.machine import State
from atoll.spec.event import Answer
from atoll.spec.message import Parcel
from atoll.spec.policy import Decision

_MODEL_LIMIT = 1 << 33  # elements of a model: 32 GiB in float32


def expected(state: State, answer: Answer, parcel: Parcel) -> tuple[tuple[str, ...], int]:
    """Return the wire and the size that an update must have, by the hub's own state and not by what it says."""
    if state.work == "initialise":
        size = sum(spec.size for spec in answer.signature)
        if not 0 < size <= _MODEL_LIMIT or size != parcel.size:
            raise Invalid(f"{answer.site}: first weights of {parcel.size} elements where the signature has {size}")
        return (), size
    if state.work != "train" or state.plan is None:
        raise Invalid(f"{answer.site}: stage '{state.work}' takes no update")
    wire = tuple(transform.kind for transform in state.plan.sync.wire)
    size = sum(spec.size for spec in state.signature)
    if (parcel.wire, parcel.size) != (wire, size):
        raise Invalid(
            f"{answer.site}: an update of {parcel.size} elements as {list(parcel.wire)} "
            f"where the plan has {size} as {list(wire)}"
        )
    return wire, size


def own(site: str, decision: Decision) -> Decision:
    """Return a site's decision; one in another's name is none."""
    if decision.party == site:
        return decision
    return Decision(allowed=False, party=site, reasons=(f"{site} refuses: it answered in another's name",))


def late(state: State, answer: Answer) -> str:
    return (
        f"{answer.site}: an answer to stage {answer.position} of epoch {answer.epoch} came too late or twice; "
        f"run {state.run} is at stage {state.position} of epoch {state.epoch}"
    )


def smallest(answer: Answer) -> int:
    rows = [group.rows for group in answer.groups] + [sums.count for sums in answer.sums.values() if sums.count]
    return min(rows, default=answer.examples)
