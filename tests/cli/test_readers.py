"""Who reads stdout, and what a tool does when nobody does any more or nobody does yet."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli.harness import Shell, eventually, unread


@contextmanager
def broken_pipe() -> Iterator[int]:
    """Give a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def run_unread(shell: Shell, tool: str, *arguments: str) -> tuple[int, bytes]:
    """Run a tool whose output nobody reads; return its status and its words."""
    with broken_pipe() as out:
        process = shell.start(tool, *arguments, stdout=out)
    return process.wait(timeout=30), process.communicate()[1]


@pytest.mark.parametrize("options", [[], ["-w"]])
def test_a_message_is_sent_although_nobody_reads_the_answer(shell: Shell, tmp_path: Path, options: list[str]) -> None:
    assert run_unread(shell, "send", *options, "-C", str(tmp_path), "@", "hello") == (0, b"")
    sessions = [json.loads(line) for line in shell.succeed("ls", "--json", "@")]
    assert [session["directory"] for session in sessions].count(str(tmp_path)) == 1


def test_a_session_is_stopped_although_nobody_reads_its_id(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hello")
    assert run_unread(shell, "stop", "@", session) == (0, b"")
    assert session not in shell.succeed("ls", "-q", "@")


def test_a_request_is_answered_although_nobody_reads_its_id(shell: Shell) -> None:
    [session] = shell.succeed("send", "--ask", "--permission-mode", "default", "@", "ASK:ls")
    eventually(lambda: bool(shell.succeed("approve", "@", session)))
    [line] = shell.succeed("approve", "@", session)
    assert run_unread(shell, "approve", "--deny", json.loads(line)["requestId"], "@") == (0, b"")
    assert shell.succeed("approve", "@", session) == []


def test_waiting_ends_when_nobody_reads_any_more(shell: Shell) -> None:
    waiting = shell.start("send", "-w", "-v", "@", "HANG")
    assert waiting.stderr and waiting.stdout
    while b"get-output" not in (line := waiting.stderr.readline()):
        assert line, "it did not wait"
    waiting.stdout.close()
    assert waiting.wait(timeout=50) == 0
    waiting.stderr.close()


def test_a_fifo_that_is_open_for_reading_too_has_a_reader(shell: Shell, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    both = os.open(fifo, os.O_RDWR)  # as `1<>fifo` does in a shell
    try:
        process = shell.start("ping", "-c", "3", "@", stdout=both)
        assert process.wait(timeout=30) == 0
        process.communicate()
        assert os.read(both, 1 << 16).count(b"\n") == 3
    finally:
        os.close(both)


@pytest.fixture(scope="module")
def long_session(shell: Shell) -> str:
    """Give a session that has printed more than a pipe holds."""
    session, *_ = shell.succeed("send", "@", text="x" * 200_000)
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    return session


def test_a_slow_reader_gets_all_although_stdout_does_not_block(shell: Shell, long_session: str) -> None:
    """Who shares stdout may have made it so, as ssh does."""
    whole = "".join(line + "\n" for line in shell.succeed("tail", "@", long_session)).encode()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = shell.start("tail", "@", long_session, stdout=writer)
    os.close(writer)
    eventually(lambda: unread(reader) > 50_000)
    with os.fdopen(reader, "rb") as rest:
        assert rest.read() == whole
    assert (process.wait(timeout=30), process.communicate()[1]) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("options", [[], ["-f"]])
def test_signals_end_a_tool_whose_reader_has_stopped(
    shell: Shell, long_session: str, number: signal.Signals, options: list[str], blocking: bool
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)
    process = shell.start("tail", *options, "@", long_session, stdin=subprocess.DEVNULL, stdout=writer)
    os.close(writer)
    assert process.stderr
    try:
        os.read(reader, 1)
        eventually(lambda: unread(reader) > 50_000)  # so that there is no room for the rest
        process.send_signal(number)
        assert process.wait(timeout=50) == -number
        assert process.stderr.read() == b""
    finally:
        os.close(reader)
        process.kill()
        process.communicate()
