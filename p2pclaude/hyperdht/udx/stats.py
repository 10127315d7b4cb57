"""What a stream counts (ring 1)."""

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """Counters of received packets; those of the sending half are in `SenderStats`."""

    packets: int = 0
    bytes: int = 0
    bad: int = 0  # no packets of this stream, or contradictions in themselves
    dropped: int = 0  # outside of the window


@dataclass(slots=True)
class SenderStats:
    """Counters of a sending half."""

    packets: int = 0
    bytes: int = 0
    retransmits: int = 0
    lost: int = 0
    probe_timeouts: int = 0
    bad_acks: int = 0
    bad_sacks: int = 0
