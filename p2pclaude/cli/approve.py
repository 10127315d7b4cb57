"""p2pclaude-approve: decide what Claude may do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pclaude.cli.common import (
    COMMON_OPTIONS,
    Arguments,
    Console,
    Target,
    parse_seconds,
    parse_target,
    printable,
    run,
    write_line,
)
from p2pclaude.errors import DataError, UsageError

if TYPE_CHECKING:
    from p2pclaude.client.remote_requests import Pending, Request
    from p2pclaude.client.rpc_client import Client

NAME = "p2pclaude-approve"
USAGE = f"""\
{NAME}: decide what Claude Code may do

Usage:
  {NAME} [options] URL [SESSION]
  {NAME} (-h | --help)
  {NAME} --version

URL is the pairing URL, or the path of a file that holds it. Prints what the
sessions started with p2pclaude-send --ask, or this one, wait for permission
to do: a JSON object a line. With --allow, --deny or --answer it answers one
request and prints its id.

Options:
  --allow ID               let the tool run
  --deny ID                do not let it run
  -m, --message TEXT       with --deny: the reason, for Claude
  --answer ID              answer with the JSON object on standard input: the
                           answers to a question, or the whole reply
  -f, --follow             go on with new requests as they come
  --filter COMMAND         let this shell command decide on each request, which
                           it gets on standard input: exit status 0 allows,
                           1 denies, any other leaves it to others (75 without
                           a word). What it prints replaces the tool's input,
                           or is the reason
  --filter-timeout SECONDS
                           end the command after this time, which leaves the
                           request to others [default: 60]
{COMMON_OPTIONS}
Exit status: 0 done, 1 the request was answered before, 64 usage, 65 malformed
URL or input, 66 no such session or request, 69 daemon not found or not
reachable, 75 timed out, 76 the daemon does not know permission requests,
77 refused, 130 interrupted.
"""

REPLY_FIELDS = frozenset({"behavior", "updatedInput", "updatedPermissions", "message", "interrupt"})
"""What a whole reply may hold; an object with none of these holds answers to questions."""
MAX_ANSWER_BYTES = 4 << 20
MAX_FILTERS = 8
"""Filters that run at once."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to do: answer `request` if there is one, else list; `reply` None stands for JSON on standard input."""

    target: Target
    session: str | None
    request: str | None
    reply: Mapping[str, object] | None
    follow: bool
    filter: str | None
    filter_timeout: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(NAME, USAGE, parse, execute, argv)


def parse(arguments: Arguments, console: Console) -> Options:
    """Check the arguments. Raises UsageError or DataError."""
    answering = [name for name in ("--allow", "--deny", "--answer") if arguments[name] is not None]
    following = [name for name in ("--follow", "--filter") if arguments[name] not in (None, False)]
    if len(answering) > 1 or (answering and following):
        raise UsageError(f"{' and '.join([*answering, *following][:2])} do not go together")
    if arguments["--message"] is not None and answering != ["--deny"]:
        raise UsageError("--message goes with --deny")
    for name in (*answering, "--filter"):
        if arguments[name] is not None and not arguments[name].strip():
            raise UsageError(f"{name} needs an argument that is not empty")
    if arguments["SESSION"] == "":
        raise UsageError("SESSION is empty")
    reply: dict[str, object] | None = None
    if arguments["--deny"] is not None:
        reply = {"behavior": "deny"}
        if arguments["--message"]:
            reply["message"] = arguments["--message"]
    elif arguments["--allow"] is not None:
        reply = {"behavior": "allow"}
    return Options(
        target=parse_target(arguments, console),
        session=arguments["SESSION"],
        request=arguments[answering[0]] if answering else None,
        reply=reply,
        follow=arguments["--follow"],
        filter=arguments["--filter"],
        filter_timeout=parse_seconds(arguments, "--filter-timeout"),
    )


def execute(options: Options, console: Console) -> int:
    """Answer, print or decide."""
    from p2pclaude.cli.network import run_with_client

    if (request := options.request) is not None:
        reply = _read_reply() if options.reply is None else options.reply
        return run_with_client(
            options.target, console, lambda client: _answer(client, options, request, reply), acts=True
        )
    if options.filter is not None:
        return run_with_client(options.target, console, lambda client: _decide(client, options, console))
    return run_with_client(options.target, console, lambda client: _print(client, options, console))


def _read_reply() -> Mapping[str, object]:
    """Make a reply of the JSON object on standard input. Raises DataError."""
    from p2pclaude.cli.stdin import read_all
    from p2pclaude.errors import WireError
    from p2pclaude.protocol.wire import load_json

    data = b"" if sys.stdin is None else read_all(MAX_ANSWER_BYTES)
    if len(data) > MAX_ANSWER_BYTES:
        raise DataError(f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
    try:
        value = load_json(data)
    except WireError:
        value = None
    if not isinstance(value, dict):
        raise DataError("the answer on standard input is not a JSON object")
    if not value.keys() & REPLY_FIELDS:
        return {"behavior": "allow", "answers": value}
    if unknown := sorted(value.keys() - REPLY_FIELDS):
        raise DataError(f"a reply has no field {unknown[0]}", hint=f"it may have {', '.join(sorted(REPLY_FIELDS))}")
    return {"behavior": "allow", **value}


async def _answer(client: Client, options: Options, request: str, reply: Mapping[str, object]) -> int:
    from p2pclaude.client.remote_requests import answer_request

    await answer_request(client, request, options.session, reply)
    write_line(printable(request))
    return 0


async def _print(client: Client, options: Options, console: Console) -> int:
    """Print each request once."""
    from p2pclaude.protocol.wire import dump_json

    def show(request: Request) -> None:
        write_line(dump_json(request))

    await _each(client, options, console, show, lambda key: console.note(f"request {key[1]} waits no more"))
    return 0


async def _decide(client: Client, options: Options, console: Console) -> int:
    """Run the filter on each request once, a few at a time; print what was decided."""
    import asyncio

    room = asyncio.Semaphore(MAX_FILTERS)
    running: dict[Key, asyncio.Task[None]] = {}
    try:
        async with asyncio.TaskGroup() as group:

            def begin(request: Request) -> None:
                running[_key(request)] = group.create_task(decide(request))

            def drop(key: Key) -> None:
                # It was answered by another, or cancelled: nobody needs this filter's opinion any more.
                if (task := running.pop(key, None)) is not None:
                    task.cancel()

            async def decide(request: Request) -> None:
                async with room:
                    answer = await _ask_filter(options, console, request)
                running.pop(_key(request), None)  # what follows is not interrupted
                if answer is not None:
                    await _give(client, console, request, answer)

            await _each(client, options, console, begin, drop)
    except ExceptionGroup as failure:
        raise failure.exceptions[0] from None
    return 0


async def _ask_filter(options: Options, console: Console, request: Request) -> Mapping[str, object] | None:
    from p2pclaude.cli.filters import run_filter

    assert options.filter is not None
    verdict = await run_filter(options.filter, request, options.filter_timeout)
    if verdict.complaint is not None:
        console.error(f"the filter {verdict.complaint}, request {request['requestId']} is left to others")
    return verdict.answer


async def _give(client: Client, console: Console, request: Request, answer: Mapping[str, object]) -> None:
    from p2pclaude.client.remote_requests import AlreadyAnswered, ClaudeEnded, answer_request
    from p2pclaude.errors import NoSession
    from p2pclaude.protocol.wire import dump_json

    try:
        await answer_request(client, request["requestId"], request["sessionId"], answer)
    except (AlreadyAnswered, NoSession, ClaudeEnded) as error:
        console.note(str(error))
        return
    except DataError as error:
        console.error(f"{error}, request {request['requestId']} is left to others")
        return
    shown = {name: request[name] for name in ("sessionId", "requestId", "toolName")}
    write_line(dump_json({**shown, **answer}))


Key = tuple[str, str]


def _key(request: Request) -> Key:
    return request["sessionId"], request["requestId"]


async def _each(
    client: Client,
    options: Options,
    console: Console,
    begin: Callable[[Request], None],
    gone: Callable[[Key], None],
) -> None:
    """Call `begin` for each request once, and `gone` when it waits no more."""
    from contextlib import aclosing

    from p2pclaude.client.remote_requests import follow_requests, list_requests

    known: set[Key] = set()

    def take(pending: Pending) -> None:
        here = {_key(request): request for request in pending.requests}
        for key in sorted(known - here.keys()) if not pending.omitted else ():
            known.discard(key)
            gone(key)
        for key, request in here.items():
            if key not in known:
                known.add(key)
                begin(request)
        if pending.omitted:
            console.hint(f"{pending.omitted} more requests wait, they are shown when some of these are answered")

    if not options.follow:
        take(await list_requests(client, options.session))
        return
    async with aclosing(follow_requests(client, options.session)) as sets:
        async for pending in sets:
            take(pending)
