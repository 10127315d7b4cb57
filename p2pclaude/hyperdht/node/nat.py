"""What others see of us: the address samples of the DHT node and of a hole puncher's socket (ring 1).

Every response names the address its sender saw the request come from. `rpc` feeds those of the node's own sockets
into a `NatSampler`; `peer.puncher` feeds those of one puncher socket into a `NatClassifier`, whose verdict goes to the
peer. Sources: nat-sampler index.js, hyperdht lib/nat.js.
"""

from collections import Counter, deque
from typing import Final

from ..constants import Firewall
from ..encoding import Address

WINDOW: Final = 16  # samples remembered
_LOOK_BACK: Final = 4  # a sample joins an equal one among that many before it


def _tolerance(size: int) -> int:
    """Return how many of `size` samples may disagree."""
    return 0 if size < 4 else 1 if size < 8 else 2 if size < 12 else 3


class _Tally:
    __slots__ = ("hits", "host", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.hits = 1


class NatSampler:
    """Our public address by the vote of the last sixteen samples.

    `host` and `port` are what nearly all agree on; `port` is 0 when they agree on the host alone (then the NAT
    gives every destination another port), `host` is None when they agree on nothing.
    """

    def __init__(self) -> None:
        self.host: str | None = None
        self.port = 0
        self.size = 0
        self._full: deque[_Tally] = deque()
        self._hosts: deque[_Tally] = deque()
        self._top_full: _Tally | None = None
        self._top_host: _Tally | None = None

    def add(self, host: str, port: int) -> int:
        """Add one sample and return how many equal ones there are in its neighbourhood, itself included."""
        full = self._count(self._full, host, port)
        by_host = self._count(self._hosts, host, 0)
        self.size = len(self._full)
        if self._top_full is None or self._top_full.hits < full.hits:
            self._top_full = full
        if self._top_host is None or self._top_host.hits < by_host.hits:
            self._top_host = by_host
        self._vote(self._top_full, self._top_host)
        return full.hits

    @staticmethod
    def _count(samples: deque[_Tally], host: str, port: int) -> _Tally:
        recent = (samples[-i] for i in range(1, min(_LOOK_BACK, len(samples)) + 1))
        tally = next((t for t in recent if t.port == port and t.host == host), None)
        if tally is None:
            tally = _Tally(host, port)
        else:
            tally.hits += 1
        samples.append(tally)
        if len(samples) > WINDOW:
            samples.popleft().hits -= 1
        return tally

    def _vote(self, full: _Tally, by_host: _Tally) -> None:
        needed = self.size - _tolerance(self.size)
        if full.hits >= needed:
            self.host, self.port = full.host, full.port
        elif by_host.hits >= needed:
            self.host, self.port = by_host.host, 0
        else:
            self.host, self.port = None, 0


class NatClassifier:
    """What kind of NAT stands before one socket, as far as its samples tell.

    The verdict needs four samples, follows every further one (so a NAT that turns out to vary its ports is found
    out, where upstream keeps an early CONSISTENT for ever) and stands still from `freeze` on, once the peer was
    told. `settle` asks for a verdict from what there is.
    """

    MIN_SAMPLES: Final = 4
    MIN_SETTLED_SAMPLES: Final = 2

    def __init__(self, firewalled: bool = True) -> None:
        self.firewall = Firewall.UNKNOWN if firewalled else Firewall.OPEN
        self.addresses: tuple[Address, ...] = ()
        """What to tell the peer: () while unknown, the host with port 0 if random, else the likely ones."""
        self.frozen = False
        self._firewalled = firewalled
        self._settled = False
        self._sources: set[Address] = set()
        self._seen: Counter[Address] = Counter()

    @property
    def sampled(self) -> int:
        """The number of samples so far."""
        return len(self._sources)

    @property
    def decided(self) -> bool:
        """Whether there is a verdict, or samples enough for one."""
        return self.firewall != Firewall.UNKNOWN or self.sampled >= self.MIN_SAMPLES

    def add(self, to: Address, source: Address) -> bool:
        """Add our address `to` as the node at `source` saw it; False if that node was asked before."""
        if source in self._sources:
            return False
        self._sources.add(source)
        self._seen[to] += 1
        self._update()
        return True

    def settle(self) -> None:
        """Say that no more samples are to be had soon: two that agree are then enough.

        A small private network has no more nodes; upstream stays UNKNOWN there and punches nothing.
        """
        self._settled = True
        self._update()

    def freeze(self) -> None:
        """Keep verdict and addresses from here on; samples are still collected."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Follow the samples again, those collected meanwhile included."""
        self.frozen = False
        self._update()

    def _update(self) -> None:
        if self.frozen:
            return
        self.firewall = self._judge()
        self.addresses = self._list_addresses()

    def _judge(self) -> Firewall:
        if not self._firewalled:
            return Firewall.OPEN
        if self.sampled < (self.MIN_SETTLED_SAMPLES if self._settled else self.MIN_SAMPLES):
            return Firewall.UNKNOWN
        # A NAT with several public hosts is consistent when each host keeps to its port.
        best: dict[str, int] = {}
        for (host, _), hits in self._seen.items():
            best[host] = max(best.get(host, 0), hits)
        agreeing = sum(hits for hits in best.values() if hits >= 2)
        if agreeing >= self.sampled - _tolerance(self.sampled):
            return Firewall.CONSISTENT
        undecided = len(best) > 1 and agreeing > 0 and self.sampled <= self.MIN_SAMPLES
        return Firewall.UNKNOWN if undecided else Firewall.RANDOM

    def _list_addresses(self) -> tuple[Address, ...]:
        if self.firewall == Firewall.UNKNOWN:
            return ()
        if self.firewall == Firewall.RANDOM:
            hosts: Counter[str] = Counter()
            for (host, _), hits in self._seen.items():
                hosts[host] += hits
            return ((hosts.most_common(1)[0][0], 0),)
        ranked = self._seen.most_common()
        return tuple(address for i, (address, hits) in enumerate(ranked) if hits >= 2 or i < 2)
