"""p2pclaude-send: a message in, a session's id or the answer out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pclaude.cli.common import (
    COMMON_OPTIONS,
    Arguments,
    Console,
    Target,
    is_terminal,
    parse_target,
    printable_text,
    run,
    write_line,
)
from p2pclaude.errors import DataError, P2PClaudeError, TryAgain, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from p2pclaude.client.remote_sessions import Accepted
    from p2pclaude.client.rpc_client import Client

NAME = "p2pclaude-send"
USAGE = f"""\
{NAME}: send a message to Claude Code

Usage:
  {NAME} [options] URL [TEXT...]
  {NAME} (-h | --help)
  {NAME} --version

URL is the pairing URL, or the path of a file that holds it. The message is
TEXT, or all of standard input if there is none or it is "-". Without a SESSION
it starts a new one. Prints the session's id; with --wait or --lines, the
answer.

Options:
  -s, --session SESSION    send to this session
  -C, --directory DIR      start the session in DIR on the daemon's host; else
                           in the daemon's own default, to which a relative
                           DIR is relative too
  --model MODEL            the model of the new session
  --permission-mode MODE   default, acceptEdits, bypassPermissions or plan
  --now                    do not wait for the end of a running turn: end it
  --ask                    let the new session ask for permission instead of
                           doing without: p2pclaude-approve answers
  -w, --wait               wait for the answer and print it instead of the id
  --json                   print the whole result object instead of its text
  --lines                  each line of standard input is a message; print each
                           answer as it comes: a chat
{COMMON_OPTIONS}
Exit status: 0 done, 1 the answer was an error, 64 usage, 65 malformed URL or
input, 66 no such session, 69 daemon not found or not reachable, 75 timed out,
76 not a p2pclaude daemon, 77 refused, 130 interrupted.
"""

PERMISSION_MODES = ("default", "acceptEdits", "bypassPermissions", "plan")

MAX_MESSAGE_BYTES = 4 << 20
"""A longer message would not fit the daemon's line, where sealing makes it a third longer and JSON may double it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to send where; `text` None means standard input."""

    target: Target
    text: str | None
    session: str | None
    directory: str | None
    model: str | None
    permission_mode: str | None
    now: bool
    ask: bool
    wait: bool
    lines: bool
    json: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError or DataError."""
    session, mode, words = arguments["--session"], arguments["--permission-mode"], arguments["TEXT"]
    words = [] if words == ["-"] else words  # standard input, as elsewhere
    if mode is not None and mode not in PERMISSION_MODES:
        raise UsageError(f"--permission-mode is one of {', '.join(PERMISSION_MODES)}")
    for option in ("--directory", "--model", "--permission-mode"):
        if session is not None and arguments[option] is not None:
            raise UsageError(f"{option} is for a new session, it does not go with --session")
        if arguments[option] == "":
            raise UsageError(f"{option} needs an argument that is not empty")
    if session is not None and arguments["--ask"]:
        raise UsageError("--ask is for a new session, it does not go with --session")
    if session == "":
        raise UsageError("--session needs a session's id")
    if arguments["--json"] and not (arguments["--wait"] or arguments["--lines"]):
        raise UsageError("--json is for an answer, it goes with --wait or --lines")
    if arguments["--now"] and session is None:
        raise UsageError("--now is for a session that runs, it goes with --session")
    if arguments["--lines"] and words:
        raise UsageError("--lines reads standard input, it does not go with TEXT")
    text = _checked(os.fsencode(" ".join(words))) if words else None
    target = parse_target(arguments, console)
    return Options(
        target,
        text,
        session,
        arguments["--directory"],
        arguments["--model"],
        mode,
        arguments["--now"],
        arguments["--ask"],
        arguments["--wait"],
        arguments["--lines"],
        arguments["--json"],
    )


def execute(options: Options, console: Console) -> int:
    """Send, and wait if asked to."""
    from p2pclaude.cli.network import run_with_client

    if options.lines:
        return run_with_client(options.target, console, lambda client: _chat(client, options, console))
    text = options.text if options.text is not None else _read_message(console)
    return run_with_client(options.target, console, lambda client: _send_one(client, options, text, console), acts=True)


def _read_message(console: Console) -> str:
    """Read the message from standard input."""
    from p2pclaude.cli.stdin import read_all

    if sys.stdin is None:
        raise DataError("no message: there is no standard input", hint=_EMPTY_HINT)
    if sys.stdin.isatty():
        console.hint("type the message and end it with ctrl-d on a line of its own")
    return _checked(read_all(MAX_MESSAGE_BYTES))


_EMPTY_HINT = "give the message as TEXT or on standard input"


def _checked(data: bytes) -> str:
    """Return a message as text, without the newline at its end. Raises DataError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise DataError(
            f"the message is longer than {MAX_MESSAGE_BYTES >> 20} MiB", hint="a file that Claude can read may hold it"
        )
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the message is not UTF-8 (at byte {error.start + 1})", hint="iconv -t utf-8 converts it"
        ) from None
    if not text.strip():
        raise DataError("the message is empty", hint=_EMPTY_HINT)
    return text.rstrip("\r\n")


async def _send_one(client: Client, options: Options, text: str, console: Console) -> int:
    """Send one message; print the session's id, or the answer."""
    from p2pclaude.cli.network import watch_stdout
    from p2pclaude.client.remote_sessions import skip_old_output, wait_for_answer

    if options.wait and options.session is not None:
        await skip_old_output(client, options.session)
    accepted = await _deliver(client, options, options.session, text, console)
    if not options.wait:
        write_line(accepted.session)
        return 0
    console.note(f"session {accepted.session}")
    watch_stdout()
    hint = _permission_hint(accepted.session, console)
    return _print_answer(await wait_for_answer(client, accepted, hint), options, console)


async def _chat(client: Client, options: Options, console: Console) -> int:
    """Send each line of standard input as a message and print its answer before the next."""
    from p2pclaude.client.remote_sessions import skip_old_output, wait_for_answer

    status, session = 0, options.session
    if session is not None:
        await skip_old_output(client, session)
    async for line in _messages(console):
        accepted = await _deliver(client, options, session, line, console)
        if session is None:
            session = accepted.session
            console.hint(f"session {session}, -s resumes it")
        hint = _permission_hint(session, console)
        status |= _print_answer(await wait_for_answer(client, accepted, hint), options, console)
    return status


async def _messages(console: Console) -> AsyncIterator[str]:
    """Yield the lines of standard input that are not blank; on a terminal, ask for them."""
    from p2pclaude.cli.stdin import read_lines

    if sys.stdin is None:
        raise DataError("no message: there is no standard input", hint=_EMPTY_HINT)
    is_chat = sys.stdin.isatty()
    console.prompt(is_chat)
    async for data in read_lines(MAX_MESSAGE_BYTES):
        if data.strip():
            yield _checked(data)
        console.prompt(is_chat)
    console.end_prompt(is_chat)


def _permission_hint(session: str, console: Console) -> Callable[[], None]:
    """Return what tells a person, once, that the session waits for permission."""
    told = sys.stderr is None or not sys.stderr.isatty()

    def tell() -> None:
        nonlocal told
        if not told:
            console.hint(f"the session waits for permission, p2pclaude-approve URL {session} shows for what")
        told = True

    return tell


async def _deliver(client: Client, options: Options, session: str | None, text: str, console: Console) -> Accepted:
    """Send a message, to a new session if there is none yet."""
    import uuid

    from p2pclaude.client import remote_sessions

    message_id = str(uuid.uuid4())
    persist = options.wait or options.lines
    try:
        if session is not None:
            return await remote_sessions.send(
                client, session, text=text, message_id=message_id, now=options.now, persist=persist
            )
        accepted = await remote_sessions.spawn(
            client,
            text=text,
            message_id=message_id,
            directory=options.directory,
            model=options.model,
            permission_mode=options.permission_mode,
            ask=options.ask,
            persist=persist,
        )
    except TryAgain as error:
        if client.was_connected:
            error.hint = error.hint or "the message may have arrived all the same, p2pclaude-ls and p2pclaude-tail tell"
        raise
    if options.ask and not accepted.asks:
        console.hint("this daemon cannot ask, the session does without what needs permission")
    return accepted


def _print_answer(answer: Mapping[str, Any], options: Options, console: Console) -> int:
    """Print a `result` object, or its text; return 1 if it is an error or the turn was cut short."""
    text = answer.get("result")
    if options.json:
        from p2pclaude.protocol.wire import dump_json

        write_line(dump_json(answer))
    elif isinstance(text, str) and text:
        write_line(printable_text(text) if is_terminal() else text)
    denied = _denied_tools(answer)
    if denied:
        console.hint(f"denied: {', '.join(denied)}")
    subtype, reason = answer.get("subtype", "success"), str(answer.get("terminal_reason") or "")
    if answer.get("is_error") is not True and subtype == "success" and not reason.startswith("aborted"):
        return 0
    if reason.startswith("aborted") and answer.get("is_error") is not True:
        return console.report(P2PClaudeError(f"the turn was cut short: {reason}"))
    # An API error comes as a "success" that is an error: that word would only confuse here.
    return console.report(P2PClaudeError("the answer is an error" + (f": {subtype}" if subtype != "success" else "")))


def _denied_tools(answer: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools that Claude was not allowed to use, each once."""
    denials = answer.get("permission_denials")
    given = denials if isinstance(denials, list) else []
    names = [denial.get("tool_name") for denial in given if isinstance(denial, dict)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))
