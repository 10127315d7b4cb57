"""Sizes as people write them."""

import argparse
from typing import Final

UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Read a number of bytes such as `5GB`; units are powers of 1000. Raises what argparse reports."""
    number = text.rstrip("KMGTB")
    unit = text[len(number) :]
    if unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{unit!r} is none of {', '.join(filter(None, UNITS))}")
    return int(float(number) * UNITS[unit])
