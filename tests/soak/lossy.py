"""Send gigabytes between Python and Node's hyperdht through a proxy that loses, doubles and reorders datagrams.

Usage: tests/soak/node [--bytes SIZE] [--transfer SIZE] [--seed N]

Both sides take both parts in turn, and data goes up and down; what arrives must have the SHA-256 of what was sent. Each
round goes through all shares of loss. Exit status 1 when a transfer failed, 69 without Node.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from interop.harness import Event, Peers, Side, missing_node, peers_on
from kit.free_ports import free_port
from soak.sizes import parse_size

LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
PAIRS: tuple[tuple[Side, Side], ...] = (("python", "node"), ("node", "python"))
JOBS = ("sink", "source")  # from the client to the server, and back
CONNECTS = 5  # where every fifth datagram is lost a connect may fail; streams are tested here
SLOWEST = 500_000  # bytes a second; what takes longer has failed


@dataclass(frozen=True)
class Case:
    """One connection and what it carries."""

    server: Side
    client: Side
    job: str
    loss: float
    seed: int

    @property
    def way(self) -> str:
        """Who sends to whom."""
        ends = (self.client, self.server) if self.job == "sink" else (self.server, self.client)
        return f"{ends[0]} to {ends[1]}"

    def run(self, size: int) -> tuple[Event, Counter[str]]:
        """Transfer `size` bytes; return how it went, and what the proxy did to the datagrams."""
        with peers_on([]) as peers:
            return self._run(peers, size)

    def _run(self, peers: Peers, size: int) -> tuple[Event, Counter[str]]:
        port = free_port()
        server = peers.start(self.server, "server", private=port, bootstrap=[])
        dice: dict[str, Any] = {"loss": self.loss, "duplicate": self.loss / 4, "reorder": self.loss, "seed": self.seed}
        proxy = peers.start("python", "proxy", target=f"127.0.0.1:{port}", **dice)
        client = peers.start(self.client, "client", bootstrap=[proxy.ready["address"]])
        seconds = 60 + size / SLOWEST
        for _ in range(CONNECTS):
            client.tell(
                "connect", key=server.ready["publicKey"], job=self.job, bytes=size, timeout=round(seconds * 1000)
            )
            result = client.expect("result", timeout=seconds + 30)
            if result["opened"]:
                break
        return result, Counter({name: count for name, count in proxy.ask("stats").items() if name != "event"})


def cases(first_seed: int) -> Iterator[Case]:
    """Yield the cases of all rounds, without end."""
    seed = first_seed
    while True:
        for loss in LOSSES:
            for server, client in PAIRS:
                for job in JOBS:
                    yield Case(server, client, job, loss, seed)
                    seed += 1


@dataclass
class Sums:
    """What all transfers came to."""

    size: int = 0
    failures: int = 0
    rates: dict[tuple[float, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    datagrams: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, size: int, result: Event, datagrams: Counter[str]) -> None:
        """Add a transfer and print it."""
        self.datagrams += datagrams
        good = result["ok"] and result["sha256"] == result["sent"]
        if good:
            self.size += size
            self.rates[case.loss, case.way].append(size / 1e3 / result["bodyMs"])
        self.failures += not good
        said = f"{self.rates[case.loss, case.way][-1]:.1f} MB/s, SHA-256 equal" if good else f"FAILED: {result}"
        print(f"seed {case.seed}: {case.way}, {case.loss:.0%} lost, {size / 1e6:.0f} MB: {said}", flush=True)

    def show(self, seconds: float) -> None:
        """Print the table of rates and the totals."""
        ways = sorted({way for _, way in self.rates})
        print(f"{'MB/s':>6}", *(f"{way:>15}" for way in ways))
        for loss in LOSSES:
            taken = [self.rates.get((loss, way), []) for way in ways]
            print(f"{loss:>6.0%}", *(f"{f'{sum(r) / len(r):.1f}' if r else '-':>15}" for r in taken))
        datagrams = ", ".join(f"{count} {name}" for name, count in sorted(self.datagrams.items()))
        print(f"{self.size / 1e9:.2f} GB in {seconds:.0f} s, {self.failures} failures; datagrams: {datagrams}")


def main() -> int:
    """Transfer until enough bytes are through."""
    parser = argparse.ArgumentParser(prog="tests/soak/node", description="Send gigabytes to and from Node.")
    parser.add_argument("--bytes", type=parse_size, default="10GB", help="how much in all, such as 2GB (10GB)")
    parser.add_argument("--transfer", type=parse_size, default="100MB", help="how much over one connection (100MB)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (0)")
    options = parser.parse_args()
    if missing := missing_node():
        print(missing, file=sys.stderr)
        return 69
    sums, began = Sums(), time.monotonic()
    for case in cases(options.seed):
        sums.add(case, options.transfer, *case.run(options.transfer))
        if sums.failures or sums.size >= options.bytes:
            break
    sums.show(time.monotonic() - began)
    return 1 if sums.failures else 0


if __name__ == "__main__":
    sys.exit(main())
