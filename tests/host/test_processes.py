"""What sessions leave running: found whatever it did to hide, ended whatever it ignores, and nobody else with it."""

import asyncio
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.sessions import are_at_rest, eventually, run

from p2pclaude.host import processes as module
from p2pclaude.host.processes import (
    DAEMON_VARIABLE,
    SESSION_VARIABLE,
    Mark,
    Process,
    Reaper,
    decode_environ,
    decode_ps,
    decode_stat,
    descendants,
    end_leftovers,
    is_running,
    kill_leftovers,
    processes,
    send_signal,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc, which only Linux has")

# What runs and how it hides; each prints the pid of the process that is to be ended. MARKED is inherited, BARE is not.
MARKED = {
    "child": "sleep 1000 & echo $!",
    "session": "setsid -f sh -c 'echo $$; exec sleep 1000'",
    "deaf": """sh -c 'trap "" TERM INT HUP; echo $$; exec sleep 1000' &""",
    "stopped": "sleep 1000 & echo $!; kill -STOP $!",
    "name": f"ln -s {shlex.quote(sys.executable)} './a) R 1 (b'; './a) R 1 (b' -c 'import os,time; "
    "print(os.getpid(), flush=True); time.sleep(1000)' &",
}


class Started:
    """A shell in claude's stead, and what it started."""

    def __init__(self, path: Path, script: str, mark: Mark) -> None:
        environ = {"PATH": os.environ["PATH"], **mark.variables()}
        self.shell = subprocess.Popen(
            ["sh", "-c", f"{script}\nexec sleep 1000"],
            stdout=subprocess.PIPE,
            cwd=path,
            env=environ,
            start_new_session=True,
        )
        assert self.shell.stdout is not None
        self.pid = int(self.shell.stdout.readline())
        eventually(lambda: are_at_rest([self.pid]))

    def end_shell(self) -> None:
        """End the shell as a claude that is killed, and reap it."""
        self.shell.kill()
        self.shell.wait()

    def close(self) -> None:
        """Leave nothing behind."""
        self.end_shell()
        assert self.shell.stdout is not None
        self.shell.stdout.close()
        if (process := processes().get(self.pid)) is not None:
            send_signal(process, signal.SIGKILL)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Started]]:
    """Collect what is to be closed in the end."""
    all_of_them: list[Started] = []
    yield all_of_them
    for one in all_of_them:
        one.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after a time that is too long for any busy machine: then an end means that there was none left."""
    monkeypatch.setattr(module, "END_SECONDS", 40.0)


def runs(pid: int) -> bool:
    process = processes().get(pid)
    return process is not None and not process.is_zombie


def is_bare(pid: int, mark: Mark) -> bool:
    return pid not in {process.pid for process in module.marked(mark)}


@pytest.mark.parametrize("kind", MARKED)
@linux_only
def test_what_carries_the_mark_is_ended(kind: str, tmp_path: Path, started: list[Started]) -> None:
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    one = Started(tmp_path, MARKED[kind], mark)
    started.append(one)
    one.end_shell()
    assert runs(one.pid)
    assert asyncio.run(end_leftovers(mark)) >= 1
    assert not runs(one.pid)
    assert asyncio.run(end_leftovers(mark)) == 0


def test_this_process_among_the_family_spares_what_runs_below_it(tmp_path: Path) -> None:
    """As when it holds a session's lock itself: its children serve other sessions."""
    own, child = Process(os.getpid(), os.getppid(), "now"), Process(10**7, os.getpid(), "now")
    table = {process.pid: process for process in (own, child)}
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    assert module._leftovers(table, {}, mark, [own]) == []
    assert module._leftovers(table, {}, mark, [own, child]) == [child]


@linux_only
def test_a_shell_that_goes_on_with_the_next_command_leaves_none(
    tmp_path: Path, started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_slowly(process: Process, number: signal.Signals) -> bool:
        sent = send_signal(process, number)
        time.sleep(0.1)  # the shell takes notice of its command's end
        return sent

    look = module._look
    monkeypatch.setattr(module, "send_signal", send_slowly)
    monkeypatch.setattr(module, "_look", lambda: (dict(reversed(look()[0].items())), look()[1]))
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    started.append(Started(tmp_path, "setsid sh -c 'echo $$; while :; do sleep 1000; done' &", mark))
    eventually(lambda: len(found := module.marked(mark)) == 3 and are_at_rest(one.pid for one in found))
    kill_leftovers(mark)
    eventually(lambda: not module.marked(mark))


@linux_only
def test_others_are_left_alone(tmp_path: Path, started: list[Started]) -> None:
    ours = Mark.of_session(tmp_path / "sessions" / "s")
    others = [
        Mark.of_session(tmp_path / "sessions" / "other"),  # another session of the data directory
        Mark.of_session(tmp_path / "elsewhere" / "s"),  # the same id of another daemon
        Mark.of_session(tmp_path / "sessions" / "s2"),
        Mark("", "s"),
    ]
    started += [Started(tmp_path, MARKED["child"], mark) for mark in (ours, *others)]
    asyncio.run(end_leftovers(ours))
    assert [runs(one.pid) for one in started] == [False, True, True, True, True]
    asyncio.run(end_leftovers(Mark.of_sessions(tmp_path / "sessions")))
    assert [runs(one.pid) for one in started] == [False, False, True, False, True]
    kill_leftovers(Mark.of_sessions(tmp_path / "elsewhere"))
    eventually(lambda: not runs(started[2].pid))  # nobody waited for its end


@linux_only
def test_a_process_without_the_mark_is_ended_with_its_family(tmp_path: Path, started: list[Started]) -> None:
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    for script in (
        "env -i sleep 1000 & echo $!",
        "env -i sh -c 'sleep 1000 & echo $!; exec sleep 1000' &",  # below one that has lost it
    ):
        one = Started(tmp_path, script, mark)
        started.append(one)
        assert is_bare(one.pid, mark)
        family = descendants(processes(), [one.shell.pid])
        assert one.pid in {process.pid for process in family}
        one.end_shell()
        asyncio.run(end_leftovers(mark))
        assert runs(one.pid)
        asyncio.run(end_leftovers(mark, family))
        assert not runs(one.pid)


@linux_only
def test_processes_that_start_others_all_the_time_are_ended(tmp_path: Path, started: list[Started]) -> None:
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    # Whatever becomes of this test, the hare tires: nothing else could catch it.
    hare = (
        "import os,time\nprint(os.getpid(), flush=True)\nend = time.time() + 60\n"
        "while time.time() < end:\n time.sleep(0.002)\n if os.fork(): os._exit(0)"
    )
    (tmp_path / "hare.py").write_text(hare)
    one = Started(tmp_path, f"setsid -f {shlex.quote(sys.executable)} -S -E hare.py", mark)
    started.append(one)
    one.end_shell()
    # A process that is another one every 2 ms is missed by a look now and then, not by many.
    deadline = time.monotonic() + 40
    while module.marked(mark):
        asyncio.run(end_leftovers(mark))
        assert time.monotonic() < deadline


@linux_only
def test_nothing_is_given_up_that_was_only_asked_to_end(
    tmp_path: Path, started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the time may be over before SIGKILL has its turn, when the machine stood still meanwhile."""
    monkeypatch.setattr(module, "END_SECONDS", module.TERM_SECONDS / 4)
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    one = Started(tmp_path, MARKED["deaf"], mark)
    started.append(one)
    asyncio.run(end_leftovers(mark))
    eventually(lambda: not runs(one.pid))


@linux_only
def test_the_caller_and_its_ancestors_are_never_meant(tmp_path: Path) -> None:
    """A daemon may be started from a session of the very data directory that it serves."""
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    code = f"""
import asyncio, os, sys
from pathlib import Path
from p2pclaude.host.processes import Mark, end_leftovers
print(asyncio.run(end_leftovers(Mark.of_session(Path({str(tmp_path / "sessions" / "s")!r})))))
"""
    script = 'sleep 1000 & "$0" -c "$1"; echo survived'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, code],
        capture_output=True,
        text=True,
        env={**os.environ, **mark.variables()},
        timeout=30,
        check=False,
    )
    assert done.stdout == "1\nsurvived\n", done.stderr


@linux_only
def test_a_number_that_has_gone_to_another_process_is_not_hit(tmp_path: Path, started: list[Started]) -> None:
    one = Started(tmp_path, MARKED["child"], Mark("d", "s"))
    started.append(one)
    seen = processes()[one.pid]
    assert is_running(seen)
    former = Process(seen.pid, seen.parent, str(int(seen.start) - 1))
    assert not is_running(former)
    assert not send_signal(former, signal.SIGKILL)
    assert not send_signal(Process(2**22 + 1, 1, "1"), signal.SIGKILL)
    assert runs(one.pid)
    assert send_signal(seen, signal.SIGKILL)


@linux_only
def test_signals_where_there_is_no_pidfd(
    tmp_path: Path, started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    mark = Mark.of_session(tmp_path / "sessions" / "s")
    one = Started(tmp_path, MARKED["deaf"], mark)
    started.append(one)
    asyncio.run(end_leftovers(mark))
    assert not runs(one.pid)


def test_two_names_of_a_directory_are_one_mark(tmp_path: Path) -> None:
    (tmp_path / "sessions").mkdir()
    (tmp_path / "link").symlink_to("sessions")
    assert Mark.of_session(tmp_path / "link" / "s") == Mark.of_session(tmp_path / "sessions" / "s")
    variables = Mark.of_session(tmp_path / "sessions" / "s").variables()
    assert set(variables) == {DAEMON_VARIABLE, SESSION_VARIABLE}
    assert str(tmp_path) not in variables[DAEMON_VARIABLE]


# Orphans

REAPER = """
import asyncio, os, subprocess, sys, time
from p2pclaude.host import processes
processes.REAP_SECONDS = 0.3

async def main():
    assert processes.become_subreaper()
    with processes.Reaper():
        code = "import os,sys\\nfor _ in range(5):\\n if not os.fork(): os._exit(0)\\nos._exit(int(sys.argv[1]))"
        statuses = []
        for number in range(40):  # each leaves five orphans, and asyncio waits for the parent itself
            child = await asyncio.create_subprocess_exec(sys.executable, "-S", "-E", "-c", code, str(number))
            statuses.append(await child.wait())
        assert statuses == list(range(40)), statuses
        deadline = time.monotonic() + 30
        while zombies := [p for p in processes.processes().values() if p.is_zombie and p.parent == os.getpid()]:
            assert time.monotonic() < deadline, zombies
            await asyncio.sleep(0.05)
        # What it cannot know by a mark it knows by descent.
        await (await asyncio.create_subprocess_shell("env -i setsid -f sleep 1000")).wait()
        assert await processes.end_descendants() == 1
        print("good")

asyncio.run(main())
"""


@linux_only
def test_orphans_are_reaped_and_children_of_asyncio_are_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", REAPER], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("good\n", "")


def test_a_reaper_leaves_nothing_behind() -> None:
    async def main() -> None:
        with Reaper():
            os.kill(os.getpid(), signal.SIGCHLD)
            await asyncio.sleep(0.05)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL

    run(main())


@linux_only
@pytest.mark.parametrize(("without_code", "without_environment"), [(0, 0), (0, 1), (1, 1), (7, 8)])
def test_a_process_that_is_just_beginning_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, without_code: int, without_environment: int
) -> None:
    """In the middle of an exec there is for a while no environment to read, and no code."""
    mark = Mark("d", "s")
    code = itertools.chain(itertools.repeat(b"0", without_code), itertools.repeat(b"4096"))
    variables = b"\0".join(f"{name}={value}".encode() for name, value in mark.variables().items())
    environment = itertools.chain(itertools.repeat(b"", without_environment), itertools.repeat(variables))

    def read(path: str) -> bytes:
        if path.endswith("environ"):
            return next(environment)
        return b"7 (sleep) R 1 7 7 0 -1 0" + b" 0" * 12 + b" 98765 0 0 0 " + next(code) + b" 0 0"

    monkeypatch.setattr(module, "processes", lambda: {7: Process(7, 1, "98765")})
    monkeypatch.setattr(module, "_read", read)
    assert [process.pid for process in module.marked(mark)] == [7]


@linux_only
def test_nobody_waits_for_kernel_threads_zombies_and_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module.is_beginning(Path("/proc/self/stat").read_bytes())
    thread = b"2 (kthreadd) S 0 0 0 0 -1 2129984" + b" 0" * 12 + b" 0 0 0 0 0 0 0"
    other = b"9 (bash) S 1 9 9 0 -1 4194304" + b" 0" * 12 + b" 98765 0 0 0 1 1 0"
    zombie = b"9 (sh) Z 1 9 9 0 -1 4194304" + b" 0" * 12 + b" 98765 0 0 0 0 0 0"
    assert not any(map(module.is_beginning, (thread, other, zombie, b"", b"7 (x) R", b"7 (x) R" + b" a" * 30)))


# Decoders


def test_stat_of_a_process_with_any_name() -> None:
    rest = b" S 12 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3"
    for name in (b"sleep", b"a b", b"a) R 1 (b", b"\xff", b""):
        assert decode_stat(7, b"7 (" + name + b")" + rest) == Process(7, 12, "98765")
    assert decode_stat(7, b"7 (x)" + rest.replace(b" S ", b" Z ")) == Process(7, 12, "98765", is_zombie=True)
    for bad in (b"", b"7 (x", b"7 (x) S", b"7 (x) S a " + b"1 " * 30):
        assert decode_stat(7, bad) is None


def test_environment_of_a_process() -> None:
    data = b"A=1\0P2PCLAUDE_SESSION=s\0XP2PCLAUDE_DAEMON=no\0P2PCLAUDE_DAEMON=d\0B=P2PCLAUDE_SESSION=no\0"
    assert decode_environ(data) == {SESSION_VARIABLE: "s", DAEMON_VARIABLE: "d"}
    assert decode_environ(data[len(b"A=1\0") :]) == {SESSION_VARIABLE: "s", DAEMON_VARIABLE: "d"}
    assert decode_environ(b"P2PCLAUDE_SESSION=\xff") == {SESSION_VARIABLE: "\ufffd"}
    assert decode_environ(b"") == {}


PS = """\
    1     0 Ss   Mon Nov 23 08:00:01 2026 /sbin/launchd
  501     1 S    Mon Nov 23 08:01:10 2026 /opt/homebrew/bin/python3 -m p2pclaude HOME=/Users/ann PATH=/usr/bin:/bin
  777   501 Ss+  Tue Nov 24 09:30:00 2026 claude --verbose HOME=/Users/ann P2PCLAUDE_DAEMON=0011223344556677 \
P2PCLAUDE_SESSION=s-1 TERM=xterm
  778   777 R    Tue Nov 24 09:30:05 2026 sh -c echo P2PCLAUDE_SESSION=fake A=b P2PCLAUDE_SESSION=s-1 \
P2PCLAUDE_DAEMON=0011223344556677
  779   777 Z    Tue Nov 24 09:30:06 2026 (sleep)
  780     1 Ss   Tue Nov  4 09:30:06 2026 /usr/libexec/with space/tool
garbage
"""


def test_ps_as_macos_prints_it() -> None:
    table, marks = decode_ps(PS)
    assert sorted(table) == [1, 501, 777, 778, 779, 780]
    assert table[780] == Process(780, 1, "Tue Nov 4 09:30:06 2026")
    assert table[779].is_zombie
    ours = Mark("0011223344556677", "s-1")
    assert [pid for pid, variables in marks.items() if ours.covers(variables)] == [777, 778]
    assert [p.pid for p in descendants(table, [501])] == [777, 778]
    assert decode_ps("") == ({}, {})


def test_an_argument_is_no_process() -> None:
    forged = "666 1 S Tue Nov 24 09:30:00 2026 sh P2PCLAUDE_DAEMON=d P2PCLAUDE_SESSION=s"
    for end in "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029":
        table, marks = decode_ps(f"777 1 S Tue Nov 24 09:30:00 2026 echo {end}{forged} more\n")
        assert (set(table), set(marks)) == ({777}, {777}), repr(end)
    assert decode_ps("\u00b2 1 S Tue Nov 24 09:30:00 2026 a digit for `isdigit`, none for `int`\n") == ({}, {})
