"""A server's slots: bounded, shared out by host, and empty when everybody is gone."""

from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pclaude.hyperdht.peer import slots as module
from p2pclaude.hyperdht.peer.pending_client import PendingClient
from p2pclaude.hyperdht.peer.slots import Slots


class Waiting:
    """Stands in for a pending client: all that slots do with one is to break it off."""

    def __init__(self) -> None:
        self.aborted = False
        self.connection = self

    def abort(self) -> None:
        """Learn that the slot is lost."""
        self.aborted = True


def take(slots: Slots, host: str) -> tuple[int, Waiting]:
    """Give a new client of a host a slot."""
    waiting = Waiting()
    return slots.take(cast(PendingClient, waiting), host), waiting


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four slots are enough to see what happens when there are none left."""
    monkeypatch.setattr(module, "MAX_PENDING", 4)


def test_the_busiest_host_loses_its_oldest_client() -> None:
    slots = Slots()
    taken = [take(slots, host) for host in ("quiet", "busy", "busy", "busy")]
    assert len(slots) == 4
    assert slots.make_room("another")
    assert [waiting.aborted for _, waiting in taken] == [False, True, False, False]
    assert slots.find(taken[1][0]) is None and slots.held == {"quiet": 1, "busy": 2}
    slots.give_back(taken[1][0])  # it was lost before
    assert slots.held == {"quiet": 1, "busy": 2} and len(slots) == 3


def test_a_host_that_holds_the_most_gets_no_room() -> None:
    slots = Slots()
    taken = [take(slots, host) for host in ("a", "a", "b", "b")]
    assert not slots.make_room("a") and not slots.make_room("b")
    assert slots.make_room("c")
    assert [waiting.aborted for _, waiting in taken] == [True, False, False, False]


def test_room_is_made_only_when_there_is_none() -> None:
    slots = Slots()
    _, waiting = take(slots, "a")
    for _ in range(2):
        take(slots, "a")
    assert slots.make_room("a") and not waiting.aborted
    take(slots, "a")
    assert not slots.make_room("a") and slots.make_room("b") and waiting.aborted


def test_rounds_reach_a_client_until_its_way_is_settled() -> None:
    slots = Slots()
    slot, waiting = take(slots, "a")
    client = cast(PendingClient, waiting)
    assert slots.find(slot) is client and not slots.is_settled
    slots.begin_settling(slot, client)
    slots.give_back(slot)
    assert slots.find(slot) is client and not slots and not slots.is_settled and not slots.held
    slots.end_settling(slot)
    assert slots.find(slot) is None and slots.is_settled


def test_abort_breaks_off_all_that_wait() -> None:
    slots = Slots()
    taken = [take(slots, "a") for _ in range(3)]
    slots.abort()
    assert all(waiting.aborted for _, waiting in taken)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_numbers_are_new_and_counts_agree(steps: list[tuple[str, bool]]) -> None:
    slots = Slots()
    given_out: list[int] = []
    for host, leaves in steps:
        if leaves and given_out:
            slots.give_back(given_out[len(given_out) // 2])
        elif slots.make_room(host):
            slot, _ = take(slots, host)
            assert slot not in given_out
            given_out.append(slot)
        assert len(slots) <= 4 and slots.held.total() == len(slots)
        assert slots.is_settled == (not slots)
