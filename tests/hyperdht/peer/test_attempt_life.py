"""The life of an attempt to connect: every row of its table, random walks, and what real attempts go through."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kit.sim_dht import Swarm, cone, echo, swarm, symmetric
from sim import Link, run

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.errors import HolepunchError, PeerNotFound, Timeout
from p2pclaude.hyperdht.peer.attempt_life import MAX_PUNCHES, OVER, TRANSITIONS, AttemptLife, Event, Stage
from p2pclaude.hyperdht.peer.punch_throttle import PunchThrottle

WAYS: Mapping[Event, tuple[set[Stage], Stage]] = {
    Event.SHAKEN: ({Stage.SEEKING}, Stage.OPENING),
    Event.UNANSWERED: ({Stage.SEEKING}, Stage.FAILED),
    Event.HELP_NEEDED: ({Stage.OPENING}, Stage.REACHING),
    Event.OPENED: ({Stage.OPENING, Stage.REACHING}, Stage.OPEN),
    Event.BROKEN_OFF: ({Stage.OPENING, Stage.REACHING}, Stage.FAILED),
    Event.TOLD_TO_WAIT: ({Stage.REACHING}, Stage.RESTING),
    Event.RESTED: ({Stage.RESTING}, Stage.SEEKING),
    Event.NO_WAY: ({Stage.REACHING}, Stage.SEEKING),
    Event.NO_WAY_LEFT: ({Stage.REACHING}, Stage.FAILED),
    Event.GIVEN_UP: ({Stage.SEEKING, Stage.OPENING, Stage.REACHING, Stage.RESTING}, Stage.FAILED),
}
"""What each event means, said the other way round: in which stages it can happen, and what comes of it."""


@pytest.mark.parametrize(("stage", "event"), [(stage, event) for stage in Stage for event in Event])
def test_each_event_leads_where_it_should_or_cannot_happen(stage: Stage, event: Event) -> None:
    life = AttemptLife()
    life.stage = stage
    before, after = WAYS[event]
    if stage in before:
        life.see(event)
        assert life.stage is after
    else:
        with pytest.raises(AssertionError, match="cannot happen"):
            life.see(event)
        assert life.stage is stage


def test_the_table_is_whole() -> None:
    """Every stage but the first is led to, every event leads somewhere, and what is over stays so."""
    assert {*TRANSITIONS.values(), Stage.SEEKING} == set(Stage)
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert not OVER & {stage for stage, _ in TRANSITIONS}
    assert {stage for stage, event in TRANSITIONS if event is Event.GIVEN_UP} == set(Stage) - OVER
    assert {Stage.OPEN, Stage.FAILED} == OVER


def test_only_so_many_ways_come_to_nothing() -> None:
    life = AttemptLife()
    for count in range(1, MAX_PUNCHES + 1):
        assert life.stage is Stage.SEEKING
        life.see(Event.SHAKEN)
        life.see(Event.HELP_NEEDED)
        life.see_no_way()
        assert life.is_over == (count == 3)
    assert life.stage is Stage.FAILED
    life.give_up()  # once more is harmless
    assert life.stage is Stage.FAILED


class Walk(RuleBasedStateMachine):
    """Random events, as `dial` would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.life = AttemptLife()
        self.seen: list[Event] = []
        self.fruitless = 0

    @precondition(lambda self: not self.life.is_over)
    @rule(data=st.data())
    def happen(self, data: st.DataObject) -> None:
        """See one of the events that can happen now."""
        possible = [event for stage, event in TRANSITIONS if stage is self.life.stage]
        event = data.draw(st.sampled_from(possible))
        self.seen.append(event)
        if event in (Event.NO_WAY, Event.NO_WAY_LEFT):
            self.fruitless += 1
            self.life.see_no_way()
        else:
            self.life.see(event)

    @rule()
    def leave(self) -> None:
        """The caller may be gone at any time."""
        before = self.life.stage
        self.life.give_up()
        assert self.life.stage is (before if before in OVER else Stage.FAILED)

    @invariant()
    def ends_once(self) -> None:
        """It is open after a handshake only, and never tried again once it failed for good."""
        assert self.fruitless <= MAX_PUNCHES
        if self.life.stage is Stage.OPEN:
            assert Event.SHAKEN in self.seen and self.seen[-1] is Event.OPENED
        if self.fruitless == MAX_PUNCHES:
            assert self.life.stage is Stage.FAILED
        assert self.seen.count(Event.SHAKEN) <= 1 + self.seen.count(Event.RESTED) + self.fruitless


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=30, derandomize=True, deadline=None)


class Watched(AttemptLife):
    """A life that keeps what it went through."""

    __slots__ = ()
    all: ClassVar[list[list[Event]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.all.append([])

    def see(self, event: Event) -> None:
        """Note the event of the newest life."""
        super().see(event)
        self.all[-1].append(event)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[Event]]:
    """Give the events of each attempt that a test makes."""
    Watched.all = []
    monkeypatch.setattr("p2pclaude.hyperdht.peer.dial.AttemptLife", Watched)
    return Watched.all


Scenario = Callable[[Swarm], Awaitable[None]]


def play(scenario: Scenario, link: Link | None = None) -> None:
    """Run a scenario in a network of twelve nodes."""

    async def main() -> None:
        async with swarm(3, 12, link) as network:
            await scenario(network)

    run(main(), seed=3)


def test_a_server_without_a_nat_is_reached_by_the_first_packet(seen: list[list[Event]]) -> None:
    async def scenario(network: Swarm) -> None:
        node = await network.join(network.net.host("5.9.0.1"), port=49737)
        server = node.create_server(echo)
        await server.listen(node.key_pair)
        client = await network.join(cone(network.net, 1))
        seen.clear()
        await (await client.connect(server.public_key)).close()

    play(scenario)
    assert seen == [[Event.SHAKEN, Event.HELP_NEEDED, Event.OPENED]]


def test_neighbours_need_no_help(seen: list[list[Event]]) -> None:
    async def scenario(network: Swarm) -> None:
        nat = network.net.nat("5.8.0.1")
        node, client = [await network.join(nat.host(f"192.168.1.{number}")) for number in (2, 3)]
        server = node.create_server(echo)
        await server.listen(node.key_pair)
        seen.clear()
        await (await client.connect(server.public_key)).close()

    play(scenario)
    assert seen == [[Event.SHAKEN, Event.OPENED]]


def test_a_busy_server_makes_the_attempt_rest(seen: list[list[Event]]) -> None:
    async def scenario(network: Swarm) -> None:
        node = await network.join(cone(network.net, 1))
        client = await network.join(symmetric(network.net, 2))
        await asyncio.sleep(5)
        server = node.create_server(echo)
        await server.listen(node.key_pair)
        for _ in range(PunchThrottle.LIMIT):
            node.context.throttle.begin(asyncio.get_running_loop().time())
        asyncio.get_running_loop().call_later(6, node.context.throttle.end)
        seen.clear()
        await (await client.connect(server.public_key, timeout=60)).close()

    play(scenario)
    (events,) = seen
    assert events[:4] == [Event.SHAKEN, Event.HELP_NEEDED, Event.TOLD_TO_WAIT, Event.RESTED]
    assert events[-1] is Event.OPENED and Event.GIVEN_UP not in events


def test_where_no_hole_can_be_punched_it_fails_for_good(seen: list[list[Event]]) -> None:
    async def scenario(network: Swarm) -> None:
        node, client = [await network.join(symmetric(network.net, number)) for number in (1, 2)]
        await asyncio.sleep(5)
        server = node.create_server(echo)
        await server.listen(node.key_pair)
        seen.clear()
        with pytest.raises(HolepunchError):
            await client.connect(server.public_key, timeout=120)

    play(scenario)
    fruitless = [Event.SHAKEN, Event.HELP_NEEDED]
    assert seen == [[*fruitless, Event.NO_WAY] * 2 + [*fruitless, Event.NO_WAY_LEFT]]


@pytest.mark.parametrize(("timeout", "events"), [(60.0, [Event.UNANSWERED]), (0.001, [Event.GIVEN_UP])])
def test_a_server_that_nobody_knows(timeout: float, events: list[Event], seen: list[list[Event]]) -> None:
    async def scenario(network: Swarm) -> None:
        client = await network.join(cone(network.net, 1))
        seen.clear()
        with pytest.raises((PeerNotFound, Timeout)):
            await client.connect(KeyPair.from_seed(bytes(32)).public_key, timeout=timeout)

    play(scenario)
    assert seen == [events]


def test_a_caller_that_leaves_gives_up(seen: list[list[Event]]) -> None:
    async def scenario(network: Swarm) -> None:
        client = await network.join(cone(network.net, 1))
        seen.clear()
        connecting = asyncio.create_task(client.connect(KeyPair.from_seed(bytes(32)).public_key))
        await asyncio.sleep(0.01)
        connecting.cancel()
        await asyncio.wait([connecting])

    play(scenario)
    assert seen == [[Event.GIVEN_UP]]
