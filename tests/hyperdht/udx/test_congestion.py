"""Congestion control and pacing on a simulated bottleneck, in virtual time."""

import math
import random

import pytest
from kit.udx_pair import Link, Pair, noise

from p2pclaude.hyperdht.udx.congestion import Mode
from p2pclaude.hyperdht.udx.pacing import Pacer
from p2pclaude.hyperdht.udx.rate import DeliveryRate
from p2pclaude.hyperdht.udx.rtt import RttEstimator
from p2pclaude.hyperdht.udx.stream import UdxStream

MBIT_100 = 12.5e6
SIZE = 25_000_000


def bottleneck(loss: float, queue: int, rate: float = MBIT_100) -> Pair:
    """A round trip of 100 ms; the data's direction has a rate, a finite queue and random loss."""
    return Pair(
        11,
        a_to_b=Link(delay=0.05, loss=loss, rate=rate, queue=queue),
        b_to_a=Link(delay=0.05, loss=loss),
    )


def goodput(pair: Pair, size: int) -> float:
    """Send, check, and return the share of the bottleneck that was used, start and end included."""
    data = noise(size)
    began = pair.now
    pair.a.stream.write(data)
    assert pair.run(lambda: len(pair.b.received) == size, seconds=300)
    assert pair.b.received == data
    assert pair.a.link.rate is not None
    return size / (pair.now - began) / pair.a.link.rate


@pytest.mark.parametrize(("loss", "queue"), [(0.0, 125_000), (0.01, 125_000), (0.02, 125_000), (0.02, 1_250_000)])
def test_fills_a_long_path_despite_random_loss(loss: float, queue: int) -> None:
    # The first second is the start-up; the rest runs at full rate.
    assert goodput(bottleneck(loss, queue), SIZE) > 0.6


def test_a_small_first_packet_does_not_slow_the_start() -> None:
    """A connection begins with a header of 59 bytes, whose delivery rate is that of no path."""

    def seconds(first: int) -> float:
        pair = bottleneck(0.0, 1_250_000)
        pair.a.stream.write(noise(first))
        assert pair.run(lambda: len(pair.b.received) == first)
        pair.run(seconds=0.1)
        began = pair.now
        pair.a.stream.write(noise(500_000))
        assert pair.run(lambda: len(pair.b.received) == first + 500_000)
        return pair.now - began

    assert seconds(59) < seconds(0) + 0.02


@pytest.mark.parametrize(("loss", "share"), [(0.1, 0.5), (0.2, 0.4), (0.3, 0.2)])
def test_heavy_loss_slows_but_does_not_stop(loss: float, share: float) -> None:
    assert goodput(bottleneck(loss, 125_000, rate=1.25e6), 4_000_000) > share


def test_the_queue_stays_short_in_the_steady_state() -> None:
    pair = bottleneck(0.0, 5_000_000)
    pair.a.stream.write(noise(SIZE))
    pair.run(lambda: len(pair.b.received) > SIZE * 0.8)
    assert pair.a.stream.sender.congestion.mode is Mode.PROBE_BW
    assert pair.a.stream.srtt is not None
    assert pair.a.stream.srtt < 0.2


def test_two_streams_share() -> None:
    """Two senders on one bottleneck: neither starves."""
    link = Link(delay=0.02, rate=5e6, queue=200_000)
    first = Pair(1, a_to_b=link, b_to_a=Link(delay=0.02))
    second = Pair(2, a=UdxStream(4), a_to_b=link, b_to_a=Link(delay=0.02))
    for pair in (first, second):
        pair.a.stream.write(noise(25_000_000))
    order = random.Random(3)
    for _ in range(8000):  # short turns in random order, so that neither always finds the queue first
        for pair in order.sample((first, second), 2):
            pair.run(seconds=0.0005)
    shares = sorted((len(first.b.received), len(second.b.received)))
    assert sum(shares) > 0.7 * 5e6 * 4
    assert shares[0] > 0.1 * sum(shares)


def test_an_application_that_sends_little_measures_nothing() -> None:
    pair = Pair()
    data = noise(3_000_000)
    pair.a.stream.write(data)
    pair.run(lambda: len(pair.b.received) == len(data))
    bandwidth = pair.a.stream.sender.congestion.bandwidth
    for _ in range(300):
        pair.a.stream.write(b"tick")
        pair.run(seconds=0.1)
    assert pair.a.stream.sender.congestion.bandwidth > bandwidth / 2


class OnMilliseconds(UdxStream):
    """A stream on an event loop whose timers come late, up to a millisecond."""

    def get_timer(self) -> float | None:
        timer = super().get_timer()
        return None if timer is None else math.ceil(timer * 1000) / 1000 + 0.0003


@pytest.mark.parametrize("seed", range(3))
def test_a_message_that_just_filled_a_burst_is_no_measure_of_the_next(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(seed, a=OnMilliseconds(1), a_to_b=Link(delay=0.025, rate=1e6), b_to_a=Link(delay=0.025))
    stream = pair.a.stream
    stream.write(noise(3_000_000))
    assert pair.run(lambda: not stream.buffered and not stream.unacked)
    bandwidth = stream.sender.congestion.bandwidth
    assert bandwidth == pytest.approx(1e6, rel=0.1)
    for _ in range(100):
        stream.write(bytes(rng.choice([100, 100, 300, rng.randint(2000, 10_000), rng.randint(2000, 60_000)])))
        assert pair.run(lambda: not stream.buffered and not stream.unacked)
        pair.run(seconds=0.1)
        assert stream.sender.congestion.bandwidth > bandwidth / 2


def test_delivery_rate_ignores_compressed_acknowledgements() -> None:
    rate = DeliveryRate()
    flight = rate.start_flight(10.0, 0)
    rate.delivered += 10_000
    assert rate.sample(flight, 10.01, 0.1) is None
    flight = rate.start_flight(11.0, 0)
    rate.delivered += 10_000
    assert rate.sample(flight, 11.1, 0.09) == pytest.approx(100_000)


def test_pacer_spreads_and_forgives_late_timers() -> None:
    pacer = Pacer()
    rate, quantum = 1_000_000.0, 2400
    assert pacer.budget(0.0, rate, quantum) == 6000
    pacer.spend(6000)
    ready = pacer.ready_at(rate, quantum)
    assert ready == pytest.approx(0.0024)
    assert pacer.budget(ready, rate, quantum) == pytest.approx(2400, abs=1)
    assert pacer.budget(1.0, rate, quantum) == 6000  # what idleness saved up is bounded
    pacer.spend(10_000)
    assert pacer.budget(1.004, rate, quantum) <= 0


def test_a_stream_probes_before_it_gives_up_even_after_one_very_slow_answer() -> None:
    rtt = RttEstimator()
    rtt.add_sample(5.0)
    assert rtt.probe_timeout(0) <= 3.0
    pair = Pair(1, a_to_b=Link(delay=2.5), b_to_a=Link(delay=2.5))
    pair.a.stream.write(b"slow")
    assert pair.run(lambda: pair.a.stream.unacked == 0 and len(pair.b.received) == 4)
    pair.a.link.delay = pair.b.link.delay = 0.02
    lost_until = pair.now + 1.0
    pair.a.link.blocked = lambda now, _data: now < lost_until
    pair.a.stream.write(b"lost once")
    assert pair.run(lambda: len(pair.b.received) == 13, seconds=10)
