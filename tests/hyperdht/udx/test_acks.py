"""Acknowledgements: a batch says what its packets say one by one, and most travel with an answer."""

from random import Random

import pytest
from kit.udx_pair import Link, Pair, noise

from p2pclaude.hyperdht.udx.packet import DATA, HEADER, MAGIC, SACK, SEQ_MASK, encode_sack
from p2pclaude.hyperdht.udx.receiver import MAX_SACK_RANGES
from p2pclaude.hyperdht.udx.recovery import DELIVERED
from p2pclaude.hyperdht.udx.sender import Sender
from p2pclaude.hyperdht.udx.stream import DataReceived, UdxStream

FIRST = 2**32 - 20  # the wire's numbers wrap on the way
PACKETS = 30


def sender(sent: list[bytes] | None = None) -> UdxStream:
    """Return a stream with so many packets under way, and a few acknowledged; `sent` gets them all."""
    sent = [] if sent is None else sent
    stream = UdxStream(7, initial_seq=FIRST, initial_remote_seq=FIRST)
    stream.connect(1, 1.0)
    stream.write(bytes(1152 * 4))
    sent += stream.datagrams_to_send(1.0)
    stream.receive_datagrams([bare(stream, FIRST + 4, 1 << 20)], 1.1)
    for number in range(4, PACKETS):
        stream.write(bytes(1000))
        sent += stream.datagrams_to_send(1.1 + number / 100)  # not faster than it is paced
    assert stream.sender.next_seq == FIRST + PACKETS
    return stream


def bare(stream: UdxStream, ack: int, window: int, seq: int = FIRST) -> bytes:
    """Return a bare acknowledgement for that stream."""
    return HEADER.pack(MAGIC, 0, 0, stream.local_id, window, seq & SEQ_MASK, ack & SEQ_MASK)


def state(stream: UdxStream) -> tuple[object, ...]:
    """Return what acknowledgements change, but for the estimates made once a batch."""
    half, receiver = stream.sender, stream.receiver
    return (
        half.acked_below, half.unacked, half.in_flight, half.peer_window, half.stats.bad_acks, half.stats.lost,
        stream.stats, receiver.next_seq, receiver.unread, stream.received_any, stream._heard.at,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(400))
def test_a_batch_says_what_its_packets_say_one_by_one(seed: int) -> None:
    rng = Random(seed)
    together, apart = sender(), sender()
    seq = FIRST
    packets: list[bytes] = []
    share_of_data = rng.choice([0.2, 0.8])
    for _ in range(rng.randint(1, 40)):
        # Rising, late, repeated, of the time before, and now and then of what was never sent.
        ack = FIRST + rng.choice([rng.randint(0, PACKETS), len(packets), len(packets), rng.randint(-9, PACKETS + 9)])
        window = rng.choice([1 << 20, 1 << 20, rng.randint(0, 1 << 21)])
        if rng.random() < share_of_data:
            header = HEADER.pack(MAGIC, DATA, 0, together.local_id, window, seq & SEQ_MASK, ack & SEQ_MASK)
            packets.append(header + rng.randbytes(5))
            seq += rng.random() < 0.9
        else:
            packets.append(bare(together, ack, window, seq))
    together.receive_datagrams(packets, 9.0)
    for packet in packets:
        apart.receive_datagrams([packet], 9.0)
    assert state(together) == state(apart)


def test_the_last_of_a_run_acknowledges_all_before() -> None:
    stream = sender()
    acks = [bare(stream, FIRST + 4 + number, (1 << 20) + number) for number in range(PACKETS - 3)]
    stream.receive_datagrams(acks, 9.0)
    assert stream.sender.acked_below == FIRST + PACKETS
    assert stream.sender.in_flight == stream.unacked == 0
    assert stream.sender.peer_window == (1 << 20) + PACKETS - 4


def answers(rng: Random) -> list[bytes]:
    """Return what a peer says to packets that come in any order, and not all of them: one answer each."""
    sent: list[bytes] = []
    sender(sent)
    assert len(sent) == PACKETS
    peer = UdxStream(1, initial_seq=FIRST, initial_remote_seq=FIRST)
    peer.connect(7, 1.0)
    peer.receive_datagrams(sent[:4], 1.0)
    peer.datagrams_to_send(1.0)
    coming = rng.sample(sent[4:], rng.randint(2, PACKETS - 4))
    said = []
    for packet in coming:
        peer.receive_datagrams([packet], 1.0)
        said += peer.datagrams_to_send(1.0)
    assert len(said) == len(coming)
    return said


def held(stream: UdxStream) -> tuple[object, ...]:
    """Return what a stream believes that its peer has."""
    half = stream.sender
    delivered = [seq - FIRST for seq, packet in half._packets.items() if packet.state == DELIVERED]
    return half.acked_below - FIRST, delivered, half.unacked, half.peer.held, half.peer_window, half.stats.bad_sacks


@pytest.mark.parametrize("seed", range(100))
def test_a_run_of_sacks_says_what_they_say_one_by_one(seed: int) -> None:
    rng = Random(seed)
    said = answers(rng)
    assert any(packet[2] == SACK for packet in said) or len(said) < 8
    if rng.random() < 0.3:  # one of the time before, whose acknowledgement is an older one, comes last
        said.append(bare(sender(), FIRST + 3, 1 << 20))
    together, apart = sender(), sender()
    together.receive_datagrams(said, 9.0)
    for packet in said:
        apart.receive_datagrams([packet], 9.0)
    assert held(together) == held(apart)


def test_the_last_of_a_run_of_sacks_is_read() -> None:
    stream = sender()
    runs = [[(FIRST + 6, FIRST + 7 + more), (FIRST + 20, FIRST + 22)] for more in range(5)]
    window = 1 << 20
    stream.receive_datagrams([sack(stream, FIRST + 5, window + more, run) for more, run in enumerate(runs)], 9.0)
    assert held(stream)[:2] == (5, [6, 7, 8, 9, 10, 20, 21])
    assert stream.sender.peer_window == window + 4


def test_a_sack_is_read_though_it_acknowledges_nothing_else_that_is_new() -> None:
    stream = sender()
    said = sack(stream, FIRST + 4, 1 << 20, [(FIRST + 6, FIRST + 7)])
    stream.receive_datagrams([bare(stream, FIRST + 4, 1 << 20), said], 9.0)
    assert held(stream)[:2] == (4, [6])


def test_a_late_sack_does_not_hide_what_a_newer_one_said() -> None:
    stream = sender()
    newer = sack(stream, FIRST + 8, 1 << 20, [(FIRST + 12, FIRST + 15)])
    late = sack(stream, FIRST + 5, 1 << 20, [(FIRST + 6, FIRST + 7)])
    stream.receive_datagrams([newer, late], 9.0)
    assert held(stream)[:2] == (8, [12, 13, 14])


@pytest.mark.parametrize("ack", [4, 8])
@pytest.mark.parametrize("kind", [0, DATA])
def test_what_has_no_ranges_does_not_hide_what_a_sack_before_it_said(kind: int, ack: int) -> None:
    """A peer that answers sends a packet of DATA behind its acknowledgements; a bare one may be late."""
    stream = sender()
    said = sack(stream, FIRST + 8, 1 << 20, [(FIRST + 12, FIRST + 15)])
    header = HEADER.pack(MAGIC, kind, 0, stream.local_id, 1 << 20, FIRST & SEQ_MASK, (FIRST + ack) & SEQ_MASK)
    stream.receive_datagrams([said, header + b"answer" if kind else header], 9.0)
    assert held(stream)[:2] == (8, [12, 13, 14])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("ranges", [[], [(FIRST + 12, FIRST + 15)]])
def test_a_window_that_is_again_what_it_was_is_read_in_data(ranges: list[tuple[int, int]], together: bool) -> None:
    """It was another one in an acknowledgement between, and the peer's own data says no more than that."""
    stream = sender()
    window = 1 << 20
    header = HEADER.pack(MAGIC, DATA, 0, stream.local_id, window, FIRST & SEQ_MASK, (FIRST + 4) & SEQ_MASK)
    less = sack(stream, FIRST + 4, 1000, ranges) if ranges else bare(stream, FIRST + 4, 1000)
    batches = [[less, header + b"answer"]] if together else [[less], [header + b"answer"]]
    for batch in batches:
        stream.receive_datagrams(batch, 9.0)
    assert stream.sender.peer_window == window


def test_an_acknowledgement_of_what_was_never_sent_brings_no_window() -> None:
    """Or no later packet with that number would bring one: libudx looks in this order too."""
    stream = sender()
    stream.receive_datagrams([bare(stream, FIRST + PACKETS + 1, 5)], 9.0)
    assert stream.sender.stats.bad_acks == 1
    assert stream.sender.peer_window == 1 << 20
    stream.receive_datagrams([bare(stream, FIRST + 4, 1 << 21)], 9.0)
    assert stream.sender.peer_window == 1 << 21


def test_as_many_ranges_are_read_as_a_peer_sends() -> None:
    """More cost processor time only: libudx sends 50 at most, and this library `MAX_SACK_RANGES`."""
    stream = sender()
    ranges = [(FIRST + 2 * number, FIRST + 2 * number + 1) for number in range(3, MAX_SACK_RANGES + 40)]
    stream.receive_datagrams([sack(stream, FIRST + 4, 1 << 20, ranges)], 9.0)
    assert len(stream._heard.ranges) == MAX_SACK_RANGES
    assert held(stream)[1] == [*range(6, PACKETS, 2)]


def sack(stream: UdxStream, ack: int, window: int, ranges: list[tuple[int, int]]) -> bytes:
    """Return an acknowledgement with ranges for that stream."""
    header = HEADER.pack(MAGIC, SACK, 0, stream.local_id, window, FIRST & SEQ_MASK, ack & SEQ_MASK)
    return header + encode_sack([(start & SEQ_MASK, end & SEQ_MASK) for start, end in ranges])


def test_an_answer_carries_the_acknowledgement() -> None:
    pair = Pair()
    pair.b.sent = []
    pair.a.stream.write(b"question")
    pair.run(lambda: bool(pair.b.received))
    pair.b.sent.clear()
    pair.b.stream.write(b"x")
    pair.a.stream.write(b"again")
    pair.run(lambda: len(pair.b.received) == 13)
    assert pair.run(lambda: pair.a.stream.unacked == 0)
    assert len(pair.b.sent) == 2


@pytest.mark.parametrize(("delay", "size", "expected"), [(0.0001, 64, True), (0.0001, 8192, False), (0.01, 64, False)])
def test_an_answer_is_prompt_on_a_short_path_that_carries_little(delay: float, size: int, expected: bool) -> None:
    pair = Pair(a_to_b=Link(delay=delay), b_to_a=Link(delay=delay))
    stream = pair.a.stream
    assert stream.prompt_answer_s == 0
    stream.write(b"first")
    assert pair.run(lambda: stream.unacked == 0)
    assert stream.prompt_answer_s == 0
    assert stream.srtt is not None
    stream.write(bytes(size))
    assert stream.datagrams_to_send(pair.now)
    assert stream.prompt_answer_s == (pytest.approx(2 * stream.srtt) if expected else 0)


@pytest.mark.parametrize(
    ("delay", "waiting", "under_way", "expected"),
    [
        (0.0001, 64, 0, True),
        (0.0001, 0, 0, True),
        (0.0001, 8192, 0, False),
        (0.0001, 64, 1, False),
        (0.01, 64, 0, False),
    ],
)
def test_a_little_may_hurry_on_a_short_path_where_nothing_is_under_way(
    delay: float, waiting: int, under_way: int, expected: bool
) -> None:
    pair = Pair(a_to_b=Link(delay=delay), b_to_a=Link(delay=delay))
    stream = pair.a.stream
    assert not stream.may_hurry  # nothing is known of the path
    stream.write(b"first")
    assert pair.run(lambda: stream.unacked == 0)
    stream.write(b"more")
    assert pair.run(lambda: stream.unacked == 0 and stream.srtt is not None)
    stream.write(bytes(under_way))
    stream.datagrams_to_send(pair.now)
    stream.write(bytes(waiting))
    assert stream.may_hurry is expected


def test_only_an_acknowledgement_of_data_in_order_may_wait_for_a_little() -> None:
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    a.write(bytes(5000))
    packets = a.datagrams_to_send(0.0)
    assert not b.owes_only_ack
    b.receive_datagrams(packets[:1], 0.1)
    assert b.owes_only_ack is True
    b.write(b"answer")
    assert b.owes_only_ack is False
    b.datagrams_to_send(0.1)
    b.receive_datagrams(packets[2:], 0.1)
    assert b.owes_only_ack is False  # there is a gap, of which the sender must hear


def test_what_the_peer_says_again_is_not_worked_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    a.write(bytes(20_000))
    packets = a.datagrams_to_send(0.0)
    heard: list[int] = []
    take = Sender.receive_ack

    def note(sender: Sender, ack: int, now: float) -> bool:
        heard.append(ack)
        return take(sender, ack, now)

    monkeypatch.setattr(Sender, "receive_ack", note)
    for number in range(1, len(packets), 2):  # each behind a gap, so that none is of a run
        b.receive_datagrams([packets[number]], 0.1)
    assert heard == [0]


def test_one_acknowledgement_a_batch() -> None:
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    a.write(bytes(20_000))
    batch = a.datagrams_to_send(0.0)
    assert len(batch) > 10
    b.receive_datagrams(batch, 0.1)
    assert len(b.datagrams_to_send(0.1)) == 1


class Conversation:
    """Two streams that take turns over a path without loss."""

    def __init__(self, seed: int, *, ask_timers: bool) -> None:
        self.rng, self.now = Random(seed), 1.0
        self.ask_timers = ask_timers  # as soon as something arrived, before the answer
        self.ends = [UdxStream(0), UdxStream(1)]
        for number, end in enumerate(self.ends):
            end.connect(1 - number, self.now)

    def turn(self, number: int) -> None:
        """Let an end say something, mostly little, and let both talk until it has arrived."""
        self.ends[number].write(bytes(self.rng.choice([1, 64, 64, 1000, 30_000])))
        quiet = 0
        while quiet < 2:
            quiet = 0 if self._pass(number) else quiet + 1
            number = 1 - number

    def _pass(self, number: int) -> bool:
        one, other = self.ends[number], self.ends[1 - number]
        packets = one.datagrams_to_send(self.now)
        one.get_timer()
        self.now += self.rng.choice([0.0001, 0.01, 0.011])
        other.receive_datagrams(packets, self.now)
        if self.ask_timers:
            other.get_timer()
        while (event := other.next_event()) is not None:
            assert isinstance(event, DataReceived)
            other.consume(len(event.data))
            if len(event.data) < 100 and self.rng.random() < 0.5:
                other.write(event.data)
        return bool(packets)

    def beliefs(self) -> list[object]:
        """Return what both ends think of the path."""
        return [
            (
                *(half.rtt.srtt, half.rtt.variation, half.rtt.minimum, half.acked_below, half.in_flight),
                *(half.congestion.mode, half.congestion.window, half.congestion.bandwidth, half.congestion.pacing_rate),
            )
            for half in (end.sender for end in self.ends)
        ]


@pytest.mark.parametrize("seed", range(50))
def test_an_answer_may_leave_before_conclusions_are_drawn(seed: int) -> None:
    before, after = Conversation(seed, ask_timers=True), Conversation(seed, ask_timers=False)
    for number in range(60):
        before.turn(number % 2)
        after.turn(number % 2)
        assert before.beliefs() == after.beliefs()
    assert after.ends[0].srtt is not None


@pytest.mark.parametrize(("size", "known"), [(64, False), (10_000, True)])
def test_conclusions_wait_for_a_single_packet_only(size: int, known: bool) -> None:
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 1.0)
    b.connect(1, 1.0)
    a.write(b"question")
    b.receive_datagrams(a.datagrams_to_send(1.0), 1.01)
    b.write(b"answer")
    a.receive_datagrams(b.datagrams_to_send(1.01), 1.02)
    a.write(bytes(size))
    assert a.datagrams_to_send(1.02)
    assert (a.srtt is not None) is known
    a.get_timer()
    assert a.srtt == pytest.approx(0.02)


def said_again(*batches: list[int]) -> list[float]:
    """Let batches of these packets of five arrive; return after how long their last acknowledgement leaves again."""
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, 0.0)
    b.connect(1, 0.0)
    a.write(bytes(5 * 1100))
    packets = a.datagrams_to_send(0.0)
    assert len(packets) == 5
    for number, batch in enumerate(batches):
        b.receive_datagrams([packets[seq] for seq in batch], 1.0 + number / 100)
        said = b.datagrams_to_send(1.0 + number / 100)
        assert len(said) == 1
    began, times = 1.0 + (len(batches) - 1) / 100, []
    while (timer := b.get_timer()) is not None:
        b.handle_timer(timer)
        assert b.datagrams_to_send(timer) == said
        times.append(round(timer - began, 3))
    return times


AGAIN = [0.2, 0.6, 1.4, 3.0]


@pytest.mark.parametrize(
    ("batches", "times"),
    [
        ([[0, 1]], []),  # nothing is missing
        ([[0, 2, 3]], AGAIN),  # the peer has something to repeat
        ([[0, 2], [3]], AGAIN),  # and again from the beginning
        ([[0, 2], [1]], []),
        ([[0, 2], [1, 4]], AGAIN),
        ([[0, 1], [0]], AGAIN),  # it has not heard that this came
        ([[0, 1], [0], [2]], []),  # it has
    ],
)
def test_an_acknowledgement_that_was_lost_perhaps_is_said_again(batches: list[list[int]], times: list[float]) -> None:
    assert said_again(*batches) == times


def test_a_lost_acknowledgement_costs_a_peer_that_waits_for_its_time_out_little() -> None:
    """As libudx does: it repeats at once what it learns is missing, and else nothing for a second."""
    peer, stream = UdxStream(1), UdxStream(2)
    peer.connect(2, 0.0)
    stream.connect(1, 0.0)
    peer.write(bytes(5 * 1100))
    packets = peer.datagrams_to_send(0.0)
    stream.receive_datagrams([packets[0], *packets[2:]], 0.02)
    [lost] = stream.datagrams_to_send(0.02)
    timer = stream.get_timer()
    assert timer is not None and timer < 0.3
    stream.handle_timer(timer)
    [again] = stream.datagrams_to_send(timer)
    assert again == lost
    peer.receive_datagrams([again], timer + 0.02)
    assert [packet for packet in peer.datagrams_to_send(timer + 0.02) if packet == packets[1]]


@pytest.mark.parametrize(("delay", "expected"), [(0.001, 0.05), (0.1, 0.4)])
def test_how_long_a_packet_is_waited_for_goes_by_the_round_trip(delay: float, expected: float) -> None:
    pair = Pair(a_to_b=Link(delay=delay), b_to_a=Link(delay=delay))
    stream = pair.b.stream
    stream.write(b"something to measure it by")
    assert pair.run(lambda: stream.srtt is not None and stream.unacked == 0)
    header = HEADER.pack(MAGIC, DATA, 0, stream.local_id, 1 << 20, 1, 1)  # 0 did not come
    stream.receive_datagrams([header + b"x"], pair.now)
    stream.datagrams_to_send(pair.now)
    assert stream.get_timer() == pytest.approx(pair.now + expected, rel=0.01)


@pytest.mark.parametrize("size", [1000, 20_000])
def test_small_reads_open_the_window_as_large_ones_do(size: int) -> None:
    """What no packet has said the peer does not know: it would find out by a probe, a second or two later."""
    pair = Pair(b=UdxStream(2, receive_window=100_000))
    pair.b.reads = False
    pair.a.stream.write(noise(300_000))
    pair.run(seconds=5)
    assert pair.a.stream.sender.peer_window == 0
    for _ in range(0, 100_000, size):
        pair.b.stream.heartbeat(1)  # on another way; and no peer reads the window in it
        pair.b.stream.consume(size)
        pair.settle()
    began = pair.now
    assert pair.run(lambda: pair.a.stream.sender.peer_window >= 75_000)
    assert pair.now - began < 0.06
