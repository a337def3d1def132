"""A tiny model that says exactly what a test wants, for a real engine. Standard library only.

Its one transformer layer is zeroed (o_proj = down_proj = 0), so the logits depend on the last token alone, and
lm_head[next] = embed[current] makes each script a chain of tokens. The chat template ends the prompt with the start
token of a script, which it chooses from the request: a tool result that contains the marker of SCRIPTS -> that script;
`@@name@@` in the last user message -> the script `name`; otherwise "call" if there are tools, else "hello".
Every token id has one successor, so a piece of text may stand in one script only.
"""

from __future__ import annotations

import array
import json
import math
import random
import struct
from pathlib import Path

END = "<|im_end|>"
TEXT_TOKENS = ("<tool_call>", "</tool_call>")  # tokens of their own that are not special, as in Qwen's tokenizers
SCRIPTS = {
    "hello": ["Hello", " from", " a tiny", " model."],
    "call": [
        "I look",
        " here.",
        "\n",
        "<tool_call>",
        '\n{"name": "Bash"',
        ', "arguments": {',
        '"command": "ls',
        ' -1", "description": ',
        '"List files"}}\n',
        "</tool_call>",
    ],
    "write": [
        "<function=Write>\n",
        "<parameter=file_path>\nnotes.md\n</parameter>\n",
        "<parameter=content>\n",
        *(f"line {number} of <b>it</b>\n" for number in range(1, 41)),
        "</parameter>\n\n",
        "</function>\n\n",
    ],
    "coder": ["<function=Bash>\n", "<parameter=command>\n", "ls -a\n", "</parameter>\n", "</function>\n", "\n "],
    "seen": ["I saw", " the", "  marker", " file."],
    "unseen": ["There is", " no marker", " in it."],
    "long": ["la", " la", " la!", "<repeat>"],
}
RESULT_MARKER = "marker.txt"
TEMPLATE = (
    "{%- set last = messages[-1] %}{%- set text = last.content if last.content is string else '' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if last.role == 'tool' %}{{- '<S:seen>' if '" + RESULT_MARKER + "' in text else '<S:unseen>' }}"
    "{%- elif '@@' in text %}{{- '<S:' + text.split('@@')[1] + '>' }}"
    "{%- elif tools %}{{- '<S:call>' }}{%- else %}{{- '<S:hello>' }}{%- endif %}"
)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, which byte-level BPE vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + number) for number, byte in enumerate(others)}}


def _chains(scripts: dict[str, list[str]]) -> tuple[dict[str, int], list[dict[str, object]], dict[int, int]]:
    """-> (BPE vocabulary, added tokens, successor of each token id)."""
    alphabet = _byte_alphabet()
    vocabulary = {char: number for number, char in enumerate(alphabet.values())}
    specials = ["<|endoftext|>", "<|im_start|>", END, *(f"<S:{name}>" for name in scripts)]
    added = {text: len(vocabulary) + number for number, text in enumerate([*specials, *TEXT_TOKENS])}
    successor: dict[int, int] = {}
    next_id = len(vocabulary) + len(added)
    for name, pieces in scripts.items():
        current = first = added[f"<S:{name}>"]
        for piece in pieces:
            if piece == "<repeat>":
                successor[current] = successor[first]
                break
            key = "".join(alphabet[byte] for byte in piece.encode())
            token = added.get(piece, vocabulary.get(key))
            if token is None:
                token = vocabulary[key] = next_id
                next_id += 1
            if token in successor:
                raise ValueError(f"{piece!r} stands in two scripts")
            successor[current] = current = token
        else:
            successor[current] = added[END]
    added_tokens = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text in specials,
        }
        for text, number in added.items()
    ]
    return vocabulary, added_tokens, successor


def _safetensors(path: Path, tensors: dict[str, tuple[list[int], array.array[float]]]) -> None:
    header, offset = {}, 0
    for name, (shape, values) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + 4 * len(values)]}
        offset += 4 * len(values)
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, values in tensors.values():
            file.write(values.tobytes())


def make_tiny_model(
    folder: Path, scripts: dict[str, list[str]] = SCRIPTS, context: int = 131072, hidden: int = 256
) -> Path:
    """Write the model to `folder` -> the folder. It has about 1 MB and loads in an instant."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, added, successor = _chains(scripts)
    size = (len(vocabulary) + len(added) + 63) // 64 * 64
    ids = {token["content"]: token["id"] for token in added}
    numbers = random.Random(0)
    rows = []
    for _ in range(size):
        row = [numbers.gauss(0, 1) for _ in range(hidden)]
        scale = math.sqrt(sum(value * value for value in row) / hidden)
        rows.append([value / scale for value in row])
    head = [[0.0] * hidden for _ in range(size)]
    for current, following in successor.items():
        head[following] = [old + 40.0 / hidden * new for old, new in zip(head[following], rows[current])]

    def flat(matrix: list[list[float]]) -> tuple[list[int], array.array[float]]:
        return [len(matrix), hidden], array.array("f", [value for row in matrix for value in row])

    def fill(value: float, *shape: int) -> tuple[list[int], array.array[float]]:
        return list(shape), array.array("f", [value]) * math.prod(shape)

    layer = "model.layers.0."
    _safetensors(
        folder / "model.safetensors",
        {
            "model.embed_tokens.weight": flat(rows),
            "lm_head.weight": flat(head),
            "model.norm.weight": fill(1, hidden),
            layer + "self_attn.q_proj.weight": fill(0, 32, hidden),
            layer + "self_attn.k_proj.weight": fill(0, 32, hidden),
            layer + "self_attn.v_proj.weight": fill(0, 32, hidden),
            layer + "self_attn.o_proj.weight": fill(0, hidden, 32),
            layer + "self_attn.q_norm.weight": fill(1, 32),
            layer + "self_attn.k_norm.weight": fill(1, 32),
            layer + "mlp.gate_proj.weight": fill(0, 64, hidden),
            layer + "mlp.up_proj.weight": fill(0, 64, hidden),
            layer + "mlp.down_proj.weight": fill(0, hidden, 64),
            layer + "input_layernorm.weight": fill(1, hidden),
            layer + "post_attention_layernorm.weight": fill(1, hidden),
        },
    )
    files = {
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": size,
            "hidden_size": hidden,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "torch_dtype": "float32",
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids[END],
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 1,
        },
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids[END], ids["<|endoftext|>"]],
            "temperature": 0.1,
            "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": END,
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": context,
            "add_bos_token": False,
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": [],
            },
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder
