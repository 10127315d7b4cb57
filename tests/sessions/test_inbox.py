"""Messages: accepted, handed, done; what a crash left is found in the journal, and no message runs twice."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from p2pclaude.protocol.wire import MESSAGE, NOTE, OUTPUT, TURN, TURN_CUT, dump_json
from p2pclaude.sessions.inbox import Inbox, Message, Recovery

RESULT: Mapping[str, Any] = {"type": "result"}
INIT: Mapping[str, Any] = {"type": "system", "subtype": "init"}
ASSISTANT: Mapping[str, Any] = {"type": "assistant"}
REPLAY: dict[str, Any] = {"type": "user", "isReplay": True}
OWN_RESULT: Mapping[str, Any] = {"type": "result", "origin": {"kind": "task-notification"}}


def message(seq: int, *, now: bool = False) -> Message:
    return Message(seq, {"uuid": f"u{seq}"} | ({"priority": "now"} if now else {}))


def accepted(*messages: Message) -> Inbox:
    inbox = Inbox()
    for one in messages:
        inbox.accept(f"m{one.seq}", one)
    return inbox


def hand(inbox: Inbox) -> int | None:
    """Hand what comes next; give its seq."""
    if (one := inbox.next()) is not None:
        inbox.hand(one)
    return None if one is None else one.seq


def test_one_message_an_idle_claude() -> None:
    inbox = accepted(message(1), message(2))
    assert hand(inbox) == 1
    assert hand(inbox) is None
    assert [inbox.observe(value) for value in (INIT, ASSISTANT)] == [None, None]
    answered = inbox.observe(RESULT)
    assert answered is not None and answered.seq == 1
    assert inbox.observe(RESULT) is None  # of nobody
    assert hand(inbox) == 2
    assert (inbox.seq_of("m1"), inbox.seq_of("m3"), inbox.is_done(1), inbox.is_done(2)) == (1, None, True, False)


def test_an_urgent_message_is_answered_after_the_turn_that_it_ends() -> None:
    inbox = accepted(message(1), message(2), message(3, now=True), message(4, now=True))
    assert hand(inbox) == 3  # before what waits
    assert hand(inbox) == 4  # during a turn
    assert hand(inbox) is None  # and no third: two would become one turn
    answers = [inbox.observe(RESULT), inbox.observe(RESULT)]
    assert [one.seq for one in answers if one is not None] == [3, 4]
    assert hand(inbox) == 1


def test_a_turn_that_claude_began_by_itself_answers_nobody() -> None:
    inbox = accepted(message(1), message(2))
    assert [inbox.observe(value) for value in (INIT, ASSISTANT, OWN_RESULT, INIT)] == [None] * 4
    assert hand(inbox) == 1  # while such a turn runs; it waits for its own
    assert [inbox.observe(value) for value in (ASSISTANT, OWN_RESULT, INIT, REPLAY, ASSISTANT)] == [None] * 5
    answered = inbox.observe(RESULT)
    assert answered is not None and answered.seq == 1
    assert hand(inbox) == 2  # taken in by such a turn, while a tool runs
    assert [inbox.observe(value) for value in (INIT, ASSISTANT, REPLAY)] == [None] * 3
    answered = inbox.observe(OWN_RESULT)
    assert answered is not None and answered.seq == 2


def test_an_urgent_message_that_ends_a_turn_of_claudes_own_is_answered_before_one_that_waits() -> None:
    inbox = accepted(message(1))
    inbox.observe(INIT)
    assert hand(inbox) == 1
    inbox.accept("m2", message(2, now=True))
    assert hand(inbox) == 2
    assert [inbox.observe(value) for value in (ASSISTANT, OWN_RESULT, INIT, REPLAY | {"uuid": "u2"})] == [None] * 4
    answers = [inbox.observe(RESULT), inbox.observe(REPLAY | {"uuid": "u1"}), inbox.observe(RESULT)]
    assert [one.seq for one in answers if one is not None] == [2, 1]
    # In an ordinary turn the order stays.
    inbox = accepted(message(1))
    assert hand(inbox) == 1
    inbox.observe(REPLAY | {"uuid": "u1"})
    inbox.accept("m2", message(2, now=True))
    assert hand(inbox) == 2
    answers = [inbox.observe(value) for value in (REPLAY | {"uuid": "u2"}, RESULT, RESULT)]
    assert [one.seq for one in answers if one is not None] == [1, 2]


def test_a_turn_that_gets_no_result() -> None:
    inbox = accepted(message(1), message(2))
    hand(inbox)
    inbox.observe(INIT)
    assert not inbox.handed[0].begun
    inbox.drop(inbox.handed[0], again=True)
    assert hand(inbox) == 1
    assert (inbox.handed[0].begun, inbox.handed[0].attempts) == (False, 2)
    inbox.observe({"type": "unparsed"})
    assert inbox.handed[0].begun
    with pytest.raises(AssertionError):  # its work may have begun
        inbox.drop(inbox.handed[0], again=True)


class Kept:
    """A journal in a list."""

    def __init__(self, *envelopes: Mapping[str, Any]) -> None:
        self.lines = [dump_json({"type": NOTE} | dict(one) | {"seq": n}) for n, one in enumerate(envelopes, 1)]
        self.kinds = [one.get("type") for one in envelopes]

    def recover(self) -> Inbox:
        """Do what opening a session's journal does."""
        recovery = Recovery()
        for seq, (kind, line) in enumerate(zip(self.kinds, self.lines, strict=True), 1):
            if kind != OUTPUT:
                recovery.learn(seq, line)
        return recovery.finish(lambda seq: self.lines[seq - 1], len(self.lines))


def said(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": OUTPUT, "data": value}


def sent(name: str) -> Mapping[str, Any]:
    return {"type": MESSAGE, "messageId": name, "data": {"uuid": name}}


def turn(seq: int, **fields: Any) -> Mapping[str, Any]:
    return {"type": TURN, "message": seq, **fields}


def cut(seq: int, *, again: bool) -> Mapping[str, Any]:
    return {"type": TURN_CUT, "message": seq, "again": again}


@pytest.mark.parametrize(
    ("journal", "handed", "waiting"),
    [
        ((), [], []),
        ((sent("a"), sent("b")), [], [1, 2]),
        ((sent("a"), turn(1)), [(1, False, 1)], []),
        ((sent("a"), turn(1), said(INIT)), [(1, False, 1)], []),
        ((sent("a"), turn(1), said(INIT), said(ASSISTANT)), [(1, True, 1)], []),
        ((sent("a"), turn(1), said(INIT), said(RESULT)), [], []),
        ((sent("a"), turn(1), said(ASSISTANT), said(OWN_RESULT)), [(1, True, 1)], []),
        ((sent("a"), turn(1), said(REPLAY), said(OWN_RESULT)), [], []),
        ((sent("a"), turn(1), said(RESULT), said(INIT), sent("b")), [], [5]),
        ((sent("a"), sent("b"), turn(1), said(RESULT), turn(2)), [(2, False, 1)], []),
        ((sent("a"), turn(1), cut(1, again=False), sent("b")), [], [4]),
        ((sent("a"), sent("b"), turn(1), cut(1, again=True)), [], [1, 2]),
        ((sent("a"), turn(1), cut(1, again=True), turn(1)), [(1, False, 2)], []),
        ((sent("a"), turn(1), cut(1, again=True), turn(1), said(RESULT)), [], []),
        # claude died while there was no room for the turn's mark
        ((sent("a"), sent("b"), cut(1, again=True)), [], [1, 2]),
        ((sent("a"), sent("b"), cut(1, again=False)), [], [2]),
        # b was handed during the turn of a
        ((sent("a"), turn(1), sent("b"), turn(3, steers=1)), [(1, False, 1), (3, False, 1)], []),
        ((sent("a"), turn(1), sent("b"), turn(3, steers=1), said(ASSISTANT)), [(1, True, 1), (3, False, 1)], []),
        ((sent("a"), turn(1), said(ASSISTANT), sent("b"), turn(4, steers=1), said(RESULT)), [(4, False, 1)], []),
        ((sent("a"), turn(1), sent("b"), turn(3, steers=1), said(RESULT), said(RESULT)), [], []),
        ((sent("a"), turn(1), sent("b"), turn(3, steers=1), cut(3, again=True)), [(1, False, 1)], [3]),
        # damage: notes instead of messages, marks of messages that were never there
        (({"type": NOTE}, turn(1), turn(99), cut(7, again=True), said({"type": ["result"]})), [], []),
        # marks in an order that no daemon writes: each message is in one place all the same
        ((turn(2), sent("a")), [], [2]),
        ((turn(2), sent("a"), turn(2)), [(2, False, 1)], []),
        ((sent("a"), turn(1), turn(1)), [(1, False, 1)], []),
        ((sent("a"), sent("b"), turn(1), turn(2), cut(1, again=True)), [(2, False, 1)], []),
        ((sent("a"), turn(1), cut(1, again=False), cut(1, again=True)), [], []),
        ((sent("a"), turn(1), cut(1, again=True), cut(1, again=True)), [], [1]),
    ],
)
def test_what_a_crash_left(
    journal: Sequence[Mapping[str, Any]], handed: list[tuple[int, bool, int]], waiting: list[int]
) -> None:
    inbox = Kept(*journal).recover()
    inbox.check()
    assert [(one.seq, one.begun, one.attempts) for one in inbox.handed] == handed
    for one in list(inbox.handed):
        inbox.drop(one, again=False)
    found = []
    while (seq := hand(inbox)) is not None:
        found.append(seq)
        inbox.observe(RESULT)
    assert found == waiting


def test_what_is_cut_off_is_not_looked_at_again() -> None:
    """Whoever is interrupted between two of them goes on with the rest."""
    inbox = Kept(sent("a"), sent("b")).recover()
    first, second = inbox.restored
    inbox.drop(first, again=False)
    assert inbox.restored == [second]
    inbox.drop(second, again=False)
    assert not inbox.restored and not inbox


def test_how_often_a_message_was_handed_before_is_counted_on() -> None:
    inbox = Kept(sent("never"), sent("once"), turn(2), cut(2, again=True)).recover()
    attempts = {}
    while (one := inbox.next()) is not None:
        attempts[one.seq] = one.attempts
        inbox.hand(one)
        inbox.observe(RESULT)
    assert attempts == {1: 0, 2: 1}
