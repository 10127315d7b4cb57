"""Presence: refreshes at their times, addresses watched, a record that grows and fits. On virtual time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from kit.fake_dht import FakeDHT, FakeServer
from kit.sessions import KeptLog
from sim import run

from p2pclaude.daemon.presence import REPUBLISH_SECONDS, RETRY_SECONDS, Presence, encode_record
from p2pclaude.hyperdht import KeyPair, TooFewNodes
from p2pclaude.protocol.record import decode_record
from p2pclaude.protocol.wire import seal, unseal

KEY = bytes(range(32))


class Bench:
    """A presence over a DHT in memory, and the snapshot that it stores."""

    def __init__(self) -> None:
        self.dht = FakeDHT()
        self.server: FakeServer = self.dht.create_server(self._refuse)
        self.log = KeptLog()
        self.snapshot: dict[str, Any] | None = None
        self.presence = Presence(
            self.dht,
            self.server,
            KeyPair.from_seed(bytes(32)),
            KEY,
            lambda: self.snapshot,
            self.log,
            refresh_interval=60.0,
        )

    async def _refuse(self, connection: object) -> None:
        raise AssertionError("nobody connects here")

    @property
    def stored(self) -> list[Any]:
        """Give the opened records, oldest first."""
        return [unseal(KEY, value.decode()) for _, value in self.dht.records]


def on_bench(work: Callable[[Bench], Awaitable[None]]) -> None:
    """Run a test's coroutine beside a running presence, on virtual time."""

    async def main() -> None:
        one = Bench()
        running = asyncio.create_task(one.presence.run())
        await work(one)
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])

    run(main())


def sessions(*created: int) -> dict[str, Any]:
    entries = [{"sessionId": f"s{n}", "pid": n, "createdAt": n, "directory": "/d"} for n in created]
    return {"sessions": entries, "updatedAt": 5}


def test_the_announcement_is_refreshed_at_the_interval() -> None:
    async def work(one: Bench) -> None:
        await asyncio.sleep(59)
        assert one.server.refreshes == 0
        await asyncio.sleep(2)
        assert one.server.refreshes == 1
        await asyncio.sleep(600)
        assert one.server.refreshes == 11

    on_bench(work)


def test_a_change_of_address_is_seen_within_ten_seconds() -> None:
    async def work(one: Bench) -> None:
        await asyncio.sleep(3)
        one.dht.local_addresses = ["192.0.2.7", "198.51.100.1"]
        await asyncio.sleep(10)
        assert one.server.refreshes == 1
        one.dht.local_addresses.reverse()
        await asyncio.sleep(20)
        assert one.server.refreshes == 1
        assert one.log.events("addresses-changed")[0]["addresses"] == ["192.0.2.7", "198.51.100.1"]

    on_bench(work)


def test_a_refresh_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(FakeServer, "refresh", fail)

    async def work(one: Bench) -> None:
        await asyncio.sleep(130)
        assert len(one.log.events("internal-error")) == 2

    on_bench(work)


def test_addresses_that_cannot_be_listed_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> list[str]:
        raise OSError("no such interface")

    async def work(one: Bench) -> None:
        await asyncio.sleep(5)
        monkeypatch.delattr(one.dht, "local_addresses")
        monkeypatch.setattr(FakeDHT, "local_addresses", property(fail), raising=False)
        await asyncio.sleep(20)
        assert one.log.events("warning")
        assert one.server.refreshes == 0

    on_bench(work)


def test_the_record_is_stored_at_the_start_and_on_each_change() -> None:
    async def work(one: Bench) -> None:
        await asyncio.sleep(1)
        assert [record["sessions"] for record in one.stored] == [[]]
        one.snapshot = sessions(1)
        one.presence.changed()
        await asyncio.sleep(1)
        one.presence.changed()  # nothing that a record shows
        await asyncio.sleep(1)
        one.snapshot = sessions(1, 2)
        one.presence.changed()
        one.presence.changed()
        await asyncio.sleep(1)
        assert [len(record["sessions"]) for record in one.stored] == [0, 1, 2]
        numbers = [seq for seq, _ in one.dht.records]
        assert numbers == sorted(set(numbers))
        assert b'"sessionId"' not in one.dht.records[-1][1]  # base64 has no quotation marks

    on_bench(work)


def test_a_clock_that_was_set_back_makes_no_older_record() -> None:
    """The nodes would refuse it, and who asks them would see an earlier daemon's sessions."""
    ahead = time.time_ns() // 1_000_000 + 10**10

    async def work(one: Bench) -> None:
        one.dht.records.append((ahead, seal(KEY, sessions(1)).encode()))
        await asyncio.sleep(1)
        one.snapshot = sessions(1, 2)
        one.presence.changed()
        await asyncio.sleep(1)
        assert [seq for seq, _ in one.dht.records] == [ahead, ahead + 1, ahead + 2]

    on_bench(work)


def test_after_a_failure_it_looks_again_for_the_number_to_go_beyond() -> None:
    """A machine without a clock of its own boots in the past, and its network comes later."""
    ahead = time.time_ns() // 1_000_000 + 10**10

    async def work(one: Bench) -> None:
        one.dht.put_error = TooFewNodes("no DHT node answered")
        await asyncio.sleep(5)  # nothing found in a network that is not there, and nothing stored
        assert one.log.events("record-failed")
        one.dht.put_error = None
        one.dht.records.append((ahead, seal(KEY, sessions(1)).encode()))
        await asyncio.sleep(RETRY_SECONDS + 1)
        assert [seq for seq, _ in one.dht.records] == [ahead, ahead + 1]

    on_bench(work)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_record_that_perhaps_was_stored_is_replaced_by_an_earlier_one(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes may have taken it without our hearing of it; who asks them must not see sessions that are gone."""

    async def work(one: Bench) -> None:
        one.snapshot = sessions(1)
        await asyncio.sleep(1)

        async def store_and_hang(self: FakeDHT, key_pair: KeyPair, value: bytes, seq: int = 0) -> None:
            self.records.append((seq, value))
            if end == "failed":
                raise TooFewNodes("no node answered")
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(FakeDHT, "mutable_put", store_and_hang)
            one.snapshot = sessions(1, 2)
            storing = asyncio.create_task(one.presence.store_record())
            await asyncio.sleep(1)
            storing.cancel()
            await asyncio.wait([storing])
        one.snapshot = sessions(1)
        await one.presence.store_record()
        assert [len(record["sessions"]) for record in one.stored] == [1, 2, 1]
        numbers = [seq for seq, _ in one.dht.records]
        assert numbers == sorted(set(numbers))

    on_bench(work)


def test_a_record_is_stored_again_now_and_then() -> None:
    async def work(one: Bench) -> None:
        await asyncio.sleep(1 + 2 * REPUBLISH_SECONDS)
        assert len(one.stored) in (2, 3)

    on_bench(work)


def test_a_record_that_could_not_be_stored_is_tried_again() -> None:
    async def work(one: Bench) -> None:
        one.dht.put_error = OSError("no node answered")
        await asyncio.sleep(5)
        assert one.log.events("record-failed")[0]["error"] == "OSError: no node answered"
        one.dht.put_error = None
        await asyncio.sleep(RETRY_SECONDS + 1)
        assert len(one.stored) == 1

    on_bench(work)


def test_a_record_that_fits_is_whole() -> None:
    value = encode_record(KEY, sessions(1, 2))
    record = decode_record(7, value, KEY)
    assert [s["sessionId"] for s in record.sessions] == ["s2", "s1"]
    assert (record.updated_at, record.omitted) == (5, 0)


def test_the_newest_session_is_the_one_made_last_whatever_the_clock_said() -> None:
    """Its place in the list tells: the clock was set back before the last one was made."""
    record = decode_record(7, encode_record(KEY, sessions(*range(1000, 1020), 3)), KEY)
    assert record.sessions[0]["sessionId"] == "s3" and record.omitted > 0


def test_the_log_says_how_many_sessions_a_record_leaves_out() -> None:
    async def work(one: Bench) -> None:
        one.snapshot = sessions(*range(20))
        await asyncio.sleep(5)
        [stored] = one.stored
        [event] = one.log.events("record-stored")
        assert event["omitted"] == stored["omitted"] == 20 - event["sessions"] > 0
        assert len(stored["sessions"]) == event["sessions"]

    on_bench(work)


@pytest.mark.parametrize("count", [20, 200])
def test_a_record_that_is_too_long_loses_the_oldest(count: int) -> None:
    value = encode_record(KEY, sessions(*range(count)))
    assert len(value) <= 1000
    record = decode_record(7, value, KEY)
    kept = len(record.sessions)
    assert 5 < kept < count
    assert record.omitted == count - kept
    assert [s["createdAt"] for s in record.sessions] == list(range(count - 1, count - kept - 1, -1))


def test_one_session_may_be_too_long_already() -> None:
    long = {"sessions": [{"sessionId": "s", "createdAt": 1, "directory": "x" * 2000}], "updatedAt": 1}
    assert unseal(KEY, encode_record(KEY, long).decode()) == {"sessions": [], "updatedAt": 1, "omitted": 1}
    with pytest.raises(ValueError, match="not even"):
        encode_record(KEY, long, max_bytes=10)
