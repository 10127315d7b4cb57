"""Make the DHT nodes and key pairs that a peer's configuration asks for."""

from typing import Any

from interop.python.control import config

from p2pclaude.hyperdht import HyperDHT, KeyPair


def new_node(**options: Any) -> HyperDHT:
    """Make (not start) a node on the configured network."""
    host = config.get("host", "127.0.0.1")
    if config.get("persistent"):
        options.setdefault("ephemeral", False)
    return HyperDHT(bootstrap=config.get("bootstrap", []), host=host, **options)


def relay_through() -> bytes | None:
    """Return the public key of the blind relay that the configuration names as `relay`."""
    return bytes.fromhex(config["relay"]) if config.get("relay") else None


def key_pair_of(seed: str | None) -> KeyPair:
    """Make the key pair of a hexadecimal seed, or a new one."""
    return KeyPair.from_seed(bytes.fromhex(seed)) if seed else KeyPair.generate()
