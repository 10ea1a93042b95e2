"""Whether the sets of rows of two answers, added and subtracted at will, can leave a few rows over.

Sets are vertices, and so is what lies outside the answers; a row is an edge between its set in one answer and its set
in the other. Adding some sets of the one and subtracting some of the other leaves the rows whose edge has one end among
those chosen: a cut. Sums with any other factors leave no fewer rows than some cut does, namely that of the sets whose
factor is above a number. So where no cut has fewer than ``least`` rows, nothing of fewer can be had of the two.
"""

from heapq import heappop, heappush

import numpy as np

_MOST = 1_000_000  # edges to scan; then it is told as if there were a cut, as others wait for their answers


def shared(one: np.ndarray, two: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of labels that rows have, and how many have each; the second's labels are below ``width``."""
    both = one.astype(np.int64) * width + two
    if both.max(initial=0) < 4 * both.size:
        pairs, rows = np.flatnonzero(found := np.bincount(both)), found[found > 0]
    else:
        pairs, rows = np.unique(both, return_counts=True)  # sorts, where a table would be large and mostly empty
    return *np.divmod(pairs, width), rows


def divisible(one: np.ndarray, two: np.ndarray, rows: np.ndarray, least: int) -> bool:
    """Tell whether the vertices and 0 can be parted so that fewer than ``least`` rows lie between the two parts.

    The edges are between ``one`` and ``two``, with as many ``rows``. What no such cut parts is taken for one vertex,
    until one is left or has too few rows around it (Padberg and Rinaldi, 1990; Nagamochi and Ibaraki, 1992).
    """
    vertices, ends = np.unique(np.concatenate([[0], one, two]), return_inverse=True)
    one, two, count = ends[1 : len(one) + 1], ends[len(one) + 1 :], len(vertices)
    scanned = 0
    while count > 1:
        around = np.bincount(one, rows, count) + np.bincount(two, rows, count)
        if around.min() < least:
            return True
        tied = rows >= least
        if not tied.any():
            scanned += len(rows)
            if scanned > _MOST:
                return True
            tied = _tied(one, two, rows, count, least)
        root = _joined(one[tied], two[tied], count)
        count = int(root.max()) + 1
        one, two = root[one], root[two]
        apart = one != two
        low, high = np.minimum(one, two)[apart], np.maximum(one, two)[apart]
        pairs, place = np.unique(low * count + high, return_inverse=True)
        rows = np.bincount(place, rows[apart], len(pairs)).astype(np.int64)
        one, two = np.divmod(pairs, count)
    return False


def _joined(one: np.ndarray, two: np.ndarray, count: int) -> np.ndarray:
    """Return for each vertex which of the parts that these edges join it is in, counted from 0."""
    root = np.arange(count)
    while (root[one] != root[two]).any():
        low = np.minimum(root[one], root[two])
        np.minimum.at(root, root[one], low)
        np.minimum.at(root, root[two], low)
        while (root != root[root]).any():
            root = root[root]
    return np.unique(root, return_inverse=True)[1]


def _tied(one: np.ndarray, two: np.ndarray, rows: np.ndarray, count: int, least: int) -> np.ndarray:
    """Return edges whose ends no cut under ``least`` parts; there are some where each vertex has that many rows around.

    The scan goes on with the vertex that most rows tie to those before it, or with any that ``least`` do.
    """
    tied = np.zeros(len(rows), bool)
    beside: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    for edge, (first, second, some) in enumerate(zip(one.tolist(), two.tolist(), rows.tolist(), strict=True)):
        beside[first].append((second, some, edge))
        beside[second].append((first, some, edge))
    reached, done = [0] * count, [False] * count
    queue = [(0, vertex) for vertex in range(count)]
    while queue:
        _, vertex = heappop(queue)
        if done[vertex]:
            continue
        done[vertex] = True
        for other, some, edge in beside[vertex]:
            if not done[other]:
                if reached[other] < least:
                    heappush(queue, (-min(reached[other] + some, least), other))
                reached[other] += some
                tied[edge] = reached[other] >= least
    return tied
