"""How fast a stream delivers: delivery rate samples (draft-cheng-iccrg-delivery-rate-estimation-02) (ring 1).

Every burst of packets that leaves shares one `Flight`, a snapshot of what had been delivered by then. When one of its
packets is acknowledged, the difference is what the path delivered in the meantime.
"""


class Flight:
    """The state of delivery when a burst of packets left; shared by all packets of the burst."""

    __slots__ = ("app_limited", "delivered", "delivered_at", "first_sent_at", "sent_at")

    def __init__(
        self, sent_at: float, delivered: int, delivered_at: float, first_sent_at: float, app_limited: bool
    ) -> None:
        self.sent_at = sent_at
        self.delivered = delivered
        self.delivered_at = delivered_at
        self.first_sent_at = first_sent_at
        self.app_limited = app_limited


class AckSample:
    """What a batch of acknowledgements taught.

    `acked` and `lost` are bytes newly delivered and newly declared lost, `delivered` those since the stream began and
    `prior_delivered` the same when the newest of the acknowledged packets left; `in_flight` is what is now under way.
    `rate` is in bytes a second, None if it could not be measured, and a lower bound where `app_limited` says that there
    was not enough to send. `rtt` is in seconds.
    """

    __slots__ = ("acked", "app_limited", "delivered", "in_flight", "lost", "prior_delivered", "rate", "rtt")

    def __init__(
        self,
        acked: int,
        lost: int,
        delivered: int,
        prior_delivered: int,
        in_flight: int,
        rate: float | None,
        app_limited: bool,
        rtt: float | None,
    ) -> None:
        self.acked = acked
        self.lost = lost
        self.delivered = delivered
        self.prior_delivered = prior_delivered
        self.in_flight = in_flight
        self.rate = rate
        self.app_limited = app_limited
        self.rtt = rtt


class DeliveryRate:
    """Counts delivered bytes and makes snapshots and samples of them."""

    __slots__ = ("_app_limited_until", "_delivered_at", "_delivered_before", "_first_sent_at", "delivered", "ran_dry")

    def __init__(self) -> None:
        self.delivered = 0
        self.ran_dry = False  # all that there was to send had left
        self._delivered_at = 0.0
        self._delivered_before = -1  # all that was ever sent, when the first flight of this reckoning left
        self._first_sent_at = 0.0
        self._app_limited_until = 0

    def start_flight(self, now: float, in_flight: int) -> Flight:
        """Take a snapshot for packets about to leave; `in_flight` is what is under way before them."""
        if not in_flight:
            self._first_sent_at = self._delivered_at = now
            self._delivered_before = self.delivered
        app_limited = 0 < self._app_limited_until >= self.delivered
        return Flight(now, self.delivered, self._delivered_at, self._first_sent_at, app_limited)

    def mark_app_limited(self, in_flight: int) -> None:
        """Note that the sender ran out of data: what is under way now measures the application, not the path."""
        self._app_limited_until = max(self.delivered + in_flight, 1)

    def sample(self, newest: Flight, now: float, min_rtt: float | None) -> float | None:
        """Return the rate in bytes a second between `newest`'s departure and now, after `delivered` was raised.

        Intervals shorter than a round trip come from compressed acknowledgements and measure nothing.
        """
        if self.delivered > self._delivered_before:  # else the next flight, with a new reckoning, has left already
            self._delivered_at = now
            self._first_sent_at = newest.sent_at
        interval = max(newest.sent_at - newest.first_sent_at, now - newest.delivered_at)
        if interval <= 0 or (min_rtt is not None and interval < min_rtt):
            return None
        return (self.delivered - newest.delivered) / interval
