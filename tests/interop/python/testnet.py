"""A DHT network of Python nodes in one process, every one persistent: the twin of `node/testnet.js`."""

import asyncio
from contextlib import AsyncExitStack

from interop.python.control import config, emit, serve_commands
from kit.free_ports import free_port

from p2pclaude.hyperdht import HyperDHT

HOST = "127.0.0.1"


async def main() -> None:
    """Start the bootstrap node, then the others one by one; obey until the end."""
    hosts = config.get("hosts") or [HOST] * config.get("size", 6)
    port = free_port(hosts[0])
    bootstrap = [f"{hosts[0]}:{port}"]
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(HyperDHT.bootstrapper(port, hosts[0], bind=hosts[0]))]
        for host in hosts[1:]:
            port = free_port(host)
            node = HyperDHT(bootstrap=bootstrap, host=host, port=port, ephemeral=False, public_address=(host, port))
            nodes.append(await stack.enter_async_context(node))
            await node.bootstrapped.wait()
        where = [f"{host}:{node.port}" for host, node in zip(hosts, nodes, strict=True)]
        emit("ready", bootstrap=bootstrap, nodes=where)
        await serve_commands({})


if __name__ == "__main__":
    asyncio.run(main())
