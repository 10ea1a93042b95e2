"""Who is admitted over TLS while it lasts: renewal, the end of a certificate, revocation in the middle of anything."""

import threading
from datetime import timedelta

import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.gate import enrol
from atoll.boundary.identity import new_key, private_key, request
from atoll.boundary.line import HEAD
from atoll.errors import Denied, LinkLost
from atoll.spec.message import Release
from tests.unit.ends import WAIT, World, answer, frames, parcel, plain, progress, update, wanted
from tests.unit.papers import HOUR

pytestmark = pytest.mark.system


def test_a_renewed_certificate_keeps_what_is_open_and_is_used_from_the_next_dial_on(tmp_path):
    world = World("tls", tmp_path, life=timedelta(minutes=30))
    keyring = world.office.member()
    before = keyring.identity
    channel = world.open(before)
    send = world.desk.sends.get(timeout=WAIT)
    world.office.ahead = 25 * 60
    after = keyring.renew(lambda asked: enrol(world.server.address, before, asked))
    assert (after.key, after.peer, after.ends > before.ends) == (before.key, before.peer, True)
    world.office.ahead = 40 * 60  # by the hub's clock the first one is over
    world.server.recheck()
    send(Release(run="run"))
    assert channel.receive(WAIT) == Release(run="run")
    world.open(after).send(progress(2))
    assert world.desk.said.get(timeout=WAIT) == ("lyon", progress(2))
    world.close()


def test_a_session_ends_when_its_sites_latest_certificate_does(tls):
    identity = tls.office.member().identity
    channel = tls.open(identity)
    tls.office.ahead = 25 * HOUR
    tls.server.recheck()
    with pytest.raises(Denied, match="its certificate ran out"):
        channel.receive(WAIT)
    assert "its certificate ran out" in tls.desk.ends.get(timeout=WAIT)[1]
    with pytest.raises(Denied, match="its certificate ran out"):
        enrol(tls.server.address, identity, request(private_key(identity.key)))


def test_a_member_renews_no_other_key(tls):
    identity = tls.office.member().identity
    channel = tls.open(identity)
    with pytest.raises(Denied, match="a membership is one key"):
        enrol(tls.server.address, identity, request(new_key()))
    channel.send(progress(1))
    assert tls.desk.said.get(timeout=WAIT) == ("lyon", progress(1))


@pytest.mark.parametrize("verb", ["put", "get", "session"])
def test_a_connection_that_a_site_kept_opens_nothing_once_it_is_revoked(tls, verb):
    line = tls.line()
    word = {"verb": verb, "parcel": wanted().model_dump(mode="json")}
    line.say({**word, "verb": "get"})
    line.hear()
    assert plain(line.frames()) == []
    tls.office.members.revoked("lyon")
    kind, words = answer(line, word)
    assert (kind, "was revoked" in words) == (Denied, True)
    assert (tls.desk.taken, tls.desk.sends.empty()) == ([], True)


def test_a_recheck_leaves_whoever_is_admitted_and_whoever_is_about_to_join(tls):
    invited, member = tls.line(tls.office.invite("bonn").identity), tls.line()
    word = {"verb": "get", "parcel": wanted().model_dump(mode="json")}
    member.say(word)
    member.hear()
    assert plain(member.frames()) == []
    invited.say(word)
    with pytest.raises(Denied):
        invited.hear()
    tls.server.recheck()
    invited.say({"verb": "certify", "request": request(new_key()).decode()})
    assert invited.hear()["certificate"].startswith("-----BEGIN")
    member.say(word)
    assert member.hear()["size"] == 0
    for line in (invited, member):
        line.close()


def test_what_a_revoked_site_was_sending_is_not_taken(tls):
    channel, reached, go_on = tls.open(), threading.Event(), threading.Event()

    def slow():
        yield frames(1)[0]
        reached.set()
        go_on.wait(WAIT)
        yield from frames(3)

    said = []

    def sender():
        with pytest.raises((Denied, LinkLost)) as raised:
            channel.put(update(), lambda offset: slow())
        said.append(raised.value)

    thread = threading.Thread(target=sender)
    thread.start()
    assert reached.wait(WAIT)
    tls.office.members.revoked("lyon")
    go_on.set()
    thread.join(WAIT)
    assert isinstance(said[0], Denied)
    assert "revoked" in str(said[0])
    assert tls.desk.taken == []


def test_who_is_revoked_when_all_but_the_end_was_sent_has_sent_nothing(tls):
    came = threading.Event()

    def take(site, parcel, found):
        tls.desk.taken.append([came.set() for _ in found(0)])

    tls.desk.take = take
    line = tls.line()
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    line.write(HEAD.pack(1, 0, 0, 1) + b"d")
    assert came.wait(WAIT)
    tls.office.members.revoked("lyon")
    line.send([])
    with pytest.raises(Denied, match="was revoked"):
        line.hear()
    line.close()
    assert tls.desk.taken == []


def test_what_a_revoked_site_was_fetching_stops(tls):
    tls.desk.gives = [Frame(number, 1, bytes(1 << 20)) for number in range(40)]
    channel = tls.open()
    _, found = channel.get(wanted())
    next(found)
    tls.office.members.revoked("lyon")
    with pytest.raises(Denied, match="revoked"):
        plain(found)
