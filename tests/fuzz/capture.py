"""Records the corpus: what Node and Python say to each other on loopback, sorted by decoder.

    PYTHONPATH=.:tests unshare --net python -m fuzz.capture      as root; needs the Node packages of tests/interop

Datagrams are read from the loopback device of a network namespace of their own, so nothing else is in it. What is
encrypted on the wire is taken from the Python side's decoders. Keys, tokens and paths in it are of throw-away nodes.
New inputs are added to `corpus/`; a few of each shape are kept.
"""

import asyncio
import atexit
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from interop import daemons
from interop.harness import HERE, Peer, Peers, missing_node, peers_on

from fuzz.engine import CORPUS, name_of
from p2pclaude.daemon import service
from p2pclaude.hyperdht import KeyPair
from p2pclaude.hyperdht.constants import Command
from p2pclaude.hyperdht.dht import HyperDHT
from p2pclaude.hyperdht.errors import DecodeError
from p2pclaude.hyperdht.peer import dial, punch_rounds, server
from p2pclaude.hyperdht.relay import mux, relay_client
from p2pclaude.hyperdht.relay.relay_client import RelayClient
from p2pclaude.hyperdht.rpc.messages import Request, decode_message
from p2pclaude.hyperdht.udx.packet import local_id_of
from p2pclaude.protocol.wire import dump_json, unseal
from p2pclaude.sessions import session

MAX_FILES: Final = 40  # a target
MAX_ALIKE: Final = 2
MAX_BYTES: Final = 1300
ETHERNET_BYTES: Final = 14
PATHS: Final = re.compile(rb"/(?:tmp|work|root|home)/[\w./-]+")
SIZE: Final = 20_000
VALUES: Final = {
    Command.PEER_HANDSHAKE: ("handshake", "handshake"),
    Command.PEER_HOLEPUNCH: ("holepunch", "holepunch"),
    Command.FIND_PEER: (None, "peer"),
    Command.LOOKUP: (None, "lookup_reply"),
    Command.ANNOUNCE: ("announce", None),
    Command.UNANNOUNCE: ("announce", None),
    Command.MUTABLE_PUT: ("mutable_put", None),
    Command.MUTABLE_GET: (None, "mutable_get_reply"),
}  # of requests and of responses

_alike: Counter[tuple[object, ...]] = Counter()


def keep(target: str, data: bytes) -> None:
    """Add an input to a target's corpus, with this machine's paths taken out, unless there are enough like it."""
    data = PATHS.sub(b"/home/x", data)
    shape = (target, len(data) // 24, data[:2])
    directory = CORPUS / target
    directory.mkdir(parents=True, exist_ok=True)
    _alike[shape] += 1
    if _alike[shape] > MAX_ALIKE or len(data) > MAX_BYTES or len(list(directory.iterdir())) >= MAX_FILES:
        return
    (directory / name_of(data)).write_bytes(data)


class Sniffer(threading.Thread):
    """Reads every UDP datagram on the loopback device."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind(("lo", 0))
        self._commands: dict[int, int] = {}

    def run(self) -> None:
        while True:
            frame, address = self._socket.recvfrom(65536)
            if address[2] == socket.PACKET_OUTGOING or frame[12:14] != b"\x08\x00":
                continue
            ip = frame[ETHERNET_BYTES:]
            if ip[9] == socket.IPPROTO_UDP:
                self.sort(ip[(ip[0] & 15) * 4 + 8 :])

    def sort(self, data: bytes) -> None:
        """Give a datagram, and the value in it, to the targets that read such."""
        if local_id_of(data) is not None:
            keep("udx_packet", data)
            if len(data) < 256:
                keep("udx_hostile", b"\x10\x02" + bytes((len(data),)) + data[:4] + b"\x01\0\0\0" + data[8:])
            return
        try:
            message = decode_message(data)
        except DecodeError:
            return
        keep("message", data)
        if len(data) < 256:
            keep("rpc", b"\x02\x02" + bytes((len(data),)) + data)
        if isinstance(message, Request):
            command = -1 if message.internal else message.command
            self._commands[message.tid] = command
        else:
            command = self._commands.get(message.tid, -1)
        target = VALUES[Command(command)][not isinstance(message, Request)] if command in VALUES else None
        if target is not None and message.value:
            keep(target, message.value)


def tap(module: ModuleType, name: str, record: Callable[..., None]) -> None:
    """Let `record` see the arguments of a module's function."""
    function = getattr(module, name)

    def tapped(*arguments: Any) -> Any:
        record(*arguments)
        return function(*arguments)

    setattr(module, name, tapped)


def tap_library() -> None:
    """Record what the library decrypts."""
    for module in (dial, server):
        tap(module, "decode_noise_payload", lambda data: keep("noise_payload", data))
    tap(punch_rounds, "decode_holepunch_payload", lambda data: keep("holepunch_payload", data))
    tap(mux, "decode_frames", lambda data: keep("protomux", data))
    tap(relay_client, "decode_relay_pair", lambda data: keep("relay_pair", data))
    tap(relay_client, "decode_relay_unpair", lambda data: keep("relay_unpair", data))


def tap_daemon() -> None:
    """Record what a daemon in this process reads: of sealed requests the plaintext."""

    def open_and_keep(key: bytes, text: str) -> Any:
        value = unseal(key, text)
        keep("sealed", b"\x02" + dump_json(value))
        return value

    service.__dict__["unseal"] = open_and_keep
    tap(service, "decode_request", lambda line: keep("wire_request", line))
    tap(session, "decode_line", lambda line: keep("claude_line", line))


async def echo(connection: Any) -> None:
    """Serve a client, as tests/interop/node/server.js does: the first line only says what for."""
    await connection.read(len(b"echo\n"))
    while data := await connection.read():
        await connection.write(data)
    await connection.write_eof()


async def exchange(peers: Peers) -> None:
    """Let Node and Python meet in every role."""
    node_server = await asyncio.to_thread(peers.start, "node", "server")
    client = await asyncio.to_thread(peers.start, "node", "client")
    records = await asyncio.to_thread(peers.start, "node", "records")
    key = node_server.ready["publicKey"]
    await _connect(client, key)
    async with HyperDHT(bootstrap=peers.bootstrap, host="127.0.0.1", port=0) as dht:
        ours = dht.create_server(echo)
        await ours.listen(KeyPair.generate())
        for options in ({}, {"localConnection": False}):
            await _connect(client, ours.public_key.hex(), **options)
        connection = await dht.connect(bytes.fromhex(key))
        await connection.write(b"echo\n" + bytes(SIZE))
        await connection.read()
        await connection.close()
        await _store(dht, records)
        await _relay(dht, peers)
        await ours.close()


async def _connect(client: Peer, key: str, **options: object) -> None:
    client.tell("connect", key=key, job="echo", bytes=SIZE, options=options)
    result = await asyncio.to_thread(client.expect, "result")
    print("Node client:", result["ok"], result.get("error"))


async def _store(dht: HyperDHT, records: Peer) -> None:
    async def ask(cmd: str, **fields: object) -> None:
        await asyncio.to_thread(records.ask, cmd, **fields)  # type: ignore[arg-type]

    pair, topic = KeyPair.generate(), os.urandom(32)
    await dht.mutable_put(pair, b"a value", 3)
    await ask("mutable-get", publicKey=pair.public_key.hex())
    await ask("mutable-put", seed=os.urandom(32).hex(), value="00ff", seq=1)
    await ask("announce", target=topic.hex(), seed=os.urandom(32).hex())
    await dht.announce(topic, pair)
    async for _ in dht.lookup(topic):
        pass
    await ask("lookup", target=topic.hex())
    await dht.unannounce(topic, pair)
    await dht.immutable_get(await dht.immutable_put(b"immutable"))


async def _relay(dht: HyperDHT, peers: Peers) -> None:
    relaying = await asyncio.to_thread(peers.start, "node", "relay")
    key, token = bytes.fromhex(relaying.ready["publicKey"]), os.urandom(32)
    clients = [RelayClient(await dht.connect(key, key_pair=KeyPair.generate())) for _ in range(2)]
    streams = [dht.endpoint.streams.create() for _ in clients]
    await asyncio.gather(*(c.pair(token, not i, streams[i]) for i, c in enumerate(clients)))
    for stream, client in zip(streams, clients, strict=True):
        stream.destroy()
        client.unpair(token)
        await client.close()


def talk_to_daemon(peers: Peers, directory: Path) -> None:
    """Let Node's chat client use the Python daemon, tapped, with a stand-in for claude."""
    code = "from fuzz.capture import tap_daemon; tap_daemon(); from p2pclaude.cli.daemon import main; main()"
    daemons.__dict__["tool_command"] = lambda _name, *arguments: [sys.executable, "-c", code, *arguments]
    daemon = daemons.start_daemon(peers, directory, HERE / "fake_claude.py")
    client = peers.start("node", "chat-client", url=daemon.url)
    client.tell("chat", directory=str(daemon.root), sessionId="11111111-0000-4000-8000-000000000001", text="grüße")
    client.expect("sent")
    for _ in range(3):
        client.expect("output")
    for method, params in (("list-sessions", {}), ("ping", {}), ("nonsense", {"a": [1.5, None]})):
        client.tell("call", tag=method, method=method, params=params)
        client.expect("answer", tag=method)


def main() -> None:
    """Run every scene and say what was added."""
    if missing := missing_node():
        sys.exit(missing)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    before = {path for path in CORPUS.rglob("*") if path.is_file()}
    atexit.register(lambda: print(len([p for p in CORPUS.rglob("*") if p.is_file() and p not in before]), "new inputs"))
    Sniffer().start()
    tap_library()
    with peers_on([]) as networks, tempfile.TemporaryDirectory() as directory:
        testnet = networks.start("node", "testnet", size=6)
        with peers_on(testnet.ready["bootstrap"]) as peers:
            asyncio.run(exchange(peers))
            talk_to_daemon(peers, Path(directory))


if __name__ == "__main__":
    main()
