"""Run by a Python that has the `mistralrs` wheel: the newest engine, in this process, on a scripted model.

Arguments: the model's folder, then prompts. Prints a line of JSON for each prompt and tool choice: the texts and the
calls that the engine streams."""

from __future__ import annotations

import json
import sys

import mistralrs

BASH = {"name": "Bash", "description": "Run", "parameters": {"type": "object", "properties": {"command": {}}}}
runner = mistralrs.Runner(which=mistralrs.Which.Plain(model_id=sys.argv[1]))
for prompt in sys.argv[2:]:
    for name, choice in (("auto", mistralrs.ToolChoice.Auto), ("none", mistralrs.ToolChoice.NoTools)):
        request = mistralrs.ChatCompletionRequest(
            model="default",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=200,
            tool_schemas=[json.dumps({"type": "function", "function": BASH})],
            tool_choice=choice,
            stream=True,
        )
        texts, calls = [], []
        for chunk in runner.send_chat_completion_request(request):
            delta = chunk.choices[0].delta
            texts += [delta.content] if delta.content else []
            calls += [[call.function.name, call.function.arguments] for call in delta.tool_calls or []]
        print("@", json.dumps({"prompt": prompt, "choice": name, "texts": texts, "calls": calls}), flush=True)
