"""A UDX stream without I/O: packets and the time go in, packets, a timer and events come out (ring 1).

`streams` (ring 2) finds the stream of each datagram, calls `receive_datagrams`, takes the events, sends what
`datagrams_to_send` returns and wakes the stream at `get_timer`. `sender` and `receiver` are the two halves; this
module joins them into packets, and knows how a stream begins and ends.

The end of a stream. Both sides send END; when the own one is acknowledged and the peer's arrived the stream is closed,
but it stays for a while to acknowledge the END again, since the last acknowledgement may be lost (TCP's TIME_WAIT;
libudx has none). After `destroy`, or when the path died, it says DESTROY a few times, and again to whatever the peer
still sends.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

from .ackduty import AckDuty
from .burst import BurstHeader
from .events import Closed, DataReceived, Drained, EndReceived, Event, MessageReceived
from .farewell import Farewell
from .liveness import Liveness
from .mtu import BASE_MTU
from .packet import (
    DATA,
    DESTROY,
    END,
    HEADER,
    HEADER_BYTES,
    HEARTBEAT,
    MAGIC,
    MESSAGE,
    OVERHEAD_BYTES,
    SACK,
    SEQ_MASK,
    decode_sack,
    encode_sack,
    sack_length,
    unwrap,
)
from .patience import GIVE_UP_S
from .receiver import MAX_AHEAD, MAX_SACK_RANGES, Receiver
from .sender import Sender
from .stats import Stats

__all__ = ["Closed", "DataReceived", "Drained", "EndReceived", "Event", "MessageReceived", "UdxStream"]

DRAIN_THRESHOLD: Final = 256 * 1024  # unsent bytes below which the writer is called again
PROMPT_RTT_S: Final = 0.001  # a path as quick as this stays inside a host or a room
PROMPT_BYTES: Final = 4096  # more under way is bulk: its sender is busy anyway, and its reader may need the processor
MAX_QUEUED_MESSAGES: Final = 256
ECONNRESET: Final = "ECONNRESET"
ETIMEDOUT: Final = "ETIMEDOUT"

_Ack = tuple[bytes, int, int, int, int]  # packet, kind, window, seq, ack; numbers as they stand on the wire


class _Heard:
    """What the peer has said so far, so that what it repeats costs nothing."""

    __slots__ = ("ack", "any", "at", "ranges", "twice", "window")

    def __init__(self) -> None:
        self.any = False  # a packet has arrived
        self.at = 0.0
        self.ack = -1  # as it stood on the wire in the packet that was processed last, and its window:
        self.window = -1  # repetitions teach nothing
        self.ranges: set[tuple[int, int]] = set()
        self.twice = False  # a packet of this batch had come before

    def note(self, now: float) -> None:
        """Note that something arrived."""
        self.any = True
        self.at = now

    def is_known(self, ack: int, window: int) -> bool:
        """Tell whether a packet says what the one before said."""
        return ack == self.ack and window == self.window


class UdxStream:
    """One end of a reliable, ordered byte stream over datagrams, compatible with libudx.

    After each call take all events (`next_event`), send all of `datagrams_to_send`, and call `handle_timer` at
    `get_timer`. `now` is in seconds and never runs backwards. No method raises on what the network brought.
    """

    def __init__(
        self,
        local_id: int,
        *,
        mtu: int = BASE_MTU,
        max_mtu: int = 1500,
        receive_window: int = 4 * 1024 * 1024,
        initial_seq: int = 0,
        initial_remote_seq: int = 0,
    ) -> None:
        """Prepare a stream that the peer addresses as `local_id`; sizes in bytes, MTUs include the IP header."""
        self.local_id = local_id
        self.remote_id: int | None = None
        self.connected = False
        self.closed = False
        self.finished = False  # nothing is left to answer: the stream may be forgotten
        self.stats = Stats()
        self._sender = Sender(initial_seq, mtu, max_mtu, local_id, initial_remote_seq)
        self._receiver = Receiver(receive_window, initial_remote_seq)
        self._events: deque[Event] = deque()
        self._messages: deque[bytes] = deque()
        self._drain_wanted = False
        self._acks = AckDuty()
        self.liveness = Liveness()  # asked where there is nothing to send: without an answer the path is dead
        self._heard = _Heard()
        self._end_told = False
        self._farewell = Farewell()

    # -- state

    @property
    def received_any(self) -> bool:
        """Whether a packet of the peer has arrived."""
        return self._heard.any

    @property
    def srtt(self) -> float | None:
        """The smoothed round-trip time in seconds, `None` before the first measurement."""
        return self._sender.path.rtt.srtt

    @property
    def mtu(self) -> int:
        """The size of the largest IP packet in use."""
        return self._sender.path.search.mtu

    @property
    def buffered(self) -> int:
        """The bytes written and not yet sent for the first time; `Drained` comes when few are left."""
        return self._sender.queued

    @property
    def unacked(self) -> int:
        """The bytes sent and not yet acknowledged."""
        return self._sender.unacked

    @property
    def prompt_answer_s(self) -> float:
        """The seconds within which the peer should answer the little it was sent; 0 where that takes longer."""
        srtt = self._sender.path.rtt.srtt
        if srtt is None or srtt > PROMPT_RTT_S or not 0 < self._sender.unacked <= PROMPT_BYTES:
            return 0.0
        return 2 * srtt

    @property
    def may_hurry(self) -> bool:
        """Whether what is queued is the little that a peer nearby waits for: it knows all that was sent before."""
        srtt = self._sender.path.rtt.srtt
        return srtt is not None and srtt <= PROMPT_RTT_S and not self._sender.unacked and self.buffered <= PROMPT_BYTES

    @property
    def owes_only_ack(self) -> bool:
        """Whether an acknowledgement of data in order is all that may leave now: it may wait for a little."""
        return self._acks.due and not self.closed and not self._receiver.holds_early and not self._sender.has_work

    @property
    def sender(self) -> Sender:
        """The sending half, for its counters and estimates."""
        return self._sender

    @property
    def receiver(self) -> Receiver:
        """The receiving half, for its counters."""
        return self._receiver

    # -- what the application does

    def connect(self, remote_id: int, now: float) -> None:
        """Set the id the peer knows the stream by; what was queued, acknowledgements too, may leave now."""
        self.remote_id = remote_id
        self.connected = True
        self._heard.at = now

    def reset_path(self, now: float) -> None:
        """Begin anew with round-trip time, bandwidth and MTU: the socket or the peer's address changed."""
        self._sender.reset_path(now)
        self._heard.at = now

    def write(self, data: bytes) -> None:
        """Queue bytes; small writes share packets when they come before the next `datagrams_to_send`."""
        if self.closed or self._sender.own_end.wanted or not data:
            return
        self._sender.write(data if isinstance(data, bytes) else bytes(data))
        self._drain_wanted = self._sender.queued > DRAIN_THRESHOLD

    def end(self) -> None:
        """End the own side once all that was written is delivered; the peer may go on sending."""
        if not self.closed:
            self._sender.own_end.wanted = True

    def destroy(self) -> None:
        """Break the stream off: drop what was not delivered, tell the peer, close."""
        if not self.closed:
            self._break(None)

    def send_message(self, data: bytes) -> None:
        """Send one message, unordered and unreliable, that should fit the MTU less 48 bytes.

        Before `connect`, and while others wait, a bounded number is kept and the oldest are dropped.
        """
        if self.closed:
            return
        if len(self._messages) >= MAX_QUEUED_MESSAGES:
            self._messages.popleft()
        self._messages.append(bytes(data))

    def consume(self, size: int) -> bool:
        """Say that the reader took `size` bytes of those in `DataReceived`: the peer may send as many more.

        Returns whether it should be told so at once, by what `datagrams_to_send` returns.
        """
        if not self._receiver.consume(size) or self.closed:
            return False
        self._acks.due = True
        return True

    def next_event(self) -> Event | None:
        """Return the next event, `None` when there is none."""
        return self._events.popleft() if self._events else None

    # -- packets in

    def receive_datagrams(self, datagrams: Sequence[bytes], now: float) -> None:
        """Process a batch of packets; bad ones are dropped and counted.

        This is the hot path. Almost every packet is DATA, next in order; such packets cost one header and one slice,
        and are given to the receiver as a run. In the other direction go bare acknowledgements, one for each packet if
        the peer is libudx. The last acknowledgement of a run says all that the others did. The rest goes through
        `_receive_packet`. Conclusions are drawn, and one acknowledgement is made, once a batch.
        """
        if self.closed:
            self._receive_closed(datagrams)
            return
        unpack, local_id = HEADER.unpack_from, self.local_id
        run: list[bytes] = []
        run_bytes = 0
        expected, last_ack, last_window, room = self._usual()
        latest: _Ack | None = None  # the last acknowledgement of a run that says something new
        ranged = False  # it has ranges, which a packet without any does not say again
        next_seq, unacked = self._sender.next_seq, self._sender.next_seq - self._sender.acked_below
        for data in datagrams:
            size = len(data)
            if size < HEADER_BYTES:
                self.stats.bad += 1
                continue
            magic, kind, offset, stream_id, window, seq, ack = unpack(data)
            if magic != MAGIC or stream_id != local_id:
                self.stats.bad += 1
                continue
            if seq == expected and kind == DATA and not offset and run_bytes + size <= room:
                known = ack == last_ack and window == last_window
                if known or (not ranged and (next_seq - ack) & SEQ_MASK <= unacked):
                    if not known:
                        unacked = (next_seq - ack) & SEQ_MASK
                        latest = data, kind, window, seq, ack
                        last_ack, last_window = ack, window
                    run.append(data[HEADER_BYTES:])
                    run_bytes += size - HEADER_BYTES
                    expected = (seq + 1) & SEQ_MASK
                    continue
            bare = (kind == 0 and size == HEADER_BYTES and not ranged) or (kind == SACK and not offset)
            if bare and seq == expected and (next_seq - ack) & SEQ_MASK <= unacked:
                unacked = (next_seq - ack) & SEQ_MASK
                latest = data, kind, window, seq, ack
                ranged = kind == SACK
                if window != last_window:
                    last_ack = -1  # what comes with the window of before says something new
                self.stats.packets += 1
                self.stats.bytes += size
                continue
            self._settle(run, run_bytes, latest, now)
            run, run_bytes, latest, ranged = [], 0, None, False
            self.stats.packets += 1
            self.stats.bytes += size
            self._receive_packet(data, kind, offset, window, seq, ack, now)
            if self.closed:
                return
            expected, last_ack, last_window, room = self._usual()
        self._settle(run, run_bytes, latest, now)
        self._finish_batch(now)

    def _usual(self) -> tuple[int, int, int, int]:
        """Return what the next packet of a run has as seq, ack and window, and how many bytes there is room for."""
        receiver, heard = self._receiver, self._heard
        room = 0 if receiver.ended else receiver.room
        return receiver.next_seq & SEQ_MASK, heard.ack, heard.window, room

    def _settle(self, run: list[bytes], run_bytes: int, latest: _Ack | None, now: float) -> None:
        """Take payloads in order, and the last of a run of acknowledgements."""
        if run:
            self.stats.packets += len(run)
            self.stats.bytes += run_bytes + HEADER_BYTES * len(run)
            self._receiver.add_in_order(run, run_bytes)
            self._receiver.drain()
            self._acks.due = True
        if latest is not None:
            data, kind, window, seq, ack = latest
            heard = self._heard
            heard.any, heard.at = True, now
            if kind or ack != heard.ack or window != heard.window:
                self._receive_ack(data, kind, window, unwrap(seq, self._receiver.next_seq), ack, now)

    def _receive_packet(
        self, data: bytes, kind: int, offset: int, window: int, wire_seq: int, wire_ack: int, now: float
    ) -> None:
        """Process one packet in the order of libudx (src/udx.c, process_packet)."""
        seq = unwrap(wire_seq, self._receiver.next_seq)
        if seq > self._receiver.next_seq + MAX_AHEAD:
            # No peer is so far ahead; libudx would believe the window of such a packet, and no later one's.
            self.stats.dropped += 1
            return
        self._heard.note(now)
        if kind & HEARTBEAT:
            self._acks.due = True
            return
        start = HEADER_BYTES + sack_length(kind, offset, len(data))
        if start > len(data):
            self.stats.bad += 1
            return
        if kind & (DATA | END):
            self._acks.due = True
            self._heard.twice |= seq < self._receiver.next_seq
            if not self._receiver.receive(seq, data[start:], bool(kind & END)):
                self.stats.dropped += 1
        if kind & DESTROY and seq >= self._receiver.next_seq:
            self._finish_batch(now)  # what came in order before it is the reader's
            if not self.closed:
                self._close(ECONNRESET)
            self.finished = True
            return
        if kind & MESSAGE:
            self._events.append(MessageReceived(bytes(data[start:])))
        if not kind & SACK and self._heard.is_known(wire_ack, window):
            return
        self._receive_ack(data, kind, window, seq, wire_ack, now)

    def _receive_ack(self, data: bytes, kind: int, window: int, seq: int, wire_ack: int, now: float) -> None:
        sender, heard = self._sender, self._heard
        ack = unwrap(wire_ack, sender.acked_below)
        sender.update_window(window, seq, ack, now)
        if not sender.receive_ack(ack, now):
            return
        if kind & SACK:
            # Most ranges are those of the packet before, and there may be dozens.
            ranges, known, near = decode_sack(data)[:MAX_SACK_RANGES], heard.ranges, sender.acked_below
            news = [(unwrap(pair[0], near), unwrap(pair[1], near)) for pair in ranges if pair not in known]
            sender.receive_sack(news, now)
            heard.ranges = set(ranges)
            if window != heard.window:
                heard.ack = -1  # a packet with the window of before says something new
        elif ack == sender.acked_below and window == sender.peer.size:
            heard.ack, heard.window = wire_ack, window

    def _finish_batch(self, now: float) -> None:
        receiver = self._receiver
        if receiver.chunks:
            heard = self._heard
            heard.any, heard.at = True, now
            data = receiver.chunks[0] if len(receiver.chunks) == 1 else b"".join(receiver.chunks)
            receiver.chunks.clear()
            self._events.append(DataReceived(bytes(data)))
        if receiver.ended and not self._end_told:
            self._end_told = self._sender.own_end.peer_ended = True
            self._events.append(EndReceived())
        acks = self._acks
        if acks.due:
            if receiver.holds_early or self._heard.twice:
                self._heard.twice = False
                acks.begin(self.srtt, now)
            else:
                acks.at = None  # the peer knows all, or speaks
        self._sender.finish_acks(now)
        if self._end_told and self._sender.end_acked:
            self._close(None)
            self._farewell.linger(now, heard=True)

    def _receive_closed(self, datagrams: Sequence[bytes]) -> None:
        """Answer a peer that does not know yet: again with the last acknowledgement, or with DESTROY."""
        for data in datagrams:
            if len(data) < HEADER_BYTES or HEADER.unpack_from(data)[0] != MAGIC:
                continue
            kind = data[2]
            if kind & DESTROY:
                self.finished = True
            elif self._farewell.is_broken_off:
                self._farewell.is_due = True
            elif kind & (DATA | END | HEARTBEAT):
                self._acks.due = True

    # -- packets out

    def datagrams_to_send(self, now: float) -> list[bytes]:
        """Return all packets that may leave now; call again after every other call, and at `get_timer`."""
        remote_id = self.remote_id
        if remote_id is None or self.finished:
            return []
        if self.closed:
            return self._last_words(remote_id, now)
        receiver, sender = self._receiver, self._sender
        window, ack = receiver.offer, receiver.next_seq & SEQ_MASK
        end_ack = (receiver.next_seq - 1) & SEQ_MASK if receiver.ended else ack
        out = sender.send(BurstHeader(remote_id, window, ack, end_ack), now)
        front: list[bytes] = []
        acks = self._acks
        if acks.due and (not out or receiver.holds_early or out[0][2] != DATA):
            front.append(self._ack_packet(remote_id, window))
        acks.due = False
        while self._messages:
            front.append(self._bare_packet(MESSAGE, remote_id, window) + self._messages.popleft())
        if front or out:
            receiver.advertised = window
        if sender.peer.probe.due:  # nobody reads the window of a HEARTBEAT
            sender.peer.probe.due = False
            front.append(self._bare_packet(HEARTBEAT, remote_id, window))
        if self._drain_wanted and sender.queued <= DRAIN_THRESHOLD:
            self._drain_wanted = False
            self._events.append(Drained())
        return front + out if front else out

    def heartbeat(self, remote_id: int) -> bytes:
        """Return a packet for another way than the stream's: the peer answers it, and nothing else comes of it."""
        return self._bare_packet(HEARTBEAT, remote_id, self._receiver.offer)

    def _bare_packet(self, kind: int, remote_id: int, window: int) -> bytes:
        """Return a packet that uses up no sequence number."""
        seq, ack = self._sender.next_seq & SEQ_MASK, self._receiver.next_seq & SEQ_MASK
        return HEADER.pack(MAGIC, kind, 0, remote_id, window, seq, ack)

    def _ack_packet(self, remote_id: int, window: int) -> bytes:
        ranges = self._receiver.sack_ranges
        if not ranges:
            return self._bare_packet(0, remote_id, window)
        # Data offset 0: everything behind the header is ranges, as libudx sends them.
        limit = min(MAX_SACK_RANGES, (self.mtu - OVERHEAD_BYTES) // 8)
        return self._bare_packet(SACK, remote_id, window) + encode_sack(ranges.edges(limit))

    def _last_words(self, remote_id: int, now: float) -> list[bytes]:
        """Return what a closed stream still has to say."""
        self._farewell.linger(now, heard=self.received_any)
        out: list[bytes] = []
        if self._acks.due:
            out.append(self._bare_packet(0, remote_id, self._receiver.offer))
        if self._farewell.take_destroy(now):
            out.append(self._bare_packet(DESTROY, remote_id, 0))
        self._acks.due = False
        return out

    # -- timers

    def get_timer(self) -> float | None:
        """Return when to call `handle_timer`, `None` for never."""
        if self.finished:
            return None
        if self.closed:
            return self._farewell.next_at
        if not self.connected:
            return None
        timer = self._sender.get_timer()
        for other in (self._acks.at, self.liveness.at):
            if other is not None and (timer is None or other < timer):
                timer = other
        return timer

    def handle_timer(self, now: float) -> None:
        """Act on what is due at `now`; then call `datagrams_to_send`."""
        if self.closed:
            if self._farewell.finish_at is not None and self._farewell.finish_at <= now:
                self.finished = True
            return
        if not self.connected:
            return
        self._acks.handle_timer(now)
        sender = self._sender
        sender.handle_timer(now, self._heard.at)
        sender.peer.probe.due |= self.liveness.handle_timer(self._heard.at, now)
        if not sender.patience.is_over and self.liveness.silence(now) < GIVE_UP_S:
            return
        if self._end_told and sender.only_end_unacked:
            # The peer has all data and ended itself; it closed and forgot the stream before this END reached it.
            self._close(None)
            self.finished = True
        else:
            self._break(ETIMEDOUT)

    # -- the end

    def _break(self, error: str | None) -> None:
        """Close, and tell the peer (if it is known) now and a few times more."""
        self._close(error)
        self._farewell.is_broken_off = True
        self.finished = not self.connected

    def _close(self, error: str | None) -> None:
        self.closed = True
        self._sender.discard()
        self._receiver.discard()
        self._messages.clear()
        self._events.append(Closed(error))
