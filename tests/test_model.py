"""Section 3: what a model directory says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyclaude import ARCHITECTURES, AnyclaudeError, inspect_model, read_model, read_template

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
    assert (
        "NewForCausalLM" in caught.value.message
        and "Qwen3MoeForCausalLM" in caught.value.message
        and "--arch" in caught.value.fix
    )


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
    assert (model.arch, model.context, model.sampling, model.on_disk) == (
        "qwen3moe",
        262144,
        {"temperature": 0.6},
        True,
    )


def test_a_hugging_face_id_is_left_to_the_engine() -> None:
    model = read_model("Qwen/Qwen3-8B")
    assert (model.path, model.name, model.arch, model.on_disk) == ("Qwen/Qwen3-8B", "Qwen3-8B", "", False)


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
