"""The session record: ours is sealed, the TypeScript daemon's is not, and anything else is refused."""

import json

import pytest

from p2pclaude.errors import ProtocolError, Refused, WireError
from p2pclaude.protocol.record import SessionRecord, decode_record
from p2pclaude.protocol.wire import seal

KEY, OTHER = bytes(32), bytes([1]) * 32
SESSIONS: list[dict[str, object]] = [{"sessionId": "a", "pid": 1}, {"sessionId": "b"}]


def clear(value: object) -> bytes:
    """Return a record as the TypeScript daemon stores it."""
    return json.dumps(value).encode()


@pytest.mark.parametrize("space", [b"", b" \n"])
def test_a_record_in_clear(space: bytes) -> None:
    value = space + clear({"sessions": SESSIONS, "updatedAt": 7, "omitted": 3})
    assert decode_record(5, value, KEY) == SessionRecord(5, SESSIONS, 7, 3)


def test_a_sealed_record() -> None:
    value = seal(KEY, {"sessions": SESSIONS, "updatedAt": "x"}).encode()
    assert decode_record(5, value, KEY) == SessionRecord(5, SESSIONS, "x", 0)
    with pytest.raises(Refused, match="wrong key"):
        decode_record(5, value, OTHER)


@pytest.mark.parametrize("omitted", [None, "3", [3]])
def test_what_is_no_number_omits_nothing(omitted: object) -> None:
    assert decode_record(1, clear({"sessions": [], "omitted": omitted}), KEY) == SessionRecord(1, [], None, 0)


def test_what_is_no_session_is_left_out() -> None:
    value = clear({"sessions": [SESSIONS[0], 7, None, "b", [], SESSIONS[1]]})
    assert decode_record(1, value, KEY).sessions == SESSIONS


@pytest.mark.parametrize("value", [{}, {"sessions": {}}, {"sessions": None}, {"updatedAt": 1}])
def test_another_object_is_no_record(value: object) -> None:
    with pytest.raises(ProtocolError, match="not a daemon's list"):
        decode_record(1, clear(value), KEY)


@pytest.mark.parametrize("value", [[], 7, "sessions", [{"sessions": []}]])
def test_a_sealed_text_that_is_no_object_is_no_record(value: object) -> None:
    with pytest.raises(ProtocolError, match="not a daemon's list"):
        decode_record(1, seal(KEY, value).encode(), KEY)


@pytest.mark.parametrize("value", [b"\xff\xfe", "\u00e9".encode(), b"{nonsense", b"{}}"])
def test_bytes_that_are_neither(value: bytes) -> None:
    with pytest.raises(WireError):
        decode_record(1, value, KEY)


def test_sealed_text_that_was_cut_is_refused() -> None:
    with pytest.raises(Refused):
        decode_record(1, seal(KEY, {}).encode()[:-8], KEY)
