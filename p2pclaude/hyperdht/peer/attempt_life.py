"""The life of one attempt to connect, as a table (ring 1).

Everything that decides what an attempt may do next stands here; `dial` says what happened and asks where that leads.
One life goes through all the handshakes that a single call of `connect` makes, since it is the call that ends once,
with a connection or with a cause. What follows upon OPEN is the connection's life, and no longer the attempt's.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

MAX_PUNCHES: Final = 3  # handshakes after which no way was found: NATs make it a matter of luck, but not of patience


class Stage(StrEnum):
    """Where an attempt stands."""

    SEEKING = "seeking"
    """Nodes that know the server are looked for, and a handshake is under way through each."""
    OPENING = "opening"
    """The handshake is through: first packets go to where the server may be reached without any help."""
    REACHING = "reaching"
    """They did not do: holes are punched, and a relay is asked if one is named."""
    RESTING = "resting"
    """One of the two sides is busy with other hole punches; it will be asked again in a few seconds."""
    OPEN = "open"
    """The server's first bytes have arrived and decrypted."""
    FAILED = "failed"
    """The call ends with the cause."""


class Event(StrEnum):
    """What can happen to an attempt."""

    SHAKEN = "handshake is through"
    UNANSWERED = "no valid handshake"
    HELP_NEEDED = "help is needed"
    OPENED = "server's bytes decrypt"
    BROKEN_OFF = "server broke it off"
    TOLD_TO_WAIT = "try later"
    RESTED = "pause is over"
    NO_WAY = "no way was found"
    NO_WAY_LEFT = "no way once too often"
    GIVEN_UP = "deadline or caller gone"


TRANSITIONS: Final[Mapping[tuple[Stage, Event], Stage]] = {
    (Stage.SEEKING, Event.SHAKEN): Stage.OPENING,
    (Stage.SEEKING, Event.UNANSWERED): Stage.FAILED,
    (Stage.SEEKING, Event.GIVEN_UP): Stage.FAILED,
    (Stage.OPENING, Event.OPENED): Stage.OPEN,
    (Stage.OPENING, Event.HELP_NEEDED): Stage.REACHING,
    (Stage.OPENING, Event.BROKEN_OFF): Stage.FAILED,
    (Stage.OPENING, Event.GIVEN_UP): Stage.FAILED,
    (Stage.REACHING, Event.OPENED): Stage.OPEN,
    (Stage.REACHING, Event.BROKEN_OFF): Stage.FAILED,
    (Stage.REACHING, Event.TOLD_TO_WAIT): Stage.RESTING,
    (Stage.REACHING, Event.NO_WAY): Stage.SEEKING,
    (Stage.REACHING, Event.NO_WAY_LEFT): Stage.FAILED,
    (Stage.REACHING, Event.GIVEN_UP): Stage.FAILED,
    (Stage.RESTING, Event.RESTED): Stage.SEEKING,
    (Stage.RESTING, Event.GIVEN_UP): Stage.FAILED,
}
"""Which event leads where. A pair that is not here cannot happen."""

OVER: Final = frozenset({Stage.OPEN, Stage.FAILED})


class AttemptLife:
    """One attempt: its stage, and how many ways have come to nothing."""

    __slots__ = ("_fruitless", "stage")

    def __init__(self) -> None:
        self.stage = Stage.SEEKING
        self._fruitless = 0

    @property
    def is_over(self) -> bool:
        """Whether the attempt has ended, well or not."""
        return self.stage in OVER

    def see(self, event: Event) -> None:
        """Go where an event leads."""
        after = TRANSITIONS.get((self.stage, event))
        assert after is not None, f"{event.name} cannot happen to an attempt that is {self.stage}"
        self.stage = after

    def see_no_way(self) -> None:
        """Count a handshake that led to no path: the attempt goes on a few times, then it has failed."""
        self._fruitless += 1
        self.see(Event.NO_WAY if self._fruitless < MAX_PUNCHES else Event.NO_WAY_LEFT)

    def give_up(self) -> None:
        """Fail, unless the attempt is over: whoever called has no time left, or is gone."""
        if not self.is_over:
            self.see(Event.GIVEN_UP)
