"""Section 7: OpenAI chunks -> Anthropic events."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from fake_engine import chunk, says
from hypothesis import given
from hypothesis import strategies as st

from anyclaude import ApiError, EventStream, Reply, ToolText, collect, encode_events, engine_error, read_chunk

TOOLS: dict[str, dict[str, Any]] = {"Bash": {"properties": {"command": {"type": "string"}}}, "Get": {}}
BASH_CALL = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'


def new_reply(**options: Any) -> Reply:
    numbers = itertools.count(1)
    reply = Reply("tiny", ToolText(TOOLS), lambda: str(next(numbers)), **options)
    reply.prompt = 7
    return reply


def play(lines: list[str], done: bool = True, reply: Reply | None = None) -> list[dict[str, Any]]:
    """The events of an engine's lines."""
    reply, stream, events = reply or new_reply(), EventStream(), []
    for payload in stream.feed("".join(lines).encode()):
        found = read_chunk(payload)
        if payload == "[DONE]":
            return events + reply.finish(done=True)
        assert found is not None
        events += reply.feed(found)
    return events + reply.finish(done=done)


def assert_legal(events: list[dict[str, Any]]) -> None:
    """The order that the Messages API promises, checked without the code that makes it."""
    names = [event["type"] for event in events]
    if names and names[-1] == "error":
        assert names.count("error") == 1
    else:
        assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("message_start") <= 1
    open_block, following = None, 0
    wanted = {"text": {"text_delta"}, "thinking": {"thinking_delta"}, "tool_use": {"input_json_delta"}}
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == following
            open_block, following = event["content_block"]["type"], following + 1
        elif event["type"] == "content_block_delta":
            assert event["index"] == following - 1 and event["delta"]["type"] in wanted[str(open_block)]
        elif event["type"] == "content_block_stop":
            assert open_block is not None and event["index"] == following - 1
            open_block = None
        elif event["type"] in ("message_delta", "message_start"):
            assert open_block is None


def test_a_text_reply_has_the_events_of_the_messages_api() -> None:
    events = play(says("Hel", "lo", prompt_tokens=11, cached=4))
    assert_legal(events)
    assert events[0]["message"] == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        },
    }
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert events[2] == {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}}
    assert events[-2] == {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 2,
        },
    }


def test_a_call_written_as_text_becomes_a_tool_use_block() -> None:
    message = collect(play(says("I look.\n\n", *BASH_CALL, "\n")))
    assert message["content"] == [
        {"type": "text", "text": "I look.\n\n"},
        {"type": "tool_use", "id": "toolu_2", "name": "Bash", "input": {"command": "ls"}},
    ]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("tool_calls", "end_turn"),  # it says so, and there is none
        ("content_filter", "refusal"),
        ("canceled", "end_turn"),
    ],
)
def test_stop_reasons(finish: str, reason: str) -> None:
    assert collect(play(says("x", finish=finish)))["stop_reason"] == reason


def test_a_call_that_is_cut_by_the_token_limit_stays_open() -> None:
    events = play(says(BASH_CALL[:50], finish="length"))
    fragments = "".join(event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta")
    with pytest.raises(ValueError):
        json.loads(fragments)
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert collect(events)["content"] == []


def test_white_space_around_calls_opens_no_block() -> None:
    message = collect(play(says("\n\n", BASH_CALL, "\n", BASH_CALL, "\n\n")))
    assert [block["type"] for block in message["content"]] == ["tool_use", "tool_use"]


def test_thinking_comes_as_thinking_blocks_from_text_and_from_the_engine() -> None:
    no_thought = [chunk("Yes", reasoning=""), *says(".")]
    assert collect(play(no_thought))["content"] == [{"type": "text", "text": "Yes."}]
    for lines in (
        says("<think>", "hm", "</think>", "\n\nYes."),
        [chunk(None, reasoning_content="hm"), *says("\n\nYes.")],
    ):
        assert collect(play(lines))["content"] == [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Yes."},
        ]


CALL = {"id": "c1", "type": "function", "function": {"name": "Bash", "arguments": '{"command": "ls"}'}}


@pytest.mark.parametrize(
    "deltas",
    [
        [[CALL]],
        [[{**CALL, "index": 0}], [{**CALL, "index": 1, "id": "c2"}]],
        [[{**CALL, "index": 0}, {**CALL, "index": 1, "id": "c2"}]],
        [
            [{"index": 0, "id": "c1", "function": {"name": "Bash", "arguments": ""}}],
            [{"index": 0, "function": {"arguments": '{"comm'}}],
            [{"index": 0, "function": {"arguments": 'and": "ls"}'}}],
        ],
        [[{"function": {"name": "Bash", "arguments": {"command": "ls"}}}]],
    ],
)
def test_calls_that_the_engine_parsed_are_taken_whole_and_as_deltas(deltas: list[Any]) -> None:
    events = play([*(chunk(None, tool_calls=delta) for delta in deltas), *says(finish="stop")])
    assert_legal(events)
    message = collect(events)
    assert message["stop_reason"] == "tool_use"
    assert all(
        block["input"] == {"command": "ls"} and block["name"] == "Bash" and block["id"] for block in message["content"]
    )
    assert len(message["content"]) == len(
        {call.get("id") for delta in deltas for call in delta if call["function"].get("name")}
    )


def test_a_stream_that_breaks_off_is_an_error_and_nothing_follows_it() -> None:
    reply = new_reply()
    events = play([chunk("half")], done=False, reply=reply)
    assert_legal(events)
    assert events[-1]["type"] == "error" and "cut off" in events[-1]["error"]["message"]
    assert reply.finish(True) == reply.feed({"choices": []}) == reply.fail(ApiError(500, "x")) == []
    with pytest.raises(ApiError):
        collect(events)


def test_usage_that_the_engine_does_not_give_is_estimated() -> None:
    usage = collect(play([chunk("a"), chunk("b"), chunk("", "stop"), "data: [DONE]\n\n"]))["usage"]
    assert usage == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 2,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Prompt sequence length is greater than 4096, perhaps consider using `truncate_sequence`?",
            "prompt is too long: 5000 tokens > 4096 maximum",
        ),
        (
            '{"message": "Prompt sequence length is greater than 8192, perhaps"}',
            "prompt is too long: 8193 tokens > 8192 maximum",
        ),
        (
            '{"error": {"message": "This model\'s maximum context length is 2048 tokens."}}',
            "prompt is too long: 5000 tokens > 2048 maximum",
        ),
    ],
)
def test_an_overflow_is_told_in_the_words_that_make_the_client_compact(text: str, message: str) -> None:
    error = engine_error(422, text, 5000)
    assert (error.status, error.message) == (400, message)


@pytest.mark.parametrize(
    ("status", "text", "shown"),
    [
        (500, "boom", "boom"),
        (422, "bad field", "bad field"),
        (500, '{"error": {"message": "bad"}}', "bad"),
        (503, "", "503"),
        (200, "[1]", "[1]"),
        (404, '{"detail": "x"}', "x"),
    ],
)
def test_any_other_error_keeps_its_words(status: int, text: str, shown: str) -> None:
    error = engine_error(status, text, 1)
    assert shown in error.message and error.status == {200: 500, 503: 529}.get(status, status)


def test_plain_text_in_the_stream_is_no_chunk() -> None:
    for payload in ("Internal error", '{"error": {"message": "x"}}', '{"message": "x"}', "[]", "{"):
        assert read_chunk(payload) is None


def test_lines_are_found_wherever_the_bytes_are_cut() -> None:
    data = 'data: {"a": "é😀"}\r\n\r\n: comment\nevent: x\ndata: two\n\ndata:[DONE]\n\n'.encode()
    for cut in range(len(data)):
        stream = EventStream()
        assert stream.feed(data[:cut]) + stream.feed(data[cut:]) == ['{"a": "é😀"}', "two", "[DONE]"]


# As mistralrs 0.8.1 sent it (shortened): a role in every delta, calls null, the usage in the last chunk only.
RECORDED = (
    "".join(
        f"data: {json.dumps({'id': '1', 'choices': [choice], 'created': 1795367692, 'object': 'chat.completion.chunk', **usage})}\n\n"
        for choice, usage in [
            *(
                (
                    {
                        "finish_reason": None,
                        "index": 0,
                        "delta": {"content": text, "role": "assistant", "tool_calls": None},
                    },
                    {},
                )
                for text in (
                    "I look",
                    " here.",
                    "\n",
                    "<tool_call>",
                    '\n{"name": "Bash"',
                    ', "arguments": {',
                    '"command": "ls',
                    ' -1"}}\n',
                    "</tool_call>",
                )
            ),
            (
                {
                    "finish_reason": "stop",
                    "index": 0,
                    "delta": {"content": "", "role": "assistant", "tool_calls": None},
                },
                {
                    "usage": {
                        "completion_tokens": 10,
                        "prompt_tokens": 12,
                        "total_tokens": 22,
                        "avg_tok_per_sec": 5666.7,
                    }
                },
            ),
        ]
    )
    + ":\n\ndata: [DONE]\n\n"
)


@pytest.mark.slow
def test_a_recorded_stream_is_the_same_message_wherever_its_bytes_are_cut() -> None:
    data = RECORDED.encode()
    for cut in range(len(data)):
        stream, reply = EventStream(), new_reply()
        events = []
        for payload in stream.feed(data[:cut]) + stream.feed(data[cut:]):
            events += reply.finish(True) if payload == "[DONE]" else reply.feed(read_chunk(payload) or {})
        message = collect(events)
        assert [block.get("text") or block["input"] for block in message["content"]] == [
            "I look here.\n",
            {"command": "ls -1"},
        ]
        assert (message["stop_reason"], message["usage"]["input_tokens"]) == ("tool_use", 12)


pieces = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["<think>", "</think>", BASH_CALL, BASH_CALL[:40], BASH_CALL[40:], "<tool_call>", "\n", " "]),
)
deltas = st.one_of(
    st.builds(lambda text: {"content": text}, pieces),
    st.builds(lambda text: {"reasoning_content": text}, pieces),
    st.builds(
        lambda index, name: {"tool_calls": [{"index": index, "function": {"name": name, "arguments": "{}"}}]},
        st.integers(0, 2),
        st.sampled_from(["Bash", None]),
    ),
    st.sampled_from([{}, {"content": None}, {"tool_calls": None}, {"role": "assistant", "content": ""}]),
)


@given(
    st.lists(deltas, max_size=8), st.sampled_from(["stop", "length", "tool_calls", None]), st.booleans(), st.booleans()
)
def test_any_stream_gives_a_legal_order_of_events(
    stream: list[dict[str, Any]], finish: str | None, done: bool, fails: bool
) -> None:
    reply = new_reply()
    events = [event for delta in stream for event in reply.feed({"choices": [{"delta": delta}]})]
    events += reply.feed({"choices": [{"delta": {}, "finish_reason": finish}]})
    events += reply.fail(ApiError(500, "x")) if fails else reply.finish(done)
    assert_legal(events)
    for line in encode_events(events).decode().split("\n\n")[:-1]:
        name, data = line.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


@given(st.lists(pieces, max_size=6))
def test_a_collected_message_says_what_the_stream_said(texts: list[str]) -> None:
    events = play(says(*texts))
    said = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
    assert "".join(block.get("text", "") for block in collect(events)["content"]) == said
