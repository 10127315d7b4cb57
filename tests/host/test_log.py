"""The log: JSON lines with stable names, and a stream that may go away."""

import asyncio
import errno
import gc
import io
import json
import logging
import os
import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from p2pclaude.host.log import MAX_KEPT_BYTES, Event, Log, first_line, short, wants_debug, with_libraries


def test_a_line_is_json_with_time_level_and_event() -> None:
    stream = io.StringIO()
    Log(stream)(Event.SPAWNED, session="a\nb", pid=7, model=None)
    line = json.loads(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {"level": "info", "event": "session-spawned", "session": "a\nb", "pid": 7}


def test_debug_events_are_for_who_asks() -> None:
    for debug, lines in ((False, 0), (True, 1)):
        stream = io.StringIO()
        Log(stream, debug=debug)(Event.REQUEST, method="ping")
        assert len(stream.getvalue().splitlines()) == lines


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True), ("*", True)])
def test_debug_environment(value: str | None, wanted: bool) -> None:
    assert wants_debug({} if value is None else {"DEBUG": value}) is wanted


@pytest.mark.parametrize(
    ("event", "level"),
    [(Event.ERROR, "error"), (Event.WARNING, "warning"), (Event.STARTED, "info"), (Event.RECORD_FAILED, "error")],
)
def test_levels(event: Event, level: str) -> None:
    stream = io.StringIO()
    Log(stream)(event)
    assert json.loads(stream.getvalue())["level"] == level


def test_each_line_is_flushed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream:
        Log(stream)(Event.STOPPED)
        assert path.read_text().endswith("\n")


def test_a_closed_stream_ends_the_log_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    log = Log(stream)
    log(Event.STARTED)
    log(Event.STOPPED)
    stream.close()
    log(Event.STOPPED)
    closed = io.StringIO()
    closed.close()
    Log(closed)(Event.STARTED)


def test_a_full_disk_costs_lines_and_not_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there was room for is whole; what is not there is counted in its place."""
    room, write = [1000], os.write

    def write_while_there_is_room(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write_while_there_is_room)
    path = tmp_path / "log"
    with path.open("w") as stream:
        log = Log(stream)
        for number in range(5000):
            log(Event.MESSAGE, session="s", seq=number)
        log.finish()
        room[0] = 1 << 30
        log(Event.UNPAUSED, session="s")
    check_lost([json.loads(line) for line in path.read_text().splitlines()], 5000)


def check_lost(lines: list[dict[str, Any]], count: int) -> None:
    """Check that of so many messages some are there in order, then the number of the others, then a last word."""
    *messages, note, last = lines
    assert [line["seq"] for line in messages] == list(range(len(messages)))
    assert MAX_KEPT_BYTES // 200 < len(messages) < count
    assert note["level"] == "warning"
    assert note["message"].startswith(f"{count - len(messages)} lines of the log are lost")
    assert last["event"] == "session-continued"


def test_nothing_waits_for_a_reader_that_does_not_read(tmp_path: Path) -> None:
    """The log of a program goes into a pipe that is full: no call takes long, and what is lost is counted."""
    reader, writer = os.pipe()
    count = 5000

    async def main() -> bytes:
        with os.fdopen(writer, "w") as stream:
            log = Log(stream)
            for number in range(count):
                log(Event.MESSAGE, session="s", seq=number)
            data = await read_until(b" lines of the log are lost")
            log(Event.UNPAUSED, session="s")
            log.finish()
        return data + await read_until(None)

    async def read_until(wanted: bytes | None) -> bytes:
        data = b""
        while (wanted is None or wanted not in data) and (more := await asyncio.to_thread(os.read, reader, 65536)):
            data += more
        return data

    with os.fdopen(reader, "rb"):
        lines = asyncio.run(asyncio.wait_for(main(), 20)).splitlines()
    check_lost([json.loads(line) for line in lines], count)


def test_the_end_waits_a_little_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept goes out when the reader reads on, and is given up when it does not."""
    reader, writer = os.pipe()
    seen = bytearray()

    def read_first() -> None:
        while b'"seq": 999}' not in seen:
            seen.extend(os.read(reader, 65536))

    read = threading.Timer(0.2, read_first)
    monkeypatch.setattr("p2pclaude.host.log.FINISH_SECONDS", 20)
    with os.fdopen(writer, "w") as stream:
        log = Log(stream)
        for number in range(1000):
            log(Event.MESSAGE, session="s" * 20, seq=number)
        read.start()
        log.finish()
        read.join(20)
        assert not read.is_alive()
        monkeypatch.setattr("p2pclaude.host.log.FINISH_SECONDS", 0.1)
        begin = time.monotonic()
        for number in range(1000):
            log(Event.MESSAGE, session="s" * 20, seq=1000 + number)
        log.finish()
        assert time.monotonic() - begin < 5
    os.close(reader)


def test_nothing_waits_for_a_terminal_that_shows_nothing() -> None:
    """As one at the other end of a connection that stalls: it may have room for less than a line."""
    master, terminal = os.openpty()

    def give_up() -> None:
        os.close(master)  # whoever waits for the terminal hears of it

    timer = threading.Timer(10, give_up)
    timer.start()
    with os.fdopen(terminal, "w") as stream:
        log = Log(stream)
        for number in range(5000):
            log(Event.MESSAGE, session="s", seq=number)
    timer.cancel()
    timer.join()
    os.close(master)


def test_a_terminal_that_is_gone_costs_the_log_alone() -> None:
    master, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        log = Log(stream)
        log(Event.STARTED)
        os.close(master)
        for _ in range(5000):
            log(Event.STOPPED)
        log.finish()


def test_errors_are_told_by_their_first_line() -> None:
    assert first_line(None) is None
    assert first_line("") == ""
    assert first_line("\none\ntwo") == "one"
    assert first_line("x" * 500) == "x" * 200


def test_a_key_is_shortened() -> None:
    assert short(bytes(range(32))) == "00010203"


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return the lines of a log without their times."""
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_what_libraries_log_becomes_events_without_what_an_exception_quotes() -> None:
    stream = io.StringIO()
    library = logging.getLogger("p2pclaude.hyperdht.some")
    with with_libraries(Log(stream)):
        try:
            raise ValueError("p2pclaude://secret")
        except ValueError:
            library.exception("a handler failed")
        library.error("something failed")
        library.warning("%d sockets", 3)
        library.info("hidden")
    library.error("nobody listens")
    failed, plain, warning = events(stream)
    (place,) = failed.pop("trace")
    assert place.startswith("test_log.py:")
    assert place.endswith("test_what_libraries_log_becomes_events_without_what_an_exception_quotes")
    where = {"level": "error", "event": "internal-error", "where": "p2pclaude.hyperdht.some"}
    assert failed == {**where, "error": "ValueError", "message": "a handler failed"}
    assert plain == {**where, "message": "something failed"}
    assert warning == {"level": "warning", "event": "warning", "message": "p2pclaude.hyperdht.some: 3 sockets"}


@pytest.mark.parametrize("debug", [False, True])
def test_details_of_our_library_are_for_who_asks(debug: bool) -> None:
    stream = io.StringIO()
    with with_libraries(Log(stream, debug=debug)):
        logging.getLogger("p2pclaude.hyperdht.some").debug("a detail")
        logging.getLogger("asyncio").debug("a detail of others")
    note = {"level": "debug", "event": "library-note", "where": "p2pclaude.hyperdht.some", "message": "a detail"}
    assert events(stream) == [note] * debug


def test_a_task_that_failed_unseen_is_logged_without_its_error_text() -> None:
    async def fail() -> None:
        raise ValueError("p2pclaude://secret")

    async def main() -> None:
        asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(0.01)
        gc.collect()

    stream = io.StringIO()
    with with_libraries(Log(stream)):
        asyncio.run(main())
    (event,) = events(stream)
    assert event["message"] == "Task exception was never retrieved"
    assert event["error"] == "ValueError"
    assert "secret" not in stream.getvalue()


def test_a_callback_that_failed_is_logged_without_its_arguments() -> None:
    def fail(*args: object) -> None:
        raise ValueError("p2pclaude://secret")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(fail, "secret")
        loop.call_soon(partial(fail, "secret"), b"secret")
        await asyncio.sleep(0.01)

    stream = io.StringIO()
    with with_libraries(Log(stream)):
        asyncio.run(main())
    for event in events(stream):
        assert event["message"].startswith("Exception in callback test_a_callback_that_failed")
        assert event["trace"][-1].endswith(" fail")
    assert len(events(stream)) == 2
    assert "secret" not in stream.getvalue()


def test_a_record_that_cannot_be_formatted_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raises
    stream = io.StringIO()
    with with_libraries(Log(stream)):
        logging.getLogger("library").warning("%d sockets", "three")
    assert [event["message"] for event in events(stream)] == ["library: %d sockets"]
