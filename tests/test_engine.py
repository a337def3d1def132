"""Section 4: find, start, share, wait for and stop an engine. The stand-in does what a real one will not do on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Sandbox
from fake_engine import fake_engine
from tiny_model import SCRIPTS, make_tiny_model

import anyclaude
from anyclaude import (
    GENERATIONS,
    LOG_HINTS,
    SUPERVISE,
    AnyclaudeError,
    Engine,
    EngineShare,
    Model,
    Settings,
    ToolText,
    birth,
    command_line,
    demo_reply,
    find_engine,
    free_port,
    port_is_free,
    port_owner,
)

SERVE, SERVER = (
    Engine(Path(f"/bin/{row.program}"), row, (0, 8, 1), "  -t, --tokenizer <T>\n      --paged-attn <MODE>\n")
    for row in GENERATIONS
)
MODEL = Model("/m/Qwen3", "Qwen3", "qwen3moe")


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet counts as ended)."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            if os.path.isdir("/proc")
            else bool(os.kill(pid, 0))
        )
    except (OSError, ProcessLookupError):
        return True


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_line_of_mistralrs_server() -> None:
    assert command_line(SERVER, MODEL, 8081, "Q4K") == (
        shlex.split(
            "/bin/mistralrs-server --port 8081 --serve-ip 127.0.0.1 --token-source none --isq Q4K plain -m /m/Qwen3 -a qwen3moe"
        )
    )


def test_the_command_line_of_mistralrs_serve() -> None:
    assert command_line(SERVE, MODEL, 8081, "Q4K") == (
        shlex.split(
            "/bin/mistralrs serve --port 8081 --host 127.0.0.1 --token-source none text -m /m/Qwen3 -a qwen3moe --isq Q4K"
        )
    )


@pytest.mark.parametrize("engine", [SERVE, SERVER])
def test_a_model_that_is_quantised_already_is_not_quantised_again(engine: Engine) -> None:
    assert "--isq" not in command_line(engine, Model("/m/x", "x", "qwen3", quantised=True), 1, "Q4K")
    assert "--isq" not in command_line(engine, MODEL, 1, "none")


def test_without_an_architecture_the_engine_detects_it() -> None:
    assert command_line(SERVE, Model("/m/x", "x"), 1)[-3:] == ["auto", "-m", "/m/x"]
    assert command_line(SERVER, Model("/m/x", "x"), 1)[-3:] == ["run", "-m", "/m/x"]


def test_extra_arguments_go_where_the_engine_reads_them() -> None:
    extra = ["--paged-attn", "off", "--max-seqs", "4", "-t", "tok.json", "--paged-attn-more=1"]
    line = command_line(SERVE, MODEL, 1, "", extra)
    assert line[line.index("text") :] == [
        "text",
        "-m",
        "/m/Qwen3",
        "-a",
        "qwen3moe",
        "--paged-attn",
        "off",
        "-t",
        "tok.json",
    ]
    assert line[line.index("none") + 1 : line.index("text")] == ["--max-seqs", "4", "--paged-attn-more=1"]


def fake_program(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{name} {version}'\n")
    program.chmod(0o755)
    return program


def test_the_newest_generation_is_taken_from_the_first_place_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = str(tmp_path / "source")
    path = {"PATH": f"{tmp_path}/path:/usr/bin:/bin"}
    with pytest.raises(AnyclaudeError, match="not found") as caught:
        find_engine(Settings(source_dir=source), path)
    assert "anyclaude build" in caught.value.fix and '"binary"' in caught.value.fix
    places = ["home/.cargo/bin", "home/.mistralrs", "home/.local/bin", "source/target/release", "path"]
    for name in ("mistralrs-server", "mistralrs"):
        for place in places:
            program = fake_program(tmp_path / place, name, "0.8.1")
            found = find_engine(Settings(source_dir=source), path)
            assert (found.program, found.version, found.generation.program) == (program, (0, 8, 1), name)


def test_a_program_that_does_not_run_or_lies_in_the_working_directory_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fake_program(tmp_path, "mistralrs", "9.9.9")  # PATH has ".", and a cloned project brings a program
    fake_program(tmp_path / "broken", "mistralrs", "0.9.0").write_text("#!/nowhere\n")
    good = fake_program(tmp_path / "good", "mistralrs", "0.7.0")
    assert find_engine(Settings(), {"PATH": f".::{tmp_path}/broken:{tmp_path}/good"}).program == good


def test_a_named_binary_is_used_whatever_its_file_is_called(tmp_path: Path) -> None:
    program = fake_program(tmp_path, "mistralrs-server", "0.6.0").rename(tmp_path / "my-engine")
    assert find_engine(Settings(binary=str(program)), {}).generation.program == "mistralrs-server"
    with pytest.raises(AnyclaudeError, match="binary"):
        find_engine(Settings(binary="/bin/ls"), {})
    with pytest.raises(AnyclaudeError, match="binary"):
        find_engine(Settings(binary=str(tmp_path)), {})


def test_the_tools_that_are_asked_never_come_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lsof", "ss", "ps"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f".::{os.environ['PATH']}:")
    port_owner(1)
    assert birth(os.getpid()) and not (tmp_path / "ran").exists()


def test_a_port_that_is_taken_is_seen_with_its_owner() -> None:
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.socket() as taken:
            taken.bind((address, 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert not port_is_free(port)
            assert port_owner(port)[0] in (0, os.getpid())
    assert port_is_free(free_port())


def test_the_demo_engine_makes_one_real_call_and_uses_its_result() -> None:
    ask = {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "Bash"}}]}
    assert '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls' in demo_reply(ask)
    assert "a.txt" in demo_reply({"messages": [{"role": "tool", "content": "a.txt"}]})
    assert "<tool_call>" not in demo_reply({"messages": [{"role": "user", "content": "x"}]})


# With a stand-in for the engine, as a user would start it.


@pytest.fixture
def box(sandbox: Sandbox, stand_in: Path, tiny_model: Path) -> Sandbox:
    sandbox.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": free_port()}}})
    return sandbox


def ready(process: object) -> dict[str, str]:
    """Wait for --proxy-only -> the variables that it exports."""
    lines = [process.stdout.readline() for _ in range(2)]  # type: ignore[attr-defined]
    assert all(line.startswith("export ") for line in lines), process.stderr.read()  # type: ignore[attr-defined]
    return dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)


def end(process: object, number: int = signal.SIGTERM) -> str:
    process.send_signal(number)  # type: ignore[attr-defined]
    return process.communicate(timeout=20)[1]  # type: ignore[attr-defined]


def test_proxy_only_prints_what_to_paste_and_ends_well_on_a_signal(box: Sandbox) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        process = box.start("--proxy-only")
        exported = ready(process)
        assert (
            exported["ANTHROPIC_BASE_URL"].startswith("http://127.0.0.1:")
            and len(exported["ANTHROPIC_AUTH_TOKEN"]) > 30
        )
        (state,) = box.engine_states()
        err = end(process, number)
        assert process.returncode == 0
        assert gone(state["pid"]) and not box.engine_states() and port_is_free(int(str(state["port"])))
        for part in (
            "starting mistral.rs: mistralrs 0.8.1",
            " MB of weights, window 131072 tokens)",
            "model: ",
            "port: ",
            "waiting",
            "Server listening on http://",
            "Proxy URL: http://localhost:",
        ):
            assert part in err, err


@pytest.mark.slow
def test_what_the_engine_started_ends_with_it(box: Sandbox) -> None:
    process = box.start("--proxy-only", env={"STAND_IN": "family"})
    ready(process)
    child = int(re.search(r"child (\d+)", box.log())[1])  # type: ignore[index]
    assert not gone(child)
    end(process)
    wait_for(lambda: gone(child))


@pytest.mark.slow
def test_the_engine_is_started_as_it_must_be(box: Sandbox, tiny_model: Path) -> None:
    process = box.start("--proxy-only", "--isq", "Q8_0", env={"http_proxy": "http://127.0.0.1:9"})
    ready(process)
    (state,) = box.engine_states()
    assert (
        state["command"][1:]
        == f"serve --port {state['port']} --host 127.0.0.1 --token-source none --prefix-cache-n 16 text -m {tiny_model} -a qwen3 --isq Q8_0".split()
    )
    assert os.getsid(int(str(state["pid"]))) == state["pid"]
    log = box.home / ".anyclaude" / "logs" / "mistralrs-server.log"
    assert log.stat().st_mode & 0o777 == 0o600 and "Loading model" in log.read_text()
    end(process)
    process = box.start("--proxy-only")
    ready(process)
    assert log.with_name("mistralrs-server.log.1").exists()


def test_sigkill_of_anyclaude_leaves_no_engine(box: Sandbox) -> None:
    process = box.start("--proxy-only")
    ready(process)
    (state,) = box.engine_states()
    process.kill()
    wait_for(lambda: gone(state["pid"]), 10)
    wait_for(lambda: port_is_free(state["port"]) and not box.engine_states(), 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.slow
def test_a_signal_while_the_engine_loads_stops_both(box: Sandbox, number: int) -> None:
    process = box.start("--proxy-only", env={"STAND_IN": "hang"})
    wait_for(lambda: box.engine_states() and "Loading" in box.log())
    (state,) = box.engine_states()
    end(process, number)
    assert process.returncode == {signal.SIGINT: 130}.get(number, 128 + number)  # type: ignore[call-overload]
    assert gone(state["pid"])


@pytest.mark.slow
def test_an_engine_that_ignores_term_is_killed(box: Sandbox) -> None:
    process = box.start("--proxy-only", env={"STAND_IN": "stubborn"})
    ready(process)
    (state,) = box.engine_states()
    end(process)
    assert gone(state["pid"])


@pytest.mark.slow
def test_an_engine_that_dies_while_loading_is_noticed_at_once_and_explained(box: Sandbox) -> None:
    started = time.monotonic()
    done = box.run("--proxy-only", env={"STAND_IN": "crash"})
    assert done.returncode == 1 and time.monotonic() - started < 5
    assert "exit status 1" in done.stderr and "shape mismatch" in done.stderr and "quantised for MLX" in done.stderr
    assert "\x1b" not in done.stderr and not done.stdout


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in LOG_HINTS])
def test_each_known_failure_of_the_engine_is_explained(tmp_path: Path, pattern: str) -> None:
    said = {
        "Address already in use": "Error: Address already in use (os error 48)",
        "does not fit": "This model does not fit on the devices [Metal], and exceeds total capacity by 9000MB.",
        "Unknown architecture": "error: invalid value 'x' for '--arch <ARCH>': Unknown architecture `x`. Possible",
        "Unsupported Hugging": "Unsupported Hugging Face Transformers -CausalLM model class `X`. Please raise an issue.",
        "tokenizer": "File `tokenizer.json` was not found in local model directory",
        "Expected file": "Expected file with extension one of .safetensors, .pth, .pt, .bin.",
        "shape mismatch": "shape mismatch for model.embed_tokens.weight, expected: [384, 128], got: [384, 16]",
        "missing field": "missing field `max_window_layers` at line 12",
        "ISQ type": "Error: ISQ type Q99 unknown, choose one of Q4K",
        "unexpected argument": "error: unexpected argument '--colour' found",
        "failed to fill": "Error: failed to fill whole buffer",
        "Unknown GGUF": "Error: Unknown GGUF architecture `mamba`",
        "ns [Ff]ailed": "Error: Dns Failed: resolve dns name 'huggingface.co:443'",
        "HTTP 40": "Could not access `x` on Hugging Face (HTTP 401)",
    }
    log = tmp_path / "log"
    log.write_text(next(text for part, text in said.items() if part in pattern) + "\n   0: anyhow::error\n  at /x.rs\n")
    share = EngineShare.__new__(EngineShare)
    share.log = log
    error = share._failure("ended")
    assert error.fix == dict(LOG_HINTS)[pattern] and "anyhow" not in error.message


@pytest.mark.slow
def test_an_engine_that_never_answers_is_given_up(box: Sandbox) -> None:
    done = box.run("--proxy-only", env={"STAND_IN": "hang", "ANYCLAUDE_START_TIMEOUT": "1"})
    assert done.returncode == 1 and "did not answer within 1 s" in done.stderr and "startTimeout" in done.stderr
    assert not box.engine_states()


@pytest.mark.slow
def test_two_sessions_share_one_engine_and_the_last_one_stops_it(box: Sandbox) -> None:
    first, second = box.start("--proxy-only"), box.start("--proxy-only")
    ready(first), ready(second)
    (state,) = box.engine_states()
    started = time.monotonic()
    err = end(first)
    assert time.monotonic() - started < 2  # it does not wait for an engine that goes on
    assert not gone(state["pid"])
    errs = (err, end(second))
    assert sorted("joining the mistral.rs that runs" in text for text in errs) == [False, True]
    assert gone(state["pid"]) and not box.engine_states()


@pytest.mark.slow
def test_another_model_on_the_port_is_an_error_that_says_so(box: Sandbox, tiny_model: Path) -> None:
    first = box.start("--proxy-only")
    ready(first)
    other = box.home / "other"
    other.symlink_to(tiny_model)
    done = box.run("--proxy-only", "--model-path", str(other))
    assert done.returncode == 1 and "another session of yours" in done.stderr and str(tiny_model) in done.stderr
    assert len(box.engine_states()) == 1 and first.poll() is None


def test_a_foreign_program_on_the_port_is_named(box: Sandbox) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = box.run("--proxy-only", "--engine-port", str(port))
        assert (
            done.returncode == 1
            and f"port {port} is taken by" in done.stderr
            and "--engine-port" in done.stderr
            and "--base-url" in done.stderr
        )
    assert not box.engine_states()


@pytest.mark.slow
def test_an_engine_whose_parent_was_killed_is_stopped_by_the_next_start(box: Sandbox) -> None:
    process = box.start("--proxy-only")
    ready(process)
    (state,) = box.engine_states()
    parent = subprocess.run(["ps", "-o", "ppid=", "-p", str(state["pid"])], capture_output=True, text=True, check=True)
    os.kill(int(parent.stdout), signal.SIGKILL)
    wait_for(lambda: gone(int(parent.stdout)))
    process.kill()
    again = box.start("--proxy-only")
    ready(again)
    (newer,) = box.engine_states()
    assert newer["pid"] != state["pid"] and gone(int(str(state["pid"])))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.03, 0.06, 0.1, 0.15])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_that_ends_while_its_engine_is_being_started_leaves_none(
    box: Sandbox, number: int, delay: float
) -> None:
    port = json.loads((box.home / ".anyclauderc.json").read_text())["backends"]["mlx"]["port"]

    def processes(part: str) -> list[str]:
        done = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,command="], capture_output=True, text=True, check=True)
        return [line for line in done.stdout.split("\n") if part in line]

    process = box.start("--proxy-only")
    wait_for(lambda: any(line.split()[1] == str(process.pid) for line in processes(SUPERVISE)))
    time.sleep(delay)  # the engine's parent is somewhere between its own start and telling of the engine's
    process.send_signal(number)
    process.communicate(timeout=20)
    wait_for(lambda: not processes(f"--port {port} "), 10)
    wait_for(lambda: not box.engine_states(), 10)


@pytest.mark.slow
def test_a_program_that_took_the_port_while_the_engine_loaded_is_not_taken_for_it(box: Sandbox, tmp_path: Path) -> None:
    port = free_port()
    process = box.start("--proxy-only", "--engine-port", str(port), env={"STAND_IN": "hang"})
    wait_for(box.engine_states)
    with fake_engine(lambda request: (200, "{}"), port):
        assert process.wait(20) == 1
    assert process.stderr is not None and f"port {port} is taken" in process.stderr.read()


@pytest.mark.slow
def test_engines_on_two_ports_have_a_log_each(box: Sandbox) -> None:
    first = box.start("--proxy-only")
    ready(first)
    second = box.start("--proxy-only", "--engine-port", str(free_port()))
    ready(second)
    logs = {str(state["log"]): state["port"] for state in box.engine_states()}
    assert len(logs) == 2
    for path, port in logs.items():
        assert f":{port}" in Path(path).read_text()


@pytest.mark.slow
def test_a_stale_state_file_whose_pid_is_another_programs_hurts_nobody(box: Sandbox) -> None:
    port = json.loads((box.home / ".anyclauderc.json").read_text())["backends"]["mlx"]["port"]
    run = box.home / ".anyclaude" / "run"
    run.mkdir(parents=True)
    (run / f"engine-{port}.json").write_text(
        json.dumps({"pid": os.getpid(), "born": "Thu Jan  1 00:00:00 1970", "model": "x", "log": "x"})
    )
    process = box.start("--proxy-only")
    ready(process)
    end(process)
    for text in ("{", "[]", '{"pid": "x", "born": "then"}', '{"pid": 999999999, "born": "then"}'):
        (run / f"engine-{port}.json").write_text(text)
        process = box.start("--proxy-only")
        ready(process)
        end(process)


@pytest.mark.slow
def test_where_any_port_will_do_one_that_was_taken_meanwhile_is_no_error(
    box: Sandbox, stand_in: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = [other.getsockname()[1], free_port()]
        monkeypatch.setattr(anyclaude, "free_port", lambda: ports.pop(0))
        monkeypatch.setenv("HOME", str(box.home))
        settings = anyclaude.Settings(port=0, model_path=str(tiny_model), binary=str(stand_in))
        with anyclaude.serving_target(settings, box.env) as (target, _):
            assert not ports and anyclaude.answers(target.url.replace("/v1", "/health"))
        taken = dataclasses.replace(settings, port=other.getsockname()[1])
        with pytest.raises(anyclaude.PortTaken), anyclaude.serving_target(taken, box.env):
            pass


def test_a_program_that_cannot_be_started_is_an_error(box: Sandbox, stand_in: Path) -> None:
    stand_in.write_text('#!/bin/sh\n[ "$1" = --version ] && echo \'mistralrs 0.8.1\' && rm "$0"\n')
    done = box.run("--proxy-only")
    assert done.returncode == 1 and "could not be started" in done.stderr and "No such file" in done.stderr


def test_a_model_that_needs_a_newer_engine_is_refused_before_it_is_loaded(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"architectures": ["Lfm2ForCausalLM"]}')
    done = box.run("--proxy-only", "--model-path", str(tmp_path / "new"))
    assert done.returncode == 1 and "needs mistral.rs 0.9.2" in done.stderr


def test_without_a_model_the_error_says_what_to_type(sandbox: Sandbox) -> None:
    done = sandbox.run("--proxy-only")
    assert (
        done.returncode == 1 and "no model" in done.stderr and "--model-path" in done.stderr and "--demo" in done.stderr
    )


# With the real engine.


@pytest.mark.outside
def test_a_real_engine_serves_and_leaves_nothing_behind(sandbox: Sandbox, engine: Path, tiny_model: Path) -> None:
    process = sandbox.start("--proxy-only", "--model-path", str(tiny_model), "--engine-port", "0")
    exported = ready(process)
    (state,) = sandbox.engine_states()
    import http.client

    connection = http.client.HTTPConnection(exported["ANTHROPIC_BASE_URL"].split("/")[2], timeout=20)
    call = {"name": "Bash", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}
    for text, expected in (("hello", "Hello from a tiny model."), ("@@call@@", "ls -1"), ("@@coder@@", "ls -a")):
        body = {
            "max_tokens": 100,
            "messages": [{"role": "user", "content": text}],
            "tools": [call] if "@@" in text else [],
        }
        connection.request("POST", "/v1/messages", json.dumps(body), {"x-api-key": exported["ANTHROPIC_AUTH_TOKEN"]})
        message = json.loads(connection.getresponse().read())
        assert expected in json.dumps(message["content"]), message
        assert message["usage"]["input_tokens"] > 0 and message["stop_reason"] == (
            "tool_use" if "@@" in text else "end_turn"
        )
    end(process)
    assert gone(state["pid"]) and port_is_free(int(str(state["port"])))


@pytest.mark.outside
def test_a_real_engines_text_streams_as_arguments_and_its_counts_are_learned(
    sandbox: Sandbox, engine: Path, tiny_model: Path
) -> None:
    import anthropic  # takes a second

    process = sandbox.start("--proxy-only", "--model-path", str(tiny_model), "--engine-port", "0")
    exported = ready(process)
    client = anthropic.Anthropic(
        base_url=exported["ANTHROPIC_BASE_URL"], auth_token=exported["ANTHROPIC_AUTH_TOKEN"], api_key=None
    )
    schema = {"type": "object", "properties": {"file_path": {"type": "string"}, "content": {"type": "string"}}}
    tools: Any = [{"name": "Write", "input_schema": schema}]
    turns: Any = [{"role": "user", "content": "@@write@@"}]
    with client.messages.stream(model="m", max_tokens=400, messages=turns, tools=tools) as stream:
        deltas = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    assert len(deltas) > 40
    (block,) = message.content
    content = "\n".join(f"line {number} of <b>it</b>" for number in range(1, 41))
    assert block.type == "tool_use" and block.input == {"file_path": "notes.md", "content": content}
    assert message.stop_reason == "tool_use"
    message = client.messages.create(model="m", max_tokens=20, messages=turns, tools=tools)  # ends in the call
    assert message.stop_reason == "max_tokens" and message.content == []
    turns = [{"role": "user", "content": "@@long@@"}]
    stopped = client.messages.create(model="m", max_tokens=400, messages=turns, stop_sequences=["la!"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "la!"
    (said,) = stopped.content
    assert said.type == "text" and said.text == "la la "
    counted = client.messages.count_tokens(model="m", messages=turns)
    assert abs(counted.input_tokens - stopped.usage.input_tokens) <= 8  # before: 50
    end(process)


@pytest.mark.outside
def test_calls_come_out_right_where_the_engines_own_parser_loses_their_arguments(wheel: Path, tmp_path: Path) -> None:
    """mistral.rs since 0.8.2 masks the "{" behind "<tool_call>\\n"; and it knows no call without its opener."""
    model = make_tiny_model(tmp_path / "Tiny", {name: SCRIPTS[name] for name in ("hello", "call", "seen", "unseen")})
    other = make_tiny_model(tmp_path / "Other", {name: SCRIPTS[name] for name in ("hello", "coder", "seen", "unseen")})
    program = Path(__file__).parent / "in_process_engine.py"
    wanted = {"call": {"command": "ls -1", "description": "List files"}, "coder": {"command": "ls -a"}}
    for folder, script in ((model, "call"), (other, "coder")):
        command = [str(wheel), str(program), str(folder), f"@@{script}@@"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        told = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("@ ")]
        auto, none = told
        assert (auto["choice"], none["choice"]) == ("auto", "none")
        assert wanted[script] not in [json.loads(arguments) for _, arguments in auto["calls"]], auto
        parser = ToolText({"Bash": {"properties": {"command": {"type": "string"}}}})
        events = [event for text in none["texts"] for event in parser.feed(text)] + parser.end(True)
        assert ("call", "Bash") in events and not none["calls"]
        assert json.loads("".join(text for kind, text in events if kind == "arguments")) == wanted[script]


@pytest.mark.outside
def test_sigkill_of_anyclaude_leaves_no_real_engine(sandbox: Sandbox, engine: Path, tiny_model: Path) -> None:
    process = sandbox.start("--proxy-only", "--model-path", str(tiny_model), "--engine-port", "0")
    ready(process)
    (state,) = sandbox.engine_states()
    process.kill()
    wait_for(lambda: gone(state["pid"]), 10)


@pytest.mark.outside
def test_when_the_client_leaves_a_real_engine_stops_generating(
    sandbox: Sandbox, engine: Path, tiny_model: Path
) -> None:
    """The script "long" repeats for ever: without the cancel it would run to max_tokens."""
    process = sandbox.start("--proxy-only", "--model-path", str(tiny_model), "--engine-port", "0")
    exported = ready(process)
    host, port = exported["ANTHROPIC_BASE_URL"].removeprefix("http://").split(":")
    body = json.dumps(
        {"max_tokens": 32000, "stream": True, "messages": [{"role": "user", "content": "@@long@@"}]}
    ).encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/messages HTTP/1.1\r\nx-api-key: {exported['ANTHROPIC_AUTH_TOKEN']}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        seen = b""
        while b"la la!" not in seen.replace(b'"', b"") and b" la!" not in seen:
            seen += connection.recv(65536)
    (state,) = sandbox.engine_states()

    def cpu() -> int:
        fields = Path(f"/proc/{state['pid']}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    if os.path.isdir("/proc"):
        before = [cpu()]

        def idle() -> bool:
            time.sleep(0.3)
            before.append(cpu())
            return before[-1] - before[-2] <= 2  # of 30 ticks

        wait_for(idle, 10)
    with contextlib.suppress(ProcessLookupError):
        end(process)
