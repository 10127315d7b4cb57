"""Where handshakes for announced servers are passed on, and for how long."""

from p2pclaude.hyperdht.node.forwards import ANNOUNCE_LIFETIME, Forward, ForwardStore

TOPIC = bytes(32)


def test_a_forward_is_overwritten_and_ages() -> None:
    store = ForwardStore()
    store.set(TOPIC, Forward(("1.2.3.4", 5), b"one"), now=0.0)
    store.set(TOPIC, Forward(("6.7.8.9", 10), b"two"), now=100.0)
    assert store.get(TOPIC, now=ANNOUNCE_LIFETIME + 99) == Forward(("6.7.8.9", 10), b"two")
    assert store.get(TOPIC, now=ANNOUNCE_LIFETIME + 100) is None
    assert store.delete(TOPIC)
    assert store.get(TOPIC, now=100.0) is None
