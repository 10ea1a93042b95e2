"""Lay this Python's standard library into two sites' folders, once: `python examples/coder/prepare.py FOLDER`.

A package goes whole to one site, by a digest of its name, so the two sites hold different code. The same Python
version gives the same files. The texts are read, not copied into this repository (licence: PSF-2.0).
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SITES = ("east", "west")
LIMIT = 600_000  # bytes of source per site
LARGEST = 50_000  # bytes of one file, so that no single module fills a site
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}


def rank(name: str) -> int:
    """Return a number that depends on the name only: an order, and a side, that every machine agrees on."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def sources() -> dict[str, Path]:
    """Return the standard library's readable modules by their path within it, in `rank` order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = {name: path for name, path in found.items() if not SKIPPED & set(name.split("/"))}
    return dict(sorted(kept.items(), key=lambda item: rank(item[0])))


def prepare(target: Path) -> dict[str, Path]:
    """Write `<target>/<site>/source.parquet` (columns `module`, `text`) for each site; return the files by site."""
    rows: dict[str, list[dict[str, str]]] = {site: [] for site in SITES}
    taken = dict.fromkeys(SITES, 0)
    for name, path in sources().items():
        site = SITES[rank(name.split("/")[0]) % 2]
        size = path.stat().st_size
        if not 0 < size <= LARGEST or taken[site] + size > LIMIT:
            continue
        rows[site].append({"module": name, "text": path.read_bytes().decode("utf-8", errors="replace")})
        taken[site] += size
    written: dict[str, Path] = {}
    for site in SITES:
        path = target / site / "source.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[site]), path)
        written[site] = path
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/coder/prepare.py FOLDER")
    for site_name, file in prepare(Path(sys.argv[1])).items():
        table = pq.read_table(file)
        characters = sum(map(len, table["text"].to_pylist()))
        print(f"{site_name:6} {table.num_rows:4} modules, {characters:,} characters  {file}")
