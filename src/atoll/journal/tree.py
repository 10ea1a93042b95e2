"""The Merkle tree over a journal's entries (RFC 6962, section 2.1): roots, and proofs that need no journal to check.

A leaf is an entry's text, a leaf's hash SHA-256(0x00 || text), a node's SHA-256(0x01 || left || right), so that no node
can be passed off as an entry. Subtrees that are complete never change again. A journal keeps the hash of each of them:
an append costs one hash more than its own on average, and any proof at most two lookups for each level.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256

EMPTY = sha256(b"").digest()  # the root of no entries
# (level, index) -> the hash of the complete subtree over the leaves from index << level on, 1 << level of them
Stored = Callable[[int, int], bytes]


def leaf(text: bytes) -> bytes:
    return sha256(b"\x00" + text).digest()


def node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """A tree that only grows, by the roots of its complete subtrees, largest first: at most one for each level."""

    def __init__(self, size: int = 0, peaks: Sequence[bytes] = ()) -> None:
        self.size = size
        self._peaks = list(peaks)

    @staticmethod
    def load(size: int, stored: Stored) -> "Frontier":
        """Return the tree of the first ``size`` leaves; one lookup for each bit that is set in it."""
        levels = [level for level in reversed(range(size.bit_length())) if size >> level & 1]
        return Frontier(size, [stored(level, (size >> level) - 1) for level in levels])

    def copy(self) -> "Frontier":
        return Frontier(self.size, self._peaks)

    def append(self, hashed: bytes) -> list[bytes]:
        """Add a leaf's hash; return those of the complete subtrees that end with it, the leaf's own first."""
        ended, rest, peaks = [hashed], self.size, self._peaks
        while rest & 1:
            hashed = sha256(b"\x01" + peaks.pop() + hashed).digest()
            ended.append(hashed)
            rest >>= 1
        peaks.append(hashed)
        self.size += 1
        return ended

    def root(self) -> bytes:
        if not self._peaks:
            return EMPTY
        root = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            root = node(peak, root)
        return root


def root(size: int, stored: Stored) -> bytes:
    """Return the root over the first ``size`` leaves."""
    return Frontier.load(size, stored).root()


def inclusion(index: int, size: int, stored: Stored) -> list[bytes]:
    """Return the proof that leaf ``index`` (from 0) is in the tree of ``size`` leaves: PATH of RFC 6962, 2.1.1."""
    assert 0 <= index < size, "a leaf of the tree"
    first, end, path = 0, size, list[bytes]()
    while end - first > 1:
        split = first + _split(end - first)
        if index < split:
            path.append(_subtree(split, end, stored))
            end = split
        else:
            path.append(_subtree(first, split, stored))
            first = split
    return path[::-1]


def consistency(old: int, size: int, stored: Stored) -> list[bytes]:
    """Return the proof that the tree of ``size`` leaves begins with that of ``old``: PROOF of RFC 6962, 2.1.2."""
    assert 0 <= old <= size, "a tree is consistent with later ones"
    if old in (0, size):
        return []
    first, end, path = 0, size, list[bytes]()
    while end != old:
        split = first + _split(end - first)
        if old <= split:
            path.append(_subtree(split, end, stored))
            end = split
        else:
            path.append(_subtree(first, split, stored))
            first = split
    if first:  # else the old tree is the one that the verifier has
        path.append(_subtree(first, end, stored))
    return path[::-1]


def includes(index: int, size: int, hashed: bytes, path: Sequence[bytes], root: bytes) -> bool:
    """Tell whether the path proves this leaf's hash at ``index`` under ``root`` (RFC 9162, section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    here, last = index, size - 1
    for step in path:
        if last == 0:
            return False
        if here & 1 or here == last:
            hashed = node(step, hashed)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            hashed = node(hashed, step)
        here, last = here >> 1, last >> 1
    return last == 0 and hashed == root


def extends(old: int, old_root: bytes, size: int, root: bytes, path: Sequence[bytes]) -> bool:
    """Tell whether the path proves that the tree under ``root`` begins with the one under ``old_root`` (RFC 9162,
    section 2.1.4.2). Every tree begins with the empty one."""
    if not 0 <= old <= size:
        return False
    if old in (0, size):
        return not path and old_root == (EMPTY if old == 0 else root)
    steps = list(path) if old & (old - 1) else [old_root, *path]
    if not steps:
        return False
    here, last = old - 1, size - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    before = now = steps[0]
    for step in steps[1:]:
        if last == 0:
            return False
        if here & 1 or here == last:
            before, now = node(step, before), node(step, now)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            now = node(now, step)
        here, last = here >> 1, last >> 1
    return last == 0 and before == old_root and now == root


def _split(count: int) -> int:
    """Return the largest power of two below a count of leaves: so many are on the left."""
    return 1 << (count - 1).bit_length() - 1


def _subtree(first: int, end: int, stored: Stored) -> bytes:
    """Return the hash over leaves ``first`` to ``end``, a subtree of some tree: begun where its size divides."""
    count = end - first
    if not count & (count - 1):
        level = count.bit_length() - 1
        return stored(level, first >> level)
    split = first + _split(count)
    return node(_subtree(first, split, stored), _subtree(split, end, stored))
