"""What the tests of permission requests share: a client's calls to a table, and what the fake claude asks for."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from kit.sessions import Place, outputs, run
from p2pclaude.daemon.methods import Methods
from p2pclaude.sessions.table import SessionTable

LS = 'ASK:Bash {"command":"ls"}'
BOTH = 'ASK:Bash {"command":"ls"}\nWrite {"file_path":"/a"}'


class Caller:
    """Calls the methods as a client does."""

    def __init__(self, table: SessionTable) -> None:
        self.table = table
        self._methods = Methods(table)

    async def __call__(self, method: str, **params: Any) -> Any:
        """Make one call."""
        return json.loads(await self._methods.call(method, params))

    async def spawn(self, text: str, session: str = "s") -> None:
        """Start a session that asks."""
        answer = await self("spawn-session", sessionId=session, text=text, ask=True)
        assert (answer["type"], answer["ask"]) == ("success", True)

    async def pending(self, count: int = 1, **params: Any) -> list[dict[str, Any]]:
        """Wait until so many requests are pending, and give them; the last ones may not fit."""
        version = ""
        while True:
            found = await self("list-permissions", version=version, waitMs=20_000, **params)
            if len(found["requests"]) + found.get("omitted", 0) == count:
                return list(found["requests"])
            version = found["version"]

    async def answer(self, request: dict[str, Any], **params: Any) -> Any:
        """Answer a request."""
        ids = {"sessionId": request["sessionId"], "requestId": request["requestId"]}
        return await self("answer-permission", **ids | params)


def on_table(place: Place, work: Callable[[Caller], Awaitable[None]], **settings: Any) -> None:
    """Run a test's coroutine with a table."""

    async def main() -> None:
        async with place.table(**settings) as table:
            await work(Caller(table))

    run(main())


def replies(envelopes: list[dict[str, Any]]) -> Any:
    """Give what the fake claude was told in answer to its requests."""
    return json.loads(outputs(envelopes, "result")[-1]["result"])


def kinds(envelopes: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """Give the permission envelopes: type and behavior."""
    return [(e["type"], e.get("behavior")) for e in envelopes if e["type"].startswith("permission-")]
