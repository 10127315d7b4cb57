"""A UDP proxy that loses, doubles and reorders what passes, both ways.

Config: {target: "host:port", loss, duplicate, reorder, seed}: probabilities a datagram, and the seed of every decision.
Each client gets a socket of its own towards the target, as behind a NAT; whoever talks to the proxy's address sees the
target there. Events: ready {address}. Commands: stats -> stats {passed, lost, doubled, moved}.
"""

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Callable

from interop.python.control import Command, config, emit, serve_commands

FRONT = "127.0.0.1"
BACK = "127.0.0.2"  # another host than the client's, or a node's answer to PING_NAT finds its way around the proxy
LATE = 0.003  # seconds that a reordered datagram is held back
BUFFER = 4 << 20

Address = tuple[str, int]
Deliver = Callable[[bytes], None]


def open_socket(host: str) -> socket.socket:
    """Open a non-blocking socket on that host, with room for bursts: what is lost is lost by decision."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.bind((host, 0))
    sock.setblocking(False)
    return sock


def receive_all(sock: socket.socket) -> list[tuple[bytes, Address]]:
    """Take every datagram that waits."""
    taken: list[tuple[bytes, Address]] = []
    while True:
        try:
            taken.append(sock.recvfrom(2048))
        except (BlockingIOError, ConnectionRefusedError):
            return taken


class Proxy:
    """The front socket, one back socket a client, and the dice."""

    def __init__(self, target: Address) -> None:
        self.loop = asyncio.get_running_loop()
        self.random = random.Random(config["seed"])
        self.target = target
        self.front = open_socket(FRONT)
        self.backs: dict[Address, socket.socket] = {}
        self.count: Counter[str] = Counter()
        self.loop.add_reader(self.front, self.from_clients)

    def from_clients(self) -> None:
        """Pass on what clients sent."""
        for data, client in receive_all(self.front):
            if client not in self.backs:
                self.backs[client] = open_socket(BACK)
                self.loop.add_reader(self.backs[client], self.from_target, client)
            self.roll(data, self.backs[client], self.target)

    def from_target(self, client: Address) -> None:
        """Pass on what the target answered to one client."""
        for data, _ in receive_all(self.backs[client]):
            self.roll(data, self.front, client)

    def roll(self, data: bytes, sock: socket.socket, to: Address) -> None:
        """Decide about one datagram."""
        if self.random.random() < config.get("loss", 0):
            self.count["lost"] += 1
            return
        copies = 1
        if self.random.random() < config.get("duplicate", 0):
            self.count["doubled"] += 1
            copies = 2
        late = self.random.random() < config.get("reorder", 0)
        self.count["moved" if late else "passed"] += 1
        for _ in range(copies):
            if late:
                self.loop.call_later(LATE, self.send, data, sock, to)
            else:
                self.send(data, sock, to)

    def send(self, data: bytes, sock: socket.socket, to: Address) -> None:
        """Hand one datagram to the kernel; what it has no room for is lost."""
        try:
            sock.sendto(data, to)
        except (BlockingIOError, ConnectionRefusedError):
            self.count["refused"] += 1

    def close(self) -> None:
        """Close every socket."""
        for sock in (self.front, *self.backs.values()):
            self.loop.remove_reader(sock)
            sock.close()


async def main() -> None:
    """Run until the controller leaves."""
    host, port = config["target"].split(":")
    proxy = Proxy((host, int(port)))

    async def stats(_: Command) -> None:
        emit("stats", **proxy.count)

    emit("ready", address=f"{FRONT}:{proxy.front.getsockname()[1]}")
    await serve_commands({"stats": stats})
    proxy.close()


if __name__ == "__main__":
    asyncio.run(main())
