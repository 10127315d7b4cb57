"""Client of one daemon: pairing -> connection -> calls, and reconnecting.

`remote_sessions` and the command-line tools stand above this module, `p2pclaude.hyperdht` below it. A request is a
sealed line (`protocol.wire`) on an encrypted connection to the daemon's public key; answers may come in any order, so
several calls can be in flight. What a failure means to a script is decided here, once: every error that leaves is a
`P2PClaudeError` with its exit status.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from p2pclaude.client.hintcache import MAX_ADDRESSES, HintCache, Hints
from p2pclaude.errors import DataError, P2PClaudeError, ProtocolError, Refused, TryAgain, Unavailable, WireError
from p2pclaude.hyperdht import (
    DecodeError,
    HolepunchError,
    HyperDHT,
    HyperDHTError,
    KeyPair,
    PeerConnectionFailed,
    PeerNotFound,
    Timeout,
    TooFewNodes,
)
from p2pclaude.protocol.pairing import client_seed
from p2pclaude.protocol.wire import (
    MAX_FIRST_LINE,
    MAX_REQUEST_LINE,
    MAX_RESPONSE_LINE,
    UNKNOWN_ID,
    UNKNOWN_METHOD,
    WRONG_KEY,
    LineBuffer,
    Request,
    Response,
    SealError,
    decode_response,
    encode_request,
    load_json,
    seal,
    unseal_json,
)

if TYPE_CHECKING:
    from p2pclaude.protocol.pairing import Pairing

DEFAULT_TIMEOUT = 30.0
"""Seconds to wait for a connection, and for each answer."""

RECONNECT_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0, 30.0)
"""Seconds before each new try after a lost connection; the last failure is final."""

CLOSE_TIMEOUT = 1.0
"""Seconds that saying goodbye to the network may take when a tool ends."""

_KEY_HINT = "the pairing URL may be an old one, take it again from pairing.url on the daemon's host"
_NETWORK_HINT = "check the network, in a private one p2pclaude-daemon too; --bootstrap names other nodes"
_KEY_ERRORS = ("decrypt", "authenticate", "cipher")  # what Node's crypto and its users say of a wrong key

Note = Callable[[str], None]
Parse = Callable[[bytes], object]


class Stream(Protocol):
    """What a call needs of a connection: the part of `hyperdht.Connection` used here."""

    @property
    def how(self) -> str:
        """The way the packets take: direct, punched or relayed."""

    @property
    def remote_address(self) -> tuple[str, int] | None:
        """Tell where packets go; None before the first."""

    async def read(self) -> bytes:
        """Return the next bytes; empty at the end."""

    async def write(self, data: bytes) -> None:
        """Queue bytes and wait for room."""

    async def close(self) -> None:
        """Send what is queued and end both directions."""

    def leave(self) -> None:
        """End both directions, and do not wait for the other side to know."""

    def abort(self) -> None:
        """End now."""


class Dialer(Protocol):
    """Opens connections to one daemon."""

    async def dial(self, timeout: float, early_data: bytes = b"") -> Stream:
        """Open a connection within so many seconds; raise a HyperDHTError or OSError.

        `early_data` are the first bytes to send; the daemon may get them several times.
        """

    async def destroy(self) -> None:
        """Leave the network."""


class DhtDialer:
    """Dials a pairing's daemon over HyperDHT, with one node for all its connections and the pairing's client key.

    It remembers in `hints` how the daemon was found.
    """

    def __init__(
        self,
        pairing: Pairing,
        bootstrap: Sequence[str] | None,
        hints: HintCache | None = None,
        note: Note | None = None,
    ) -> None:
        self._pairing = pairing
        self._bootstrap = bootstrap
        self._hints = hints
        self._note: Note = note or (lambda text: None)
        self._dht: HyperDHT | None = None

    async def dial(self, timeout: float, early_data: bytes = b"") -> Stream:
        """Open a connection; the node is started with the first one."""
        dht = self._dht or await self._start()
        pairing = self._pairing
        return await dht.connect(
            pairing.public_key,
            key_pair=KeyPair.from_seed(client_seed(pairing.data_key)),
            relay_through=pairing.relay,
            early_data=early_data,
            timeout=timeout,
        )

    async def _start(self) -> HyperDHT:
        hints = self._read_hints()
        dht = HyperDHT(bootstrap=self._bootstrap, remembered=hints.nodes, port=0, ephemeral=True)
        dht.remember_relays(self._pairing.public_key, hints.addresses)
        try:
            await dht.start()
        except BaseException:  # a caller that gives up must leave no socket behind
            await dht.destroy(timeout=CLOSE_TIMEOUT)
            raise
        self._dht = dht
        return dht

    def _read_hints(self) -> Hints:
        if self._hints is None:
            return Hints()
        found = self._hints.read()
        self._note_problem("read")
        return found

    async def destroy(self) -> None:
        """Leave the network within `CLOSE_TIMEOUT` seconds."""
        if self._dht is None:
            return
        addresses = self._dht.remembered_relays(self._pairing.public_key)
        if self._hints is not None and addresses:
            self._hints.write(Hints(addresses, self._dht.latest_nodes(MAX_ADDRESSES)))
            self._note_problem("kept")
        await self._dht.destroy(timeout=CLOSE_TIMEOUT)

    def _note_problem(self, what: str) -> None:
        if self._hints is not None and self._hints.problem is not None:
            self._note(f"the daemon's whereabouts cannot be {what}: {self._hints.problem}")


class _Channel:
    """One connection, and the calls waiting on it; the request `early_id` went out with its first packet."""

    def __init__(self, stream: Stream, data_key: bytes, early_id: str | None = None) -> None:
        self.stream = stream
        self.failure: P2PClaudeError | None = None  # set once, when the connection is of no more use
        self.has_proved = False  # that this side holds the key: the daemon has answered
        self._data_key = data_key
        self._waiting: dict[str | int, asyncio.Future[Response]] = {}
        if early_id is not None:
            self._waiting[early_id] = asyncio.get_running_loop().create_future()
        self._heard_at = 0.0
        self._reading = asyncio.create_task(self._read())

    async def call(self, request_id: str, line: bytes, timeout: float, parse: Parse) -> object:
        """Make one call; `timeout` is the silence in seconds, so that a long answer may take its time."""
        answer = self._waiting.get(request_id)
        is_sent = answer is not None
        if answer is None:
            answer = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            if not is_sent:
                async with asyncio.timeout(timeout):
                    await self.stream.write(line)
            return self._open(await self._wait(answer, timeout), parse)
        except (HyperDHTError, OSError) as error:
            self.failure = explain(error)
            raise self.failure from error
        finally:
            self._waiting.pop(request_id, None)
            answer.cancel()

    async def _wait(self, answer: asyncio.Future[Response], timeout: float) -> Response:
        loop = asyncio.get_running_loop()
        if self.failure is not None:
            raise self.failure
        deadline = loop.time() + timeout
        while not answer.done():
            await asyncio.wait({answer}, timeout=deadline - loop.time())
            if not answer.done() and loop.time() >= (deadline := max(deadline, self._heard_at + timeout)):
                self.failure = TryAgain("no answer from the daemon in time")
                raise self.failure
        return answer.result()

    def _open(self, response: Response, parse: Parse) -> object:
        """Unseal a result, or raise what the answer says."""
        if not response.ok:
            raise _refusal(response.error or "")
        self.has_proved = True
        if response.result is None:
            return {}
        try:
            return parse(unseal_json(self._data_key, response.result))
        except SealError as error:
            raise Refused("wrong key: the daemon's answer does not open with it", hint=_KEY_HINT) from error

    async def _read(self) -> None:
        """Hand out answers until the connection ends, then fail what still waits."""
        lines = LineBuffer(MAX_RESPONSE_LINE)
        failure: P2PClaudeError = TryAgain("the connection to the daemon was lost")
        try:
            while data := await self.stream.read():
                self._heard_at = asyncio.get_running_loop().time()
                for line in lines.feed(data):
                    self._deliver(decode_response(line))
        except WireError:
            failure = ProtocolError("what answers is not a p2pclaude daemon")
        except (HyperDHTError, OSError) as error:
            failure = explain(error)
        self.failure = failure
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(failure)

    def _deliver(self, response: Response) -> None:
        """Give an answer to its call; one that nobody waits for any more is dropped.

        Raises WireError for the answer to a line that the daemon could not read.
        """
        if response.id == UNKNOWN_ID:
            raise WireError("the daemon could not read a request")
        answer = self._waiting.get(response.id)
        if answer is not None and not answer.done():
            answer.set_result(response)

    async def close(self) -> None:
        """End the connection; its reader ends with it."""
        self._reading.cancel()
        if not self._waiting and self.failure is None:
            self.stream.leave()  # every answer is there: the daemon has all it needs
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.stream.close()
        except (HyperDHTError, OSError):
            self.stream.abort()
        await asyncio.gather(self._reading, return_exceptions=True)


class Client:
    """Calls to one daemon over one connection, which is opened when it is first needed.

    Use `async with open_client(pairing) as client`; the connection is closed at the end.
    """

    def __init__(
        self, dialer: Dialer, data_key: bytes, *, timeout: float = DEFAULT_TIMEOUT, note: Note | None = None
    ) -> None:
        self.timeout = timeout
        self._dialer = dialer
        self._data_key = data_key
        self._note: Note = note or (lambda text: None)
        self._channel: _Channel | None = None
        self._ids = itertools.count(1)
        self._connecting = asyncio.Lock()
        self._reached = False
        self.was_connected = False
        """Whether a connection was open at any time: only then a request may have been sent."""

    async def connect(self) -> Stream:
        """Return the open connection, opening it if there is none.

        Raises Unavailable when the daemon is not found or not reachable, TryAgain when time runs out.
        """
        return (await self._open_channel()).stream

    async def call(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        *,
        patience: float = 0.0,
        early: bool = False,
        parse: Parse = load_json,
    ) -> object:
        """Make one call and return its result, a JSON value, as `parse` reads it.

        `patience` is added to the timeout, in seconds, for a call that the daemon answers late on purpose. An `early`
        one may leave with the first packet of a new connection, which saves a round trip; when that packet's way turns
        out to be none the daemon may get it again, so it must be harmless twice.
        Raises Unavailable, TryAgain, Refused (wrong key) or ProtocolError.
        """
        request_id, line = self._encode(method, params or {})
        loop = asyncio.get_running_loop()
        started = loop.time()
        early = early and len(line) <= MAX_FIRST_LINE
        channel = await self._open_channel(request_id if early else None, line if early else b"")
        if len(line) > MAX_FIRST_LINE and not channel.has_proved:
            # Strangers share what the daemon keeps of unread lines: a few long ones at once would break each other off.
            await channel.call(*self._encode("ping", {}), self.timeout, load_json)
        result = await channel.call(request_id, line, self.timeout + patience, parse)
        self._note(f"{method} answered in {(loop.time() - started) * 1000:.0f} ms")
        self._reached = True
        return result

    async def persist(
        self,
        method: str,
        params: Mapping[str, object],
        *,
        patience: float = 0.0,
        early: bool = False,
        parse: Parse = load_json,
    ) -> object:
        """Make a call that is harmless twice, reconnecting until it is answered.

        Tries again after each of `RECONNECT_DELAYS`, then raises what the last try raised. Every answered call
        starts with all tries again. What was never reached is not lost: then the first failure is final.
        """
        for delay in RECONNECT_DELAYS:
            try:
                return await self.call(method, params, patience=patience, early=early, parse=parse)
            except (Unavailable, TryAgain) as error:
                if not self._reached:
                    raise
                self._note(f"{error}; trying again in {delay:g} s")
                await asyncio.sleep(delay)
        return await self.call(method, params, patience=patience, early=early, parse=parse)

    async def close(self) -> None:
        """Close the connection and leave the network."""
        if self._channel is not None:
            await self._channel.close()
        await self._dialer.destroy()

    def _encode(self, method: str, params: Mapping[str, object]) -> tuple[str, bytes]:
        """Give the id and the line of a new request. Raises DataError if it is too long."""
        request_id = str(next(self._ids))
        line = encode_request(Request(request_id, method, seal(self._data_key, params)))
        if len(line) > MAX_REQUEST_LINE:
            raise DataError(f"the request is longer than {MAX_REQUEST_LINE >> 20} MiB")
        return request_id, line

    async def _open_channel(self, early_id: str | None = None, early_data: bytes = b"") -> _Channel:
        async with self._connecting:
            if self._channel is None or self._channel.failure is not None:
                if self._channel is not None:
                    await self._channel.close()
                    self._channel = None
                self._channel = _Channel(await self._dial(early_data), self._data_key, early_id)
                self.was_connected = True
            return self._channel

    async def _dial(self, early_data: bytes) -> Stream:
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self.timeout):
                stream = await self._dialer.dial(self.timeout, early_data)
        except (HyperDHTError, OSError) as error:
            raise explain(error) from error
        spent_ms = (asyncio.get_running_loop().time() - started) * 1000
        self._note(f"connected to {format_address(stream)} ({stream.how}) in {spent_ms:.0f} ms")
        return stream


@asynccontextmanager
async def open_client(
    pairing: Pairing,
    *,
    bootstrap: Sequence[str] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    note: Note | None = None,
    hints: HintCache | None = None,
) -> AsyncIterator[Client]:
    """Yield a Client of the daemon that a pairing names, and close it at the end.

    `bootstrap` are `host:port` strings, None for the public network; `timeout` is in seconds; `note` gets diagnostics;
    `hints` says where the daemon was the last time.
    """
    dialer = DhtDialer(pairing, bootstrap, hints, note)
    client = Client(dialer, pairing.data_key, timeout=timeout, note=note)
    try:
        yield client
    finally:
        await client.close()


def format_address(stream: Stream) -> str:
    """Return the peer's address as host:port."""
    host, port = stream.remote_address or ("unknown", 0)
    return f"{host}:{port}"


def _refusal(error: str) -> P2PClaudeError:
    """Say what an answer with `ok: false` means; our daemon's texts are named in `wire`, others are guessed."""
    if error == WRONG_KEY or any(word in error.lower() for word in _KEY_ERRORS):
        return Refused("wrong key: the daemon cannot open the request", hint=_KEY_HINT)
    if error.startswith(UNKNOWN_METHOD):
        return ProtocolError("the daemon does not know this request", hint="it may be an older one")
    return ProtocolError(f"the daemon could not answer: {error or 'no reason given'}")


def explain(error: Exception) -> P2PClaudeError:
    """Say what a failure of the network means to the caller."""
    if isinstance(error, DecodeError):  # what the network brings is dropped, so it is our own input
        return DataError("the pairing URL holds no usable public key", hint="copy it again, the whole of it")
    if isinstance(error, PeerNotFound):
        return Unavailable("daemon not found", hint="is p2pclaude-daemon running there, with this pairing URL?")
    if isinstance(error, TooFewNodes):
        return Unavailable("no DHT node answered", hint=_NETWORK_HINT)
    if isinstance(error, PeerConnectionFailed | HolepunchError):
        return Unavailable("daemon found, but not reachable")
    if isinstance(error, Timeout | TimeoutError):
        return TryAgain("timed out")
    if isinstance(error, ConnectionError):
        return TryAgain("the connection to the daemon was lost")
    if isinstance(error, HyperDHTError):
        return Unavailable(f"daemon not reachable: {error}")
    reason = error.strerror if isinstance(error, OSError) else None
    return Unavailable(f"the network failed: {(reason or str(error)).lower()}")
