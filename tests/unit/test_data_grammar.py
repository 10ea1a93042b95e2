"""What a query may be, and in which words another one is refused."""

import pytest

from atoll.data.grammar import parse
from atoll.errors import Invalid


def test_a_query_names_its_dataset_and_columns():
    query = parse(
        'SELECT h.sex, avg(CAST(age AS INT)) AS "mean" FROM "heart-2.x" AS h WHERE well AND chol > 1 GROUP BY sex '
        "LIMIT 3"
    )
    assert query.dataset == "heart-2.x"
    assert query.columns == ("sex", "age", "well", "chol")
    assert [output.name for output in query.outputs] == ["sex", "mean"]
    assert query.conditions == ('"well"', '("chol" > 1)')
    assert query.limit == 3


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT * FROM t", "rows never leave a site"),
        ("SELECT a FROM t", "no aggregate"),
        ("SELECT a, count(*) FROM t", "'a' stands beside an aggregate"),
        ("SELECT a + 1, count(*) FROM t GROUP BY ALL", "needs a name"),
        ("SELECT count(*) FROM t, u", "a join"),
        ("SELECT count(*) FROM t JOIN u USING (a)", "a join"),
        ("SELECT count(*) FROM read_csv('/etc/passwd')", "a table function"),
        ("SELECT count(*) FROM '/etc/passwd'", "no dataset's name"),
        ("SELECT count(*) FROM s.t", "a schema"),
        ("SELECT main.sum(a) FROM t", "a schema"),
        ("SELECT count(*) FROM (SELECT 1)", "a subquery"),
        ("SELECT count(*) FROM t WHERE a IN (SELECT 1)", "a subquery"),
        ("WITH x AS (SELECT 1) SELECT count(*) FROM t", "WITH"),
        ("SELECT count(*) FROM t UNION ALL SELECT 1", "UNION"),
        ("SELECT sum(a) OVER () FROM t", "a window function"),
        ("SELECT count(*) FROM t HAVING count(*) > 1", "HAVING"),
        ("SELECT count(*) FROM t QUALIFY true", "QUALIFY"),
        ("SELECT count(*) FROM t USING SAMPLE 1", "SAMPLE"),
        ("SELECT count(*) FROM t TABLESAMPLE 10%", "SAMPLE"),
        ("SELECT count(*) FROM t AS t(b)", "renaming columns"),
        ("SELECT count(DISTINCT a) FROM t", "DISTINCT"),
        ("SELECT DISTINCT a, count(*) FROM t GROUP BY a", "DISTINCT"),
        ("SELECT count(*) FILTER (a > 1) FROM t", "FILTER"),
        ("SELECT sum(a ORDER BY b) FROM t", "ORDER_BYS"),
        ("SELECT a, count(*) FROM t GROUP BY CUBE (a)", "CUBE"),
        ("SELECT a, count(*) FROM t GROUP BY 2", "'a' stands beside"),
        ("SELECT a, count(*) AS n FROM t GROUP BY a, n", "an aggregate is no group"),
        ("SELECT count(*) FROM t GROUP BY a", "not in the select list"),
        ("SELECT count(*) FROM t ORDER BY a", "not in the select list"),
        ("SELECT count(*) FROM t ORDER BY 2", "count from 1 to 1"),
        ("SELECT count(*) FROM t LIMIT 1 OFFSET 1", "OFFSET"),
        ("SELECT count(*) FROM t LIMIT 10%", "LIMIT"),
        ("SELECT sum(a) / 2 AS h FROM t", "sum inside an expression"),
        ("SELECT sum(avg(a)) FROM t", "avg inside an expression"),
        ("SELECT sum(a * CAST(id = 17 AS INT)) FROM t", "sum of an expression.*could tell of one row"),
        ("SELECT sum(CAST(id = 17 AS INT)) FROM t", "sum of an expression"),
        ("SELECT sum(CAST(a AS BOOLEAN)) FROM t", "sum of an expression"),
        ("SELECT max((a + 4503599627370496e0) - 4503599627370496e0) FROM t", "max of an expression"),
        ("SELECT count(1) FROM t", "count of an expression"),
        ("SELECT CAST(id = 17 AS INT) * age AS k, count(*) FROM t GROUP BY k", "the key 'k' is made of id, age"),
        ("SELECT id + age AS k, 2 AS m, count(*) FROM t GROUP BY ALL", "could tell of one row; take one column"),
        ("SELECT count(*) FROM t WHERE CASE WHEN a THEN b END", "CASE"),
        ("SELECT count(*) FROM t WHERE uper(a) = 'A'", "did you mean 'upper'"),
        ("SELECT count(*) FROM t WHERE a LIKE '%'", "'like'"),
        ("SELECT count(*) FROM t WHERE getenv('HOME') = 'x'", "'getenv'"),
        ("SELECT median(a) FROM t", "'median'"),
        ("SELECT sum(a.b.c) FROM t", "a.b.c"),
        ("SELECT sum(u.a) FROM t", "u.a"),
        ("SELECT sum(CAST(a AS STRUCT(b INT))) FROM t", "CAST to|CHILDREN|not allowed"),
        ("SELECT sum(a[1]) FROM t", "array_extract"),
        ("SELECT count(*) FROM t WHERE a = $1", "a parameter"),
        ("SELECT count(*)", "without FROM"),
        ("SELECT count(*) FROM t; SELECT count(*) FROM t", "more than one statement"),
        ("", "an empty query"),
        ("SELECT \udcff", "no Unicode"),
        ("SELECT count(*) FROM t WHERE a = '\0' OR", "syntax error"),
        ("DROP TABLE t", "anything but SELECT"),
        ("COPY t TO 'x'", "anything but SELECT"),
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT sum(A), sum(a) FROM t", "differ only in case"),
        ("SELECT sum(a), sum(a) FROM t", "two output columns"),
        ("SELECT floor(a) AS a, count(*) FROM t GROUP BY a", "names both a column and a key"),
        ("SELECT count(*) FROM t WHERE " + "NOT " * 300 + "a", "nested too deeply"),
        ("SELECT count(*) FROM t WHERE a IN (" + "1," * 6000 + "1)", "10000 is the most"),
    ],
)
def test_what_is_not_allowed_is_named(sql, words):
    with pytest.raises(Invalid, match=words) as told:
        parse(sql)
    assert str(told.value).startswith("sql: ")
    assert "\n" not in str(told.value)
