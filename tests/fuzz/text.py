"""The application's decoders: pairing URLs, lines, sealed text, answers, processes, files of the data directory."""

import atexit
import base64
import json
import re
import shutil
import tempfile
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from fuzz import engine
from fuzz.target import Script, Target
from p2pclaude.client.hintcache import MAX_ADDRESSES, decode_hints
from p2pclaude.errors import DataError, P2PClaudeError, ProtocolError, Refused, WireError
from p2pclaude.host.datadir import DataDir
from p2pclaude.host.processes import DAEMON_VARIABLE, SESSION_VARIABLE, decode_environ, decode_ps, decode_stat
from p2pclaude.hyperdht import KeyPair
from p2pclaude.protocol.pairing import PREFIX, format_url, is_host_port, parse_url
from p2pclaude.protocol.permissions import Answer, Book, History, Refusal, Request, decode_answer
from p2pclaude.protocol.record import decode_record
from p2pclaude.protocol.wire import (
    NOTE,
    PAGE_END,
    PAGE_START,
    UNKNOWN_ID,
    JsonLine,
    LineBuffer,
    LineTooLong,
    SealError,
    decode_request,
    decode_response,
    dump_json,
    encode_request,
    encode_response,
    id_of_line,
    load_json,
    load_page,
    seal_json,
    unseal,
)
from p2pclaude.sessions.claude import decode_line
from p2pclaude.sessions.directory import Info
from p2pclaude.sessions.inbox import Recovery
from p2pclaude.sessions.journalfile import JournalFile
from p2pclaude.sessions.seqindex import seq_of_line

KEY: Final = bytes(range(32))
UNUSED_KEY: Final = KEY[::-1]  # nothing is sealed with it: what opens is a forgery
NONCE: Final = bytes(12)
LINE_CAP: Final = 64


# -- pairing URL: first byte 0 the text itself, else base64 of the rest behind the prefix


def _read_url(data: bytes) -> None:
    script = Script(data)
    raw = script.byte() == 0
    rest = script.rest()
    text = rest.decode("utf-8", "surrogateescape") if raw else PREFIX + base64.b64encode(rest).decode()
    try:
        pairing = parse_url(text)
    except DataError as error:
        code = text.partition("code=")[2]
        said = str(error).replace(PREFIX, "")
        assert len(code) < 16 or code not in said, "the error repeats the URL"
        return
    again = parse_url(format_url(pairing))
    assert (again.public_key, again.data_key) == (pairing.public_key, pairing.data_key)
    assert all(is_host_port(entry) for entry in pairing.bootstrap)
    assert repr(pairing) == repr(again) == "Pairing()", "a key in the repr"


def _url_seeds() -> list[bytes]:
    body = {
        "v": 1,
        "dhtPublicKey": base64.b64encode(KEY).decode(),
        "dataKey": base64.b64encode(KEY[::-1]).decode(),
        "metadata": {"host": "h", "platform": "linux", "createdAt": 1, "bootstrap": ["127.0.0.1:49737"]},
    }
    text = json.dumps(body).encode()
    url = PREFIX.encode() + base64.b64encode(text)
    old = b"happy://p2p-machine?code=" + base64.urlsafe_b64encode(text).rstrip(b"=") + b"&x=1"
    return [b"\x00" + url, b"\x00" + old, b"\x01" + text]


# -- request and response lines


def _read_request(data: bytes) -> None:
    named = id_of_line(data)
    try:
        request = decode_request(data)
    except WireError:
        return
    assert named == request.id
    assert decode_request(encode_request(request)) == request


_BASE64: Final = re.compile("[A-Za-z0-9+/=]*")


def _read_response(data: bytes) -> None:
    try:
        response = decode_response(data)
    except WireError:
        return
    assert id_of_line(data) in (response.id, UNKNOWN_ID)  # a response may have more marks than a request
    if response.result is None or _BASE64.fullmatch(response.result):
        assert decode_response(encode_response(response)) == response


def _request_seeds() -> list[bytes]:
    return [
        b'{"id":"1","method":"ping","params":"AAAA"}',
        b'{"id":7,"method":"\\ud800\\u00e9","x":[[[]]],"params":null}',
        b'{"id":9007199254740992,"method":"list-sessions"}',
        b'{"id":1e3,"method":1}',
        b'{"id":"' + UNKNOWN_ID.encode() + b'"}',
        b'{"id":1,"method":"ping","x":' + b"[" * 600 + b"]" * 600 + b"}",
    ]


def _response_seeds() -> list[bytes]:
    return [
        b'{"id":"1","ok":true,"result":"AAAA"}',
        b'{"id":2,"ok":false,"error":"Session not found"}',
        b'{"id":3,"ok":false,"error":{"a":[1,2.5,null]}}',
        b'{"id":4,"ok":false,"error":' + b"[" * 600 + b"]" * 600 + b"}",
    ]


# -- the answer to get-output: what is left unread reads as if it had been read, or as WireError if it is not ours


def _read_page(data: bytes) -> None:
    try:
        page = load_page(data)
        if isinstance(page, dict) and isinstance(page.get("messages"), list):
            page["messages"] = [dict(entry) if isinstance(entry, JsonLine) else entry for entry in page["messages"]]
        plain = load_json(data)
    except WireError:
        return
    assert page == plain, f"{plain!r} became {page!r}"


def _page_seeds() -> list[bytes]:
    line = b'{"type":"session-output","seq":1,"timestamp":2,"data":{"a":"\xc3\xbc\\n"}}'
    start, end = PAGE_START + b"\n", b"\n" + PAGE_END
    both = b"{}" + end + b'"messages":[7],"next":0}'
    return [
        start + both,
        start + b"{},{}" + end + b'"next":0}',
        start + line + b",\n" + line + end + b'"next":2,"state":"idle"}',
        start + end + b'"next":0}',
        start + b'{"a":1} ,\n{}' + end + b'"messages":[7],"next":0}',
        b'{"messages":[],"next":null}',
        start + b"[]" + end + b"}",
    ]


# -- the file of a daemon's whereabouts


def _read_hints(data: bytes) -> None:
    try:
        value = load_json(data)
    except WireError:
        return
    try:
        hints = decode_hints(value)
    except ValueError:
        return
    assert max(map(len, hints)) <= MAX_ADDRESSES
    for host, port in (*hints.addresses, *hints.nodes):
        assert str(ip_address(host)) == host and 0 < port < 65536
    assert decode_hints(load_json(dump_json(hints._asdict()))) == hints


def _hint_seeds() -> list[bytes]:
    good = {"addresses": [["127.0.0.1", 1], ["10.0.0.255", 65535]], "nodes": [["1.2.3.4", 49737]] * 9}
    bad: list[object] = [["1.2.3.4", True], ["1.2.3.4", 1.0], ["01.2.3.4", 1], ["1.2.3", 1], ["::1", 1], "ab", [1, 2]]
    return [json.dumps(value).encode() for value in (good, {}, [], *({**good, "nodes": [entry]} for entry in bad))]


# -- lines cut out of chunks: each chunk is a length byte and as many bytes


def _cut_lines(data: bytes) -> None:
    script, lines, stream = Script(data), LineBuffer(LINE_CAP), b""
    got: list[bytes] = []
    too_long = False
    while script.more:
        chunk = script.chunk()
        stream += chunk
        try:
            got += lines.feed(chunk)
        except LineTooLong as error:
            got += error.lines
            too_long = True
            break
        assert lines.pending <= LINE_CAP
    *whole, rest = stream.split(b"\n")
    expected = next((whole[:i] for i, line in enumerate(whole) if len(line) > LINE_CAP), whole)
    assert got == expected
    assert too_long == (expected != whole or len(rest) > LINE_CAP)
    if not too_long:
        assert lines.pending == len(rest)


def _line_seeds() -> list[bytes]:
    return [b"\x03a\nb\x02\nc", b"\x40" + b"x" * 64 + b"\x01\n", b"\x01\n\x00\x02\n\n\x41" + b"y" * 65]


# -- sealed text: first byte 0 the text itself, 1 the bytes in base64, else JSON text that is sealed


def _open_sealed(data: bytes) -> None:
    script = Script(data)
    mode = script.byte() % 3
    rest = script.rest()
    text = _sealed(mode, rest)
    try:
        value = unseal(KEY if mode == 2 else UNUSED_KEY, text)
    except SealError:
        assert mode != 2, "what this key sealed did not open"
        return
    except WireError:
        return
    assert mode == 2, "a forgery opened"
    assert repr(value) == repr(load_json(rest))


def _sealed(mode: int, rest: bytes) -> str:
    if mode == 2:
        return seal_json(KEY, rest, nonce=NONCE)
    return base64.b64encode(rest).decode() if mode else rest.decode("latin-1")


def _sealed_seeds() -> list[bytes]:
    plain = b'{"sessionId":"a","text":"\\u00e9"}'
    sealed = seal_json(KEY, plain, nonce=NONCE)
    texts = [b"\x02" + plain, b"\x02[1,2.5,-0,1e400,null,true]", b"\x02" + b"[" * 600 + b"]" * 600, b"\x02NaN"]
    forged = bytearray(base64.b64decode(sealed))
    forged[-1] ^= 1
    return [*texts, b"\x01" + bytes(forged), b"\x00" + sealed[:-8].encode()]


# -- a line of Claude's stdout: what is kept is one line of JSON that can stand in an envelope


def _read_claude(data: bytes) -> None:
    line = data.replace(b"\n", b"")
    kept, value = decode_line(line)
    assert b"\n" not in kept
    envelope = load_json(b'{"messages":[{"type":"session-output","seq":1,"data":' + kept + b"}]}")
    assert dump_json(envelope["messages"][0]["data"]) == dump_json(value)
    _ask(value, len(kept))


def _ask(value: dict[str, Any], size: int) -> None:
    """What claude asks is shown, refused or ignored; what it is told holds the id that it asked with."""
    outcome = Book(asks=True).receive(value, size, 0)
    reply = None
    if isinstance(outcome, Request):
        dump_json(outcome.describe("s", "/"))
        reply = Answer("allow").reply(outcome)
    elif isinstance(outcome, Refusal):
        reply = outcome.reply
    if reply is not None:
        assert load_json(dump_json(reply))["response"]["request_id"] == value["request_id"]


def _claude_seeds() -> list[bytes]:
    return [
        b'{"type":"system","subtype":"init","cwd":"/tmp","session_id":"x","tools":["Bash"]}',
        b'{"type":"assistant","message":{"role":"assistant","content":[{"type":"text","text":"\\ud83d\\ude00"}]}}',
        b'{"type":"result","subtype":"success","is_error":false,"total_cost_usd":0.01,"result":"\xc3\xa9"}\r',
        b'{"type":"control_request","request_id":"r","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{}}}',
        b'{"type":"control_request","request_id":"r","request":{"subtype":"hook_callback"}}',
        b'{"type":"control_cancel_request","request_id":"r"}',
        b"stray words \xff\xfe",
        b'{"type":"assistant","mess',
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    ]


# -- files of the data directory


def _read_session(data: bytes) -> None:
    try:
        info = Info.decode(data)
    except WireError:
        return
    assert isinstance(info.session_id, str)
    assert isinstance(info.created_at, int)


def _session_seeds() -> list[bytes]:
    info = {
        "session_id": "a1", "claude_id": "8f1d2c0e-5f0b-4b5e-9a57-0d6f3f1c7f52", "directory": "/tmp", "mark": 3,
        "created_at": 1, "permission_mode": "plan", "model": None, "state": "dormant", "begun": True, "last_seq": 9,
    }  # fmt: skip
    return [json.dumps(info).encode(), json.dumps({**info, "later": [1], "error": "x", "exit_status": -9}).encode()]


@cache
def _directory() -> Path:
    """Return a directory in memory where there is one: the targets below read and write real files."""
    path = tempfile.mkdtemp(prefix="fuzz-", dir=engine.scratch or engine.memory())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _load_journal(data: bytes) -> None:
    path = _directory() / "journal.jsonl"
    path.write_bytes(data)
    path.with_suffix(".index").unlink(missing_ok=True)
    others: list[tuple[int, bytes]] = []
    journal = JournalFile.open(path, on_other=lambda seq, line: others.append((seq, line)))
    try:
        last = journal.last_seq
        page = journal.read(0, max_bytes=len(data) + 1000 * last)
        assert page.next == len(page.lines) == last
        assert [load_json(line)["seq"] for line in page.lines] == list(range(1, last + 1))
        lines = [line for line in data.split(b"\n")[:-1] if seq_of_line(line) is not None]
        if [seq_of_line(line) for line in data.split(b"\n")[:-1]] == list(range(1, data.count(b"\n") + 1)):
            kept = zip(lines, page.lines, strict=False)  # a tail that was cut off leaves a note
            assert all(line == given or load_json(given)["type"] == NOTE for line, given in kept)
            assert data.count(b"\n") <= last <= data.count(b"\n") + 1, "envelopes in their order were dropped"
        assert set(journal.read(0, max_bytes=len(data) + 1, outputs_only=True).lines) <= set(lines)
        recovery, asked = Recovery(), History()
        for seq, line in others:
            recovery.learn(seq, line)
            asked.learn(line)
        assert len(asked.unanswered) + len(asked.answered) <= len(others)
        inbox = recovery.finish(lambda seq: journal.read(seq - 1, limit=1).lines[0], last)
        inbox.check()
        assert len(inbox) + len(inbox.handed) <= len(others)
        journal.start_of_last(2)
        assert journal.append_output(b"{}") == last + 1
        journal.flush()
        journal.show(last + 1)
        assert load_json(journal.read(last).lines[0])["seq"] == last + 1
    finally:
        journal.close()


def _journal_seeds() -> list[bytes]:
    output = b'{"type":"session-output","seq":1,"timestamp":1,"data":{"type":"result"}}\n'
    message = b'{"type":"message","seq":2,"timestamp":2,"messageId":"m","data":{"type":"user"}}\n'
    turn = b'{"type":"turn","seq":3,"timestamp":3,"message":2}\n'
    asked = b'{"type":"permission-request","seq":4,"timestamp":4,"requestId":"r","data":{"tool_name":"Bash"}}\n'
    answered = b'{"type":"permission-answer","seq":5,"timestamp":5,"requestId":"r","behavior":"allow","answerId":"a"}\n'
    permissions = [asked + answered, asked * 2]
    return [
        *permissions,
        output + message + turn,
        output * 3 + turn[:-9],
        message + b"\x00\xff\n\n" + turn,
        b"[]\n1\n",
    ]


# Two files, each behind its length of two bytes; a length of 0 leaves the file out.
def _load_keys(data: bytes) -> None:
    directory = _directory() / "data"
    data_dir, script = DataDir(directory), Script(data)
    contents = (script.long_chunk(), script.rest())
    for path, content in zip((data_dir.keypair_file, data_dir.encryption_key_file), contents, strict=True):
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
    data_dir.write_pairing_url("x")  # so that a missing key is an error and none is made
    try:
        identity = data_dir.load_or_create_identity()
    except P2PClaudeError as error:
        assert isinstance(error, DataError), error
        return
    assert len(identity.public_key) == len(identity.data_key) == 32
    metadata = {"host": "h", "createdAt": identity.created_at}
    load_json(dump_json(metadata))


def _key_seeds() -> list[bytes]:
    pair = KeyPair.from_seed(KEY)
    keys = {"publicKey": pair.public_key, "secretKey": pair.secret_key}
    first = json.dumps({name: base64.b64encode(key).decode() for name, key in keys.items()}).encode()
    inputs = []
    for created in ("1700000000000", '"2026-01-01"', "null", "1e400", "-1.5"):
        second = b'{"key":"' + base64.b64encode(KEY) + b'","createdAt":' + created.encode() + b"}"
        inputs.append(len(first).to_bytes(2, "little") + first + second)
    return inputs


# -- the session record: first byte 0 the value itself, else JSON text that is sealed


def _read_record(data: bytes) -> None:
    script = Script(data)
    raw = script.byte() == 0
    rest = script.rest()
    value = rest if raw else seal_json(KEY, rest, nonce=NONCE).encode()
    try:
        record = decode_record(1, value, KEY)
    except (Refused, ProtocolError):
        return
    assert all(isinstance(session, dict) for session in record.sessions)
    assert isinstance(record.omitted, int)


def _record_seeds() -> list[bytes]:
    body = b'{"sessions":[{"sessionId":"a","pid":1,"createdAt":2,"directory":"/"},5],"updatedAt":3,"omitted":1}'
    return [b"\x00" + body, b"\x01" + body, b"\x00" + seal_json(KEY, body, nonce=NONCE).encode(), b"\x01[]", b"\x00AA"]


# -- an answer to a permission request, as a client or a filter gives it


def _read_answer(data: bytes) -> None:
    try:
        value = load_json(data)
    except WireError:
        return
    if not isinstance(value, dict):
        return
    asked = Book(asks=True).receive(_QUESTION, 100, 0)
    assert isinstance(asked, Request)
    try:
        answer = decode_answer(value).complete(asked)
    except DataError:
        return
    reply = answer.reply(asked)["response"]["response"]
    assert reply["behavior"] == value["behavior"]
    assert load_json(dump_json(reply)) == reply


_QUESTION: Final[dict[str, Any]] = {
    "type": "control_request",
    "request_id": "r",
    "request": {"subtype": "can_use_tool", "tool_name": "AskUserQuestion", "input": {"questions": [{"question": "q"}]}},
}


def _answer_seeds() -> list[bytes]:
    return [
        b'{"behavior":"allow","updatedInput":{"a":1},"updatedPermissions":[{}]}',
        b'{"behavior":"deny","message":"no","interrupt":true}',
        b'{"behavior":"allow","answers":{"q":["a","b"]}}',
    ]


# -- what the system says of its processes: names, arguments and variables are anybody's


def _read_processes(data: bytes) -> None:
    process = decode_stat(7, data)
    assert process is None or process.pid == 7
    assert set(decode_environ(data)) <= {DAEMON_VARIABLE, SESSION_VARIABLE}
    table, marks = decode_ps(data.decode("utf-8", "replace"))
    assert table.keys() == marks.keys()
    assert len(table) <= data.count(b"\n") + 1, "a process that is none"


def _process_seeds() -> list[bytes]:
    line = "777 1 S Tue Nov 24 09:30:00 2026 claude A=b P2PCLAUDE_DAEMON=0011223344556677 P2PCLAUDE_SESSION=s"
    return [
        b"7 (a) R 1 (b) S 12 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3",
        b"A=1\0P2PCLAUDE_SESSION=s\0P2PCLAUDE_DAEMON=d\0",
        f"{line}\n{line} \u2028{line}\n".encode(),
        "\u00b2 \u00b2 S a b c d e f\n".encode(),
    ]


TARGETS: Final = (
    Target("pairing_url", _read_url, seeds=_url_seeds),
    Target("wire_request", _read_request, seeds=_request_seeds),
    Target("wire_response", _read_response, seeds=_response_seeds),
    Target("wire_page", _read_page, seeds=_page_seeds),
    Target("hints", _read_hints, seeds=_hint_seeds),
    Target("wire_lines", _cut_lines, seeds=_line_seeds),
    Target("sealed", _open_sealed, seeds=_sealed_seeds),
    Target("claude_line", _read_claude, 5000, max_bytes=4096, seeds=_claude_seeds),
    Target("session_info", _read_session, seeds=_session_seeds),
    Target("session_record", _read_record, seeds=_record_seeds),
    Target("journal", _load_journal, 3000, max_bytes=4096, seeds=_journal_seeds),
    Target("key_files", _load_keys, 2000, seeds=_key_seeds),
    Target("answer", _read_answer, seeds=_answer_seeds),
    Target("processes", _read_processes, seeds=_process_seeds),
)
