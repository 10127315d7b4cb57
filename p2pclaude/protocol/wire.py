"""Request and response lines and the sealing of what they carry (pure).

Stands between the bytes of a connection and `daemon` or `client`.

    line      UTF-8 JSON, ended by a newline
    request   {"id", "method", "params": SEALED}
    response  {"id", "ok": true, "result": SEALED}  or  {"id", "ok": false, "error": TEXT}
    SEALED    base64 of: version 0 (1 byte), nonce (12), AES-256-GCM ciphertext of JSON text, tag (16)

Bytes come from strangers: every decoder here raises WireError and nothing else.

What `get-output` hands out are the journal's envelopes, each `{"type", "data", "timestamp", "seq"}`; the types are
named here because both ends must know them.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import isfinite
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from p2pclaude.errors import WireError

MAX_REQUEST_LINE = 8 * 1024 * 1024
"""Longest line, in bytes, that the daemon reads."""
MAX_FIRST_LINE = 256 * 1024
"""Longest first line, in bytes, of a tool: a stranger's fair share of what the daemon keeps for all of them."""
MAX_RESPONSE_LINE = 96 * 1024 * 1024
"""Longest line, in bytes, that a tool reads: a page holds one object at least, and Claude prints up to 64 MiB."""
MAX_MARKS = 256
"""Brackets, colons and commas in a request's line: it has a few, and many make values of twenty times its size."""
MAX_ID_CHARS = 256
"""A request with a longer id is answered with UNKNOWN_ID."""

UNKNOWN_ID = "unknown"
"""The id of an answer to a line whose own id cannot be told."""
WRONG_KEY = "Failed to decrypt params"
"""The error in our daemon's answer to params that do not open: the other side holds another dataKey."""
SESSION_NOT_FOUND = "Session not found"
"""The error in the answer to `send-message` for an unknown session."""
SESSION_ENDED = "Session has ended"
"""The error in the answer to `send-message` for one that was stopped, or is being stopped."""
REQUEST_NOT_FOUND = "Request not found"
"""The error in the answer to `answer-permission` for an unknown request."""
ALREADY_ANSWERED = "Already answered: "
"""What the error in the answer to `answer-permission` begins with if another was first; its behavior follows."""
UNKNOWN_METHOD = "Unknown method: "
"""What the error in the answer to an unknown method begins with; the name follows."""

OUTPUT = "session-output"
"""Envelope: `data` is one object that Claude printed. The only type that the TypeScript client knows."""
REPLAY = "message-taken"
"""Envelope: `data` is what Claude printed, at the daemon's wish, when it took a message in: the message once more."""
MESSAGE = "message"
"""Envelope: a message was accepted; `data` is what Claude gets, `messageId` the sender's own."""
TURN = "turn"
"""Envelope: the message with the seq `message` is handed to Claude; the next `result` (see `Results`) answers it.

With `steers` it was handed during the turn of that message, whose own result comes first, unless Claude takes in the
message with this `uuid` first, as a REPLAY with the same one shows.
"""
TURN_CUT = "turn-cut"
"""Envelope: the turn of `message` ended without a result, for the `reason`; with `again` true it is handed again."""
NOTE = "note"
"""Envelope: the daemon says in `text` what happened to the journal: `event` is "cut" or "damaged", with `bytes`."""
PERMISSION_REQUEST = "permission-request"
"""Envelope: Claude asks whether it may use a tool; `data` is its request, `requestId` the id to answer."""
PERMISSION_ANSWER = "permission-answer"
"""Envelope: what became of the request `requestId`: `behavior` allow, deny or cancelled, and what else was said."""

PAGE_START = b'{"messages":['
PAGE_END = b"],"
"""Our daemon's answer to `get-output` is JSON in lines: this first, an envelope a line, then this and the rest."""

_KEPT = (frozenset({"sessions", "updatedAt"}), frozenset({"addresses", "nodes"}))
"""Fields of what is sealed with the data key too, and kept where others may come by it: session record and hints."""

_VERSION = 0
_NONCE_BYTES = 12
_CONTROL = bytes(range(0x20))
_OUTPUT_HEAD = re.compile(rb'\{"type":"' + OUTPUT.encode() + rb'","seq":\d+,"timestamp":\d+,"data":')
_TAG_BYTES = 16


class Results:
    """Tells which of the objects that Claude prints are answers, if it is given them all.

    A `result` answers a message, unless its `origin` says that Claude began the turn by itself, as it does when a tool
    in the background has ended. But if a message came in during such a turn, as its replay shows, it answers that.
    """

    def __init__(self) -> None:
        self._took_message = False  # since the last result

    @staticmethod
    def is_replay(data: Mapping[str, Any]) -> bool:
        """Tell whether an object is a message that Claude has taken in, once more."""
        return data.get("isReplay") is True

    def is_answer(self, data: Mapping[str, Any]) -> bool:
        """Take the next object; return whether it answers a message."""
        if data.get("type") != "result":
            self._took_message |= self.is_replay(data)
            return False
        took, self._took_message = self._took_message, False
        origin = data.get("origin")
        return took or not isinstance(origin, dict) or origin.get("kind") == "human"


class LineTooLong(WireError):
    """A line exceeded the cap; `lines` are those that were complete before it."""

    def __init__(self, max_bytes: int, lines: list[bytes]) -> None:
        super().__init__(f"a line is longer than {max_bytes} bytes")
        self.lines = lines


class SealError(WireError):
    """Sealed text that this key does not open."""


class Request(NamedTuple):
    """A request as it stands in its line: `params` is still sealed (None: left out)."""

    id: str | int
    method: str
    params: str | None


class Response(NamedTuple):
    """A response as it stands in its line: `result` is still sealed (None: left out, which reads as {})."""

    id: str | int
    ok: bool
    result: str | None = None
    error: str | None = None


def dump_json(value: object) -> bytes:
    """Give compact UTF-8 JSON; text that UTF-8 cannot hold (lone surrogates) is escaped. Raises ValueError on NaN."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def load_json(data: bytes | str) -> Any:
    """Read JSON text (UTF-8 if bytes). Raises WireError on anything else.

    NaN, numbers too large for a float and overly deep nesting are refused too: no JSON could be made of them again.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        return _decoder.decode(text)
    except (ValueError, RecursionError):
        raise WireError("not valid JSON") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number out of range")
    return number


_decoder: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
# One for all: `json.loads` would make one for each text, which takes as long as reading a short one.


class JsonLine(Mapping[str, Any]):
    """A JSON object as the text it came in, which is read when somebody looks into it. Raises WireError then."""

    __slots__ = ("_value", "text")

    def __init__(self, text: bytes) -> None:
        self.text = text
        self._value: dict[str, Any] | None = None

    def _read(self) -> dict[str, Any]:
        if self._value is None:
            self._value = _object(self.text)
        return self._value

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    @property
    def output(self) -> bytes | None:
        """The text of what Claude printed, if this is an envelope of it as our journal writes one."""
        head = _OUTPUT_HEAD.match(self.text)
        return self.text[head.end() : -1] if head is not None and self.text.endswith(b"}") else None


def load_page(text: bytes) -> Any:
    """Read the answer to `get-output`; the envelopes in it stay unread (JsonLine) if it is our daemon's."""
    first, *lines = text.split(b"\n")
    if first != PAGE_START or len(lines) < 2 or not lines[-1].startswith(PAGE_END):
        return load_json(text)
    if len(text.translate(None, _CONTROL)) + len(lines) != len(text):
        return load_json(text)  # it tells white space from what a terminal would obey
    end = lines.pop()
    page = _object(b"{" + end.removeprefix(PAGE_END))
    if "messages" in page:  # named twice: the later one counts
        return load_json(text)
    page["messages"] = [JsonLine(line.removesuffix(b",")) for line in lines if line]
    return page


def seal(data_key: bytes, value: object) -> str:
    """Seal any JSON value under the 32-byte data key."""
    return seal_json(data_key, dump_json(value))


def seal_json(data_key: bytes, text: bytes, *, nonce: bytes | None = None) -> str:
    """Seal JSON text that stands ready as bytes; `nonce` (12 bytes) is random unless a test vector needs one."""
    nonce = os.urandom(_NONCE_BYTES) if nonce is None else nonce
    sealed = b"".join((bytes([_VERSION]), nonce, cipher().encrypt(data_key, nonce, text)))
    return base64.b64encode(sealed).decode()


def unseal(data_key: bytes, text: str) -> Any:
    """Open sealed text and give its JSON value.

    Raises SealError if it is no sealed text or of another key, WireError if what it holds is not JSON.
    """
    return load_json(unseal_json(data_key, text))


def unseal_json(data_key: bytes, text: str) -> bytes:
    """Open sealed text and give the JSON text it holds, unread. Raises SealError."""
    try:
        sealed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SealError("sealed text is not base64") from None
    if len(sealed) < 1 + _NONCE_BYTES + _TAG_BYTES or sealed[0] != _VERSION:
        raise SealError("sealed text has another form")
    try:
        return cipher().decrypt(data_key, sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :])
    except ValueError:
        raise SealError("sealed text does not open with this key") from None


def unseal_params(data_key: bytes, text: str) -> Any:
    """Open the params of a request. Raises as `unseal`.

    SealError also for what the holder of the key sealed for another purpose: whoever got it, as anyone gets the session
    record from the DHT, could send it as his own.
    """
    value = unseal(data_key, text)
    if isinstance(value, dict) and any(fields <= value.keys() for fields in _KEPT):
        raise SealError("sealed text was not made for a request")
    return value


class Cipher(Protocol):
    """AES-256-GCM: key (32 bytes), nonce (12), text."""

    def encrypt(self, key: bytes, nonce: bytes, text: bytes) -> bytes:
        """Return ciphertext and tag."""

    def decrypt(self, key: bytes, nonce: bytes, sealed: bytes) -> bytes:
        """Return the text. Raises ValueError when the tag is wrong."""


@cache
def cipher() -> Cipher:
    """Return libsodium's AES where the processor has it: that library is loaded anyway, OpenSSL takes its time."""
    try:
        found = _Sodium()
        found.encrypt(bytes(32), bytes(_NONCE_BYTES), b"")
        return found
    except (AttributeError, RuntimeError):  # an older PyNaCl; a processor without AES
        return _OpenSSL()


class _Sodium:
    def __init__(self) -> None:
        from nacl import bindings, exceptions

        self._encrypt = bindings.crypto_aead_aes256gcm_encrypt
        self._decrypt = bindings.crypto_aead_aes256gcm_decrypt
        self._error = exceptions.CryptoError

    def encrypt(self, key: bytes, nonce: bytes, text: bytes) -> bytes:
        return self._encrypt(text, None, nonce, key)

    def decrypt(self, key: bytes, nonce: bytes, sealed: bytes) -> bytes:
        try:
            return self._decrypt(sealed, None, nonce, key)
        except self._error:
            raise ValueError("a wrong tag") from None


class _OpenSSL:
    def __init__(self) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aes, self._error = AESGCM, InvalidTag

    def encrypt(self, key: bytes, nonce: bytes, text: bytes) -> bytes:
        return self._aes(key).encrypt(nonce, text, None)

    def decrypt(self, key: bytes, nonce: bytes, sealed: bytes) -> bytes:
        try:
            return self._aes(key).decrypt(nonce, sealed, None)
        except self._error:
            raise ValueError("a wrong tag") from None


def encode_request(request: Request) -> bytes:
    """Give a request's line, newline included."""
    body: dict[str, object] = {"id": request.id, "method": request.method}
    if request.params is not None:
        body["params"] = request.params
    return dump_json(body) + b"\n"


def decode_request(line: bytes) -> Request:
    """Read a request's line. Raises WireError."""
    body = _flat_object(line)
    method, params = body.get("method"), body.get("params")
    if not isinstance(method, str):
        raise WireError("the request names no method")
    if params is not None and not isinstance(params, str):
        raise WireError("params are not sealed text")
    return Request(_id(body), method, params)


def id_of_line(line: bytes) -> str | int:
    """Give the id to answer a line with, whatever is wrong with it: its own, or UNKNOWN_ID. Never raises."""
    try:
        return _id(_flat_object(line))
    except WireError:
        return UNKNOWN_ID


def encode_response(response: Response) -> bytes:
    """Give a response's line, newline included; its result is base64, as sealed text is."""
    body: dict[str, object] = {"id": response.id, "ok": response.ok}
    if response.error is not None:
        body["error"] = response.error
    if response.result is None:
        return dump_json(body) + b"\n"
    # It may be long, and needs no escaping.
    return b"".join((dump_json(body)[:-1], b',"result":"', response.result.encode(), b'"}\n'))


def decode_response(line: bytes) -> Response:
    """Read a response's line. Raises WireError."""
    body = _object(line)
    ok, result, error = body.get("ok"), body.get("result"), body.get("error")
    if not isinstance(ok, bool):
        raise WireError("the response does not say whether it is ok")
    if result is not None and not isinstance(result, str):
        raise WireError("the result is not sealed text")
    return Response(_id(body), ok, result, None if error is None else str(error))


def _object(line: bytes) -> dict[str, Any]:
    body = load_json(line)
    if not isinstance(body, dict):
        raise WireError("the line is not a JSON object")
    return body


def _flat_object(line: bytes) -> dict[str, Any]:
    """Read a line that anyone may have sent; in sealed text, the only long part of a request, there are no marks."""
    if sum(map(line.count, (b"[", b"{", b":", b","))) > MAX_MARKS:
        raise WireError("the line is no request")
    return _object(line)


def _id(body: dict[str, Any]) -> str | int:
    value = body.get("id")
    if isinstance(value, str) and len(value) <= MAX_ID_CHARS:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return value
    raise WireError("the line has no usable id")


class LineBuffer:
    """Cut a byte stream into lines, on bytes and before any decoding, so that a chunk may end within a character."""

    def __init__(self, max_bytes: int = MAX_REQUEST_LINE) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()

    @property
    def pending(self) -> int:
        """Give the number of bytes held of a line that is not complete yet."""
        return len(self._rest)

    def clear(self) -> None:
        """Drop what is held, and its memory."""
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take a chunk and give the lines that it completes, without their newlines.

        Raises LineTooLong, which carries the lines complete before it; the buffer is of no use afterwards.
        """
        lines: list[bytes] = []
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._hold(end, lines)
            lines.append(bytes(self._rest))
            self._rest.clear()
        self._hold(rest, lines)
        return lines

    def _hold(self, part: bytes, complete: list[bytes]) -> None:
        # One buffer, not the parts: those of a stranger may be two bytes each, which an object makes 35 of.
        if len(self._rest) + len(part) > self._max_bytes:
            self._rest.clear()
            raise LineTooLong(self._max_bytes, complete)
        self._rest += part
