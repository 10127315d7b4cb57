"""The two ports of a node: which ones are bound, and which ones again after a sleep (ring 2)."""

from collections.abc import Iterator
from typing import Final

from ..net.endpoint import Endpoint
from ..net.sockets import Socket

PORT_TRIES: Final = 5  # ports from the wanted one on, if that is taken


class Ports:
    """Binds a node's sockets on `host`: the server's to a known port, the client's to one of chance.

    `port` 0 is any port. If another one is taken, the next ones are tried and then any, unless `any_port` is False.
    """

    def __init__(self, endpoint: Endpoint, host: str, port: int, *, any_port: bool) -> None:
        self.host = host
        self.bound = (0, 0)
        """The server's and the client's port when they were bound last."""
        self._endpoint = endpoint
        self._port = port
        self._any_port = any_port

    async def bind(self) -> tuple[Socket, Socket]:
        """Bind the server's socket and the client's, on the former ports if there were some. Raises OSError."""
        server = await self._bind_server()
        try:
            client = await self._bind_one(self.bound[1])
        except OSError:
            server.close()
            raise
        self.bound = server.address[1], client.address[1]
        return server, client

    async def _bind_server(self) -> Socket:
        if not self._port:
            return await self._bind_one(self.bound[0])
        for port in self._wanted():
            try:
                return await self._endpoint.bind(self.host, port)
            except OSError:
                if not self._any_port:
                    raise
        return await self._endpoint.bind(self.host, 0)

    def _wanted(self) -> Iterator[int]:
        if self.bound[0]:
            yield self.bound[0]
        yield from range(self._port, min(self._port + (PORT_TRIES if self._any_port else 1), 65536))

    async def _bind_one(self, port: int) -> Socket:
        if port:
            try:
                return await self._endpoint.bind(self.host, port)
            except OSError:
                pass  # taken while the node was suspended
        return await self._endpoint.bind(self.host, 0)
