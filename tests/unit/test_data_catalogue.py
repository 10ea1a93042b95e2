"""A site's list of datasets: read back exactly, refused when wrong, and never telling where the files are."""

import os
import stat
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from atoll.data.catalogue import Catalogue, read_table, rows_of
from atoll.data.live import LiveCatalogue
from atoll.errors import Corrupt, Invalid, NotFound, Unavailable

TABLE = pa.table({"age": [63, 37, None], "sex": ["m", None, "f"], "well": [True, False, True]})


@pytest.fixture
def heart(tmp_path):
    parquet.write_table(TABLE, tmp_path / "heart.parquet")
    return tmp_path / "heart.parquet"


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue(tmp_path / "home")


def write(path):
    if path.suffix == ".parquet":
        parquet.write_table(TABLE, path)
    elif path.suffix == ".csv":
        csv.write_csv(TABLE, path)
    else:
        feather.write_feather(TABLE, path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow", ".feather", ".PARQUET"])
def test_each_format_reads_back_whole_and_by_column(tmp_path, catalogue, suffix):
    path = tmp_path / f"x{suffix.lower()}"
    write(path)
    path = path.rename(tmp_path / f"heart{suffix}")
    dataset = catalogue.add("heart", path, purposes=["cardiology"], min_group=5)
    assert (dataset.rows, dataset.bytes) == (3, path.stat().st_size)
    assert dataset.columns == {"age": "int64", "sex": "string", "well": "bool"}
    assert (dataset.purposes, dataset.min_group) == (("cardiology",), 5)
    assert catalogue.table("heart").equals(TABLE)
    assert catalogue.table("heart", ["well", "age"]).equals(TABLE.select(["well", "age"]))
    assert catalogue.table("heart", []).num_columns == 0


def test_the_list_outlives_the_process_and_replaces_by_name(tmp_path, catalogue, heart):
    catalogue.add("heart", heart)
    catalogue.add("other", heart)
    again = catalogue.add("heart", heart, min_group=3)
    fresh = Catalogue(tmp_path / "home")
    assert fresh.datasets() == catalogue.datasets()
    assert fresh.entry("heart").dataset == again
    assert [dataset.name for dataset in fresh.datasets()] == ["other", "heart"]
    fresh.remove("heart")
    assert [dataset.name for dataset in catalogue.datasets()] == ["other"]
    assert heart.exists()


def test_a_relative_path_is_kept_absolute(tmp_path, catalogue, heart, monkeypatch):
    monkeypatch.chdir(tmp_path)
    catalogue.add("heart", "heart.parquet")
    monkeypatch.chdir("/")
    assert catalogue.entry("heart").path == str(heart)
    assert catalogue.table("heart").num_rows == 3


def test_the_list_is_private_and_leaves_no_draft(tmp_path, catalogue, heart):
    catalogue.add("heart", heart)
    assert stat.S_IMODE(os.stat(tmp_path / "home" / "catalogue.yaml").st_mode) == 0o600
    assert sorted(os.listdir(tmp_path / "home")) == ["catalogue.lock", "catalogue.yaml"]


def test_two_who_add_at_once_lose_nothing(tmp_path, heart):
    names = [f"heart-{i}" for i in range(8)]
    adders = [threading.Thread(target=Catalogue(tmp_path / "home").add, args=(name, heart)) for name in names]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join()
    assert sorted(dataset.name for dataset in Catalogue(tmp_path / "home").datasets()) == names


def test_an_unknown_name_gets_its_near_miss(catalogue, heart):
    with pytest.raises(NotFound, match="atoll data add"):
        catalogue.entry("heart")
    catalogue.add("heart", heart)
    with pytest.raises(NotFound, match="did you mean 'heart'"):
        catalogue.table("haert")
    with pytest.raises(NotFound):
        catalogue.remove("lung")


def test_a_file_that_changed_is_found_out(catalogue, heart):
    catalogue.add("heart", heart)
    assert catalogue.verify("heart") == catalogue.entry("heart")
    heart.write_bytes(heart.read_bytes() + b"\0")
    with pytest.raises(Corrupt, match=r"'heart'.*add it again"):
        catalogue.verify("heart")
    heart.unlink()
    with pytest.raises(Unavailable, match="'heart'"):
        catalogue.verify("heart")
    with pytest.raises(Unavailable, match="cannot be opened"):
        catalogue.table("heart")


@pytest.mark.parametrize("columns", [["agee"], ["age", "agee"]])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow"])
def test_a_missing_column_is_named_with_its_near_miss(tmp_path, catalogue, suffix, columns):
    path = tmp_path / f"heart{suffix}"
    write(path)
    catalogue.add("heart", path)
    with pytest.raises(NotFound, match=r"'agee'; did you mean 'age'\?"):
        catalogue.table("heart", columns)


@pytest.mark.parametrize("name", ["Heart", "../heart", "", "a b", "x" * 64])
def test_a_wrong_name_is_refused(catalogue, heart, name):
    with pytest.raises(Invalid, match="name"):
        catalogue.add(name, heart)
    assert catalogue.datasets() == ()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("x.xlsx", b"PK", "suffix '.xlsx'"),
        ("x", b"", "suffix ''"),
        ("x.parquet", b"not parquet at all", "does not read as parquet"),
        ("x.parquet", b"", "does not read as parquet"),
        ("x.arrow", b"junk", "does not read as arrow"),
        ("x.feather", b"", "does not read as arrow"),
        ("x.csv", b"", "does not read as csv"),
        ("x.csv", b"a,b\n1,2\n3\n", "does not read as csv"),
        ("x.csv", b"a,b\n", "no rows"),
        ("x.csv", b"a,b,a\n1,2,3\n", "'a' is there twice"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path, catalogue, file, content, words):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(Invalid, match=words) as told:
        catalogue.add("heart", tmp_path / file)
    assert str(tmp_path / file) in str(told.value)
    assert "\n" not in str(told.value)
    assert catalogue.datasets() == ()


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path, catalogue):
    (tmp_path / "folder.parquet").mkdir()
    for path in (tmp_path / "none.parquet", tmp_path / "folder.parquet"):
        with pytest.raises(NotFound, match="no such file"):
            catalogue.add("heart", path)


def test_parquet_without_rows_or_with_twin_columns_is_refused(tmp_path, catalogue):
    path = tmp_path / "x.parquet"
    parquet.write_table(TABLE.slice(0, 0), path)
    with pytest.raises(Invalid, match="no rows"):
        catalogue.add("heart", path)
    parquet.write_table(pa.table([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(Invalid, match="'a' is there twice"):
        catalogue.add("heart", path)


def test_what_a_worker_says_holds_neither_path_nor_value(tmp_path):
    (tmp_path / "x.csv").write_text("name,age\nAlice,1\nBob\n")
    with pytest.raises(Invalid) as told:
        read_table(tmp_path / "x.csv", "csv")
    with pytest.raises(Unavailable) as gone:
        read_table(tmp_path / "y.csv", "csv")
    for words in (str(told.value), str(gone.value)):
        assert str(tmp_path) not in words
        assert "Bob" not in words


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(Invalid, match="did you mean 'parquet'"):
        read_table(tmp_path / "x", "parqet")


def test_missing_values_of_csv_are_missing_in_text_too(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n1,NA\n,"NA"\n3,\n')
    table = read_table(tmp_path / "x.csv", "csv")
    assert table.to_pydict() == {"a": [1, None, 3], "b": [None, "NA", None]}


def test_a_broken_list_is_refused_and_not_overwritten(tmp_path, catalogue, heart):
    catalogue.add("heart", heart)
    file = tmp_path / "home" / "catalogue.yaml"
    file.write_text(file.read_text().replace("format:", "fromat:"))
    broken = file.read_text()
    with pytest.raises(Invalid, match="did you mean 'format'"):
        catalogue.add("other", heart)
    assert file.read_text() == broken


def test_a_home_that_cannot_be_is_unavailable(tmp_path, heart):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(Unavailable, match="cannot be written"):
        Catalogue(tmp_path / "home").add("heart", heart)


# --- for a process that must go on


BROKEN = ["entries: [", "entries: {}", "entrees: []", "- 1", "entries:\n- path: x", b"\xff\xfe\x00"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_live_list_that_breaks_stays_as_it_was_and_says_so_once(tmp_path, catalogue, heart, caplog, content):
    catalogue.add("heart", heart)
    live = LiveCatalogue(tmp_path / "home")
    listed = live.datasets()
    file = tmp_path / "home" / "catalogue.yaml"
    good = file.read_bytes()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):
        assert live.datasets() == listed
        assert live.table("heart").num_rows == 3
    assert len(caplog.records) == 1
    assert "the list before it stays in force (1 datasets)" in caplog.text
    assert live.problem in caplog.text
    with pytest.raises(Invalid):
        live.add("other", heart)  # what an owner is just writing is not overwritten
    file.write_bytes(good)
    catalogue.remove("heart")
    assert (live.datasets(), live.problem) == ((), None)


@pytest.mark.parametrize("content", BROKEN)
def test_a_live_list_that_is_broken_from_the_start_is_empty(tmp_path, catalogue, heart, content, caplog):
    catalogue.add("heart", heart)
    file = tmp_path / "home" / "catalogue.yaml"
    good = file.read_bytes()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    live = LiveCatalogue(tmp_path / "home")
    assert live.datasets() == ()
    assert len(caplog.records) == 1
    with pytest.raises(NotFound):
        live.entry("heart")
    file.write_bytes(good)
    assert live.entry("heart").path == str(heart)


def test_a_live_list_that_is_taken_away_is_empty(tmp_path, catalogue, heart):
    catalogue.add("heart", heart)
    live = LiveCatalogue(tmp_path / "home")
    assert len(live.datasets()) == 1
    (tmp_path / "home" / "catalogue.yaml").unlink()
    assert (live.datasets(), live.problem) == ((), None)


def test_rows_are_those_of_their_numbers_in_their_order():
    table = pa.table({"x": np.arange(9), "y": [str(number) for number in range(9)]})
    for rows in (np.array([7, 0, 7, 3]), np.arange(9), np.array([], np.int64)):
        assert rows_of(table, rows).equals(table.take(rows))
