"""Section 9 and the whole: Claude Code's environment and arguments, and the real one through the real proxy."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Sandbox
from fake_engine import fake_engine, says
from test_engine import free_port, gone, wait_for
from tool_formats import WRITTEN

from anyclaude import (
    LEAN_TOOLS,
    OUR_VARIABLES,
    OWN_OPTIONS,
    STABLE_PROMPT,
    SWITCHES,
    AnyclaudeError,
    Session,
    Settings,
    chosen_mode,
    claude_arguments,
    claude_environment,
    claude_settings,
    client_name,
    find_claude,
)

SESSION = Session("http://127.0.0.1:1", "token", "tiny", 65536, 8192)


def test_what_makes_it_this_session_is_ours_and_the_rest_the_users() -> None:
    users = {
        "ANTHROPIC_API_KEY": "sk-real",
        "ANTHROPIC_BASE_URL": "https://example.com",
        "ANTHROPIC_MODEL": "claude-x",
        "CLAUDE_CODE_USE_BEDROCK": "1",
        "API_TIMEOUT_MS": "5",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "9",
        "HTTP_PROXY": "http://corp:3128",
        "NO_PROXY": "intra.example",
        "OTHER": "x",
    }
    made = claude_environment(users, SESSION)
    assert (
        made["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:1"
        and made["ANTHROPIC_AUTH_TOKEN"] == "token"
        and made["ANTHROPIC_API_KEY"] == ""
    )
    assert (
        made["ANTHROPIC_MODEL"] == made["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == made["CLAUDE_CODE_SUBAGENT_MODEL"] == "tiny"
    )
    assert made["CLAUDE_CODE_USE_BEDROCK"] == ""
    assert (made["API_TIMEOUT_MS"], made["CLAUDE_CODE_MAX_CONTEXT_TOKENS"], made["OTHER"]) == ("5", "9", "x")
    assert made["NO_PROXY"] == "intra.example,127.0.0.1,localhost" and made["no_proxy"] == "127.0.0.1,localhost"
    bare = claude_environment({}, SESSION)
    assert (
        bare["CLAUDE_CODE_MAX_CONTEXT_TOKENS"],
        bare["CLAUDE_CODE_MAX_OUTPUT_TOKENS"],
        bare["CLAUDE_CODE_ATTRIBUTION_HEADER"],
    ) == ("65536", "8192", "0")


def arguments(*given: str, help_text: str = "", mode: str = "plan", prompt: str = "") -> list[str]:
    return claude_arguments(given, help_text, mode, prompt, Path("/ours"))


def test_our_arguments_stand_in_front_and_swallow_nothing() -> None:
    usual = ["--disallowedTools=WebSearch", "--settings=/ours"]
    assert arguments("-p", "hi", "--x", mode="") == ["--permission-mode=default", *usual, "-p", "hi", "--x"]
    assert arguments("hi") == [*usual, "hi"]
    assert STABLE_PROMPT in arguments("hi", help_text=f"  {STABLE_PROMPT}\n")
    assert STABLE_PROMPT not in arguments("--system-prompt", "x", help_text=STABLE_PROMPT)
    assert arguments("hi", prompt="lean")[1].startswith("--tools=Bash,")
    assert arguments("--tools", "Read", prompt="lean") == [*usual, "--tools", "Read"]


def test_our_settings_follow_the_users_because_only_the_last_ones_count() -> None:
    assert arguments("-p", "--settings", "theirs", "hi")[1:] == ["-p", "--settings", "theirs", "--settings=/ours", "hi"]
    assert arguments("--settings=theirs", "hi")[1:] == ["--settings=theirs", "--settings=/ours", "hi"]


def test_a_mode_that_the_user_chose_is_kept(tmp_path: Path) -> None:
    cwd, home = tmp_path / "cwd", tmp_path / "home"
    for folder in (cwd / ".claude", home / ".claude", tmp_path / "config"):
        folder.mkdir(parents=True)

    def mode(*given: str, **environ: str) -> str:
        named, others = claude_settings(given, environ, cwd, home)
        return chosen_mode(given, [named, *others])

    def setting(mode: str) -> str:
        return json.dumps({"permissions": {"defaultMode": mode}})

    assert mode("-p", "hi") == ""
    assert mode("--permission-mode", "plan") == mode("--permission-mode=plan") == "plan"
    assert mode("--dangerously-skip-permissions") == "bypassPermissions"
    (home / ".claude" / "settings.json").write_text(setting("acceptEdits"))
    assert mode() == "acceptEdits"
    (tmp_path / "config" / "settings.json").write_text(setting("auto"))
    assert mode(CLAUDE_CONFIG_DIR=str(tmp_path / "config")) == "auto"
    (cwd / ".claude" / "settings.json").write_text(setting("dontAsk"))
    assert mode() == "dontAsk"
    (cwd / ".claude" / "settings.local.json").write_text("{broken")
    assert mode() == "dontAsk"
    assert mode("--settings", setting("plan")) == mode("--settings=" + setting("plan")) == "plan"
    assert mode("--settings", str(home / ".claude" / "settings.json")) == "acceptEdits"
    assert mode("--settings", "/not/there") == mode("--settings") == "dontAsk"


def test_a_models_name_never_looks_like_one_of_anthropics() -> None:
    names = {
        "Qwen3-8B": "Qwen3-8B",
        "/m/Qwen 3": "Qwen-3",
        "org/Model:x": "Model:x",
        "claude-mini": "local-claude-mini",
        "": "local",
        "../": "local",
    }
    assert {name: client_name(name) for name in names} == names


def test_claude_is_found_in_its_places_and_never_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def program(folder: str) -> Path:
        path = tmp_path / folder / "claude"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.chmod(0o755)
        return path

    program("")
    with pytest.raises(AnyclaudeError, match="not found") as caught:
        find_claude(Settings(), {"PATH": "."})
    assert "npm install -g @anthropic-ai/claude-code" in caught.value.fix
    for folder in ("home/.claude/local", "home/.local/bin", "path"):
        expected = program(folder)
        assert find_claude(Settings(), {"PATH": f".:{tmp_path}/path"}) == expected
    named = program("named")
    assert find_claude(Settings(claude_binary=str(named)), {}) == named
    with pytest.raises(AnyclaudeError, match="claudeBinary"):
        find_claude(Settings(claude_binary=str(tmp_path)), {})


# A stand-in for claude, to see exactly what reaches it.

RECORDER = """#!{python}
import json, os, sys, signal
if sys.argv[1:] == ["--help"]:
    print("  --exclude-dynamic-system-prompt-sections\\n\\nCommands:\\n  mcp      Servers\\n  plugin|plugins   More"); sys.exit()
text = sys.stdin.read() if sys.stdin and not sys.stdin.isatty() else ""
print(json.dumps({{"arguments": sys.argv[1:], "stdin": text, "environment": dict(os.environ)}}), flush=True)
{then}
"""


def recorder(sandbox: Sandbox, then: str = "") -> None:
    (sandbox.bin / "claude").write_text(RECORDER.format(python=sys.executable, then=then))
    (sandbox.bin / "claude").chmod(0o755)


def test_arguments_input_and_exit_status_pass_through(sandbox: Sandbox) -> None:
    recorder(sandbox, "sys.exit(7)")
    done = sandbox.run("--demo", "-p", "a 'b' $c", "--", "--demo", input="from a pipe\n")
    seen = json.loads(done.stdout)
    assert done.returncode == 7
    (ours,) = [argument for argument in seen["arguments"] if argument.startswith("--settings=")]
    assert not Path(ours.partition("=")[2]).exists()
    assert seen["arguments"] == [
        "--permission-mode=default",
        "--disallowedTools=WebSearch",
        STABLE_PROMPT,
        ours,
        "-p",
        "a 'b' $c",
        "--demo",
    ]
    assert seen["stdin"] == "from a pipe\n"
    assert seen["environment"]["ANTHROPIC_BASE_URL"] in done.stderr.replace("localhost", "127.0.0.1")
    assert seen["environment"]["ANTHROPIC_AUTH_TOKEN"] not in done.stderr


@pytest.mark.slow
def test_the_permission_mode_is_explained_once(sandbox: Sandbox) -> None:
    recorder(sandbox)
    assert "permission mode: default" in sandbox.run("--demo").stderr
    assert "permission mode" not in sandbox.run("--demo").stderr
    done = sandbox.run("--demo", "--permission-mode", "auto")
    assert "Anthropic's servers" in done.stderr and "--permission-mode=default" not in done.stdout


def test_a_death_by_signal_is_the_shells_status(sandbox: Sandbox) -> None:
    recorder(sandbox, "os.kill(os.getpid(), signal.SIGKILL)")
    assert sandbox.run("--demo").returncode == 128 + signal.SIGKILL


def test_ctrl_c_is_claudes_own(sandbox: Sandbox) -> None:
    recorder(sandbox, "signal.signal(signal.SIGINT, lambda *_: sys.exit(5)); print('up', flush=True); signal.pause()")
    process = sandbox.start("--demo")
    assert process.stdout is not None
    process.stdout.readline(), process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 5


def test_a_term_for_anyclaude_ends_claude_too(sandbox: Sandbox) -> None:
    recorder(sandbox, "print(os.getpid(), flush=True); signal.pause()")
    process = sandbox.start("--demo")
    assert process.stdout is not None
    process.stdout.readline()
    pid = int(process.stdout.readline())
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and gone(pid)


def test_a_second_signal_does_not_leave_a_claude_that_is_slow_to_end(sandbox: Sandbox) -> None:
    recorder(
        sandbox,
        "import time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'told\\n'), time.sleep(1), sys.exit()))\n"
        "print(os.getpid(), flush=True)\nwhile True: signal.pause()",
    )
    process = sandbox.start("--demo")
    assert process.stdout is not None
    process.stdout.readline()
    pid = int(process.stdout.readline())
    process.terminate()
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and gone(pid)


def test_when_claude_stops_itself_the_shell_comes_back(sandbox: Sandbox) -> None:
    recorder(sandbox, "os.kill(os.getpid(), signal.SIGSTOP); sys.exit(3)")
    process = sandbox.start("--demo")

    def stopped() -> bool:
        state = subprocess.run(
            ["ps", "-o", "state=", "-p", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout
        return state.startswith("T")

    wait_for(stopped)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=20)
    assert process.returncode == 3


def test_a_claude_that_ends_right_after_it_was_stopped_gives_its_status(sandbox: Sandbox) -> None:
    kill = "import os, signal, time; time.sleep(0.02); os.kill({pid}, signal.SIGKILL)"
    then = f"import subprocess; subprocess.Popen([sys.executable, '-S', '-c', {kill!r}.format(pid=os.getpid())])"
    recorder(
        sandbox, f"{then}; os.kill(os.getpid(), signal.SIGSTOP); import time; time.sleep(30)"
    )  # if it is continued
    process = sandbox.start("--demo")

    def ended() -> bool:
        process.send_signal(signal.SIGCONT)  # if it stopped itself first, as it should
        return process.poll() is not None

    wait_for(ended)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.slow
def test_what_claude_does_without_a_model_starts_no_engine(sandbox: Sandbox) -> None:
    recorder(sandbox)
    for arguments in (["mcp", "list", "--help"], ["plugins"], ["-v"]):
        seen = json.loads(sandbox.run(*arguments).stdout)
        assert seen["arguments"] == arguments and "ANTHROPIC_BASE_URL" not in seen["environment"]
    seen = json.loads(sandbox.run("--", "--version").stdout)
    assert seen["arguments"] == ["--version"]


def test_without_claude_the_error_says_how_to_get_it(sandbox: Sandbox) -> None:
    done = sandbox.run("--demo", env={"PATH": "/nowhere"})
    assert (
        done.returncode == 1
        and "npm install -g @anthropic-ai/claude-code" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_settings_problems_are_told_and_nothing_is_started(sandbox: Sandbox) -> None:
    sandbox.settings({"backends": {"mlx": {"port": "x", "maxTokens": -1}}})
    done = sandbox.run("--demo")
    assert done.returncode == 1 and done.stderr.count("expected a whole number") == 2 and "fix:" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(sandbox: Sandbox, closed: str) -> None:
    recorder(sandbox, "sys.exit(7)")
    command = f'"{sys.executable}" "{PROGRAM}" --demo -p x {closed}'
    assert subprocess.run(["sh", "-c", command], env=sandbox.env, cwd=sandbox.work, check=False).returncode == 7


def test_a_home_that_does_not_exist_yet_is_made(sandbox: Sandbox) -> None:
    recorder(sandbox)
    home = sandbox.home / "new" / "home"
    assert sandbox.run("--demo", env={"HOME": str(home)}).returncode == 0
    assert stat.S_IMODE((home / ".anyclaude").stat().st_mode) == 0o700
    sandbox.home.joinpath("file").write_text("")
    done = sandbox.run("--demo", env={"HOME": str(sandbox.home / "file" / "x")})
    assert done.returncode == 1 and "HOME" in done.stderr and "Traceback" not in done.stderr


# The real Claude Code, headless, through the real proxy.


def scripted(request: dict[str, Any], result: str, *calls: dict[str, Any]) -> list[str]:
    """The calls one after the other, then an answer that depends on the last one's result."""
    results = [message["content"] for message in request["messages"] if message["role"] == "tool"]
    if not request.get("tools"):
        return says("ok")
    if len(results) < len(calls):
        return says("Let me see.\n", *f"<tool_call>\n{json.dumps(calls[len(results)])}\n</tool_call>")
    return says("The result has it." if result in results[-1] else f"Not there: {results}")


@pytest.mark.outside
def test_claude_code_answers(sandbox: Sandbox, claude: Path) -> None:
    with fake_engine(lambda request: says("Forty", "-two.")) as engine:
        done = sandbox.run("--base-url", engine.url, "-p", "What is six times seven?")
        assert (done.returncode, done.stdout.strip()) == (0, "Forty-two."), done.stderr
        assert "billing" not in json.dumps(engine.requests)
        assert all(message["role"] in ("system", "user") for message in engine.requests[-1]["messages"])


@pytest.mark.outside
def test_settings_of_claude_code_cannot_send_the_session_elsewhere(sandbox: Sandbox, claude: Path) -> None:
    """`env` in its settings wins over the environment, and a cloned project can bring such settings."""
    with fake_engine(lambda request: says("Here.")) as engine, socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.setblocking(False)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
        env = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "theirs", "HTTP_PROXY": url, "http_proxy": url}
        env |= {"NO_PROXY": "", "no_proxy": "", "ANTHROPIC_AWS_BASE_URL": url, "ANTHROPIC_BEDROCK_MANTLE_BASE_URL": url}
        env |= {f"CLAUDE_CODE_USE_{name}": "1" for name in ("MANTLE", "ANTHROPIC_AWS", "BEDROCK", "GATEWAY")}
        env |= {"CLAUDE_CODE_SKIP_MANTLE_AUTH": "1", "ANTHROPIC_GOOGLE_CLOUD_BASE_URL": url}
        for folder in (sandbox.home / ".claude", sandbox.work / ".claude"):
            folder.mkdir()
            (folder / "settings.json").write_text(json.dumps({"env": {**env, "ANTHROPIC_MODEL": "claude-x"}}))
        theirs = json.dumps({"env": {**env, "WORD": "plum"}})
        for options in ((), ("--settings", theirs)):
            done = sandbox.run("--base-url", engine.url, *options, "-p", "Where?")
            assert (done.returncode, done.stdout.strip()) == (0, "Here."), done.stderr
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


@pytest.mark.outside
def test_every_provider_that_claude_code_knows_is_switched_off(claude: Path) -> None:
    found = (re.match(rb"[A-Z_]+\b", rest) for rest in claude.resolve().read_bytes().split(b"CLAUDE_CODE_USE_")[1:])
    names = {name[0].decode() for name in found if name}
    no_providers = {"CCR_V", "COWORK_PLUGINS", "NATIVE_FILE_SEARCH", "POWERSHELL_TOOL"}
    assert len(names) > 5
    assert {f"CLAUDE_CODE_USE_{name}" for name in names - no_providers} <= OUR_VARIABLES.keys()


@pytest.mark.outside
def test_claude_code_runs_a_bash_call_and_uses_its_result(sandbox: Sandbox, claude: Path) -> None:
    (sandbox.work / "secret.txt").write_text("the word is marmalade\n")
    call = {"name": "Bash", "arguments": {"command": "cat secret.txt", "description": "Read"}}
    with fake_engine(lambda request: scripted(request, "marmalade", call)) as engine:
        done = sandbox.run("--base-url", engine.url, "-p", "Read it", env={"ANYCLAUDE_TOOL_CALLS": "text"})
        assert (done.returncode, done.stdout.strip()) == (0, "The result has it."), done.stderr
        first, second = (request for request in engine.requests[-2:])
        assert json.dumps(second["messages"]).startswith(json.dumps(first["messages"])[:-1])
        assert second["tools"] == first["tools"]


@pytest.mark.outside
def test_claude_code_edits_a_file(sandbox: Sandbox, claude: Path) -> None:
    old, new = "return \"<b>\\n</b>\" if 1 < 2 else ''", "return {'a': [1]}  # \"</parameter>\""
    path = sandbox.work / "code.py"
    path.write_text(f"def f():\n    {old}\n")
    read = {"name": "Read", "arguments": {"file_path": str(path)}}
    edit = {"name": "Edit", "arguments": {"file_path": str(path), "old_string": old, "new_string": new}}
    with fake_engine(lambda request: scripted(request, "code.py", read, edit)) as engine:
        options = ("--base-url", engine.url, "-p", "Edit it", "--permission-mode", "acceptEdits")
        done = sandbox.run(*options, env={"ANYCLAUDE_TOOL_CALLS": "text"})
        assert (done.returncode, done.stdout.strip()) == (0, "The result has it."), done.stderr
    assert path.read_text() == f"def f():\n    {new}\n"


OWN = {"ANYCLAUDE_TOOL_CALLS": "text"}


def results(request: dict[str, Any]) -> list[dict[str, Any]]:
    return [message for message in request["messages"] if message["role"] == "tool"]


@pytest.mark.outside
def test_claude_code_runs_parallel_calls(sandbox: Sandbox, claude: Path) -> None:
    calls = [WRITTEN["qwen3-coder"]("Bash", {"command": f"echo {word}{word}"}) for word in ("plum", "pear")]

    def answer(request: dict[str, Any]) -> list[str]:
        return says("Both came.") if len(results(request)) == 2 else says("Both:\n\n", *calls)

    with fake_engine(answer) as engine:
        done = sandbox.run("--base-url", engine.url, "-p", "Do both", env=OWN)
        assert (done.returncode, done.stdout.strip()) == (0, "Both came."), done.stderr
        told = results(engine.requests[-1])
        assert ["plumplum" in told[0]["content"], "pearpear" in told[1]["content"]] == [True, True], told
        calls_made = engine.requests[-1]["messages"][-3]["tool_calls"]
        assert [call["id"] for call in calls_made] == [result["tool_call_id"] for result in told]


@pytest.mark.outside
def test_claude_code_writes_four_hundred_lines(sandbox: Sandbox, claude: Path) -> None:
    content = "".join(f"line {number}: <b>\"{number}\"</b> \\n {{'a': [1]}} </parameter>\n" for number in range(400))
    path = sandbox.work / "long.txt"
    write = WRITTEN["qwen3-coder"]("Write", {"file_path": str(path), "content": content})

    def answer(request: dict[str, Any]) -> list[str]:
        return says("Written.") if results(request) else says(*(write[at : at + 9] for at in range(0, len(write), 9)))

    with fake_engine(answer) as engine:
        options = ("--base-url", engine.url, "-p", "Write it", "--permission-mode", "acceptEdits")
        done = sandbox.run(*options, env=OWN)
        assert (done.returncode, done.stdout.strip()) == (0, "Written."), done.stderr
    assert path.read_text() == content


def png(side: int = 8) -> bytes:
    """A grey picture."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        part(*one)
        for one in ((b"IHDR", head), (b"IDAT", zlib.compress((b"\0" + b"\x80" * side) * side)), (b"IEND", b""))
    )


@pytest.mark.outside
@pytest.mark.parametrize("sees", [True, False])
def test_claude_code_shows_a_picture_to_a_model_that_sees(sandbox: Sandbox, claude: Path, sees: bool) -> None:
    path = sandbox.work / "shot.png"
    path.write_bytes(png())
    call = WRITTEN["hermes"]("Read", {"file_path": str(path)})
    with fake_engine(lambda request: says("Grey.") if results(request) else says(call)) as engine:
        env = {**OWN, "ANYCLAUDE_VISION": str(sees)}
        done = sandbox.run("--base-url", engine.url, "-p", "Look at it", env=env)
        assert (done.returncode, done.stdout.strip()) == (0, "Grey."), done.stderr
        last = engine.requests[-1]["messages"]
        images = [part for message in last if isinstance(message["content"], list) for part in message["content"]]
        urls = [part["image_url"]["url"] for part in images if part["type"] == "image_url"]
        assert len(urls) == sees and all(url.startswith("data:image/") for url in urls)
        assert sees or "this model cannot see images" in results(engine.requests[-1])[0]["content"]


@pytest.mark.outside
def test_an_overflow_ends_in_a_compaction_and_claude_code_goes_on(sandbox: Sandbox, claude: Path) -> None:
    overflown: list[int] = []

    def answer(request: dict[str, Any]) -> Any:
        rounds = len(results(request))
        if not overflown and rounds < 5:
            return says(WRITTEN["hermes"]("Bash", {"command": f"echo round {rounds}"}))
        if not overflown:
            overflown.append(rounds)
            return (422, '{"message": "Prompt sequence length is greater than 4096, perhaps consider using it"}')
        overflown.append(rounds)
        return says("<summary>It echoed.</summary>") if len(overflown) == 2 else says("Went on.")

    with fake_engine(answer) as engine:
        done = sandbox.run("--base-url", engine.url, "-p", "Echo five times", env=OWN)
        assert (done.returncode, done.stdout.strip()) == (0, "Went on."), done.stderr
        assert overflown[0] == 5 and len(overflown) == 3
        assert "It echoed." in json.dumps(engine.requests[-1]["messages"])


@pytest.mark.outside
def test_no_single_result_of_a_tool_ends_a_session_with_a_small_window(sandbox: Sandbox, claude: Path) -> None:
    big = sandbox.work / "big.txt"
    big.write_text("".join(f"line {number} of a file that is large against the window\n" for number in range(6000)))
    calls = [("Bash", {"command": f"cat {big}"}), ("Read", {"file_path": str(big)})]

    def answer(request: dict[str, Any]) -> Any:
        done = len(results(request))
        return says(WRITTEN["hermes"](*calls[done])) if done < len(calls) else says("Read it.")

    with fake_engine(answer) as engine:
        done = sandbox.run(
            "--base-url",
            engine.url,
            "--context-window",
            "32768",
            "-p",
            "Read it",
            "--allowedTools",
            "Bash,Read",
            env=OWN,
        )
        assert (done.returncode, done.stdout.strip()) == (0, "Read it."), done.stderr
        sizes = [len(message["content"]) for message in results(engine.requests[-1])]
        assert len(sizes) == 2 and max(sizes) < 32768 // 8 * 5, sizes
        offered = {tool["function"]["name"] for tool in engine.requests[0]["tools"]}
        assert offered <= set(LEAN_TOOLS.split(",")) and "Bash" in offered  # a window under 65,536
        engine.requests.clear()
        calls.clear()
        sandbox.run("--base-url", engine.url, "--context-window", "32768", "--prompt", "full", "-p", "Hello", env=OWN)
        assert len(engine.requests[0]["tools"]) > len(LEAN_TOOLS.split(","))


@pytest.mark.outside
@pytest.mark.slow
def test_claude_code_goes_on_by_itself_when_the_engine_was_started_again(
    sandbox: Sandbox, claude: Path, stand_in: Path, tiny_model: Path
) -> None:
    sandbox.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": free_port()}}})
    process = sandbox.start("-p", "Hello?", env={"STAND_IN": "fatal"})  # it dies of its first request
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "here I am"), err
    assert "mistral.rs ended once and is started again" in err


@pytest.mark.outside
def test_an_engine_that_is_loading_is_waited_for_by_claude_code(sandbox: Sandbox, claude: Path) -> None:
    answers: list[Any] = [(503, '{"error": {"message": "Loading model"}}')] * 2
    with fake_engine(lambda request: answers.pop() if answers else says("Here.")) as engine:
        done = sandbox.run("--base-url", engine.url, "-p", "Hello?")
        assert (done.returncode, done.stdout.strip()) == (0, "Here."), done.stderr
        assert len(engine.requests) >= 3


@pytest.mark.outside
def test_the_demo_lists_the_files_through_the_real_claude_code(sandbox: Sandbox, claude: Path) -> None:
    for name in ("alpha.txt", "beta.md"):
        (sandbox.work / name).touch()
    done = sandbox.run("--demo", "-p", "Which files are here?")
    assert done.returncode == 0 and "alpha.txt" in done.stdout and "beta.md" in done.stdout, done.stderr


@pytest.mark.outside
def test_a_real_engine_makes_a_real_tool_call_for_the_real_claude_code(
    sandbox: Sandbox, claude: Path, engine: Path, tiny_model: Path
) -> None:
    (sandbox.work / "marker.txt").touch()
    port = free_port()
    for prompt in ("Look at the files.", "Please @@coder@@ now"):
        process = sandbox.start("--model-path", str(tiny_model), "--engine-port", str(port), "-p", prompt)
        wait_for(sandbox.engine_states)
        (state,) = sandbox.engine_states()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "I saw the  marker file."), err
        assert gone(int(str(state["pid"]))) and not sandbox.engine_states()
        wait_for(lambda: not subprocess.run(["pgrep", "-f", str(sandbox.bin)], capture_output=True, check=False).stdout)


@pytest.mark.outside
def test_no_option_of_ours_has_the_name_of_one_of_claudes(sandbox: Sandbox, claude: Path) -> None:
    text = subprocess.run(
        [str(claude), "--help"], env=sandbox.env, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    theirs = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(theirs) > 30
    assert not (OWN_OPTIONS.keys() | SWITCHES | {"--config-file"}) & theirs
