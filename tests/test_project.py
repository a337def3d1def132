"""The repository: its one file under old Pythons, its packages, and what the README says."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import PROGRAM, ROOT, Sandbox
from test_care import serving

import anyclaude

CACHE = Path(os.environ.get("ANYCLAUDE_TEST_CACHE") or Path.home() / ".cache" / "anyclaude-tests")


def run(
    *command: object, cwd: Path = ROOT, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of the repository and nothing else, as in a fresh clone."""
    names = ("anyclaude.py", "install.sh", "pyproject.toml", "README.md", "LICENSE", "tests")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in names:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, folder / name)
    return folder


def test_only_the_standard_library_is_imported() -> None:
    modules = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module).split(".")[0])
    if sys.version_info >= (3, 10):
        assert modules <= set(sys.stdlib_module_names)
    assert len(modules) > 20


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
@pytest.mark.slow
def test_ruff_has_nothing_to_say(command: tuple[str, ...]) -> None:
    run(sys.executable, "-m", "ruff", *command, ".")


@pytest.mark.slow
def test_the_type_hints_are_right() -> None:
    run(sys.executable, "-m", "mypy", "--strict", "--python-version=3.10", f"--cache-dir={CACHE / 'mypy'}", PROGRAM)


@pytest.mark.slow
def test_nothing_newer_than_python_3_9_is_used() -> None:
    run(Path(sys.executable).parent / "vermin", "--no-tips", "--eval-annotations", "-t=3.9-", "--violations", PROGRAM)


def test_the_version_and_the_help_need_no_settings_and_no_claude(sandbox: Sandbox) -> None:
    sandbox.settings("{broken")
    assert sandbox.run("--version").stdout == f"anyclaude {anyclaude.__version__}\n"
    text = sandbox.run("--help").stdout
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 80
    assert all(option in text for option in anyclaude.OWN_OPTIONS.keys() | anyclaude.SWITCHES | {"--config-file"})
    assert not (sandbox.home / ".anyclaude").exists()


def test_it_runs_from_a_read_only_folder_and_leaves_nothing_beside_itself(sandbox: Sandbox, checkout: Path) -> None:
    checkout.chmod(0o555)
    try:
        assert sandbox.run("--version", program=checkout / "anyclaude.py").returncode == 0
    finally:
        checkout.chmod(0o755)
    assert not (checkout / "__pycache__").exists()


@pytest.mark.slow
def test_the_wheel_builds_installs_and_runs(checkout: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    tools = Path(sys.executable).parent
    if not (tools / "uv").exists() or not (tools / "pipx").exists():
        pytest.skip("uv or pipx is not here: pip install --group install")
    with_uv = {**os.environ, "PATH": f"{tools}:{sandbox.env['PATH']}", "UV_CACHE_DIR": str(CACHE / "uv")}
    run(sys.executable, "-m", "build", "--installer=uv", "--outdir", tmp_path / "dist", cwd=checkout, env=with_uv)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    version = f"anyclaude {anyclaude.__version__}\n"
    env = {
        **with_uv,
        "UV_PYTHON": sys.executable,
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
    }
    run(tools / "pipx", "install", "--python", sys.executable, ".", cwd=checkout, env=env)
    assert run(tmp_path / "bin" / "anyclaude", "--version", env=sandbox.env).stdout == version
    assert (
        run(tools / "uvx", "--offline", "--no-index", "--from", wheel, "anyclaude", "--version", env=env).stdout
        == version
    )


def test_a_copy_of_the_file_runs_in_a_home_that_does_not_exist_yet(sandbox: Sandbox) -> None:
    copy = sandbox.work / "my tool.py"
    shutil.copy(PROGRAM, copy)
    home = sandbox.home / "not" / "yet"
    assert "no request was answered yet" in sandbox.run("stats", program=copy, env={"HOME": str(home)}).stdout
    assert (home / ".anyclaude").stat().st_mode & 0o777 == 0o700
    assert "wrote" in sandbox.run("init", program=copy, env={"HOME": str(home / "again")}).stderr


@pytest.mark.outside
@pytest.mark.slow
def test_from_nothing_but_python_sh_and_npm_to_an_answer(checkout: Path, sandbox: Sandbox) -> None:
    """Two commands, in an empty home."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node or not os.environ.get("ANYCLAUDE_TEST_CLAUDE"):
        pytest.skip("npm is not here, or Claude Code cannot be had")
    for name, program in (("python3", sys.executable), ("sh", "/bin/sh"), ("npm", npm), ("node", node)):
        (sandbox.bin / name).symlink_to(program)
    path = f"{sandbox.home}/.local/bin:{sandbox.bin}"
    env = {**sandbox.env, "PATH": path, "npm_config_cache": str(CACHE / "npm"), "npm_config_prefer_offline": "true"}
    env["npm_config_prefix"] = "/nowhere"  # as on a system whose own folders are not the user's
    (sandbox.work / "marker.txt").touch()
    run(sandbox.bin / "sh", "install.sh", cwd=checkout, env=env)
    done = run(
        sandbox.bin / "sh", "-c", 'anyclaude --demo -p "hi" --yes', cwd=sandbox.work, env=env, stdin=subprocess.DEVNULL
    )
    assert "This is the demo engine" in done.stdout and "Claude Code was not found" in done.stderr
    assert (sandbox.home / ".local" / "bin" / "claude").exists()


URL = "https://raw.githubusercontent.com/anyclaude/anyclaude/main"


def commands_of_the_readme() -> list[str]:
    """The indented command lines of the README."""
    return re.findall(r"^    ((?:anyclaude|curl|sh) .+|anyclaude)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_readmes_commands_are_the_ones_that_are_run_here() -> None:
    model = "~/models/Qwen3-Coder-30B-A3B-Instruct"
    assert commands_of_the_readme() == [
        f"curl -fsSL {URL}/install.sh | sh",
        "anyclaude --demo",
        "anyclaude",
        'anyclaude -p "Explain this repository"',
        f"anyclaude --model-path {model}",
        "anyclaude doctor",
        "anyclaude stats",
        "anyclaude status",
        "anyclaude logs",
        "anyclaude stop",
        "anyclaude init",
        f"anyclaude init --model-path {model}",
        "anyclaude models",
        "anyclaude build",
        "anyclaude --base-url http://localhost:8000/v1",
        "anyclaude init --base-url http://localhost:8000/v1",
        "anyclaude --proxy-only",
        "sh tests/run",
        "sh install.sh --uninstall",
    ]
    assert (ROOT / ".ci" / "run").read_text().split("\n")[1:] == ["exec sh tests/run", ""]


def test_the_readme_names_every_setting_and_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition("## Settings")[2].partition("## Models")[0]
    missing = [key.json for key in anyclaude.KEYS if key.json and f"`{key.json}`" not in table]
    assert missing == ["serverScript", "pythonVenv"]  # deprecated
    assert all(f"anyclaude {command}" in text for command in anyclaude.COMMANDS)
    assert all(
        f"`{option}`" in text
        for option in anyclaude.OWN_OPTIONS
        if option not in ("--proxy-port", "--proxy-only", "--demo")
    )


@pytest.mark.outside
def test_the_readmes_commands_work_in_a_fresh_checkout(
    checkout: Path, sandbox: Sandbox, claude: Path, engine: Path, tiny_model: Path
) -> None:
    (sandbox.bin / "python3").symlink_to(sys.executable)
    sandbox.env["PATH"] = f"{sandbox.home}/.local/bin:{sandbox.env['PATH']}"
    sandbox.env["ANYCLAUDE_ENGINE_PORT"] = "0"  # not the one that people have
    (sandbox.work / "marker.txt").touch()
    models = sandbox.home / "models"
    models.mkdir()
    (models / "Qwen3-Coder-30B-A3B-Instruct").symlink_to(tiny_model)

    ran = set()

    def shell(command: str, env: dict[str, str] | None = None) -> str:
        ran.update(line for line in commands_of_the_readme() if line.split(" -p ")[0] == command.split(" -p ")[0])
        done = run(
            "sh", "-c", command.replace(URL, site), cwd=checkout, env=env or sandbox.env, stdin=subprocess.DEVNULL
        )
        return done.stdout + done.stderr

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(checkout))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None: ...

    with serving(Files) as site:
        env = {**sandbox.env, "ANYCLAUDE_URL": f"{site}/anyclaude.py"}
        assert "installed anyclaude" in shell(f"curl -fsSL {URL}/install.sh | sh", env)
    assert "pyproject.toml" in shell("anyclaude --demo -p 'Which files are here?'")
    model = "~/models/Qwen3-Coder-30B-A3B-Instruct"
    assert "no marker" in shell(f"anyclaude --model-path {model} -p 'Look.'")
    assert re.search("  1 +1 MB +131072 ", shell("anyclaude models"))
    assert "wrote ~/.anyclauderc.json" in shell("anyclaude init")
    assert "wrote ~/.anyclauderc.json" in shell(f"anyclaude init --model-path {model}")
    assert "no marker" in shell('anyclaude -p "Explain this repository"')
    assert "would run: " in shell("anyclaude doctor")
    assert anyclaude.READY_LINE.search(shell("anyclaude logs"))
    assert "no engine runs" in shell("anyclaude stop")
    assert re.search(r"anyclaude-demo +2 ", shell("anyclaude stats")) and "Qwen3-Coder" in shell("anyclaude stats")
    assert "wrote" in shell("anyclaude init --base-url http://localhost:8000/v1")
    assert "no server answers at http://localhost:8000/v1" in sandbox.run("-p", "hi").stderr
    assert "removed" in shell("sh install.sh --uninstall") and not (sandbox.home / ".local/bin/anyclaude").exists()
    # `build` is run by tests/test_commands.py; `status`, `--base-url` and `--proxy-only` by nearly all tests.
    elsewhere = {
        "anyclaude build",
        "anyclaude status",
        "anyclaude --base-url http://localhost:8000/v1",
        "anyclaude --proxy-only",
    }
    assert set(commands_of_the_readme()) - ran == elsewhere | {"sh tests/run"}
    # `sh tests/run` is what runs this; that it finds its tools and passes its arguments on is tried with one test.
    line = ("sh", "tests/run", "-n0", "tests/test_model.py", "-k=architecture")
    assert "passed" in run(*line, cwd=checkout, env={**os.environ, "ANYCLAUDE_TEST_CACHE": str(CACHE)}).stdout


def test_what_to_type_is_what_works_there(sandbox: Sandbox) -> None:
    copy = sandbox.home / "a b" / "anyclaude"
    copy.parent.mkdir()
    shutil.copy(PROGRAM, copy)
    assert f"'{copy}' doctor\n" in sandbox.run("docter", program=copy).stderr
    assert "fix: anyclaude doctor\n" in sandbox.run("docter", program=copy, env={"PATH": str(copy.parent)}).stderr
    shutil.copy(PROGRAM, sandbox.work / "x.py")
    assert "fix: python3 x.py doctor\n" in sandbox.run("docter", program="x.py").stderr
