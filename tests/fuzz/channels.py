"""Protomux: frames of a hostile peer, and what the application does meanwhile."""

import asyncio
from typing import Final, cast

from fuzz import virtual
from fuzz.decoders import frame_seeds
from fuzz.target import Script, Target
from p2pclaude.hyperdht.errors import ConnectionClosed, DecodeError
from p2pclaude.hyperdht.relay.mux import MAX_REMOTE_CHANNELS, MAX_WAITING_BYTES, Channel, Mux
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

MAX_STEPS: Final = 400
PROTOCOLS: Final = ("blind-relay", "a")
IDS: Final = (None, b"x", bytes(32))


class _Peer:
    """A connection as the mux sees it, whose frames come from a script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.closed = False
        self.unsent = 0
        self.steps = 0
        self.application: _Application | None = None

    async def read_frame(self) -> bytes:
        while self.script.more and self.steps < MAX_STEPS and not self.closed:
            self.steps += 1
            assert self.application is not None
            choice = self.script.byte()
            if choice >= 200:
                self.application.act(choice, self.script)
                await asyncio.sleep(0)
                continue
            if frame := _frame(choice, self.script):
                return frame
        if self.closed:
            raise ConnectionClosed("closed")
        return b""

    def send_frame(self, data: bytes) -> None:
        if self.closed:
            raise ConnectionClosed("closed")
        assert decode_frames(data), "a frame that no peer could read"

    def abort(self) -> None:
        self.closed = True

    async def wait_closed(self) -> None:
        await asyncio.sleep(1.0)  # nobody opens what waits: the peer gives up
        self.closed = True


def _frame(choice: int, script: Script) -> bytes:
    kind, number = choice % 8, script.byte() & 15
    made: Frame
    match kind:
        case 0 | 1:
            made = ChannelOpen(number, PROTOCOLS[script.byte() & 1], IDS[script.byte() % 3], script.chunk())
        case 2:
            made = ChannelReject(number)
        case 3:
            made = ChannelClose(number)
        case 4 | 5:
            made = ChannelMessage(number or 1, script.byte(), bytes(script.byte() * 40))
        case _:
            return script.chunk()
    return encode_frame(made)


class _Application:
    """Opens, uses and closes channels as the script says, and counts what it hears."""

    def __init__(self, mux: Mux, script: Script) -> None:
        self.mux = mux
        self.script = script
        self.channels: list[Channel] = []
        self.closes: list[int] = []

    def act(self, choice: int, script: Script) -> None:
        """Do one thing."""
        if choice < 225:
            try:
                self.open(PROTOCOLS[script.byte() & 1], IDS[script.byte() % 3])
            except ConnectionClosed:
                pass
        elif self.channels:
            channel = self.channels[script.byte() % len(self.channels)]
            if choice < 240:
                channel.close()
            else:
                channel.send(script.byte(), script.chunk())

    def open(self, protocol: str, channel_id: bytes | None) -> None:
        """Open a channel that notes how it ends."""
        index = len(self.channels)
        self.closes.append(0)

        def on_close() -> None:
            self.closes[index] += 1

        def on_message(kind: int, payload: bytes) -> None:
            assert channel.opened and not channel.closed
            if kind == 77:
                raise DecodeError("not what it should be")
            if kind == 78:
                channel.close()

        channel = self.mux.open(protocol, channel_id, on_message=on_message, on_close=on_close)
        self.channels.append(channel)

    def on_offer(self, protocol: str, channel_id: bytes | None) -> bool:
        """Open, keep or refuse what the peer offers."""
        choice = self.script.byte() % 3
        if choice == 1:
            self.open(protocol, channel_id)
        return choice == 2


async def _talk(script: Script) -> None:
    peer = _Peer(script)
    mux = Mux(cast("Connection", peer), lambda protocol, channel_id: application.on_offer(protocol, channel_id))
    application = peer.application = _Application(mux, script)
    await mux.run()
    await asyncio.sleep(0)
    assert len(mux._remote) <= MAX_REMOTE_CHANNELS
    assert 0 <= mux._waiting_bytes <= MAX_WAITING_BYTES + 255 * 40 + 65536
    assert mux._waiting_bytes == sum(remote.waiting_bytes for remote in mux._remote.values())
    assert not mux._local, "channels that outlive the connection"
    assert all(channel.closed for channel in application.channels)
    assert set(application.closes) <= {1}, f"on_close was called {application.closes} times"
    assert len(set(mux._free)) == len(mux._free), "a number that is free twice"
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    assert not pending, f"left behind: {pending}"


def _run_mux(data: bytes) -> None:
    virtual.run(_talk(Script(data)))


def _mux_seeds() -> list[bytes]:
    raw = b"".join(bytes((6, 0, len(frame))) + frame for frame in frame_seeds() if len(frame) < 256)
    offered = bytes((0, 1, 0, 0, 2, 104, 105, 1)) + bytes((4, 1, 0, 9, 12, 1, 78, 0, 3, 1))
    waiting = bytes((0, 1, 1, 1, 0, 2)) + bytes((4, 1, 0, 255)) * 5 + bytes((210, 1, 1))
    ours = bytes((210, 0, 0, 0, 1, 0, 0, 0, 250, 0, 1, 3, 97, 98, 99, 230, 0, 3, 1, 210, 1, 1, 2, 2))
    return [raw, offered, waiting, ours, ours + offered + waiting]


TARGETS: Final = (Target("mux", _run_mux, 4000, max_bytes=1000, seeds=_mux_seeds),)
