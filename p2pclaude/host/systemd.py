"""What the daemon tells its service manager, as systemd's sd_notify(3): ready, status, stopping, still alive.

    NOTIFY_SOCKET   the datagram socket of the manager, a path or `@name` in the abstract namespace (Linux); of another
                    kind (`vsock:` in a virtual machine) none is spoken to, which `problem` says
    WATCHDOG_USEC   the manager restarts the daemon when it hears nothing for so long; WATCHDOG_PID says whom it means

Without these nothing happens, and nothing here ever fails for the manager's sake.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping

PINGS = 3
"""Signs of life in the time after which a silent daemon is taken for dead."""


class Notifier:
    """Talks to the service manager that the environment names, if there is one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _socket_address(environ.get("NOTIFY_SOCKET", ""))
        self.problem: str | None = None
        """What keeps the daemon from being heard, for its log."""
        if self._address is None and environ.get("NOTIFY_SOCKET"):
            self.problem = "NOTIFY_SOCKET is neither a path nor @name, so the service manager hears nothing"
        self.watchdog_seconds = _watchdog_seconds(environ)
        """After so long a silence the manager takes the daemon for dead; None if it does not watch."""

    def send(self, *assignments: str) -> None:
        """Send assignments such as `READY=1`; no control character goes with them, a newline would begin another."""
        if self._address is None:
            return
        message = "\n".join("".join(c if c.isprintable() else " " for c in line) for line in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
                manager.setblocking(False)
                manager.sendto(message.encode("utf-8", "replace"), self._address)
        except OSError:
            pass  # a manager that is gone or busy; the next word may reach it

    async def keep_alive(self, is_alive: Callable[[], bool]) -> None:
        """Give signs of life as long as `is_alive` says so, until cancelled; returns at once if nobody watches."""
        if self._address is None or self.watchdog_seconds is None:
            return
        while True:
            if is_alive():
                self.send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_seconds / PINGS)


def _socket_address(name: str) -> bytes | None:
    if len(name) < 2 or name[0] not in "/@":
        return None
    address = os.fsencode(name)
    return b"\0" + address[1:] if name[0] == "@" else address


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    usable = microseconds.isascii() and microseconds.isdigit() and len(microseconds) <= 15 and int(microseconds)
    return int(microseconds) / 1e6 if usable else None
