"""Section 6: the model's text -> text, thinking and tool calls, wherever the stream is cut."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_formats import BARE, CODE, NO_CALLS, PAR, SHAPES, TOOLS, WRITTEN, call

from anyclaude import LEAKS, TOOL_FORMATS, JsonRepair, ToolText, write_calls


def parse(pieces: list[str], natural: bool = True) -> list[tuple[str, str]]:
    """The events of a reply, neighbouring ones of a kind put together; the same, whatever needs no `feed`."""
    fed, passed_on = ToolText(TOOLS), ToolText(TOOLS)
    events = [event for piece in pieces for event in fed.feed(piece)] + fed.end(natural)
    others = []
    for piece in pieces:
        if piece and set(piece.encode()) <= set(passed_on.free):
            passed_on.pass_on(piece)
            others.append(("text", piece))
        else:
            others += passed_on.feed(piece)
    assert merged(events) == merged(others + passed_on.end(natural))
    return merged(events)


def merged(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for event in events:
        if found and found[-1][0] == event[0] and event[0] != "call":
            found[-1] = (event[0], found[-1][1] + event[1])
        else:
            found.append(event)
    return found


def hermes(name: str, arguments: Any) -> str:
    return str(WRITTEN["hermes"](name, arguments))


def coder(name: str, opener: str = "<tool_call>\n", **parameters: str) -> str:
    return str(WRITTEN["qwen3-coder"](name, parameters)).replace("<tool_call>\n", opener, 1)


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
    **SHAPES,
    "thinking": (
        "<think>\nhm <tool_call> x\n</think>\n\nDone.",
        [("thinking", "\nhm <tool_call> x\n"), ("text", "\n\nDone.")],
    ),
    "thinking, then a call": ("<think>go</think>" + hermes("Get", {}), [("thinking", "go"), *call("Get", {})]),
}


def valued(events: list[tuple[str, str]]) -> list[Any]:
    return [(kind, json.loads(value)) if kind == "arguments" else (kind, value) for kind, value in events]


@pytest.mark.parametrize("name", CASES)
def test_a_reply_is_read_the_same_wherever_it_is_cut(name: str) -> None:
    source, expected = CASES[name]
    assert valued(parse([source])) == expected
    assert valued(parse(list(source))) == expected
    for cut in range(len(source)):
        assert valued(parse([source[:cut], source[cut:]])) == expected


@pytest.mark.parametrize("source", NO_CALLS)
def test_what_is_no_call_stays_text_unchanged(source: str) -> None:
    for pieces in ([source], list(source), *([source[:cut], source[cut:]] for cut in range(len(source)))):
        assert parse(pieces) == [("text", source)]


@given(
    st.lists(
        st.one_of(
            st.sampled_from([source for source, _ in CASES.values()] + NO_CALLS),
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
    if all(kind == "text" for kind, _ in whole) and not any(leak in source for leak in LEAKS):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITTEN, *BARE])
def test_each_format_is_read_wherever_it_is_cut(name: str) -> None:
    write = {**WRITTEN, **BARE}[name]
    before = [] if name in BARE else [("text", "I write:\n")]
    source = ("I write:\n" if before else "") + write("Write", PAR)
    expected = [*before, *call("Write", PAR)]
    dice = random.Random(1)
    cuts = [sorted(dice.sample(range(len(source)), 9)) for _ in range(30)]
    pieces = [[source[a:b] for a, b in zip([0, *places], [*places, len(source)])] for places in cuts]
    for cut in [[source], list(source), *pieces, *([source[:at], source[at:]] for at in range(len(source)))]:
        assert [event for event in valued(parse(cut)) if event != ("text", " ")] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_calls_follow_one_another_in_any_format(name: str) -> None:
    for other in WRITTEN.values():
        source = WRITTEN[name]("Bash", {"command": "ls <b>"}) + "\n" + other("Get", {}) + "\nDone."
        events = [event for event in valued(parse([source])) if event != ("text", "\n")]
        assert events == [*call("Bash", {"command": "ls <b>"}), *call("Get", {}), ("text", "\nDone.")]


@pytest.mark.parametrize("first", [row.name for row in TOOL_FORMATS])
def test_the_format_of_the_models_template_is_read_and_no_other_is_lost(first: str) -> None:
    for name in ("hermes", "qwen3-coder", "glm-4.5", "mistral"):
        parser = ToolText(TOOLS, first)
        events = parser.feed(WRITTEN[name]("Bash", {"command": "ls"})) + parser.end(True)
        assert [value for kind, value in events if kind == "call"] == ["Bash"]


@pytest.mark.parametrize("row", [row.name for row in TOOL_FORMATS if "," not in row.name])
def test_what_we_write_for_a_template_we_also_read(row: str) -> None:
    calls = [(0, "Write", {key: value for key, value in PAR.items() if key != "meta"}), (1, "Get", {})]
    events = [event for event in valued(parse([write_calls(row, calls)])) if event[0] != "text"]
    assert events == [*call("Write", calls[0][2]), *call("Get", {})]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (row, row)
        for row in WRITTEN
        if row in {row.name for row in TOOL_FORMATS} and row not in ("mistral-v11", "deepseek-v3.2")
    ]
    + [("glm", "glm-4.5"), ("bare", "bare")],
)
def test_calls_are_written_as_the_template_writes_them(row: str, name: str) -> None:
    if "gemma" not in row and row != "harmony":
        assert write_calls(row, [(0, "Bash", {"command": "ls"})]) == {**WRITTEN, **BARE}[name](
            "Bash", {"command": "ls"}
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITTEN, *BARE])
def test_arguments_stream_as_they_are_generated(name: str) -> None:
    source = {**WRITTEN, **BARE}[name]("Write", {"file_path": "a", "content": "line\n" * 300})
    parser = ToolText(TOOLS)
    begun = streamed = 0
    for start in range(0, len(source), 7):
        kinds = {kind for kind, _ in parser.feed(source[start : start + 7])}
        begun += "call" in kinds
        streamed += "arguments" in kinds
    assert begun == 1 and streamed > len(source) / 7 * 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITTEN, *BARE])
def test_what_streams_is_always_the_beginning_of_the_same_json(name: str) -> None:
    source = {**WRITTEN, **BARE}[name]("Write", PAR)
    whole = "".join(value for kind, value in parse([source]) if kind == "arguments")
    for end in range(len(source)):
        arguments = "".join(value for kind, value in parse([source[:end]], natural=False) if kind == "arguments")
        assert whole.startswith(arguments)
        assert arguments != whole or end > len(source) - 60


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_markup_that_is_cut_off_does_not_show(name: str) -> None:
    source = "So.\n" + WRITTEN[name]("Bash", {"command": "ls"})
    for end in range(len(source)):
        text = "".join(value for kind, value in parse([source[:end]], natural=False) if kind == "text")
        assert "So.\n".startswith(text) or len(text) < len("So.\n") + len("<|tool_calls_section_begin|>")


@pytest.mark.parametrize(
    ("source", "natural"),
    [
        ("<tool_call>\n<function=Bash>\n<parameter=comm", False),
        ("<tool_call>\n<function=Bash>\n<parameter=comm", True),
        ("<tool_call>Get\n<arg_key>x", False),
        ('<minimax:tool_call>\n<invoke name="Get">\n<parameter na', False),
        ('<tool_call>{"name": "Get", "arguments": nul', False),
        ('<tool_call>{"name": "Get", "arguments": "{\\"a', False),
        ("<tool_call>\n<function=Bash>\n<parameter=command>\nrm -rf /tmp/", True),
    ],
)
def test_a_call_without_its_end_is_not_one_to_run(source: str, natural: bool) -> None:
    events = parse([source], natural)
    assert events[0][0] == "call" and [kind for kind, _ in events[1:]] == ["arguments"]
    with pytest.raises(ValueError):
        json.loads(events[1][1])


@pytest.mark.parametrize(
    "before",
    [
        "Run:\n```bash\nls\n```",
        "```ls -la``` is what I run.\n",
        "- ```bash\n  ls\n  ```\n",
        "```\n~~~\n```\n",
        "```bash\nls```\n",
        "`ls` and `x`",
        "1. ```\n   a\n   ```\n",
    ],
)
@pytest.mark.parametrize("name", ["hermes", "deepseek", "mistral", "kimi"])
def test_a_call_behind_code_is_a_call(before: str, name: str) -> None:
    events = parse(list(before + WRITTEN[name]("Bash", {"command": "ls"})))
    assert valued(events) == [("text", before), *call("Bash", {"command": "ls"})]


@pytest.mark.parametrize(
    "opener", ["[TOOL_CALLS]", "<tool_call>", "<function=Bash>", "<tool_call>Bash", "[", "<tool_calls>["]
)
def test_a_model_that_falls_into_line_ends_costs_no_time(opener: str) -> None:
    parser, started = ToolText(TOOLS), time.monotonic()
    parser.feed(opener)
    for _ in range(3000):
        parser.feed("\n")
    parser.feed("x")
    parser.end(True)
    assert time.monotonic() - started < 2


def test_long_arguments_are_read_in_time() -> None:
    source = hermes("Write", {"file_path": "a", "content": "line\n" * 60_000})
    parser, started = ToolText(TOOLS), time.monotonic()
    for start in range(0, len(source), 8):
        parser.feed(source[start : start + 8])
    assert time.monotonic() - started < 8


def test_numbers_that_json_has_not_are_texts() -> None:
    assert valued(parse([coder("Bash", timeout="NaN")])) == call("Bash", {"timeout": "NaN"})
    source = '<tool_call>{"name": "Get", "arguments": {"a": NaN, "b": -Infinity}}</tool_call>'
    assert valued(parse([source])) == call("Get", {"a": "NaN", "b": "-Infinity"})


def test_thinking_whose_opener_was_the_end_of_the_prompt_is_thinking() -> None:
    for source in ("hm</think>\n\nDone.", "<think>hm</think>\n\nDone.", "\n<think>hm</think>\n\nDone."):
        for cut in range(len(source)):
            parser = ToolText(TOOLS, thinks=True)
            events = parser.feed(source[:cut]) + parser.feed(source[cut:]) + parser.end(True)
            assert "".join(value for kind, value in events if kind == "thinking") == "hm"
            assert "".join(value for kind, value in events if kind == "text").strip() == "Done."


def test_a_model_that_never_closes_its_thinking_has_answered() -> None:
    parser = ToolText(TOOLS, thinks=True)
    events = parser.feed("Hm. " + hermes("Get", {})) + parser.end(True)
    assert [event for event in events if event[0] != "thinking"] == [("call", "Get"), ("arguments", "{}")]
    parser = ToolText(TOOLS, thinks=True)
    events = parser.feed("The answer is 4.") + parser.end(True)
    assert ("text", "The answer is 4.") in events


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
    rest = ""
    for start in range(0, len(source), size):
        rest += source[start : start + size]
        used, fragment = repair.feed(rest)
        rest = rest[used:]
        assert len(rest) < 5
        out += fragment
    assert repair.done and json.loads(out) == value
