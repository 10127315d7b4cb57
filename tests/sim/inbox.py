"""A socket for tests of the simulated network that keeps what it gets."""

import asyncio

from sim.host import Host, SimSocket
from sim.realm import Address


class Inbox:
    """A socket that keeps what it gets: `packets` of (time, data, source), and the sizes of the batches."""

    def __init__(self) -> None:
        self.packets: list[tuple[float, bytes, Address]] = []
        self.batches: list[int] = []
        self.socket: SimSocket

    @classmethod
    async def bind(cls, host: Host, port: int = 0, address: str = "0.0.0.0") -> "Inbox":
        """Return an inbox on a new socket of `host`."""
        inbox = cls()
        inbox.socket = await host.bind(address, port, inbox.receive)
        return inbox

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return self.socket.address[1]

    @property
    def data(self) -> list[bytes]:
        """The payloads, in the order of arrival."""
        return [data for _, data, _ in self.packets]

    @property
    def sources(self) -> list[Address]:
        """The source addresses, in the order of arrival."""
        return [source for _, _, source in self.packets]

    def receive(self, batch: list[tuple[list[bytes], Address]]) -> None:
        """Keep a batch, with the time it came."""
        now = asyncio.get_running_loop().time()
        packets = [(now, data, source) for datagrams, source in batch for data in datagrams]
        self.batches.append(len(packets))
        self.packets += packets

    async def take(self) -> list[tuple[float, bytes, Address]]:
        """Wait two seconds of virtual time and return, and forget, what came."""
        await asyncio.sleep(2)
        taken, self.packets = self.packets, []
        return taken
