"""See what passes a namespace: every UDP datagram, decoded with the library's codecs.

A tool for tests and for people. In a test, `with Sniffer(home.namespace) as sniffer: ...; print(sniffer.text())`;
by hand, as root, `python -m nat.sniff NAMESPACE [SECONDS]`.
"""

import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from nat.lab import socket_in

from p2pclaude.hyperdht.constants import Command, InternalCommand, Mode, PacketType
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.peer.setup_messages import decode_handshake, decode_holepunch
from p2pclaude.hyperdht.rpc.messages import Request, Response, decode_message
from p2pclaude.hyperdht.udx.packet import MAGIC, decode_header

ETH_P_IP: Final = 0x0800
ETH_P_ALL: Final = 3  # others tell of incoming packets only; linux/if_ether.h
PACKET_OUTGOING: Final = 4  # linux/if_packet.h
BUFFER_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Packet:
    """One datagram: when (seconds since the sniffer began), on which interface, whether it left there, its TTL."""

    at: float
    device: str
    outgoing: bool
    source: Address
    to: Address
    ttl: int
    data: bytes

    def message(self) -> Request | Response | None:
        """Return the DHT message in it, if it is one."""
        try:
            return decode_message(self.data)
        except DecodeError:
            return None

    def __str__(self) -> str:
        way = "out" if self.outgoing else "in "
        ends = f"{self.source[0]}:{self.source[1]} > {self.to[0]}:{self.to[1]}"
        return f"{self.at:9.4f} {self.device} {way} {ends} ttl {self.ttl} {describe(self.data)}"


def describe(data: bytes) -> str:
    """Say what a datagram is."""
    if len(data) < 2:
        return "probe"
    try:
        return _describe_udx(data) if data[0] == MAGIC & 0xFF else _describe_message(decode_message(data))
    except DecodeError as error:
        return f"{len(data)} bytes ({error})"


def _describe_udx(data: bytes) -> str:
    header = decode_header(data)
    kind = "|".join(flag.name or "?" for flag in PacketType(header.type)) or "ACK"
    return f"UDX {kind} to {header.stream_id:x} seq {header.seq} ack {header.ack} ({len(data)} bytes)"


def _describe_message(message: Request | Response) -> str:
    if isinstance(message, Response):
        value = "" if message.value is None else f" value {_value(message.value)}"
        error = f" error {message.error}" if message.error else ""
        seen, near = f"{message.to[0]}:{message.to[1]}", len(message.closer_nodes)
        return f"[{message.tid}] response, sees {seen}, {near} closer{error}{value}"
    names: type[Command] | type[InternalCommand] = InternalCommand if message.internal else Command
    name = names(message.command).name if message.command in list(names) else str(message.command)
    value = "" if message.value is None or message.internal else f" {_value(message.value)}"
    return f"[{message.tid}] {name}{value}"


def _value(value: bytes) -> str:
    # Handshake and hole punching values look alike but for the payload; other values are not told apart.
    for decode in (decode_holepunch, decode_handshake):
        try:
            mode, peer = (decoded := decode(value)).mode, decoded.peer_address
        except DecodeError:
            continue
        return f"{Mode(mode).name} ({len(value)} bytes) peer {peer}"
    return f"{len(value)} bytes"


class Sniffer:
    """Collects the datagrams that pass a namespace's interfaces while the `with` block runs."""

    def __init__(self, namespace: str) -> None:
        self._socket = socket_in(namespace, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._socket.settimeout(0.1)
        self._began = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"sniffer of {namespace}")
        self.packets: list[Packet] = []
        """What was seen so far, in order; appended to from another thread."""

    def _read(self) -> None:
        while not self._stopped.is_set():
            try:
                frame, (device, protocol, direction, *_) = self._socket.recvfrom(65536)
            except TimeoutError:
                continue
            if protocol != ETH_P_IP:
                continue
            packet = self._parse(time.monotonic() - self._began, frame, device, direction == PACKET_OUTGOING)
            if packet is not None:
                self.packets.append(packet)

    @staticmethod
    def _parse(at: float, frame: bytes, device: str, outgoing: bool) -> Packet | None:
        header = (frame[0] & 15) * 4
        if frame[9] != socket.IPPROTO_UDP or len(frame) < header + 8:
            return None
        source, to, length = struct.unpack_from(">HHH", frame, header)
        hosts = socket.inet_ntoa(frame[12:16]), socket.inet_ntoa(frame[16:20])
        data = frame[header + 8 : header + length]
        return Packet(at, device, outgoing, (hosts[0], source), (hosts[1], to), frame[8], data)

    def text(self, packets: Iterable[Packet] | None = None) -> str:
        """Return one line a datagram."""
        return "\n".join(map(str, self.packets if packets is None else packets))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._socket.close()


def main() -> None:
    """Print what passes a namespace for some seconds."""
    namespace, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    with Sniffer(namespace) as sniffer:
        printed = 0
        while time.monotonic() - sniffer._began < seconds:
            time.sleep(0.1)
            fresh = sniffer.packets[printed:]
            printed += len(fresh)
            if fresh:
                print(sniffer.text(fresh), flush=True)


if __name__ == "__main__":
    main()
