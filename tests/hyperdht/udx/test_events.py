"""Events and counters: equal when they say the same, and readable."""

import pytest

from p2pclaude.hyperdht.udx.events import Closed, DataReceived, Drained, EndReceived, MessageReceived
from p2pclaude.hyperdht.udx.stats import SenderStats, Stats


def test_events_say_what_they_are() -> None:
    events = [DataReceived(b"a"), DataReceived(b"b"), MessageReceived(b"a"), EndReceived(), Drained(), Closed(None)]
    assert len(set(events)) == 6
    assert DataReceived(b"a") == DataReceived(b"a") != MessageReceived(b"a") and EndReceived() == EndReceived()
    assert Closed("ETIMEDOUT") != Closed(None)
    assert list(map(repr, events[2:])) == ["MessageReceived(b'a')", "EndReceived()", "Drained()", "Closed(None)"]
    match events[0]:
        case DataReceived(data):
            assert data == b"a"
        case _:
            raise AssertionError("it matches by position")


def test_counters_begin_with_nought() -> None:
    stats = Stats()
    assert (stats.packets, stats.bytes, stats.bad, stats.dropped) == (0, 0, 0, 0)
    sent = SenderStats()
    sent.lost += 2
    assert sent.lost == 2 and sent.retransmits == sent.probe_timeouts == sent.bad_acks == sent.bad_sacks == 0
    other = SenderStats()
    assert sent != other and stats == Stats()
    other.lost = 2
    assert sent == other and "lost=2" in repr(sent)
    with pytest.raises(TypeError):
        hash(stats)
