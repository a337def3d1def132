"""A stand-in for mistralrs that is told by STAND_IN what to do: "serve" (default), "crash", "oom" (as the kernel ends it),
"hang" (while loading), "slow" (to load), "fatal" (dies of its first request), "slow again" and "hang again" (the second time, and not the first), "stubborn" (ignores TERM), "family" (has a child of its own). One that serves dies
when it is asked for /die, and answers no chat any more after /deaf. Its words are those of mistralrs 0.8.1; --version and
--help are answered by the script that runs it (conftest.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = {"choices": [{"index": 0, "delta": {"content": "here I am"}, "finish_reason": "stop"}]}


class Handler(BaseHTTPRequestHandler):
    deaf = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if os.environ.get("STAND_IN") == "fatal" and not Path("died").exists():
            Path("died").touch()  # in the home folder, where engines are started
            os._exit(4)
        if Handler.deaf:
            threading.Event().wait()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"data: " + json.dumps(CHUNK).encode() + b"\n\ndata: [DONE]\n\n")

    def do_GET(self) -> None:
        if self.path == "/die":
            print("Error: Out of Memory, here ends the log", file=sys.stderr, flush=True)
            os._exit(3)
        Handler.deaf = Handler.deaf or self.path == "/deaf"
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    arguments = sys.argv[1:]
    behaviour, _, again = os.environ.get("STAND_IN", "serve").partition(" ")
    if again and not Path("started").exists():  # in the home folder, where engines are started
        Path("started").touch()
        behaviour = "serve"
    assert os.environ["NO_COLOR"] == "1"
    print("\x1b[2m2026-01-01T00:00:00Z\x1b[0m INFO mistralrs_core: Loading model", flush=True)
    if behaviour == "crash":
        print(
            "Error: shape mismatch for model.embed_tokens.weight, expected: [384, 128], got: [384, 16]",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    if behaviour == "oom":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "slow":
        time.sleep(2)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "family":
        print(f"child {subprocess.Popen(['sleep', '600']).pid}", flush=True)
    if behaviour == "hang":
        threading.Event().wait()
    port = int(arguments[arguments.index("--port") + 1])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(f"INFO mistralrs::commands::serve: Server listening on http://127.0.0.1:{port}", flush=True)
    server.serve_forever()


main()
