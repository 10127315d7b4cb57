"""A stub of the Messages API on loopback, enough for whole turns of the real `claude` without an account.

The last text of the user decides the answer: `TOOL:CMD` runs a command, `BACKGROUND:CMD` does so in the background
(its end is answered slowly, when the CLI tells of it), `FETCH:URL URL` fetches pages, for which the CLI asks at once,
`WRITE:PATH` writes a file, `QUESTION:TEXT` asks the user, `SLOW:N` streams N words half a second apart, `BIG:N` gives
N bytes, `ERR:STATUS` fails; anything else comes back as `echo: …`. Started as a program it prints its port and serves
until it is ended.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Block = dict[str, Any]

SLOW_SECONDS = 0.5


class StubApi(ThreadingHTTPServer):
    """The server; `requests` holds the bodies of the turns asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.stopping = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that were ended; their tests see what became of them."""

    @property
    def url(self) -> str:
        """Give what ANTHROPIC_BASE_URL should be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def stub_api() -> Iterator[StubApi]:
    """Serve in a thread of its own."""
    server = StubApi()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def environment(api_url: str, home: str, path: str) -> dict[str, str]:
    """Give the environment in which `claude` talks to the stub and to nobody else."""
    return {
        "PATH": path,
        "HOME": home,
        "ANTHROPIC_BASE_URL": api_url,
        "ANTHROPIC_API_KEY": "dummy",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
    }


def answer(messages: list[dict[str, Any]]) -> list[Block]:
    """Choose the content blocks for a conversation."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [b["text"] for b in blocks if b.get("type") == "text"]
    said = [text for text in texts if not text.lstrip().startswith("<system-reminder")]
    text = said[-1] if said else ""
    word, _, rest = text.strip().partition(":")
    results = [b for b in blocks if b.get("type") == "tool_result"]
    if results and word not in ("TOOL", "WRITE"):
        return [{"type": "text", "text": f"tool said: {json.dumps(results[-1].get('content'))[:200]}"}]
    if word == "FETCH":
        return [_tool("WebFetch", {"url": url, "prompt": "what is there?"}) for url in rest.split()]
    if word == "QUESTION":
        options = [{"label": label, "description": label} for label in ("red", "blue")]
        question = {"question": rest.strip(), "header": "Choice", "multiSelect": False, "options": options}
        return [_tool("AskUserQuestion", {"questions": [question]})]
    if word == "TOOL":
        return [_tool("Bash", {"command": rest.strip(), "description": "run a command"})]
    if word == "BACKGROUND":
        return [_tool("Bash", {"command": rest.strip(), "description": "run it", "run_in_background": True})]
    if text.startswith("<task-notification>"):
        return [{"type": "text", "text": "the task has ended, as I hear", "slow": True}]
    if word == "WRITE":
        return [_tool("Write", {"file_path": rest.strip(), "content": "hello\n"})]
    if word == "BIG":
        return [{"type": "text", "text": "z" * int(rest)}]
    if word == "SLOW":
        return [{"type": "text", "text": " ".join(f"w{n}" for n in range(int(rest))), "slow": True}]
    return [{"type": "text", "text": f"echo: {text[-200:]}"}]


def _tool(name: str, arguments: dict[str, Any]) -> Block:
    return {"type": "tool_use", "name": name, "input": arguments}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubApi

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._json({})

    def do_GET(self) -> None:
        self._json({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        if "count_tokens" in self.path:
            self._json({"input_tokens": 10})
        elif not self.path.startswith("/v1/messages"):
            self._json({})
        else:
            self.server.requests.append(body)
            self._turn(body)

    def _turn(self, body: dict[str, Any]) -> None:
        blocks = answer(body.get("messages", []))
        text = blocks[0].get("text", "")
        if text.startswith("echo: ERR:"):
            error = {"type": "invalid_request_error", "message": "stub error"}
            self._json({"type": "error", "error": error}, int(text[10:].split()[0]))
        elif body.get("stream"):
            self._stream(body, blocks)
        else:
            self._json(self._message(body, [{"type": "text", "text": "title"}], "end_turn"))

    def _message(self, body: dict[str, Any], content: list[Block], stop: str | None) -> dict[str, Any]:
        return {
            "id": f"msg_{len(self.server.requests):04d}",
            "type": "message",
            "role": "assistant",
            "model": body.get("model"),
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }

    def _stream(self, body: dict[str, Any], blocks: list[Block]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._event("message_start", message=self._message(body, [], None))
            for index, block in enumerate(blocks):
                self._block(index, block)
            stop = "tool_use" if blocks[-1]["type"] == "tool_use" else "end_turn"
            delta = {"stop_reason": stop, "stop_sequence": None}
            self._event("message_delta", delta=delta, usage={"output_tokens": 5})
            self._event("message_stop")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was interrupted

    def _block(self, index: int, block: Block) -> None:
        if block["type"] == "tool_use":
            name = f"toolu_{len(self.server.requests):04d}{index}"
            start = {"type": "tool_use", "id": name, "name": block["name"], "input": {}}
            self._event("content_block_start", index=index, content_block=start)
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            self._event("content_block_delta", index=index, delta=delta)
        else:
            self._event("content_block_start", index=index, content_block={"type": "text", "text": ""})
            for word in block["text"].split(" "):
                self._event("content_block_delta", index=index, delta={"type": "text_delta", "text": word + " "})
                if block.get("slow"):
                    self.server.stopping.wait(SLOW_SECONDS)
        self._event("content_block_stop", index=index)

    def _event(self, kind: str, **fields: Any) -> None:
        data = json.dumps({"type": kind, **fields})
        self.wfile.write(f"event: {kind}\ndata: {data}\n\n".encode())
        self.wfile.flush()

    def _json(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


if __name__ == "__main__":
    with stub_api() as running:
        print(running.server_port, flush=True)
        while True:
            time.sleep(3600)
