"""What holds for every test: the same examples of properties in each run, and no time spent on collecting modules."""

import atexit
import gc
import os

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("new", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

gc.disable()  # imports make a million objects that stay: to walk over them again and again costs three seconds
atexit.register(gc.unfreeze)  # duckdb's binding counts what is left of it at the end


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def house(tmp_path):
    """A hub's desk with three sites there, of which runs are given to `ada` and `bob`."""
    from tests.unit.houses import House  # here: most unit tests need none of what it imports

    made = House(tmp_path)
    made.connect("ada", "bob", "mallory")
    yield made
    made.close()


@pytest.fixture
def lyon(tmp_path):
    """A site with 50 rows, of which the workers and the hub do as the test says."""
    from tests.unit.places import House

    made = House(tmp_path)
    yield made
    made.journal.close()


@pytest.fixture
def errand(lyon):
    """The site's side of the run `run`; what it kept outlives it."""
    from atoll.runtime.errand import Errand

    made = Errand(lyon.place, "run")
    yield made
    made.end(keep=True)
    assert made.wait(20)
