"""Numbers of the wire, under their upstream names (ring 1)."""

from enum import IntEnum, IntFlag
from typing import Final

# dht-rpc lib/io.js: the low nibble is the version, the high one tells requests from responses.
REQUEST_ID: Final = 0x03
RESPONSE_ID: Final = 0x13

ID_BYTES: Final = 32
KEY_BYTES: Final = 32
TOKEN_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

K: Final = 20  # closest nodes of a lookup, nodes of a routing table row
DEFAULT_PORT: Final = 49737
MAX_VALUE_BYTES: Final = 1000  # a stored record must fit one datagram that no path fragments


class InternalCommand(IntEnum):
    """dht-rpc lib/commands.js."""

    PING = 0
    PING_NAT = 1
    FIND_NODE = 2
    DOWN_HINT = 3
    DELAYED_PING = 4


class Command(IntEnum):
    """hyperdht lib/constants.js, COMMANDS."""

    PEER_HANDSHAKE = 0
    PEER_HOLEPUNCH = 1
    FIND_PEER = 2
    LOOKUP = 3
    ANNOUNCE = 4
    UNANNOUNCE = 5
    MUTABLE_PUT = 6
    MUTABLE_GET = 7
    IMMUTABLE_PUT = 8
    IMMUTABLE_GET = 9
    PLUGIN = 10


class ErrorCode(IntEnum):
    """Errors a response can carry: dht-rpc lib/errors.js and hyperdht lib/constants.js."""

    NONE = 0
    UNKNOWN_COMMAND = 1
    INVALID_TOKEN = 2
    SEQ_REUSED = 16
    SEQ_TOO_LOW = 17


class Firewall(IntEnum):
    """What a peer says of the NAT in front of it; hyperdht lib/constants.js, FIREWALL."""

    UNKNOWN = 0
    OPEN = 1
    CONSISTENT = 2
    RANDOM = 3


class HandshakeError(IntEnum):
    """Errors of a handshake or holepunch payload; hyperdht lib/constants.js, ERROR."""

    NONE = 0
    ABORTED = 1
    VERSION_MISMATCH = 2
    TRY_LATER = 3


class Mode(IntEnum):
    """Which leg of its way a relayed handshake or holepunch is on; hyperdht lib/messages.js."""

    FROM_CLIENT = 0
    FROM_SERVER = 1
    FROM_RELAY = 2
    FROM_SECOND_RELAY = 3
    REPLY = 4


class PacketType(IntFlag):
    """UDX packet types; libudx include/udx.h. 0 is a bare acknowledgement."""

    DATA = 1
    END = 2
    SACK = 4
    MESSAGE = 8
    DESTROY = 16
    HEARTBEAT = 32
