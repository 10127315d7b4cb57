"""Bootstrap nodes: the forms they are given in, and how their names are looked up."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim import run

from p2pclaude.hyperdht.node.bootstrap import (
    PUBLIC_NODES,
    RESOLVE_AGAIN,
    RESOLVE_RETRY,
    RESOLVE_TIMEOUT,
    Bootstrap,
    parse_node,
)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("127.0.0.1:49737", ("127.0.0.1", None, 49737)),
        (("127.0.0.1", 1), ("127.0.0.1", None, 1)),
        ("node.example:5", (None, "node.example", 5)),
        (("node.example", 5), (None, "node.example", 5)),
        ("1.2.3.4@node.example:65535", ("1.2.3.4", "node.example", 65535)),
    ],
)
def test_all_forms(given: str | tuple[str, int], parsed: tuple[str | None, str | None, int]) -> None:
    assert parse_node(given) == parsed


BAD = ["", "host", "host:", ":1", "h:0", "h:65536", "h:-1", "h:1x", "x@h:1", "@:1", "1.2.3.4@:1", "h:\u0661"]


@pytest.mark.parametrize("text", BAD)
def test_nonsense_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_node(text)


@given(st.text(max_size=30))
def test_any_text_is_a_node_or_a_value_error(text: str) -> None:
    try:
        host, name, port = parse_node(text)
    except ValueError:
        return
    assert (host or name) and 0 < port < 65536


def test_the_public_nodes_are_known_without_a_lookup() -> None:
    async def resolve(host: str) -> str:
        raise AssertionError

    nodes = Bootstrap(PUBLIC_NODES, resolve)
    assert len(nodes.known()) == len(nodes) == 3
    assert run(_lookup_is_none(nodes))


async def _lookup_is_none(nodes: Bootstrap) -> bool:
    return nodes.lookup(fallbacks=False) is None


def test_names_are_looked_up_side_by_side_and_once_in_a_while() -> None:
    asked: list[str] = []

    async def resolve(host: str) -> str:
        asked.append(host)
        await asyncio.sleep(1)
        return {"a": "1.1.1.1", "b": "2.2.2.2"}[host]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        nodes = Bootstrap(["a:1", "b:2", "c:3", "9.9.9.9:9"], resolve)
        assert nodes.known() == [("9.9.9.9", 9)]
        first = nodes.lookup(fallbacks=False)
        assert first is not None and nodes.lookup(fallbacks=False) is first
        await first
        assert loop.time() == pytest.approx(1) and asked == ["a", "b", "c"]
        assert nodes.known() == [("1.1.1.1", 1), ("2.2.2.2", 2), ("9.9.9.9", 9)]
        assert nodes.lookup(fallbacks=False) is None
        await asyncio.sleep(RESOLVE_RETRY)
        again = nodes.lookup(fallbacks=False)
        assert again is not None
        await again
        assert asked[3:] == ["c"]
        await asyncio.sleep(RESOLVE_AGAIN)
        again = nodes.lookup(fallbacks=False)
        assert again is not None
        await again
        assert asked[4:] == ["a", "b", "c"]

    run(main())


def test_a_name_beside_an_address_is_a_fallback() -> None:
    async def resolve(host: str) -> str:
        return "2.2.2.2"

    async def main() -> None:
        nodes = Bootstrap(["1.1.1.1@moved.example:7"], resolve)
        assert nodes.lookup(fallbacks=False) is None
        lookup = nodes.lookup(fallbacks=True)
        assert lookup is not None
        await lookup
        assert nodes.known() == [("1.1.1.1", 7), ("2.2.2.2", 7)]

    run(main())


def test_fallbacks_are_looked_up_beside_names_that_take_their_time() -> None:
    """The lookup under way may have been begun for another query, which still has nodes to ask."""
    asked: list[str] = []

    async def resolve(host: str) -> str:
        asked.append(host)
        await asyncio.sleep(3 if host == "slow.example" else 1)
        return "2.2.2.2" if host == "moved.example" else "3.3.3.3"

    async def main() -> None:
        nodes = Bootstrap(["slow.example:1", "1.1.1.1@moved.example:7"], resolve)
        first = nodes.lookup(fallbacks=False)
        await asyncio.sleep(0.5)
        lookup = nodes.lookup(fallbacks=True)
        assert lookup is not None and nodes.lookup(fallbacks=True) is nodes.lookup(fallbacks=False) is lookup
        await lookup
        assert nodes.known() == [("1.1.1.1", 7), ("2.2.2.2", 7)]
        assert first is not None
        await first
        assert nodes.known() == [("3.3.3.3", 1), ("1.1.1.1", 7), ("2.2.2.2", 7)]
        assert asked == ["slow.example", "moved.example"]
        nodes = Bootstrap(["slow.example:1", "1.1.1.1@moved.example:7"], resolve)
        lookups = [nodes.lookup(fallbacks=fallbacks) for fallbacks in (False, True)]
        await nodes.close()
        assert all(lookup is not None and lookup.cancelled() for lookup in lookups)
        again = nodes.lookup(fallbacks=True)
        assert again is not None
        await again
        assert asked[2:] == ["slow.example", "moved.example"]

    run(main())


def test_a_name_server_that_is_silent_holds_nobody_for_ever() -> None:
    async def resolve(host: str) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        nodes = Bootstrap(["slow.example:1"], resolve)
        lookup = nodes.lookup(fallbacks=False)
        assert lookup is not None
        await lookup
        assert asyncio.get_running_loop().time() == pytest.approx(RESOLVE_TIMEOUT)
        nodes = Bootstrap(["slow.example:1"], resolve)
        lookup = nodes.lookup(fallbacks=False)
        assert lookup is not None
        await nodes.close()
        assert lookup.cancelled()

    run(main())
