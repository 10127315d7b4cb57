"""The pairing URL: one form written, several read, nothing of it ever told."""

import base64
import hashlib
import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.errors import DataError
from p2pclaude.protocol.pairing import PREFIX, Pairing, client_seed, format_url, is_host_port, parse_relay, parse_url

PUBLIC = bytes(range(32))
DATA = bytes(range(223, 255))
METADATA = {"host": "büro", "platform": "linux", "createdAt": 1767225600000}
# What the TypeScript system writes for these: Buffer.from(JSON.stringify(…)).toString("base64").
WRITTEN = (
    '{"v":1,"dhtPublicKey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",'
    '"dataKey":"3+Dh4uPk5ebn6Onq6+zt7u/w8fLz9PX29/j5+vv8/f4=",'
    '"metadata":{"host":"büro","platform":"linux","createdAt":1767225600000}}'
)


def code(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def url_of(**changes: Any) -> str:
    return PREFIX + code(json.dumps(json.loads(WRITTEN) | changes))


def test_the_url_is_written_as_by_the_typescript_system() -> None:
    assert format_url(Pairing(PUBLIC, DATA, METADATA)) == PREFIX + code(WRITTEN)


URL_SAFE = code(WRITTEN).replace("+", "-").replace("/", "_")


@pytest.mark.parametrize(
    "url",
    [
        PREFIX + code(WRITTEN),
        "happy://p2p-machine?code=" + code(WRITTEN),
        PREFIX + URL_SAFE,
        PREFIX + URL_SAFE.rstrip("="),
        PREFIX + code(WRITTEN).rstrip("="),
        PREFIX + quote(code(WRITTEN), safe=""),
        f"  {PREFIX}{code(WRITTEN)}\r\n",
        PREFIX + code(WRITTEN) + "&from=qr",
        url_of(unknown={"field": 1}),
    ],
)
def test_forms_that_are_read(url: str) -> None:
    assert parse_url(url) == Pairing(PUBLIC, DATA, METADATA)


def test_metadata_may_be_missing_or_name_a_private_network() -> None:
    bare = json.loads(WRITTEN)
    del bare["metadata"]
    assert parse_url(PREFIX + code(json.dumps(bare))).bootstrap == ()
    private = parse_url(url_of(metadata={"bootstrap": ["192.0.2.1:49737", "host.example:1"]}))
    assert private.bootstrap == ("192.0.2.1:49737", "host.example:1")
    assert private.relay is None
    assert parse_url(url_of(metadata={"relay": "0f" * 32})).relay == b"\x0f" * 32


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "not a pairing URL"),
        ("https://example.org/?code=" + code(WRITTEN), "not a pairing URL"),
        (PREFIX + "A" * 70000, "not a pairing URL"),
        (PREFIX, "not JSON"),
        (PREFIX + "!!!!", "not base64"),
        (PREFIX + "AAAAA", "not base64"),
        (PREFIX + code("no json"), "not JSON"),
        (PREFIX + code("[" * 40000), "not JSON"),
        (PREFIX + code("[1]"), "not a JSON object"),
        (url_of(v=2), "not version 1"),
        (url_of(v=True), "not version 1"),
        (url_of(v="1"), "not version 1"),
        (url_of(dhtPublicKey=None), "dhtPublicKey is not 32 bytes"),
        (url_of(dhtPublicKey="AAAA"), "dhtPublicKey is not 32 bytes"),
        (url_of(dataKey=7), "dataKey is not 32 bytes"),
        (url_of(dataKey="%" * 44), "dataKey is not base64"),
        (url_of(metadata=[]), "metadata is not an object"),
        (url_of(metadata={"bootstrap": "x:1"}), "list of host:port"),
        (url_of(metadata={"bootstrap": ["x"]}), "list of host:port"),
        (url_of(metadata={"relay": "ab"}), "relay is not a public key"),
        (url_of(metadata={"relay": 7}), "relay is not a public key"),
    ],
)
def test_malformed_urls_are_named_and_not_quoted(url: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_url(url)
    assert said in str(caught.value)
    assert caught.value.hint
    body = url.removeprefix(PREFIX)
    assert not body or body not in str(caught.value) + caught.value.hint
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # nor does a traceback


def test_nothing_shows_the_keys() -> None:
    pairing = Pairing(PUBLIC, DATA, METADATA)
    shown = f"{pairing!r} {pairing}"
    for key in (PUBLIC, DATA):
        assert repr(key) not in shown
        assert base64.b64encode(key).decode() not in shown


@pytest.mark.parametrize("good", ["h:1", "192.0.2.1:65535", "a-b.example:49737"])
def test_host_port(good: str) -> None:
    assert is_host_port(good)


@pytest.mark.parametrize("bad", ["", "h", ":1", "h:", "h:0", "h:65536", "h:x", "h:-1", "h:\u0661", "a b:1", "a,b:1"])
def test_no_host_port(bad: object) -> None:
    assert not is_host_port(bad)


metadata = st.fixed_dictionaries(
    {"host": st.text(), "platform": st.text(), "createdAt": st.integers(0, 2**53)}, optional={"rootDir": st.text()}
)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), metadata)
def test_round_trip(public: bytes, data: bytes, fields: dict[str, Any]) -> None:
    pairing = Pairing(public, data, fields)
    assert parse_url(format_url(pairing)) == pairing


@given(st.text() | st.binary().map(lambda b: base64.b64encode(b).decode()))
def test_any_text_is_a_pairing_or_a_data_error(text: str) -> None:
    for prefix in ("", PREFIX):
        try:
            assert isinstance(parse_url(prefix + text), Pairing)
        except DataError:
            pass


def test_the_key_that_tools_connect_with_is_derived_from_the_data_key() -> None:
    """A change of this would lock every tool out of every strict daemon of another version."""
    seed = client_seed(bytes(range(32)))
    assert seed == hashlib.blake2b(b"p2pclaude client key v1", digest_size=32, key=bytes(range(32))).digest()
    assert seed.hex() == "2dfe49f5bc45242f16a4ab1b26eeb0dba4b9a2552a4c0d39ea293a0c8e2e88d2"
    assert client_seed(bytes(32)) != seed


def test_a_relays_key_is_read() -> None:
    assert parse_relay("0aB" + "0" * 61) == bytes.fromhex("0ab" + "0" * 61)
    for text in ("", "0" * 63, "0" * 65, "g" * 64):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            parse_relay(text)
