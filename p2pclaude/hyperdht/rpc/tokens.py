"""Round-trip tokens, by which a node knows that a requester receives where it sends from (ring 1).

Source: dht-rpc lib/io.js.
"""

import hmac
import random
from typing import Final

from ..constants import TOKEN_BYTES
from ..crypto import keyed_hash


class TokenJar:
    """Round-trip tokens: proof that a requester receives at the host it sends from.

    The caller rotates every `ROTATION_SECONDS`; a token is good until the second rotation after its issue.
    """

    ROTATION_SECONDS: Final = 7.5

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._old = rng.randbytes(TOKEN_BYTES)
        self._new = rng.randbytes(TOKEN_BYTES)

    def issue(self, host: str) -> bytes:
        """Return the token (32 bytes) for a dotted IPv4 host."""
        return keyed_hash(host.encode(), self._new)

    def check(self, host: str, token: bytes) -> bool:
        """Tell whether `token` was issued to `host` lately."""
        return any(hmac.compare_digest(token, keyed_hash(host.encode(), secret)) for secret in (self._new, self._old))

    def rotate(self) -> None:
        """Replace the older secret by a fresh one."""
        self._old, self._new = self._new, self._rng.randbytes(TOKEN_BYTES)
