"""The life of a session, as tables (pure).

What may happen to a session next stands here: `session` and `table` say what happened, and ask. What the tables do not
list cannot happen.

Three things are true of a session at the same time, and each of them has one owner:

    its stage   which claude there is, and what it does: TRANSITIONS
    its ending  whether that claude is being ended, and what for: ENDINGS
    its disk    whether there is room to write down what it says

They are apart because they meet in every combination: a session that is being stopped may be running, and may wait for
room. A request for permission that nobody has answered is no state, but a fact of `open_requests`, which is asked for
it.

Others see a `State`, on the wire and in session.json, which follows from these. The words are the wire's.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """What a session is doing, as `list-sessions` and `get-output` say it."""

    STARTING = "starting"
    """Claude is about to be started, or was and has not been heard of."""
    IDLE = "idle"
    """Claude waits for a message."""
    RUNNING = "running"
    """Claude works on a message."""
    WAITING = "waiting"
    """Claude asks for permission, and nobody has answered yet."""
    PAUSED = "paused"
    """The disk is full: nothing is lost, claude waits until there is room."""
    DORMANT = "dormant"
    """No process; the next message starts one that knows the conversation."""
    ENDED = "ended"
    """It was stopped, and takes no more messages."""
    FAILED = "failed"
    """Claude died with an error, or cannot be started; the next message tries again."""


LIVE: Final = frozenset({State.STARTING, State.IDLE, State.RUNNING, State.WAITING, State.PAUSED})
"""The states in which there is a process, or is about to be one."""
OVER: Final = frozenset({State.ENDED, State.FAILED})
"""The states in which nothing new is waited for; a dormant session may come back."""


class Stage(StrEnum):
    """Which claude there is, and what it does."""

    AWAITED = "awaited"
    """None, but one is about to be started: the session is new, or messages wait."""
    WAKING = "waking"
    """One is being started for a session that was dormant."""
    RETRYING = "retrying"
    """One is being started for a session that has failed."""
    STARTED = "started"
    """There is one, and it has not been heard of."""
    IDLE = "idle"
    """It has nothing to do."""
    RUNNING = "running"
    """It has a message, or a turn of its own."""
    DORMANT = "dormant"
    """None; the next message has one started."""
    FAILED = "failed"
    """None; the last one ended in a way that somebody should know of."""
    ENDED = "ended"
    """None, and there will be none."""
    REMOVED = "removed"
    """Everything that the session has said is deleted."""


class Happening(StrEnum):
    """What can happen to a session."""

    START_TRIED = "start tried"
    START_REFUSED = "start refused"
    START_REFUSED_MAIL = "start refused with messages waiting"
    LAUNCHED = "process launched"
    SETTLED = "it runs"
    SETTLED_BUSY = "it runs on a message"
    ACCEPTED = "message accepted"
    HANDED = "message handed to claude"
    OWN_TURN = "claude begins by itself"
    DONE = "all is done"
    DIED_WITH_MAIL = "claude died with messages waiting"
    LEFT_IN_ORDER = "claude left in order"
    DIED = "claude died"
    PUT_AWAY = "ended with the daemon"
    STOPPED = "stopped"
    GIVEN_UP = "given up"
    MAIL_FOUND = "messages found at start"
    DELETED = "deleted"


_NO_PROCESS: Final = (Stage.AWAITED, Stage.DORMANT, Stage.FAILED)
_STARTING: Final = (Stage.AWAITED, Stage.WAKING, Stage.RETRYING)
_PROCESS: Final = (Stage.STARTED, Stage.IDLE, Stage.RUNNING)

TRANSITIONS: Final[Mapping[tuple[Stage, Happening], Stage]] = {
    (Stage.AWAITED, Happening.START_TRIED): Stage.AWAITED,
    (Stage.DORMANT, Happening.START_TRIED): Stage.WAKING,
    (Stage.FAILED, Happening.START_TRIED): Stage.RETRYING,
    (Stage.AWAITED, Happening.START_REFUSED): Stage.AWAITED,
    (Stage.WAKING, Happening.START_REFUSED): Stage.DORMANT,
    (Stage.RETRYING, Happening.START_REFUSED): Stage.FAILED,
    (Stage.WAKING, Happening.START_REFUSED_MAIL): Stage.FAILED,
    (Stage.RETRYING, Happening.START_REFUSED_MAIL): Stage.FAILED,
    **{(stage, Happening.LAUNCHED): Stage.STARTED for stage in _STARTING},
    (Stage.STARTED, Happening.SETTLED): Stage.IDLE,
    (Stage.STARTED, Happening.SETTLED_BUSY): Stage.RUNNING,
    **{(stage, Happening.ACCEPTED): stage for stage in _STARTING},  # it waits, whoever comes of this start
    (Stage.STARTED, Happening.ACCEPTED): Stage.STARTED,
    (Stage.IDLE, Happening.ACCEPTED): Stage.RUNNING,
    (Stage.RUNNING, Happening.ACCEPTED): Stage.RUNNING,
    **{(stage, Happening.HANDED): Stage.RUNNING for stage in _PROCESS},
    (Stage.STARTED, Happening.OWN_TURN): Stage.STARTED,  # its first words, whatever they are about
    (Stage.IDLE, Happening.OWN_TURN): Stage.RUNNING,
    (Stage.RUNNING, Happening.OWN_TURN): Stage.RUNNING,  # or the turn of a message: claude says `init` for both
    **{(stage, Happening.DONE): Stage.IDLE for stage in _PROCESS},
    **{(stage, Happening.DIED_WITH_MAIL): Stage.AWAITED for stage in _PROCESS},
    **{(stage, Happening.LEFT_IN_ORDER): Stage.DORMANT for stage in _PROCESS},
    **{(stage, Happening.DIED): Stage.FAILED for stage in _PROCESS},
    **{(stage, Happening.PUT_AWAY): Stage.DORMANT for stage in (Stage.AWAITED, *_PROCESS)},
    **{(stage, Happening.STOPPED): Stage.ENDED for stage in (*_NO_PROCESS, *_PROCESS)},
    **{(stage, Happening.GIVEN_UP): Stage.FAILED for stage in _NO_PROCESS},
    (Stage.DORMANT, Happening.MAIL_FOUND): Stage.AWAITED,
    (Stage.FAILED, Happening.MAIL_FOUND): Stage.AWAITED,
    **{(stage, Happening.DELETED): Stage.REMOVED for stage in (*_NO_PROCESS, Stage.ENDED)},
}
"""Which happening leads where. A pair that is not here cannot happen."""


class Ending(StrEnum):
    """Whether the claude of a session is being ended, and what the session shall be then."""

    NO = "no"
    """It is not: messages are handed to it."""
    TO_SLEEP = "to sleep"
    """To make room for others: dormant, unless a message comes meanwhile."""
    WITH_DAEMON = "with the daemon"
    """Dormant, whatever comes."""
    FOR_GOOD = "for good"
    """Ended: no message is accepted any more."""


class Order(StrEnum):
    """What a session can be told about the end of its claude; a new claude has not been told any of it."""

    SLEEP = "go to sleep"
    LEAVE = "the daemon ends"
    STOP = "stop"
    LAUNCH = "process launched"


ENDINGS: Final[Mapping[tuple[Ending, Order], Ending]] = {
    (Ending.NO, Order.SLEEP): Ending.TO_SLEEP,
    (Ending.TO_SLEEP, Order.SLEEP): Ending.TO_SLEEP,
    (Ending.WITH_DAEMON, Order.SLEEP): Ending.WITH_DAEMON,
    (Ending.FOR_GOOD, Order.SLEEP): Ending.FOR_GOOD,
    (Ending.FOR_GOOD, Order.LEAVE): Ending.FOR_GOOD,
    **{(ending, Order.LEAVE): Ending.WITH_DAEMON for ending in (Ending.NO, Ending.TO_SLEEP, Ending.WITH_DAEMON)},
    **{(ending, Order.STOP): Ending.FOR_GOOD for ending in Ending},
    **{(ending, Order.LAUNCH): Ending.NO for ending in (Ending.NO, Ending.TO_SLEEP, Ending.WITH_DAEMON)},
}
"""Which order leads where.

A later order never makes less of an earlier one: a stop may be cut short, and the daemon end before it is asked for
again. Who was stopped for good is not started again.
"""

_AIMS: Final[Mapping[Ending, tuple[Happening, Stage]]] = {
    Ending.WITH_DAEMON: (Happening.PUT_AWAY, Stage.DORMANT),
    Ending.FOR_GOOD: (Happening.STOPPED, Stage.ENDED),
}
"""What an ending comes to, whatever claude does: what happens, and the stage after it."""

_SEEN_AS: Final[Mapping[Stage, State]] = {
    Stage.AWAITED: State.STARTING,
    Stage.WAKING: State.STARTING,
    Stage.RETRYING: State.STARTING,
    Stage.STARTED: State.STARTING,
    Stage.IDLE: State.IDLE,
    Stage.RUNNING: State.RUNNING,
    Stage.DORMANT: State.DORMANT,
    Stage.FAILED: State.FAILED,
    Stage.ENDED: State.ENDED,
    Stage.REMOVED: State.ENDED,
}


class ImpossibleHappening(AssertionError):
    """Something happened to a session that the tables do not list: a defect of this program."""


class SessionLife:
    """One session's stage, ending and disk."""

    __slots__ = ("ending", "is_paused", "stage")

    def __init__(self, stage: Stage = Stage.AWAITED) -> None:
        self.stage = stage
        self.ending = Ending.NO
        self.is_paused = False
        """Whether it waits for room on the disk."""

    @classmethod
    def loaded(cls, state: State) -> "SessionLife":
        """Return the life of a session that an earlier daemon left in that state: its claude, if any, is gone."""
        return cls(Stage.DORMANT if state in LIVE else Stage(state))

    # what others see

    @property
    def stored(self) -> State:
        """The state for session.json: that of the stage alone, as what is asked and the disk are of the moment."""
        return _SEEN_AS[self.stage]

    def seen(self, *, asks: bool) -> State:
        """The state as others see it; `asks` tells whether a request for permission waits."""
        state = self.stored
        if state not in LIVE:  # without a process there is nobody who waits
            return state
        if self.is_paused:
            return State.PAUSED
        return State.WAITING if asks else state

    # what it may do

    @property
    def has_process(self) -> bool:
        """Whether there is a claude."""
        return self.stage in _PROCESS

    @property
    def is_live(self) -> bool:
        """Whether there is a claude, or is about to be one."""
        return self.stored in LIVE

    @property
    def is_orphaned(self) -> bool:
        """Whether there is no claude, but is about to be one."""
        return self.is_live and not self.has_process

    @property
    def is_unheard(self) -> bool:
        """Whether there is a claude that has not been heard of."""
        return self.stage is Stage.STARTED

    @property
    def is_being_ended(self) -> bool:
        """Whether nothing more is handed to claude."""
        return self.ending is not Ending.NO

    @property
    def refuses_messages(self) -> bool:
        """Whether no message is accepted, now and later."""
        return self.ending is Ending.FOR_GOOD or self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether it was stopped for good."""
        return self.stage in (Stage.ENDED, Stage.REMOVED)

    @property
    def is_removed(self) -> bool:
        """Whether there is nothing left of it."""
        return self.stage is Stage.REMOVED

    # what happens to it

    def see(self, what: Happening) -> None:
        """Go where a happening leads. Raises ImpossibleHappening, and changes nothing."""
        after = TRANSITIONS.get((self.stage, what))
        if after is None:
            raise ImpossibleHappening(f"'{what}' cannot happen to a session that is {self.stage}")
        if what is Happening.ACCEPTED and self.refuses_messages:
            raise ImpossibleHappening("a session that is being stopped accepts no message")
        if what is Happening.LAUNCHED:
            self.tell(Order.LAUNCH)
        self.stage = after

    def tell(self, order: Order) -> None:
        """Take an order about claude's end. Raises ImpossibleHappening, and changes nothing."""
        after = ENDINGS.get((self.ending, order))
        if after is None:
            raise ImpossibleHappening(f"'{order}' comes too late for a session that is being ended {self.ending}")
        self.ending = after

    @property
    def outstanding(self) -> Happening | None:
        """What is still to happen for the ending that was ordered; None if it has."""
        what, aim = _AIMS.get(self.ending, (None, self.stage))
        return None if self.stage is aim else what

    def meaning_of_exit(self, *, mail: bool, progress: bool, in_order: bool, broken: bool) -> Happening:
        """Return what claude's end means.

        `mail` tells whether messages wait, `progress` whether this claude has done away with one, `in_order` whether it
        ended with nothing left to do, `broken` whether the journal cannot be written. Another claude is started for
        what waits only after progress: so this comes to an end.
        """
        if (aim := _AIMS.get(self.ending)) is not None:
            return aim[0]
        if broken:
            return Happening.DIED
        if mail and (progress or self.ending is Ending.TO_SLEEP):
            return Happening.DIED_WITH_MAIL
        return Happening.LEFT_IN_ORDER if in_order and not mail else Happening.DIED
