"""Secure sums, each party in turn: the sum is right with any who leave, and nobody is shown a single update."""

import hashlib
import itertools

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.errors import Corrupt, Denied
from atoll.outer.neighbours import degree, neighbours
from atoll.outer.secret import Circle, Party, ring_of, unmasking
from atoll.spec.secret import Agreed, Terms, fewest

SIZE = 1000
rng = np.random.default_rng(7)


class World:
    """Sites with signing keys and updates, and a hub that passes on what they say."""

    def __init__(self, count, attempt=0, least=1):
        self.names = [f"site-{number:03}" for number in range(count)]
        self.signing = {name: Ed25519PrivateKey.generate() for name in self.names}
        known = {"run": "r1", "position": 2, "attempt": attempt, "bound": 1.0, "heaviest": 64, "least": least}
        self.terms = Terms(sites=tuple(self.names), **known)
        self.ring = ring_of(self.terms)
        self.updates = {name: rng.uniform(-1, 1, SIZE).astype(np.float32) for name in self.names}
        self.weights = {name: int(rng.integers(1, 65)) for name in self.names}
        self.parties = {name: self.party(name) for name in self.names}

    def party(self, name, before=()):
        return Party(self.terms, name, f"key-of-{name}", self.signing[name].sign, self.verify, before)

    def verify(self, site, signer, said, signature):
        assert signer == f"key-of-{site}"
        try:
            self.signing[site].public_key().verify(signature, said)
        except InvalidSignature:
            raise Denied(f"{site}: signature") from None

    def plain(self, name):
        return self.ring.lifted(self.updates[name], self.weights[name])

    def masked(self, name, masks):
        words = self.plain(name)
        for first in range(0, words.size, 160):  # in any windows
            masks.apply(first, words[first : first + 160])
        return words

    def begun(self, without=()):
        """Return the circle, and what each site is dealt."""
        keys = [self.parties[name].keys() for name in self.names if name not in without]
        self.dealt = {one.site: self.parties[one.site].deal(keys) for one in keys}
        return Circle.of(self.terms, keys)

    def inbox(self, name, dealers):
        return {d: self.dealt[d].sealed[name] for d in dealers if name in self.dealt[d].sealed}


def mean(world, names):
    total = sum(world.weights[name] for name in names)
    return sum(world.weights[name] * world.updates[name].astype(np.float64) for name in names) / total


def opened(world, circle, dealers, there, openers):
    sums = np.zeros(SIZE, np.uint32)
    for name in dealers:
        words = world.masked(name, world.parties[name].mask(world.inbox(name, dealers)))
        if name in there:
            sums += words
    agreed = [world.parties[name].agree(there) for name in there if name in openers]
    shown = [world.parties[name].unseal(agreed) for name in there if name in openers]
    unmasking(circle, dealers, there, shown).apply(0, sums)
    weight = sum(world.weights[name] for name in there)
    return world.ring.lowered(sums) * world.terms.heaviest / weight


@pytest.mark.parametrize(
    ("count", "no_keys", "no_shares", "no_update", "no_opening"),
    [
        (3, 0, 0, 0, 0),
        (4, 1, 0, 0, 0),
        (5, 0, 1, 0, 0),
        (6, 0, 0, 2, 0),
        (6, 0, 0, 0, 2),
        (12, 1, 1, 1, 1),
        (60, 2, 1, 1, 1),
        (100, 0, 3, 4, 3),
    ],
)
def test_the_sum_is_right_whoever_leaves_at_each_stage(count, no_keys, no_shares, no_update, no_opening):
    world = World(count)
    left = list(world.names)
    gone = [left.pop(0) for _ in range(no_keys)]
    circle = world.begun(gone)
    gone = [left.pop(1) for _ in range(no_shares)]
    dealers = [name for name in circle.keys if name not in gone]
    gone = [left.pop(-1) for _ in range(no_update)]
    there = [name for name in dealers if name not in gone]
    openers = left[no_opening:]
    found = opened(world, circle, dealers, there, openers)
    assert np.abs(found - mean(world, there)).max() < 1e-4


def test_what_a_hub_sees_of_a_site_is_not_its_update():
    world = World(5)
    world.begun()
    name = world.names[0]
    words = world.masked(name, world.parties[name].mask(world.inbox(name, world.names)))
    plain = world.plain(name)
    assert (words != plain).mean() > 0.99
    guessed = world.ring.lowered(words)
    assert abs(np.corrcoef(guessed, world.updates[name])[0, 1]) < 0.2
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.02


def test_a_hub_cannot_have_both_secrets_of_a_site():
    world = World(6)
    circle = world.begun()
    for name in world.names:
        world.parties[name].mask(world.inbox(name, world.names))
    others = world.names[1:]
    # One half is told that the victim stayed, and the other that it left: neither list has signatures enough.
    stayed = [world.parties[name].agree(world.names) for name in others[:3]]
    left = [world.parties[name].agree(others) for name in others[3:]]
    for name, signed in [(others[0], stayed), (others[3], left), (others[0], [*stayed, *left])]:
        with pytest.raises(Denied, match=r"(too few sites have signed|signature)"):
            world.parties[name].unseal(signed)
    for name in others[:3]:
        with pytest.raises(Denied, match="two lists of whose updates are there"):
            world.parties[name].agree(others)
    # With one list nobody opens the victim's key, and so its masks with others are not told.
    whole = World(6)
    circle = whole.begun()
    for name in whole.names:
        whole.parties[name].mask(whole.inbox(name, whole.names))
    agreed = [whole.parties[name].agree(whole.names) for name in whole.names]
    shown = [whole.parties[name].unseal(agreed) for name in whole.names]
    assert all(not one.masking for one in shown)
    assert all(set(one.own) == set(whole.names) for one in shown)
    assert circle.threshold == 4


def test_signatures_of_others_or_for_another_sum_do_not_count():
    world, other = World(4), World(4, attempt=1)
    other.signing = world.signing
    for each in (world, other):
        each.parties = {name: each.party(name) for name in each.names}
        each.begun()
        for name in each.names:
            each.parties[name].mask(each.inbox(name, each.names))
    party = world.parties[world.names[0]]
    party.agree(world.names)
    stale = [other.parties[name].agree(other.names) for name in other.names]
    with pytest.raises(Denied, match="too few sites have signed"):
        party.unseal(stale)
    with pytest.raises(Denied, match="too few sites have signed"):
        party.unseal([Agreed(site="stranger", signature="00" * 64)])
    again = world.party(world.names[0])
    with pytest.raises(Denied, match="signature"):
        again.deal([again.keys(), *(other.parties[name].keys() for name in other.names[1:])])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda keys: keys[1:], "own keys are not among"),
        (lambda keys: [*keys, keys[1]], "twice of one"),
        (lambda keys: keys[:2], "2 of 4 sites are there, and 3 hide each other"),
        (lambda keys: [*keys[:3], keys[3].model_copy(update={"site": "stranger"})], "not asked"),
        (lambda keys: [*keys[:3], keys[3].model_copy(update={"masking": "00" * 32})], "signature"),
        (lambda keys: [keys[0].model_copy(update={"own": keys[1].own}), *keys[1:]], "own keys are not among"),
    ],
)
def test_keys_that_are_not_the_sites_own_are_refused(change, words):
    world = World(4)
    keys = [world.parties[name].keys() for name in world.names]
    with pytest.raises(Denied, match=words):
        world.parties[world.names[0]].deal(change(keys))


def test_no_step_is_told_two_things():
    world = World(5)
    keys = [world.parties[name].keys() for name in world.names]
    party = world.parties[world.names[0]]
    dealt = party.deal(keys)
    assert party.deal(list(reversed(keys))) == dealt
    with pytest.raises(Denied, match="two lists of the sites' keys"):
        party.deal(keys[:4])
    world.begun()
    party.mask(world.inbox(world.names[0], world.names))
    with pytest.raises(Denied, match="two lists of who dealt shares"):
        party.mask(world.inbox(world.names[0], world.names[:-1]))


@pytest.mark.parametrize("count", [7, 10, 50, 100])
def test_no_site_shows_itself_in_a_circle_of_few(count):
    world = World(count)
    keys = [world.parties[name].keys() for name in world.names]
    for few in (3, fewest(count) - 1):
        with pytest.raises(Denied, match=rf"^secure sum: {few} of {count} sites are there, and {fewest(count)} hide"):
            world.parties[world.names[0]].deal(keys[:few])
    circle = Circle.of(world.terms, keys[: fewest(count)])
    assert circle.threshold == degree(count).threshold, "whoever is shown: two circles must not both open a secret"


def test_a_site_that_was_shown_another_list_of_dealers_signs_for_no_update_that_lacks_its_mask():
    world = World(10)
    world.begun()
    first, rest = world.names[0], world.names[1:]
    dealers = rest[:6]  # and the first itself: enough to be told to mask
    world.parties[first].mask(world.inbox(first, dealers))
    for name in rest:
        world.parties[name].mask(world.inbox(name, world.names))
    with pytest.raises(Denied, match="an update is there whose site dealt this one no shares"):
        world.parties[first].agree([first, *rest[3:]])
    other = World(4)
    other.begun()
    with pytest.raises(Denied, match="an update is there whose site dealt this one no shares"):
        other.parties[first].agree(other.names)  # before any inbox


def test_too_few_updates_are_not_signed_for_and_so_much_noise_as_was_asked_for_is_in_a_sum():
    world = World(6)
    world.begun()
    name = world.names[0]
    world.parties[name].mask(world.inbox(name, world.names))
    with pytest.raises(Denied, match=r"^secure sum: 3 of 6 updates are there, and 4 hide each other"):
        world.parties[name].agree(world.names[:3])
    noised = World(6, least=6)
    keys = [noised.parties[name].keys() for name in noised.names]
    with pytest.raises(Denied, match=r"^secure sum: 5 of 6 sites are there, and 6 hide each other"):
        noised.parties[name].deal(keys[:5])
    noised.begun()
    noised.parties[name].mask(noised.inbox(name, noised.names))
    with pytest.raises(Denied, match=r"^secure sum: 5 of 6 updates are there, and 6 hide each other"):
        noised.parties[name].agree(noised.names[:5])
    assert noised.parties[name].agree(noised.names)


def test_of_updates_whose_sum_was_opened_no_other_one_is_masked_or_signed_for():
    opened = "another sum of these updates was opened"
    world = World(6)
    name = world.names[0]
    world.parties[name] = world.party(name, world.names[:5])
    keys = [world.parties[one].keys() for one in world.names]
    with pytest.raises(Denied, match=opened):
        world.parties[name].deal([*keys[:4], keys[5]])
    world.begun()
    with pytest.raises(Denied, match=opened):
        world.parties[name].mask(world.inbox(name, world.names[:4]))
    world.parties[name].mask(world.inbox(name, world.names))
    with pytest.raises(Denied, match=opened):
        world.parties[name].agree(world.names)
    assert world.parties[name].agree(world.names[:5])


def test_no_step_is_taken_before_its_turn():
    world = World(4)
    party = world.parties[world.names[0]]
    for step in (lambda: party.mask({}), lambda: party.agree(world.names), lambda: party.unseal([])):
        with pytest.raises(Denied, match="secure sum: the sites' keys are not here yet"):
            step()
    world.begun()
    with pytest.raises(Denied, match="nobody has said whose updates are there"):
        party.unseal([])


def test_too_few_neighbours_or_what_they_did_not_seal_stops_a_site():
    world = World(6)
    world.begun()
    name = world.names[0]
    inbox = world.inbox(name, world.names)
    with pytest.raises(Denied, match="too few to hide an update"):
        world.parties[name].mask(dict(itertools.islice(inbox.items(), 2)))
    swapped = dict(zip(inbox, reversed(inbox.values()), strict=True))
    with pytest.raises(Corrupt, match="is not that; nothing was sent"):
        world.parties[name].mask(swapped)
    with pytest.raises(Denied, match="no neighbour"):
        world.parties[name].mask({**inbox, "stranger": inbox[world.names[1]]})


def test_shares_that_are_too_few_or_of_something_else_lose_the_sum_in_a_sentence():
    world = World(6)
    circle = world.begun()
    for name in world.names:
        world.parties[name].mask(world.inbox(name, world.names))
    there = world.names[:5]
    agreed = [world.parties[name].agree(there) for name in there]
    shown = [world.parties[name].unseal(agreed) for name in there]
    with pytest.raises(Corrupt, match=r"^shares: 3 are there, and 4 give a secret back"):
        unmasking(circle, world.names, there, shown[:3])
    false = [one.model_copy(update={"own": {site: "00" * 66 for site in one.own}}) for one in shown[:1]]
    with pytest.raises(Corrupt, match=r"not of one secret|own mask are not what it announced"):
        unmasking(circle, world.names, there, [*false, *shown[1:]])
    false = [one.model_copy(update={"masking": {site: "00" * 66 for site in one.masking}}) for one in shown[:1]]
    with pytest.raises(Corrupt, match=r"not of one secret|key are not what it announced"):
        unmasking(circle, world.names, there, [*false, *shown[1:]])


@pytest.mark.parametrize("sites", [51, 64, 100, 1000])
def test_many_sites_have_few_neighbours_and_as_many_holders_as_two_lists_would_need(sites):
    found = degree(sites)
    assert found.neighbours % 2 == 0
    assert found.neighbours < sites / 2
    assert 2 * found.threshold > found.neighbours + 1
    assert degree(50).neighbours == 49


def test_two_lists_of_enough_sites_have_more_sites_in_common_than_may_be_hostile():
    for sites in range(3, 300):
        asked, common = degree(sites), 2 * fewest(sites) - sites
        hostile = 2 * asked.threshold - asked.neighbours - 2 if asked.neighbours == sites - 1 else sites // 10
        assert common > hostile, sites
        assert 3 <= fewest(sites) <= sites
        assert fewest(sites) >= asked.threshold


def test_a_graph_is_drawn_slowly_and_the_same_for_all():
    names = [f"site-{number}" for number in range(60)]
    near = neighbours(names, b"seed", 20)
    assert near == neighbours(names[::-1], b"seed", 20)
    assert near != neighbours(names, b"other", 20)
    for name, others in near.items():
        assert len(set(others)) == 20
        assert name not in others
        assert all(name in near[other] for other in others)
    # To try one seed more costs 50 ms and 16 MiB.
    drawn = hashlib.scrypt(b"seed", salt=b"atoll secure sum", n=2**14, r=8, p=1)
    circle = sorted(names, key=lambda name: hashlib.sha256(drawn + b"\0" + name.encode()).digest())
    assert circle[1] in near[circle[0]]
    assert circle[11] not in near[circle[0]]
