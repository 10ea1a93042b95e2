"""When a rank that says nothing counts as lost: not while it computes, or waits for a disk, or nobody can tell."""

import time

import pytest

from atoll.runtime.member import Member

SILENCE = 2.0


class Still:
    """A rank that says nothing, and has used so many seconds of processor."""

    orders = replies = -1
    rest = b""

    def __init__(self, used):
        self.used = used

    def computed(self):
        return self.used


def member(after):
    """One that was looked at 10 s ago, when it had used 100 s, and has used ``after`` of them by now."""
    one = Member(0, Still(after))
    one.heard, one.computed = time.monotonic() - 10, 100.0
    return one


@pytest.mark.parametrize(
    ("used", "lost"),
    [
        (100.0, True),
        (100.13, True),  # threads that wait for Python's lock look for it now and then
        (101.0, False),
        (140.0, False),
        (-1.0, False),  # it waits for a disk
        (None, False),  # nobody can tell
    ],
)
def test_who_says_nothing_and_computes_next_to_nothing_is_lost(used, lost):
    one = member(used)
    assert one.silent(SILENCE) is lost
    assert one.silent(SILENCE) is lost  # one that is not has as long again


def test_who_has_just_said_something_is_not_lost():
    one = member(100.0)
    one.heard = time.monotonic()
    assert not one.silent(SILENCE)


def test_who_has_not_begun_yet_is_not_lost():
    assert not Member(0, Still(0.0)).silent(SILENCE)
