"""The nodes a DHT is entered by (ring 2): what the user names, and the addresses that stand for it.

`query` takes `known()` at once; names are looked up in parallel, each at most once in a while, while the query is
already under way. Source of the string forms and of the public network: dht-rpc index.js, hyperdht lib/constants.js.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from socket import AF_INET, inet_pton
from typing import Final

from ..encoding import Address

logger = logging.getLogger(__name__)

PUBLIC_NODES: Final = (
    "88.99.3.86@node1.hyperdht.org:49737",
    "142.93.90.113@node2.hyperdht.org:49737",
    "138.68.147.8@node3.hyperdht.org:49737",
)
RESOLVE_TIMEOUT: Final = 5.0
RESOLVE_AGAIN: Final = 600.0  # after success
RESOLVE_RETRY: Final = 20.0  # after failure


class _Entry:
    __slots__ = ("address", "name", "next_try", "port", "resolved")

    def __init__(self, address: Address | None, name: str | None, port: int) -> None:
        self.address = address  # given as numbers
        self.name = name  # to look up, if there is no address or it does not answer
        self.port = port
        self.resolved: Address | None = None
        self.next_try = 0.0


def is_ipv4(host: str) -> bool:
    """Tell whether a host is an IPv4 address in dotted form."""
    try:
        inet_pton(AF_INET, host)
    except (OSError, ValueError):
        return False
    return True


def parse_node(node: Address | str) -> tuple[str | None, str | None, int]:
    """Return address, name and port of "HOST:PORT", "IP@HOST:PORT" or a pair; ValueError for anything else."""
    if isinstance(node, str):
        text, separator, digits = node.rpartition(":")
        if not separator or not digits.isascii() or not digits.isdigit():
            raise ValueError(f"a bootstrap node is HOST:PORT, not {node!r}")
        host, port = text, int(digits)
    else:
        host, port = node
    suggested, at, name = host.rpartition("@")
    if not 0 < port < 65536 or not name or (at and not is_ipv4(suggested)):
        raise ValueError(f"a bootstrap node is HOST:PORT, not {node!r}")
    if at:
        return suggested, name, port
    return (name, None, port) if is_ipv4(name) else (None, name, port)


class Bootstrap:
    """The bootstrap nodes of one DHT node, and others `remembered` from an earlier life.

    `resolve` looks up a host name and may raise OSError.
    """

    def __init__(
        self,
        nodes: Sequence[Address | str],
        resolve: Callable[[str], Awaitable[str]],
        remembered: Sequence[Address] = (),
    ) -> None:
        self._resolve = resolve
        self._remembered = remembered
        self._tasks: list[asyncio.Task[None]] = []  # lookups under way
        self._entries = []
        for node in nodes:
            host, name, port = parse_node(node)
            self._entries.append(_Entry((host, port) if host is not None else None, name, port))

    def __len__(self) -> int:
        return len(self._entries)

    def known(self) -> list[Address]:
        """Return the addresses that need no lookup, or had it."""
        found = [address for e in self._entries for address in (e.address, e.resolved) if address is not None]
        return list(dict.fromkeys((*found, *self._remembered)))

    def lookup(self, *, fallbacks: bool) -> asyncio.Task[None] | None:
        """Begin to look up the names due, or else join a lookup under way; None if there is nothing to look up.

        Only with `fallbacks` are those taken whose address is given too (it did not answer).
        """
        now = asyncio.get_running_loop().time()
        due = [e for e in self._entries if e.name and (fallbacks or e.address is None) and now >= e.next_try]
        self._tasks = [task for task in self._tasks if not task.done()]
        if due:
            for entry in due:
                entry.next_try = math.inf  # while it is looked up
            self._tasks.append(asyncio.create_task(self._look_up(due)))
        return self._tasks[-1] if self._tasks else None

    async def _look_up(self, entries: list[_Entry]) -> None:
        await asyncio.gather(*map(self._look_up_one, entries))

    async def _look_up_one(self, entry: _Entry) -> None:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                host = await self._resolve(entry.name or "")
            entry.resolved, entry.next_try = (host, entry.port), now + RESOLVE_AGAIN
        except Exception as error:  # without a name server there are still the other nodes
            entry.next_try = now + RESOLVE_RETRY
            logger.debug("bootstrap node not resolved: %s", type(error).__name__)

    async def close(self) -> None:
        """Give up a lookup under way, and those that queries begin because it ended without a result."""
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for entry in self._entries:
            if entry.next_try == math.inf:
                entry.next_try = 0.0
