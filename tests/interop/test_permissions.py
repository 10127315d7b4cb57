"""Permissions with the real `claude` before a stub of its API: asked for, decided by filters and people, cancelled."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import TEST_SECONDS
from interop.daemons import Daemon, start_daemon
from interop.harness import Peer, Tools, peers_on
from kit import stub_api

WAIT_SECONDS = float(os.environ.get("P2PCLAUDE_LATE_SECONDS", "5"))
"""How long an answer is late; tests/soak/late sets it to 200."""


@pytest.fixture(scope="module")
def daemon(testnet: Peer, claude: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Run a daemon whose sessions ask for whatever they do."""
    with stub_api.stub_api() as server, peers_on(testnet.ready["bootstrap"]) as group:
        env = stub_api.environment(server.url, "", os.environ["PATH"])
        del env["HOME"]
        options = ("--permission-mode", "default")
        yield start_daemon(group, tmp_path_factory.mktemp("asking"), claude, *options, env=env)


class Asking:
    """Sessions that ask, and who answers."""

    def __init__(self, tools: Tools, daemon: Daemon) -> None:
        self.tools = tools
        self.url = str(daemon.data / "pairing.url")
        self.root = daemon.root
        self._daemon = daemon
        self._started = ExitStack()

    def close(self) -> None:
        """End who still follows."""
        self._started.close()

    def start(self, text: str) -> str:
        """Start a session that asks, and give its id."""
        return self.tools.succeed("send", "--ask", self.url, text)

    def approve(self, *words: str) -> Peer:
        """Start an approver."""
        return self._started.enter_context(self.tools.start("approve", *words))

    def clients(self) -> int:
        """Return how many connections have asked the daemon for something so far."""
        return sum('"connection-proven"' in line for line in self._daemon.peer.said)

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        """Wait until something is the case."""
        deadline = time.monotonic() + 50
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def requests(self, session: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so many requests of a session wait, and give them."""
        with self.tools.start("approve", "-f", self.url, session) as follower:
            return [json.loads(follower.line()) for _ in range(count)]

    def envelopes(self, session: str) -> list[dict[str, Any]]:
        """Wait for a turn's result, and give everything up to it."""
        with self.tools.start("tail", "-f", "--meta", self.url, session) as follower:
            found: list[dict[str, Any]] = []
            while not found or found[-1].get("data", {}).get("type") != "result":
                found.append(json.loads(follower.line()))
        return found

    def finish(self, session: str) -> tuple[list[str], dict[str, Any]]:
        """Wait for a turn's result; give what the tools said to Claude, and the result."""
        outputs = [e["data"] for e in self.envelopes(session) if e["type"] == "session-output"]
        said = [
            str(block.get("content"))
            for output in outputs
            if output["type"] == "user"
            for block in output["message"]["content"]
            if block.get("type") == "tool_result"
        ]
        return said, outputs[-1]

    def outcomes(self, session: str) -> list[str]:
        """Give what became of a session's requests, from its journal."""
        lines = self.tools.succeed("tail", "--meta", self.url, session).splitlines()
        return [e["behavior"] for e in map(json.loads, lines) if e["type"] == "permission-answer"]

    def turns(self, session: str) -> int:
        """Return how many messages of a session Claude has been handed."""
        lines = self.tools.succeed("tail", "--meta", self.url, session).splitlines()
        return sum(json.loads(line)["type"] == "turn" for line in lines)


@pytest.fixture
def asking(tools: Tools, daemon: Daemon) -> Iterator[Asking]:
    """Give the sessions that ask."""
    one = Asking(tools, daemon)
    yield one
    one.close()


def test_a_filter_rewrites_the_input_and_the_rewritten_input_runs(asking: Asking) -> None:
    filter_ = 'jq ".input | .command = \\"echo rewritten >changed\\""'
    approver = asking.approve("-f", "--filter", filter_, asking.url)
    session = asking.start("TOOL:touch original")
    decided = json.loads(approver.line())
    assert (decided["sessionId"], decided["behavior"]) == (session, "allow")
    _, result = asking.finish(session)
    assert (result["is_error"], result["permission_denials"]) == (False, [])
    assert (asking.root / "changed").read_text() == "rewritten\n"
    assert not (asking.root / "original").exists()
    assert asking.outcomes(session) == ["allow"]


def test_denied_with_a_reason(asking: Asking) -> None:
    session = asking.start("TOOL:touch denied")
    [request] = asking.requests(session)
    assert (request["toolName"], request["input"]["command"]) == ("Bash", "touch denied")
    assert request["suggestions"] and request["directory"] == str(asking.root)
    assert request["requestId"] in asking.tools.succeed("approve", asking.url)
    asking.tools.succeed("approve", "--deny", request["requestId"], "-m", "not today", asking.url)
    said, result = asking.finish(session)
    assert said == ["not today"]
    assert result["permission_denials"][0]["tool_name"] == "Bash"
    assert not (asking.root / "denied").exists()


def test_left_to_a_second_approver(asking: Asking) -> None:
    seen = asking.root / "seen"
    first = asking.approve("-v", "-f", "--filter", f"cat >>{seen}; exit 75", asking.url)
    session = asking.start("TOOL:touch second")
    [request] = asking.requests(session)
    asking.wait_for(lambda: seen.exists() and seen.read_text().endswith("\n"))
    decided = asking.tools.succeed("approve", "--filter", "exit 0", asking.url, session)
    assert json.loads(decided)["requestId"] == request["requestId"]
    _, result = asking.finish(session)
    assert not result["is_error"]
    assert (asking.root / "second").exists()
    assert [json.loads(line)["requestId"] for line in seen.read_text().splitlines()] == [request["requestId"]]
    assert first.said == []


def test_two_race_and_one_wins(asking: Asking) -> None:
    before = asking.clients()
    racers = [asking.approve("-f", "--filter", f"exit {status}", asking.url) for status in (0, 1)]
    asking.wait_for(lambda: asking.clients() - before >= len(racers))
    session = asking.start("TOOL:touch race")
    said, _ = asking.finish(session)
    [outcome] = asking.outcomes(session)
    assert (asking.root / "race").exists() == (outcome == "allow")
    assert (said == ["Denied"]) == (outcome == "deny")
    asking.tools.succeed("stop", asking.url, session)
    asking.wait_for(lambda: any(racer.said for racer in racers))
    told = [json.loads(line) for racer in racers for line in racer.said]
    assert [line["behavior"] for line in told] == [outcome]


def test_answered_late(asking: Asking) -> None:
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS + TEST_SECONDS)  # the usual limit is shorter than this may take
    session = asking.start("TOOL:touch late")
    [request] = asking.requests(session)
    time.sleep(WAIT_SECONDS)
    assert f"{session}\twaiting" in asking.tools.succeed("ls", asking.url)
    asking.tools.succeed("approve", "--allow", request["requestId"], asking.url)
    _, result = asking.finish(session)
    assert not result["is_error"]
    assert (asking.root / "late").exists()
    again = asking.tools("approve", "--allow", request["requestId"], asking.url)
    assert again.status == 1, again


def test_cancelled_by_an_interrupt(asking: Asking) -> None:
    session = asking.start("FETCH:http://127.0.0.1:9/a http://127.0.0.2:9/b")
    requests = asking.requests(session, 2)
    assert asking.tools.succeed("stop", "--turn", asking.url, session) == session
    _, result = asking.finish(session)
    assert (result["subtype"], result["is_error"]) == ("error_during_execution", True)
    assert asking.outcomes(session) == ["cancelled"] * 2
    for request in requests:
        late = asking.tools("approve", "--allow", request["requestId"], asking.url)
        assert late.status == 1, late
    assert asking.tools.succeed("send", "-w", "-s", session, asking.url, "and now")  # the session goes on


def test_a_denial_that_interrupts_cancels_the_others(asking: Asking) -> None:
    session = asking.start("FETCH:http://127.0.0.1:9/c http://127.0.0.2:9/d")
    first, _ = asking.requests(session, 2)
    reply = '{"behavior": "deny", "message": "stop it", "interrupt": true}'
    asking.tools.succeed("approve", "--answer", first["requestId"], asking.url, text=reply)
    _, result = asking.finish(session)
    assert result["subtype"] == "error_during_execution"
    assert asking.outcomes(session) == ["deny", "cancelled"]


def test_an_interrupt_ends_a_running_command(asking: Asking) -> None:
    session = asking.start("TOOL:touch running; sleep 600")
    [request] = asking.requests(session)
    asking.tools.succeed("approve", "--allow", request["requestId"], asking.url)
    asking.wait_for((asking.root / "running").exists)
    asking.tools.succeed("stop", "--turn", asking.url, session)
    _, result = asking.finish(session)
    assert result["is_error"]


def test_a_question_is_answered(asking: Asking) -> None:
    session = asking.start("QUESTION:Which colour?")
    [request] = asking.requests(session)
    assert request["toolName"] == "AskUserQuestion"
    answer = '{"Which colour?": "blue"}'
    asking.tools.succeed("approve", "--answer", request["requestId"], asking.url, text=answer)
    said, _ = asking.finish(session)
    assert '"Which colour?"="blue"' in said[0]


def test_a_suggestion_given_back_spares_the_next_request(asking: Asking) -> None:
    session = asking.start("WRITE:" + str(asking.root / "first.txt"))
    [request] = asking.requests(session)
    mode = next(one for one in request["suggestions"] if one["type"] == "setMode")
    reply = json.dumps({"updatedPermissions": [mode]})
    asking.tools.succeed("approve", "--answer", request["requestId"], asking.url, text=reply)
    asking.finish(session)
    text = "WRITE:" + str(asking.root / "second.txt")
    asking.tools.succeed("send", "-w", "-s", session, asking.url, text)
    assert (asking.root / "second.txt").exists()
    assert asking.outcomes(session) == ["allow"]


def test_who_waits_is_told_what_was_denied(asking: Asking) -> None:
    done = asking.tools("send", "-w", asking.url, "TOOL:touch unasked")
    assert (done.status, done.err) == (0, "p2pclaude-send: hint: denied: Bash\n"), done
    session = asking.start("hello")
    asking.finish(session)
    with asking.tools.start("send", "-w", "-s", session, asking.url, f"WRITE:{asking.root / 'refused'}") as waiting:
        [request] = asking.requests(session)
        asking.tools.succeed("approve", "--deny", request["requestId"], asking.url)
        assert waiting.finish() == 0, waiting.transcript()
        assert "p2pclaude-send: hint: denied: Write\n" in waiting.transcript()
    assert not (asking.root / "refused").exists()


@pytest.mark.parametrize(("busy", "answer"), [("text", "echo: quick"), ("tool", "tool said: ")])
def test_an_urgent_message_ends_a_turn_and_each_gets_its_own_answer(busy: str, answer: str, asking: Asking) -> None:
    """A text is cut at once, a tool that runs ends first; what the stub says then shows that it has heard of both."""
    session = asking.start("hello")
    asking.finish(session)
    tool = f"TOOL:touch busy; until test -e {session}; do sleep 0.1; done; sleep 3"
    text = tool if busy == "tool" else "SLOW:100"
    with asking.tools.start("send", "-w", "-s", session, asking.url, text) as waiting, ThreadPoolExecutor(1) as thread:
        if busy == "tool":
            [request] = asking.requests(session)
            asking.tools.succeed("approve", "--allow", request["requestId"], asking.url)
            asking.wait_for((asking.root / "busy").exists)
        else:
            asking.wait_for(lambda: f"{session}\trunning" in asking.tools.succeed("ls", asking.url))
            time.sleep(2 * stub_api.SLOW_SECONDS)
        began = time.monotonic()
        urgent = thread.submit(asking.tools.succeed, "send", "-w", "--now", "-s", session, asking.url, "quick")
        asking.wait_for(lambda: asking.turns(session) == 3)
        (asking.root / session).touch()
        assert urgent.result().startswith(answer)
        assert time.monotonic() - began < 35  # of the 50 s that the long text would take
        assert waiting.finish() == 1, waiting.transcript()
        assert "the turn was cut short" in waiting.transcript()
        assert answer not in "".join(waiting.said)


def test_a_session_that_does_not_ask_is_denied_as_ever(asking: Asking) -> None:
    session = asking.tools.succeed("send", asking.url, "TOOL:touch unasked")
    _, result = asking.finish(session)
    assert result["permission_denials"][0]["tool_name"] == "Bash"
    assert asking.outcomes(session) == []
    assert not (asking.root / "unasked").exists()
