"""Section 5: Anthropic -> OpenAI."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyclaude import ApiError, Target, estimate_tokens, translate_request

TARGET = Target("http://127.0.0.1:1/v1", max_tokens=1000)
BASH = {
    "name": "Bash",
    "description": "Run",
    "input_schema": {"$schema": "x", "type": "object", "properties": {"z": {}, "a": {}}, "required": ["z"]},
}


def translate(target: Target = TARGET, **body: Any) -> dict[str, Any]:
    return translate_request({"messages": [{"role": "user", "content": "hi"}], **body}, target)


def messages(*turns: tuple[str, Any], system: Any = None) -> list[dict[str, Any]]:
    return translate(messages=[{"role": role, "content": content} for role, content in turns], system=system)[
        "messages"
    ]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def result(identity: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": identity, "content": content, **more}


def use(identity: str, name: str = "Bash", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": name, "input": arguments}


def test_text_and_blocks_of_the_same_content_translate_alike() -> None:
    assert messages(("user", "hi"), system="Be brief.") == messages(("user", [text("hi")]), system=[text("Be brief.")])
    assert messages(("user", "hi"), system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_the_billing_block_never_reaches_the_model() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.197.c40; cc_entrypoint=cli;"
    assert messages(("user", "hi"), system=[text(billing), text("Be brief.")])[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    assert messages(("user", "hi"), system=f"{billing}\n\nBe brief.")[0]["content"] == "Be brief."
    assert messages(("user", "hi"), system=[text(billing)]) == [{"role": "user", "content": "hi"}]


def test_a_system_turn_is_folded_where_it_stands() -> None:
    folded = messages(
        ("user", "one"),
        ("system", "note"),
        ("assistant", [text("two"), use("t")]),
        ("user", [result("t", "r")]),
        ("system", [text("later")]),
        system="S",
    )
    assert [message["role"] for message in folded] == ["system", "user", "assistant", "tool", "user"]
    assert folded[1]["content"] == "one\n\n<system-reminder>\nnote\n</system-reminder>"
    assert folded[4]["content"] == "<system-reminder>\nlater\n</system-reminder>"


def test_calls_and_their_results_are_translated() -> None:
    made = messages(
        ("user", "go"),
        ("assistant", [text("I look."), use("t1", z=1, a="é"), use("t2")]),
        ("user", [text("and then"), result("t1", "one"), result("t2", [text("two"), text("2")])]),
    )
    assert made[1] == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "Bash", "arguments": '{"z": 1, "a": "é"}'}},
            {"id": "t2", "type": "function", "function": {"name": "Bash", "arguments": "{}"}},
        ],
    }
    assert made[2:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": "two\n\n2"},
        {"role": "user", "content": "and then"},
    ]


def test_content_beside_calls_is_empty_text_and_never_null() -> None:
    assert messages(("user", "go"), ("assistant", [use("t1")]), ("user", [result("t1", None)]))[1]["content"] == ""


def test_an_error_result_is_visible_as_one() -> None:
    made = messages(("user", "go"), ("assistant", [use("t")]), ("user", [result("t", "no such file", is_error=True)]))
    assert made[2]["content"] == "Error: no such file"
    made = messages(
        ("user", "go"),
        ("assistant", [use("t")]),
        ("user", [result("t", "<tool_use_error>no</tool_use_error>", is_error=True)]),
    )
    assert made[2]["content"] == "<tool_use_error>no</tool_use_error>"


def test_consecutive_turns_of_one_role_merge() -> None:
    assert messages(
        ("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", [use("t")]), ("user", [result("t", "r")])
    )[:2] == [
        {"role": "user", "content": "a\n\nb"},
        {
            "role": "assistant",
            "content": "c",
            "tool_calls": [{"id": "t", "type": "function", "function": {"name": "Bash", "arguments": "{}"}}],
        },
    ]


def test_what_the_model_cannot_read_is_named_not_dropped() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "the text"}}
    made = messages(("user", [text("see"), image, document, {"type": "thinking", "thinking": "x", "signature": ""}]))
    assert made[0]["content"] == "see\n\n[image: this model cannot see images]\n\nthe text"


def test_tools_keep_their_order_and_their_keys_and_lose_only_the_schema_uri() -> None:
    other = {"name": "Aaa", "input_schema": {"type": "object"}}
    tools = translate(tools=[BASH, other])["tools"]
    assert [tool["function"]["name"] for tool in tools] == ["Bash", "Aaa"]
    assert (
        json.dumps(tools[0]["function"]["parameters"])
        == '{"type": "object", "properties": {"z": {}, "a": {}}, "required": ["z"]}'
    )
    assert BASH["input_schema"]["$schema"] == "x"


def test_tools_of_anthropics_servers_never_reach_the_engine() -> None:
    assert "tools" not in translate(tools=[{"type": "web_search_20250305", "name": "web_search"}])


def test_the_engines_own_tool_parser_stays_off_unless_it_is_wanted() -> None:
    engine = Target("http://127.0.0.1:1/v1", own_tools=False, forces_calls=True)
    assert translate(tools=[BASH], tool_choice={"type": "any"})["tool_choice"] == "none"
    assert "tool_choice" not in translate()
    wanted = {
        "auto": "auto",
        "any": "required",
        "none": "none",
        "tool": {"type": "function", "function": {"name": "Bash"}},
    }
    for kind, expected in wanted.items():
        assert translate(engine, tools=[BASH], tool_choice={"type": kind, "name": "Bash"})["tool_choice"] == expected
    assert translate(engine, tools=[BASH])["tool_choice"] == "auto"


def test_limits_sampling_and_stops() -> None:
    target = Target(
        "http://127.0.0.1:1/v1", model="default", max_tokens=1000, sampling={"temperature": 0.7, "top_k": 20}
    )
    request = translate(
        target,
        max_tokens=64000,
        temperature=0.1,
        stop_sequences=["END"],
        model="claude-x",
        metadata={},
        thinking={"type": "adaptive"},
    )
    del request["messages"]
    assert request == {
        "model": "default",
        "max_tokens": 1000,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.1,
        "top_k": 20,
        "stop": ["END"],
    }
    assert translate(target, max_tokens=10)["max_tokens"] == 10
    assert translate(target, max_tokens=True)["max_tokens"] == 1000


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ([], "JSON object"),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [1]}, r"messages\.0\.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\.0\.role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\.0\.content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\.0\.content"),
        ({"messages": [{"role": "user", "content": ""}]}, "text content"),
        ({"messages": [{"role": "user", "content": "x"}], "system": 7}, "system"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": ["x"]}, "tools"),
    ],
)
def test_a_bad_request_is_refused_with_the_name_of_the_field(body: Any, part: str) -> None:
    with pytest.raises(ApiError, match=part) as caught:
        translate_request(body, TARGET)
    assert caught.value.status == 400 and caught.value.body()["error"]["type"] == "invalid_request_error"


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
reminders = st.lists(st.tuples(st.just("system"), words), max_size=1)


@st.composite
def conversations(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """A conversation as the client sends it, request after request: each adds the reply to the last and a new user turn."""
    history: list[dict[str, Any]] = [{"role": "user", "content": draw(words)}]
    requests = [copy.deepcopy(history)]
    for round_number in range(draw(st.integers(1, 4))):
        calls = [use(f"t{round_number}.{index}", command=draw(words)) for index in range(draw(st.integers(0, 2)))]
        said = [text(draw(words))] if draw(st.booleans()) or not calls else []
        history.append({"role": "assistant", "content": said + calls})
        results = [result(call["id"], draw(words), is_error=draw(st.booleans())) for call in calls]
        blocks = results + ([text(draw(words))] if draw(st.booleans()) or not results else [])
        history.append({"role": "user", "content": blocks})
        history += [{"role": role, "content": content} for role, content in draw(reminders)]
        requests.append(copy.deepcopy(history))
    return requests


@given(conversations(), words, st.booleans())
def test_a_prompt_only_ever_grows(requests: list[list[dict[str, Any]]], system: str, as_blocks: bool) -> None:
    made = [
        translate(messages=turns, system=[text(system)] if as_blocks and number % 2 else system, tools=[BASH])
        for number, turns in enumerate(requests)
    ]
    for earlier, later in zip(made, made[1:]):
        assert json.dumps(later["messages"]).startswith(json.dumps(earlier["messages"])[:-1])
        assert json.dumps(later["tools"]) == json.dumps(earlier["tools"])


@given(conversations())
def test_the_same_input_gives_the_same_bytes_and_is_not_changed(requests: list[list[dict[str, Any]]]) -> None:
    before = json.dumps(requests[-1])
    assert json.dumps(translate(messages=requests[-1])) == json.dumps(translate(messages=requests[-1]))
    assert json.dumps(requests[-1]) == before


def test_the_estimate_counts_text_and_tools() -> None:
    small, large = translate(), translate(tools=[BASH], messages=[{"role": "user", "content": "word " * 1000}])
    assert estimate_tokens(json.dumps(small)) < 80
    assert 1000 < estimate_tokens(json.dumps(large)) < 2500
