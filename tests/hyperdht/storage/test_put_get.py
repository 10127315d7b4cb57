"""Puts and announcements where a node near the target does not mean well."""

import pytest
from kit.sim_dht import swarm
from sim import run

from p2pclaude.hyperdht.constants import Command, ErrorCode
from p2pclaude.hyperdht.crypto import KeyPair
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.errors import RemoteError
from p2pclaude.hyperdht.rpc.requests import IncomingRequest
from p2pclaude.hyperdht.storage.records import MutableStore


def test_a_node_that_refuses_everything_spoils_no_put() -> None:
    """Its word that it holds a newer record counts when it shows one."""

    async def main() -> None:
        async with swarm(1, 10) as network:
            liar, reader = network.nodes[3:5]
            writer = await network.join(network.net.host("5.2.0.1"))
            honest, refused = liar.node.on_request, set()

            def lie(request: IncomingRequest) -> bool:
                if request.token is None:
                    return honest(request)
                refused.add(request.command)
                request.error(ErrorCode.SEQ_TOO_LOW)
                return True

            liar.node.on_request = lie
            for seq in (1, 2):
                await writer.mutable_put(writer.key_pair, b"record", seq)
                assert await reader.mutable_get(writer.key_pair.public_key) == (seq, b"record")
            assert await reader.immutable_get(await writer.immutable_put(b"value")) == b"value"
            await writer.announce(bytes(32))
            assert refused == {Command.MUTABLE_PUT, Command.IMMUTABLE_PUT, Command.ANNOUNCE}

    run(main(), seed=1)


def test_one_node_that_holds_a_newer_record_is_enough_to_refuse_a_put() -> None:
    async def main() -> None:
        async with swarm(1, 10) as network:
            writer = await network.join(network.net.host("5.2.0.1"))
            await writer.mutable_put(writer.key_pair, b"newer", 2)
            for node in [*network.nodes[1:], network.bootstrap]:
                node._persistent.mutables = MutableStore()
            for seq, code in ((1, ErrorCode.SEQ_TOO_LOW), (2, ErrorCode.SEQ_REUSED)):
                with pytest.raises(RemoteError) as caught:
                    await writer.mutable_put(writer.key_pair, b"other", seq)
                assert caught.value.code == code

    run(main(), seed=1)


def test_a_refusal_says_more_than_the_silence_of_another_node() -> None:
    """All but the last of the nodes that are asked hold a newer record, and that one does not answer."""

    async def main() -> None:
        async with swarm(1, 6) as network:
            writer = await network.join(network.net.host("5.2.0.1"))
            await writer.mutable_put(writer.key_pair, b"newer", 2)
            target = blake2b(writer.key_pair.public_key)
            last = writer.node.table.closest(target)[-1].address
            silent = next(node for node in [*network.nodes, network.bootstrap] if node.remote_address == last)
            handle = silent.node.on_request
            silent.node.on_request = lambda request: request.command == Command.MUTABLE_PUT or handle(request)
            with pytest.raises(RemoteError) as caught:
                await writer.mutable_put(writer.key_pair, b"older", 1)
            assert caught.value.code == ErrorCode.SEQ_TOO_LOW

    run(main(), seed=1)


def test_what_the_node_itself_stores_is_unannounced_too() -> None:
    """Another of the key's holders may have announced it here; a walk does not ask the node that walks."""

    async def main() -> None:
        async with swarm(1, 5) as network:
            topic, key_pair = bytes(32), KeyPair.from_seed(bytes(32))

            async def found() -> list[bytes]:
                return [peer.public_key async for result in reader.lookup(topic) for peer in result.peers]

            announcer, other, reader = network.nodes[:3]
            await announcer.announce(topic, key_pair)
            assert key_pair.public_key in await found()
            await other.unannounce(topic, key_pair)
            assert await found() == []

    run(main(), seed=1)
