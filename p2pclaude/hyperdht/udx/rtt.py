"""Round-trip time of one path, and the timeouts that follow from it (ring 1)."""

from typing import Final

INITIAL_TIMEOUT_S: Final = 0.5  # before the first sample; hyperdht has just done a handshake over this path
GRANULARITY_S: Final = 0.01  # event loops have millisecond timers, and the peer may be a busy Python program
MAX_TIMEOUT_S: Final = 1.0  # probes in an outage leave at least this often, so that its end is noticed at once
MAX_FIRST_TIMEOUT_S: Final = 3.0  # one slow answer must not put the first probe behind the time to give up


class RttEstimator:
    """Smoothed round-trip time and its variation (RFC 6298), and the minimum."""

    __slots__ = ("latest", "minimum", "srtt", "variation")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the path."""
        self.latest: float | None = None
        self.minimum: float | None = None
        self.srtt: float | None = None
        self.variation = 0.0

    def add_sample(self, rtt: float) -> None:
        """Take a measurement in seconds, of a packet that was sent once only (Karn's rule)."""
        rtt = max(rtt, 1e-6)
        self.latest = rtt
        self.minimum = rtt if self.minimum is None else min(self.minimum, rtt)
        if self.srtt is None:
            self.srtt = rtt
            self.variation = rtt / 2
        else:
            self.variation += (abs(self.srtt - rtt) - self.variation) / 4
            self.srtt += (rtt - self.srtt) / 8

    def probe_timeout(self, attempts: int) -> float:
        """Return the seconds without an answer after which to probe, when `attempts` probes were in vain.

        Twice the smoothed time like a tail loss probe of RFC 8985, or more when it varies much; doubled for each
        attempt up to a second. Later probes do not wait for the variation, which a queue's end leaves large.
        """
        if self.srtt is None:
            base = INITIAL_TIMEOUT_S
        else:
            base = max(2 * self.srtt, self.srtt + 4 * self.variation) + GRANULARITY_S
        if not attempts:
            return min(base, MAX_FIRST_TIMEOUT_S)
        return min(base * 2.0 ** min(attempts, 10), max(2 * (self.srtt or 0.0) + GRANULARITY_S, MAX_TIMEOUT_S))
