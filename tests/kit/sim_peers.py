"""Two ends of the library's encrypted connections on the simulated network, without a DHT: for tests of streams."""

import hashlib
import os
from dataclasses import dataclass
from random import Random

from sim import Host, SimNetwork

from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.net.sockets import Socket
from p2pclaude.hyperdht.net.streams import Stream
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.secure.noise import NoiseIK

READ_BYTES = 65536


def seeds(count: int) -> range:
    """Return the seeds to test: `count` of them, or as many as P2PCLAUDE_SEEDS says for a deeper run."""
    return range(int(os.environ.get("P2PCLAUDE_SEEDS", "0")) or count)


@dataclass
class End:
    """One side: its host, endpoint, socket, stream and connection."""

    host: Host
    endpoint: Endpoint
    socket: Socket
    stream: Stream
    connection: Connection

    @property
    def address(self) -> Address:
        """Where the other side finds this one."""
        return self.host.addresses[0], self.socket.address[1]


async def connect_ends(net: SimNetwork, name: str = "") -> tuple[End, End]:
    """Return the initiator's and the responder's end of a new connection; the Noise handshake is exchanged by hand.

    `name` tells several in one network apart.
    """
    hosts = (net.host("5.1.0.1"), net.host("5.1.0.2"))
    key_pairs = [KeyPair.generate(net.random(f"key {name}{i}")) for i in range(2)]
    ephemerals = [KeyPair.generate(net.random(f"ephemeral {name}{i}")) for i in range(2)]
    initiator = NoiseIK.initiator(key_pairs[0], key_pairs[1].public_key, ephemerals[0])
    responder = NoiseIK.responder(key_pairs[1], ephemerals[1])
    responder.read_message(initiator.write_message(b""))
    initiator.read_message(responder.write_message(b""))
    ends = []
    for i, noise in enumerate((initiator, responder)):
        endpoint = Endpoint(hosts[i], net.random(f"endpoint {name}{i}"))
        socket = await endpoint.bind("0.0.0.0", 0)
        stream = endpoint.streams.create()
        keys = key_pairs[i].public_key, key_pairs[1 - i].public_key
        connection = Connection(stream, *keys, is_initiator=not i, keep_alive=5.0, rng=net.random(f"stream {name}{i}"))
        connection.start(noise)
        ends.append(End(hosts[i], endpoint, socket, stream, connection))
    for end, other in zip(ends, reversed(ends), strict=True):
        end.stream.connect(end.socket, other.stream.id, other.address)
    return ends[0], ends[1]


async def send_random(connection: Connection, size: int, rng: Random) -> str:
    """Write `size` random bytes in portions of all sizes; return their SHA-256."""
    digest = hashlib.sha256()
    while size:
        data = rng.randbytes(min(size, rng.choice([1, 50, 1000, 5000, 60_000])))
        size -= len(data)
        digest.update(data)
        await connection.write(data)
    return digest.hexdigest()


async def receive_all(connection: Connection, size: int | None = None) -> str:
    """Read `size` bytes, or to the end; return their SHA-256. Fails on an end that comes early."""
    digest, received = hashlib.sha256(), 0
    while size is None or received < size:
        data = await connection.read(READ_BYTES if size is None else min(READ_BYTES, size - received))
        if not data:
            assert size is None, f"the end came after {received} of {size} bytes"
            break
        received += len(data)
        digest.update(data)
    return digest.hexdigest()
