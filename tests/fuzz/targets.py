"""Every fuzz target by name."""

from typing import Final

from fuzz import channels, decoders, machines, nodes, text
from fuzz.target import Target

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (*decoders.TARGETS, *text.TARGETS, *machines.TARGETS, *channels.TARGETS, *nodes.TARGETS)
}
