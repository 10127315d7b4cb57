"""The ways a stream can take to its peer, and how both sides settle for the same one (ring 2).

A direct way shows itself by a packet that arrives on it (`streams` asks `firewall`), by a pong or by a hole punching
probe; a relay's way is known once both sides are paired there. The client settles for the way on which the server's
first bytes arrive; the server follows the client's packets until one of its own was acknowledged, which the client
sends on the way it settled for. Later a stream moves only when its way has fallen silent and the peer goes on sending
from elsewhere, as behind a NAT that changed its mapping. From a relay both move on to a direct way as soon as one
carries packets of the stream, and back if it turns out to carry no more of them. `dial` and `pending_client` have one
such object each.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Final

from ..encoding import Address
from ..net.sockets import Socket
from ..net.streams import Stream
from ..node.node import Node
from ..secure.connection import Connection

if TYPE_CHECKING:
    from ..relay.relay_client import RelayLink
    from .puncher import Puncher

log = logging.getLogger(__name__)

UPGRADE_CHECK: Final = 2.0  # seconds after the move from a relay until a direct way must carry an answer again,
UPGRADE_ANSWER: Final = 1.5  # and the time it has for that
UPGRADE_LINGER: Final = 5.0  # seconds for which the server keeps the relay longer than the client
LOST_GRACE: Final = 4.0  # seconds for a packet on another way, once the relay in use has ended the link: a keep-alive
TRIES: Final = (0.0, 0.1, 0.3, 0.6)  # seconds at which a way is tried, since packets get lost
MIGRATION_SILENCE: Final = 0.5  # seconds in which packets come from elsewhere only
SETTLE_INTERVAL: Final = 0.1
AGREE_TIMEOUT: Final = 15.0  # seconds on a relay until probes must be under way; one side may say "try later"
FIRST_REPEAT: Final = 0.15  # seconds after which the first packets are sent again; nothing is known of the way yet,
REPEAT_BACKOFF: Final = 1.4  # so that a lost packet costs little, and a long way a few needless ones
LAST_REPEAT: Final = 0.5
MAX_REPEATS: Final = 12  # of a server, about 5 s; it has heard the client, which may be gone since


class Paths:
    """The way of one stream."""

    def __init__(self, node: Node, stream: Stream, connection: Connection) -> None:
        self._node = node
        self._stream = stream
        self._connection = connection
        self._link: RelayLink | None = None
        self._heard_direct = False
        self._upgraded = False
        self._repeating = False
        self._repeats = 0  # each gives the stream its full time to give up again
        self._other: tuple[Socket, Address] | None = None  # another way that packets come on, and since when
        self._other_since = 0.0
        self.remote_id: int | None = None
        """The peer's id for the stream, once its handshake is read; 0 is none."""
        self.early: tuple[Socket, Address] | None = None
        """Where the peer's first packet came from, if that was before its handshake was read."""
        self.latest = math.inf
        """When the first way may be taken at the latest: a peer that hears us just before we give up would be alone."""
        stream.firewall = self.firewall
        connection.path_kind = self._kind

    @property
    def on_relay(self) -> bool:
        """Whether the stream goes through the relay at present."""
        return self._link is not None and self._is_on(self._link)

    def firewall(self, socket: Socket, source: Address) -> bool:
        """Take note of the way a packet came; all are let in, as what they carry is authenticated."""
        if self.remote_id is None:
            self.early = self.early or (socket, source)
        elif self._link is None or not self._link.carries(socket, source):
            self.take(socket, source)
        elif self._is_open_to_change():
            self._take_relay(self._link)
        else:
            self._consider(socket, source)
        return True

    def take(self, socket: Socket, address: Address) -> None:
        """Use a direct way that has shown itself, unless the stream has settled for one."""
        if self.remote_id is None:
            return
        if self._is_open_to_change():
            self._connect(socket, self.remote_id, address)
        elif self.on_relay:
            self._upgrade(socket, address)
        else:
            self._consider(socket, address)

    def hear_probe(self, socket: Socket, address: Address) -> None:
        """Use a way on which a probe came; leave a relay that works only for one that carries the stream as well."""
        if self.on_relay and self._connection.opened:
            self._try(socket, address, self.remote_id)
        else:
            self.take(socket, address)

    def _try(self, socket: Socket, address: Address, remote_id: int | None) -> None:
        """Send a few packets on a way: the peer that gets one takes it, and shows that by its answer."""
        assert remote_id is not None
        for delay in TRIES:
            asyncio.get_running_loop().call_later(delay, self._stream.try_way, socket, remote_id, address)

    def _consider(self, socket: Socket, address: Address) -> None:
        """Move to where the peer's packets come from now, if for a while none came on the stream's way."""
        now = asyncio.get_running_loop().time()
        if self._other != (socket, address) or self._stream.heard:
            self._other, self._other_since = (socket, address), now
            self._stream.heard = False
        elif now - self._other_since >= MIGRATION_SILENCE and self.remote_id is not None:
            link = self._link
            if link is not None and link.carries(socket, address):
                self._take_relay(link)
            else:
                self._connect(socket, self.remote_id, address)

    def use_relay(self, link: RelayLink) -> None:
        """Know a relay's way; it is used until a direct one shows itself."""
        if self._connection.opened and not self._is_on(link):
            link.close()  # a direct way was faster
            return
        self._link = link
        link.on_lost = lambda: self._lose(link)
        if self._stream.address is None or not self._stream.core.received_any:
            self._take_relay(link)

    def _lose(self, link: RelayLink) -> None:
        """Do not wait for the peer's silence to show that nothing comes through the relay any more."""
        self._stream.heard = False
        asyncio.get_running_loop().call_later(LOST_GRACE, self._give_up, link)

    def _give_up(self, link: RelayLink) -> None:
        if not self._is_on(link) or self._connection.closed or not self._connection.opened:
            return
        if self._stream.heard:  # the link's last packets, as it ends a little later
            self._lose(link)
        else:
            self._connection.fail("the relay ended the link to the peer")

    def _is_on(self, link: RelayLink) -> bool:
        socket, address = self._stream.socket, self._stream.address
        return socket is not None and address is not None and link.carries(socket, address)

    def _is_open_to_change(self) -> bool:
        if self._connection.is_initiator:
            return not self._connection.opened
        return not self._stream.acknowledged and not self._upgraded

    def _connect(self, socket: Socket, remote_id: int, address: Address) -> None:
        if not self._stream.core.connected and asyncio.get_running_loop().time() > self.latest:
            return
        self._stream.connect(socket, remote_id, address)
        if not self._repeating:
            self._repeating = True
            self._repeat_after(FIRST_REPEAT)

    def _repeat_after(self, pause: float) -> None:
        asyncio.get_running_loop().call_later(pause, self._repeat, min(pause * REPEAT_BACKOFF, LAST_REPEAT))

    def _repeat(self, pause: float) -> None:
        """Send the first packets again while it is not certain that they arrived; to nobody who was not heard yet."""
        initiator, opened = self._connection.is_initiator, self._connection.opened
        if self._stream.acknowledged or self._connection.closed or (initiator and opened):
            return
        if opened:
            self._repeats += 1
        if self._repeats > MAX_REPEATS:
            return
        if initiator or opened:
            self._stream.repeat()
        self._repeat_after(pause)

    def _take_relay(self, link: RelayLink) -> None:
        self._connect(link.socket, link.remote_id, link.address)

    def _upgrade(self, socket: Socket, address: Address) -> None:
        """Leave the relay for a direct way, and see whether it works."""
        assert self.remote_id is not None
        log.debug("leaving the relay for a direct way")
        self._heard_direct, self._upgraded = False, True
        self._connect(socket, self.remote_id, address)
        self._try(socket, address, self.remote_id)  # shows the peer the new way if there is nothing else to send
        asyncio.get_running_loop().call_later(UPGRADE_CHECK, self._begin_check)

    def _begin_check(self) -> None:
        socket, address = self._stream.socket, self._stream.address
        if self._link is None or self._connection.closed or socket is None or address is None or self.on_relay:
            return
        self._heard_direct = False
        self._stream.on_packet = self._listen
        self._try(socket, address, self.remote_id)
        asyncio.get_running_loop().call_later(UPGRADE_ANSWER, self._check_upgrade)

    def _listen(self, socket: Socket, source: Address) -> None:
        if self._link is not None and self._link.carries(socket, source):
            self._stream.on_packet = self._listen
        else:
            self._heard_direct = True

    def _check_upgrade(self) -> None:
        link = self._link
        if link is None or link.closed or self._connection.closed or self.on_relay:
            return
        if not self._heard_direct:
            self._take_relay(link)
            self._try(link.socket, link.address, link.remote_id)  # the peer follows
        elif self._connection.is_initiator:
            self._drop_link()
        else:  # it may be that the client hears nothing and comes back
            asyncio.get_running_loop().call_later(UPGRADE_LINGER, self._drop_link)

    def _drop_link(self) -> None:
        if self._link is not None and not self.on_relay:
            self._link.close()
            self._link = None

    async def settle(self, puncher: Puncher | None) -> None:
        """Wait until the way is settled for good, and close the sockets it does not need.

        Call it once the connection is open. While the stream goes through a relay the puncher goes on to the end of its
        probes; a way it finds is taken by `hear_probe`.
        """
        if self._link is not None and not self.on_relay:  # a direct way was faster, and is as new as a later one
            asyncio.get_running_loop().call_later(UPGRADE_CHECK, self._begin_check)
        until = asyncio.get_running_loop().time() + AGREE_TIMEOUT
        while not self._connection.closed and (not self._stream.acknowledged or self._may_leave_relay(puncher, until)):
            await asyncio.sleep(SETTLE_INTERVAL)
        if puncher is not None:
            puncher.hand_over(self._stream)

    def _may_leave_relay(self, puncher: Puncher | None, until: float) -> bool:
        """Tell whether a direct way may still be found: probes leave, or both sides are yet to agree on that."""
        if self._link is None or puncher is None or puncher.exhausted:
            return False
        return puncher.punching or asyncio.get_running_loop().time() < until

    def _kind(self) -> str:
        if self.on_relay:
            return "relayed"
        direct = self._stream.socket in (None, self._node.server_socket, self._node.client_socket)
        return "direct" if direct else "punched"
