"""Two answers, subtracted, tell of no person: by words, by groups, by what a group by leaves over, by a holdout."""

import sqlite3
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.answered import Answered, Selection
from atoll.data.query import answer, parse
from atoll.errors import Corrupt, Denied, Unavailable
from atoll.spec.fleet import Dataset

LEAST, FINGERPRINT = 5, "sha256:" + 64 * "0"
AGES = [20 + row % 7 * 10 for row in range(60)]
PEOPLE = pa.table(
    {"id": range(60), "age": AGES, "sex": ["m"] * 29 + ["f"] * 30 + ["x"], "ill": [row == 17 for row in range(60)]}
)


def listed(least=LEAST, fingerprint=FINGERPRINT):
    return Dataset(name="people", rows=60, fingerprint=fingerprint, min_group=least)


@pytest.fixture
def ask(tmp_path):
    """Return what asks a site a query that it answered nothing before."""
    kept = Answered(tmp_path, "lyon")

    def asked(where="true", what="count(*) AS n", table=PEOPLE, least=LEAST):
        query = parse(f"SELECT {what} FROM people WHERE {where}" + (" GROUP BY ALL" if "," in what else ""))
        groups, _ = answer(query, table, least, lambda one: kept.admit(listed(least), one))
        return sorted((group.key, group.rows) for group in groups)

    return asked


@pytest.mark.parametrize("where", ["id <> 17", "id < 59", "age > 20 OR id <> 17", "NOT (id IN (1, 2, 3, 4))"])
def test_all_but_a_few_are_not_told_of_beside_all(ask, where):
    assert ask() == [((), 60)]
    with pytest.raises(Denied, match="fewer than 5 are others than these, or none, so the two answers could be subtra"):
        ask(where)
    assert ask() == [((), 60)]


def test_what_a_few_rows_more_would_tell_is_not_told_either(ask):
    assert ask("age < 50") == [((), 27)]
    with pytest.raises(Denied):
        ask("age < 50 OR id = 17 OR id = 18 OR id = 59")
    assert ask("age <= 50") == [((), 36)]


@pytest.mark.parametrize("ill", [True, False])
def test_a_refusal_does_not_tell_whether_there_is_such_a_person(ask, ill):
    person = 17 if ill else 16
    assert ask() == [((), 60)]
    with pytest.raises(Denied, match="or none"):
        ask(f"NOT (id = {person} AND ill)")


def test_the_same_rows_asked_for_in_the_same_words_are_told_of_again_with_other_aggregates_too(ask):
    assert ask("age > 30 AND sex = 'm'") == ask("sex = 'm' AND (age > 30)", "avg(age) AS a")
    assert ask("age > 30", "sex, count(*) AS n")[-1] == (("m",), 20)
    assert ask("sex = 'm' AND age > 30") == [((), 20)]


def test_what_the_groups_leave_over_of_all_is_not_told(ask):
    assert ask(what="sex, count(*) AS n") == [(("f",), 30), (("m",), 29)]
    with pytest.raises(Denied):
        ask()  # less the two groups it is the one person of the third


def test_groups_that_leave_nothing_over_go_with_their_total_either_way(ask):
    assert ask("id < 59", "sex, count(*) AS n") == [(("f",), 30), (("m",), 29)]
    assert ask("id < 59") == [((), 59)]
    assert ask("id < 59", "age, count(*) AS n")[0] == ((20,), 9)


def test_groups_drawn_a_person_apart_are_not_told(ask):
    assert len(ask(what="id // 20 AS k, count(*) AS n")) == 3
    with pytest.raises(Denied):
        ask(what="(id + 1) // 20 AS k, count(*) AS n")


def test_how_many_groups_are_held_back_rests_on_as_many_rows_as_any_number(ask):
    assert ask("id < 12", "id, count(*) AS n") == []
    with pytest.raises(Denied):
        ask("id < 12 AND NOT ill OR id = 17 AND ill", "id, count(*) AS n")


def test_where_single_rows_may_be_told_of_nothing_is_kept(ask, tmp_path):
    assert ask(least=1) == [((), 60)]
    assert ask("id <> 17", least=1) == [((), 59)]
    assert not (tmp_path / "answered.db").exists()


def test_other_content_is_another_dataset_and_the_file_is_private_and_outlives_the_process(ask, tmp_path):
    ask()
    one = Selection(np.r_[np.zeros(1, np.uint32), np.ones(59, np.uint32)], 1, ("other", "other"))
    Answered(tmp_path, "lyon").admit(listed(fingerprint="sha256:" + 64 * "1"), one)
    with pytest.raises(Denied, match="lyon refuses"):
        Answered(tmp_path, "lyon").admit(listed(), one)
    assert (tmp_path / "answered.db").stat().st_mode & 0o077 == 0


def test_of_two_that_ask_at_once_one_is_refused(tmp_path):
    told, sets = [], [np.ones(60, np.uint32) for _ in range(2)]
    sets[1][17] = 0

    def asks(labels):
        try:
            Answered(tmp_path, "lyon").admit(listed(), Selection(labels, 1, (str(labels.sum()),) * 2))
            told.append("answered")
        except Denied:
            told.append("denied")

    threads = [threading.Thread(target=asks, args=(labels,)) for labels in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(told) == ["answered", "denied"]


def test_after_the_most_answers_only_those_are_given_again(tmp_path):
    kept = Answered(tmp_path, "lyon", most=2)
    sets = [Selection((np.arange(60) % 4 == one).astype(np.uint32), 1, (str(one),) * 2) for one in range(3)]
    for one in (*sets[:2], *sets[:2]):
        kept.admit(listed(), one)
    with pytest.raises(Denied, match="it answered 2 different questions about 'people', which is the most"):
        kept.admit(listed(), sets[2])


@pytest.mark.parametrize("column", ["labels", "words"])
def test_what_is_not_what_was_written_is_no_reason_to_answer(ask, tmp_path, column):
    ask()
    with sqlite3.connect(tmp_path / "answered.db") as file:
        file.execute(f"UPDATE answered SET {column} = x'00'")
    file.close()
    with pytest.raises(Corrupt, match="not what was written there"):
        ask("age < 50")
    (tmp_path / "answered.db").write_bytes(b"x" * 5000)
    with pytest.raises(Unavailable, match="so no query is answered"):
        ask("age < 50")


LABELS = st.lists(st.integers(0, 3), min_size=12, max_size=12).map(lambda found: np.array(found, np.uint32))


@given(LABELS, LABELS, st.integers(0, 3), st.integers(0, 3), st.integers(1, 8))
def test_sets_are_near_exactly_where_few_rows_are_in_one_of_them_alone(first, second, told, other_told, least):
    one, two = (
        Selection(labels, count, tuple(f"{name}{i}" for i in range(4)))
        for labels, count, name in ((first, told, "a"), (second, other_told, "b"))
    )

    def sets(labels, count):
        return [set(np.flatnonzero(labels == i)) for i in (1, 2, 3)] + [
            set(np.flatnonzero((labels > 0) & (labels <= count)))
        ]

    near = any(
        mine & theirs and len(mine ^ theirs) < least
        for mine in sets(first, told)
        for theirs in sets(second, other_told)
    )
    assert one.nearest(two, least) == near == two.nearest(one, least)
