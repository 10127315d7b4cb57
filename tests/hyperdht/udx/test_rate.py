"""Delivery rates: bytes that arrived, over the time in which they left or were acknowledged."""

import pytest

from p2pclaude.hyperdht.udx.rate import DeliveryRate


def test_a_burst_that_arrives_whole_measures_a_round_trip() -> None:
    rate = DeliveryRate()
    flight = rate.start_flight(10.0, 0)
    assert (flight.sent_at, flight.delivered, flight.delivered_at, flight.first_sent_at) == (10.0, 0, 10.0, 10.0)
    assert not flight.app_limited
    rate.delivered += 5000
    assert rate.sample(flight, 10.1, None) == pytest.approx(50_000)


def test_the_longer_of_departure_and_arrival_counts() -> None:
    rate = DeliveryRate()
    first = rate.start_flight(10.0, 0)
    rate.delivered = 1000
    assert rate.sample(first, 10.1, None) == pytest.approx(10_000)
    second = rate.start_flight(10.3, 5000)  # what was under way left at 10.0
    assert (second.delivered, second.delivered_at, second.first_sent_at) == (1000, 10.1, 10.0)
    rate.delivered = 4000
    assert rate.sample(second, 10.35, None) == pytest.approx(3000 / 0.3)
    third = rate.start_flight(10.3, 5000)
    assert (third.delivered_at, third.first_sent_at) == (10.35, 10.3)
    rate.delivered = 5000
    assert rate.sample(third, 10.85, None) == pytest.approx(1000 / 0.5)


def test_an_interval_shorter_than_a_round_trip_measures_nothing() -> None:
    rate = DeliveryRate()
    flight = rate.start_flight(1.0, 0)
    rate.delivered = 100
    assert rate.sample(flight, 1.0, None) is None
    assert rate.sample(flight, 1.05, 0.1) is None
    assert rate.sample(flight, 1.1, 0.1) is not None


def test_a_new_reckoning_begins_when_nothing_is_under_way() -> None:
    rate = DeliveryRate()
    old = rate.start_flight(1.0, 0)
    rate.delivered = 1000
    new = rate.start_flight(5.0, 0)  # before the old one's sample was taken
    assert (new.delivered_at, new.first_sent_at, new.delivered) == (5.0, 5.0, 1000)
    rate.sample(old, 5.1, None)
    assert rate.start_flight(5.2, 100).first_sent_at == 5.0  # the late sample has not moved it


def test_what_was_under_way_when_the_data_ran_out_is_marked() -> None:
    rate = DeliveryRate()
    assert not rate.ran_dry
    rate.mark_app_limited(3000)
    assert rate.start_flight(1.0, 10).app_limited
    rate.delivered = 3000
    assert rate.start_flight(1.1, 10).app_limited
    rate.delivered = 3001
    assert not rate.start_flight(1.2, 10).app_limited
    fresh = DeliveryRate()
    fresh.mark_app_limited(0)
    assert fresh.start_flight(1.0, 0).app_limited
