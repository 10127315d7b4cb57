"""Lines and sealing: the contract's forms, strangers' bytes, chunks that end anywhere."""

import base64
import json
import tracemalloc
from typing import Any

import nacl.exceptions
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.errors import WireError
from p2pclaude.protocol.wire import (
    PAGE_END,
    PAGE_START,
    UNKNOWN_ID,
    Cipher,
    LineBuffer,
    LineTooLong,
    Request,
    Response,
    Results,
    SealError,
    _OpenSSL,
    _Sodium,
    cipher,
    decode_request,
    decode_response,
    dump_json,
    encode_request,
    encode_response,
    id_of_line,
    load_json,
    load_page,
    seal,
    seal_json,
    unseal,
)

KEY = bytes(range(32))
# Made by Node 20.20.2: createCipheriv("aes-256-gcm", key, nonce) over {"text":"grüße"}, then
# Buffer.concat([Buffer.from([0]), nonce, ciphertext, tag]).toString("base64").
SEALED = "AGRlZmdoaWprbG1ubzM5qgMBnXSkHAUtK2am9Zhgv7ixOz+kOt3aDZ2Ws3zYG78="
NONCE = bytes(range(100, 112))
TEXT = '{"text":"grüße"}'.encode()


def test_sealing_has_the_contracts_form() -> None:
    assert seal_json(KEY, TEXT, nonce=NONCE) == SEALED
    assert unseal(KEY, SEALED) == {"text": "grüße"}


def test_each_sealing_differs() -> None:
    assert seal(KEY, {}) != seal(KEY, {})


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"\1" + raw[1:],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:],
        lambda raw: raw[:28],
        lambda raw: b"",
        lambda raw: raw + b"\0",
    ],
)
def test_damaged_sealed_text_does_not_open(damage: Any) -> None:
    raw = base64.b64decode(seal(KEY, {"a": 1}))
    with pytest.raises(SealError):
        unseal(KEY, base64.b64encode(damage(raw)).decode())


def test_another_key_does_not_open() -> None:
    with pytest.raises(SealError) as caught:
        unseal(bytes(32), seal(KEY, {"secret": "text"}))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["not base64!", "é", " " + "A" * 44, "AAAA\n" * 10])
def test_what_is_not_base64_does_not_open(text: str) -> None:
    with pytest.raises(SealError):
        unseal(KEY, text)


def test_sealed_text_that_is_no_json() -> None:
    for plain in (b"{", b"\xff", b"NaN", b"1e400", b"[-1e999]", b"[" * 100_000):
        with pytest.raises(WireError):
            unseal(KEY, seal_json(KEY, plain))


def test_lines() -> None:
    assert encode_request(Request("7", "ping", "x")) == b'{"id":"7","method":"ping","params":"x"}\n'
    assert encode_response(Response("7", True, "x")) == b'{"id":"7","ok":true,"result":"x"}\n'
    assert encode_response(Response(7, False, error="no")) == b'{"id":7,"ok":false,"error":"no"}\n'
    assert decode_response(b'{"id":"7","ok":true}') == Response("7", True)
    assert decode_request(b'{"id":1,"method":"ping","more":[]}\r') == Request(1, "ping", None)


@pytest.mark.parametrize(
    ("line", "answer_to"),
    [
        (b"not json", UNKNOWN_ID),
        (b"", UNKNOWN_ID),
        (b"\xff\xfe", UNKNOWN_ID),
        (b'"text"', UNKNOWN_ID),
        (b"[" * 100_000, UNKNOWN_ID),
        (b'{"method":"ping"}', UNKNOWN_ID),
        (b'{"id":null,"method":"ping"}', UNKNOWN_ID),
        (b'{"id":true,"method":"ping"}', UNKNOWN_ID),
        (b'{"id":1.5,"method":"ping"}', UNKNOWN_ID),
        (b'{"id":1' + b"0" * 5000 + b',"method":"ping"}', UNKNOWN_ID),
        (b'{"id":"' + b"x" * 300 + b'","method":"ping"}', UNKNOWN_ID),
        (b'{"id":"a"}', "a"),
        (b'{"id":"a","method":7}', "a"),
        (b'{"id":5,"method":"ping","params":{}}', 5),
    ],
)
def test_bad_requests(line: bytes, answer_to: str | int) -> None:
    with pytest.raises(WireError):
        decode_request(line)
    assert id_of_line(line) == answer_to


@pytest.mark.parametrize(
    "line", [b"", b"[]", b'{"id":1}', b'{"id":1,"ok":1}', b'{"id":1,"ok":true,"result":{}}', b'{"ok":true}']
)
def test_bad_responses(line: bytes) -> None:
    with pytest.raises(WireError):
        decode_response(line)


@given(st.binary())
def test_any_bytes_are_a_value_or_a_wire_error(data: bytes) -> None:
    for decode in (decode_request, decode_response, load_json):
        try:
            decode(data)
        except WireError:
            pass
    id_of_line(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_any_value_comes_back(value: object) -> None:
    assert unseal(KEY, seal(KEY, value)) == value


@pytest.mark.parametrize("part", [b"{}", b"[]", b'{"":0}', b"0", b'"":0', b'"":""'], ids=str)
def test_a_line_is_not_read_that_would_take_much_more_room(part: bytes) -> None:
    """Anyone may send one: a request is flat and its params are one text, so that its few values take what it has."""
    line = b'{"id":"1","method":"ping","params":[' + b",".join([part] * 300_000) + b"]}"
    if b":" in part and b"{" not in part:
        line = line.replace(b"[", b"{").replace(b"]", b"}")
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode_request(line)
        assert id_of_line(line) == UNKNOWN_ID
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_lone_surrogates_survive() -> None:
    value = json.loads('"\\ud800"')
    assert load_json(dump_json({"a": value})) == {"a": value}


@given(st.lists(st.binary().map(lambda b: b.replace(b"\n", b""))), st.data())
def test_lines_come_whole_however_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"rest"
    buffer, found, at = LineBuffer(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        found += buffer.feed(stream[at : at + size])
        at += size
    assert found == lines
    assert buffer.pending == len(b"rest")


def test_a_character_cut_in_two_chunks_is_whole_again() -> None:
    line = '{"id":"ü"}\n'.encode()
    buffer = LineBuffer()
    assert buffer.feed(line[:8]) == []
    assert load_json(buffer.feed(line[8:])[0]) == {"id": "ü"}


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_line_over_the_cap_is_refused_and_lines_before_it_are_not_lost(chunk: int) -> None:
    stream = b"ok\n" + b"x" * 10 + b"\n" + b"y" * 11
    buffer, found = LineBuffer(10), []
    with pytest.raises(LineTooLong) as caught:
        for at in range(0, len(stream), chunk):
            found += buffer.feed(stream[at : at + chunk])
    assert found + caught.value.lines == [b"ok", b"x" * 10]


ENVELOPES = [
    b'{"type":"session-output","seq":1,"timestamp":5,"data":{"type":"x","text":"},\\n]"}}',
    b'{"type":"message","seq":2,"timestamp":5,"data":"],"}',
    b'{"type":"session-output","seq":3,"timestamp":5,"data":null}',
]


def page(*envelopes: bytes) -> bytes:
    """Give an answer to `get-output` as our daemon writes it."""
    return PAGE_START + b"\n" + b",\n".join(envelopes) + b"\n" + PAGE_END + b'"next":3,"state":"idle"}'


def test_a_page_comes_apart_at_its_lines() -> None:
    """The envelopes are the journal's bytes; what is inside is there for who looks."""
    for envelopes in (ENVELOPES, ENVELOPES[:1], []):
        read = load_page(page(*envelopes))
        assert [len(line) for line in read["messages"]] == [len(json.loads(one)) for one in envelopes]
        assert [line.text for line in read["messages"]] == envelopes
        assert read == load_json(page(*envelopes)), "it is plain JSON for everybody else"
        assert [dict(line) for line in read["messages"]] == [json.loads(line) for line in envelopes]
    outputs = [line.output for line in load_page(page(*ENVELOPES))["messages"]]
    assert outputs == [b'{"type":"x","text":"},\\n]"}', None, b"null"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"messages":[{"type":"session-output","data":1}]}',
        b'{"messages": [\n],"next":1}',
        b'{"messages":[\n{}\n],"messages":[7]}',
        b'{\n"messages":[]}',
        page(b'{"type":"session-output","seq":1,"timestamp":5,"data":{\t}}'),
        b"[]",
    ],
)
def test_another_daemons_page_is_read_as_json(text: bytes) -> None:
    assert load_page(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        PAGE_START + b"\n",
        PAGE_START + b"\n" + PAGE_END,
        page(b'{"type":"session-output","seq":1,"timestamp":5,"data":"\x1b[2J"}'),
        page(b'{"type":"session-output","seq":1,"timestamp":5,"data":"\x00"}'),
    ],
)
def test_a_page_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(WireError):
        load_page(text)


def test_what_is_wrong_in_an_envelope_is_said_when_it_is_read() -> None:
    for text in (b"{", b"[]", b"1", b'{"type":"session-output","seq":1,"timestamp":5,"data":'):
        (line,) = load_page(page(text))["messages"]
        assert line.output is None
        with pytest.raises(WireError):
            line.get("type")


@pytest.mark.parametrize("kind", [_Sodium, _OpenSSL])
def test_both_ciphers_are_the_same(kind: type[Cipher]) -> None:
    """What one seals the other opens, and neither opens what was touched."""
    own, nonce = kind(), bytes(range(12))
    for other in (_Sodium(), _OpenSSL()):
        for text in (b"", b"x" * 100_000):
            sealed = own.encrypt(KEY, nonce, text)
            assert other.decrypt(KEY, nonce, sealed) == text
            with pytest.raises(ValueError, match="tag"):
                other.decrypt(KEY, nonce, bytes([sealed[0] ^ 1]) + sealed[1:])
            with pytest.raises(ValueError, match="tag"):
                other.decrypt(bytes(32), nonce, sealed)


def test_without_sodiums_cipher_there_is_openssls(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older PyNaCl, or a processor without AES."""
    cipher.cache_clear()
    assert isinstance(cipher(), _Sodium)
    try:
        for failure in (AttributeError, nacl.exceptions.UnavailableError):
            cipher.cache_clear()

            def fail(*_: object, failure: type[Exception] = failure) -> bytes:
                raise failure("not here")

            monkeypatch.setattr("nacl.bindings.crypto_aead_aes256gcm_encrypt", fail)
            assert isinstance(cipher(), _OpenSSL)
            assert unseal(KEY, seal(KEY, [1])) == [1]
    finally:
        cipher.cache_clear()


def test_a_result_without_any_message_before_it_that_claude_began_by_itself_answers_nobody() -> None:
    results = Results()
    assert not results.is_answer({"type": "assistant"})
    assert not results.is_answer({"type": "result", "origin": {"kind": "task-notification"}})
    assert results.is_answer({"type": "result"})
