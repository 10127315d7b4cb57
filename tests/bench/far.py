"""Hosts that are far apart: network namespaces, joined by a process that gives every packet its time.

    python -m bench.far '{"hosts": {NAMESPACE: [ADDRESS, ...], ...}, "ms": {NAMESPACE: MS, ...}, "loss": 0, "seed": 1}'

Each namespace has a TUN device. A packet from one host to another takes the sum of their `ms`, one way, unless it is of
the share that gets lost; the seed says which. (The kernel's own `netem` is not in every kernel.) A device knows no
offload, so what is sent as one train is cut to real packets.
"""

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
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
QUEUE_PACKETS: Final = 20_000  # more than any window: what gets lost is lost by the dice
_LINK_UP: Final = f"link set far mtu 1500 txqueuelen {QUEUE_PACKETS} up"
ENDS: Final = ("11.9.0.1", "11.9.0.2")  # of `wire`


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
    for command in (*(f"addr add {address}/16 dev far" for address in addresses), _LINK_UP):
        subprocess.run(["ip", "-netns", namespace, *command.split()], check=True)
    return fd


def carry(hosts: Mapping[str, Sequence[str]], ms: Mapping[str, float], loss: float, seed: int) -> None:
    """Carry packets between the hosts, for ever; say `ready` first."""
    devices = {open_tun(name, addresses): ms[name] / 1000 for name, addresses in hosts.items()}
    target_of = {
        socket.inet_aton(address): fd
        for fd, addresses in zip(devices, hosts.values(), strict=True)
        for address in addresses
    }
    dice = {fd: random.Random(f"{seed} {number}").random for number, fd in enumerate(devices)}
    under_way: list[tuple[float, int, int, bytes]] = []
    number = itertools.count()  # packets of one way stay in order
    print("ready", flush=True)
    while True:
        pause = max(under_way[0][0] - time.monotonic(), 0.0) if under_way else None
        for fd in select.select(list(devices), [], [], pause)[0]:
            for packet in _packets(fd):
                target = target_of.get(packet[_DESTINATION])
                if target is not None and dice[fd]() >= loss:
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
def far_apart(
    hosts: Mapping[str, tuple[float, Sequence[str]]], loss: float = 0.0, seed: int = 1
) -> Iterator[dict[str, str]]:
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
            "loss": loss,
            "seed": seed,
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


@contextlib.contextmanager
def wire(rtt_ms: float, loss: float, seed: int) -> Iterator[tuple[str, str]]:
    """Make two hosts with the addresses `ENDS` and a wire between them; yield their namespaces. Needs root."""
    with far_apart({"one": (rtt_ms / 4, ENDS[:1]), "two": (rtt_ms / 4, ENDS[1:])}, loss, seed) as names:
        yield names["one"], names["two"]


if __name__ == "__main__":
    carry(**json.loads(sys.argv[1]))
