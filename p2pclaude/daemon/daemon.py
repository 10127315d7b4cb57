"""The daemon: data directory, identity, DHT node, service and presence put together, started and ended in order.

    connection -> `service` -> `methods` -> `sessions` -> claude        `presence` -> the DHT

`cli.daemon` fills `DaemonOptions` and runs `run_daemon`. Nothing below this module knows of `p2pclaude.hyperdht`.
"""

import asyncio
import ctypes
import hmac
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from p2pclaude import __version__
from p2pclaude.daemon.methods import Methods
from p2pclaude.daemon.presence import Announcement, Node, Presence
from p2pclaude.daemon.service import PeerConnection, Service
from p2pclaude.errors import Refused, Unavailable, UsageError, cannot_bind
from p2pclaude.host.datadir import DataDir, Identity
from p2pclaude.host.log import Event, Log, short, wants_debug, with_libraries
from p2pclaude.host.processes import (
    END_SECONDS,
    Mark,
    Reaper,
    become_subreaper,
    end_descendants,
    end_leftovers,
    kill_leftovers,
)
from p2pclaude.host.systemd import Notifier
from p2pclaude.protocol.pairing import Pairing, client_seed, format_url, is_host_port
from p2pclaude.sessions.claude import PERMISSION_MODES, find_claude
from p2pclaude.sessions.launcher import DEFAULT_MAX_SESSIONS, DEFAULT_PERMISSION_MODE, Settings
from p2pclaude.sessions.retention import Retention
from p2pclaude.sessions.table import SessionTable

if TYPE_CHECKING:
    from p2pclaude.hyperdht import HyperDHT, KeyPair

PRIVATE_PORT = 49737
"""The port of a private network's bootstrap node, unless an option names another."""
DEFAULT_REFRESH_INTERVAL = 60.0
"""Seconds between refreshes of the announcement."""
WANTED_FILES = 8192
"""Open files that the daemon allows itself where the system lets it."""
SHUTDOWN_SECONDS = 10.0
"""The ordered shutdown is over by then."""

_M_MMAP_THRESHOLD = -3
_SESSIONS_SECONDS = 5.5
_RECORD_SECONDS = 1.5
_DESTROY_SECONDS = 1.3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What `p2pclaude-daemon` was asked for; None stands for the default.

    `bootstrap` lists `host:port`; `claude` is a path or a name on PATH; `refresh_interval` and
    `ask_timeout` (None: for ever) are in seconds; `relay` is the 32-byte public key of a blind relay; `strict` lets
    nobody shake hands who has not the client key.
    """

    root_dir: str | None = None
    data_dir: str | None = None
    bootstrap: tuple[str, ...] | None = None
    host: str | None = None
    port: int | None = None
    private: bool = False
    relay: bytes | None = None
    claude: str | None = None
    permission_mode: str | None = None
    model: str | None = None
    refresh_interval: float = DEFAULT_REFRESH_INTERVAL
    max_sessions: int = DEFAULT_MAX_SESSIONS
    retain_days: int | None = None
    ask_timeout: float | None = None
    strict: bool = False
    debug: bool = False


Allow = Callable[[bytes, tuple[str, int]], bool]
"""Tells whether a client with that public key, at that address, may shake hands."""


class DHTServer(Announcement, Protocol):
    """What the daemon needs of `hyperdht.Server`."""

    async def listen(self, key_pair: "KeyPair") -> None:
        """Announce a key pair and answer for it."""

    async def close(self) -> None:
        """Take the announcement back."""


class DHT(Node, Protocol):
    """What the daemon needs of `hyperdht.HyperDHT`."""

    @property
    def port(self) -> int:
        """Give the port that it is bound to."""

    async def start(self) -> None:
        """Bind its sockets. Raises OSError."""

    async def destroy(self, timeout: float) -> None:
        """Leave the network."""

    def create_server(
        self,
        on_connection: Callable[[PeerConnection], Awaitable[None]],
        *,
        allow: Allow | None,
        relay_through: bytes | None,
    ) -> DHTServer:
        """Make a server."""


MakeDHT = Callable[[DaemonOptions], DHT]


async def run_daemon(options: DaemonOptions) -> int:
    """Serve until SIGINT or SIGTERM, and give the exit status. Raises P2PClaudeError when it cannot start."""
    _allow_many_files()
    _give_memory_back()
    become_subreaper()
    with Reaper():
        try:
            return await Daemon(options).run()
        finally:
            await end_descendants()


def _allow_many_files() -> None:
    """Raise the soft limit of open files: sessions have pipes, and a hole punch through some NATs takes 640 sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def pairing_url(options: DaemonOptions, environ: Mapping[str, str] | None = None) -> str:
    """Give the URL that a daemon with these options hands out, making keys if there are none (`--print-url`)."""
    data_dir = data_dir_of(options, os.environ if environ is None else environ, lambda _: None)
    return format_url(_pairing(options, data_dir.load_or_create_identity()))


def _give_memory_back() -> None:
    """Let glibc give large blocks back when they are freed: it would keep them after the first, and strangers cost."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 * 1024)


def rotate(options: DaemonOptions, environ: Mapping[str, str] | None = None) -> str:
    """Make a new data key and give the new pairing URL (`--rotate`). Raises TryAgain while a daemon runs."""
    root_of(options)  # what is wrong with it must be said while the old key is there
    data_dir = data_dir_of(options, os.environ if environ is None else environ, lambda _: None)
    data_dir.lock()
    try:
        data_dir.rotate_data_key()
        url = format_url(_pairing(options, data_dir.load_or_create_identity()))
        data_dir.write_pairing_url(url)
    finally:
        data_dir.unlock()
    return url


class Daemon:
    """One daemon. The DHT, environment and streams can be given, for tests."""

    def __init__(
        self,
        options: DaemonOptions,
        *,
        make_dht: MakeDHT | None = None,
        environ: Mapping[str, str] | None = None,
        log: Log | None = None,
        terminal: TextIO | None = None,
        exit_now: Callable[[int], Any] = os._exit,
    ) -> None:
        self._options = options
        self._environ = os.environ if environ is None else environ
        _check(options, self._environ)
        self._log = log or Log(debug=options.debug or wants_debug(self._environ))
        self._make_dht = make_dht or new_dht
        self._terminal: TextIO | None = terminal or sys.stderr
        self._exit_now = exit_now
        self._stopping = asyncio.Event()
        self.started = asyncio.Event()
        """Set when it serves."""
        self._notifier = Notifier(self._environ)
        self._table: SessionTable | None = None
        self._mark: Mark | None = None

    async def run(self) -> int:
        """Serve until a signal or `stop`; give the exit status. Raises P2PClaudeError when it cannot start."""
        loop = asyncio.get_running_loop()
        data_dir = data_dir_of(self._options, self._environ, self._warn)
        data_dir.lock()
        try:
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._on_signal, number)
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
            with with_libraries(self._log):
                return await self._serve(data_dir)
        finally:
            for number in (*_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)
            data_dir.unlock()
            self._log.finish()

    def stop(self) -> None:
        """Begin the ordered shutdown."""
        self._stopping.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            if self._table is not None and self._mark is not None:
                self._table.kill()
                kill_leftovers(self._mark)
            self._exit_now(128 + number)
        self._log(Event.STOPPING, signal=number.name)
        self.stop()

    def _on_hangup(self) -> None:
        message = "nothing is opened anew: options and keys are those of the start, and the log is standard output"
        self._log(Event.SIGNAL_IGNORED, signal="SIGHUP", message=message)

    async def _serve(self, data_dir: DataDir) -> int:
        """Bring everything up, wait for the end, and take it down in the reverse order."""
        identity = data_dir.load_or_create_identity()
        url = format_url(_pairing(self._options, identity))
        self._mark = Mark.of_sessions(data_dir.sessions_dir)
        table = self._table = SessionTable(data_dir.sessions_dir, self._settings(), self._log, self._on_change)
        service = Service(identity.data_key, Methods(table).call, self._log)
        async with AsyncExitStack() as stack:
            dht = self._make_dht(self._options)
            stack.push_async_callback(self._leave, dht)
            await start_dht(dht, self._options)
            data_dir.write_pairing_url(url)
            allow = _only_client_key(identity) if self._options.strict else None
            server = dht.create_server(service.serve, allow=allow, relay_through=self._options.relay)
            key_pair = _key_pair(identity)
            self._presence = Presence(
                dht,
                server,
                key_pair,
                identity.data_key,
                table.snapshot,
                self._log,
                refresh_interval=self._options.refresh_interval,
            )
            await table.load()  # which starts what waits: nothing fails from here on without ending that in order
            stack.push_async_callback(self._take_down, table, service, server)
            listening = asyncio.create_task(server.listen(key_pair))
            stack.callback(listening.cancel)
            if await self._unless_stopped(listening):
                await self._live(data_dir, identity, dht, url)
        return 0

    async def _live(self, data_dir: DataDir, identity: Identity, dht: DHT, url: str) -> None:
        self._say_started(data_dir, identity, dht, url)
        presence = asyncio.create_task(self._presence.run())
        retention = asyncio.create_task(self._retain())
        watchdog = asyncio.create_task(self._notifier.keep_alive(lambda: self._presence.is_alive))
        try:
            await self._unless_stopped(presence)
        finally:
            presence.cancel()
            watchdog.cancel()
            retention.cancel()

    async def _retain(self) -> None:
        if self._options.retain_days is not None and self._table is not None:
            await Retention(self._table, self._options.retain_days, self._log).run()

    async def _unless_stopped(self, task: "asyncio.Task[None]") -> bool:
        """Wait for a task or for the end, whichever is first; tell whether it was the task."""
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._stopping.is_set():
            return False
        await task
        return True

    async def _take_down(self, table: SessionTable, service: Service, server: DHTServer) -> None:
        """End sessions, connections and the announcement; together with `dht.destroy` within SHUTDOWN_SECONDS."""
        self._stopping.set()
        self._notifier.send("STOPPING=1", "STATUS=stopping")
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await self._gently(_within, _SESSIONS_SECONDS, table.close())
        table.kill()
        leftovers = asyncio.create_task(self._end_leftovers())
        await service.close()
        # The record goes with the announcement: neither waits for nodes that do not answer.
        last_words = asyncio.gather(self._presence.store_record(), server.close(), return_exceptions=True)
        await self._gently(_within, _RECORD_SECONDS, last_words)
        await self._gently(_within, END_SECONDS, leftovers)
        self._log(Event.STOPPED, seconds=round(loop.time() - begin, 3))

    async def _end_leftovers(self) -> None:
        if self._mark is not None and (ended := await end_leftovers(self._mark)):
            self._log(Event.WARNING, message=f"ended {ended} processes that sessions had left running")

    async def _leave(self, dht: DHT) -> None:
        leaving = dht.destroy(timeout=_DESTROY_SECONDS / 2)
        await self._gently(_within, _DESTROY_SECONDS, leaving)

    async def _gently(self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Do one step of the shutdown; its failure must not keep the others from happening."""
        try:
            await function(*args)
        except TimeoutError:
            self._warn("shutdown: a step took too long and was given up")
        except Exception as error:
            self._log(Event.WARNING, message=f"shutdown: {type(error).__name__}: {error}")

    def _say_started(self, data_dir: DataDir, identity: Identity, dht: DHT, url: str) -> None:
        settings = self._settings()
        if self._notifier.problem is not None:
            self._warn(self._notifier.problem)
        self._log(
            Event.STARTED,
            version=__version__,
            pid=os.getpid(),
            public_key=short(identity.public_key),
            data_dir=str(data_dir.path),
            root_dir=None if settings.root_dir is None else str(settings.root_dir),
            network=self._network(),
            port=dht.port,
            claude=self._claude_found(),
        )
        if self._terminal is not None and self._terminal.isatty():  # stderr may be closed from the start
            print(url, file=self._terminal, flush=True)
        self.started.set()
        self._notifier.send("READY=1", self._status())

    def _status(self) -> str:
        running = 0 if self._table is None else len(self._table.listing())
        return f"STATUS=serving, {running} session{'s' * (running != 1)} running"

    def _network(self) -> str:
        if self._options.private:
            return "private"
        return ",".join(self._options.bootstrap) if self._options.bootstrap else "public"

    def _claude_found(self) -> str | None:
        try:
            return str(find_claude(self._options.claude, self._environ))
        except Unavailable as error:
            # It may be installed later, and everything but spawning works without it.
            self._log(Event.WARNING, message=str(error), hint=error.hint)
            return None

    def _settings(self) -> Settings:
        return Settings(
            find_claude=lambda: find_claude(self._options.claude, self._environ),
            default_dir=default_dir_of(self._options),
            root_dir=root_of(self._options),
            permission_mode=self._options.permission_mode or DEFAULT_PERMISSION_MODE,
            model=self._options.model,
            max_sessions=self._options.max_sessions,
            ask_timeout=self._options.ask_timeout,
        )

    def _on_change(self) -> None:
        if self.started.is_set():
            self._presence.changed()
            if not self._stopping.is_set():
                self._notifier.send(self._status())

    def _warn(self, message: str) -> None:
        self._log(Event.WARNING, message=message)


def _check(options: DaemonOptions, environ: Mapping[str, str]) -> None:
    if options.permission_mode is not None and options.permission_mode not in PERMISSION_MODES:
        raise UsageError(f"--permission-mode is none of {', '.join(PERMISSION_MODES)}")
    if options.private and options.bootstrap:
        raise UsageError("--private is a network of its own and takes no --bootstrap")
    if bad := next((entry for entry in options.bootstrap or () if not is_host_port(entry)), None):
        raise UsageError(f"not HOST:PORT: {bad}")
    if options.refresh_interval <= 0 or options.max_sessions < 1:
        raise UsageError("--refresh-interval and --max-sessions take a number above 0")
    if options.claude is not None:
        find_claude(options.claude, environ)


def _real_directory(path: str) -> Path:
    real = Path(os.path.realpath(path))
    if not os.access(real, os.F_OK) or not real.is_dir():
        raise UsageError(f"the root directory {path} is not a directory")
    if not os.access(real, os.R_OK | os.X_OK):
        raise Refused(f"the root directory {path} cannot be entered")
    return real


def root_of(options: DaemonOptions) -> Path | None:
    """Give the real path of the root directory, None if there is none.

    Raises UsageError if it is no directory, Refused if no session could start there.
    """
    return None if options.root_dir is None else _real_directory(options.root_dir)


def default_dir_of(options: DaemonOptions) -> Path:
    """Give the directory of sessions for which the client names none. Raises as `root_of`."""
    try:
        return root_of(options) or Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current directory is gone", hint="start in another one, or name a --root-dir") from None


def data_dir_of(options: DaemonOptions, environ: Mapping[str, str], warn: Callable[[str], None]) -> DataDir:
    """Open the data directory for these options; `warn` gets what was put right. Raises P2PClaudeError."""
    path = DataDir.default_path(environ) if options.data_dir is None else Path(options.data_dir)
    return DataDir(path, warn=warn)


def _pairing(options: DaemonOptions, identity: Identity) -> Pairing:
    metadata: dict[str, Any] = {
        "host": socket.gethostname(),
        "platform": sys.platform,
        "createdAt": identity.created_at,
    }
    if options.root_dir is not None:
        metadata["rootDir"] = str(_real_directory(options.root_dir))
    if options.private:
        port = PRIVATE_PORT if options.port is None else options.port
        metadata["bootstrap"] = [f"{_private_host(options)}:{port}"]
    elif options.bootstrap:
        metadata["bootstrap"] = list(options.bootstrap)
    if options.relay is not None:
        metadata["relay"] = options.relay.hex()
    return Pairing(identity.public_key, identity.data_key, metadata)


def _private_host(options: DaemonOptions) -> str:
    """Give the address at which a private network's bootstrap node is reached."""
    if options.host is not None and options.host != "0.0.0.0":
        return options.host
    import ifaddr  # here, because only a private network asks

    addresses = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)]
    return next((address for address in addresses if not address.startswith("127.")), "127.0.0.1")


def new_dht(options: DaemonOptions) -> "HyperDHT":
    """Make the node for these options, not yet started."""
    from p2pclaude.hyperdht import HyperDHT  # here, because --print-url needs no network

    if options.private:
        port = PRIVATE_PORT if options.port is None else options.port
        return HyperDHT.bootstrapper(port, _private_host(options), bind=options.host or "0.0.0.0")
    place: dict[str, Any] = {"host": options.host, "port": options.port, "bootstrap": options.bootstrap or None}
    # whoever names a port has let it through a firewall: another one would be of no use
    return HyperDHT(any_port=not options.port, **{name: value for name, value in place.items() if value is not None})


async def start_dht(dht: DHT, options: DaemonOptions) -> None:
    """Bind the node's sockets. Raises Unavailable."""
    try:
        await dht.start()
    except OSError as error:
        port = PRIVATE_PORT if options.port is None and options.private else options.port
        raise cannot_bind(error, options.host, port) from error


def _key_pair(identity: Identity) -> "KeyPair":
    from p2pclaude.hyperdht import KeyPair

    return KeyPair(identity.public_key, identity.secret_key)


def _only_client_key(identity: Identity) -> Allow:
    from p2pclaude.hyperdht import KeyPair

    expected = KeyPair.from_seed(client_seed(identity.data_key)).public_key
    return lambda public_key, _: hmac.compare_digest(public_key, expected)


async def _within(seconds: float, awaitable: Awaitable[Any]) -> None:
    async with asyncio.timeout(seconds):
        await awaitable
