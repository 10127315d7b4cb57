"""What a batch of acknowledgements adds up to."""

from p2pclaude.hyperdht.udx.ackbatch import AckBatch
from p2pclaude.hyperdht.udx.packet import DATA
from p2pclaude.hyperdht.udx.rate import Flight
from p2pclaude.hyperdht.udx.recovery import Packet


def flight(sent_at: float) -> Flight:
    """Return a snapshot of that moment."""
    return Flight(sent_at, 0, sent_at, sent_at, False)


def test_a_batch_adds_up() -> None:
    batch = AckBatch()
    first, second, third = (Packet(i, DATA, b"", 100 + i, flight(1.0 + i / 10), i) for i in range(3))
    third.count = 2  # sent again: its round trip says nothing
    for packet in (second, third, first):
        batch.add(packet, 2.0)
    batch.ended_at = 2.5
    assert batch.newest is third
    acked, rtt, ended_at = batch.take()
    assert (acked, ended_at) == (303, 2.5) and rtt is not None and abs(rtt - 0.9) < 1e-9
    assert batch.newest is None and batch.take() == (0, None, 2.5)
