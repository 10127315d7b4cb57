"""Who gets in: a strict daemon and tools that share one key, strangers who see nothing, and keys that are rotated."""

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.harness import Shell, daemon
from kit.free_ports import free_port

from p2pclaude.hyperdht import HyperDHT, HyperDHTError, KeyPair
from p2pclaude.protocol.pairing import Pairing, client_seed, format_url, parse_url

PINGS = 6


def events(shell: Shell, name: str) -> list[dict[str, object]]:
    """Give the daemon's log lines of one event."""
    *lines, _ = (shell.work / "daemon.log").read_text().split("\n")  # the last one may be half written
    return [event for event in map(json.loads, lines) if event["event"] == name]


def use_all_at_once(shell: Shell) -> None:
    """Have many tools hold a connection at the same time, all with the same key, for as long as some take."""
    session = shell.succeed("send", "-w", "@", "hello")
    assert session == ["echo: hello"]
    (session_id,) = shell.succeed("ls", "-q", "@")[-1:]
    followers = [
        shell.start("tail", "-f", "--after", "0", "@", session_id, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    pings = [shell.start("ping", "-c", "4", "@") for _ in range(PINGS)]
    for ping in pings:
        out, err = ping.communicate(timeout=60)
        assert (ping.returncode, err, len(out.splitlines())) == (0, b"", 4)
    answers: list[list[str]] = []

    def send(text: str) -> None:
        answers.append(shell.succeed("send", "-w", "@", text))

    senders = [threading.Thread(target=send, args=(f"m{n}",)) for n in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sorted(answers) == [[f"echo: m{n}"] for n in range(4)]
    shell.succeed("stop", "@", session_id)
    said = {follower.communicate(timeout=60) for follower in followers}
    assert len(said) == 1  # the same whole journal for each, and not a word of a lost connection
    ((out, err),) = said
    assert err == b"" and b"echo: hello" in out


@pytest.fixture(params=[True, False], ids=["strict", "open"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    """Give a shell before a daemon, strict or not."""
    with daemon(tmp_path / "work", *(["--strict"] if request.param else [])) as ready:
        yield ready


def test_many_tools_at_once_share_the_key(shell: Shell) -> None:
    use_all_at_once(shell)
    peers = {line["peer"] for line in events(shell, "connection-opened")}
    seed = client_seed(parse_url(shell.url).data_key)
    assert peers == {KeyPair.from_seed(seed).public_key.hex()[:8]}


def test_a_stranger_does_not_complete_a_handshake(tmp_path: Path) -> None:
    async def knock(pairing: Pairing, key_pair: KeyPair, timeout: float = 3.0) -> str:
        async with HyperDHT(bootstrap=pairing.bootstrap, host="127.0.0.1", port=0) as dht:
            try:
                connection = await dht.connect(pairing.public_key, key_pair=key_pair, timeout=timeout)
            except HyperDHTError as error:
                return type(error).__name__
            await connection.close()
            return "connected"

    async def knock_twice(pairing: Pairing, *seeds: bytes) -> list[str]:
        return await asyncio.gather(*(knock(pairing, KeyPair.from_seed(seed)) for seed in seeds))

    with daemon(tmp_path / "work", "--strict") as shell:
        pairing = parse_url(shell.url)
        wrong = Pairing(pairing.public_key, bytes(32), pairing.metadata)
        # Nor does one who has only half of it: the derived public key is no secret worth having.
        knocks = asyncio.run(knock_twice(pairing, bytes(32), client_seed(wrong.data_key)))
        assert set(knocks) <= {"PeerConnectionFailed", "Timeout"}
        strangers = Shell(shell.work, format_url(wrong))
        assert "not reachable" in strangers.fail(69, "ls", "-t", "30", "@")
        assert events(shell, "connection-opened") == []
        assert shell.succeed("ping", "@")
        ours = KeyPair.from_seed(client_seed(pairing.data_key))
        assert asyncio.run(knock(pairing, ours, timeout=30.0)) == "connected"


def test_rotation_revokes_urls_and_keeps_the_rest(tmp_path: Path) -> None:
    work, port = tmp_path / "work", free_port()
    options = ("--private", "--host", "127.0.0.1", "--port", str(port))
    with daemon(work, port=port) as old:
        session = old.succeed("send", "@", "hello")[0]
        refused = old.fail(75, "daemon", *options, "--rotate")
        assert "in use" in refused
        assert old.succeed("ping", "@")
    assert "not a directory" in old.fail(64, "daemon", *options, "--rotate", "--root-dir", "nowhere")
    assert old.succeed("daemon", *options, "--print-url") == [old.url]  # what fails has revoked nothing
    (url,) = old.succeed("daemon", *options, "--rotate")
    before, after = parse_url(old.url), parse_url(url)
    assert after.public_key == before.public_key
    assert after.data_key != before.data_key
    assert after.metadata["createdAt"] > before.metadata["createdAt"]
    assert old.succeed("daemon", *options, "--print-url") == [url]
    data = work / "home" / ".p2p-claude"
    assert (data / "pairing.url").read_text() == url + "\n"
    assert [p.name for p in data.iterdir() if p.name.startswith(".")] == []
    with daemon(work, port=port) as new:
        assert new.url == url
        assert "wrong key" in Shell(work, old.url).fail(77, "ls", "@")
        assert session in new.succeed("ls", "-a", "-q", "@")
        assert new.succeed("send", "-w", "-s", session, "@", "more") == ["echo: more"]
    with daemon(work, "--strict", port=port) as strict:
        assert strict.url == url
        Shell(work, old.url).fail(69, "ls", "-t", "30", "@")
        assert strict.succeed("ping", "@")
