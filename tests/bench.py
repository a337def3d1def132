"""What the proxy costs: `python3 tests/bench.py` prints one line a figure. Standard library only.

A scripted engine, the proxy and this client are three processes. The engine writes the clock into each chunk; what is
"added" is the difference between reading it through the proxy and directly. anyclaude is run as install.sh installs it;
with --as-a-script, as the file itself is run, which Python compiles at each start."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = (  # as mistral.rs 0.9.2 sends each token
    b'data: {"id":"1","choices":[{"finish_reason":null,"index":0,"delta":{"content":"@%d ","role":"assistant"},'
    b'"logprobs":null}],"created":1795367692,"model":"default","system_fingerprint":"local",'
    b'"object":"chat.completion.chunk"}\n\n'
)
END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
LIMITS = {  # figure -> (its limit, unit)
    "added to the first delta": (3.0, "ms"),
    "added to a chunk at 200 chunks/s, median": (0.12, "ms"),
    "the same by a relay that changes nothing": (float("inf"), "ms"),  # what this machine charges for any relay
    "flat out": (30_000.0, "chunks/s"),
    "16 streams at once, p99 added to a chunk": (10.0, "ms"),
    "cancel in prefill": (300.0, "ms"),
    "cancel in stream": (300.0, "ms"),
    "resident memory": (40.0, "MB"),
    "resident memory after 16 streams": (float("inf"), "MB"),
    "start to the first answer": (0.3, "s"),
}


def stamp() -> bytes:
    """A chunk that says when it was made. The monotonic clock is one for all processes."""
    return framed(CHUNK % time.monotonic_ns())


def framed(content: bytes) -> bytes:
    """A chunk of an HTTP body."""
    return b"%x\r\n%s\r\n" % (len(content), content)


LEFT: list[int] = []  # when clients left, by the monotonic clock in ns


class Engine(BaseHTTPRequestHandler):
    """Does what the last user message says: "say", "flat N", "paced RATE N", "prefill" or "stream" (until one leaves)."""

    def do_GET(self) -> None:
        body = json.dumps(LEFT).encode()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        verb, *numbers = str(request["messages"][-1]["content"]).split()[-3:]
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if verb == "prefill" or "prefill" in numbers:
            self._until_left(silent=True)
        self.connection.sendall(HEAD)
        words = [verb, *numbers]
        if "stream" in words:
            self._until_left(silent=False)
        elif "flat" in words:
            block = stamp() * 1000
            for _ in range(int(words[-1]) // 1000):
                self.connection.sendall(block)
        elif "paced" in words:
            pause, due = 1 / int(words[-2]), time.monotonic()
            for _ in range(int(words[-1])):
                due += pause
                time.sleep(max(0.0, due - time.monotonic()))
                self.connection.sendall(stamp())
        else:
            self.connection.sendall(stamp())
        self.connection.sendall(framed(END) + framed(b""))

    def _until_left(self, silent: bool) -> None:
        with contextlib.suppress(OSError):
            while not select.select([self.connection], [], [], 0.02)[0]:
                if not silent:
                    self.connection.sendall(stamp())
        LEFT.append(time.monotonic_ns())
        raise ConnectionAbortedError

    def log_message(self, format: str, *args: object) -> None:
        pass


class EngineServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def body_of(order: str, size: int = 80_000) -> dict[str, Any]:
    """A request of `size` bytes, half tools and half conversation, that ends in `order`."""
    schema = {"type": "object", "properties": {"path": {"type": "string", "description": "A path. " * 40}}}
    tools = [{"name": f"Tool{number}", "description": "It does. " * 60, "input_schema": schema} for number in range(40)]
    filler = "The quick brown fox jumps over the lazy dog. " * ((size - len(json.dumps(tools))) // 45)
    return {
        "model": "m",
        "max_tokens": 9,
        "stream": True,
        "tools": tools,
        "messages": [{"role": "user", "content": filler + order}],
    }


class Client:
    """Sends to the proxy, or to the engine directly (`token` empty)."""

    def __init__(self, port: int, token: str = "") -> None:
        self.port, self.token = port, token

    def open(self, order: str) -> socket.socket:
        body = json.dumps(body_of(order)).encode()
        path = "/v1/messages" if self.token else "/v1/chat/completions"
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.token}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def first(self, order: str) -> float:
        """Seconds until the first delta."""
        started = time.monotonic()
        with self.open(order) as connection:
            seen = b""
            while b"@" not in seen:
                data = connection.recv(65536)
                if not data:
                    raise SystemExit(f"no answer: {seen.decode()}")
                seen += data
            return time.monotonic() - started

    def delays(self, order: str) -> list[float]:
        """For each chunk the milliseconds from its stamp to its arrival."""
        found, rest = [], b""
        with self.open(order) as connection:
            while data := connection.recv(1 << 18):
                now = time.monotonic_ns()
                rest = rest[-40:] + data
                found += [(now - int(number)) / 1e6 for number in re.findall(rb"@(\d+) ", rest)]
                rest = rest[rest.rfind(b"@") + 1 :] if b"@" in rest else rest
                if b"message_stop" in data or b"[DONE]" in data:
                    break
        return found

    def flat(self, count: int) -> float:
        """Chunks a second."""
        with self.open(f"flat {count}") as connection:
            seen, started = 0, 0.0
            while seen < count and (data := connection.recv(1 << 20)):
                started = started or time.monotonic()
                seen += data.count(b"@")
            return seen / (time.monotonic() - started)

    def cancel(self, order: str, engine: int) -> float:
        """Milliseconds from closing the connection to the engine's noticing."""
        before = len(left(engine))
        connection = self.open(order)
        if order == "stream":
            connection.recv(4096)
        time.sleep(0.3)
        closed = time.monotonic_ns()
        connection.close()
        deadline = time.monotonic() + 5
        while len(left(engine)) == before:
            if time.monotonic() > deadline:
                return float("inf")
            time.sleep(0.005)
        return (left(engine)[-1] - closed) / 1e6


def relay(engine: int) -> None:
    """The least that a proxy in Python can do: bytes read are bytes written."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client = listener.accept()[0]
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with client, socket.create_connection(("127.0.0.1", engine)) as upstream:
                poll, peers = select.poll(), {client.fileno(): upstream, upstream.fileno(): client}
                for one in (client, upstream):
                    poll.register(one, select.POLLIN)
                while True:
                    sink = peers[poll.poll()[0][0]]
                    data = peers[sink.fileno()].recv(1 << 16)
                    if not data:
                        break
                    sink.sendall(data)


def left(port: int) -> list[int]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return list(json.loads(connection.makefile("rb").read().rpartition(b"\r\n")[2]))


@contextlib.contextmanager
def started(*command: str, home: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HOME": home, "ANYCLAUDE_DEBUG": "0"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


def program(home: str) -> str:
    """The file to run."""
    if "--as-a-script" in sys.argv:
        return str(ROOT / "anyclaude.py")
    os.symlink(sys.executable, f"{home}/python3")  # what it compiles is for this Python
    environment = {"HOME": home, "PATH": f"{home}:{os.environ['PATH']}"}
    subprocess.run(["sh", str(ROOT / "install.sh")], env=environment, capture_output=True, check=True)
    return f"{home}/.local/bin/anyclaude"


@contextlib.contextmanager
def proxied(file: str, engine: int, home: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """The proxy before the engine -> (its process, a client of it)."""
    with started(file, "--proxy-only", "--base-url", f"http://127.0.0.1:{engine}/v1", home=home) as process:
        assert process.stdout is not None
        url, token = (process.stdout.readline().strip().partition("=")[2] for _ in range(2))
        yield process, Client(int(url.rpartition(":")[2]), token)


def resident(pid: int) -> float:
    """Megabytes."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) / 1024


def measure(quick: bool) -> dict[str, float]:
    """Every figure of LIMITS."""
    found: dict[str, float] = {}
    rounds = 5 if quick else 40
    with tempfile.TemporaryDirectory() as home, started(__file__, "--engine", home=home) as server:
        assert server.stdout is not None
        engine = int(server.stdout.readline())
        direct = Client(engine)
        file = program(home)
        starts = []
        for _ in range(1 if quick else 5):
            begin = time.monotonic()
            with proxied(file, engine, home) as (_, client):
                client.first("say")
                starts.append(time.monotonic() - begin)
        found["start to the first answer"] = statistics.median(starts)
        with proxied(file, engine, home) as (process, client):
            for one in (client, direct):  # both warm
                one.first("say")
            pairs = [(client.first("say"), direct.first("say")) for _ in range(rounds)]
            found["added to the first delta"] = 1e3 * (
                statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs)
            )
            with started(__file__, "--relay", str(engine), home=home) as relaying:
                assert relaying.stdout is not None
                ways = (client, direct, Client(int(relaying.stdout.readline())))
                delays: list[list[float]] = [[], [], []]
                for _ in range(1 if quick else 6):  # in turns: a machine is not always equally fast
                    for way, found_here in zip(ways, delays):
                        found_here += way.delays("paced 200 200")
                through, around, least = map(statistics.median, delays)
            found["added to a chunk at 200 chunks/s, median"] = through - around
            found["the same by a relay that changes nothing"] = least - around
            found["flat out"] = client.flat(20_000 if quick else 200_000)
            found["resident memory"] = resident(process.pid)
            found["16 streams at once, p99 added to a chunk"] = many(client, quick) - many(direct, quick)
            for order in ("prefill", "stream"):
                found[f"cancel in {order}"] = max(client.cancel(order, engine) for _ in range(1 if quick else 5))
            found["resident memory after 16 streams"] = resident(process.pid)
    return found


def many(client: Client, quick: bool) -> float:
    """The 99th percentile of the delay of a chunk, with 16 streams of 50 chunks/s."""
    delays: list[float] = []
    order = f"paced 50 {50 if quick else 250}"
    threads = [threading.Thread(target=lambda: delays.extend(client.delays(order))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.quantiles(delays, n=100)[98]


def main() -> int:
    if sys.argv[1:] == ["--engine"]:
        server = EngineServer(("127.0.0.1", 0), Engine)
        print(server.server_address[1], flush=True)
        server.serve_forever()
    if sys.argv[1:2] == ["--relay"]:
        relay(int(sys.argv[2]))
    found = measure("--quick" in sys.argv)
    print(
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}, request of 80 kB"
    )
    worse = 0
    for name, (limit, unit) in LIMITS.items():
        good = found[name] > limit if unit == "chunks/s" else found[name] < limit
        worse += not good
        wanted = "" if limit == float("inf") else ("over" if unit == "chunks/s" else "under") + f" {limit:,g} {unit}"
        print(f"{name:42} {found[name]:>10,.2f} {unit:9} {wanted}{'' if good else '   MISSED'}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
