"""Search for the largest packet a path carries (ring 1).

Probes are full data packets padded to the size under test, so a lost one costs a retransmission and nothing else.
Sizes are whole IP packets. The search halves the unknown interval; padding limits a step up to 255 bytes.
"""

from typing import Final

from .packet import DATAGRAM_OVERHEAD_BYTES, MAX_PADDING

BASE_MTU: Final = 1200  # carried by practically every path; libudx UDX_MTU_BASE
BLACK_HOLE_MTU: Final = 1000  # used when not even that passes
MAX_TRIES: Final = 3
CLOSE_ENOUGH: Final = 16  # the search ends when fewer bytes are in doubt


class MtuSearch:
    """State of the search on one path: `mtu` is safe to use, `wanted` the size to try, or 0."""

    __slots__ = ("_base", "_high", "_largest", "_max", "_outstanding", "_proven_order", "_tries", "mtu", "wanted")

    def __init__(self, mtu: int, max_mtu: int) -> None:
        self._max = max(mtu, max_mtu)
        self._largest = mtu  # that was ever in use
        self.restart(mtu, 0)

    def restart(self, mtu: int, order: int) -> None:
        """Begin again from a safe size: transmissions from `order` on take another path."""
        self.mtu = mtu
        self._base = mtu
        self._proven_order = order - 1  # the latest transmission of more than `BLACK_HOLE_MTU` that arrived
        self._high = self._max  # the largest size not known to fail
        self._tries = 0
        self._outstanding = 0
        self.wanted = self._choose()

    @property
    def done(self) -> bool:
        """Tell whether nothing is left to try."""
        return self._high - self.mtu < CLOSE_ENOUGH and not (self.mtu < self._high == self._max)

    def part(self, datagrams: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Part what leaves whole or not at all from packets that once were small enough, and may be fragmented now."""
        if self.mtu >= self._largest:
            return datagrams, []
        most = self.mtu - DATAGRAM_OVERHEAD_BYTES
        oversized = [data for data in datagrams if len(data) > most and not data[3]]  # a padded one is to be lost
        return [data for data in datagrams if len(data) <= most or data[3]], oversized

    def _choose(self) -> int:
        """Return the size to probe now, or 0 while a probe is under way or the search is over."""
        if self._outstanding or self.mtu >= self._high or self.done:
            return 0
        reach = self.mtu + MAX_PADDING
        if self._high == self._max:  # nothing failed so far: the usual path carries the maximum
            return min(self._max, reach)
        return min((self.mtu + self._high + 1) // 2, reach)

    def probe_sent(self, size: int) -> None:
        """Note that a probe left; the next one waits for its fate."""
        self._outstanding = size
        self.wanted = 0

    def probe_acked(self, size: int) -> None:
        """Raise the MTU: a packet of this size arrived."""
        self._outstanding = 0
        self._tries = 0
        self.mtu = max(self.mtu, size)
        self._largest = max(self._largest, size)
        self.wanted = self._choose()

    def probe_lost(self, size: int) -> None:
        """Note a lost probe; three of one size mean that the size does not pass."""
        self._outstanding = 0
        self._tries += 1
        if self._tries >= MAX_TRIES:
            self._tries = 0
            self._high = max(self.mtu, size - 1)
        self.wanted = self._choose()

    def packet_lost(self, size: int, first_order: int) -> None:
        """Note that a packet was lost again and again since transmission `first_order`.

        If nothing as large has arrived since, the path swallows that size: fall back to the base, then lower, and
        search from there.
        """
        if size <= BLACK_HOLE_MTU or first_order <= self._proven_order:
            return
        self.mtu = self._base if min(self.mtu, size) > self._base else min(self.mtu, BLACK_HOLE_MTU)
        self._high = max(min(self._high, size - 1), self.mtu)
        self._outstanding = self._tries = 0
        self.wanted = self._choose()

    def packet_arrived(self, size: int, order: int) -> None:
        """Note that transmission `order`, a large packet, arrived.

        If it is larger than what is in use, the fallback may have been needless (the path was dead, not narrow), or
        it came in fragments: probes will tell.
        """
        if size <= self.mtu:
            self._proven_order = max(self._proven_order, order)
        elif self._high < self._max:
            self._high = self._max
            self.wanted = 0 if self._outstanding else self._choose()
