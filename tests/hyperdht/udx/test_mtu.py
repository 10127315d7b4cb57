"""The search for the packet size a path carries, alone and in a stream."""

import pytest
from kit.udx_pair import Link, Pair, noise

from p2pclaude.hyperdht.udx.mtu import MtuSearch
from p2pclaude.hyperdht.udx.packet import DATA


def settled(path_mtu: int, max_mtu: int = 1500) -> tuple[MtuSearch, int]:
    """Run the search against a path; return it and the number of probes."""
    search, probes = MtuSearch(1200, max_mtu), 0
    while search.wanted:
        size = search.wanted
        assert search.mtu < size <= min(search.mtu + 255, max_mtu)
        probes += 1
        search.probe_sent(size)
        assert search.wanted == 0
        if size <= path_mtu:
            search.probe_acked(size)
        else:
            search.probe_lost(size)
    return search, probes


@pytest.mark.parametrize("path_mtu", [1200, 1201, 1280, 1400, 1420, 1455, 1480, 1492, 1499, 1500, 9000])
def test_search_comes_close(path_mtu: int) -> None:
    search, probes = settled(path_mtu)
    assert search.mtu <= path_mtu
    assert search.mtu > min(path_mtu, 1500) - 16 or search.mtu == 1200
    assert probes < 25


def test_search_keeps_to_its_maximum() -> None:
    assert settled(9000, max_mtu=1210)[0].mtu == 1210
    assert settled(9000, max_mtu=1200) [0].mtu == 1200  # fmt: skip
    assert settled(9000, max_mtu=4000)[0].mtu == 4000


def test_one_lost_probe_decides_nothing() -> None:
    search = MtuSearch(1200, 1400)
    for _ in range(2):
        search.probe_sent(1400)
        search.probe_lost(1400)
    assert search.wanted == 1400


def test_lost_packets_mean_a_black_hole_only_if_none_as_large_arrives() -> None:
    search = MtuSearch(1200, 1500)
    search.probe_acked(1500)
    search.packet_arrived(1500, 50)
    search.packet_lost(1500, 40)
    assert search.mtu == 1500
    search.packet_lost(1500, 60)
    assert search.mtu == 1200
    assert search.wanted == (1200 + 1499 + 1) // 2  # 1500 need not be tried again
    search.packet_lost(1200, 70)
    assert search.mtu == 1000
    search.packet_lost(1000, 80)
    assert search.mtu == 1000
    assert search.wanted > 1000
    search.probe_sent(search.wanted)
    search.packet_arrived(1500, 90)  # it may have come in fragments: only the next probe tells
    assert search.mtu == 1000
    search.probe_acked(1255)
    assert search.wanted == 1500


@pytest.mark.parametrize("path_mtu", [1200, 1300, 1450, 1500])
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_streams_find_the_size_without_losing_a_byte(path_mtu: int, loss: float) -> None:
    pair = Pair(5, a_to_b=Link(delay=0.01, mtu=path_mtu, loss=loss, rate=1e6), b_to_a=Link(delay=0.01, loss=loss))
    data = noise(1_500_000)
    pair.a.stream.write(data)
    assert pair.run(lambda: len(pair.b.received) == len(data))
    assert pair.b.received == data
    assert pair.a.stream.mtu <= path_mtu
    if not loss:
        assert pair.a.stream.mtu > path_mtu - 16


@pytest.mark.parametrize("fragments", [False, True])
def test_a_black_hole_makes_new_packets_small(fragments: bool) -> None:
    """A path begins to swallow what exceeds 1000 bytes; without fragments it must recover for old packets to pass."""
    pair = Pair(a_to_b=Link(delay=0.01, rate=1e6), b_to_a=Link(delay=0.01))
    data = noise(3_000_000)
    pair.a.stream.write(data)
    pair.run(lambda: len(pair.b.received) > 500_000)
    assert pair.a.stream.mtu == 1500
    broken_at = pair.now

    def swallows(now: float, packet: bytes) -> bool:
        size = len(packet) + 28
        fragmented = fragments and size > pair.a.stream.mtu and not packet[3]  # probes never are
        return size > 1010 and not fragmented and (fragments or now < broken_at + 6)

    pair.a.link.blocked = swallows
    pair.run(seconds=5)
    assert pair.a.stream.mtu <= 1010
    assert pair.run(lambda: len(pair.b.received) == len(data), seconds=40)
    assert pair.b.received == data


def test_an_outage_does_not_leave_packets_small() -> None:
    pair = Pair(a_to_b=Link(delay=0.01, rate=1e6), b_to_a=Link(delay=0.01))
    data = noise(2_000_000)
    pair.a.stream.write(data)
    pair.run(lambda: len(pair.b.received) > 500_000)
    ends_at = pair.now + 8
    pair.a.link.blocked = lambda now, packet: now < ends_at
    assert pair.run(lambda: len(pair.b.received) == len(data), seconds=30)
    assert pair.b.received == data
    assert pair.a.stream.mtu == 1500


def test_probes_are_padded_data_packets() -> None:
    pair = Pair()
    pair.a.sent = []
    pair.a.stream.write(noise(200_000))
    pair.run(lambda: len(pair.b.received) == 200_000)
    padded = [data for _, data in pair.a.sent if data[3]]
    assert padded
    for data in padded:
        assert data[2] == DATA
        assert data[20 : 20 + data[3]] == bytes(data[3])


def test_small_packets_are_no_probes() -> None:
    pair = Pair()
    pair.a.sent = []
    for _ in range(20):
        pair.a.stream.write(b"small")
        pair.run(seconds=0.2)
    assert all(data[3] == 0 for _, data in pair.a.sent)


def packet(size: int, padding: int = 0) -> bytes:
    """Return a datagram of an IP packet of that size."""
    return bytes([255, 1, DATA, padding]).ljust(size - 28, b"x")


def test_packets_that_once_were_small_enough_may_be_fragmented() -> None:
    search = MtuSearch(1200, 1500)
    whole, large, probe = packet(1200), packet(1201), packet(1400, 200)
    assert search.part([whole, large]) == ([whole, large], [])  # nothing was ever larger: it leaves as it is
    search.probe_acked(1500)
    search.packet_lost(1500, 5)
    assert search.mtu == 1200
    assert search.part([whole, large, probe]) == ([whole, probe], [large])
    search.probe_acked(1300)
    assert search.part([large, packet(1301)]) == ([large], [packet(1301)])
    search.probe_acked(1500)
    assert search.part([packet(1501)]) == ([packet(1501)], [])


def test_three_probes_of_one_size_decide_and_counting_begins_anew() -> None:
    search = MtuSearch(1200, 1400)
    for size in (1400, 1400):
        search.probe_sent(size)
        search.probe_lost(size)
    search.probe_acked(1300)
    assert search.wanted == 1400
    for _ in range(2):
        search.probe_lost(1400)
        assert search.wanted == 1400
    search.probe_lost(1400)
    assert search.wanted == (1300 + 1399 + 1) // 2


def test_what_arrived_before_another_path_proves_nothing_there() -> None:
    search = MtuSearch(1200, 1500)
    search.probe_acked(1500)
    search.restart(1200, 50)
    search.packet_lost(1200, 49)  # it left on the old path
    assert search.mtu == 1200
    search.packet_lost(1200, 50)
    assert search.mtu == 1000
    fresh = MtuSearch(1200, 1500)
    fresh.packet_lost(1200, 0)
    assert fresh.mtu == 1000


def test_a_larger_packet_that_arrives_begins_the_search_again() -> None:
    search = MtuSearch(1200, 1500)
    for _ in range(3):
        search.probe_lost(1500)
    assert search.wanted == 1350
    search.probe_sent(1350)
    search.packet_arrived(1500, 7)
    assert search.wanted == 0  # a probe is under way
    search.probe_lost(1350)
    assert search.wanted == 1455
    untouched = MtuSearch(1200, 1500)
    untouched.probe_sent(1455)
    untouched.packet_arrived(1500, 7)
    assert untouched.wanted == 0
    untouched.wanted = 7
    untouched.packet_arrived(1500, 8)  # nothing has failed: there is nothing to begin again
    assert untouched.wanted == 7


def test_a_loss_does_not_widen_what_is_searched() -> None:
    search = MtuSearch(1200, 1500)
    for _ in range(3):
        search.probe_lost(1400)
    search.packet_lost(1450, 3)
    assert search.mtu == 1000
    search.probe_acked(1390)
    assert search.done
