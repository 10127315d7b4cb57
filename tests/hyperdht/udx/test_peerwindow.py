"""The peer's window: whose word counts, and how much may be sent."""

import pytest

from p2pclaude.hyperdht.udx.peerwindow import MAX_UNDER_WAY, UNTOLD_WINDOW, PeerWindow


def test_until_the_peer_says_libudxs_window_is_taken() -> None:
    window = PeerWindow(0)
    assert window.size == UNTOLD_WINDOW == 4 * 1024 * 1024
    assert window.room(1000) == UNTOLD_WINDOW - 1000


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ((5, 3), (6, 0), True),  # a later packet, whatever it acknowledges
        ((5, 3), (5, 4), True),
        ((5, 3), (5, 3), True),
        ((5, 3), (5, 2), False),
        ((5, 3), (4, 9), False),
    ],
)
def test_an_older_packets_window_is_not_taken(first: tuple[int, int], second: tuple[int, int], taken: bool) -> None:
    window = PeerWindow(0)
    window.update(1000, *first)
    assert window.size == 1000
    window.update(2000, *second)
    assert window.size == (2000 if taken else 1000)


def test_the_first_packet_counts() -> None:
    window = PeerWindow(7)
    window.update(1000, 6, 0)  # the peer's numbers begin with 7: this is the last before
    assert window.size == 1000
    window = PeerWindow(7)
    window.update(1000, 5, 9)
    assert window.size == UNTOLD_WINDOW


def test_no_window_is_larger_than_sixty_four_mebibytes() -> None:
    window = PeerWindow(0)
    window.update(2**32 - 1, 1, 0)
    assert window.size == MAX_UNDER_WAY == 64 * 1024 * 1024


def test_what_the_peer_holds_takes_no_room_within_three_windows() -> None:
    window = PeerWindow(0)
    window.update(1000, 1, 0)
    assert window.room(400) == 600
    window.held = 300
    assert window.room(400) == 900
    assert window.room(1300) == 0
    window.held = 2800
    assert window.room(2900) == 100  # the span of three windows ends there
    assert window.room(3000) == 0
    window.update(500, 2, 0)  # the span is that of the largest window
    assert window.room(2900) == 100
    assert window.room(2800) == 200
