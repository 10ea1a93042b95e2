"""What several unit tests begin with."""

import pytest


@pytest.fixture
def house(tmp_path):
    """A hub's desk with three sites there, of which runs are given to `ada` and `bob`."""
    from tests.unit.houses import House  # here: most unit tests need none of what it imports

    made = House(tmp_path)
    made.connect("ada", "bob", "mallory")
    yield made
    made.close()
