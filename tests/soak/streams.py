"""Send terabytes through UDX streams in memory, over seeded roads that lose, reorder, double and narrow.

Usage: tests/soak/streams [--bytes SIZE] [--seed N] [--processes N]

Every seed is a scenario: how much goes which way, through what. Every byte is compared where it arrives; no reader may
wait for two retransmission timeouts while what it waits for comes through. A failure prints the seed that replays it:
`tests/soak/streams --seed N --bytes 1`. A run that was interrupted goes on with the seed that it names.
"""

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

from soak.memory import BLOCK, PERIOD, End, Road, SoakFailure, SoakPair
from soak.sizes import parse_size

from p2pclaude.hyperdht.udx.stream import UdxStream

LOSSES: Final = (0.0, 0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
VIRTUAL_SECONDS: Final = 3600.0
REPORT_S: Final = 10.0


@dataclass(frozen=True)
class Result:
    """How a scenario went."""

    seed: int
    size: int = 0  # bytes delivered, both ways
    packets: int = 0
    retransmits: int = 0
    longest_wait: float = 0.0  # of a reader whom no loss hindered, in retransmission timeouts
    excused: int = 0
    wrapped: int = 0  # sequence numbers that went past 2**32
    seconds: float = 0.0  # of processor time
    failure: str = ""

    def __add__(self, other: "Result") -> "Result":
        """Add up what can be added."""
        return replace(
            self,
            size=self.size + other.size,
            packets=self.packets + other.packets,
            retransmits=self.retransmits + other.retransmits,
            longest_wait=max(self.longest_wait, other.longest_wait),
            excused=self.excused + other.excused,
            wrapped=self.wrapped + other.wrapped,
            seconds=self.seconds + other.seconds,
        )


class Scenario:
    """What a seed stands for."""

    def __init__(self, seed: int) -> None:
        """Draw everything from the seed."""
        self.rng = rng = random.Random(seed)
        self.seed = seed
        self.delay = 10 ** rng.uniform(-3.0, -0.7)  # 1 to 200 ms one way
        self.narrow = rng.random() < 0.15
        self.roads = (self._road(), self._road())
        self.batch = rng.choice((1, 8, 44, 256))
        self.tick = rng.choice((0.0, 0.001, 0.004)) if self.batch > 8 else 0.0
        # As much as takes about half a second: what comes one by one, or gets lost, costs more.
        size = 4e6 if self.narrow else 400e3 * self.batch + 6e6 if self.batch < 44 else 64e6
        size *= (1 - max(self.losses)) ** 3
        self.up = int(size * rng.uniform(0.5, 1.5))
        self.down = rng.choice((0, 0, 1000, self.up // 10, self.up))

    def _road(self) -> Road:
        rng = self.rng
        loss = rng.choice(LOSSES)
        self.losses = (*getattr(self, "losses", ()), loss)
        rate = 10 ** rng.uniform(5.5, 7.5) if self.narrow else math.inf  # 0.3 to 30 MB/s
        return Road(
            rng,
            delay=self.delay,
            jitter=self.delay * rng.choice((0.0, 0.0, 0.1, 0.5)),
            loss=loss,
            loss_run=4 if loss <= 0.1 and rng.random() < 0.25 else 1,
            reordering=rng.choice((0.0, 0.0, 0.02, 0.2)),
            duplication=rng.choice((0.0, 0.0, 0.02, 0.2)),
            rate=rate,
            queue=int(rate * rng.uniform(0.02, 0.3)) + 20_000 if self.narrow else 0,
            mtu=rng.choice((1500, 1500, rng.randint(1200, 1500))),
        )

    def _pieces(self) -> list[bytes]:
        """Cut the block as an application writes: all at once, or in small portions."""
        rng = self.rng
        if rng.random() < 0.7:
            return [BLOCK]
        largest = rng.choice((3000, 20_000, 100_000))
        borders = [0]
        while borders[-1] < PERIOD:
            borders.append(min(borders[-1] + rng.randint(1, largest), PERIOD))
        return [BLOCK[begin:end] for begin, end in itertools.pairwise(borders)]

    def run(self) -> Result:
        """Run it and return what came of it."""
        began = time.process_time()
        rng = self.rng
        first = [2**32 - rng.randrange(2000) if rng.random() < 0.4 else 0 for _ in "ab"]
        window = rng.choice((4 << 20, 4 << 20, 1 << 20, 128 << 10))
        a = UdxStream(1, initial_seq=first[0], initial_remote_seq=first[1], receive_window=window)
        b = UdxStream(2, initial_seq=first[1], initial_remote_seq=first[0], receive_window=window)
        sizes = (self.up, self.down), (self.down, self.up)
        last = rng.randrange(3)
        ends = [
            End(stream, road, *size, pieces=self._pieces(), ends_last=last == i)
            for i, (stream, road, size) in enumerate(zip((a, b), self.roads, sizes, strict=True))
        ]
        result = Result(self.seed)
        pair = SoakPair(*ends, batch=self.batch, tick=self.tick)
        try:
            pair.run(VIRTUAL_SECONDS)
        except SoakFailure as failure:
            result = replace(result, failure=str(failure))
        return replace(
            result,
            size=sum(end.received for end in ends),
            packets=sum(end.stream.sender.stats.packets for end in ends),
            retransmits=sum(end.stream.sender.stats.retransmits for end in ends),
            longest_wait=max(end.longest_wait for end in ends),
            excused=sum(end.excused for end in ends),
            wrapped=sum(end.stream.sender.next_seq > 2**32 > start for end, start in zip(ends, first, strict=True)),
            seconds=time.process_time() - began,
        )


def run_seed(seed: int) -> Result:
    """Run the scenario of a seed."""
    return Scenario(seed).run()


class Progress:
    """Adds up what came of the seeds, and says so now and then."""

    def __init__(self, first: int) -> None:
        """Count from seed `first`."""
        self.total = Result(first)
        self.failures: list[Result] = []
        self.next = first  # all seeds below are done
        self._first = first
        self._done: set[int] = set()
        self._began = self._said = time.monotonic()

    def add(self, result: Result) -> None:
        """Take the result of a seed."""
        self.total += result
        self._done.add(result.seed)
        while self.next in self._done:
            self._done.discard(self.next)
            self.next += 1
        if result.failure:
            self.failures.append(result)
            print(f"seed {result.seed} FAILED: {result.failure}", flush=True)
        if time.monotonic() - self._said > REPORT_S:
            self._said = time.monotonic()
            self.say(f"next seed {self.next}")

    def say(self, what: str) -> None:
        """Print how far it is, with a word at the end."""
        total, seconds = self.total, time.monotonic() - self._began
        again = total.retransmits / max(total.packets, 1)
        print(
            f"{total.size / 1e9:.2f} GB in {seconds:.0f} s ({total.size / 1e6 / max(seconds, 1e-3):.0f} MB/s), "
            f"{total.packets / 1e6:.2f} million packets, {again:.1%} of them repeats, {total.wrapped} wraps, "
            f"longest wait {total.longest_wait:.2f} timeouts, {what}",
            flush=True,
        )


def results(first: int, processes: int) -> Generator[Result, None, None]:
    """Yield the results of all seeds from `first` on, nearly in order, for as long as somebody asks."""
    seeds = itertools.count(first)
    if processes == 1:
        yield from map(run_seed, seeds)
        return
    with ProcessPoolExecutor(processes) as pool:
        running: set[Future[Result]] = set()
        try:
            while True:
                while len(running) < 2 * processes:
                    running.add(pool.submit(run_seed, next(seeds)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> int:
    """Run seeds until enough bytes are through or one fails."""
    parser = argparse.ArgumentParser(prog="tests/soak/streams", description="Send terabytes through UDX in memory.")
    parser.add_argument("--bytes", type=parse_size, default="5GB", help="how much to send, such as 1TB (5GB)")
    parser.add_argument("--seed", type=int, default=0, help="the first scenario (0)")
    parser.add_argument("--processes", type=int, default=1, help="how many work side by side (1)")
    options = parser.parse_args()
    progress = Progress(options.seed)
    try:
        with closing(results(options.seed, options.processes)) as each:
            for result in each:
                progress.add(result)
                if progress.failures or progress.total.size >= options.bytes:
                    break
    except KeyboardInterrupt:
        progress.say(f"interrupted: go on with --seed {progress.next}")
        return 130
    failed = progress.failures
    progress.say(f"FAILED: replay with --seed {failed[0].seed} --bytes 1" if failed else f"next seed {progress.next}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
