"""Measure the UDX core alone: two ends in one process, packets handed over in memory.

    python tests/bench/udx_memory.py [MEGABYTES [BATCH]]

Prints payload throughput and the time a packet costs, both ends and all acknowledgements together. BATCH is how many
datagrams the receiving end is given at once, as a socket would hand them over.
"""

import sys
import time

from p2pclaude.hyperdht.udx.events import DataReceived
from p2pclaude.hyperdht.udx.stream import UdxStream

CHUNK = bytes(256 * 1024)


def transfer(megabytes: int, batch: int) -> tuple[float, int]:
    """Move data from one stream to another; return the seconds and the data packets it took."""
    clock = time.perf_counter
    a, b = UdxStream(1), UdxStream(2)
    a.connect(2, clock())
    b.connect(1, clock())
    wanted, received, written = megabytes * 1_000_000, 0, 0
    begin = clock()
    while received < wanted:
        while a.buffered < len(CHUNK) and written < wanted:
            a.write(CHUNK)
            written += len(CHUNK)
        datagrams = a.datagrams_to_send(clock())
        for i in range(0, len(datagrams), batch):
            b.receive_datagrams(datagrams[i : i + batch], clock())
            while (event := b.next_event()) is not None:
                if isinstance(event, DataReceived):
                    received += len(event.data)
                    b.consume(len(event.data))
            a.receive_datagrams(b.datagrams_to_send(clock()), clock())
        while a.next_event() is not None:
            pass
        timer = a.get_timer()
        if timer is not None and timer <= clock():
            a.handle_timer(clock())
    return clock() - begin, a.sender.stats.packets


def main() -> None:
    """Run and print."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 44
    seconds, packets = transfer(megabytes, batch)
    print(f"{megabytes / seconds:.0f} MB/s, {seconds / packets * 1e6:.2f} us a packet, batches of {batch}")


if __name__ == "__main__":
    main()
