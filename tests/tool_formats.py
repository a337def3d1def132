"""How models write tool calls: for each format a call in its usual form, and shapes that were seen, with what they mean.

`written(name, arguments)` is one call; a shape is (what the model wrote, the texts and calls in it)."""

from __future__ import annotations

import json
import re
from typing import Any

TOOLS: dict[str, dict[str, Any]] = {
    "Bash": {
        "properties": {"command": {"type": "string"}, "timeout": {"type": "integer"}, "background": {"type": "boolean"}}
    },
    "Write": {
        "properties": {
            "file_path": {"type": "string"},
            "content": {"type": "string"},
            "tags": {"type": "array"},
            "meta": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        }
    },
    "Get": {"properties": {"a": {}}},
}
CODE = (
    'def f(x):\n    """doc"""\n    if x < 3 and "</b>" != \'{"a": [1, 2]}\':\n'
    '        return "\\n\\t" + "<parameter=x>" # </parameter> </arg_value> here\n    return "</tool_call>" + "``"\n\n'
)
PAR = {"file_path": "a b.py", "content": CODE, "tags": ["x", 1], "meta": {"k": [None, True]}}


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parameters(form: str, arguments: dict[str, Any]) -> str:
    return "".join(form.replace("KEY", key).replace("VALUE", text_of(value)) for key, value in arguments.items())


def gemma(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, list):
        return "[" + ",".join(gemma(item, quote) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(item, quote)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def named(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


# format -> one call in it
WRITTEN: dict[str, Any] = {
    "hermes": lambda name, arguments: f"<tool_call>\n{named(name, arguments)}\n</tool_call>",
    "qwen3-coder": lambda name, arguments: (
        f"<tool_call>\n<function={name}>\n"
        + parameters("<parameter=KEY>\nVALUE\n</parameter>\n", arguments)
        + "</function>\n</tool_call>"
    ),
    "qwen3-coder without opener": lambda name, arguments: (
        f"<function={name}>\n" + parameters("<parameter=KEY>\nVALUE\n</parameter>\n", arguments) + "</function>\n"
        "</tool_call>"
    ),
    "seed": lambda name, arguments: (
        f"<seed:tool_call>\n<function={name}>\n"
        + parameters("<parameter=KEY>VALUE</parameter>\n", arguments)
        + "</function>\n</seed:tool_call>"
    ),
    "glm-4.5": lambda name, arguments: (
        f"<tool_call>{name}\n"
        + parameters("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n", arguments)
        + "</tool_call>"
    ),
    "glm-4.7": lambda name, arguments: (
        f"<tool_call>{name}"
        + parameters("<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>", arguments)
        + "</tool_call>"
    ),
    "minimax": lambda name, arguments: (
        f'<minimax:tool_call>\n<invoke name="{name}">\n'
        + parameters('<parameter name="KEY">VALUE</parameter>\n', arguments)
        + "</invoke>\n</minimax:tool_call>"
    ),
    "deepseek-v3.2": lambda name, arguments: (
        f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="{name}">\n'
        + parameters('<｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>\n', arguments)
        + "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    "kimi": lambda name, arguments: (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>"
        f"{json.dumps(arguments)}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "deepseek": lambda name, arguments: (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek-v3.1": lambda name, arguments: (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    ),
    "harmony": lambda name, arguments: (
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}<|call|>"
    ),
    "harmony, recipient in the role": lambda name, arguments: (
        f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{json.dumps(arguments)}<|call|>"
    ),
    "harmony on the analysis channel": lambda name, arguments: (
        f"<|start|>assistant<|channel|>analysis to=functions.{name}<|message|>{json.dumps(arguments)}<|call|>"
    ),
    "gemma": lambda name, arguments: "<|tool_call>call:" + name + gemma(arguments, '<|"|>') + "<tool_call|>",
    "functiongemma": lambda name, arguments: (
        "<start_function_call>call:" + name + gemma(arguments, "<escape>") + "<end_function_call>"
    ),
    "mistral-v11": lambda name, arguments: f"[TOOL_CALLS]{name}[CALL_ID]aB3dE6gH9[ARGS]{json.dumps(arguments)}",
    "mistral": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}",
    "mistral, specials skipped": lambda name, arguments: f"[TOOL_CALLS]{name}{json.dumps(arguments)}",
    "mistral-list": lambda name, arguments: f"[TOOL_CALLS] [{named(name, arguments)}]",
    "llama": lambda name, arguments: "<|python_tag|>" + named(name, arguments, "parameters"),
    "llama-function": lambda name, arguments: f"<function={name}>{json.dumps(arguments)}</function>",
    "granite": lambda name, arguments: f"<|tool_call|>[{named(name, arguments)}]",
    "hunyuan": lambda name, arguments: f"<tool_calls>[{named(name, arguments)}]</tool_calls>",
}
# Only at the beginning of a reply: nothing tells them from text but that they come first.
BARE: dict[str, Any] = {
    "bare": lambda name, arguments: named(name, arguments, "parameters"),
    "bare, with a type": lambda name, arguments: (
        '{"type": "function", "name": ' + json.dumps(name) + ', "parameters": ' + json.dumps(arguments) + "}"
    ),
    "bare list": lambda name, arguments: f"[{named(name, arguments)}]",
    "harmony, after the prompt's own role": lambda name, arguments: (
        f" to=functions.{name}<|channel|>commentary json<|message|>{json.dumps(arguments)}<|call|>"
    ),
}


def call(name: str, arguments: Any) -> list[Any]:
    return [("call", name), ("arguments", arguments)]


LS, GET = call("Bash", {"command": "ls"}), call("Get", {})
KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
# Shapes from the tests and the issues of the parsers in vLLM, SGLang, llama.cpp, mlx-lm, Ollama and mistral.rs.
SHAPES: dict[str, tuple[str, list[Any]]] = {
    "kimi: two in a section, spaces and lines": (
        "Let me.\n<|tool_calls_section_begin|>\n"
        + KIMI.format("Bash", 0, ' {"command": "ls"} ')
        + "\n"
        + KIMI.format("Get", 1, "{}")
        + "\n<|tool_calls_section_end|>\nDone.",
        [("text", "Let me.\n"), *LS, ("text", "\n"), *GET, ("text", "\nDone.")],
    ),
    "kimi: the call ends unclosed thinking": (
        "<think>I call it<|tool_calls_section_begin|>" + KIMI.format("Get", 0, "{}") + "<|tool_calls_section_end|>",
        [("thinking", "I call it"), *GET],
    ),
    "minimax: two in a wrapper": (
        (
            '<minimax:tool_call>\n<invoke name="Bash">\n<parameter name="command">ls</parameter>\n</invoke>\n'
            '<invoke name="Get">\n</invoke>\n</minimax:tool_call>'
        ),
        [*LS, ("text", "\n"), *GET],
    ),
    "minimax: without wrapper": (
        (
            '<invoke name="Bash">\n<parameter name="command">ls</parameter>\n<parameter name="background">True</parameter>\n'
            "</invoke>"
        ),
        call("Bash", {"command": "ls", "background": True}),
    ),
    "deepseek: two, a leaked end": (
        (
            '<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>Bash\n```json\n{"command": "ls"}\n```'
            "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>Get\n```json\n{}\n```<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        ),
        [*LS, ("text", "\n"), *GET],
    ),
    "deepseek: thinking without its opener": (
        "</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>Get<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        GET,
    ),
    "glm: no arguments": ("Let me see.</think><tool_call>Get</tool_call>", [("text", "Let me see."), *GET]),
    "glm: words of Python, text behind": (
        (
            "<tool_call>Bash\n<arg_key>command</arg_key>\n<arg_value>ls</arg_value>\n<arg_key>background</arg_key>\n"
            "<arg_value>False</arg_value>\n<arg_key>timeout</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\nThen this."
        ),
        [*call("Bash", {"command": "ls", "background": False, "timeout": 3}), ("text", "\nThen this.")],
    ),
    "mistral: three in a list": (
        (
            '[TOOL_CALLS] [{"name": "Get", "arguments": {}, "id": "call00001"}, {"arguments": {"command": "ls"}, '
            '"name": "Bash"}, {"name": "Get", "arguments": {"a": "name"}}]'
        ),
        [*GET, *LS, *call("Get", {"a": "name"})],
    ),
    "mistral: two by name": (
        'Both.[TOOL_CALLS]Bash{"command": "ls"}[TOOL_CALLS]Get[ARGS]{}</s>',
        [("text", "Both."), *LS, *GET],
    ),
    "mistral: thinking": (
        "[THINK]I could [TOOL_CALLS]Get[ARGS]{} it[/THINK][TOOL_CALLS]Get[ARGS]{}",
        [("thinking", "I could [TOOL_CALLS]Get[ARGS]{} it"), *GET],
    ),
    "llama: several, separated": (
        (
            '{"name": "Bash", "parameters": {"command": "ls"}}; {"name": "Get", "parameters": {}};\n'
            '{"name": "Get", "arguments": {}}'
        ),
        [*LS, ("text", " "), *GET, ("text", "\n"), *GET],
    ),
    "llama: text in front": ('I\'ll look.<|python_tag|>{"name":"Get","parameters":{}}', [("text", "I'll look."), *GET]),
    "harmony: a whole reply": (
        (
            "<|channel|>analysis<|message|>Need to look.<|end|><|start|>assistant<|channel|>commentary<|message|>"
            "**Plan**: look.<|end|><|start|>assistant<|channel|>commentary to=functions.Bash<|constrain|>json<|message|>"
            '{"command": "ls"}<|call|>'
        ),
        [("thinking", "Need to look."), ("text", "**Plan**: look."), *LS],
    ),
    "harmony: an answer": (
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>",
        [("thinking", "Easy."), ("text", "Hello.")],
    ),
    "gemma: quotes, backslashes and lines are raw": (
        (
            '<|channel>thought\nI check.<channel|><|tool_call>call:Bash{background:true,command:<|"|>echo "a" \\n {b}\n'
            'C:\\x<|"|>,timeout:3}<tool_call|>'
        ),
        [
            ("thinking", "I check."),
            *call("Bash", {"background": True, "command": 'echo "a" \\n {b}\nC:\\x', "timeout": 3}),
        ],
    ),
    "gemma: JSON quotes among its own, no closer": (
        '<|tool_call>call:Write{file_path:"a \\"b\\"",tags:[<|"|>x<|"|>,{k:1.5e10}]}',
        call("Write", {"file_path": 'a "b"', "tags": ["x", {"k": 1.5e10}]}),
    ),
    "gemma: ends the turn": ("<|tool_call>call:Get{}<tool_call|><|tool_response>", GET),
    "functiongemma: two": (
        (
            "Let me check.<start_function_call>call:Get{a:<escape>x<escape>}<end_function_call><start_function_call>call:Get{}"
            "<end_function_call>"
        ),
        [("text", "Let me check."), *call("Get", {"a": "x"}), *GET],
    ),
    "hermes: two without lines": (
        '<tool_call>{"name": "Get", "arguments": {}}</tool_call><tool_call>{"name": "Get", "arguments": {"a": 1}}</tool_call>',
        [*GET, *call("Get", {"a": 1})],
    ),
    "hermes: two in one tag": (
        '<tool_call>\n{"name": "Get", "arguments": {}}\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>',
        [*GET, *LS],
    ),
    "hermes: a bare key": ('<tool_call>{"name": "Get", "arguments": {a: 1}}</tool_call>', call("Get", {"a": 1})),
    "thinking again, behind a call": (
        '<think>one</think><tool_call>{"name": "Get"}</tool_call>\n<think>two</think>Done.',
        [("thinking", "one"), *GET, ("text", "\n"), ("thinking", "two"), ("text", "Done.")],
    ),
    "a name in quotes": ('<tool_call>\n<function="Get">\n</function>\n</tool_call>', GET),
    "hermes: a list in the tag": ('<tool_call>[{"name": "Get", "arguments": {}}]</tool_call>', GET),
    "gemma: one colon more": ("<|tool_call>:call:Get{}<tool_call|>", GET),
    "harmony: an answer in JSON": ('<|channel|>final <|constrain|>json<|message|>{"a": 1}', [("text", '{"a": 1}')]),
    "llama: Python behind the tag": ("<|python_tag|>print(1)", [("text", "print(1)")]),
    "a path in JSON": (
        '<tool_call>{"name": "Bash", "arguments": {"command": "C:\\users\\u00e9\\u12"}}</tool_call>',
        call("Bash", {"command": "C:\\usersé\\u12"}),
    ),
    "Python's words and commas in a parameter": (
        WRITTEN["qwen3-coder"]("Write", {"tags": "['a', True, ]", "meta": "{'k': None,}"}),
        call("Write", {"tags": ["a", True], "meta": {"k": None}}),
    ),
    "a call in thinking that is never closed": (
        '<think>I do it.\n<tool_call>\n{"name": "Get", "arguments": {}}\n</tool_call>',
        [("thinking", 'I do it.\n<tool_call>\n{"name": "Get", "arguments": {}}\n</tool_call>'), *GET],
    ),
    "a fence in one line is none": (
        '```ls``` lists files.\n<tool_call>{"name": "Get"}</tool_call>',
        [("text", "```ls``` lists files.\n"), *GET],
    ),
    "leaked tokens": ("Hello.<|im_end|>\n<|im_start|>assistant\nMore.<|eot_id|>", [("text", "Hello.\n\nMore.")]),
    "a leaked token behind code": ("```\nx\n```<|im_end|>", [("text", "```\nx\n```")]),
    "a leaked token behind an open fence": ("```\nx <|eot_id|>", [("text", "```\nx ")]),
}
LEAK = re.compile(r"<\|call\|>|<\|python_tag\|>")  # these never show, whatever stands around them
NO_CALLS = [
    *(LEAK.sub("", write("Nope", {"command": "ls"})) for write in [*WRITTEN.values(), *BARE.values()]),
    *(f"Like this:\n```\n{write('Bash', {'command': 'ls'})}\n```\nThat is all." for write in WRITTEN.values()),
    *(f"It is `{write('Bash', {'command': 'ls'})}`" for write in WRITTEN.values()),
    *("One writes " + LEAK.sub("", write("Bash", {"command": "ls"})) for write in BARE.values()),
    "<tool_call>",
    "<tool_call>\n",
    "A <tool_call> is XML. <function=Bash> is too. Bash(command) and [TOOL_CALLS] are not.",
    "<tool_call>[1, 2]</tool_call>",
    '<tool_call>{"nome": "Bash"}</tool_call>',
    "<function=",
    "<function=Bash",
    "a < b && c <t [TOOL <|",
    "Text <think>not thinking</think> and more",
    '<tool_call>{"name": 5}</tool_call>',
    "<tool_call>{</tool_call>",
    '{"name": "Bash", "version": 3}',
    '{"type": "module", "name": "Bash"}',
    "[1, 2, 3]",
    '[{"name": "x"}]',
    "{}",
    "to=functions.",
    '````md\n```\n<tool_call>{"name": "Get"}</tool_call>\n```\n````\n',
    '~~~\n```\n<tool_call>{"name": "Get"}</tool_call>\n~~~~ no\n',
    "Old: <s>gone</s>",
    "</s> is an end tag, and <s>so on</s>.",
    "`<|im_end|>` ends a turn. So:\n```\n<|im_start|>user\nhi<|im_end|>\n```\n",
]
