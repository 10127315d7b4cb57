"""UDX streams between two ends in virtual time: every byte arrives, whatever the network does."""

import pytest
from kit.udx_pair import Link, Pair, noise

from p2pclaude.hyperdht.udx.packet import DATA, DESTROY, END, HEADER, HEARTBEAT, MAGIC, SACK, encode_sack
from p2pclaude.hyperdht.udx.stream import Closed, UdxStream

NEAR_WRAP = 0xFFFFFFFF - 40


def kind_of(data: bytes) -> int:
    return data[2]


def seq_of(data: bytes) -> int:
    seq: int = HEADER.unpack_from(data)[5]
    return seq


def both_closed(pair: Pair) -> bool:
    return pair.a.closed is not None and pair.b.closed is not None


def exchange(pair: Pair, size: int, seconds: float = 120.0) -> None:
    """Send data both ways, end both sides, check all of it."""
    upward, downward = noise(size, 1), noise(size // 2, 2)
    pair.a.stream.write(upward)
    pair.b.stream.write(downward)
    pair.a.stream.end()
    pair.b.stream.end()
    assert pair.run(lambda: both_closed(pair), seconds=seconds)
    assert pair.b.received == upward
    assert pair.a.received == downward
    assert pair.a.closed == pair.b.closed == Closed(None)


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05, 0.2, 0.3])
@pytest.mark.parametrize("seed", range(20))
def test_keeps_every_byte(loss: float, seed: int) -> None:
    def link() -> Link:
        return Link(delay=0.02, jitter=0.005, loss=loss, duplication=0.02, reordering=0.02)

    exchange(Pair(seed, a_to_b=link(), b_to_a=link()), 150_000)


@pytest.mark.parametrize("seed", range(5))
def test_sequence_numbers_wrap(seed: int) -> None:
    def link() -> Link:
        return Link(loss=0.05, reordering=0.05, jitter=0.01)

    a = UdxStream(1, initial_seq=NEAR_WRAP, initial_remote_seq=NEAR_WRAP + 20)
    b = UdxStream(2, initial_seq=NEAR_WRAP + 20, initial_remote_seq=NEAR_WRAP)
    pair = Pair(seed, a=a, b=b, a_to_b=link(), b_to_a=link())
    exchange(pair, 200_000)
    assert a.sender.next_seq > 2**32
    assert b.sender.next_seq > 2**32


@pytest.mark.parametrize(("first", "remote_first"), [(NEAR_WRAP, 0), (0, NEAR_WRAP)])
def test_windows_are_heard_wherever_the_numbers_begin(first: int, remote_first: int) -> None:
    a = UdxStream(1, initial_seq=first, initial_remote_seq=remote_first)
    b = UdxStream(2, initial_seq=remote_first, initial_remote_seq=first, receive_window=50_000)
    pair = Pair(a=a, b=b)
    a.write(b"x")
    assert pair.run(lambda: a.unacked == 0)
    assert a.sender.peer_window == 50_000


def test_small_writes_share_packets_and_leave_at_once() -> None:
    pair = Pair()
    pair.a.sent = []
    for _ in range(100):
        pair.a.stream.write(b"0123456789")
    pair.settle()
    assert len(pair.a.sent) == 1
    pair.run(lambda: len(pair.b.received) == 1000)
    assert pair.b.received == b"0123456789" * 100


def test_data_before_connect_is_taken_and_acknowledged_on_connect() -> None:
    pair = Pair(connect=False)
    pair.a.stream.connect(2, pair.now)
    pair.b.sent = []
    pair.a.stream.write(b"early")
    pair.run(lambda: pair.b.received == b"early", seconds=1)
    pair.b.stream.write(b"queued")
    pair.settle()
    assert pair.b.sent == []
    assert pair.b.stream.received_any
    pair.b.stream.connect(1, pair.now)
    assert pair.run(lambda: pair.a.received == b"queued" and pair.a.stream.unacked == 0, seconds=1)


def test_half_closed_both_ways() -> None:
    pair = Pair()
    data = noise(50_000)
    pair.a.stream.write(b"question")
    pair.a.stream.end()
    assert pair.run(lambda: pair.b.ended)
    assert pair.b.closed is None
    pair.b.stream.write(data)
    assert pair.run(lambda: len(pair.a.received) == len(data))
    assert pair.a.closed is None
    pair.b.stream.end()
    assert pair.run(lambda: both_closed(pair), seconds=1)
    assert pair.a.received == data


def test_writes_after_the_end_are_ignored() -> None:
    pair = Pair()
    pair.a.stream.end()
    pair.a.stream.write(b"late")
    assert pair.run(lambda: pair.b.ended)
    assert not pair.b.received


def test_messages_arrive_unordered_and_may_be_empty() -> None:
    pair = Pair()
    pair.a.stream.send_message(b"one")
    pair.a.stream.send_message(b"")
    pair.run(lambda: len(pair.b.messages) == 2)
    assert sorted(pair.b.messages) == [b"", b"one"]


def test_messages_do_not_pile_up_before_connect() -> None:
    stream = UdxStream(1)
    for i in range(100_000):
        stream.send_message(b"%d" % i)
    stream.connect(2, 0.0)
    sent = stream.datagrams_to_send(0.0)
    assert len(sent) <= 256
    assert sent[-1].endswith(b"99999")


# -- loss of single packets that matter


def drop_first(kind: int, count: int = 1) -> Link:
    """A link that swallows the first packets with one of these type bits."""
    left = count

    def blocked(_now: float, data: bytes) -> bool:
        nonlocal left
        if left and (kind_of(data) & kind if kind else kind_of(data) == 0):
            left -= 1
            return True
        return False

    return Link(blocked=blocked)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lost_end_is_repeated(count: int) -> None:
    pair = Pair(a_to_b=drop_first(END, count))
    exchange(pair, 5000, seconds=5)


def test_lost_final_acknowledgement_times_nobody_out() -> None:
    # Everything of b is lost from the moment both ENDs have been sent: b closes, a repeats its END.
    pair = Pair()
    pair.a.stream.end()
    pair.run(lambda: pair.b.ended)
    pair.b.stream.end()
    lost_until = pair.now + 3.0
    pair.a.link.blocked = lambda now, data: now < lost_until
    assert pair.run(lambda: pair.a.closed is not None, seconds=1)
    assert pair.b.closed is None
    assert pair.run(lambda: pair.b.closed is not None, seconds=5)
    assert pair.b.closed == Closed(None)


def test_a_peer_that_forgot_the_closed_stream_is_no_error() -> None:
    # libudx keeps nothing after a clean end; its last acknowledgement may be lost.
    pair = Pair()
    pair.a.stream.end()
    pair.run(lambda: pair.b.ended)
    pair.b.stream.end()
    pair.a.link.blocked = lambda now, data: True
    assert pair.run(lambda: pair.b.closed is not None, seconds=15)
    assert pair.b.closed == Closed(None)


@pytest.mark.parametrize("seed", range(10))
def test_a_peer_that_ended_first_gets_the_end_after_all_data_is_acknowledged(seed: int) -> None:
    # Such a peer, if it is libudx, vanishes with the END; only then may its silence mean success.
    pair = Pair(seed, a_to_b=Link(loss=0.2), b_to_a=Link(loss=0.2))
    pair.b.stream.end()
    pair.run(lambda: pair.a.ended)
    data = noise(100_000)
    pair.a.stream.write(data)
    pair.a.stream.end()
    pair.a.sent = []
    assert pair.run(lambda: pair.b.ended, seconds=20)
    pair.a.link.blocked = pair.b.link.blocked = lambda now, packet: True
    assert pair.run(lambda: pair.a.closed is not None, seconds=20)
    assert pair.a.closed == Closed(None)
    assert pair.b.received == data
    kinds = [kind_of(packet) for _, packet in pair.a.sent]
    assert DATA not in kinds[kinds.index(END) :]


def test_closed_streams_finish_after_a_while() -> None:
    pair = Pair()
    exchange(pair, 1000)
    assert not pair.a.stream.finished
    pair.run(seconds=16)
    assert pair.a.stream.finished
    assert pair.b.stream.finished
    assert pair.a.stream.get_timer() is None


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_destroy_is_seen_although_packets_are_lost(lost: int) -> None:
    pair = Pair(a_to_b=drop_first(DESTROY, lost))
    pair.a.stream.write(b"x")
    pair.run(lambda: bool(pair.b.received))
    began = pair.now
    pair.a.stream.destroy()
    assert pair.run(lambda: pair.b.closed is not None, seconds=2)
    assert pair.b.closed == Closed("ECONNRESET")
    assert pair.a.closed == Closed(None)
    assert pair.now - began < 1.5


def test_destroy_is_said_again_to_a_peer_that_goes_on() -> None:
    pair = Pair(a_to_b=drop_first(DESTROY, 3))
    pair.b.stream.write(b"hello")  # a peer that was never heard of is forgotten soon
    pair.run(seconds=1)
    pair.a.stream.destroy()
    pair.run(seconds=3)
    assert pair.b.closed is None
    pair.b.stream.write(b"anyone?")
    assert pair.run(lambda: pair.b.closed is not None, seconds=0.5)
    assert pair.b.closed == Closed("ECONNRESET")


def test_destroy_before_connect_is_silent() -> None:
    stream = UdxStream(1)
    stream.write(b"x")
    stream.destroy()
    assert stream.next_event() == Closed(None)
    assert stream.finished
    assert stream.datagrams_to_send(0.0) == []


def test_an_old_destroy_is_ignored() -> None:
    pair = Pair()
    pair.a.stream.write(b"x")
    pair.run(lambda: bool(pair.b.received))
    old = HEADER.pack(0x01FF, DESTROY, 0, 2, 0, 0, 0)
    pair.b.stream.receive_datagrams([old], pair.now)
    assert not pair.b.stream.closed


def test_two_destroyed_ends_fall_silent() -> None:
    pair = Pair()
    pair.a.stream.destroy()
    pair.b.stream.destroy()
    pair.a.sent = []
    pair.run(seconds=20)
    assert len(pair.a.sent) <= 3


# -- outages


def outage(pair: Pair, begin: float, end: float) -> None:
    for one in pair.ends:
        one.link.blocked = lambda now, data: begin <= now < end


def test_tail_loss_is_repaired_in_a_few_round_trips() -> None:
    pair = Pair()
    pair.a.stream.write(noise(30_000))
    pair.run(lambda: len(pair.b.received) == 30_000)
    pair.run(seconds=1)
    began = pair.now
    pair.a.link = drop_first(DATA, 3)
    pair.a.stream.write(noise(3000))
    assert pair.run(lambda: len(pair.b.received) == 33_000, seconds=5)
    assert pair.now - began < 0.6  # round trip 0.1


@pytest.mark.parametrize("begin", [0.0, 0.03, 0.5, 2.0])
def test_ten_seconds_of_outage_kill_nothing(begin: float) -> None:
    pair = Pair(a_to_b=Link(rate=400_000, queue=40_000), b_to_a=Link(rate=400_000, queue=40_000))
    outage(pair, pair.now + begin, pair.now + begin + 10)
    ended_at = pair.now + begin + 10
    data = noise(1_500_000)
    pair.a.stream.write(data)
    assert pair.run(lambda: len(pair.b.received) == len(data), seconds=40)
    assert pair.b.received == data
    assert pair.now - ended_at < 7


@pytest.mark.parametrize("begin", [0.1 * i for i in range(10)])
def test_outages_in_a_quiet_conversation_kill_nothing(begin: float) -> None:
    pair = Pair()
    outage(pair, pair.now + begin, pair.now + begin + 10)
    for i in range(14):
        pair.a.stream.write(b"%d" % i)
        pair.b.stream.write(b"%d" % i)
        pair.run(seconds=1)
    pair.run(seconds=1)
    assert pair.a.received == pair.b.received == b"".join(b"%d" % i for i in range(14))
    assert pair.a.closed is None


def test_a_dead_path_is_noticed() -> None:
    pair = Pair()
    pair.a.stream.write(b"x")
    pair.run(lambda: bool(pair.b.received))
    outage(pair, pair.now, pair.now + 1000)
    began = pair.now
    pair.a.stream.write(b"y")
    assert pair.run(lambda: pair.a.closed is not None, seconds=60)
    assert pair.a.closed == Closed("ETIMEDOUT")
    assert 11 < pair.now - began < 14


def test_a_dead_path_is_noticed_although_the_application_goes_on_writing() -> None:
    """A timer that comes late finds that something has just left; that must not put off for ever what it is for."""
    pair = Pair()
    pair.a.stream.write(noise(3_000_000))
    assert pair.run(lambda: pair.a.stream.unacked == 0 and not pair.a.stream.buffered)
    stream, began = pair.a.stream, pair.now
    for turn in range(300):
        now = began + turn * 0.05
        stream.write(b"output")
        stream.datagrams_to_send(now)
        timer = stream.get_timer()
        if timer is not None and timer < now + 0.04:
            stream.handle_timer(now + 0.04)
            stream.datagrams_to_send(now + 0.04)
        if stream.closed:
            break
    assert stream.closed
    assert 11 < now - began < 14


def test_a_path_that_never_worked_is_noticed() -> None:
    pair = Pair(a_to_b=Link(loss=1.0))
    began = pair.now
    pair.a.stream.write(b"x")
    assert pair.run(lambda: pair.a.closed is not None, seconds=60)
    assert pair.a.closed == Closed("ETIMEDOUT")
    assert 11 < pair.now - began < 14


def test_reset_path_goes_on_elsewhere() -> None:
    pair = Pair(a_to_b=Link(rate=2e6), b_to_a=Link(rate=2e6))
    data = noise(3_000_000)
    pair.a.stream.write(data)
    pair.run(lambda: len(pair.b.received) > 500_000)
    outage(pair, pair.now, pair.now + 5)
    pair.run(seconds=5)
    pair.a.link, pair.b.link = Link(delay=0.01), Link(delay=0.01)
    pair.a.stream.reset_path(pair.now)
    pair.b.stream.reset_path(pair.now)
    assert pair.run(lambda: len(pair.b.received) == len(data), seconds=3)
    assert pair.b.received == data
    assert pair.a.stream.srtt is not None
    assert pair.a.stream.srtt < 0.03


# -- the receive window


def test_a_slow_reader_stops_the_sender_and_starts_it_again() -> None:
    window = 100_000
    pair = Pair(b=UdxStream(2, receive_window=window))
    pair.b.reads = False
    data = noise(500_000)
    pair.a.stream.write(data)
    pair.run(seconds=5)
    assert window - 1500 <= len(pair.b.received) <= window
    assert pair.a.closed is None
    pair.b.reads = True
    pair.b.stream.consume(len(pair.b.received))
    assert pair.run(lambda: len(pair.b.received) == len(data), seconds=10)
    assert pair.b.received == data


def test_a_closed_window_is_probed_and_kills_nothing() -> None:
    pair = Pair(b=UdxStream(2, receive_window=100_000))
    pair.b.reads = False
    pair.a.sent = []
    pair.a.stream.write(noise(300_000))
    pair.run(seconds=60)
    heartbeats = [data for _, data in pair.a.sent if kind_of(data) & HEARTBEAT]
    assert 20 < len(heartbeats) < 50
    assert pair.a.closed is None
    # The packet that says the window is open again gets lost: a probe finds out.
    pair.b.link = drop_first(0)
    pair.b.reads = True
    pair.b.stream.consume(len(pair.b.received))
    assert pair.run(lambda: len(pair.b.received) == 300_000, seconds=5)


def test_a_window_smaller_than_the_first_flight_kills_nothing() -> None:
    pair = Pair(b=UdxStream(2, receive_window=10_000))
    pair.b.reads = False
    pair.a.stream.write(noise(60_000))
    pair.run(seconds=60)
    assert pair.a.closed is None
    assert 10_000 <= len(pair.b.received) <= 4 * 10_000
    pair.b.reads = True
    pair.b.stream.consume(len(pair.b.received))
    assert pair.run(lambda: len(pair.b.received) == 60_000, seconds=5)
    assert pair.b.received == noise(60_000)


def test_a_closed_window_on_a_dead_path_is_noticed() -> None:
    pair = Pair(b=UdxStream(2, receive_window=100_000))
    pair.b.reads = False
    pair.a.stream.write(noise(300_000))
    pair.run(seconds=10)
    outage(pair, pair.now, pair.now + 100)
    assert pair.run(lambda: pair.a.closed is not None, seconds=17)
    assert pair.a.closed == Closed("ETIMEDOUT")


def test_tiny_reads_do_not_cause_tiny_packets() -> None:
    pair = Pair(b=UdxStream(2, receive_window=20_000))
    pair.b.reads = False
    pair.b.sent = []
    pair.a.stream.write(noise(60_000))
    pair.run(seconds=2)
    pair.b.sent.clear()
    for _ in range(400):
        pair.b.stream.consume(10)
        pair.settle()
    assert len(pair.b.sent) <= 2


def test_drained_comes_when_there_is_room() -> None:
    pair = Pair(a_to_b=Link(rate=1e6))
    pair.a.stream.write(bytes(1_000_000))
    pair.settle()
    assert pair.a.drains == 0
    pair.run(lambda: pair.a.drains == 1)
    assert 0 < pair.a.stream.buffered <= 256 * 1024


# -- loss recovery


def test_reordering_alone_causes_few_retransmissions() -> None:
    pair = Pair(7, a_to_b=Link(delay=0.05, jitter=0.04, rate=5e6, queue=10_000_000), b_to_a=Link(delay=0.05))
    data = noise(6_000_000)
    pair.a.stream.write(data)
    assert pair.run(lambda: len(pair.b.received) == len(data))
    sender = pair.a.stream.sender
    # The window begins at a quarter of the round trip, and each needless retransmission widens it.
    assert sender.stats.retransmits - pair.a.link.dropped < 0.02 * sender.stats.packets


def test_lost_packets_are_repaired_by_sacks_alone() -> None:
    pair = Pair(3, a_to_b=Link(loss=0.05))
    pair.b.sent = []
    pair.a.stream.write(noise(1_000_000))
    assert pair.run(lambda: len(pair.b.received) == 1_000_000)
    assert any(kind_of(data) & SACK for _, data in pair.b.sent)
    sender = pair.a.stream.sender
    assert sender.stats.probe_timeouts <= 2
    assert sender.stats.retransmits <= pair.a.link.dropped + 5


def test_retransmissions_keep_number_and_payload() -> None:
    pair = Pair(4, a_to_b=Link(loss=0.2))
    pair.a.sent = []
    pair.a.stream.write(noise(100_000))
    pair.run(lambda: len(pair.b.received) == 100_000)
    payloads: dict[int, bytes] = {}
    for _, data in pair.a.sent:
        if kind_of(data) & DATA:
            payload = data[20 + data[3] :]
            assert payloads.setdefault(seq_of(data), payload) == payload


def test_a_probe_repeats_what_the_reader_waits_for_before_other_repairs() -> None:
    a = UdxStream(1)
    a.connect(2, 0.0)
    a.write(bytes(10 * 1152))
    assert [seq_of(data) for data in a.datagrams_to_send(0.0)] == list(range(10))
    a.sender.congestion.window = 1
    # Three packets are missing; the window lets no repair leave but the first, which a probe sends.
    answer = HEADER.pack(0x01FF, SACK, 0, 1, 1 << 20, 0, 0) + encode_sack([(3, 10)])
    a.receive_datagrams([answer], 0.1)
    a.sender.congestion.window = 1
    assert [seq_of(data) for data in a.datagrams_to_send(0.1)] == [0]
    a.sender.congestion.window = 1
    a.handle_timer(1.0)
    assert [seq_of(data) for data in a.datagrams_to_send(1.0)] == [0, 1]


def test_a_heartbeat_for_another_way_is_answered_and_changes_nothing() -> None:
    pair = Pair()
    pair.a.stream.write(b"x")
    assert pair.run(lambda: pair.b.received == b"x" and pair.a.stream.unacked == 0)
    packet = pair.a.stream.heartbeat(2)
    assert HEADER.unpack_from(packet)[1:5] == (HEARTBEAT, 0, 2, pair.a.stream.receiver.offer)
    pair.b.stream.receive_datagrams([packet], pair.now)
    assert len(pair.b.stream.datagrams_to_send(pair.now)) == 1
    assert pair.a.stream.get_timer() is None
    assert pair.b.received == b"x"


def test_a_closed_stream_keeps_nothing_that_waited_for_a_gap() -> None:
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    a.write(bytes(5000))
    b.receive_datagrams(a.datagrams_to_send(0.0)[1:], 0.1)
    assert b.receiver.holds_early
    b.destroy()
    assert not b.receiver.holds_early
    assert not b.receiver.sack_ranges


def connected_pair() -> tuple[UdxStream, UdxStream]:
    """Return two ends that know each other's ids."""
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    return a, b


@pytest.mark.parametrize(("window", "told"), [(1 << 20, False), (10_000, True)])
def test_a_reader_who_has_made_much_room_has_the_peer_told(window: int, told: bool) -> None:
    a, b = UdxStream(1), UdxStream(2, receive_window=window)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    a.write(bytes(9000))
    b.receive_datagrams(a.datagrams_to_send(0.0), 0.1)
    b.datagrams_to_send(0.1)
    assert b.consume(9000) is told
    assert len(b.datagrams_to_send(0.1)) == told


def test_a_peer_that_has_nothing_to_acknowledge_is_asked() -> None:
    a, b = connected_pair()
    a.liveness.ask(1.0)
    a.handle_timer(1.0)
    (question,) = a.datagrams_to_send(1.0)
    assert kind_of(question) == HEARTBEAT
    a.handle_timer(1.5)
    assert a.datagrams_to_send(1.5) == []
    b.receive_datagrams([question], 1.6)
    a.receive_datagrams(b.datagrams_to_send(1.6), 1.7)
    a.handle_timer(2.0)
    assert a.datagrams_to_send(2.0) == []


def test_a_packet_from_beyond_all_range_is_counted_and_teaches_nothing() -> None:
    a, _ = connected_pair()
    before = a.sender.peer_window
    a.receive_datagrams([HEADER.pack(MAGIC, DATA, 0, 1, 5, 40_000, 0) + b"x"], 0.1)
    assert (a.stats.dropped, a.sender.peer_window, a.received_any) == (1, before, False)
