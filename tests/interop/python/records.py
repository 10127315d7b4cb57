"""DHT records: the Python twin of `node/records.js`, with the same commands and events (binary values are hex)."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from interop.python.control import Command, config, emit, serve_commands
from interop.python.nodes import key_pair_of, new_node

from p2pclaude.hyperdht import HyperDHT

Answer = dict[str, Any]


def _bytes(command: Command, name: str) -> bytes:
    return bytes.fromhex(command[name])


async def mutable_put(dht: HyperDHT, command: Command) -> Answer:
    """Store a value under a key pair."""
    pair, seq = key_pair_of(command["seed"]), command.get("seq", 0)
    await dht.mutable_put(pair, _bytes(command, "value"), seq=seq)
    return {"publicKey": pair.public_key.hex(), "seq": seq}


async def mutable_get(dht: HyperDHT, command: Command) -> Answer:
    """Find the newest value of a key."""
    found = await dht.mutable_get(_bytes(command, "publicKey"), seq=command.get("seq", 0))
    return {"missing": True} if found is None else {"seq": found.seq, "value": found.value.hex()}


async def immutable_put(dht: HyperDHT, command: Command) -> Answer:
    """Store a value under its hash."""
    return {"target": (await dht.immutable_put(_bytes(command, "value"))).hex()}


async def immutable_get(dht: HyperDHT, command: Command) -> Answer:
    """Find the value of a hash."""
    value = await dht.immutable_get(_bytes(command, "target"))
    return {"missing": True} if value is None else {"value": value.hex()}


async def announce(dht: HyperDHT, command: Command) -> Answer:
    """Announce a key pair under a topic."""
    await dht.announce(_bytes(command, "target"), key_pair_of(command["seed"]))
    return {}


async def unannounce(dht: HyperDHT, command: Command) -> Answer:
    """Take an announcement back."""
    await dht.unannounce(_bytes(command, "target"), key_pair_of(command["seed"]))
    return {}


async def lookup(dht: HyperDHT, command: Command) -> Answer:
    """Collect the keys announced under a topic."""
    keys = [peer.public_key.hex() async for reply in dht.lookup(_bytes(command, "target")) for peer in reply.peers]
    return {"peers": sorted(set(keys))}


async def where(dht: HyperDHT, _: Command) -> Answer:
    """Say where this node's server socket is."""
    return {"address": f"{config.get('host', '127.0.0.1')}:{dht.port}"}


HANDLERS: dict[str, Callable[[HyperDHT, Command], Awaitable[Answer]]] = {
    "mutable-put": mutable_put,
    "mutable-get": mutable_get,
    "immutable-put": immutable_put,
    "immutable-get": immutable_get,
    "announce": announce,
    "unannounce": unannounce,
    "lookup": lookup,
    "where": where,
}


async def main() -> None:
    """Start a node, then obey."""
    async with new_node() as dht:

        def bind(name: str) -> Callable[[Command], Awaitable[None]]:
            async def run(command: Command) -> None:
                emit(name, tag=command.get("tag"), **await HANDLERS[name](dht, command))

            return run

        await dht.bootstrapped.wait()
        emit("ready")
        await serve_commands({name: bind(name) for name in HANDLERS})


if __name__ == "__main__":
    asyncio.run(main())
