"""A seeded simulator for tests: virtual time (`loop`) and a UDP internet (`network`) with NATs (`nat`).

async def main() -> None:
    net = SimNetwork(seed=1, link=Link(latency=(0.01, 0.05), loss=0.05))
    home = net.nat("203.0.113.7", mapping=Dependence.ADDRESS_AND_PORT).host("192.168.1.2")
    open_host = net.host("198.51.100.1")       # each host is a `Network` for the library under test

run(main(), seed=1)
"""

from sim.link import Link
from sim.loop import SimLoop, SimulationError, run
from sim.nat import Dependence, Nat, PortChoice
from sim.network import Host, SimNetwork, SimSocket
from sim.realm import Packet

__all__ = [
    "Dependence",
    "Host",
    "Link",
    "Nat",
    "Packet",
    "PortChoice",
    "SimLoop",
    "SimNetwork",
    "SimSocket",
    "SimulationError",
    "run",
]
