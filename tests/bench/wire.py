"""A long wire between two network namespaces: every packet takes its time, some get lost.

    python -m bench.wire NAMESPACE NAMESPACE [--rtt MS] [--loss SHARE] [--seed N]

Each namespace gets a TUN device `wire` (11.9.0.1 and 11.9.0.2, addresses that DHT nodes take for public ones); this
process carries what one sends to the other. Being TUN devices without offloads, they cut batches into real packets.
"""

import argparse
import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from interop.harness import HERE, environment
from nat.lab import CLONE_NEWNET

ADDRESSES: Final = ("11.9.0.1", "11.9.0.2")
QUEUE_PACKETS: Final = 20_000  # more than any window: what gets lost is lost by the dice
AT_ONCE: Final = 64
_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
_IFF_TUN_NO_PI: Final = 0x1001


def open_tun(namespace: str, address: str) -> int:
    """Make the device in a namespace and return its file descriptor."""

    def make() -> int:
        with Path("/run/netns", namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"no namespace {namespace}")
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", b"wire", _IFF_TUN_NO_PI))
        return fd

    with ThreadPoolExecutor(1) as thread:  # a thread has a namespace of its own
        fd = thread.submit(make).result()
    for command in (f"addr add {address}/24 dev wire", f"link set wire mtu 1500 txqueuelen {QUEUE_PACKETS} up"):
        subprocess.run(["ip", "-netns", namespace, *command.split()], check=True)
    return fd


class Direction:
    """What is under way from one device to the other."""

    def __init__(self, source: int, target: int, delay: float, loss: float, rng: random.Random) -> None:
        self.source = source
        self._target, self._delay, self._loss, self._random = target, delay, loss, rng.random
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Take what was sent."""
        due = time.monotonic() + self._delay
        for _ in range(AT_ONCE):
            try:
                packet = os.read(self.source, 2048)
            except BlockingIOError:
                return
            if self._random() >= self._loss:
                self._under_way.append((due, packet))

    def deliver(self) -> float:
        """Deliver what is due; return when to come again."""
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            with contextlib.suppress(OSError):
                os.write(self._target, self._under_way.popleft()[1])
        return self._under_way[0][0] if self._under_way else now + 1.0


def carry(fds: tuple[int, int], delay: float, loss: float, seed: int) -> None:
    """Carry packets both ways, for ever."""
    dice = [random.Random(f"{seed} {i}") for i in range(2)]
    one, two = fds
    directions = {one: Direction(one, two, delay, loss, dice[0]), two: Direction(two, one, delay, loss, dice[1])}
    while True:
        pause = min([direction.deliver() for direction in directions.values()]) - time.monotonic()
        for fd in select.select(fds, [], [], max(pause, 0.0))[0]:
            directions[fd].take()


@contextlib.contextmanager
def wire(rtt_ms: float, loss: float = 0.0, seed: int = 1) -> Iterator[tuple[str, str]]:
    """Make two namespaces with a wire between them; yield their names. Needs root."""
    names = (f"p2pwire-{os.getpid()}-1", f"p2pwire-{os.getpid()}-2")
    with contextlib.ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            subprocess.run(["ip", "-netns", name, "link", "set", "lo", "up"], check=True)
        argv = [sys.executable, "-m", "bench.wire", *names]
        options = ["--rtt", str(rtt_ms), "--loss", str(loss), "--seed", str(seed)]
        carrier = stack.enter_context(
            subprocess.Popen([*argv, *options], env=environment(), cwd=HERE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(carrier.terminate)
        assert carrier.stdout is not None
        if carrier.stdout.readline() != "ready\n":
            raise RuntimeError("the wire did not come up")
        yield names


def main() -> None:
    """Make the devices, say `ready`, carry."""
    parser = argparse.ArgumentParser(prog="bench.wire")
    parser.add_argument("namespaces", nargs=2)
    parser.add_argument("--rtt", type=float, default=100.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    one, two = (open_tun(*end) for end in zip(options.namespaces, ADDRESSES, strict=True))
    print("ready", flush=True)
    carry((one, two), options.rtt / 2000, options.loss, options.seed)


if __name__ == "__main__":
    main()
