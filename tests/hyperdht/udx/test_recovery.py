"""Which packets are lost: by hand, in the order of departure, with times in seconds."""

import pytest

from p2pclaude.hyperdht.udx.packet import DATA
from p2pclaude.hyperdht.udx.rate import Flight
from p2pclaude.hyperdht.udx.recovery import (
    CALM_RECOVERIES,
    DELIVERED,
    IN_FLIGHT,
    LOST,
    MAX_WINDOW_STEPS,
    SACKS_WITHOUT_REORDERING,
    LossDetector,
    Packet,
)
from p2pclaude.hyperdht.udx.rtt import RttEstimator

RTT = 0.1


class Wire:
    """A detector on a path of 100 ms, and the packets that have left."""

    def __init__(self, *, measured: bool = True) -> None:
        self.rtt = RttEstimator()
        if measured:
            self.rtt.add_sample(RTT)
        self.loss = LossDetector(self.rtt)
        self.packets: dict[int, Packet] = {}
        self.acked_below = 0

    def send(self, seq: int, now: float) -> Packet:
        """Let a packet leave for the first time."""
        packet = Packet(seq, DATA, b"x", 49, Flight(now, 0, now, now, False), self.loss.next_order)
        self.loss.sent.append((self.loss.next_order, packet))
        self.loss.next_order += 1
        self.packets[seq] = packet
        return packet

    def send_again(self, seq: int, now: float) -> Packet:
        """Let a lost packet leave once more."""
        packet = self.packets[seq]
        packet.count += 1
        packet.state = IN_FLIGHT
        packet.order = self.loss.next_order
        packet.flight = Flight(now, 0, now, now, False)
        self.loss.sent.append((self.loss.next_order, packet))
        self.loss.next_order += 1
        return packet

    def deliver(self, seq: int, now: float) -> None:
        """Take the first acknowledgement of a packet."""
        self.packets[seq].state = DELIVERED
        self.loss.on_delivered(self.packets[seq], now)

    def lost(self, now: float) -> list[int]:
        """Give the numbers of the packets that are lost by now."""
        return [packet.seq for packet in self.loss.detect(self.acked_below, len(self.packets), now)]


def test_a_packet_behind_which_nothing_arrived_is_not_lost() -> None:
    wire = Wire()
    for seq in range(3):
        wire.send(seq, 1.0)
    wire.deliver(0, 1.1)
    assert wire.lost(99.0) == [] and wire.loss.deadline is None
    assert wire.loss.highest_seq == 0


def test_a_gap_is_waited_for_a_quarter_of_a_round_trip() -> None:
    wire = Wire()
    for seq in range(3):
        wire.send(seq, 1.0 + seq / 1000)
    wire.deliver(1, 1.1)
    assert wire.lost(1.1) == []
    assert wire.loss.deadline == pytest.approx(1.0 + (1.1 - 1.001) + RTT / 4)
    deadline = wire.loss.deadline
    assert deadline is not None and wire.lost(deadline - 0.0001) == []
    assert wire.lost(deadline) == [0]
    assert wire.packets[0].state == LOST and wire.packets[2].state == IN_FLIGHT
    assert wire.loss.deadline is None
    assert wire.lost(99.0) == []  # said once


def test_three_held_packets_leave_no_doubt() -> None:
    wire = Wire()
    for seq in range(5):
        wire.send(seq, 1.0)
    for seq in (1, 2, 3):
        wire.deliver(seq, 1.1)
    wire.loss.sacked = SACKS_WITHOUT_REORDERING - 1
    assert wire.lost(1.1) == []
    wire.loss.sacked = SACKS_WITHOUT_REORDERING
    assert wire.lost(1.1) == [0]


def test_where_packets_overtake_each_other_doubt_stays() -> None:
    wire = Wire()
    for seq in range(6):
        wire.send(seq, 1.0)
    wire.deliver(2, 1.1)
    wire.deliver(1, 1.1)  # it came late, but it came
    wire.loss.sacked = 10
    assert wire.lost(1.1) == []
    assert wire.lost(1.1 + RTT / 4) == [0]


def test_without_a_measured_round_trip_there_is_no_window() -> None:
    wire = Wire(measured=False)
    for seq in range(3):
        wire.send(seq, 1.0)
    wire.deliver(1, 1.1)
    assert wire.lost(1.1) == [0]


def test_while_repairing_nothing_is_waited_for() -> None:
    wire = Wire()
    for seq in range(4):
        wire.send(seq, 1.0)
    wire.deliver(1, 1.1)
    assert wire.lost(1.2) == [0]  # the recovery lasts until packet 3 is acknowledged
    wire.send(4, 1.2)
    wire.send(5, 1.2)
    wire.deliver(5, 1.3)
    assert wire.lost(1.3) == [2, 3, 4]
    wire.acked_below = 6
    wire.send(6, 2.0)
    wire.send(7, 2.0)
    wire.deliver(7, 2.1)
    assert wire.lost(2.1) == []  # over: packets may have overtaken each other


def test_a_repair_that_is_answered_too_soon_was_needless() -> None:
    wire = Wire()
    for seq in range(3):
        wire.send(seq, 1.0)
    wire.deliver(1, 1.1)
    assert wire.lost(1.2) == [0]
    wire.send_again(0, 1.2)
    wire.deliver(0, 1.2 + RTT / 2)
    assert wire.loss.spurious == 1
    assert wire.loss.highest_seq == 1  # it says nothing of what left since
    for seq in range(3, 5):
        wire.send(seq, 2.0)
    wire.acked_below = 3
    wire.deliver(4, 2.1)
    wire.loss.sacked = 10
    assert wire.lost(2.1) == [2]  # it left long ago
    assert wire.lost(2.1 + 2 * RTT / 4 - 0.001) == []  # the window has grown by a step, and reordering is expected
    assert wire.lost(2.1 + 2 * RTT / 4 + 0.001) == [3]


def test_a_repair_that_takes_a_round_trip_was_needed() -> None:
    wire = Wire()
    for seq in range(3):
        wire.send(seq, 1.0)
    wire.deliver(1, 1.1)
    assert wire.lost(1.2) == [0]
    wire.send_again(0, 1.2)
    wire.deliver(0, 1.2 + RTT)
    assert wire.loss.spurious == 0
    assert wire.lost(1.3) == [2]  # its repair left later, and has arrived


def test_the_window_is_a_round_trip_at_most() -> None:
    wire = Wire()
    for _ in range(50):
        wire.loss._on_spurious()
    assert wire.loss._window_steps == MAX_WINDOW_STEPS
    assert wire.loss._reordering_window(0) == RTT  # though sixteen quarters were four
    wire.rtt.srtt = 1.0
    assert wire.loss._reordering_window(0) == pytest.approx(MAX_WINDOW_STEPS * RTT / 4)


def test_calm_makes_the_window_small_again() -> None:
    wire = Wire()
    wire.loss._on_spurious()
    for number in range(CALM_RECOVERIES):
        assert wire.loss._window_steps == 2
        assert number < CALM_RECOVERIES
        wire.loss._begin_recovery(10 * number)
    assert wire.loss._window_steps == 1
    wire.loss._on_spurious()
    wire.loss._begin_recovery(99)
    assert wire.loss._window_steps == 2  # it counts from the last needless repair on


def test_another_path_is_judged_by_what_leaves_on_it() -> None:
    wire = Wire()
    for seq in range(4):
        wire.send(seq, 1.0)
    wire.deliver(2, 1.1)
    wire.deliver(1, 1.1)
    wire.packets[0].order = 99  # sent again since
    wire.loss.forget_path()
    assert [packet.seq for _, packet in wire.loss.sent] == [1, 2, 3]
    assert wire.lost(99.0) == []  # nothing has arrived on it
    wire.send(4, 2.0)
    wire.send(5, 2.0)
    wire.deliver(5, 2.1)
    wire.loss.sacked = SACKS_WITHOUT_REORDERING
    assert wire.lost(2.1) == [3, 4]  # nothing is known of packets that overtake each other there


def test_on_another_path_the_window_is_small_again() -> None:
    wire = Wire()
    wire.loss._on_spurious()
    wire.loss.forget_path()
    wire.send(0, 2.0)
    wire.send(1, 2.0)
    wire.deliver(1, 2.1)
    assert wire.lost(2.1 + RTT / 4 - 0.001) == []
    assert wire.lost(2.1 + RTT / 4 + 0.001) == [0]


def test_repairing_ends_with_the_last_packet_that_had_left_when_it_began() -> None:
    wire = Wire()
    wire.loss._begin_recovery(4)  # packets 0 to 3 had left
    assert wire.loss._reordering_window(3) == 0.0
    assert wire.loss._reordering_window(4) == pytest.approx(RTT / 4)


def test_a_packets_first_departure() -> None:
    packet = Wire().send(7, 1.0)
    assert (packet.seq, packet.kind, packet.payload, packet.size) == (7, DATA, b"x", 49)
    assert (packet.count, packet.state, packet.order, packet.first_order, packet.padded_mtu) == (1, IN_FLIGHT, 0, 0, 0)
