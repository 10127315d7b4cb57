"""UDX against the real udx-native, each end in a process of its own, over loopback UDP."""

import hashlib
import time

import pytest
from kit.udx_driver import LOCAL_ID, NodeDriver, missing_tools
from kit.udx_pair import noise

from p2pclaude.hyperdht.udx.stream import Closed, UdxStream

MISSING = missing_tools()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

MB = 1_000_000
SELDOM = 80.0  # seconds: a Node whose repeat is lost waits for a second, then two, then four, but not for ever
CASES = [(20 * MB, 0.0, 0.0), (8 * MB, 0.05, 0.02), (3 * MB, 0.2, 0.05)]


@pytest.mark.parametrize(("size", "loss", "reordering"), CASES)
def test_sends_to_node(size: int, loss: float, reordering: float) -> None:
    data = noise(size)
    with NodeDriver({}, seed=3, loss=loss, reordering=reordering) as driver:
        driver.stream.write(data)
        driver.stream.end()
        began = time.monotonic()
        driver.run(lambda: driver.closed is not None and driver.said("close") is not None, seconds=SELDOM)
        print(f"{size / (time.monotonic() - began) / 1e6:.0f} MB/s at loss {loss}")
        end = driver.said("end")
        assert end is not None
        assert (end["bytes"], end["sha256"]) == (size, hashlib.sha256(data).hexdigest())
        assert driver.closed == Closed(None)
        assert driver.said("close") == {"event": "close", "error": None}


@pytest.mark.parametrize(("size", "loss", "reordering"), CASES)
def test_receives_from_node(size: int, loss: float, reordering: float) -> None:
    with NodeDriver({"size": size}, seed=5, loss=loss, reordering=reordering) as driver:
        driver.stream.end()
        began = time.monotonic()
        driver.run(lambda: driver.closed is not None and driver.said("close") is not None, seconds=SELDOM)
        print(f"{size / (time.monotonic() - began) / 1e6:.0f} MB/s at loss {loss}")
        sent = driver.said("sent")
        assert sent is not None
        assert len(driver.received) == size
        assert hashlib.sha256(driver.received).hexdigest() == sent["sha256"]
        assert driver.closed == Closed(None)
        assert driver.said("close") == {"event": "close", "error": None}


def test_node_answers_on_a_half_closed_stream() -> None:
    with NodeDriver({"size": MB, "reply": True}) as driver:
        driver.stream.write(b"question")
        driver.stream.end()
        driver.run(lambda: driver.closed is not None and driver.said("close") is not None)
        assert len(driver.received) == MB
        assert driver.closed == Closed(None)
        assert driver.said("close") == {"event": "close", "error": None}


def test_answers_node_on_a_half_closed_stream() -> None:
    data = noise(MB)
    with NodeDriver({"size": 5}) as driver:
        driver.run(lambda: driver.ended)
        driver.stream.write(data)
        driver.stream.end()
        driver.run(lambda: driver.closed is not None and driver.said("close") is not None)
        end = driver.said("end")
        assert end is not None
        assert end["sha256"] == hashlib.sha256(data).hexdigest()
        assert driver.closed == Closed(None)


def test_node_sees_destroy() -> None:
    with NodeDriver({"keepOpen": True}) as driver:
        driver.stream.write(b"hello")
        driver.run(lambda: driver.stream.connected and driver.stream.unacked == 0 and not driver.stream.buffered)
        driver.stream.destroy()
        driver.run(lambda: driver.said("close") is not None)
        assert driver.closed == Closed(None)
        assert driver.said("close") == {"event": "close", "error": "ECONNRESET"}


def test_sees_node_destroy() -> None:
    with NodeDriver({"keepOpen": True, "destroyAfter": 5}) as driver:
        driver.stream.write(b"hello")
        driver.run(lambda: driver.closed is not None)
        assert driver.closed == Closed("ECONNRESET")


def test_messages_both_ways() -> None:
    with NodeDriver({"keepOpen": True, "echoMessages": True}) as driver:
        driver.stream.send_message(b"a message")
        driver.stream.send_message(b"")
        driver.run(lambda: len(driver.messages) == 2)
        assert sorted(driver.messages) == [b"", b"a message"]


def test_node_keeps_to_a_slow_readers_window() -> None:
    window = 256 * 1024
    stream = UdxStream(LOCAL_ID, receive_window=window)
    with NodeDriver({"size": MB}, stream=stream, reads=False) as driver:
        driver.run(lambda: len(driver.received) > window - 3000)
        stalled_until = time.monotonic() + 0.5
        driver.run(lambda: time.monotonic() > stalled_until)
        assert len(driver.received) <= window + 3000
        driver.reads = True
        driver.stream.consume(len(driver.received))
        driver.run(lambda: driver.ended)
        assert len(driver.received) == MB
