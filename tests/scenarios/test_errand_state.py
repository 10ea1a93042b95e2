"""The inner optimiser's state at a site: a round goes on from the one before it, or the run ends in words."""

from pathlib import Path

from atoll.runtime.errand import Errand
from atoll.spec.sync import Sync
from tests.unit.places import STEPS, WAIT, assign


def diloco(position, **fields):
    sync = Sync.model_validate({"period": STEPS, "keep_optimiser": True})
    return assign(position=position, sync=sync, **fields)


def test_a_round_goes_on_from_the_state_after_the_one_before(lyon, errand):
    for count, position in enumerate((2, 3), 1):
        errand.assign(diloco(position))
        lyon.hub.wait_taken(count)
    first, second = lyon.workers.did("train")
    assert first.state_in is None
    assert Path(second.state_in).name == Path(first.state_out).name


def test_a_state_that_is_not_what_was_kept_ends_the_run_in_words_and_no_round_begins_without_it(lyon, errand):
    errand.assign(diloco(2))
    lyon.hub.wait_taken()
    errand.end(keep=True)
    assert errand.wait(WAIT)
    (state,) = (lyon.runs / "run").glob("state-*")
    state.write_bytes(b"another")
    again = Errand(lyon.place, "run")  # what an agent wrote itself it does not read again
    again.assign(diloco(3))
    failure = lyon.hub.wait("failure")
    assert (failure.error, failure.position) == ("Corrupt", 3)
    assert "state after stage 2 is not what was kept" in failure.words
    assert len(lyon.workers.did("train")) == 1
    again.end(keep=True)
    assert again.wait(WAIT)
