"""What a stream counts (ring 1). Plain classes, as those of `events` and for the same reason."""


class _Counters:
    """Counters are equal when all of them are."""

    __slots__: tuple[str, ...] = ()

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._counts() == self._counts()

    __hash__ = None  # type: ignore[assignment] # they change

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={count}' for name, count in self._counts().items())})"


class Stats(_Counters):
    """Counters of received packets; those of the sending half are in `SenderStats`."""

    __slots__ = ("bad", "bytes", "dropped", "packets")

    packets: int
    bytes: int
    bad: int
    """No packets of this stream, or contradictions in themselves."""
    dropped: int
    """Outside of the window."""


class SenderStats(_Counters):
    """Counters of a sending half."""

    __slots__ = ("bad_acks", "bad_sacks", "bytes", "lost", "packets", "probe_timeouts", "retransmits")

    packets: int
    bytes: int
    retransmits: int
    lost: int
    probe_timeouts: int
    bad_acks: int
    bad_sacks: int
