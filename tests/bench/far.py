"""Hosts that are far apart: network namespaces, joined by a process that gives every packet its time.

    python -m bench.far '{"hosts": {NAMESPACE: [ADDRESS, ...], ...}, "ms": {NAMESPACE: MS, ...}}'

Each namespace has a TUN device. A packet from one host to another takes the sum of their `ms`, one way.
"""

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from interop.harness import HERE, environment
from nat.lab import CLONE_NEWNET

_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
_IFF_TUN_NO_PI: Final = 0x1001
_DESTINATION: Final = slice(16, 20)  # in an IPv4 header
AT_ONCE: Final = 64


def open_tun(namespace: str, addresses: Sequence[str]) -> int:
    """Make the device in a namespace, with these addresses, and return its file descriptor."""

    def make() -> int:
        with Path("/run/netns", namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"no namespace {namespace}")
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", b"far", _IFF_TUN_NO_PI))
        return fd

    with ThreadPoolExecutor(1) as thread:  # a thread has a namespace of its own
        fd = thread.submit(make).result()
    for command in (*(f"addr add {address}/16 dev far" for address in addresses), "link set far mtu 1500 up"):
        subprocess.run(["ip", "-netns", namespace, *command.split()], check=True)
    return fd


def carry(hosts: Mapping[str, Sequence[str]], ms: Mapping[str, float]) -> None:
    """Carry packets between the hosts, for ever; say `ready` first."""
    devices = {open_tun(name, addresses): ms[name] / 1000 for name, addresses in hosts.items()}
    target_of = {
        socket.inet_aton(address): fd
        for fd, addresses in zip(devices, hosts.values(), strict=True)
        for address in addresses
    }
    under_way: list[tuple[float, int, int, bytes]] = []
    number = itertools.count()  # packets of one way stay in order
    print("ready", flush=True)
    while True:
        pause = max(under_way[0][0] - time.monotonic(), 0.0) if under_way else None
        for fd in select.select(list(devices), [], [], pause)[0]:
            for packet in _packets(fd):
                target = target_of.get(packet[_DESTINATION])
                if target is not None:
                    due = time.monotonic() + devices[fd] + devices[target]
                    heapq.heappush(under_way, (due, next(number), target, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            with contextlib.suppress(OSError):
                os.write(target, packet)


def _packets(fd: int) -> Iterator[bytes]:
    for _ in range(AT_ONCE):
        try:
            yield os.read(fd, 2048)
        except BlockingIOError:
            return


@contextlib.contextmanager
def far_apart(hosts: Mapping[str, tuple[float, Sequence[str]]]) -> Iterator[dict[str, str]]:
    """Make hosts with their milliseconds and addresses; yield their namespaces by name. Needs root."""
    names = {name: f"p2pfar-{os.getpid()}-{name}" for name in hosts}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            subprocess.run(["ip", "-netns", name, "link", "set", "lo", "up"], check=True)
        wanted = {
            "hosts": {names[name]: addresses for name, (_, addresses) in hosts.items()},
            "ms": {names[name]: ms for name, (ms, _) in hosts.items()},
        }
        carrier = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "bench.far", json.dumps(wanted)],
                env=environment(),
                cwd=HERE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(carrier.terminate)
        assert carrier.stdout is not None
        if carrier.stdout.readline() != "ready\n":
            raise RuntimeError("the hosts did not come up")
        yield names


if __name__ == "__main__":
    carry(**json.loads(sys.argv[1]))
