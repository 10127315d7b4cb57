"""Words to the service manager: what systemd gets, when it gets none, and a daemon that hangs falls silent."""

import asyncio
import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.daemons import client_of, daemon
from kit.sessions import Place, eventually, prepare, run

from p2pclaude.host.systemd import Notifier


class Manager:
    """The receiving end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(30)
        self.address = address

    def hear(self) -> list[str]:
        """Wait for a datagram and give its lines."""
        return self.socket.recv(4096).decode().split("\n")

    def hear_until(self, line: str) -> list[str]:
        """Give every line up to one."""
        lines: list[str] = []
        while line not in lines:
            lines += self.hear()
        return lines

    def is_silent(self) -> bool:
        """Tell whether nothing waits."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(30)
        return False


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    """Give a manager that listens; its path is short, for the kernel takes 107 bytes, wherever the clone lies."""
    with tempfile.TemporaryDirectory(prefix="notify-", dir="/tmp") as directory:
        one = Manager(f"{directory}/socket" if request.param == "path" else f"@p2pclaude-test-{os.getpid()}")
        yield one
        one.socket.close()


def test_what_is_sent(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    notifier.send("READY=1", "STATUS=one\nMAINPID=1\0")
    assert manager.hear() == ["READY=1", "STATUS=one MAINPID=1 "]


NOBODY = ("", "/", "@", "vsock:2:1", "relative", "/nowhere/at/all", "@nobody-listens", "/" * 200)


@pytest.mark.parametrize("address", NOBODY)
def test_nobody_listens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.send("READY=1")
    is_wrong = address in ("/", "@", "vsock:2:1", "relative")
    assert (notifier.problem is not None) == is_wrong
    Notifier({}).send("READY=1")


def test_a_manager_that_does_not_read_holds_up_nothing(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    for _ in range(2000):
        notifier.send("STATUS=" + "x" * 1000)


def test_when_somebody_watches() -> None:
    def seconds(**environ: str) -> float | None:
        return Notifier(environ).watchdog_seconds

    assert seconds(WATCHDOG_USEC="3000000") == 3.0
    assert seconds(WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid())) == 3.0
    assert seconds(WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid() + 1)) is None
    for bad in ("", "0", "-5", "1e6", "\u0663", "9" * 400):
        assert seconds(WATCHDOG_USEC=bad) is None


def test_signs_of_life_stop_when_there_is_none(manager: Manager) -> None:
    async def main() -> None:
        alive = True
        notifier = Notifier({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "60000"})
        task = asyncio.create_task(notifier.keep_alive(lambda: alive))
        await asyncio.sleep(0.15)
        alive = False
        while not manager.is_silent():
            pass
        await asyncio.sleep(0.15)
        assert manager.is_silent()
        alive = True
        await asyncio.sleep(0.1)
        assert manager.hear() == ["WATCHDOG=1"]
        task.cancel()
        await Notifier({"NOTIFY_SOCKET": manager.address}).keep_alive(lambda: True)  # nobody watches

    run(main())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place with a fake claude."""
    return prepare(tmp_path, monkeypatch)


def test_the_daemons_life_as_the_manager_hears_it(place: Place, manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000"}
    with daemon(place, environ=environ) as process:
        heard = manager.hear_until("READY=1") + manager.hear_until("WATCHDOG=1")
        assert heard[1] == "STATUS=serving, 0 sessions running"

        async def spawn() -> None:
            async with client_of(place) as client:
                await client.call("spawn-session", {"sessionId": "s", "text": "x"})

        # All the while, or signs of life fill the socket and the status finds no room there.
        with ThreadPoolExecutor(1) as thread:
            hearing = thread.submit(manager.hear_until, "STATUS=serving, 1 session running")
            run(spawn())
            hearing.result()
        eventually(lambda: bool(place.told()))
        (told,) = [note for note in place.told() if "env" in note]
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(told["env"])
        process.send_signal(signal.SIGSTOP)  # it hangs
        while not manager.is_silent():
            pass
        process.send_signal(signal.SIGCONT)
        manager.hear_until("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        manager.hear_until("STOPPING=1")
        assert process.wait(30) == 0


def test_a_hangup_ends_nothing_and_is_logged(place: Place) -> None:
    with daemon(place) as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        while (line := json.loads(process.stdout.readline()))["event"] != "signal-ignored":
            pass
        assert (line["signal"], line["level"]) == ("SIGHUP", "info")

        async def ping() -> None:
            async with client_of(place) as client:
                await client.call("ping")

        run(ping())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
