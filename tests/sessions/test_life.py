"""The life of a session: every row of its tables against a model in other terms, and random walks over them."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pclaude.sessions.life import (
    ENDINGS,
    LIVE,
    TRANSITIONS,
    Ending,
    Happening,
    ImpossibleHappening,
    Order,
    SessionLife,
    Stage,
    State,
)

PROCESS = {Stage.STARTED, Stage.IDLE, Stage.RUNNING}


def life_at(stage: Stage, ending: Ending = Ending.NO) -> SessionLife:
    """Return a life in the middle."""
    life = SessionLife(stage)
    life.ending = ending
    return life


@dataclass(frozen=True)
class Facts:
    """What a stage stands for. Without a process the session is as `rests` says, or a start is tried from there."""

    rests: str = ""
    tried: bool = False
    heard: bool = False  # of the process
    busy: bool = False

    @property
    def process(self) -> bool:
        """Whether there is one."""
        return not self.rests


FACTS = {
    Stage.AWAITED: Facts("awaited", tried=True),
    Stage.WAKING: Facts("dormant", tried=True),
    Stage.RETRYING: Facts("failed", tried=True),
    Stage.STARTED: Facts(),
    Stage.IDLE: Facts(heard=True),
    Stage.RUNNING: Facts(heard=True, busy=True),
    Stage.DORMANT: Facts("dormant"),
    Stage.FAILED: Facts("failed"),
    Stage.ENDED: Facts("ended"),
    Stage.REMOVED: Facts("removed"),
}


def unbound(facts: Facts) -> bool:
    """Tell whether nothing keeps a session without a process from becoming something else: no start in its middle."""
    return facts.rests == "awaited" or (facts.rests in ("dormant", "failed") and not facts.tried)


def rest(name: str) -> Facts:
    """Return the facts of a session that waits for a claude, or has none."""
    return Facts(name, tried=name == "awaited")


def work(facts: Facts) -> Facts | None:
    """Return what comes of something to do: it waits for a claude that is being started, or was not heard of yet."""
    if facts.process or facts.tried:
        return replace(facts, busy=facts.heard)
    return None


Model = Callable[[Facts], Facts | None]
MODEL: Mapping[Happening, Model] = {
    Happening.START_TRIED: lambda f: replace(f, tried=True) if unbound(f) else None,
    Happening.START_REFUSED: lambda f: rest(f.rests) if f.tried else None,
    Happening.START_REFUSED_MAIL: lambda f: rest("failed") if f.tried and f.rests != "awaited" else None,
    Happening.LAUNCHED: lambda f: Facts() if f.tried else None,
    Happening.SETTLED: lambda f: Facts(heard=True) if f.process and not f.heard else None,
    Happening.SETTLED_BUSY: lambda f: Facts(heard=True, busy=True) if f.process and not f.heard else None,
    Happening.ACCEPTED: work,
    Happening.HANDED: lambda f: Facts(heard=True, busy=True) if f.process else None,
    Happening.OWN_TURN: lambda f: work(f) if f.process else None,
    Happening.DONE: lambda f: Facts(heard=True) if f.process else None,
    Happening.DIED_WITH_MAIL: lambda f: rest("awaited") if f.process else None,
    Happening.LEFT_IN_ORDER: lambda f: rest("dormant") if f.process else None,
    Happening.DIED: lambda f: rest("failed") if f.process else None,
    Happening.PUT_AWAY: lambda f: rest("dormant") if f.process or f.rests == "awaited" else None,
    Happening.STOPPED: lambda f: rest("ended") if f.process or unbound(f) else None,
    Happening.GIVEN_UP: lambda f: rest("failed") if unbound(f) else None,
    Happening.MAIL_FOUND: lambda f: rest("awaited") if unbound(f) and f.rests != "awaited" else None,
    Happening.DELETED: lambda f: rest("removed") if unbound(f) or f.rests == "ended" else None,
}


@pytest.mark.parametrize(("stage", "what"), list(itertools.product(Stage, Happening)))
def test_each_happening_leads_where_the_model_says_or_changes_nothing(stage: Stage, what: Happening) -> None:
    life = life_at(stage)
    if (after := MODEL[what](FACTS[stage])) is not None:
        life.see(what)
        assert FACTS[life.stage] == after
    else:
        with pytest.raises(ImpossibleHappening, match="cannot happen"):
            life.see(what)
        assert life.stage is stage


def test_what_has_been_stopped_for_good_neither_starts_nor_accepts() -> None:
    for stage, what in ((Stage.WAKING, Happening.LAUNCHED), (Stage.RUNNING, Happening.ACCEPTED)):
        life = life_at(stage, Ending.FOR_GOOD)
        with pytest.raises(ImpossibleHappening):
            life.see(what)
        assert (life.stage, life.ending) == (stage, Ending.FOR_GOOD)
    with pytest.raises(ImpossibleHappening, match="too late"):
        life_at(Stage.RUNNING, Ending.FOR_GOOD).tell(Order.LAUNCH)


def test_the_tables_are_whole() -> None:
    """Every stage is reached from a new session, every happening leads somewhere, and nothing follows upon deletion."""
    reached, edge = {Stage.AWAITED}, {Stage.AWAITED}
    while edge:
        edge = {after for (stage, _), after in TRANSITIONS.items() if stage in edge} - reached
        reached |= edge
    assert reached == set(Stage)
    assert {what for _, what in TRANSITIONS} == set(Happening)
    assert not [what for stage, what in TRANSITIONS if stage is Stage.REMOVED]
    assert {what for stage, what in TRANSITIONS if stage is Stage.ENDED} == {Happening.DELETED}
    assert {order for _, order in ENDINGS} == set(Order)


@pytest.mark.parametrize("start", [stage for stage in Stage if stage is not Stage.REMOVED])
def test_every_session_can_be_stopped_for_good(start: Stage) -> None:
    reached, edge = {start}, {start}
    while edge:
        edge = {after for (stage, _), after in TRANSITIONS.items() if stage in edge} - reached
        reached |= edge
    assert Stage.ENDED in reached


@pytest.mark.parametrize(
    ("stage", "state"),
    [
        (Stage.AWAITED, "starting"),
        (Stage.WAKING, "starting"),
        (Stage.RETRYING, "starting"),
        (Stage.STARTED, "starting"),
        (Stage.IDLE, "idle"),
        (Stage.RUNNING, "running"),
        (Stage.DORMANT, "dormant"),
        (Stage.FAILED, "failed"),
        (Stage.ENDED, "ended"),
        (Stage.REMOVED, "ended"),
    ],
)
def test_what_others_see(stage: Stage, state: str) -> None:
    life = life_at(stage)
    assert life.stored == state
    assert life.has_process == (stage in PROCESS)
    assert life.is_orphaned == (state == "starting" and stage not in PROCESS)
    assert life.is_live == (state in ("starting", "idle", "running"))
    assert life.is_removed is (stage is Stage.REMOVED)
    waits = State.WAITING if life.is_live else life.stored
    assert (life.seen(asks=False), life.seen(asks=True)) == (life.stored, waits)
    life.is_paused = True
    paused = State.PAUSED if life.is_live else life.stored
    assert (life.seen(asks=False), life.seen(asks=True)) == (paused, paused)


@pytest.mark.parametrize("state", State)
def test_no_claude_outlives_its_daemon(state: State) -> None:
    life = SessionLife.loaded(state)
    assert not life.is_live and not life.is_being_ended
    assert life.stored == (State.DORMANT if state in LIVE else state)
    assert life.refuses_messages == (state is State.ENDED)


@pytest.mark.parametrize("ending", Ending)
def test_what_the_end_of_claude_means(ending: Ending) -> None:
    for mail, progress, in_order, broken in itertools.product([False, True], repeat=4):
        life = life_at(Stage.RUNNING, ending)
        what = life.meaning_of_exit(mail=mail, progress=progress, in_order=in_order, broken=broken)
        life.see(what)  # it can happen
        if ending is Ending.FOR_GOOD:
            assert life.stage is Stage.ENDED
        elif ending is Ending.WITH_DAEMON:
            assert life.stage is Stage.DORMANT
        elif broken:
            assert life.stage is Stage.FAILED
        elif mail:
            goes_on = progress or ending is Ending.TO_SLEEP
            assert life.stage is (Stage.AWAITED if goes_on else Stage.FAILED)
        else:
            assert life.stage is (Stage.DORMANT if in_order else Stage.FAILED)


@pytest.mark.parametrize("ending", Ending)
def test_what_is_being_ended_is_handed_nothing(ending: Ending) -> None:
    assert life_at(Stage.RUNNING, ending).is_being_ended is (ending is not Ending.NO)


def test_a_new_claude_is_not_being_ended() -> None:
    for ending in (Ending.NO, Ending.TO_SLEEP, Ending.WITH_DAEMON):
        life = life_at(Stage.WAKING, ending)
        life.see(Happening.LAUNCHED)
        assert not life.is_being_ended and life.stage is Stage.STARTED


STRENGTH = [Ending.NO, Ending.TO_SLEEP, Ending.WITH_DAEMON, Ending.FOR_GOOD]


@pytest.mark.parametrize("ending", Ending)
@pytest.mark.parametrize("order", [Order.SLEEP, Order.LEAVE, Order.STOP])
def test_no_order_makes_less_of_an_earlier_one(ending: Ending, order: Order) -> None:
    """A stop may be cut short, and the daemon end before it is asked for again: it stays a stop."""
    life = life_at(Stage.IDLE, ending)
    life.tell(order)
    assert STRENGTH.index(life.ending) == max(STRENGTH.index(ending), 1 + [*Order].index(order))


@pytest.mark.parametrize(
    ("ending", "what", "aim"),
    [
        (Ending.NO, None, None),
        (Ending.TO_SLEEP, None, None),
        (Ending.WITH_DAEMON, Happening.PUT_AWAY, Stage.DORMANT),
        (Ending.FOR_GOOD, Happening.STOPPED, Stage.ENDED),
    ],
)
def test_what_is_outstanding_until_an_ending_is_true(ending: Ending, what: Happening | None, aim: Stage | None) -> None:
    life = life_at(Stage.RUNNING, ending)
    assert life.outstanding is what
    if what is not None:
        life.see(what)
        assert life.stage is aim and life.outstanding is None


class Walk(RuleBasedStateMachine):
    """Whatever can happen, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.life = SessionLife()
        self.ended = False

    def possible(self) -> list[Happening]:
        """Give what can happen now, as `Session` lets it: nothing is accepted or launched after a stop."""
        stopped = self.life.refuses_messages
        kept_back = {Happening.ACCEPTED, Happening.LAUNCHED} if stopped else set()
        return [what for stage, what in TRANSITIONS if stage is self.life.stage and what not in kept_back]

    @precondition(lambda self: self.possible())
    @rule(data=st.data())
    def happen(self, data: st.DataObject) -> None:
        """See one of the things that can happen now."""
        self.life.see(data.draw(st.sampled_from(self.possible())))

    @rule(order=st.sampled_from([Order.SLEEP, Order.LEAVE, Order.STOP]))
    def order(self, order: Order) -> None:
        """Tell it something."""
        if (self.life.ending, order) in ENDINGS:
            self.life.tell(order)

    @precondition(lambda self: self.life.has_process)
    @rule(mail=st.booleans(), progress=st.booleans(), in_order=st.booleans(), broken=st.booleans())
    def die(self, mail: bool, progress: bool, in_order: bool, broken: bool) -> None:
        """Let claude end."""
        self.life.see(self.life.meaning_of_exit(mail=mail, progress=progress, in_order=in_order, broken=broken))
        assert not self.life.has_process

    @invariant()
    def holds(self) -> None:
        """A process only in live states; what has ended never comes back, and takes no message."""
        life = self.life
        assert not life.has_process or life.stored in LIVE
        assert life.stored not in (State.WAITING, State.PAUSED)  # they are of the moment
        self.ended = self.ended or life.has_ended
        if self.ended:
            assert life.has_ended and life.refuses_messages and not life.is_live
            with pytest.raises(ImpossibleHappening):
                life.see(Happening.ACCEPTED)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None)
