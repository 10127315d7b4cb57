"""A UDP port for a process that is about to start: free now, and nobody else's by the time it is bound."""

import errno
import random
import socket

# Whoever asks the kernel for any port gets one above these (Linux from 32,768 on, macOS from 49,152), and many ask in
# the moment between the choice and the use. Who chooses here hardly ever chooses the same.
FIRST, END = 10_240, 32_768


def free_port(host: str = "127.0.0.1") -> int:
    """Give a UDP port of a host's address that is free."""
    while True:
        port = random.SystemRandom().randrange(FIRST, END)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
