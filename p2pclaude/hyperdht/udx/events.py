"""What a UDX stream tells its owner; taken one by one with `UdxStream.next_event` (ring 1).

Plain classes, where dataclasses would do: every tool imports these, and making five of them takes 2 ms of its start.
"""


class _Event:
    """Events are equal when they say the same."""

    __slots__: tuple[str, ...] = ()

    def _said(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._said() == self._said()

    def __hash__(self) -> int:
        return hash((type(self), self._said()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._said()))})"


class DataReceived(_Event):
    """Bytes of the stream, in order; tell the stream with `consume` when they were taken."""

    __slots__ = ("data",)
    __match_args__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class MessageReceived(_Event):
    """One unordered, unreliable message."""

    __slots__ = ("data",)
    __match_args__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class EndReceived(_Event):
    """The peer ended its side; no more data will come."""

    __slots__ = ()


class Drained(_Event):
    """`buffered` fell to the drain threshold after a write: there is room again."""

    __slots__ = ()


class Closed(_Event):
    """The stream is over: `error` is `None` after a clean end or an own destroy, else ECONNRESET or ETIMEDOUT."""

    __slots__ = ("error",)
    __match_args__ = ("error",)

    def __init__(self, error: str | None) -> None:
        self.error = error


Event = DataReceived | MessageReceived | EndReceived | Drained | Closed
