"""Permission requests as seen from afar: list, follow, answer.

Stands between `p2pclaude-approve` and `rpc_client`. A daemon that does not know the methods is told apart by its
answer, "Unknown method", which is a ProtocolError.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from p2pclaude.client.remote_sessions import ENDED_STATES, LONG_POLL_SECONDS, no_session
from p2pclaude.client.rpc_client import Client
from p2pclaude.errors import DataError, NoSession, P2PClaudeError, ProtocolError, Refused, Unavailable
from p2pclaude.protocol.wire import ALREADY_ANSWERED, REQUEST_NOT_FOUND, SESSION_NOT_FOUND

Request = Mapping[str, Any]
"""A pending request as the daemon shows it: `sessionId`, `requestId`, `toolName`, `input` and more."""


class AlreadyAnswered(P2PClaudeError):
    """Somebody else was faster; `behavior` is what came of it: allow, deny or cancelled."""

    def __init__(self, request_id: str, behavior: str) -> None:
        super().__init__(f"request {request_id} is already answered: {behavior}")
        self.behavior = behavior


class ClaudeEnded(Unavailable):
    """The claude that asked has ended: nobody needs the answer any more."""


@dataclass(frozen=True, slots=True)
class Pending:
    """The requests that wait; `omitted` did not fit the answer. `over`: the session has ended and asks no more."""

    requests: Sequence[Request]
    version: str
    omitted: int
    over: bool


async def list_requests(
    client: Client, session: str | None, *, version: str | None = None, wait: float = 0.0
) -> Pending:
    """Return what waits in a session, or in all; with `version`, wait so many seconds for another set than that one.

    A lost connection is opened again: listing changes nothing. Raises NoSession.
    """
    params: dict[str, object] = {} if session is None else {"sessionId": session}
    if version is not None:
        params |= {"version": version, "waitMs": round(wait * 1000)}
    result = await client.persist("list-permissions", params, patience=wait, early=True)
    requests, name = (result.get("requests"), result.get("version")) if isinstance(result, dict) else (None, None)
    if not isinstance(result, dict) or not isinstance(requests, list) or not isinstance(name, str):
        raise ProtocolError("the daemon's answer holds no requests")
    if session is not None and result.get("state") is None:
        raise no_session(session)
    omitted = result.get("omitted")
    return Pending(
        [request for request in requests if _is_request(request)],
        name,
        omitted if isinstance(omitted, int) else 0,
        session is not None and result.get("state") in ENDED_STATES,
    )


async def follow_requests(client: Client, session: str | None) -> AsyncGenerator[Pending, None]:
    """Yield the set of waiting requests now and after each change, over as many connections as it takes.

    Ends with the session, if one is named. Raises NoSession.
    """
    version: str | None = None
    while True:
        pending = await list_requests(client, session, version=version, wait=LONG_POLL_SECONDS)
        if pending.version != version:
            yield pending
        if pending.over:
            return
        version = pending.version


async def answer_request(client: Client, request_id: str, session: str | None, answer: Mapping[str, object]) -> None:
    """Answer a request (`behavior` and what goes with it), over as many connections as it takes.

    Raises AlreadyAnswered, NoSession, ClaudeEnded, or another P2PClaudeError that says why not.
    """
    # The id makes a repeated answer harmless, so that a lost connection leaves nobody in doubt.
    params: dict[str, object] = {**answer, "requestId": request_id, "answerId": str(uuid4())}
    if session is not None:
        params["sessionId"] = session
    result = await client.persist("answer-permission", params)
    if not isinstance(result, dict):
        raise ProtocolError("the daemon's answer is not an object")
    if result.get("success") is True:
        return
    error = str(result.get("error") or "no reason given")
    if error.startswith(ALREADY_ANSWERED):
        raise AlreadyAnswered(request_id, error.removeprefix(ALREADY_ANSWERED))
    if error == REQUEST_NOT_FOUND:
        raise no_request(request_id)
    if error == SESSION_NOT_FOUND and session is not None:
        raise no_session(session)
    kind = ClaudeEnded if "has ended" in error else DataError if "must be" in error else Refused
    raise kind(f"the answer was not taken: {error[0].lower()}{error[1:]}")


def no_request(request_id: str) -> NoSession:
    """Return the error for a request that the daemon does not know."""
    return NoSession(f"no such request: {request_id}", hint="p2pclaude-approve without options lists them")


def _is_request(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(name), str) for name in ("sessionId", "requestId", "toolName"))
