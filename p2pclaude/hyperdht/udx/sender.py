"""The sending half of a stream: queue, packets under way, acknowledgements, and what may leave when (ring 1).

`stream` calls `receive_ack` for each packet that says something new and `finish_acks` once a batch, then `send` to
get what may leave, then `get_timer`. The parts know one thing each: `recovery` what is lost, `congestion` how much may
be under way, `pacing` when, `mtu` how large, `rtt` how long an answer takes.
"""

import heapq
from typing import Final

from .ackbatch import AckBatch
from .burst import Burst, BurstHeader
from .congestion import Bbr
from .mtu import BLACK_HOLE_MTU, MtuSearch
from .pacing import Pacer
from .packet import DATA, END, HEADER, MAGIC, OVERHEAD_BYTES, SEQ_MASK
from .ranges import RangeSet
from .rate import AckSample, DeliveryRate
from .recovery import DELIVERED, IN_FLIGHT, LOST, LossDetector, Packet
from .rtt import RttEstimator
from .sendqueue import SendQueue
from .stats import SenderStats
from .windowprobe import WindowProbe

GIVE_UP_S: Final = 11.8  # without progress; an outage of 10 s must kill nothing, and probes leave every second
NEW_PATHS_S: Final = 60.0  # without progress, in which each new path has that time; a hole is punched in less
MAX_UNDER_WAY: Final = 64 * 1024 * 1024  # whatever window the peer offers
MAX_PACKETS_UNDER_WAY: Final = 65536  # libudx reports no gaps further ahead
MAX_BURST_PACKETS: Final = 256  # of one call: others want a turn
PROBES: Final = 2  # packets a probe timeout sends: one of them may be lost as well
OUTAGE_ATTEMPTS: Final = 3  # probe timeouts in a row that mean more than a lost tail
BLACK_HOLE_ATTEMPTS: Final = 3  # transmissions of one full packet, all lost while others arrive
MAX_SPAN: Final = 3  # windows between the first unacknowledged byte and the last


class Sender:
    """Sends bytes as numbered packets until each is acknowledged."""

    def __init__(self, initial_seq: int, mtu: int, max_mtu: int, variety: int = 0, initial_remote_seq: int = 0) -> None:
        self.stats = SenderStats()
        self.rtt = RttEstimator()
        self.search = MtuSearch(mtu, max_mtu)
        self.congestion = Bbr(mtu, variety)
        self.acked_below = initial_seq  # unbounded, as next_seq
        self.next_seq = initial_seq
        self.unacked = 0  # payload bytes from the first unacknowledged packet on
        self.in_flight = 0  # bytes on the wire, neither acknowledged nor lost
        self.end_queued = False
        self.peer_ended = False
        self.end_seq: int | None = None
        self.peer_window = 4 * 1024 * 1024  # until the peer says; libudx UDX_DEFAULT_RWND_MAX
        self.give_up = False  # the path is dead
        self.window_probe = WindowProbe()
        self._base_mtu = mtu
        self._variety = variety
        self._largest_window = 0
        self._sacked_bytes = 0  # payload the peer holds behind a gap
        self._queue = SendQueue()
        self._packets: dict[int, Packet] = {}
        self._sacked = RangeSet()
        self._lost: list[int] = []  # heap of sequence numbers to send again; outdated ones are skipped
        self._loss = LossDetector(self.rtt)
        self._rate = DeliveryRate()
        self._pacer = Pacer()
        self._order = 0
        self._ran_dry = False  # all that there was to send had left
        self._probe_count = 0  # probe timeouts since the last progress
        self._probes_due = 0
        self._last_sent_at = 0.0
        self._progress_at = 0.0
        self._answered_at = 0.0  # the same, but that new paths do not move it
        self._paced_until: float | None = None
        self._window_from = (initial_remote_seq - 1, 0)  # (seq, ack) of the packet the peer's window is from
        self._batch = AckBatch()

    @property
    def queued(self) -> int:
        """The bytes written and not yet sent."""
        return self._queue.size

    @property
    def has_work(self) -> bool:
        """Whether there is something to send, as soon as it may leave."""
        return bool(self._queue.size or self._lost or self._probes_due or self._end_due)

    @property
    def end_acked(self) -> bool:
        """Tell whether the peer has everything and knows of the end."""
        return self.end_seq is not None and self.acked_below > self.end_seq

    @property
    def only_end_unacked(self) -> bool:
        """Tell whether nothing but a bare END lacks its acknowledgement."""
        return self.end_seq is not None and self.acked_below == self.end_seq and not self.unacked

    @property
    def spurious(self) -> int:
        """Retransmissions that turned out to be needless."""
        return self._loss.spurious

    def write(self, data: bytes) -> None:
        """Queue bytes."""
        self._queue.append(data)

    def discard(self) -> None:
        """Drop everything queued and under way (the stream is over); the numbers stay."""
        self._queue.clear()
        self._packets.clear()
        self._lost.clear()
        self._sacked = RangeSet()
        self._loss = LossDetector(self.rtt)
        self.unacked = self.in_flight = self._sacked_bytes = 0
        self._paced_until = None
        self.window_probe.stop()

    def reset_path(self, now: float) -> None:
        """Begin anew with another path: its round-trip time, bandwidth and packet size are unknown."""
        self._conclude()
        self.rtt.reset()
        self.search.restart(self._base_mtu, self._order)
        for packet in self._packets.values():
            packet.padded_mtu = 0
        self.congestion = Bbr(self._base_mtu, self._variety)
        self._pacer = Pacer()
        self._loss.forget_path()
        # Not for ever: a peer that comes by ever new ways but acknowledges nothing must not keep us.
        self._progress_at = max(self._progress_at, min(now, self._answered_at + NEW_PATHS_S))
        self._probe_count = 0
        self._probes_due = PROBES if self._packets else 0

    # -- acknowledgements

    def update_window(self, window: int, seq: int, ack: int, now: float) -> None:
        """Take the peer's window unless an older or impossible packet brought it (the rule of RFC 9293 3.10.7.4)."""
        if not self.acked_below <= ack <= self.next_seq:
            return
        if self._window_from[0] < seq or (self._window_from[0] == seq and self._window_from[1] <= ack):
            self._window_from = (seq, ack)
            if self.peer_window < self.search.mtu <= window:
                self._progress_at = now  # what the peer had no room for gets its full time again
            self.peer_window = min(window, MAX_UNDER_WAY)
            self._largest_window = max(self._largest_window, self.peer_window)

    def receive_ack(self, ack: int, now: float) -> bool:
        """Take a cumulative acknowledgement (unbounded); return False when it covers what was never sent."""
        if ack > self.next_seq:
            self.stats.bad_acks += 1
            return False
        if self._sacked:
            ack = self._sacked.end_behind(ack)  # what is held behind no gap is as good as acknowledged
        packets = self._packets
        seq = self.acked_below
        while seq < ack:
            seq = self._deliver_run(seq, ack, now)
            if seq < ack:
                packet = packets.pop(seq)
                self.unacked -= len(packet.payload)
                if packet.state == DELIVERED:
                    self._loss.sacked -= 1
                    self._sacked_bytes -= len(packet.payload)
                else:
                    self._deliver(packet, now)
                seq += 1
        if ack > self.acked_below:
            self.acked_below = ack
            self._sacked.discard_below(ack)
        return True

    def _deliver_run(self, first: int, ack: int, now: float) -> int:
        """Account for packets from `first` on that left once, in order, and arrived in order; return where that ends.

        The hot path of acknowledgements. All that is learnt from such packets, the last of them teaches.
        """
        if first < self._loss.highest_seq:
            return first  # it came late
        packets, mtu = self._packets, self.search.mtu
        last = None
        size = 0
        for seq in range(first, ack):
            packet = packets[seq]
            if packet.count != 1 or packet.state != IN_FLIGHT or packet.padded_mtu or packet.size > mtu:
                break
            del packets[seq]
            packet.state = DELIVERED
            size += packet.size
            last = packet
        if last is None:
            return first
        self.unacked -= size - (last.seq + 1 - first) * OVERHEAD_BYTES
        self.in_flight -= size
        self._batch.acked += size - last.size
        self._rate.delivered += size - last.size
        self._deliver(last, now)
        return last.seq + 1

    def receive_sack(self, ranges: list[tuple[int, int]], now: float) -> None:
        """Take ranges the peer holds behind a gap (unbounded numbers, end exclusive)."""
        for start, end in ranges:
            if not self.acked_below < start < end <= self.next_seq:
                # Ranges that the cumulative acknowledgement overtook are merely old.
                if end > self.next_seq or start >= end:
                    self.stats.bad_sacks += 1
                continue
            for first, last in self._sacked.add(start, end):
                for seq in range(first, last):
                    packet = self._packets[seq]
                    self._deliver(packet, now)
                    self._loss.sacked += 1
                    self._sacked_bytes += len(packet.payload)

    def _deliver(self, packet: Packet, now: float) -> None:
        """Account for the first acknowledgement of a packet."""
        if packet.state == IN_FLIGHT:
            self.in_flight -= packet.size
        packet.state = DELIVERED
        self._rate.delivered += packet.size
        self._loss.on_delivered(packet, now)
        self._batch.add(packet, now)
        if packet.size > BLACK_HOLE_MTU or packet.padded_mtu:
            self.search.packet_arrived(packet.size, packet.order)
            if packet.padded_mtu and packet.count == 1:
                self.search.probe_acked(packet.padded_mtu)
            self.congestion.mss = self.search.mtu

    def finish_acks(self, now: float) -> None:
        """End a batch: draw the conclusions, now or with the timer.

        If nothing is under way they change nothing for a single packet; so one that answers the batch leaves first.
        """
        self._batch.ended_at = now
        if self._packets or self._probe_count:
            self._conclude()

    def _conclude(self) -> None:
        """Draw the conclusions from acknowledgements: round trip, losses, congestion, timers."""
        newest = self._batch.newest
        if newest is None:
            return
        acked, rtt, now = self._batch.take()
        if newest.count > 1:
            rtt = None  # a repair fills a gap: what was sent once before it may have arrived long ago
        if rtt is not None:
            self.rtt.add_sample(rtt)
        if self._probe_count >= OUTAGE_ATTEMPTS:
            self.congestion.on_outage()
        self._probe_count = self._probes_due = 0
        self._progress_at = self._answered_at = max(self._progress_at, now)
        lost = self._detect_losses(now)
        flight = newest.flight
        rate = self._rate.sample(flight, now, self.rtt.minimum)
        sample = AckSample(
            acked, lost, self._rate.delivered, flight.delivered, self.in_flight, rate, flight.app_limited, rtt
        )
        self.congestion.on_ack(sample, now)

    def _detect_losses(self, now: float) -> int:
        """Move lost packets to the repair queue; return their bytes."""
        size = 0
        for packet in self._loss.detect(self.acked_below, self.next_seq, now):
            size += packet.size
            self.stats.lost += 1
            self._queue_repair(packet)
        self.in_flight -= size
        return size

    def _queue_repair(self, packet: Packet) -> None:
        heapq.heappush(self._lost, packet.seq)
        if packet.padded_mtu:
            self._strip_padding(packet)
        elif packet.count >= BLACK_HOLE_ATTEMPTS:
            self._suspect_size(packet, packet.first_order)

    def _strip_padding(self, packet: Packet) -> None:
        """Let a probe travel again as an ordinary packet."""
        self.search.probe_lost(packet.padded_mtu)
        packet.padded_mtu = 0

    def _suspect_size(self, packet: Packet, since: int) -> None:
        """Let the search draw its conclusion from a packet of which no transmission has arrived since that one.

        Only new packets get smaller. One that has left keeps its number and payload, for the peer may have it, and
        numbers count packets: `streams` lets routers fragment it.
        """
        self.search.packet_lost(packet.size, since)
        self.congestion.mss = self.search.mtu

    # -- sending

    def send(self, burst_header: BurstHeader, now: float) -> list[bytes]:
        """Return the packets that may leave now: probes, repairs, new data."""
        self._paced_until = None
        if self._queue.size > self.search.mtu:
            self._conclude()
        if not self.has_work:
            return []
        if not self._packets:
            self._progress_at = self._answered_at = now
        budget = self._pacer.budget(now, self.congestion.pacing_rate, self.congestion.quantum)
        allowance = min(self.congestion.window - self.in_flight, budget)
        if self._ran_dry and allowance > 0:
            self._rate.mark_app_limited(self.in_flight)
        burst = Burst(burst_header, self._rate.start_flight(now, self.in_flight))
        before = self.stats.bytes
        if self._probes_due:
            self._send_probes(burst)
        self._send_repairs(burst, allowance - (self.stats.bytes - before))
        self._send_new(burst, allowance - (self.stats.bytes - before))
        spent = self.stats.bytes - before
        if spent:
            self._pacer.spend(spent)
            self._last_sent_at = now
        self._after_send(allowance - spent, budget - spent, now)
        return burst.packets

    @property
    def _end_due(self) -> bool:
        """Tell whether END may leave: in a packet of its own, and last.

        A peer that has ended is gone when it got this END; libudx acknowledges it once, and if that is lost nothing
        tells what else arrived. So such a peer is sent END only when it has acknowledged all data.
        """
        if not self.end_queued or self.end_seq is not None or self._queue.size:
            return False
        return not (self.peer_ended and self._packets)

    def _send_probes(self, burst: Burst) -> None:
        """Make the peer answer: what its reader waits for, then repairs or new data, else the last packet again."""
        due, self._probes_due = self._probes_due, 0
        first = next((packet for packet in self._packets.values() if packet.state != DELIVERED), None)
        if first is not None and first.state == IN_FLIGHT:
            due -= self._send_again(burst, first)
        sent_before = self.stats.packets
        self._send_repairs(burst, due * self.search.mtu)
        due -= self.stats.packets - sent_before
        if due > 0:
            new_before = self.stats.packets
            self._send_new(burst, 1)
            if self.stats.packets == new_before:
                self._send_again(burst, self._last_in_flight())

    def _send_again(self, burst: Burst, packet: Packet | None) -> int:
        if packet is None or packet.flight is burst.flight:
            return 0
        if packet.padded_mtu:
            self._strip_padding(packet)
        self._transmit(burst, packet)
        return 1

    def _first_in_flight(self) -> Packet | None:
        return next((packet for packet in self._packets.values() if packet.state == IN_FLIGHT), None)

    def _last_in_flight(self) -> Packet | None:
        return next((packet for packet in reversed(self._packets.values()) if packet.state == IN_FLIGHT), None)

    def _send_repairs(self, burst: Burst, allowance: int) -> None:
        while self._lost and allowance > 0:
            packet = self._packets.get(heapq.heappop(self._lost))
            if packet is None or packet.state != LOST:
                continue
            packet.state = IN_FLIGHT
            self.in_flight += packet.size
            self._transmit(burst, packet)
            allowance -= packet.size

    def _transmit(self, burst: Burst, packet: Packet) -> None:
        """Send a packet another time, with current acknowledgement and window."""
        packet.count += 1
        packet.order = self._order
        packet.flight = burst.flight
        self._order += 1
        self._loss.sent.append((packet.order, packet))
        burst.add(packet)
        self.stats.retransmits += 1
        self.stats.packets += 1
        self.stats.bytes += packet.size

    def _send_new(self, burst: Burst, allowance: int) -> None:
        """Cut new packets from the queue: the hot path of sending.

        All but the last few of a stream are DATA packets of full size; whatever the burst shares is looked up once.
        """
        queue, packets, flight = self._queue, self._packets, burst.flight
        take, on_sent, add, pack = queue.take, self._loss.sent.append, burst.packets.append, HEADER.pack
        remote_id, window, ack, _ = burst.header
        payload_size = self.search.mtu - OVERHEAD_BYTES
        room = self._window_room()
        first = seq = self.next_seq
        end = min(first + MAX_BURST_PACKETS, self.acked_below + MAX_PACKETS_UNDER_WAY)
        order = self._order
        sent_bytes = 0
        while sent_bytes < allowance and seq < end:
            size = min(payload_size, queue.size)
            if size > room and size:
                # Part of a packet is worth sending only when nothing under way will open the window.
                if packets or room <= 0:
                    break
                size = room
            if not size and not self._end_due:
                break
            wire_size = size + OVERHEAD_BYTES
            if size:
                payload = take(size)
                packet = packets[seq] = Packet(seq, DATA, payload, wire_size, flight, order)
                padding = self._padding(size, payload_size) if self.search.wanted else 0
                header = pack(MAGIC, DATA, padding, remote_id, window, seq & SEQ_MASK, ack)
                if padding:
                    packet.padded_mtu = wire_size + padding
                    self.search.probe_sent(packet.padded_mtu)
                    header += bytes(padding)
                add(header + payload)
            else:
                packet = packets[seq] = Packet(seq, END, b"", wire_size, flight, order)
                burst.add(packet)
                self.end_seq = seq
            on_sent((order, packet))
            order += 1
            seq += 1
            room -= size
            sent_bytes += wire_size
        self._order = order
        self.next_seq = seq
        self.unacked += sent_bytes - (seq - first) * OVERHEAD_BYTES
        self.in_flight += sent_bytes
        self.stats.packets += seq - first
        self.stats.bytes += sent_bytes

    def _window_room(self) -> int:
        """Return the payload bytes the peer's window has room for.

        What the peer already holds does not count (libudx), within bounds that `Receiver` keeps room for.
        """
        span_left = MAX_SPAN * self._largest_window - self.unacked if self._largest_window else self.peer_window
        return min(self.peer_window - (self.unacked - self._sacked_bytes), span_left)

    def _padding(self, size: int, payload_size: int) -> int:
        """Return the padding that makes this packet an MTU probe, usually 0."""
        if size != payload_size or self.rtt.srtt is None:
            return 0
        probe = self.search.wanted
        return probe - size - OVERHEAD_BYTES if probe else 0

    def _after_send(self, allowance: int, budget: int, now: float) -> None:
        """Note why nothing more leaves: pacing (END waits for it too), a window, or no data."""
        self._ran_dry = not self.has_work
        if self._ran_dry:
            self.window_probe.watch(False, 0.0, now)
            return
        window_closed = self.queued > 0 and not self._packets and self.peer_window <= 0
        full = self.next_seq >= self.acked_below + MAX_PACKETS_UNDER_WAY
        if budget <= 0 and not window_closed:
            self._paced_until = self._pacer.ready_at(self.congestion.pacing_rate, self.congestion.quantum)
        elif allowance > 0 and self.queued and not full and self._window_room() >= self.search.mtu:
            self._paced_until = now  # the burst's limit of packets was reached
        self.window_probe.watch(window_closed, self.rtt.probe_timeout(0), now)

    # -- timers

    def get_timer(self) -> float | None:
        """Return when `handle_timer` or `send` has something to do."""
        self._conclude()
        earliest = self._probe_at()
        for time in (self._paced_until, self._loss.deadline, self.window_probe.at):
            if time is not None and (earliest is None or time < earliest):
                earliest = time
        return earliest

    def _probe_at(self) -> float | None:
        if not self._packets:
            return None
        give_up_at = self._progress_at + GIVE_UP_S
        probe_at = max(self._last_sent_at, self._progress_at) + self.rtt.probe_timeout(self._probe_count)
        # With no room it may be time to give up, and still too early, for there are answers.
        awaited = self._last_sent_at < give_up_at or self.peer_window >= self.search.mtu
        return give_up_at if awaited and give_up_at < probe_at else probe_at

    def _alive_at(self, last_heard: float) -> float:
        """Return the last sign of a path that works; mere answers count while the peer has no room for data."""
        no_room = self.peer_window < self.search.mtu
        return max(self._progress_at, last_heard) if no_room else self._progress_at

    def handle_timer(self, now: float, last_heard: float) -> None:
        """Act on what is due; `last_heard` is when the peer's last packet came."""
        self._conclude()
        if self._loss.deadline is not None and self._loss.deadline <= now:
            self._detect_losses(now)
        probe_at = self._probe_at()
        if probe_at is not None and probe_at <= now:
            if now >= self._alive_at(last_heard) + GIVE_UP_S:
                self.give_up = True
                return
            self._probe_count += 1
            self._last_sent_at = now
            self._probes_due = PROBES
            self.stats.probe_timeouts += 1
            if self._probe_count >= OUTAGE_ATTEMPTS and (first := self._first_in_flight()) is not None:
                self._suspect_size(first, first.order)  # each probe repeats it, so all these are lost
        self.window_probe.handle_timer(now)
        if self.window_probe.silence(last_heard, now) >= GIVE_UP_S:
            self.give_up = True
