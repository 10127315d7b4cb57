"""How long to wait for a node's answer before the request is sent again (ring 1).

`rpc` reports every round trip here and asks before each send. A host that answered before is given what it needs; an
unknown one what the network as a whole needs. Resends keep the transaction id, so an answer to any of them counts:
a guess that is too short costs a datagram, one that is too long costs the user's time.
"""

import random
from collections import OrderedDict
from typing import Final

from ..encoding import Address

MIN_TIMEOUT: Final = 0.25
MAX_TIMEOUT: Final = 4.0
UNKNOWN_TIMEOUT: Final = 0.5  # the first send, before anybody answered
RELAYED_LIMIT: Final = 1.0  # the first send of what another node passes on
LAST_TIMEOUT: Final = 1.0  # after the last send at least: a near node may be busy
BACKOFF: Final = 1.4
BACKOFF_LIMIT: Final = 1.0  # or twice what the host needs: in loss, patience between sends gains nothing
JITTER: Final = 0.1  # of the timeout: a burst's resends shall not leave as a burst
MAX_HOSTS: Final = 4096
MAX_AGE: Final = 600.0


class RttEstimator:
    """Smoothed round trip and deviation, in seconds, as TCP keeps them (RFC 6298)."""

    __slots__ = ("deviation", "last", "smoothed")

    def __init__(self, rtt: float, now: float) -> None:
        self.smoothed = rtt
        self.deviation = rtt / 2
        self.last = now

    def add(self, rtt: float, now: float) -> None:
        """Take one more sample."""
        self.deviation += (abs(self.smoothed - rtt) - self.deviation) / 4
        self.smoothed += (rtt - self.smoothed) / 8
        self.last = now

    @property
    def timeout(self) -> float:
        """The time in which an answer should come."""
        return self.smoothed + 4 * self.deviation


class AdaptiveTimeouts:
    """Timeouts by address, learnt from round trips; bounded in hosts and in age."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._hosts: OrderedDict[Address, RttEstimator] = OrderedDict()
        self._all: RttEstimator | None = None

    def put(self, address: Address, rtt: float, sends: int, now: float) -> None:
        """Report that `address` answered `rtt` seconds after the first of `sends` sends.

        With more than one send the sample is ambiguous and would grow with every loss, so it counts only for a host
        nothing is known of: there, too long is better than timing out before every answer.
        """
        known = self._fresh(address, now)
        if sends > 1 and (known is not None or sends > 2):
            return
        if known is None:
            self._remember(address, RttEstimator(rtt, now))
        else:
            known.add(rtt, now)
        if sends > 1:
            return
        if self._all is None:
            self._all = RttEstimator(rtt, now)
        else:
            self._all.add(rtt, now)

    def get_relayed(self, attempt: int) -> float:
        """Return the seconds to wait for an answer that a node fetches from another one, whose distance is unknown.

        It goes two ways instead of one, so twice what the network as a whole needs.
        """
        if self._all is None:
            return self._backed_off(UNKNOWN_TIMEOUT, attempt)
        return self._backed_off(min(max(2 * self._all.timeout, MIN_TIMEOUT), RELAYED_LIMIT), attempt)

    def get(self, address: Address, attempt: int, now: float) -> float:
        """Return the seconds to wait after send number `attempt` (from 1) to `address`."""
        known = self._fresh(address, now)
        if known is not None:
            base = max(known.timeout, MIN_TIMEOUT)
        elif self._all is not None:
            base = min(max(self._all.timeout, MIN_TIMEOUT), 1.0)
        else:
            base = UNKNOWN_TIMEOUT
        return self._backed_off(base, attempt)

    def _backed_off(self, base: float, attempt: int) -> float:
        limit = min(max(BACKOFF_LIMIT, 2 * base), MAX_TIMEOUT)
        timeout = min(base * BACKOFF ** (attempt - 1), limit)
        return timeout * (1 + JITTER * self._rng.random())

    def _fresh(self, address: Address, now: float) -> RttEstimator | None:
        known = self._hosts.get(address)
        if known is None or now - known.last > MAX_AGE:
            return None
        self._hosts.move_to_end(address)
        return known

    def _remember(self, address: Address, estimator: RttEstimator) -> None:
        self._hosts[address] = estimator
        self._hosts.move_to_end(address)
        if len(self._hosts) > MAX_HOSTS:
            self._hosts.popitem(last=False)
