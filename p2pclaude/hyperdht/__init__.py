"""HyperDHT for Python: peers find each other by public key and talk over encrypted streams.

Wire-compatible with the npm package `hyperdht` 6.34. `HyperDHT` is the way in; `Connection` and `Server` are what it
gives. Every error is a `HyperDHTError`.
"""

from .connection import Connection
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
from .messages import Peer
from .relayserver import (
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
from .requests import Reply
from .server import Server
from .storage import LookupResult, MutableRecord

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
