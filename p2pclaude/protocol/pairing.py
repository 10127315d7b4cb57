"""The pairing URL (pure): what the daemon shows and every tool is given.

    p2p-claude://connect?code=BASE64        also read: happy://p2p-machine?code=BASE64 (the older prefix)
    BASE64 of the JSON  {"v": 1, "dhtPublicKey", "dataKey", "metadata": {"host", "platform", "createdAt",
                         "rootDir"?, "bootstrap"?, "relay"?}}     keys are base64 of 32 bytes; relay is hex

Written in standard base64, as the TypeScript system writes it; the URL-safe alphabet, missing padding and a
percent-encoded code are read too. Whoever holds the URL is let in, so it never stands in an error, a log or a repr.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from p2pclaude.errors import DataError

PREFIX = "p2p-claude://connect?code="
"""The prefix that URLs are written with."""
PREFIXES = (PREFIX, "happy://p2p-machine?code=")
"""Every prefix that is read."""
KEY_BYTES = 32
"""Length of the DHT public key and of the data key."""
MAX_URL_CHARS = 65536
"""A longer URL is refused unread."""

_CLIENT_KEY_LABEL = b"p2pclaude client key v1"
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_HINT = "use the URL in the daemon's pairing.url, whole and unchanged, or the path of a file that holds it"


class Pairing(NamedTuple):
    """What a tool needs to reach one daemon: its DHT public key and the key that seals requests (32 bytes each)."""

    public_key: bytes
    data_key: bytes
    metadata: Mapping[str, Any] = _NOTHING

    def __repr__(self) -> str:
        return "Pairing()"

    @property
    def bootstrap(self) -> tuple[str, ...]:
        """Give the `host:port` of the private network's bootstrap nodes; empty for the public network."""
        return tuple(self.metadata.get("bootstrap", ()))

    @property
    def relay(self) -> bytes | None:
        """Give the public key of the blind relay where the daemon can be met; None if it uses none."""
        key = self.metadata.get("relay")
        return None if key is None else bytes.fromhex(key)


def client_seed(data_key: bytes) -> bytes:
    """Give the seed of the Ed25519 key pair that tools connect with: BLAKE2b-256 of a label, keyed with the data key.

    A daemon derives the same key, and with `--strict` lets nobody else shake hands. All tools of all who hold the data
    key share it: one of a run's own could not be told from a stranger's before the handshake is answered. It seals
    nothing: the handshake's ephemeral keys do, so who learns the seed reads no connection.
    """
    return blake2b(_CLIENT_KEY_LABEL, key=data_key, digest_size=KEY_BYTES).digest()


def parse_relay(text: str) -> bytes:
    """Read the public key of a blind relay, 64 hexadecimal digits. Raises ValueError."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ValueError("a relay's key has 64 hexadecimal digits")
    return bytes.fromhex(text)


def parse_url(text: str) -> Pairing:
    """Read a pairing URL; white space around it is ignored.

    Raises DataError, whose text says what is wrong and never holds any part of the URL.
    """
    text = text.strip()
    prefix = next((p for p in PREFIXES if text.startswith(p)), None)
    if prefix is None or len(text) > MAX_URL_CHARS:
        raise DataError(f"not a pairing URL: it should begin with {PREFIX}", hint=_HINT)
    # Form decoders turn the + of base64 into a blank; a blank cannot mean anything else here.
    code = text[len(prefix) :].split("&", 1)[0].split("#", 1)[0]
    if "%" in code:
        from urllib.parse import unquote  # here, because it takes its time and few URLs need it

        code = unquote(code)
    code = code.replace(" ", "+")
    return _pairing_from_json(_decode_base64(code, "code"))


def format_url(pairing: Pairing) -> str:
    """Give the pairing URL, byte for byte as the TypeScript system writes one with the same fields."""
    body = {
        "v": 1,
        "dhtPublicKey": base64.b64encode(pairing.public_key).decode(),
        "dataKey": base64.b64encode(pairing.data_key).decode(),
        "metadata": dict(pairing.metadata),
    }
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return PREFIX + base64.b64encode(text.encode("utf-8", "replace")).decode()


def is_host_port(text: object) -> bool:
    """Tell whether `text` is HOST:PORT with a port from 1 to 65535."""
    if not isinstance(text, str):
        return False
    host, colon, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536
    return bool(colon) and is_port and bool(host) and host.isprintable() and not set(host) & set(" /,")


def _pairing_from_json(data: bytes) -> Pairing:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("malformed pairing URL: its code is not JSON", hint=_HINT) from None
    if not isinstance(body, dict):
        raise DataError("malformed pairing URL: its code is not a JSON object", hint=_HINT)
    version = body.get("v")
    if isinstance(version, bool) or version != 1:
        raise DataError("malformed pairing URL: not version 1", hint="a newer p2pclaude may read it")
    return Pairing(_key(body, "dhtPublicKey"), _key(body, "dataKey"), _metadata(body.get("metadata", {})))


def _metadata(metadata: object) -> dict[str, Any]:
    if not isinstance(metadata, dict):
        raise DataError("malformed pairing URL: metadata is not an object", hint=_HINT)
    bootstrap = metadata.get("bootstrap", [])
    if not isinstance(bootstrap, list) or not all(is_host_port(entry) for entry in bootstrap):
        raise DataError("malformed pairing URL: metadata.bootstrap is not a list of host:port", hint=_HINT)
    relay = metadata.get("relay")
    try:
        if relay is not None:
            parse_relay(relay)
    except (ValueError, TypeError):
        raise DataError("malformed pairing URL: metadata.relay is not a public key", hint=_HINT) from None
    return metadata


def _key(body: Mapping[str, object], name: str) -> bytes:
    text = body.get(name)
    key = _decode_base64(text, name) if isinstance(text, str) else b""
    if len(key) != KEY_BYTES:
        raise DataError(f"malformed pairing URL: {name} is not {KEY_BYTES} bytes in base64", hint=_HINT)
    return key


def _decode_base64(text: str, what: str) -> bytes:
    text = text.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"malformed pairing URL: {what} is not base64", hint=_HINT) from None
