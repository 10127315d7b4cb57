"""The real claude CLI in tests: where it is, and sessions that run it against the stub of the Messages API."""

import os
from pathlib import Path
from typing import Final

import pytest

from kit.sessions import Place
from kit.stub_api import StubApi, environment

_MODULES: Final = Path(os.environ.get("P2PCLAUDE_NODE_MODULES", Path(__file__).parents[1] / "interop" / "node_modules"))
REAL: Final = _MODULES / ".bin" / "claude"
needs_claude = pytest.mark.skipif(
    not REAL.exists(), reason=f"the real claude is not installed: no {REAL} (node: npm ci in tests/interop)"
)


def real_place(directory: Path, monkeypatch: pytest.MonkeyPatch, api: StubApi) -> Place:
    """Return a place where sessions run the real claude, with an empty HOME, talking to the stub."""
    place = Place(directory)
    place.claude = REAL.resolve()
    (directory / "home").mkdir()
    for name in list(os.environ):
        if name.startswith(("ANTHROPIC", "CLAUDE", "P2P_")):
            monkeypatch.delenv(name)
    for name, value in environment(api.url, str(directory / "home"), os.environ["PATH"]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IS_SANDBOX", "1")  # bypassPermissions as root
    return place
