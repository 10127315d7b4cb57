"""Sessions that ask for permission: from the child's request to the answer it gets, and everything that cuts in."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from kit.asking import BOTH, LS, Caller, kinds, on_table, replies
from kit.sessions import Place, outputs, prepare, read_all, read_results, read_until, run, wait_for_state

from p2pclaude.protocol.permissions import MAX_PENDING, MAX_REQUEST_BYTES
from p2pclaude.sessions import open_requests
from p2pclaude.sessions.journal import DiskFull, Journal
from p2pclaude.sessions.life import State
from p2pclaude.sessions.table import SessionTable


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Give a place to run sessions in."""
    return prepare(tmp_path, monkeypatch)


def test_a_request_is_listed_answered_and_journaled(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(LS)
        [request] = await call.pending()
        assert (request["sessionId"], request["toolName"], request["input"]) == ("s", "Bash", {"command": "ls"})
        assert request["directory"] == str(place.root)
        assert call.table.listing()[0]["state"] == "waiting"
        assert await call.answer(request, behavior="allow", updatedInput={"command": "pwd"}) == {"success": True}
        envelopes = await read_results(call.table, "s")
        assert replies(envelopes) == [{"behavior": "allow", "updatedInput": {"command": "pwd"}}]
        assert kinds(envelopes) == [("permission-request", None), ("permission-answer", "allow")]
        asked, answered = (e for e in envelopes if e["type"].startswith("permission-"))
        assert asked["requestId"] == answered["requestId"] == request["requestId"]
        assert (asked["data"]["tool_name"], answered["updatedInput"]) == ("Bash", {"command": "pwd"})
        assert await call("list-permissions") == {
            "requests": [],
            "version": (await call("list-permissions"))["version"],
        }
        await wait_for_state(call.table, "s", State.IDLE)
        old = await call("get-output", sessionId="s")
        assert {message["type"] for message in old["messages"]} == {"session-output"}

    on_table(place, work)
    start = next(entry["argv"] for entry in place.told() if "argv" in entry)
    assert start[-2:] == ["--permission-prompt-tool", "stdio"]
    [asked] = place.log.events("permission-asked")
    [answered] = place.log.events("permission-answered")
    assert (asked["session"], asked["tool"], asked["request"]) == ("s", "Bash", answered["request"])
    assert answered["behavior"] == "allow"


def test_a_session_without_ask_is_as_before(place: Place) -> None:
    async def work(call: Caller) -> None:
        answer = await call("spawn-session", sessionId="s", text=LS)
        assert "ask" not in answer
        envelopes = await read_results(call.table, "s")
        assert replies(envelopes) == ["error"]
        assert kinds(envelopes) == []
        for bad in ("yes", 1):
            assert "ask must be" in (await call("spawn-session", ask=bad))["errorMessage"]

    on_table(place, work)
    assert "--permission-prompt-tool" not in next(entry["argv"] for entry in place.told() if "argv" in entry)


def test_a_denial_with_its_reason(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(LS)
        [request] = await call.pending()
        await call.answer(request, behavior="deny", message="not here", interrupt=True)
        told = replies(await read_results(call.table, "s"))
        assert told == [{"behavior": "deny", "message": "not here", "interrupt": True}]

    on_table(place, work)


def test_the_first_answer_wins_and_a_retry_is_harmless(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(LS)
        [request] = await call.pending()
        answers = await asyncio.gather(
            call.answer(request, behavior="allow", answerId="one"),
            call.answer(request, behavior="deny", answerId="two"),
            call.answer(request, behavior="allow", answerId="one"),
        )
        late = {"success": False, "error": "Already answered: allow"}
        assert list(answers) == [{"success": True}, late, {"success": True}]
        envelopes = await read_results(call.table, "s")
        assert kinds(envelopes).count(("permission-answer", "allow")) == 1
        assert len([entry for entry in place.told() if "control" in entry]) == 1
        del request["sessionId"]  # it is found without
        assert (await call("answer-permission", **request, behavior="deny"))["error"] == "Already answered: allow"

    on_table(place, work)


def test_an_interrupt_cancels_and_ends_the_turn(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(BOTH)
        requests = await call.pending(2)
        await call("send-message", sessionId="s", text="next")
        assert await call("interrupt-session", sessionId="s") == {"success": True}
        await call.pending(0)
        for request in requests:
            late = await call.answer(request, behavior="allow")
            assert late == {"success": False, "error": "Already answered: cancelled"}
        envelopes = await read_results(call.table, "s", 2)
        assert [e["subtype"] for e in outputs(envelopes, "result")] == ["error_during_execution", "success"]
        assert kinds(envelopes)[2:] == [("permission-answer", "cancelled")] * 2
        await wait_for_state(call.table, "s", State.IDLE)
        assert await call("interrupt-session", sessionId="s") == {"success": True}  # nothing to end

    on_table(place, work)
    assert len(place.log.events("turn-interrupted")) == 2


@pytest.mark.parametrize("end", ["stop", "kill", "close"])
def test_the_end_of_the_process_cancels(place: Place, end: str) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(LS)
        [request] = await call.pending()
        session = call.table.find("s")
        if end == "stop":
            await call.table.stop("s")
        elif end == "close":
            await call.table.close()
        else:
            session.kill()
            await wait_for_state(call.table, "s", State.FAILED)
        assert not list(session.open_requests.pending)
        assert (await call("list-permissions"))["requests"] == []
        late = await call.answer(request, behavior="allow")
        assert late == {"success": False, "error": "Already answered: cancelled"}
        assert kinds(await read_all(call.table, "s"))[-1] == ("permission-answer", "cancelled")

    on_table(place, work)


def test_a_crash_of_the_daemon_cancels_and_a_retry_still_succeeds(place: Place) -> None:
    """What was journaled is taken up: the answered request, and the one that nobody can answer any more."""
    found: list[dict[str, Any]] = []

    async def crash() -> None:
        table = SessionTable(place.sessions, place.settings(), place.log)
        call = Caller(table)
        await call.spawn(BOTH)
        found.extend(await call.pending(2))
        assert await call.answer(found[0], behavior="allow", answerId="mine") == {"success": True}
        await table.find("s").file.save()
        table.find("s").journal, journal = None, table.find("s").journal  # nothing more is written
        table.kill()
        while table.find("s").is_live:
            await asyncio.sleep(0.01)
        assert journal is not None
        journal.close()

    run(crash())

    async def again(call: Caller) -> None:
        assert kinds(await read_all(call.table, "s"))[-2:] == [
            ("permission-answer", "allow"),
            ("permission-answer", "cancelled"),
        ]
        assert await call.answer(found[0], behavior="allow", answerId="mine") == {"success": True}
        assert (await call.answer(found[0], behavior="deny"))["error"] == "Already answered: allow"
        assert (await call.answer(found[1], behavior="allow"))["error"] == "Already answered: cancelled"
        await call("send-message", sessionId="s", text=LS)  # it comes back, and still asks
        [request] = await call.pending()
        await call.answer(request, behavior="allow")
        await read_results(call.table, "s", after=call.table.find("s").last_seq - 1)

    on_table(place, again)
    assert all(e["argv"][-1] == "stdio" for e in place.told() if "argv" in e)


def test_a_request_that_nobody_answers_is_denied(place: Place) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(BOTH)
        first, second = await call.pending(2)
        await call.answer(first, behavior="allow")
        timers = call.table.find("s").open_requests._timers
        assert list(timers) == [second["requestId"]]
        timer = timers[second["requestId"]]
        assert 0 < timer.when() - asyncio.get_running_loop().time() <= 60
        timer._run()  # as if nobody had answered for so long
        envelopes = await read_results(call.table, "s")
        assert [told["behavior"] for told in replies(envelopes)] == ["allow", "deny"]
        assert replies(envelopes)[1]["message"] == "nobody answered within 60 s"
        assert [e["by"] for e in envelopes if e.get("behavior") == "deny"] == ["timeout"]

    on_table(place, work, ask_timeout=60.0)


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        ({"type": "control_request", "request_id": "r", "request": {"subtype": "hook_callback"}}, "unknown control"),
        ({"type": "control_request", "request_id": "r"}, "unknown control"),
        (
            {"type": "control_request", "request_id": "r", "request": {"subtype": "can_use_tool", "tool_name": 5}},
            "without a tool",
        ),
    ],
)
def test_claude_does_not_hang_on_what_is_not_understood(place: Place, said: dict[str, Any], reply: str) -> None:
    async def work(call: Caller) -> None:
        await call.spawn("SAY:" + json.dumps(said))
        [result] = outputs(await read_results(call.table, "s"), "result")
        got = json.loads(result["result"])["response"]
        assert (got["subtype"], got["request_id"]) == ("error", "r")
        assert reply in got["error"]

    on_table(place, work)
    assert place.log.events("control-refused")[0]["session"] == "s"


@pytest.mark.parametrize(
    "said",
    [
        {"type": "control_request"},
        {"type": "control_request", "request_id": {}, "request": {"subtype": "can_use_tool"}},
        {"type": "control_cancel_request", "request_id": "never seen"},
        {"type": "control_cancel_request", "request_id": None},
        {"type": "control_response", "response": "x"},
    ],
)
def test_garbage_changes_nothing(place: Place, said: dict[str, Any]) -> None:
    async def work(call: Caller) -> None:
        # The fake waits for a line on stdin, which an interrupt brings.
        await call.spawn("SAY:" + json.dumps(said))
        await read_until(call.table, "s", lambda e: bool(e.get("data", {}).get("type") == said["type"]))
        await call("interrupt-session", sessionId="s")
        envelopes = await read_results(call.table, "s")
        assert json.loads(outputs(envelopes, "result")[0]["result"])["request"]["subtype"] == "interrupt"
        assert kinds(envelopes) == []

    on_table(place, work)


def test_too_many_and_too_large_requests_are_denied(place: Place) -> None:
    async def work(call: Caller) -> None:
        large = json.dumps({"content": "x" * MAX_REQUEST_BYTES})
        await call.spawn(f"ASK:Write {large}\n" + 'Bash {"n":1}\n' * (MAX_PENDING + 3))
        for request in await call.pending(MAX_PENDING):
            await call.answer(request, behavior="allow")
        told = replies_in_notes(place)
        while len(told) < MAX_PENDING + 4:
            await asyncio.sleep(0.02)
            told = replies_in_notes(place)
        messages = [one["message"] for one in told if one["behavior"] == "deny"]
        assert (
            messages
            == ["p2pclaude: the request is longer than 1 MiB"] + [f"p2pclaude: {MAX_PENDING} requests wait already"] * 3
        )

    on_table(place, work)


def replies_in_notes(place: Place) -> list[dict[str, Any]]:
    """Give what the fake was told, from its own notes: its result would be cut."""
    return [entry["control"]["response"]["response"] for entry in place.told() if "control" in entry]


def test_a_full_disk_holds_an_answer_up_and_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pclaude.sessions.session.RETRY_SECONDS", 0.02)
    append = Journal.append
    full = False

    def sometimes(journal: Journal, kind: str, fields: Any) -> int:
        if full and kind.startswith("permission-"):
            raise DiskFull("no space left")
        return append(journal, kind, fields)

    monkeypatch.setattr(Journal, "append", sometimes)

    async def work(call: Caller) -> None:
        nonlocal full
        await call.spawn(LS)
        [request] = await call.pending()
        full = True
        answering = asyncio.create_task(call.answer(request, behavior="allow", answerId="1"))
        await wait_for_state(call.table, "s", State.PAUSED)
        assert not [entry for entry in place.told() if "control" in entry]  # claude hears it when it is kept
        full = False
        assert await answering == {"success": True}
        envelopes = await read_results(call.table, "s")
        assert kinds(envelopes) == [("permission-request", None), ("permission-answer", "allow")]

    on_table(place, work)


def test_a_disk_that_is_still_full_at_the_end_is_made_up_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def never(journal: Journal, kind: str, fields: Any) -> int:
        if kind == "permission-answer":
            raise DiskFull("no space left")
        return append(journal, kind, fields)

    async def work(call: Caller) -> None:
        await call.spawn(LS)
        await call.pending()
        monkeypatch.setattr(Journal, "append", never)
        await call.table.stop("s")
        assert (await call("list-permissions"))["requests"] == []
        monkeypatch.setattr(Journal, "append", append)
        call.table.find("s").close_journal()
        assert kinds(await read_all(call.table, "s")) == [
            ("permission-request", None),
            ("permission-answer", "cancelled"),
        ]

    on_table(place, work)


def test_an_answer_to_a_claude_that_is_gone_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(call: Caller) -> None:
        await call.spawn(LS)
        [request] = await call.pending()
        abandoned = asyncio.Event()

        async def never(self: open_requests.OpenRequests) -> None:
            await abandoned.wait()

        monkeypatch.setattr(open_requests.OpenRequests, "abandon", never)
        session = call.table.find("s")
        assert session._child is not None
        process = session._child.process
        process.kill()
        while not process.has_exited:
            await asyncio.sleep(0.01)
        assert await call.answer(request, behavior="allow") == {"success": False, "error": "claude has ended"}
        abandoned.set()

    on_table(place, work)
