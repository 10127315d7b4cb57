"""Filters: what is run, what its end means, and that whatever goes wrong with it allows nothing."""

import asyncio
import os
import subprocess
import time
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.cli import filters
from p2pclaude.cli.filters import Verdict, environment, judge, run_filter

REQUEST = {
    "sessionId": "s",
    "requestId": "r",
    "toolName": "Ba\nsh",
    "directory": "/srv",
    "input": {"command": "grüß"},
}


def decide(command: str, timeout: float = 40.0, request: dict[str, Any] = REQUEST) -> Verdict:
    """Run a filter."""
    return asyncio.run(run_filter(command, request, timeout))


def eventually_gone(group: int) -> None:
    """Wait until a process group has no member that runs."""
    deadline = time.monotonic() + 40
    while listed := subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout:
        members = [line.split() for line in listed.splitlines()]
        if not [state for pgid, state in members if pgid == str(group) and not state.startswith("Z")]:
            return
        assert time.monotonic() < deadline, members
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("exit 0", {"behavior": "allow"}),
        ("true", {"behavior": "allow"}),
        ("echo", {"behavior": "allow"}),
        ("jq -c .input", {"behavior": "allow", "updatedInput": {"command": "grüß"}}),
        ("echo '{}'", {"behavior": "allow", "updatedInput": {}}),
        ("exit 1", {"behavior": "deny"}),
        ("echo ' not so '; echo here; exit 1", {"behavior": "deny", "message": "not so \nhere"}),
        ("echo '{}'; exit 1", {"behavior": "deny", "message": "{}"}),
        ("exec <&-; exit 0", {"behavior": "allow"}),
        ("exec >&-; exit 0", {"behavior": "allow"}),
        (
            'echo "$P2P_CLAUDE_TOOL $P2P_CLAUDE_SESSION_ID $P2P_CLAUDE_REQUEST_ID $P2P_CLAUDE_DIRECTORY"; exit 1',
            {"behavior": "deny", "message": "Bash s r /srv"},
        ),
    ],
)
def test_a_filter_decides(command: str, answer: dict[str, Any]) -> None:
    assert decide(command) == Verdict(answer)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("echo '{}'; exit 75", None),
        ("exit 2", "exited with status 2"),
        ("exit 255", "exited with status 255"),
        ("kill -9 $$", "was ended by signal 9"),
        ("./no-such-program 2>&-", "exited with status 127"),
        ("if", "exited with status 2"),
        ("echo yes", "printed something else than a JSON object for the tool's input"),
        ("echo '[]'", "printed something else than a JSON object for the tool's input"),
        ("echo '{}{}'", "printed something else than a JSON object for the tool's input"),
        ("echo '{\"a\": NaN}'", "printed something else than a JSON object for the tool's input"),
        ("printf '\\377'", "printed something else than a JSON object for the tool's input"),
        ("head -c 5000000 /dev/zero", "printed more than 4 MiB"),
        ("yes", "printed more than 4 MiB"),
    ],
)
def test_a_filter_that_does_not_decide_leaves_the_request(command: str, complaint: str | None) -> None:
    assert decide(command + " 2>/dev/null" if command == "if" else command) == Verdict(None, complaint)


def test_a_filter_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*words: object, **options: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    before = len(list(Path("/dev/fd").iterdir()))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    assert decide("true") == Verdict(None, "could not be started: resource temporarily unavailable")
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_request_that_no_environment_holds_leaves_it_to_others() -> None:
    """JSON may hold half of a surrogate pair, which is no text for a system."""
    before = len(list(Path("/dev/fd").iterdir()))
    verdict = decide("true", request={**REQUEST, "toolName": "\ud800"})
    assert verdict.answer is None and (verdict.complaint or "").startswith("could not be started")
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize(
    "command",
    [
        "sleep 60",
        "cat; sleep 60",
        "exec >&-; sleep 60",
        "trap '' TERM; sleep 60 & wait; sleep 60",
        "(trap '' TERM; sleep 60)",
    ],
)
def test_a_filter_that_hangs_is_ended_with_what_it_started(command: str, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    for patience in (0.5, 2, 8):  # until it has begun in time
        started = time.monotonic()
        verdict = decide(f"echo $$ >{quote(str(pid))}; {command}", timeout=patience)
        assert verdict == Verdict(None, f"was not done within {patience:g} s")
        assert time.monotonic() - started < patience + 30  # of 60
        if pid.exists() and pid.read_text():
            break
    eventually_gone(int(pid.read_text()))


def test_what_a_filter_leaves_behind_does_not_hold_it_up(tmp_path: Path) -> None:
    """A process in the background that keeps stdout open: the filter's own end counts."""
    started = time.monotonic()
    verdict = decide(f'sleep 100 & echo $! >{quote(str(tmp_path))}/pid; echo \'{{"command": "ls"}}\'')
    assert verdict == Verdict({"behavior": "allow", "updatedInput": {"command": "ls"}})
    assert time.monotonic() - started < 50
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_a_cancelled_filter_is_ended(tmp_path: Path) -> None:
    async def main() -> int:
        pid = tmp_path / "pid"
        task = asyncio.create_task(run_filter(f"echo $$ >{quote(str(pid))}; sleep 60", REQUEST, 60))
        while not (pid.exists() and pid.read_text()):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return int(pid.read_text())

    eventually_gone(asyncio.run(main()))


def test_a_filter_that_is_cancelled_twice_is_killed(tmp_path: Path) -> None:
    """The request is answered by another, and at once the tool itself is interrupted."""

    async def main() -> int:
        pid = tmp_path / "pid"
        command = f"trap '' TERM; echo $$ >{quote(str(pid))}; while :; do sleep 1; done"
        task = asyncio.create_task(run_filter(command, REQUEST, 60))
        while not (pid.exists() and pid.read_text()):
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return int(pid.read_text())

    eventually_gone(asyncio.run(main()))


def test_a_large_request_reaches_a_filter_that_reads_it_and_one_that_does_not() -> None:
    large = {**REQUEST, "input": {"content": "x" * (1 << 20)}}
    assert decide("wc -c >&2; exit 1", request=large).answer == {"behavior": "deny"}
    assert decide("exit 0", request=large).answer == {"behavior": "allow"}
    changed = decide("jq .input", request=large).answer
    assert changed == {"behavior": "allow", "updatedInput": large["input"]}


def test_a_filter_has_no_terminal() -> None:
    assert decide("cat </dev/tty >/dev/null 2>&1; exit 1").answer == {"behavior": "deny"}


def test_the_environment_holds_no_control_characters() -> None:
    env = environment({"sessionId": "a\0b", "toolName": "\x1b[31m"})
    assert (env["P2P_CLAUDE_SESSION_ID"], env["P2P_CLAUDE_TOOL"]) == ("ab", "[31m")
    assert env["PATH"] == os.environ["PATH"]


@given(st.integers(-64, 255), st.binary(max_size=20) | st.just(b"{}") | st.just(b'{"a":1}\n'))
def test_nothing_but_status_zero_allows(status: int, output: bytes) -> None:
    verdict = judge(status, output)
    behavior = None if verdict.answer is None else verdict.answer["behavior"]
    assert behavior in ({0: ("allow", None), 1: ("deny",)}.get(status, (None,)))
    assert (verdict.complaint is None) == (behavior is not None or status == filters.LEFT)
