"""How many signatures strangers may have us verify (ring 1).

`persistent` asks before each verification. Whoever announces has shown with a token that it receives at its host, so
counting by host means something; the total bounds what many hosts together can cost.
"""

from collections import OrderedDict
from typing import Final

HOST_RATE: Final = 200.0  # a second; one verification takes about 0.1 ms
HOST_BURST: Final = 400.0
TOTAL_RATE: Final = 2000.0
TOTAL_BURST: Final = 2000.0
MAX_HOSTS: Final = 4096


class _Bucket:
    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._updated = burst, now

    def take(self, now: float) -> bool:
        self._level = min(self._burst, self._level + (now - self._updated) * self._rate)
        self._updated = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class VerifyBudget:
    """Token buckets: one a host, one for all."""

    def __init__(self) -> None:
        self._hosts: OrderedDict[str, _Bucket] = OrderedDict()
        self._total: _Bucket | None = None

    def take(self, host: str, now: float) -> bool:
        """Spend one verification on `host`; False if it has had its share, or everybody together."""
        bucket = self._hosts.get(host)
        if bucket is None:
            bucket = self._hosts[host] = _Bucket(HOST_RATE, HOST_BURST, now)
            if len(self._hosts) > MAX_HOSTS:
                self._hosts.popitem(last=False)
        else:
            self._hosts.move_to_end(host)
        if self._total is None:
            self._total = _Bucket(TOTAL_RATE, TOTAL_BURST, now)
        return bucket.take(now) and self._total.take(now)
