"""Links with a rate and a round trip, as the benchmarks use them: never faster than they say, and nothing but them."""

import struct
import subprocess
from collections.abc import Iterator

import pytest
from shaped import CannotShape, Links, Shape, links
from shaped.relay import Lane, on_wire

pytestmark = pytest.mark.system
SHAPE = Shape(mbit=40, round_trip=0.02)


def test_packets_leave_one_after_the_other_and_arrive_in_order() -> None:
    lane = Lane(rate=1000, delay=5, room=2000)
    lane.take(0.0, b"first", 1000)
    lane.take(0.0, b"second", 500)
    assert lane.due == 6.0  # a second to leave, five under way
    assert lane.arrived(5.9) is None
    assert lane.arrived(6.0) == b"first"
    assert lane.due == 6.5  # it left when the first had left
    assert lane.arrived(7.0) == b"second"
    lane.take(10.0, b"third", 1000)  # the link has been idle: nothing is saved up, and nothing is owed
    assert lane.due == 16.0
    assert (lane.carried, lane.lost) == (2500, 0)


def test_a_full_queue_loses_what_comes_on_top_and_takes_more_once_it_drains() -> None:
    lane = Lane(rate=1000, delay=0, room=2000)
    for packet in (b"1", b"2", b"3"):
        lane.take(0.0, packet, 1000)
    lane.take(1.0, b"4", 1000)
    assert [lane.arrived(9.0) for _ in range(4)] == [b"1", b"2", b"4", None]
    assert (lane.carried, lane.lost) == (3000, 1000)


@pytest.mark.parametrize(("payload", "segments"), [(1460, 1), (1461, 2), (14600, 10), (20000, 14)])
def test_a_large_packet_counts_as_the_segments_it_crosses_in(payload: int, segments: int) -> None:
    large = int(payload > 1460)
    offload = struct.pack("=BBHHHH", 1, large, 40, 1460 * large, 20, 16)
    tcp = bytes(12) + bytes([5 << 4]) + bytes(7)
    assert on_wire(offload + bytes(20) + tcp + bytes(payload)) == payload + 40 * segments


@pytest.fixture
def joined() -> Iterator[Links]:
    try:
        with links([SHAPE, SHAPE]) as found:
            yield found
    except CannotShape as error:
        pytest.skip(str(error))


def test_a_link_is_never_faster_than_its_shape_and_counts_what_it_carries(joined: Links) -> None:
    size = 1_000_000
    found = joined.measure(1, size)
    assert found.round_trip >= SHAPE.round_trip
    assert 0 < found.mbit <= SHAPE.mbit
    carried = joined.carried()
    assert size < carried.up < 1.5 * size  # headers, and what had to be sent again
    assert 0 < carried.down < 0.2 * size  # receipts
    assert carried.processor_seconds > 0


def test_each_network_has_its_link_and_no_other_way_out(joined: Links) -> None:
    def devices(site: int | None) -> set[str]:
        command = [*joined.inside(site), "cat", "/proc/net/dev"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return {row.split(":")[0].strip() for row in told.splitlines()[2:]}

    assert devices(None) == {"lo", "site0", "site1"}
    assert devices(0) == devices(1) == {"lo", "hub"}
