"""What holds for every test: the same examples of properties in each run, and no time spent on collecting modules."""

import gc
import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

gc.disable()  # imports make a million objects that stay: to walk over them again and again costs two seconds


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # duckdb's binding counts what is left of it at the end
