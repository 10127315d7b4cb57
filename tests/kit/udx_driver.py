"""A real UDP socket for one `UdxStream`, with a Node peer behind a path that drops and reorders on purpose."""

import heapq
import itertools
import json
import os
import random
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from p2pclaude.hyperdht.udx.stream import (
    Closed,
    DataReceived,
    EndReceived,
    MessageReceived,
    UdxStream,
)

HERE = Path(__file__).parent.parent
NODE_MODULES = Path(os.environ.get("P2PCLAUDE_NODE_MODULES", HERE / "interop" / "node_modules")).resolve()
LOCAL_ID, REMOTE_ID = 11, 22


def missing_tools() -> str | None:
    """Return why the tests with Node cannot run, `None` if they can."""
    if shutil.which("node") is None:
        return "no node: UDX IS NOT TESTED AGAINST udx-native"
    if not (NODE_MODULES / "udx-native").is_dir():
        return f"no udx-native in {NODE_MODULES.name}, run `npm ci`: UDX IS NOT TESTED AGAINST udx-native"
    return None


class LossyPath:
    """What one direction does to packets: drop a share, hold another share up for some milliseconds."""

    def __init__(self, seed: int, loss: float, reordering: float) -> None:
        self._rng = random.Random(seed)
        self._loss = loss
        self._reordering = reordering
        self._held: list[tuple[float, int, bytes]] = []
        self._count = itertools.count()

    def passing(self, datagrams: list[bytes], now: float) -> list[bytes]:
        """Return what comes through now, packets held up earlier included."""
        if not self._loss and not self._reordering:
            return datagrams
        out = []
        for data in datagrams:
            if self._rng.random() < self._loss:
                continue
            if self._rng.random() < self._reordering:
                heapq.heappush(self._held, (now + 0.001 + 0.004 * self._rng.random(), next(self._count), data))
            else:
                out.append(data)
        while self._held and self._held[0][0] <= now:
            out.append(heapq.heappop(self._held)[2])
        return out

    @property
    def due(self) -> float | None:
        """When the next packet that was held up comes through."""
        return self._held[0][0] if self._held else None


class NodeDriver:
    """Runs a stream over loopback against `interop/udx/peer.js` until a condition holds."""

    def __init__(
        self,
        options: dict[str, Any],
        *,
        stream: UdxStream | None = None,
        seed: int = 0,
        loss: float = 0.0,
        reordering: float = 0.0,
        reads: bool = True,
    ) -> None:
        self.stream = stream or UdxStream(LOCAL_ID)
        self.received = bytearray()
        self.messages: list[bytes] = []
        self.ended = False
        self.closed: Closed | None = None
        self.reads = reads
        self.heard: list[dict[str, Any]] = []  # what the Node peer printed
        self._out, self._in = LossyPath(seed, loss, reordering), LossyPath(seed + 1, loss, reordering)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        port = self._socket.getsockname()[1]
        arguments = {"id": REMOTE_ID, "remoteId": LOCAL_ID, "remotePort": port, **options}
        self._node = subprocess.Popen(
            ["node", str(HERE / "interop" / "udx" / "peer.js"), json.dumps(arguments)],
            stdout=subprocess.PIPE,
            env={**os.environ, "NODE_PATH": str(NODE_MODULES)},
        )
        assert self._node.stdout is not None
        self._line = b""
        os.set_blocking(self._node.stdout.fileno(), False)
        self._peer: tuple[str, int] | None = None

    def __enter__(self) -> "NodeDriver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._node.kill()
        self._node.wait()
        assert self._node.stdout is not None
        self._node.stdout.close()
        self._socket.close()

    def said(self, event: str) -> dict[str, Any] | None:
        """Return the first line of this kind that Node printed."""
        return next((line for line in self.heard if line["event"] == event), None)

    def run(self, until: Callable[[], bool], seconds: float = 30.0) -> None:
        """Carry packets until the condition holds; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not until():
            now = time.monotonic()
            assert now < deadline, f"no end in {seconds} s: {self.heard}, {self.stream.sender.stats}"
            self._wait(now)
            self._step(time.monotonic())

    def _wait(self, now: float) -> None:
        times = [self.stream.get_timer(), self._out.due, self._in.due, now + 0.1]
        pause = max(min(t for t in times if t is not None) - now, 0.0)
        assert self._node.stdout is not None
        readable, _, _ = select.select([self._socket.fileno(), self._node.stdout.fileno()], [], [], pause)
        if self._node.stdout.fileno() in readable:
            self._read_lines()

    def _read_lines(self) -> None:
        assert self._node.stdout is not None
        self._line += self._node.stdout.read() or b""
        *lines, self._line = self._line.split(b"\n")
        for line in lines:
            self.heard.append(json.loads(line))
        listening = self.said("listening")
        if self._peer is None and listening is not None:
            self._peer = ("127.0.0.1", listening["port"])
            self.stream.connect(REMOTE_ID, time.monotonic())

    def _step(self, now: float) -> None:
        datagrams = self._in.passing(self._receive(), now)
        if datagrams:
            self.stream.receive_datagrams(datagrams, now)
        timer = self.stream.get_timer()
        if timer is not None and timer <= now:
            self.stream.handle_timer(now)
        self._take_events()
        leaving = self._out.passing(self.stream.datagrams_to_send(now), now)
        self._take_events()
        if self._peer is not None:
            for data in leaving:
                try:
                    self._socket.sendto(data, self._peer)
                except BlockingIOError:
                    break

    def _receive(self) -> list[bytes]:
        datagrams: list[bytes] = []
        while len(datagrams) < 64:
            try:
                datagrams.append(self._socket.recv(2048))
            except (BlockingIOError, ConnectionRefusedError):
                break
        return datagrams

    def _take_events(self) -> None:
        while (event := self.stream.next_event()) is not None:
            match event:
                case DataReceived(data):
                    self.received += data
                    if self.reads:
                        self.stream.consume(len(data))
                case MessageReceived(data):
                    self.messages.append(data)
                case EndReceived():
                    self.ended = True
                case Closed():
                    self.closed = event
