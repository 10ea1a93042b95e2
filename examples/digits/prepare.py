"""Write scikit-learn's handwritten digits as one site's Parquet file, once: `python examples/digits/prepare.py FOLDER`.

1,797 digits of 8 x 8 grey values from 0 to 16: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits,
UCI Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

SITE = "lab"


def prepare(target: Path) -> dict[str, Path]:
    """Write `<target>/lab/digits.parquet`, columns `pixels` (64 values, row by row) and `digit`; return it by site."""
    pixels, digits = load_digits(return_X_y=True)
    table = pa.table({"pixels": pixels.tolist(), "digit": digits})
    path = target / SITE / "digits.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return {SITE: path}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/digits/prepare.py FOLDER")
    for name, file in prepare(Path(sys.argv[1])).items():
        print(f"{name}: {pq.read_metadata(file).num_rows} digits  {file}")
