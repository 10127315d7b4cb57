"""The kernel's UDP sockets behind the `Network` protocol (ring 2): the one place where system calls move datagrams.

A system call costs more than all else that is done for a datagram. So Linux is asked to take and to give trains: runs
of datagrams of one size, the last may be shorter, to or from one address in one call. It cuts a train that is sent
(UDP_SEGMENT, Linux 4.18) and couples what arrives (UDP_GRO, Linux 5.0); on the wire nothing differs. Whether it can is
seen when a socket is made. What an interface refuses as a train leaves one by one, and so does all elsewhere.

To go to sleep and to be woken takes the system longer than a peer on the same host needs to answer. Where an answer is
that near the event loop goes on turning until it is here, for half a millisecond at most (tests/bench/roundtrip.py).
"""

import asyncio
import errno
import functools
import os
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ..encoding import Address
from .interfaces import host_addresses
from .sockets import Arrival

BATCH: Final = 128  # datagrams a turn: enough to amortise the turn, few enough to let others run
RECEIVE_BYTES: Final = 2048  # no datagram of this protocol is larger; of others the rest is cut off
TRAIN_BYTES: Final = 65507  # what one IPv4 datagram could hold: the kernel's limit for a train
TRAIN_DATAGRAMS: Final = 64  # linux/udp.h UDP_MAX_SEGMENTS, before it was raised
BUFFER_BYTES: Final = 2 << 20
MAX_AWAKE_S: Final = 0.0005
POLLS: Final = 8  # looks at the socket a turn of the event loop, which takes as long itself
MAX_BACKLOG: Final = 4096  # datagrams kept while the kernel's buffer is full; more are lost, as on any wire
PLAIN: Final = "P2PCLAUDE_PLAIN_UDP"
"""An environment variable for tests: if it is not empty no trains are used, as on systems that have none."""

# "Never fragment, and let MTU probes out" as (option, value): linux/in.h and macOS netinet/in.h
_DONT_FRAGMENT: Final = {"linux": (10, 3), "darwin": (28, 1)}.get(sys.platform)
_FRAGMENT: Final = 0  # the same option's value for "routers may fragment": IP_PMTUDISC_DONT, or not IP_DONTFRAG
_SOL_UDP: Final = 17
_UDP_SEGMENT: Final = 103  # linux/udp.h
_UDP_GRO: Final = 104
_SEGMENT_SIZE: Final = struct.Struct("=H")
_ANCILLARY_BYTES: Final = 32  # room for one message with an int
_REFUSALS: Final = {errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.ENOPROTOOPT, errno.EOPNOTSUPP}


class UdpSocket:
    """A non-blocking UDP socket on the running event loop."""

    def __init__(self, host: str, port: int, on_datagrams: Callable[[list[Arrival]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_datagrams = on_datagrams
        self._backlog: deque[tuple[Sequence[bytes], Address]] = deque()
        self._waiting = 0  # datagrams in it
        self._sends_trains = self._receives_trains = False
        self._awake_until = 0.0
        self._turning = False
        self._poll: select.poll | None = None
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
        if sys.platform == "linux" and not os.environ.get(PLAIN):
            self._sends_trains = self._has_option(_UDP_SEGMENT, 0)  # 0: only where a call says so
            self._receives_trains = self._has_option(_UDP_GRO, 1)

    def _has_option(self, option: int, value: int) -> bool:
        try:
            self._socket.setsockopt(_SOL_UDP, option, value)
        except OSError:  # an older kernel
            return False
        return True

    # -- out

    def send(self, datagrams: Sequence[bytes], to: Address, ttl: int | None = None, *, fragment: bool = False) -> None:
        """Send a batch to one receiver; `ttl` (hops) and `fragment` are for this batch alone."""
        if self._socket.fileno() < 0:
            return
        if ttl is not None:
            self._send_with(socket.IP_TTL, ttl, self._ttl, datagrams, to)
        elif fragment and _DONT_FRAGMENT is not None:
            option, never = _DONT_FRAGMENT
            self._send_with(option, _FRAGMENT, never, datagrams, to)
        elif self._backlog:
            self._queue(datagrams, to)
        elif (gone := self._hand_over(datagrams, to)) < len(datagrams):
            self._queue(datagrams[gone:], to)
            self._loop.add_writer(self._socket, self._writable)

    def _hand_over(self, datagrams: Sequence[bytes], to: Address) -> int:
        """Give datagrams to the kernel; return how many are gone, fewer than all when its buffer is full."""
        gone, count = 0, len(datagrams)
        refused = -1  # the first datagram of a train that was refused
        while gone < count:
            trains = self._sends_trains and gone != refused and count - gone > 1
            end = _train_end(datagrams, gone) if trains else gone + 1
            try:
                if end - gone == 1:
                    self._socket.sendto(datagrams[gone], to)
                    self._sends_trains &= gone != refused  # it was not too large: go on one by one
                else:
                    size = _SEGMENT_SIZE.pack(len(datagrams[gone]))
                    self._socket.sendmsg(datagrams[gone:end], [(_SOL_UDP, _UDP_SEGMENT, size)], 0, to)
            except (BlockingIOError, InterruptedError):
                return gone
            except OSError as error:
                if end - gone > 1 and error.errno in _REFUSALS:
                    refused = gone  # nothing of it left
                    continue
                # No route, too large, refused by a firewall: lost, as on any wire.
            gone = end
        return gone

    def _send_with(self, option: int, value: int, usual: int, datagrams: Sequence[bytes], to: Address) -> None:
        """Send with an option of the IP layer set to a value for the time being."""
        self._socket.setsockopt(socket.IPPROTO_IP, option, value)
        try:
            for data in datagrams:
                self._socket.sendto(data, to)
        except OSError:
            pass  # what is sent so is repeated anyway
        finally:
            self._socket.setsockopt(socket.IPPROTO_IP, option, usual)

    def _queue(self, datagrams: Sequence[bytes], to: Address) -> None:
        datagrams = datagrams[: MAX_BACKLOG - self._waiting]
        if datagrams:
            self._backlog.append((datagrams, to))
            self._waiting += len(datagrams)

    def _writable(self) -> None:
        while self._backlog:
            datagrams, to = self._backlog[0]
            gone = self._hand_over(datagrams, to)
            self._waiting -= gone
            if gone < len(datagrams):
                self._backlog[0] = (datagrams[gone:], to)
                return
            self._backlog.popleft()
        self._loop.remove_writer(self._socket)

    # -- in

    def stay_awake(self, seconds: float) -> None:
        """Keep the event loop turning until something arrives, for so long at most."""
        self._awake_until = self._loop.time() + min(seconds, MAX_AWAKE_S)
        if not self._turning and _can_wait_awake():
            self._turning = True
            if self._poll is None:  # the many sockets of a hole punch need none
                self._poll = select.poll()
                self._poll.register(self._socket, select.POLLIN)
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = self._loop.time() < self._awake_until
        if not self._turning or self._poll is None:
            return
        self._loop.call_soon(self._turn)
        for _ in range(POLLS):
            if self._poll.poll(0):
                self._read(1)  # it came just now: to ask for another would take longer than to be called again
                break

    def _readable(self) -> None:
        self._read(BATCH)

    def _read(self, left: int) -> None:
        """Take that many datagrams, or what there is if it is less, or the train that has the last of them."""
        batch: list[Arrival] = []
        receive = self._receive_train if self._receives_trains else self._receive_one
        while left > 0:
            try:
                datagrams, source = receive()
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # a queued ICMP error of an earlier send: the next call reads on
                left -= 1
                continue
            left -= len(datagrams)
            if batch and batch[-1][1] == source:
                batch[-1][0].extend(datagrams)
            else:
                batch.append((datagrams, source))
        if batch:
            self._awake_until = 0.0
            self._on_datagrams(batch)

    def _receive_one(self) -> Arrival:
        data, source = self._socket.recvfrom(RECEIVE_BYTES)
        return [data], source

    def _receive_train(self) -> Arrival:
        data, ancillary, _, source = self._socket.recvmsg(TRAIN_BYTES, _ANCILLARY_BYTES)
        for level, kind, value in ancillary:
            if level == _SOL_UDP and kind == _UDP_GRO:
                size = int.from_bytes(value, sys.byteorder)
                if 0 < size < len(data):
                    kept = min(size, RECEIVE_BYTES)
                    return [data[start : start + kept] for start in range(0, len(data), size)], source
        return [data[:RECEIVE_BYTES]], source  # a train's room would hold a whole one of 64 KiB

    def close(self) -> None:
        """Stop reading and close; what was not sent yet is lost."""
        if self._socket.fileno() < 0:
            return
        self._awake_until = 0.0
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()


def _train_end(datagrams: Sequence[bytes], begin: int) -> int:
    """Return where the train ends that begins there: equal sizes, and the last may be shorter."""
    size = len(datagrams[begin])
    limit = min(begin + TRAIN_DATAGRAMS, len(datagrams), begin + TRAIN_BYTES // max(size, 1))
    end = begin + 1
    while end < limit and len(datagrams[end]) == size:
        end += 1
    if end < limit and 0 < len(datagrams[end]) < size:
        end += 1
    return end


@functools.cache
def _can_wait_awake() -> bool:
    """Tell whether a peer on this host can go on while this process waits awake: one processor is not enough."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) > 1
    return (os.cpu_count() or 1) > 1


class UdpNetwork:
    """This host's network."""

    def __init__(self) -> None:
        self._interfaces: list[str] = []

    async def bind(self, host: str, port: int, on_datagrams: Callable[[list[Arrival]], None]) -> UdpSocket:
        """Bind a UDP socket; raises OSError if the address is taken or not ours."""
        return UdpSocket(host, port, on_datagrams)

    def interfaces(self) -> list[str]:
        """Return this host's IPv4 addresses, loopback included; while it cannot tell, those of the last time."""
        try:
            self._interfaces = host_addresses()
        except OSError:  # to ask takes a file, and a hole punch may have taken all there are
            pass
        return list(self._interfaces)

    async def resolve(self, host: str) -> str:
        """Return an IPv4 address of a host name; raises OSError if it has none."""
        found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET)
        return str(found[0][4][0])
