"""Who is served next when too many want something at once (ring 2).

`server` lets each handshake wait here. They go on one at a time, with some turns of the event loop between them, and
only so many in a second. So streams go on however many come, also where others use the processor and a second of the
clock holds less work; but where a turn is long, since hundreds of streams are served in it, newcomers need not wait for
many. Those of hosts that hold little go first: a flood does not keep out the others.
"""

import asyncio
from collections import Counter
from typing import Final

MAX_WAITING: Final = 128  # two thirds of a second at the server's rate: who waits longer has asked again
TICK: Final = 0.001  # seconds; more often it is not worth looking
BETWEEN: Final = 8  # turns of the loop, each of which serves every stream, or times as long as the handshake took
LEAST_SECONDS: Final = 0.001  # that a handshake takes, with all that follows
BURST_SECONDS: Final = 0.25  # what may go on at once after a pause, as a share of the rate


class Turns:
    """A waiting room."""

    def __init__(self, rate: float, held: Counter[str]) -> None:
        """Let `rate` a second go on; `held` is how much each host holds already, and kept so by the owner."""
        self._rate = rate
        self._held = held
        self._burst = self._tokens = max(rate * BURST_SECONDS, 1.0)
        self._updated = 0.0
        self._began = 0.0  # when the last one went on
        self._waiting: list[tuple[str, asyncio.Future[bool]]] = []
        self._wishes: Counter[str] = Counter()  # of those who wait, by host
        self._scheduled = False

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def _load(self, host: str) -> int:
        return self._wishes[host] + self._held[host]

    def has_room(self, host: str) -> bool:
        """Tell whether `wait` would not send away this very host at once."""
        return len(self._waiting) < MAX_WAITING or self._load(host) + 1 < max(map(self._load, self._wishes))

    async def wait(self, host: str) -> bool:
        """Return True when it is one's turn, False when others of hosts that hold less fill the room."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((host, turn))
        self._wishes[host] += 1
        if len(self._waiting) > MAX_WAITING:
            self._turn_away()
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._admit)
        try:
            return await turn
        finally:
            self._wishes[host] -= 1
            if not self._wishes[host]:
                del self._wishes[host]

    def _admit(self) -> None:
        """Let one of the host with the least load go on, and come back some turns of the loop later."""
        loop = asyncio.get_running_loop()
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        self._scheduled = bool(self._waiting)
        if not self._waiting:
            return
        now = loop.time()
        self._tokens = min(self._tokens + (now - self._updated) * self._rate, self._burst)
        self._updated = now
        if self._tokens < 1:
            loop.call_later(max((1 - self._tokens) / self._rate, TICK), self._admit)
            return
        self._tokens -= 1
        entry = min(self._waiting, key=lambda entry: self._load(entry[0]))
        self._waiting.remove(entry)
        loop.call_soon(self._begin)  # these three run one right after the other
        entry[1].set_result(True)
        loop.call_soon(self._end)

    def _begin(self) -> None:
        self._began = asyncio.get_running_loop().time()

    def _end(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        until = now + BETWEEN * max(now - self._began, LEAST_SECONDS)
        loop.call_soon(self._yield, BETWEEN - 1, until)

    def _yield(self, turns: int, until: float) -> None:
        """Let the loop turn so often, or so long, before the next one goes on."""
        loop = asyncio.get_running_loop()
        if turns > 1 and loop.time() < until:
            loop.call_soon(self._yield, turns - 1, until)
        else:
            self._admit()

    def _turn_away(self) -> None:
        """Send away the last that came from the host with the most load."""
        hosts = dict.fromkeys(host for host, _ in reversed(self._waiting))  # fewer than those who wait
        busiest = max(hosts, key=self._load)
        entry = next(entry for entry in reversed(self._waiting) if entry[0] == busiest)
        self._waiting.remove(entry)
        if not entry[1].done():
            entry[1].set_result(False)
