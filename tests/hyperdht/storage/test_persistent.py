"""What a persistent node stores: each command, who may, what is refused, and what is never answered."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.dht_nodes import PORT, Peer, make_node
from sim import SimNetwork, run

from p2pclaude.hyperdht.constants import Command, ErrorCode
from p2pclaude.hyperdht.crypto import (
    NS_ANNOUNCE,
    NS_MUTABLE_PUT,
    NS_UNANNOUNCE,
    KeyPair,
    announce_signable,
    hash,
    sign,
)
from p2pclaude.hyperdht.encoding import Address, uint
from p2pclaude.hyperdht.errors import Timeout
from p2pclaude.hyperdht.node.budget import BURST_SECONDS, VerifyBudget
from p2pclaude.hyperdht.node.forwards import ANNOUNCE_LIFETIME, ForwardStore
from p2pclaude.hyperdht.node.node import Node
from p2pclaude.hyperdht.node.routing import TableNode
from p2pclaude.hyperdht.peer.router import Router
from p2pclaude.hyperdht.rpc.messages import (
    Announce,
    LookupReply,
    MutablePut,
    decode_lookup_reply,
    decode_mutable_get_reply,
    decode_peer,
    encode_announce,
    encode_mutable_put,
    encode_mutable_signable,
    encode_peer,
)
from p2pclaude.hyperdht.rpc.messages import Peer as PeerRecord
from p2pclaude.hyperdht.rpc.requests import Reply
from p2pclaude.hyperdht.storage.persistent import Persistent

KEYS = KeyPair.from_seed(b"\x01" * 32)
OTHERS = [KeyPair.from_seed(bytes([i]) * 32) for i in range(2, 42)]
SELF = hash(KEYS.public_key)
TOPIC = b"\x07" * 32
STORE: Address = ("8.8.8.8", PORT)
RELAYS = tuple((f"9.9.9.{i}", i) for i in range(1, 6))
WALL = 1_700_000_000.0


class Shop:
    """A persistent node with its storage, and a customer."""

    def __init__(self, node: Node, storage: Persistent, router: Router, peer: Peer) -> None:
        self.node, self.storage, self.router, self.peer = node, storage, router, peer

    @classmethod
    async def open(cls) -> "Shop":
        net = SimNetwork()
        node = make_node(net.host(STORE[0]), ephemeral=False, firewalled=False, host=STORE[0])
        router = Router(ForwardStore())
        storage = Persistent(node, router, random.Random(1), wall=lambda: WALL)
        node.on_request = storage.handle
        await node.start()
        await node.bootstrapped.wait()
        node.table.add(TableNode.at(("1.2.3.4", 5)))
        return cls(node, storage, router, await Peer(net.host("7.7.7.7")).start())

    async def ask(
        self, command: Command, target: bytes | None, value: bytes | None = None, token: bytes | None = None
    ) -> Reply:
        return await self.peer.rpc.request(STORE, command, target=target, value=value, token=token, retries=0)

    async def silent(self, command: Command, target: bytes | None, value: bytes | None, token: bytes | None) -> None:
        with pytest.raises(Timeout):
            await self.ask(command, target, value, token)

    @property
    def token(self) -> bytes:
        return self.node.rpc.own.issue_token(self.peer.address[0])

    def signed(
        self,
        target: bytes,
        keys: KeyPair = KEYS,
        relays: tuple[Address, ...] = (),
        refresh: bytes | None = None,
        bump: int = 0,
        namespace: bytes = NS_ANNOUNCE,
    ) -> Announce:
        peer = PeerRecord(keys.public_key, relays)
        assert self.node.id is not None
        signable = announce_signable(target, self.node.id, self.token, encode_peer(peer), refresh, namespace)
        return Announce(peer, refresh, sign(keys, signable), bump)

    async def announce(self, target: bytes, message: Announce) -> Reply:
        return await self.ask(Command.ANNOUNCE, target, encode_announce(message), self.token)

    async def unannounce(self, target: bytes, keys: KeyPair = KEYS) -> Reply:
        message = self.signed(target, keys, namespace=NS_UNANNOUNCE)
        return await self.ask(Command.UNANNOUNCE, target, encode_announce(message), self.token)

    async def lookup(self, target: bytes = TOPIC) -> LookupReply | None:
        reply = await self.ask(Command.LOOKUP, target)
        return None if reply.value is None else decode_lookup_reply(reply.value)


def in_shop(body: Callable[[Shop], Awaitable[None]]) -> None:
    async def main() -> None:
        shop = await Shop.open()
        await body(shop)
        await shop.node.destroy()
        assert shop.node.rpc.stats.handler_errors == 0

    run(main(), time_limit=3 * 86_400)


def test_a_server_announces_itself_is_found_and_leaves() -> None:
    async def body(shop: Shop) -> None:
        assert (await shop.ask(Command.FIND_PEER, SELF)).value is None
        stored = await shop.announce(SELF, shop.signed(SELF, relays=RELAYS))
        assert (stored.error, stored.token, stored.closer_nodes, stored.value) == (0, None, (), None)
        found = await shop.ask(Command.FIND_PEER, SELF)
        assert found.value is not None and found.token is not None and found.closer_nodes
        assert decode_peer(found.value) == PeerRecord(KEYS.public_key, RELAYS[:3])  # cut after the verification
        forward = shop.router.get(SELF, asyncio.get_running_loop().time())
        assert forward is not None and forward.relay == shop.peer.address
        assert await shop.lookup(SELF) == LookupReply((PeerRecord(KEYS.public_key, RELAYS[:3]),))
        left = await shop.unannounce(SELF)
        assert (left.error, left.token, left.closer_nodes) == (0, None, ())
        assert (await shop.ask(Command.FIND_PEER, SELF)).value is None
        assert await shop.lookup(SELF) is None

    in_shop(body)


def test_topics_hold_many_and_give_twenty() -> None:
    async def body(shop: Shop) -> None:
        assert await shop.lookup() is None
        for keys in OTHERS:
            await shop.announce(TOPIC, shop.signed(TOPIC, keys))
        assert (await shop.ask(Command.FIND_PEER, TOPIC)).value is None
        found = [await shop.lookup() for _ in range(10)]
        keys_found = [{peer.public_key for peer in reply.peers} for reply in found if reply is not None]
        assert all(len(keys) == 20 for keys in keys_found)
        assert set.union(*keys_found) == {keys.public_key for keys in OTHERS}
        for keys in OTHERS[1:]:
            await shop.unannounce(TOPIC, keys)
        assert await shop.lookup() == LookupReply((PeerRecord(OTHERS[0].public_key),))

    in_shop(body)


def test_announcing_again_replaces_the_relays_at_once() -> None:
    async def body(shop: Shop) -> None:
        for relays in (RELAYS[:1], RELAYS[1:3]):
            await shop.announce(TOPIC, shop.signed(TOPIC, relays=relays))
            assert await shop.lookup() == LookupReply((PeerRecord(KEYS.public_key, relays),))

    in_shop(body)


def test_announcements_expire() -> None:
    async def body(shop: Shop) -> None:
        await shop.announce(TOPIC, shop.signed(TOPIC))
        await shop.announce(SELF, shop.signed(SELF))
        await asyncio.sleep(ANNOUNCE_LIFETIME - 60)
        assert await shop.lookup() and await shop.lookup(SELF)
        await asyncio.sleep(120)
        assert await shop.lookup() is None and await shop.lookup(SELF) is None

    in_shop(body)


def test_a_bump_grows_and_is_not_from_the_future() -> None:
    async def body(shop: Shop) -> None:
        wall_ms = int(WALL * 1000)
        for sent, kept in [(1000, 1000), (999, 1000), (wall_ms + 50_000, wall_ms + 50_000), (wall_ms + 61_000, None)]:
            await shop.announce(TOPIC, shop.signed(TOPIC, bump=sent))
            found = await shop.lookup()
            assert found is not None and found.bump == (kept or wall_ms + 50_000)

    in_shop(body)


def test_an_announcement_is_renewed_by_the_preimage_of_its_refresh_token() -> None:
    async def body(shop: Shop) -> None:
        first, second = b"\x01" * 32, hash(b"\x01" * 32)
        await shop.announce(TOPIC, shop.signed(TOPIC, refresh=second))
        await shop.unannounce(TOPIC)
        renewed = await shop.announce(TOPIC, Announce(refresh=first))
        assert (renewed.error, renewed.token) == (0, None)
        assert await shop.lookup() == LookupReply((PeerRecord(KEYS.public_key),))
        await shop.silent(Command.ANNOUNCE, TOPIC, encode_announce(Announce(refresh=first)), shop.token)

    in_shop(body)


def test_bad_announcements_get_no_answer_and_leave_nothing() -> None:
    async def body(shop: Shop) -> None:
        good = shop.signed(TOPIC)
        bad = [
            good._replace(signature=None),
            good._replace(signature=b"\x01" * 64),
            good._replace(refresh=b"\x01" * 32),  # not what was signed
            good._replace(peer=PeerRecord(OTHERS[0].public_key)),
            shop.signed(SELF),  # for another target
            shop.signed(TOPIC, namespace=NS_UNANNOUNCE),
            Announce(),
        ]
        for message in bad:
            await shop.silent(Command.ANNOUNCE, TOPIC, encode_announce(message), shop.token)
        value = encode_announce(good)
        await shop.silent(Command.ANNOUNCE, TOPIC, value, None)
        await shop.silent(Command.ANNOUNCE, None, value, shop.token)
        await shop.silent(Command.ANNOUNCE, TOPIC, None, shop.token)
        await shop.silent(Command.ANNOUNCE, TOPIC, value[:-1], shop.token)
        assert await shop.lookup() is None
        await shop.announce(TOPIC, shop.signed(TOPIC))  # by now the token is another one
        for keys in OTHERS[:2]:
            forged = shop.signed(TOPIC, keys, namespace=NS_UNANNOUNCE)._replace(peer=PeerRecord(KEYS.public_key))
            await shop.silent(Command.UNANNOUNCE, TOPIC, encode_announce(forged), shop.token)
        assert await shop.lookup() is not None

    in_shop(body)


def test_a_signature_for_another_token_is_no_signature() -> None:
    async def body(shop: Shop) -> None:
        stale = shop.signed(TOPIC)
        await asyncio.sleep(60)
        await shop.silent(Command.ANNOUNCE, TOPIC, encode_announce(stale), shop.token)

    in_shop(body)


def put(seq: int, value: bytes, keys: KeyPair = KEYS) -> bytes:
    signable = NS_MUTABLE_PUT + hash(encode_mutable_signable(seq, value))
    return encode_mutable_put(MutablePut(keys.public_key, seq, value, sign(keys, signable)))


def test_mutable_values_by_sequence_number() -> None:
    async def body(shop: Shop) -> None:
        async def error_of(seq: int, value: bytes) -> int:
            reply = await shop.ask(Command.MUTABLE_PUT, SELF, put(seq, value), shop.token)
            assert reply.closer_nodes
            assert (reply.token is None) == (reply.error != 0)
            return reply.error

        assert (await shop.ask(Command.MUTABLE_GET, SELF, uint(0))).value is None
        assert await error_of(5, b"five") == 0
        assert await error_of(5, b"five") == 0
        assert await error_of(5, b"FIVE") == ErrorCode.SEQ_REUSED
        assert await error_of(4, b"four") == ErrorCode.SEQ_TOO_LOW
        assert await error_of(6, b"") == 0
        found = await shop.ask(Command.MUTABLE_GET, SELF, uint(6))
        assert found.value is not None and found.token is not None
        stored = decode_mutable_get_reply(found.value)
        assert (stored.seq, stored.value) == (6, b"")
        assert (await shop.ask(Command.MUTABLE_GET, SELF, uint(7))).value is None

    in_shop(body)


def test_bad_values_get_no_answer() -> None:
    async def body(shop: Shop) -> None:
        good = put(1, b"value")
        mutable = Command.MUTABLE_PUT
        await shop.silent(mutable, TOPIC, good, shop.token)
        await shop.silent(mutable, SELF, put(1, b"value", OTHERS[0]), shop.token)
        await shop.silent(mutable, SELF, good[:-1] + bytes([good[-1] ^ 1]), shop.token)
        await shop.silent(mutable, SELF, good[:-1], shop.token)
        await shop.silent(mutable, SELF, good, None)
        await shop.silent(mutable, SELF, None, shop.token)
        await shop.silent(Command.MUTABLE_GET, SELF, None, None)
        await shop.silent(Command.MUTABLE_GET, SELF, b"", None)
        await shop.silent(Command.IMMUTABLE_PUT, SELF, b"value", shop.token)
        await shop.silent(Command.IMMUTABLE_PUT, hash(b"value"), b"value", None)
        assert len(shop.storage.mutables) == len(shop.storage.immutables) == 0

    in_shop(body)


def test_immutable_values() -> None:
    async def body(shop: Shop) -> None:
        target = hash(b"value")
        assert (await shop.ask(Command.IMMUTABLE_GET, target)).value is None
        stored = await shop.ask(Command.IMMUTABLE_PUT, target, b"value", shop.token)
        assert (stored.error, stored.value) == (0, None) and stored.token and stored.closer_nodes
        assert (await shop.ask(Command.IMMUTABLE_GET, target)).value == b"value"
        await asyncio.sleep(49 * 3600)
        assert (await shop.ask(Command.IMMUTABLE_GET, target)).value is None

    in_shop(body)


def test_a_wrong_token_is_refused_before_anything_else() -> None:
    async def body(shop: Shop) -> None:
        reply = await shop.ask(Command.IMMUTABLE_PUT, hash(b"value"), b"value", b"\x01" * 32)
        assert reply.error == 0  # retried with the token that came with the refusal
        assert shop.node.rpc.stats.bad_tokens == 1

    in_shop(body)


def test_an_ephemeral_node_stores_nothing_and_says_who_is_closer() -> None:
    async def body(shop: Shop) -> None:
        shop.node.set_identity(None)
        for command in list(Command)[2:]:
            reply = await shop.ask(command, SELF, b"value")
            assert (reply.error, reply.closer_nodes) == (ErrorCode.UNKNOWN_COMMAND, (("1.2.3.4", 5),))

    in_shop(body)


def test_verifying_for_strangers_has_its_limit() -> None:
    async def body(shop: Shop) -> None:
        shop.storage._budget = VerifyBudget(host_rate=3 / BURST_SECONDS)
        forged = encode_announce(shop.signed(TOPIC)._replace(signature=b"\x01" * 64))
        token, good = shop.token, encode_announce(shop.signed(TOPIC))
        peer = shop.peer.rpc
        for _ in range(3):
            peer.start(STORE, Command.ANNOUNCE, target=TOPIC, value=forged, token=token)
        await asyncio.sleep(0.1)
        for call in list(peer._calls):
            call.cancel()
        await shop.silent(Command.ANNOUNCE, TOPIC, good, token)
        await asyncio.sleep(20)
        assert (await shop.announce(TOPIC, shop.signed(TOPIC))).error == 0

    in_shop(body)


@settings(max_examples=40)
@given(st.sampled_from(list(Command)[2:]), st.binary(max_size=150))
def test_any_value_is_survived(command: Command, value: bytes) -> None:
    async def body(shop: Shop) -> None:
        call = shop.peer.rpc.start(STORE, command, target=SELF, value=value, token=shop.token)
        await asyncio.sleep(0.2)
        call.cancel()

    in_shop(body)
