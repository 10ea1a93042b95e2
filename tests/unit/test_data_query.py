"""The law: answers of the sites, merged, are the answer over their pooled rows; and nothing small gets out."""

from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from atoll.data import engine
from atoll.data.engine import connect
from atoll.data.query import answer, merge, parse
from atoll.errors import Invalid, NotFound
from atoll.spec.event import Answer, Group

SCHEMA = pa.schema([("sex", pa.string()), ("age", pa.int64()), ("chol", pa.float64()), ("well", pa.bool_())])
EVERY = (
    "count(*) AS n, count(chol), sum(age), sum(chol) AS s, avg(CAST(chol AS INT)) AS m, min(chol), max(age), "
    "sum(well), var_pop(chol), var_samp(age), variance(chol), stddev(chol), stddev_pop(chol) AS p, "
    "stddev_samp(age), mean(age)"
)
LAWS = [
    f"SELECT {EVERY} FROM heart",
    f"SELECT sex, {EVERY} FROM heart GROUP BY sex ORDER BY sex",
    f"SELECT sex, well AS w, {EVERY} FROM heart WHERE age > 20 AND NOT (sex = 'f' OR chol IS NULL) GROUP BY sex, w",
    f"SELECT {EVERY}, age // 10 AS decade FROM heart WHERE age BETWEEN 3 AND 70 GROUP BY decade ORDER BY 16 DESC",
    f"SELECT upper(sex) AS u, {EVERY} FROM heart WHERE coalesce(age, 0) IN (0, 1, 2) OR abs(chol) < 9.5 GROUP BY ALL",
    f"SELECT CAST(well AS INT) AS w, {EVERY} FROM heart h WHERE h.sex IS NOT NULL GROUP BY 1 ORDER BY w NULLS FIRST",
    "SELECT age, count(*) AS n FROM heart GROUP BY age ORDER BY n DESC, age DESC NULLS FIRST LIMIT 3",
]


def made(rows, seed):
    draw = np.random.default_rng(seed)
    columns = {
        "sex": draw.choice(["m", "f"], rows),
        "age": draw.integers(-3, 90, rows),
        "chol": draw.normal(200, 50, rows).round(int(draw.integers(0, 9))),
        "well": draw.random(rows) < 0.5,
    }
    missing = {name: draw.random(rows) < draw.choice([0.0, 0.2, 1.0]) for name in columns}
    return pa.table({n: pa.array(v, SCHEMA.field(n).type, mask=missing[n]) for n, v in columns.items()}, SCHEMA)


SITES = [made(rows, seed) for seed, rows in enumerate((0, 1, 14, 300))]


def known(selection):
    """Let any answer out: what was told before is for `test_data_answered.py`."""


def asked(sql, sites, min_group=0):
    query = parse(sql)
    return merge(query, [answer(query, site, min_group, known) for site in sites])


@pytest.fixture(scope="module")
def pooled():
    """Ask an engine that is not ours, over all rows."""
    with duckdb.connect(":memory:") as connection:

        def ask(sql, tables):
            connection.register("heart", pa.concat_tables(tables))
            return connection.execute(sql).fetchall()

        yield ask


def by_key(row, keys):
    return [(row[i] is None, row[i] or 0 if not isinstance(row[i], str) else row[i]) for i in keys]


@pytest.mark.parametrize("sql", LAWS)
def test_merged_answers_of_sites_are_the_answer_over_their_pooled_rows(sql, pooled):
    query = parse(sql)
    answers = [answer(query, site, 0, known) for site in SITES]
    keys = [i for i, output in enumerate(query.outputs) if not output.function]
    for sites in (4, 2):  # of two there is one patient
        ours, theirs = merge(query, answers[:sites]).rows, pooled(sql, SITES[:sites])
        if "ORDER BY" not in sql:
            theirs.sort(key=lambda row: by_key(row, keys))
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            for value, expected in zip(our, their, strict=True):
                if isinstance(expected, float):
                    assert value == pytest.approx(expected, rel=1e-12, abs=1e-9)
                else:
                    assert value == expected


def test_variance_far_from_zero_keeps_its_digits():
    draw = np.random.default_rng(1)
    tables = [pa.table({"x": 1e9 + draw.normal(size=n)}) for n in (5, 2000, 300)]
    ((variance, mean),) = asked("SELECT var_samp(x), avg(x) FROM heart", tables).rows
    values = np.concatenate([one["x"].to_numpy() for one in tables])
    assert variance == pytest.approx(values.var(ddof=1), rel=1e-7)
    assert mean == pytest.approx(values.mean(), rel=1e-15)


def test_integer_sums_are_exact_beyond_float64():
    tables = [pa.table({"x": pa.array([2**63 - 1, 2**63 - 1])}), pa.table({"x": [7]})]
    assert asked("SELECT sum(x) FROM t", tables).rows == ((2**64 + 5,),)


def test_groups_survive_the_journey_as_json():
    query = parse("SELECT sex, well, age, count(*), avg(chol), stddev(age) FROM heart GROUP BY ALL")
    rows = [{"sex": "m", "age": 1, "chol": 2.5, "well": True}, {"sex": None, "age": 0, "chol": None, "well": None}]
    groups, suppressed = answer(query, pa.Table.from_pylist(rows, SCHEMA), 0, known)
    sent = Answer(site="a", position=0, epoch=0, groups=groups, suppressed=suppressed).model_dump_json()
    back = Answer.model_validate_json(sent)
    assert merge(query, [(back.groups, back.suppressed)]) == merge(query, [(groups, suppressed)])
    assert merge(query, [(back.groups, False)]).rows == (("m", True, 1, 1, 2.5, None), (None, None, 0, 1, None, None))


# --- what must not get out ------------------------------------------------------------------------------------


def people(**columns):
    return pa.table(columns)


def test_groups_below_the_minimum_are_held_back_and_said_to_be_where_they_have_as_many_rows_together():
    first = people(sex=["m"] * 5 + ["f"] * 2, age=list(range(7)))
    second = people(sex=["m"] * 2 + ["f"] * 6 + ["x"], age=list(range(9)))
    sql = "SELECT sex, count(*) AS n, max(age) FROM heart GROUP BY sex"
    result = asked(sql, [first, second], min_group=3)
    assert (result.rows, result.suppressed) == ((("f", 6, 7), ("m", 5, 4)), True)
    assert not asked(sql, [first], min_group=3).suppressed  # that it has two more rows would tell of two


@pytest.mark.parametrize("apart", [0, 1, 2])
def test_how_many_groups_are_held_back_is_not_told_as_it_could_hang_on_one_person(apart):
    site = people(id=[*range(100 - apart), *range(apart)])
    query = parse("SELECT id AS k, count(*) AS n FROM heart GROUP BY k")
    assert answer(query, site, 10, known) == ((), True)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("odd", "exact"),
    [
        (2_345_678_901, {"BIGINT", "DOUBLE"}),
        (16_777_217, {"INTEGER", "BIGINT", "DOUBLE"}),
        (2**53 + 1, {"BIGINT"}),
        (1e15 + 0.5, {"DOUBLE"}),
        (1e200, set()),
        (40.5, {"FLOAT", "DOUBLE"}),
        (0.1, {"DOUBLE"}),
        ("a few", set()),
    ],
)
def test_a_cast_that_leaves_out_or_changes_a_few_is_not_told(odd, exact, text):
    """The column's sum, less that of its CAST, would be those few rows' values, or what of them the CAST lost."""
    for times in (1, 9, 10):
        values = [*range(90), *[odd] * times]
        column = [str(one) for one in values] if text or odd == "a few" else values
        site = people(x=pa.array(column, pa.float64() if isinstance(column[-1], float) else None))
        for kind in ("INTEGER", "BIGINT", "FLOAT", "DOUBLE"):
            told = asked(f"SELECT count(*), sum(CAST(x AS {kind})) AS a FROM heart", [site], min_group=10).rows
            assert bool(told) == (kind in exact or times == 10), (times, kind)


def test_a_question_about_one_person_is_held_back_whole():
    site = people(id=list(range(50)), age=[40.0] * 50)
    result = asked("SELECT count(*), avg(age) FROM heart WHERE id = 17", [site], min_group=10)
    assert (result.rows, result.suppressed) == ((), True)
    assert asked("SELECT count(*) FROM heart WHERE id = 99", [site], min_group=10).suppressed


def test_an_aggregate_that_rests_on_few_values_is_held_back_in_a_large_group():
    site = people(ill=[1.5] + [None] * 49, never=pa.nulls(50, pa.float64()), age=[40] * 50)
    assert asked("SELECT sum(ill) FROM heart", [site], min_group=10).suppressed
    assert asked("SELECT count(ill) FROM heart", [site], min_group=10).rows == ()
    assert asked("SELECT sum(never), avg(age) FROM heart", [site], min_group=10).rows == ((None, 40.0),)


@pytest.mark.parametrize(
    "expression",
    [
        "CAST(name AS INT)",
        "age * 9223372036854775807",
        "age * 9223372036854775807 + 0.5",
        "age // (age - 41)",
        "abs(-9223372036854775807 - age)",
        "CAST(name AS DATE) = CAST('2020-01-01' AS DATE)",
    ],
)
def test_a_row_that_fails_is_missing_and_no_error_tells_of_it(expression):
    site = people(name=["Alice", "7", None], age=[41, 42, 1])
    keyed = asked(f"SELECT {expression} AS k, count(*) AS n FROM heart GROUP BY k", [site]).rows
    present = sum(n for key, n in keyed if key is not None)
    assert sum(n for _, n in keyed) == 3
    assert present < 3
    assert asked(f"SELECT count(*) AS n FROM heart WHERE ({expression}) IS NOT NULL", [site]).rows == ((present,),)


def test_no_optimiser_takes_a_failing_part_out_of_its_guard():
    site = people(name=["Alice", "7", None], age=[2, 7, None])
    shared = "age * 9223372036854775807 + 1 AS a, age * 9223372036854775807 + 2 AS b"
    assert asked(f"SELECT {shared}, count(*) AS n FROM heart GROUP BY a, b", [site]).rows == ((None, None, 3),)
    assert asked("SELECT count(*) AS n FROM heart WHERE name IN (1, 2, 3, 4, 5, 6, 7)", [site]).rows == ((1,),)
    assert asked("SELECT count(*) AS n FROM heart WHERE name IN (age, 1)", [site]).rows == ((1,),)


def test_a_condition_that_is_no_truth_value_tells_nothing_by_failing():
    site = people(name=["Alice", "true", None], age=[1, 0, None])
    assert asked("SELECT count(*) FROM heart WHERE name", [site]).rows == ((1,),)
    assert asked("SELECT count(*) FROM heart WHERE age", [site]).rows == ((1,),)


def test_what_is_no_number_counts_as_missing():
    site = people(x=[1.0, float("nan"), float("inf"), None, 1e200, 3.0])
    assert asked("SELECT count(x), avg(x), max(x) FROM heart", [site]).rows == ((2, 2.0, 3.0),)
    assert asked("SELECT x / 0 AS z, count(*) FROM heart GROUP BY z", [site]).rows == ((None, 6),)


def test_a_site_with_too_many_groups_is_refused_by_the_hub():
    query = parse("SELECT id, count(*) AS n FROM heart GROUP BY id")
    groups = [Group(key=(i,), rows=1, partials={"n": (1,)}) for i in range(10_001)]
    with pytest.raises(Invalid, match="10001 groups"):
        merge(query, [(groups, False)])


def test_too_many_groups_are_refused():
    with pytest.raises(Invalid, match="10001 groups"):
        asked("SELECT id, count(*) FROM heart GROUP BY id", [people(id=list(range(10_001)))])


def test_the_columns_own_names_cannot_be_mistaken_for_the_engines():
    site = people(k0=[1, 1], x0=[10, 20], rows=[5, 6], g0=["a", "b"], a0_0=[0, 1])
    sql = 'SELECT g0, sum(x0), sum(k0), sum("rows"), sum(a0_0) FROM heart WHERE x0 > 5 GROUP BY g0'
    assert asked(sql, [site]).rows == (("a", 10, 1, 5, 0), ("b", 20, 1, 6, 1))


def test_quotes_in_names_and_texts_stay_names_and_texts():
    site = pa.table({'we"ird; --': ["a'b", "c"]})
    sql = 'SELECT "we""ird; --" AS k, count(*) AS n FROM heart WHERE "we""ird; --" = \'a\'\'b\' GROUP BY k'
    assert asked(sql, [site]).rows == (("a'b", 1),)


def test_connections_see_nothing_of_each_other_nor_of_the_machine(tmp_path):
    (tmp_path / "x.csv").write_text("a\n1\n")
    here = pa.table({"a": [1]})  # a Python variable the engine could find by its name
    with connect() as one, connect() as other:
        one.register("dataset", here)
        one.execute("CREATE TEMP TABLE groups AS SELECT * FROM dataset")
        for text in ("dataset", "groups", "here", f"'{tmp_path}/x.csv'", f"read_text('{tmp_path}/x.csv')"):
            with pytest.raises(duckdb.Error):
                other.execute(f"SELECT * FROM {text}")
        for text in ("SET enable_external_access = true", "INSTALL httpfs", f"COPY groups TO '{tmp_path}/y.csv'"):
            with pytest.raises(duckdb.Error):
                one.execute(text)
    assert not (tmp_path / "y.csv").exists()


def test_an_engine_that_broke_is_replaced():
    engine._engine().close()
    assert asked("SELECT sum(x) FROM t", [people(x=[1, 2])]).rows == ((3,),)


def test_queries_at_once_do_not_mix():
    sites = [people(x=list(range(n, n + 2000))) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda site: asked("SELECT count(*), min(x) FROM t", [site]).rows, sites * 4))
    assert results == [((2000, n),) for n in range(8)] * 4


# --- what fits the columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT avg(agee) FROM heart", "no column 'agee'; did you mean 'age'"),
        ("SELECT avg(rowid) FROM heart", "no column 'rowid'"),
        ("SELECT avg(sex) FROM heart", "it needs numbers"),
        ("SELECT min(seen) FROM heart", "it needs numbers"),
        ("SELECT tags, count(*) FROM heart GROUP BY tags", "group by numbers"),
        ("SELECT sex + 1 AS k, count(*) FROM heart GROUP BY k", "Binder Error.*change the expression"),
    ],
)
def test_what_does_not_fit_a_columns_type_is_named(sql, words):
    site = people(age=[1], sex=["m"], seen=pa.array([1], pa.date32()), tags=[["a"]])
    with pytest.raises(Invalid, match=words):
        asked(sql, [site])


def test_an_unknown_column_is_not_found():
    with pytest.raises(NotFound):
        asked("SELECT avg(b) FROM t", [people(a=[1])])


def test_half_floats_and_dictionaries_are_read():
    tables = [people(s=pa.array(["a", "b", "a"]).dictionary_encode(), x=np.array([1, 2, np.nan], np.float16))]
    assert asked("SELECT s, sum(x) FROM t GROUP BY s", tables).rows == (("a", 1.0), ("b", 2.0))


def test_dates_and_decimals_can_be_keys():
    site = people(day=pa.array([0, 0, None], pa.date32()), price=pa.array([1, 1, 2], pa.decimal128(5, 1)))
    result = asked("SELECT day, price, count(*) AS n FROM shop GROUP BY ALL", [site, site])
    assert result.rows == (("1970-01-01", 1.0, 4), (None, 2.0, 2))


@pytest.mark.parametrize(
    "group",
    [
        Group(rows=5, partials={"n": (5, 1.0)}),
        Group(key=("x", "y"), rows=5, partials={"n": (5, 1.0)}),
        Group(key=("x",), rows=5, partials={}),
        Group(key=("x",), rows=5, partials={"n": (5,)}),
        Group(key=("x",), rows=5, partials={"n": ()}),
        Group(key=("x",), rows=5, partials={"n": (6, 1.0)}),
        Group(key=("x",), rows=5, partials={"n": (-1, 1.0)}),
        Group(key=("x",), rows=5, partials={"n": (None, 1.0)}),
        Group(key=("x",), rows=5, partials={"n": (5, None)}),
        Group(key=("x",), rows=5, partials={"n": (0, 1.0)}),
        Group(key=("x",), rows=5, partials={"n": (5, 1e300)}),
        Group(key=("x",), rows=10**400, partials={"n": (10**400, 1.0)}),
    ],
)
def test_a_forged_group_is_refused(group):
    query = parse("SELECT sex, sum(age) AS n FROM heart GROUP BY sex")
    with pytest.raises(Invalid, match="does not fit the query"):
        merge(query, [((group,), False)])


def test_forged_variances_are_refused_and_the_largest_honest_ones_do_not_overflow():
    query = parse("SELECT var_pop(age) AS v FROM heart")
    for part in ((5, 1e200, 1.0), (5, 1.0, -1.0), (5, 1.0, 1e300)):
        with pytest.raises(Invalid, match="does not fit"):
            merge(query, [((Group(rows=5, partials={"v": part}),), False)])
    far = [Group(rows=2**52, partials={"v": (2**52, side * 1e140, 0.0)}) for side in (-1, 1)]
    assert merge(query, [((group,), False) for group in far]).rows == ((pytest.approx(1e280),),)
