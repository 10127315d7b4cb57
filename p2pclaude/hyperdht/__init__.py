"""HyperDHT for Python: peers find each other by public key and talk over encrypted streams.

Wire-compatible with the npm package `hyperdht` 6.34. `HyperDHT` is the way in; `Connection` and `Server` are what it
gives. Every error is a `HyperDHTError`.
"""

from typing import TYPE_CHECKING

from .constants import MAX_VALUE_BYTES, ErrorCode
from .crypto import KeyPair
from .dht import HyperDHT
from .encoding import Address
from .errors import (
    ConnectionClosed,
    DecodeError,
    Destroyed,
    HandshakeFailed,
    HolepunchError,
    HyperDHTError,
    PeerConnectionFailed,
    PeerNotFound,
    RelayFailed,
    RemoteError,
    Suspended,
    Timeout,
    TooFewNodes,
)
from .rpc.requests import Reply
from .secure.connection import Connection

if TYPE_CHECKING:
    from .peer.server import Server
    from .relay.relay_server import (
        ClientConnected,
        ClientGone,
        ClientRefused,
        LinkClosed,
        LinkOpened,
        LinkRefused,
        RelayEvent,
        RelayLimits,
        RelayServer,
    )
    from .rpc.messages import Peer
    from .storage.put_get import LookupResult, MutableRecord

_LATER = {
    "rpc.messages": ("Peer",),
    "relay.relay_server": (
        "ClientConnected",
        "ClientGone",
        "ClientRefused",
        "LinkClosed",
        "LinkOpened",
        "LinkRefused",
        "RelayEvent",
        "RelayLimits",
        "RelayServer",
    ),
    "peer.server": ("Server",),
    "storage.put_get": ("LookupResult", "MutableRecord"),
}  # what a client that only connects never needs is loaded when it is first named

__all__ = [
    "MAX_VALUE_BYTES",
    "Address",
    "ClientConnected",
    "ClientGone",
    "ClientRefused",
    "Connection",
    "ConnectionClosed",
    "DecodeError",
    "Destroyed",
    "ErrorCode",
    "HandshakeFailed",
    "HolepunchError",
    "HyperDHT",
    "HyperDHTError",
    "KeyPair",
    "LinkClosed",
    "LinkOpened",
    "LinkRefused",
    "LookupResult",
    "MutableRecord",
    "Peer",
    "PeerConnectionFailed",
    "PeerNotFound",
    "RelayEvent",
    "RelayFailed",
    "RelayLimits",
    "RelayServer",
    "RemoteError",
    "Reply",
    "Server",
    "Suspended",
    "Timeout",
    "TooFewNodes",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    for module, names in _LATER.items():
        if name in names:
            value: object = getattr(import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
