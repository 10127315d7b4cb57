"""Inputs without coverage guidance: seeded mutations of a corpus."""

import random
from collections.abc import Callable, Sequence
from typing import Final

_NUMBERS: Final = (
    *(bytes((n,)) for n in (0, 1, 2, 0x7F, 0x80, 0xFC, 0xFD, 0xFE, 0xFF)),
    *(n.to_bytes(2, "little") for n in (0, 1, 0xFC, 0xFF, 0x7FFF, 0x8000, 0xFFFF)),
    *(n.to_bytes(4, "little") for n in (0, 1, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    *(n.to_bytes(8, "little") for n in (2**53 - 1, 2**53, 2**63, 2**64 - 1)),
)
MAX_STEPS: Final = 4


class Mutator:
    """Makes inputs from `corpus` (and the empty one); the same `rng` makes the same ones."""

    def __init__(self, corpus: Sequence[bytes], rng: random.Random, max_bytes: int) -> None:
        self._corpus = [b"", *corpus]
        self._rng = rng
        self._max_bytes = max_bytes
        self._steps: tuple[Callable[[bytearray, int], None], ...] = (
            self._flip, self._set, self._number, self._insert, self._cut, self._repeat, self._splice, self._truncate
        )  # fmt: skip

    def next(self) -> bytes:
        """Return the next input."""
        rng = self._rng.random
        data = bytearray(self._corpus[int(rng() * len(self._corpus))])
        for _ in range(1 + int(rng() * MAX_STEPS)):
            self._steps[int(rng() * len(self._steps))](data, int(rng() * (len(data) + 1)))
        return bytes(data[: self._max_bytes])

    def _flip(self, data: bytearray, at: int) -> None:
        if at < len(data):
            data[at] ^= 1 << int(self._rng.random() * 8)

    def _set(self, data: bytearray, at: int) -> None:
        if at < len(data):
            data[at] = int(self._rng.random() * 256)

    def _number(self, data: bytearray, at: int) -> None:
        number = _NUMBERS[int(self._rng.random() * len(_NUMBERS))]
        data[at : at + len(number)] = number

    def _insert(self, data: bytearray, at: int) -> None:
        data[at:at] = self._rng.randbytes(1 + int(self._rng.random() ** 3 * 40))

    def _cut(self, data: bytearray, at: int) -> None:
        del data[at : at + 1 + int(self._rng.random() ** 3 * 40)]

    def _repeat(self, data: bytearray, at: int) -> None:
        piece = data[at : at + 1 + int(self._rng.random() ** 2 * 60)]
        data[at:at] = piece * (1 + int(self._rng.random() ** 4 * 8))

    def _splice(self, data: bytearray, at: int) -> None:
        other = self._corpus[int(self._rng.random() * len(self._corpus))]
        data[at:] = other[int(self._rng.random() * (len(other) + 1)) :]

    def _truncate(self, data: bytearray, at: int) -> None:
        del data[at:]
