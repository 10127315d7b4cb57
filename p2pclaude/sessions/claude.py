"""Claude Code as a child process: where it is, how it is started, its stream-json, how it is ended.

`session` stands above and journals what `ClaudeProcess` gives it, a line at a time; below is the only subprocess of the
daemon. The CLI's behaviour was measured with `@anthropic-ai/claude-code` 2.1.197; most of it is not documented.
"""

import asyncio
import glob
import os
import shutil
import signal
import uuid
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from p2pclaude.errors import Unavailable, WireError
from p2pclaude.host.processes import Mark, Process, descendants_of, end_leftovers, family_of
from p2pclaude.protocol.permissions import interrupt_request
from p2pclaude.protocol.wire import LineBuffer, LineTooLong, dump_json, load_json

PERMISSION_MODES = ("default", "acceptEdits", "bypassPermissions", "plan")
"""What `--permission-mode` may be."""
MAX_LINE = 64 * 1024 * 1024
"""Longest line, in bytes, that Claude may print; a longer one ends it. Lines of 3 MB were seen."""
STOP_STEPS: tuple[tuple[signal.Signals | None, float], ...] = (
    (None, 2.0),  # interrupted and stdin closed: 0.1 s, or 1.6 s when the running tool ignores its own end
    (signal.SIGINT, 1.0),
    (signal.SIGTERM, 0.5),
    (signal.SIGKILL, 0.5),
)
"""How a process is ended: a signal and the seconds to wait for its exit, in turn; 4 s at the worst."""

_USUAL_PLACES = (
    "/usr/local/bin",
    "/opt/homebrew/bin",
    "~/.npm-global/bin",
    "~/node_modules/.bin",
    "~/.claude/local",
    "~/.local/bin",
)
_INSTALL_HINT = "install it with `npm install -g @anthropic-ai/claude-code`, or name it with --claude"
_HIGH_WATER = 1024 * 1024
_CHUNK = 1024 * 1024
_HIGH_WATER_AT_THE_END = 64 * 1024 * 1024  # claude drops what is not read within 5 s once its stdin is closed
_LAST_WORDS_BYTES = 4096
_LINGER_SECONDS = 1.0
_NOT_FOR_CHILDREN = frozenset({"CLAUDECODE", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"})
_LONGEST_ESCAPE = 6  # bytes of JSON that a character may take
_SPARE_DEPTH = 400  # of nesting: for the envelope, the page, and a reader that stands deeper in its own calls
_MESSAGE_NAMESPACE = uuid.UUID("8f1d2c0e-5f0b-4b5e-9a57-0d6f3f1c7f52")


class ClaudeGone(Unavailable):
    """The process has ended, or no longer reads."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: `claude_id` is the UUID that Claude knows the session by; with `resume` it has one already.

    With `ask` Claude asks for permission over its stdin and stdout instead of denying by itself.
    """

    executable: Path
    directory: Path
    permission_mode: str
    claude_id: str
    model: str | None = None
    resume: bool = False
    ask: bool = False

    def command(self) -> list[str]:
        """Give the command line; values from users stand in the equals form, so that none is read as a flag."""
        words = [str(self.executable), "--output-format", "stream-json", "--input-format", "stream-json"]
        words += ["--verbose", "--permission-mode", self.permission_mode]
        words.append(f"--resume={self.claude_id}" if self.resume else f"--session-id={self.claude_id}")
        words.append("--replay-user-messages")  # shows which turn took a message in, see wire.Results
        if self.model is not None:
            words.append(f"--model={self.model}")
        if self.ask:
            words += ["--permission-prompt-tool", "stdio"]
        return words


def find_claude(explicit: str | None, environ: Mapping[str, str]) -> Path:
    """Find the `claude` program: the one named, else on PATH, else in the usual places.

    Raises Unavailable, with a hint, when there is none.
    """
    path = environ.get("PATH", os.defpath)
    if explicit is not None:
        if found := shutil.which(explicit, path=path):
            return Path(found).absolute()
        raise Unavailable(f"{explicit} is not a program that can be run", hint="check --claude")
    if found := shutil.which("claude", path=path):
        return Path(found).absolute()
    home = environ.get("HOME")
    for place in _USUAL_PLACES:
        if place.startswith("~") and not home:
            continue
        candidate = Path(place.replace("~", home or "", 1)) / "claude"
        if os.access(candidate, os.X_OK) and candidate.is_file():  # in this order: is_file may raise
            return candidate
    raise Unavailable("claude was not found on PATH or in the usual places", hint=_INSTALL_HINT)


def child_environment(environ: Mapping[str, str], mark: Mark | None = None) -> dict[str, str]:
    """Give the environment for the child: ours, marked as the daemon's and the session's.

    The mark of a surrounding Claude and what a service manager said to the daemon alone are left out.
    """
    child = {name: value for name, value in environ.items() if name not in _NOT_FOR_CHILDREN}
    child["CLAUDE_CODE_ENTRYPOINT"] = "p2p-daemon"
    return child | ({} if mark is None else mark.variables())


def has_conversation(claude_id: str, environ: Mapping[str, str]) -> bool | None:
    """Tell whether Claude remembers anything under an id; None if it cannot be told.

    It starts with `--session-id` only when it does not, and with `--resume` only when it does; when exactly it begins
    to remember (some way into the first turn) is not documented, so its transcripts are looked at.
    """
    return any(_transcripts(claude_id, environ)) if _projects(environ).is_dir() else None


def knows_message(claude_id: str, message_uuid: str, environ: Mapping[str, str]) -> bool:
    """Tell whether a message stands in the transcript of a conversation: then Claude has had it."""
    wanted = message_uuid.encode()
    return any(_contains(path, wanted) for path in _transcripts(claude_id, environ))


def _transcripts(claude_id: str, environ: Mapping[str, str]) -> Iterator[Path]:
    return _projects(environ).glob(f"*/{glob.escape(claude_id)}.jsonl")


def _projects(environ: Mapping[str, str]) -> Path:
    home = environ.get("CLAUDE_CONFIG_DIR") or Path(environ.get("HOME", "/")) / ".claude"
    return Path(home) / "projects"


def _contains(path: Path, wanted: bytes) -> bool:
    """Search a file that may be large, in pieces that overlap."""
    try:
        with path.open("rb") as file:
            before = b""
            while chunk := file.read(_CHUNK):
                if wanted in before + chunk:
                    return True
                before = chunk[-len(wanted) :]
    except FileNotFoundError:
        pass
    return False


def user_message(text: str, message_id: str, priority: str | None = None) -> dict[str, Any]:
    """Give the stream-json object for a message of the user; with priority "now" it ends a running turn.

    Claude ignores a `uuid` that it has seen, so the same message id always gives the same one, and no other id does.
    """
    message = {"type": "user", "message": {"role": "user", "content": text}, "uuid": _uuid_of(message_id)}
    return message if priority is None else message | {"priority": priority}


def _uuid_of(message_id: str) -> str:
    try:
        if str(uuid.UUID(message_id)) == message_id:  # there are other spellings, which are other ids
            return message_id
    except ValueError:
        pass
    return str(uuid.uuid5(_MESSAGE_NAMESPACE, message_id.encode("utf-8", "replace").decode()))


def decode_line(line: bytes) -> tuple[bytes, dict[str, Any]]:
    """Read a line of Claude's stdout; give the JSON to keep, unchanged where it is an object, and the object.

    Anything else (a stray print, half a line) is kept as `{"type": "unparsed", "text": …}`, and so is an object nested
    so deeply that a reader could not open the page that holds it. The text is cut where the JSON would be longer than
    MAX_LINE, which a reader takes at most. Never raises.
    """
    try:
        value = load_json(line)
        if isinstance(value, dict):
            _check_depth(line)
            return line.strip(), value
    except WireError:
        pass
    text = line.decode("utf-8", "replace")
    data = dump_json({"type": "unparsed", "text": text})
    if len(data) > MAX_LINE:
        text = text[: MAX_LINE // _LONGEST_ESCAPE]
        data = dump_json({"type": "unparsed", "text": text})
    return data, {"type": "unparsed", "text": text}


def _check_depth(line: bytes) -> None:
    """Raise WireError unless a line could be read `_SPARE_DEPTH` levels further down."""
    if line.count(b"[") + line.count(b"{") > _SPARE_DEPTH:
        load_json(b"[" * _SPARE_DEPTH + line + b"]" * _SPARE_DEPTH)


def describe_exit(status: int | None) -> str:
    """Say how a process ended; a negative status is a signal's."""
    if status is not None and status < 0:
        return f"it was ended by signal {-status}"
    return f"it exited with status {status}"


class ClaudeProcess:
    """One running `claude`. Its stdout is drained as long as someone iterates over the process; stderr always.

    However it ends, everything that carries its mark is ended after it: nothing that it started goes on.
    """

    def __init__(self, transport: asyncio.SubprocessTransport, protocol: "_Pipes", mark: Mark | None) -> None:
        self._transport = transport
        self._pipes = protocol
        self._mark = mark
        self._family: set[Process] = set()  # what it was seen to have started
        self._cleaning = asyncio.create_task(self._clean_up())
        self.pid = transport.get_pid()

    @classmethod
    async def start(
        cls,
        launch: Launch,
        environ: Mapping[str, str] | None = None,
        *,
        mark: Mark | None = None,
        keep: Collection[int] = (),
    ) -> Self:
        """Start the program in its directory, in a session of its own. Raises Unavailable if it cannot be run.

        `mark` is what it and all that it starts are known by; it inherits the descriptors in `keep`.
        """
        environment = child_environment(os.environ if environ is None else environ, mark)
        try:
            transport, protocol = await asyncio.get_running_loop().subprocess_exec(
                _Pipes, *launch.command(), cwd=launch.directory, env=environment, start_new_session=True, pass_fds=keep
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise Unavailable(f"{launch.executable} could not be started: {reason}") from error
        return cls(transport, protocol, mark)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Give each line of stdout as soon as it is complete, until stdout ends."""
        while (line := await self._pipes.next_line()) is not None:
            yield line

    def write(self, value: Mapping[str, Any]) -> None:
        """Hand one object to stdin. Raises ClaudeGone if the process does not read any more."""
        stdin = self._stdin()
        if stdin is None or stdin.is_closing() or self._pipes.exited.done():
            raise ClaudeGone("claude has ended")
        stdin.write(dump_json(value) + b"\n")

    @property
    def has_exited(self) -> bool:
        """Tell whether the process is gone."""
        return self._pipes.exited.done()

    async def finish(self) -> int:
        """Wait for the exit, end what is left, close the pipes and give the status; a negative one is a signal's.

        What nobody has read by then is dropped.
        """
        status = await asyncio.shield(self._pipes.exited)
        await asyncio.shield(self._cleaning)
        await asyncio.wait([self._pipes.closed], timeout=_LINGER_SECONDS)
        self._transport.close()
        self._pipes.drop()
        return status

    async def settle(self, timeout: float) -> bool:
        """Wait until it printed a line, exited, or `timeout` seconds passed; tell whether it still runs."""
        signs: list[asyncio.Future[Any]] = [self._pipes.exited, self._pipes.printed]
        await asyncio.wait(signs, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self.has_exited:
            # What it said stands in pipes that may not have been read yet.
            await asyncio.wait([self._pipes.closed], timeout=timeout)
        return not self.has_exited

    def last_words(self) -> str:
        """Give the end of what it wrote to stderr, at most 4 KiB."""
        return bytes(self._pipes.stderr).decode("utf-8", "replace").strip()

    async def stop(self, *, in_turn: bool = False) -> int | None:
        """End the process as `STOP_STEPS` says, then what it left; give its status, None if SIGKILL did not end it.

        `in_turn` tells that there is a turn to interrupt, so that its result comes. Somebody must go on iterating
        meanwhile, or a full pipe holds the process up.
        """
        await self._look_around()
        self._pipes.high_water = _HIGH_WATER_AT_THE_END
        self._say_goodbye(in_turn)
        for step, seconds in STOP_STEPS:
            if step is not None:
                self._signal(step)
            done, _ = await asyncio.wait([self._pipes.exited], timeout=seconds)
            if done:
                await asyncio.shield(self._cleaning)
                return self._pipes.exited.result()
            await self._look_around()
        await self._end_leftovers()
        return None

    def _say_goodbye(self, in_turn: bool) -> None:
        stdin = self._stdin()
        if in_turn:
            try:
                self.write(interrupt_request(str(uuid.uuid4())))
            except ClaudeGone:
                return
        if stdin is not None:
            stdin.close()

    async def has_background(self) -> bool:
        """Tell whether anything runs that its tools have started.

        Each of these has a process group of its own. What claude itself keeps running, an MCP server as a rule, shares
        claude's group and its end.
        """
        running = await (descendants_of(self.pid) if self._mark is None else family_of(self._mark))
        return any(_group_of(process) not in (None, self.pid) for process in running)

    async def _look_around(self) -> None:
        """Note what runs below it: once it is gone only the mark tells, and not every process keeps that."""
        if self._mark is not None and not self.has_exited:
            with suppress(OSError):  # no descriptor may be left to look with
                self._family.update(await descendants_of(self.pid))

    async def _clean_up(self) -> None:
        await asyncio.shield(self._pipes.exited)
        await self._end_leftovers()

    async def _end_leftovers(self) -> None:
        if self._mark is not None:
            with suppress(OSError):  # they go with the daemon then; that claude has ended must be known in any case
                await end_leftovers(self._mark, self._family)

    def kill(self) -> None:
        """End it at once, with whatever it started in its own process group."""
        self._pipes.kill()

    def _signal(self, number: signal.Signals) -> None:
        # Only the last step goes to the whole group: on SIGINT claude ends its commands by itself.
        if number == signal.SIGKILL:
            self._pipes.kill()
        elif not self.has_exited:
            try:
                self._transport.send_signal(number)
            except (ProcessLookupError, PermissionError):
                pass

    def _stdin(self) -> asyncio.WriteTransport | None:
        return cast("asyncio.WriteTransport | None", self._transport.get_pipe_transport(0))


def _group_of(process: Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


class _Pipes(asyncio.SubprocessProtocol):
    """The child's pipes: lines of stdout in a bounded queue, the end of stderr, and the exit.

    Not asyncio's own streams: their `wait` may hang on a pipe that a grandchild holds open.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = loop.create_future()
        self.printed: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()  # both stdout and stderr ended
        self.stderr = bytearray()
        self.high_water = _HIGH_WATER
        self._buffer = LineBuffer(MAX_LINE)
        self._lines: deque[bytes] = deque()
        self._queued = 0
        self._news = asyncio.Event()
        self._open = {1, 2}
        self._paused = False
        self._overflown = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self.stderr += data
            del self.stderr[:-_LAST_WORDS_BYTES]
            return
        if self._overflown:
            return
        try:
            self._queue(self._buffer.feed(data))
        except LineTooLong as error:
            self._overflown = True
            self._queue(error.lines)
            self.stderr += f"\n{error}".encode()
            self.kill()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1 and self._buffer.pending and not self._overflown:
            self._queue(self._buffer.feed(b"\n"))
        self._open.discard(fd)
        self._news.set()
        if not self._open and not self.closed.done():
            self.closed.set_result(None)

    def process_exited(self) -> None:
        status = self._transport.get_returncode()
        self.exited.set_result(-signal.SIGKILL if status is None else status)
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._abandon)

    async def next_line(self) -> bytes | None:
        """Give the next line, or None when stdout has ended and nothing is left."""
        while not self._lines:
            if 1 not in self._open:
                return None
            self._news.clear()
            await self._news.wait()
        line = self._lines.popleft()
        self._queued -= len(line)
        if self._paused and self._queued < self.high_water:
            self._pause(False)
        return line

    def kill(self) -> None:
        """End the process and its group, unless it is gone."""
        if not self.exited.done():
            try:
                os.killpg(self._transport.get_pid(), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass

    def drop(self) -> None:
        """Forget what nobody has read."""
        self._lines.clear()
        self._buffer.clear()
        self._queued, self._paused = 0, False

    def _queue(self, lines: list[bytes]) -> None:
        lines = [line for line in lines if line.strip()]
        self._lines.extend(lines)
        self._queued += sum(map(len, lines))
        if lines:
            self._news.set()
            if not self.printed.done():
                self.printed.set_result(None)
        if self._queued >= self.high_water and not self._paused:
            self._pause(True)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        stdout = cast("asyncio.ReadTransport | None", self._transport.get_pipe_transport(1))
        if stdout is not None and 1 in self._open:
            (stdout.pause_reading if paused else stdout.resume_reading)()

    def _abandon(self) -> None:
        # A command that claude left behind may hold its pipes for ever; what claude printed is read by now,
        # unless the queue is full, and then it is looked at again.
        if self._paused:
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._abandon)
            return
        for fd in (1, 2):
            pipe = self._transport.get_pipe_transport(fd)
            if pipe is not None:
                pipe.close()
