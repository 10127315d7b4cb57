"""The IPv4 addresses of this host (ring 2).

`udp` asks for every connection's handshake, which names them for peers in the same network. Linux tells in one system
call; elsewhere `ifaddr` does, which brings ctypes along and takes its time to load.
"""

import array
import socket
import struct
import sys

_SIOCGIFCONF = 0x8912  # linux/sockios.h
_IFREQ_BYTES = 40  # linux/if.h, struct ifreq where a pointer has 8 bytes: char name[16], then a sockaddr
_ADDRESS_AT = 16 + 4  # behind the sockaddr_in's family and port


def host_addresses() -> list[str]:
    """Return the IPv4 addresses of all interfaces that are up, loopback included."""
    if sys.platform == "linux" and struct.calcsize("P") == 8:
        return _ask_linux()
    import ifaddr  # here, because Linux needs none

    return [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]


def _ask_linux() -> list[str]:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        room = 64 * _IFREQ_BYTES
        while True:
            buffer = array.array("B", bytes(room))
            # struct ifconf: int length, which the kernel sets to what it wrote | pointer to the buffer
            request = struct.pack("iP", room, buffer.buffer_info()[0])
            used: int = struct.unpack("iP", fcntl.ioctl(any_socket, _SIOCGIFCONF, request))[0]
            if used < room:
                break
            room *= 2  # it may have been cut
    entries = memoryview(buffer)[:used]
    starts = range(_ADDRESS_AT, used, _IFREQ_BYTES)
    return [socket.inet_ntoa(entries[start : start + 4]) for start in starts]
