"""Where a round trip goes: what each layer adds to one of 64 bytes between two processes on loopback.

    PYTHONPATH=.:tests python -m bench.roundtrip [--rounds N]

Every layer stands on those above it in the table: sockets that block are what the kernel and two interpreters take,
asyncio adds an event loop and a task to wake at each end; awake, its loop never goes to sleep, and no system has to
wake it, as with the layers that follow (`UdpSocket.stay_awake`): UDX adds the stream, the last one encryption. The
layers take turns; the figures are medians of the rounds, and the processor time is that of both ends, waiting awake
included.
"""

import argparse
import asyncio
import random
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Final

from p2pclaude.hyperdht import KeyPair
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.net.udp import UdpNetwork
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.secure.noise import NoiseIK

PAYLOAD: Final = bytes(64)
COUNT: Final = 2000
WARM_UP: Final = 200
MAX_BYTES: Final = 2048

Ends = tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]  # send, receive
Layer = Callable[[Pipe, bool], Awaitable[Ends]]


def new_socket(pipe: Pipe) -> socket.socket:
    """Return a UDP socket that is connected to the other process's."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    pipe.send(udp.getsockname())
    udp.connect(pipe.recv())
    return udp


async def blocking(pipe: Pipe, first: bool) -> Ends:
    """Open sockets that block."""
    udp = new_socket(pipe)

    async def send() -> None:
        udp.send(PAYLOAD)

    async def receive() -> None:
        udp.recv(MAX_BYTES)

    return send, receive


async def looping(pipe: Pipe, first: bool) -> Ends:
    """Open sockets whose datagrams wake a task."""
    udp = new_socket(pipe)
    udp.setblocking(False)
    arrived = asyncio.Event()

    def readable() -> None:
        udp.recv(MAX_BYTES)
        arrived.set()

    async def send() -> None:
        udp.send(PAYLOAD)

    async def receive() -> None:
        await arrived.wait()
        arrived.clear()

    asyncio.get_running_loop().add_reader(udp, readable)
    return send, receive


async def looping_awake(pipe: Pipe, first: bool) -> Ends:
    """Open the same sockets on a loop that never sleeps."""
    loop = asyncio.get_running_loop()

    def turn() -> None:
        loop.call_soon(turn)

    turn()
    return await looping(pipe, first)


class Inbox:
    """Takes what a bare stream receives; only bytes matter here."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.arrived.set()

    def message_received(self, data: bytes) -> None:
        """Do nothing."""

    def eof_received(self) -> None:
        """Do nothing."""

    def drained(self) -> None:
        """Do nothing."""

    def stream_closed(self, error: str | None) -> None:
        """Do nothing."""


async def streaming(pipe: Pipe, first: bool) -> Ends:
    """Open UDX streams."""
    endpoint = Endpoint(UdpNetwork(), random.Random(int(first)))
    stream = endpoint.streams.create()
    sock = await endpoint.bind("127.0.0.1", 0)
    pipe.send((stream.id, sock.address))
    stream.connect(sock, *pipe.recv())
    inbox = stream.handler = Inbox()

    async def send() -> None:
        stream.write(PAYLOAD)

    async def receive() -> None:
        await inbox.arrived.wait()
        inbox.arrived.clear()
        stream.consume(len(PAYLOAD))

    return send, receive


async def encrypted(pipe: Pipe, first: bool) -> Ends:
    """Open connections."""
    endpoint = Endpoint(UdpNetwork(), random.Random(int(first)))
    stream = endpoint.streams.create()
    sock = await endpoint.bind("127.0.0.1", 0)
    connection = Connection(stream, bytes(32), bytes(32), is_initiator=first, keep_alive=5.0, rng=endpoint.rng)
    connection.start(handshake(first))
    pipe.send((stream.id, sock.address))
    stream.connect(sock, *pipe.recv())

    async def receive() -> None:
        await connection.read()

    return partial(connection.write, PAYLOAD), receive


def handshake(first: bool) -> NoiseIK:
    """Return the initiator's or the responder's keys: both ends make the whole handshake by themselves, alike."""
    keys = [KeyPair.from_seed(bytes([i]) * 32) for i in range(4)]
    initiator = NoiseIK.initiator(keys[0], keys[1].public_key, keys[2])
    responder = NoiseIK.responder(keys[1], keys[3])
    responder.read_message(initiator.write_message(b""))
    initiator.read_message(responder.write_message(b""))
    return initiator if first else responder


LAYERS: Final[dict[str, Layer]] = {
    "sockets that block": blocking,
    "asyncio": looping,
    "asyncio, awake": looping_awake,
    "UDX": streaming,
    "encryption": encrypted,
}


async def measure(layer: Layer, pipe: Pipe, first: bool) -> None:
    """Ping, or answer, and send the median round trip and the processor time of each, in seconds."""
    send, receive = await layer(pipe, first)
    times = []
    for i in range(WARM_UP + COUNT):
        if i == WARM_UP:
            began = time.process_time()
        start = time.perf_counter()
        if first:
            await send()
            await receive()
        else:
            await receive()
            await send()
        times.append(time.perf_counter() - start)
    pipe.send((statistics.median(times[WARM_UP:]), (time.process_time() - began) / COUNT))
    await asyncio.sleep(0.2)  # what is sent last leaves at the end of the turn, and may need repeating


def work(layer: str, pipe: Pipe, first: bool) -> None:
    """Be one of the two processes."""
    asyncio.run(measure(LAYERS[layer], pipe, first))


def run_layer(layer: str) -> tuple[float, float]:
    """Return the round trip and the processor time of both ends, in microseconds."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in "ab"]
    ends = [context.Process(target=work, args=(layer, pipes[i][1], not i), daemon=True) for i in range(2)]
    for end in ends:
        end.start()
    (one, _), (other, _) = pipes
    where = one.recv(), other.recv()
    one.send(where[1])
    other.send(where[0])
    (trip, mine), (_, theirs) = one.recv(), other.recv()
    for end in ends:
        end.join()
    return trip * 1e6, (mine + theirs) * 1e6


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.roundtrip", description="Where a round trip of 64 bytes goes.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each layer is taken (5)")
    samples: dict[str, list[tuple[float, float]]] = {layer: [] for layer in LAYERS}
    for _ in range(parser.parse_args().rounds):
        for layer, taken in samples.items():
            taken.append(run_layer(layer))
    print("layer                round trip     adds   processor time of both ends")
    before = 0.0
    for layer, taken in samples.items():
        trip, processor = (statistics.median(figures) for figures in zip(*taken, strict=True))
        print(f"{layer:20} {trip:7.0f} us {trip - before:5.0f} us {processor:7.0f} us")
        before = trip
    return 0


if __name__ == "__main__":
    sys.exit(main())
