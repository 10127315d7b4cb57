"""The routing table: which DHT nodes we know, by distance and by last contact (ring 1).

`rpc` reports every node that was heard from; `query` and FIND_NODE replies take the closest ones from here. Times
are ticks of five seconds, as upstream's. Sources: kademlia-routing-table, time-ordered-set, dht-rpc index.js.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Final

from ..constants import ID_BYTES, K
from ..encoding import Address
from ..rpc.messages import node_id

RECENT_TICKS: Final = 12  # a node pinged since then (1 min) is fresh
OLD_TICKS: Final = 360  # a node added before that (30 min) has proved itself
_BITS: Final = ID_BYTES * 8


class TableNode:
    """A DHT node as we know it; every time is a tick, 0 for never."""

    __slots__ = ("added", "down_hints", "host", "id", "pinged", "port", "sampled", "seen", "to")

    def __init__(self, id: bytes, host: str, port: int, tick: int = 0) -> None:
        self.id = id
        self.host = host
        self.port = port
        self.to: Address | None = None
        """Our own address as the node saw it last."""
        self.sampled = 0
        """When `to` last went into the NAT sampler."""
        self.added = tick
        self.pinged = tick
        """When we last sent to the node or heard from it."""
        self.seen = tick
        """When we last heard from the node."""
        self.down_hints = 0
        """How often others said that it is down."""

    @classmethod
    def at(cls, address: Address, tick: int = 0) -> "TableNode":
        """Return the node of `address`, added, pinged and seen at `tick`."""
        return cls(node_id(address), *address, tick)

    @property
    def address(self) -> Address:
        """The node's IPv4 address and port."""
        return self.host, self.port


class RoutingTable:
    """Up to `k` nodes for each length of prefix that their ids share with ours.

    One dictionary in the order of last contact serves as index and as timeline; rows hold the same nodes by
    shared prefix, with their ids as numbers.
    """

    def __init__(self, id: bytes, k: int = K) -> None:
        self.k = k
        self._nodes: dict[bytes, TableNode] = {}
        self._set_id(id)

    def _set_id(self, id: bytes) -> None:
        if len(id) != ID_BYTES:
            raise ValueError("an id has 32 bytes")
        self.id = id
        self._number = int.from_bytes(id, "big")
        # One row more than bits: the last would be for our own id, and stays empty.
        self._rows: list[dict[int, TableNode]] = [{} for _ in range(_BITS + 1)]

    def _row_index(self, number: int) -> int:
        return _BITS - (number ^ self._number).bit_length()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, id: bytes) -> bool:
        return id in self._nodes

    def __iter__(self) -> Iterator[TableNode]:
        """Iterate over all nodes, longest without contact first; the table must not change meanwhile."""
        return iter(self._nodes.values())

    def get(self, id: bytes) -> TableNode | None:
        """Return the node of that id, if known."""
        return self._nodes.get(id)

    def add(self, node: TableNode) -> bool:
        """Add a node just heard from; False if its row is full, it is known already, or it is ourselves."""
        number = int.from_bytes(node.id, "big")
        index = self._row_index(number)
        row = self._rows[index]
        if index == _BITS or node.id in self._nodes or len(row) >= self.k:
            return False
        row[number] = self._nodes[node.id] = node
        return True

    def remove(self, id: bytes) -> bool:
        """Forget the node of that id; False if it is not known."""
        if self._nodes.pop(id, None) is None:
            return False
        number = int.from_bytes(id, "big")
        del self._rows[self._row_index(number)][number]
        return True

    def touch(self, node: TableNode) -> None:
        """Note contact with a node: it becomes the latest. A node that is not in the table is left alone."""
        if self._nodes.get(node.id) is node:
            self._nodes[node.id] = self._nodes.pop(node.id)

    def oldest(self, limit: int | None = None) -> list[TableNode]:
        """Return up to `limit` nodes (default: all), longest without contact first."""
        return list(islice(self._nodes.values(), limit))

    def latest(self, limit: int | None = None) -> list[TableNode]:
        """Return up to `limit` nodes (default: all), most recent contact first."""
        return list(islice(reversed(self._nodes.values()), limit))

    def random(self, rng: random.Random) -> TableNode | None:
        """Return any node, None from an empty table."""
        return rng.choice(list(self._nodes.values())) if self._nodes else None

    def closest(self, target: bytes, k: int | None = None) -> list[TableNode]:
        """Return up to `k` nodes (default: the table's k), sorted by XOR distance to `target`."""
        k = self.k if k is None else k
        goal = int.from_bytes(target, "big")
        if len(self._nodes) <= k:  # all of them; rows would be looked through for little
            return sorted(self._nodes.values(), key=lambda node: int.from_bytes(node.id, "big") ^ goal)
        found: list[TableNode] = []
        for group in self._groups(self._row_index(goal)):
            if len(found) >= k:
                break
            found += [group[number] for number in sorted(group, key=goal.__xor__)]
        return found[:k]

    def _groups(self, index: int) -> Iterator[dict[int, TableNode]]:
        """Yield sets of nodes such that each is closer to a target of row `index` than all later ones.

        Nodes of the target's row share more bits with it than anyone else; those of all longer rows differ from
        it first in the same bit, so they mix; then each shorter row is farther than the one before.
        """
        yield self._rows[index]
        yield {number: node for row in self._rows[index + 1 :] for number, node in row.items()}
        for i in range(index - 1, -1, -1):
            yield self._rows[i]

    def full_row(self, id: bytes) -> list[TableNode]:
        """Return the nodes that keep `id` out, longest without ping first; [] while its row has room."""
        row = self._rows[self._row_index(int.from_bytes(id, "big"))]
        return sorted(row.values(), key=lambda node: (node.pinged, node.added)) if len(row) >= self.k else []

    def replaceable(self, id: bytes, tick: int) -> TableNode | None:
        """Return the node to ping, and to replace by that of `id` if it is silent; None when all may stay.

        That is the one longest without ping, not pinged in this tick, unless it is both fresh and old; dht-rpc
        index.js, _onfullrow.
        """
        for node in self.full_row(id):
            if node.pinged == tick:
                continue
            fresh, old = tick - node.pinged < RECENT_TICKS, tick - node.added > OLD_TICKS
            return None if fresh and old else node
        return None

    def rebuild(self, id: bytes) -> None:
        """Take a new id and sort all nodes anew, in their order of contact; rows that overflow lose the oldest."""
        nodes = self.latest()
        self._nodes = {}
        self._set_id(id)
        kept = [node for node in nodes if self.add(node)]
        self._nodes = {node.id: node for node in reversed(kept)}
