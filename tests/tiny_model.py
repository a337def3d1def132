"""A tiny model that says exactly what a test wants, for a real engine: as safetensors, as MLX's 4 bits, as GGUF.

Its one transformer layer is zeroed (o_proj = down_proj = 0), so the logits depend on the last token alone, and
lm_head[next] = embed[current] makes each script a chain of tokens. The chat template ends the prompt with the start
token of a script, which it chooses from the request: a tool result that contains the marker of SCRIPTS -> that script;
`@@name@@` in the last user message -> the script `name`; otherwise "call" if there are tools, else "hello".
Every token id has one successor, so a piece of text may stand in one script only.
"""

from __future__ import annotations

import array
import functools
import json
import math
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

Tensor = tuple[list[int], "array.array[Any]"]  # its shape and its numbers
DTYPES = {"f": "F32", "H": "BF16", "I": "U32"}  # safetensors' name of an array's typecode
GROUP = 64  # numbers that share a scale and a bias in MLX's quantisation
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


def _safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    header, offset = {}, 0
    for name, (shape, values) in tensors.items():
        end = offset + values.itemsize * len(values)
        header[name] = {"dtype": DTYPES[values.typecode], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, values in tensors.values():
            file.write(values.tobytes())


def _weights(successor: dict[int, int], size: int, hidden: int) -> dict[str, Tensor]:
    numbers = random.Random(0)
    rows = []
    for _ in range(size):
        row = [numbers.gauss(0, 1) for _ in range(hidden)]
        scale = math.sqrt(sum(value * value for value in row) / hidden)
        rows.append([value / scale for value in row])
    head = [[0.0] * hidden for _ in range(size)]
    for current, following in successor.items():
        head[following] = [old + 40.0 / hidden * new for old, new in zip(head[following], rows[current])]

    def flat(matrix: list[list[float]]) -> Tensor:
        return [len(matrix), hidden], array.array("f", [value for row in matrix for value in row])

    def fill(value: float, *shape: int) -> Tensor:
        return list(shape), array.array("f", [value]) * math.prod(shape)

    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": flat(rows),
        "lm_head.weight": flat(head),
        "model.norm.weight": fill(1, hidden),
        layer + "self_attn.q_proj.weight": fill(0, GROUP, hidden),
        layer + "self_attn.k_proj.weight": fill(0, GROUP, hidden),
        layer + "self_attn.v_proj.weight": fill(0, GROUP, hidden),
        layer + "self_attn.o_proj.weight": fill(0, hidden, GROUP),
        layer + "self_attn.q_norm.weight": fill(1, GROUP),
        layer + "self_attn.k_norm.weight": fill(1, GROUP),
        layer + "mlp.gate_proj.weight": fill(0, GROUP, hidden),
        layer + "mlp.up_proj.weight": fill(0, GROUP, hidden),
        layer + "mlp.down_proj.weight": fill(0, hidden, GROUP),
        layer + "input_layernorm.weight": fill(1, hidden),
        layer + "post_attention_layernorm.weight": fill(1, hidden),
    }


def _configs(ids: dict[str, int], size: int, context: int, hidden: int) -> dict[str, dict[str, Any]]:
    return {
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": size,
            "hidden_size": hidden,
            "intermediate_size": GROUP,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": GROUP,
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
    }


def _tokenizer(vocabulary: dict[str, int], added: list[dict[str, object]], context: int) -> dict[str, dict[str, Any]]:
    return {
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


def _model(
    scripts: dict[str, list[str]], context: int = 131072, hidden: int = 256
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """-> (its tensors, its JSON files). At least one row of the embedding has no token."""
    vocabulary, added, successor = _chains(scripts)
    size = (len(vocabulary) + len(added) + 64) // 64 * 64
    ids = {str(token["content"]): int(str(token["id"])) for token in added}
    files = {**_configs(ids, size, context, hidden), **_tokenizer(vocabulary, added, context)}
    return _weights(successor, size, hidden), files


def _write(folder: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _safetensors(folder / "model.safetensors", tensors)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def make_tiny_model(
    folder: Path, scripts: dict[str, list[str]] = SCRIPTS, context: int = 131072, hidden: int = 256
) -> Path:
    """Write the model to `folder` -> the folder. It has about 1 MB and loads in an instant."""
    if scripts is not SCRIPTS:
        return _write(folder, *_model(scripts, context, hidden))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _usual_files(context, hidden).items():
        (folder / name).write_bytes(content)
    return folder


@functools.lru_cache
def _usual_files(context: int, hidden: int) -> dict[str, bytes]:
    """The files of the usual model, made once a process: that takes a third of a second."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            path.name: path.read_bytes() for path in _write(Path(folder), *_model(SCRIPTS, context, hidden)).iterdir()
        }


def _bfloat16(values: array.array[float]) -> array.array[int]:
    return array.array("H", values.tobytes())[1::2]  # the upper half of each


def _quantised(name: str, shape: list[int], values: array.array[float]) -> dict[str, Tensor]:
    """What MLX makes of a matrix: codes of 4 bits, eight in a word, the first lowest; value = bias + code * scale."""
    words, scales, biases = array.array("I"), array.array("f"), array.array("f")
    for start in range(0, len(values), GROUP):
        group = values[start : start + GROUP]
        bias, scale = min(group), max((max(group) - min(group)) / 15, 1e-7)
        codes = [round((value - bias) / scale) for value in group]
        words.extend(sum(codes[first + at] << 4 * at for at in range(8)) for first in range(0, GROUP, 8))
        scales.append(scale)
        biases.append(bias)
    *outer, inner = shape
    return {
        name + ".weight": ([*outer, inner // 8], words),
        name + ".scales": ([*outer, inner // GROUP], _bfloat16(scales)),
        name + ".biases": ([*outer, inner // GROUP], _bfloat16(biases)),
    }


def make_tiny_mlx_model(folder: Path, scripts: dict[str, list[str]] = SCRIPTS, experts: int = 0) -> Path:
    """The same as mlx-lm quantises it -> the folder. With `experts` it is a mixture of them.

    mistral.rs loads it once config.json has its `quantization` as `quantization_config` too.
    """
    tensors, files = _model(scripts)
    config = files["config.json"]
    config.update({"torch_dtype": "bfloat16", "quantization": {"group_size": GROUP, "bits": 4}})
    if experts:
        config.update({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts})
        config.update({"num_experts_per_tok": 1, "moe_intermediate_size": GROUP, "norm_topk_prob": True})
        config.update({"decoder_sparse_step": 1, "mlp_only_layers": []})
        for name in [name for name in tensors if ".mlp." in name]:
            shape, values = tensors.pop(name)
            tensors[name.replace(".mlp.", ".mlp.switch_mlp.")] = [experts, *shape], values * experts
        shape = [experts, config["hidden_size"]]
        tensors["model.layers.0.mlp.gate.weight"] = shape, array.array("f", [0]) * math.prod(shape)
    packed: dict[str, Tensor] = {}
    for name, (shape, values) in tensors.items():
        if len(shape) == 1:
            packed[name] = shape, _bfloat16(values)
        else:
            packed.update(_quantised(name[: -len(".weight")], shape, values))
    return _write(folder, packed, files)


def _add_tokenizer(writer: Any, kind: Any, files: dict[str, dict[str, Any]]) -> None:
    config, tokenizer = files["config.json"], files["tokenizer.json"]
    tokens = [(f"[PAD{number}]", kind.UNUSED) for number in range(config["vocab_size"])]
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number] = text, kind.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"], kind.CONTROL if token["special"] else kind.USER_DEFINED
    space = _byte_alphabet()[ord(" ")]
    tokens[-1] = space + space, kind.NORMAL  # the result of the one merge, without which no GGUF can be written
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([number for _, number in tokens])
    writer.add_token_merges([f"{space} {space}"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(files["tokenizer_config.json"]["chat_template"])


def make_tiny_gguf(file: Path, scripts: dict[str, list[str]] = SCRIPTS, context: int = 131072) -> Path:
    """The same as one GGUF file, tokenizer and template in it as llama.cpp's converter puts them there -> the file."""
    import gguf  # here, since it takes a moment and not every Python has it
    import numpy

    tensors, files = _model(scripts, context)
    config = files["config.json"]
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_name("Tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(1)
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    _add_tokenizer(writer, gguf.TokenType, files)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)
    for name, (shape, values) in tensors.items():
        writer.add_tensor(str(names.get_name(name, (".weight",))), numpy.array(values).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
