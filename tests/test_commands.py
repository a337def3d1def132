"""Section 10's commands, as a person types them: doctor, build, status, stop, logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import Sandbox
from test_care import serving, tell
from test_engine import end, gone, ready, wait_for

import anyclaude
from anyclaude import AnyclaudeError, Settings, build, check_build, free_port, plan_build


@pytest.fixture
def box(sandbox: Sandbox, stand_in: Path, tiny_model: Path) -> Sandbox:
    """A sandbox with a stand-in engine, a model and a Claude Code that does nothing."""
    (sandbox.bin / "claude").write_text("#!/bin/sh\necho 9.9.9\n")
    (sandbox.bin / "claude").chmod(0o755)
    sandbox.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": free_port()}}})
    return sandbox


# --- status, stop, logs ---


@pytest.mark.slow
def test_status_tells_of_the_engine_and_its_sessions(box: Sandbox) -> None:
    assert (done := box.run("status")).returncode == 1 and done.stdout == "no engine runs\n"
    first, second = box.start("--proxy-only"), box.start("--proxy-only")
    ready(first), ready(second)
    wait_for(lambda: box.engine_states()[0]["ready"])
    text = box.run("status").stdout
    for part in ("mistralrs 0.8.1", "Tiny", "ready", "uptime", f"pid {first.pid} in {box.work}", " MB"):
        assert part in text, text
    (one,) = json.loads(box.run("status", "--json").stdout)["engines"]
    assert one["state"] == "ready" and {card["pid"] for card in one["sessions"]} == {first.pid, second.pid}
    assert one["memory"] > 1 << 20 and one["pid"] == box.engine_states()[0]["pid"]
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    (one,) = json.loads(box.run("status", "--json").stdout)["engines"]
    assert [card["pid"] for card in one["sessions"]] == [first.pid]
    end(first)
    assert box.run("status").returncode == 1
    run = box.home / ".anyclaude" / "run"
    assert not {path.name for path in run.iterdir() if path.suffix == ".json"}
    (run / "engine-7.json").mkdir()
    (run / "engine-8x.json").write_text("{")
    (run / "engine-9.json").write_text('{"pid": [], "started": NaN, "log": 5}')
    assert box.run("status").stdout == "no engine runs\n"
    for path in run.glob("engine-[78]*.json"):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_stop_refuses_while_sessions_are_open_unless_forced(box: Sandbox) -> None:
    assert "no engine runs" in box.run("stop").stderr
    process = box.start("--proxy-only")
    ready(process)
    (state,) = box.engine_states()
    done = box.run("stop")
    assert done.returncode == 1 and f"pid {process.pid} in {box.work}" in done.stderr and "stop --force" in done.stderr
    assert not gone(int(str(state["pid"])))
    done = box.run("stop", "--force")
    assert done.returncode == 0 and "stopped the engine" in done.stderr
    assert gone(int(str(state["pid"]))) and not box.engine_states()
    end(process)


@pytest.mark.slow
def test_stop_ends_an_engine_that_is_kept_alive_and_one_whose_parent_was_killed(box: Sandbox) -> None:
    for harm in (False, True):
        process = box.start("--proxy-only", env={"ANYCLAUDE_KEEP_ALIVE": "600"})
        ready(process)
        (state,) = box.engine_states()
        if harm:
            os.kill(int(str(state["parent"])), signal.SIGKILL)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(20)
        else:
            end(process)
        assert not gone(int(str(state["pid"])))
        assert "stopped the engine" in box.run("stop").stderr
        assert gone(int(str(state["pid"]))) and not box.engine_states()


@pytest.mark.slow
def test_logs_shows_the_engines_log_and_follows_it(box: Sandbox) -> None:
    done = box.run("logs")
    assert done.returncode == 1 and "no log yet" in done.stderr
    process = box.start("--proxy-only")
    ready(process)
    assert "Loading model" in box.run("logs").stdout and "\x1b" not in box.run("logs").stdout
    follower = box.start("logs", "-f")
    assert follower.stdout is not None
    while "listening" not in follower.stdout.readline():
        pass
    (state,) = box.engine_states()
    tell(state["port"], "/die")
    assert "here ends the log" in follower.stdout.readline()
    end(process)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(10) == 0


@pytest.mark.slow
def test_an_option_that_a_command_does_not_have_is_an_error_with_a_way_to_claude(box: Sandbox) -> None:
    done = box.run("status", "--jsn")
    assert done.returncode == 1 and "no --jsn" in done.stderr and "anyclaude.py -- status" in done.stderr
    assert "needs a value" in box.run("build", "--tag").stderr


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        text = '# TYPE x counter\nmistralrs_prefix_cache_lookups_total{model="m"} 8\nmistralrs_prefix_cache_hits_total{model="m"} 6\n'
        self.wfile.write(text.encode() if self.path == "/metrics" else b"OK")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_status_reads_the_hits_of_the_prefix_cache_where_the_engine_counts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(Metrics) as url:
        files = anyclaude._Files(int(url.rpartition(":")[2]))
        log = tmp_path / "log"
        log.write_text(
            "Throughput (T/s) 41.20, Prefix cache hitrate 50.00%, Encoder cache hitrate 1.00%, 1 running, 0 waiting\n"
        )
        anyclaude.write_json(files.state, {"log": str(log), "model": "m"})
        found = anyclaude.engine_status(files)
        assert (found["prefix_cache_hits"], found["tokens_per_second"], found["running"]) == (75.0, 41.2, 1)


# --- doctor ---


def test_doctor_is_content_where_all_is_well_and_says_what_would_run(box: Sandbox, tiny_model: Path) -> None:
    done = box.run("doctor")
    assert done.returncode == 0, done.stdout
    assert "FAILURE" not in done.stdout and "warning" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"would run: {box.bin}/mistralrs serve --port ")
    found = json.loads(box.run("doctor", "--json").stdout)
    assert found["ok"] and f"-m {tiny_model} -a qwen3 --isq Q4K" in found["command"]
    assert {check["name"] for check in found["checks"]} >= {
        "python",
        "claude",
        "model",
        "engine",
        "memory",
        "fit",
        "port",
    }
    assert not box.engine_states()  # it looks, and starts nothing


@pytest.mark.slow
def test_doctor_finds_each_failure_with_its_fix_and_fails(box: Sandbox, tmp_path: Path, tiny_model: Path) -> None:
    def failures(**backend: object) -> dict[str, dict[str, str]]:
        box.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": free_port(), **backend}}})
        done = box.run("doctor", "--json")
        found = json.loads(done.stdout)
        assert done.returncode == 1 and not found["ok"]
        return {check["name"]: check for check in found["checks"] if check["state"] == "failure"}

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    assert "hf download" in failures(modelPath=str(broken))["model"]["fix"]
    assert "does not exist" in failures(modelPath="/none")["model"]["text"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "is taken" in failures(port=taken.getsockname()[1])["port"]["text"]
    assert "does not fit" in failures(memoryLimit=100)["fit"]["text"]
    (box.bin / "claude").unlink()
    assert "npm install" in failures()["claude"]["fix"]
    (box.bin / "mistralrs").unlink()
    found = failures()
    assert "anyclaude build" in found["engine"]["fix"]


@pytest.mark.slow
def test_doctor_tells_of_another_model_on_the_port(box: Sandbox, tmp_path: Path, tiny_model: Path) -> None:
    process = box.start("--proxy-only")
    ready(process)
    assert "which a new session joins" in box.run("doctor").stdout
    other = shutil.copytree(tiny_model, tmp_path / "Other")
    done = box.run("--model-path", str(other), "doctor")
    assert done.returncode == 1 and "used by other sessions" in done.stdout
    end(process)


def test_doctor_knows_the_deprecated_server(box: Sandbox, tiny_model: Path) -> None:
    (box.bin / "mistralrs").unlink()
    (box.home / "server.py").write_text("import argparse; argparse.ArgumentParser().parse_args()")
    backend = {"modelPath": str(tiny_model), "serverScript": "~/server.py"}
    box.settings({"backends": {"mlx": backend}})
    done = box.run("doctor")
    assert done.returncode == 0 and f"would run: {sys.executable} -u {box.home}/server.py --model" in done.stdout
    box.settings({"backends": {"mlx": {**backend, "serverScript": "~/none.py"}}})
    assert box.run("doctor").returncode == 1


@pytest.mark.slow
def test_the_commands_about_an_engine_work_with_broken_settings_and_a_reader_that_leaves(box: Sandbox) -> None:
    box.settings("{broken")
    assert box.run("status").stdout == "no engine runs\n" and box.run("stop").returncode == 0
    line = f"{sys.executable} {anyclaude.__file__} doctor | true"
    done = subprocess.run(
        ["bash", "-c", line], check=False, cwd=box.work, env=box.env, capture_output=True, text=True, timeout=60
    )
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr


def test_what_nobody_foresaw_is_told_in_words_and_kept(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("nobody")

    monkeypatch.setenv("HOME", str(box.home))
    monkeypatch.setattr(anyclaude, "load_settings", fail)
    monkeypatch.setattr(anyclaude, "exit_on_signals", lambda: None)
    assert anyclaude.main(["-p", "x"]) == 1
    err = capsys.readouterr().err
    assert "anyclaude made a mistake: KeyError('nobody')" in err and "Traceback" not in err
    assert "KeyError" in (box.home / ".anyclaude" / "logs" / "crash.log").read_text()


def test_doctor_looks_at_a_remote_server(sandbox: Sandbox) -> None:
    sandbox.settings({"backend": "remote", "backends": {"remote": {"baseUrl": f"http://127.0.0.1:{free_port()}/v1"}}})
    done = sandbox.run("doctor")
    assert done.returncode == 1 and "no server answers" in done.stdout


# --- build ---


def checkout(folder: Path, package: str = "mistralrs-cli", source: str = "", rust: str = "1.60") -> Path:
    """A checkout like mistral.rs', whose program is small."""
    program = "mistralrs-server" if package == "mistralrs-server" else "mistralrs"
    source = source or f'fn main() {{ println!("{program} 0.8.1"); }}'
    (folder / package / "src").mkdir(parents=True)
    (folder / "Cargo.toml").write_text(
        f'[workspace]\nmembers = ["{package}"]\nresolver = "2"\n[workspace.package]\nrust-version = "{rust}"\n'
    )
    (folder / package / "Cargo.toml").write_text(
        f'[package]\nname = "{package}"\nversion = "0.8.1"\nedition = "2021"\n\n[features]\nmetal = []\ncuda = []\n\n'
        f'[[bin]]\nname = "{program}"\npath = "src/main.rs"\n'
    )
    (folder / package / "src" / "main.rs").write_text(source)
    return folder


@pytest.fixture
def cargo(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real cargo, in the sandbox."""
    program = shutil.which("cargo")
    if not program:
        pytest.skip("cargo is not here: nothing can be built")
    home = Path.home()
    sandbox.env["PATH"] = f"{Path(program).parent}:{sandbox.env['PATH']}"
    for name, folder in (("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")):
        sandbox.env[name] = os.environ.get(name, str(home / folder))
    return Path(program)


@pytest.mark.outside
@pytest.mark.slow
@pytest.mark.parametrize("package", ["mistralrs-cli", "mistralrs-server"])
def test_a_checkout_of_the_users_is_built_and_then_found(sandbox: Sandbox, cargo: Path, package: str) -> None:
    source = checkout(sandbox.home / "Documents" / "GitHub" / "mistral.rs", package)
    done = sandbox.run("build")
    assert done.returncode == 0, done.stderr
    program = source / "target" / "release" / package.replace("-cli", "")
    assert f"ready: {program.name} 0.8.1 ({program})" in done.stderr
    log = sandbox.home / ".anyclaude" / "logs" / "build.log"
    assert "Compiling" in log.read_text() and log.stat().st_mode & 0o777 == 0o600
    assert str(program) in sandbox.run("doctor").stdout


@pytest.mark.outside
@pytest.mark.slow
def test_a_tag_is_cloned_built_and_put_where_it_is_found_first(
    sandbox: Sandbox, cargo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = checkout(tmp_path / "origin")
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run([cargo, "generate-lockfile", "--offline"], cwd=source, check=True, env={**os.environ, **sandbox.env})
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"], ["tag", "v0.8.1"]):
        subprocess.run([*git, *words], check=True)
    for name, value in sandbox.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(anyclaude, "REPOSITORY", source.as_uri())
    program = build(Settings(), os.environ, "v0.8.1")
    assert program == sandbox.home / ".anyclaude" / "bin" / "mistralrs"
    assert anyclaude.find_engine(Settings(), os.environ).program == program
    with pytest.raises(AnyclaudeError, match="git failed"):
        build(Settings(), os.environ, "v9.9.9")
    assert [path.name for path in (sandbox.home / ".anyclaude" / "src").glob("[!b]*")] == ["mistral.rs-v0.8.1"]


@pytest.mark.outside
@pytest.mark.slow
def test_a_build_that_fails_shows_the_compilers_words(sandbox: Sandbox, cargo: Path) -> None:
    checkout(sandbox.home / "Documents" / "GitHub" / "mistral.rs", source="fn main() { nonsense }")
    done = sandbox.run("build")
    assert done.returncode == 1 and "cannot find value `nonsense`" in done.stderr and "build.log" in done.stderr


def test_too_old_a_rust_is_told_before_the_build(sandbox: Sandbox) -> None:
    source = checkout(sandbox.home / "Documents" / "GitHub" / "mistral.rs", rust="1.94")
    fake(sandbox, "cargo", "exit 9")
    fake(sandbox, "rustc", "echo 'rustc 1.80.1 (x)'")
    done = sandbox.run("build")
    assert done.returncode == 1 and "rustc 1.80, 1.94 or newer is needed" in done.stderr
    assert "rustup update stable" in done.stderr and not (source / "target").exists()


def fake(box: Sandbox, name: str, script: str) -> None:
    (box.bin / name).write_text(f"#!/bin/sh\n{script}\n")
    (box.bin / name).chmod(0o755)


@pytest.fixture
def builder(sandbox: Sandbox) -> Sandbox:
    """A sandbox with a checkout and tools that do nothing."""
    checkout(sandbox.home / "Documents" / "GitHub" / "mistral.rs")
    fake(sandbox, "rustc", "echo 'rustc 1.99.0 (x)'")
    fake(sandbox, "cc", "exit 0")
    return sandbox


def test_cargo_is_called_with_the_package_and_its_progress_is_shown_on_a_terminal(builder: Sandbox) -> None:
    fake(
        builder,
        "cargo",
        r"""printf '%s\n' "$@" > "$HOME/called"; printf '    Building [==>   ] 7/321: serde\r'; exit 3""",
    )
    master, slave = os.openpty()
    process = builder.start("build", stdin=slave)
    os.close(slave)
    _, err = process.communicate(timeout=30)
    os.close(master)
    assert "cargo failed (exit status 3)" in err
    called = (builder.home / "called").read_text().split()
    assert called[:4] == ["build", "--release", "-p", "mistralrs-cli"]
    assert called[4:] in ([], ["--features", "metal"], ["--features", "cuda"])


@pytest.mark.slow
def test_progress_is_a_live_line_on_a_terminal(builder: Sandbox) -> None:
    fake(builder, "cargo", r"""printf '    Building [==>   ] 7/321: serde\r'; sleep 0.3; exit 3""")
    _, shown = builder.on_terminal("build")
    assert "building: 7 of 321 crates, 0:00" in shown


@pytest.mark.slow
def test_ctrl_c_ends_a_build_and_says_how_to_go_on(builder: Sandbox) -> None:
    fake(builder, "cargo", 'touch "$HOME/started"; exec sleep 60')
    process = builder.start("build")
    wait_for((builder.home / "started").exists)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "what is compiled stays" in err and "the same command" in err
    assert time.monotonic() - started < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "number", "status"),
    [("cargo", signal.SIGINT, 1), ("cargo", signal.SIGTERM, 143), ("claude", signal.SIGTERM, 143)],
)
def test_a_signal_in_the_moment_in_which_a_program_starts_ends_it_too(
    builder: Sandbox, program: str, number: signal.Signals, status: int
) -> None:
    """Between the fork and our knowing of it there is a moment; here the signal comes in it."""
    fake(builder, program, 'case "$*" in --version|--help) exit; esac; exec sleep 60')
    script = builder.work / "early.py"
    script.write_text(f"""import os, subprocess, sys
sys.path.insert(0, {str(Path(anyclaude.__file__).parent)!r})
import anyclaude
class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        if command[0].endswith({program!r}) and command[1:] not in (["--version"], ["--help"]):
            print("started", self.pid, flush=True)
            os.kill(os.getpid(), {int(number)})
subprocess.Popen = Popen
sys.exit(anyclaude.main())
""")
    done = builder.run(*["build"] if program == "cargo" else ["--demo"], program=script, timeout=20)
    pid = int(done.stdout.partition("started ")[2].split()[0])
    if left := not gone(pid):
        os.kill(pid, signal.SIGKILL)
    assert not left and done.returncode == status
    assert number != signal.SIGINT or "what is compiled stays" in done.stderr


@pytest.mark.slow
def test_what_a_build_started_ends_with_it(builder: Sandbox) -> None:
    fake(builder, "cargo", 'sleep 600 & echo $! > "$HOME/child"; wait')
    process = builder.start("build")
    wait_for(lambda: (builder.home / "child").exists() and (builder.home / "child").read_text().strip())
    child = int((builder.home / "child").read_text())
    end(process)
    wait_for(lambda: gone(child))
    fake(builder, "cargo", 'sleep 600 & echo $! > "$HOME/child"; exit 7')  # and one that it leaves is not waited for
    assert "cargo failed (exit status 7)" in builder.run("build", timeout=20).stderr
    os.kill(int((builder.home / "child").read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_two_builds_do_not_disturb_each_other_and_odd_tags_are_refused(builder: Sandbox) -> None:
    fake(builder, "cargo", 'touch "$HOME/started"; exec sleep 60')
    first = builder.start("build")
    wait_for((builder.home / "started").exists)
    assert "another build runs" in builder.run("build").stderr
    end(first)
    for tag in ("--upload-pack=x", "a b", "\udcff", "../../x\n"):
        assert "is no tag" in builder.run("build", f"--tag={tag}").stderr


def test_what_was_built_before_does_not_pass_for_a_new_tag(builder: Sandbox) -> None:
    old = builder.home / ".anyclaude" / "build" / "release" / "mistralrs"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    checkout(builder.home / ".anyclaude" / "src" / "mistral.rs-v0.9.1")
    fake(builder, "cargo", "exit 0")
    done = builder.run("build", "--tag", "v0.9.1")
    assert done.returncode == 1 and "cargo made no" in done.stderr


@pytest.mark.slow
def test_control_d_is_no_agreement(builder: Sandbox, tiny_model: Path) -> None:
    fake(builder, "cargo", 'touch "$HOME/called"')
    fake(builder, "claude", "exit 0")
    status, shown = builder.on_terminal("--model-path", str(tiny_model), answers=[("[Y/n]", "\x04")])
    assert status == 130 and "mistral.rs was not found. Build it now?" in shown and "stopped" in shown
    assert not (builder.home / "called").exists()


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("error: linker `cc` not found", anyclaude.BUILD_TOOLS),
        ("error: failed to write: No space left on device (os error 28)", "Make room"),
        ("error: could not compile `x`\n  (signal: 9, SIGKILL: kill)", "CARGO_BUILD_JOBS=1"),
        ("error: package requires rustc 1.99", "rustup update"),
        ("error: failed to download from x", "goes on where it stopped"),
        ('error: unable to find utility "metal"', "xcodebuild -downloadComponent MetalToolchain"),
    ],
)
def test_each_known_failure_of_a_build_has_its_fix(builder: Sandbox, said: str, fix: str) -> None:
    (builder.home / "said").write_text(said + "\n")
    fake(builder, "cargo", 'cat "$HOME/said" >&2; exit 101')
    done = builder.run("build")
    assert done.returncode == 1 and fix in done.stderr.partition("fix: ")[2], done.stderr


def test_what_is_built_follows_from_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(anyclaude, "read_machine", lambda limit=0: anyclaude.Machine("metal", 1, ""))
    settings, here = Settings(source_dir=str(tmp_path / "own")), {"PATH": str(tmp_path / "bin")}
    cargo = Path("/bin/cargo")
    registry = plan_build(settings, here)
    assert registry.command(cargo)[1:3] == ["install", "--locked"] and registry.command(cargo)[-1] == "metal"
    assert f"mistralrs-cli@{anyclaude.REGISTRY}" in registry.command(cargo)
    with pytest.raises(AnyclaudeError, match="git was not found"):
        plan_build(settings, here, "v0.7.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    cloned = plan_build(settings, here)
    assert cloned.tag == anyclaude.TESTED_TAG and "--locked" in cloned.command(cargo)
    assert plan_build(settings, here, "v0.6.0").generation.program == "mistralrs-server"
    checkout(tmp_path / "own", "mistralrs-server")
    own = plan_build(settings, here)
    assert own.source == tmp_path / "own" and own.command(cargo)[-4:] == [
        "-p",
        "mistralrs-server",
        "--features",
        "metal",
    ]


def test_cuda_is_built_for_where_both_the_compiler_and_a_gpu_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    for accelerator, path, features in (("cuda", tmp_path, ("cuda",)), ("cuda", "/none", ()), ("", tmp_path, ())):
        found = anyclaude.Machine(accelerator, 1, "")
        monkeypatch.setattr(anyclaude, "read_machine", lambda limit=0, found=found: found)
        if path != "/none" or not os.path.exists("/usr/local/cuda/bin/nvcc"):
            assert plan_build(Settings(), {"PATH": str(path)}).features == features


def test_a_mac_without_the_metal_toolchain_is_told_and_still_builds_where_it_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(anyclaude, "read_machine", lambda limit=0: anyclaude.Machine("metal", 1, ""))
    for package, state in (("mistralrs-cli", "warning"), ("mistralrs-server", "failure")):
        own = checkout(tmp_path / package, package)
        plan = plan_build(Settings(source_dir=str(own)), {"PATH": ""})
        monkeypatch.setattr(anyclaude, "output_of", lambda *command: "xcrun: error: cannot find metal")
        (metal,) = (check for check in check_build(plan, {"PATH": ""}) if check.name == "metal")
        assert metal.state == state and "MetalToolchain" in metal.fix
        monkeypatch.setattr(anyclaude, "output_of", lambda *command: "/x/metal\n")
        assert all(check.state == "ok" for check in check_build(plan, {"PATH": ""}) if check.name == "metal")


def test_a_missing_cargo_or_compiler_or_a_full_disk_is_told_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    checks = {check.name: check for check in check_build(plan_build(Settings(), {"PATH": ""}), {"PATH": ""})}
    assert checks["cargo"].state == "failure" and "rustup.rs" in checks["cargo"].fix
    assert checks["compiler"].fix == anyclaude.BUILD_TOOLS and "1.0 GB free" in checks["disk"].text
    assert checks["disk"].state == "failure"
