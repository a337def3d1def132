"""What the tests share: a sandbox to run anyclaude in as a user would, and the real neighbours."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

PROGRAM = ROOT / "anyclaude.py"
# As the command of a wheel does; a script is compiled at each start, which a hundred tests would wait for.
_COMMAND = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {str(PROGRAM)!r}; import anyclaude; anyclaude.entry()"
AS_A_COMMAND = ("-c", _COMMAND)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "outside: needs a program that is not this project's (claude, mistral.rs)")
    config.addinivalue_line("markers", "slow: takes a second or more, and is run under one Python only")


def _as_a_background_job() -> None:
    """As a script starts one: SIGINT is ignored. SIGHUP is not, even if the tests run under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


NO_HUB = "http://127.0.0.1:9"  # nobody listens there: no test asks the real hub


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NO_HUB)


class Sandbox:
    """A home and a working directory of their own, and the processes started in them."""

    def __init__(self, folder: Path) -> None:
        self.home, self.work, self.bin = (folder / name for name in ("home", "work", "bin"))
        for path in (self.home, self.work, self.bin):
            path.mkdir()
        kept = {
            name: os.environ[name]
            for name in ("LANG", "TMPDIR", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
            if name in os.environ
        }
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        self.env = {**kept, "HOME": str(self.home), "PATH": path, "HF_ENDPOINT": NO_HUB}
        self.env["PYTHONPYCACHEPREFIX"] = str(folder.parent.parent / "compiled")  # not into the checkout
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **options: object) -> subprocess.Popen[str]:
        """Start anyclaude; it is stopped at the latest when the test ends."""
        program = options.pop("program", None)  # another than the one that is tested, or that one as a script
        process = subprocess.Popen(
            [sys.executable, *([str(program)] if program else AS_A_COMMAND), *arguments],
            cwd=self.work,
            text=True,
            env={**self.env, **options.pop("env", {})},
            stdin=options.pop("stdin", subprocess.DEVNULL),  # type: ignore[dict-item, call-overload]
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_as_a_background_job,  # noqa: PLW1509
            **options,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, timeout: float = 90, **options: object) -> subprocess.CompletedProcess[str]:
        """Run anyclaude to its end."""
        text = options.pop("input", None)
        if text is not None:
            options["stdin"] = subprocess.PIPE
        process = self.start(*arguments, **options)
        out, err = process.communicate(text, timeout=timeout)  # type: ignore[arg-type]
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def on_terminal(
        self, *arguments: str, answers: Sequence[tuple[str, str]] = (), env: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run anyclaude on a terminal of 100 columns; each answer is typed when its question stands there -> the exit
        status, and all that was shown."""
        pid, terminal = pty.fork()
        if pid == 0:  # pragma: no cover
            try:
                os.chdir(self.work)
                whole = {**self.env, "TERM": "xterm", "COLUMNS": "100", **(env or {})}
                os.execve(sys.executable, [sys.executable, *AS_A_COMMAND, *arguments], whole)
            finally:  # else this would go on as a second pytest
                os._exit(127)
        shown, queued, seen = "", list(answers), 0
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError):  # so a terminal ends on Linux
            while time.monotonic() < deadline:
                if not select.select([terminal], [], [], 1)[0]:
                    continue
                data = os.read(terminal, 4096)
                if not data:
                    break
                shown += data.decode("utf-8", "replace")
                if queued and queued[0][0] in shown[seen:]:
                    seen = len(shown)
                    os.write(terminal, queued.pop(0)[1].encode())
            else:
                os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(terminal)
        assert not queued, f"never asked: {queued[0][0]}\n{shown}"
        return status, shown

    def settings(self, content: object, folder: Path | None = None) -> Path:
        """Write a settings file, by default the home's."""
        path = (folder or self.home) / ".anyclauderc.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def engine_states(self) -> list[dict[str, object]]:
        """What the engines' parents wrote."""
        states = []
        for path in (self.home / ".anyclaude" / "run").glob("engine-*.json"):
            with contextlib.suppress(FileNotFoundError):  # an engine may be ending just now
                states.append(json.loads(path.read_text()))
        return states

    def log(self) -> str:
        """The engine's log."""
        return (self.home / ".anyclaude" / "logs" / "mistralrs-server.log").read_text()

    def clean_up(self) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for state in self.engine_states():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(str(state["pid"])), signal.SIGKILL)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    box = Sandbox(tmp_path)
    yield box
    box.clean_up()


def _tool(variable: str, what: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{what} is not here: run the tests with `sh tests/run`, or name it in {variable}")
    return Path(path)


@pytest.fixture
def claude(sandbox: Sandbox) -> Path:
    """The real Claude Code, on the sandbox's PATH."""
    program = _tool("ANYCLAUDE_TEST_CLAUDE", "Claude Code")
    (sandbox.bin / "claude").symlink_to(program.resolve())
    return program


@pytest.fixture
def engine(sandbox: Sandbox) -> Path:
    """The real mistral.rs, on the sandbox's PATH."""
    program = _tool("ANYCLAUDE_TEST_ENGINE", "mistral.rs")
    (sandbox.bin / program.name).symlink_to(program.resolve())
    return program


def every_engine() -> list[str]:
    """The programs of all real engines that are here."""
    named = (os.environ.get(name, "") for name in ("ANYCLAUDE_TEST_ENGINE", "ANYCLAUDE_TEST_ENGINES"))
    return [path for paths in named for path in paths.split(":") if path]


@pytest.fixture
def wheel() -> Path:
    """A Python that has mistral.rs as a module, which is newer than what can be built from the registry."""
    return _tool("ANYCLAUDE_TEST_WHEEL", "the mistralrs wheel")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "Tiny")


@pytest.fixture
def stand_in(sandbox: Sandbox) -> Path:
    """A program called mistralrs that starts, answers and fails as tests/stand_in_engine.py is told to."""
    program = sandbox.bin / "mistralrs"
    script = ROOT / "tests" / "stand_in_engine.py"
    answers = f"""case "$*" in
        --version) echo "mistralrs 0.8.1";;
        *"text --help") cat '{ROOT}/tests/help/mistralrs-0.8.1-text.txt';;
        *"serve --help") cat '{ROOT}/tests/help/mistralrs-0.8.1-serve.txt';;
        *) exec {sys.executable} '{script}' "$@";;
        esac"""
    program.write_text(f"#!/bin/sh\n{answers}\n")
    program.chmod(0o755)
    return program
