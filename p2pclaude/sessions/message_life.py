"""The life of a message, as a table (pure).

Where a message may go next stands here. `inbox` keeps the messages in their order and says what happened to each;
`session` finds out, when a claude has ended, whether a message was begun. A message that is accepted gets to DONE or
CUT_OFF, whatever dies meanwhile, unless its session is stopped for good: what waits then stays.

TAKEN and BEGUN are two things, and come in either order: Claude says that it has taken a message in, and it prints what
shows that it works. The first tells which answer is whose, the second that the message must not run again.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Stage(StrEnum):
    """Where a message is."""

    WAITING = "waiting"
    """It is in the journal, and claude has not had it."""
    HANDED = "handed"
    """Claude was given it, or will have been: the journal says so."""
    TAKEN = "taken"
    """Claude has said that it took the message in."""
    BEGUN = "begun"
    """Claude has printed something since it was handed the message: work may have begun."""
    WORKED_ON = "worked on"
    """Both."""
    DONE = "done"
    """It has its answer."""
    CUT_OFF = "cut off"
    """It has none, and will not run again: what it did may stand."""


class Happening(StrEnum):
    """What can happen to a message."""

    HANDED_OVER = "handed over"
    REPLAYED = "claude repeats it"
    OUTPUT = "claude prints"
    ANSWERED = "result"
    HANDED_BACK = "claude died before it began"
    CUT = "claude died or had it before"


_WITH_CLAUDE: Final = (Stage.HANDED, Stage.TAKEN, Stage.BEGUN, Stage.WORKED_ON)

TRANSITIONS: Final[Mapping[tuple[Stage, Happening], Stage]] = {
    (Stage.WAITING, Happening.HANDED_OVER): Stage.HANDED,
    (Stage.WAITING, Happening.CUT): Stage.CUT_OFF,  # it ran from another copy of the journal
    (Stage.HANDED, Happening.REPLAYED): Stage.TAKEN,
    (Stage.TAKEN, Happening.REPLAYED): Stage.TAKEN,
    (Stage.BEGUN, Happening.REPLAYED): Stage.WORKED_ON,
    (Stage.WORKED_ON, Happening.REPLAYED): Stage.WORKED_ON,
    (Stage.HANDED, Happening.OUTPUT): Stage.BEGUN,
    (Stage.BEGUN, Happening.OUTPUT): Stage.BEGUN,
    (Stage.TAKEN, Happening.OUTPUT): Stage.WORKED_ON,
    (Stage.WORKED_ON, Happening.OUTPUT): Stage.WORKED_ON,
    **{(stage, Happening.ANSWERED): Stage.DONE for stage in _WITH_CLAUDE},
    **{(stage, Happening.CUT): Stage.CUT_OFF for stage in _WITH_CLAUDE},
    # Not once it has begun: its work would run twice.
    **{(stage, Happening.HANDED_BACK): Stage.WAITING for stage in (Stage.HANDED, Stage.TAKEN)},
}
"""Which happening leads where. A pair that is not here cannot happen: nothing happens to what is over."""

BEGUN: Final = frozenset({Stage.BEGUN, Stage.WORKED_ON})
TAKEN: Final = frozenset({Stage.TAKEN, Stage.WORKED_ON})
OVER: Final = frozenset({Stage.DONE, Stage.CUT_OFF})


def after(stage: Stage, what: Happening) -> Stage:
    """Return where a happening leads."""
    next_stage = TRANSITIONS.get((stage, what))
    assert next_stage is not None, f"'{what}' cannot happen to a message that is {stage}"
    return next_stage
