"""What the tools remember of a daemon: the next one finds it by that alone, and never fails for its sake."""

import stat
from pathlib import Path

import pytest
from cli.harness import Shell

from p2pclaude.client.hintcache import HintCache, Hints
from p2pclaude.protocol.pairing import parse_url

NOWHERE = ("--bootstrap", "127.0.0.1:9")


def cache_of(path: Path) -> dict[str, str]:
    """Return the environment that names a cache directory."""
    return {"P2P_CLAUDE_CACHE": str(path)}


def test_a_daemon_is_found_again_without_the_dht(shell: Shell, tmp_path: Path) -> None:
    assert shell.run("ping", *NOWHERE, "--timeout", "3", "@", env=cache_of(tmp_path / "none")).status in (69, 75)
    shell.succeed("ls", "-q", "@", env=cache_of(tmp_path / "c"))
    (line,) = shell.succeed("ping", *NOWHERE, "@", env=cache_of(tmp_path / "c"))
    assert " direct 127.0.0.1:" in line


def test_it_is_the_users_cache_and_private(shell: Shell) -> None:
    shell.succeed("ping", "@")
    place = shell.work / "home" / ".cache" / "p2pclaude"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (file,) = place.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_it_can_be_switched_off(shell: Shell, tmp_path: Path) -> None:
    shell.succeed("ping", "@", env={"P2P_CLAUDE_CACHE": "", "XDG_CACHE_HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["damaged", "no directory"])
def test_one_that_cannot_be_used_is_passed_over_in_silence(shell: Shell, tmp_path: Path, wrong: str) -> None:
    place = tmp_path / "c"
    if wrong == "damaged":
        shell.succeed("ping", "@", env=cache_of(place))
        (file,) = place.iterdir()
        file.write_bytes(b"damaged")
    else:
        place.write_bytes(b"")
    noted = shell.run("ping", "-v", "@", env=cache_of(place))
    assert (noted.status, len(noted.lines())) == (0, 1)
    assert "p2pclaude-ping: the daemon's whereabouts cannot be read: " in noted.err
    assert len(shell.succeed("ping", "@", env=cache_of(place))) == 1


def test_an_old_entry_costs_no_time(shell: Shell, tmp_path: Path) -> None:
    """The pairing is the same, the daemon another one meanwhile: found by the URL's own nodes."""

    stale = tuple(("127.0.0.1", port) for port in range(9, 16))
    HintCache(str(tmp_path), parse_url(shell.url)).write(Hints(stale, stale))
    assert len(shell.succeed("ping", "--timeout", "10", "@", env=cache_of(tmp_path))) == 1
    assert HintCache(str(tmp_path), parse_url(shell.url)).read().addresses != stale
