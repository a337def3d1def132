"""Section 8: the proxy over real sockets, in front of an engine that behaves as it is told."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fake_engine import FakeEngine, chunk, fake_engine, says
from test_reply import assert_legal
from tool_formats import CODE, WRITTEN

import anyclaude
from anyclaude import Proxy, Target

BASH = {"name": "Bash", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}
REQUEST = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def proxy_for(url: str, level: int = 0, **target: Any) -> Iterator[Proxy]:
    with Proxy(0, Target(url, "tiny", **target), level) as proxy:
        yield proxy


@contextlib.contextmanager
def serving(*answers: Any) -> Iterator[tuple[Proxy, FakeEngine]]:
    """A proxy before an engine that gives these answers in turn, the last one for ever."""
    queued = list(answers)
    with (
        fake_engine(lambda request: queued.pop(0) if len(queued) > 1 else queued[0]) as engine,
        proxy_for(engine.url) as proxy,
    ):
        yield proxy, engine


def ask(
    proxy: Proxy,
    method: str = "POST",
    path: str = "/v1/messages",
    body: Any = REQUEST,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.server_address[1], timeout=20)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Authorization": f"Bearer {proxy.token}"} if headers is None else headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, dict(reply.headers), content


def events_of(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in content.decode().split("\n") if line.startswith("data: ")]


def connect(proxy: Proxy, body: dict[str, Any]) -> socket.socket:
    """A raw connection with a request on its way."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", proxy.server_address[1]), timeout=20)
    connection.sendall(
        b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: %s\r\nContent-Length: %d\r\n\r\n%s"
        % (proxy.token.encode(), len(data), data)
    )
    return connection


def test_a_streamed_reply_and_a_whole_one_say_the_same() -> None:
    with serving(says("Hello", " there")) as (proxy, engine):
        status, headers, content = ask(proxy, body={**REQUEST, "stream": True})
        assert (status, headers["Content-Type"]) == (200, "text/event-stream")
        events = events_of(content)
        assert_legal(events)
        whole = json.loads(ask(proxy)[2])
        assert whole["content"] == [{"type": "text", "text": "Hello there"}] and whole["usage"]["input_tokens"] == 11
        assert (
            "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
            == "Hello there"
        )
        assert all(request["stream"] and request["model"] == "default" for request in engine.requests)


def test_a_call_in_the_models_text_reaches_the_client_as_tool_use() -> None:
    with serving(says(*'<tool_call>{"name": "Bash", "arguments": {"command": "ls"}}</tool_call>')) as (proxy, engine):
        whole = json.loads(ask(proxy, body={**REQUEST, "tools": [BASH]})[2])
        assert whole["content"][0]["input"] == {"command": "ls"} and whole["stop_reason"] == "tool_use"
        assert engine.requests[0]["tool_choice"] == "none"
        forbidden = json.loads(ask(proxy, body={**REQUEST, "tools": [BASH], "tool_choice": {"type": "none"}})[2])
        assert forbidden["content"][0]["type"] == "text"


def test_only_the_sessions_token_is_served() -> None:
    with serving(says("x")) as (proxy, engine):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}, {"Authorization": proxy.token[:-1]}):
            status, _, content = ask(proxy, headers=headers)
            assert status == 401 and json.loads(content)["error"]["type"] == "authentication_error"
        assert ask(proxy, headers={"x-api-key": proxy.token})[0] == 200
        assert len(engine.requests) == 1


def test_the_other_paths_of_the_client_are_served_and_the_rest_is_a_404_that_goes_nowhere() -> None:
    with serving(says("x")) as (proxy, engine):
        assert ask(proxy, "GET", "/health", None, {})[0] == 200
        assert ask(proxy, "HEAD", "/", None, {})[::2] == (200, b"")
        assert ask(proxy, "HEAD", "/api/hello", None, {})[0] == 200
        assert json.loads(ask(proxy, "GET", "/v1/models?limit=1000", None)[2])["data"][0]["id"] == "tiny"
        assert json.loads(ask(proxy, path="/v1/messages/count_tokens?beta=true")[2])["input_tokens"] > 0
        for method, path in (
            ("POST", "/api/event_logging/batch"),
            ("GET", "/v1/messages"),
            ("PUT", "/v1/messages"),
            ("DELETE", "/x"),
            ("GET", "/"),
        ):
            status, headers, content = ask(proxy, method, path, b"{}")
            assert (status, headers["Content-Type"]) == (404, "application/json")
            assert json.loads(content)["error"]["type"] == "not_found_error"
        assert not engine.requests


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100000, 400),
        ({"messages": []}, 400),
        ({**REQUEST, "tools": 5}, 400),
    ],
)
def test_a_bad_request_is_a_400_in_the_clients_words(body: Any, status: int) -> None:
    with serving(says("x")) as (proxy, engine):
        answered, _, content = ask(proxy, body=body)
        assert answered == status and json.loads(content)["error"]["type"] == "invalid_request_error"
        assert not engine.requests


def test_a_request_that_is_too_large_is_refused_before_it_is_read() -> None:
    with serving(says("x")) as (proxy, _):
        status, headers, content = ask(
            proxy, body=b"", headers={"x-api-key": proxy.token, "Content-Length": str((64 << 20) + 1)}
        )
        assert headers["Connection"] == "close"  # the body is not read
        assert status == 413 and json.loads(content)["error"]["type"] == "request_too_large"


def test_one_connection_serves_one_request_after_the_other() -> None:
    with serving(says("x")) as (proxy, _):
        connection = http.client.HTTPConnection("127.0.0.1", proxy.server_address[1], timeout=20)
        for stream in (True, False, True):
            connection.request(
                "POST", "/v1/messages", json.dumps({**REQUEST, "stream": stream}), {"x-api-key": proxy.token}
            )
            assert b"x" in connection.getresponse().read()
        connection.close()


def test_a_request_that_is_sent_before_the_last_is_answered_waits_its_turn() -> None:
    go = threading.Event()

    def slow() -> Iterator[str]:
        assert go.wait(20)
        yield from says("one")

    with serving(slow(), says("two")) as (proxy, engine):
        connection = connect(proxy, {**REQUEST, "stream": True})
        assert engine.asked.wait(20)
        data = json.dumps(REQUEST).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nx-api-key: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        before = time.process_time()
        connection.sendall(head % (proxy.token.encode(), len(data), data))
        time.sleep(0.3)  # a busy loop would show in the time used
        assert time.process_time() - before < 0.2
        go.set()
        seen = b"".join(iter(lambda: connection.recv(65536), b""))
        assert seen.index(b'"text": "one"') < seen.index(b"message_stop") < seen.index(b'"text": "two"')
        connection.close()


def test_an_engine_that_is_down_is_an_overload_which_the_client_tries_again() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with proxy_for(f"http://127.0.0.1:{taken.getsockname()[1]}/v1") as proxy:
            status, _, content = ask(proxy)
            assert status == 529 and json.loads(content)["error"]["type"] == "overloaded_error"


def test_an_engine_whose_name_no_host_can_have_is_an_overload_too() -> None:
    with proxy_for(f"http://{'a' * 64}/v1") as proxy:
        status, _, content = ask(proxy)
        assert status == 529 and "does not answer at http://aaa" in json.loads(content)["error"]["message"]


class ShareThatSays:
    """A share in an engine; `restarts`: whether that is being started again, each time it is asked."""

    def __init__(self, *restarts: bool) -> None:
        self.restarts = list(restarts)

    def trouble(self) -> str:
        return ""

    def hear(self) -> None: ...

    def is_started_again(self) -> bool:
        return self.restarts.pop(0)


@contextlib.contextmanager
def proxy_with(share: ShareThatSays, port: int) -> Iterator[Proxy]:
    target = Target(f"http://127.0.0.1:{port}/v1", "tiny")
    with Proxy(0, target, share=cast(anyclaude.EngineShare, share)) as proxy:
        yield proxy


def test_an_engine_that_runs_and_does_not_listen_is_an_overload_after_a_second_try() -> None:
    share = ShareThatSays(False, False)  # asked before each try
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with proxy_with(share, taken.getsockname()[1]) as proxy:
            assert ask(proxy)[0] == 529 and not share.restarts


def test_while_the_engine_is_started_again_whatever_listens_there_gets_no_prompt() -> None:
    share = ShareThatSays(*[True] * 3, False)
    with fake_engine(lambda _: (says("x"), seen.append(len(share.restarts)))[0]) as engine:
        seen: list[int] = []
        with proxy_with(share, engine.server_address[1]) as proxy:
            assert ask(proxy)[0] == 200 and seen == [0]


OVERFLOW = "Prompt sequence length is greater than 4096, perhaps consider using `truncate_sequence`?"


@pytest.mark.parametrize(
    "answer",
    [
        (422, json.dumps({"message": OVERFLOW})),
        [f"data: {OVERFLOW}\n\n"],
        [f'data: {{"error": {{"message": "{OVERFLOW}"}}}}\n\n', "data: [DONE]\n\n"],
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_overflow_is_an_http_400_however_the_engine_tells_it(answer: Any, stream: bool) -> None:
    with serving(answer) as (proxy, _):
        status, _, content = ask(proxy, body={**REQUEST, "stream": stream})
        assert (
            status == 400
            and json.loads(content)["error"]["message"] == "prompt is too long: 4097 tokens > 4096 maximum"
        )


def test_an_error_after_the_first_word_is_an_error_event() -> None:
    with serving([chunk("half"), "data: kaboom\n\n"]) as (proxy, _):
        events = events_of(ask(proxy, body={**REQUEST, "stream": True})[2])
        assert_legal(events)
        assert events[-1]["error"] == {"type": "api_error", "message": "the engine: kaboom"}


@pytest.mark.parametrize("answer", [[chunk("half")], [chunk("half"), 'data: {"choi'], []])
def test_a_stream_without_its_end_is_an_error(answer: list[str]) -> None:
    with serving(answer) as (proxy, _):
        assert ask(proxy)[0] == 500
        content = ask(proxy, body={**REQUEST, "stream": True})[2]
        assert b"cut off" in content


def test_pings_come_while_the_engine_reads_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anyclaude, "FIRST_WORD_SECONDS", 0.05)
    monkeypatch.setattr(anyclaude, "PING_SECONDS", 0.05)
    go = threading.Event()

    def slow() -> Iterator[str]:
        assert go.wait(20)
        yield from says("late")

    with serving(slow()) as (proxy, _):
        connection = connect(proxy, {**REQUEST, "stream": True})
        seen = b""
        while seen.count(b"event: ping") < 3:
            seen += connection.recv(65536)
        assert seen.index(b"event: message_start") < seen.index(b"event: ping")
        go.set()
        while b"message_stop" not in seen:
            seen += connection.recv(65536)
        assert_legal([event for event in events_of(seen) if event["type"] != "ping"])
        connection.close()


def test_an_engine_that_stays_silent_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FIRST_WORD_SECONDS", 0.02), ("PING_SECONDS", 0.02)):
        monkeypatch.setattr(anyclaude, name, value)
    stop = threading.Event()

    def silent() -> Iterator[str]:
        stop.wait(20)
        yield ""

    with serving(silent()) as (proxy, _):
        proxy.target = dataclasses.replace(proxy.target, stall=0.2)
        assert events_of(ask(proxy, body={**REQUEST, "stream": True})[2])[-1]["error"]["message"].startswith(
            "the engine was silent"
        )
        stop.set()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_leaves_the_engine_is_left_at_once(streaming: bool, stream: bool) -> None:
    """Esc, while the prompt is read and while the answer is written."""

    def answer() -> Iterator[str]:
        if streaming:
            yield chunk("first")
        while True:  # an engine that sees the closed connection only when it writes, like the real one
            yield ": keep-alive\n\n"
            time.sleep(0.01)

    with serving(answer()) as (proxy, engine):
        connection = connect(proxy, {**REQUEST, "stream": stream})
        assert engine.asked.wait(10)
        if streaming and stream:
            assert connection.recv(65536)
        connection.close()
        started = time.monotonic()
        assert engine.left.wait(10)
        assert time.monotonic() - started < 0.3


def received(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    assert data, "the proxy closed the connection"
    return data


def framed(content: str, size: str = "%x") -> bytes:
    """A chunk of an HTTP body."""
    data = content.encode()
    return (size % len(data)).encode() + b"\r\n" + data + b"\r\n"


@contextlib.contextmanager
def asked(listener: socket.socket) -> Iterator[socket.socket]:
    """An engine's side of a request, which it has begun to answer in chunks."""
    with listener.accept()[0] as connection:
        connection.recv(1 << 20)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        yield connection


def in_turn(reads: list[bytes]) -> tuple[list[dict[str, Any]], bytes]:
    """An engine sends these, each when the client has what came before -> the client's events, and what was parsed."""
    seen, parsed, feed, got = b"", list[bytes](), anyclaude.ReplyStream.feed, threading.Event()

    def serve() -> None:
        with asked(listener) as connection, contextlib.suppress(OSError):
            for read in reads:
                got.clear()
                connection.sendall(read)
                got.wait(10 if b"}\n\n\r\n" in read else 0.05)  # what is not whole is not told

    def noted(stream: anyclaude.ReplyStream, data: bytes, last: bool = False) -> list[dict[str, Any]]:
        parsed.append(data)
        return feed(stream, data, last)

    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setattr(anyclaude.ReplyStream, "feed", noted)
        thread = threading.Thread(target=serve)
        thread.start()
        with proxy_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as proxy:
            with connect(proxy, {**REQUEST, "stream": True}) as connection:
                while not seen.endswith(b"\r\n0\r\n\r\n"):
                    seen += received(connection)
                    got.set()
            thread.join()
    events = events_of(anyclaude.ChunkedBody().feed(seen.partition(b"\r\n\r\n")[2]))
    assert_legal(events)
    return events, b"".join(parsed)


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")


END = framed(chunk("", "stop") + "data: [DONE]\n\n") + b"0\r\n\r\n"


@pytest.mark.parametrize("size", ["%x", "%X"])  # mistral.rs' HTTP library writes large letters
def test_a_chunk_like_one_before_goes_to_the_client_unparsed(size: str) -> None:
    first, *others = (
        framed(chunk("TEXT").replace("TEXT", word), size) for word in ["one", " two", " \u00fc\u4e2d", "4%b"]
    )
    events, parsed = in_turn([first, *others, END])
    assert text_of(events) == "one two \u00fc\u4e2d4%b" and events[-2]["usage"]["output_tokens"] == 4
    assert b"one" in parsed and not any(word.encode() in parsed for word in ["two", "\u00fc", "4%b"])


ONE, TWO = framed(chunk("one")), framed(chunk("two"))


@pytest.mark.parametrize(
    "reads",
    [
        [framed(chunk("one"), "00%x"), TWO],
        [framed(chunk("one"), "%x;a=b"), TWO],
        [ONE + TWO],
        [framed(chunk("one") + chunk("two"))],
        [ONE + TWO[:9], TWO[9:]],
        # a frame that is the content of one that was begun before
        [ONE + b"%x\r\n" % len(TWO), TWO, b"\r\n" + framed(":" * 300 + "\n\n")],
        *(
            [(ONE + TWO)[:cut], (ONE + TWO)[cut:]]
            for cut in (1, 2, 3, 4, 20, 70, len(ONE) - 2, len(ONE) - 1, len(ONE) + 2)
        ),
        [framed(chunk("one")[:-1]), framed("\n" + chunk("two"))],
        [framed(": comment\n\n" + chunk("one")), TWO],
        [framed(chunk("one", something="else")), TWO],
        [framed(chunk("one", refusal=None).replace('"one"', '"\\u006fne"')), TWO],
    ],
)
def test_known_chunks_in_any_frame_and_cut_anywhere_say_the_same(reads: list[bytes]) -> None:
    events, _ = in_turn([framed(chunk("first ")), framed(chunk("second ")), *reads, framed(chunk(" last")), END])
    assert text_of(events) == "first second onetwo last" and events[-1]["type"] == "message_stop"


@pytest.mark.parametrize("size", ["1", "-%x", "0", "x%x", "", "%x\r\n"])
def test_a_known_chunk_in_a_wrong_frame_is_no_text_but_an_error(size: str) -> None:
    size = size % len(chunk("one")) if "%" in size else size
    events, _ = in_turn([framed(chunk("first ")), size.encode() + ONE[ONE.index(b"\r\n") :]])
    assert text_of(events) == "first " and events[-1]["type"] == "error"


def test_in_a_long_run_of_known_chunks_no_ping_comes_and_behind_it_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anyclaude, "PING_SECONDS", 0.6)
    pinged, last = threading.Event(), [0.0]

    def answer() -> Iterator[str]:
        for _ in range(80):
            yield chunk("word ")
            time.sleep(0.01)
        last[0] = time.monotonic() - 0.01
        assert pinged.wait(10)
        yield from says("end")

    with serving(answer()) as (proxy, _), connect(proxy, {**REQUEST, "stream": True}) as connection:
        seen = b""
        while b"event: message_stop" not in seen:
            seen += received(connection)
            if b"event: ping" in seen:
                assert seen.count(b"word ") == 80
                assert pinged.is_set() or time.monotonic() - last[0] > 0.5
                pinged.set()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pause", [0.01, 0.09, 0.11, 5])
def test_a_client_that_leaves_between_known_chunks_is_noticed_at_once(
    pause: float, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`half`: it still listens, so that what is sent does not fail."""
    monkeypatch.setenv("HOME", str(tmp_path))
    left = threading.Event()

    def serve() -> None:
        with asked(listener) as connection, contextlib.suppress(OSError):
            for number in range(1000):
                connection.sendall(framed(chunk("word ")))
                if select.select([connection], [], [], 0.01 if number < 3 else pause)[0]:
                    break
        left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with proxy_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", 1) as proxy:
            connection, seen = connect(proxy, {**REQUEST, "stream": True}), b""
            while seen.count(b"word ") < 4:
                seen += received(connection)
            connection.shutdown(socket.SHUT_WR) if half else connection.close()
            started = time.monotonic()
            assert left.wait(10)
            assert time.monotonic() - started < 0.3
            connection.close()
            thread.join()
    assert "Traceback" not in (tmp_path / ".anyclaude" / "logs" / "debug.log").read_text()


@pytest.mark.parametrize("pause", [0.02, 0.12, 0.3])
def test_an_engine_that_dies_between_known_chunks_is_told_as_that(pause: float) -> None:
    def serve() -> None:
        with asked(listener) as connection:
            for _ in range(4):
                connection.sendall(framed(chunk("word ")))
                time.sleep(0.02)
            time.sleep(pause - 0.02)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with proxy_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as proxy:
            events = events_of(ask(proxy, body={**REQUEST, "stream": True})[2])
        thread.join()
    assert "word word" in text_of(events)  # a reset may take what was not yet read
    assert "ConnectionResetError" in events[-1]["error"]["message"]


class Share:
    """Counts how often the engine was heard."""

    heard = 0

    def is_started_again(self) -> bool:
        return False

    def hear(self) -> None:
        self.heard += 1

    def restart(self, seconds: float) -> None:
        raise AssertionError("a healthy engine was ended")


def test_an_engine_is_heard_in_a_long_run_of_known_chunks_and_not_taken_for_silent_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anyclaude, "PING_SECONDS", 0.1)
    share, heard = Share(), list[int]()

    def answer() -> Iterator[str]:
        for _ in range(130):
            yield chunk("word ")
            time.sleep(0.01)
            heard.append(share.heard)
        time.sleep(0.5)  # and the run took longer than `stall`
        yield from says("end")

    with (
        fake_engine(lambda request: answer()) as engine,
        Proxy(0, Target(engine.url, "tiny", stall=1), share=cast(Any, share)) as proxy,
    ):
        events = events_of(ask(proxy, body={**REQUEST, "stream": True})[2])
    assert events[-1]["type"] == "message_stop" and heard[-1] >= heard[20] + 5


def test_at_level_three_the_debug_log_has_known_chunks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def answer() -> Iterator[str]:
        for number in range(30):
            yield chunk(f"word{number} ")
            time.sleep(0.01)
        yield from says("end")

    with fake_engine(lambda request: answer()) as engine, proxy_for(engine.url, 3) as proxy:
        ask(proxy, body={**REQUEST, "stream": True})
    log = (tmp_path / ".anyclaude" / "logs" / "debug.log").read_text()
    assert all(f"word{number} " in log.partition("to the client")[2] for number in range(30))


@pytest.mark.parametrize("status", [413, 401])
def test_an_engine_that_refuses_a_request_before_it_has_read_it_is_understood(status: int) -> None:
    """Else the client would send it again and again."""
    body = b'{"error": {"message": "no way"}}'

    def refuse(engine: socket.socket) -> None:
        connection = engine.accept()[0]
        with connection:
            connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    with socket.create_server(("127.0.0.1", 0)) as engine:
        thread = threading.Thread(target=refuse, args=(engine,))
        thread.start()
        long = [{"role": "user", "content": "x" * (12 << 20)}]
        with proxy_for(f"http://127.0.0.1:{engine.getsockname()[1]}/v1") as proxy:
            got, _, content = ask(proxy, body={**REQUEST, "messages": long})
        thread.join()
    assert got == {413: 413, 401: 400}[status] and "no way" in json.loads(content)["error"]["message"]


def test_many_streams_at_once_do_not_mix() -> None:
    with (
        fake_engine(lambda request: says(*(request["messages"][0]["content"] + " ") * 20)) as engine,
        proxy_for(engine.url) as proxy,
    ):
        answers: dict[int, Any] = {}
        threads = [
            threading.Thread(
                target=lambda n=n: answers.update(
                    {n: json.loads(ask(proxy, body={**REQUEST, "messages": [{"role": "user", "content": f"n{n}"}]})[2])}
                )
            )
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(answers[n]["content"][0]["text"] == f"n{n} " * 20 for n in range(16))


def test_a_remote_server_gets_its_key_and_its_model_name() -> None:
    with fake_engine(lambda request: says("x")) as engine, proxy_for(engine.url, model="big", key="sesame") as proxy:
        ask(proxy)
        assert engine.headers[0]["Authorization"] == "Bearer sesame" and engine.requests[0]["model"] == "big"


def test_the_debug_log_is_private_and_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with fake_engine(lambda request: says("x")) as engine, proxy_for(engine.url, 3, key="sesame") as proxy:
        ask(proxy, body={**REQUEST, "messages": [{"role": "user", "content": f"my token is {proxy.token} and sesame"}]})
        ask(proxy, path="/nothing")
    log = tmp_path / ".anyclaude" / "logs" / "debug.log"
    text = log.read_text()
    assert "POST /v1/messages" in text and "404" in text and "[DONE]" in text
    assert proxy.token not in text and "sesame" not in text
    assert log.stat().st_mode & 0o777 == 0o600 and log.parent.stat().st_mode & 0o777 == 0o700


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(anyclaude.AnyclaudeError, match=str(port)):
            Proxy(port, Target("http://127.0.0.1:1/v1"))


def test_a_defect_of_ours_is_an_error_for_the_client_and_a_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(anyclaude, "callable_tools", lambda request: 1 // 0)
    with proxy_for("http://127.0.0.1:1/v1", 1) as proxy:
        status, _, content = ask(proxy)
    assert status == 500 and b"ZeroDivisionError" in content
    assert "Traceback" in (tmp_path / ".anyclaude" / "logs" / "debug.log").read_text()


def test_a_closed_proxy_has_no_thread_left() -> None:
    before = threading.active_count()
    with proxy_for("http://127.0.0.1:1/v1"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


ODD = [5, True, "x", [1], {"a": 1}, None, [[None]]]


@pytest.mark.parametrize("field", ["tool_calls", "content", "reasoning_content", "usage", "finish_reason", "choices"])
@pytest.mark.slow
def test_odd_answers_of_the_engine_end_in_a_whole_stream(field: str) -> None:
    for odd in ODD:
        body: dict[str, Any] = {"choices": [{"delta": {"content": "a"}}]}
        if field in ("usage", "choices"):
            body[field] = {"prompt_tokens": odd, "completion_tokens": odd} if field == "usage" else odd
        else:
            (body["choices"][0] if field == "finish_reason" else body["choices"][0]["delta"])[field] = odd
        with serving([chunk("first"), f"data: {json.dumps(body)}\n\n", *says("last")]) as (proxy, _):
            assert_legal(events_of(ask(proxy, body={**REQUEST, "stream": True})[2]))
    deep = "data: " + '{"choices": [' * 30000 + "\n\n"
    with serving([chunk("first"), deep]) as (proxy, _):
        assert_legal(events_of(ask(proxy, body={**REQUEST, "stream": True})[2]))


@pytest.mark.parametrize(
    "key", ["messages", "system", "tools", "tool_choice", "stop_sequences", "max_tokens", "temperature", "stream"]
)
def test_odd_requests_are_answered_or_refused_but_never_break_anything(key: str) -> None:
    with serving(says("x")) as (proxy, _):
        for odd in [*ODD, float("nan"), [{"role": ["user"]}], [{"role": "user", "content": [{"type": ["x"]}]}]]:
            assert ask(proxy, body={**REQUEST, key: odd})[0] in (200, 400)
        block = {"type": "tool_result", "tool_use_id": 5, "content": [{"type": None}], "is_error": "x"}
        assert ask(proxy, body={**REQUEST, "messages": [{"role": "user", "content": [block]}]})[0] == 200


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_an_interim_answer_and_a_last_line_without_its_end_are_read(size: int) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        head = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        answer = head + chunk("a").encode() + b"data: Engine died"
        for at in range(0, len(answer), size):
            connection.sendall(answer[at : at + size])
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass  # what is unread when it closes would cut the answer off
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: serve(listener.accept()[0]))
        thread.start()
        with proxy_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as proxy:
            events = events_of(ask(proxy, body={**REQUEST, "stream": True})[2])
        thread.join()
    assert events[-1]["error"]["message"] == "the engine: Engine died"


def test_a_body_in_chunks_is_read_wherever_it_is_cut() -> None:
    data = b"5\r\nhello\r\n1;x=y\r\n\n\r\nA\r\n0123456789\r\n0\r\n\r\n"
    for size in range(1, len(data)):
        body = anyclaude.ChunkedBody()
        assert b"".join(body.feed(data[at : at + size]) for at in range(0, len(data), size)) == b"hello\n0123456789"
        assert body.ended


@pytest.mark.parametrize("stream", [True, False])
def test_a_search_that_cannot_be_made_gets_an_honest_answer_without_the_engine(stream: bool) -> None:
    with serving(says("Made up.")) as (proxy, engine):
        tools = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]
        status, _, content = ask(proxy, body={**REQUEST, "tools": tools, "stream": stream})
        assert status == 200 and engine.requests == []
        assert b"web search is not available here" in content and b"end_turn" in content
        ask(proxy, body={**REQUEST, "tools": [*tools, BASH]})
        assert [tool["function"]["name"] for tool in engine.requests[0]["tools"]] == ["Bash"]


def padded(words: int) -> dict[str, Any]:
    return {**REQUEST, "messages": [{"role": "user", "content": "lorem ipsum dolor " * words}]}


def test_a_prompt_that_cannot_fit_is_refused_without_the_engine() -> None:
    with fake_engine(lambda request: says("x")) as engine, proxy_for(engine.url, window=1000) as proxy:
        status, _, content = ask(proxy, body=padded(2000))
        assert status == 400 and engine.requests == []
        assert re.search(rb"prompt is too long: \d+ tokens > 1000 maximum", content)
        assert ask(proxy, body={**padded(100), "max_tokens": 5000})[0] == 200
        assert 300 < engine.requests[0]["max_tokens"] < 900


def counted(answer: Any) -> int:
    return int(json.loads(answer[2])["input_tokens"])


def test_after_three_replies_tokens_are_counted_within_five_percent_and_in_time(tmp_path: Path) -> None:
    def tokens(request: dict[str, Any]) -> int:  # this engine's tokenizer: 10 a message, 2 a word
        return sum(10 + 2 * len(str(message["content"]).split()) for message in request["messages"])

    memory = tmp_path / "tokens.json"
    with fake_engine(lambda request: says("x", prompt_tokens=tokens(request))) as engine:
        with Proxy(0, Target(engine.url, "tiny"), memory=memory) as proxy:
            for words in (200, 700, 1500):
                ask(proxy, body=padded(words))
            asked = len(engine.requests)
            for words in (300, 1000, 1800, 4000):
                count = counted(ask(proxy, path="/v1/messages/count_tokens", body=padded(words)))
                assert abs(count / tokens(padded(words)) - 1) < 0.05
            assert len(engine.requests) == asked
        assert memory.stat().st_mode & 0o777 == 0o600 and "lorem" not in memory.read_text()
        with Proxy(0, Target(engine.url, "tiny"), memory=memory) as proxy:  # the next session knows it still
            count = counted(ask(proxy, path="/v1/messages/count_tokens", body=padded(1000)))
            assert abs(count / tokens(padded(1000)) - 1) < 0.05
            large = {**padded(5000), "tools": [BASH] * 100}
            took = []
            for _ in range(5):
                started = time.monotonic()
                ask(proxy, path="/v1/messages/count_tokens", body=large)
                took.append(time.monotonic() - started)
            assert min(took) < 0.02
        memory.write_text("{broken")
        with Proxy(0, Target(engine.url, "tiny"), memory=memory) as proxy:
            assert ask(proxy, body=padded(200))[0] == 200


def test_an_exact_count_of_the_engine_is_used_if_it_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        if "slow" in str(request["messages"]):
            time.sleep(0.2)
        return (200, '{"input_tokens": 4321}') if request["system"] else (500, "broken")

    with fake_engine(answer) as engine, proxy_for(engine.url, counts=True) as proxy:
        path = "/v1/messages/count_tokens"
        monkeypatch.setattr(anyclaude, "COUNT_SECONDS", 10)
        assert counted(ask(proxy, path=path, body={**REQUEST, "system": "S"})) == 4321
        assert engine.requests[0]["messages"] == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        assert counted(ask(proxy, path=path)) < 200
        monkeypatch.setattr(anyclaude, "COUNT_SECONDS", 0.01)
        slow = {**REQUEST, "system": "S", "messages": [{"role": "user", "content": "slow"}]}
        started = time.monotonic()
        assert counted(ask(proxy, path=path, body=slow)) < 200 and time.monotonic() - started < 0.15


def test_stops_and_single_calls_are_kept_through_the_proxy() -> None:
    call = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'
    with serving(says("One. STOP two"), says(call, call)) as (proxy, engine):
        message = json.loads(ask(proxy, body={**REQUEST, "stop_sequences": ["STOP"]})[2])
        assert (message["content"][0]["text"], message["stop_sequence"]) == ("One. ", "STOP")
        assert engine.requests[0]["stop"] == ["STOP"]
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        message = json.loads(ask(proxy, body={**REQUEST, "tools": [BASH], "tool_choice": choice})[2])
        assert len(message["content"]) == 1


def test_an_engine_that_goes_away_before_it_answers_is_an_overload() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drop() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.close()

        thread = threading.Thread(target=drop)
        thread.start()
        with proxy_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as proxy:
            assert ask(proxy)[0] == 529
        thread.join()
    with serving((503, '{"error":{"message":"Loading model","type":"unavailable_error","code":503}}')) as (proxy, _):
        status, _, content = ask(proxy, body={**REQUEST, "stream": True})
        assert status == 529 and b"Loading model" in content and b"overloaded_error" in content


SDK_REPLIES: dict[str, tuple[list[str], list[str], str]] = {
    "text": (says("Hello", " there"), ["text"], "end_turn"),
    "thinking and text": ([chunk(None, reasoning_content="hm"), *says("Yes.")], ["thinking", "text"], "end_turn"),
    "calls": (
        says(
            "I look.", *WRITTEN["hermes"]("Bash", {"command": CODE}), "\n", WRITTEN["glm-4.5"]("Bash", {"command": "x"})
        ),
        ["text", "tool_use", "tool_use"],
        "tool_use",
    ),
    "a call of the engine": (
        [chunk(None, tool_calls=[{"function": {"name": "Bash", "arguments": "{}"}}]), *says()],
        ["tool_use"],
        "tool_use",
    ),
    "cut off": (
        says(*WRITTEN["qwen3-coder"]("Bash", {"command": CODE})[:90], finish="length"),
        ["tool_use"],
        "max_tokens",
    ),
    "stopped": (says("One. ", "STOP"), ["text"], "stop_sequence"),
    "nothing": (says(""), [], "end_turn"),
}


@pytest.mark.slow
def test_the_stream_helper_of_anthropics_sdk_reads_every_reply() -> None:
    import anthropic  # takes a second, which each worker would wait for

    for name, (lines, kinds, reason) in SDK_REPLIES.items():
        with serving(lines) as (proxy, _):
            client = anthropic.Anthropic(base_url=proxy.url, auth_token=proxy.token, api_key=None, max_retries=0)
            ask_for: dict[str, Any] = {**REQUEST, "tools": [BASH], "stop_sequences": ["STOP"]}
            with client.messages.stream(**ask_for) as stream:
                events = [event.type for event in stream]
                message = stream.get_final_message()
            whole = client.messages.create(**ask_for)
        assert [block.type for block in message.content] == kinds and message.stop_reason == reason, name
        assert events[0] == "message_start" and events[-1] == "message_stop", name
        if reason != "max_tokens":
            assert [block.type for block in whole.content] == kinds, name
            strip = {"id"}
            for one, other in zip(message.content, whole.content):
                assert one.model_dump(exclude=strip) == other.model_dump(exclude=strip), name
        if name == "calls":
            assert message.content[1].input == {"command": CODE}


@pytest.mark.slow
def test_errors_reach_the_sdk_as_its_own() -> None:
    import anthropic

    with serving((503, "Loading model"), (422, "Prompt sequence length is greater than 9"), [chunk("half")]) as (
        proxy,
        _,
    ):
        client = anthropic.Anthropic(base_url=proxy.url, auth_token=proxy.token, api_key=None, max_retries=0)
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(**REQUEST)
        assert caught.value.status_code == 529
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            client.messages.create(**REQUEST)
        with pytest.raises(anthropic.APIStatusError), client.messages.stream(**REQUEST) as stream:
            stream.get_final_message()


@pytest.mark.slow
def test_the_benchmark_measures_everything_and_nothing_is_far_off() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "bench.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    figures = dict(re.findall(r"(?m)^(\S.*?\S) {2,}(-?[\d,]+\.\d+) ", done.stdout))
    assert len(figures) == 10, done.stdout + done.stderr
    for name, limit in {"added to the first delta": 50, "cancel in prefill": 300, "cancel in stream": 300}.items():
        assert float(figures[name]) < limit, done.stdout
    assert float(figures["flat out"].replace(",", "")) > 3000, done.stdout  # other tests run beside it
    assert float(figures["resident memory"]) < 60, done.stdout


def raw_engine(answer: bytes, hold: threading.Event) -> socket.socket:
    """An engine that sends these bytes and then keeps the connection open."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 20)
            connection.sendall(answer)
            hold.wait(20)

    threading.Thread(target=serve, daemon=True).start()
    return listener


OVERFLOW = b'{"error": {"message": "Prompt sequence length is greater than 4096"}}'


@pytest.mark.parametrize(
    ("answer", "status", "word"),
    [
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nboom", 500, b"boom"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(OVERFLOW), OVERFLOW), 400, b"prompt is too long"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + chunk("Hi", "stop").encode(), 200, b"end_turn"),
    ],
)
def test_an_engine_that_keeps_the_connection_open_does_not_keep_the_client_waiting(
    answer: bytes, status: int, word: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anyclaude, "PING_SECONDS", 0.1)
    hold = threading.Event()
    with raw_engine(answer, hold) as listener, proxy_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as proxy:
        started = time.monotonic()
        found, _, content = ask(proxy)
        hold.set()
        assert found == status and word in content and time.monotonic() - started < 3


@pytest.mark.slow
def test_a_prefill_behind_tls_is_waited_for_and_left(tmp_path: Path) -> None:
    """TLS 1.3 sends tickets first, so that there is something to read, and nothing to hand on."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = [*make.split(), "-keyout", str(key), "-out", str(certificate)]
    if not shutil.which("openssl") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("openssl cannot make a certificate here")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    left = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(2):
            connection = server.wrap_socket(listener.accept()[0], server_side=True)
            connection.recv(1 << 20)
            if number:
                with contextlib.suppress(OSError):
                    while connection.recv(1 << 20):
                        pass
                left.set()
            else:
                time.sleep(0.5)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + "".join(says("Hi")).encode())
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import anyclaude\n"
        "with anyclaude.Proxy(0, anyclaude.Target(sys.argv[2])) as proxy:\n"
        "    print(json.dumps([proxy.server_address[1], proxy.token]), flush=True)\n"
        "    sys.stdin.read()"
    )
    url = f"https://localhost:{listener.getsockname()[1]}/v1"
    command = [sys.executable, "-c", program, str(Path(anyclaude.__file__).parent), url]
    environment = {**os.environ, "SSL_CERT_FILE": str(certificate)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        port, token = json.loads(process.stdout.readline())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/v1/messages", json.dumps(REQUEST), {"x-api-key": token})
        assert b"Hi" in connection.getresponse().read()
        connection.request("POST", "/v1/messages", json.dumps(REQUEST), {"x-api-key": token})
        time.sleep(0.5)
        connection.close()
        assert left.wait(1)
        process.communicate("")
    listener.close()
