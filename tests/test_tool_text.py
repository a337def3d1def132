"""Section 6: the model's text -> text, thinking and tool calls, wherever the stream is cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyclaude import JsonRepair, ToolText

TOOLS: dict[str, dict[str, Any]] = {
    "Bash": {
        "properties": {"command": {"type": "string"}, "timeout": {"type": "integer"}, "background": {"type": "boolean"}}
    },
    "Write": {
        "properties": {
            "file_path": {"type": "string"},
            "content": {"type": "string"},
            "tags": {"type": "array"},
            "meta": {"type": ["object", "null"]},
        }
    },
    "Get": {},
}
CODE = 'def f(x):\n    """doc"""\n    if x < 3 and "</b>" != \'{"a": [1, 2]}\':\n        return "\\n\\t" + "<parameter=x>" # </parameter> here\n    return "</tool_call>"\n\n'


def parse(pieces: list[str], natural: bool = True) -> list[tuple[str, str]]:
    """The events of a reply, neighbouring ones of a kind put together."""
    parser, found = ToolText(TOOLS), []
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.end(natural):
        if found and found[-1][0] == event[0] and event[0] != "call":
            found[-1] = (event[0], found[-1][1] + event[1])
        else:
            found.append(event)
    return found


def call(name: str, arguments: Any) -> list[Any]:
    return [("call", name), ("arguments", arguments)]


def hermes(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def coder(name: str, opener: str = "<tool_call>\n", **parameters: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"{opener}<function={name}>\n{inside}</function>\n</tool_call>"


# (what the model wrote, the calls and texts in it; arguments as Python values)
CASES: dict[str, tuple[str, list[Any]]] = {
    "text": ("Just text with <b>tags</b> & {braces}.", [("text", "Just text with <b>tags</b> & {braces}.")]),
    "hermes": (hermes("Bash", {"command": "ls"}), call("Bash", {"command": "ls"})),
    "hermes without space": (
        '<tool_call>{"name":"Bash","arguments":{"command":"ls"}}</tool_call>',
        call("Bash", {"command": "ls"}),
    ),
    "hermes after text": (
        "Look:\n" + hermes("Bash", {"command": "ls"}),
        [("text", "Look:\n"), *call("Bash", {"command": "ls"})],
    ),
    "hermes, code inside": (
        hermes("Write", {"file_path": "a.py", "content": CODE}),
        call("Write", {"file_path": "a.py", "content": CODE}),
    ),
    "hermes, nested values": (
        hermes("Get", {"a": [1, {"b": None}], "c": 1.5e-3, "d": True}),
        call("Get", {"a": [1, {"b": None}], "c": 1.5e-3, "d": True}),
    ),
    "hermes, arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "Get"}</tool_call>', call("Get", {"a": 1})),
    "hermes, parameters": ('<tool_call>{"name": "Get", "parameters": {"a": 1}}</tool_call>', call("Get", {"a": 1})),
    "hermes, id and type": (
        '<tool_call>{"type": "function", "id": "x{1}", "name": "Get", "arguments": {"a": 1}, "id": "2"}</tool_call>.',
        [*call("Get", {"a": 1}), ("text", ".")],
    ),
    "hermes, arguments as text": (
        '<tool_call>{"name": "Get", "arguments": "{\\"a\\": 1}"}</tool_call>',
        call("Get", {"a": 1}),
    ),
    "hermes, no arguments": ('<tool_call>{"name": "Get"}</tool_call>', call("Get", {})),
    "hermes, null arguments": ('<tool_call>{"name": "Get", "arguments": null}</tool_call>', call("Get", {})),
    "hermes, two": (
        hermes("Bash", {"command": "ls"}) + "\n" + hermes("Get", {}),
        [*call("Bash", {"command": "ls"}), ("text", "\n"), *call("Get", {})],
    ),
    "hermes, closing tag missing": ('<tool_call>{"name": "Get", "arguments": {"a": 1}}', call("Get", {"a": 1})),
    "hermes, last braces missing": ('<tool_call>{"name": "Get", "arguments": {"a": [1, 2', call("Get", {"a": [1, 2]})),
    "hermes, brace missing before tag": (
        '<tool_call>{"name": "Get", "arguments": {"a": 1</tool_call>!',
        [*call("Get", {"a": 1}), ("text", "!")],
    ),
    "hermes, trailing comma": (
        '<tool_call>{"name": "Get", "arguments": {"a": [1, 2, ], }}</tool_call>',
        call("Get", {"a": [1, 2]}),
    ),
    "hermes, single quotes": (
        "<tool_call>{'name': 'Get', 'arguments': {'a': 'say \"x\"', 'b': True}}</tool_call>",
        call("Get", {"a": 'say "x"', "b": True}),
    ),
    "hermes, raw newline": (
        '<tool_call>{"name": "Get", "arguments": {"a": "x\ny\tz"}}</tool_call>',
        call("Get", {"a": "x\ny\tz"}),
    ),
    "hermes, bad escape": (
        '<tool_call>{"name": "Get", "arguments": {"a": "\\d+ \\u00e9"}}</tool_call>',
        call("Get", {"a": "\\d+ é"}),
    ),
    "coder": (coder("Bash", command="ls"), call("Bash", {"command": "ls"})),
    "coder without opener": (
        "So:\n" + coder("Bash", opener="", command="ls -la"),
        [("text", "So:\n"), *call("Bash", {"command": "ls -la"})],
    ),
    "coder, code inside": (
        coder("Write", file_path="a.py", content=CODE),
        call("Write", {"file_path": "a.py", "content": CODE}),
    ),
    "coder, coerced": (
        coder("Bash", command="3", timeout="30", background="True"),
        call("Bash", {"command": "3", "timeout": 30, "background": True}),
    ),
    "coder, structures": (
        coder("Write", file_path="3", tags='["a", 1]', meta='{"k": null}'),
        call("Write", {"file_path": "3", "tags": ["a", 1], "meta": {"k": None}}),
    ),
    "coder, not the type it should be": (coder("Bash", timeout="soon"), call("Bash", {"timeout": "soon"})),
    "coder, no parameters": ("<tool_call>\n<function=Get>\n</function>\n</tool_call>", call("Get", {})),
    "coder, one line": ("<function=Bash><parameter=command>ls</parameter></function>", call("Bash", {"command": "ls"})),
    "coder, empty value": (coder("Bash", command=""), call("Bash", {"command": ""})),
    "coder, two": (
        coder("Bash", command="a") + "\n" + coder("Bash", opener="", command="b"),
        [*call("Bash", {"command": "a"}), ("text", "\n"), *call("Bash", {"command": "b"})],
    ),
    "coder, no tag behind the value": (
        "<tool_call>\n<function=Bash>\n<parameter=command>\nls\n</function>\n</tool_call>",
        call("Bash", {"command": "ls"}),
    ),
    "coder, ends behind a value": (
        "<function=Bash>\n<parameter=command>\nls\n</parameter>",
        call("Bash", {"command": "ls"}),
    ),
    "thinking": (
        "<think>\nhm <tool_call> x\n</think>\n\nDone.",
        [("thinking", "\nhm <tool_call> x\n"), ("text", "\n\nDone.")],
    ),
    "thinking, then a call": ("<think>go</think>" + hermes("Get", {}), [("thinking", "go"), *call("Get", {})]),
}
NEGATIVES = [
    hermes("Nope", {"command": "ls"}),
    coder("Nope", command="ls"),
    "<tool_call>",
    "<tool_call>\n",
    "A <tool_call> is XML. <function=Bash> is too.",
    "<tool_call>[1, 2]</tool_call>",
    '<tool_call>{"nome": "Bash"}</tool_call>',
    "<function=",
    "<function=Bash",
    "a < b && c <t",
    'Type `<tool_call>{"name": "Bash"}`',
    f"Write it so:\n```xml\n{hermes('Bash', {'command': 'ls'})}\n```\nThat is all.",
    f"```\n{coder('Bash', command='ls')}\n```",
    "`" + hermes("Get", {}) + "`",
    "Text <think>not thinking</think>",
    '<tool_call>{"name": 5}</tool_call>',
    "<tool_call>{</tool_call>",
]


def valued(events: list[tuple[str, str]]) -> list[Any]:
    return [(kind, json.loads(value)) if kind == "arguments" else (kind, value) for kind, value in events]


@pytest.mark.parametrize("name", CASES)
def test_a_reply_is_read_the_same_wherever_it_is_cut(name: str) -> None:
    source, expected = CASES[name]
    assert valued(parse([source])) == expected
    assert valued(parse(list(source))) == expected
    for cut in range(len(source)):
        assert valued(parse([source[:cut], source[cut:]])) == expected


@pytest.mark.parametrize("source", NEGATIVES)
def test_what_is_no_call_stays_text_unchanged(source: str) -> None:
    for pieces in ([source], list(source), *([source[:cut], source[cut:]] for cut in range(len(source)))):
        assert parse(pieces) == [("text", source)]


@given(
    st.lists(
        st.one_of(
            st.sampled_from([source for source, _ in CASES.values()] + NEGATIVES),
            st.text(max_size=8),
            st.sampled_from("<>{}\"'`\n/="),
        ),
        max_size=5,
    ),
    st.randoms(),
)
def test_random_text_and_cuts_lose_nothing_and_make_nothing_up(parts: list[str], dice: random.Random) -> None:
    source = "".join(parts)
    cuts = sorted(dice.sample(range(len(source) + 1), min(len(source), 6)))
    pieces = [source[start:end] for start, end in zip([0, *cuts], [*cuts, len(source)])]
    whole, split = parse([source]), parse(pieces)
    assert whole == split
    if all(kind == "text" for kind, _ in whole):
        assert "".join(value for _, value in whole) == source
    for kind, value in whole:
        if kind == "call":
            assert value in TOOLS


def test_without_tools_all_is_text() -> None:
    source = hermes("Bash", {"command": "ls"})
    parser = ToolText({})
    assert "".join(value for _, value in parser.feed(source) + parser.end(True)) == source


def test_text_streams_at_once_and_little_is_held_back() -> None:
    parser = ToolText(TOOLS)
    said = ""
    source = "Hello < world <tool_cal <function- done"
    for number, char in enumerate(source):
        said += "".join(value for _, value in parser.feed(char))
        assert len(source[: number + 1]) - len(said) <= len("<tool_call>") - 1
    assert said == source


@pytest.mark.parametrize(
    "source",
    [
        hermes("Write", {"file_path": "a", "content": "line\n" * 300}),
        coder("Write", file_path="a", content="line\n" * 300),
    ],
)
def test_arguments_stream_as_they_are_generated(source: str) -> None:
    parser = ToolText(TOOLS)
    behind, events = 0, 0
    for number in range(0, len(source), 7):
        events += sum(kind == "arguments" for kind, _ in parser.feed(source[number : number + 7]))
        behind = number
    assert events > behind / 7 * 0.9


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name][1][0][0] == "call" and "missing" not in name and "ends" not in name]
)
def test_a_call_that_is_cut_off_is_never_completed(name: str) -> None:
    source, expected = CASES[name]
    whole = json.dumps(expected[1][1])
    for end in range(len(source)):
        events = parse([source[:end]], natural=False)
        arguments = [value for kind, value in events if kind == "arguments"]
        for value in arguments[:1]:
            try:
                found = json.loads(value)
            except ValueError:
                continue  # left open, as it must be
            assert json.dumps(found) == whole, source[:end]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=5), json_values, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 7),
)
def test_correct_json_passes_unchanged_in_value(
    value: dict[str, Any], ascii_only: bool, indent: int | None, size: int
) -> None:
    source = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    repair, out = JsonRepair(), ""
    for start in range(0, len(source), size):
        used, fragment = repair.feed(source[start : start + size])
        assert used == len(source[start : start + size])
        out += fragment
    assert repair.done and json.loads(out) == value
