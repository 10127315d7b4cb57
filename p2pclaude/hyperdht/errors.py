"""The library's errors (ring 1): one base class, one class a cause."""

from .constants import ErrorCode


class HyperDHTError(Exception):
    """Base of every error this library raises on purpose."""


class DecodeError(HyperDHTError):
    """Bytes from the network that are not what they should be; the only error a decoder raises."""


class RemoteError(HyperDHTError):
    """A DHT node answered with an error code (`ErrorCode`), in `.code`."""

    def __init__(self, code: int) -> None:
        name = next((error.name for error in ErrorCode if error == code), code)
        super().__init__(f"the remote node answered with the error {name}")
        self.code = code


class Timeout(HyperDHTError, TimeoutError):
    """No answer in time."""


class TooFewNodes(HyperDHTError):
    """No DHT node answered: the network is out of reach, or nothing could be stored."""


class PeerNotFound(HyperDHTError):
    """No DHT node knows the peer's public key."""


class PeerConnectionFailed(HyperDHTError):
    """Nodes that know the peer were found, but none led to a valid handshake."""


class HandshakeFailed(HyperDHTError):
    """The peer's handshake was invalid, of another version, or refused."""


class HolepunchError(HyperDHTError):
    """No path through the NATs between was found."""


class TryLater(HolepunchError):
    """The peer punches too many holes at present; a new attempt in some seconds may succeed."""


class ConnectionClosed(HyperDHTError, ConnectionError):
    """The connection is closed, or was lost; the message says which."""


class RelayFailed(HyperDHTError):
    """A blind relay did not bring the two sides together; the message says why."""


class Suspended(HyperDHTError):
    """The node is suspended."""


class Destroyed(HyperDHTError):
    """The node is destroyed."""
