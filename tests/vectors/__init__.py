"""Golden vectors that the JavaScript packages wrote (`generate.js`), and how to read them."""

import json
from pathlib import Path
from typing import Any

from p2pclaude.hyperdht.encoding import Address


def load(name: str) -> dict[str, Any]:
    """Return the vectors of one file."""
    text = Path(__file__).with_name(f"{name}.json").read_text()
    vectors: dict[str, Any] = json.loads(text)["vectors"]
    return vectors


def versions(name: str) -> dict[str, str]:
    """Return the versions of the packages that wrote one file, by their names."""
    found: dict[str, str] = json.loads(Path(__file__).with_name(f"{name}.json").read_text())["versions"]
    return found


def unhex(text: str) -> bytes:
    """Return the bytes of a hex string."""
    return bytes.fromhex(text)


def unhex_or_none(text: str | None) -> bytes | None:
    """Return the bytes of a hex string, None for null."""
    return None if text is None else bytes.fromhex(text)


def address(text: str) -> Address:
    """Return the address of a "host:port" string."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def address_or_none(text: str | None) -> Address | None:
    """Return the address of a "host:port" string, None for null."""
    return None if text is None else address(text)


def addresses(texts: list[str]) -> tuple[Address, ...]:
    """Return the addresses of a list of "host:port" strings."""
    return tuple(map(address, texts))
