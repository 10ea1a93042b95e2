"""Jobs about a model: the version is fixed once, and a job that is sent again is known by its model's name."""

import pytest

from atoll.errors import Invalid, NotFound
from atoll.journal import Entry
from atoll.registry.models import Models
from atoll.runtime.pinned import check, pinned, same
from atoll.spec.event import EVENT, Published
from atoll.spec.job import parse_job
from tests.unit.runs import model, query_job, train_job


def about(reference, kind="evaluate", **more):
    fields = {"kind": kind, "name": "check", "purpose": "care", "model": reference, "data": {"dataset": "rows"}}
    return parse_job({**fields, **more}, "job")


def models(versions, **aliases):
    events = [
        Published(run=f"r-{at}", model=model().model_copy(update={"version": at})) for at in range(1, versions + 1)
    ]
    told = {"kind": "model.aliased", "model": "job", "user": "ada"}
    events += [EVENT.validate_python({**told, "alias": name, "version": aliases[name]}) for name in aliases]
    return Models.fold(Entry(seq=at, time=0.0, actor="hub", event=event) for at, event in enumerate(events, 1))


@pytest.mark.parametrize("kind", ["evaluate", "predict"])
def test_a_name_and_an_alias_become_the_version_that_they_mean(kind):
    known = models(2, champion=1)
    for reference, version in (("job", 2), ("job@champion", 1), ("job@1", 1)):
        job = pinned(about(reference, kind), known)
        assert job == about(f"job@{version}", kind)
        check(job, known)
    with pytest.raises(NotFound, match="no version or alias '3'"):
        pinned(about("job@3", kind), known)


def test_jobs_about_no_model_stay_as_they_are():
    for job in (train_job(), query_job()):
        assert pinned(job, models(0)) is job
        check(job, models(0))


@pytest.mark.parametrize("reference", ["job", "job@champion"])
def test_a_job_that_was_not_pinned_is_told_from_one_that_was(reference):
    with pytest.raises(Invalid, match=f"'{reference}' names no version, as 'job@1' does; reject this"):
        check(about(reference), models(1, champion=1))


def test_what_is_sent_again_is_the_same_job_whatever_its_name_means_by_now():
    begun = about("job@1")
    assert all(same(about(reference), begun) for reference in ("job", "job@champion", "job@1"))
    others = (about("job@2"), about("job2"), about("job@1", seed=3), about("job", "predict"), query_job())
    assert not any(same(other, begun) for other in others)
    assert same(query_job(), query_job())
    assert not same(begun, query_job())
