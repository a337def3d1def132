"""Section 7: OpenAI chunks -> Anthropic events."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from fake_engine import chunk, says
from hypothesis import given, settings
from hypothesis import strategies as st

from anyclaude import (
    ApiError,
    EventStream,
    Reply,
    ReplyStream,
    ToolText,
    collect,
    encode_events,
    engine_error,
    read_chunk,
)

TOOLS: dict[str, dict[str, Any]] = {"Bash": {"properties": {"command": {"type": "string"}}}, "Get": {}}
BASH_CALL = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'


def new_reply(**options: Any) -> Reply:
    numbers = itertools.count(1)
    reply = Reply("tiny", ToolText(TOOLS), lambda: str(next(numbers)), **options)
    reply.prompt = 7
    return reply


def play(lines: list[str], done: bool = True, reply: Reply | None = None) -> list[dict[str, Any]]:
    """The events of an engine's lines."""
    reply = reply or new_reply()
    events = ReplyStream(reply).feed("".join(lines).encode())
    return events + reply.finish(done)


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


def one(**call: Any) -> dict[str, Any]:
    return {"function": {}, **call}


@pytest.mark.parametrize(
    ("deltas", "calls"),
    [
        # a new id under the same index (Gemini's and Open WebUI's adapters)
        (
            [one(index=0, id="a", function={"name": "Bash", "arguments": '{"command": "x"}'})]
            + [one(index=0, id="b", function={"name": "Get", "arguments": "{}"})],
            [("Bash", {"command": "x"}), ("Get", {})],
        ),
        # neither index nor id, the name alone begins a call (Ollama)
        (
            [one(function={"name": "Get", "arguments": "{}"}), one(function={"name": "Get", "arguments": "{}"})],
            [("Get", {}), ("Get", {})],
        ),
        # the name behind the id, and first as an empty text (Azure, vLLM)
        (
            [one(index=0, id="a", function={"name": ""}), one(index=0, function={"arguments": '{"a'})]
            + [one(index=0, function={"name": "Get", "arguments": '": 1}'})],
            [("Get", {"a": 1})],
        ),
        # id and name again in every delta, or as empty texts (MiniMax, DashScope)
        (
            [one(index=0, id="a", function={"name": "Get", "arguments": '{"a'})]
            + [one(index=0, id="a", function={"name": "Get", "arguments": '": '})]
            + [one(index=0, id="", function={"name": "", "arguments": "1}"})],
            [("Get", {"a": 1})],
        ),
        # deltas of two calls mixed up after each began
        (
            [one(index=0, id="a", function={"name": "Get"}), one(index=1, id="b", function={"name": "Bash"})],
            [("Get", {}), ("Bash", {})],
        ),
        ([one(index=0, function={"name": "Get", "arguments": None})], [("Get", {})]),
        (
            [one(index=0, id="a", function={"name": "Get"}), one(index=1, id="b", function={"name": "Bash"})]
            + [one(index=1, function={"arguments": '{"command"'}), one(index=0, function={"arguments": '{"a": 1}'})]
            + [one(index=1, function={"arguments": ': "x"}'})],
            [("Get", {"a": 1}), ("Bash", {"command": "x"})],
        ),
    ],
)
def test_odd_deltas_of_calls_are_put_together(deltas: list[Any], calls: list[Any]) -> None:
    events = play([*(chunk(None, tool_calls=[delta]) for delta in deltas), *says()])
    assert_legal(events)
    assert [(block["name"], block["input"]) for block in collect(events)["content"]] == calls


def test_the_function_call_of_old_servers_is_a_call() -> None:
    message = collect(
        play([chunk(None, function_call={"name": "Get", "arguments": "{}"}), *says(finish="function_call")])
    )
    assert [block["name"] for block in message["content"]] == ["Get"] and message["stop_reason"] == "tool_use"


def test_a_call_of_the_engines_that_was_cut_off_is_not_to_be_run() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "Bash", "arguments": '{"command": "rm -r /tmp/x'}}
    message = collect(play([chunk(None, tool_calls=[call]), *says(finish="tool_calls")]))  # as gpt-oss' parser says
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")


@pytest.mark.parametrize("arguments", ['{"command": "a" "b"}', "5", "[]", '{"a": 1}}'])
def test_arguments_that_are_no_object_are_handed_over_for_the_client_to_refuse(arguments: str) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "Bash", "arguments": arguments}}
    message = collect(play([chunk(None, tool_calls=[call]), *says(finish="stop")]))
    assert message["content"][0]["input"] == {"invalid_json": arguments} and message["stop_reason"] == "tool_use"


def test_what_is_neither_a_chunk_nor_an_error_is_passed_over() -> None:
    message = collect(play(['data: {"type": "ping"}\n\n', "data: {}\n\n", *says("Hi")]))
    assert message["content"] == [{"type": "text", "text": "Hi"}]


def test_a_call_that_leaks_as_text_is_rescued_beside_the_engines_own() -> None:
    message = collect(play([chunk(BASH_CALL), chunk(None, tool_calls=[CALL]), *says()]))
    assert [block["name"] for block in message["content"]] == ["Bash", "Bash"]


@pytest.mark.parametrize(
    "pieces",
    [
        ["One. STOP"],
        ["One. ST", "OP and more"],
        list("One. STOP and"),
        ["One. ", "STOP", BASH_CALL],
        ["One. ", "S", "T", "OPP"],
    ],
)
def test_a_stop_sequence_ends_the_reply_and_does_not_show(pieces: list[str]) -> None:
    message = collect(play(says(*pieces), reply=new_reply(stops=["END", "STOP"])))
    assert message["content"] == [{"type": "text", "text": "One. "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "STOP")


def test_the_beginning_of_a_stop_sequence_that_is_none_is_shown() -> None:
    message = collect(play(says("One. ST", "EP. S"), reply=new_reply(stops=["STOP"])))
    assert message["content"] == [{"type": "text", "text": "One. STEP. S"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_a_stop_sequence_that_the_server_names_is_told(field: str) -> None:
    last = {"choices": [{"delta": {}, "finish_reason": "stop", field: "END"}]}
    message = collect(play([chunk("One."), "data: " + json.dumps(last) + "\n\n"], reply=new_reply(stops=["END"])))
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    token = {"choices": [{"delta": {}, "finish_reason": "stop", field: 151645}]}
    message = collect(play([chunk("One."), "data: " + json.dumps(token) + "\n\n"], reply=new_reply(stops=["END"])))
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


def test_a_stop_sequence_in_a_call_leaves_it_open() -> None:
    message = collect(play(says(BASH_CALL.replace("ls", "ls STOP")), reply=new_reply(stops=["STOP"])))
    assert (message["content"], message["stop_reason"]) == ([], "stop_sequence")


def test_a_long_stop_sequence_is_found() -> None:
    stop = "x" * 900 + "y"
    message = collect(play(says("One. ", *stop), reply=new_reply(stops=[stop])))
    assert (message["content"], message["stop_sequence"]) == ([{"type": "text", "text": "One. "}], stop)


def test_one_call_when_no_more_is_wanted() -> None:
    for lines in (
        says("A", BASH_CALL, "\n", BASH_CALL, "and more"),
        [chunk("A", tool_calls=[CALL, {**CALL, "id": "c2", "index": 1}]), *says("B")],
    ):
        events = play(lines, reply=new_reply(one_call=True))
        assert_legal(events)
        message = collect(events)
        assert [block["type"] for block in message["content"]].count("tool_use") == 1
        assert message["stop_reason"] == "tool_use"


def test_thinking_that_the_engine_told_apart_is_not_looked_for_in_the_text() -> None:
    numbers = itertools.count(1)
    reply = Reply("tiny", ToolText(TOOLS, thinks=True), lambda: str(next(numbers)))
    message = collect(play([chunk(None, reasoning="hm"), *says("Yes.")], reply=reply))
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]


def test_content_in_parts_is_read() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Yes."}]
    line = "data: " + json.dumps({"choices": [{"delta": {"content": parts}}]}) + "\n\n"
    assert [block["type"] for block in collect(play([line, *says()]))["content"]] == ["thinking", "text"]


@pytest.mark.parametrize(
    "choice", [{"finish_reason": "error", "delta": {}}, {"delta": {}, "error": {"message": "boom"}}]
)
def test_an_error_in_a_choice_is_an_error(choice: dict[str, Any]) -> None:
    events = new_reply().feed({"choices": [choice]})
    assert [event["type"] for event in events] == ["error"]


def test_an_answer_without_anything_is_an_error_and_not_silence() -> None:
    events = play(["data: [DONE]\n\n"])
    assert events[-1]["type"] == "error" and "empty" in events[-1]["error"]["message"]


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


LIMITED = "This model's maximum context length is 4096 tokens. However, "


@pytest.mark.parametrize(
    ("text", "prompt", "limit"),
    [
        # mistral.rs
        ("Prompt sequence length is greater than 4096, perhaps consider using `truncate_sequence`?", 5000, 4096),
        ('{"message": "Prompt sequence length is greater than 8192, perhaps"}', 8193, 8192),
        ("Sequence 3 exceeds the total KV cache capacity of 2048 tokens.", 5000, 2048),
        ("The sequence is too long and exceeds KV cache size.", 5000, 4096),
        # vLLM, from 0.9 to 0.33
        (LIMITED + "you requested 9000 tokens in the messages, Please reduce", 9000, 4096),
        (LIMITED + "you requested 9064 tokens (9000 in the messages, 64 in the completion).", 9000, 4096),
        (LIMITED + "your request has 9001 input tokens. Please reduce the length of the input messages.", 9001, 4096),
        (LIMITED + "your prompt contains 9002 input tokens, which exceeds this limit even without any output", 9002, 4096),
        (LIMITED + "you requested 64 output tokens and your prompt contains 9003 input tokens, for a total of", 9003, 4096),
        (LIMITED + "you requested 64 output tokens and your prompt contains at least 4033 input tokens, for a total of", 5000, 4096),
        ('{"error": {"message": "Too long.", "code": "context_length_exceeded"}}', 5000, 4096),
        ("the input length exceeds the context length", 5000, 4096),
        (LIMITED + "you requested 5000 tokens (3500 in the messages, 1500 in the completion).", 4097, 4096),
        (LIMITED + "your prompt contains 100000 characters (more than 81280 characters, which is", 5000, 4096),
        ("Input length (9004) exceeds model's maximum context length (4096).", 9004, 4096),
        ("The decoder prompt (length 9005) is longer than the maximum model length of 4096. Make sure", 9005, 4096),
        ("The prompt (total length 9006) is too long to fit into the model (context length 4096).", 9006, 4096),
        # llama.cpp
        ('{"error":{"code":400,"message":"request (9007 tokens) exceeds the available context size (4096 tokens), try "}}', 9007, 4096),
        ("the request exceeds the available context size, try increasing it", 5000, 4096),
        ("Context size has been exceeded.", 5000, 4096),
        ("Requested tokens (9008) exceed context window of 4096", 9008, 4096),
        # SGLang, LM Studio, TGI, OpenAI, Ollama
        ("The input (9009 tokens) is longer than the model's context length (4096 tokens).", 9009, 4096),
        ("Input length (9010 tokens) exceeds the maximum allowed length (4096 tokens). Use a shorter input", 9010, 4096),
        ('{"error": "The number of tokens to keep from the initial prompt is greater than the context length (n_keep: 9011>= n_ctx: 4096)."}', 9011, 4096),
        ("Cannot truncate prompt with n_keep (9012) >= n_ctx (4096)", 9012, 4096),
        ("Trying to keep the first 9013 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens, which", 9013, 4096),
        ("`inputs` must have less than 4096 tokens. Given: 9014", 9014, 4096),
        (LIMITED + "your messages resulted in 9015 tokens. Please reduce the length of the messages.", 9015, 4096),
        ("Input tokens exceed the configured limit of 4096 tokens. Your messages resulted in 9016 tokens.", 9016, 4096),
        ("the prompt is longer than the context length currently available to the model", 5000, 4096),
        ('{"detail":"Request needs 10017 context tokens (9017 prompt + 1000 max generation), but MAX_KV_SIZE is 4096."}', 9017, 4096),
    ],
)  # fmt: skip
def test_an_overflow_is_told_in_the_words_that_make_the_client_compact(text: str, prompt: int, limit: int) -> None:
    error = engine_error(422, text, 5000, 4096)
    assert (error.status, error.message) == (400, f"prompt is too long: {prompt} tokens > {limit} maximum")


@pytest.mark.parametrize(
    "text",
    [
        LIMITED + "you requested 5000 tokens (3000 in the messages, 2000 in the completion).",
        LIMITED + "you requested 2000 output tokens and your prompt contains 3000 input tokens, for a total of 5000",
        "'max_tokens' is too large: 2000. This model's maximum context length is 4096 tokens and your request has 3000 input tokens",
        ("Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of 5000 tokens: "
        "3000 tokens from the input messages and 2000 tokens for the completion."),
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 3000 `inputs` tokens and 2000 `max_new_tokens`",
        "Request needs 5000 context tokens (3000 prompt + 2000 max generation), but MAX_KV_SIZE is 4096.",
    ],
)  # fmt: skip
def test_an_answer_that_would_be_too_long_is_told_so_that_the_client_asks_for_less(text: str) -> None:
    error = engine_error(400, text, 3000, 4096)
    assert error.message == "input length and `max_tokens` exceed context limit: 3000 + 2000 > 4096"


@pytest.mark.parametrize(
    ("status", "text", "shown"),
    [
        (500, "boom", "boom"),
        (422, "bad field", "bad field"),
        (500, '{"error": {"message": "bad"}}', "bad"),
        (503, "", "503"),
        (200, "[1]", "[1]"),
        (404, '{"detail": "x"}', "x"),
        (400, '{"error": "in words"}', "in words"),
        (401, "no", "check apiKey"),  # and no 401 for the client, which would ask for a login
        (429, '{"detail": {"error": {"message": "inside"}}}', "inside"),
        (400, '{"object": "error", "message": "flat", "code": 400}', "flat"),
        (500, '{"error": {"code": 7}}', "7"),
    ],
)
def test_any_other_error_keeps_its_words(status: int, text: str, shown: str) -> None:
    error = engine_error(status, text, 1)
    assert shown in error.message and error.status == {200: 500, 503: 529, 404: 400, 422: 400, 401: 400}.get(
        status, status
    )


def test_plain_text_in_the_stream_is_no_chunk() -> None:
    for payload in ("Internal error", '{"error": {"message": "x"}}', '{"message": "x"}', "[]", "{"):
        assert read_chunk(payload) is None


def test_lines_are_found_wherever_the_bytes_are_cut() -> None:
    data = 'data: {"a": "é😀"}\r\n\r\n: comment\nevent: x\ndata:\ndata: two\n\ndata:[DONE]\n\n'.encode()
    for cut in range(len(data)):
        stream = EventStream()
        assert stream.feed(data[:cut]) + stream.feed(data[cut:]) == ['{"a": "é😀"}', "two", "[DONE]"]


def test_a_long_line_in_many_pieces_is_read_in_time() -> None:
    stream, started = EventStream(), time.monotonic()
    for _ in range(20_000):
        assert stream.feed(b"x" * 1000) == []
    stream.feed(b"\ndata: ")
    assert stream.feed(b"1\n") == ["1"] and time.monotonic() - started < 2
    assert EventStream().feed(b'error: {"code": 400}\n\ndata: [DONE]\n') == ['{"code": 400}', "[DONE]"]


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
        stream = ReplyStream(new_reply())
        message = collect(stream.feed(data[:cut]) + stream.feed(data[cut:]))
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


def events_in(data: bytes) -> list[dict[str, Any]]:
    """What a client reads."""
    return [json.loads(event.partition("\ndata: ")[2]) for event in data.decode().split("\n\n")[:-1]]


def merged(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events, neighbouring deltas of a text put together."""
    found: list[dict[str, Any]] = []
    for event in events:
        delta = event.get("delta", {})
        if found and delta.get("type") in ("text_delta", "thinking_delta") and found[-1]["type"] == event["type"]:
            (kind,) = delta.keys() - {"type"}
            found[-1] = {**event, "delta": {**delta, kind: found[-1]["delta"][kind] + delta[kind]}}
        else:
            found.append(event)
    return found


def handed_on(reads: list[bytes], **options: Any) -> tuple[list[dict[str, Any]], int]:
    """What the client gets of an engine's reads, and how many chunks were not parsed for it."""
    reply, fed = new_reply(**options), list[Any]()
    stream, events, parse = ReplyStream(reply), list[dict[str, Any]](), reply.feed
    reply.feed = lambda chunk: fed.append(chunk) or parse(chunk)  # type: ignore[method-assign, func-returns-value]
    for data in reads:
        known = stream.known
        head, text, tail = known.partition(data) if known else (b"", b"", b"")
        if known and text and not head and not tail:
            assert events_in(known.event % text) == [stream.pass_on([text.decode()])]
            events += events_in(known.event % text)
        else:
            events += stream.feed(data)
    events += stream.feed(b"", last=True)
    return merged(events_in(encode_events(events))), b"".join(reads).count(b"data: {") - len(fed)


def parsed(data: bytes, **options: Any) -> list[dict[str, Any]]:
    """The same when each chunk is parsed: none comes whole."""
    stream, events = ReplyStream(new_reply(**options)), list[dict[str, Any]]()
    for event in data.split(b"\n\n"):
        events += [*stream.feed(event), *stream.feed(b"\n\n")]
    return merged(events_in(encode_events(events + stream.feed(b"", last=True))))


# How engines write a text: mistral.rs, vLLM, llama.cpp (with the time of each chunk), reasoning; and chunks in which
# something else equals the text, or that say more than it.
SHAPES = [
    '{"id":"1","choices":[{"finish_reason":null,"index":0,"delta":{"content":TEXT,"role":"assistant"},"logprobs":null}]}',
    '{"choices": [{"index": 0, "delta": {"content": TEXT}, "finish_reason": null}], "usage": null}',
    '{"choices": [{"delta": {"content": TEXT}}], "created": NUMBER}',
    '{"choices": [{"delta": {"reasoning_content": TEXT, "content": null}}]}',
    '{"choices": [{"delta": {"content": [{"type": "text", "text": TEXT}]}}]}',
    '{"model": "a", "choices": [{"delta": {"content": TEXT, "role": "a"}}], "id": "b"}',
    '{"id": TEXT, "choices": [{"delta": {"content": "\\u0061"}}]}',
    '{"choices": [{"delta": {"content": TEXT}}], "usage": {"completion_tokens": 7}}',
    '{"choices": [{"delta": {"content": TEXT}, "finish_reason": "length"}]}',
    '{"choices": [{"delta": {"content": TEXT, "tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}]}',
]


def line(shape: int, text: str, number: int = 0, escaped: bool = False) -> bytes:
    """A chunk as an engine writes it. U+FFFD is a byte that is no text."""
    payload = SHAPES[shape].replace("TEXT", json.dumps(text, ensure_ascii=escaped)).replace("NUMBER", str(number // 3))
    return f"data: {payload}\n\n".encode().replace("\ufffd".encode(), b"\xff")


PLAIN = ["", "a", "b", " the", "中文", "é", "`", "a\ufffd"]
CALL_PARTS = [BASH_CALL, BASH_CALL[:40], BASH_CALL[40:]]
MARKUP = [*'?\n<["\\', "<to", *CALL_PARTS, "<think>", "</think>", "<|channel|>analysis<|message|>"]
words = st.one_of(st.sampled_from(PLAIN), st.sampled_from(MARKUP))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.integers(0, len(SHAPES) - 1),
    st.lists(st.tuples(st.sampled_from([-1] * 20 + [*range(len(SHAPES))]), words), max_size=30),
    st.sampled_from([{}, {}, {"stops": ("ab",)}, {"one_call": True}]),
    st.booleans(),
    st.sampled_from([0, 0, 0, 1, 6, 40]),
    st.booleans(),
)
def test_a_chunk_that_is_not_parsed_says_what_it_says_parsed(
    usual: int, said: list[tuple[int, str]], options: dict[str, Any], escaped: bool, cut: int, both: bool
) -> None:
    """`cut`: how far behind a chunk's end its read ends; `both`: there, too, ends one."""
    lines = [line(usual if shape < 0 else shape, text, number, escaped) for number, (shape, text) in enumerate(said)]
    data, ends = b"".join(lines), [0, *itertools.accumulate(map(len, lines))]
    marks = sorted({min(end + cut, len(data)) for end in ends if end} | {0, *(ends if both else ())} | {len(data)})
    reads = [data[begin:end] for begin, end in zip(marks, marks[1:])]
    assert handed_on(reads, **options)[0] == parsed(data, **options)


def test_known_chunks_of_one_read_are_one_event_and_count_as_many() -> None:
    reply = new_reply()
    stream = ReplyStream(reply)
    stream.feed(line(0, "a") + line(0, "b")[:9])
    events = stream.feed(line(0, "b")[9:] + line(0, "c") + line(0, "d"))
    assert [event["delta"]["text"] for event in events] == ["b", "cd"] and reply.usage["output_tokens"] == 4


@pytest.mark.parametrize("first", [line(0, "b")[:-1], line(1, "b")])
def test_what_stands_before_a_known_chunk_is_said_too(first: bytes) -> None:
    events, _ = handed_on([line(0, "a"), first + line(0, "c") + line(0, "d")])
    assert [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"] == ["abcd"]


def test_chunks_with_the_time_in_them_are_known_again_each_second() -> None:
    """Engines are tried to be known four times in a row, and each use makes up for all."""
    for rounds in range(1, 10):
        _, unparsed = handed_on([line(2, text, number * 3) for number in range(rounds) for text in "ab"])
        assert unparsed == rounds


def test_a_known_chunk_cut_anywhere_is_said_once() -> None:
    first, second = line(3, "one "), line(3, "two")
    for cut in range(len(second) + 1):
        events, unparsed = handed_on([first, second[:cut], second[cut:]])
        assert [event["delta"] for event in events if event["type"] == "content_block_delta"] == [
            {"type": "thinking_delta", "thinking": "one two"}
        ]
        assert unparsed == (cut in (0, len(second)))


@pytest.mark.parametrize("behind", [line(0, "c"), line(0, "c") + line(0, "d")])
def test_half_a_line_before_a_known_chunk_is_not_lost(behind: bytes) -> None:
    events, _ = handed_on([line(0, "a"), line(0, "b"), b"data: ", behind])
    assert events[-1]["type"] == "error"  # that line is no JSON
    assert [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"] == ["ab"]


@pytest.mark.parametrize(
    ("inside", "said"), [(b'b", "x": "', "b"), (b"b\t", ""), (b"b\\t", "b\t"), (b"b\xff", "b\ufffd")]
)
def test_what_is_no_single_plain_text_is_parsed(inside: bytes, said: str) -> None:
    """A field more, a character that JSON does not have, an escape."""
    events, passed_on = handed_on([line(1, "a"), line(1, "z").replace(b"z", inside)])
    assert passed_on == (not said)  # what is no JSON is parsed, but no chunk
    assert {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a" + said}} in events


def test_a_line_that_begins_in_the_read_of_a_chunk_is_not_lost() -> None:
    a, b, c, d, e = (line(0, text) for text in "abcde")
    events, _ = handed_on([a + b"data: ", b[6:], c + b"data: ", d[6:], e])
    assert [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"] == ["abcde"]


def test_a_stop_that_comes_in_two_known_chunks_ends_the_reply() -> None:
    events, _ = handed_on([*(line(0, text) for text in "xyabz"), b"data: [DONE]\n\n"], stops=("ab",))
    assert [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"] == ["xy"]
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "ab"}


@pytest.mark.parametrize(("shape", "calls"), [(0, 0), (3, 1)])
def test_code_that_begins_in_a_known_chunk_is_code_and_code_in_thinking_is_not(shape: int, calls: int) -> None:
    """There people write about calls."""
    events, passed_on = handed_on(
        [*(line(shape, piece) for piece in ["I\n", "``", "`", "sh"]), line(0, "\n" + BASH_CALL)]
    )
    kinds = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert passed_on == 3 and kinds.count("tool_use") == calls


def test_before_any_chunk_is_known_none_is_passed_on() -> None:
    events, passed_on = handed_on([b": hello\n\n", b'no chunk x"\n\n'])
    assert passed_on == 0 and events[-1]["type"] == "error"


def test_text_behind_the_only_call_that_is_allowed_stays_unsaid() -> None:
    pieces = ["I", " look", BASH_CALL, "And", " so", BASH_CALL, "Not", " shown"]
    events, passed_on = handed_on([line(0, piece) for piece in pieces], one_call=True)
    assert passed_on == 2 and "Not" not in str(events) and "shown" not in str(events)


@pytest.mark.parametrize("shape", range(5))
def test_plain_text_is_handed_on_without_parsing_it(shape: int) -> None:
    texts = ["I", " look", " é", "中文", " at", "\n", " it", ".", " And", " so", " on", "  "]
    lines = [line(shape, text) for text in texts]
    events, passed_on = handed_on(lines)
    assert passed_on == len(texts) - 2  # not the first, nor the line end
    assert handed_on([lines[0], b"".join(lines[1:])]) == (events, 4)  # up to it, if all come in one read
    assert handed_on([b"".join(lines[:3]), *lines[3:]]) == (events, len(texts) - 4)
    shown = [delta.get("text") or delta.get("thinking") for delta in (event.get("delta", {}) for event in events)]
    assert "".join(filter(None, shown)) == "".join(texts)


@pytest.mark.parametrize("shape", range(5, 10))
def test_a_chunk_that_says_more_than_its_text_or_says_it_twice_is_parsed(shape: int) -> None:
    assert handed_on([line(shape, text) for text in ("a", "b", "a", "c")])[1] == 0
