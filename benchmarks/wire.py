"""Claim: encoding an update, checking it and adding it to an exact sum keep up with the wire on one core.

The limits are memcpy and numpy's own float32 and float64 additions of the same vector, in the same run. Rates are GB of
float32 per second of this thread's processor time, the best of several passes.
"""

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from reporting import Figure, Report, options

from atoll.outer.merge import Sum, Update, merge
from atoll.outer.wire import CHUNK, Chunk, decode, encode, encoded_bytes, feedback, recalls
from atoll.spec.wire import Transform

SITES = 8
TOPK = Transform(kind="topk", share=0.01)
BFLOAT16, INT8, INT4, ZSTD = (Transform(kind=kind) for kind in ("bfloat16", "int8", "int4", "zstd"))
WIRES: dict[str, tuple[Transform, ...]] = {
    "float32": (),
    "clip": (Transform(kind="clip", value=1.0),),
    "bfloat16": (BFLOAT16,),
    "int8": (INT8,),
    "int4": (INT4,),
    "topk": (TOPK,),
    "topk_int8": (TOPK, INT8),
    "float32_zstd": (ZSTD,),
    "bfloat16_zstd": (BFLOAT16, ZSTD),
    "int8_zstd": (INT8, ZSTD),
    "int4_zstd": (INT4, ZSTD),
}


def main() -> int:
    asked = options("Gigabytes a second of each transform and of the exact sum, against memcpy.")
    report = Report("wire", "The wire's transforms and the exact sum on one core", asked)
    size, passes = (16 * CHUNK, 3) if asked.quick else (100 * CHUNK, 7)
    # Heavy tails, as deltas of training have them: normal noise would flatter zstd less and the block formats more.
    vector = (1e-3 * np.random.default_rng(0).standard_t(5, size)).astype(np.float32)
    peers = limits(report, vector, passes)
    measured = transforms(report, vector, passes, peers["memcpy_gbs"])
    report.finish({"mb": vector.nbytes // 1_000_000, **peers, **measured, **sums(report, vector, passes, peers)})
    return 0


def rate(work: Callable[[], object], size: int, passes: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Return GB of float32 a second for `size` elements, of the fastest pass."""
    best = float("inf")
    for _ in range(passes):
        began = clock()
        work()
        best = min(best, clock() - began)
    return round(4e-9 * size / best, 2)


def limits(report: Report, vector: np.ndarray, passes: int) -> dict[str, float]:
    copy, total = np.zeros_like(vector), np.zeros(vector.size)
    found = {
        "memcpy_gbs": rate(lambda: np.copyto(copy, vector), vector.size, passes),
        "float32_add_gbs": rate(lambda: np.add(copy, vector, out=copy), vector.size, passes),
        "float64_add_gbs": rate(lambda: np.add(total, vector, out=total), vector.size, passes),
    }
    report.say(
        f"{vector.nbytes / 1e6:.0f} MB of float32: " + ", ".join(f"{name} {value}" for name, value in found.items())
    )
    return found


def transforms(report: Report, vector: np.ndarray, passes: int, memcpy: float) -> dict[str, Figure]:
    """Measure both ways of each wire; a transform's residual starts at zero."""
    rows: list[list[object]] = []
    found: dict[str, Figure] = {}
    residual = np.zeros_like(vector)
    for name, wire in WIRES.items():
        chunks = list(encode(vector, wire))
        out = rate(lambda wire=wire: drained(encode(vector, wire)), vector.size, passes)
        back = rate(lambda wire=wire, chunks=chunks: decoded(chunks, wire, vector.size), vector.size, passes)
        again = rate(lambda wire=wire: drained(feedback(vector, residual, wire)), vector.size, passes)
        bits = 8 * sum(len(chunk.data) + len(chunk.scales) for chunk in chunks) / vector.size
        assert bits <= 8 * encoded_bytes(vector.size, wire) / vector.size
        found |= {f"{name}_encode_gbs": out, f"{name}_decode_gbs": back, f"{name}_bits": round(bits, 3)}
        fed = again if recalls(wire) else None
        found[f"{name}_feedback_gbs"] = fed
        rows.append([name, out, fed or "", back, f"{out / memcpy:.2f}", f"{back / memcpy:.2f}", f"{bits:.2f}"])
    columns = ["wire", ">encode", ">with feedback", ">decode", ">encode/memcpy", ">decode/memcpy", ">bits an element"]
    report.table(columns, rows)
    return found


def drained(chunks: Iterable[object]) -> None:
    for _ in chunks:
        pass


def decoded(chunks: Iterable[Chunk], wire: tuple[Transform, ...], size: int) -> None:
    for chunk in chunks:
        decode(chunk, wire, size)


def sums(report: Report, vector: np.ndarray, passes: int, peers: dict[str, float]) -> dict[str, float]:
    """Measure adding as chunks arrive, merging from the spool's windows, and two threads in windows of their own."""
    total = Sum(vector.size)

    def add(first: int = 0, stride: int = 1) -> None:
        for offset in range(first * CHUNK, vector.size, stride * CHUNK):
            total.add(offset, vector[offset : offset + CHUNK], 120.0)

    def both() -> None:
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(add, first, 2) for first in (0, 1)]:
                done.result()

    def window(offset: int) -> np.ndarray:
        return vector[offset : offset + CHUNK]

    updates = [Update(f"s{number}", 100.0 + number, window) for number in range(SITES)]
    found = {
        "sum_add_gbs": rate(add, vector.size, passes),
        "sum_two_threads_gbs": rate(both, vector.size, passes, time.perf_counter),
        "merge_gbs": rate(lambda: merge("weighted_mean", vector.size, updates), SITES * vector.size, passes),
    }
    for peer in ("float32_add", "float64_add"):
        found[f"sum_over_{peer}"] = round(found["sum_add_gbs"] / peers[f"{peer}_gbs"], 3)
    report.say("exact sum: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    sys.exit(main())
