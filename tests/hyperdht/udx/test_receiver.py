"""The receiving half: order, duplicates, the window, what is acknowledged; by hand and against a plain model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pclaude.hyperdht.udx.receiver import CAPACITY, MAX_AHEAD, Receiver

FIRST = 100


def taken(receiver: Receiver) -> bytes:
    """Take what is in order."""
    data = b"".join(receiver.chunks)
    receiver.chunks.clear()
    return data


def test_what_comes_in_order_is_given_out() -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(100, b"ab", False) and receiver.receive(101, b"c", False)
    assert (receiver.next_seq, receiver.unread, taken(receiver)) == (102, 3, b"abc")
    assert not receiver.holds_early and not receiver.ended and not receiver.sack_ranges


def test_a_gap_holds_back_what_follows() -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(102, b"c", False) and receiver.receive(101, b"b", False)
    assert receiver.holds_early and receiver.unread == 0 and taken(receiver) == b""
    assert receiver.sack_ranges.edges(9) == [(101, 103)]
    assert receiver.receive(100, b"a", False)
    assert (receiver.next_seq, taken(receiver)) == (103, b"abc")
    assert not receiver.holds_early and not receiver.sack_ranges


def test_duplicates_change_nothing() -> None:
    receiver = Receiver(1000, FIRST)
    receiver.receive(100, b"a", False)
    assert receiver.receive(100, b"zzz", False)  # fine, and ignored
    assert receiver.receive(102, b"c", False) and receiver.receive(102, b"other", False)
    receiver.receive(101, b"b", False)
    assert taken(receiver) == b"abc" and receiver.unread == 3


@pytest.mark.parametrize(("seq", "fits"), [(FIRST + MAX_AHEAD - 1, True), (FIRST + MAX_AHEAD, False)])
def test_packets_out_of_all_range_are_dropped(seq: int, fits: bool) -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(seq, b"x", False) == fits
    assert receiver.holds_early == fits


def test_four_windows_may_wait_in_order() -> None:
    receiver = Receiver(10, FIRST)
    assert receiver.room == 40
    assert receiver.receive(100, bytes(40), False)
    assert receiver.room == 0
    assert not receiver.receive(101, b"x", False)
    assert receiver.receive(101, b"", False)  # nothing needs no room
    receiver.consume(1)
    assert receiver.receive(102, b"x", False) and not receiver.receive(103, b"x", False)


def test_four_windows_may_wait_behind_a_gap() -> None:
    receiver = Receiver(10, FIRST)
    assert receiver.receive(101, bytes(40), False)
    assert not receiver.receive(102, b"x", False)
    assert receiver.sack_ranges.edges(9) == [(101, 102)]  # what was dropped is not reported
    assert receiver.receive(100, bytes(40), False)  # the gap itself has its own room


def test_the_end_comes_last() -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(102, b"", True)
    assert not receiver.ended
    assert receiver.receive(101, b"b", False) and receiver.receive(100, b"a", False)
    assert receiver.ended and receiver.next_seq == 103 and taken(receiver) == b"ab"


def test_an_end_with_data() -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(100, b"last", True)
    assert receiver.ended and taken(receiver) == b"last"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((103, True), (104, False)),  # behind the end
        ((103, True), (104, True)),
        ((103, True), (102, True)),  # two ends
        ((103, False), (102, True)),  # an end before what is there already
    ],
)
def test_packets_that_contradict_the_end_are_dropped(first: tuple[int, bool], second: tuple[int, bool]) -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(first[0], b"x", first[1])
    assert not receiver.receive(second[0], b"x", second[1])


def test_packets_that_do_not() -> None:
    receiver = Receiver(1000, FIRST)
    assert receiver.receive(103, b"x", True) and receiver.receive(103, b"x", True)
    assert receiver.receive(102, b"x", False)
    other = Receiver(1000, FIRST)
    assert other.receive(102, b"x", False) and other.receive(103, b"x", True)


def test_a_run_in_order_may_hold_what_waited() -> None:
    receiver = Receiver(1000, FIRST)
    receiver.receive(101, b"b", False)
    receiver.receive(103, b"d", False)
    receiver.add_in_order([b"a", b"b", b"c"], 3)
    assert receiver.next_seq == 103 and receiver.sack_ranges.edges(9) == [(103, 104)]
    receiver.drain()
    assert taken(receiver) == b"abcd" and receiver.unread == 4 and not receiver.holds_early
    assert receiver._early_bytes == 0


def test_a_quarter_of_the_window_that_came_free_is_worth_a_word() -> None:
    receiver = Receiver(1000, FIRST)
    receiver.receive(100, bytes(800), False)
    receiver.advertised = receiver.offer
    assert receiver.offer == 200
    assert not receiver.consume(249)
    assert receiver.consume(1)
    assert receiver.offer == 450
    receiver.consume(10_000)  # more than there was
    assert receiver.unread == 0 and receiver.offer == 1000


def test_the_offer_is_never_negative_and_fits_the_wire() -> None:
    receiver = Receiver(10, FIRST)
    receiver.receive(100, bytes(30), False)
    assert receiver.offer == 0
    assert Receiver(2**40, FIRST).offer == 0xFFFFFFFF
    assert Receiver(0, FIRST).window == 1


def test_what_waits_behind_a_gap_counts_as_far_as_the_reader_is_slow() -> None:
    receiver = Receiver(1000, FIRST)
    receiver.receive(102, bytes(400), False)
    assert receiver.offer == 1000  # a quick reader will have taken it with the gap
    receiver.receive(100, bytes(125), False)
    assert receiver.offer == 1000 - 125 - 200
    receiver.unread = 250
    assert receiver.offer == 1000 - 250 - 400
    receiver.unread = 300
    assert receiver.offer == 1000 - 300 - 400


def test_discard_keeps_the_numbers() -> None:
    receiver = Receiver(1000, FIRST)
    receiver.receive(100, b"a", False)
    receiver.receive(102, b"c", False)
    receiver.discard()
    assert receiver.next_seq == 101 and not receiver.chunks and not receiver.holds_early and not receiver.sack_ranges
    assert receiver.receive(102, bytes(CAPACITY * 1000 - 1), False)  # all but what the reader has


def test_bytes_are_kept_as_bytes() -> None:
    receiver = Receiver(1000, FIRST)
    buffer = bytearray(b"b")
    receiver.receive(101, memoryview(buffer), False)  # type: ignore[arg-type]
    buffer[0] = 0
    receiver.receive(100, b"a", False)
    assert taken(receiver) == b"ab"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.permutations(range(12)), st.lists(st.integers(0, 11), max_size=8))
def test_any_order_with_any_repeats_gives_the_bytes(order: list[int], repeats: list[int]) -> None:
    receiver = Receiver(10_000, FIRST)
    payloads = [bytes([i]) * (i + 1) for i in range(12)]
    got = b""
    for seq in [*order, *repeats]:
        assert receiver.receive(FIRST + seq, payloads[seq], seq == 11)
        held = sorted(FIRST + s for s in order[: order.index(seq) + 1] if FIRST + s >= receiver.next_seq)
        if seq in order and not got.endswith(payloads[11]):
            assert [s for a, b in receiver.sack_ranges.edges(99) for s in range(a, b)] == held or seq in repeats
        got += taken(receiver)
        assert receiver._early_bytes == sum(len(receiver._early[s]) for s in receiver._early)
    assert got == b"".join(payloads) and receiver.ended and receiver.unread == len(got)


def test_of_a_tiny_window_each_byte_is_worth_a_word() -> None:
    receiver = Receiver(3, FIRST)
    receiver.receive(100, bytes(3), False)
    receiver.advertised = receiver.offer
    assert not receiver.consume(0)
    assert receiver.consume(1)
