"""Two answers, subtracted, tell of no person: by words, by groups, by what a group by leaves over, by a holdout."""

import itertools
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


@pytest.mark.parametrize("where", ["id < 59", "true", "sex = 'm'"])
@pytest.mark.parametrize(("first", "second"), [("count(*) AS n", "sex, count(*) AS n"), ("sex, sum(age)", "avg(age)")])
def test_groups_and_their_total_are_not_both_told_whether_or_not_one_is_held_back(ask, where, first, second):
    alike = where == "sex = 'm'"  # the one group is in the total's words, then
    ask(where, first)
    for _ in range(2):
        if alike:
            assert ask(where, second)
            continue
        with pytest.raises(Denied, match="or none"):
            ask(where, second)


@pytest.mark.parametrize("age", [20, 50, 99])
def test_a_refusal_of_groups_does_not_tell_whether_one_person_is_apart(ask, age):
    assert ask() == [((), 60)]
    with pytest.raises(Denied, match="or none"):
        ask(what=f"id // 30 + 100 * CAST(id = 17 AND {age} = 50 AS INTEGER) AS k, count(*) AS n")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("true", "id // 20 AS k, count(*) AS n"), ("id < 40 AND id <> 17", "count(*) AS n")),
        (("true", "id // 20 AS k, count(*) AS n"), ("id <> 17 AND NOT id BETWEEN 20 AND 39", "sum(age) AS n")),
        (("id <> 17", "id // 12 AS k, count(*) AS n"), ("id < 24 OR id >= 48", "id // 30 AS k, count(*) AS n")),
        (("id <> 17", "id % 4 AS k, count(*) AS n"), ("id < 48", "id % 2 AS k, id % 3 AS l, count(*) AS n")),
    ],
)
def test_what_some_groups_of_one_answer_have_beyond_some_of_another_is_not_told(ask, first, second, reverse):
    one, two = (second, first) if reverse else (first, second)
    assert ask(*one)
    if second[0] == "id < 48":  # twelve rows are in one of them alone, and no fewer by any of their groups
        assert ask(*two)
        return
    with pytest.raises(Denied):
        ask(*two)


def test_finer_groups_that_leave_one_person_over_in_each_coarser_are_not_told_beside_them(ask):
    table = pa.table({"ward": [row % 4 for row in range(60)], "sex": ["x" if row < 4 else "m" for row in range(60)]})
    assert len(ask(what="ward, count(*) AS n", table=table)) == 4
    with pytest.raises(Denied):
        ask(what="ward, sex, count(*) AS n", table=table)
    assert len(ask(what="ward, count(*) AS m, min(ward) AS least", table=table)) == 4


def test_answers_that_many_rows_tell_apart_are_given(ask):
    assert len(ask(what="id % 4 AS k, count(*) AS n")) == 4
    assert ask("true AND (id % 4) = 2", "sum(age) AS a") == [((), 15)]
    assert ask("id < 30", "sum(age) AS a") == [((), 30)]
    assert len(ask(what="id % 4 AS k, sum(age) AS a")) == 4


def test_groups_drawn_a_person_apart_are_not_told(ask):
    assert len(ask(what="id // 20 AS k, count(*) AS n")) == 3
    with pytest.raises(Denied):
        ask(what="(id + 1) // 20 AS k, count(*) AS n")


def test_groups_that_are_held_back_shut_nothing_out(ask):
    assert ask(what="id, count(*) AS n") == []
    assert ask() == [((), 60)]


def test_where_single_rows_may_be_told_of_nothing_is_kept(ask, tmp_path):
    assert ask(least=1) == [((), 60)]
    assert ask("id <> 17", least=1) == [((), 59)]
    assert not (tmp_path / "answered.db").exists()


def test_other_content_is_another_dataset_and_the_file_is_private_and_outlives_the_process(ask, tmp_path):
    ask()
    one = Selection(np.r_[np.zeros(1, np.uint32), np.ones(59, np.uint32)], ("other",))
    Answered(tmp_path, "lyon").admit(listed(fingerprint="sha256:" + 64 * "1"), one)
    with pytest.raises(Denied, match="lyon refuses"):
        Answered(tmp_path, "lyon").admit(listed(), one)
    assert (tmp_path / "answered.db").stat().st_mode & 0o077 == 0


def test_of_two_that_ask_at_once_one_is_refused(tmp_path):
    told, sets = [], [np.ones(60, np.uint32) for _ in range(2)]
    sets[1][17] = 0

    def asks(labels):
        try:
            Answered(tmp_path, "lyon").admit(listed(), Selection(labels, (str(labels.sum()),)))
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
    sets = [Selection((np.arange(60) % 4 == one).astype(np.uint32), (str(one),)) for one in range(3)]
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


def unions(labels):
    """Return the sets, by number, and all that can be made of them: the numbers taken, and their rows."""
    chosen = [taken for size in range(4) for taken in itertools.combinations((1, 2, 3), size)]
    return [(set(taken), set(np.flatnonzero(np.isin(labels, taken)))) for taken in chosen]


@given(LABELS, LABELS, st.integers(1, 8))
def test_answers_are_near_exactly_where_few_rows_tell_some_sets_of_one_from_some_of_the_other(first, second, least):
    one, two = Selection(first, ("a", "b", "c")), Selection(second, ("a", "x", "y"))

    def alone(labels, others):
        """Sets that share no row with the other answer: to add them brings no union nearer."""
        return {number for number in (1, 2, 3) if not (others[labels == number] > 0).any()}

    again = {1} if set(np.flatnonzero(first == 1)) == set(np.flatnonzero(second == 1)) else set()
    mine_idle, theirs_idle = alone(first, second) | again, alone(second, first) | again
    near = any(
        len(mine ^ theirs) < least
        for taken, mine in unions(first)
        for others, theirs in unions(second)
        if (taken or others) and not taken & mine_idle and not others & theirs_idle
    )
    assert one.near(two, least) == near == two.near(one, least)
