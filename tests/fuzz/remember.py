"""Pure functions of libsodium that remember their results: most inputs ask for the same ones, and they cost most."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

from nacl import bindings as sodium

_NAMES: Final = (
    "crypto_scalarmult_ed25519_noclamp",
    "crypto_sign",
    "crypto_sign_open",
    "crypto_sign_seed_keypair",
)
_ORIGINALS: Final[dict[str, Callable[..., Any]]] = {name: getattr(sodium, name) for name in _NAMES}
_REMEMBERING: Final = {name: lru_cache(20_000)(function) for name, function in _ORIGINALS.items()}


@contextmanager
def key_arithmetic() -> Iterator[None]:
    """Remember results of key arithmetic and signatures meanwhile; errors are found anew each time."""
    vars(sodium).update(_REMEMBERING)
    try:
        yield
    finally:
        vars(sodium).update(_ORIGINALS)
