"""A DHT node by itself, and a blind relay on it if that is wanted: what `p2pclaude-node` runs.

`cli.node` fills `NodeOptions` and runs `run_node`. The relay's key pair is in a file, so that its key, which daemons
and clients are told, survives restarts.
"""

import asyncio
import base64
import binascii
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from p2pclaude import __version__
from p2pclaude.errors import DataError, UsageError, cannot_bind
from p2pclaude.host.datadir import DataDir, file_errors, write_atomically
from p2pclaude.host.log import Log, NodeEvent, short, wants_debug, with_libraries

if TYPE_CHECKING:
    from p2pclaude.hyperdht import HyperDHT, KeyPair, RelayEvent, RelayServer

DEFAULT_PORT: Final = 49737
DEFAULT_MAX_CONNECTIONS: Final = 256
DEFAULT_MAX_LINKS: Final = 1024
KEY_FILE: Final = "relay-keypair.json"
STATUS_SECONDS: Final = 60.0

_MAX_KEY_FILE = 65536
_DESTROY_SECONDS = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What `p2pclaude-node` was asked for.

    `bootstrap` lists `host:port`: None is a network of one's own, empty the public one. `host` is the address to bind,
    `public_host` the one at which others reach the node; both IPv4. `max_bytes` and `max_seconds` are a link's.
    """

    bootstrap: tuple[str, ...] | None = None
    host: str | None = None
    port: int | None = None
    public_host: str | None = None
    relay: bool = False
    key_file: str | None = None
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    max_links: int = DEFAULT_MAX_LINKS
    max_bytes: int | None = None
    max_seconds: float | None = None
    debug: bool = False


async def run_node(options: NodeOptions) -> int:
    """Run until SIGINT or SIGTERM, and give the exit status. Raises P2PClaudeError when it cannot start."""
    return await DHTNode(options).run()


def relay_key(options: NodeOptions, environ: Mapping[str, str] | None = None) -> str:
    """Give the relay's public key in hex, making it if there is none (`--print-key`)."""
    return _load_key_pair(options, os.environ if environ is None else environ, lambda _: None).public_key.hex()


class DHTNode:
    """One node. Environment and log can be given, for tests."""

    def __init__(
        self,
        options: NodeOptions,
        *,
        environ: Mapping[str, str] | None = None,
        log: Log | None = None,
        exit_now: Callable[[int], Any] = os._exit,
    ) -> None:
        self._options = options
        self._environ = os.environ if environ is None else environ
        self._log = log or Log(debug=options.debug or wants_debug(self._environ))
        self._exit_now = exit_now
        self._stopping = asyncio.Event()
        self._relay: RelayServer | None = None

    async def run(self) -> int:
        """Run until a signal or `stop`; give the exit status. Raises P2PClaudeError when it cannot start."""
        loop = asyncio.get_running_loop()
        key_pair = _load_key_pair(self._options, self._environ, self._warn) if self._options.relay else None
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        try:
            with with_libraries(self._log):
                dht = await self._start()
                await self._live(dht, key_pair)
        finally:
            for number in (*_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)
            self._log.finish()
        return 0

    def stop(self) -> None:
        """Begin the ordered shutdown."""
        self._stopping.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            self._exit_now(128 + number)
            return
        self._log(NodeEvent.STOPPING, signal=number.name)
        self.stop()

    def _on_hangup(self) -> None:
        message = "nothing is opened anew: options and key are those of the start, and the log is standard output"
        self._log(NodeEvent.SIGNAL_IGNORED, signal="SIGHUP", message=message)

    async def _start(self) -> "HyperDHT":
        dht = _make_dht(self._options)
        try:
            await dht.start()
        except OSError as error:
            await dht.destroy()
            raise cannot_bind(error, self._options.host, self._options.port or DEFAULT_PORT) from error
        return dht

    async def _live(self, dht: "HyperDHT", key_pair: "KeyPair | None") -> None:
        tasks = [asyncio.create_task(self._watch(dht))]
        if key_pair is not None:
            self._relay = _make_relay(dht, self._options, self._tell)
            tasks.append(asyncio.create_task(self._announce(self._relay, key_pair)))
        self._say_started(dht, key_pair)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            # A task that ends before the signal has failed, and its exception is the command's.
            done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for waiting in (*tasks, stopping):
                waiting.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
            await self._take_down(dht)

    async def _take_down(self, dht: "HyperDHT") -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        try:
            if self._relay is not None:
                async with asyncio.timeout(_DESTROY_SECONDS):
                    await self._relay.close()
        except TimeoutError:
            pass  # the nodes that store the announcement will forget it
        finally:
            await dht.destroy(_DESTROY_SECONDS)
        self._log(NodeEvent.STOPPED, seconds=round(loop.time() - begin, 3))

    async def _watch(self, dht: "HyperDHT") -> None:
        """Say when the network is joined; then, for who wants it, once a minute how things are."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await dht.bootstrapped.wait()
        if self._options.bootstrap is not None and not dht.node.table:
            self._warn("no node of the network answers; this one goes on asking")
            while not dht.node.table:
                await asyncio.sleep(1)
        self._log(NodeEvent.JOINED, seconds=round(loop.time() - begin, 3), nodes=len(dht.node.table))
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            relay = self._relay
            self._log(
                NodeEvent.STATUS,
                nodes=len(dht.node.table),
                clients=None if relay is None else relay.connections,
                links=None if relay is None else relay.links,
                bytes=None if relay is None else relay.stats.bytes,
            )

    async def _announce(self, relay: "RelayServer", key_pair: "KeyPair") -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await relay.listen(key_pair)
        if not relay.is_announced:
            self._warn("the relay cannot be found yet: no node takes its announcement; this one goes on trying")
            while not relay.is_announced:
                await asyncio.sleep(1)
        self._log(NodeEvent.ANNOUNCED, seconds=round(loop.time() - begin, 3))
        await self._stopping.wait()

    def _say_started(self, dht: "HyperDHT", key_pair: "KeyPair | None") -> None:
        options = self._options
        host = _public_host(options) or options.host or "0.0.0.0"
        self._log(
            NodeEvent.STARTED,
            version=__version__,
            pid=os.getpid(),
            network="own" if options.bootstrap is None else "joined" if options.bootstrap else "public",
            address=f"{host}:{dht.port}",
            relay_key=None if key_pair is None else key_pair.public_key.hex(),
        )

    def _tell(self, event: "RelayEvent") -> None:
        """Log what happens at the relay."""
        from p2pclaude.hyperdht import (
            ClientConnected,
            ClientGone,
            ClientRefused,
            LinkClosed,
            LinkOpened,
            LinkRefused,
        )

        match event:
            case ClientConnected(client, public_key, address):
                self._log(NodeEvent.CONNECTED, client=client, peer=short(public_key), address=_text(address))
            case ClientGone(client):
                self._log(NodeEvent.GONE, client=client)
            case ClientRefused(address):
                self._log(NodeEvent.REFUSED, address=_text(address))
            case LinkOpened(link, (initiator, responder)):
                self._log(NodeEvent.LINKED, link=link, initiator=initiator, responder=responder)
            case LinkClosed(link, reason, size, seconds):
                self._log(NodeEvent.UNLINKED, link=link, reason=reason, bytes=size, seconds=round(seconds, 3))
            case LinkRefused(client):
                self._log(NodeEvent.LINK_REFUSED, client=client)

    def _warn(self, message: str) -> None:
        self._log(NodeEvent.WARNING, message=message)


def _text(address: tuple[str, int] | None) -> str | None:
    return None if address is None else f"{address[0]}:{address[1]}"


def _make_dht(options: NodeOptions) -> "HyperDHT":
    from p2pclaude.hyperdht import HyperDHT  # here, because --print-key needs no network

    bind, port = options.host or "0.0.0.0", options.port or DEFAULT_PORT
    public_host = _public_host(options)
    if options.bootstrap is None:
        assert public_host is not None
        return HyperDHT.bootstrapper(port, public_host, bind=bind)
    return HyperDHT(
        bootstrap=options.bootstrap or None,
        host=bind,
        port=port,
        any_port=options.port is None and public_host is None,
        ephemeral=None if public_host is None else False,
        public_address=None if public_host is None else (public_host, port),
    )


def _public_host(options: NodeOptions) -> str | None:
    """Give the address at which others reach the node; a bootstrap node has to know it."""
    if options.public_host is not None or options.bootstrap is not None:
        return options.public_host
    if options.host not in (None, "0.0.0.0"):
        return options.host
    import ifaddr  # here, because only a network of one's own asks

    addresses = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)]
    return next((address for address in addresses if not address.startswith("127.")), "127.0.0.1")


def _make_relay(dht: "HyperDHT", options: NodeOptions, tell: "Callable[[RelayEvent], None]") -> "RelayServer":
    from p2pclaude.hyperdht import RelayLimits, RelayServer

    limits = RelayLimits(
        connections=options.max_connections,
        links=options.max_links,
        link_bytes=options.max_bytes,
        link_seconds=options.max_seconds,
    )
    return RelayServer(dht, limits, tell)


# The key pair's file: {"publicKey", "secretKey"} in base64, 32 and 64 bytes, as the daemon's.


def _load_key_pair(options: NodeOptions, environ: Mapping[str, str], warn: Callable[[str], None]) -> "KeyPair":
    """Read the relay's key pair, or make it if there is none. Raises DataError for a damaged file."""
    if options.key_file is None:
        path = DataDir(DataDir.default_path(environ), warn=warn).path / KEY_FILE
    else:
        path = Path(options.key_file)
    try:
        with file_errors(path):
            if not path.exists():
                _create_key_file(path)
            with path.open("rb") as file:
                data = file.read(_MAX_KEY_FILE)
            if loose := path.stat().st_mode & 0o077:
                path.chmod(0o600)
                warn(f"{path} was open to others (mode bits {loose:03o}), now it is not")
    except FileNotFoundError:
        raise UsageError(f"the directory {path.parent} does not exist") from None
    return _decode_key_pair(path, data)


def _create_key_file(path: Path) -> None:
    from p2pclaude.hyperdht import KeyPair

    key_pair = KeyPair.generate()
    parts = {"publicKey": key_pair.public_key, "secretKey": key_pair.secret_key}
    text = json.dumps({name: base64.b64encode(key).decode() for name, key in parts.items()}, indent=2)
    write_atomically(path, text.encode() + b"\n", exclusive=True)


def _decode_key_pair(path: Path, data: bytes) -> "KeyPair":
    from p2pclaude.hyperdht import KeyPair

    try:
        values = json.loads(data)
        public, secret = (base64.b64decode(values[name], validate=True) for name in ("publicKey", "secretKey"))
        key_pair = KeyPair.from_seed(secret[:32])
        if (key_pair.public_key, key_pair.secret_key) == (public, secret):
            return key_pair
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        pass
    raise DataError(
        f"{path} is damaged",
        hint=f"restore it from a backup; to begin with a new key, which all clients must be told, move {path} away",
    )
