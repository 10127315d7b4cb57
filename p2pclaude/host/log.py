"""The log of daemon and node: one JSON object a line on stdout, made for `jq` and for a service manager's journal.

    {"time": "2026-01-02T03:04:05.678Z", "level": "info", "event": "session-spawned", "session": "…", …}

Event names are stable and listed in `Event` (the daemon's) and `NodeEvent`. Values are text, numbers, booleans and
lists of them: never a pairing URL, a message, Claude's output, or a key other than a relay's public one. When claude
dies, the first line of what it said on stderr is given. What libraries log by way of `logging` becomes events, too.
Who reads the log may stop reading: nothing waits for that, some of the log is kept meanwhile and the rest is counted.
"""

import asyncio
import json
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO


class Event(StrEnum):
    """Every event that the daemon logs. The text after each says what its fields are."""

    STARTED = "daemon-started"
    """The daemon serves: version, pid, public_key (first 8 digits), data_dir, root_dir, network, port, claude."""
    STOPPING = "daemon-stopping"
    """A signal came: signal."""
    SIGNAL_IGNORED = "signal-ignored"
    """A signal came that changes nothing: signal, message."""
    STOPPED = "daemon-stopped"
    """The ordered shutdown is over: seconds."""
    WARNING = "warning"
    """Something was put right or needs a person: message, hint, session (if it is about one)."""
    CONNECTED = "connection-opened"
    """Somebody connected: connection (a number), peer (first 8 digits of the key), address, how."""
    PROVEN = "connection-proven"
    """The connection's first request opened with the data key: connection."""
    DISCONNECTED = "connection-closed"
    """A connection is over: connection, reason, requests."""
    REFUSED = "connection-refused"
    """A connection was dropped for a limit: connection, reason."""
    REQUEST = "request"
    """Debug: a request was answered: connection, method, seconds, ok."""
    BAD_LINE = "bad-line"
    """A line was no valid request: connection, reason."""
    SPAWNED = "session-spawned"
    """Claude runs for a new session: session, pid, directory, permission_mode, model."""
    RESUMED = "session-resumed"
    """Claude runs again for a session: session, pid, directory, permission_mode, model."""
    SPAWN_FAILED = "session-spawn-failed"
    """Claude could not be started: session, error."""
    MESSAGE = "message-accepted"
    """A message is in the journal: session, seq."""
    TURN = "turn-started"
    """A message was handed to Claude: session, seq."""
    TURN_ENDED = "turn-ended"
    """Claude gave a result: session, seq, is_error."""
    TURN_CUT = "turn-cut"
    """A turn got no result: session, seq, again (the message is handed again, Claude has not begun with it)."""
    JOURNAL_CUT = "journal-cut"
    """The end of a journal was torn: session, bytes (cut off)."""
    INTERRUPTED = "turn-interrupted"
    """Claude was told to end its turn: session."""
    PERMISSION_ASKED = "permission-asked"
    """Claude asks whether it may use a tool: session, request, tool."""
    PERMISSION_ANSWERED = "permission-answered"
    """A request is settled: session, request, behavior (allow, deny or cancelled), by (timeout, if so)."""
    CONTROL_REFUSED = "control-refused"
    """Claude asked something that is not passed on: session, reason."""
    PAUSED = "session-paused"
    """Output waits for room on the disk: session, error."""
    UNPAUSED = "session-continued"
    """Output is written again: session."""
    REMOVED = "session-removed"
    """An ended session was deleted, as --retain says: session."""
    ENDED = "session-ended"
    """Claude is gone: session, state, exit_status, error."""
    ANNOUNCED = "presence-refreshed"
    """Debug: the announcement was refreshed: reason."""
    ADDRESSES = "addresses-changed"
    """The host's addresses changed: addresses."""
    RECORD_STORED = "record-stored"
    """Debug: the session record is in the DHT: seq, sessions, omitted."""
    RECORD_FAILED = "record-failed"
    """The session record could not be stored: error."""
    LIBRARY = "library-note"
    """Debug: what a library says: where, message."""
    ERROR = "internal-error"
    """A defect: where, error, message, trace (places in the code). Please report it."""


class NodeEvent(StrEnum):
    """Every event that `p2pclaude-node` logs. The text after each says what its fields are."""

    STARTED = "node-started"
    """The node is bound: version, pid, network (own, joined or public), address, relay_key (64 digits)."""
    JOINED = "network-joined"
    """The node has looked around in its network, and knows somebody if it joined one: seconds, nodes (known ones)."""
    ANNOUNCED = "relay-announced"
    """The relay can be found by its key: seconds."""
    STATUS = "node-status"
    """Debug: once a minute: nodes, clients, links, bytes (relayed so far)."""
    STOPPING = "node-stopping"
    """A signal came: signal."""
    SIGNAL_IGNORED = "signal-ignored"
    """A signal came that changes nothing: signal, message."""
    STOPPED = "node-stopped"
    """The ordered shutdown is over: seconds."""
    WARNING = "warning"
    """Something was put right or needs a person: message."""
    CONNECTED = "client-connected"
    """Somebody connected to the relay: client (a number), peer (first 8 digits of the key), address."""
    GONE = "client-gone"
    """A client's connection is over: client."""
    REFUSED = "client-refused"
    """A connection was dropped, there are too many: address."""
    LINKED = "link-opened"
    """Two clients are linked: link (a number), initiator, responder (their numbers)."""
    UNLINKED = "link-closed"
    """A link is over: link, reason (client, bytes, seconds or closed), bytes, seconds."""
    LINK_REFUSED = "link-refused"
    """A client asked for more links than it may have, or than there are; said once for each: client."""
    LIBRARY = "library-note"
    """Debug: what a library says: where, message."""
    ERROR = "internal-error"
    """A defect: where, error, message, trace (places in the code). Please report it."""


_DEBUG_EVENTS = frozenset({Event.REQUEST, Event.ANNOUNCED, Event.RECORD_STORED, Event.LIBRARY, NodeEvent.STATUS})
_ERROR_EVENTS = frozenset({Event.ERROR, Event.SPAWN_FAILED, Event.RECORD_FAILED, Event.PAUSED})
_WARNING_EVENTS = frozenset(
    {
        Event.WARNING,
        Event.REFUSED,
        Event.BAD_LINE,
        Event.TURN_CUT,
        Event.JOURNAL_CUT,
        Event.CONTROL_REFUSED,
        NodeEvent.REFUSED,
        NodeEvent.LINK_REFUSED,
    }
)

MAX_KEPT_BYTES = 256 * 1024
"""Of the log while nobody reads it, or the disk is full; what comes then is lost, and counted."""
AGAIN_SECONDS = 0.1
"""Pause between attempts to write what is kept."""
FINISH_SECONDS = 1.0
"""How long the end of the program waits for a reader of what is kept."""

_PLACES = 12  # of a traceback, the innermost

Field = str | int | float | bool | None | list[str]


class Log:
    """Writes events to a stream, each line at once.

    A stream that is closed, or whose reader is gone, ends the log and nothing else. One that takes nothing, because
    nobody reads it or the disk is full, costs lines only: what is kept of them follows, with the number of the others.
    """

    def __init__(self, stream: TextIO | None = None, *, debug: bool = False) -> None:
        self._stream: TextIO | None = sys.stdout if stream is None else stream
        self._is_file = _has_descriptor(self._stream)
        self._terminal = None if self._stream is None else _open_terminal(self._stream)
        self._kept = bytearray()  # whole lines, but for the first, whose beginning may be written
        self._lost = 0
        self._timer: asyncio.TimerHandle | None = None
        self.debug = debug
        """Whether debug events are logged."""

    def __call__(self, event: Event | NodeEvent, **fields: Field) -> None:
        """Log an event with its fields; fields that are None are left out. Never raises for the stream's sake."""
        if self._stream is None or (_level(event) == "debug" and not self.debug):
            return
        line = _line(event, fields)
        self._write()  # what came before may have made room
        self._keep(line)
        self._write()

    def finish(self) -> None:
        """Write what is kept, at the end of the program: waits for a reader, but not for long."""
        deadline = time.monotonic() + FINISH_SECONDS
        before = -1  # a full disk is not waited for
        while self._kept and len(self._kept) != before and time.monotonic() < deadline:
            before = len(self._kept)
            self._write(deadline)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _keep(self, line: bytes) -> None:
        """Put a line behind the others, and before it how many are lost there."""
        text = f"{self._lost} lines of the log are lost: nobody read it, or the disk was full"
        note = _line(Event.WARNING, {"message": text}) if self._lost else b""
        if len(self._kept) + len(note) + len(line) > MAX_KEPT_BYTES:
            self._lost += bool(line)
        else:
            self._kept += note + line
            self._lost = 0

    def _write(self, deadline: float = 0.0) -> None:
        """Write what is kept as far as that goes without waiting, or until then."""
        try:
            while self._kept and self._stream is not None:
                if not (done := self._write_some(self._stream, deadline)):
                    self._write_later()
                    return
                del self._kept[:done]
                if not self._kept and self._lost:
                    self._keep(b"")
        except (BrokenPipeError, ValueError):  # ValueError: the stream object itself is closed
            self._stream = None
            self._kept.clear()
        except OSError:
            pass  # the next line tries again

    def _write_some(self, stream: TextIO, deadline: float) -> int:
        if not self._is_file:
            stream.write(self._kept.decode())
            stream.flush()
            return len(self._kept)
        descriptor = stream.fileno() if self._terminal is None else self._terminal
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
            return 0
        # Where there is room at all so much does not wait; whole lines, as others may write there too.
        end = self._kept.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        try:
            return os.write(descriptor, self._kept[:end])
        except BlockingIOError:
            return 0

    def _write_later(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # the next line takes it along
            return
        if self._timer is None:
            self._timer = loop.call_later(AGAIN_SECONDS, self._write_again)

    def _write_again(self) -> None:
        self._timer = None
        self._write()


def _has_descriptor(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError):
        return False


def _open_terminal(stream: TextIO) -> int | None:
    """Open the terminal that a stream is, so that no write waits: there is none that surely does not, as with pipes.

    The stream's own description is that of other programs too, the shell among them, and stays as it is.
    """
    try:
        path = os.ttyname(stream.fileno())
        return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None


def _line(event: Event | NodeEvent, fields: Mapping[str, Field]) -> bytes:
    line: dict[str, Field] = {"time": _now(), "level": _level(event), "event": event.value}
    line |= {name: value for name, value in fields.items() if value is not None}
    return json.dumps(line).encode() + b"\n"


class _Records(logging.Handler):
    """Turns records of `logging` into events. An exception's text is not given: it may quote what nobody shall see."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        where, message = record.name, first_line(_message(record))
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            name = None if error is None else type(error).__name__
            self._log(Event.ERROR, where=where, error=name, message=message, trace=_places(error))
        elif record.levelno >= logging.WARNING:
            self._log(Event.WARNING, message=f"{where}: {message}")
        else:
            self._log(Event.LIBRARY, where=where, message=message)


@contextmanager
def with_libraries(log: Log) -> Iterator[None]:
    """Log what libraries say, asyncio of tasks that failed included; with `log.debug` also what ours says in detail."""
    handler, root, own = _Records(log), logging.getLogger(), logging.getLogger("p2pclaude")
    level = own.level
    root.addHandler(handler)
    if log.debug:
        own.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(level)


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # it does not fit its arguments: whoever logs shall not fail for that
        return str(record.msg)
    # asyncio names a callback with its arguments, which may be anything: output of Claude, a packet, a key.
    return message.partition("(")[0] if message.startswith("Exception in callback ") else message


def _places(error: BaseException | None) -> list[str] | None:
    if error is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)[-_PLACES:]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]


def wants_debug(environ: Mapping[str, str]) -> bool:
    """Tell whether DEBUG in the environment asks for debug events (set, and neither empty nor 0)."""
    return environ.get("DEBUG", "") not in ("", "0")


def first_line(text: str | None, limit: int = 200) -> str | None:
    """Give the beginning of an error's text; None stays None."""
    return text if not text else text.strip().split("\n", 1)[0][:limit]


def short(key: bytes) -> str:
    """Give the first 8 hexadecimal digits of a public key: enough to tell peers apart."""
    return key[:4].hex()


def _level(event: Event | NodeEvent) -> str:
    if event in _DEBUG_EVENTS:
        return "debug"
    if event in _ERROR_EVENTS:
        return "error"
    return "warning" if event in _WARNING_EVENTS else "info"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
