"""The log: JSON lines with stable names, and a stream that may go away."""

import errno
import io
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from p2pclaude.log import Event, Log, first_line, short, wants_debug


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
    with pytest.raises(BrokenPipeError):
        stream.close()
    log(Event.STOPPED)
    closed = io.StringIO()
    closed.close()
    Log(closed)(Event.STARTED)


def test_a_full_disk_costs_lines_and_not_the_log(tmp_path: Path) -> None:
    class Disk(io.FileIO):
        is_full = True

        def write(self, data: Any) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    path = tmp_path / "log"
    disk = Disk(path, "w")
    with io.TextIOWrapper(io.BufferedWriter(disk), encoding="utf-8") as stream:
        log = Log(stream)
        for _ in range(1000):
            log(Event.PAUSED, session="s")
        disk.is_full = False
        log(Event.UNPAUSED, session="s")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) < 200
    assert lines[-1]["event"] == "session-continued"


def test_errors_are_told_by_their_first_line() -> None:
    assert first_line(None) is None
    assert first_line("") == ""
    assert first_line("\none\ntwo") == "one"
    assert first_line("x" * 500) == "x" * 200


def test_a_key_is_shortened() -> None:
    assert short(bytes(range(32))) == "00010203"
