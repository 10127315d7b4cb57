"""The sockets of one attempt to get through NATs, and what they send at whom (ring 2).

`punch_rounds` exchanges the rounds with the other side and decides; here a socket of its own is opened, the NAT before
it is classified with the help of a few DHT nodes, and probes leave by the strategy that fits both NATs. A probe is one
byte; the side that connects takes the path on which one arrives, the other side sends it back. Source: hyperdht
lib/holepuncher.js, lib/nat.js.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

from ..constants import Firewall, InternalCommand
from ..encoding import Address
from ..errors import HyperDHTError
from ..net.sockets import Socket
from ..net.streams import Stream
from ..node.nat import NatClassifier
from ..node.node import Node
from .punch_throttle import PunchThrottle

log = logging.getLogger(__name__)

PROBE: Final = b"\x00"
LOW_TTL: Final = 5  # enough to pass the own NATs, too little to reach the peer's
SAMPLES: Final = 8  # nodes asked how they see us: four must answer, and packets get lost
MAX_REOPENS: Final = 3
BIRTHDAY_SOCKETS: Final = 640  # upstream has 256; its 50 probes a second then hit one of ours within 7 s in 95 %
RANDOM_PROBES: Final = 3500
RANDOM_INTERVAL: Final = 0.02
RANDOM_BURST: Final = 4  # probes an interval: at 200 a second one of upstream's 256 sockets is hit within 6 s in 99 %
HELD_INTERVALS: Final = 1800  # upstream sends one probe an interval, the last of them after 35 s
LOW_TTL_CYCLES: Final = 1
UNVERIFIED_EVERY: Final = 4  # rounds; an address the peer only claims could be a victim's
MAX_REMOTE_ADDRESSES: Final = 8
MAX_ANSWERS: Final = 4096  # to probes; more than a peer sends, and the end of two that answer each other

_CONSISTENT: Final = (Firewall.OPEN, Firewall.CONSISTENT)


def _consistent_pauses() -> Iterator[float]:
    """Yield the seconds between rounds of probes: soon at first, since packets get lost; ten seconds in all."""
    pause = 0.1
    for _ in range(12):
        yield pause
        pause = min(2 * pause, 1.0)


class RemoteSide:
    """What the other side says of itself, and which of its hosts have proved that they receive what we send."""

    __slots__ = ("addresses", "firewall", "punching", "verified")

    def __init__(self) -> None:
        self.firewall: int = Firewall.UNKNOWN
        self.addresses: tuple[Address, ...] = ()
        self.punching = False
        """Whether it sends probes, or is about to."""
        self.verified: set[str] = set()

    def verified_address(self) -> Address | None:
        """Return the first of its addresses that is proved: the only kind to which thousands of packets may go."""
        return next((address for address in self.addresses if address[0] in self.verified), None)


class Puncher:
    """One attempt's sockets. `open` it, `close` it when the stream has a path or the attempt is over."""

    def __init__(
        self,
        node: Node,
        rng: random.Random,
        throttle: PunchThrottle,
        *,
        is_initiator: bool,
        on_path: Callable[[Socket, Address], None] | None = None,
    ) -> None:
        self._node = node
        self._rng = rng
        self._throttle = throttle
        self._is_initiator = is_initiator
        self._on_path = on_path
        self.sockets: list[Socket] = []
        """The first one sends the rounds; random punching adds many."""
        self._sampling: asyncio.Task[None] | None = None
        self._known = asyncio.Event()  # the verdict on the NAT, or that there is none to be had
        self._reopening: asyncio.Task[None] | None = None
        self._punching: asyncio.Task[None] | None = None
        self._random = False
        self._answers_left = MAX_ANSWERS
        self.nat = NatClassifier(node.firewalled)
        """What is known of the NAT before our socket."""
        self.remote = RemoteSide()
        self.closed = False

    @property
    def socket(self) -> Socket:
        """The socket rounds and probes leave from."""
        return self.sockets[0]

    @property
    def punching(self) -> bool:
        """Whether probes are being sent."""
        return self._punching is not None and not self._punching.done()

    async def open(self) -> None:
        """Bind the socket and begin to find out about the NAT."""
        self.sockets = [await self._bind()]
        self._begin_sampling()

    def hand_over(self, stream: Stream) -> None:
        """Stop, and leave the socket that the stream has settled for to it."""
        if stream.socket in self.sockets and not stream.forgotten:
            stream.own_socket = stream.socket
        self.close(keep=stream.own_socket)

    def close(self, keep: Socket | None = None) -> None:
        """Stop, and close all sockets but `keep`."""
        if self.closed:
            return
        self.closed = True
        for task in (self._sampling, self._reopening, self._punching):
            if task is not None:
                task.cancel()
        if self._random:
            self._throttle.end()
        for socket in self.sockets:
            if socket is not keep:
                socket.close()

    async def _bind(self) -> Socket:
        socket = await self._node.endpoint.bind(self._node.bind_host, 0)
        socket.on_probe = self._receive_probe
        return socket

    # The own NAT

    def learn(self, to: Address, source: Address) -> None:
        """Take one more sample: where the node at `source` sees the socket."""
        self._learn(self.nat, to, source)

    def _learn(self, nat: NatClassifier, to: Address, source: Address) -> None:
        nat.add(to, source)
        if nat is self.nat and nat.firewall != Firewall.UNKNOWN:
            self._known.set()

    def _begin_sampling(self) -> None:
        self._known.clear()
        self._sampling = asyncio.create_task(self._sample(self.nat, self.socket))
        self._sampling.add_done_callback(self._sampled)

    def _sampled(self, sampling: "asyncio.Task[None]") -> None:
        if sampling is self._sampling:
            self._known.set()

    async def _sample(self, nat: NatClassifier, socket: Socket) -> None:
        """Ask nodes how they see the socket."""
        asked: set[Address] = set()
        for _ in range(2):
            nodes = [address for address in self._helpers() if address not in asked][:SAMPLES]
            asked.update(nodes)
            await asyncio.gather(*(self._ask(nat, socket, address) for address in nodes))
            if nat.decided:
                break
            if len(asked) < SAMPLES:  # a tool that has just started knows few nodes yet
                await self._wait_bootstrapped()
        nat.settle()

    async def _wait_bootstrapped(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._node.bootstrapped.wait()
        except TimeoutError:
            pass

    def _helpers(self) -> list[Address]:
        """Return nodes to ask, on hosts of their own first: a NAT may treat two ports of one host alike."""
        known = [node.address for node in self._node.table.latest(64)]
        known += [address for address in self._node.bootstrap.known() if address not in known]
        first = list({address[0]: address for address in reversed(known)}.values())[::-1]
        return first + [address for address in known if address not in first]

    async def _ask(self, nat: NatClassifier, socket: Socket, address: Address) -> None:
        try:
            reply = await self._node.rpc.request(address, InternalCommand.PING, internal=True, socket=socket, retries=2)
        except HyperDHTError:
            return
        self._learn(nat, reply.to, reply.source)

    async def analyse(self, *, reopen: bool) -> bool:
        """Wait for a verdict on the own NAT and tell whether it leaves a chance.

        With `reopen` up to three fresh sockets are tried: mobile networks give some a better NAT than others.
        """
        await self._wait_decided()
        if self._is_stable():
            return True
        if not reopen:
            return False
        if self._reopening is None:
            self._reopening = asyncio.create_task(self._reopen())
        await asyncio.wait([self._reopening])
        return self._is_stable()

    async def _wait_decided(self) -> None:
        if self.nat.firewall == Firewall.UNKNOWN:  # some node will be slow to answer: it need not be waited for
            await self._known.wait()

    def _is_stable(self) -> bool:
        both_random = self.remote.firewall == Firewall.RANDOM and self.nat.firewall == Firewall.RANDOM
        return not both_random and self.nat.firewall != Firewall.UNKNOWN

    async def _reopen(self) -> None:
        for _ in range(MAX_REOPENS):
            if self._is_stable() or self.closed or self.punching:
                return
            try:
                socket = await self._bind()
            except OSError:  # too many open files: the one there is will have to do
                return
            former, self.sockets = self.sockets, [socket]
            for old in former:
                old.close()
            self.nat = NatClassifier(self._node.firewalled)
            self._begin_sampling()
            await self._wait_decided()

    # The other side

    def update_remote(
        self, firewall: int, addresses: tuple[Address, ...], punching: bool, verified_host: str | None
    ) -> None:
        """Take what the other side says of itself; `verified_host` is one that echoed our token."""
        if verified_host is not None:
            self.remote.verified.add(verified_host)
        self.remote.firewall = firewall
        self.remote.addresses = addresses[:MAX_REMOTE_ADDRESSES]
        self.remote.punching = punching

    def probe(self, address: Address) -> None:
        """Send one probe."""
        self.socket.send([PROBE], address)

    def open_session(self, address: Address, socket: Socket | None = None) -> None:
        """Open the own NAT for an address with a probe that should not get there."""
        (socket or self.socket).send([PROBE], address, LOW_TTL)

    def _receive_probe(self, socket: Socket, source: Address) -> None:
        if self.closed:
            return
        if not self._is_initiator:
            if self._answers_left:
                self._answers_left -= 1
                socket.send([PROBE], source)
        elif self._on_path is not None:
            self._on_path(socket, source)

    # Strategies

    @property
    def needs_random(self) -> bool:
        """Whether one of the NATs makes ports a matter of chance."""
        return Firewall.RANDOM in (self.remote.firewall, self.nat.firewall)

    def may_punch(self) -> bool:
        """Tell whether punching may begin now; random punches are throttled."""
        return self.punching or not self.needs_random or self._throttle.allows(asyncio.get_running_loop().time())

    def punch(self) -> bool:
        """Begin to send probes; False if there is no way for these two NATs."""
        if self._punching is not None:
            return True
        strategy = self._choose()
        if strategy is None or self.closed:
            return False
        if self.needs_random:
            self._random = True
            self._throttle.begin(asyncio.get_running_loop().time())
        self._punching = asyncio.create_task(strategy())
        return True

    @property
    def exhausted(self) -> bool:
        """Whether all probes were sent, or the attempt is over."""
        return self.closed or (self._punching is not None and self._punching.done())

    async def wait_exhausted(self) -> None:
        """Wait until the last probe was sent."""
        if self._punching is not None:
            await asyncio.wait([self._punching])

    def _choose(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        own, remote = self.nat.firewall, self.remote.firewall
        if not self.remote.addresses:
            return None
        if own in _CONSISTENT and remote in _CONSISTENT:
            return self._probe_consistent
        if self.remote.verified_address() is None:
            return None
        if own in _CONSISTENT and remote == Firewall.RANDOM:
            return self._probe_random_ports
        if own == Firewall.RANDOM and remote in _CONSISTENT:
            return self._probe_from_many_sockets
        return None

    async def _probe_consistent(self) -> None:
        for number, pause in enumerate(_consistent_pauses()):
            for address in self.remote.addresses:
                if address[1] and (address[0] in self.remote.verified or number % UNVERIFIED_EVERY == 0):
                    self.probe(address)
            await asyncio.sleep(pause)

    async def _probe_random_ports(self) -> None:
        """Hit one of the many ports that the other side has open."""
        address = self.remote.verified_address()
        assert address is not None
        ports = iter(self._rng.sample(range(1024, 65536), RANDOM_PROBES))
        for _ in range(RANDOM_PROBES // RANDOM_BURST):
            for _ in range(RANDOM_BURST):
                self.probe((address[0], next(ports)))
            await asyncio.sleep(RANDOM_INTERVAL)

    async def _probe_from_many_sockets(self) -> None:
        """Open many ports, and keep them open, for the other side to hit one."""
        address = self.remote.verified_address()
        assert address is not None
        while len(self.sockets) < BIRTHDAY_SOCKETS:
            try:
                socket = await self._bind()
            except OSError:  # too many open files: those there are will have to do
                break
            self.sockets.append(socket)
            self.open_session(address, socket)
        await asyncio.sleep(0.1)
        for number in range(HELD_INTERVALS):
            socket = self.sockets[number % len(self.sockets)]
            low_ttl = number < LOW_TTL_CYCLES * len(self.sockets)
            socket.send([PROBE], address, LOW_TTL if low_ttl else None)
            await asyncio.sleep(RANDOM_INTERVAL)
