"""Ring 2 in virtual time: a node that hostile datagrams reach, and a server's handshake and hole punching handlers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from random import Random
from typing import Any, Final

import vectors
from sim import Host, SimNetwork, SimSocket

from fuzz import virtual
from fuzz.target import Script, Target
from p2pclaude.hyperdht.constants import (
    REQUEST_ID,
    Command,
    Firewall,
    HandshakeError,
    InternalCommand,
    Mode,
)
from p2pclaude.hyperdht.crypto import (
    NS_ANNOUNCE,
    NS_MUTABLE_PUT,
    NS_UNANNOUNCE,
    HolepunchBox,
    KeyPair,
    announce_signable,
    sign,
)
from p2pclaude.hyperdht.crypto import hash as blake2b
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.encoding import Address, uint
from p2pclaude.hyperdht.errors import DecodeError, HyperDHTError
from p2pclaude.hyperdht.net.sockets import Arrival, Socket
from p2pclaude.hyperdht.peer.server import Server
from p2pclaude.hyperdht.peer.setup_messages import (
    Handshake,
    Holepunch,
    HolepunchPayload,
    NoisePayload,
    RelayedPath,
    UdxInfo,
    decode_holepunch_payload,
    decode_noise_payload,
    encode_handshake,
    encode_holepunch,
    encode_holepunch_payload,
    encode_noise_payload,
)
from p2pclaude.hyperdht.peer.slots import MAX_PENDING
from p2pclaude.hyperdht.rpc.messages import (
    Announce,
    MutablePut,
    Peer,
    Request,
    Response,
    decode_message,
    encode_announce,
    encode_mutable_put,
    encode_mutable_signable,
    encode_peer,
    encode_request,
    encode_response,
    node_id,
)
from p2pclaude.hyperdht.rpc.requests import IncomingRequest
from p2pclaude.hyperdht.secure.connection import Connection
from p2pclaude.hyperdht.secure.noise import NoiseIK
from p2pclaude.hyperdht.udx.packet import HEADER, MAGIC

HERE: Final[Address] = ("5.0.0.1", 49737)
PEERS: Final[tuple[Address, ...]] = (
    ("5.0.0.2", 49737),
    ("5.0.0.3", 1),
    ("5.0.0.3", 0),
    ("192.168.0.2", 65535),
    HERE,
    ("224.0.0.1", 5),
)
SERVER: Final = KeyPair.from_seed(bytes([1]) * 32)
CLIENT: Final = KeyPair.from_seed(bytes([2]) * 32)
EPHEMERAL: Final = tuple(KeyPair.from_seed(bytes([3, i]) * 16) for i in range(4))
TARGETS_OF: Final = (None, blake2b(SERVER.public_key), bytes(32), blake2b(CLIENT.public_key))
HELPERS: Final = 4  # as many as a NAT's kind takes
MAX_STEPS: Final = 60
TURNS: Final = 20  # of the loop, in which a handshake is answered: the next step may need the answer
MAX_SOCKETS: Final = 3000  # 256 for each random punch, of which two may run
MAX_TASKS: Final = 3000


async def _stay(connection: Connection) -> None:
    """Serve a client until its end."""
    while await connection.read():
        pass


class _Node:
    """A node on a simulated host, fed datagrams by a script; `relay` is one of its announcement's."""

    def __init__(self, *, firewalled: bool) -> None:
        net = SimNetwork(0)
        self.host: Host = net.host(HERE[0])
        self.dht = HyperDHT(
            bootstrap=(),
            port=HERE[1],
            ephemeral=None if firewalled else False,
            public_address=None if firewalled else HERE,
            network=self.host,
            rng=Random(1),
        )
        self.server: Server = self.dht.create_server(_stay)
        self.tasks: list[asyncio.Task[None]] = []
        self._net = net
        self._helpers: list[SimSocket] = []

    async def start(self) -> None:
        """Begin, and listen."""
        await self.dht.start()
        await self.server.listen(SERVER)

    async def meet_helpers(self, spread: int) -> None:
        """Get to know nodes that answer pings, and see us at ports that lie `spread` apart: 0 is a good NAT."""
        await self.dht.node.bootstrapped.wait()
        for number in range(HELPERS):
            host = self._net.host(f"5.0.1.{number + 1}")
            helper = await host.bind("0.0.0.0", HERE[1], lambda batch, n=number: self._help(n, spread, batch))  # type: ignore[misc]
            self._helpers.append(helper)
            address = host.addresses[0], HERE[1]
            ping = Request(1, HERE, InternalCommand.PING, True, node_id(address))
            self.deliver(self.sockets[0], encode_request(ping), address)

    def _help(self, number: int, spread: int, batch: list[Arrival]) -> None:
        for data, source in ((data, source) for datagrams, source in batch for data in datagrams):
            if data[:1] != bytes((REQUEST_ID,)):
                continue
            request = decode_message(data)
            seen = source[0], (source[1] + spread * number) % 65536
            answer = encode_response(Response(request.tid, seen, node_id(request.to)))
            self._helpers[number].send([answer], source)

    async def stop(self) -> None:
        """End; nothing may be left behind."""
        assert len(asyncio.all_tasks()) <= MAX_TASKS
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.dht.destroy()
        await asyncio.sleep(20.0)  # streams linger
        for helper in self._helpers:
            helper.close()
        assert not self.host.sockets, f"{len(self.host.sockets)} sockets left open"
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"left behind: {left}"

    @property
    def sockets(self) -> tuple[Socket, Socket]:
        """Both sockets of the node."""
        server, client = self.dht.node.server_socket, self.dht.node.client_socket
        assert server is not None and client is not None
        return server, client

    def deliver(self, socket: Socket, data: bytes, source: Address) -> None:
        """Let a datagram arrive."""
        self.dht.endpoint._receive(socket, [([data], source)])

    def ask(self, work: Coroutine[Any, Any, object]) -> None:
        """Do something in the background that may fail as documented, and in no other way."""

        async def guarded() -> None:
            try:
                await work
            except (HyperDHTError, ValueError):
                pass

        self.tasks.append(asyncio.create_task(guarded()))

    def check(self) -> None:
        """Check what must hold at any time."""
        rpc = self.dht.node.rpc
        assert rpc.stats.handler_errors == 0
        assert len(self.host.sockets) <= MAX_SOCKETS
        assert len(self.server._slots) <= MAX_PENDING
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()


# -- datagrams


def _request(script: Script, node: _Node, source: Address) -> bytes:
    rpc = node.dht.node.rpc
    flags = script.byte()
    token = (None, rpc.own.issue_token(source[0]), bytes(32), None)[flags & 3]
    own_id = node_id(source) if flags & 4 and source[1] else (bytes(32) if flags & 8 else None)
    target = TARGETS_OF[flags >> 4 & 3]
    command = script.byte() % 12 if flags & 128 else script.byte()
    value = script.chunk() if flags & 64 else _good_value(script, node, command, target or bytes(32), token or b"")
    request = Request(script.number(2), HERE, command, bool(script.byte() & 1), own_id, token, target, value)
    return encode_request(request)


def _good_value(script: Script, node: _Node, command: int, target: bytes, token: bytes) -> bytes | None:
    """Return a well-formed value for a command, signed where it has to be."""
    choice = script.byte()
    peers = [PEERS[(choice >> i) % len(PEERS)] if choice >> i & 1 else None for i in range(2)]
    match command:
        case Command.PEER_HANDSHAKE:
            return encode_handshake(Handshake(choice % 5, bytes(choice), *peers))
        case Command.PEER_HOLEPUNCH:
            return encode_holepunch(Holepunch(choice % 5, choice, bytes(choice), peers[0]))
        case Command.ANNOUNCE | Command.UNANNOUNCE:
            namespace = NS_ANNOUNCE if command == Command.ANNOUNCE else NS_UNANNOUNCE
            peer = Peer(CLIENT.public_key, PEERS[: choice & 7])
            refresh = bytes(32) if choice & 8 else None
            if choice & 16:
                return encode_announce(Announce(refresh=bytes([choice & 32]) * 32))
            hashed = None if refresh is None else blake2b(refresh)
            signable = announce_signable(target, node.dht.node.id or b"", token, encode_peer(peer), hashed, namespace)
            return encode_announce(Announce(peer, hashed, sign(CLIENT, signable), choice >> 5))
        case Command.MUTABLE_PUT:
            content = bytes(choice * 5)
            signable = NS_MUTABLE_PUT + blake2b(encode_mutable_signable(choice, content))
            return encode_mutable_put(MutablePut(CLIENT.public_key, choice, content, sign(CLIENT, signable)))
        case Command.MUTABLE_GET:
            return uint(choice)
        case Command.IMMUTABLE_PUT:
            return bytes(choice)
    return None


def _response(script: Script, node: _Node) -> tuple[bytes, Address | None]:
    """Return an answer to a request in flight (the first, or any tid), and whom it was sent to."""
    flags = script.byte()
    calls = list(node.dht.node.rpc._in_flight.items())
    tid, to = script.number(2), None
    if calls:
        tid, call = calls[script.byte() % len(calls)]
        to = call.to
    closer = tuple(PEERS[script.byte() % len(PEERS)] for _ in range(script.byte() & 3)) if flags & 1 else ()
    response = Response(
        tid,
        HERE if flags & 2 else PEERS[script.byte() % len(PEERS)],
        node_id(to or HERE) if flags & 4 else None,
        bytes(32) if flags & 8 else None,
        closer,
        script.byte() if flags & 16 else 0,
        script.chunk() if flags & 32 else None,
    )
    return encode_response(response), to


def _questions(node: _Node) -> tuple[Callable[[], Coroutine[Any, Any, object]], ...]:
    dht, key = node.dht, CLIENT.public_key
    return (
        lambda: dht.node.ping(PEERS[0], retries=1),
        lambda: _drain(dht.find_peer(key)),
        lambda: dht.mutable_get(key),
        lambda: dht.immutable_get(bytes(32)),
        lambda: dht.mutable_put(CLIENT, b"value", 3),
        lambda: _drain(dht.lookup(bytes(32))),
        lambda: dht.connect(key, timeout=5.0),
        lambda: dht.announce(bytes(32), CLIENT),
    )


async def _drain(found: AsyncIterator[object]) -> None:
    async for _ in found:
        pass


async def _receive_datagrams(script: Script) -> None:
    options = script.byte()
    node = _Node(firewalled=bool(options & 1))
    await node.start()
    questions = _questions(node)
    if options & 2:  # somebody to ask
        to = PEERS[0]
        ping = Request(1, HERE, InternalCommand.PING, True, node_id(to))
        node.deliver(node.sockets[0], encode_request(ping), to)
    for _ in range(MAX_STEPS):
        if not script.more:
            break
        choice = script.byte()
        socket, source = node.sockets[choice & 1], PEERS[(choice >> 1 & 7) % len(PEERS)]
        match choice >> 4:
            case 0 | 1 | 2:
                node.deliver(socket, script.chunk(), source)
            case 3 | 4 | 5 | 6 | 7:
                node.deliver(socket, _request(script, node, source), source)
            case 8 | 9 | 10:
                data, to_ = _response(script, node)
                node.deliver(socket, data, to_ or source)
            case 11 | 12 if len(node.tasks) < 8:
                node.ask(questions[script.byte() % len(questions)]())
            case 13:
                await asyncio.sleep(script.byte() * 0.1)
            case _:
                pass
        await asyncio.sleep(0)
        node.check()
    await node.stop()
    node.check()


def _run_rpc(data: bytes) -> None:
    virtual.run(_receive_datagrams(Script(data)))


def _rpc_seeds() -> list[bytes]:
    found = vectors.load("datagrams")
    raw = [bytes.fromhex(entry["hex"]) for kind in ("requests", "responses") for entry in found[kind]]
    inputs = [bytes((i & 3, 2, len(data))) + data for i, data in enumerate(raw) if len(data) < 256]
    # a question, an answer to it with closer nodes, time
    inputs += [bytes((2, 0xB0, i, 0x80, 0x2F, 0, 0, 0, 2, 0, 1, 3, 97, 98, 99, 0xD0, 30, 0xD0, 200)) for i in range(8)]
    for command in Command:
        for target in (0x10, 0x20, 0x30):
            step = bytes((0x30, 0x81 | target, command, 5, 0, 0, 0))
            inputs.append(b"\x00" + step + step.replace(b"\x05", b"\x0b") + b"\xd0\x40" + step)
    return inputs


# -- handshakes: the plaintexts come from the script, the sealing is right


_FROM: Final = (Mode.FROM_CLIENT, Mode.FROM_RELAY, Mode.FROM_SECOND_RELAY, Mode.REPLY)
_RELAY: Final = PEERS[0]


class _Client:
    """One client of the server, as a relay brings it."""

    def __init__(self, number: int) -> None:
        self.noise = NoiseIK.initiator(CLIENT, SERVER.public_key, EPHEMERAL[number])
        self.answer: NoisePayload | None = None
        self.first = b""

    @property
    def box(self) -> HolepunchBox | None:
        """What seals the rounds, once the handshake is through."""
        return HolepunchBox(self.noise.holepunch_secret) if self.noise.complete else None


def _incoming(node: _Node, script: Script, command: int, value: bytes) -> IncomingRequest:
    choice = script.byte()
    source = _RELAY if choice & 1 else PEERS[(choice >> 1) % 4]
    request = Request(7, HERE, command, False, None, None, TARGETS_OF[1], value)
    return IncomingRequest(node.dht.node.rpc.own, node.sockets[choice >> 7], source, request)


def _peer_address(script: Script) -> Address | None:
    choice = script.byte()
    return None if choice > 200 else PEERS[choice % len(PEERS)]


def _noise_payload(script: Script) -> bytes:
    choice = script.byte()
    if choice >= 128:
        return script.chunk()
    return encode_noise_payload(
        NoisePayload(
            error=choice & 1,
            firewall=script.byte() % 6,
            addresses4=PEERS[: script.byte() % len(PEERS)],
            udx=UdxInfo(False, script.number(4), script.byte()) if choice & 2 else None,
            secret_stream=True,
        )
    )


async def _shake(script: Script, node: _Node, client: _Client) -> None:
    if not client.first:
        client.first = client.noise.write_message(_noise_payload(script))
    message = Handshake(_FROM[script.byte() & 3], client.first, _peer_address(script), _peer_address(script))
    request = _incoming(node, script, Command.PEER_HANDSHAKE, encode_handshake(message))
    answer = await node.server.handle_handshake(message, request)
    if answer is None or client.noise.complete:
        return
    client.answer = decode_noise_payload(client.noise.read_message(answer.payload))
    assert client.answer.version == 1


def _round_payload(script: Script) -> bytes:
    choice = script.byte()
    if choice >= 128:
        return script.chunk()
    return encode_holepunch_payload(
        HolepunchPayload(
            error=HandshakeError.ABORTED if choice & 64 else HandshakeError.NONE,
            firewall=script.byte() % 6,
            round=script.byte(),
            connected=bool(choice & 1),
            punching=bool(choice & 2),
            addresses=PEERS[: script.byte() % len(PEERS)] if choice & 4 else None,
            remote_address=HERE if choice & 8 else None,
            token=bytes(32) if choice & 16 else None,
            remote_token=script.take(32).ljust(32, b"\0") if choice & 32 else None,
        )
    )


async def _punch(script: Script, node: _Node, client: _Client) -> None:
    box, answer = client.box, client.answer
    slot = script.byte()
    if answer is not None and answer.holepunch is not None and slot < 200:
        slot = answer.holepunch.id
    plain = _round_payload(script)
    sealed = plain if box is None or script.byte() > 240 else box.seal(plain, Random(slot))
    message = Holepunch(Mode.FROM_RELAY, slot, sealed, _peer_address(script))
    request = _incoming(node, script, Command.PEER_HOLEPUNCH, encode_holepunch(message))
    reply = await node.server.handle_holepunch(message, request)
    if reply is not None:
        assert box is not None
        payload = decode_holepunch_payload(box.open(reply.payload))
        assert payload.firewall in list(Firewall)


def _udx(script: Script, node: _Node, client: _Client) -> None:
    udx = client.answer.udx if client.answer is not None else None
    if udx is None:
        return
    header = HEADER.pack(MAGIC, script.byte(), 0, udx.id, 1 << 20, script.byte(), script.byte())
    node.deliver(node.sockets[script.byte() & 1], header + script.chunk(), PEERS[script.byte() % len(PEERS)])


async def _attack_server(script: Script) -> None:
    options = script.byte()
    node = _Node(firewalled=options < 200)
    await node.start()
    if options & 3:
        await node.meet_helpers(0 if options & 1 else 7)
    announcer = node.server._announcer
    assert announcer is not None and announcer._task is not None
    if not options & 4:
        announcer._task.cancel()  # what it says all the time costs more than what is to be tested
    announcer.relays = (RelayedPath(_RELAY, HERE),)  # as if it had been announced there
    announcer._announced_at[_RELAY] = asyncio.get_running_loop().time()
    clients = [_Client(number) for number in range(len(EPHEMERAL))]
    for _ in range(MAX_STEPS):
        if not script.more:
            break
        choice = script.byte()
        client = clients[choice & 3]
        match choice >> 2 & 7:
            case 0 | 1:
                node.ask(_shake(script, node, client))
            case 2 | 3 | 4:
                node.ask(_punch(script, node, client))
            case 5:
                _udx(script, node, client)
            case 6:
                await asyncio.sleep(script.byte() * 0.1)
            case _:
                probed = list(node.dht.endpoint.sockets)
                node.deliver(probed[script.byte() % len(probed)], b"\0", PEERS[script.byte() % 4])
        await virtual.settle(TURNS)
        node.check()
    await node.stop()
    node.check()


def _run_server(data: bytes) -> None:
    try:
        virtual.run(_attack_server(Script(data)))
    except DecodeError as error:
        raise AssertionError("the server's answer does not decode") from error


def _server_seeds() -> list[bytes]:
    shake = bytes((0, 2, 2, 3, 9, 0, 0, 0, 0, 1, 3, 255, 1))
    punch = bytes((8, 0, 0x3E, 2, 1, 3)) + bytes(32) + bytes((0, 0, 1))
    wait = bytes((24, 20))
    packet = bytes((20, 1, 0, 0, 0, 4, 1, 2, 3, 4, 0))
    late = bytes((24, 255))
    return [
        b"\x00" + shake + punch + wait + packet + wait,
        b"\x01" + shake + punch + wait + punch + wait + packet + late,
        b"\x02" + shake + punch + wait + punch + wait + b"\x1c\x02\x00" + late,
        b"\x01" + shake + (wait + punch.replace(b"\x3e\x02", b"\x3e\x03")) * 2 + late,
        b"\x00" + shake + wait + punch * 3 + wait * 2 + late,
        b"\x05" + shake + punch + wait + packet + late,  # with an announcer
        b"\xff" + shake + packet + late,
        b"\x00" + shake + wait + punch.replace(b"\x02\x01\x03", b"\x03\x01\x03") * 2 + late + punch,
    ]


TARGETS: Final = (
    Target("rpc", _run_rpc, 800, max_bytes=1000, seeds=_rpc_seeds),
    Target("server", _run_server, 200, max_bytes=800, seeds=_server_seeds),
)
