"""By which keys sites know each other: those of the first sum at first sight, all later ones by the owner's word."""

import json
import logging

import pytest
from typer.testing import CliRunner

from atoll.console.cli import app
from atoll.errors import Corrupt, Denied, Invalid
from atoll.journal.key import Key
from atoll.runtime.peers import FILE, Peer, Peers, check_signed

KEYS = {name: Key.new(name) for name in ("ada", "bob", "cyd", "paris", "rome")}
SIGNERS = {name: str(key.public) for name, key in KEYS.items()}
MARKS = {name: Peer(signer, "confirmed").fingerprint for name, signer in SIGNERS.items()}
FIRST = ("ada", "bob", "cyd")


def signers(*names):
    return {name: SIGNERS[name] for name in names}


@pytest.fixture
def peers(tmp_path):
    """Peers of a site whose first sum was with three others, of whom cyd was late."""
    made = Peers(tmp_path)
    made.meet(FIRST, signers("ada", "bob"))
    return made


def test_what_a_site_has_not_signed_is_not_its_word():
    key, other = KEYS["ada"], Key.new("ada")
    check_signed("ada", str(key.public), b"text", key.sign(b"text"))
    for signer, signature in (
        (str(key.public), key.sign(b"other")),
        (str(other.public), key.sign(b"text")),
        (SIGNERS["bob"], KEYS["bob"].sign(b"text")),
        ("no key", key.sign(b"text")),
    ):
        with pytest.raises(Denied, match=r"said to be of ada is not signed by it"):
            check_signed("ada", signer, b"text", signature)


def test_who_is_in_the_first_sum_is_believed_at_first_sight_and_told_of(tmp_path, caplog):
    peers = Peers(tmp_path)
    with caplog.at_level(logging.WARNING):
        peers.meet(FIRST, signers("ada", "bob"))
    assert [f"atoll/{name}/{MARKS[name]}" in caplog.text for name in FIRST] == [True, True, False]
    caplog.clear()
    peers.meet(FIRST, signers("ada", "bob"))
    assert caplog.text == ""
    peers.meet(FIRST, signers("ada", "cyd"))
    assert f"cyd is seen for the first time, as atoll/cyd/{MARKS['cyd']}" in caplog.text
    assert peers.known() == {name: Peer(SIGNERS[name], "first seen") for name in FIRST}


def test_a_name_that_comes_later_is_refused_until_its_owner_is_asked(peers, caplog):
    words = rf"^secure sum: paris is new here \(so do 1 others\); .* say: atoll site confirm paris {MARKS['paris']}$"
    for _ in range(2):
        with pytest.raises(Denied, match=words):
            peers.meet(("ada", "paris", "rome"), signers("ada", "paris", "rome"))
    assert f"rome is not believed: it signs as atoll/rome/{MARKS['rome']}" in caplog.text
    assert peers.known()["rome"] == Peer(SIGNERS["rome"], "refused")
    peers.confirm("rome", MARKS["rome"])
    peers.meet(FIRST, signers("ada", "rome"))
    assert peers.known()["rome"] == Peer(SIGNERS["rome"], "confirmed")
    with pytest.raises(Denied, match="paris is new here; "):
        peers.meet(FIRST, signers("ada", "paris"))


def test_of_names_that_are_made_up_only_the_newest_are_kept(peers):
    for number in range(3):
        name = f"ghost-{number}"
        with pytest.raises(Denied, match=f"{name} is new here"):
            peers.meet(FIRST, {name: str(Key.new(name).public)})
    assert [name for name, peer in peers.known().items() if peer.standing == "refused"] == ["ghost-2"]


def test_another_key_of_a_known_name_is_refused_until_it_is_confirmed(peers):
    other = str(Key.new("bob").public)
    mark = Peer(other, "confirmed").fingerprint
    with pytest.raises(
        Denied, match=rf"bob signs with another key than before; .* say: atoll site confirm bob {mark}$"
    ):
        peers.meet(FIRST, {"bob": other})
    assert peers.known()["bob"] == Peer(SIGNERS["bob"], "first seen")
    peers.confirm("bob", mark)
    peers.meet(FIRST, {"bob": other})
    assert peers.known()["bob"] == Peer(other, "confirmed")
    with pytest.raises(Denied, match="bob signs with another key than before"):
        peers.meet(FIRST, signers("bob"))


def test_an_owner_who_confirms_ahead_of_the_first_sum_believes_nobody_else(tmp_path):
    peers = Peers(tmp_path)
    peers.confirm("ada", f"atoll/ada/{MARKS['ada']}")
    with pytest.raises(Denied, match="bob is new here"):
        peers.meet(FIRST, signers("ada", "bob"))
    peers.confirm("bob", SIGNERS["bob"])
    peers.meet(FIRST, signers("ada", "bob"))
    assert peers.known() == {name: Peer(SIGNERS[name], "confirmed") for name in ("ada", "bob")}
    with pytest.raises(Denied, match="ada signs with another key than before"):
        peers.meet(FIRST, {"ada": str(Key.new("ada").public)})
    for wrong in ("", "12", MARKS["ada"].upper() + "x", "../../etc"):
        with pytest.raises(Invalid, match=r"^fingerprint: .* is none; it is 16 of 0-9 and a-f$"):
            peers.confirm("ada", wrong)


def test_one_sum_of_many_is_one_write(tmp_path, peers):
    file = tmp_path / FILE
    before = file.stat().st_ino
    peers.meet(FIRST, signers(*FIRST))
    after = file.stat().st_ino
    peers.meet(FIRST, signers(*FIRST))
    assert (before != after, file.stat().st_ino) == (True, after), "written where something is new, and then once"


@pytest.mark.parametrize("text", ["{", "[]", '{"ada": "key"}', '{"ada": {"key": "k", "standing": "friend"}}'])
def test_a_file_that_cannot_be_read_is_told_and_nobody_is_believed(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(Corrupt, match=r"sites.json: the other sites' keys cannot be read: .* is wrong; mend it"):
        Peers(tmp_path).meet(FIRST, signers("ada"))


def test_an_owner_lists_and_confirms_by_commands(tmp_path):
    run = CliRunner().invoke
    home = ["--home", str(tmp_path)]
    assert run(app, [*home, "site", "add", "lyon"]).exit_code == 0
    peers = Peers(tmp_path / "sites" / "lyon")
    peers.meet(FIRST, signers("ada", "bob"))
    assert run(app, [*home, "site", "confirm", "ada", MARKS["ada"]]).exit_code == 0
    found = run(app, [*home, "site", "peers", "--json"])
    rows = {row["name"]: (row["fingerprint"], row["standing"]) for row in json.loads(found.stdout)}
    assert rows.pop("lyon")[1] == "this site"
    assert rows == {
        "ada": (MARKS["ada"], "confirmed"),
        "bob": (MARKS["bob"], "first seen"),
        "cyd": ("not yet seen", "first seen"),
    }
