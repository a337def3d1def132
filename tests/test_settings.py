"""Section 2: where settings come from, which one wins, and what is said about mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

import anyclaude
from anyclaude import AnyclaudeError, Settings, load_settings, split_arguments


class Place:
    """A home and a project under it, as folders."""

    def __init__(self, folder: Path) -> None:
        self.home, self.project = folder / "home", folder / "home" / "code" / "project"
        self.project.mkdir(parents=True)

    def write(self, folder: Path, content: object) -> Path:
        path = folder / ".anyclauderc.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def load(
        self, own: dict[str, str] | None = None, environ: dict[str, str] | None = None, cwd: Path | None = None
    ) -> tuple[Settings, list[str]]:
        return load_settings(own or {}, environ or {}, cwd or self.project, self.home)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def one(**values: object) -> dict[str, object]:
    return {"backend": "mlx", "backends": {"mlx": values}}


def test_without_any_source_the_defaults_hold(place: Place) -> None:
    settings, warnings = place.load()
    assert (settings, warnings) == (Settings(), [])


def test_flags_win_over_environment_over_project_over_home(place: Place) -> None:
    place.write(place.home, one(arch="home", isq="home", maxTokens=1, contextWindow=5000))
    place.write(place.project, one(arch="project", isq="project", maxTokens=2))
    settings, _ = place.load({"--arch": "flag"}, {"ANYCLAUDE_ARCH": "environment", "ANYCLAUDE_ISQ": "environment"})
    assert (settings.arch, settings.isq, settings.max_tokens, settings.context_window) == (
        "flag",
        "environment",
        2,
        5000,
    )


def test_the_settings_file_of_the_design_is_read_whole(place: Place) -> None:
    values = {
        "enabled": True,
        "port": 8081,
        "baseUrl": "http://localhost:8081/v1",
        "apiKey": "mlx",
        "model": "default",
        "modelPath": "/path/to/model",
        "maxTokens": 32768,
        "description": "mistral.rs MLX server",
    }
    place.write(place.home, one(**values))
    settings, warnings = place.load()
    assert (settings.kind, settings.port, settings.model_path, warnings) == ("mistralrs", 8081, "/path/to/model", [])


def test_every_own_option_reaches_its_field(place: Place) -> None:
    values = {
        "--model-path": "/m",
        "--arch": "llama",
        "--isq": "Q8_0",
        "--engine-port": "9000",
        "--context-window": "4096",
        "--prompt": "lean",
        "--proxy-only": "true",
        "--proxy-port": "9001",
        "--demo": "true",
    }
    settings, _ = place.load(values)
    expected = Settings(
        model_path="/m",
        arch="llama",
        isq="Q8_0",
        port=9000,
        context_window=4096,
        prompt="lean",
        proxy_only=True,
        proxy_port=9001,
        demo=True,
    )
    assert settings == expected
    assert place.load({"--base-url": "http://10.0.0.1:8000/v1/"})[0].base_url == "http://10.0.0.1:8000/v1"


def test_every_key_can_come_from_the_environment(place: Place) -> None:
    texts = {
        "flag": "true",
        "note": "x",
        "text": "x",
        "key": "x",
        "path": "/x",
        "url": "http://h/v1",
        "texts": "--a 'b c'",
        "numbers": '{"top_k": 3}',
    }
    for key in anyclaude.KEYS:
        text = texts.get(key.kind) or (key.kind.split("|")[0] if "|" in key.kind else key.kind.split("..")[1])
        value = getattr(
            place.load(
                {},
                {key.variable: text, "ANYCLAUDE_BASE_URL": "http://localhost:1/v1"}
                if key.field == "kind"
                else {key.variable: text},
            )[0],
            key.field,
        )
        assert value not in (None, "", {}, ()), key
    assert place.load({}, {"PROXY_ONLY": "true"})[0].proxy_only
    assert place.load({}, {"ANYCLAUDE_EXTRA_ARGS": "--a 'b c'"})[0].extra_args == ["--a", "b c"]


def test_every_field_of_settings_has_a_key_but_those_about_the_sources() -> None:
    about_the_sources = {"backend", "file", "given", "home_backend", "model_backends", "project_model"}
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert {key.field for key in anyclaude.KEYS} == fields - about_the_sources


def test_the_nearest_project_file_counts_and_the_home_file_below_it(place: Place) -> None:
    place.write(place.home, one(isq="Q3K"))
    place.write(place.project.parent, one(arch="outer", isq="Q5K"))
    place.write(place.project, one(arch="inner"))
    assert (place.load()[0].arch, place.load()[0].isq) == ("inner", "Q3K")
    assert place.load(cwd=place.project.parent)[0].isq == "Q5K"
    assert place.load(cwd=place.home)[0].isq == "Q3K"


def test_a_named_settings_file_replaces_the_others_and_is_trusted(place: Place, tmp_path: Path) -> None:
    place.write(place.home, one(isq="Q3K", arch="home"))
    named = tmp_path / "named.json"
    named.write_text(json.dumps(one(binary="engine")))
    settings, warnings = place.load({"--config-file": str(named)})
    assert (settings.binary, settings.isq, settings.arch, warnings) == (str(tmp_path / "engine"), "Q4K", "", [])


def test_a_projects_file_may_choose_a_model_but_not_run_programs_or_redirect_traffic(place: Place) -> None:
    place.write(
        place.project,
        {
            "backend": "mlx",
            "backends": {
                "mlx": {
                    "modelPath": "model",
                    "binary": "./evil",
                    "sourceDir": "/evil",
                    "extraArgs": ["--evil"],
                    "apiKey": "stolen",
                    "claudeBinary": "./evil",
                    "kind": "remote",
                    "baseUrl": "http://evil.example/v1",
                }
            },
        },
    )
    settings, warnings = place.load()
    assert settings == Settings(model_path=str(place.project / "model"))
    assert len(warnings) == 7 and all("ignored" in warning and str(place.project) in warning for warning in warnings)


def test_a_projects_file_may_use_a_server_on_this_machine(place: Place) -> None:
    place.write(place.project, {"backend": "remote", "backends": {"remote": {"baseUrl": "http://127.0.0.1:9000/v1"}}})
    settings, warnings = place.load()
    assert (settings.kind, settings.base_url, warnings) == ("remote", "http://127.0.0.1:9000/v1", [])


def test_every_problem_is_reported_at_once_with_its_file_and_key(place: Place) -> None:
    path = place.write(
        place.home,
        one(
            port="eighty",
            maxTokens=0,
            modelPath=7,
            extraArgs="x y",
            sampling={"heat": 1},
            enabled="perhaps",
            toolCalls="none",
            baseUrl="localhost",
        ),
    )
    with pytest.raises(AnyclaudeError) as caught:
        place.load({"--engine-port": "99999"}, {"ANYCLAUDE_CONTEXT_WINDOW": "big"})
    text = caught.value.message
    for key in ("port", "maxTokens", "modelPath", "sampling", "enabled", "toolCalls", "baseUrl"):
        assert f"{path}: backends.mlx.{key}: expected" in text
    assert "--engine-port: expected a whole number from 0 to 65535" in text and "ANYCLAUDE_CONTEXT_WINDOW" in text
    assert text.count("expected") == 9


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"backends": []}', "backends: expected"),
        ('{"backends": {"mlx": 1}}', "backends: expected"),
        ('{"backend": 5}', "backend: expected"),
        ("[" * 200000, "not valid JSON"),
        ('{"backend": "no", "backends": {"mlx": {}}}', 'backend "no" is none of'),
        ('{"backends": {"mlx": {"enabled": false}}}', '"enabled": false'),
        ('{"backends": {"remote": {}}}', "has no baseUrl"),
        ('{"backends": {"mlx": {"baseUrl": "http://far.example/v1"}}}', "not this machine"),
        ('{"backends": {"mlx": {"port": 1, "baseUrl": "http://localhost:2/v1"}}}', "different ports"),
    ],
)
def test_a_settings_file_that_cannot_be_used_is_named(place: Place, content: str, part: str) -> None:
    path = place.write(place.home, content)
    with pytest.raises(AnyclaudeError) as caught:
        place.load()
    assert part in caught.value.message
    assert str(path) in caught.value.message or "backend" in caught.value.message
    assert caught.value.fix


JUNK = [
    ["\ud800"],
    None,
    True,
    -1,
    1.5,
    "",
    " ",
    "\0",
    "~nobody/x",
    "http://[::1",
    "http://h:x/",
    [],
    [1],
    {},
    {"a": []},
    "\ud800",
    "9" * 5000,
]


@pytest.mark.parametrize("value", JUNK, ids=lambda value: repr(value)[:20])
def test_no_value_of_any_key_makes_a_traceback(place: Place, value: object) -> None:
    for folder in (place.home, place.project):
        place.write(folder, one(**{key.json: value for key in anyclaude.KEYS if key.json}))
        with contextlib.suppress(AnyclaudeError):
            place.load()
    for key in anyclaude.KEYS:
        with contextlib.suppress(AnyclaudeError):
            place.load({key.flag: str(value)} if key.flag else {}, {key.variable: str(value)})


def test_an_api_key_is_never_shown(place: Place) -> None:
    place.write(place.home, one(apiKey=["sesame"]))
    with pytest.raises(AnyclaudeError) as caught:
        place.load()
    assert "apiKey" in caught.value.message and "sesame" not in caught.value.message


def test_a_settings_file_in_another_encoding_is_named(place: Place) -> None:
    (place.home / ".anyclauderc.json").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(AnyclaudeError, match="anyclauderc"):
        place.load()


def test_an_unknown_key_is_a_warning_with_the_nearest_known_name(place: Place) -> None:
    place.write(place.home, {"backnd": "mlx", "backends": {"mlx": {"modelpath": "/m", "colour": 1}}})
    _, warnings = place.load()
    assert any('"backnd"' in warning and '"backend"' in warning for warning in warnings)
    assert any('"modelpath"' in warning and '"modelPath"' in warning for warning in warnings)
    assert any('"colour"' in warning and "mean" not in warning for warning in warnings)


def test_the_backend_can_be_chosen_by_the_environment(place: Place) -> None:
    place.write(place.home, {"backend": "mlx", "backends": {"mlx": {"isq": "Q3K"}, "other": {"isq": "Q8_0"}}})
    assert place.load({}, {"ANYCLAUDE_BACKEND": "other"})[0].isq == "Q8_0"


def test_a_base_url_for_one_run_starts_no_engine(place: Place) -> None:
    place.write(place.home, one(modelPath="/m", port=8081))
    assert place.load({"--base-url": "http://localhost:9000/v1"})[0].kind == "remote"
    assert place.load({}, {"ANYCLAUDE_BASE_URL": "http://localhost:9000/v1"})[0].kind == "remote"


@pytest.mark.parametrize(
    "url",
    [
        "http://h/a b",
        "http://h/\u00e9",
        "http://h/v1\r\nx: y",
        "http://u:p@h/v1",
        "http://:p@h/v1",
        "http://h/v1?",
        "http://h/#",
        "ftp://h/v1",
    ],
)
def test_a_base_url_that_could_not_be_asked_is_refused(place: Place, url: str) -> None:
    with pytest.raises(AnyclaudeError) as caught:
        place.load({"--base-url": url})
    assert "--base-url: expected a URL like http://localhost:8081/v1" in caught.value.message


def test_the_port_may_be_said_by_the_base_url(place: Place) -> None:
    place.write(place.home, one(baseUrl="http://localhost:9000/v1"))
    assert (place.load()[0].port, place.load()[0].kind) == (9000, "mistralrs")
    assert place.load({"--engine-port": "9005"})[0].port == 9005


def test_a_home_file_with_a_byte_order_mark_is_read(place: Place) -> None:
    (place.home / ".anyclauderc.json").write_text("\ufeff" + json.dumps(one(isq="Q8_0")), encoding="utf-8")
    assert place.load()[0].isq == "Q8_0"


def test_a_home_that_is_a_link_is_still_home(place: Place, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place.home)
    place.write(place.home, one(binary="/bin/engine"))
    settings, warnings = load_settings({}, {}, place.project, tmp_path / "link")
    assert (settings.binary, warnings) == ("/bin/engine", [])


def test_the_home_files_key_is_not_for_a_server_that_the_project_chose(place: Place) -> None:
    place.write(
        place.home, {"backend": "remote", "backends": {"remote": {"baseUrl": "https://far/v1", "apiKey": "sesame"}}}
    )
    assert place.load()[0].api_key == "sesame"
    place.write(place.project, {"backends": {"remote": {"baseUrl": "http://localhost:666/v1"}}})
    assert (place.load()[0].base_url, place.load()[0].api_key) == ("http://localhost:666/v1", "")


def test_a_backend_that_nobody_defined_is_named(place: Place) -> None:
    place.write(place.home, {"backend": "foo"})
    with pytest.raises(AnyclaudeError, match='"foo" is none of'):
        place.load()


def test_paths_start_at_the_file_that_names_them(place: Place) -> None:
    place.write(place.home, one(modelPath="models/a", binary="~/bin/mistralrs"))
    settings, _ = place.load()
    assert settings.model_path == "models/a"  # could be a Hugging Face id, and no such folder exists
    (place.home / "models" / "a").mkdir(parents=True)
    assert place.load()[0].model_path == str(place.home / "models" / "a")
    assert place.load({"--model-path": "./x"})[0].model_path == str(place.project / "x")
    assert place.load({"--model-path": "Qwen/Qwen3-8B"})[0].model_path == "Qwen/Qwen3-8B"


def test_own_options_are_taken_anywhere_before_the_double_dash_and_the_rest_stays_in_order() -> None:
    arguments = [
        "-p",
        "--model-path",
        "/m",
        "hello",
        "--engine-port=9",
        "--model",
        "x",
        "--demo",
        "--resume",
        "--",
        "--demo",
        "--",
        "x",
    ]
    own, rest = split_arguments(arguments)
    assert own == {"--model-path": "/m", "--engine-port": "9", "--demo": "true"}
    assert rest == ["-p", "hello", "--model", "x", "--resume", "--demo", "--", "x"]


def test_options_of_claude_that_look_like_ours_are_claudes() -> None:
    for argument in ("--demos", "--model-pathx", "--prom", "-demo", "--model"):
        assert split_arguments([argument, "v"]) == ({}, [argument, "v"])


@pytest.mark.parametrize("arguments", [["--model-path"], ["--model-path", "--demo"], ["--config-file"]])
def test_an_option_without_its_value_is_an_error_that_names_it(arguments: list[str]) -> None:
    with pytest.raises(AnyclaudeError, match=arguments[0]):
        split_arguments(arguments)
