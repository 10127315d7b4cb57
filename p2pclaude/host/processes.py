"""Processes that a session's claude leaves behind: found by a mark in their environment, ended, and reaped.

Claude runs its tools in sessions and process groups of their own, so that neither its own end nor a signal to its
group reaches them. `claude` marks each child with the session and the data directory it belongs to; what the child
starts inherits that. Whatever was started below a marked process belongs to it too, also with another environment, as
long as its parent lives or, on Linux, hands it over to the daemon (`become_subreaper`).

On Linux /proc is read, and a signal cannot hit a process that got the number of another one (pidfd). On macOS the
output of `ps` is; there the environment of programs that the system protects is not shown, and the parser alone is
tested.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, Self
from weakref import WeakKeyDictionary

SESSION_VARIABLE: Final = "P2PCLAUDE_SESSION"
"""In the environment of a session's processes: the session's id."""
DAEMON_VARIABLE: Final = "P2PCLAUDE_DAEMON"
"""In the environment of a session's processes: which data directory the session belongs to, as 16 digits."""
TERM_SECONDS: Final = 0.4
"""From SIGTERM to SIGKILL."""
END_SECONDS: Final = 1.2
"""After that it is given up: a process may start others faster than they are ended, or hang in the kernel."""
KILL_LOOKS: Final = 5
"""How often `kill_leftovers` looks, at the most."""
REAP_SECONDS: Final = 2.0
"""How long a zombie stays at least: one that asyncio started is its own to reap, and that takes no time."""

BEGINNING_LOOKS: Final = 40
"""How often a process that is just beginning with a program is looked at: its mark cannot be seen yet."""
BEGINNING_SECONDS: Final = 0.005
"""Between these looks."""

_POLL_SECONDS = 0.03
_thread = ThreadPoolExecutor(1, "processes")  # its own: a disk that hangs may hold all the others
_PF_KTHREAD = 0x00200000  # linux/sched.h
_PR_SET_CHILD_SUBREAPER = 36
_PS = ("ps", "-axwwE", "-o", "pid=,ppid=,stat=,lstart=,command=")
_LSTART_WORDS = 5  # Tue Nov 24 14:15:25 2026


@dataclass(frozen=True, slots=True)
class Mark:
    """What the processes of one session carry; with `session` None it stands for all sessions of a data directory."""

    daemon: str
    session: str | None = None

    @classmethod
    def of_sessions(cls, path: Path) -> Self:
        """Give the mark of all sessions that are kept in a directory."""
        return cls(blake2b(os.fsencode(os.path.realpath(path)), digest_size=8).hexdigest())

    @classmethod
    def of_session(cls, path: Path) -> Self:
        """Give the mark of the session whose directory that is."""
        return cls(cls.of_sessions(path.parent).daemon, path.name)

    def variables(self) -> dict[str, str]:
        """Give what the environment of the session's claude needs."""
        return {DAEMON_VARIABLE: self.daemon, SESSION_VARIABLE: self.session or ""}

    def covers(self, variables: Mapping[str, str]) -> bool:
        """Tell whether a process with these variables is meant."""
        if variables.get(DAEMON_VARIABLE) != self.daemon:
            return False
        return self.session is None or variables.get(SESSION_VARIABLE) == self.session


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was seen: `start` is when it started, in whatever form tells two with the same number apart."""

    pid: int
    parent: int
    start: str
    is_zombie: bool = False


Table = dict[int, Process]
"""Every process, by number."""
Marks = dict[int, dict[str, str]]
"""What processes carry of a mark, by number."""


class _Scanner:
    """Looks at all processes for many sessions at once: who asks before a look begins shares it."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._next: asyncio.Task[tuple[Table, Marks]] | None = None

    async def look(self) -> tuple[Table, Marks]:
        """Give what there was at some time after the call."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> tuple[Table, Marks]:
        async with self._lock:
            self._next = None  # who asks from here on wants to see what happens after this
            return await asyncio.get_running_loop().run_in_executor(_thread, _look)


_scanners: WeakKeyDictionary[asyncio.AbstractEventLoop, _Scanner] = WeakKeyDictionary()


async def _look_together() -> tuple[Table, Marks]:
    return await _scanners.setdefault(asyncio.get_running_loop(), _Scanner()).look()


async def end_leftovers(mark: Mark, family: Collection[Process] = ()) -> int:
    """End every process that carries a mark, those of `family`, and all below them; give their number.

    SIGTERM first, SIGKILL `TERM_SECONDS` later; new ones are looked for until none is left or `END_SECONDS` are over.
    The calling process and those it descends from are never meant.
    """
    return await _end(lambda table, marks: _leftovers(table, marks, mark, family))


def kill_leftovers(mark: Mark) -> None:
    """End what carries a mark at once, for a process that has no time left."""
    for _ in range(KILL_LOOKS):  # a shell whose command is killed starts the next one before its own turn comes
        found = _leftovers(*_look(), mark, ())
        for process in found:
            send_signal(process, signal.SIGKILL)
        if not found:
            break


async def end_descendants() -> int:
    """End every process below this one, as `end_leftovers` does; give their number."""
    return await _end(lambda table, _: descendants(table, [os.getpid()]))


async def _end(find: Callable[[Table, Marks], list[Process]]) -> int:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    ended: set[Process] = set()
    while found := find(*await _look_together()):
        patient = loop.time() - begin < TERM_SECONDS and not ended.issuperset(found)
        for process in found:
            send_signal(process, signal.SIGTERM if patient else signal.SIGKILL)
        ended.update(found)
        grace = min(loop.time() + TERM_SECONDS, begin + END_SECONDS)
        while loop.time() < grace and any(map(is_running, found)):
            await asyncio.sleep(_POLL_SECONDS)
        if not patient and loop.time() >= begin + END_SECONDS:  # the last thing that is done is never a SIGTERM
            break
    return len(ended)


async def family_of(mark: Mark) -> list[Process]:
    """Give what carries a mark now, and all below that."""
    return _leftovers(*await _look_together(), mark, ())


async def descendants_of(pid: int) -> list[Process]:
    """Give what runs below a process now."""
    table, _ = await _look_together()
    return descendants(table, [pid])


def descendants(table: Table, roots: Iterable[int]) -> list[Process]:
    """Give what stands below `roots` in a table and is no zombie, parents first, without the roots themselves."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    waiting = list(roots)
    seen = set(waiting)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child.pid not in seen:
                seen.add(child.pid)
                found[child.pid] = child
                waiting.append(child.pid)
    return [process for process in found.values() if not process.is_zombie]


def _leftovers(table: Table, marks: Marks, mark: Mark, family: Collection[Process]) -> list[Process]:
    spared = _ancestry(table, os.getpid())
    known = (process for process in family if process.pid not in spared)
    roots = {process.pid: process for process in known if _is_same(table.get(process.pid), process)}
    for pid, process in table.items():
        if pid not in spared and not process.is_zombie and mark.covers(marks.get(pid, {})):
            roots[pid] = process
    found = roots | {process.pid: process for process in descendants(table, roots)}
    return [process for process in found.values() if process.pid not in spared]


def _is_same(now: Process | None, then: Process) -> bool:
    return now is not None and now.start == then.start and not now.is_zombie


def _ancestry(table: Table, pid: int) -> set[int]:
    """Give a process and those it descends from: a daemon may have been started from a session of its own."""
    found = {0}
    while pid not in found:
        found.add(pid)
        pid = table[pid].parent if pid in table else 0
    return found


# Linux


def become_subreaper() -> bool:
    """Make orphans below this process its own children, for `end_descendants` and `Reaper`; False where it cannot."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def decode_stat(pid: int, data: bytes) -> Process | None:
    """Read /proc/PID/stat; None if it is no such text. The name in it may hold anything, brackets too."""
    words = data.rpartition(b")")[2].split()
    try:
        state, parent, start = words[0], int(words[1]), words[19].decode()
    except (IndexError, ValueError):
        return None
    return Process(pid, parent, start, state in (b"Z", b"X"))


def is_beginning(data: bytes) -> bool:
    """Tell from /proc/PID/stat whether a process is just beginning with a program: no mark can be seen then.

    It has no code yet, and its environment comes soon after (linux/fs/binfmt_elf.c). A kernel thread or a zombie has
    neither; of another user's process nothing is told.
    """
    words = data.rpartition(b")")[2].split()
    try:
        return words[0] not in (b"Z", b"X") and not int(words[6]) & _PF_KTHREAD and words[23] == b"0"
    except (IndexError, ValueError):
        return False


def _read(path: str) -> bytes:
    """Read a file of /proc, b"" if the process is gone or not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        chunks = []
        while chunk := os.read(descriptor, 1 << 16):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _linux_processes() -> Table:
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 (a path object for each entry costs more than the reading)
        if name.isdigit() and (process := decode_stat(int(name), _read(f"/proc/{name}/stat"))) is not None:
            found[process.pid] = process
    return found


def decode_environ(data: bytes) -> dict[str, str]:
    """Give the variables of a mark that stand in /proc/PID/environ."""
    found = {}
    for name in (DAEMON_VARIABLE, SESSION_VARIABLE):
        _, present, rest = (b"\0" + data).partition(f"\0{name}=".encode())
        if present:
            found[name] = rest.partition(b"\0")[0].decode("utf-8", "replace")
    return found


# macOS


def decode_ps(text: str) -> tuple[Table, Marks]:
    """Read what `ps` prints: a line is pid, ppid, state, five words of the start, the command with its environment."""
    table: Table = {}
    marks: Marks = {}
    for line in text.split("\n"):  # arguments may hold whatever else Unicode calls the end of a line
        words = line.split()
        if len(words) < 3 + _LSTART_WORDS or not (_is_number(words[0]) and _is_number(words[1])):
            continue
        pid = int(words[0])
        table[pid] = Process(pid, int(words[1]), " ".join(words[3 : 3 + _LSTART_WORDS]), words[2].startswith("Z"))
        pairs = (word.partition("=") for word in words[3 + _LSTART_WORDS :])
        # The environment stands behind the arguments, so that the last one counts.
        marks[pid] = {name: value for name, _, value in pairs if name in (DAEMON_VARIABLE, SESSION_VARIABLE)}
    return table, marks


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 20


def _run_ps(*more: str) -> tuple[Table, Marks]:
    done = subprocess.run([*_PS, *more], capture_output=True, check=False)
    return decode_ps(done.stdout.decode("utf-8", "replace"))


# Both


def processes() -> Table:
    """Give every process of the system. It takes a while: call it in a thread."""
    return _linux_processes() if sys.platform == "linux" else _run_ps()[0]


def _look() -> tuple[Table, Marks]:
    if sys.platform != "linux":
        return _run_ps()
    table = processes()
    environs = {pid: _read(f"/proc/{pid}/environ") for pid in table}
    bare = [pid for pid, data in environs.items() if not data]
    for _ in range(BEGINNING_LOOKS):
        beginning = [pid for pid in bare if is_beginning(_read(f"/proc/{pid}/stat"))]
        environs.update((pid, _read(f"/proc/{pid}/environ")) for pid in bare)  # it may have begun between two readings
        bare = [pid for pid in beginning if not environs[pid]]
        if not bare:
            break
        time.sleep(BEGINNING_SECONDS)
    return table, {pid: decode_environ(data) for pid, data in environs.items()}


def marked(mark: Mark) -> list[Process]:
    """Give what runs and carries a mark. It takes a while: call it in a thread."""
    table, marks = _look()
    return [one for pid, one in table.items() if mark.covers(marks.get(pid, {})) and not one.is_zombie]


def holders(path: Path) -> list[Process]:
    """Give what holds the lock (flock) on a file, by inheriting it as a rule; on Linux alone. Call it in a thread."""
    if sys.platform != "linux":
        return []
    real = os.path.realpath(path)
    return [one for one in processes().values() if not one.is_zombie and _holds(one.pid, real)]


def _holds(pid: int, path: str) -> bool:
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 (as above)
            if os.readlink(f"/proc/{pid}/fd/{name}") == path and b"\nlock:" in _read(f"/proc/{pid}/fdinfo/{name}"):  # noqa: PTH115
                return True
    except OSError:
        pass  # it is gone or not ours, or closes files: it is looked at again
    return False


def is_running(process: Process) -> bool:
    """Tell whether a process that was seen still runs."""
    if sys.platform == "linux":
        now = decode_stat(process.pid, _read(f"/proc/{process.pid}/stat"))
    else:
        now = _run_ps("-p", str(process.pid))[0].get(process.pid)
    return _is_same(now, process)


def send_signal(process: Process, number: signal.Signals) -> bool:
    """Send a signal to a process that was seen, and to no other that has its number by now; tell whether it was sent.

    A descriptor of the process is taken first: if the one that runs after that started when ours did, then it is ours.
    """
    try:
        descriptor = _open_pidfd(process.pid)
        try:
            if not is_running(process):
                return False
            if descriptor is None:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            if descriptor is not None:
                os.close(descriptor)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _open_pidfd(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # a kernel, or a sandbox, that does not know it
        return None


class Reaper:
    """Reaps orphans that came to this process, and leaves alone what asyncio started and waits for.

    Both are children, and nothing tells them apart but that asyncio reaps its own at once: what has been a zombie for
    `REAP_SECONDS` is nobody's. Use it as a context manager, in a running loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seen: set[Process] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        if sys.platform == "linux":
            self._loop.add_signal_handler(signal.SIGCHLD, self._wake)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if sys.platform == "linux":
            self._loop.remove_signal_handler(signal.SIGCHLD)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _wake(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(REAP_SECONDS, self._begin)

    def _begin(self) -> None:
        self._timer = None
        task = self._loop.create_task(self._reap())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reap(self) -> None:
        table = await asyncio.get_running_loop().run_in_executor(_thread, processes)
        zombies = {one for one in table.values() if one.is_zombie and one.parent == os.getpid()}
        for process in zombies & self._seen:
            _reap(process.pid)
        self._seen = zombies - self._seen
        if self._seen:
            self._wake()


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
