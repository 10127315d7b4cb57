"""Round-trip tokens against those of dht-rpc, and how long they are good."""

import random

import pytest
from hyperdht.test_crypto import FixedRandom
from vectors import load, unhex

from p2pclaude.hyperdht.rpc.tokens import TokenJar


def test_tokens_are_those_of_dht_rpc() -> None:
    old, new = load("datagrams")["tokens"]
    jar = TokenJar(FixedRandom(unhex(old["secret"]) + unhex(new["secret"])))
    assert jar.issue(new["host"]).hex() == new["token"]
    assert jar.check(old["host"], unhex(old["token"]))
    assert jar.check(new["host"], unhex(new["token"]))


def test_a_token_outlives_one_rotation() -> None:
    jar = TokenJar(random.Random(1))
    token = jar.issue("10.0.0.1")
    checks = []
    for _ in range(4):
        checks.append(jar.check("10.0.0.1", token))
        jar.rotate()
    assert checks == [True, True, False, False]
    assert jar.issue("10.0.0.1") != token


@pytest.mark.parametrize("token", [b"", bytes(31), bytes(32), bytes(33)])
def test_other_tokens_are_refused(token: bytes) -> None:
    assert not TokenJar(random.Random(1)).check("10.0.0.1", token)


def test_a_token_is_for_one_host() -> None:
    jar = TokenJar(random.Random(1))
    assert not jar.check("10.0.0.2", jar.issue("10.0.0.1"))
    assert not TokenJar(random.Random(2)).check("10.0.0.1", jar.issue("10.0.0.1"))


def test_a_token_lives_for_two_rotations_as_dht_rpcs_do() -> None:
    assert TokenJar.ROTATION_SECONDS == 7.5
