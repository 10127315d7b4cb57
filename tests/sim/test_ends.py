"""Encrypted connections whose other side is gone: it is noticed soon, whatever state they are in."""

import asyncio

import pytest
from kit.sim_peers import connect_ends

from p2pclaude.hyperdht.constants import PacketType
from p2pclaude.hyperdht.errors import ConnectionClosed
from sim import Packet, SimNetwork, run


def test_a_vanished_peer_is_noticed_by_who_has_ended_and_still_reads() -> None:
    """Behind the own end there is nothing more to send, and so nothing that the peer would have to acknowledge."""

    async def main() -> None:
        net = SimNetwork(1)
        left, right = await connect_ends(net)
        await left.connection.write(b"question")
        assert await right.connection.read() == b"question"
        await left.connection.write_eof()
        assert await right.connection.read() == b""
        await asyncio.sleep(600)  # a peer that takes its time is none that has vanished
        assert not left.connection.closed
        right.host.up = False
        async with asyncio.timeout(20):
            with pytest.raises(ConnectionClosed, match="does not answer"):
                await left.connection.read()
        for end in (left, right):
            end.endpoint.close()

    run(main(), seed=1)


@pytest.mark.parametrize("before", ["nothing", "abort"])
def test_a_node_that_leaves_is_missed_at_once_though_a_packet_is_lost(before: str) -> None:
    """There will be nobody to say it again later."""

    async def main() -> None:
        net = SimNetwork(1)
        left, right = await connect_ends(net)
        await left.connection.write(b"question")
        assert await right.connection.read() == b"question"
        lost: list[Packet] = []

        def lose_first(packet: Packet) -> bool:
            if packet.data[2] & PacketType.DESTROY and not lost:
                lost.append(packet)
                return True
            return False

        net.intercept = lose_first
        if before == "abort":
            left.connection.abort()
            await asyncio.sleep(0.01)
        left.endpoint.close()
        async with asyncio.timeout(1):
            with pytest.raises(ConnectionClosed, match="broke"):
                await right.connection.read()
        assert lost
        right.endpoint.close()

    run(main(), seed=1)
