"""session.json: the form that every version reads and writes, and the keeper that writes it until it is written."""

import asyncio
import errno
from pathlib import Path

import pytest
from kit.sessions import KeptLog, run

from p2pclaude.errors import WireError
from p2pclaude.sessions import directory as module
from p2pclaude.sessions.directory import Info, InfoFile
from p2pclaude.sessions.life import LIVE, SessionLife, State

# As the version before wrote them: with these a data directory is taken over.
WRITTEN = """\
{"session_id":"%s","claude_id":"37bc9f6c-5160-466c-9995-a1c511fd77e6","directory":"/home/ann/project",\
"created_at":1796094548051,"permission_mode":"acceptEdits","model":null,"state":"%s","begun":true,"ask":false,\
"mark":0,"last_seq":5,"queued":0,"ended_at":%s,"exit_status":0,"error":null,"number":1}
"""


@pytest.mark.parametrize("state", State)
def test_what_earlier_versions_wrote_is_read_and_written_alike(state: State, tmp_path: Path) -> None:
    path = tmp_path / "37bc"
    path.mkdir()
    text = WRITTEN % ("37bc", state, 1796094549618 if state is State.ENDED else "null")
    (path / "session.json").write_text(text)
    info = Info.load(path)
    assert (info.session_id, info.state, info.last_seq, info.number) == ("37bc", state, 5, 1)
    info.save(path)
    assert (path / "session.json").read_text() == text
    assert SessionLife.loaded(State(info.state)).stored == (State.DORMANT if state in LIVE else state)


def test_unknown_fields_are_passed_over_and_missing_ones_have_their_defaults() -> None:
    short = b'{"session_id":"a","claude_id":"b","directory":"/","created_at":1,"permission_mode":"plan","later":[]}'
    info = Info.decode(short)
    assert (info.state, info.number, info.queued, info.model) == (State.STARTING, 0, 0, None)


@pytest.mark.parametrize("state", ["removed", "waking", "", "Idle", 7])
def test_a_state_that_no_version_knows_is_damage(state: object) -> None:
    text = (WRITTEN % ("a", "idle", "null")).replace('"idle"', f'"{state}"' if isinstance(state, str) else str(state))
    with pytest.raises(WireError):
        Info.decode(text.encode())


@pytest.fixture
def info() -> Info:
    """Give what a session keeps."""
    return Info("a", "b", "/", 1, "default")


def keeper(path: Path, info: Info) -> tuple[InfoFile, KeptLog, list[int]]:
    """Give a keeper, its log, and how often it asked for what is new."""
    log, noted = KeptLog(), list[int]()
    return InfoFile(path, info, log, lambda: noted.append(1)), log, noted


def test_it_is_brought_up_to_date_before_it_is_written(tmp_path: Path, info: Info) -> None:
    async def main() -> None:
        file, log, noted = keeper(tmp_path, info)
        await file.create()
        assert not noted
        file.save_soon()
        await file.settle()
        assert noted == [1] and not log.lines
        file.save_soon(again=True)  # nothing was in vain
        await file.settle()
        assert noted == [1]

    run(main())
    assert Info.decode((tmp_path / "session.json").read_bytes()) == info


def test_what_could_not_be_written_is_written_later(
    tmp_path: Path, info: Info, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_AGAIN_SECONDS", 0.01)
    tries = 0

    def fail_twice(self: Info, path: Path) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Info, "save", fail_twice)

    async def main() -> None:
        file, log, _ = keeper(tmp_path, info)
        await file.save()
        while tries < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.03)
        assert tries == 3
        assert [line["message"] for line in log.lines] == ["session.json: No space left on device"] * 2

    run(main())


@pytest.mark.parametrize("why", ["deleted", "damaged", "abandoned"])
def test_what_is_gone_or_damaged_is_not_written_again(
    why: str, tmp_path: Path, info: Info, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_AGAIN_SECONDS", 0.001)
    tries = 0

    def fail(self: Info, path: Path) -> None:
        nonlocal tries
        tries += 1
        raise FileNotFoundError(errno.ENOENT, "gone") if why == "deleted" else OSError(errno.EIO, "broken")

    monkeypatch.setattr(Info, "save", fail)

    async def main() -> None:
        file, _, _ = keeper(tmp_path, info)
        file.is_damaged = why == "damaged"
        await file.save()
        if why == "abandoned":
            await file.abandon()
        before = tries
        await asyncio.sleep(0.02)
        assert tries == before == {"deleted": 1, "damaged": 0, "abandoned": 2}[why]

    run(main())
