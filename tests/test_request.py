"""Section 5: Anthropic -> OpenAI."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyclaude import (
    ApiError,
    Dialect,
    Target,
    TokenCount,
    count_request,
    dialect_on,
    estimate_tokens,
    fit_to_window,
    read_dialect,
    translate_request,
    unavailable_tool,
)

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
    made = messages(
        ("user", "go"), ("assistant", [use("t")]), ("user", [result("t", "0 errors, 1 crash", is_error=True)])
    )
    assert made[2]["content"] == "Error: 0 errors, 1 crash"
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
    assert translate(target, max_tokens=0)["max_tokens"] == 1
    assert translate(target)["max_tokens"] == 1000


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


# Dialects: what the model's chat template and the engine's generation want.

CALL_TURNS: list[tuple[str, Any]] = [
    ("user", "go"),
    ("assistant", [text("I look."), use("toolu_1", command="ls"), use("toolu_2", "Get")]),
    ("user", [result("toolu_1", "one"), result("toolu_2", "two"), text("and?")]),
]
TEMPLATES = {  # signs of real chat templates, and the dialect that they show
    "{{ tools }}{% if tool_call.arguments is string %}{{ tool_calls }}<tool_call>": {
        "calls": "hermes",
        "takes_text": True,
    },
    "{{ tools }}{{ tool_calls }}<tool_call>\n<function=\n<parameter=": {"calls": "qwen3-coder"},
    "{{ tools }}{{ tool_calls }}<tool_call>{{ name }}<arg_key> enable_thinking": {
        "calls": "glm",
        "thinking": "enable_thinking",
    },
    "tools tool_calls <｜tool▁call▁begin｜>'\n```json\n' + tool['function']['arguments']": {
        "calls": "deepseek",
        "wants_text": True,
    },
    "tools tool_calls <｜tool▁call▁begin｜>": {"calls": "deepseek-v3.1"},
    "tools tool_calls [TOOL_CALLS] raise('roles must alternate') tool_call.id|length != 9": {
        "calls": "mistral-list",
        "alternates": True,
        "short_ids": True,
    },
    "tools tool_calls [TOOL_CALLS]x[ARGS]": {"calls": "mistral"},
    "tools tool_calls <|python_tag|> only supports single tool-calls at once": {"calls": "llama", "one_call": True},
    "tools tool_calls <|channel|> reasoning_effort tool_calls[0]": {
        "calls": "harmony",
        "thinking": "reasoning_effort",
        "one_call": True,
    },
    "tools tool_calls <|tool_call> <|tool_response>": {"calls": "gemma", "names_results": True, "ties_results": True},
    "must alternate; System role not supported": {
        "hides_tools": True,
        "hides_calls": True,
        "alternates": True,
        "no_system": True,
    },
    "tools tool_calls <tool_call> '<|im_start|>assistant\\n<think>\\n' }}": {"calls": "hermes", "opens_thinking": True},
    "tools tool_calls <tool_call> '<think>\\n\\n</think>\\n\\n' }}": {"calls": "hermes"},
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_tells_the_dialect(template: str) -> None:
    assert read_dialect(template) == Dialect(**TEMPLATES[template])


def spoken(version: tuple[int, int, int], **signs: Any) -> Target:
    return Target("http://127.0.0.1:1/v1", dialect=dialect_on(Dialect(**signs), version))


def conversation(target: Target, *turns: tuple[str, Any], system: str = "") -> list[dict[str, Any]]:
    body = {"messages": [{"role": role, "content": content} for role, content in turns], "tools": [BASH]}
    made: list[dict[str, Any]] = translate_request({**body, "system": system}, target)["messages"]
    return made


def test_calls_are_written_into_the_text_where_the_engine_would_drop_them() -> None:
    made = conversation(spoken((0, 6, 0), calls="hermes", takes_text=True), *CALL_TURNS)
    assert made[1] == {
        "role": "assistant",
        "content": 'I look.\n<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "Get", "arguments": {}}\n</tool_call>',
    }
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "tool", "user"]
    assert "tool_calls" in conversation(spoken((0, 7, 0), calls="hermes", takes_text=True), *CALL_TURNS)[1]


def test_arguments_reach_a_template_that_takes_them_apart() -> None:
    before = conversation(spoken((0, 8, 1), calls="qwen3-coder"), *CALL_TURNS)
    assert "<function=Bash>\n<parameter=command>\nls\n</parameter>\n</function>" in before[1]["content"]
    assert "tool_calls" not in before[1]
    assert "tool_calls" in conversation(spoken((0, 9, 0), calls="qwen3-coder"), *CALL_TURNS)[1]


def test_a_template_without_tools_has_them_written_for_it() -> None:
    target = spoken((0, 9, 2), hides_tools=True, hides_calls=True, alternates=True, no_system=True)
    request = translate_request(
        {
            "system": "Be brief.",
            "tools": [BASH],
            "messages": [{"role": role, "content": content} for role, content in CALL_TURNS],
        },
        target,
    )
    assert "tools" not in request and "tool_choice" not in request
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "user"]
    first, _, results = (message["content"] for message in request["messages"])
    assert first.startswith("Be brief.") and '"name": "Bash"' in first and "<tool_call>" in first
    assert first.endswith("go")
    assert results == "<tool_response>\none\n</tool_response>\n\n<tool_response>\ntwo\n</tool_response>\n\nand?"


def test_roles_alternate_where_the_template_insists() -> None:
    made = conversation(spoken((0, 9, 2), calls="mistral-list", alternates=True, short_ids=True), *CALL_TURNS)
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "tool"]
    assert made[-1]["content"] == "two\n\nand?"
    ids = [call["id"] for call in made[1]["tool_calls"]]
    assert all(re.fullmatch("[0-9a-f]{9}", identity) for identity in ids) and len(set(ids)) == 2
    assert [message["tool_call_id"] for message in made[2:]] == ids


def test_one_call_a_turn_where_the_template_shows_no_more() -> None:
    made = conversation(spoken((0, 9, 2), calls="llama", one_call=True), *CALL_TURNS)
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "assistant", "tool", "user"]
    assert [len(message.get("tool_calls", [])) for message in made] == [0, 1, 0, 1, 0, 0]


def test_ids_and_results_are_named_where_the_template_shows_them() -> None:
    made = conversation(spoken((0, 9, 2), calls="kimi"), *CALL_TURNS, ("assistant", [use("toolu_3")]))
    assert [call["id"] for call in made[1]["tool_calls"]] == ["functions.Bash:0", "functions.Get:1"]
    assert made[-2]["tool_calls"][0]["id"] == "functions.Bash:2"
    assert made[2]["tool_call_id"] == "functions.Bash:0"
    named = conversation(spoken((0, 9, 2), calls="gemma", names_results=True), *CALL_TURNS)
    assert [message.get("name") for message in named[2:4]] == ["Bash", "Get"]


DIALECTS = st.builds(
    lambda version, **signs: dialect_on(Dialect(**signs), version),
    version=st.sampled_from([(0, 6, 0), (0, 8, 1), (0, 9, 2)]),
    calls=st.sampled_from(["", "hermes", "qwen3-coder", "glm", "kimi", "mistral-list", "minimax", "deepseek"]),
    **{
        name: st.booleans()
        for name in ("hides_tools", "alternates", "no_system", "short_ids", "one_call", "takes_text")
    },
)


def rendered(request: dict[str, Any]) -> str:
    """A prompt as a plain chat template would make it."""
    shown = json.dumps(request.get("tools", []))
    for message in request["messages"]:
        content = message["content"]
        content = content if isinstance(content, str) else json.dumps(content)
        shown += f"<{message['role']}>{content}{json.dumps(message.get('tool_calls', []))}"
    return shown


@given(conversations(), words, DIALECTS)
def test_in_every_dialect_a_prompt_only_ever_grows_and_has_all_that_was_said(
    requests: list[list[dict[str, Any]]], system: str, dialect: Dialect
) -> None:
    target = Target("http://127.0.0.1:1/v1", dialect=dialect)
    made = [translate(target, messages=turns, system=system, tools=[BASH]) for turns in requests]
    for earlier, later in zip(made, made[1:]):
        assert rendered(later).startswith(rendered(earlier)[:-2])
    roles = [message["role"] for message in made[-1]["messages"]]
    assert roles.count("system") <= 1 and "system" not in roles[1:]
    if dialect.alternates and dialect.writes_results:
        assert all(one != other for one, other in zip(roles, roles[1:]))
    everything = rendered(made[-1])
    for turn in requests[-1]:
        for block in turn["content"] if isinstance(turn["content"], list) else []:
            if block["type"] == "text":
                assert json.dumps(block["text"])[1:-1] in json.dumps(everything)


def test_every_result_stands_behind_its_call_and_every_call_has_one() -> None:
    made = messages(
        ("user", "go"),
        ("assistant", [use("a"), use("b"), use("c")]),
        ("user", [text("stop"), result("gone", "from before"), result("b", "two"), result("b", "again")]),
        ("assistant", [use("d")]),
        ("system", "note"),
        ("user", [result("d", "four")]),
        ("assistant", [use("e")]),
    )
    calls = [call["id"] for message in made for call in message.get("tool_calls", [])]
    results = [message["tool_call_id"] for message in made if message["role"] == "tool"]
    assert calls == ["a", "b", "c", "d", "e"] and sorted(results) == calls
    for number, message in enumerate(made):
        if message["role"] == "tool":
            assert made[number - 1]["role"] in ("assistant", "tool")
    whole = json.dumps(made)
    for kept in ("from before", "again", "note", "stop", "interrupted"):
        assert kept in whole
    assert made[-1]["role"] == "tool"


def test_results_stand_in_the_order_of_their_calls_not_in_that_in_which_they_ended() -> None:
    made = messages(
        ("user", "go"),
        ("assistant", [use("a"), use("b")]),
        ("user", [result("b", "two"), text("and"), result("a", "one")]),
    )
    assert [message["content"] for message in made[2:]] == ["one", "two", "and"]


# What the model reads.

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def test_images_go_to_a_model_that_sees() -> None:
    seeing = Target("http://127.0.0.1:1/v1", sees=True)
    linked = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    made = conversation(seeing, ("user", [text("see"), IMAGE, text("and"), linked]))
    assert made[0]["content"] == [
        {"type": "text", "text": "see\n\n[image 1]\n\nand\n\n[image 2]"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ]


def test_a_picture_that_is_followed_by_more_words_stays_where_it_was() -> None:
    seeing = Target("http://127.0.0.1:1/v1", sees=True)
    first = conversation(seeing, ("user", [text("see"), IMAGE]))
    later = conversation(seeing, ("user", [text("see"), IMAGE]), ("system", "note"), ("user", [IMAGE, text("more")]))
    assert json.dumps(later).startswith(json.dumps(first)[:-3])
    assert [part.get("text", "") for part in later[0]["content"]][::2] == [
        "see\n\n[image 1]",
        later[0]["content"][2]["text"],
        "",
    ]
    assert "[image 2]" in json.dumps(later) and later[0]["content"][-1]["type"] == "image_url"


def test_a_picture_from_a_tool_keeps_roles_alternating() -> None:
    target = Target("http://127.0.0.1:1/v1", sees=True, dialect=Dialect(calls="mistral", alternates=True))
    made = conversation(target, ("user", "go"), ("assistant", [use("t")]), ("user", [result("t", [IMAGE])]))
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "assistant", "user"]


def test_the_image_in_a_tool_result_follows_it_as_an_image_of_the_user() -> None:
    seeing = Target("http://127.0.0.1:1/v1", sees=True)
    turns = [("user", "go"), ("assistant", [use("t")]), ("user", [result("t", [text("shot:"), IMAGE])])]
    made = conversation(seeing, *turns)
    assert made[2] == {"role": "tool", "tool_call_id": "t", "content": "shot:\n\n[image 1]"}
    assert [part["type"] for part in made[3]["content"]] == ["text", "image_url"]
    blind = conversation(TARGET, *turns)
    assert blind[2]["content"] == "shot:\n\n[image: this model cannot see images]" and len(blind) == 3


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "the text"}}, "T\n\nthe text"),
        ({"type": "document", "source": {"type": "content", "content": [text("inner")]}}, "inner"),
        ({"type": "document", "source": {"type": "content", "content": "inner"}}, "inner"),
        (
            {"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": "dGhlIHRleHQ="}},
            "the text",
        ),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}, "pdf"),
        (
            {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
            "https://example.com/a.pdf",
        ),
        ({"type": "search_result", "title": "T", "source": "S", "content": [text("found")]}, "T\nS\nfound"),
        ({"type": "server_tool_use", "id": "x", "name": "web_search", "input": {"query": "cats"}}, "web_search\ncats"),
        (
            {
                "type": "web_search_tool_result",
                "tool_use_id": "x",
                "content": [
                    {"type": "web_search_result", "title": "T", "url": "https://u", "encrypted_content": "SECRET"}
                ],
            },
            "T\nhttps://u",
        ),
        ({"type": "code_execution_tool_result", "content": {"stdout": "out", "stderr": "", "return_code": 0}}, "out"),
        ({"type": "compaction", "content": "the summary"}, "the summary"),
        ({"type": "tool_reference", "tool_name": "Grep"}, "Grep"),
        ({"type": "something_new", "text": "words"}, "words"),
    ],
)
def test_what_there_is_to_read_in_a_block_is_read(block: dict[str, Any], shown: str) -> None:
    for turns in ([("user", [block])], [("user", "go"), ("assistant", [use("t")]), ("user", [result("t", [block])])]):
        content = messages(*turns)[-1]["content"]
        assert shown in content and "SECRET" not in content and "JVBE" not in content


def test_thinking_of_earlier_turns_is_not_repeated() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    made = messages(
        ("user", "a"), ("assistant", [thought, {"type": "redacted_thinking", "data": "x"}, text("b")]), ("user", "c")
    )
    assert made[1] == {"role": "assistant", "content": "b"}


def test_a_last_turn_of_the_assistant_is_to_be_continued() -> None:
    made = messages(("user", "Count."), ("assistant", "1, 2,"))
    assert made[1] == {"role": "assistant", "content": "1, 2,"}
    assert made[2]["role"] == "user" and "without repeating" in made[2]["content"]


# Tools.


def test_tools_that_the_client_runs_and_that_have_no_schema_get_their_published_one() -> None:
    tools = translate(
        tools=[
            {"type": "bash_20250124", "name": "bash"},
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            {"type": "memory_20250818", "name": "memory"},
            {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1},
            {"type": "custom", "name": "Mine", "input_schema": {"type": "object", "properties": None}},
        ]
    )["tools"]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    assert set(schemas["bash"]["properties"]) == {"command", "restart"}
    assert {"command", "path", "old_str", "new_str", "insert_line", "insert_text", "view_range"} <= set(
        schemas["str_replace_based_edit_tool"]["properties"]
    )
    assert schemas["str_replace_based_edit_tool"]["required"] == ["command", "path"]
    assert "rename" in schemas["memory"]["properties"]["command"]["enum"]
    assert "screenshot" in schemas["computer"]["properties"]["action"]["enum"]
    assert schemas["Mine"] == {"type": "object"}


@pytest.mark.parametrize(
    "kind", ["web_search_20250305", "web_fetch_20250910", "code_execution_20250825", "mcp_toolset"]
)
def test_tools_of_anthropics_servers_are_named_when_a_request_is_only_for_them(kind: str) -> None:
    server = {"type": kind, "name": "x"}
    assert unavailable_tool({"tools": [server]}).replace(" ", "_") == re.sub(r"_\d+$", "", kind)
    assert unavailable_tool({"tools": [server, BASH]}) == ""
    assert unavailable_tool({"tools": []}) == "" == unavailable_tool({})
    assert [tool["function"]["name"] for tool in translate(tools=[server, BASH])["tools"]] == ["Bash"]


@pytest.mark.parametrize(
    ("choice", "told"), [({"type": "any"}, "one of the tools"), ({"type": "tool", "name": "Bash"}, "the tool Bash")]
)
def test_a_call_that_is_asked_for_is_asked_for_in_words_where_the_engine_would_not_force_it(
    choice: Any, told: str
) -> None:
    request = translate(tools=[BASH], tool_choice=choice)
    assert told in request["messages"][-1]["content"] and request["tool_choice"] == "none"
    old = Target("http://127.0.0.1:1/v1", own_tools=False)
    request = translate(old, tools=[BASH], tool_choice=choice)
    assert told in request["messages"][-1]["content"] and request["tool_choice"] == "auto"
    assert translate(tools=[BASH], tool_choice={"type": "auto"})["messages"] == translate()["messages"]


def test_parallel_calls_can_be_switched_off() -> None:
    engine = Target("http://127.0.0.1:1/v1", own_tools=False, forces_calls=True)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert translate(engine, tools=[BASH], tool_choice=choice)["parallel_tool_calls"] is False
    assert "parallel_tool_calls" not in translate(tools=[BASH], tool_choice=choice)


# The rest of a request.


@pytest.mark.parametrize(
    ("switch", "body", "wanted"),
    [
        ("enable_thinking", {"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ("enable_thinking", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True}),
        ("enable_thinking", {"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ("enable_thinking", {}, {"enable_thinking": False}),
        ("reasoning_effort", {"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ("reasoning_effort", {"output_config": {"effort": "xhigh"}}, {"reasoning_effort": "high"}),
        ("reasoning_effort", {}, {"reasoning_effort": "medium"}),
        ("reasoning_effort", {"thinking": {"type": "disabled"}}, {"reasoning_effort": "low"}),
        ("", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, {}),
    ],
)
def test_thinking_is_switched_where_the_model_has_a_switch(switch: str, body: Any, wanted: dict[str, Any]) -> None:
    request = translate(Target("http://127.0.0.1:1/v1", dialect=Dialect(thinking=switch)), **body)
    assert {key: request[key] for key in ("enable_thinking", "reasoning_effort") if key in request} == wanted


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_an_answer_in_json_is_asked_of_the_engine_and_comes_without_thinking(place: str) -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    wanted = {"type": "json_schema", "schema": schema}
    body = {place: {"format": wanted} if place == "output_config" else wanted, "thinking": {"type": "adaptive"}}
    request = translate(Target("http://127.0.0.1:1/v1", dialect=Dialect(thinking="enable_thinking")), **body)
    assert request["response_format"] == {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    assert request["enable_thinking"] is False


def test_stops_without_text_are_left_out() -> None:
    assert translate(stop_sequences=["", "END"])["stop"] == ["END"]
    assert "stop" not in translate(stop_sequences=[""])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("top_p", True),
        ("top_k", 1.5),
        ("top_k", -1),
        ("stop_sequences", "END"),
        ("max_tokens", "many"),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("messages", [{"role": "user"}]),
        ("stop_sequences", [1]),
        ("tools", {"name": "x"}),
        ("tools", [{"name": "x"}]),
        ("tools", [{"input_schema": {}}]),
        ("messages", None),
        ("messages", 5),
    ],
)
def test_the_field_that_is_wrong_is_named(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match=field) as caught:
        translate(**{field: value})
    assert caught.value.status == 400


def test_max_tokens_are_held_to_what_the_window_still_has() -> None:
    request = translate(max_tokens=1000)
    assert fit_to_window(request, 500, 0.1, 0) == request
    assert fit_to_window(request, 500, 0.1, 10_000) == request
    assert fit_to_window(request, 1000, 0.1, 1500)["max_tokens"] == 500
    with pytest.raises(ApiError, match="prompt is too long: 2000 tokens > 1500 maximum") as caught:
        fit_to_window(request, 2000, 0.1, 1500)
    assert caught.value.status == 400
    assert fit_to_window(request, 1600, 0.1, 1500)["max_tokens"] == 60  # perhaps it fits


def test_the_estimate_learns_what_the_engine_counts() -> None:
    counter = TokenCount()
    assert counter.corrected(1000) == 1000 and counter.doubt > 0.3
    for estimate, tokens in ((1000, 1250), (2000, 2480), (3000, 3790)):
        assert counter.learn(estimate, tokens)
    assert not counter.learn(1000, 1250) and not counter.learn(50, 50_000)
    assert counter.doubt <= 0.1
    for estimate, tokens in ((3500, 4400), (1500, 1870), (20_000, 25_000)):
        assert abs(counter.corrected(estimate) / tokens - 1) < 0.02
    again = TokenCount(json.loads(json.dumps(counter.pairs)))
    assert again.corrected(3500) == counter.corrected(3500)
    assert TokenCount([None, [1], ["a", 2], [0, 1], [True, 2]]).pairs == []
    for number in range(100):
        counter.learn(10_000 + number, 12_000 + number)
    assert len(counter.pairs) <= TokenCount.KEPT


def test_an_image_counts_as_an_image_and_not_as_its_bytes() -> None:
    seeing = Target("http://127.0.0.1:1/v1", sees=True)
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 400_000}}
    request = translate(seeing, messages=[{"role": "user", "content": [text("see"), picture]}])
    assert 500 < estimate_tokens(json.dumps(request)) < 2000


def test_a_request_goes_back_into_the_form_in_which_engines_count() -> None:
    seeing = Target("http://127.0.0.1:1/v1", sees=True)
    body = {
        "system": "S",
        "tools": [BASH],
        "messages": [{"role": role, "content": content} for role, content in CALL_TURNS],
    }
    counted = count_request(translate_request(body, seeing))
    assert counted["system"] == "S" and counted["tools"][0]["input_schema"]["required"] == ["z"]
    assert [message["role"] for message in counted["messages"]] == ["user", "assistant", "user", "user", "user"]
    assert counted["messages"][1]["content"][1] == {
        "type": "tool_use",
        "id": "toolu_1",
        "name": "Bash",
        "input": {"command": "ls"},
    }
    assert counted["messages"][2]["content"] == [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "one"}]
    assert (
        translate_request({**counted, "max_tokens": 1}, seeing)["messages"]
        == translate_request(body, seeing)["messages"]
    )
