"""One question, repeated each second until the peer says anything."""

from p2pclaude.hyperdht.udx.liveness import Liveness


def test_it_asks_until_it_hears() -> None:
    alive = Liveness()
    assert alive.at is None and not alive.handle_timer(0.0, 99.0) and alive.silence(99.0) == 0.0
    alive.ask(10.0)
    assert alive.at == 10.0
    alive.ask(10.5)  # an answer is awaited already
    assert alive.at == 10.0
    assert alive.handle_timer(9.0, 10.0)
    assert alive.at == 11.0 and alive.silence(12.5) == 2.5
    assert not alive.handle_timer(9.0, 10.9)
    assert alive.handle_timer(10.0, 11.0)  # what came when it was asked is no answer
    assert not alive.handle_timer(11.5, 12.0)
    assert alive.at is None and alive.silence(20.0) == 0.0
