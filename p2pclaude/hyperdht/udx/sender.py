"""The sending half of a stream: queue, packets under way, acknowledgements, and what may leave when (ring 1).

`stream` calls `receive_ack` for each packet that says something new and `finish_acks` once a batch, then `send` to get
what may leave, then `get_timer`. The parts know one thing each: `recovery` what is lost, `pathmodel` what the path
bears (how much may be under way, when it leaves, how large it is, how long an answer takes), `peerwindow` what the peer
has room for, `patience` when to probe and when to give up.
"""

import heapq
from typing import Final

from .ackbatch import AckBatch
from .burst import Burst, BurstHeader
from .congestion import Bbr
from .mtu import BLACK_HOLE_MTU, MtuSearch
from .packet import DATA, END, HEADER, MAGIC, OVERHEAD_BYTES, SEQ_MASK
from .pathmodel import PathModel
from .patience import GIVE_UP_S, OUTAGE_ATTEMPTS, Patience
from .peerwindow import PeerWindow
from .ranges import RangeSet
from .rate import AckSample, DeliveryRate
from .recovery import DELIVERED, IN_FLIGHT, LOST, LossDetector, Packet
from .rtt import RttEstimator
from .sendqueue import SendQueue
from .stats import SenderStats

MAX_PACKETS_UNDER_WAY: Final = 65536  # libudx reports no gaps further ahead
MAX_BURST_PACKETS: Final = 256  # of one call: others want a turn
BLACK_HOLE_ATTEMPTS: Final = 3  # transmissions of one full packet, all lost while others arrive


class OwnEnd:
    """The end of the own side: asked for, then numbered as a packet of its own, the last one."""

    __slots__ = ("peer_ended", "seq", "wanted")

    def __init__(self) -> None:
        self.wanted = False
        self.seq: int | None = None
        """The number of the END, once it has left."""
        self.peer_ended = False
        """Whether the peer's END and all before it arrived: it is gone as soon as it gets ours."""


class Sender:
    """Sends bytes as numbered packets until each is acknowledged."""

    def __init__(self, initial_seq: int, mtu: int, max_mtu: int, variety: int = 0, initial_remote_seq: int = 0) -> None:
        self.stats = SenderStats()
        self.path = PathModel(mtu, max_mtu, variety)
        self.peer = PeerWindow(initial_remote_seq)
        self.patience = Patience()
        self.own_end = OwnEnd()
        self.acked_below = initial_seq  # unbounded, as next_seq
        self.next_seq = initial_seq
        self.unacked = 0  # payload bytes from the first unacknowledged packet on
        self.in_flight = 0  # bytes on the wire, neither acknowledged nor lost
        self._queue = SendQueue()
        self._packets: dict[int, Packet] = {}
        self._sacked = RangeSet()
        self._loss = LossDetector(self.path.rtt)
        self._rate = DeliveryRate()
        self._batch = AckBatch()

    @property
    def rtt(self) -> RttEstimator:
        """The round trip of the path in use."""
        return self.path.rtt

    @property
    def search(self) -> MtuSearch:
        """The search for the packet size of the path in use."""
        return self.path.search

    @property
    def congestion(self) -> Bbr:
        """The congestion control of the path in use."""
        return self.path.congestion

    @property
    def peer_window(self) -> int:
        """The window that the peer offers, in bytes."""
        return self.peer.size

    @property
    def has_peer_room(self) -> bool:
        """Whether the peer has room for a packet."""
        return self.peer.size >= self.path.search.mtu

    @property
    def queued(self) -> int:
        """The bytes written and not yet sent."""
        return self._queue.size

    @property
    def has_work(self) -> bool:
        """Whether there is something to send, as soon as it may leave."""
        return bool(self._queue.size or self._loss.repairs or self.patience.probes_due or self._end_due)

    @property
    def end_acked(self) -> bool:
        """Tell whether the peer has everything and knows of the end."""
        return self.own_end.seq is not None and self.acked_below > self.own_end.seq

    @property
    def only_end_unacked(self) -> bool:
        """Tell whether nothing but a bare END lacks its acknowledgement."""
        return self.own_end.seq is not None and self.acked_below == self.own_end.seq and not self.unacked

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
        self._sacked = RangeSet()
        next_order, self._loss = self._loss.next_order, LossDetector(self.path.rtt)
        self._loss.next_order = next_order
        self.unacked = self.in_flight = self.peer.held = 0
        self.path.pacer.wait_until = None
        self.peer.probe.stop()

    def reset_path(self, now: float) -> None:
        """Begin anew with another path: its round-trip time, bandwidth and packet size are unknown."""
        self._conclude()
        self.path.reset(self._loss.next_order)
        for packet in self._packets.values():
            packet.padded_mtu = 0
        self._loss.forget_path()
        self.patience.reset_path(now, under_way=bool(self._packets))

    # -- acknowledgements

    def update_window(self, window: int, seq: int, ack: int, now: float) -> None:
        """Take the peer's window unless an older or impossible packet brought it."""
        if not self.acked_below <= ack <= self.next_seq:
            return
        peer, mtu = self.peer, self.path.search.mtu
        before = peer.size
        peer.update(window, seq, ack)
        if before < mtu <= peer.size:
            self.patience.note_room(now)

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
                    self.peer.held -= len(packet.payload)
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
        packets, mtu = self._packets, self.path.search.mtu
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
                    self.peer.held += len(packet.payload)

    def _deliver(self, packet: Packet, now: float) -> None:
        """Account for the first acknowledgement of a packet."""
        if packet.state == IN_FLIGHT:
            self.in_flight -= packet.size
        packet.state = DELIVERED
        self._rate.delivered += packet.size
        self._loss.on_delivered(packet, now)
        self._batch.add(packet, now)
        if packet.size > BLACK_HOLE_MTU or packet.padded_mtu:
            search = self.path.search
            search.packet_arrived(packet.size, packet.order)
            if packet.padded_mtu and packet.count == 1:
                search.probe_acked(packet.padded_mtu)
            self.path.fit_size()

    def finish_acks(self, now: float) -> None:
        """End a batch: draw the conclusions, now or with the timer.

        If nothing is under way they change nothing for a single packet; so one that answers the batch leaves first.
        """
        self._batch.ended_at = now
        if self._packets or self.patience.attempts:
            self._conclude()

    def _conclude(self) -> None:
        """Draw the conclusions from acknowledgements: round trip, losses, congestion, timers."""
        newest = self._batch.newest
        if newest is None:
            return
        acked, rtt, now = self._batch.take()
        if newest.count > 1:
            rtt = None  # a repair fills a gap: what was sent once before it may have arrived long ago
        path, patience = self.path, self.patience
        if rtt is not None:
            path.rtt.add_sample(rtt)
        if patience.attempts >= OUTAGE_ATTEMPTS:
            path.congestion.on_outage()
        patience.note_progress(now)
        lost = self._detect_losses(now)
        flight = newest.flight
        rate = self._rate.sample(flight, now, path.rtt.minimum)
        sample = AckSample(
            acked, lost, self._rate.delivered, flight.delivered, self.in_flight, rate, flight.app_limited, rtt
        )
        path.congestion.on_ack(sample, now)

    def _detect_losses(self, now: float) -> int:
        """Move lost packets to the repair queue; return their bytes."""
        size = 0
        for packet in self._loss.detect(self.acked_below, self.next_seq, now):
            size += packet.size
            self.stats.lost += 1
            self._queue_repair(packet)
        self.in_flight -= size
        assert self.in_flight >= 0
        return size

    def _queue_repair(self, packet: Packet) -> None:
        heapq.heappush(self._loss.repairs, packet.seq)
        if packet.padded_mtu:
            self._strip_padding(packet)
        elif packet.count >= BLACK_HOLE_ATTEMPTS:
            self._suspect_size(packet, packet.first_order)

    def _strip_padding(self, packet: Packet) -> None:
        """Let a probe travel again as an ordinary packet."""
        self.path.search.probe_lost(packet.padded_mtu)
        packet.padded_mtu = 0

    def _suspect_size(self, packet: Packet, since: int) -> None:
        """Let the search draw its conclusion from a packet of which no transmission has arrived since that one.

        Only new packets get smaller. One that has left keeps its number and payload, for the peer may have it, and
        numbers count packets: `streams` lets routers fragment it.
        """
        self.path.search.packet_lost(packet.size, since)
        self.path.fit_size()

    # -- sending

    def send(self, burst_header: BurstHeader, now: float) -> list[bytes]:
        """Return the packets that may leave now: probes, repairs, new data."""
        path, patience = self.path, self.patience
        path.pacer.wait_until = None
        if self._queue.size > path.search.mtu:
            self._conclude()
        if not self.has_work:
            return []
        if not self._packets:
            patience.begin(now)
        congestion = path.congestion
        budget = path.pacer.budget(now, congestion.pacing_rate, congestion.quantum)
        allowance = min(congestion.window - self.in_flight, budget)
        if self._rate.ran_dry and allowance > 0:
            self._rate.mark_app_limited(self.in_flight)
        burst = Burst(burst_header, self._rate.start_flight(now, self.in_flight))
        before = self.stats.bytes
        if patience.probes_due:
            self._send_probes(burst)
        self._send_repairs(burst, allowance - (self.stats.bytes - before))
        self._send_new(burst, allowance - (self.stats.bytes - before))
        spent = self.stats.bytes - before
        if spent:
            path.pacer.spend(spent)
            patience.note_sent(now)
        self._after_send(allowance - spent, budget - spent, now)
        return burst.packets

    @property
    def _end_due(self) -> bool:
        """Tell whether END may leave: in a packet of its own, and last.

        A peer that has ended is gone when it got this END; libudx acknowledges it once, and if that is lost nothing
        tells what else arrived. So such a peer is sent END only when it has acknowledged all data.
        """
        end = self.own_end
        if not end.wanted or end.seq is not None or self._queue.size:
            return False
        return not (end.peer_ended and self._packets)

    def _send_probes(self, burst: Burst) -> None:
        """Make the peer answer: what its reader waits for, then repairs or new data, else the last packet again."""
        due, self.patience.probes_due = self.patience.probes_due, 0
        first = next((packet for packet in self._packets.values() if packet.state != DELIVERED), None)
        if first is not None and first.state == IN_FLIGHT:
            due -= self._send_again(burst, first)
        sent_before = self.stats.packets
        self._send_repairs(burst, due * self.path.search.mtu)
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
        repairs = self._loss.repairs
        while repairs and allowance > 0:
            packet = self._packets.get(heapq.heappop(repairs))
            if packet is None or packet.state != LOST:
                continue
            packet.state = IN_FLIGHT
            self.in_flight += packet.size
            self._transmit(burst, packet)
            allowance -= packet.size

    def _transmit(self, burst: Burst, packet: Packet) -> None:
        """Send a packet another time, with current acknowledgement and window."""
        packet.count += 1
        packet.order = self._loss.next_order
        packet.flight = burst.flight
        self._loss.next_order += 1
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
        loss, search = self._loss, self.path.search
        take, on_sent, add, pack = queue.take, loss.sent.append, burst.packets.append, HEADER.pack
        remote_id, window, ack, _ = burst.header
        payload_size = search.mtu - OVERHEAD_BYTES
        room = self.peer.room(self.unacked)
        first = seq = self.next_seq
        end = min(first + MAX_BURST_PACKETS, self.acked_below + MAX_PACKETS_UNDER_WAY)
        order = loss.next_order
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
                padding = self._padding(size, payload_size) if search.wanted else 0
                header = pack(MAGIC, DATA, padding, remote_id, window, seq & SEQ_MASK, ack)
                if padding:
                    packet.padded_mtu = wire_size + padding
                    search.probe_sent(packet.padded_mtu)
                    header += bytes(padding)
                add(header + payload)
            else:
                packet = packets[seq] = Packet(seq, END, b"", wire_size, flight, order)
                burst.add(packet)
                self.own_end.seq = seq
            on_sent((order, packet))
            order += 1
            seq += 1
            room -= size
            sent_bytes += wire_size
        loss.next_order = order
        self.next_seq = seq
        self.unacked += sent_bytes - (seq - first) * OVERHEAD_BYTES
        self.in_flight += sent_bytes
        self.stats.packets += seq - first
        self.stats.bytes += sent_bytes

    def _padding(self, size: int, payload_size: int) -> int:
        """Return the padding that makes this packet an MTU probe, usually 0."""
        if size != payload_size or self.path.rtt.srtt is None:
            return 0
        probe = self.path.search.wanted
        return probe - size - OVERHEAD_BYTES if probe else 0

    def _after_send(self, allowance: int, budget: int, now: float) -> None:
        """Note why nothing more leaves: pacing (END waits for it too), a window, or no data."""
        self._rate.ran_dry = not self.has_work
        if self._rate.ran_dry:
            self.peer.probe.watch(False, 0.0, now)
            return
        path, peer = self.path, self.peer
        window_closed = self.queued > 0 and not self._packets and peer.size <= 0
        full = self.next_seq >= self.acked_below + MAX_PACKETS_UNDER_WAY
        if budget <= 0 and not window_closed:
            path.pacer.wait_until = path.pacer.ready_at(path.congestion.pacing_rate, path.congestion.quantum)
        elif allowance > 0 and self.queued and not full and peer.room(self.unacked) >= path.search.mtu:
            path.pacer.wait_until = now  # the burst's limit of packets was reached
        peer.probe.watch(window_closed, path.rtt.probe_timeout(0), now)

    # -- timers

    def get_timer(self) -> float | None:
        """Return when `handle_timer` or `send` has something to do."""
        self._conclude()
        earliest = self._probe_at()
        for time in (self.path.pacer.wait_until, self._loss.deadline, self.peer.probe.at):
            if time is not None and (earliest is None or time < earliest):
                earliest = time
        return earliest

    def _probe_at(self) -> float | None:
        if not self._packets:
            return None
        path = self.path
        return self.patience.probe_at(path.rtt, self.peer.size >= path.search.mtu)

    def handle_timer(self, now: float, last_heard: float) -> None:
        """Act on what is due; `last_heard` is when the peer's last packet came."""
        self._conclude()
        if self._loss.deadline is not None and self._loss.deadline <= now:
            self._detect_losses(now)
        probe_at, patience = self._probe_at(), self.patience
        if probe_at is not None and probe_at <= now:
            if not patience.run_out(now, last_heard, has_room=self.has_peer_room):
                return
            self.stats.probe_timeouts += 1
            if patience.attempts >= OUTAGE_ATTEMPTS and (first := self._first_in_flight()) is not None:
                self._suspect_size(first, first.order)  # each probe repeats it, so all these are lost
        self.peer.probe.handle_timer(now)
        if self.peer.probe.silence(last_heard, now) >= GIVE_UP_S:
            patience.is_over = True
