"""p2pclaude-approve as a user types it, before a real daemon: listing, answering, filters, and what goes wrong."""

import json
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.harness import Process, Shell, command, daemon, environment, eventually
from cli.test_transcripts import on_terminal
from kit.free_ports import free_port


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Give a shell before a daemon of its own, so that nobody else's requests are in its list."""
    with daemon(tmp_path_factory.mktemp("approve")) as ready:
        yield ready


def ask(shell: Shell, text: str = "ASK:ls") -> dict[str, Any]:
    """Start a session that asks, and give its request."""
    return request_of(shell, ask_only(shell, text))


def ask_only(shell: Shell, text: str = "ASK:ls") -> str:
    """Start a session that asks, and give its id: a filter may decide at any time."""
    [session] = shell.succeed("send", "--ask", "@", text)
    return session


def request_of(shell: Shell, session: str) -> dict[str, Any]:
    """Give the one request of a session as soon as it is there."""
    return first_line(shell.start("approve", "-f", "@", session), lambda request: True)


def answer_of(shell: Shell, session: str) -> str:
    """Wait for the result of a session's turn, and give it."""
    result = first_line(shell.start("tail", "-f", "@", session), lambda one: bool(one["type"] == "result"))
    return str(result.get("result", result["subtype"]))


def first_line(process: Process, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Read what a follower prints up to the object that is wanted, and end it."""
    assert process.stdout
    try:
        return dict(next(one for one in map(json.loads, process.stdout) if wanted(one)))
    finally:
        process.terminate()
        assert process.communicate(timeout=50)[1] == b""


def test_what_waits_is_printed(shell: Shell) -> None:
    assert shell.succeed("approve", "@") == []
    one, two = ask(shell), ask(shell, "ASK:pwd")
    listed = [json.loads(line) for line in shell.succeed("approve", "@")]
    assert listed == [one, two]
    assert (one["toolName"], one["input"], one["directory"]) == ("Bash", {"command": "ls"}, str(shell.work))
    assert any(line.startswith(f"{one['sessionId']}\twaiting\t") for line in shell.succeed("ls", "@"))
    shell.succeed("stop", "--all", "@")
    assert shell.succeed("approve", "@") == []


def test_allow_and_deny(shell: Shell) -> None:
    request = ask(shell)
    assert shell.succeed("approve", "--allow", request["requestId"], "@") == [request["requestId"]]
    assert answer_of(shell, request["sessionId"]) == 'allow: {"command": "ls"}'
    request = ask(shell)
    words = ["--deny", request["requestId"], "-m", "not on Fridays"]
    assert shell.succeed("approve", *words, "@", request["sessionId"]) == [request["requestId"]]
    assert answer_of(shell, request["sessionId"]) == "deny: not on Fridays"
    request = ask(shell)
    shell.succeed("approve", "--deny", request["requestId"], "@")
    assert answer_of(shell, request["sessionId"]) == "deny: Denied"


def test_a_whole_reply_and_answers_come_from_stdin(shell: Shell) -> None:
    request = ask(shell)
    reply = json.dumps({"updatedInput": {"command": "grüß"}})
    assert shell.succeed("approve", "--answer", request["requestId"], "@", text=reply) == [request["requestId"]]
    assert answer_of(shell, request["sessionId"]) == 'allow: {"command": "gr\\u00fc\\u00df"}'
    request = ask(shell)
    reply = '{"behavior": "deny", "message": "no"}\n'
    shell.succeed("approve", "--answer", request["requestId"], "@", text=reply)
    assert answer_of(shell, request["sessionId"]) == "deny: no"
    request = ask(shell, "QUESTION")
    assert request["toolName"] == "AskUserQuestion"
    err = shell.fail(65, "approve", "--answer", request["requestId"], "@", text='{"Which?": "blue"}')
    assert "a question that was asked" in err
    shell.succeed("approve", "--answer", request["requestId"], "@", text='{"Which colour?": "blue"}')
    assert json.loads(answer_of(shell, request["sessionId"]).removeprefix("allow: "))["answers"] == {
        "Which colour?": "blue"
    }


def test_replies_that_are_none(shell: Shell) -> None:
    request = ask(shell)
    for text, message in {
        "": "is not a JSON object",
        "[1]": "is not a JSON object",
        '{"behavior": "allow", "and": 1}': "a reply has no field and",
        '{"behavior": "perhaps"}': "behavior must be allow or deny",
        '{"updatedInput": "ls"}': "updatedInput must be an object",
        '{"Which colour?": "blue"}': "bash must be answered with behavior",
    }.items():
        assert message in shell.fail(65, "approve", "--answer", request["requestId"], "@", text=text)
    assert request_of(shell, request["sessionId"]) == request  # it waits on
    shell.succeed("stop", "@", request["sessionId"])


def test_who_comes_late_is_told(shell: Shell) -> None:
    request = ask(shell)
    request_id = request["requestId"]
    shell.succeed("approve", "--allow", request_id, "@")
    for words in (["--deny", request_id], ["--allow", request_id]):
        err = shell.fail(1, "approve", *words, "@")
        assert err == f"p2pclaude-approve: error: request {request_id} is already answered: allow\n"
    err = shell.fail(1, "approve", "--answer", request_id, "@", text='{"behavior": "deny"}')
    assert "already answered: allow" in err
    answer_of(shell, request["sessionId"])
    request = ask(shell)
    shell.succeed("stop", "@", request["sessionId"])
    err = shell.fail(1, "approve", "--allow", request["requestId"], "@")
    assert err.endswith("is already answered: cancelled\n")


def test_unknown_sessions_and_requests(shell: Shell) -> None:
    for words in (["@", "nope"], ["-f", "@", "nope"], ["--filter", "true", "@", "nope"], ["--allow", "r", "@", "nope"]):
        assert "no such session: nope" in shell.fail(66, "approve", *words)
    assert "no such request: nope" in shell.fail(66, "approve", "--allow", "nope", "@")


def test_ending_the_turn_and_not_the_session(shell: Shell) -> None:
    request = ask(shell)
    session = request["sessionId"]
    assert shell.succeed("stop", "--turn", "@", session) == [session]
    eventually(lambda: shell.succeed("approve", "@", session) == [])
    assert shell.succeed("send", "-w", "-s", session, "@", "still there") == ["echo: still there"]
    assert shell.succeed("stop", "--turn", "@", session) == [session]  # there is none
    result = shell.run("stop", "--turn", "@", "nope", session)
    assert (result.status, result.lines()) == (66, [session])
    assert shell.succeed("send", "-w", "-s", session, "@", "and again") == ["echo: and again"]


def test_an_interrupted_turn_is_an_error_for_who_waits(shell: Shell) -> None:
    waiting = shell.start("send", "-w", "--ask", "@", "ASK:sleep 1000")
    eventually(lambda: bool(shell.succeed("approve", "@")))
    shell.succeed("stop", "--turn", "--all", "@")
    out, err = waiting.communicate(timeout=50)
    assert (waiting.returncode, out) == (1, b"")
    assert b"error_during_execution" in err
    shell.succeed("stop", "--all", "@")


def test_who_waits_on_a_terminal_is_told_once(shell: Shell) -> None:
    shown = on_terminal(shell, "send", "-w", "--ask", "@", "ASK:ls", typed=(b"hint: ", b"\x03"))
    [session] = [line.split("\t")[0] for line in shell.succeed("ls", "@") if "\twaiting\t" in line]
    assert f"hint: the session waits for permission, p2pclaude-approve URL {session} shows for what" in shown
    assert shown.count("hint:") == 1
    shell.succeed("stop", "@", session)


# following


def lines_of(process: Process, count: int) -> list[dict[str, Any]]:
    """Read so many lines of a follower."""
    assert process.stdout
    return [json.loads(process.stdout.readline()) for _ in range(count)]


def finish(process: Process, number: signal.Signals = signal.SIGTERM) -> str:
    """End a follower; give the rest of what it said on stderr."""
    process.send_signal(number)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out) == (-number, b"")
    return err.decode()


def test_following_prints_each_request_once(shell: Shell) -> None:
    first = ask(shell)
    followers = [shell.start("approve", "-f", "@") for _ in range(2)]
    assert [lines_of(follower, 1) for follower in followers] == [[first], [first]]
    second = ask(shell, "ASK:pwd")
    shell.succeed("approve", "--allow", first["requestId"], "@")
    third = ask(shell, "ASK:id")
    for follower in followers:
        assert lines_of(follower, 2) == [second, third]
        assert finish(follower) == ""
    shell.succeed("stop", "--all", "@")


def test_following_one_session_ends_with_it(shell: Shell) -> None:
    request, other = ask(shell), ask(shell)
    follower = shell.start("approve", "-f", "@", request["sessionId"])
    assert lines_of(follower, 1) == [request]
    shell.succeed("stop", "@", request["sessionId"])
    assert follower.communicate(timeout=50) == (b"", b"")
    assert follower.returncode == 0
    shell.succeed("stop", "@", other["sessionId"])


def test_a_closed_pipe_ends_it_quietly(shell: Shell) -> None:
    line = f"{shlex.join(command('approve', '-f', shell.url))} | sleep 1; echo ${{PIPESTATUS[@]}}"
    env = environment(shell.work / "home")
    done = subprocess.run(["bash", "-c", line], cwd=shell.work, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0 0\n", "")


# filters


def test_a_filter_decides(shell: Shell) -> None:
    """Allows, denies with a reason, and rewrites the input: three requests, one script."""
    script = shell.work / "policy"
    script.write_text(
        """#!/bin/sh
        command=$(jq -r .input.command)
        case $command in
        ls) exit 0 ;;
        rm*) echo "no $command for $P2P_CLAUDE_TOOL in $P2P_CLAUDE_DIRECTORY"; exit 1 ;;
        *) printf '{"command": "echo %s"}' "$command" ;;
        esac
        """
    )
    script.chmod(0o755)
    deciding = shell.start("approve", "-f", "--filter", "./policy", "@")
    requests = [ask_only(shell, text) for text in ("ASK:ls", "ASK:rm -r /", "ASK:pwd")]
    decided = {line["requestId"]: line for line in lines_of(deciding, 3)}
    assert finish(deciding) == ""
    answers = [answer_of(shell, session) for session in requests]
    assert answers == [
        'allow: {"command": "ls"}',
        f"deny: no rm -r / for Bash in {shell.work}",
        'allow: {"command": "echo pwd"}',
    ]
    by_session = {line["sessionId"]: line for line in decided.values()}
    assert [by_session[session]["behavior"] for session in requests] == ["allow", "deny", "allow"]
    assert by_session[requests[2]]["updatedInput"] == {"command": "echo pwd"}
    assert set(by_session[requests[0]]) == {"sessionId", "requestId", "toolName", "behavior"}


def test_without_follow_a_filter_decides_on_what_waits(shell: Shell) -> None:
    requests = [ask(shell), ask(shell, "ASK:pwd")]
    decided = [json.loads(line) for line in shell.succeed("approve", "--filter", "exit 1", "@")]
    assert {line["requestId"] for line in decided} == {request["requestId"] for request in requests}
    assert [answer_of(shell, request["sessionId"]) for request in requests] == ["deny: Denied"] * 2


def test_a_filter_that_does_not_decide_leaves_the_request_with_a_word(shell: Shell) -> None:
    request = ask(shell)
    id_ = request["requestId"]
    for filter_, seconds, words in (
        ("exit 75", "50", ""),
        ("exit 2", "50", f"the filter exited with status 2, request {id_} is left to others"),
        ("sleep 60", "0.5", f"the filter was not done within 0.5 s, request {id_} is left to others"),
    ):
        result = shell.run("approve", "--filter", filter_, "--filter-timeout", seconds, "@", request["sessionId"])
        said = f"p2pclaude-approve: error: {words}\n" if words else ""
        assert (result.status, result.out, result.err) == (0, "", said)
    assert request_of(shell, request["sessionId"]) == request
    shell.succeed("stop", "@", request["sessionId"])


def test_filters_chain(shell: Shell) -> None:
    """What the first leaves the second decides; each looks at a request once."""
    seen = shell.work / "seen"
    path = shlex.quote(str(seen))
    first = shell.start("approve", "-f", "--filter", f"cat >>{path}; exit 75", "@")
    second = shell.start("approve", "-f", "--filter", f"until grep -qs . {path}; do sleep 0.1; done; exit 0", "@")
    session = ask_only(shell, "ASK:ls")
    [decided] = lines_of(second, 1)
    assert (decided["sessionId"], decided["behavior"]) == (session, "allow")
    assert [finish(process) for process in (first, second)] == ["", ""]
    assert answer_of(shell, session) == 'allow: {"command": "ls"}'
    assert [json.loads(line)["requestId"] for line in seen.read_text().splitlines()] == [decided["requestId"]]


def clients_of(shell: Shell) -> int:
    """Return how many connections have asked the daemon for something so far."""
    return (shell.work / "daemon.log").read_bytes().count(b'"connection-proven"')


def test_two_approvers_race_and_one_wins(shell: Shell) -> None:
    before, said = clients_of(shell), shell.work / "said"
    with said.open("ab") as out:
        racers = [
            shell.start("approve", "-v", "-f", "--filter", f"exit {status}", "@", stdout=out) for status in (0, 1, 0, 1)
        ]
    eventually(lambda: clients_of(shell) - before >= len(racers))
    sessions = [ask_only(shell, "ASK:ls") for _ in range(3)]
    answers = [answer_of(shell, session) for session in sessions]
    eventually(lambda: said.read_bytes().count(b"\n") >= len(sessions))  # who has won says so when it has heard of it
    for racer in racers:
        racer.terminate()
        assert b"error" not in racer.communicate(timeout=50)[1]
    decided = [json.loads(line) for line in said.read_text().splitlines()]
    assert sorted(line["sessionId"] for line in decided) == sorted(sessions)
    for session, answer in zip(sessions, answers, strict=True):
        [line] = [line for line in decided if line["sessionId"] == session]
        assert answer.startswith(line["behavior"])


def test_a_filter_is_ended_when_its_request_is_gone(shell: Shell) -> None:
    pid = shell.work / "pid"
    deciding = shell.start("approve", "-v", "-f", "--filter", f"echo $$ >{shlex.quote(str(pid))}; sleep 600", "@")
    session = ask_only(shell, "ASK:ls")
    eventually(lambda: pid.exists() and bool(pid.read_text().strip()))
    request = request_of(shell, session)
    shell.succeed("approve", "--deny", request["requestId"], "@")
    eventually(lambda: not is_running(int(pid.read_text())))
    assert "error" not in finish(deciding)
    answer_of(shell, request["sessionId"])


def is_running(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_filters_too(shell: Shell, number: signal.Signals) -> None:
    pid = shell.work / f"pid-{number}"
    deciding = shell.start("approve", "-f", "--filter", f"echo $$ >{shlex.quote(str(pid))}; sleep 600", "@")
    request = ask(shell)
    eventually(lambda: pid.exists() and bool(pid.read_text().strip()))
    assert finish(deciding, number) == ""
    eventually(lambda: not is_running(int(pid.read_text())))
    assert request_of(shell, request["sessionId"]) == request
    shell.succeed("stop", "@", request["sessionId"])


def test_an_approver_that_dies_in_mid_answer_leaves_the_request(shell: Shell) -> None:
    pid, over = shell.work / "dying", shell.work / "over"
    filter_ = f"echo $$ >{shlex.quote(str(pid))}; until test -e {shlex.quote(str(over))}; do sleep 0.1; done; exit 0"
    deciding = shell.start("approve", "-f", "--filter", filter_, "@")
    request = ask(shell)
    eventually(lambda: pid.exists() and bool(pid.read_text().strip()))
    deciding.kill()
    deciding.wait()
    over.touch()  # its filter ends and allows, and nobody hears of it
    eventually(lambda: not is_running(int(pid.read_text())))
    deciding.communicate()
    assert request_of(shell, request["sessionId"]) == request
    shell.succeed("approve", "--filter", "exit 0", "@")
    assert answer_of(shell, request["sessionId"]) == 'allow: {"command": "ls"}'


def test_following_survives_a_restart_of_the_daemon(tmp_path: Path) -> None:
    port = free_port()
    with daemon(tmp_path / "work", port=port) as first:
        follower = first.start("approve", "-f", "@")
        one = ask(first)
        assert lines_of(follower, 1) == [one]
    with daemon(tmp_path / "work", port=port) as again:
        two = ask(again)
        assert lines_of(follower, 1) == [two]
        assert finish(follower) == ""
        assert "cancelled" in again.fail(1, "approve", "--allow", one["requestId"], "@", one["sessionId"])


def test_what_nobody_answers_in_time(tmp_path: Path) -> None:
    with daemon(tmp_path / "work", "--ask-timeout", "1") as own:
        result = own.run("send", "-w", "--ask", "@", "ASK:ls")
        assert result.lines() == ["deny: nobody answered within 1 s"]
