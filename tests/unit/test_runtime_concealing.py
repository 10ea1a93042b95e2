"""A site's part in secure sums, by the hub's words: what it says, of which update its masks are, what it has opened."""

import pytest

from atoll.errors import Corrupt, Denied, LinkLost
from atoll.journal.key import Key
from atoll.outer.secret import Party
from atoll.runtime.concealing import Concealing, terms_of
from atoll.runtime.peers import Peers, check_signed
from atoll.spec.message import Assign, SumTold
from atoll.spec.secret import Everyone, Inbox, Signed, There
from tests.unit.runs import train_job

NAMES = ("ada", "bob", "cyd", "dee")
WIRE = [{"kind": "clip", "value": 1.0}, {"kind": "mask"}]


class Three:
    """Sites that hear of sums as their agents do."""

    def __init__(self, tmp_path):
        self.home, self.said, self.sites = tmp_path, [], {}
        self.keys = {name: Key.new(name) for name in NAMES}
        for name in NAMES:
            (tmp_path / name / "runs" / "run").mkdir(parents=True)  # as an errand does
            self.start(name)

    def start(self, name):
        """Start a site's agent, again with nothing but what is on its disk."""
        home = self.home / name
        self.sites[name] = Concealing(name, self.keys[name], Peers(home), home / "runs", self.said.append)

    def begun(self, epoch, **sync):
        self.said.clear()
        for site in self.sites.values():
            site.begin(assigned(epoch, **sync))

    def summed(self, epoch, there, **sync):
        """Have a round's sum opened as a hub does; return who opened it."""
        self.begun(epoch, **sync)
        self.tell(epoch, Everyone(keys=self.words("keys")))
        dealt = self.words("dealt")
        for name in NAMES:
            inbox = {one.site: one.sealed[name] for one in dealt if name in one.sealed}
            self.tell(epoch, Inbox(sealed=inbox), name)
        self.tell(epoch, There(sites=there), *there)
        self.tell(epoch, Signed(agreed=self.words("agreed")), *there)
        return {one.site for one in self.words("unsealed")}

    def tell(self, epoch, told, *names):
        for name in names or NAMES:
            self.sites[name].heard(SumTold(run="run", position=1, attempt=epoch, told=told))

    def words(self, kind):
        return tuple(one.said for one in self.said if one.said.kind == kind)


def assigned(epoch, together=NAMES, **more):
    sync = {"preset": "fedavg", "period": 3, "wire": WIRE, **more}
    place = {"run": "run", "epoch": epoch, "position": 1, "work": "train"}
    return Assign.model_validate({**place, "job": train_job(), "sync": sync, "together": together})


QUORUM = {"wait": {"kind": "quorum", "count": 3}}


def test_a_site_opens_one_sum_of_its_update_and_no_other(tmp_path):
    world = Three(tmp_path)
    assert world.summed(0, NAMES, **QUORUM) == set(NAMES)
    assert world.summed(1, NAMES, **QUORUM) == set(NAMES), "the same one again, for a hub that began anew"
    assert world.summed(2, NAMES[:3], **QUORUM) == set(), "what the two differ in is the fourth's own update"
    for name in NAMES:
        world.start(name)
    assert world.summed(3, NAMES[:3], **QUORUM) == set(), "also by agents that started again"
    for name, site in world.sites.items():
        site.drop("run")
        (tmp_path / name / "runs" / "run" / "opened-1.json").unlink()  # with its folder
    assert world.summed(4, NAMES[:3], **QUORUM) == set(NAMES[:3]), "another run of that name"


def test_no_update_leaves_for_a_sum_that_is_not_the_one_which_was_opened(tmp_path):
    world = Three(tmp_path)
    assert world.summed(0, NAMES, **QUORUM) == set(NAMES)
    world.start("ada")
    world.begun(1, **QUORUM)
    terms = terms_of("run", 1, 1, NAMES, assigned(1, **QUORUM).sync, train_job())
    few = tuple(one for one in world.words("keys") if one.site != "dee")
    world.tell(1, Everyone(keys=few), "ada")
    with pytest.raises(Denied, match=r"^ada refuses: secure sum: another sum of these updates was opened"):
        world.sites["ada"].masks(terms, "update", lambda: True)
    assert world.words("dealt") == ()


def test_a_list_of_what_was_opened_that_cannot_be_read_or_written_opens_nothing(tmp_path):
    world = Three(tmp_path)
    file = tmp_path / "ada" / "runs" / "run" / "opened-1.json"
    file.mkdir()  # nothing can be written there
    with pytest.raises(Corrupt, match=r"opened-1.json: cannot be read, and so no other sum is begun"):
        world.sites["ada"].begin(assigned(0))
    file.rmdir()
    world.begun(0)
    file.parent.rmdir()
    world.said.clear()
    assert world.summed(0, NAMES) == set(NAMES) - {"ada"}


def test_masks_are_of_one_update_and_another_one_has_the_sum_begun_anew(tmp_path):
    world, terms = Three(tmp_path), terms_of("run", 1, 0, NAMES, assigned(0).sync, train_job())
    world.begun(0)
    world.tell(0, Everyone(keys=world.words("keys")))
    for name in NAMES:
        inbox = {one.site: one.sealed[name] for one in world.words("dealt") if name in one.sealed}
        world.tell(0, Inbox(sealed=inbox), name)
    ada, before = world.sites["ada"], world.words("keys")
    first, name = ada.masks(terms, "first", lambda: True)
    assert ada.masks(terms, "first", lambda: True) == (first, name), "after a lost link the same bytes go on"
    world.said.clear()
    with pytest.raises(LinkLost, match="not asked for any more"):
        ada.masks(terms, "second", once())
    (anew,) = world.words("keys")
    assert anew.site == "ada"
    assert anew.masking not in {one.masking for one in before}
    assert anew.own not in {one.own for one in before}
    with pytest.raises(LinkLost, match="not asked for any more"):  # nor does the first one get its masks back
        ada.masks(terms, "first", once())


def once():
    """Return a question that is answered yes, and from then on no."""
    answers = iter([True])
    return lambda: next(answers, False)


def test_a_quorum_of_more_than_are_asked_has_no_sum_with_all_its_noise(tmp_path):
    world = Three(tmp_path)
    with pytest.raises(Denied, match=r"^ada refuses: wait.count: 5: each adds its part of the noise, and 4 sites are"):
        world.sites["ada"].begin(assigned(0, wait={"kind": "quorum", "count": 5}))
    assert world.said == []


def test_what_failed_for_the_disk_is_tried_again_and_a_strange_name_is_refused_before_any_share(tmp_path):
    world = Three(tmp_path)
    world.begun(0)
    keys, ada, file = world.words("keys"), world.sites["ada"], tmp_path / "ada" / "sites.json"
    file.mkdir()  # nothing can be written there
    world.tell(0, Everyone(keys=keys), "ada")
    terms = terms_of("run", 1, 0, NAMES, assigned(0).sync, train_job())
    with pytest.raises(Corrupt, match=r"sites.json: the other sites' keys cannot be read"):
        ada.masks(terms, "update", lambda: True)
    world.tell(0, Inbox(sealed={}), "ada")  # of a sum that failed here no word is taken
    file.rmdir()
    assert ada.begin(assigned(0)) == terms
    world.tell(0, Everyone(keys=keys), "ada")
    assert [one.site for one in world.words("dealt")] == ["ada"]
    made = Key.new("dee")
    ghost = Party(terms, "dee", str(made.public), made.sign, check_signed).keys()
    world.said.clear()
    world.start("ada")
    ada = world.sites["ada"]
    ada.begin(assigned(0))
    world.tell(0, Everyone(keys=(*world.words("keys"), *keys[1:3], ghost)), "ada")
    with pytest.raises(Denied, match=r"^ada refuses: secure sum: dee signs with another key than before"):
        ada.masks(terms, "update", lambda: True)
    assert world.words("dealt") == ()


@pytest.mark.parametrize("together", [("bob", "cyd", "dee"), ("ada", "bob"), ("ada", "bob", "bob"), ()])
def test_a_site_says_nothing_where_it_would_not_be_hidden(tmp_path, together):
    world = Three(tmp_path)
    with pytest.raises(Denied, match=r"^ada refuses: wire: mask: among \d sites nothing is hidden"):
        world.sites["ada"].begin(assigned(0, together))
    assert world.said == []


def test_who_waits_for_masks_hears_what_went_wrong_or_that_nobody_asks_for_them_any_more(tmp_path):
    world = Three(tmp_path)
    terms = world.sites["ada"].begin(assigned(0))
    with pytest.raises(LinkLost, match="it is not asked for any more"):
        world.sites["ada"].masks(terms, "update", lambda: False)
    world.tell(0, Everyone(keys=world.words("keys")), "ada")
    with pytest.raises(Denied, match=r"^ada refuses: secure sum: 1 of 4 sites are there"):
        world.sites["ada"].masks(terms, "update", lambda: True)
    world.sites["ada"].begin(assigned(1))
    with pytest.raises(LinkLost, match="it is not asked for any more"):
        world.sites["ada"].masks(terms, "update", lambda: True)
