"""The commands as a user types them, before a real daemon: stdout, stderr, exit status, and silence."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli.harness import Shell, check_words, command, daemon, environment, eventually

from p2pclaude.protocol.pairing import Pairing, format_url, parse_url

UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


def shell_line(shell: Shell, line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which the tools are functions; `$U` is the pairing URL."""
    functions = "".join(
        f'{tool}() {{ {shlex.join(command(tool))} "$@"; }}\n' for tool in ("send", "tail", "ls", "ping")
    )
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{functions}{line}"],
        cwd=shell.work,
        env=environment(shell.work / "home", {"U": shell.url, **env}),
        capture_output=True,
        text=True,
        timeout=60,
    )


# ping


def test_ping_prints_a_line_a_reply(shell: Shell) -> None:
    lines = shell.succeed("ping", "-c", "2", "@")
    assert len(lines) == 2
    assert all(re.fullmatch(r"\d+\.\d ms direct 127\.0\.0\.1:\d+", line) for line in lines), lines


def test_diagnostics_go_to_stderr(shell: Shell) -> None:
    result = shell.run("ping", "-v", "@")
    assert (result.status, len(result.lines())) == (0, 1)
    assert re.search(r"^p2pclaude-ping: connected to 127\.0\.0\.1:\d+ \(direct\) in \d+ ms$", result.err, re.M)
    assert "p2p-claude://" not in result.err


def test_the_url_may_stand_in_a_file_or_come_from_the_data_directory(shell: Shell) -> None:
    assert len(shell.succeed("ping", "home/.p2p-claude/pairing.url")) == 1


# send


def test_send_prints_the_sessions_id(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hello", "world")
    assert re.fullmatch(UUID, session)
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    assert json.loads(shell.succeed("tail", "@", session)[2])["result"] == "echo: hello world"


def test_send_names_denied_tools(shell: Shell) -> None:
    result = shell.run("send", "-w", "@", "DENIED")
    assert (result.status, result.out) == (0, "echo: DENIED\n")
    assert result.err == "p2pclaude-send: hint: denied: Bash, Write\n"


def test_send_says_when_a_turn_was_cut_short(shell: Shell) -> None:
    result = shell.run("send", "-w", "@", "ABORTED")
    assert (result.status, result.out) == (1, "echo: ABORTED\n")
    assert result.err == "p2pclaude-send: error: the turn was cut short: aborted_streaming\n"


def test_send_prints_the_whole_result(shell: Shell) -> None:
    [line] = shell.succeed("send", "-w", "--json", "@", "hello")
    assert json.loads(line)["result"] == "echo: hello"
    result = shell.run("send", "-w", "--json", "@", "FAIL")
    assert (result.status, json.loads(result.out)["is_error"]) == (1, True)
    assert "--json is for an answer" in shell.fail(64, "send", "--json", "@", "x")


def test_send_now_ends_a_turn(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hello")
    assert shell.succeed("send", "-w", "--now", "-s", session, "@", "at once") == ["echo: at once"]
    assert "--now is for a session" in shell.fail(64, "send", "--now", "@", "x")


def test_tail_shows_states(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hello")
    tail = shell.start("tail", "-f", "--meta", "@", session)
    shell.succeed("send", "-w", "-s", session, "@", "again")
    shell.succeed("stop", "@", session)
    lines = [json.loads(line) for line in tail.communicate(timeout=60)[0].splitlines()]
    states = [line["state"] for line in lines if line["type"] == "state"]
    assert states[-1] == "ended" and set(states) <= {"starting", "running", "idle", "ended"}
    seqs = [line["seq"] for line in lines if line["type"] != "state"]
    assert seqs == list(range(1, len(seqs) + 1))


def test_send_takes_the_message_from_stdin(shell: Shell) -> None:
    text = 'grüß dich\nzwei Zeilen, ein \U0001f600 und "Anführung"\n'
    assert shell.succeed("send", "-w", "@", text=text) == [
        "echo: " + line if not i else line for i, line in enumerate(text.splitlines())
    ]
    assert shell.succeed("send", "-w", "@", "-", text="with a dash") == ["echo: with a dash"]
    assert shell.succeed("send", "-w", "@", "-", "-", text="not read") == ["echo: - -"]


def test_send_to_a_session_goes_on_with_it(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "first")
    assert shell.succeed("send", "-s", session, "@", "second") == [session]
    assert shell.succeed("send", "-w", "-s", session, "@", "third") == ["echo: third"]
    results = [o["result"] for o in map(json.loads, shell.succeed("tail", "@", session)) if o["type"] == "result"]
    assert results == ["echo: first", "echo: second", "echo: third"]


def test_words_after_two_dashes_are_text(shell: Shell) -> None:
    assert shell.succeed("send", "-w", "@", "--", "-w", "--help") == ["echo: -w --help"]
    assert shell.succeed("send", "-w", "--", "@", "a", "--", "-b") == ["echo: a -- -b"]
    assert len(shell.succeed("ping", "--", "@")) == 1


def test_the_answer_is_an_error(shell: Shell) -> None:
    result = shell.run("send", "-w", "@", "FAIL")
    assert (result.status, result.out) == (1, "API Error: 529 overloaded\n")
    assert result.err == "p2pclaude-send: error: the answer is an error\n"


def test_the_session_ends_instead_of_answering(shell: Shell) -> None:
    assert "ended without an answer" in shell.fail(1, "send", "-w", "@", "EXIT:3")


def test_where_a_session_runs(shell: Shell, tmp_path: Path) -> None:
    (shell.work / "below").mkdir(exist_ok=True)
    for directory in (str(tmp_path), "below"):
        [session] = shell.succeed("send", "-C", directory, "@", "hi")
        row = next(line for line in shell.succeed("ls", "@") if line.startswith(session))
        assert row.split("\t")[4] == str(shell.work / directory)
    assert "directory does not exist" in shell.fail(65, "send", "-C", "missing", "@", "hi")
    assert "not a directory" in shell.fail(65, "send", "-C", "/dev/null", "@", "hi")


def test_messages_to_unknown_and_ended_sessions(shell: Shell) -> None:
    assert "no such session: nope" in shell.fail(66, "send", "-s", "nope", "@", "hi")
    assert "no such session: nope" in shell.fail(66, "send", "-w", "-s", "nope", "@", "hi")
    [session] = shell.succeed("send", "@", "hi")
    shell.succeed("stop", "@", session)
    assert "session has ended" in shell.fail(77, "send", "-s", session, "@", "hi")


@pytest.mark.parametrize("option", ["-w", "--lines"])
def test_input_that_does_not_block_is_read_to_its_end(shell: Shell, option: str) -> None:
    """Who shares stdin may have made it so, as ssh does: what is not there yet still belongs to the message."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    process = shell.start("send", option, "@", stdin=reader)
    os.close(reader)
    with os.fdopen(writer, "wb", 0) as text:
        for part in (b"first, ", b"second\n"):
            text.write(part)
            time.sleep(1.0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"echo: first, second\n"), err


def test_a_chat_in_a_pipe(shell: Shell) -> None:
    result = shell.run("send", "--lines", "-w", "@", text="one\n\n  \ntwo\nFAIL\nno newline")
    assert result.status == 1
    assert result.lines() == ["echo: one", "echo: two", "API Error: 529 overloaded", "echo: no newline"]
    hint, error = result.err.splitlines()
    session = re.fullmatch(rf"p2pclaude-send: hint: session ({UUID}), -s resumes it", hint)
    assert session
    assert error == "p2pclaude-send: error: the answer is an error"
    assert shell.succeed("send", "--lines", "-s", session[1], "@", text="again\n") == ["echo: again"]


def test_a_chat_without_a_line_starts_nothing(shell: Shell) -> None:
    before = shell.succeed("ls", "-aq", "@")
    assert shell.succeed("send", "--lines", "@", text="\n") == []
    assert shell.succeed("ls", "-aq", "@") == before


def test_a_chat_answers_each_line_as_it_comes(shell: Shell) -> None:
    chat = shell.start("send", "--lines", "@", stdin=subprocess.PIPE)
    assert chat.stdin and chat.stdout
    for text in (b"one\n", b"two\n"):
        chat.stdin.write(text)
        chat.stdin.flush()
        assert chat.stdout.readline() == b"echo: " + text
    chat.communicate(timeout=60)
    assert chat.returncode == 0


# tail


def test_tail_prints_claudes_own_objects(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "grüße")
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    lines = shell.succeed("tail", "@", session)
    assert [json.loads(line)["type"] for line in lines] == ["system", "assistant", "result"]
    result = {"type": "result", "subtype": "success", "is_error": False, "result": "echo: grüße", "session_id": "fake"}
    assert lines[2] == json.dumps(result, ensure_ascii=False), "not as it was written"
    assert shell.succeed("tail", "-n", "1", "@", session) == lines[2:]
    assert shell.succeed("tail", "-n", "2", "@", session) == lines[1:]
    assert shell.succeed("tail", "-n", "99", "@", session) == lines
    assert shell.succeed("tail", "-n", "0", "@", session) == []
    assert shell.succeed("tail", "--after", "99", "@", session) == []
    envelopes = [json.loads(line) for line in shell.succeed("tail", "--meta", "@", session)]
    assert [e["seq"] for e in envelopes] == list(range(1, len(envelopes) + 1))
    assert [e["data"] for e in envelopes[2:]] == [json.loads(line) for line in lines]
    after = envelopes[-2]["seq"]
    assert shell.succeed("tail", "--after", str(after), "@", session) == lines[2:]


def test_tail_as_text(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "TOOL\nplease")
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    shell.succeed("stop", "@", session)
    assert shell.succeed("tail", "--text", "@", session) == ["> TOOL", "> please", "echo: TOOL", "please"]


def test_tail_as_text_shows_tools_and_errors(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "TOOL:")
    assert shell.run("send", "-w", "-s", session, "@", "FAIL").status == 1
    text = shell.succeed("tail", "--text", "@", session)
    expected = ["> TOOL:", "[Bash] ls -l [31m", "echo: TOOL:", "> FAIL", "[error] API Error: 529 overloaded"]
    assert sorted(text) == sorted(expected)


def test_tail_of_an_unknown_session(shell: Shell) -> None:
    for options in ([], ["-f"], ["-n", "3"], ["-n", "0"], ["--text"]):
        assert "no such session: nope" in shell.fail(66, "tail", *options, "@", "nope")


def test_following_ends_with_the_session_and_prints_everything_once(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "COUNT:300")
    followers = [shell.start("tail", "-f", "@", session) for _ in range(3)]
    eventually(lambda: len(shell.succeed("tail", "@", session)) >= 303)
    shell.succeed("stop", "@", session)
    outputs = [follower.communicate(timeout=60) for follower in followers]
    assert [follower.returncode for follower in followers] == [0, 0, 0]
    assert {err for _, err in outputs} == {b""}
    assert [o["n"] for o in map(json.loads, outputs[0][0].splitlines()) if "n" in o] == list(range(300))
    assert outputs[0] == outputs[1] == outputs[2]


def test_following_prints_at_once(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "one")
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    follower = shell.start("tail", "-f", "-n", "0", "--meta", "@", session)
    assert follower.stdout
    assert json.loads(follower.stdout.readline()) == {"type": "state", "state": "idle"}
    shell.succeed("send", "-s", session, "@", "two")
    shown: list[bytes] = []  # in either order: a state waits for no disk, and a page may hold more than the message
    while b'{"type":"state","state":"running"}\n' not in shown or not any(b'"content":"two"' in one for one in shown):
        shown.append(follower.stdout.readline())
        assert shown[-1], shown
    shell.succeed("stop", "@", session)
    follower.communicate(timeout=60)
    assert follower.returncode == 0


# ls and stop


def test_ls_prints_tabs_in_a_pipe(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hi")
    row = next(line for line in shell.succeed("ls", "@") if line.startswith(session))
    assert re.fullmatch(rf"{UUID}\t[a-z]+\t\d+\t{TIME}\t{re.escape(str(shell.work))}", row)
    assert session in shell.succeed("ls", "-q", "@")
    [entry] = [e for e in map(json.loads, shell.succeed("ls", "--json", "@")) if e["sessionId"] == session]
    assert {"sessionId", "state", "pid", "createdAt", "directory"} <= set(entry)
    eventually(lambda: session in shell.run("ls", "--dht", "-q", "@").lines())
    assert shell.succeed("stop", "@", session) == [session]
    assert session not in shell.succeed("ls", "-q", "@")
    assert any(re.match(rf"{session}\tended\t-\t", line) for line in shell.succeed("ls", "-a", "@"))
    eventually(lambda: session not in shell.run("ls", "--dht", "-q", "@").lines())


def test_ls_aligns_columns_under_a_header_on_a_terminal(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hi")
    out = on_terminal(shell, "ls", "@")
    header, *rows = out.splitlines()
    assert re.fullmatch(r"SESSION +STATE +PID +CREATED +DIRECTORY", header)
    row = next(row for row in rows if row.startswith(session))
    assert row.index(str(shell.work)) == header.index("DIRECTORY")
    assert "\t" not in out and "\x1b" not in out


def test_stop_does_the_others_when_one_is_unknown(shell: Shell) -> None:
    [one], [two] = (shell.succeed("send", "@", "hi") for _ in range(2))
    result = shell.run("stop", "@", one, "nope", two, one)
    assert (result.status, result.lines()) == (66, [one, two])
    assert "no such session: nope" in result.err
    assert not {one, two} & set(shell.succeed("ls", "-q", "@"))


def test_stop_all(tmp_path: Path) -> None:
    with daemon(tmp_path / "all") as own:
        assert own.succeed("ls", "@") == []
        assert own.succeed("stop", "--all", "@") == []
        sessions = {own.succeed("send", "@", "hi")[0] for _ in range(2)}
        assert set(own.succeed("stop", "--all", "@")) == sessions
        assert own.succeed("ls", "@") == []


# what goes wrong


def test_nobody_is_there(offline: Shell) -> None:
    lines = (["ping", "@"], ["send", "@", "x"], ["send", "-w", "@", "x"], ["tail", "-f", "@", "s"], ["ls", "@"])
    started = [(words[0], offline.start(*words)) for words in lines]
    for tool, process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (69, b"")
        check_words(tool, err.decode(), offline.url)
        assert b"error: no DHT node answered\n" in err


def test_a_timeout(offline: Shell) -> None:
    started = time.monotonic()
    assert "timed out" in offline.fail(75, "ls", "--dht", "-t", "0.5", "@")
    assert time.monotonic() - started < 15
    assert "arrived" not in offline.fail(75, "send", "-t", "0.1", "@", "x")  # nothing was sent


def test_a_wrong_key(shell: Shell, tmp_path: Path) -> None:
    right = parse_url(shell.url)
    wrong = Shell(tmp_path, format_url(Pairing(right.public_key, bytes(32), right.metadata)))
    for words in (
        ["ping", "@"],
        ["send", "@", "x"],
        ["tail", "-f", "@", "s"],
        ["stop", "@", "s"],
        ["ls", "--dht", "@"],
    ):
        assert "wrong key" in wrong.fail(77, *words)


@pytest.fixture(scope="module")
def counted(shell: Shell) -> str:
    """Give a session that has printed some lines."""
    [session] = shell.succeed("send", "@", "COUNT:50")
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 53)
    return session


@pytest.mark.parametrize("line", ["tail $U $S", "tail -f $U $S", "tail --text $U $S", "ls --json $U", "ping -c 100 $U"])
def test_a_closed_pipe_ends_a_tool_quietly(shell: Shell, counted: str, line: str) -> None:
    started = time.monotonic()
    result = shell_line(shell, f"{line} | head -n 1", S=counted)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    assert time.monotonic() - started < 50  # a hundred pings take longer


def test_a_closed_pipe_is_seen_although_nothing_is_printed(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "HANG")
    result = shell_line(shell, "tail -f -n 0 $U $S | sleep 1; echo ${PIPESTATUS[@]}", S=session)
    assert (result.stdout, result.stderr) == ("0 0\n", "")


def test_a_full_disk_and_no_stdout(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "x")
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    for line in ("ls --json $U >/dev/full", "tail $U $S >/dev/full", "ls -h >/dev/full"):
        result = shell_line(shell, line, S=session)
        words = f"p2pclaude-{line.split()[0]}: error: cannot write: no space left on device\n"
        assert (result.returncode, result.stderr) == (74, words)
    result = shell_line(shell, "ping $U >&-")
    assert (result.returncode, result.stderr) == (74, "p2pclaude-ping: error: cannot write: bad file descriptor\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_tool_quietly(shell: Shell, number: signal.Signals) -> None:
    [session] = shell.succeed("send", "@", "hi")
    eventually(lambda: len(shell.succeed("tail", "@", session)) == 3)
    waiting = [
        shell.start("tail", "-f", "@", session),
        shell.start("send", "--lines", "-s", session, "@", stdin=subprocess.PIPE),
    ]
    assert waiting[0].stdout and waiting[1].stdout and waiting[1].stdin
    waiting[0].stdout.readline()
    waiting[1].stdin.write(b"there\n")
    waiting[1].stdin.flush()
    assert waiting[1].stdout.readline() == b"echo: there\n"
    for process in waiting:
        process.send_signal(number)
    for process in waiting:
        assert process.stderr
        assert process.wait(timeout=30) == -number
        assert process.stderr.read() == b""
        process.communicate()


def test_a_locale_without_unicode_changes_nothing(shell: Shell) -> None:
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert shell.succeed("send", "-w", "@", "grüße", env=env) == ["echo: grüße"]


# the daemon


def test_a_second_daemon_on_the_same_data_is_turned_away(shell: Shell) -> None:
    assert "is in use by another daemon" in shell.fail(75, "daemon", "--private", "--host", "127.0.0.1", "--port", "1")


def test_following_and_waiting_outlive_the_daemon(tmp_path: Path) -> None:
    work = tmp_path / "restart"
    with daemon(work) as own:
        [session] = own.succeed("send", "@", "one")
        eventually(lambda: len(own.succeed("tail", "@", session)) == 3)
        port = re.search(r":(\d+)$", own.succeed("ping", "@")[0])
        assert port
        follower = own.start("tail", "-f", "@", session)
        assert follower.stdout
        shown = [follower.stdout.readline()]  # it follows
    try:
        with daemon(work, port=int(port[1])) as restarted:
            assert restarted.succeed("send", "-w", "-s", session, "@", "two") == ["echo: two"]
            restarted.succeed("stop", "@", session)
            shown += follower.stdout.readlines()
            err = follower.communicate(timeout=60)[1]
    finally:
        follower.kill()
        follower.communicate()
    results = [o["result"] for o in map(json.loads, shown) if o["type"] == "result"]
    assert (results, err, follower.returncode) == (["echo: one", "echo: two"], b"", 0)


# terminals


def on_terminal(shell: Shell, tool: str, *arguments: str, typed: tuple[bytes, bytes] | None = None) -> str:
    """Run a tool with a terminal for everything; type something once a text has appeared. Return what was shown."""
    words = [shell.url if word == "@" else word for word in arguments]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(shell.work)
        line = command(tool, *words)
        os.execve(line[0], line, environment(shell.work / "home", {"TERM": "xterm", "COLUMNS": "200"}))
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.2)[0]:
            if typed and typed[0] in shown:
                os.write(terminal, typed[1])
                typed = None
            continue
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break  # the tool has ended
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode().replace("\r\n", "\n")


def test_json_on_a_terminal_holds_nothing_that_it_would_obey(shell: Shell) -> None:
    """JSON itself escapes neither DEL nor the controls beyond ASCII, and a terminal takes U+009B for ESC [."""
    text = "rm -rf ~\x9b2K\x9b1Gls\x7f \u202eturned\u2069"
    [session] = shell.succeed("send", "@", text)
    shown = on_terminal(shell, "tail", "--meta", "@", session)
    assert r"rm -rf ~\u009b2K\u009b1Gls\u007f \u202eturned\u2069" in shown
    assert not {"\x9b", "\x7f", "\u202e", "\u2069"} & set(shown)
    assert text in "\n".join(shell.succeed("tail", "--meta", "@", session))


def test_a_message_typed_on_a_terminal(shell: Shell) -> None:
    shown = on_terminal(shell, "send", "-w", "@", typed=(b"ctrl-d", b"typed\n\x04"))
    assert "echo: typed" in shown


def test_a_chat_on_a_terminal(shell: Shell) -> None:
    shown = on_terminal(shell, "send", "--lines", "@", typed=(b"> ", b"hello\n\x04"))
    assert "echo: hello\n" in shown
    assert shown.endswith("> \n")  # what the shell says next has a line of its own
    assert "hint: session" in shown
