"""Section 3: what a model directory says."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tiny_gguf, make_tiny_mlx_model, make_tiny_model

from anyclaude import (
    ARCHITECTURES,
    AnyclaudeError,
    cache_numbers,
    inspect_gguf,
    inspect_model,
    read_model,
    read_template,
)

QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "max_position_embeddings": 262144}


@pytest.mark.parametrize(
    ("hf_class", "arch"),
    [
        ("Qwen3MoeForCausalLM", "qwen3moe"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "mistral"),
        ("PhiMoEForCausalLM", "phi3.5moe"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("Lfm2MoeForCausalLM", "lfm2_moe"),
        ("Gemma3ForConditionalGeneration", ""),
    ],
)
def test_the_architecture_comes_from_the_class_in_config_json(hf_class: str, arch: str) -> None:
    assert inspect_model("/m/x", {"architectures": [hf_class]}, {}).arch == arch


def test_the_table_of_architectures_has_every_class_of_the_sources() -> None:
    assert len(ARCHITECTURES) == 51
    assert all(hf_class and since >= (0, 6, 0) for hf_class, (_, since) in ARCHITECTURES.items())
    assert inspect_model("/m/x", {"architectures": ["Qwen3NextForCausalLM"]}, {}).since == (0, 8, 0)


def test_the_name_tells_the_architecture_only_without_config_json() -> None:
    assert [inspect_model(f"/m/{name}", None, {}).arch for name in ("Qwen3-30B", "Meta-Llama-3", "Mistral-7B")] == [
        "qwen3moe",
        "llama",
        "mistral",
    ]
    assert inspect_model("/m/Qwen3-8B", {"architectures": ["LlamaForCausalLM"]}, {}).arch == "llama"
    with pytest.raises(AnyclaudeError, match=r"no config\.json"):
        inspect_model("/m/phi", None, {})


def test_a_named_architecture_overrides_all() -> None:
    assert inspect_model("/m/x", QWEN3, {}, "llama").arch == "llama"
    assert inspect_model("/m/x", {"architectures": ["NewForCausalLM"]}, {}, "llama").arch == "llama"
    assert inspect_model("/m/x", None, {}, "llama").arch == "llama"


def test_a_class_that_no_engine_knows_is_named_with_what_is_known() -> None:
    with pytest.raises(AnyclaudeError) as caught:
        inspect_model("/m/x", {"architectures": ["NewForCausalLM"]}, {})
    assert "NewForCausalLM" in caught.value.message and " qwen3moe " in caught.value.fix


@pytest.mark.parametrize("classes", [None, [], ["A", "B"], "Qwen3ForCausalLM", [3]])
def test_not_exactly_one_class_is_an_error(classes: object) -> None:
    with pytest.raises(AnyclaudeError, match="one class"):
        inspect_model("/m/x", {"architectures": classes}, {})


def test_the_context_window_is_found_at_the_top_and_in_text_config() -> None:
    assert inspect_model("/m/x", QWEN3, {}).context == 262144
    assert (
        inspect_model(
            "/m/x",
            {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": {"max_position_embeddings": 4096}},
            {},
        ).context
        == 4096
    )
    assert (
        inspect_model(
            "/m/x", {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": "many", "text_config": None}, {}
        ).context
        == 0
    )


def test_sampling_defaults_come_from_generation_config() -> None:
    generation = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True, "eos_token_id": [1], "min_p": None}
    assert inspect_model("/m/x", QWEN3, generation).sampling == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert inspect_model("/m/x", QWEN3, {"do_sample": False, "temperature": 0.7}).sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    "extra",
    [
        {"quantization_config": {"bits": 4}},
        {"quantization": {"bits": 4}},
        {"text_config": {"quantization_config": {"bits": 4}}},
    ],
)
def test_a_quantised_model_is_seen(extra: dict[str, object]) -> None:
    assert inspect_model("/m/x", {**QWEN3, **extra}, {}).quantised
    assert not inspect_model("/m/x", QWEN3, {}).quantised


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    model = read_model(str(tmp_path))
    assert (model.arch, model.context, model.sampling, model.hub) == ("qwen3moe", 262144, {"temperature": 0.6}, "")


def test_a_hugging_face_id_needs_the_hub() -> None:
    with pytest.raises(AnyclaudeError, match="is to be downloaded, and .* cannot be reached"):
        read_model("Qwen/Qwen3-8B")


def test_what_cannot_be_a_model_is_a_clear_error(tmp_path: Path) -> None:
    for path, part in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "x.gguf", "does not exist"),
        (tmp_path, r"no config\.json"),
    ):
        with pytest.raises(AnyclaudeError, match=part):
            read_model(str(path))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(AnyclaudeError, match=r"config\.json: not valid JSON"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "sees"),
    [
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {"depth": 1}}, True),
        ({"architectures": ["Phi3VForCausalLM"], "img_processor": {}}, True),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, False),
        ({"architectures": ["Gemma3ForCausalLM"], "vision_config": {}}, False),
        ({"architectures": ["Qwen3ForCausalLM"], "vision_config": {"depth": 1}}, False),
    ],
)
def test_a_model_that_sees_is_known_by_its_class_and_its_config(config: dict[str, Any], sees: bool) -> None:
    assert inspect_model("/m/x", config, {}).sees is sees


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": "one"}, "chat_template.jinja": "two"}, "two"),
        ({"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "three"}}, "three"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "default", "template": "plain"},
                        {"name": "tool_use", "template": "with tools"},
                    ]
                }
            },
            "with tools",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "plain"}, 5]}}, "plain"),
        ({"tokenizer_config.json": {"chat_template": 5}}, ""),
        ({"tokenizer_config.json": "{broken"}, ""),
        ({}, ""),
    ],
)
def test_the_chat_template_is_found_where_models_keep_it(tmp_path: Path, files: dict[str, Any], template: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_template(tmp_path) == template


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        # Qwen3-Coder-30B-A3B, Llama-3.1-8B, Qwen2.5-7B (no head_dim): layers x 2 x KV heads x head size
        (
            {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
            48 * 2 * 4 * 128,
        ),
        (
            {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584},
            28 * 2 * 4 * 128,
        ),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 2 * 2 * 4 * 16),  # no grouped heads
        (  # gpt-oss: every other layer only looks back 128 tokens
            {
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            2 * 2 * 2 * 64,
        ),
        (  # Qwen3-Next: three layers of four are linear
            {
                "num_hidden_layers": 48,
                "full_attention_interval": 4,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 256,
            },
            12 * 2 * 2 * 256,
        ),
        (  # DeepSeek: keys and values are kept as they are used, not compressed
            {
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
            27 * 16 * (128 + 64 + 128),
        ),
        ({"text_config": {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}}, 2 * 2 * 2 * 8),
        (
            {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34}},
            5 * 2 * 4 * 256,
        ),  # the class' defaults
        ({"num_hidden_layers": 10**400, "num_attention_heads": 1, "head_dim": 1}, 0),
        ({}, 0),
        ({"num_hidden_layers": "many", "num_attention_heads": None}, 0),
    ],
)
def test_what_a_token_takes_in_the_cache_is_known(config: dict[str, object], numbers: int) -> None:
    assert cache_numbers(config) == numbers


def test_the_weights_after_quantising_are_estimated_from_the_tensors(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": (1000, 2000),
        "model.layers.0.self_attn.q_proj.weight": (8000, 16000),
        "model.layers.0.mlp.experts.3.up_proj.weight": (8000, 16000),
        "model.norm.weight": (10, 20),
    }
    model = inspect_model("/m/x", QWEN3, {}, tensors=tensors)
    assert model.size("none") == 34020
    assert model.size("q4k") == 2020 + 16000 * 4.5 / 8 and model.size("8") == 2020 + 16000 * 8.5 / 8
    already = inspect_model("/m/x", {**QWEN3, "quantization_config": {"bits": 4}}, {}, tensors=tensors)
    assert already.size("Q4K") == 34020


def test_a_whole_model_has_no_flaw_and_its_weights_are_measured(tmp_path: Path) -> None:
    model = read_model(str(make_tiny_model(tmp_path / "m")))
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert not model.flaws and 0.95 * size < model.weights < size
    assert model.size("Q4K") < 0.8 * model.weights  # but for the embeddings
    assert model.cache == 2 * 64


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def as_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def as_index(path: Path) -> None:
    names = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def as_noise(path: Path) -> None:
    path.write_bytes(b"\xff" * 99)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Path.unlink, "there are none"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "only pytorch_model.bin"),
        (lambda path: path.rename(path.with_name("model-00001-of-00002.safetensors")), "1 of 2 files are missing"),
        (cut, "not whole"),
        (as_pointer, "git lfs pull"),
        (as_index, "1 of 2 files are missing, model-00002-of-00002.safetensors"),
        (as_noise, "not whole"),
        (lambda path: path.write_bytes(b""), "not whole"),
        (lambda path: (path.parent / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda path: (path.parent / "tokenizer_config.json").write_text("{}"), "no chat template"),
    ],
)
def test_a_half_finished_download_is_found_before_loading(
    tmp_path: Path, harm: Callable[[Path], object], words: str
) -> None:
    folder = make_tiny_model(tmp_path / "m")
    harm(folder / "model.safetensors")
    ((message, fix), *more) = read_model(str(folder)).flaws
    assert words in message + fix and fix and not more


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "x.gguf", "model.safetensors"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with contextlib.suppress(AnyclaudeError):
        read_model(str(folder), "qwen3")


def test_sampling_that_is_no_number_is_passed_over() -> None:
    said = {"temperature": float("nan"), "top_p": float("inf"), "top_k": -7, "min_p": True}
    assert inspect_model("/m/x", QWEN3, said).sampling == {}


def test_a_chat_template_that_is_named_stands_for_the_models_own(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("{}")
    model = read_model(str(folder), template="{% for m in messages %}<tool_call>{% endfor %}{{ tools }}")
    assert not model.flaws and model.dialect.calls == "hermes"


def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model in Hugging Face's cache -> its snapshot."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    folder = tmp_path / "hf" / "hub" / "models--org--Tiny"
    snapshot = folder / "snapshots" / "0123abc"
    blobs = make_tiny_model(folder / "blobs")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    return snapshot


def test_a_model_in_the_hugging_face_cache_is_used_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = hub(monkeypatch, tmp_path)
    model = read_model("org/Tiny")
    assert (model.path, model.name, model.hub, model.context) == (str(snapshot), "Tiny", "", 131072)


def test_a_model_in_the_cache_that_no_download_mends_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = hub(monkeypatch, tmp_path)
    for name, content, words in (
        ("config.json", '{"architectures": ["OlmoeForCausalLM"]}', "does not load"),
        ("tokenizer_config.json", "{}", "no chat template"),
    ):
        whole = (snapshot / name).readlink()
        (snapshot / name).unlink()
        (snapshot / name).write_text(content)
        with pytest.raises(AnyclaudeError, match=words):
            model = read_model("org/Tiny")
            raise AnyclaudeError(*model.flaws[0])
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(whole)


def test_a_model_half_in_the_cache_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (hub(monkeypatch, tmp_path) / "model.safetensors").unlink()
    with pytest.raises(AnyclaudeError, match="cannot be reached"):
        read_model("org/Tiny")


def gguf_bytes(metadata: dict[str, object], version: int = 3) -> bytes:
    """A GGUF file without tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(one: object) -> bytes:
        if isinstance(one, str):
            return struct.pack("<I", 8) + text(one)
        if isinstance(one, int):
            return struct.pack("<IQ", 10, one)
        if isinstance(one, float):
            return struct.pack("<If", 6, one)
        assert isinstance(one, list)
        kind = 8 if isinstance(one[0], str) else 4
        body = b"".join(text(str(part)) if kind == 8 else struct.pack("<I", part) for part in one)
        return struct.pack("<IIQ", 9, kind, len(one)) + body

    pairs = b"".join(text(name) + value(one) for name, one in metadata.items())
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(metadata)) + pairs


GGUF = {
    "general.architecture": "qwen3moe",
    "qwen3moe.context_length": 40960,
    "qwen3moe.block_count": 48,
    "qwen3moe.embedding_length": 2048,
    "qwen3moe.attention.head_count": 32,
    "qwen3moe.attention.head_count_kv": 4,
    "qwen3moe.attention.key_length": 128,
    "qwen3moe.attention.value_length": 128,
    "some.float": 1.5,
    "tokenizer.ggml.tokens": ["word"] * 3000,
    "tokenizer.ggml.token_type": [1] * 3000,
    "tokenizer.chat_template": "{{ tools }}<tool_call>{{ message.tool_calls }}",
}


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "Qwen3-30B-Q4_K_M.gguf"
    path.write_bytes(gguf_bytes(GGUF))
    model = read_model(str(path))
    assert (model.path, model.files, model.name) == (str(tmp_path), (path.name,), "Qwen3-30B-Q4_K_M")
    assert (model.context, model.cache, model.since) == (40960, 48 * 4 * 256, (0, 7, 0))
    assert model.dialect.calls == "hermes" and model.quantised and not model.flaws
    assert model.weights == path.stat().st_size and model.place == str(path)
    assert read_model(str(tmp_path)) == model  # the only one in its folder


def test_a_truncated_gguf_file_is_found(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    model = read_model(str(path))
    assert model.dialect.calls == "" and model.context == 131072 and model.cache == 2 * 64
    size = path.stat().st_size
    for cut_off in (1, 1000, size // 2):
        path.write_bytes(path.read_bytes()[: size - cut_off])
        with pytest.raises(AnyclaudeError, match="it is not whole"):
            read_model(str(path))


def test_what_a_token_takes_in_the_cache_is_known_of_gguf_files_too() -> None:
    layers = {"qwen3moe.attention.head_count_kv": [0, 0, 0, 8] * 10, "qwen3moe.block_count": 40}
    model = inspect_gguf("/m/x.gguf", {**GGUF, **layers})
    assert model.cache == 10 * 2 * 8 * 128  # the others have no attention that looks back
    gemma = {key.replace("qwen3moe", "gemma3"): value for key, value in GGUF.items()}
    assert inspect_gguf("/m/x.gguf", {**gemma, "general.architecture": "gemma3"}).cache == 8 * 2 * 4 * 128


def test_a_gguf_in_parts_is_one_model_and_a_missing_part_is_found(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00003.gguf").write_bytes(gguf_bytes(GGUF))
    model = read_model(str(tmp_path))
    assert model.files == tuple(f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)) and model.name == "m"
    assert "1 of its 3 files are missing, m-00003-of-00003.gguf" in model.flaws[0][0]


def test_of_several_gguf_models_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a-Q4.gguf", "b-Q8.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(gguf_bytes(GGUF))
    with pytest.raises(AnyclaudeError, match="holds 2 models") as caught:
        read_model(str(tmp_path))
    assert f"--model-path {tmp_path}/a-Q4.gguf" in caught.value.fix


def test_a_gguf_that_no_engine_loads_or_that_cannot_talk_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "mamba"}))
    with pytest.raises(AnyclaudeError, match="the architecture mamba"):
        read_model(str(path))
    path.write_bytes(gguf_bytes({**GGUF, "tokenizer.chat_template": 1}))
    assert "no chat template" in read_model(str(path)).flaws[0][0]


def test_any_broken_gguf_file_is_an_error_in_words(tmp_path: Path) -> None:
    whole, path = (
        gguf_bytes({**GGUF, "tokenizer.ggml.tokens": ["word"], "tokenizer.ggml.token_type": [1]}),
        tmp_path / "x.gguf",
    )
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(AnyclaudeError, match="cannot be read"):
            read_model(str(path))
    generator = random.Random(1)
    for _ in range(300):
        noisy = bytearray(whole)
        noisy[generator.randrange(4, len(noisy))] = generator.randrange(256)
        path.write_bytes(noisy)
        with contextlib.suppress(AnyclaudeError):
            read_model(str(path))


def test_a_model_quantised_for_mlx_is_known_and_its_config_is_not_touched(tmp_path: Path) -> None:
    dense = read_model(str(make_tiny_mlx_model(tmp_path / "dense")))
    assert (dense.mlx, dense.quantised, dense.flaws) == ("shadow", True, ())
    experts = read_model(str(make_tiny_mlx_model(tmp_path / "experts", experts=4)))
    assert (experts.mlx, experts.flaws) == ("experts", ())
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    quantisation = config["quantization"]
    both = inspect_model("/m/x", {**config, "quantization_config": quantisation}, {})
    assert both.mlx == ""  # newer converters write both names


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.mlp.gate": {"bits": 8, "group_size": 64}},
        {"lm_head": False},
        {"mode": "mxfp4"},
        {"x": {"bits": [4], "group_size": {}}},
    ],
)
def test_mlx_widths_that_no_engine_reads_are_found(more: dict[str, object]) -> None:
    quantisation = {"bits": 4, "group_size": 64, "model.layers.0.mlp.up": {"bits": 4, "group_size": 64}}
    assert not inspect_model("/m/x", {**QWEN3, "quantization": quantisation}, {}).flaws
    ((message, fix),) = inspect_model("/m/x", {**QWEN3, "quantization": {**quantisation, **more}}, {}).flaws
    assert "more than one way" in message and "--base-url" in fix


def test_a_gguf_in_the_folder_itself_is_meant_and_not_what_lies_below(tmp_path: Path) -> None:
    direct = tmp_path / "a.gguf"
    direct.write_bytes(b"GGUF")
    for other in ("mmproj/mmproj-a.gguf", "old/x/b.gguf"):
        (tmp_path / other).parent.mkdir(parents=True)
        (tmp_path / other).write_bytes(b"GGUF")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(AnyclaudeError, match=r"/a\.gguf cannot be read"):
        read_model(str(tmp_path))
    direct.unlink()
    with pytest.raises(AnyclaudeError, match=r"/old/x/b\.gguf cannot be read"):
        read_model(str(tmp_path))
    make_tiny_model(tmp_path / "y")
    with pytest.raises(AnyclaudeError, match="holds 2 models"):
        read_model(str(tmp_path))
