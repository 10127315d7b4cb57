"""The daemon as a whole: what it needs to start, what it serves, how it ends; over a DHT in memory and as a process."""

import asyncio
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cli.harness import unread
from kit.daemons import client_of, daemon, start
from kit.fake_dht import Caller, FakeDHT
from kit.sessions import Place, prepare, run

from p2pclaude.daemon import presence as presence_module
from p2pclaude.daemon.daemon import PRIVATE_PORT, SHUTDOWN_SECONDS, WANTED_FILES, Daemon, DaemonOptions, pairing_url
from p2pclaude.errors import DataError, P2PClaudeError, TryAgain, Unavailable, UsageError
from p2pclaude.hyperdht import KeyPair
from p2pclaude.protocol.pairing import Pairing, parse_url
from p2pclaude.protocol.wire import unseal


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place with a fake claude that is the only one to be found."""
    monkeypatch.setattr(presence_module, "DEBOUNCE_SECONDS", 0.01)
    return prepare(tmp_path, monkeypatch)


class Terminal(io.StringIO):
    """A stderr that may be a terminal."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        """Tell."""
        return self._is_terminal


class Running:
    """A daemon over a DHT in memory, in a task of its own."""

    def __init__(self, place: Place, *, is_terminal: bool = False, **options: Any) -> None:
        self.place = place
        self.dht = FakeDHT()
        self.exits: list[int] = []
        self.terminal = Terminal(is_terminal=is_terminal)
        self.data_dir = place.path / "data"
        chosen = {"data_dir": str(self.data_dir), "root_dir": str(place.root), "claude": str(place.claude)}
        self.daemon = Daemon(
            DaemonOptions(**{**chosen, **options}),
            make_dht=lambda _: self.dht,
            environ=dict(os.environ),
            log=place.log,
            terminal=self.terminal,
            exit_now=self.exits.append,
        )
        self.task = asyncio.create_task(self.daemon.run())

    async def started(self) -> None:
        """Wait until it serves; raise what kept it from that."""
        waiting = asyncio.create_task(self.daemon.started.wait())
        await asyncio.wait([waiting, self.task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.task.done():
            await self.task

    @property
    def pairing(self) -> Pairing:
        """Give what the pairing URL holds."""
        return parse_url((self.data_dir / "pairing.url").read_text())

    def caller(self) -> Caller:
        """Connect a client."""
        return Caller(self.dht.connect(), self.pairing.data_key)

    async def stop(self) -> int:
        """End it in order and give its exit status."""
        self.daemon.stop()
        return await self.task


@asynccontextmanager
async def running(place: Place, **options: Any) -> AsyncIterator[Running]:
    one = Running(place, **options)
    try:
        await one.started()
        yield one
    finally:
        one.daemon.stop()
        await asyncio.wait([one.task])


def with_daemon(place: Place, work: Callable[[Running], Awaitable[None]], **options: Any) -> None:
    """Run a test's coroutine beside a daemon that serves."""

    async def main() -> None:
        async with running(place, **options) as one:
            await work(one)

    run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_message_in_and_an_answer_out(place: Place) -> None:
    async def work(one: Running) -> None:
        caller = one.caller()
        spawned = await caller.call("spawn-session", {"text": "hello", "sessionId": "s"})
        after, said = 0, []
        while "result" not in said:
            output = await caller.call("get-output", {"sessionId": "s", "after": after, "waitMs": 20_000})
            after = output["next"]
            said += [m["data"]["type"] for m in output["messages"] if m["type"] == "session-output"]
        assert [s["pid"] for s in await caller.call("list-sessions")] == [spawned["pid"]]
        assert await one.stop() == 0

    with_daemon(place, work)


def test_the_pairing_url_is_the_same_at_every_start_and_shown_to_terminals_only(place: Place) -> None:
    urls: list[str] = []
    for is_terminal in (True, False):
        shown: list[str] = []

        async def work(one: Running, shown: list[str] = shown) -> None:
            urls.append((one.data_dir / "pairing.url").read_text())
            shown.append(one.terminal.getvalue())

        with_daemon(place, work, is_terminal=is_terminal)
        assert shown == [urls[0] if is_terminal else ""]
    assert urls[0] == urls[1]
    logged = place.log.stream.getvalue()
    pairing = parse_url(urls[0])
    assert pairing.metadata["rootDir"] == str(place.root)
    assert urls[0].strip() not in logged
    assert "p2p-claude://" not in logged
    options = DaemonOptions(data_dir=str(place.path / "data"), root_dir=str(place.root))
    assert pairing_url(options) + "\n" == urls[0]


def test_a_relay_is_named_to_clients_and_in_the_url(place: Place) -> None:
    async def main() -> None:
        async with running(place, relay=b"\x0f" * 32) as daemon:
            assert daemon.dht.relay_through == b"\x0f" * 32
            assert daemon.pairing.relay == b"\x0f" * 32

    run(main())


def test_the_session_record_follows_the_sessions(place: Place) -> None:
    async def work(one: Running) -> None:
        key = one.pairing.data_key

        def stored() -> list[list[str]]:
            records = [unseal(key, value.decode()) for _, value in one.dht.records]
            return [[session["sessionId"] for session in record["sessions"]] for record in records]

        await until(lambda: stored() == [[]])
        caller = one.caller()
        await caller.call("spawn-session", {"sessionId": "s", "text": "x"})
        await until(lambda: stored()[1:] == [["s"]])
        await one.stop()
        assert stored()[2:] == [[]]  # nobody is left to be reached

    with_daemon(place, work)


def test_the_shutdown_keeps_its_order_and_leaves_sessions_dormant(place: Place) -> None:
    async def work(one: Running) -> None:
        caller = one.caller()
        spawned = await caller.call("spawn-session", {"sessionId": "s", "text": "HOLD:" + str(place.path / "never")})
        await until(lambda: bool(place.messages()))
        waiting = asyncio.create_task(caller.ask("get-output", {"sessionId": "s", "after": 99, "waitMs": 30_000}))
        assert await one.stop() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(spawned["pid"], 0)
        await caller.ended()
        await asyncio.wait([waiting])
        assert one.dht.events == ["start", "listen", "unannounce", "destroy"]
        order = [line["event"] for line in place.log.lines]
        assert order.index("session-ended") < order.index("connection-closed") < order.index("daemon-stopped")
        saved = json.loads((one.data_dir / "sessions" / "s" / "session.json").read_text())
        assert saved["state"] == "dormant"

    with_daemon(place, work)


def test_a_signal_stops_it_and_a_second_one_ends_it_at_once(place: Place) -> None:
    async def work(one: Running) -> None:
        one.dht.may_end.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: bool(place.log.events("daemon-stopping")))
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: bool(one.exits))
        assert one.exits == [130]
        one.dht.may_end.set()
        assert await one.task == 0

    with_daemon(place, work)


def test_a_network_that_does_not_let_go_is_left_anyway(place: Place) -> None:
    async def work(one: Running) -> None:
        one.dht.may_end.clear()
        assert await one.stop() == 0
        assert "took too long" in place.log.events("warning")[-1]["message"]

    with_daemon(place, work)


def test_a_stop_while_it_joins_the_network(place: Place) -> None:
    async def main() -> None:
        one = Running(place)
        one.dht.listen_forever = True
        await until(lambda: "listen" in one.dht.events)
        assert await one.stop() == 0
        assert one.dht.events[-1] == "destroy"

    run(main())


def test_what_keeps_it_from_starting(place: Place) -> None:
    async def fail(kind: type[P2PClaudeError], said: str, **options: Any) -> None:
        with pytest.raises(kind, match=said):
            async with running(place, **options):
                raise AssertionError("it started")

    async def main() -> None:
        await fail(UsageError, "permission-mode", permission_mode="yolo")
        await fail(UsageError, "takes no --bootstrap", private=True, bootstrap=("h:1",))
        await fail(UsageError, "HOST:PORT", bootstrap=("h",))
        await fail(UsageError, "above 0", refresh_interval=0)
        await fail(UsageError, "above 0", max_sessions=0)
        await fail(UsageError, "root directory", root_dir=str(place.path / "none"))
        await fail(Unavailable, "not a program", claude=str(place.path / "none"))
        async with running(place):
            await fail(TryAgain, "in use")
        (place.path / "data" / "encryption.key").write_text("{")
        await fail(DataError, "damaged")

    run(main())


def test_a_taken_port_is_said(place: Place) -> None:
    async def main() -> None:
        one = Running(place, private=True, host="127.0.0.1")
        one.dht.start_error = OSError(98, "Address already in use")
        with pytest.raises(Unavailable, match=f"port {PRIVATE_PORT} cannot be used: address already in use"):
            await one.started()
        assert one.dht.events == ["start", "destroy"]

    run(main())


@pytest.mark.parametrize("what", ["port", "disk"])
def test_a_daemon_that_cannot_start_runs_nothing_that_waits(place: Place, what: str) -> None:
    async def leave_a_message(one: Running) -> None:
        caller = one.caller()
        await caller.call("spawn-session", {"sessionId": "s", "text": "HOLD:" + str(place.path / "never")})
        await caller.call("send-message", {"sessionId": "s", "text": "waits"})

    async def fail() -> None:
        one = Running(place)

        async def start_slowly() -> None:
            await asyncio.sleep(0.5)
            if what == "port":
                raise OSError(98, "Address already in use")

        one.dht.start = start_slowly  # type: ignore[method-assign]
        if what == "disk":
            (one.data_dir / "pairing.url").unlink()
            (one.data_dir / "pairing.url").mkdir()
        with pytest.raises(P2PClaudeError):
            await one.started()
        assert one.daemon._table is not None
        one.daemon._table.kill()
        if what == "disk":
            (one.data_dir / "pairing.url").rmdir()

    async def wait_for_it(one: Running) -> None:
        caller, answer = one.caller(), {"state": "starting", "messages": []}
        while "echo: waits" not in str(answer["messages"]):
            answer = await caller.call("get-output", {"sessionId": "s", "after": 0})

    with_daemon(place, leave_a_message)
    run(fail())
    assert len([entry for entry in place.told() if "argv" in entry]) == 1
    with_daemon(place, wait_for_it)
    assert place.messages().count("waits") == 1


def test_without_claude_it_serves_and_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place.path / "none"))
    monkeypatch.setenv("HOME", str(place.path / "none"))
    monkeypatch.setattr("p2pclaude.sessions.claude._USUAL_PLACES", ())

    async def work(one: Running) -> None:
        assert "not found" in place.log.events("warning")[0]["message"]
        answer = await one.caller().call("spawn-session", {"text": "x"})
        assert answer["type"] == "error"
        assert "not found" in answer["errorMessage"]
        assert "npm install" in answer["errorMessage"]

    with_daemon(place, work, claude=None)


def test_a_private_network_stands_in_the_url(place: Place) -> None:
    options = DaemonOptions(data_dir=str(place.path / "d"), private=True, host="192.0.2.9")
    assert parse_url(pairing_url(options)).bootstrap == (f"192.0.2.9:{PRIVATE_PORT}",)
    anywhere = DaemonOptions(data_dir=str(place.path / "d"), private=True, port=1234)
    (entry,) = parse_url(pairing_url(anywhere)).bootstrap
    assert entry.endswith(":1234")
    assert not entry.startswith("0.0.0.0")
    assert parse_url(pairing_url(DaemonOptions(data_dir=str(place.path / "d")))).bootstrap == ()
    elsewhere = DaemonOptions(data_dir=str(place.path / "d"), bootstrap=("192.0.2.9:1",))
    assert parse_url(pairing_url(elsewhere)).bootstrap == ("192.0.2.9:1",)


# As a process, on the real library


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_process_ends_in_order_with_a_session_running(place: Place, number: signal.Signals) -> None:
    from p2pclaude.hyperdht import HyperDHT

    process = start(place)
    pairing = parse_url((place.path / "data" / "pairing.url").read_text())

    async def use() -> dict[str, Any]:
        async with HyperDHT(bootstrap=pairing.bootstrap, host="127.0.0.1") as dht:
            connection = await dht.connect(pairing.public_key)
            caller = Caller(connection, pairing.data_key)  # type: ignore[arg-type]
            spawned: dict[str, Any] = await caller.call("spawn-session", {"text": "HOLD:/never"})
            await asyncio.to_thread(process.send_signal, number)
            await caller.ended()
            return spawned

    try:
        spawned = asyncio.run(asyncio.wait_for(use(), 40))
        assert process.wait(3 * SHUTDOWN_SECONDS) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(spawned["pid"], 0)
        out, err = process.communicate()
        events = [json.loads(line)["event"] for line in out.splitlines()]
        assert events[-1] == "daemon-stopped"
        assert err == ""
    finally:
        process.kill()
        process.communicate()


def test_the_process_allows_itself_many_files(place: Place) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = f"""
import asyncio, resource
from p2pclaude.daemon import daemon
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
async def run(self):
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    return 0
daemon.Daemon.run = run
asyncio.run(daemon.run_daemon(daemon.DaemonOptions(data_dir={str(place.path / "data")!r})))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == [str(min(WANTED_FILES, hard) if hard > 0 else WANTED_FILES), str(hard)]


def test_the_process_survives_a_closed_log(place: Place) -> None:
    process = start(place)
    try:
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(3 * SHUTDOWN_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_the_process_serves_on_when_nobody_reads_its_log(place: Place) -> None:
    """The pipe that the log goes into is full: requests are answered, and the end is no later."""

    async def ask() -> None:
        async with client_of(place) as client:
            for _ in range(600):
                await client.call("ping")

    with daemon(place, debug=True) as process:
        asyncio.run(asyncio.wait_for(ask(), 100))
        assert process.stdout is not None
        assert unread(process.stdout) > 50_000
        process.send_signal(signal.SIGTERM)
        assert process.wait(SHUTDOWN_SECONDS) == 0


def test_key_pairs_of_the_data_directory_are_the_librarys(place: Place) -> None:
    async def work(one: Running) -> None:
        assert one.dht.server is not None
        key_pair = one.dht.server.key_pair
        assert isinstance(key_pair, KeyPair)
        assert key_pair == KeyPair.from_seed(key_pair.seed)
        assert key_pair.public_key == one.pairing.public_key

    with_daemon(place, work)
