"""The receiving half of a stream: order, duplicates, the window and what to acknowledge (ring 1).

`stream` feeds it packets whose header is already checked; in-order data takes the short way there
(`UdxStream.receive_datagrams`), everything else comes through `receive`.
"""

from typing import Final

from .ranges import RangeSet

MAX_AHEAD: Final = 32768  # packets beyond the next expected one; libudx itself reports at most 65536 ahead
MAX_SACK_RANGES: Final = 64
CAPACITY: Final = 4  # windows that may wait in all; the sender keeps to three (`sender.MAX_SPAN`)


class Receiver:
    """Puts packets in order and bounds what waits.

    The window advertises what the reader has not yet to take of `window` bytes. As libudx understands it, it limits
    what is under way and not what the peer knows to be held behind a gap; so `CAPACITY` windows may wait in all, and
    whatever was sent under an older, larger window still finds room. Packets beyond are dropped and not reported.
    """

    def __init__(self, window: int, initial_seq: int) -> None:
        self.window = max(window, 1)
        self.next_seq = initial_seq  # unbounded; the next one expected
        self.unread = 0  # bytes given out and not yet consumed
        self.chunks: list[bytes] = []  # data in order, not yet given out
        self.ended = False  # the peer's END and all before it arrived
        self.sack_ranges = RangeSet()
        self._end_seq: int | None = None
        self._early: dict[int, bytes] = {}  # behind a gap
        self._early_bytes = 0
        self.advertised = self.window  # what the peer was told last

    @property
    def holds_early(self) -> bool:
        """Tell whether packets wait behind a gap."""
        return bool(self._early)

    def receive(self, seq: int, payload: bytes, ends: bool) -> bool:
        """Take one DATA or END packet; return False when it had to be dropped.

        Duplicates are fine. Dropped are packets out of all range, behind the end, or beyond the window.
        """
        if seq < self.next_seq:
            return True
        if seq >= self.next_seq + MAX_AHEAD or self._contradicts_end(seq, ends):
            return False
        if seq != self.next_seq:
            return self._hold(seq, payload, ends)
        if len(payload) > self.room:
            return False
        self._take(payload, ends, seq)
        self.drain()
        return True

    @property
    def room(self) -> int:
        """The bytes that may come in order; they may fill a gap, so what waits behind it does not count."""
        return CAPACITY * self.window - self.unread

    def add_in_order(self, payloads: list[bytes], size: int) -> None:
        """Take the payloads of consecutive DATA packets that start at `next_seq`; the caller kept to `room`."""
        first, self.next_seq = self.next_seq, self.next_seq + len(payloads)
        self.chunks += payloads
        self.unread += size
        if self._early:  # what waited behind the gap may have come once more, as a repair that was not needed
            for seq in range(first, self.next_seq):
                self._early_bytes -= len(self._early.pop(seq, b""))
            self.sack_ranges.discard_below(self.next_seq)

    def drain(self) -> None:
        """Move what the gap held back and is now in order."""
        early = self._early
        if not early:
            return
        while (payload := early.pop(self.next_seq, None)) is not None:
            self._early_bytes -= len(payload)
            self._take(payload, self.next_seq == self._end_seq, self.next_seq)
        self.sack_ranges.discard_below(self.next_seq)

    def consume(self, size: int) -> bool:
        """Note that the reader took bytes; return True if the peer should be told of the room."""
        self.unread = max(self.unread - size, 0)
        return self._free - self.advertised >= max(self.window // 4, 1)

    @property
    def offer(self) -> int:
        """The window for the next packet; note it in `advertised` when one leaves that the peer reads it in."""
        return min(max(self._free, 0), 0xFFFFFFFF)

    @property
    def _free(self) -> int:
        """The window to advertise.

        What waits behind a gap costs nothing if the reader is quick: it will be gone with the gap, and a long path
        needs it for its full rate. The slower the reader, the more it counts, up to its full size.
        """
        if not self._early_bytes:
            return self.window - self.unread
        slowness = min(4 * self.unread / self.window, 1.0)
        return self.window - self.unread - int(self._early_bytes * slowness)

    def discard(self) -> None:
        """Drop all data that waits; the numbers stay for final acknowledgements."""
        self.chunks.clear()
        self._early.clear()
        self._early_bytes = 0
        self.sack_ranges = RangeSet()

    def _contradicts_end(self, seq: int, ends: bool) -> bool:
        if self._end_seq is not None:
            return seq > self._end_seq or (ends and seq != self._end_seq)
        highest = self.sack_ranges.highest
        return ends and highest is not None and seq < highest

    def _hold(self, seq: int, payload: bytes, ends: bool) -> bool:
        if seq in self._early:
            return True
        if self._early_bytes + len(payload) > self.room:
            return False
        if ends:
            self._end_seq = seq
        self._early[seq] = payload if isinstance(payload, bytes) else bytes(payload)
        self._early_bytes += len(payload)
        self.sack_ranges.add(seq, seq + 1)
        return True

    def _take(self, payload: bytes, ends: bool, seq: int) -> None:
        if payload:
            self.chunks.append(payload)
            self.unread += len(payload)
        self.next_seq = seq + 1
        if ends:
            self._end_seq = seq
            self.ended = True
