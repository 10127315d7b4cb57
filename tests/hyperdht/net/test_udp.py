"""The kernel's sockets: trains where it has them, single datagrams where not, the same datagrams either way."""

import asyncio
import errno
import random
import selectors
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net import udp
from p2pclaude.hyperdht.net.sockets import Arrival
from p2pclaude.hyperdht.net.udp import PLAIN, UdpSocket

FULL = 1472
AWAKE_S = 30.0  # far more than it takes to be answered, also on a busy machine
has_trains = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has trains: THEY ARE NOT TESTED")


class Inbox:
    """A bound socket and what came to it."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.calls = 0
        self._changed = asyncio.Event()
        self.socket = UdpSocket("127.0.0.1", 0, self._take)

    def _take(self, batch: list[Arrival]) -> None:
        self.calls += 1
        self.arrivals += batch
        self._changed.set()

    @property
    def datagrams(self) -> list[tuple[bytes, Address]]:
        return [(data, source) for datagrams, source in self.arrivals for data in datagrams]

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.datagrams]

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.datagrams) < count:
                self._changed.clear()
                await self._changed.wait()


class Refusing:
    """Stands before a kernel socket and lets calls fail: `trains` with that error, `full` those to come."""

    def __init__(self, inner: Any, trains: int = 0) -> None:
        self.inner, self.trains = inner, trains
        self.largest = 0  # datagrams over this size are too large, and trains of others are not refused
        self.full: set[int] = set()  # numbers of calls that find the kernel's buffer full
        self.calls: list[int] = []  # datagrams of each call that went through
        self.got: list[int] = []  # bytes of each call that brought some

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _pass(self, count: int) -> None:
        number = len(self.calls)
        if number in self.full:
            self.full.discard(number)
            raise BlockingIOError(errno.EAGAIN, "full")
        self.calls.append(count)

    def sendto(self, data: bytes, to: Address) -> int:
        if 0 < self.largest < len(data):
            raise OSError(errno.EMSGSIZE, "too large")
        self._pass(1)
        sent: int = self.inner.sendto(data, to)
        return sent

    def recvmsg(self, *sizes: int) -> Any:
        got = self.inner.recvmsg(*sizes)
        self.got.append(len(got[0]))
        return got

    def sendmsg(self, datagrams: list[bytes], ancillary: Any, flags: int, to: Address) -> int:
        if self.trains and len(datagrams[0]) > self.largest:
            raise OSError(self.trains, "no trains here")
        self._pass(len(datagrams))
        sent: int = self.inner.sendmsg(datagrams, ancillary, flags, to)
        return sent


def refuse(sock: UdpSocket, trains: int = 0) -> Refusing:
    """Put a `Refusing` before the kernel."""
    refusing = Refusing(sock._socket, trains)
    sock._socket = refusing  # type: ignore[assignment]
    return refusing


@pytest.fixture(params=["trains", "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with all the kernel has, and as on a system that has none of it."""
    monkeypatch.setenv(PLAIN, "1" if request.param == "plain" else "")
    yield request.param


def run(work: Callable[[Inbox, Inbox], Awaitable[None]]) -> None:
    """Run a test's coroutine with two sockets."""

    async def main() -> None:
        one, two = Inbox(), Inbox()
        try:
            await work(one, two)
        finally:
            one.socket.close()
            two.socket.close()

    asyncio.run(main())


def numbered(sizes: list[int]) -> list[bytes]:
    """Return datagrams of these sizes, all different."""
    return [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]


def test_every_datagram_arrives_as_it_was(kind: str) -> None:
    rng = random.Random(1)
    sizes = [FULL] * 100 + [700, FULL, FULL, 0, 1, 1, 1, 20, FULL] + [rng.choice((30, 31, FULL)) for _ in range(100)]
    sent = numbered(sizes)

    async def work(one: Inbox, two: Inbox) -> None:
        one.socket.send(sent, two.socket.address)
        await two.wait(len(sent))
        assert two.data == sent
        assert {source for _, source in two.datagrams} == {one.socket.address}

    run(work)


def test_a_datagram_longer_than_any_of_the_protocol_is_cut(kind: str) -> None:
    """A persistent node keeps what strangers send it: 65,536 values, and a datagram could bring 64 KiB."""

    async def work(one: Inbox, two: Inbox) -> None:
        one.socket.send([b"a" * 60_000], two.socket.address, fragment=True)
        one.socket.send([b"b" * 9000] * 3, two.socket.address)
        await two.wait(4)
        assert two.data == [b"a" * 2048] + [b"b" * 2048] * 3

    run(work)


def test_sources_are_not_confused(kind: str) -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        others = [Inbox() for _ in range(5)]
        sent = {other.socket.address: numbered([FULL] * (7 + i)) for i, other in enumerate(others)}
        for other in others:
            other.socket.send(sent[other.socket.address], one.socket.address)
        await one.wait(sum(map(len, sent.values())))
        for other in others:
            came = [data for data, source in one.datagrams if source == other.socket.address]
            assert came == sent[other.socket.address]
            other.socket.close()

    run(work)


@has_trains
def test_a_train_is_one_call_each_way() -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        assert one.socket._sends_trains and two.socket._receives_trains, "this kernel has no trains"
        calls, got = refuse(one.socket).calls, refuse(two.socket).got
        sent = numbered([FULL] * 30 + [100] + [50] * 3)
        one.socket.send(sent, two.socket.address)
        await two.wait(len(sent))
        assert calls == [31, 3]
        assert got == [30 * FULL + 100, 150]

    run(work)


def test_no_train_is_longer_than_the_kernel_takes() -> None:
    for size in (1, 20, 500, 1000, FULL, 9000, 40_000):
        datagrams = [bytes(size)] * 300
        begin = 0
        while begin < len(datagrams):
            end = udp._train_end(datagrams, begin)
            assert begin < end <= begin + 64 and (end - begin == 1 or (end - begin) * size <= 65_507)
            begin = end


@has_trains
@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL])
def test_what_an_interface_refuses_leaves_one_by_one(error: int) -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        refusing = refuse(one.socket, trains=error)
        sent = numbered([FULL] * 50 + [3])
        for _ in range(2):
            one.socket.send(sent, two.socket.address)
        await two.wait(2 * len(sent))
        assert two.data == sent * 2
        assert refusing.calls == [1] * 102

    run(work)


@has_trains
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EMSGSIZE])
def test_what_is_too_large_for_the_interface_is_lost_alone(error: int) -> None:
    """A probe of the path's MTU, and what follows it: the errors are those of older kernels and of newer ones."""

    async def work(one: Inbox, two: Inbox) -> None:
        refusing = refuse(one.socket, trains=error)
        refusing.largest = FULL
        sent = numbered([FULL + 100] + [FULL] * 20 + [3])
        for _ in range(2):
            one.socket.send(sent, two.socket.address)
        await two.wait(2 * (len(sent) - 1))
        assert two.data == sent[1:] * 2 and refusing.calls == [21] * 2

    run(work)


@has_trains
def test_another_error_loses_the_train_alone() -> None:
    """No way there, or none that large: as on any wire, and no reason to give up trains."""

    async def work(one: Inbox, two: Inbox) -> None:
        refusing = refuse(one.socket, trains=errno.ENETUNREACH)
        one.socket.send(numbered([FULL] * 10), two.socket.address)
        refusing.trains = 0
        one.socket.send(numbered([100] * 10), two.socket.address)
        await two.wait(10)
        assert two.data == numbered([100] * 10) and refusing.calls == [10]

    run(work)


def test_what_finds_the_buffer_full_leaves_later_in_order(kind: str) -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        refusing = refuse(one.socket)
        refusing.full = {1, 2, 3}
        sent = numbered([FULL] * 100 + [9] * 20)
        one.socket.send(sent[:100], two.socket.address)
        one.socket.send(sent[100:], two.socket.address)
        assert sum(refusing.calls) < len(sent)
        await two.wait(len(sent))
        assert two.data == sent and not refusing.full and not one.socket._waiting

    run(work)


def test_the_backlog_is_bounded(kind: str) -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        refusing = refuse(one.socket)
        refusing.full = {0}
        for _ in range(100):
            one.socket.send([bytes(10)] * 100, two.socket.address)
        assert one.socket._waiting == udp.MAX_BACKLOG
        assert sum(len(datagrams) for datagrams, _ in one.socket._backlog) == udp.MAX_BACKLOG
        one.socket._writable()
        assert sum(refusing.calls) == udp.MAX_BACKLOG and not one.socket._waiting

    run(work)


def test_others_have_their_turn(kind: str) -> None:
    """However much waits to be read, a turn of the loop reads a bounded part."""

    async def work(one: Inbox, two: Inbox) -> None:
        for _ in range(20):
            one.socket.send([bytes(100)] * 50, two.socket.address)
        two.socket._readable()
        assert udp.BATCH <= len(two.datagrams) < udp.BATCH + udp.TRAIN_DATAGRAMS

    run(work)


def test_an_older_kernel_has_no_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(socket.socket):
        def setsockopt(self, level: int, option: int, value: Any, *rest: Any) -> None:
            if level == 17:
                raise OSError(errno.ENOPROTOOPT, "never heard of it")
            super().setsockopt(level, option, value, *rest)

    monkeypatch.setattr(socket, "socket", Older)

    async def work(one: Inbox, two: Inbox) -> None:
        assert not one.socket._sends_trains and not two.socket._receives_trains
        one.socket.send(numbered([FULL] * 10), two.socket.address)
        await two.wait(10)
        assert two.data == numbered([FULL] * 10)

    run(work)


@has_trains
def test_a_batch_that_may_be_fragmented_is_the_exception(kind: str) -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        option, never = 10, 3  # IP_MTU_DISCOVER, IP_PMTUDISC_PROBE
        spy = Refusing(one.socket._socket)
        seen: list[int] = []

        def sendto(data: bytes, to: Address) -> int:
            seen.append(spy.inner.getsockopt(socket.IPPROTO_IP, option))
            return int(spy.inner.sendto(data, to))

        spy.sendto = sendto  # type: ignore[method-assign]
        one.socket._socket = spy  # type: ignore[assignment]
        one.socket.send([b"a" * FULL], two.socket.address)
        one.socket.send([b"b" * FULL, b"c" * FULL], two.socket.address, fragment=True)
        one.socket.send([b"d"], two.socket.address)
        await two.wait(4)
        assert [data[:1] for data in two.data] == [b"a", b"b", b"c", b"d"]
        assert seen == [never, 0, 0, never]

    run(work)


def test_a_closed_socket_sends_nothing(kind: str) -> None:
    async def work(one: Inbox, two: Inbox) -> None:
        three = Inbox()
        try:
            one.socket.close()
            one.socket.send([b"late"] * 3, two.socket.address)
            three.socket.send([b"after it"], two.socket.address)
            await two.wait(1)
            assert two.data == [b"after it"]
        finally:
            three.socket.close()

    run(work)


class Watched(selectors.DefaultSelector):
    """Notes for how long the event loop was ready to sleep, each time it looked for events; None for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.patience: list[float | None] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.patience.append(timeout)
        return super().select(timeout)

    def slept(self) -> bool:
        return any(timeout != 0 for timeout in self.patience)


def slept(work: Callable[[Inbox, Inbox], Awaitable[None]], patience_s: float = 0.0) -> bool:
    """Run a test's coroutine with two sockets; tell whether the event loop went to sleep, if need be in some more time.

    A timer that is due by the time the loop looks puts nobody to sleep, so on a busy machine one is not enough.
    """
    selector = Watched()

    async def main() -> bool:
        one, two = Inbox(), Inbox()
        try:
            await asyncio.sleep(0)
            selector.patience.clear()
            await work(one, two)
            until = time.monotonic() + patience_s
            while not selector.slept() and time.monotonic() < until:
                await asyncio.sleep(0.001)
            return selector.slept()
        finally:
            one.socket.close()
            two.socket.close()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(main())


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "_can_wait_awake", lambda: True)


@pytest.mark.usefixtures("two_processors")
def test_a_near_answer_is_waited_for_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "MAX_AWAKE_S", AWAKE_S)

    async def answered(one: Inbox, two: Inbox) -> None:
        one.socket.stay_awake(AWAKE_S)
        thread = threading.Timer(0.05, two.socket._socket.sendto, (b"here", one.socket.address))
        thread.start()
        await one.wait(1)
        thread.join()

    assert not slept(answered)


@pytest.mark.usefixtures("two_processors")
def test_nobody_stays_awake_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "MAX_AWAKE_S", AWAKE_S)

    async def answered_twice(one: Inbox, two: Inbox) -> None:
        one.socket.stay_awake(AWAKE_S)
        two.socket.send([b"here"], one.socket.address)
        await one.wait(1)

    assert slept(answered_twice, patience_s=AWAKE_S / 2)


@pytest.mark.usefixtures("two_processors")
def test_nobody_stays_awake_for_long() -> None:
    async def alone(one: Inbox, two: Inbox) -> None:
        began = asyncio.get_running_loop().time()
        one.socket.stay_awake(60.0)
        while one.socket._turning:
            await asyncio.sleep(0)
        assert asyncio.get_running_loop().time() - began >= udp.MAX_AWAKE_S

    assert not slept(alone)


def test_with_one_processor_the_peer_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "MAX_AWAKE_S", AWAKE_S)
    monkeypatch.setattr(udp, "_can_wait_awake", lambda: False)

    async def waiting(one: Inbox, two: Inbox) -> None:
        one.socket.stay_awake(AWAKE_S)

    assert slept(waiting, patience_s=AWAKE_S / 2)


@pytest.mark.usefixtures("two_processors")
def test_a_closed_socket_lets_the_loop_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "MAX_AWAKE_S", AWAKE_S)

    async def closing(one: Inbox, two: Inbox) -> None:
        one.socket.stay_awake(AWAKE_S)
        one.socket.close()

    assert slept(closing, patience_s=AWAKE_S / 2)


def test_without_a_file_to_ask_with_the_host_keeps_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or no handshake were answered, and no tick done, while a hole punch through a random NAT has all the files."""

    def fail() -> list[str]:
        raise OSError(errno.EMFILE, "too many open files")

    network = udp.UdpNetwork()
    known = network.interfaces()
    assert "127.0.0.1" in known
    monkeypatch.setattr(udp, "host_addresses", fail)
    assert network.interfaces() == known
    assert udp.UdpNetwork().interfaces() == []
