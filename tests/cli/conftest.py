"""One daemon for all tests that only need some daemon."""

from collections.abc import Iterator

import pytest
from cli.harness import Shell, daemon


@pytest.fixture(scope="package")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Give a shell before a running daemon of a private network."""
    with daemon(tmp_path_factory.mktemp("daemon")) as ready:
        yield ready


@pytest.fixture(scope="package")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Give a shell whose pairing URL names a daemon that nobody runs, in a network that nobody has."""
    work = tmp_path_factory.mktemp("offline")
    url = Shell(work, "").succeed("daemon", "--private", "--host", "127.0.0.1", "--port", "9", "--print-url")[0]
    return Shell(work, url)
