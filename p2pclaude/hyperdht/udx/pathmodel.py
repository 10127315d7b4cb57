"""What a sender knows of the path that its packets take: it all begins anew on another one (ring 1)."""

from .congestion import Bbr
from .mtu import MtuSearch
from .pacing import Pacer
from .rtt import RttEstimator


class PathModel:
    """Round trip, packet size, congestion and pacing of one path.

    `mtu` and `max_mtu` are sizes of IP packets in bytes; paths of streams with different `variety` are probed at
    different times.
    """

    __slots__ = ("_mtu", "_variety", "congestion", "pacer", "rtt", "search")

    def __init__(self, mtu: int, max_mtu: int, variety: int) -> None:
        self.rtt = RttEstimator()
        self.search = MtuSearch(mtu, max_mtu)
        self.congestion = Bbr(mtu, variety)
        self.pacer = Pacer()
        self._mtu = mtu
        self._variety = variety

    def reset(self, next_order: int) -> None:
        """Begin anew; transmissions from `next_order` on take the other path."""
        self.rtt.reset()
        self.search.restart(self._mtu, next_order)
        self.congestion = Bbr(self._mtu, self._variety)
        self.pacer = Pacer()

    def fit_size(self) -> None:
        """Count in packets of the size that the search has come to."""
        self.congestion.mss = self.search.mtu
