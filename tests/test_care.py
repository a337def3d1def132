"""Section 4: how a model is laid into memory, and how an engine is looked after."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Sandbox, every_engine
from test_engine import end, gone, ready, wait_for
from tiny_model import make_tiny_gguf, make_tiny_mlx_model, make_tiny_model

import anyclaude
from anyclaude import (
    GENERATIONS,
    AnyclaudeError,
    Engine,
    Fit,
    Machine,
    Model,
    Session,
    Settings,
    claude_environment,
    command_line,
    ending,
    fit,
    free_port,
    read_machine,
)

GB = 1 << 30
CODER = Model(
    "/m/Coder", "Coder", "qwen3moe", 262144, weights=61 * GB, linear=(30 * GB, 60 * GB), cache=48 * 2 * 4 * 128
)
HELP = Path(__file__).parent / "help"


# --- Fit ---


def test_the_window_is_as_large_as_its_cache_fits_beside_the_weights() -> None:
    machine = Machine("metal", 48 * GB, "")
    laid = fit(CODER, machine, "Q4K")
    assert laid.weights == GB + 30 * GB * 4.5 / 8 and laid.token == 98304
    used = laid.weights + laid.window * laid.token * (1 + laid.cached)
    assert 65536 <= laid.window < CODER.context and laid.cached == 2 and 0.9 * 48 * GB < used < 48 * GB
    assert laid.window % 1024 == 0


def test_more_memory_never_gives_less_and_everything_always_fits() -> None:
    before = Fit()
    for memory in range(20, 200):
        laid = fit(CODER, Machine("", memory * GB, ""), "Q4K")
        assert laid.window >= min(before.window, 65536), memory
        assert laid.window * (1 + laid.cached) >= before.window, memory
        assert laid.weights + laid.window * laid.token * (1 + laid.cached) < memory * GB
        assert 1 <= laid.cached <= 16 and laid.window <= CODER.context
        before = laid
    assert before.window == CODER.context and before.cached > 2


def test_a_model_that_cannot_fit_is_refused_with_the_figures_and_a_way_out() -> None:
    with pytest.raises(AnyclaudeError) as caught:
        fit(CODER, Machine("metal", 16 * GB, "what macOS gives to the GPU"), "Q4K")
    assert "17.9 GB" in caught.value.message and "16.0 GB (what macOS gives to the GPU)" in caught.value.message
    assert "--isq Q3K: 15.3 GB" in caught.value.fix
    with pytest.raises(AnyclaudeError) as caught:
        fit(CODER, Machine("", 8 * GB, ""), "Q2K")
    assert "--isq" not in caught.value.fix and "smaller model" in caught.value.fix


def test_a_window_of_the_users_own_is_not_questioned() -> None:
    assert fit(CODER, Machine("", 20 * GB, ""), "Q4K", 200_000).window == 200_000
    assert fit(CODER, Machine("", 400 * GB, ""), "Q4K", 20_000) == Fit(20_000, 16, int(GB + 30 * GB * 4.5 / 8), 98304)


def test_on_a_processor_newer_engines_compute_with_numbers_twice_as_large() -> None:
    assert CODER.size("none", 2) == 2 * CODER.weights
    assert CODER.size("Q4K", 2) == 2 * GB + 30 * GB * 4.5 / 8


def test_a_window_larger_than_the_models_own_is_not_promised() -> None:
    assert fit(CODER, Machine("", 400 * GB, ""), "Q4K", 99_999_999).window == CODER.context


def test_what_is_not_known_is_not_guessed() -> None:
    assert fit(Model("org/x", "x", context=4096), Machine("", GB, ""), "Q4K") == Fit(4096, 0, 0, 0)


@pytest.mark.parametrize(
    ("total", "wired", "usable"), [(32 * GB, 0, 32 * GB * 2 // 3), (64 * GB, 0, 48 * GB), (64 * GB, 57344, 56 * GB)]
)
def test_a_macs_gpu_may_have_what_macos_gives_it(
    monkeypatch: pytest.MonkeyPatch, total: int, wired: int, usable: int
) -> None:
    said = {"hw.memsize": total, "iogpu.wired_limit_mb": wired}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "uname", lambda: type("", (), {"machine": "arm64"}))
    monkeypatch.setattr(anyclaude, "output_of", lambda *command: f"{said[command[-1]]}\n")
    assert read_machine() == Machine("metal", usable, "what macOS gives to the GPU")


def test_gpus_count_together_and_the_users_figure_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(anyclaude, "output_of", lambda *command: "24564\n24564\n" if "nvidia-smi" in command else "")
    machine = read_machine()
    assert machine.accelerator == "cuda" and machine.memory == (2 * 24564 << 20) * 9 // 10
    assert read_machine(1000) == Machine("cuda", 1000 << 20, "memoryLimit")


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="only Linux has /proc/meminfo")
def test_this_machines_memory_is_found() -> None:
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10  # type: ignore[index]
    assert 0 < read_machine().memory < total


@pytest.mark.parametrize("window", [4096, 16384, 65536, 200_000, 1_000_000])
def test_no_tool_result_may_take_more_than_an_eighth_of_the_window(window: int) -> None:
    environment = claude_environment({}, Session("u", "t", "m", window, 4096))
    tokens = int(environment["CLAUDE_CODE_FILE_READ_MAX_OUTPUT_TOKENS"])
    assert tokens == int(environment["MAX_MCP_OUTPUT_TOKENS"]) <= min(25_000, max(1000, window // 8))
    assert 3000 <= int(environment["BASH_MAX_OUTPUT_LENGTH"]) <= min(30_000, max(3000, window // 8 * 3))
    assert environment["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(window)
    assert (
        claude_environment({"BASH_MAX_OUTPUT_LENGTH": "7"}, Session("u", "t", "m", window, 1))["BASH_MAX_OUTPUT_LENGTH"]
        == "7"
    )


# --- The command line of each generation, against its recorded --help ---


def recorded(name: str, version: tuple[int, int, int]) -> Engine:
    serve, text = (
        (HELP / f"{name}-{'.'.join(map(str, version))}-{part}.txt").read_text() for part in ("serve", "text")
    )
    row = next(row for row in GENERATIONS if row.program == name)
    return Engine(Path("/bin") / name, row, version, text, serve)


ENGINES = [
    recorded("mistralrs", (0, 9, 2)),
    recorded("mistralrs", (0, 8, 1)),
    recorded("mistralrs", (0, 7, 0)),
    recorded("mistralrs-server", (0, 7, 0)),
]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("accelerator", ["", "metal", "cuda"])
@pytest.mark.parametrize("model", [CODER, Model("/m", "x", files=("a.gguf",), quantised=True)], ids=["plain", "gguf"])
def test_every_flag_that_is_passed_is_one_the_engine_lists(engine: Engine, accelerator: str, model: Model) -> None:
    line = command_line(engine, model, 8081, "Q4K", (), Fit(65536, 3, 1, 1), accelerator)
    front, behind = line, list[str]()
    place = next(at for at, word in enumerate(line) if word in ("text", "plain", "gguf"))
    front, behind = line[1:place], line[place:]
    for words, text in ((front, engine.help), (behind, engine.model_help)):
        for flag in (word for word in words if word.startswith("-") and word not in ("-m", "-f")):
            assert anyclaude.lists(text, flag), flag


def test_paged_attention_is_told_how_much_to_take_on_a_gpu_only() -> None:
    plan = Fit(65536, 3, 1, 1)
    new, old = ENGINES[0], ENGINES[3]
    assert "--pa-context-len 262144" in " ".join(command_line(new, CODER, 1, "Q4K", (), plan, "cuda"))
    assert "--pa-ctxt-len 262144" in " ".join(command_line(old, CODER, 1, "Q4K", (), plan, "cuda"))
    for accelerator in ("", "metal"):
        assert "--pa-" not in " ".join(command_line(new, CODER, 1, "Q4K", (), plan, accelerator))
    oldest = Engine(old.program, old.generation, (0, 6, 0), old.model_help, old.help)  # it would read each prompt anew
    assert "--no-paged-attn" in command_line(oldest, CODER, 1, "Q4K", (), plan, "cuda")


def test_gguf_files_are_named_as_each_generation_wants_them() -> None:
    model = Model("/m", "x", files=("a-1.gguf", "a-2.gguf"), quantised=True)
    lines = [" ".join(command_line(engine, model, 1, "Q4K")) for engine in (ENGINES[0], ENGINES[3])]
    assert lines[0].endswith("text --format gguf -m /m -f a-1.gguf;a-2.gguf")
    assert lines[1].endswith("gguf -m /m -f a-1.gguf a-2.gguf")
    assert not any("--isq" in line for line in lines)


# --- MLX ---


def test_the_shadow_of_an_mlx_model_links_what_is_there_and_follows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = make_tiny_mlx_model(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):
        model = anyclaude.read_model(str(folder))
        anyclaude.make_shadow(model)
        shadow = Path(anyclaude.shadow_folder(model))
        assert os.access(shadow / "config.json", os.R_OK)
        config = json.loads((shadow / "config.json").read_text())
        assert config["quantization_config"] == config["quantization"]
        assert {path.name for path in shadow.iterdir()} == {path.name for path in folder.iterdir()}
        assert (shadow / "model.safetensors").samefile(folder / "model.safetensors")
        (folder / "added.json").write_text("{}")
        if (folder / "generation_config.json").exists():
            (folder / "generation_config.json").unlink()
            del before["generation_config.json"]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "added.json"}


def test_the_shadow_is_whole_at_every_moment_while_others_make_it_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = anyclaude.read_model(str(make_tiny_mlx_model(tmp_path / "m")))
    anyclaude.make_shadow(model)
    shadow, failed = Path(anyclaude.shadow_folder(model)), list[BaseException]()

    def again() -> None:
        try:
            for _ in range(20):
                anyclaude.make_shadow(model)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=again) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert "quantization_config" in json.loads((shadow / "config.json").read_text())
    assert not failed


# --- Watch ---


@pytest.fixture
def box(sandbox: Sandbox, stand_in: Path, tiny_model: Path) -> Sandbox:
    """A sandbox with a stand-in engine and a model."""
    sandbox.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": free_port()}}})
    return sandbox


def tell(port: object, path: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read()


def ask(exported: dict[str, str], streamed: bool = False) -> tuple[int, str]:
    """One request to the proxy -> (status, body)."""
    body = {"model": "m", "max_tokens": 9, "stream": streamed, "messages": [{"role": "user", "content": "hi"}]}
    request = urllib.request.Request(
        exported["ANTHROPIC_BASE_URL"] + "/v1/messages",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {exported['ANTHROPIC_AUTH_TOKEN']}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def deafened(box: Sandbox) -> tuple[subprocess.Popen[str], dict[str, str], dict[str, object]]:
    """A session with a stallTimeout of 1 s, whose engine answers no chat any more -> (it, its variables, the state)."""
    process = box.start("--proxy-only", env={"ANYCLAUDE_STALL_TIMEOUT": "1"})
    exported = ready(process)
    (state,) = box.engine_states()
    tell(state["port"], "/deaf")
    time.sleep(max(0.0, float(str(state["started"])) + 1.1 - time.time()))  # it must be older than its silence
    return process, exported, state


@pytest.mark.slow
@pytest.mark.parametrize("how", ["/die", "SIGKILL"])
def test_an_engine_that_dies_is_started_again_and_the_session_goes_on(box: Sandbox, how: str) -> None:
    process = box.start("--proxy-only")
    exported = ready(process)
    assert ask(exported)[0] == 200
    (state,) = box.engine_states()
    if how == "/die":
        tell(state["port"], "/die")
    else:
        os.kill(int(str(state["pid"])), signal.SIGKILL)
    seen = set()

    def answered() -> bool:
        status, _text = ask(exported)
        seen.add(status)
        return status == 200

    wait_for(answered)
    assert seen <= {200, 529, 500}, seen  # which Claude Code tries again by itself
    (after,) = box.engine_states()
    assert after["pid"] != state["pid"] and after["crashes"] == 1
    end(process)
    assert gone(int(str(after["pid"]))) and not box.engine_states()


@pytest.mark.slow
def test_a_request_waits_with_pings_while_the_engine_is_started_again(box: Sandbox) -> None:
    process = box.start("--proxy-only", env={"STAND_IN": "slow again"})
    exported = ready(process)
    (state,) = box.engine_states()
    os.kill(int(str(state["pid"])), signal.SIGKILL)
    wait_for(lambda: not box.engine_states()[0]["ready"])
    with ThreadPoolExecutor(2) as pool:
        streamed, whole = pool.submit(ask, exported, True), pool.submit(ask, exported)
    status, text = streamed.result()  # loading takes longer than the client tries
    assert status == 200 and "event: ping" in text and text.index("event: ping") < text.index("here I am")
    assert whole.result()[0] == 200
    assert "mistral.rs ended once" in end(process)  # the person was told, too


@pytest.mark.slow
def test_an_engine_that_hangs_while_it_is_started_again_is_killed_and_given_up(box: Sandbox) -> None:
    # (the reason that is kept says so, and not that memory ran out)
    process = box.start("--proxy-only", env={"STAND_IN": "hang again", "ANYCLAUDE_START_TIMEOUT": "1"})
    exported = ready(process)
    (state,) = box.engine_states()
    wait_for(lambda: box.engine_states()[0]["ready"])
    os.kill(int(str(state["pid"])), signal.SIGKILL)
    wait_for(lambda: "did not answer" in str(box.engine_states()[0].get("reason")))
    wait_for(lambda: box.engine_states()[0]["crashes"] >= 2)
    assert box.run("stop", "--force").returncode == 0
    assert ask(exported)[0] == 400
    end(process)


@pytest.mark.slow
def test_a_silent_request_does_not_end_an_engine_that_talks_to_another_session(box: Sandbox) -> None:
    process, exported, state = deafened(box)
    heard = box.home / ".anyclaude" / "run" / f"engine-{state['port']}.heard"
    stop = threading.Event()

    def others() -> None:
        while not stop.wait(0.1):
            heard.touch()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        assert "was silent" in ask(exported, streamed=True)[1]
        assert not gone(int(str(state["pid"])))
    finally:
        stop.set()
        thread.join()
    end(process)


@pytest.mark.slow
def test_a_kept_engine_that_nobody_uses_makes_room_for_another_model(box: Sandbox, tmp_path: Path) -> None:
    process = box.start("--proxy-only", env={"ANYCLAUDE_KEEP_ALIVE": "600"})
    ready(process)
    wait_for(lambda: box.engine_states()[0]["ready"])
    (state,) = box.engine_states()
    end(process)
    process = box.start("--proxy-only", "--model-path", str(make_tiny_model(tmp_path / "Other")))
    ready(process)
    assert gone(int(str(state["pid"]))) and str(box.engine_states()[0]["model"]).endswith("Other")
    end(process)


@pytest.mark.slow
def test_an_engine_that_never_served_is_not_kept_alive(box: Sandbox) -> None:
    env = {"ANYCLAUDE_KEEP_ALIVE": "600", "ANYCLAUDE_START_TIMEOUT": "1", "STAND_IN": "hang"}
    assert "did not answer within 1 s" in box.run("--proxy-only", env=env).stderr
    assert not box.engine_states()


@pytest.mark.slow
def test_who_joins_uses_the_engine_as_it_was_started(box: Sandbox) -> None:
    first = box.start("--proxy-only", "--context-window", "50000")
    ready(first)
    second = box.start("--proxy-only")
    ready(second)
    end(first)
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS=50000" in end(second)


@pytest.mark.slow
def test_when_the_parent_was_killed_the_engine_serves_on_and_the_last_session_stops_it(box: Sandbox) -> None:
    process = box.start("--proxy-only")
    exported = ready(process)
    (state,) = box.engine_states()
    os.kill(int(str(state["parent"])), signal.SIGKILL)
    assert ask(exported)[0] == 200
    err = end(process)
    assert "stopped from outside" not in err and gone(int(str(state["pid"])))


@pytest.mark.slow
def test_a_removed_folder_of_state_files_leaves_no_engine(box: Sandbox) -> None:
    process = box.start("--proxy-only", env={"ANYCLAUDE_KEEP_ALIVE": "3"})
    ready(process)
    (state,) = box.engine_states()
    shutil.rmtree(box.home / ".anyclaude" / "run")
    assert "Traceback" not in end(process)
    wait_for(lambda: gone(int(str(state["pid"]))))


@pytest.mark.parametrize("parent", [-1, 0, True, "1", None])
def test_a_state_file_never_makes_us_signal_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parent: object
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files, told = anyclaude._Files(1), list[object]()
    held = anyclaude.lock(files.alive, anyclaude.fcntl.LOCK_EX)
    anyclaude.write_json(files.state, {"parent": parent, "parent_born": "", "pid": parent, "born": "", "ready": "x"})
    monkeypatch.setattr(os, "kill", lambda *words: told.append(words))
    monkeypatch.setattr(os, "killpg", lambda *words: told.append(words))
    monkeypatch.setattr(anyclaude, "STOP_SECONDS", -3)
    anyclaude.stop_engine(files)
    assert not told and "ready" not in files.read_state()
    os.close(held)


def test_a_process_is_known_again_whatever_the_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    born = anyclaude.birth(os.getpid())
    monkeypatch.setenv("TZ", "America/New_York")
    assert born and anyclaude.birth(os.getpid()) == born and not anyclaude.birth(2**22 + 1)


def test_no_program_is_asked_in_the_working_directory(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    (sandbox.bin / "rustc").write_text("#!/bin/sh\npwd\n")  # rustup's runs what a rust-toolchain.toml there names
    (sandbox.bin / "rustc").chmod(0o755)
    monkeypatch.setenv("HOME", str(sandbox.home))
    monkeypatch.chdir(sandbox.work)
    assert anyclaude.output_of(str(sandbox.bin / "rustc")).strip() == str(sandbox.home)


@pytest.mark.slow
def test_an_engine_that_hangs_is_started_again(box: Sandbox) -> None:
    process, exported, state = deafened(box)
    status, text = ask(exported, streamed=True)
    assert "was silent for 1 s" in text and "stallTimeout" in text, (status, text)
    wait_for(lambda: ask(exported)[0] == 200)
    assert box.engine_states()[0]["pid"] != state["pid"]
    end(process)


@pytest.mark.slow
def test_an_engine_that_keeps_dying_is_given_up_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, box: Sandbox
) -> None:
    for name, value in box.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(anyclaude, "RESTART_PAUSE", 0.01)
    port, log = free_port(), str(box.home / "engine.log")
    command = [str(box.bin / "mistralrs"), "serve", "--port", str(port)]
    spec = {"port": port, "command": command, "log": log, "model": "m", "keep_alive": 0, "start_timeout": 20}
    parent = anyclaude._Supervisor(spec)
    parent.start()
    thread = threading.Thread(target=parent.watch)
    thread.start()
    pids = set()
    while thread.is_alive():
        state = json.loads((box.home / ".anyclaude" / "run" / f"engine-{port}.json").read_text())
        if state["ready"]:
            pids.add(state["pid"])
            tell(port, "/die")
        thread.join(0.05)
    assert len(pids) == 4  # the first, and three more
    os.close(parent.alive)
    share = object.__new__(anyclaude.EngineShare)
    share._files, share.log = anyclaude._Files(port), Path(log)
    trouble = share.trouble()
    assert "ended 4 times" in trouble and "here ends the log" in trouble and "--isq Q3K" in trouble


@pytest.mark.slow
def test_when_the_engine_is_given_up_the_client_is_told_why_and_does_not_try_again(box: Sandbox) -> None:
    process = box.start("--proxy-only")
    exported = ready(process)
    (state,) = box.engine_states()
    os.kill(int(str(state["parent"])), signal.SIGKILL)
    os.kill(int(str(state["pid"])), signal.SIGKILL)
    wait_for(lambda: gone(int(str(state["pid"]))))
    status, text = ask(exported)
    assert status == 400 and "start anyclaude again" in text
    end(process)


@pytest.mark.slow
def test_an_engine_killed_for_want_of_memory_is_told_as_such(box: Sandbox) -> None:
    done = box.run("--proxy-only", env={"STAND_IN": "oom"})
    assert done.returncode == 1 and "signal 9; the system kills so when memory runs out" in done.stderr
    assert ending(1) == "exit status 1" and ending(-15) == "signal 15"


@pytest.mark.slow
def test_an_engine_that_is_kept_alive_serves_the_next_session_and_then_ends(box: Sandbox) -> None:
    env = {"ANYCLAUDE_KEEP_ALIVE": "2"}
    process = box.start("--proxy-only", env=env)
    ready(process)
    (state,) = box.engine_states()
    started = time.monotonic()
    end(process)
    assert time.monotonic() - started < 1.5 and not gone(int(str(state["pid"])))
    process = box.start("--proxy-only", env=env)
    ready(process)
    assert "joining the mistral.rs that runs" in end(process)
    assert box.engine_states()[0]["pid"] == state["pid"]
    wait_for(lambda: gone(int(str(state["pid"]))) and not box.engine_states())


@pytest.mark.slow
def test_starts_at_the_same_moment_give_one_engine(box: Sandbox) -> None:
    processes = [box.start("--proxy-only", env={"STAND_IN": "slow"}) for _ in range(4)]
    for process in processes:
        ready(process)
    assert len(box.engine_states()) == 1 and box.log().count("Loading model") == 1
    for process in processes[:-1]:
        os.kill(process.pid, signal.SIGKILL)
    (state,) = box.engine_states()
    assert not gone(int(str(state["pid"])))
    end(processes[-1])
    assert gone(int(str(state["pid"])))


# --- Downloads ---


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


# --- Remote servers ---


class Remote(BaseHTTPRequestHandler):
    models: Any = None

    def do_GET(self) -> None:
        good = self.headers["Authorization"] == "Bearer sesame"
        body = json.dumps({"data": self.models}).encode() if self.models is not None else b"<html>"
        self.send_response(200 if good else 401)
        self.end_headers()
        self.wfile.write(body if good else b"no")

    def log_message(self, format: str, *args: object) -> None:
        pass


def remote(url: str, **more: Any) -> Settings:
    return Settings(backend="remote", kind="remote", base_url=f"{url}/v1", **{"api_key": "sesame", **more})


def test_a_remote_server_is_asked_for_its_models_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Remote) as url:
        monkeypatch.setattr(Remote, "models", [{"id": "big", "max_model_len": 32768}])
        assert anyclaude.check_remote(remote(url)) == ("big", 32768)  # the only one it has
        assert anyclaude.check_remote(remote(url, model="big", context_window=9)) == ("big", 9)
        with pytest.raises(AnyclaudeError, match='no model "small"') as caught:
            anyclaude.check_remote(remote(url, model="small"))
        assert "It has: big." in caught.value.message and "ANYCLAUDE_MODEL=big" in caught.value.fix
        for key, words in (("wrong", "refuses the apiKey"), ("", "refuses requests without a key")):
            with pytest.raises(AnyclaudeError, match=words) as caught:
                anyclaude.check_remote(remote(url, api_key=key))
            assert "wrong" not in caught.value.message
        for nothing in ([], None, [1, {"id": None}]):
            monkeypatch.setattr(Remote, "models", nothing)
            assert anyclaude.check_remote(remote(url, model="m")) == ("m", 0)  # not all of them have a list
    with pytest.raises(AnyclaudeError, match="no server answers"):
        anyclaude.check_remote(remote(url))


class Elsewhere(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        Elsewhere.asked += self.path == "/stolen"
        self.send_response(302 if self.path == "/a/models" else 500 if self.path == "/b/models" else 404)
        self.send_header("Location", "/stolen")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_key_follows_no_redirect_and_a_broken_server_is_no_server() -> None:
    with serving(Elsewhere) as url:
        for part, words in (("a", "HTTP 302 to /stolen"), ("b", "HTTP 500")):
            settings = Settings(kind="remote", base_url=f"{url}/{part}", api_key="sesame")
            with pytest.raises(AnyclaudeError, match=words):
                anyclaude.check_remote(settings)
        assert not Elsewhere.asked
        settings = Settings(kind="remote", base_url=f"{url}/c", model="m")
        assert anyclaude.check_remote(settings) == ("m", 0)


# --- The deprecated server ---

SCRIPT = """
import argparse, http.server
parser = argparse.ArgumentParser()
for name in ("model", "host", "port"):
    parser.add_argument("--" + name)
options = parser.parse_args()
print("model", options.model, flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"choices":[{"delta":{"content":"old"},"finish_reason":"stop"}]}\\n\\ndata: [DONE]\\n\\n')


http.server.HTTPServer((options.host, int(options.port)), Handler).serve_forever()
"""


@pytest.mark.slow
def test_the_deprecated_server_starts_serves_and_is_stopped_the_same_way(sandbox: Sandbox, tiny_model: Path) -> None:
    (sandbox.home / "server.py").write_text(SCRIPT)
    venv = sandbox.home / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python3").symlink_to(sys.executable)
    backend = {"modelPath": str(tiny_model), "port": free_port(), "serverScript": "~/server.py", "pythonVenv": "~/venv"}
    sandbox.settings({"backends": {"mlx": backend}})
    process = sandbox.start("--proxy-only")
    exported = ready(process)
    assert '"old"' in ask(exported)[1]
    (state,) = sandbox.engine_states()
    assert state["command"][0] == str(venv / "python3")  # type: ignore[index]
    err = end(process)
    assert "deprecated" in err and gone(int(str(state["pid"]))) and not sandbox.engine_states()
    sandbox.settings({"backends": {"mlx": {**backend, "serverScript": "~/none.py"}}})
    done = sandbox.run("--proxy-only")
    assert done.returncode == 1 and "serverScript" in done.stderr and "does not exist" in done.stderr


# --- Real engines ---


@pytest.mark.outside
@pytest.mark.slow
@pytest.mark.parametrize("program", every_engine(), ids=lambda path: path.split("/")[-3])
@pytest.mark.parametrize("kind", ["plain", "gguf", "mlx"])
def test_a_real_engine_of_each_generation_loads_what_people_have(
    sandbox: Sandbox, program: str, kind: str, tmp_path: Path, tiny_model: Path
) -> None:
    model = tiny_model
    if kind == "gguf":
        pytest.importorskip("gguf")
        (tmp_path / "models").mkdir()
        model = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    elif kind == "mlx":
        model = make_tiny_mlx_model(tmp_path / "mlx")
    sandbox.settings({"backends": {"mlx": {"modelPath": str(model), "port": free_port(), "binary": program}}})
    process = sandbox.start("--proxy-only")
    exported = ready(process)
    status, text = ask(exported)
    assert (status, json.loads(text)["content"][0]["text"]) == (200, "Hello from a tiny model.")
    assert "Hello" in ask(exported, streamed=True)[1] and anyclaude.READY_LINE.search(end(process))


@pytest.mark.outside
@pytest.mark.slow
def test_a_real_engine_that_is_killed_comes_back_and_its_log_gives_the_speed(
    sandbox: Sandbox, engine: Path, tiny_model: Path
) -> None:
    sandbox.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": free_port()}}})
    process = sandbox.start("--proxy-only")
    exported = ready(process)
    assert ask(exported)[0] == 200
    (state,) = sandbox.engine_states()
    wait_for(lambda: "Throughput" in sandbox.log())
    shown = json.loads(sandbox.run("status", "--json").stdout)["engines"][0]
    assert shown["tokens_per_second"] > 0 and shown["memory"] > 10 << 20 and shown["state"] == "ready"
    os.kill(int(str(state["pid"])), signal.SIGKILL)
    wait_for(lambda: ask(exported)[0] == 200)
    end(process)
