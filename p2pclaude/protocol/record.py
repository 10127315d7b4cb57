"""What the session record in the DHT holds (pure): `client.remote_sessions` reads it for `p2pclaude-ls --dht`.

The daemon stores `{sessions, updatedAt}` as a mutable record under its public key: sealed under the data key by ours,
in clear by the TypeScript one. Only the holder of the daemon's secret key can sign a record, so a readable one is its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pclaude.errors import ProtocolError, Refused, WireError
from p2pclaude.protocol.wire import SealError, load_json, unseal


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A daemon's sessions as it last stored them; `updated_at` as it wrote it, `omitted` how many did not fit."""

    seq: int
    sessions: Sequence[Mapping[str, Any]]
    updated_at: object
    omitted: int


def decode_record(seq: int, value: bytes, data_key: bytes) -> SessionRecord:
    """Open a record's value, sealed or in clear. Raises Refused (wrong key) or ProtocolError."""
    try:
        record = _open(value, data_key)
    except SealError as error:
        raise Refused("wrong key: the daemon's record does not open with it") from error
    sessions = record.get("sessions") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(sessions, list):
        raise ProtocolError("the record is not a daemon's list of sessions")
    omitted = record.get("omitted")
    return SessionRecord(
        seq,
        [session for session in sessions if isinstance(session, dict)],
        record.get("updatedAt"),
        omitted if isinstance(omitted, int) else 0,
    )


def _open(value: bytes, data_key: bytes) -> object:
    """Sealed text begins with the base64 of its version byte, which no JSON object does."""
    if value.lstrip().startswith(b"{"):
        return load_json(value)
    try:
        return unseal(data_key, value.decode("ascii"))
    except UnicodeDecodeError:
        raise WireError("the record is neither JSON nor sealed text") from None
