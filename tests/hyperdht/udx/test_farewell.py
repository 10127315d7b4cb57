"""What a stream says when it is over, and how long it stays for that."""

from p2pclaude.hyperdht.udx.farewell import DESTROY_TIMES_S, LINGER_S, UNHEARD_LINGER_S, Farewell


def test_a_clean_end_is_silent_and_stays_for_a_while() -> None:
    farewell = Farewell()
    assert farewell.next_at is None and not farewell.take_destroy(1.0)
    farewell.linger(10.0, heard=True)
    assert farewell.next_at == farewell.finish_at == 10.0 + LINGER_S == 25.0
    farewell.linger(20.0, heard=True)  # once only
    assert farewell.finish_at == 25.0
    assert not farewell.take_destroy(24.0)


def test_who_was_broken_off_is_told_three_times() -> None:
    farewell = Farewell()
    farewell.is_broken_off = True
    farewell.linger(10.0, heard=False)
    assert farewell.finish_at == 10.0 + UNHEARD_LINGER_S == 13.0
    assert DESTROY_TIMES_S == (0.0, 0.3, 1.0)
    assert farewell.next_at == 10.0
    assert farewell.take_destroy(10.0) and not farewell.take_destroy(10.0)
    assert farewell.next_at == 10.3
    assert not farewell.take_destroy(10.29)
    assert farewell.take_destroy(10.3)
    assert farewell.next_at == 11.0
    assert farewell.take_destroy(99.0) and farewell.next_at == 13.0
    assert not farewell.take_destroy(99.0)


def test_times_that_have_passed_are_said_once() -> None:
    farewell = Farewell()
    farewell.is_broken_off = True
    farewell.linger(10.0, heard=True)
    assert farewell.take_destroy(20.0) and not farewell.take_destroy(20.0)


def test_who_says_something_is_told_again() -> None:
    farewell = Farewell()
    farewell.is_broken_off = farewell.is_due = True
    assert farewell.take_destroy(1.0) and not farewell.take_destroy(1.0)
