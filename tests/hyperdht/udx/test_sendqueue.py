"""The queue gives back what was put in, in whatever portions."""

from random import Random

import pytest

from p2pclaude.hyperdht.udx.sendqueue import SendQueue


@pytest.mark.parametrize("seed", range(100))
def test_gives_back_every_byte_in_order(seed: int) -> None:
    rng = Random(seed)
    queue, put, taken = SendQueue(), b"", b""
    for _ in range(200):
        if rng.random() < 0.4:
            chunk = rng.randbytes(rng.choice([0, 1, 3, 4, 8]))
            queue.append(chunk)
            put += chunk
        elif queue.size:
            portion = queue.take(rng.randint(1, min(queue.size, 9)))
            assert type(portion) is bytes
            taken += portion
        assert queue.size == len(put) - len(taken)
    while queue.size:
        taken += queue.take(min(queue.size, 4))
    assert taken == put


def test_a_cleared_queue_is_empty() -> None:
    queue = SendQueue()
    queue.append(b"some")
    queue.take(1)
    queue.clear()
    queue.append(b"other")
    assert queue.take(5) == b"other"
