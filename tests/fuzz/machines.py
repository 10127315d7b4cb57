"""The state machines of ring 1: streams, the Noise handshake, the secret stream."""

import math
from collections import deque
from typing import Final

from fuzz import remember
from fuzz.decoders import packet_seeds
from fuzz.target import Script, Target
from p2pclaude.hyperdht.crypto import HolepunchBox, KeyPair
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.secure.noise import NoiseIK
from p2pclaude.hyperdht.secure.secretstream import MAX_FRAME_BYTES, OVERHEAD, SecretStream
from p2pclaude.hyperdht.udx.packet import HEADER, HEADER_BYTES, MAGIC, SEQ_MASK, encode_sack
from p2pclaude.hyperdht.udx.receiver import CAPACITY, MAX_AHEAD
from p2pclaude.hyperdht.udx.stream import (
    ETIMEDOUT,
    Closed,
    DataReceived,
    EndReceived,
    MessageReceived,
    UdxStream,
)

MAX_STEPS: Final = 150  # of one script
BODY: Final = bytes((i * 7 + (i >> 8) * 13) & 0xFF for i in range(1 << 17))
SEQS: Final = (0, 0xFFFFFFFF, 0xFFFFFFF0, 1000)
WINDOWS: Final = (4 << 20, 1000, 20_000, 0)
PAIR_WINDOWS: Final = (4 << 20, 3000, 16_000, 64_000)
MTUS: Final = (1200, 1500, 1200, 1280)
OUTAGE_SECONDS: Final = 10.0  # what a stream must survive
HEAL_SECONDS: Final = 120.0
HEAL_STEPS: Final = 20_000
DELAY: Final = 0.02
MAX_BURST: Final = 1000


def check_state(stream: UdxStream) -> None:
    """Check what must hold of any stream at any time."""
    sender, receiver = stream.sender, stream._receiver
    timer = stream.get_timer()
    assert timer is None or math.isfinite(timer)
    assert sender.in_flight >= 0
    assert sender.unacked >= 0
    assert sender.acked_below <= sender.next_seq
    held = receiver._early_bytes + sum(map(len, receiver.chunks))
    assert held <= 2 * CAPACITY * receiver.window, f"{held} bytes held"
    assert len(receiver._early) <= MAX_AHEAD
    assert receiver._early_bytes == 0 or receiver._early_bytes <= sum(map(len, receiver._early.values()))


# -- two ends and honest packets, which the script loses, repeats, reorders and delays


class _End:
    def __init__(self, stream: UdxStream) -> None:
        self.stream = stream
        self.written = 0
        self.received = 0
        self.unread = 0
        self.reads = True
        self.ended = False
        self.closed: Closed | None = None
        self.inbox: deque[bytes] = deque()
        self.touched = True  # used, or given packets: it may have something to say

    def take_events(self, peer: "_End") -> bool:
        """Check every event; tell whether there was one."""
        event = self.stream.next_event()
        if event is None:
            return False
        assert self.closed is None, "an event after the end"
        match event:
            case DataReceived(data):
                assert not self.ended, "data after the end"
                assert data == BODY[self.received : self.received + len(data)], "other bytes than were written"
                self.received += len(data)
                self.unread += len(data)
                assert self.received <= peer.written
            case MessageReceived(data):
                assert data == BODY[: len(data)]
            case EndReceived():
                assert self.received == peer.written, "the end came before all data"
                self.ended = True
            case Closed():
                self.closed = event
        if self.reads:
            self.consume()
        return True

    def consume(self) -> None:
        """Read what is there."""
        self.stream.consume(self.unread)
        self.unread = 0


class _Pair:
    def __init__(self, script: Script) -> None:
        options = script.byte(), script.byte()
        seqs = [SEQS[option & 3] for option in options]
        self.ends: list[_End] = []
        self.now = 1000.0
        self.destroyed = False
        for i, option in enumerate(options):
            stream = UdxStream(
                i + 1,
                max_mtu=MTUS[option >> 4 & 3],
                receive_window=PAIR_WINDOWS[option >> 2 & 3],
                initial_seq=seqs[i],
                initial_remote_seq=seqs[1 - i],
            )
            self.ends.append(_End(stream))
        for i, end in enumerate(self.ends):
            end.stream.connect(2 - i, self.now)

    def step(self, script: Script) -> None:
        """Do one thing to one end, and let both answer."""
        choice = script.byte()
        end, kind = self.ends[choice & 1], (choice >> 1) % 13
        if kind <= 5:
            self._use_end(end, kind, script)
        else:
            self._use_network(end, kind, script)
        self.settle()

    def _use_end(self, end: _End, kind: int, script: Script) -> None:
        stream = end.stream
        end.touched = True
        if kind <= 1:
            size = min(script.byte() * (60 if kind else 1), len(BODY) - end.written)
            if not stream.closed and not stream.sender.own_end.wanted:
                stream.write(BODY[end.written : end.written + size])
                end.written += size
        elif kind == 2:
            stream.end()
        elif kind == 3 and script.byte() > 200:
            stream.destroy()
            self.destroyed = True
        elif kind == 4:
            stream.send_message(BODY[: script.byte()])
        elif kind == 5:
            end.reads = not end.reads
            if end.reads:
                end.consume()

    def _use_network(self, end: _End, kind: int, script: Script) -> None:
        inbox = end.inbox
        if kind == 6:
            self.now += script.byte() * 0.005
        elif kind == 7:
            self._skip_to_timer(end)
        elif kind == 8:
            self._deliver(end, len(inbox))
        elif kind == 9:
            self._deliver(end, 1 + script.byte() % 8)
        elif inbox:
            inbox.rotate(-script.byte())
            if kind == 10:
                inbox.popleft()
            elif kind == 11:
                inbox.append(inbox[0])

    def _skip_to_timer(self, end: _End) -> None:
        timer = end.stream.get_timer()
        if timer is not None:
            self.now = max(self.now, timer)

    def _deliver(self, end: _End, count: int) -> None:
        if not end.inbox:
            return
        end.touched = True
        batch = [end.inbox.popleft() for _ in range(min(count, len(end.inbox)))]
        end.stream.receive_datagrams(batch, self.now)

    def settle(self) -> None:
        """Fire timers, take events, and put packets out until nothing moves."""
        for i, end in enumerate(self.ends):
            timer = end.stream.get_timer()
            if timer is not None and timer <= self.now:
                end.stream.handle_timer(self.now)
            elif not end.touched:
                continue  # as in `streams`: nothing happened to it
            end.touched = False
            for turn in range(MAX_BURST):
                busy = end.take_events(self.ends[1 - i])
                out = end.stream.datagrams_to_send(self.now)
                self.ends[1 - i].inbox.extend(out)
                if not busy and not out:
                    break
                assert turn < MAX_BURST - 1, "a stream that never gets quiet"
            check_state(end.stream)

    def heal(self) -> None:
        """Bring everything over from now on: both streams must end well."""
        for end in self.ends:
            end.reads = True
            end.consume()
            end.stream.end()
            end.touched = True
        self.settle()
        until = self.now + HEAL_SECONDS
        for _ in range(HEAL_STEPS):
            if self.now > until or all(end.closed for end in self.ends):
                break
            if not any(end.inbox for end in self.ends):
                timers = [end.stream.get_timer() for end in self.ends]
                known = [timer for timer in timers if timer is not None]
                if not known and self.destroyed:
                    break  # every DESTROY was lost, and the other side has nothing to say that would be answered
                assert known, "streams that wait for ever"
                self.now = max(self.now, min(known))
            else:
                self.now += DELAY
                for end in self.ends:
                    self._deliver(end, len(end.inbox))
            self.settle()


def _run_pair(data: bytes) -> None:
    script = Script(data)
    pair = _Pair(script)
    began = pair.now
    for _ in range(MAX_STEPS):
        if not script.more:
            break
        pair.step(script)
    lasted = pair.now - began
    pair.heal()
    one, other = pair.ends
    if pair.destroyed:
        return
    assert one.closed is not None and other.closed is not None, "streams that do not end"
    errors = {one.closed.error, other.closed.error} - {None}
    if errors:
        assert lasted >= OUTAGE_SECONDS, f"closed with {errors} after an outage of {lasted:.1f} s at most"
        assert ETIMEDOUT in errors
        return
    assert (one.received, other.received) == (other.written, one.written), "a clean end without all data"


def _pair_seeds() -> list[bytes]:
    write, end, all_in, skip, drop = 2, 4, 16, 14, 20
    talk = [write, 200, write | 1, 90, all_in, all_in | 1, skip, skip | 1]
    return [
        bytes([0, 0, *talk, *talk, end, end | 1, all_in, all_in | 1]),
        bytes([1, 5, *talk, drop, 3, drop | 1, 0, skip, all_in, *talk]),
        bytes([0x3E, 0x17, *talk, 22, 0, 22, 1, 12, 255, *talk, 10, *talk, 10 | 1]),
    ]


# -- one end and packets that lie: numbers near the stream's own, or any


def _any_number(script: Script, near: int) -> int:
    mode = script.byte()
    if mode < 160:
        return near + mode - 40 & SEQ_MASK
    return near + (script.byte() << (mode & 31)) & SEQ_MASK if mode < 250 else script.number(4)


def _forge(script: Script, stream: UdxStream) -> bytes:
    kind, offset = script.byte(), (0, 0, 8, script.byte())[script.byte() & 3]
    near_seq, near_ack = stream._receiver.next_seq, stream.sender.next_seq
    seq, ack = _any_number(script, near_seq), _any_number(script, near_ack)
    window = (1 << 20, 0, 1000, script.number(4))[script.byte() & 3]
    ranges = [(_any_number(script, near_ack), _any_number(script, near_ack)) for _ in range(script.byte() & 3)]
    body = encode_sack(ranges) + (bytes(script.byte() * 6) if kind & 1 else script.chunk())
    stream_id = stream.local_id if script.byte() < 250 else 77
    return HEADER.pack(MAGIC, kind, offset, stream_id, window, seq, ack) + body


def _attack(data: bytes) -> None:
    script = Script(data)
    options, now = script.byte(), 1000.0
    stream = UdxStream(1, receive_window=WINDOWS[options & 3], initial_seq=SEQS[options >> 2 & 3])
    if options < 250:
        stream.connect(2, now)
    held = delivered = 0
    for _ in range(MAX_STEPS):
        if not script.more:
            break
        now += _attack_once(script, stream, now)
        timer = stream.get_timer()
        if timer is not None and timer <= now:
            stream.handle_timer(now)
        assert len(stream.datagrams_to_send(now)) <= MAX_BURST
        while (event := stream.next_event()) is not None:
            held += len(event.data) if isinstance(event, DataReceived) else 0
        delivered = max(delivered, held)
        if options & 16:
            stream.consume(held)
            held = 0
        assert held <= CAPACITY * max(stream._receiver.window, 1), "more than the windows allow"
        check_state(stream)
    assert stream.buffered <= 255 * 60 * MAX_STEPS


def _attack_once(script: Script, stream: UdxStream, now: float) -> float:
    """Do one thing; return the seconds it takes."""
    match script.byte() % 10:
        case 0:
            stream.write(BODY[: script.byte() * 60])
        case 1:
            return script.byte() * 0.02
        case 2:
            stream.receive_datagrams([script.chunk()], now)
        case 3:
            stream.receive_datagrams([_forge(script, stream) for _ in range(script.byte() & 15)], now)
        case 4 if script.byte() > 200:
            stream.end()
        case 5 if script.byte() > 240:
            stream.destroy()
        case 6:
            stream.reset_path(now)
        case 7:
            stream.send_message(script.chunk())
        case 8:
            timer = stream.get_timer()
            return max(timer - now, 0.0) if timer is not None else 0.0
        case _:
            stream.receive_datagrams([_forge(script, stream)], now)
    return 0.001


def _attack_seeds() -> list[bytes]:
    packets = packet_seeds()
    raw = b"".join(b"\x02" + bytes((len(packet),)) + packet for packet in packets if len(packet) >= HEADER_BYTES)
    forged = bytes((9, 1, 0, 0, 40, 40, 0, 0, 10, 0)) + bytes((9, 4, 0, 0, 40, 30, 0, 2, 45, 50, 60, 70, 0, 0))
    return [b"\x10" + raw, b"\x00\x00\x80\x01\x10" + forged * 3, b"\x15\x00\xff\x08\x00" + raw + forged]


# -- Noise IK: what the script makes of the true message, then the true one

_STATIC: Final = (KeyPair.from_seed(bytes([1]) * 32), KeyPair.from_seed(bytes([2]) * 32))
_EPHEMERAL: Final = (KeyPair.from_seed(bytes([3]) * 32), KeyPair.from_seed(bytes([4]) * 32))


def _handshake() -> tuple[NoiseIK, NoiseIK]:
    initiator = NoiseIK.initiator(_STATIC[0], _STATIC[1].public_key, _EPHEMERAL[0])
    return initiator, NoiseIK.responder(_STATIC[1], _EPHEMERAL[1])


def _run_noise(data: bytes) -> None:
    with remember.key_arithmetic():
        _shake_hands(Script(data))


def _shake_hands(script: Script) -> None:
    initiator, responder = _handshake()
    payloads = script.chunk(), script.chunk()
    first = initiator.write_message(payloads[0])
    _deceive(script, responder, first)
    assert responder.read_message(first) == payloads[0]
    assert responder.remote_public_key == _STATIC[0].public_key
    second = responder.write_message(payloads[1])
    _deceive(script, initiator, second)
    assert initiator.read_message(second) == payloads[1]
    assert (initiator.tx_key, initiator.rx_key) == (responder.rx_key, responder.tx_key)
    assert initiator.handshake_hash == responder.handshake_hash
    box = HolepunchBox(initiator.holepunch_secret)
    try:
        box.open(script.rest())
    except DecodeError:
        pass
    else:
        raise AssertionError("a forged box opened")


def _deceive(script: Script, noise: NoiseIK, true: bytes) -> None:
    """Let a side read up to three messages that are not the peer's."""
    for _ in range(script.byte() & 3):
        forged = bytearray(true)
        match script.byte() & 3:
            case 0:
                forged[:] = script.chunk()
            case 1:
                del forged[script.byte() :]
            case 2:
                start = script.byte()
                forged[start : start + 32] = script.take(32)
            case _:
                forged += script.chunk()
        if forged == true:
            continue
        try:
            noise.read_message(bytes(forged))
        except DecodeError:
            continue
        raise AssertionError("a forged handshake message was believed")


def _noise_seeds() -> list[bytes]:
    small = b"\x01" + bytes(31)
    return [b"\x03abc\x02de\x00\x00", b"\x00\x00\x01\x02\x00" + small + b"\x02\x01\x20\x02\x20" + small + b"\x00" * 40]


# -- secret stream: true frames, cut anywhere and perhaps corrupted


def _stream_pair() -> tuple[SecretStream, SecretStream]:
    key, other, digest = bytes([5]) * 32, bytes([6]) * 32, bytes(64)
    return SecretStream(True, digest, key, other), SecretStream(False, digest, other, key)


def _run_secret_stream(data: bytes) -> None:
    script = Script(data)
    sender, receiver = _stream_pair()
    wire, sent = bytearray(), []
    header = sender.header()
    if script.byte() < 250:
        wire += header
    for _ in range(script.byte() & 15):
        message = BODY[: script.byte() * (80 if script.byte() & 1 else 1)]
        sent.append(message)
        wire += sender.encrypt_frame(message)
    true = bytes(wire)
    if damage := script.byte() & 3:
        at = script.number(2) % (len(wire) + 1)
        wire[at : at + damage] = script.take(damage)
    wire += script.chunk()
    got = _receive(script, receiver, bytes(wire))
    assert got == sent[: len(got)], "other messages than were sent"
    if wire == true and true.startswith(header):
        assert got == sent
    _check_messages(script, sender, receiver)


def _receive(script: Script, receiver: SecretStream, wire: bytes) -> list[bytes]:
    got: list[bytes] = []
    at = 0
    while at < len(wire):
        size = script.byte() * 16 + 1 if script.more else len(wire)
        try:
            got += receiver.receive_data(wire[at : at + size])
        except DecodeError:
            assert receiver.buffered == 0
            try:
                receiver.receive_data(b"")
            except DecodeError:
                return got
            raise AssertionError("a broken stream goes on") from None
        at += size
        assert receiver.buffered <= min(at, MAX_FRAME_BYTES + OVERHEAD + 3)
    return got


def _check_messages(script: Script, sender: SecretStream, receiver: SecretStream) -> None:
    message = script.chunk()
    sealed = sender.encrypt_message(message)
    assert receiver.decrypt_message(sealed) == message
    forged = script.rest()
    try:
        receiver.decrypt_message(forged)
    except DecodeError:
        return
    raise AssertionError("a forged message opened")


def _hostile_frames(data: bytes) -> None:
    """Give a stream the peer's header and then the bytes as they are, cut by the first one."""
    sender, receiver = _stream_pair()
    script = Script(data)
    if script.byte() & 1:
        receiver.receive_data(sender.header())
    rest = script.rest()
    size = 1 + (rest[0] if rest else 0)
    try:
        for start in range(0, len(rest), size):
            assert not any(receiver.receive_data(rest[start : start + size]))
            assert receiver.buffered <= len(rest)
    except DecodeError:
        assert receiver.buffered == 0


def _secret_seeds() -> list[bytes]:
    return [
        bytes((0, 3, 10, 0, 200, 1, 0, 0, 0)) + b"\x00\x05hello",
        bytes((0, 2, 5, 0, 9, 0, 1, 60, 0, 7, 0, 3, 1, 2, 3)),
        bytes((255, 1, 5, 0, 0, 0)),
    ]


def _frame_seeds() -> list[bytes]:
    return [b"\x01\x14\x00\x00" + bytes(40), b"\x00\x38\x00\x00" + bytes(56)]


TARGETS: Final = (
    Target("udx_pair", _run_pair, 800, max_bytes=400, seeds=_pair_seeds),
    Target("udx_hostile", _attack, 4000, max_bytes=1000, seeds=_attack_seeds),
    Target("noise", _run_noise, 600, max_bytes=600, seeds=_noise_seeds),
    Target("secret_stream", _run_secret_stream, 5000, max_bytes=600, seeds=_secret_seeds),
    Target("secret_frames", _hostile_frames, 5000, seeds=_frame_seeds),
)
