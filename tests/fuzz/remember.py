"""Pure functions of keys that remember their results: most inputs ask for the same ones, and they cost most."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

from nacl import bindings as sodium

from p2pclaude.hyperdht.secure import noise

_FUNCTIONS: Final = (
    (sodium, "crypto_scalarmult_ed25519_noclamp"),
    (sodium, "crypto_sign"),
    (sodium, "crypto_sign_open"),
    (sodium, "crypto_sign_seed_keypair"),
    (sodium, "crypto_aead_chacha20poly1305_ietf_decrypt"),
    (sodium, "crypto_aead_chacha20poly1305_ietf_encrypt"),
    (noise, "_hkdf"),
)
_ORIGINALS: Final[list[Callable[..., Any]]] = [getattr(module, name) for module, name in _FUNCTIONS]
_REMEMBERING: Final = [lru_cache(20_000)(function) for function in _ORIGINALS]


@contextmanager
def key_arithmetic() -> Iterator[None]:
    """Remember results of key arithmetic and signatures meanwhile; errors are found anew each time."""
    _use(_REMEMBERING)
    try:
        yield
    finally:
        _use(_ORIGINALS)


def _use(functions: Sequence[Callable[..., Any]]) -> None:
    for (module, name), function in zip(_FUNCTIONS, functions, strict=True):
        vars(module)[name] = function
