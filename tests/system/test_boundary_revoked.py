"""A site that is revoked while it holds still is cut off, with no frame of it to wait for."""

import threading

import pytest

from atoll.errors import Denied, LinkLost
from tests.unit.ends import WAIT, World, frames, update

pytestmark = pytest.mark.system


def test_a_revoked_site_that_holds_still_is_cut_off(tmp_path):
    tls = World("tls", tmp_path)
    reached = threading.Event()
    identity = tls.office.member().identity

    def still():
        yield frames(1)[0]
        reached.set()
        stop.wait(WAIT)

    stop, ended = threading.Event(), threading.Event()

    def take(site, parcel, found):
        try:
            list(found(0))
        finally:
            ended.set()

    tls.desk.take = take
    channel = tls.open(identity)

    def sender():
        with pytest.raises((Denied, LinkLost)):
            channel.put(update(), lambda offset: still())

    thread = threading.Thread(target=sender)
    thread.start()
    assert reached.wait(WAIT)
    tls.office.members.revoked("lyon")
    tls.server.recheck()
    assert ended.wait(WAIT)
    with pytest.raises(Denied, match="was revoked"):
        channel.receive(WAIT)
    stop.set()
    thread.join(WAIT)
    assert not thread.is_alive()
    tls.close()
