"""A DHT network of Python nodes in one process, every one persistent: the twin of `node/testnet.js`."""

import asyncio
import socket
from contextlib import AsyncExitStack

from interop.python.control import config, emit, serve_commands

from p2pclaude.hyperdht import HyperDHT

HOST = "127.0.0.1"


def free_port() -> int:
    """Find a UDP port that nobody uses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


async def main() -> None:
    """Start the bootstrap node, then the others one by one; obey until the end."""
    port = free_port()
    bootstrap = [f"{HOST}:{port}"]
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(HyperDHT.bootstrapper(port, HOST, bind=HOST))]
        while len(nodes) < config.get("size", 6):
            port = free_port()
            address = (HOST, port)
            node = HyperDHT(bootstrap=bootstrap, host=HOST, port=port, ephemeral=False, public_address=address)
            nodes.append(await stack.enter_async_context(node))
            await node.bootstrapped.wait()
        emit("ready", bootstrap=bootstrap, nodes=[f"{HOST}:{node.port}" for node in nodes])
        await serve_commands({})


if __name__ == "__main__":
    asyncio.run(main())
