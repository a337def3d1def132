"""An engine that does what a real one will not do on demand: it speaks OpenAI's protocol as it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def chunk(
    content: str | None = None, finish: str | None = None, usage: dict[str, Any] | None = None, **delta: Any
) -> str:
    """One line of a streamed answer."""
    body: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}]}
    return "data: " + json.dumps({**body, **({"usage": usage} if usage else {})}) + "\n\n"


def says(*pieces: str, finish: str = "stop", prompt_tokens: int = 11, cached: int = 0) -> list[str]:
    """A whole answer, piece by piece."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(pieces),
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return [*(chunk(piece) for piece in pieces), chunk("", finish, usage), "data: [DONE]\n\n"]


class FakeEngine(ThreadingHTTPServer):
    """`answer(request)` gives the text to send, in pieces; or (status, body). What was asked is in `requests`;
    `left` is set when the client closes the connection before the answer is whole."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], Any], port: int = 0) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()
        self.asked = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEngine

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"OK")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.headers.append(dict(self.headers))
        self.server.asked.set()
        answer = self.server.answer(request)
        if isinstance(answer, tuple):
            body = answer[1].encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._stream(answer)

    def _stream(self, pieces: Iterable[str]) -> None:
        try:
            for piece in pieces:
                data = piece.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.left.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def fake_engine(answer: Callable[[dict[str, Any]], Any], port: int = 0) -> Iterator[FakeEngine]:
    """A running FakeEngine."""
    engine = FakeEngine(answer, port)
    thread = threading.Thread(target=engine.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.shutdown()
        engine.server_close()
        thread.join()
