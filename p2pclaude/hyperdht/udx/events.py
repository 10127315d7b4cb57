"""What a UDX stream tells its owner; taken one by one with `UdxStream.next_event` (ring 1)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes of the stream, in order; tell the stream with `consume` when they were taken."""

    data: bytes


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """One unordered, unreliable message."""

    data: bytes


@dataclass(frozen=True, slots=True)
class EndReceived:
    """The peer ended its side; no more data will come."""


@dataclass(frozen=True, slots=True)
class Drained:
    """`buffered` fell to the drain threshold after a write: there is room again."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The stream is over: `error` is `None` after a clean end or an own destroy, else ECONNRESET or ETIMEDOUT."""

    error: str | None


Event = DataReceived | MessageReceived | EndReceived | Drained | Closed
