"""What is remembered of servers that were met, for the whole of a node."""

from p2pclaude.hyperdht.peer.context import MAX_REMEMBERED_PEERS, KnownRelays

RELAY, OTHER = ("5.5.5.5", 1), ("6.6.6.6", 2)


def key(number: int) -> bytes:
    """Return a public key."""
    return number.to_bytes(32, "big")


def test_the_newest_word_counts() -> None:
    known = KnownRelays()
    assert known.of(key(1)) == ()
    known.remember(key(1), [RELAY])
    known.remember(key(1), [OTHER, RELAY])
    assert known.of(key(1)) == (OTHER, RELAY) and known.of(key(2)) == ()


def test_the_server_met_the_longest_ago_goes_first() -> None:
    known = KnownRelays()
    for number in range(MAX_REMEMBERED_PEERS):
        known.remember(key(number), [RELAY])
    known.remember(key(0), [OTHER])
    known.remember(key(MAX_REMEMBERED_PEERS), [RELAY])
    assert known.of(key(0)) == (OTHER,) and known.of(key(1)) == () and known.of(key(2)) == (RELAY,)
