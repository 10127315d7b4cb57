"""The kernel's UDP sockets behind the `Network` protocol (ring 2): the one place where system calls move datagrams."""

import asyncio
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from .encoding import Address
from .endpoint import Datagrams
from .interfaces import host_addresses

BATCH: Final = 128  # datagrams a turn: enough to amortise the turn, few enough to let others run
RECEIVE_BYTES: Final = 2048  # no datagram of this protocol is larger
BUFFER_BYTES: Final = 2 << 20
MAX_BACKLOG: Final = 4096  # datagrams kept while the kernel's buffer is full; more are lost, as on any wire
# "Never fragment, and let MTU probes out" as (option, value): linux/in.h and macOS netinet/in.h
_DONT_FRAGMENT: Final = {"linux": (10, 3), "darwin": (28, 1)}.get(sys.platform)


class UdpSocket:
    """A non-blocking UDP socket on the running event loop."""

    def __init__(self, host: str, port: int, on_datagrams: Callable[[Datagrams], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_datagrams = on_datagrams
        self._backlog: deque[tuple[bytes, Address]] = deque()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._set_options()
            self._socket.bind((host, port))
        except BaseException:
            self._socket.close()
            raise
        self.address: Address = self._socket.getsockname()
        self._ttl = self._socket.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)
        self._loop.add_reader(self._socket, self._readable)

    def _set_options(self) -> None:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        if _DONT_FRAGMENT is not None:  # other systems may fragment instead
            self._socket.setsockopt(socket.IPPROTO_IP, *_DONT_FRAGMENT)

    def send(self, datagrams: Sequence[bytes], to: Address, ttl: int | None = None) -> None:
        """Send a batch to one receiver; with `ttl`, that many hops for this batch alone."""
        if self._socket.fileno() < 0:
            return
        if ttl is not None:
            self._send_with_ttl(datagrams, to, ttl)
            return
        if self._backlog:
            self._queue(datagrams, to)
            return
        sendto = self._socket.sendto
        for index, data in enumerate(datagrams):
            try:
                sendto(data, to)
            except (BlockingIOError, InterruptedError):
                self._queue(datagrams[index:], to)
                self._loop.add_writer(self._socket, self._writable)
                return
            except OSError:  # no route, too large, refused by a firewall: lost, as on any wire
                continue

    def _send_with_ttl(self, datagrams: Sequence[bytes], to: Address, ttl: int) -> None:
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        try:
            for data in datagrams:
                self._socket.sendto(data, to)
        except OSError:
            pass  # probes are repeated anyway
        finally:
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, self._ttl)

    def _queue(self, datagrams: Sequence[bytes], to: Address) -> None:
        room = MAX_BACKLOG - len(self._backlog)
        self._backlog.extend((data, to) for data in datagrams[:room])

    def _writable(self) -> None:
        while self._backlog:
            data, to = self._backlog[0]
            try:
                self._socket.sendto(data, to)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                pass
            self._backlog.popleft()
        self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        batch: Datagrams = []
        receive = self._socket.recvfrom
        for _ in range(BATCH):
            try:
                batch.append(receive(RECEIVE_BYTES))
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # a queued ICMP error of an earlier send: the next call reads on
                continue
        if batch:
            self._on_datagrams(batch)

    def close(self) -> None:
        """Stop reading and close; what was not sent yet is lost."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()


class UdpNetwork:
    """This host's network."""

    async def bind(self, host: str, port: int, on_datagrams: Callable[[Datagrams], None]) -> UdpSocket:
        """Bind a UDP socket; raises OSError if the address is taken or not ours."""
        return UdpSocket(host, port, on_datagrams)

    def interfaces(self) -> list[str]:
        """Return this host's IPv4 addresses, loopback included."""
        return host_addresses()

    async def resolve(self, host: str) -> str:
        """Return an IPv4 address of a host name; raises OSError if it has none."""
        found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET)
        return str(found[0][4][0])
