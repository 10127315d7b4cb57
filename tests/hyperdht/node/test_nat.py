"""The NAT sampler against nat-sampler's runs, the classifier against what NATs do."""

import random

import pytest
from vectors import load

from p2pclaude.hyperdht.constants import Firewall
from p2pclaude.hyperdht.encoding import Address
from p2pclaude.hyperdht.node.nat import WINDOW, NatClassifier, NatSampler

HOST, OTHER, THIRD = "203.0.113.7", "203.0.113.8", "203.0.113.9"


@pytest.mark.parametrize("run", load("nat")["runs"])
def test_sampler_follows_the_javascript(run: list[tuple[str, int, str | None, int, int]]) -> None:
    sampler = NatSampler()
    for host, port, seen_host, seen_port, size in run:
        sampler.add(host, port)
        assert (sampler.host, sampler.port, sampler.size) == (seen_host, seen_port, size)


def test_sampler_knows_nothing_at_first() -> None:
    sampler = NatSampler()
    assert (sampler.host, sampler.port, sampler.size) == (None, 0, 0)


def test_sampler_forgets_an_old_address() -> None:
    sampler = NatSampler()
    for _ in range(100):
        assert sampler.add(HOST, 1000) <= WINDOW
    for _ in range(WINDOW):
        sampler.add(OTHER, 2000)
    assert (sampler.host, sampler.port, sampler.size) == (OTHER, 2000, WINDOW)


def test_sampler_names_the_host_alone_when_ports_vary() -> None:
    sampler = NatSampler()
    for port in range(1000, 1010):
        sampler.add(HOST, port)
    assert (sampler.host, sampler.port) == (HOST, 0)


@pytest.mark.parametrize(("between", "hits"), [(0, 2), (3, 2), (4, 1), (5, 1)])
def test_sampler_joins_equal_samples_that_are_near(between: int, hits: int) -> None:
    sampler = NatSampler()
    sampler.add(HOST, 999)
    for port in range(between):
        sampler.add(HOST, port)
    assert sampler.add(HOST, 999) == hits


def classified(samples: list[Address], *, firewalled: bool = True) -> NatClassifier:
    """Return a classifier that heard these addresses, each from a node of its own."""
    classifier = NatClassifier(firewalled)
    for i, sample in enumerate(samples):
        assert classifier.add(sample, (f"10.0.0.{i}", 49737))
    return classifier


A, B, C, D, E = ((HOST, port) for port in range(1000, 1005))
X, Y = (OTHER, 1000), (OTHER, 2000)


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        ([], Firewall.UNKNOWN),
        ([A], Firewall.UNKNOWN),
        ([A, A, A], Firewall.UNKNOWN),
        ([A, A, A, A], Firewall.CONSISTENT),
        ([A, A, A, B], Firewall.CONSISTENT),  # one may lie
        ([A, A, B, C], Firewall.RANDOM),
        ([A, A, B, B], Firewall.RANDOM),  # two ports of one host
        ([A, B, C, D], Firewall.RANDOM),
        ([A, A, X, X], Firewall.CONSISTENT),  # two public hosts, each keeps its port
        ([A, A, X, Y], Firewall.UNKNOWN),
        ([A, A, X, Y, B], Firewall.RANDOM),
        ([A, X, B, Y], Firewall.RANDOM),
        ([A, A, A, B, C], Firewall.RANDOM),  # upstream would stay with CONSISTENT
        ([A, A, A, B, C, D, E], Firewall.RANDOM),
        ([A] * 8 + [B, C], Firewall.CONSISTENT),
        ([A] * 8 + [B, C, D], Firewall.RANDOM),
        ([A] * 9 + [B, C, D], Firewall.CONSISTENT),
    ],
)
def test_verdicts_do_not_depend_on_the_order(samples: list[Address], verdict: Firewall) -> None:
    rng = random.Random(len(samples))
    for _ in range(6):
        assert classified(samples).firewall == verdict
        rng.shuffle(samples)


def test_an_early_agreement_is_given_up_when_ports_turn_out_to_vary() -> None:
    classifier, verdicts = classified([A, A, A, A]), []
    for i, sample in enumerate([A, B, C]):
        classifier.add(sample, ("10.0.1.1", i))
        verdicts.append(classifier.firewall)
    assert verdicts == [Firewall.CONSISTENT, Firewall.CONSISTENT, Firewall.RANDOM]
    assert classifier.addresses == ((HOST, 0),)


def test_a_node_counts_once() -> None:
    classifier = NatClassifier()
    for _ in range(5):
        classifier.add(A, ("10.0.0.1", 49737))
    assert classifier.sampled == 1
    assert not classifier.add(B, ("10.0.0.1", 49737))
    assert classifier.firewall == Firewall.UNKNOWN


def test_what_the_peer_is_told() -> None:
    assert classified([A, A, A]).addresses == ()
    assert classified([A, B, C, X]).addresses == ((HOST, 0),)
    assert classified([B, A, A, A]).addresses == (A, B)
    assert classified([A, A, A, X, X]).addresses == (A, X)
    assert set(classified([A] * 7 + [B]).addresses) == {A, B}
    assert set(classified([A] * 8 + [B, C]).addresses) == {A, B}


def test_an_open_host_names_its_address_from_the_first_sample_on() -> None:
    assert classified([], firewalled=False).firewall == Firewall.OPEN
    open_host = classified([A], firewalled=False)
    assert (open_host.firewall, open_host.addresses) == (Firewall.OPEN, (A,))
    assert open_host.decided


def test_a_frozen_verdict_stands_until_it_is_thawed() -> None:
    classifier = classified([A, A, A, A])
    classifier.freeze()
    for i, sample in enumerate([B, C, D]):
        classifier.add(sample, ("10.0.1.1", i))
    assert (classifier.firewall, classifier.addresses) == (Firewall.CONSISTENT, (A,))
    assert classifier.sampled == 7
    classifier.unfreeze()
    assert (classifier.firewall, classifier.addresses) == (Firewall.RANDOM, ((HOST, 0),))


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        ([], Firewall.UNKNOWN),
        ([A], Firewall.UNKNOWN),
        ([A, A], Firewall.CONSISTENT),
        ([A, B], Firewall.RANDOM),
        ([A, A, A], Firewall.CONSISTENT),
        ([A, A, B], Firewall.RANDOM),
        ([A, A, X], Firewall.UNKNOWN),
    ],
)
def test_a_small_network_settles_for_fewer_samples(samples: list[Address], verdict: Firewall) -> None:
    classifier = classified(samples)
    assert classifier.firewall == Firewall.UNKNOWN
    classifier.settle()
    assert classifier.firewall == verdict


def test_four_samples_are_all_that_is_waited_for() -> None:
    assert not classified([A, A, A]).decided
    assert classified([A, A, X, Y]).decided
    assert classified([A, A, X, Y]).firewall == Firewall.UNKNOWN
