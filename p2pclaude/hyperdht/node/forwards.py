"""Where a node passes on what is meant for the servers that announced themselves at it (ring 1).

`storage` notes an announcement, `peer` passes handshakes and rounds of hole punching on. Source: hyperdht
lib/router.js.
"""

from typing import Final, NamedTuple

from ..encoding import Address
from ..expiring import ExpiringMap

CAPACITY: Final = 65536
ANNOUNCE_LIFETIME: Final = 20 * 60.0  # seconds; a server announces itself more often


class Forward(NamedTuple):
    """Where the handshakes for a peer go, and its encoded peer record.

    `relay` is the address the peer announced itself from: the only path to it. None for a server of our own.
    """

    relay: Address | None
    record: bytes


class ForwardStore(ExpiringMap[bytes, Forward]):
    """The peers that announced themselves here, by the hash of their public key.

    Servers of our own are `router`'s to know: they do not expire.
    """

    def __init__(self, capacity: int = CAPACITY, lifetime: float = ANNOUNCE_LIFETIME) -> None:
        super().__init__(capacity, lifetime)
