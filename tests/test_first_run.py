"""The first minutes: what is on the disk, what is downloaded, what is asked, and what is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import NO_HUB, Sandbox
from hypothesis import given
from hypothesis import strategies as st
from test_care import serving
from tiny_model import make_tiny_model

import anyclaude
from anyclaude import (
    COMMANDS,
    COMMENTED_SETTINGS,
    AnyclaudeError,
    Machine,
    Settings,
    fit,
    load_settings,
    near_miss,
    read_model,
    with_setting,
    without_comments,
)

GB = 1 << 30
NEWEST = anyclaude.likely_engine(Settings(binary="/nowhere"), {})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


# --- The settings file ---


@given(VALUES)
def test_json_without_comments_stays_as_it_is(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False)):
        assert without_comments(text) == text


def test_comments_and_a_comma_too_many_become_spaces() -> None:
    text = '{ // one "\n "a//b": "http://x /* no */", /* two\n lines */ "c": [1, 2, // three\n ],\n}\n'
    clean = without_comments(text)
    assert json.loads(clean) == {"a//b": "http://x /* no */", "c": [1, 2]}
    assert len(clean) == len(text) and clean.count("\n") == text.count("\n")


@given(
    st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    st.lists(st.sampled_from(["backends", "mlx", "é", "a b"]), min_size=1, max_size=3),
    VALUES,
    st.sampled_from([None, 2, 4]),
)
def test_a_setting_is_put_into_a_file_and_all_else_stays(
    content: dict[str, Any], keys: list[str], value: object, indent: int | None
) -> None:
    text = "// first\n" + json.dumps(content, indent=indent) + "\n// last"
    changed = with_setting(text, keys, value)
    expected, inner = content, content
    for key in keys[:-1]:
        inner[key] = inner[key] if isinstance(inner.get(key), dict) else {}
        inner = inner[key]
    inner[keys[-1]] = value
    assert json.loads(without_comments(changed)) == expected
    assert changed.startswith("// first\n") and changed.endswith("\n// last")
    assert with_setting(changed, keys, value) == changed


def test_what_init_writes_loads_with_every_line_in_force(tmp_path: Path) -> None:
    path = tmp_path / anyclaude.SETTINGS_FILE
    path.write_text(COMMENTED_SETTINGS)
    assert load_settings({}, {}, tmp_path / "work", tmp_path) == (Settings(), [])
    path.write_text(re.sub(r'(?m)^( +)// ("\w+": )', r"\1\2", COMMENTED_SETTINGS))
    settings, warnings = load_settings({}, {}, tmp_path / "work", tmp_path)
    assert not warnings and settings.memory_limit and settings.keep_alive and settings.context_window
    path.write_text(path.read_text().replace('"backend": "mlx"', '"backend": "remote"'))
    assert load_settings({}, {}, tmp_path / "work", tmp_path)[0].api_key == "..."


def test_init_begins_a_file_and_changes_one_without_losing_a_comment(sandbox: Sandbox, tiny_model: Path) -> None:
    path = sandbox.home / ".anyclauderc.json"
    assert "wrote ~/.anyclauderc.json" in sandbox.run("init").stderr
    assert path.read_text() == COMMENTED_SETTINGS and path.stat().st_mode & 0o777 == 0o600
    done = sandbox.run("init")
    assert done.returncode == 1 and "there already" in done.stderr and path.read_text() == COMMENTED_SETTINGS
    more = path.read_text().replace("{\n", '{\n    // mine\n    "x": 1,\n', 1)
    (sandbox.home / "dotfiles.json").write_text(more)
    path.unlink()
    path.symlink_to("dotfiles.json")
    assert sandbox.run("init", "--model-path", str(tiny_model), "--context-window", "4096").returncode == 0
    assert path.is_symlink() and "// mine" in path.read_text() and '"x": 1' in path.read_text()
    settings = load_settings({}, {}, sandbox.work, sandbox.home)[0]
    assert (settings.model_path, settings.context_window) == (str(tiny_model), 4096)
    sandbox.run("init", "--base-url", "http://localhost:9/v1")
    settings = load_settings({}, {}, sandbox.work, sandbox.home)[0]
    assert (settings.kind, settings.base_url) == ("remote", "http://localhost:9/v1") and "// mine" in path.read_text()


@pytest.mark.slow
def test_a_text_that_is_not_closed_is_read_in_no_time(sandbox: Sandbox) -> None:
    sandbox.settings("{" + '"\\' * 200_000 + "\n}")
    started = time.monotonic()
    assert "not valid JSON" in sandbox.run("models").stderr and time.monotonic() - started < 10


@pytest.mark.slow
def test_inits_at_the_same_moment_lose_nothing(sandbox: Sandbox) -> None:
    options = {"--isq": "Q3K", "--context-window": "4096", "--prompt": "lean", "--engine-port": "9000"}
    running = [sandbox.start("init", *pair) for pair in options.items()]
    assert [process.wait(30) for process in running] == [0, 0, 0, 0]
    settings = load_settings({}, {}, sandbox.work, sandbox.home)[0]
    assert (settings.isq, settings.context_window, settings.prompt, settings.port) == ("Q3K", 4096, "lean", 9000)


@pytest.mark.slow
def test_a_project_decides_neither_where_a_choice_is_kept_nor_what_is_downloaded(
    sandbox: Sandbox, stand_in: Path, tiny_model: Path
) -> None:
    odd = {"modelPath": "./\x1b]0;x\x07\x1b[2J"}
    sandbox.settings({"backend": "evil", "backends": {"evil": odd}}, sandbox.work)
    for command in ("models", "doctor"):
        done = sandbox.run(command)
        assert "\x1b" not in done.stdout + done.stderr
    sandbox.run("init", "--context-window", "4096")
    sandbox.run("init", "--model-path", str(tiny_model))
    settings = load_settings({}, {}, sandbox.home, sandbox.home)[0]
    assert (settings.backend, settings.context_window, settings.model_path) == ("mlx", 4096, str(tiny_model))
    sandbox.settings({"backends": {"mlx": {"modelPath": "org/Big"}}}, sandbox.work)
    content = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}
    Hub.content, Hub.plan, Hub.seen = content, [], []
    with serving(Hub) as url:
        done = sandbox.run("--proxy-only", env={"HF_ENDPOINT": url})
        assert done.returncode == 1 and "which this project's file names, is not on this disk" in done.stderr
        assert not (sandbox.home / "models").exists()
        status, shown = sandbox.on_terminal(
            "--proxy-only", env={"HF_ENDPOINT": url, "ANYCLAUDE_ENGINE_PORT": "0"},
            answers=[("Download it? [Y/n]", "y\n"), ("Ctrl-C ends it", "\x03")],
        )  # fmt: skip
    assert status == 0 and "downloading Big" in shown, shown


@pytest.mark.slow
def test_a_model_that_is_named_is_not_sent_to_a_server(sandbox: Sandbox, stand_in: Path, tiny_model: Path) -> None:
    sandbox.run("init", "--base-url", "http://127.0.0.1:9/v1")
    assert load_settings({}, {}, sandbox.work, sandbox.home)[0].kind == "remote"
    settings = load_settings({"--model-path": str(tiny_model)}, {}, sandbox.work, sandbox.home)[0]
    assert (settings.kind, settings.backend, settings.base_url) == ("mistralrs", "mlx", "")
    sandbox.run("init", "--model-path", str(tiny_model))
    settings = load_settings({}, {}, sandbox.work, sandbox.home)[0]
    assert (settings.kind, settings.model_path) == ("mistralrs", str(tiny_model))


REMOTE = {"kind": "remote", "baseUrl": "http://127.0.0.1:9/v1"}
OFF: dict[str, Any] = {"enabled": False}


@pytest.mark.parametrize(
    ("home", "project"),
    [
        ({"backend": "remote", "backends": {"old": OFF, "mlx": {}, "remote": REMOTE}}, {}),
        (
            {"backend": "remote", "backends": {"remote": REMOTE}},
            {"backend": "proj", "backends": {"proj": {"isq": "Q8_0"}}},
        ),
        ({"backends": {"mlx": REMOTE}}, {}),
        ({"backend": "remote", "backends": {"mlx": OFF, "remote": REMOTE}}, {}),
        ({"backends": {"vllm": REMOTE}}, {"backends": {"vllm": {"model": "q"}}}),
        ({"backends": {"mlx": {"memoryLimit": 9000}}}, {"backend": "proj", "backends": {"proj": {}}}),
        ({}, {}),
    ],
)
@pytest.mark.slow
def test_a_model_that_init_writes_is_the_one_that_is_used(
    sandbox: Sandbox, tiny_model: Path, home: dict[str, Any], project: dict[str, Any]
) -> None:
    sandbox.settings(home)
    if project:
        sandbox.settings(project, sandbox.work)
    assert load_settings({"--model-path": "/m"}, {}, sandbox.work, sandbox.home)[0].kind == "mistralrs"
    done = sandbox.run("init", "--model-path", str(tiny_model))
    assert done.returncode == 0, done.stderr
    there = load_settings({}, {}, sandbox.home, sandbox.home)[0]
    assert (there.kind, there.model_path) == ("mistralrs", str(tiny_model))
    if "proj" in project.get("backends", {}):
        assert load_settings({}, {}, sandbox.work, sandbox.home)[0].model_path == str(tiny_model)
    assert there.memory_limit == home.get("backends", {}).get("mlx", {}).get("memoryLimit", 0)


@pytest.mark.slow
def test_init_keeps_no_wrong_model_and_touches_no_broken_file(sandbox: Sandbox) -> None:
    done = sandbox.run("init", "--model-path", "/nowhere")
    assert done.returncode == 1 and "does not exist" in done.stderr
    assert not (sandbox.home / ".anyclauderc.json").exists()
    path = sandbox.settings("{ broken")
    done = sandbox.run("init", "--isq", "Q3K")
    assert done.returncode == 1 and "line 1, column 3" in done.stderr and path.read_text() == "{ broken"


# --- What is on the disk ---


@pytest.fixture
def shelf(sandbox: Sandbox, tiny_model: Path) -> Sandbox:
    """A home with models in several places."""
    home = sandbox.home
    make_tiny_model(home / "models" / "publisher" / "Deep")
    (home / "models" / "Linked").symlink_to(home / "models" / "publisher" / "Deep")
    other = make_tiny_model(home / ".lmstudio" / "models" / "someone" / "Other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    make_tiny_model(home / "elsewhere" / "p" / "Studio")
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(home / "elsewhere")}))
    snapshot = home / ".cache" / "huggingface" / "hub" / "models--org--Cached" / "snapshots" / "abc"
    make_tiny_model(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (home / "models" / "broken.gguf").write_bytes(b"GGUF")
    (home / "models" / "x-mmproj-F16.gguf").touch()
    (home / "models" / "datasets").mkdir()
    return sandbox


def test_models_lists_what_is_on_the_disk_and_what_fits_first(shelf: Sandbox) -> None:
    listed = json.loads(shelf.run("models", "--json").stdout)
    here = {row["path"].rpartition("/")[2]: row for row in listed["on_disk"]}
    assert set(here) == {"Linked", "Other", "Studio", "Cached", "broken.gguf"} or set(here) == {
        "Deep", "Other", "Studio", "Cached", "broken.gguf",
    }  # fmt: skip
    assert here["Cached"]["path"] == "org/Cached" and here["Cached"]["kind"] == "qwen3 F32"
    assert here["Cached"]["window"] == 131072 and here["Cached"]["size"] > 1000
    assert "does not load" in here["Other"]["problem"] and "cannot be read" in here["broken.gguf"]["problem"]
    assert [bool(row["problem"]) for row in listed["on_disk"]] == [False, False, False, True, True]
    problems = [bool(row["problem"]) for row in listed["to_download"]]
    assert len(problems) > 5 and problems == sorted(problems)
    text = shelf.run("models").stdout
    assert re.search(r"(?m)^  3 +1 MB +131072  qwen3 F32", text)
    assert re.search(r"(?m)^  4 .* Q4_K_M  .* \(\w+\)$", text) and str(shelf.home) not in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) < 80


def test_a_machine_without_memory_is_offered_what_fits_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(anyclaude, "read_machine", lambda limit=0: Machine("", 6 * GB, "a test"))
    here, known = anyclaude.choices(Settings(), {"PATH": ""}, NEWEST)
    assert not here and "Qwen3-4B" in known[0].path and not known[0].problem
    assert {one.path for one in known if one.problem} > {path for path in anyclaude.KNOWN_MODELS if "27B" in path}
    monkeypatch.setattr(anyclaude, "read_machine", lambda limit=0: Machine("metal", 40 * GB, "a test"))
    known = anyclaude.choices(Settings(), {"PATH": ""}, NEWEST)[1]
    assert "27B" in known[0].path  # of those that know no better, the largest; not one whose experts are slow there
    assert "slow" in next(one.note for one in known if "A3B" in one.path)


@pytest.mark.parametrize("name", sorted(anyclaude.KNOWN_MODELS))
def test_every_model_of_the_table_can_be_named_and_weighed(name: str) -> None:
    assert anyclaude.checked("path", name, Path("/nowhere")) == name
    model = anyclaude.KNOWN_MODELS[name]
    assert 2e9 < model.weights < 60e9 and fit(model, Machine("", 100 * GB, ""), "Q4K").window >= 32768
    assert model.since <= anyclaude.version_in(anyclaude.TESTED_TAG) and model.quantised and model.stored


@pytest.mark.parametrize("place", [*anyclaude.MODEL_FOLDERS, "~/.cache/huggingface/hub/models--a--b/snapshots/c"])
def test_every_place_where_models_are_kept_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = Path(os.path.expanduser(place)) / ("one" * ("Jan" in place))
    folder.mkdir(parents=True)
    (folder / "x-Q4_K_M.gguf").touch()
    (folder / "x-Q8_0-00002-of-00002.gguf").touch()
    if "hub" in place:
        (folder.parent.parent / "refs").mkdir()
        (folder.parent.parent / "refs" / "main").write_text("c")
    assert anyclaude.models_on_disk({}) == [str(folder / "x-Q4_K_M.gguf")]


def test_what_is_on_the_disk_is_not_offered_for_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = next(iter(anyclaude.KNOWN_MODELS))
    path = tmp_path / "models" / os.path.basename(name)
    monkeypatch.setattr(anyclaude, "read_model", lambda *_: dataclasses.replace(anyclaude.KNOWN_MODELS[name], path="/"))
    path.parent.mkdir()
    path.touch()
    here, known = anyclaude.choices(Settings(memory_limit=100_000), {"PATH": ""}, NEWEST)
    assert [one.path for one in here] == [str(path)] and name not in [one.path for one in known]
    assert len(known) == len(anyclaude.KNOWN_MODELS) - 1


@pytest.mark.slow
def test_settings_that_cannot_be_written_are_shown_instead(sandbox: Sandbox, tiny_model: Path) -> None:
    done = sandbox.run("init", "--config-file", "/proc/none.json", "--model-path", str(tiny_model))
    assert done.returncode == 1 and "/proc/none.json cannot be written" in done.stderr
    assert f'"modelPath": "{tiny_model}"' in done.stderr and "--config-file" in done.stderr
    assert sandbox.run("init", "--config-file", "new.json", "--model-path", str(tiny_model)).returncode == 0
    assert str(tiny_model) in (sandbox.work / "new.json").read_text()
    assert sandbox.run("doctor", "--config-file", "none.json").returncode == 1


@pytest.mark.slow
def test_a_file_keeps_its_mode_and_its_line_ends_and_odd_paths_are_kept(sandbox: Sandbox, tiny_model: Path) -> None:
    path = sandbox.settings('{\r\n  // mine\r\n  "backend": "mlx"\r\n}\r\n')
    path.chmod(0o644)
    odd = os.fsdecode(bytes(sandbox.home) + b"/\xff")
    shutil.copytree(tiny_model, odd)
    done = sandbox.run("init", "--model-path", odd)
    assert done.returncode == 0, done.stderr
    assert b"// mine\r\n" in path.read_bytes() and path.stat().st_mode & 0o777 == 0o644
    assert load_settings({}, {}, sandbox.work, sandbox.home)[0].model_path.endswith("/\udcff")


# --- Downloads ---


class Hub(BaseHTTPRequestHandler):
    """Hugging Face, with the files in `content`; `plan`: what goes wrong with each request of a file, in order."""

    content: ClassVar[dict[str, bytes]] = {}
    plan: ClassVar[list[str]] = []
    seen: ClassVar[list[tuple[str, str | None, str | None]]] = []

    def do_GET(self) -> None:
        Hub.seen.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/Big"):
            rows = [
                {"rfilename": name, "size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
                for name, data in self.content.items()
            ]
            return self.answer(200, json.dumps({"siblings": rows}).encode())
        name = path.partition("/resolve/main/")[2]
        if name not in self.content:
            return self.answer(401, b"no")
        data, trouble = self.content[name], self.plan.pop(0) if self.plan and "safetensors" in name else ""
        begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if trouble == "from the beginning":
            return self.answer(200, data)
        if trouble == "busy":
            return self.answer(503, b"")
        if trouble == "reset":
            self.close_connection = True
            return None
        if trouble in ("elsewhere", "moved"):
            here = f"http://{self.headers['Host']}"
            self.send_response(302 if trouble == "elsewhere" else 308)
            there = here.replace("127.0.0.1", "localhost") if trouble == "elsewhere" else here
            self.send_header("Location", f"{there}/cdn-{trouble}{path}")
            return self.end_headers()
        if trouble == "unsatisfiable":
            return self.answer(416, b"")
        if trouble == "endless":
            data += b"x" * 99_999
        if trouble == "another":
            data = data[:-1] + b"!"
        rest = data[begin:]
        self.answer(206 if begin else 200, rest, len(rest) // 2 if trouble == "cut" else len(rest))

    def answer(self, status: int, body: bytes, sent: int = -1) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent] if sent >= 0 else body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> Iterator[str]:
    """A hub that has the tiny model as org/Big -> its URL. Home is a folder of its own."""
    content = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}
    for name, value in (("content", content), ("plan", []), ("seen", [])):
        monkeypatch.setattr(Hub, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(Hub) as url:
        for name, value in (("HF_ENDPOINT", url), ("no_proxy", "127.0.0.1"), ("HOME", str(tmp_path / "home"))):
            monkeypatch.setenv(name, value)
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        yield url


def test_a_model_is_looked_at_then_downloaded_then_used_without_the_hub(
    hub: str, tmp_path: Path, tiny_model: Path
) -> None:
    Hub.content.update({"README.md": b"x", "consolidated.safetensors": b"x", "onnx/model.safetensors": b"x"})
    model = read_model("org/Big")
    assert (model.hub, model.arch, model.context, model.sampling) == (
        "org/Big",
        "qwen3",
        131072,
        read_model(str(tiny_model)).sampling,
    )
    place = tmp_path / "home" / "models" / "org" / "Big"
    assert model.path == str(place) and not place.exists() and not model.flaws
    anyclaude.fetch_model(model)
    names = {path.name for path in place.iterdir()}
    assert names == set(Hub.content) - {"README.md", "consolidated.safetensors", "onnx/model.safetensors"}
    assert all((place / name).read_bytes() == Hub.content[name] for name in names)
    asked = len(Hub.seen)
    there = read_model("org/Big")
    assert (there.path, there.hub, there.name, there.flaws) == (str(place), "", "Big", ()) and len(Hub.seen) == asked


@pytest.mark.parametrize(
    "plan",
    [
        ["cut", "cut"],
        ["cut", "from the beginning"],
        ["busy", "cut", "busy"],
        ["cut"] * 9,
        ["reset", "cut"],
        ["endless"],
    ],
)
def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: str, plan: list[str]) -> None:
    model = read_model("org/Big")
    Hub.plan.extend(plan)
    anyclaude.fetch_model(model)
    assert (Path(model.path) / "model.safetensors").read_bytes() == Hub.content["model.safetensors"]
    ranges = [begin for path, begin, _ in Hub.seen if path.endswith("model.safetensors")]
    assert len(ranges) == len(plan) + (plan[-1] not in ("from the beginning", "endless"))
    assert any(ranges) or plan == ["endless"]


def test_what_came_stays_when_a_download_is_given_up(hub: str) -> None:
    model = read_model("org/Big")
    Hub.plan.extend(["cut", *["busy"] * anyclaude.HUB_TRIES])
    with pytest.raises(AnyclaudeError, match="broke off 5 times.*503") as caught:
        anyclaude.fetch_model(model)
    assert "goes on where it stopped" in caught.value.fix
    part = Path(model.path) / "model.safetensors.part"
    have = part.stat().st_size
    assert 0 < have < len(Hub.content["model.safetensors"])
    with pytest.raises(AnyclaudeError):  # half a model is none
        anyclaude.make_plan(
            Settings(), read_model(model.path), anyclaude.Engine(Path("x"), anyclaude.GENERATIONS[0], (0, 9, 2))
        )
    anyclaude.fetch_model(read_model("org/Big"))
    assert f"bytes={have}-" in [begin for _, begin, _ in Hub.seen] and not part.exists()


def test_a_file_that_came_differently_is_not_used(hub: str) -> None:
    model = read_model("org/Big")
    Hub.plan.append("another")
    with pytest.raises(AnyclaudeError, match="SHA-256"):
        anyclaude.fetch_model(model)
    assert not (Path(model.path) / "model.safetensors").exists()
    anyclaude.fetch_model(model)


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = Path.home() / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret\n")
    model = read_model("org/Big")
    Hub.plan.extend(["elsewhere", "cut", "moved"])
    anyclaude.fetch_model(model)
    carried = {path.partition("/org")[0]: header for path, _, header in Hub.seen if "safetensors" in path}
    assert carried == {"": "Bearer hf_secret", "/cdn-elsewhere": None, "/cdn-moved": "Bearer hf_secret"}


def test_a_model_that_is_not_to_be_had_is_a_clear_error(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AnyclaudeError, match="org/None is no folder here, and Hugging Face has no such model"
    ) as caught:
        read_model("org/None")
    assert "HF_TOKEN=" in caught.value.fix
    monkeypatch.setitem(Hub.content, "config.json", b"[]")
    with pytest.raises(AnyclaudeError, match="no config.json"):
        read_model("org/Big")
    model = dataclasses.replace(read_model_of(Hub), remote={"x": (1 << 60, "")})
    with pytest.raises(AnyclaudeError, match="more on the disk"):
        anyclaude.fetch_model(model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AnyclaudeError, match="HF_HUB_OFFLINE is set"):
        read_model("org/Big")


def read_model_of(hub: type[Hub]) -> anyclaude.Model:
    return anyclaude.Model(str(Path.home() / "models" / "org" / "Big"), "Big", hub="org/Big")


def test_what_is_no_beginning_of_the_file_is_begun_anew(hub: str) -> None:
    model = read_model("org/Big")
    Path(model.path).mkdir(parents=True)
    (Path(model.path) / "model.safetensors.part").write_bytes(b"x" * 10)
    (Path(model.path) / "gone.safetensors.part").write_bytes(b"x" * 10)
    Hub.plan.append("unsatisfiable")
    anyclaude.fetch_model(model)
    assert (Path(model.path) / "model.safetensors").read_bytes() == Hub.content["model.safetensors"]
    assert not list(Path(model.path).glob("*.part")) and read_model("org/Big").hub == ""


@pytest.mark.parametrize("error", [OSError(113, "No route to host"), ssl.SSLError(1, "bad record mac")])
def test_the_network_is_told_from_the_disk(hub: str, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    model, read = read_model("org/Big"), anyclaude.http.client.HTTPResponse.read
    failures = [error]

    def fail_once(reply: Any, *amount: int) -> bytes:
        if failures and amount:
            raise failures.pop()
        return read(reply, *amount)

    monkeypatch.setattr(anyclaude.http.client.HTTPResponse, "read", fail_once)
    anyclaude.fetch_model(model)
    assert not failures and read_model("org/Big").hub == ""


def test_two_sessions_do_not_write_into_one_download(hub: str) -> None:
    model = read_model("org/Big")
    Path(model.path).mkdir(parents=True)
    handle = anyclaude.lock(Path(model.path) / ".downloading", anyclaude.fcntl.LOCK_EX)
    with pytest.raises(AnyclaudeError, match="another session downloads"):
        anyclaude.fetch_model(model)
    os.close(handle)


def test_a_gguf_of_a_repository_is_named_by_its_file(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a-Q4_K_M.gguf": b"1" * 9, "q8/b-Q8_0-00001-of-00002.gguf": b"2", "q8/b-Q8_0-00002-of-00002.gguf": b"3"}
    monkeypatch.setattr(Hub, "content", {**files, "mmproj-x.gguf": b"4"})
    for name in ("org/Big", "org/Big/c.gguf"):
        with pytest.raises(AnyclaudeError) as caught:
            read_model(name)
        assert "--model-path org/Big/a-Q4_K_M.gguf" in caught.value.fix and "00002-of" not in caught.value.fix
    model = read_model("org/Big/a-Q4_K_M.gguf")
    assert (model.weights, model.stored, model.quantised) == (9, "GGUF Q4_K_M", True)
    model = read_model("org/Big/q8/b-Q8_0-00001-of-00002.gguf")
    assert set(model.remote) == set(files) - {"a-Q4_K_M.gguf"} and len(model.files) == 2
    anyclaude.fetch_model(model)
    assert (Path(model.path) / model.files[1]).read_bytes() == b"3"


@pytest.fixture
def large(hub: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """org/Big has 3 GB of weights -> its config.json."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "max_position_embeddings": 40960, "vocab_size": 150_000,
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    }  # fmt: skip
    whole = anyclaude.hub_files
    sizes = {"model.safetensors": (3 * GB, "")}
    monkeypatch.setattr(anyclaude, "hub_files", lambda name: {**whole(name), **sizes})
    monkeypatch.setitem(Hub.content, "config.json", json.dumps(config).encode())
    return config


def test_what_will_not_do_is_refused_before_it_is_downloaded(
    hub: str, large: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model("org/Big")
    assert (model.weights, model.cache, model.context) == (3 * GB, 48 * 2 * 4 * 128, 40960)
    assert 0.28 < model.size("Q4K") / model.weights < 0.45 and not model.flaws
    with pytest.raises(AnyclaudeError, match="does not fit"):
        fit(model, Machine("", GB, ""), "Q4K")
    monkeypatch.setitem(
        Hub.content, "config.json", json.dumps({**large, "architectures": ["OlmoeForCausalLM"]}).encode()
    )
    with pytest.raises(AnyclaudeError, match="does not load"):
        read_model("org/Big")
    monkeypatch.setitem(Hub.content, "config.json", json.dumps(large).encode())
    monkeypatch.setitem(Hub.content, "tokenizer_config.json", b"{}")
    assert "no chat template" in read_model("org/Big").flaws[0][0]
    monkeypatch.setattr(anyclaude, "hub_files", lambda name: {"x-Q4_0.gguf": (40 * GB, "")})
    with pytest.raises(AnyclaudeError, match="does not fit"):  # though it is not known what its cache takes
        fit(read_model("org/Big"), Machine("", 8 * GB, ""), "Q4K")
    monkeypatch.setattr(anyclaude, "hub_files", lambda name: {"config.json": (1, ""), "pytorch_model.bin": (9, "")})
    with pytest.raises(AnyclaudeError, match=r"no \*\.safetensors"):
        read_model("org/Big")


def test_how_far_a_download_is_shows_on_a_terminal(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(anyclaude.TERMINAL, "waiting", shown.append)
    anyclaude.fetch_model(read_model("org/Big"))
    assert any(re.fullmatch(r"download: 100 %, 1 MB of 1 MB, \d+\.\d MB/s, 0 s left", line) for line in shown), shown
    assert shown[-1] == ""


@pytest.mark.parametrize("endpoint", ["hf-mirror.example", "http://127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_a_hub_that_cannot_be_reached_is_named(hub: str, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(AnyclaudeError, match=f"{endpoint} cannot be reached"):
        read_model("org/Big")


def test_a_token_with_a_line_end_is_no_trouble(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x\n")
    assert read_model("org/Big").hub and {token for *_, token in Hub.seen} == {"Bearer hf_x"}


def test_another_file_that_is_being_downloaded_is_no_reason_to_ask_the_hub(hub: str) -> None:
    anyclaude.fetch_model(read_model("org/Big"))
    place = Path.home() / "models" / "org" / "Big"
    (place / "q8").mkdir()
    (place / "q8" / "x.gguf.part").touch()
    assert read_model("org/Big").hub == ""
    (place / "model.safetensors.part").touch()
    assert read_model("org/Big").hub == "org/Big"


def test_names_that_lead_out_of_the_folder_are_not_downloaded(hub: str) -> None:
    Hub.content.update({"../evil.json": b"{}", "/tmp/evil.json": b"{}", "a/../../evil.safetensors": b""})
    assert not any("evil" in name for name in read_model("org/Big").remote)


@pytest.mark.slow
def test_a_session_downloads_its_model_first_and_ctrl_c_keeps_what_came(
    sandbox: Sandbox, stand_in: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}
    reached, go = threading.Event(), threading.Event()

    class Slow(Hub):
        def do_GET(self) -> None:
            if self.path.endswith("model.safetensors") and not go.is_set():
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content["model.safetensors"][:1000])
                reached.set()
                go.wait(30)
                return
            super().do_GET()

    monkeypatch.setattr(Hub, "content", content)
    (sandbox.bin / "claude").write_text("#!/bin/sh\necho the end\n")
    (sandbox.bin / "claude").chmod(0o755)
    with serving(Slow) as url:
        env = {"HF_ENDPOINT": url, "ANYCLAUDE_ENGINE_PORT": "0"}
        process = sandbox.start("--model-path", "org/Big", env=env)
        assert reached.wait(30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        go.set()
        assert "what came stays" in err and "fix: To go on: the same command again" in err and "Traceback" not in err
        done = sandbox.run("--model-path", "org/Big", env=env)
    assert done.stdout == "the end\n", done.stderr
    assert "downloading Big" in done.stderr and f"model: {sandbox.home}/models/org/Big" in done.stderr


# --- What is asked ---


@pytest.fixture
def newcomer(shelf: Sandbox) -> Sandbox:
    """A home with models, an npm that installs a claude, and an engine."""
    npm = """case "$*" in
        "prefix -g") echo /nowhere;;
        *) echo "$@" > "$HOME/npm"; mkdir -p "$HOME/.local/bin"
           printf '#!/bin/sh\\necho the end\\n' > "$HOME/.local/bin/claude"; chmod +x "$HOME/.local/bin/claude";;
        esac"""
    (shelf.bin / "npm").write_text(f"#!/bin/sh\n{npm}\n")
    (shelf.bin / "npm").chmod(0o755)
    shelf.env["ANYCLAUDE_ENGINE_PORT"] = "0"
    return shelf


@pytest.mark.slow
def test_a_first_run_asks_for_what_is_missing_and_keeps_the_choice(
    newcomer: Sandbox, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(newcomer.home))
    answers = [("[Y/n]", "y\n"), ("[1]:", "77\n"), ("[1]:", "/nowhere\n"), ("[1]:", "2\n")]
    status, shown = newcomer.on_terminal(answers=answers)
    assert status == 0 and "the end" in shown, shown
    order = [
        "Claude Code was not found. Install it now?",
        "(npm install",
        "Which model?",
        "On this disk:",
        "To download",
    ]
    order += [
        "has no number 77",
        "/nowhere does not exist",
        "model: ",
        "wrote ~/.anyclauderc.json",
        "to choose another: ",
        "starting mistral.rs",
        "Proxy URL",
        "the end",
    ]
    places = [shown.find(words) for words in order]
    assert places == sorted(places) and places[0] >= 0, shown
    chosen = json.loads(newcomer.run("models", "--json").stdout)["on_disk"][1]["path"]
    assert load_settings({}, {}, newcomer.work, newcomer.home)[0].model_path == chosen
    assert (newcomer.home / "npm").read_text().split() == [
        "install", "-g", "--prefix", f"{newcomer.home}/.local", "@anthropic-ai/claude-code@latest",
    ]  # fmt: skip
    status, shown = newcomer.on_terminal()
    assert status == 0 and "Which model" not in shown and "[Y/n]" not in shown
    assert re.search(r"to go on with this conversation: python3 .*anyclaude.py --continue", shown)
    status, shown = newcomer.on_terminal("init", answers=[("[2]:", "\n")])  # what is set is the default
    assert " *\r\n" in shown and "*: the one that is set" in shown
    assert load_settings({}, {}, newcomer.work, newcomer.home)[0].model_path == chosen


@pytest.mark.slow
def test_with_yes_nothing_is_asked(newcomer: Sandbox, stand_in: Path) -> None:
    done = newcomer.run("--yes", "-p", "hi")
    assert done.stdout == "the end\n" and "yes (--yes)" in done.stderr, done.stderr
    assert load_settings({}, {}, newcomer.work, newcomer.home)[0].model_path


@pytest.mark.slow
def test_with_yes_and_no_model_the_first_that_fits_is_downloaded(sandbox: Sandbox, stand_in: Path) -> None:
    path = {"PATH": str(sandbox.bin)}
    best = anyclaude.choices(Settings(), path, anyclaude.likely_engine(Settings(), path))[1][0].path
    done = sandbox.run("--proxy-only", "--yes")
    assert done.returncode == 1 and f"model: {best}" in done.stderr
    assert f"{'/'.join(best.split('/')[:2])} is to be downloaded, and {NO_HUB} cannot be reached" in done.stderr
    assert not (sandbox.home / ".anyclauderc.json").exists()  # nobody chose it


@pytest.mark.slow
def test_a_model_that_cannot_be_used_is_not_kept(newcomer: Sandbox, stand_in: Path) -> None:
    bare = make_tiny_model(newcomer.home / "bare")
    (bare / "tokenizer_config.json").write_text("{}")
    status, shown = newcomer.on_terminal("init", answers=[("[1]:", f"{bare}\n"), ("[1]:", "\x03")])
    assert status == 130 and "no chat template" in shown and not (newcomer.home / ".anyclauderc.json").exists()


@pytest.mark.slow
def test_init_with_an_option_asks_for_nothing_else(newcomer: Sandbox, stand_in: Path) -> None:
    status, shown = newcomer.on_terminal("init", "--isq", "Q3K")
    assert (
        status == 0
        and "Which model" not in shown
        and '"isq": "Q3K"' in (newcomer.home / ".anyclauderc.json").read_text()
    )


@pytest.mark.slow
def test_a_claude_in_npms_own_folder_is_found(newcomer: Sandbox, stand_in: Path) -> None:
    claude = newcomer.home / "global" / "bin" / "claude"
    claude.parent.mkdir(parents=True)
    claude.write_text("#!/bin/sh\necho the end\n")
    claude.chmod(0o755)
    (newcomer.bin / "npm").write_text(f'#!/bin/sh\n[ "$*" = "prefix -g" ] && echo {newcomer.home}/global\n')
    assert newcomer.run("--demo", "-p", "hi").stdout == "the end\n"


@pytest.mark.slow
def test_without_a_terminal_everything_that_is_missing_is_told_at_once(newcomer: Sandbox) -> None:
    bare = {"PATH": str(newcomer.bin)}
    words = ["mistral.rs was not found, and it cannot be built yet", "rustup", "no model is configured", "with --yes"]
    words += ["anyclaude.py models", "--model-path", "--demo"]
    done = newcomer.run("--proxy-only", env=bare)
    assert done.returncode == 1 and all(one in done.stderr for one in words), done.stderr
    done = newcomer.run("-p", "hi", env=bare)
    words += ["Claude Code (claude) was not found", "npm install -g"]
    assert done.returncode == 1 and all(one in done.stderr for one in words), done.stderr
    assert done.stderr.count("--demo") == 1 and not (newcomer.home / "npm").exists()
    assert not (newcomer.home / ".anyclauderc.json").exists()


def test_what_a_build_lacks_is_told_before_anything_is_asked(newcomer: Sandbox) -> None:
    status, shown = newcomer.on_terminal("--proxy-only", env={"PATH": str(newcomer.bin)})
    assert status == 1 and "not found, and it cannot be built yet" in shown and "rustup" in shown
    assert "then the same command again" in shown and "Which model" not in shown and "[Y/n]" not in shown


@pytest.mark.slow
def test_no_is_an_answer(newcomer: Sandbox, stand_in: Path) -> None:
    status, shown = newcomer.on_terminal(answers=[("[Y/n]", "n\n")])
    assert status == 1 and "was not found" in shown and not (newcomer.home / "npm").exists()
    status, shown = newcomer.on_terminal("--proxy-only", answers=[("[1]:", "\x04")])
    assert status == 130 and not (newcomer.home / ".anyclauderc.json").exists()


def test_claude_codes_own_installer_stands_in_for_npm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (
                b'mkdir -p "$HOME/.local/bin"; cd "$HOME/.local/bin"; printf "#!/bin/sh\\n" > claude; chmod +x claude'
            )
            self.send_response(200 if self.path == "/install.sh" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = {"PATH": str(tmp_path / "bin")}
    with serving(Site) as url:
        monkeypatch.setattr(anyclaude, "CLAUDE_INSTALLER", f"{url}/none")
        with pytest.raises(AnyclaudeError, match="cannot be had.*404"):
            anyclaude.set_up_claude(Settings(yes=True), path)
        monkeypatch.setattr(anyclaude, "CLAUDE_INSTALLER", f"{url}/install.sh")
        assert anyclaude.set_up_claude(Settings(yes=True), path) == tmp_path / ".local" / "bin" / "claude"


@pytest.mark.slow
def test_what_npm_cannot_install_is_told(newcomer: Sandbox) -> None:
    (newcomer.bin / "npm").write_text("#!/bin/sh\necho npm: no network >&2\nexit 7\n")
    done = newcomer.run("--yes", "--demo", "-p", "hi")
    assert done.returncode == 1 and "npm: no network" in done.stderr
    assert "not installed (exit status 7)" in done.stderr and "curl -fsSL" in done.stderr


# --- Options that nearly are ours ---

CLAUDE_HELP = """
Options:
  --model <model>   x
  --debug [filter]
  --print, -p
Commands:
  doctor
  mcp
  update|upgrade
  models-x
"""


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--model-pth /x", "--model-path"),
        ("--modelpath=/x", "--model-path"),
        ("--Model-Path /x", "--model-path"),
        ("-model-path /x", "--model-path"),
        ("-p hi --context-windw 5", "--context-window"),
        ("--context 5", "--context-window"),
        ("--proxyonly", "--proxy-only"),
        ("--dem", "--demo"),
        ("-yes", "--yes"),
        ("--base", "--base-url"),
        ("docter", "doctor"),
        ("modles", "models"),
        ("statuss", "status"),
        ("docter --json", "doctor"),
    ],
)
def test_a_near_miss_of_what_is_ours_is_found(words: str, meant: str) -> None:
    assert near_miss(words.split(), CLAUDE_HELP) == (
        next(w for w in words.partition("=")[0].split() if w not in ("-p", "hi")),
        meant,
    )


@pytest.mark.parametrize(
    "words",
    [
        "--model opus",
        "--print",
        "-p --debug",
        "mcp list",
        "models-x",
        "update",
        "-c",
        "hello",
        "fix --all",
        "--settings x",
        "--prompt",
        "--help",
    ],
)
def test_what_is_claudes_or_a_prompt_is_no_near_miss(words: str) -> None:
    assert near_miss(words.split(), CLAUDE_HELP) == ("", "")


@pytest.mark.outside
@pytest.mark.slow
def test_claudes_own_commands_get_their_arguments_unchanged(sandbox: Sandbox, claude: Path) -> None:
    done = sandbox.run("mcp", "add", "mine", "--", "npx", "-y", "--demo", "pkg")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((sandbox.home / ".claude.json").read_text())["projects"][str(sandbox.work.resolve())]
    assert kept["mcpServers"]["mine"]["args"] == ["-y", "--demo", "pkg"]  # `mcp list` would run it
    assert "no option" not in sandbox.run("plugin", "install", "x@y", "--config", "a=b", "--yes").stderr


def test_without_a_claude_to_ask_only_what_is_very_near_counts() -> None:
    assert near_miss(["--model", "opus"], "") == near_miss(["--print"], "") == ("", "")
    assert near_miss(["--model-pth"], "")[1] == "--model-path"


@pytest.mark.outside
def test_no_option_or_command_of_the_real_claude_is_taken_for_a_near_miss(claude: Path) -> None:
    help_text = anyclaude.output_of(str(claude), "--help")
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_text))
    assert len(options) > 40
    for option in options:
        assert near_miss([option], help_text) == ("", ""), option
    for command in anyclaude.claude_commands(help_text):
        assert near_miss([command], help_text) == ("", "") or command in COMMANDS


def test_a_near_miss_ends_with_what_to_type(sandbox: Sandbox) -> None:
    done = sandbox.run("--demo", "--model-pth", "/x")
    assert done.returncode == 1 and "has no option --model-pth" in done.stderr
    assert "anyclaude.py --model-path ..." in done.stderr and "-- --model-pth" in done.stderr
    done = sandbox.run("docter")
    assert done.returncode == 1 and "anyclaude.py doctor" in done.stderr
    (sandbox.bin / "claude").write_text('#!/bin/sh\necho "$@"\n')
    (sandbox.bin / "claude").chmod(0o755)
    assert "--model-pth" in sandbox.run("--demo", "--", "--model-pth").stdout


# --- What is shown ---


@pytest.mark.slow
def test_colours_are_for_terminals_that_want_them(sandbox: Sandbox) -> None:
    _, shown = sandbox.on_terminal("stop", "--frce")
    assert "\x1b[31merror:" in shown and "\x1b[32mfix:" in shown
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        _, shown = sandbox.on_terminal("stop", "--frce", env=env)
        assert "error:" in shown and "\x1b" not in shown
    assert "\x1b" not in sandbox.run("stop", "--frce").stderr


def test_a_long_wait_says_something_in_a_pipe_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    terminal = anyclaude.Terminal()
    for second in range(100):
        now = 1000.0 + second
        terminal.waiting(f"so far {second}")
    terminal.waiting("")
    now += 20
    terminal.waiting("another wait")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"[anyclaude] so far {second}" for second in (31, 62, 93)]


@pytest.mark.slow
def test_loading_is_told_in_percent(sandbox: Sandbox, stand_in: Path, tiny_model: Path) -> None:
    status, shown = sandbox.on_terminal(
        "--proxy-only", "--model-path", str(tiny_model), env={"STAND_IN": "slow", "ANYCLAUDE_ENGINE_PORT": "0"},
        answers=[("Ctrl-C ends it", "\x03")],
    )  # fmt: skip
    assert status == 0 and re.search(r"waiting for mistral\.rs: \d s, \d\d? % loaded: ", shown), shown


# --- In the session ---


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> anyclaude.Meter:
    """A meter of a session whose model has a window of 1,000 tokens, in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return anyclaude.Meter(anyclaude.Target("", "Tiny", window=1000), None, None)


def answered(meter: anyclaude.Meter, main: bool = True, **usage: Any) -> None:
    """A request that was answered with two chunks and this usage."""
    reply = anyclaude.Reply("Tiny", anyclaude.ToolText({}), lambda: "id")
    with meter.measuring(reply, main, time.monotonic()) as one:
        batches = iter([reply.start(), reply.feed({"choices": [{"delta": {"content": "secret words"}}]})])
        list(one.watching(batches))
        reply.feed({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage})
        reply.finish(done=True)


def requests_of(home: Path) -> list[dict[str, Any]]:
    text = (home / ".anyclaude" / "logs" / "requests.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_each_request_is_a_line_of_figures_without_its_text(measured: anyclaude.Meter, tmp_path: Path) -> None:
    answered(measured, prompt_tokens=400, completion_tokens=50, prompt_tokens_details={"cached_tokens": 300})
    reply = anyclaude.Reply("Tiny", anyclaude.ToolText({}), lambda: "id")
    with pytest.raises(anyclaude.ApiError), measured.measuring(reply, False, time.monotonic()):
        raise anyclaude.ApiError(529, "busy with secret words")
    first, second = requests_of(tmp_path)
    expected = {"model": "Tiny", "subagent": False, "prompt_tokens": 400, "cached_tokens": 300, "output_tokens": 50}
    expected |= {"cached_is_estimated": False, "outcome": "end_turn"}
    assert {name: first[name] for name in expected} == expected
    assert 0 <= first["time_to_first_token"] <= first["seconds"] and first["tokens_per_second"] > 0
    assert (second["outcome"], second["subagent"], second["tokens_per_second"]) == ("error 529", True, None)
    path = tmp_path / ".anyclaude" / "logs" / "requests.jsonl"
    assert "secret" not in path.read_text() and path.stat().st_mode & 0o777 == 0o600


def test_what_was_reused_follows_from_how_long_the_engine_read(measured: anyclaude.Meter, tmp_path: Path) -> None:
    """Reading times of mistral.rs 0.9.2 for a conversation that grew, of which 3,220 to 5,500 tokens were cached."""
    for prompt, seconds in ((3220, 0.951), (3992, 0.137), (4764, 0.163), (100, 0.001)):
        answered(measured, prompt_tokens=prompt, completion_tokens=28, total_prompt_time_sec=seconds)
    assert [one["cached_tokens"] for one in requests_of(tmp_path)] == [0, 3500, 4200, None]
    assert all(one["cached_is_estimated"] for one in requests_of(tmp_path))


def test_what_ran_beside_another_request_tells_nothing_of_reuse(measured: anyclaude.Meter, tmp_path: Path) -> None:
    reply = anyclaude.Reply("Tiny", anyclaude.ToolText({}), lambda: "id")
    with pytest.raises(anyclaude._ClientLeft), measured.measuring(reply, True, time.monotonic()):
        answered(measured, prompt_tokens=3000, completion_tokens=9, total_prompt_time_sec=60)
        raise anyclaude._ClientLeft
    answered(measured, prompt_tokens=600, completion_tokens=9, total_prompt_time_sec=3)  # warming up
    answered(measured, prompt_tokens=5000, completion_tokens=9, total_prompt_time_sec=2)
    answered(measured, prompt_tokens=5500, completion_tokens=9, total_prompt_time_sec=0.2)
    assert [one["cached_tokens"] for one in requests_of(tmp_path)] == [None, None, 0, 0, 5000]
    assert [one["outcome"] for one in requests_of(tmp_path)][:2] == ["end_turn", "left"]


def test_the_status_line_says_what_happens(measured: anyclaude.Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert measured.words() == "Tiny"
    reply = anyclaude.Reply("Tiny", anyclaude.ToolText({}), lambda: "id")
    with measured.measuring(reply, True, time.monotonic()) as one:
        reply.prompt = 420
        measured._share = SimpleNamespace(is_started_again=lambda: True)  # type: ignore[assignment]
        assert measured.words() == "Tiny | mistral.rs is started again"
        measured._share = None
        now[0] += 7
        assert measured.words() == "Tiny | reading 420, 7 s"
        list(one.watching(iter([reply.feed({"choices": [{"delta": {"content": "a"}}]})])))
        now[0] += 2
        usage = {"prompt_tokens": 400, "completion_tokens": 80, "prompt_tokens_details": {"cached_tokens": 390}}
        reply.feed({"choices": [{"delta": {"content": "b"}}], "usage": usage})
        assert measured.words() == "Tiny | writing 40 tokens/s"
        reply.finish(done=True)
    said = "Tiny | context 48 % | 40 tokens/s | first 7.0 s | prompt 400, 390 reused"
    assert measured.words() == said
    answered(measured, main=False, prompt_tokens=900, completion_tokens=9)
    assert measured.words().startswith("Tiny | context 48 % |")  # a subagent's context is another


def test_the_log_of_requests_is_rotated_and_written_by_many(
    measured: anyclaude.Meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anyclaude, "REQUESTS_LOG_LIMIT", 20_000)
    others = [anyclaude.Meter(measured._target, None, None) for _ in range(4)]
    threads = [
        threading.Thread(
            target=lambda one=one: [answered(one, prompt_tokens=9, completion_tokens=9) for _ in range(25)]
        )
        for one in others
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logs = sorted((tmp_path / ".anyclaude" / "logs").glob("requests.jsonl*"))
    assert len(logs) == 2 and all(path.stat().st_size for path in logs)
    assert sum(len(path.read_text().splitlines()) for path in logs) == 100
    assert len(anyclaude.read_requests()) == 100


def test_stats_shows_the_last_sessions_and_passes_over_what_is_broken(sandbox: Sandbox) -> None:
    assert "no request was answered yet" in sandbox.run("stats").stdout
    path = sandbox.home / ".anyclaude" / "logs" / "requests.jsonl"
    rows = []
    for session in range(12):
        row = {
            "time": 1.7e9 + session,
            "session": str(session),
            "model": "M\x1b[31m",
            "prompt_tokens": 1000,
            "seconds": 2,
        }
        row |= {"output_tokens": 10, "cached_tokens": 750, "tokens_per_second": 5.0 * session, "outcome": "end_turn"}
        rows += [row, {**row, "time_to_first_token": 0.25, "prompt_tokens": 3000, "outcome": "error 500"}]
    odd = [
        {**rows[0], name: value} for name, value in (("time", 1e300), ("seconds", 1e308), ("cached_tokens", 10**400))
    ]
    odd += [{**rows[0], "prompt_tokens": float("nan")}, {**rows[0], "tokens_per_second": float("inf"), "session": "0"}]
    path.write_text("\n".join(["{broken", "[]", "{}", '{"time": "x"}', *map(json.dumps, odd), *map(json.dumps, rows)]))
    text = sandbox.run("stats").stdout
    lines = [line for line in text.splitlines() if " M " in line]
    assert len(lines) == 10 and "\x1b" not in text and "Traceback" not in text
    assert re.search(r" 2 +3000 +38 % +0\.25 s +55 (█{8}|#{8}) 1 failed$", lines[-1])
    (*_, last) = json.loads(sandbox.run("stats", "--json").stdout)["sessions"]
    assert (last["requests"], last["reused_percent"], last["tokens_per_second"], last["failed"]) == (2, 37.5, 55.0, 1)


CLIENT = """#!/bin/sh
[ "$1" != --help ] || { printf -- '--settings\\n'; exit; }
for one; do case $one in --settings=*) cat "${one#*=}";; esac; done
echo; eval "$(sed -n 's/.*"command": "\\(cat [^"]*\\)".*/\\1/p' "${one#*=}")"
"""


@pytest.mark.slow
def test_the_status_line_is_for_sessions_on_a_terminal_and_never_over_the_users_own(sandbox: Sandbox) -> None:
    (sandbox.bin / "claude").write_text(CLIENT)
    (sandbox.bin / "claude").chmod(0o755)
    status, shown = sandbox.on_terminal("--demo")
    assert (
        status == 0
        and '"statusLine": {"type": "command", "command": "cat ' in shown
        and "\r\nanyclaude-demo\r\n" in shown
    )
    assert "that was the demo; with a model of yours: python3" in shown
    assert re.search(r'"command": "cat [^"]+", "refreshInterval": 1, "padding": 0}', shown)
    assert "statusLine" not in sandbox.run("--demo", "-p", "hi").stdout
    assert "statusLine" not in sandbox.on_terminal("--demo", "-p", "hi")[1]
    own = sandbox.home / ".claude" / "settings.json"
    own.parent.mkdir()
    own.write_text('{"statusLine": {"type": "command", "command": "mine"}}')
    assert "statusLine" not in sandbox.on_terminal("--demo")[1]
    own.unlink()
    mine = '{"statusLine": {"type": "command", "command": "mine"}}'
    assert sandbox.on_terminal("--demo", "--settings", mine)[1].count('"mine"') == 1
    assert not list((sandbox.home / ".anyclaude" / "run").glob("claude-*"))


@pytest.mark.outside
@pytest.mark.slow
def test_the_real_claude_leaves_its_figures(sandbox: Sandbox, claude: Path) -> None:
    assert sandbox.run("--demo", "-p", "Which files are here?").returncode == 0
    rows = requests_of(sandbox.home)
    assert len(rows) >= 2 and {row["outcome"] for row in rows} == {"tool_use", "end_turn"}
    assert all(row["prompt_tokens"] > 1000 and row["output_tokens"] > 1 and row["time_to_first_token"] for row in rows)
    assert re.search(r"anyclaude-demo +\d", sandbox.run("stats").stdout)


@pytest.mark.outside
@pytest.mark.slow
def test_the_real_claude_shows_the_status_line_on_a_terminal(sandbox: Sandbox, claude: Path) -> None:
    tmux = shutil.which("tmux")
    if not tmux:
        pytest.skip("tmux is not here: apt install tmux")
    known = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "projects": {str(sandbox.work): {"hasTrustDialogAccepted": True}},
    }
    (sandbox.home / ".claude.json").write_text(json.dumps(known))
    server = (tmux, "-S", str(sandbox.home / "tmux"), "-f", "/dev/null")

    def screen(words: str = "") -> str:
        """What the terminal shows, as soon as `words` are there."""
        deadline = time.monotonic() + 40
        while True:
            shown = subprocess.run([*server, "capture-pane", "-p"], capture_output=True, text=True, check=False).stdout
            if words in shown:
                return shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)

    def type_in(*keys: str) -> None:
        subprocess.run([*server, "send-keys", *keys], check=True)

    line = shlex.join([sys.executable, str(anyclaude.__file__), "--demo"])
    start = ["new-session", "-d", "-x", "100", "-y", "30", "-c", str(sandbox.work), f"{line}; sleep 60"]
    subprocess.run([*server, *start], env={**sandbox.env, "TERM": "xterm-256color"}, check=True)
    try:
        screen("anyclaude-demo\n")  # the status line, before the first request
        type_in("Which files are here?")
        screen("Which files are here?")
        type_in("Enter")
        screen("all else is real")
        screen("| first ")
        assert re.search(
            r"(?m)^ *anyclaude-demo \| context \d+ % \| [\d.]+ tokens/s \| first \d+ ms \| prompt [\d.]+k", screen()
        )
        type_in("/exit")
        screen("/exit")
        type_in("Enter")
        screen("that was the demo")
    finally:
        subprocess.run([*server, "kill-server"], check=False)
