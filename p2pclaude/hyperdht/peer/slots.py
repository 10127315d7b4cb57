"""The clients that a server waits for: a slot each, of which there are only so many, shared out by host (ring 2)."""

from collections import Counter
from itertools import count
from typing import Final

from .pending_client import PendingClient

MAX_PENDING: Final = 256  # clients whose first packet has not come yet; each has a stream


class Slots:
    """One server's slots. A client's slot is the number by which it addresses its rounds of hole punching."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        """How many slots each host holds: who holds many is served last, and loses one first."""
        self._numbers = count()
        self._waiting: dict[int, PendingClient] = {}  # oldest first
        self._hosts: dict[int, str] = {}  # of those that wait
        self._settling: dict[int, PendingClient] = {}  # clients that came, perhaps through a relay, and still punch

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_settled(self) -> bool:
        """Whether nobody is waited for, and nobody that came still looks for a better way."""
        assert self._waiting.keys() == self._hosts.keys() and self.held.total() == len(self._waiting)
        return not self._waiting and not self._settling

    def find(self, slot: int) -> PendingClient | None:
        """Return the client of a slot, one that still punches included."""
        return self._waiting.get(slot) or self._settling.get(slot)

    def make_room(self, host: str) -> bool:
        """Tell whether a client of that host may have a slot; for it the host with the most loses its oldest one."""
        if len(self._waiting) < MAX_PENDING:
            return True
        busiest, most = self.held.most_common(1)[0]
        if self.held[host] >= most:
            return False
        oldest = next(slot for slot, other in self._hosts.items() if other == busiest)
        self._waiting[oldest].connection.abort()
        self._release(oldest)
        return True

    def take(self, pending: PendingClient, host: str) -> int:
        """Give a client a slot, and return its number. Call `make_room` before."""
        assert len(self._waiting) < MAX_PENDING
        slot = next(self._numbers)
        self._waiting[slot], self._hosts[slot] = pending, host
        self.held[host] += 1
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot, if its client has not lost it meanwhile."""
        if slot in self._waiting:
            self._release(slot)

    def _release(self, slot: int) -> None:
        del self._waiting[slot]
        host = self._hosts.pop(slot)
        self.held[host] -= 1
        if not self.held[host]:
            del self.held[host]

    def begin_settling(self, slot: int, pending: PendingClient) -> None:
        """Go on passing rounds to a client that has come, since a better way may still be found."""
        self._settling[slot] = pending

    def end_settling(self, slot: int) -> None:
        """Let go of a client whose way is settled."""
        del self._settling[slot]

    def abort(self) -> None:
        """Break off everybody who is waited for."""
        for pending in list(self._waiting.values()):
            pending.connection.abort()
