"""Sessions from afar: sending, reading, following over lost connections; our daemon's and the TypeScript one's."""

import asyncio
from contextlib import aclosing
from random import Random
from typing import Any

import pytest
from client.test_rpc_client import with_client
from kit.fake_daemon import FakeDaemon, FakeSession, MemoryDialer

from p2pclaude.client import remote_sessions
from p2pclaude.client.rpc_client import Client
from p2pclaude.errors import DataError, NoSession, P2PClaudeError, Refused, TryAgain, Unavailable
from p2pclaude.hyperdht import PeerNotFound, Timeout, TooFewNodes
from p2pclaude.protocol.record import decode_record
from p2pclaude.protocol.wire import OUTPUT, REPLAY, seal

BOTH = pytest.mark.parametrize("old", [False, True], ids=["ours", "typescript"])


def daemon_with(*, old: bool = False, outputs: int = 0, state: str = "idle") -> FakeDaemon:
    """Make a daemon with a session `s` that has printed so many objects, other envelopes between."""
    daemon = FakeDaemon(old=old)
    session = daemon.sessions["s"] = FakeSession(state=state)
    for number in range(outputs):
        if number % 3 == 0 and not old:
            session.journal.append({"type": "turn", "seq": len(session.journal) + 1, "timestamp": 0, "message": 0})
        seq = len(session.journal) + 1
        session.journal.append({"type": OUTPUT, "seq": seq, "timestamp": 0, "data": {"type": "x", "n": number}})
    return daemon


def numbers(page: remote_sessions.Page) -> list[int]:
    """Return the numbers of the objects in a page."""
    return [message["data"]["n"] for message in page.messages if message["type"] == OUTPUT]


async def collect(client: Client, *, after: int = 0, read: Any = remote_sessions.follow) -> list[int]:
    """Read a session to its end."""
    found: list[int] = []
    async with aclosing(read(client, "s", after=after)) as pages:
        async for page in pages:
            found += numbers(page)
    return found


async def ask(client: Client, text: str, **options: Any) -> Any:
    """Start a session with a message and wait for its answer."""
    accepted = await remote_sessions.spawn(client, text=text, message_id="m", directory="/srv", **options)
    return await remote_sessions.wait_for_answer(client, accepted)


def test_sending_to_a_new_session_is_one_call() -> None:
    daemon = FakeDaemon()
    accepted = with_client(daemon, lambda c: remote_sessions.spawn(c, text="hi", message_id="m", model="opus"))
    [(method, params)] = daemon.requests
    assert method == "spawn-session"
    assert params == {"sessionId": accepted.session, "text": "hi", "messageId": "m", "model": "opus"}
    assert accepted.seq == 1


def test_an_old_daemon_gets_the_message_in_a_second_call() -> None:
    daemon = FakeDaemon(old=True)
    accepted = with_client(daemon, lambda c: remote_sessions.spawn(c, text="hi", message_id="m", directory="/srv"))
    assert [method for method, _ in daemon.requests] == ["spawn-session", "send-message"]
    assert accepted.seq is None


@pytest.mark.parametrize(("directory", "kind", "status"), [("/outside", Refused, 77), ("/missing", DataError, 65)])
def test_why_no_session_was_started(directory: str, kind: type[P2PClaudeError], status: int) -> None:
    with pytest.raises(kind, match="directory") as caught:
        with_client(FakeDaemon(), lambda c: remote_sessions.spawn(c, text="hi", message_id="m", directory=directory))
    assert caught.value.exit_status == status


def test_an_old_daemon_needs_a_directory_and_the_hint_says_so() -> None:
    with pytest.raises(P2PClaudeError) as caught:
        with_client(FakeDaemon(old=True), lambda c: remote_sessions.spawn(c, text="hi", message_id="m"))
    assert "-C" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("claude was not found on PATH or in the usual places (install it)", Unavailable),
        ("claude ended at once: no login", Unavailable),
        ("64 sessions run already, which is the most that this daemon allows", TryAgain),
        ("the daemon is stopping", TryAgain),
        ("/home/ann/.p2p-claude/sessions/1: no space left on the disk (make room and try again)", TryAgain),
        ("Directory does not exist: /srv/full: limits", DataError),
        ("/srv/busy/claude is not a program that can be run (check --claude)", Unavailable),
        ("claude ended at once: permission mode is not allowed", Unavailable),
        ("/srv/busy/claude could not be started: No such file or directory", Unavailable),
        ("/srv/busy/claude could not be started: Permission denied", Unavailable),
        ("spawn /usr/bin/claude ENOENT", Unavailable),
        ("Failed to start: spawn claude EACCES", Unavailable),
        ("Error: ENOENT: no such file or directory, lstat '/x'", DataError),
        ("EACCES: permission denied, access '/x'", Refused),
        ("Not a directory: /x", DataError),
        ("Not a directory: /x\nfull", DataError),
        pytest.param(": /" * 300_000 + "\nfull", Refused, id="hostile"),  # it takes no time
        ("Permission denied: /x", Refused),
        ("something new", Refused),
    ],
)
def test_reasons_become_classes(reason: str, kind: type[P2PClaudeError]) -> None:
    """By the words of the reason itself: those of a path, or of what Claude said, count for nothing."""
    error = remote_sessions._spawn_error({"type": "error", "errorMessage": reason}, "/x")
    assert type(error) is kind
    assert (error.hint == "nothing was done, it may do later") is (kind is TryAgain)
    assert str(error).startswith("no session was started: ")


def test_no_directory_is_asked_for_where_claude_is_what_is_missing() -> None:
    reason = "/srv/claude could not be started: No such file or directory"
    assert remote_sessions._spawn_error({"type": "error", "errorMessage": reason}, None).hint is None


@BOTH
def test_sending_to_an_unknown_session(old: bool) -> None:
    with pytest.raises(NoSession, match="nope"):
        with_client(FakeDaemon(old=old), lambda c: remote_sessions.send(c, "nope", text="x", message_id="m"))


@BOTH
def test_the_answer_of_a_message(old: bool) -> None:
    answer = with_client(FakeDaemon(old=old), lambda c: ask(c, "hello"))
    assert answer["result"] == "echo: hello"


def test_the_answer_is_the_one_of_this_message() -> None:
    """Another message was accepted before, and is answered after, this one was accepted."""
    finder = remote_sessions.AnswerFinder(7)
    other = {"type": OUTPUT, "data": {"type": "result", "result": "other"}}
    mine = {"type": OUTPUT, "data": {"type": "result", "result": "mine"}}
    turns = [{"type": "turn", "message": seq} for seq in (5, 7)]
    found = [finder.feed(envelope) for envelope in (other, turns[0], other, turns[1], mine)]
    assert found == [None, None, None, None, mine["data"]]


def test_a_message_that_steers_is_answered_after_the_turn_that_it_ends() -> None:
    finder = remote_sessions.AnswerFinder(7)
    cut_short, mine = ({"type": OUTPUT, "data": {"type": "result", "result": text}} for text in ("cut short", "mine"))
    turn: dict[str, Any] = {"type": "turn", "message": 7, "steers": 3}
    assert [finder.feed(envelope) for envelope in (turn, cut_short, mine)] == [None, None, mine["data"]]
    # The turn that it was to end got no result, because Claude died; then it is handed again.
    finder = remote_sessions.AnswerFinder(7)
    cuts: list[dict[str, Any]] = [{"type": "turn-cut", "message": seq, "again": seq == 7} for seq in (7, 3)]
    again = {"type": "turn", "message": 7}
    assert [finder.feed(envelope) for envelope in (turn, *cuts, again, mine)] == [None] * 4 + [mine["data"]]


def test_a_message_that_claude_takes_in_first_is_answered_first() -> None:
    """By its turn's mark another one was to come before: Claude had a turn of its own, which the urgent one ended."""
    turns: list[dict[str, Any]] = [
        {"type": "turn", "message": 5, "uuid": "u5"},
        {"type": "turn", "message": 7, "uuid": "u7", "steers": 5},
    ]
    taken: dict[str, dict[str, Any]] = {
        uuid: {"type": REPLAY, "data": {"type": "user", "isReplay": True, "uuid": uuid}} for uuid in ("u5", "u7")
    }
    first, second = ({"type": OUTPUT, "data": {"type": "result", "result": text}} for text in ("first", "second"))
    for order, answers in ((("u7", "u5"), {5: second, 7: first}), (("u5", "u7"), {5: first, 7: second})):
        for seq, answer in answers.items():
            finder = remote_sessions.AnswerFinder(seq)
            envelopes = [*turns, taken[order[0]], first, taken[order[1]], second]
            assert next(found for e in envelopes if (found := finder.feed(e)) is not None) == answer["data"]


def test_what_claude_takes_in_by_itself_is_no_message_that_is_answered_first() -> None:
    """After /compact there is a replay of its output, under a uuid of its own, and then the one result."""
    output = {"type": REPLAY, "data": {"type": "user", "isReplay": True, "uuid": "of nobody's message"}}
    cut_short, mine = ({"type": OUTPUT, "data": {"type": "result", "result": text}} for text in ("cut short", ""))
    turn: dict[str, Any] = {"type": "turn", "message": 7, "uuid": "u7"}
    finder = remote_sessions.AnswerFinder(7)
    assert [finder.feed(envelope) for envelope in (turn, output, mine)] == [None, None, mine["data"]]
    finder = remote_sessions.AnswerFinder(7)  # sent with --now
    envelopes = ({**turn, "steers": 3}, cut_short, output, mine)
    assert [finder.feed(envelope) for envelope in envelopes] == [None, None, None, mine["data"]]


def test_a_turn_that_was_cut_off_has_no_answer() -> None:
    finder = remote_sessions.AnswerFinder(7)
    finder.feed({"type": "turn", "message": 7})
    assert finder.feed({"type": "turn-cut", "message": 5, "again": False, "reason": "x"}) is None
    with pytest.raises(P2PClaudeError, match="the turn was cut off: it was ended by signal 9") as caught:
        finder.feed({"type": "turn-cut", "message": 7, "again": False, "reason": "it was ended by signal 9"})
    assert caught.value.exit_status == 1


def test_an_error_result_is_an_answer() -> None:
    assert with_client(FakeDaemon(), lambda c: ask(c, "FAIL"))["is_error"] is True


def test_a_session_that_ends_without_an_answer() -> None:
    with pytest.raises(P2PClaudeError, match="ended without an answer") as caught:
        with_client(FakeDaemon(), lambda c: ask(c, "DIE"))
    assert caught.value.exit_status == 1


@BOTH
def test_an_old_answer_is_not_taken_for_the_new_one(old: bool) -> None:
    daemon = FakeDaemon(old=old)

    async def work(client: Client) -> Any:
        accepted = await remote_sessions.spawn(client, text="first", message_id="m1", directory="/srv")
        await remote_sessions.skip_old_output(client, accepted.session)
        accepted = await remote_sessions.send(client, accepted.session, text="second", message_id="m2")
        return await remote_sessions.wait_for_answer(client, accepted)

    assert with_client(daemon, work)["result"] == "echo: second"


def test_a_send_that_persists_takes_effect_once() -> None:
    daemon = FakeDaemon()

    async def cut_once(method: str, params: dict[str, Any]) -> None:
        if method == "send-message" and len(daemon.requests) < 4:
            await daemon._send_message(params)
            daemon.cut()

    async def work(client: Client) -> Any:
        accepted = await remote_sessions.spawn(client, text="first", message_id="m1")
        daemon.before_answer = cut_once
        accepted = await remote_sessions.send(client, accepted.session, text="second", message_id="m2", persist=True)
        return await remote_sessions.wait_for_answer(client, accepted)

    assert with_client(daemon, work)["result"] == "echo: second"
    [session] = daemon.sessions.values()
    results = [m for m in session.journal if m.get("data", {}).get("type") == "result"]
    assert [m["data"]["result"] for m in results] == ["echo: first", "echo: second"]


def test_a_send_to_an_old_daemon_is_never_repeated() -> None:
    daemon = daemon_with(old=True)

    async def cut(method: str, params: dict[str, Any]) -> None:
        if method == "send-message":
            daemon.cut()

    async def work(client: Client) -> None:
        await client.call("ping")
        daemon.before_answer = cut
        await remote_sessions.send(client, "s", text="x", message_id="m", persist=True)

    with pytest.raises(TryAgain):
        with_client(daemon, work)
    assert [method for method, _ in daemon.requests].count("send-message") == 1


def test_a_message_goes_out_when_the_daemon_is_back() -> None:
    """As in a chat whose connection is lost between two messages: nothing was sent yet, and the daemon is known."""
    daemon = daemon_with()
    dialer = MemoryDialer(daemon)

    async def work(client: Client) -> remote_sessions.Accepted:
        await client.call("ping")
        daemon.cut()
        await asyncio.sleep(1)
        dialer.failures = [TooFewNodes("x"), PeerNotFound("x"), Timeout("x")]
        return await remote_sessions.send(client, "s", text="x", message_id="m", persist=True)

    assert with_client(daemon, work, dialer=dialer).seq == 1


@pytest.mark.parametrize("failure", [Timeout("x"), PeerNotFound("x")])
def test_a_daemon_that_was_never_reached_is_dialed_once(failure: Exception) -> None:
    daemon = FakeDaemon()
    dialer = MemoryDialer(daemon, *[failure] * 9)
    with pytest.raises(P2PClaudeError):
        with_client(daemon, lambda c: remote_sessions.spawn(c, text="x", message_id="m", persist=True), dialer=dialer)
    assert len(dialer.dials) == 1


def test_a_message_that_may_have_arrived_is_not_said_to_have_found_nobody() -> None:
    daemon = FakeDaemon()
    dialer = MemoryDialer(daemon)

    async def vanish(method: str, params: dict[str, Any]) -> None:
        dialer.failures = [PeerNotFound("x")] * 20
        daemon.cut()

    daemon.before_answer = vanish
    with pytest.raises(TryAgain, match="connection to the daemon was lost"):
        with_client(daemon, lambda c: remote_sessions.spawn(c, text="x", message_id="m", persist=True), dialer=dialer)


@BOTH
def test_reading_what_there_is(old: bool) -> None:
    daemon = daemon_with(old=old, outputs=20)
    daemon.page_size = 6
    assert with_client(daemon, lambda c: collect(c, read=remote_sessions.read_journal)) == list(range(20))
    assert daemon.sessions["s"].cleared == 0


def test_pages_of_a_long_journal_are_asked_for_before_the_last_one_has_come() -> None:
    daemon = daemon_with(outputs=100)
    daemon.page_size = 6
    waiting: set[int] = set()
    most = 0

    async def answer_late(method: str, params: dict[str, Any]) -> None:
        nonlocal most
        waiting.add(params["after"])
        most = max(most, len(waiting))
        await asyncio.sleep(0.1)
        waiting.remove(params["after"])

    daemon.before_answer = answer_late
    assert with_client(daemon, lambda c: collect(c, read=remote_sessions.read_journal)) == list(range(100))
    assert most == 9
    asked = [params["after"] for _, params in daemon.requests]
    assert asked == sorted(set(asked))  # nothing twice


@pytest.mark.parametrize("then", [[7, 9, 1000], [3, 2, 1], [5, 5, 5], [-1], ["x", None, {}], list(range(10**5))])
def test_a_daemon_that_is_wrong_about_its_pages(then: list[Any]) -> None:
    daemon = daemon_with(outputs=40)
    daemon.page_size = 6
    daemon.then = lambda _: then
    assert with_client(daemon, lambda c: collect(c, read=remote_sessions.read_journal)) == list(range(40))
    assert len(daemon.requests) < 300


def test_reading_from_a_sequence_number_and_the_last_ones() -> None:
    daemon = daemon_with(outputs=20)
    assert with_client(daemon, lambda c: collect(c, after=24, read=remote_sessions.read_journal)) == [18, 19]
    assert with_client(daemon, lambda c: collect(c, after=-4, read=remote_sessions.read_journal)) == [16, 17, 18, 19]
    assert with_client(daemon, lambda c: remote_sessions.last_seq(c, "s")) == 27


@BOTH
@pytest.mark.parametrize("read", [remote_sessions.follow, remote_sessions.read_journal])
def test_an_unknown_session_is_an_error_at_once(old: bool, read: Any) -> None:
    with pytest.raises(NoSession):
        with_client(FakeDaemon(old=old), lambda c: collect(c, read=read))


def test_states_come_at_once_when_nothing_is_printed() -> None:
    """The state that the session is in as well as each that it gets into; the daemon holds no question for them."""
    daemon = daemon_with()

    async def work(client: Client) -> list[tuple[float, str | None]]:
        clock = asyncio.get_running_loop().time
        began, seen = clock(), list[tuple[float, str | None]]()
        async with aclosing(remote_sessions.follow(client, "s", states=True)) as pages:
            async for page in pages:
                seen.append((round(clock() - began), page.state))
                if page.state == "idle":
                    asyncio.get_running_loop().call_later(3, asyncio.create_task, daemon.end("s", "busy"))
                elif page.state == "busy":
                    asyncio.get_running_loop().call_later(4, asyncio.create_task, daemon.end("s"))
        return seen

    assert with_client(daemon, work) == [(0, "idle"), (3, "busy"), (7, "ended")]


@BOTH
def test_following_ends_with_the_session(old: bool) -> None:
    daemon = daemon_with(old=old, outputs=3)

    async def work(client: Client) -> list[int]:
        async def live() -> None:
            for number in range(3, 8):
                await asyncio.sleep(0.7)
                await daemon.print("s", {"type": "x", "n": number})
            await asyncio.sleep(3)
            await daemon.end("s")

        living = asyncio.create_task(live())
        found = await collect(client)
        await living
        return found

    assert with_client(daemon, work) == list(range(8))


def test_following_an_ended_session_prints_it_and_ends() -> None:
    assert with_client(daemon_with(outputs=9, state="ended"), collect) == list(range(9))


def test_following_waits_without_asking_again_and_again() -> None:
    daemon = daemon_with(outputs=1)

    async def work(client: Client) -> None:
        following = asyncio.create_task(collect(client))
        await asyncio.sleep(200)
        await daemon.end("s")
        await following

    with_client(daemon, work)
    assert len(daemon.requests) <= 2 + 200 / remote_sessions.LONG_POLL_SECONDS + 2


def test_following_goes_on_when_a_dormant_session_comes_back() -> None:
    daemon = daemon_with(outputs=1, state="dormant")

    async def work(client: Client) -> list[int]:
        following = asyncio.create_task(collect(client))
        await asyncio.sleep(60)
        daemon.sessions["s"].state = "running"
        await daemon.print("s", {"type": "x", "n": 1})
        await daemon.end("s")
        return await following

    assert with_client(daemon, work) == [0, 1]
    assert len(daemon.requests) < 60 / remote_sessions.POLL_SECONDS + 10


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_and_nothing_comes_twice_over_cut_connections(seed: int) -> None:
    rng = Random(seed)
    daemon = daemon_with()
    daemon.page_size = 4
    dialer = MemoryDialer(daemon)

    async def work(client: Client) -> list[int]:
        async def live() -> None:
            for number in range(100):
                await daemon.print("s", {"type": "x", "n": number})
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.random() * 5)
                if rng.random() < 0.1:
                    dialer.failures = [OSError("no route")] * rng.randrange(3)
                    daemon.cut()
            await daemon.end("s")

        living = asyncio.create_task(live())
        found = await collect(client)
        await living
        return found

    assert with_client(daemon, work, dialer=dialer) == list(range(100)), f"seed {seed}"
    assert len(dialer.dials) > 5


def test_a_session_that_falls_asleep_before_its_answer() -> None:
    daemon = FakeDaemon()

    async def work(client: Client) -> None:
        accepted = await remote_sessions.spawn(client, text="SILENT", message_id="m")
        await daemon.end(accepted.session, "dormant")
        await remote_sessions.wait_for_answer(client, accepted)

    with pytest.raises(TryAgain):
        with_client(daemon, work)


@BOTH
def test_stopping(old: bool) -> None:
    daemon = daemon_with(old=old)
    assert with_client(daemon, lambda c: remote_sessions.stop(c, "s")) is True
    assert with_client(daemon, lambda c: remote_sessions.stop(c, "nope")) is False


KEY = bytes(range(32))
RECORD = {"sessions": [{"sessionId": "s", "pid": 1}], "updatedAt": 5}


@pytest.mark.parametrize(
    "value", [seal(KEY, RECORD).encode(), b'{"sessions":[{"sessionId":"s","pid":1}],"updatedAt":5}']
)
def test_a_session_record_sealed_or_in_clear(value: bytes) -> None:
    record = decode_record(3, value, KEY)
    assert (record.seq, record.sessions, record.updated_at) == (3, RECORD["sessions"], 5)


@pytest.mark.parametrize(
    ("value", "status"),
    [(seal(bytes(32), RECORD).encode(), 77), (b"", 77), (b"\xff\xff", 76), (b"{", 76), (b'{"sessions":1}', 76)],
)
def test_a_session_record_that_cannot_be_read(value: bytes, status: int) -> None:
    with pytest.raises(P2PClaudeError) as caught:
        decode_record(1, value, KEY)
    assert caught.value.exit_status == status
