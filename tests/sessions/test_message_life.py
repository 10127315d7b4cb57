"""The life of a message: its table, and a real inbox that is driven at random beside a model of it."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pclaude.sessions.inbox import Inbox, Message
from p2pclaude.sessions.message_life import BEGUN, OVER, TAKEN, TRANSITIONS, Happening, Stage, after


@pytest.mark.parametrize(("stage", "what"), list(itertools.product(Stage, Happening)))
def test_each_happening_leads_where_the_table_says_or_cannot_be(stage: Stage, what: Happening) -> None:
    if (stage, what) in TRANSITIONS:
        assert after(stage, what) is TRANSITIONS[stage, what]
    else:
        with pytest.raises(AssertionError, match="cannot happen"):
            after(stage, what)


def test_the_table_is_whole() -> None:
    """Every stage is led to; what is over stays so; all can be answered or cut off, and no work begins twice."""
    assert {*TRANSITIONS.values(), Stage.WAITING} == set(Stage)
    assert {what for _, what in TRANSITIONS} == set(Happening)
    assert not OVER & {stage for stage, _ in TRANSITIONS}
    for stage in set(Stage) - OVER - {Stage.WAITING}:
        assert after(stage, Happening.ANSWERED) is Stage.DONE
        assert after(stage, Happening.CUT) is Stage.CUT_OFF
        assert ((stage, Happening.HANDED_BACK) in TRANSITIONS) == (stage not in BEGUN)


@pytest.mark.parametrize("order", list(itertools.permutations([Happening.REPLAYED, Happening.OUTPUT])))
def test_taken_and_begun_come_in_either_order(order: tuple[Happening, ...]) -> None:
    message = Message(1, {"uuid": "u1"})
    message.see(Happening.HANDED_OVER)
    assert (message.taken, message.begun) == (False, False)
    for what in order:
        message.see(what)
        assert (message.stage in TAKEN, message.stage in BEGUN) == (message.taken, message.begun)
    assert (message.taken, message.begun) == (True, True)
    assert message.stage is Stage.WORKED_ON


class Desk(RuleBasedStateMachine):
    """An inbox, as a session uses it while claudes print, die and are started again."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox = Inbox()
        self.all: list[Message] = []
        self.over: list[int] = []
        self.attempts: dict[int, int] = {}

    @rule(urgent=st.booleans())
    def accept(self, urgent: bool) -> None:
        """Take one more message."""
        seq = len(self.all) + 1
        self.all.append(Message(seq, {"uuid": f"u{seq}"} | ({"priority": "now"} if urgent else {})))
        self.inbox.accept(f"m{seq}", self.all[-1])

    @rule()
    def hand(self) -> None:
        """Hand what comes next, if claude may have it."""
        busy = len(self.inbox.handed)
        if (message := self.inbox.next()) is not None:
            assert busy == 0 or (busy == 1 and message.is_urgent)
            assert message.seq not in self.over, "it ran twice"
            self.inbox.hand(message)
            self.attempts[message.seq] = self.attempts.get(message.seq, 0) + 1

    @precondition(lambda self: self.inbox.handed)
    @rule(which=st.integers(0, 1), what=st.sampled_from(["replay", "assistant", "system"]))
    def print_something(self, which: int, what: str) -> None:
        """Let claude say something during a turn."""
        one = self.inbox.handed[which % len(self.inbox.handed)]
        values: dict[str, dict[str, object]] = {
            "replay": {"type": "user", "isReplay": True, "uuid": one.uuid},
            "assistant": {"type": "assistant"},
            "system": {"type": "system", "subtype": "status"},
        }
        first = self.inbox.handed[0]
        assert self.inbox.observe(values[what]) is None
        assert one.taken or what != "replay"
        assert first.begun or what != "assistant"

    @precondition(lambda self: self.inbox.handed)
    @rule()
    def answer(self) -> None:
        """Let claude end its turn."""
        taken = [message for message in self.inbox.handed if message.taken]
        answered = self.inbox.observe({"type": "result"})
        assert answered is not None and answered.stage is Stage.DONE
        assert answered in taken or not taken
        self.over.append(answered.seq)

    @precondition(lambda self: self.inbox.handed)
    @rule()
    def die(self) -> None:
        """Let claude die: what it had not begun is handed again, before all others."""
        had = list(self.inbox.handed)
        for message in reversed(had):
            again = not message.begun
            self.inbox.drop(message, again=again)
            if not again:
                self.over.append(message.seq)
        back = [message for message in had if message.stage is Stage.WAITING]
        assert list(self.inbox._waiting)[: len(back)] == back

    @rule()
    def find_known(self) -> None:
        """Let the transcript know a message that was found waiting."""
        if self.inbox._waiting:
            message = self.inbox._waiting[0]
            self.inbox.drop(message, again=False)
            self.over.append(message.seq)

    @invariant()
    def holds(self) -> None:
        """A message is in one place only; what is over is in none, and nothing is lost."""
        self.inbox.check()
        assert len(set(self.over)) == len(self.over)
        kept = {message.seq for message in (*self.inbox._waiting, *self.inbox.handed)}
        assert kept | set(self.over) == {message.seq for message in self.all}
        assert not kept & set(self.over)
        for message in self.all:
            assert self.inbox.is_done(message.seq) == (message.stage in OVER)
            assert self.inbox.seq_of(f"m{message.seq}") == message.seq
            assert message.attempts == self.attempts.get(message.seq, 0)
        assert len(self.inbox.handed) <= 2


TestDesk = Desk.TestCase
TestDesk.settings = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None)
