"""The Merkle tree: the reference vectors of Certificate Transparency, RFC 6962's own example, and its laws."""

import random
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.journal import tree

# The reference tree of certificate-transparency's merkle_tree_test: eight leaves and its root at each size.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# (leaf counted from 1, size) -> path
PATHS = {
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (3, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (2, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
# (old size, size) -> proof
PROOFS = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def grown(texts):
    """Return a tree's frontier, and the hashes it gave out by their place."""
    frontier, kept = tree.Frontier(), {}
    for number, text in enumerate(texts):
        for level, hashed in enumerate(frontier.append(tree.leaf(text))):
            kept[level, number >> level] = hashed
    return frontier, kept


def stored(texts):
    kept = grown(texts)[1]
    return lambda level, index: kept[level, index]


def defined(texts):
    """The root as RFC 6962 defines it, in its own words."""
    if not texts:
        return sha256(b"").digest()
    if len(texts) == 1:
        return sha256(b"\0" + texts[0]).digest()
    split = max(1 << bit for bit in range(32) if 1 << bit < len(texts))
    return sha256(b"\1" + defined(texts[:split]) + defined(texts[split:])).digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_the_roots_are_those_of_the_reference_tree(size):
    assert grown(LEAVES[:size])[0].root().hex() == ROOTS[size - 1]
    assert tree.root(size, stored(LEAVES)).hex() == ROOTS[size - 1]


def test_the_root_of_nothing_is_the_hash_of_nothing():
    assert tree.Frontier().root().hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(("place", "path"), PATHS.items())
def test_the_paths_are_those_of_the_reference_tree(place, path):
    number, size = place
    assert [step.hex() for step in tree.inclusion(number - 1, size, stored(LEAVES))] == path
    steps = [bytes.fromhex(step) for step in path]
    assert tree.includes(number - 1, size, tree.leaf(LEAVES[number - 1]), steps, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize(("sizes", "proof"), PROOFS.items())
def test_the_consistency_proofs_are_those_of_the_reference_tree(sizes, proof):
    old, size = sizes
    assert [step.hex() for step in tree.consistency(old, size, stored(LEAVES))] == proof
    steps = [bytes.fromhex(step) for step in proof]
    assert tree.extends(old, bytes.fromhex(ROOTS[old - 1]), size, bytes.fromhex(ROOTS[size - 1]), steps)


texts = st.lists(st.binary(max_size=4), min_size=1, max_size=70)


@given(texts)
def test_a_tree_that_grew_is_the_tree_that_rfc_6962_defines(given_texts):
    frontier = grown(given_texts)[0]
    assert frontier.root() == defined(given_texts)
    assert tree.Frontier.load(len(given_texts), stored(given_texts)).root() == defined(given_texts)


@given(texts, st.data())
def test_every_leaf_is_proven_and_no_other_text_place_or_path_is(given_texts, data):
    size = data.draw(st.integers(1, len(given_texts)))
    index = data.draw(st.integers(0, size - 1))
    root, hashed = defined(given_texts[:size]), tree.leaf(given_texts[index])
    path = tree.inclusion(index, size, stored(given_texts))
    assert tree.includes(index, size, hashed, path, root)
    assert not tree.includes(index, size, tree.leaf(b"another text"), path, root)
    assert not tree.includes(index, size, hashed, [*path, root], root)
    assert not tree.includes(size, size, hashed, path, root)
    assert not tree.includes(index, size, hashed, path, sha256(root).digest())
    assert size == 1 or not tree.includes(index, size, hashed, path[:-1], root)
    for number in range(len(path)):
        spoilt = [sha256(step).digest() if number == at else step for at, step in enumerate(path)]
        assert not tree.includes(index, size, hashed, spoilt, root)


@given(texts, st.data())
def test_a_tree_extends_each_that_it_grew_from_and_no_other(given_texts, data):
    size = len(given_texts)
    old = data.draw(st.integers(0, size))
    root, before = defined(given_texts), defined(given_texts[:old])
    proof = tree.consistency(old, size, stored(given_texts))
    assert tree.extends(old, before, size, root, proof)
    assert not tree.extends(old, before, size, root, [*proof, root])
    assert not tree.extends(old, sha256(before).digest(), size, root, proof)
    assert not tree.extends(size, root, size - 1, before, proof)
    if old not in (0, size):
        assert not tree.extends(old, before, size, sha256(root).digest(), proof)
        assert not tree.extends(old, before, size, root, proof[:-1])
        for number in range(len(proof)):
            spoilt = [sha256(step).digest() if number == at else step for at, step in enumerate(proof)]
            assert not tree.extends(old, before, size, root, spoilt)
        changed = list(given_texts)
        changed[old - 1] += b"!"
        forged = tree.consistency(old, size, stored(changed))
        assert not tree.extends(old, before, size, defined(changed), forged)


def test_a_tree_of_any_size_is_proven_with_few_lookups():
    seeded = random.Random(7)
    kept = grown([b"%d" % number for number in range(3000)])[1]
    asked = []

    def lookup(level, index):
        asked.append((level, index))
        return kept[level, index]

    for _ in range(50):
        old, size = sorted(seeded.sample(range(1, 3001), 2))
        asked.clear()
        tree.consistency(old, size, lookup)
        tree.inclusion(old - 1, size, lookup)
        assert len(asked) <= 4 * 12
