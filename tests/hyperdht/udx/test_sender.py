"""The sending half by hand: what leaves when, what acknowledgements change, repairs, probes, the end."""

import pytest

from p2pclaude.hyperdht.udx.burst import BurstHeader
from p2pclaude.hyperdht.udx.packet import DATA, END, HEADER, HEADER_BYTES, OVERHEAD_BYTES
from p2pclaude.hyperdht.udx.patience import GIVE_UP_S
from p2pclaude.hyperdht.udx.recovery import DELIVERED, IN_FLIGHT, LOST
from p2pclaude.hyperdht.udx.sender import MAX_BURST_PACKETS, MAX_PACKETS_UNDER_WAY, Sender

FIRST = 1000
MTU = 1248
FULL = MTU - OVERHEAD_BYTES  # payload bytes of a full packet
HEADER_OF = BurstHeader(7, 5000, 60, 59)


def sender(*, max_mtu: int = MTU, window: int | None = None) -> Sender:
    """Return a sender whose first packet has the number 1000; its packets have one size unless `max_mtu` says more."""
    made = Sender(FIRST, MTU, max_mtu)
    if window is not None:
        made.update_window(window, 0, FIRST, 0.0)
    return made


def seqs(packets: list[bytes]) -> list[int]:
    """Give the numbers of packets."""
    return [HEADER.unpack_from(packet)[5] for packet in packets]


def kinds(packets: list[bytes]) -> list[int]:
    """Give the kinds of packets."""
    return [packet[2] for packet in packets]


def sums_agree(half: Sender) -> bool:
    """Tell whether the sums are those of the packets."""
    packets = list(half._packets.values())
    return (
        half.unacked == sum(len(packet.payload) for packet in packets)
        and half.in_flight == sum(packet.size for packet in packets if packet.state == IN_FLIGHT)
        and half.peer.held == sum(len(packet.payload) for packet in packets if packet.state == DELIVERED)
        and half._loss.sacked == sum(packet.state == DELIVERED for packet in packets)
        and sorted(half._packets) == list(range(half.acked_below, half.next_seq))
    )


def acknowledge(half: Sender, ack: int, now: float, *held: tuple[int, int]) -> bool:
    """Bring one packet's acknowledgement, and conclude."""
    fine = half.receive_ack(ack, now)
    half.receive_sack(list(held), now)
    half.finish_acks(now)
    return fine


def test_nothing_leaves_without_data() -> None:
    half = sender()
    assert not half.has_work and half.send(HEADER_OF, 1.0) == [] and half.get_timer() is None


def test_what_is_written_leaves_in_full_packets() -> None:
    half = sender()
    half.write(bytes(2 * FULL))
    half.write(b"end")
    assert half.has_work and half.queued == 2 * FULL + 3
    packets = half.send(HEADER_OF, 1.0)
    assert seqs(packets) == [1000, 1001, 1002] and kinds(packets) == [DATA] * 3
    assert [len(packet) - HEADER_BYTES for packet in packets] == [FULL, FULL, 3]
    _, kind, offset, stream_id, window, seq, ack = HEADER.unpack_from(packets[0])
    assert (kind, offset, stream_id, window, seq, ack) == (DATA, 0, 7, 5000, 1000, 60)
    assert (half.queued, half.unacked, half.next_seq) == (0, 2 * FULL + 3, 1003)
    assert half.in_flight == 2 * FULL + 3 + 3 * OVERHEAD_BYTES
    assert (half.stats.packets, half.stats.bytes, half.stats.retransmits) == (3, half.in_flight, 0)
    assert sums_agree(half) and not half.has_work


def test_an_acknowledgement_settles_what_it_covers() -> None:
    half = sender()
    half.write(bytes(3 * FULL))
    half.send(HEADER_OF, 1.0)
    assert acknowledge(half, 1002, 1.1)
    assert (half.acked_below, half.unacked, half.in_flight) == (1002, FULL, MTU)
    assert half.rtt.srtt == pytest.approx(0.1) and sums_agree(half)
    assert acknowledge(half, 1001, 1.2)  # an old one
    assert half.acked_below == 1002
    assert acknowledge(half, 1003, 1.2)
    assert half.unacked == half.in_flight == 0 and half.get_timer() is None and sums_agree(half)


@pytest.mark.parametrize(("ack", "fine"), [(1001, True), (1002, False), (10**9, False)])
def test_what_was_never_sent_cannot_be_acknowledged(ack: int, fine: bool) -> None:
    half = sender()
    half.write(b"x")
    half.send(HEADER_OF, 1.0)
    assert half.receive_ack(ack, 1.1) == fine
    assert half.stats.bad_acks == (not fine)
    assert half.acked_below == (1001 if fine else 1000)


def test_ranges_are_held_and_later_covered() -> None:
    half = sender()
    half.write(bytes(6 * FULL))
    half.send(HEADER_OF, 1.0)
    acknowledge(half, 1000, 1.1, (1002, 1004))
    assert half.peer.held == 2 * FULL and half._loss.sacked == 2 and sums_agree(half)
    acknowledge(half, 1000, 1.1, (1002, 1004), (1003, 1005))
    assert half.peer.held == 3 * FULL and sums_agree(half)
    assert half.acked_below == 1000
    half.receive_ack(1002, 1.2)  # what is held behind no gap counts too
    assert half.acked_below == 1005 and half.peer.held == 0 and half._loss.sacked == 0 and sums_agree(half)


@pytest.mark.parametrize(
    ("held", "bad"),
    [((1001, 1007), 1), ((1003, 1003), 1), ((1004, 1002), 1), ((1000, 1002), 0), ((900, 950), 0), ((1001, 1006), 0)],
)
def test_impossible_ranges_are_counted_and_old_ones_passed_over(held: tuple[int, int], bad: int) -> None:
    half = sender()
    half.write(bytes(6 * FULL))
    half.send(HEADER_OF, 1.0)
    half.receive_sack([held], 1.1)
    assert half.stats.bad_sacks == bad and sums_agree(half)
    assert half.peer.held == (5 * FULL if held == (1001, 1006) else 0)


def lose_first(half: Sender) -> None:
    """Send six packets, of which the first gets lost."""
    half.write(bytes(6 * FULL))
    half.send(HEADER_OF, 1.0)
    acknowledge(half, 1000, 1.1, (1001, 1005))


def test_a_lost_packet_is_repaired_before_new_data() -> None:
    half = sender()
    lose_first(half)
    assert half._packets[1000].state == LOST and half.stats.lost == 1 and sums_agree(half)
    half.write(b"new")
    packets = half.send(HEADER_OF, 1.1)
    assert seqs(packets) == [1000, 1006]
    assert half.stats.retransmits == 1 and half._packets[1000].count == 2 and sums_agree(half)
    acknowledge(half, 1007, 1.3)
    assert half.unacked == half.in_flight == 0 and half.spurious == 0


def test_a_repair_that_was_needless_is_counted() -> None:
    half = sender()
    lose_first(half)
    half.send(HEADER_OF, 1.1)
    acknowledge(half, 1006, 1.13)
    assert half.spurious == 1


def test_a_repair_measures_no_round_trip() -> None:
    half = sender()
    lose_first(half)
    assert half.rtt.latest == pytest.approx(0.1)
    half.send(HEADER_OF, 5.0)
    acknowledge(half, 1005, 5.3)
    assert half.rtt.latest == pytest.approx(0.1)


def test_a_lost_packet_that_arrives_after_all_needs_no_repair() -> None:
    half = sender()
    lose_first(half)
    assert half.has_work
    acknowledge(half, 1005, 1.11)
    assert half.send(HEADER_OF, 1.2) == [] and half.stats.retransmits == 0 and sums_agree(half)


def test_the_peers_window_bounds_what_is_under_way() -> None:
    half = sender(window=2 * FULL + 10)
    half.write(bytes(5 * FULL))
    assert len(half.send(HEADER_OF, 1.0)) == 2  # a part of a packet is not worth it
    acknowledge(half, 1001, 1.1)
    assert len(half.send(HEADER_OF, 1.1)) == 1
    assert half.send(HEADER_OF, 1.1) == []


def test_a_small_window_takes_a_small_packet_when_nothing_is_under_way() -> None:
    half = sender(window=10)
    half.write(bytes(100))
    (packet,) = half.send(HEADER_OF, 1.0)
    assert len(packet) - HEADER_BYTES == 10
    assert half.send(HEADER_OF, 1.0) == []


def test_a_closed_window_is_asked_about_and_in_the_end_given_up() -> None:
    half = sender(window=0)
    half.write(bytes(100))
    assert half.send(HEADER_OF, 1.0) == []
    timer = half.get_timer()
    assert timer == pytest.approx(1.5)
    half.handle_timer(1.5, 0.5)
    assert half.peer.probe.due and not half.patience.is_over
    half.handle_timer(1.0 + GIVE_UP_S, 1.0)
    assert half.patience.is_over


@pytest.mark.parametrize(
    ("ack", "seq", "taken"), [(1001, 1, True), (1000, 1, True), (1002, 1, False), (999, 1, False), (1001, -2, False)]
)
def test_windows_of_impossible_or_older_packets_are_not_taken(ack: int, seq: int, taken: bool) -> None:
    half = sender()
    half.write(b"x")
    half.send(HEADER_OF, 1.0)
    half.update_window(777, seq, ack, 1.1)
    assert (half.peer_window == 777) == taken


def test_the_burst_has_a_limit_and_goes_on_at_once() -> None:
    half = sender(window=2**26)
    half.congestion.window = 10**9
    half.congestion.pacing_rate = 1e12
    half.write(bytes((MAX_BURST_PACKETS + 10) * FULL))
    assert len(half.send(HEADER_OF, 1.0)) == MAX_BURST_PACKETS
    assert half.get_timer() == 1.0
    assert len(half.send(HEADER_OF, 1.0)) == 10


def test_the_congestion_window_bounds_what_leaves() -> None:
    half = sender()
    half.congestion.window = 3 * MTU
    half.write(bytes(10 * FULL))
    assert len(half.send(HEADER_OF, 1.0)) == 3
    half.congestion.window = 4 * MTU
    assert len(half.send(HEADER_OF, 1.0)) == 1


def test_pacing_makes_the_rest_wait() -> None:
    half = sender()
    half.congestion.window, half.congestion.pacing_rate = 10**9, 1_000_000.0
    half.write(bytes(100 * FULL))
    sent = len(half.send(HEADER_OF, 1.0))
    assert sent == -(-6000 // MTU)  # the bucket of six milliseconds, overdrawn by one packet
    assert half.send(HEADER_OF, 1.0) == []  # it is empty
    timer = half.get_timer()
    assert timer is not None and 1.001 <= timer < 1.01
    assert half.send(HEADER_OF, timer)


def test_after_a_silence_two_probes_leave() -> None:
    half = sender()
    half.write(bytes(6 * FULL))
    half.send(HEADER_OF, 1.0)
    timer = half.get_timer()
    assert timer == pytest.approx(1.5)  # half a second before anything is measured
    half.handle_timer(1.5, 0.0)
    assert half.stats.probe_timeouts == 1 and half.has_work
    assert seqs(half.send(HEADER_OF, 1.5)) == [1000, 1005]  # the first one, and the last
    assert half.send(HEADER_OF, 1.5) == [] and sums_agree(half)


def test_probes_take_new_data_where_there_is_some() -> None:
    half = sender()
    half.congestion.window = 2 * MTU
    half.write(bytes(5 * FULL))
    assert seqs(half.send(HEADER_OF, 1.0)) == [1000, 1001]
    half.handle_timer(1.5, 0.0)
    assert seqs(half.send(HEADER_OF, 1.5)) == [1000, 1002]  # whatever the congestion window says


def test_it_gives_up_without_progress() -> None:
    half, now = sender(), 1.0
    half.write(b"x")
    half.send(HEADER_OF, now)
    while not half.patience.is_over:
        timer = half.get_timer()
        assert timer is not None and timer > now
        now = timer
        half.handle_timer(now, 0.0)
        half.send(HEADER_OF, now)
    assert now == pytest.approx(1.0 + GIVE_UP_S)
    assert 10 <= half.stats.probe_timeouts <= 14


def test_an_outage_makes_the_window_small() -> None:
    half, now = sender(), 1.0
    half.write(bytes(20 * FULL))
    half.send(HEADER_OF, now)
    for _ in range(3):
        timer = half.get_timer()
        assert timer is not None
        now = timer
        half.handle_timer(now, 0.0)
        half.send(HEADER_OF, now)
    acknowledge(half, 1001, now + 0.1)
    assert half.congestion.window < 10 * MTU  # four packets and what has arrived, where it was thirty-two


def test_the_end_is_a_packet_of_its_own_and_the_last() -> None:
    half = sender()
    half.write(b"data")
    half.own_end.wanted = True
    packets = half.send(HEADER_OF, 1.0)
    assert kinds(packets) == [DATA, END] and half.own_end.seq == 1001
    assert HEADER.unpack_from(packets[1])[6] == 59  # never the peer's END
    assert not half.end_acked and not half.only_end_unacked
    half.receive_ack(1001, 1.1)
    assert half.only_end_unacked and not half.end_acked
    half.receive_ack(1002, 1.1)
    assert half.end_acked and not half.only_end_unacked
    assert not half.has_work


def test_a_peer_that_has_ended_gets_the_end_when_it_has_all_data() -> None:
    half = sender()
    half.write(b"data")
    half.own_end.wanted = half.own_end.peer_ended = True
    assert kinds(half.send(HEADER_OF, 1.0)) == [DATA]
    assert not half.has_work
    acknowledge(half, 1001, 1.1)
    assert half.has_work and kinds(half.send(HEADER_OF, 1.1)) == [END]


def test_another_path_begins_anew() -> None:
    half = sender()
    half.write(bytes(6 * FULL))
    half.send(HEADER_OF, 1.0)
    acknowledge(half, 1002, 1.1)
    before = half.congestion
    half.reset_path(5.0)
    assert half.rtt.srtt is None and half.congestion is not before
    assert half.patience.probes_due == 2
    assert seqs(half.send(HEADER_OF, 5.0)) == [1002, 1005]
    acknowledge(half, 1006, 5.1)
    half.reset_path(6.0)
    assert half.patience.probes_due == 0


def test_full_packets_probe_for_a_larger_size() -> None:
    half = sender(max_mtu=1500)
    half.write(bytes(10 * FULL))
    half.send(HEADER_OF, 1.0)
    acknowledge(half, 1010, 1.1)
    half.write(bytes(3 * FULL))
    packets = half.send(HEADER_OF, 1.2)
    padded = [packet for packet in packets if packet[3]]
    assert len(padded) == 1 and padded[0] is packets[0]
    size = len(padded[0]) + 28
    assert MTU < size <= 1500 and half._packets[1010].padded_mtu == size
    assert padded[0][HEADER_BYTES : HEADER_BYTES + padded[0][3]] == bytes(padded[0][3])
    acknowledge(half, 1013, 1.3)
    assert half.search.mtu == half.congestion.mss == size


def test_a_probe_that_gets_lost_travels_again_as_it_should_be() -> None:
    half = sender(max_mtu=1500)
    half.write(bytes(10 * FULL))
    half.send(HEADER_OF, 1.0)
    acknowledge(half, 1010, 1.1)
    half.write(bytes(6 * FULL))
    half.send(HEADER_OF, 1.2)
    acknowledge(half, 1010, 1.3, (1011, 1016))
    assert half._packets[1010].padded_mtu == 0
    (again,) = half.send(HEADER_OF, 1.3)
    assert seqs([again]) == [1010] and len(again) == HEADER_BYTES + FULL
    assert half.search.mtu == MTU


def test_a_small_packet_or_an_unmeasured_path_is_no_probe() -> None:
    half = sender(max_mtu=1500)
    half.write(bytes(2 * FULL))
    assert not any(packet[3] for packet in half.send(HEADER_OF, 1.0))  # nothing is known of the path yet
    acknowledge(half, 1002, 1.1)
    half.write(bytes(FULL - 1))
    assert not any(packet[3] for packet in half.send(HEADER_OF, 1.2))


def test_discard_keeps_the_numbers() -> None:
    half = sender(window=3 * FULL)
    lose_first(half)
    half.write(b"more")
    half.discard()
    assert (half.queued, half.unacked, half.in_flight, half.peer.held) == (0, 0, 0, 0)
    assert half.get_timer() is None and half.send(HEADER_OF, 2.0) == []
    assert half.next_seq > 1000


def test_a_run_of_acknowledgements_is_as_good_as_each_by_itself() -> None:
    one, other = sender(), sender()
    for half in (one, other):
        half.write(bytes(8 * FULL))
        half.send(HEADER_OF, 1.0)
    acknowledge(one, 1008, 1.1)
    for ack in range(1001, 1009):
        other.receive_ack(ack, 1.1)
    other.finish_acks(1.1)
    for half in (one, other):
        assert (half.acked_below, half.in_flight, half.unacked) == (1008, 0, 0)
    assert one.congestion.window == other.congestion.window
    assert one._rate.delivered == other._rate.delivered == 8 * MTU


def test_no_more_is_under_way_than_libudx_can_report() -> None:
    half = sender(window=2**30)
    half.congestion.window, half.congestion.pacing_rate = 10**9, 1e12
    half.next_seq = half.acked_below + MAX_PACKETS_UNDER_WAY - 2
    half.write(bytes(3 * FULL))
    assert len(half.send(HEADER_OF, 1.0)) == 2


def test_what_is_under_way_when_data_comes_late_measures_the_application() -> None:
    half = sender()
    half.write(bytes(FULL))
    half.send(HEADER_OF, 1.0)
    assert half._rate.ran_dry
    half.write(bytes(FULL))
    half.send(HEADER_OF, 1.05)
    assert half._packets[1001].flight.app_limited and not half._packets[1000].flight.app_limited


def test_a_size_that_gets_lost_in_an_outage_is_suspected() -> None:
    half, now = sender(max_mtu=1500), 1.0
    half.write(bytes(4 * FULL))
    half.send(HEADER_OF, now)
    acknowledge(half, 1000, 1.1, (1002, 1003))
    for _ in range(4):
        timer = half.get_timer()
        assert timer is not None
        now = timer
        half.handle_timer(now, 0.0)
        half.send(HEADER_OF, now)
    assert half.search.mtu < MTU  # not even what was sure passes any more


def test_a_window_of_just_a_packet_is_room() -> None:
    half = sender(window=MTU)
    assert half.has_peer_room
    half.update_window(MTU - 1, 1, FIRST, 1.0)
    assert not half.has_peer_room


def test_a_window_of_one_byte_takes_one() -> None:
    half = sender(window=1)
    half.write(b"xy")
    (packet,) = half.send(HEADER_OF, 1.0)
    assert len(packet) - HEADER_BYTES == 1 and half.queued == 1


def test_what_the_peer_had_no_room_for_gets_its_full_time_again() -> None:
    half = sender(window=10 * MTU)
    half.write(b"x")
    half.send(HEADER_OF, 1.0)
    half.update_window(MTU - 1, 1, FIRST, 2.0)
    half.update_window(MTU, 2, FIRST, 10.0)
    half.update_window(10 * MTU, 3, FIRST, 11.0)  # there was room already
    half.handle_timer(1.0 + GIVE_UP_S, 1.0)
    assert not half.patience.is_over
    half.handle_timer(10.0 + GIVE_UP_S, 1.0)
    assert half.patience.is_over
