"""A flood of handshakes, in a process that speaks JSON lines: config {key, port, rate, hosts, made}.

`made` Noise messages are made first, each of another client, so that none is answered from memory; they are sent again
and again from as many hosts of 127.1.0.0/16. Events: ready. Commands: flood {seconds} -> flooded {sent, answered}.
"""

import asyncio
import random
import socket
from typing import Final

from interop.python.control import Command, config, emit, serve_commands

from p2pclaude.hyperdht.constants import Command as DhtCommand
from p2pclaude.hyperdht.constants import Mode
from p2pclaude.hyperdht.crypto import KeyPair, hash
from p2pclaude.hyperdht.peer.setup_messages import (
    Handshake,
    NoisePayload,
    UdxInfo,
    encode_handshake,
    encode_noise_payload,
)
from p2pclaude.hyperdht.rpc.messages import Request, encode_request
from p2pclaude.hyperdht.secure.noise import NoiseIK

TICK: Final = 0.01
HOST: Final = "127.0.0.1"


def make(key: bytes, port: int, rng: random.Random) -> bytes:
    """Make the request of one client that will never come."""
    noise = NoiseIK.initiator(KeyPair.generate(rng), key, KeyPair.generate(rng))
    payload = NoisePayload(udx=UdxInfo(reusable_socket=False, id=rng.getrandbits(32)), secret_stream=True)
    value = encode_handshake(Handshake(Mode.FROM_CLIENT, noise.write_message(encode_noise_payload(payload))))
    request = Request(rng.getrandbits(16), (HOST, port), DhtCommand.PEER_HANDSHAKE, target=hash(key), value=value)
    return encode_request(request)


def open_socket(number: int) -> socket.socket:
    """Open the socket of one host."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((f"127.1.{number >> 8}.{number & 255}", 0))
    sock.setblocking(False)
    return sock


def answers(sock: socket.socket) -> int:
    """Take every datagram that waits; return how many."""
    count = 0
    while True:
        try:
            sock.recv(2048)
        except (BlockingIOError, ConnectionRefusedError):
            return count
        count += 1


async def main() -> None:
    """Make the messages, then obey."""
    rng = random.Random(6)
    key, port, rate = bytes.fromhex(config["key"]), config["port"], config["rate"]
    requests = [make(key, port, rng) for _ in range(config["made"])]
    sockets = [open_socket(number) for number in range(1, config["hosts"] + 1)]

    async def flood(command: Command) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        sent = answered = 0
        while (elapsed := loop.time() - began) < command["seconds"]:
            while sent < elapsed * rate:
                sent += 1
                sockets[sent % len(sockets)].sendto(requests[sent % len(requests)], (HOST, port))
            answered += sum(map(answers, sockets))
            await asyncio.sleep(TICK)
        emit("flooded", sent=sent, answered=answered)

    emit("ready")
    await serve_commands({"flood": flood})
    for sock in sockets:
        sock.close()


if __name__ == "__main__":
    asyncio.run(main())
