"""Channels over a connection: pairing, order, numbers, closes that cross, and peers that break the rules."""

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from kit.sim_peers import connect_ends, seeds
from sim import SimNetwork, run

from p2pclaude.hyperdht.encoding import buffer, uint
from p2pclaude.hyperdht.errors import ConnectionClosed, DecodeError
from p2pclaude.hyperdht.relay.mux import MAX_REMOTE_CHANNELS, MAX_WAITING_BYTES, MESSAGE_COST, Channel, Mux, OnOffer
from p2pclaude.hyperdht.relay.mux_frames import (
    ChannelClose,
    ChannelMessage,
    ChannelOpen,
    ChannelReject,
    Frame,
    decode_frames,
    encode_frame,
)
from p2pclaude.hyperdht.secure.connection import Connection

Message = tuple[int, bytes]
SETTLE = 1.0  # virtual seconds, many times what a message takes


class Log:
    """What became of one channel."""

    def __init__(self) -> None:
        self.opened: list[bytes] = []
        self.messages: list[Message] = []
        self.closed = 0
        self.channel: Channel | None = None

    def open(
        self, mux: Mux, protocol: str = "chat", channel_id: bytes | None = None, handshake: bytes = b""
    ) -> Channel:
        """Open a channel that tells this log."""
        self.channel = mux.open(
            protocol,
            channel_id,
            on_message=lambda kind, payload: self.messages.append((kind, payload)),
            on_open=self.opened.append,
            on_close=self._count,
            handshake=handshake,
        )
        return self.channel

    def _count(self) -> None:
        self.closed += 1


@asynccontextmanager
async def two_muxes(offer: OnOffer | None = None, seed: object = 1) -> AsyncIterator[tuple[Mux, Mux]]:
    """Give the muxes of both ends of a connection, running; `offer` is the second one's."""
    ends = await connect_ends(SimNetwork(seed))
    pair = Mux(ends[0].connection), Mux(ends[1].connection, offer)
    running = [asyncio.create_task(mux.run()) for mux in pair]
    try:
        yield pair
    finally:
        await asyncio.gather(*(mux.connection.close() for mux in pair))
        await asyncio.gather(*running)


class Raw:
    """A peer that is no mux: sends any frames, and keeps those it gets."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.frames: list[Frame] = []

    def send(self, *frames: Frame | bytes) -> None:
        """Send frames, or messages given as bytes."""
        for frame in frames:
            self.connection.send_frame(frame if isinstance(frame, bytes) else encode_frame(frame))

    async def run(self) -> None:
        """Collect the other side's frames."""
        try:
            while data := await self.connection.read_frame():
                self.frames += decode_frames(data)
        except ConnectionClosed:
            pass


@asynccontextmanager
async def mux_and_raw(offer: OnOffer | None = None) -> AsyncIterator[tuple[Mux, Raw]]:
    """Give a running mux and a raw peer."""
    ends = await connect_ends(SimNetwork(1))
    mux, raw = Mux(ends[0].connection, offer), Raw(ends[1].connection)
    running = [asyncio.create_task(mux.run()), asyncio.create_task(raw.run())]
    try:
        yield mux, raw
    finally:
        await asyncio.gather(mux.connection.close(), raw.connection.close())
        await asyncio.gather(*running)


def simulate(main: Coroutine[Any, Any, None], seed: object = 1) -> None:
    run(main, seed=seed)


def test_both_sides_open_and_messages_go_both_ways() -> None:
    """Whoever opens first: handshakes, kinds and payloads arrive; the sides' numbers need not be the same."""

    async def main() -> None:
        async with two_muxes(lambda protocol, channel_id: True) as (a, b):
            logs = [Log() for _ in range(6)]
            logs[4].open(a, "other")  # moves a's numbers
            first = logs[0].open(a, "chat", b"x", b"from a")
            first.send(3, b"early")
            await asyncio.sleep(SETTLE)
            assert not first.opened
            second = logs[1].open(b, "chat", b"x", b"from b")
            assert (first.number, second.number) == (2, 1)
            await asyncio.sleep(SETTLE)
            second.send(0, b"")
            first.send(300, b"later")
            await asyncio.sleep(SETTLE)
            assert first.opened and second.opened
            assert (logs[0].opened, logs[1].opened) == ([b"from b"], [b"from a"])
            assert (logs[0].messages, logs[1].messages) == ([(0, b"")], [(3, b"early"), (300, b"later")])

    simulate(main())


def test_same_name_pairs_in_order_and_ids_tell_apart() -> None:
    """Channels of one protocol and id pair first with first; another id, or none, is another channel."""

    async def main() -> None:
        async with two_muxes(lambda protocol, channel_id: True) as (a, b):
            names = [("p", b"1"), ("p", None), ("p", b"1"), ("q", b"1")]
            for_a, for_b = [Log() for _ in names], [Log() for _ in names]
            for number, (log, name) in enumerate(zip(for_a, names, strict=True)):
                log.open(a, *name).send(0, b"%d" % number)
            for log, name in reversed(list(zip(for_b, names, strict=True))):
                log.open(b, *name)
            await asyncio.sleep(SETTLE)
            # The two of the same name: b opened its third log first, so that is a's first.
            assert [log.messages for log in for_b] == [[(0, b"2")], [(0, b"1")], [(0, b"0")], [(0, b"3")]]

    simulate(main())


def test_what_nobody_wants_is_rejected() -> None:
    """Without a taker the opener's channel closes, and its number is free again; sending on it harms nothing."""

    async def main() -> None:
        offered: list[tuple[str, bytes | None]] = []

        def offer(protocol: str, channel_id: bytes | None) -> bool:
            offered.append((protocol, channel_id))
            return False

        async with two_muxes(offer) as (a, _):
            log = Log()
            channel = log.open(a, "chat", b"id")
            channel.send(0, b"lost")
            await asyncio.sleep(SETTLE)
            assert channel.closed and not channel.opened and log.closed == 1
            channel.send(0, b"lost too")
            channel.close()
            assert Log().open(a).number == 1
            await asyncio.sleep(SETTLE)
            assert offered == [("chat", b"id"), ("chat", None)]
            assert not a.connection.closed

    simulate(main())


def test_an_offer_may_be_taken_at_once() -> None:
    """The hook opens the channel itself; messages sent before are delivered after it holds the channel."""

    async def main() -> None:
        taken = Log()

        def offer(protocol: str, channel_id: bytes | None) -> bool:
            taken.open(pair[1], protocol, channel_id)
            return False

        async with two_muxes(offer) as pair:
            log = Log()
            channel = log.open(pair[0])
            channel.send(7, b"first")
            channel.close()
            await asyncio.sleep(SETTLE)
            assert (taken.messages, taken.closed, len(taken.opened)) == ([(7, b"first")], 1, 1)

    simulate(main())


@pytest.mark.parametrize("who", ["opener", "taker", "both"])
def test_close(who: str) -> None:
    """One side's close closes both, closes may cross; what was sent before arrives, numbers are used again."""

    async def main() -> None:
        async with two_muxes(lambda protocol, channel_id: True) as (a, b):
            for turn in range(20):
                logs = Log(), Log()
                one, two = logs[0].open(a), logs[1].open(b)
                await asyncio.sleep(SETTLE)
                assert one.opened and two.opened and (one.number, two.number) == (1, 1)
                for channel in {"opener": [one], "taker": [two], "both": [one, two]}[who]:
                    channel.send(0, b"%d" % turn)
                    channel.close()
                    channel.close()
                await asyncio.sleep(SETTLE)
                assert one.closed and two.closed and [log.closed for log in logs] == [1, 1]
                # Whoever has closed hears nothing more.
                wanted = {"opener": (0, 1), "taker": (1, 0), "both": (0, 0)}[who]
                assert tuple(len(log.messages) for log in logs) == wanted

    simulate(main())


@pytest.mark.parametrize("kept", [True, False])
def test_close_before_the_peer_has_answered(kept: bool) -> None:
    """A channel taken back before it was paired: the number stays in use until the peer's answer, and is free then."""

    async def main() -> None:
        async with two_muxes(lambda protocol, channel_id: kept) as (a, b):
            first = Log().open(a)
            first.close()
            assert Log().open(a, "other").number == 2
            await asyncio.sleep(SETTLE)
            assert Log().open(a, "third").number == 1
            # The peer, which waited with it, does not find it any more.
            later = Log()
            channel = later.open(b)
            await asyncio.sleep(SETTLE)
            assert channel.closed and not later.opened

    simulate(main())


def test_opens_that_cross_with_a_close() -> None:
    """The peer opens its side while we take ours back: its channel closes, and the numbers work again on both."""

    async def main() -> None:
        async with two_muxes() as (a, b):
            logs = Log(), Log()
            one, two = logs[0].open(a), logs[1].open(b)  # both on the way
            one.close()
            await asyncio.sleep(SETTLE)
            assert two.closed and not logs[0].opened
            logs = Log(), Log()
            one, two = logs[0].open(a), logs[1].open(b)
            one.send(0, b"hi")
            await asyncio.sleep(SETTLE)
            assert (one.number, two.number) == (1, 1)
            assert logs[1].messages == [(0, b"hi")]

    simulate(main())


def test_the_connections_end_closes_channels() -> None:
    """Each channel learns it once, also one that the peer never opened; opening another one fails."""

    async def main() -> None:
        async with two_muxes(lambda protocol, channel_id: True) as (a, b):
            logs = [Log() for _ in range(3)]
            logs[0].open(a), logs[1].open(b), logs[2].open(a, "lonely")
            await asyncio.sleep(SETTLE)
            b.connection.abort()
            await asyncio.sleep(SETTLE)
            assert [log.closed for log in logs] == [1, 1, 1]
            with pytest.raises(ConnectionClosed):
                Log().open(a)

    simulate(main())


# A peer that is no mux


def batch(channel: int, *parts: bytes) -> bytes:
    """Encode a batch: parts are a kind and a payload each; an empty one is followed by the number it switches to."""
    return b"\x00\x00" + uint(channel) + b"".join(parts)


def test_batches() -> None:
    """One message that opens, talks on two channels, and closes one."""

    async def main() -> None:
        async with mux_and_raw() as (mux, raw):
            logs = Log(), Log()
            logs[0].open(mux, "p")
            logs[1].open(mux, "q")
            opens = [encode_frame(ChannelOpen(number, name))[1:] for number, name in ((1, "q"), (2, "p"))]
            talk = [buffer(b"\x05one"), buffer(b"\x06two")]
            close = encode_frame(ChannelClose(1))[1:]
            switches = [b"\x00" + uint(number) for number in (1, 2, 0)]
            raw.send(batch(0, *map(buffer, opens), switches[0], *talk, switches[1], *talk, switches[2], buffer(close)))
            await asyncio.sleep(SETTLE)
            assert logs[0].messages == logs[1].messages == [(5, b"one"), (6, b"two")]
            assert (logs[0].closed, logs[1].closed) == (0, 1)

    simulate(main())


def test_stray_frames_are_ignored() -> None:
    """Messages and closes for what is closed already, unknown kinds and empty messages do nothing; 0 is rejected."""

    async def main() -> None:
        async with mux_and_raw() as (mux, raw):
            raw.send(ChannelMessage(9, 0, b"x"), ChannelClose(9), ChannelClose(0), b"\x00\x09abc", ChannelOpen(0, "p"))
            await asyncio.sleep(SETTLE)
            assert raw.frames == [ChannelReject(0)]
            assert not mux.connection.closed

    simulate(main())


HOSTILE: dict[str, list[Frame | bytes]] = {
    "a gap in the numbers": [ChannelOpen(3, "kept")],
    "a number in use": [ChannelOpen(1, "kept"), ChannelOpen(1, "kept")],
    "a rejection of nothing": [ChannelReject(1)],
    "a batch in a batch": [batch(0, buffer(b"\x00\x01"))],
    "cut short": [b"\x00\x01"],
    "a number that is none": [b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00"],
    "a message that does not decode": [ChannelOpen(1, "strict"), ChannelMessage(1, 0, b"")],
    "too many channels": [ChannelOpen(number + 1, "kept") for number in range(MAX_REMOTE_CHANNELS + 1)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_who_breaks_the_rules_is_broken_off(name: str) -> None:
    """The connection ends, channels are told, and nothing is raised."""

    def strict(kind: int, payload: bytes) -> None:
        raise DecodeError("never right")

    async def main() -> None:
        async with mux_and_raw(lambda protocol, channel_id: True) as (mux, raw):
            log = Log()
            log.open(mux, "mine")
            raw.send(ChannelOpen(1, "mine"), ChannelClose(1))  # so that it is open to closed numbers too
            await asyncio.sleep(SETTLE)
            mux.open("strict", on_message=strict)
            raw.send(*HOSTILE[name])
            if name == "a rejection of nothing":  # 1 is "strict", which may be rejected once
                raw.send(ChannelReject(1))
            await asyncio.sleep(SETTLE)
            assert mux.connection.closed and raw.connection.closed
            assert log.closed == 1

    simulate(main())


def test_as_many_channels_as_there_may_be() -> None:
    """The limit itself is allowed, and closed channels do not count."""

    async def main() -> None:
        async with mux_and_raw(lambda protocol, channel_id: True) as (mux, raw):
            for number in range(MAX_REMOTE_CHANNELS):
                raw.send(ChannelOpen(number + 1, "kept"))
            raw.send(ChannelClose(3), ChannelOpen(3, "kept"))
            await asyncio.sleep(SETTLE)
            assert raw.frames == [ChannelReject(3)]
            assert not mux.connection.closed

    simulate(main())


def test_early_messages_wait_within_bounds() -> None:
    """Nothing more is read while too much waits; opening the channel brings it all, in order."""

    async def main() -> None:
        async with mux_and_raw(lambda protocol, channel_id: True) as (mux, raw):
            fitting = MAX_WAITING_BYTES // (MESSAGE_COST + 100)
            raw.send(ChannelOpen(1, "chat"))
            sent = [(number, bytes(100)) for number in range(3 * fitting)]
            raw.send(*(ChannelMessage(1, kind, payload) for kind, payload in sent))
            raw.send(ChannelOpen(2, "chat"))
            await asyncio.sleep(SETTLE)
            log = Log()
            log.open(mux)
            assert log.messages == []
            await asyncio.sleep(0)
            assert log.messages == sent[: fitting + 1]  # the one that went over was read, the next was not
            await asyncio.sleep(SETTLE)
            assert log.messages == sent

    simulate(main())


@pytest.mark.parametrize("how", ["close", "abort", "reject"])
def test_a_full_wait_does_not_hang(how: str) -> None:
    """While reading pauses the connection may end, on either side, and `run` ends with it."""

    async def main() -> None:
        async with mux_and_raw(lambda protocol, channel_id: True) as (mux, raw):
            raw.send(ChannelOpen(1, "chat"), ChannelMessage(1, 0, bytes(MAX_WAITING_BYTES)), ChannelClose(1))
            await asyncio.sleep(SETTLE)
            assert raw.frames == []  # its close is not read
            if how == "reject":
                log = Log()
                log.open(mux)
                await asyncio.sleep(SETTLE)
                assert (len(log.messages), log.closed) == (1, 1)
            elif how == "abort":
                raw.connection.abort()
                await asyncio.sleep(SETTLE)
                assert mux.connection.closed

    simulate(main())


def test_a_peer_that_takes_nothing_is_broken_off() -> None:
    """What waits to be sent is bounded."""

    async def main() -> None:
        net = SimNetwork(1)
        ends = await connect_ends(net)
        mux = Mux(ends[0].connection)
        running = asyncio.create_task(mux.run())
        channel = Log().open(mux)
        net.internet.link.loss = 1.0
        for _ in range(64):
            channel.send(0, bytes(65536))
        assert mux.connection.closed
        await running
        ends[1].connection.abort()

    simulate(main())


@pytest.mark.parametrize("seed", seeds(20))
def test_random_opens_and_closes(seed: int) -> None:
    """However opens, messages and closes of two sides cross: no rule is broken, pairs agree, and all numbers return."""

    async def main() -> None:
        rng = random.Random(seed)
        async with two_muxes(lambda protocol, channel_id: rng.random() < 0.5, seed) as pair:
            live: list[tuple[Log, int]] = []
            for step in range(300):
                side = rng.randrange(2)
                if rng.random() < 0.5 or not live:
                    log = Log()
                    log.open(pair[side], rng.choice("pq"), handshake=b"%d" % step)
                    live.append((log, step))
                else:
                    log, opened_at = rng.choice(live)
                    assert log.channel is not None
                    log.channel.send(opened_at, b"%d" % step)
                    if rng.random() < 0.6:
                        log.channel.close()
                if rng.random() < 0.7:
                    await asyncio.sleep(rng.random() * 0.05)
            await asyncio.sleep(SETTLE)
            for log, _ in live:
                assert log.channel is not None
                log.channel.close()
            await asyncio.sleep(SETTLE)
            for log, _ in live:
                assert log.closed == 1
                # All that a channel heard came from the one that greeted it.
                assert {b"%d" % kind for kind, _ in log.messages} <= set(log.opened)
                said = [int(payload) for _, payload in log.messages]
                assert said == sorted(said)
            assert not any(mux.connection.closed for mux in pair), seed
            assert [Log().open(mux, "new").number for mux in pair] == [1, 1]

    simulate(main(), seed)
