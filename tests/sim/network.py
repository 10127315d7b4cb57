"""The simulated internet: the face of the simulator for tests."""

from sim.host import Host, SimSocket
from sim.link import Link
from sim.nat import Dependence, Nat, PortChoice
from sim.realm import Realm, World

__all__ = ["Host", "SimNetwork", "SimSocket"]


class SimNetwork(World):
    """An internet of hosts and NATs. `link` is the default path between any two public addresses.

    Make it inside the coroutine given to `run`, or before; everything random in it comes from `seed`. `stats`
    counts what became of packets; `intercept(packet)` may change one, or return True to lose it;
    `observe(event, packet)` sees them all.
    """

    def __init__(self, seed: object = 0, link: Link | None = None, *, tick: float = 1e-4, trace: bool = False) -> None:
        super().__init__(seed, tick=tick, trace=trace)
        self.internet = Realm(self, link or Link(hops=8))

    def host(self, *addresses: str) -> Host:
        """Return the public host of that address, made if there is none."""
        node = self.internet.nodes.get(addresses[0])
        if node is None:
            return Host(self.internet, *addresses)
        assert isinstance(node, Host)
        return node

    def hosts(self, count: int, prefix: str = "5.1") -> list[Host]:
        """Return `count` public hosts with an address each under `prefix`, a dotted pair (globally routable)."""
        return [self.host(f"{prefix}.{i // 250}.{i % 250 + 1}") for i in range(count)]

    def nat(
        self,
        address: str,
        *,
        mapping: Dependence = Dependence.ENDPOINT,
        filtering: Dependence = Dependence.ADDRESS_AND_PORT,
        ports: PortChoice = PortChoice.PRESERVING,
        timeout: float = 120.0,
    ) -> Nat:
        """Return a new NAT on a public address; `Nat` has more options, and nests."""
        return Nat(self.internet, address, mapping=mapping, filtering=filtering, ports=ports, timeout=timeout)

    def set_path(self, sender: Host | Nat, receiver: Host | Nat, link: Link) -> None:
        """Use `link` from one public node to another, in that direction only."""
        self.internet.set_path(sender, receiver, link)
