"""The long proofs' own machinery: it sees every fault that it is there to see, and replays from a seed."""

from dataclasses import replace
from random import Random

import pytest
from soak.memory import BLOCK, PATTERN_BYTES, End, Road, SoakFailure, SoakPair, loss_pattern
from soak.sizes import UNITS, parse_size
from soak.streams import Progress, Result, run_seed

from p2pclaude.hyperdht.udx.events import DataReceived
from p2pclaude.hyperdht.udx.packet import DATA, HEADER
from p2pclaude.hyperdht.udx.stream import Event, UdxStream

SIZE = 3_000_000


class Faulty(UdxStream):
    """Does one thing wrong with what it receives."""

    def __init__(self, fault: str) -> None:
        super().__init__(2)
        self.fault = fault

    def next_event(self) -> Event | None:
        event = super().next_event()
        if not isinstance(event, DataReceived) or self.receiver.next_seq < 100 or not self.fault:
            return event
        fault, self.fault = self.fault, ""
        match fault:
            case "changed":
                return DataReceived(bytes([event.data[0] ^ 1]) + event.data[1:])
            case "lost":
                return DataReceived(event.data[:-1])
            case "doubled":
                return DataReceived(event.data[:10] + event.data)
            case _:
                return DataReceived(event.data[1:2] + event.data[:1] + event.data[2:])


class Stubborn(UdxStream):
    """Sends one packet never again once it was lost, for a time."""

    def __init__(self, until: float) -> None:
        super().__init__(1)
        self.until = until

    def datagrams_to_send(self, now: float) -> list[bytes]:
        datagrams = super().datagrams_to_send(now)
        if now >= self.until:
            return datagrams
        return [data for data in datagrams if not (data[2] == DATA and HEADER.unpack_from(data)[5] == 500)]


def roads(loss: float = 0.0, mistreated: float = 0.0, mtu: int = 1500) -> list[Road]:
    """Make a road for each direction."""
    return [
        Road(Random(i), delay=0.01, loss=loss, reordering=mistreated, duplication=mistreated, mtu=mtu) for i in range(2)
    ]


def pair_of(a: UdxStream, b: UdxStream, between: list[Road]) -> tuple[SoakPair, End, End]:
    """Join streams of which the first sends."""
    one = End(a, between[0], SIZE, 0, pieces=[BLOCK], ends_last=False)
    two = End(b, between[1], 0, SIZE, pieces=[BLOCK], ends_last=False)
    return SoakPair(one, two, batch=44, tick=0.0), one, two


def transfer(a: UdxStream, b: UdxStream, between: list[Road] | None = None) -> tuple[End, End]:
    """Send one way."""
    pair, one, two = pair_of(a, b, between or roads())
    pair.run(60.0)
    return one, two


def test_a_whole_transfer_passes() -> None:
    one, two = transfer(UdxStream(1), Faulty(""), roads(0.1, 0.1))
    assert (one.received, two.received) == (0, SIZE)
    assert one.stream.sender.stats.retransmits > 100


@pytest.mark.parametrize("fault", ["changed", "lost", "doubled", "swapped"])
def test_a_wrong_byte_is_seen(fault: str) -> None:
    with pytest.raises(SoakFailure, match="wrong bytes"):
        transfer(UdxStream(1), Faulty(fault))


def test_a_stall_is_seen() -> None:
    with pytest.raises(SoakFailure, match="no progress in 2"):
        transfer(Stubborn(1004.0), UdxStream(2))


def test_a_short_wait_is_no_stall_but_is_told() -> None:
    _, two = transfer(Stubborn(1001.5), UdxStream(2))
    assert 0.5 < two.longest_wait < 2


def test_an_outage_is_not_the_streams_fault() -> None:
    between = roads()
    pair, _, _ = pair_of(UdxStream(1), UdxStream(2), between)
    carry = between[1].carry
    between[1].carry = (  # type: ignore[method-assign]
        lambda burst, now: [] if 1000.05 < now < 1006.0 else carry(burst, now)
    )
    assert pair.run(60.0) > 6


def test_what_never_ends_is_seen() -> None:
    with pytest.raises(SoakFailure, match=r"ETIMEDOUT|no progress|no end"):
        transfer(UdxStream(1), UdxStream(2), roads(mtu=600))


@pytest.mark.parametrize(("loss", "run"), [(0.001, 1), (0.05, 4), (0.3, 1)])
def test_patterns_lose_as_much_as_they_say(loss: float, run: int) -> None:
    lost = loss_pattern(loss, run).count(0) / PATTERN_BYTES
    assert lost == pytest.approx(loss, rel=0.25)


def test_a_seed_replays() -> None:
    results = [replace(run_seed(3), seconds=0.0) for _ in range(2)]
    assert results[0] == results[1]
    assert not results[0].failure


def test_seeds_of_every_kind_pass() -> None:
    results = [run_seed(seed) for seed in range(1000, 1010)]
    assert [result for result in results if result.failure] == []
    assert sum(result.wrapped for result in results) > 1


def test_progress_names_the_seed_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(7)
    for seed in (8, 7, 10):
        progress.add(Result(seed, size=1))
    assert progress.next == 9
    progress.add(Result(9, failure="no"))
    assert capsys.readouterr().out == "seed 9 FAILED: no\n"
    assert (progress.next, len(progress.failures), progress.total.size) == (11, 1, 3)


def test_sizes_are_read() -> None:
    assert [parse_size(text) for text in ("1", "5GB", "1TB", "0.5MB")] == [1, 5 * 10**9, 10**12, 500_000]
    assert set(UNITS) == {"", "KB", "MB", "GB", "TB"}


def test_a_repeat_that_is_lost_before_anybody_watches_is_the_roads_fault() -> None:
    """In this scenario what the reader waits for is lost once more a millisecond before its wait is a long one."""
    result = run_seed(1029088)
    assert not result.failure
    assert result.size > 10_000_000
