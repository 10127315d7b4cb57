"""How much work with public keys strangers may make us do (ring 1).

`persistent` asks before it verifies a signature, `server` before it answers a handshake. Counting by host means
something where a token or a relay vouches for the address; the total bounds what many hosts together can cost.
"""

from collections import OrderedDict
from typing import Final

HOST_RATE: Final = 200.0  # a second; one verification takes about 0.1 ms
TOTAL_RATE: Final = 2000.0
BURST_SECONDS: Final = 2.0
MAX_HOSTS: Final = 4096


class _Bucket:
    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, now: float) -> None:
        self._rate, self._burst = rate, rate * BURST_SECONDS
        self._level, self._updated = self._burst, now

    def take(self, now: float) -> bool:
        self._level = min(self._burst, self._level + (now - self._updated) * self._rate)
        self._updated = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class VerifyBudget:
    """Token buckets: one a host, one for all; rates are a second."""

    def __init__(self, host_rate: float = HOST_RATE, total_rate: float = TOTAL_RATE) -> None:
        self._host_rate = host_rate
        self._total_rate = total_rate
        self._hosts: OrderedDict[str, _Bucket] = OrderedDict()
        self._total: _Bucket | None = None

    def take(self, host: str, now: float) -> bool:
        """Spend one verification on `host`; False if it has had its share, or everybody together."""
        bucket = self._hosts.get(host)
        if bucket is None:
            bucket = self._hosts[host] = _Bucket(self._host_rate, now)
            if len(self._hosts) > MAX_HOSTS:
                self._hosts.popitem(last=False)
        else:
            self._hosts.move_to_end(host)
        if self._total is None:
            self._total = _Bucket(self._total_rate, now)
        return bucket.take(now) and self._total.take(now)
