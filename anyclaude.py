#!/usr/bin/env python3
"""Claude Code on your own model, in one file.

anyclaude finds mistral.rs, starts it with the right arguments for the model on disk, waits until it
serves, stands between Claude Code and it as a translating proxy (Anthropic Messages API to OpenAI
chat completions and back, streaming), runs Claude Code, and leaves nothing behind.

    anyclaude [own options] [anything for claude]

The file reads top to bottom, and a section uses only those above it:

    1 Ground       constants, errors, the terminal, private files
    2 Settings     flags > environment > project file > home file > defaults
    3 Model        what is on disk or on Hugging Face: architecture, context window, size, quantisation; downloads
    4 Engine       mistral.rs: find, command line, start, share, wait, stop; the demo engine
    5 Request      Anthropic -> OpenAI; pure
    6 Tool text    model output -> text and tool calls, as a stream; pure
    7 Reply        OpenAI chunks -> Anthropic events; a pure state machine
    8 Proxy        http.server and threads around 5 to 7, and what the requests take
    9 Claude Code  find it, its environment, run it in the foreground
    10 Commands    the command line
"""

from __future__ import annotations

import _thread
import base64
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import hmac
import http.client
import itertools
import json
import math
import operator
import os
import queue
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, TextIO

try:
    import fcntl
except ImportError:  # Windows has no flock, no sessions and no signals of the kind used here
    raise SystemExit("anyclaude runs on macOS and Linux. On Windows, run it inside WSL.") from None

__version__ = "0.1.0"


# === 1 Ground =================================================================================
# Rule: every error a person sees says what happened and what to do next.

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 5.0  # between TERM and KILL

DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the proxy of the environment

Json = dict[str, Any]  # a JSON object
to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode  # nothing here contains itself
from_json = json.JSONDecoder(parse_constant=str).decode  # NaN is no number to hand on
Version = tuple[int, int, int]


def as_object(value: Any) -> Json:
    """`value` if it is a JSON object, otherwise an empty one: what others send is never trusted to have its shape."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """`value` if it is a JSON array, otherwise an empty one."""
    return value if isinstance(value, list) else []


class AnyclaudeError(Exception):
    """Something a person must know: `message` says what happened and why, `fix` what to type next."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message, self.fix = message, fix


# How a message begins -> its colour on a terminal (SGR, ECMA-48).
COLOURS = {"error:": "31", "warning:": "33", "fix:": "32"}
WAITING_SECONDS = 30.0  # between two lines about the same wait, in a pipe


def has_colours(stream: TextIO) -> bool:
    """Whether colours may be written to `stream`. Source: no-color.org."""
    return is_screen(stream) and not os.environ.get("NO_COLOR")


def is_screen(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can do more than print lines."""
    return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


class Terminal:
    """Messages on stderr. `waiting` keeps one live line on a terminal, and prints one now and then in a pipe."""

    def __init__(self) -> None:
        self._live = ""
        self._told = 0.0

    def _write(self, text: str, live: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr must not end the session
            sys.stderr.write(("\r\x1b[2K" if self._live else "") + text)
            sys.stderr.flush()
        self._live = live

    def say(self, text: str) -> None:
        """Print `text`, each line of it behind `[anyclaude]`."""
        lines, mark = map(plain, text.split("\n")), "[anyclaude]"
        if has_colours(sys.stderr):
            lines, mark = map(_coloured, lines), f"\x1b[2m{mark}\x1b[0m"
        self._write("".join(f"{mark} {line}\n" for line in lines), "")

    def show(self, lines: Iterable[str]) -> None:
        """Print a table, as it is."""
        self._write("".join(f"{one_line(line)}\n" for line in lines), "")

    def waiting(self, text: str) -> None:
        """Put `text` in place of the live line; "" takes that away: the wait is over."""
        now = time.monotonic()
        if is_screen(sys.stderr):
            if text != self._live:
                self._write(f"[anyclaude] {text}"[: shutil.get_terminal_size().columns - 1] if text else "", text)
        elif not text or not self._told:
            self._told = now if text else 0.0
        elif now - self._told > WAITING_SECONDS:
            self._told = now
            self.say(text)


def _coloured(line: str) -> str:
    word, space, rest = line.partition(" ")
    return f"\x1b[{COLOURS[word]}m{word}\x1b[0m{space}{rest}" if word in COLOURS else line


TERMINAL = Terminal()
say = TERMINAL.say


def plain(text: str) -> str:
    """`text` without escape sequences and control characters: a log must not drive the terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def one_line(text: str) -> str:
    """`text` without what would end its line, too."""
    return re.sub(r"\s", " ", plain(text))


def state_path(*parts: str) -> Path:
    """A path under `~/.anyclaude`; its folders are made, mode 0700."""
    folder = Path.home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in (".anyclaude", *parts[:-1]):
            folder = folder / part
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        message = f"cannot make {folder}: {error.strerror}."
        raise AnyclaudeError(message, "Set HOME to a folder you can write to.") from None
    return folder / parts[-1]


def write_json(path: Path, value: Any) -> None:
    """Replace the file at `path` in one step; mode 0600."""
    write_text(path, json.dumps(value))


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace the file at `path` in one step. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def without_comments(text: str) -> str:
    """JSON with comments (`//`, `/* */`) and commas behind the last of a list, made JSON: spaces stand in their places,
    so that every other character stays where it is."""

    def blanked(pattern: str, text: str) -> str:
        inside = r'("(?:\\.|[^"\\\r\n])*"?)|'  # a text that is not closed ends with its line
        return re.sub(inside + pattern, lambda found: found[1] or re.sub(r"[^\r\n]", " ", found[0]), text)

    return blanked(r",(?=\s*[}\]])", blanked(r"//[^\r\n]*|/\*[\s\S]*?\*/", text))


def read_json(path: Path, comments: bool = False) -> Json:
    """The JSON object in `path`; `comments`: it may have some. Raises AnyclaudeError that names the file and, for bad
    JSON, line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content: Any = json.loads(without_comments(text) if comments else text)
        problem = "" if isinstance(content, dict) else f"expected an object, found {type(content).__name__}"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON: {error}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    if problem:
        raise AnyclaudeError(f"{path}: {problem}.", "Correct the file, or move it away.")
    return as_object(content)


def rotated_log(path: Path, keep: int = 3) -> int:
    """Move earlier logs on (`x.log` to `x.log.1` ...) and open a new one to append to; mode 0600. A file descriptor."""
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, keep + 1))]
    for older, newer in reversed(list(zip(names, names[1:]))):
        with contextlib.suppress(OSError):
            os.replace(older, newer)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def unexpected(error: Exception) -> AnyclaudeError:
    """An error that nobody has put into words."""
    if isinstance(error, OSError):
        return AnyclaudeError(f"the system refused: {error}.", "Check that file or folder.")
    with contextlib.suppress(OSError, AnyclaudeError):
        path = state_path("logs", "crash.log")
        os.write(rotated_log(path), traceback.format_exc().encode("utf-8", "replace"))
        return AnyclaudeError(f"anyclaude made a mistake: {error!r}.", f"Please report it, with {path}")
    return AnyclaudeError(f"anyclaude made a mistake: {error!r}.", "Please report it.")


_LOG_PREFIX = re.compile(r"\S+Z +(INFO|(?=WARN|ERROR))( [\w:]+: )?")  # time, level and module of a tracing line


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log that hold anything, made plain and without time and module."""
    try:
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            text = file.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return []
    lines = (_LOG_PREFIX.sub("", plain(line)) for line in re.split(r"[\r\n]+", text))
    return [line for line in lines if line.strip()][-count:]


def which(name: str, folders: Iterable[str | Path]) -> Path | None:
    """The first program `name` in `folders`. Relative folders are passed over: a cloned repository that is the
    working directory must not supply a program."""
    programs = (Path(folder) / name for folder in folders)
    return next((path for path in programs if path.is_absolute() and is_program(path)), None)


def is_program(path: Path) -> bool:
    """Whether `path` is a file that may be executed."""
    return path.is_file() and os.access(path, os.X_OK)


def search_path(environ: Mapping[str, str]) -> list[str | Path]:
    """The folders of PATH."""
    return [*environ.get("PATH", os.defpath).split(os.pathsep)]


def output_of(*command: str) -> str:
    """What a short command prints, on either stream; "" if it fails."""
    program = which(command[0], ["/", *search_path(os.environ)])  # an absolute path stays what it is
    if not program:
        return ""
    line, env = [str(program), *command[1:]], {**os.environ, "NO_COLOR": "1", "LC_ALL": "C", "TZ": "UTC0"}
    no_input, joined = subprocess.DEVNULL, subprocess.STDOUT
    home = (
        Path.home() if Path.home().is_dir() else Path("/")
    )  # not the working directory: its files tell rustc what to run
    try:
        output = subprocess.check_output(line, stdin=no_input, stderr=joined, env=env, timeout=20, cwd=home)
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.decode("utf-8", "replace")


def terminate(process: subprocess.Popen[bytes], kill: Callable[[int, int], None] = os.kill) -> None:
    """TERM, then KILL after STOP_SECONDS; returns when the process is gone. `kill`: os.killpg ends its whole group."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if kill is os.kill:  # a group may outlive its leader, and gets KILL as well
                return


def ending(status: Any) -> str:
    """An exit status in words. -9 on Linux is the kernel's answer to a machine without memory."""
    if not isinstance(status, int) or status >= 0:
        return f"exit status {status}"
    killed = "; the system kills so when memory runs out" * (status == -signal.SIGKILL)
    return f"signal {-status}{killed}"


def in_thousands(count: int) -> str:
    """A number of tokens in few characters."""
    return f"{count / 1000:.1f}k" if count >= 10_000 else str(count)


def times(count: Any) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count} times"


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / (1 << 30):.1f} GB" if size >= 1 << 29 else f"{size / (1 << 20):.0f} MB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"


def can_ask() -> bool:
    """Whether a person is there to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str) -> str:
    """What a person answers, without spaces around it; Ctrl-D ends the program as Ctrl-C does."""
    say(question)
    answer = sys.stdin.readline()
    if not answer:
        raise KeyboardInterrupt
    return answer.strip()


def agrees(question: str, yes: bool = False) -> bool:
    """Ask a person, on a terminal; without one the answer is no. `yes`: it was given on the command line."""
    if yes:
        say(f"{question} yes (--yes)")
    return yes or (can_ask() and ask(f"{question} [Y/n]").lower() in ("", "y", "yes"))


@contextlib.contextmanager
def next_signal() -> Iterator[Callable[[], Any]]:
    """A function that waits until a signal comes. A plain wait can miss one that comes just before it blocks, or that
    the kernel gives to another thread; this one is woken by the interpreter's own handler, in whatever thread."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield lambda: reader.recv(64)
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """INT, TERM and HUP that come in the block are handled right behind it: a process that starts in it is known by then, and
    can be ended."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in handlers.items():
            if callable(handler):  # what is ignored stays so, in the new process too
                signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


# === 2 Settings ===============================================================================
# Rule: flags > environment > project file > home file > defaults, one frozen value, made once.

SETTINGS_FILE = ".anyclauderc.json"


@dataclass(frozen=True)
class Settings:
    """What the user wants, after every source was read. `kind`: "mistralrs" is started here, "remote" only talked to;
    `file`, `home_backend`: where `init` writes to, and `model_backends`: where a model is kept, home's own first; `given`:
    the fields that the command line set; `project_model`: the model was chosen by a project's file."""

    backend: str = "mlx"
    enabled: bool = True
    description: str = ""
    kind: str = "mistralrs"
    port: int = 8081
    base_url: str = ""
    api_key: str = ""
    model: str = "default"
    model_path: str = ""
    max_tokens: int = 32768
    arch: str = ""
    isq: str = "Q4K"
    context_window: int = 0
    binary: str = ""
    source_dir: str = "~/Documents/GitHub/mistral.rs"
    extra_args: Sequence[str] = ()
    tool_calls: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    prompt: str = ""
    vision: bool = False
    claude_binary: str = ""
    start_timeout: int = 600
    stall_timeout: int = 900
    keep_alive: int = 0
    memory_limit: int = 0
    server_script: str = ""
    python_venv: str = ""
    yes: bool = False
    file: str = field(default="", compare=False)
    given: Sequence[str] = field(default=(), compare=False)
    home_backend: str = field(default="mlx", compare=False)
    model_backends: Sequence[str] = field(default=("mlx",), compare=False)
    project_model: bool = field(default=False, compare=False)
    proxy_only: bool = False
    proxy_port: int = 0
    demo: bool = False
    debug: int = 0


@dataclass(frozen=True)
class Key:
    """One setting. `kind`: what it holds (see `checked`); `json`: its name in a backend of the settings file;
    `flag`: its option on the command line; the environment variable follows from either. `trusted`: counts only
    from home, environment and flags, because a cloned project's file must not run programs or redirect traffic."""

    field: str
    kind: str
    json: str = ""
    flag: str = ""
    trusted: bool = False

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "ANYCLAUDE_" + (self.flag[2:].replace("-", "_") or self.field).upper()


KEYS = (
    Key("enabled", "flag", "enabled"),
    Key("description", "note", "description"),
    Key("kind", "mistralrs|remote", "kind", trusted=True),
    Key("port", "0..65535", "port", "--engine-port"),
    Key("base_url", "url", "baseUrl", "--base-url"),
    Key("api_key", "key", "apiKey", trusted=True),
    Key("model", "text", "model"),
    Key("model_path", "path", "modelPath", "--model-path"),
    Key("max_tokens", "1..10000000", "maxTokens"),
    Key("arch", "text", "arch", "--arch"),
    Key("isq", "text", "isq", "--isq"),
    Key("context_window", "1024..100000000", "contextWindow", "--context-window"),
    Key("binary", "path", "binary", trusted=True),
    Key("source_dir", "path", "sourceDir", trusted=True),
    Key("extra_args", "texts", "extraArgs", trusted=True),
    Key("tool_calls", "text|engine", "toolCalls"),
    Key("sampling", "numbers", "sampling"),
    Key("prompt", "lean|full", "prompt", "--prompt"),
    Key("vision", "flag", "vision"),
    Key("claude_binary", "path", "claudeBinary", trusted=True),
    Key("start_timeout", "1..86400", "startTimeout"),
    Key("stall_timeout", "1..86400", "stallTimeout", trusted=True),
    Key("keep_alive", "0..86400", "keepAlive", trusted=True),
    Key("memory_limit", "0..100000000", "memoryLimit", trusted=True),
    Key("server_script", "path", "serverScript", trusted=True),
    Key("python_venv", "path", "pythonVenv", trusted=True),
    Key("proxy_only", "flag", flag="--proxy-only"),  # these are of one run, and never in a file
    Key("proxy_port", "0..65535", flag="--proxy-port"),
    Key("demo", "flag", flag="--demo"),
    Key("yes", "flag", flag="--yes"),
    Key("debug", "0..3"),
)
OWN_OPTIONS = {key.flag: key for key in KEYS if key.flag}
SWITCHES = {*(key.flag for key in KEYS if key.kind == "flag" and key.flag)}
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def checked(kind: str, value: Any, folder: Path) -> Any:
    """`value` (from JSON, or a text from a flag or the environment) as what `kind` says. `folder`: what relative
    paths start from. Raises ValueError that says what was expected."""
    if kind in ("text", "path", "url", "key"):
        if not _is_text(value) or not value.strip() or (kind == "key" and not re.fullmatch(r"[!-~]+", value)):
            raise ValueError("a text that is not empty" + (", of ASCII characters without space" * (kind == "key")))
        return _absolute(value, folder) if kind == "path" else _url(value) if kind == "url" else value.strip()
    if kind == "note":
        return str(value)
    if kind == "flag":
        if str(value).lower() not in _FLAGS:
            raise ValueError("true or false")
        return _FLAGS[str(value).lower()]
    if "|" in kind:
        if value not in kind.split("|"):
            raise ValueError("one of " + ", ".join(kind.split("|")))
        return value
    if ".." in kind:
        low, high = map(int, kind.split(".."))
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,12}", str(value)) or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)
    return _texts(value) if kind == "texts" else _numbers(value)


def _is_text(value: Any) -> bool:
    """Whether `value` is a text that can be passed to a program."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _absolute(text: str, folder: Path) -> str:
    """`~` and relative paths made absolute. What is not there and could be a Hugging Face id stays as it is."""
    path = folder / os.path.expanduser(text)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*((/[\w-][\w.-]*)+\.gguf)?", text) and not path.exists()
    return text if is_hub_id else os.path.normpath(path)


def _url(text: str) -> str:
    text = text.strip().rstrip("/")
    with contextlib.suppress(ValueError):  # of a port that is none
        parts = urllib.parse.urlsplit(text)
        extra = re.search("[^!-~]|[?#]", text) or "@" in parts.netloc
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not extra:
            return text
    raise ValueError("a URL like http://localhost:8081/v1")


def _texts(value: Any) -> list[str]:
    value = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(map(_is_text, value)):
        raise ValueError("a list of texts")
    return value


def _numbers(value: Any) -> dict[str, float]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    numbers = value if isinstance(value, dict) else {"": value}
    if not set(numbers) <= set(SAMPLING) or not all(type(number) in (int, float) for number in numbers.values()):
        raise ValueError("an object of numbers under " + ", ".join(SAMPLING))
    return numbers


def is_loopback(url: str) -> bool:
    """Whether `url` is on this machine."""
    with contextlib.suppress(ValueError):  # of a URL that is none
        return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return False


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Part own options from claude's arguments -> ({option: value}, the rest in order).

    Own options are recognised anywhere before `--` by their exact name, as `--x V` or `--x=V`. The first `--` is
    dropped: it only parts ours from claude's."""
    own: dict[str, str] = {}
    rest: list[str] = []
    queued = list(arguments)
    while queued:
        argument = queued.pop(0)
        name, equals, value = argument.partition("=")
        if argument == "--":
            return own, rest + queued
        if name in SWITCHES:
            own[name] = value or "true"
        elif name == "--config-file" or name in OWN_OPTIONS:
            if not equals and (not queued or queued[0].startswith("--")):
                raise AnyclaudeError(f"{name} needs a value.", f"anyclaude {name} VALUE")
            own[name] = value if equals else queued.pop(0)
        else:
            rest.append(argument)
    return own, rest


def settings_files(cwd: Path, home: Path, named: str = "") -> list[tuple[Path, bool]]:
    """Settings files, strongest first, as (path, trusted). One named by --config-file stands for both others."""
    if named:
        return [(cwd / os.path.expanduser(named), True)]
    above_project = (home, home.resolve())
    folders = [*itertools.takewhile(lambda folder: folder not in above_project, (cwd, *cwd.parents))]
    project = next((folder / SETTINGS_FILE for folder in folders if (folder / SETTINGS_FILE).is_file()), None)
    found = [(project, False)] if project else []
    return [*found, (home / SETTINGS_FILE, True)] if (home / SETTINGS_FILE).is_file() else found


class _Sources:
    """The sources of one reading, and every problem and warning found in them, to be told at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def take(self, layer: Json, key: Key, value: Any, where: str, folder: Path) -> None:
        """Put a checked value into `layer`, or report it."""
        try:
            layer[key.field] = checked(key.kind, value, folder)
        except ValueError as error:
            found = "another value" if key.field == "api_key" else to_json(value)[:80]
            self.problems.append(f"{where}: expected {error}, found {found}.")

    def unknown(self, where: str, name: str, known: Iterable[str]) -> None:
        """Warn of a key that nothing reads."""
        if name in {key.json for key in KEYS if key.json} and name not in known:
            inside = f'it belongs into a backend: {{"backends": {{"mlx": {{"{name}": ...}}}}}}'
            return self.warnings.append(f'{where}: "{name}" is ignored here, {inside}')
        near = difflib.get_close_matches(name, list(known), 1, 0.6)
        self.warnings.append(f'{where}: unknown key "{name}"' + (f', did you mean "{near[0]}"?' if near else "."))

    def variables(self, environ: Mapping[str, str], cwd: Path) -> Json:
        """The layer of the environment."""
        layer: Json = {}
        for key in KEYS:
            for name in (key.variable, *(["PROXY_ONLY"] if key.field == "proxy_only" else [])):
                if environ.get(name):
                    self.take(layer, key, environ[name], name, cwd)
        return layer

    def file(self, path: Path, trusted: bool) -> tuple[str, dict[str, Json]]:
        """-> (the backend that a file chooses, its backends as layers)."""
        try:
            content = read_json(path, comments=True)
        except AnyclaudeError as error:
            self.problems.append(error.message)
            return "", {}
        for name in set(content) - {"backend", "backends"}:
            self.unknown(str(path), name, ("backend", "backends"))
        backends = content.get("backends", {})
        if not isinstance(backends, dict) or not all(isinstance(values, dict) for values in backends.values()):
            self.problems.append(f"{path}: backends: expected an object of objects.")
            backends = {}
        if not isinstance(content.get("backend", ""), str):
            self.problems.append(f"{path}: backend: expected a text.")
        layers = {name: self.backend(path, name, values, trusted) for name, values in backends.items()}
        return str(content.get("backend") or ""), layers

    def backend_of(self, files: Sequence[tuple[str, dict[str, Json]]], named: str) -> str:
        """The backend to use. `named`: by the environment."""
        defined = [name for _, layers in files for name in layers]
        backend = next(filter(None, [named, *(choice for choice, _ in files), *defined, "mlx"]))
        known = defined or ["mlx", "remote"]
        if backend not in known:
            self.problems.append(f'backend "{backend}" is none of the backends that are set: {", ".join(known)}.')
        return backend

    def backend(self, path: Path, name: str, values: Json, trusted: bool) -> Json:
        """The layer of one backend in one file."""
        known = {key.json: key for key in KEYS if key.json}
        layer: Json = {}
        for key_name, value in values.items():
            where = f"{path}: backends.{name}.{key_name}"
            key = known.get(key_name)
            if key is None:
                self.unknown(f"{path}: backends.{name}", key_name, known)
            elif trusted or not (key.trusted or (key.field == "base_url" and not is_loopback(str(value)))):
                self.take(layer, key, value, where, path.parent)
            else:
                self.warnings.append(
                    f"{where}: ignored, because a project's file may not run programs or redirect traffic. "
                    f"Set it in ~/{SETTINGS_FILE}, or as {key.variable}."
                )
        if "base_url" in layer and not trusted:
            layer["api_key"] = ""  # the home file's key is not for a server that the project chose
        port = urllib.parse.urlsplit(layer.get("base_url", "")).port
        if port and is_loopback(layer["base_url"]) and layer.setdefault("port", port) != port:
            self.problems.append(f"{path}: backends.{name}: port and baseUrl name different ports. Keep one of them.")
        return layer


def known_backends(files: Sequence[tuple[str, dict[str, Json]]]) -> list[str]:
    """The backends of the files, strongest first, and the one that is there without any."""
    return list(dict.fromkeys([*(name for _, backends in files for name in backends), "mlx"]))


def starts_engine(name: str, files: Sequence[tuple[str, dict[str, Json]]]) -> bool:
    """Whether a backend is one that starts mistral.rs, and may be used."""
    merged: Json = {"kind": "remote" if name == "remote" else "mistralrs", "enabled": True}
    for _, backends in reversed(files):
        merged.update(backends.get(name, {}))
    return bool(merged["kind"] == "mistralrs" and merged["enabled"])


def load_settings(
    own: Mapping[str, str], environ: Mapping[str, str], cwd: Path, home: Path, begins: bool = False
) -> tuple[Settings, list[str]]:
    """Read every source -> (settings, warnings). `own`: {option: value} of the command line; `begins`: a file that is named
    may still be written.

    Raises AnyclaudeError that lists every problem, each with its file and key."""
    sources = _Sources()
    flags: Json = {}
    for option, text in own.items():
        if option in OWN_OPTIONS:
            sources.take(flags, OWN_OPTIONS[option], text, option, cwd)
    variables = sources.variables(environ, cwd)
    for layer in (flags, variables):
        if "base_url" in layer:  # a URL for this run: that server is used as it is
            layer.setdefault("kind", "remote")

    named = own.get("--config-file") or environ.get("ANYCLAUDE_CONFIG_FILE", "")
    there = [pair for pair in settings_files(cwd, home, named) if pair[0].exists() or not begins]
    files = [sources.file(path, trusted) for path, trusted in there]
    backend = sources.backend_of(files, environ.get("ANYCLAUDE_BACKEND", ""))
    ours = [name for name in known_backends(files) if starts_engine(name, files)]
    if "model_path" in flags and "base_url" not in flags:  # that is for mistral.rs
        backend = backend if backend in ours else "mlx" if "mlx" in ours else next(iter(ours), "mistralrs")
        for name in ("base_url", "kind"):
            variables.pop(name, None)
    merged: Json = {"kind": "remote" if backend == "remote" else "mistralrs"}
    layers = [flags, variables, *(backends.get(backend, {}) for _, backends in files)]
    for layer in reversed(layers):
        merged.update(layer)
    trusts = [True, True, *(trusted for _, trusted in there)]
    merged["project_model"] = not next((trust for layer, trust in zip(layers, trusts) if "model_path" in layer), True)
    choice, own_backends = next((file for file, (_, trusted) in zip(files, there) if trusted), ("", {}))
    theirs = backend if backend in own_backends else choice or next(iter(own_backends), "mlx")
    merged["home_backend"] = theirs
    first = next((name for name in (theirs, "mlx", *own_backends) if name in ours), "mistralrs")
    merged["model_backends"] = tuple(dict.fromkeys((first, backend if backend in ours else first)))
    kept = cwd / os.path.expanduser(named) if named else home / SETTINGS_FILE
    settings = Settings(backend=backend, file=str(kept), given=tuple(flags), **merged)
    name = f'backend "{backend}"'
    if not settings.enabled:
        sources.problems.append(f'{name} has "enabled": false. Enable it, or choose another as "backend".')
    if settings.kind == "remote" and not settings.base_url:
        sources.problems.append(f"{name} is remote and has no baseUrl, like http://localhost:8000/v1.")
    if settings.kind == "mistralrs" and settings.base_url and not is_loopback(settings.base_url):
        sources.problems.append(f'{name}: baseUrl is not this machine. "kind": "remote" would use that server.')
    if sources.problems:
        listed = "".join(f"\n  {problem}" for problem in sources.problems)
        raise AnyclaudeError(f"the settings cannot be used:{listed}", "Correct them, and run the same command again.")
    return settings, sources.warnings


_MEMBER = re.compile(r'[\s,]*(?=")')
_COLON = re.compile(r"\s*:\s*")


def _members(text: str, at: int) -> dict[str, tuple[int, int]]:
    """The members of the JSON object that opens at `at` -> where the value of each begins and ends."""
    decode, found = json.JSONDecoder().raw_decode, {}
    at += 1
    while member := _MEMBER.match(text, at):
        name, at = decode(text, member.end())
        colon = _COLON.match(text, at)
        begin = colon.end() if colon else at
        at = decode(text, begin)[1]
        found[name] = (begin, at)
    return found


def _rendered(value: Any) -> str:
    """JSON as people write it; a path that is no UTF-8 is escaped."""
    text = json.dumps(value, indent=4, ensure_ascii=False)
    return json.dumps(value, indent=4) if re.search(r"[\ud800-\udfff]", text) else text


def with_setting(text: str, keys: Sequence[str], value: Any) -> str:
    """The text of a settings file with `value` under `keys`, outermost first. All else, comments too, stays as it is. Pure.
    What stands under one of `keys` and is no object is replaced."""
    clean = without_comments(text)
    at = clean.index("{")
    for depth, key in enumerate(keys):
        members = _members(clean, at)
        begin, end = members.get(key, (0, 0))
        inner = functools.reduce(lambda content, name: {name: content}, reversed(keys[depth + 1 :]), value)
        indent = "    " * (depth + 1)
        if key not in members:
            new = _rendered({key: inner})[2:-2].replace("\n", "\n" + indent[4:])
            rest = text[at + 1 :].lstrip(" \t")
            behind = "," * (bool(members) or clean != text) + (
                "" if rest.startswith(("\n", "\r")) else "\n" + indent[4 * (not members) :]
            )
            return f"{text[: at + 1]}\n{indent[4:]}{new}{behind}{rest}"
        if depth == len(keys) - 1 or clean[begin] != "{":
            new = _rendered(inner).replace("\n", "\n" + indent)
            return text[:begin] + new + text[end:]
        at = begin
    return text


# What `anyclaude init` begins with: as if it were not there, until a line's comment is taken away.
COMMENTED_SETTINGS = """\
// The settings of anyclaude: JSON, in which comments and a comma too many are allowed.
// The same keys may stand in .anyclauderc.json in a project's folder; options on the command line come first.
{
    "backend": "mlx",
    "backends": {
        "mlx": {
            // The model: a folder, a .gguf file, or the name of a model on Hugging Face. `anyclaude models` lists yours.
            // "modelPath": "~/models/Qwen3-Coder-30B-A3B-Instruct",

            // Quantisation while loading, of a model that is not quantised yet: Q3K, Q4K, Q6K, Q8_0, or none.
            // "isq": "Q4K",

            // Tokens: of the window (otherwise what fits into memory), and of one reply at most.
            // "contextWindow": 65536,
            // "maxTokens": 32768,

            // MB of memory that the engine may have, in place of what was found.
            // "memoryLimit": 24000,

            // Seconds for which the engine stays loaded when the last session is gone.
            // "keepAlive": 600,
        },
        // A server that runs already, on this machine or another, with OpenAI's protocol: "backend": "remote" uses it.
        "remote": {
            // "baseUrl": "http://localhost:8000/v1",
            // "apiKey": "...",
            // "model": "...",
        },
    },
}
"""


# === 3 Model ==================================================================================
# Rule: inspection is pure (`inspect_model`, `inspect_gguf`); what reads the disk, asks the hub and downloads stands behind it.

# First mistral.rs that loads it -> "value of -a = class in config.json". No value: the engine's automatic loader takes
# it (multimodal models). Source: mistralrs-core/src/pipeline/loaders/{normal,vision,multimodal}_loaders.rs at v0.6.0,
# v0.7.0, v0.8.0, v0.8.23 and v0.9.2.
LOADERS: dict[Version, str] = {
    (0, 6, 0): """mistral=MistralForCausalLM mixtral=MixtralForCausalLM gemma=GemmaForCausalLM gemma2=Gemma2ForCausalLM
        phi2=PhiForCausalLM phi3=Phi3ForCausalLM phi3.5moe=PhiMoEForCausalLM llama=LlamaForCausalLM
        qwen2=Qwen2ForCausalLM qwen3=Qwen3ForCausalLM qwen3moe=Qwen3MoeForCausalLM starcoder2=Starcoder2ForCausalLM
        deepseekv2=DeepseekV2ForCausalLM deepseekv3=DeepseekV3ForCausalLM
        =Phi3VForCausalLM =Phi4MMForCausalLM =MiniCPMO =Idefics2ForConditionalGeneration
        =Idefics3ForConditionalGeneration =LlavaForConditionalGeneration =LlavaNextForConditionalGeneration
        =MllamaForConditionalGeneration =Qwen2VLForConditionalGeneration =Qwen2_5_VLForConditionalGeneration
        =Gemma3ForConditionalGeneration =Mistral3ForConditionalGeneration =Llama4ForConditionalGeneration""",
    (0, 7, 0): """glm4=Glm4ForCausalLM glm4moelite=Glm4MoeLiteForCausalLM glm4moe=Glm4MoeForCausalLM
        smollm3=SmolLM3ForCausalLM granitemoehybrid=GraniteMoeHybridForCausalLM gpt_oss=GptOssForCausalLM
        =Gemma3ForCausalLM =Gemma3nForConditionalGeneration =Qwen3VLForConditionalGeneration
        =Qwen3VLMoeForConditionalGeneration""",
    (0, 8, 0): """qwen3next=Qwen3NextForCausalLM =Gemma4ForConditionalGeneration =Qwen3_5ForConditionalGeneration
        =Qwen3_5MoeForConditionalGeneration =VoxtralRealtimeForConditionalGeneration""",
    (0, 8, 23): "hunyuanv1dense=HunYuanDenseV1ForCausalLM hunyuanv1moe=HunYuanMoEV1ForCausalLM",
    (0, 9, 2): """qwen3_5=Qwen3_5ForCausalLM lfm2=Lfm2ForCausalLM lfm2_moe=Lfm2MoeForCausalLM =Gemma4UnifiedForCausalLM
        =Lfm2VlForConditionalGeneration =MuseGlimmerForConditionalGeneration =DiffusionGemmaForBlockDiffusion""",
}
ARCHITECTURES: dict[str, tuple[str, Version]] = {  # class -> (value of -a, first version)
    row.partition("=")[2]: (row.partition("=")[0], since) for since, rows in LOADERS.items() for row in rows.split()
}
# Only where there is no config.json: part of the name -> value of -a.
ARCHITECTURE_NAMES = (("qwen3", "qwen3moe"), ("llama", "llama"), ("mistral", "mistral"))


@dataclass(frozen=True)
class ToolFormat:
    """One way in which models write tool calls: section 6 reads it, `write_calls` writes it.

    `sign`: the texts in a chat template that tell it, all of them. `call`: a call as the template writes it. {name} is the tool's,
    {number} counts the calls of the conversation, {id} is one of 9 characters, and the arguments are {arguments} (a JSON
    object), {json} (an object of name and arguments) or {parameters}, each of which is `parameter` with {key} and {value}.
    What is in parentheses is sometimes missing in what a model writes, what is in (?...) sometimes there, and white space may
    differ. `before`, `after`:
    around all calls of a turn; `between`: two of them. `inner`: the key of the arguments in {json}. `quote`: what stands
    around strings in place of the JSON quote."""

    name: str
    sign: str
    call: str
    parameter: str = ""
    before: str = ""
    after: str = ""
    between: str = ""
    inner: str = "arguments"
    quote: str = ""


# In the order in which their signs are looked for; one without a sign is only read. Source: the chat templates of the
# models named, rendered with one and with two calls, and the tests of the parsers in vLLM, SGLang and llama.cpp.
TOOL_FORMATS = (
    ToolFormat(
        "seed",  # Seed-OSS
        "<seed:tool_call>",
        "<seed:tool_call>\n<function={name}>\n{parameters}</function>\n(</seed:tool_call>)",
        "<parameter={key}>{value}</parameter>\n",
        between="\n",
    ),
    ToolFormat(
        "qwen3-coder",  # Qwen3-Coder, Qwen3.5, Nemotron-3, Step-3.5; the opener is often missing (llama.cpp#16755)
        "<parameter=",
        '(<tool_call>)\n<function=(?"){name}(?")>\n{parameters}</function>\n(</tool_call>)',
        "<parameter={key}>\n{value}\n</parameter>\n",
        between="\n",
    ),
    ToolFormat(
        "glm",  # GLM-4.5 and 4.6 as here, GLM-4.7 without line ends
        "<arg_key>",
        "<tool_call>{name}\n{parameters}</tool_call>",
        "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
        between="\n",
    ),
    ToolFormat(
        "minimax",  # MiniMax-M2
        "<minimax:tool_call>",
        '<invoke name="{name}">\n{parameters}</invoke>',
        '<parameter name="{key}">{value}</parameter>\n',
        before="<minimax:tool_call>\n",
        after="\n</minimax:tool_call>",
        between="\n",
    ),
    ToolFormat(
        "kimi",  # Kimi-K2
        "<|tool_call_argument_begin|>",
        "<|tool_call_begin|>(functions.){name}(:{number})(? )<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
    ),
    ToolFormat(
        "deepseek-v3.2",
        "｜DSML｜",
        '<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>',
        '<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>\n',
        before="<｜DSML｜function_calls>\n",
        after="\n</｜DSML｜function_calls>",
        between="\n",
    ),
    ToolFormat(
        "deepseek",  # DeepSeek V3, R1
        "<｜tool▁call▁begin｜> ```json",
        "<｜tool▁call▁begin｜>(function)<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        between="\n",
    ),
    ToolFormat(
        "deepseek-v3.1",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "harmony",  # gpt-oss
        "<|channel|>",
        "(<|start|>assistant) to=(functions.){name}<|channel|>(?analysis)(commentary) (?<|constrain|>)(json)<|message|>{arguments}"
        "<|call|>",
    ),
    ToolFormat(
        "harmony, channel first",
        "",
        "(<|start|>assistant)<|channel|>(?analysis)(commentary) to=(functions.){name} (<|constrain|>)(json)<|message|>{arguments}"
        "<|call|>",
    ),
    ToolFormat("gemma", "<|tool_call>", "<|tool_call>(?:)call:{name}{arguments}<tool_call|>", quote='<|"|>'),  # Gemma 4
    ToolFormat(
        "functiongemma",
        "<start_function_call>",
        "<start_function_call>call:{name}{arguments}<end_function_call>",
        quote="<escape>",
    ),
    ToolFormat("mistral-v11", "[CALL_ID]", "[TOOL_CALLS]{name}[CALL_ID]{id}([ARGS]){arguments}(?</s>)"),  # Small 3.2
    ToolFormat("mistral", "[ARGS]", "[TOOL_CALLS]{name}([ARGS]){arguments}(?</s>)"),  # Devstral, Ministral 3
    ToolFormat(
        "mistral-list", "[TOOL_CALLS]", "[TOOL_CALLS] ([){json}(])(?</s>)"
    ),  # 7B v0.3, Nemo, Large 2411, Small 3.1
    ToolFormat("llama-function", "<function=", "<function={name}>{arguments}</function>"),
    ToolFormat("llama", "<|python_tag|>", "<|python_tag|>{json}(?;)", inner="parameters"),  # Llama 3.1, 3.3
    ToolFormat("granite", "<|tool_call|>", "<|tool_call|>([){json}(])(?<|/tool_call|>)"),  # Granite 3, Phi-4-mini
    ToolFormat("hunyuan", "<tool_calls>", "<tool_calls>([){json}(])</tool_calls>"),
    ToolFormat(
        "hermes", "<tool_call>", "<tool_call>\n(?[){json}(?])\n</tool_call>", between="\n"
    ),  # Qwen2.5, Qwen3, Hermes
    ToolFormat("bare", '"parameters": ', "(?[){json}(?;)(?])", inner="parameters"),  # Llama 3.2
)


def write_calls(name: str, calls: Sequence[tuple[int, str, Json]]) -> str:
    """Calls of one turn, each (number, tool, arguments), as the row `name` of TOOL_FORMATS writes them. Pure."""
    row = next((row for row in TOOL_FORMATS if row.name == name), TOOL_FORMATS[-2])

    def filled(pattern: str, **fields: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], re.sub(r"\(\?[^()]*\)|[()]", "", pattern))

    def as_text(value: Any) -> str:
        return value if isinstance(value, str) else to_json(value)

    written = []
    for number, tool, arguments in calls:
        parameters = (
            filled(row.parameter, key=key, value=as_text(value), text=json.dumps(isinstance(value, str)))
            for key, value in arguments.items()
        )
        text = to_json(arguments)
        together = f'{{"name": {json.dumps(tool)}, "{row.inner}": {text}}}'
        fields = {"name": tool, "number": str(number), "id": f"call{number:05}", "arguments": text, "json": together}
        written.append(filled(row.call, **fields, parameters="".join(parameters) if row.parameter else ""))
    return row.before + row.between.join(written) + row.after


@dataclass(frozen=True)
class Dialect:
    """How a model wants its conversations. What is said by `SIGNS` is found in its chat template."""

    calls: str = ""  # the row of TOOL_FORMATS in which it writes calls
    hides_tools: bool = False
    hides_calls: bool = False
    thinking: str = ""  # the request field that switches thinking
    opens_thinking: bool = False
    alternates: bool = False
    no_system: bool = False
    short_ids: bool = False
    one_call: bool = False
    names_results: bool = False
    takes_text: bool = False
    wants_text: bool = False
    ties_results: bool = False
    writes_calls: bool = False  # calls in the history are written into the text, as the template would write them
    writes_results: bool = False  # and results, too: as text of the user


# A field of Dialect -> what shows it in a chat template. Source: the templates of the models named.
SIGNS = {
    "opens_thinking": r"<think>(\\n|\n)*['\"]\s*-?\}\}",  # the prompt ends with it: QwQ, R1, Qwen3-Thinking-2507
    "alternates": r"must alternate",  # raises: Mistral, Gemma 1 to 3
    "no_system": r"[Ss]ystem role not supported",  # raises: Gemma 1 and 2
    "short_ids": r"length *!= *9",  # raises: Mistral Nemo, Small 3.2
    "one_call": r"single tool-calls|tool_calls\[0\]",  # raises: Llama 3; shows only the first: gpt-oss
    "names_results": r"<\|tool_response>",  # Gemma 4 in mistral.rs
    "ties_results": r"previous assistant message with a tool call|<\|tool_response>",  # to calls: MiniMax, Gemma 4
    # Arguments as text, as mistral.rs before 0.9.0 hands them on, are printed as they are; others would quote them once
    # more (Qwen2.5, Llama 3, Mistral Nemo) or fail (Qwen3-Coder, GLM, MiniMax: `items`).
    "takes_text": r"arguments is string\s*-?%\}(?!\s*\{\{-?\s*raise)",
    # They are joined to text, so that objects fail: DeepSeek (which also wants no text beside calls), functionary.
    "wants_text": r"\+ *tool\w*(\['function'\]|\[\"function\"\]|\.function)(\['arguments'\]|\[\"arguments\"\]|\.arguments)",
}


def read_dialect(template: str) -> Dialect:
    """The dialect that a chat template shows. Pure."""
    if not template:
        return Dialect(takes_text=True)
    found = {name: re.search(sign, template) is not None for name, sign in SIGNS.items()}
    signs = ((row.name, row.sign.split()) for row in TOOL_FORMATS if row.sign)
    calls = next((name for name, texts in signs if all(text in template for text in texts)), "")
    switch = "enable_thinking" if "enable_thinking" in template else "reasoning_effort" * (calls == "harmony")
    hidden = {"hides_tools": "tools" not in template, "hides_calls": "tool_calls" not in template}
    return Dialect(calls=calls, thinking=switch, **hidden, **found)


def call_id(dialect: Dialect, identity: str, name: str, number: int) -> str:
    """The id of a call as the template wants it."""
    if dialect.calls == "kimi":
        return f"functions.{name}:{number}"
    return hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:9] if dialect.short_ids else identity


HubFiles = Mapping[str, tuple[int, str]]  # name -> (bytes, SHA-256, "" if the hub does not tell it)


@dataclass(frozen=True)
class Model:
    """A model as the engine is told of it.

    `path`: its folder; `arch`: the value of -a, "" where the engine detects it (for GGUF files, which always tell it:
    general.architecture); `context`: tokens, 0 if unknown; `since`: the first engine that loads it; `files`: the GGUF
    files in `path`; `hub`, `remote`: the repository and the files that must be downloaded first; `weights`: their bytes;
    `linear`: (numbers, bytes) of those that can be quantised while loading; `cache`: numbers that a token adds to the KV
    cache; `stored`: the kind of its numbers, in words; `mlx`: "shadow" (its config.json hides from mistral.rs that it is
    quantised) or "experts"; `flaws`: (what is wrong, what to do), found before anything is loaded."""

    path: str
    name: str
    arch: str = ""
    context: int = 0
    quantised: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    since: Version = (0, 0, 0)
    hub: str = ""
    remote: HubFiles = field(default_factory=dict)
    sees: bool = False
    dialect: Dialect = Dialect(takes_text=True)
    files: tuple[str, ...] = ()
    weights: int = 0
    linear: tuple[int, int] = (0, 0)
    cache: int = 0
    stored: str = ""
    mlx: str = ""
    flaws: tuple[tuple[str, str], ...] = ()

    @property
    def place(self) -> str:
        """Its folder or its file: what tells it from others."""
        return os.path.join(self.path, self.files[0]) if self.files else self.path

    @property
    def to_download(self) -> int:
        """The bytes of `remote`."""
        return sum(size for size, _ in self.remote.values())

    def size(self, isq: str, widened: int = 1) -> int:
        """The bytes of its weights in memory, when quantised to `isq` while loading. `widened`: how many times larger
        those become that are not quantised."""
        if self.quantised:
            return self.weights
        numbers, stored = self.linear
        bits = ISQ_BITS.get(isq.upper(), 0.0)
        plain = self.weights - stored if bits else self.weights
        return plain * widened + int(min(float(stored), numbers * bits / 8))


# --isq, with the bits for each number, scales included. Source: mistralrs-core/src/pipeline/isq.rs (v0.6.0 to v0.9.2), the
# block sizes of ggml, and AFQ's 32 bits of scale and bias for each 64 numbers.
_ISQ = """Q2K,2=2.625 Q3K,3=3.4375 Q4K,Q4_0,4=4.5 Q5K,Q5_0,5=5.5 Q6K,6=6.5625 Q8K=9.125 Q8_0,HQQ8,8=8.5 Q4_1=5 Q5_1=6 Q8_1=9
    HQQ4=4.5 FP8=8 MXFP4=4.25 AFQ2=2.5 AFQ3=3.5 AFQ4=4.5 AFQ6=6.5 AFQ8=8.5"""
ISQ_BITS = {name: float(bits) for names, bits in (row.split("=") for row in _ISQ.split()) for name in names.split(",")}
DOWNLOAD = (
    "Download it again, by its name on Hugging Face: anyclaude --model-path ORG/NAME\n"
    "or into the same folder, which goes on where it stopped: hf download ORG/NAME --local-dir {}"
)


# What config.json leaves out because the class has it as default. Source: transformers' configuration_gemma3.py.
CONFIG_DEFAULTS: dict[str, Json] = {
    "gemma3_text": {
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window_pattern": 6,
    }
}


def cache_numbers(config: Json) -> int:
    """How many numbers a token adds to the KV cache: keys and values of every layer whose attention looks back without
    limit; 0 if config.json does not say. Pure. Source: the caches in mistralrs-core/src/kv_cache at v0.6.0 to v0.9.2."""
    text = {**config, **as_object(config.get("text_config"))}
    config = {**CONFIG_DEFAULTS.get(str(text.get("model_type")), {}), **text}

    def number(*names: str) -> int:
        found = (config.get(name) for name in names)
        return next((value for value in found if type(value) is int and 0 < value < 1 << 24), 0)

    layers, heads = number("num_hidden_layers", "n_layers"), number("num_attention_heads")
    kinds = [str(kind) for kind in as_list(config.get("layer_types"))]
    if kinds:
        layers = sum("attention" in kind and not kind.startswith(("sliding", "linear")) for kind in kinds)
    else:
        layers //= number("sliding_window_pattern", "full_attention_interval") or 1  # Gemma 3, Qwen3-Next
    if number("kv_lora_rank"):  # DeepSeek: kept as they are, not compressed
        return layers * heads * (number("qk_nope_head_dim") + number("qk_rope_head_dim") + number("v_head_dim"))
    size = number("head_dim") or (number("hidden_size") // heads if heads else 0)
    return layers * 2 * (number("num_key_value_heads") or heads) * size


def inspect_model(
    path: str,
    config: Json | None,
    generation: Json,
    arch: str = "",
    template: str = "",
    tensors: Mapping[str, tuple[int, int]] | None = None,
) -> Model:
    """A model from its config.json (None: there is none), generation_config.json, chat template and tensors (name ->
    numbers, bytes). Pure.

    `arch` overrides the architecture. Raises AnyclaudeError for one that cannot be told, or that no engine loads."""
    name = Path(path).name
    since = (0, 0, 0)
    if config is None:
        arch = arch or next((value for part, value in ARCHITECTURE_NAMES if part in name.lower()), "")
        if not arch:
            message = f"{path} has no config.json, and its name does not tell the architecture."
            raise AnyclaudeError(message, "Name the folder that holds config.json, or the architecture: --arch qwen3")
    elif not arch:
        arch, since = _architecture(path, config.get("architectures"))
    config, tensors = config or {}, tensors or {}
    seers = {name for name, (value, _) in ARCHITECTURES.items() if not value and name != "Gemma3ForCausalLM"}
    configs = (config, as_object(config.get("text_config")))
    lengths = [part.get("max_position_embeddings") for part in configs]
    numbers = {key: value for key in SAMPLING if isinstance(value := generation.get(key), (int, float))}
    sampling = {key: value for key, value in numbers.items() if not isinstance(value, bool) and 0 <= value < 1e6}
    linear = [size for key, size in tensors.items() if _LINEAR.search(key)]
    mlx, flaws = _mlx(path, config, tensors)
    return Model(
        path,
        name,
        arch,
        context=next((length for length in lengths if type(length) is int and length > 0), 0),
        quantised=any(part.get("quantization_config") or part.get("quantization") for part in configs),
        sampling={"temperature": 0.0} if generation.get("do_sample") is False else sampling,
        since=since,
        sees=bool(config.get("vision_config") or "img_processor" in config)
        and not seers.isdisjoint(name for name in as_list(config.get("architectures")) if isinstance(name, str)),
        dialect=read_dialect(template),
        weights=sum(size for _, size in tensors.values()),
        linear=(sum(count for count, _ in linear), sum(size for _, size in linear)),
        cache=cache_numbers(config),
        stored=_stored(config),
        mlx=mlx,
        flaws=flaws,
    )


def _stored(config: Json) -> str:
    """The kind of numbers that a config.json tells of, in words."""
    text = {**as_object(config.get("text_config")), **config}
    quantisation = as_object(text.get("quantization")) or as_object(text.get("quantization_config"))
    bits, method = quantisation.get("bits"), str(quantisation.get("quant_method") or "MLX")
    if quantisation:
        return method.upper() + (f" {bits} bits" if type(bits) is int else "")
    kind = str(text.get("torch_dtype") or text.get("dtype") or "").rpartition("torch.")[2]
    return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(kind, kind)


_LINEAR = re.compile(r"\.experts\.|(_proj|_linear|lm_head|dense|fc\d|\.w\d)\.weight$")  # what --isq quantises


def _mlx(path: str, config: Json, tensors: Iterable[str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """How a model quantised for MLX is to be loaded, and what stands against it. mistral.rs reads `quantization_config`
    only, and there one width for all layers. Source: mistralrs-quant/src/lib.rs at v0.6.0 to v0.9.2."""
    quantisation = as_object(config.get("quantization"))
    if "bits" not in quantisation:
        return "", ()
    flaws = []
    layers = (value for value in quantisation.values() if isinstance(value, dict) and "bits" in value)
    others = any(layer.get(key) != quantisation.get(key) for layer in layers for key in ("bits", "group_size"))
    if others or False in quantisation.values() or quantisation.get("mode", "affine") != "affine":
        flaws.append((f"{path} is quantised for MLX in more than one way, and mistral.rs reads one.", ORIGINAL))
    if any(".switch_mlp." in name for name in tensors):
        return "experts", tuple(flaws)
    return ("" if config.get("quantization_config") else "shadow"), tuple(flaws)


MLX_EXPERTS_BEFORE = (0, 7, 0)  # from then on their router is read as if it were not quantised
ORIGINAL = (
    "Use the model's original (safetensors, quantised while loading), or a GGUF file of it,\n"
    "or serve it with MLX itself and use that server: --base-url http://localhost:8080/v1"
)


def _architecture(path: str, classes: Any) -> tuple[str, Version]:
    if not isinstance(classes, list) or len(classes) != 1 or not isinstance(classes[0], str):
        message = f'{path}/config.json must name one class in "architectures", and has {json.dumps(classes)}.'
        raise AnyclaudeError(message, "Name the architecture yourself: --arch qwen3")
    if classes[0] not in ARCHITECTURES:
        loaders = " ".join(sorted({loader for loader, _ in ARCHITECTURES.values() if loader}))
        fix = f"Choose another model: anyclaude models\nor, if you know better, name its loader, as --arch qwen3. There are:\n{loaders}"
        raise AnyclaudeError(f"{path} is a {classes[0]}, which mistral.rs does not load.", fix)
    return ARCHITECTURES[classes[0]]


def read_template(folder: Path) -> str:
    """The chat template of a model's folder; of several, the one for tools. "" if there is none."""
    found: Any = ""
    with contextlib.suppress(OSError, ValueError, RecursionError, StopIteration):
        if (folder / "chat_template.jinja").is_file():
            found = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        else:
            names = ("chat_template.json", "tokenizer_config.json")
            path = next(folder / name for name in names if (folder / name).is_file())
            found = as_object(json.loads(path.read_text(encoding="utf-8"))).get("chat_template")
    return as_template(found)


def as_template(found: Any) -> str:
    """The chat template in a value of that name; of several, the one for tools."""
    named = {str(row.get("name")): row.get("template") for row in map(as_object, as_list(found))}
    found = named.get("tool_use", named.get("default", "")) if named else found
    return found if isinstance(found, str) else ""


_NUMBER_SIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def read_tensors(path: Path) -> dict[str, tuple[int, int]]:
    """What a safetensors file says it holds: name -> (numbers, bytes). Raises ValueError for one that is not whole.
    Source: the format's description at huggingface/safetensors."""
    with path.open("rb") as file:
        begin = file.read(8)
        if begin.startswith(b"version "):
            raise ValueError("it is only a pointer of git-lfs (git lfs pull brings the file)")
        length = int.from_bytes(begin, "little")
        head: Json = {}
        with contextlib.suppress(ValueError, RecursionError):
            head = as_object(json.loads(file.read(min(length, 100 << 20)))) if len(begin) == 8 else {}
        found = {}
        for name, tensor in head.items():
            tensor = as_object(tensor)
            ends = [one for one in as_list(tensor.get("data_offsets")) if type(one) is int and 0 <= one < 1 << 50]
            if name != "__metadata__" and len(ends) == 2:
                size = max(0, ends[1] - ends[0])
                found[name] = (size // _NUMBER_SIZE.get(str(tensor.get("dtype")), 1), size)
        whole = 8 + length + sum(size for _, size in found.values())
        if not found or os.fstat(file.fileno()).st_size < whole:
            raise ValueError("it is not whole")
        return found


def _read_weights(folder: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """The tensors in a folder, and what is wrong with its weight files."""
    tensors: dict[str, tuple[int, int]] = {}
    problems = []
    index = folder / "model.safetensors.index.json"
    named = as_object(read_json(index).get("weight_map")).values() if index.is_file() else ()
    names = {name for name in named if isinstance(name, str)}
    files = {path.name: path for path in folder.glob("*.safetensors") if path.is_file()}
    for count, name in ((int(found[1]), name) for name in files if (found := re.search(r"-of-0*(\d+)\.", name))):
        names |= {re.sub(r"-\d+(-of-)", f"-{at:05}\\1", name) for at in range(1, min(count, 9999) + 1)}
    missing = sorted(names - set(files))
    if missing:
        problems.append(f"{len(missing)} of {len(names)} files are missing, {missing[0]} first")
    for name, path in sorted(files.items()):
        try:
            if not names or name in names:
                tensors.update(read_tensors(path))
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error.strerror if isinstance(error, OSError) else error}")
    if not files and not names:
        others = next((path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt")), "")
        problems.append(
            f"there is only {others}; *.safetensors are needed" if others else "there are none (*.safetensors)"
        )
    return tensors, problems


def _read_folder(folder: Path, arch: str, template: str) -> Model:
    config, generation = (
        read_json(folder / name) if (folder / name).is_file() else None
        for name in ("config.json", "generation_config.json")
    )
    tensors, problems = _read_weights(folder)
    template = template or read_template(folder)
    model = inspect_model(str(folder), config, generation or {}, arch, template, tensors)
    flaws = [*model.flaws]
    if problems:
        flaws.append((f"the weights in {folder} are {INCOMPLETE}: {'; '.join(problems[:3])}.", DOWNLOAD.format(folder)))
    if not (folder / "tokenizer.json").is_file():
        flaws.append((f"{folder} is {INCOMPLETE}: it has no tokenizer.json.", DOWNLOAD.format(folder)))
    if not template:
        flaws.append(
            (f"{folder} has no chat template: it is no model to talk with, or a file is missing.", NO_TEMPLATE)
        )
    return dataclasses.replace(model, flaws=tuple(flaws))


INCOMPLETE = "not complete"  # so begin the flaws that a download mends
NO_TEMPLATE = (
    "Choose the model's instruct variant, or put its chat_template.jinja into the folder,\n"
    'or name one: "extraArgs": ["--chat-template", "/path/to/chat_template.jinja"]'
)


def hub_home(environ: Mapping[str, str]) -> Path:
    """Hugging Face's own folder. Source: huggingface_hub's environment variables."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(environ.get("HF_HOME") or os.path.join(cache, "huggingface")))


def hub_folder(name: str, environ: Mapping[str, str]) -> Path:
    """Where the Hugging Face cache keeps the model `name` ("org/name")."""
    cache = Path(os.path.expanduser(environ.get("HF_HUB_CACHE") or hub_home(environ) / "hub"))
    return cache / ("models--" + name.replace("/", "--"))


def _hub_snapshot(name: str) -> Path | None:
    """The folder of a model in the Hugging Face cache, if it was ever begun to be downloaded."""
    folder = hub_folder(name, os.environ)
    with contextlib.suppress(OSError, ValueError):
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    return None


# general.architecture of a GGUF file -> first mistral.rs that loads it. Source: mistralrs-core/src/gguf/content.rs and
# docs/reference/gguf-support.md at v0.6.0 to v0.9.2.
GGUF_SINCE: dict[Version, str] = {
    (0, 6, 0): "llama phi2 phi3 starcoder2 qwen2 qwen3",
    (0, 7, 0): "qwen3moe",
    (0, 8, 0): "mistral3",
    (0, 9, 1): """gemma gemma2 phimoe qwen3next qwen35 qwen35moe deepseek2 glm4 glm4moe smollm3 granite granitemoe
        granitehybrid gpt-oss hunyuan-dense hunyuan-moe lfm2 lfm2moe gemma3""",
}
# Type of a tensor -> (bytes, numbers) of a block. Source: ggml's ggml-common.h. Others count as nothing.
GGML_SIZES = {0: (4, 1), 1: (2, 1), 2: (18, 32), 3: (20, 32), 6: (22, 32), 7: (24, 32), 8: (34, 32), 9: (36, 32)}
GGML_SIZES |= {
    10: (84, 256),
    11: (110, 256),
    12: (144, 256),
    13: (176, 256),
    14: (210, 256),
    15: (292, 256),
    30: (2, 1),
}
_GGUF_KIND = re.compile(r"(?i)[-._](I?Q\d\w*|MXFP4|BF16|F16|F32)(?=[-.])")  # in a file's name, as people name them
_LATER_PART = re.compile(r"-0*(?!0*1-)\d+-of-\d+\.gguf$")
_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def is_gguf_model(name: str) -> bool:
    """Whether a GGUF file is a model by its name: of one in parts the first, and no projector of images."""
    return not _LATER_PART.search(name) and "mmproj" not in name


def gguf_kind(name: str) -> str:
    """How a GGUF file is quantised, by its name."""
    found = _GGUF_KIND.search(name)
    return f"GGUF {found[1].upper()}" if found else "GGUF"


def read_metadata(path: Path) -> Json:
    """The metadata of a GGUF file; of its long arrays (the vocabulary) only their length. Raises AnyclaudeError.
    Source: ggml's description of the format, versions 2 and 3."""
    with path.open("rb") as file:

        def exactly(count: int) -> bytes:
            data = file.read(count) if count < 1 << 26 else b""
            if len(data) < count:
                raise ValueError("it is not whole")
            return data

        def number(code: str) -> Any:
            return struct.unpack("<" + code, exactly(struct.calcsize("<" + code)))[0]

        def value(kind: int) -> Any:
            if kind == 8:
                return exactly(number("Q")).decode("utf-8", "replace")
            if kind != 9:
                return number(_GGUF_NUMBERS[kind])
            inner, count = number("I"), number("Q")
            if count <= 1024:
                return [value(inner) for _ in range(count)]
            if inner in _GGUF_NUMBERS:
                file.seek(struct.calcsize(_GGUF_NUMBERS[inner]) * count, os.SEEK_CUR)
                return count
            for _ in range(count):
                exactly(number("Q")) if inner == 8 else value(inner)
            return count

        try:
            if exactly(4) != b"GGUF" or number("I") not in (2, 3):
                raise ValueError("it is no GGUF file of version 2 or 3")
            tensors, count = number("Q"), number("Q")
            found = {value(8): value(number("I")) for _ in range(count)}
            last = 0
            for _ in range(tensors):
                value(8)
                numbers = functools.reduce(operator.mul, [number("Q") for _ in range(number("I"))], 1)
                size, block = GGML_SIZES.get(number("I"), (0, 1))
                last = max(last, number("Q") + numbers // block * size)
            if os.fstat(file.fileno()).st_size < file.tell() + last:
                raise ValueError("it is not whole")
            return found
        except (OSError, ValueError, KeyError, OverflowError, RecursionError, struct.error) as error:
            message = f"{path} cannot be read: {error if isinstance(error, ValueError) else 'it is broken'}."
            raise AnyclaudeError(message, DOWNLOAD.format(path.parent)) from None


def inspect_gguf(path: str, metadata: Json, template: str = "") -> Model:
    """A model from the metadata of its GGUF file. Pure. Raises AnyclaudeError for one that no engine loads."""
    kind = str(metadata.get("general.architecture"))
    since = next((version for version, kinds in GGUF_SINCE.items() if kind in kinds.split()), None)
    if since is None:
        message = f"{path} is a GGUF file of the architecture {kind}, which mistral.rs does not load."
        raise AnyclaudeError(message, "Use the model's safetensors folder, or choose another model.")
    own = {name.partition(".")[2]: value for name, value in metadata.items() if name.startswith(kind + ".")}

    heads = own.get("attention.head_count_kv")
    each = [
        one for one in as_list(heads) if type(one) is int and one > 0
    ]  # one a layer; none in those without attention
    config = {
        "num_hidden_layers": len(each) or own.get("block_count"),
        "num_attention_heads": max(as_list(own.get("attention.head_count")) or [own.get("attention.head_count")]),
        "num_key_value_heads": max(each, default=heads),
        "head_dim": own.get("attention.key_length"),
        "hidden_size": own.get("embedding_length"),
        "full_attention_interval": own.get("full_attention_interval"),
        "sliding_window_pattern": 6 if kind == "gemma3" else None,
    }
    context = own.get("context_length")
    found = template or metadata.get("tokenizer.chat_template")
    flaws = () if isinstance(found, str) and found else ((f"{path} has no chat template.", NO_TEMPLATE),)
    return Model(
        os.path.dirname(path),
        re.sub(r"(-0*1-of-\d+)?\.gguf$", "", os.path.basename(path)),
        kind,
        context=context if type(context) is int and context > 0 else 0,
        quantised=True,
        since=since,
        dialect=read_dialect(found if isinstance(found, str) else ""),
        files=(os.path.basename(path),),
        cache=cache_numbers(config),
        stored=gguf_kind(path),
        flaws=flaws,
    )


def _read_gguf(path: Path, template: str) -> Model:
    model = inspect_gguf(str(path), read_metadata(path), template)
    part = re.search(r"^(.*-)(\d+)(-of-)(\d+)(\.gguf)$", path.name, re.IGNORECASE)
    count, width = (min(int(part[4]), 9999), len(part[4])) if part else (1, 0)
    names = (
        [f"{part[1]}{at:0{width}}{part[3]}{part[4]}{part[5]}" for at in range(1, count + 1)] if part else [path.name]
    )
    missing = [name for name in names if not (path.parent / name).exists()]
    flaws = [*model.flaws]
    if missing:
        message = f"{path} is {INCOMPLETE}: {len(missing)} of its {count} files are missing, {missing[0]} first."
        flaws.append((message, DOWNLOAD.format(path.parent)))
    for name in names[1:]:
        if name not in missing:
            read_metadata(path.parent / name)  # it tells of one that is not whole
    weights = sum((path.parent / name).stat().st_size for name in names if name not in missing)
    return dataclasses.replace(model, files=tuple(names), weights=weights, flaws=tuple(flaws))


HUB = "https://huggingface.co"
HUB_SECONDS = 20.0  # without a byte
HUB_TRIES = 5  # in a row, without a byte between them
HUB_WEIGHTS = re.compile(r"(?!consolidated)[^/]+\.safetensors")  # consolidated: the same in Mistral's own format
HUB_SMALL = re.compile(r"[^/]+\.(json|jinja|txt|model)")


class _HubRedirects(urllib.request.HTTPRedirectHandler):
    """The token goes where the hub itself redirects to, and to no other host."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # known from Python 3.11 on

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, 302 if code == 308 else code, msg, headers, newurl)
        if request and urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


def _name_in(path: str) -> str:
    """The model ("org/name") in a path of the hub."""
    return "/".join(path.partition("?")[0].replace("api/models/", "").split("/")[:2])


def open_hub(path: str, begin: int = 0) -> Any:
    """A response of the Hugging Face hub, from byte `begin` on. Raises AnyclaudeError where trying again does not help, and
    OSError. Source: the hub's API, /api/models/NAME?blobs=true and /NAME/resolve/main/FILE, and huggingface_hub."""
    host = os.environ.get("HF_ENDPOINT") or HUB
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise AnyclaudeError("HF_HUB_OFFLINE is set, and this model is not on this disk.", "unset HF_HUB_OFFLINE")
    request = urllib.request.Request(f"{host}/{urllib.parse.quote(path, safe='/?=')}")
    kept = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or hub_home(os.environ) / "token"))
    token = os.environ.get("HF_TOKEN") or (kept.read_text(errors="replace") if kept.is_file() else "")
    if re.fullmatch(r"[!-~]+", token := token.strip()):
        request.add_header("Authorization", f"Bearer {token}")
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    name = _name_in(path)
    try:
        return urllib.request.build_opener(_HubRedirects).open(request, timeout=HUB_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            terms = f"Correct the name; or, if it wants a licence accepted or a token: {host}/{name}"
            fix = f"{terms}\nthen: HF_TOKEN=hf_... anyclaude --model-path {name}"
            why = f"Hugging Face has no such model or does not give it to everybody (HTTP {error.code})"
            message = f"{name} is no folder here, and {why}."
            raise AnyclaudeError(message, fix) from None
        raise


def ask_hub(path: str) -> str:
    """A small file of the hub. Raises AnyclaudeError."""
    name = _name_in(path)
    host = os.environ.get("HF_ENDPOINT") or HUB
    try:
        with open_hub(path) as reply:
            return str(reply.read(16 << 20).decode("utf-8", "replace"))
    except (OSError, ValueError, http.client.HTTPException) as error:
        message = f"{name} is to be downloaded, and {host} cannot be reached: {getattr(error, 'reason', error)}."
        raise AnyclaudeError(message, "Check the connection, or choose one that is here: anyclaude init") from None


def _object_of_hub(path: str) -> Json:
    """A JSON object of the hub; empty if it is none. Raises AnyclaudeError."""
    text = ask_hub(path)
    with contextlib.suppress(ValueError, RecursionError):
        return as_object(json.loads(text))
    return {}


def hub_files(name: str) -> HubFiles:
    """The files of a model on Hugging Face. Raises AnyclaudeError."""
    found: dict[str, tuple[int, str]] = {}
    for one in map(as_object, as_list(_object_of_hub(f"api/models/{name}?blobs=true").get("siblings"))):
        file, size, digest = str(one.get("rfilename")), one.get("size"), as_object(one.get("lfs")).get("sha256")
        stays = re.fullmatch(r"\w[\w.+ -]{0,199}(/\w[\w.+ -]{0,199})*", file)  # in the model's folder
        if type(size) is int and 0 <= size < 1 << 50 and stays and not file.endswith(".part"):
            found[file] = (size, str(digest or ""))
    return found


def hub_place(name: str) -> Path:
    """Where a model is downloaded to."""
    return Path.home() / "models" / name


def _hub_gguf(name: str, file: str, files: HubFiles) -> Model:
    """A GGUF file of the repository `name`, with its other parts if it is in parts; `file`: "" for the only one."""
    firsts = [one for one in files if one.endswith(".gguf") and is_gguf_model(one)]
    chosen = [one for one in firsts if one == file] if file else firsts
    if len(chosen) != 1:
        listed = "".join(f"\n  --model-path {name}/{one}   ({gigabytes(files[one][0])})" for one in firsts[:30])
        message = f"{name} has no {file}." if file else f"{name} holds {len(firsts)} GGUF models."
        raise AnyclaudeError(message, f"Name one of them:{listed}")
    whole = re.sub(r"-\d+(-of-)", r"\1", chosen[0])
    parts = sorted(one for one in files if re.sub(r"-\d+(-of-)", r"\1", one) == whole)
    known = KNOWN_MODELS.get(f"{name}/{chosen[0]}", Model("", "", stored=gguf_kind(chosen[0])))
    return dataclasses.replace(
        known,
        path=str((hub_place(name) / chosen[0]).parent),
        name=Path(chosen[0]).stem,
        quantised=True,
        files=tuple(map(os.path.basename, parts)),
        weights=sum(files[one][0] for one in parts),
        hub=name,
        remote={one: files[one] for one in parts},
    )


def hub_model(path: str, arch: str, template: str) -> Model:
    """A model on Hugging Face ("org/name" or "org/name/file.gguf"), as far as its small files tell before it is downloaded.
    Raises AnyclaudeError for what no download would make loadable."""
    name, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    files = hub_files(name)
    if file or not any(map(HUB_WEIGHTS.fullmatch, files)) and any(one.endswith(".gguf") for one in files):
        return _hub_gguf(name, file, files)

    def content(file: str) -> Json:
        return _object_of_hub(f"{name}/resolve/main/{file}") if file in files else {}

    config = content("config.json")
    if not config or not any(map(HUB_WEIGHTS.fullmatch, files)):
        lacks = "config.json" if not config else "*.safetensors"
        raise AnyclaudeError(
            f"{name} on Hugging Face is no model that can be used: it has no {lacks}.", "Choose another."
        )
    own = ask_hub(f"{name}/resolve/main/chat_template.jinja") if "chat_template.jinja" in files else ""
    own = own or as_template(content("tokenizer_config.json").get("chat_template"))
    wanted = {one: files[one] for one in files if HUB_WEIGHTS.fullmatch(one) or HUB_SMALL.fullmatch(one)}
    total = sum(size for one, (size, _) in wanted.items() if HUB_WEIGHTS.fullmatch(one))
    kept = [config.get(key) for key in ("vocab_size", "hidden_size")]
    embeddings = min(total, 2 * math.prod(one for one in kept if type(one) is int and 0 < one < 1 << 24))
    rest = total - embeddings  # of which 16 bits a number is what nearly all are stored in
    tensors = {"embed": (embeddings // 2, embeddings), "all_proj.weight": (rest // 2, rest)}
    place = str(hub_place(name))
    model = inspect_model(place, config, content("generation_config.json"), arch, template or own, tensors)
    flaws = [*model.flaws, *([] if template or own else [(f"{name} has no chat template.", NO_TEMPLATE)])]
    return dataclasses.replace(model, hub=name, remote=wanted, flaws=tuple(flaws))


class _Progress:
    """How far a download is. `done`: bytes of `total` that are here."""

    def __init__(self, total: int, done: int) -> None:
        self.done, self._total, self._first = done, total, done
        self._began = self._shown = time.monotonic()

    def show(self, more: int) -> None:
        """`more` bytes came."""
        self.done, now = self.done + more, time.monotonic()
        if now - self._shown < 0.1 and self.done < self._total:
            return
        self._shown, rate = now, max(1.0, (self.done - self._first) / max(0.5, now - self._began))
        parts = (
            f"download: {self.done * 100 // max(1, self._total)} %",
            f"{gigabytes(self.done)} of {gigabytes(self._total)}",
            f"{rate / 1e6:.1f} MB/s",
            f"{duration((self._total - self.done) / rate)} left",
        )
        TERMINAL.waiting(", ".join(parts))


def fetch_model(model: Model) -> None:
    """Download a model's files to where it says it is; what is there already stays. Raises AnyclaudeError."""
    place = hub_place(model.hub)
    parts = {name: (place / name, place / f"{name}.part") for name in model.remote}
    total = model.to_download
    try:
        for path, _ in parts.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        have = sum(one.stat().st_size for pair in parts.values() for one in pair if one.is_file())
        free = shutil.disk_usage(place).free
        if free < total - have + (1 << 30):
            message = f"{model.name} takes {gigabytes(total - have)} more on the disk, and {gigabytes(free)} are free in {place}."
            raise AnyclaudeError(message, "Make room, or choose a smaller model: anyclaude models")
        say(f"downloading {model.name}: {gigabytes(total)} from Hugging Face to {place}")
        progress = _Progress(total, have)
        with contextlib.closing(os.fdopen(lock(place / ".downloading", fcntl.LOCK_EX | fcntl.LOCK_NB))):
            for name, (path, part) in parts.items():
                size, digest = model.remote[name]
                if not (path.is_file() and path.stat().st_size == size):
                    _fetch_file(f"{model.hub}/resolve/main/{name}", part, size, digest, progress)
                    os.replace(part, path)
            for stray in place.glob("*.part") if not model.files else ():  # of files that it has no more
                stray.unlink()
            (place / ".downloading").unlink(missing_ok=True)
    except BlockingIOError:
        raise AnyclaudeError(
            f"another session downloads {model.name}.", "Wait until it is done, then start again."
        ) from None
    except OSError as error:
        raise AnyclaudeError(
            f"{place}: {error.strerror or error}.", "Mend that, and start again: what came stays."
        ) from None
    except KeyboardInterrupt:
        raise AnyclaudeError("the download was stopped; what came stays.", "To go on: the same command again") from None
    finally:
        TERMINAL.waiting("")


class _BrokeOff(Exception):
    """The network ended a download, and not the disk."""


def _opened(path: str, begin: int) -> Any:
    """A response of the hub. Raises _BrokeOff for what the network does, and HTTPError."""
    try:
        return open_hub(path, begin)
    except urllib.error.HTTPError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _BrokeOff(getattr(error, "reason", error)) from None


def _read_some(reply: Any, most: int) -> bytes:
    """The next bytes, at most so many; none at the end. Raises _BrokeOff."""
    try:
        return bytes(reply.read(min(1 << 18, most)))
    except (OSError, http.client.HTTPException) as error:
        raise _BrokeOff(getattr(error, "strerror", None) or error) from None


def _fetch_file(path: str, part: Path, size: int, digest: str, progress: _Progress) -> None:
    """One file of the hub, from where an earlier try ended. Raises AnyclaudeError and OSError of the disk."""
    failed = 0
    with part.open("ab+") as file:
        while (have := file.seek(0, os.SEEK_END)) < size:
            pause, trouble = 0.5 * 2**failed if failed else 0.0, "it ended too soon"
            try:
                with _opened(path, have) as reply:
                    if have and reply.status != 206:  # it begins anew
                        progress.done -= have
                        file.truncate(0)
                    while data := _read_some(reply, size - file.seek(0, os.SEEK_END)):
                        file.write(data)
                        progress.show(len(data))
            except _BrokeOff as error:
                trouble = str(error)
            except urllib.error.HTTPError as error:
                if error.code == 416:  # what is here is no beginning of it
                    progress.done -= have
                    file.truncate(0)
                trouble, told = str(error), str(error.headers.get("Retry-After"))
                pause = min(300.0, float(told)) if told.isdecimal() else pause
            failed = 0 if file.seek(0, os.SEEK_END) > have else failed + 1
            if failed >= HUB_TRIES:
                message = f"the download broke off {HUB_TRIES} times: {trouble}."
                raise AnyclaudeError(message, "Check the connection, and start again: it goes on where it stopped.")
            if file.tell() < size:
                time.sleep(pause)
        file.seek(0)
        check = hashlib.sha256()
        while digest and (data := file.read(1 << 20)):
            check.update(data)
            TERMINAL.waiting(f"checking {part.stem}")
        if file.seek(0, os.SEEK_END) != size or (digest and check.hexdigest() != digest):
            file.truncate(0)
            message = f"{path} did not come as Hugging Face has it (its SHA-256 or its size differs)."
            raise AnyclaudeError(message, "Start again: that file is downloaded anew.")


def gguf_models(folder: Path) -> list[Path]:
    """The GGUF models in a folder; what is none by its name only if there is nothing else."""
    ggufs = sorted(one for one in folder.glob("*.gguf") if one.is_file())
    return [one for one in ggufs if is_gguf_model(one.name)] or ggufs


def read_model(path: str, arch: str = "", template: str = "") -> Model:
    """Read what `path` (a folder, a GGUF file, or a Hugging Face id) holds. `template`: one that stands for its own.
    Raises AnyclaudeError for what cannot be a model."""
    folder = Path(path)
    if not folder.is_absolute():  # a Hugging Face id
        name, file = "/".join(folder.parts[:2]), "/".join(folder.parts[2:])
        for place in filter(None, (hub_place(name), _hub_snapshot(name))):
            if not (place / (file or "config.json")).exists() and (file or not any(_models_below(place, 1))):
                continue
            if (place / f"{file}.part").exists() if file else any(place.glob("*.part")):
                continue  # its download goes on
            model = read_model(str(place / file), arch, template)
            if not any(INCOMPLETE in message for message, _ in model.flaws):  # used as it lies, without the network
                return model if file else dataclasses.replace(model, name=model.name if model.files else folder.name)
        return hub_model(path, arch, template)
    if not (folder.is_dir() or (folder.is_file() and folder.suffix.lower() == ".gguf")):
        what = "is neither a folder nor a .gguf file" if folder.exists() else "does not exist"
        raise AnyclaudeError(
            f"the model {path} {what}.", "Name the model's folder, or its .gguf file: --model-path /path/to/it"
        )
    if folder.is_file():
        return _read_gguf(folder, template)
    has_weights = any(folder.glob("*.safetensors"))
    is_model = has_weights or (folder / "config.json").is_file()
    found = [] if has_weights else gguf_models(folder) or ([] if is_model else [*_models_below(folder, 2)])
    found = [*{os.path.realpath(one): one for one in found}.values()]
    if len(found) > 1:
        listed = "".join(f"\n  --model-path {shlex.quote(str(one))}" for one in found[:20])
        raise AnyclaudeError(f"{path} holds {len(found)} models.", f"Name one of them:{listed}")
    return read_model(str(found[0]), arch, template) if found else _read_folder(folder, arch, template)


# Models worth downloading, that call tools well: file -> bytes, tokens of context, numbers that a token adds to the cache,
# GGUF architecture. All load in TESTED_TAG. Source: the files' metadata and sizes as published with them.
_KNOWN = """
    unsloth/Qwen3-4B-Instruct-2507-GGUF/Qwen3-4B-Instruct-2507-Q4_K_M.gguf 2497281120 262144 73728 qwen3
    Qwen/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf 5027783488 40960 73728 qwen3
    unsloth/Qwen3.5-9B-GGUF/Qwen3.5-9B-Q4_K_M.gguf 5680522464 262144 16384 qwen35
    Qwen/Qwen3-14B-GGUF/Qwen3-14B-Q4_K_M.gguf 9001752960 40960 81920 qwen3
    unsloth/gpt-oss-20b-GGUF/gpt-oss-20b-Q4_K_M.gguf 11624759488 131072 24576 gpt-oss
    unsloth/Qwen3.6-27B-GGUF/Qwen3.6-27B-Q4_K_M.gguf 16817244384 262144 32768 qwen35
    unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF/Qwen3-Coder-30B-A3B-Instruct-Q4_K_M.gguf 18556689568 262144 49152 qwen3moe
"""


def known_model(path: str, size: str, context: str, cache: str, kind: str) -> Model:
    """A row of _KNOWN."""
    since = next(version for version, kinds in GGUF_SINCE.items() if kind in kinds.split())
    model = Model(path, Path(path).stem, kind, int(context), quantised=True, files=(os.path.basename(path),))
    return dataclasses.replace(model, cache=int(cache), weights=int(size), since=since, stored=gguf_kind(path))


KNOWN_MODELS = {row.split()[0]: known_model(*row.split()) for row in _KNOWN.strip().split("\n")}

# Where programs and people keep models: a folder -> how many folders there may be between it and a model. Source: the
# documentation of LM Studio, of llama.cpp (before 2026; now it is Hugging Face's cache) and of Jan.
MODEL_FOLDERS = {
    "~/models": 2,
    "~/Models": 2,
    "~/.lmstudio/models": 2,
    "~/.cache/lm-studio/models": 2,
    "~/.cache/llama.cpp": 0,
    "~/Library/Caches/llama.cpp": 0,
    "~/.local/share/Jan/data/llamacpp/models": 1,
    "~/Library/Application Support/Jan/data/llamacpp/models": 1,
}
LM_STUDIO_SETTINGS = ("~/.lmstudio/settings.json", "~/.cache/lm-studio/settings.json")  # "downloadsFolder" is elsewhere


def _models_below(folder: Path, depth: int) -> Iterator[Path]:
    """The folders and the GGUF files that could be models."""
    with contextlib.suppress(OSError):
        yield from (one for one in gguf_models(folder) if is_gguf_model(one.name))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            yield folder
        elif depth >= 0:
            inner = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
            for one in inner:
                yield from _models_below(one, depth - 1)


def models_on_disk(environ: Mapping[str, str]) -> list[str]:
    """The models in the Hugging Face cache and in MODEL_FOLDERS, each as --model-path takes it, none twice."""
    found: dict[str, str] = {}
    cache = hub_folder("", environ).parent
    for folder in sorted(cache.glob("models--*--*")) if os.access(cache, os.R_OK | os.X_OK) else ():
        name = folder.name[len("models--") :].replace("--", "/", 1)
        snapshot = _hub_snapshot(name)
        for path in _models_below(snapshot, 0) if snapshot else ():
            found.setdefault(os.path.realpath(path), name if path == snapshot else str(path))
    folders = dict(MODEL_FOLDERS)
    for settings in LM_STUDIO_SETTINGS:
        with contextlib.suppress(AnyclaudeError):
            named = read_json(Path(os.path.expanduser(settings))).get("downloadsFolder")
            folders[str(named) if named and _is_text(named) else "~/models"] = 2
    for place, depth in folders.items():
        for path in _models_below(Path(os.path.expanduser(place)), depth):
            found.setdefault(os.path.realpath(path), str(path))
    return list(found.values())


# === 4 Engine =================================================================================
# Rule: the engine is started by argument list, on the loopback, with a parent of its own that stops it when the last
# session is gone; HTTP decides whether it is ready, its log explains why not.


@dataclass(frozen=True)
class Generation:
    """How one generation of mistral.rs is called. `text`, `auto`, `gguf`: its subcommands for a named architecture, for
    automatic loading and for GGUF files (with what comes before -m); `isq_behind`: --isq and what the cache is told belong
    behind the subcommand (in front of it, they are dropped); `joint`: between GGUF files; `paged_off`, `paged_tokens`: the
    flags of paged attention; `package`: what cargo builds it from."""

    program: str
    front: tuple[str, ...]
    host: str
    text: str
    auto: str
    gguf: tuple[str, ...]
    isq_behind: bool
    joint: str
    paged_off: tuple[str, ...]
    paged_tokens: str
    package: str


# Newest first. Source: mistralrs-cli/src/args/ at v0.7.0, v0.8.0 and v0.9.2; mistralrs-server/src/main.rs and
# mistralrs-core/src/model_selected.rs at v0.6.0 and v0.7.0; the --help texts of 0.7.0, 0.8.1 and 0.9.2.
GENERATIONS = (
    Generation(
        "mistralrs",
        ("serve",),
        "--host",
        "text",
        "auto",
        ("text", "--format", "gguf"),
        isq_behind=True,
        joint=";",
        paged_off=("--paged-attn", "off"),
        paged_tokens="--pa-context-len",
        package="mistralrs-cli",
    ),
    Generation(
        "mistralrs-server",
        (),
        "--serve-ip",
        "plain",
        "run",
        ("gguf",),
        isq_behind=False,
        joint=" ",
        paged_off=("--no-paged-attn",),
        paged_tokens="--pa-ctxt-len",
        package="mistralrs-server",
    ),
)
# What the chat endpoint can, and since when. Source: mistralrs-server-core/src and mistralrs-core/src/engine at v0.6.0,
# v0.7.0, v0.8.0 and v0.9.2.
SINCE: dict[str, Version] = {
    "calls in the history": (0, 7, 0),
    "images": (0, 7, 0),
    "thinking apart from text": (0, 7, 0),
    "forced calls": (0, 8, 4),
    "counts tokens": (0, 8, 4),
    "arguments as objects": (0, 9, 0),
    "reuses prompts with paged attention": (0, 7, 0),
}
# What the engine's log says when it fails -> what to do. Source: mistral.rs at v0.6.0 to v0.9.2, and runs of 0.8.1 and 0.9.5.
LOG_HINTS = (
    (r"Address already in use", "Another program took the port. Choose another: --engine-port 8082"),
    (
        (
            r"does not fit on the devices|[Oo]ut ?[_Oo][Ff]_? ?[Mm]emory|OUT_OF_MEMORY|Num GPU blocks is 0|No more devices to map"
            r"|Failed to allocate|Insufficient Memory"
        ),
        "Quantise it harder (--isq Q3K), or choose a smaller model.",
    ),
    (r"Unknown architecture", "Correct --arch, or leave it out."),
    (r"Unsupported Hugging Face", "Update mistral.rs, or choose another model."),
    (r"tokenizer\.json.{0,60}not found", "The model folder has no tokenizer.json: download the model again."),
    (r"Expected file with extension one of", "The model folder has no weights: download the model again."),
    (r"outside file length|failed to fill whole buffer", "The model's file is not whole: download it again."),
    (
        r"Unknown GGUF architecture|[Uu]nsupported architecture",
        "Update mistral.rs (anyclaude build), or choose another model.",
    ),
    (r"shape mismatch for", "The weights do not fit config.json, as with models quantised for MLX: use the original."),
    (r"missing field `", "config.json is incomplete: download the model again, or update mistral.rs."),
    (
        r"[Dd]ns [Ff]ailed|failed to lookup address|Failed to access|Could not get directory listing|HF_HUB_OFFLINE",
        "Hugging Face cannot be reached. Check the connection, or download the model elsewhere and name its folder.",
    ),
    (r"HTTP 40[13]|status code 40[13]", "Hugging Face wants a token for this model: hf auth login"),
    (r"ISQ type .* unknown|invalid value '.*' for '--isq", "Choose a quantisation that the engine knows: --isq Q4K"),
    (r"unexpected argument '", "This engine has no such option: correct extraArgs in ~/.anyclauderc.json."),
)
BACKTRACE = re.compile(r"\s*(Stack backtrace|stack backtrace|\d+: |at \S*/|note: run with)")
READY_LINE = re.compile(r"(OpenAI-compatible server|Server) listening on http://")
SUPERVISE = "--supervise-engine"  # internal: the command line of the engine's parent


@dataclass(frozen=True)
class Engine:
    """A mistral.rs program on this machine. `help`, `model_help`: the --help texts of the server and of its subcommand
    for text models."""

    program: Path
    generation: Generation
    version: Version
    model_help: str = ""
    help: str = ""

    def __str__(self) -> str:
        return f"{self.generation.program} {dotted(self.version)} ({self.program})"


def dotted(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def version_in(text: str) -> Version:
    """The first version in `text`."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def lists(help_text: str, flag: str) -> bool:
    """Whether a --help text lists `flag`."""
    return re.search(rf"(?m)(^|[\s,]){re.escape(flag)}(?![\w-])", help_text) is not None


@dataclass(frozen=True)
class Machine:
    """`accelerator`: "metal", "cuda" or "" (the processor); `memory`: bytes that the engine may have, by `source`."""

    accelerator: str = ""
    memory: int = 0
    source: str = ""


def read_machine(limit: int = 0) -> Machine:
    """Ask the system. `limit`: the user's own figure, in MB, in place of what was found."""

    def number(*command: str) -> int:
        return sum(int(line) for line in output_of(*command).split("\n") if line.strip().isdigit())

    if sys.platform == "darwin" and os.uname().machine == "arm64":
        total, wired = number("sysctl", "-n", "hw.memsize"), number("sysctl", "-n", "iogpu.wired_limit_mb") << 20
        # what macOS lets a GPU wire. Source: mistralrs-core/src/utils/memory_usage.rs at v0.7.0 to v0.9.2
        usable, source = (
            wired or (total * 2 // 3 if total <= 36 << 30 else total * 3 // 4),
            "what macOS gives to the GPU",
        )
        accelerator = "metal"
    else:
        gpus = number("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits") << 20
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError, ValueError):  # of a container; "max" is no limit
            total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        usable, source, accelerator = total - max(2 << 30, total // 10), "this machine's, less a tenth", ""
        if gpus:
            usable, source, accelerator = gpus * 9 // 10, "the GPU's, less a tenth", "cuda"
    return Machine(accelerator, *((limit << 20, "memoryLimit") if limit else (max(0, usable), source)))


@dataclass(frozen=True)
class Fit:
    """How a model is laid into memory. `window`: tokens, 0 if unknown; `cached`: how many earlier sequences stay cached,
    0 for the engine's own choice; `weights`, `token`: bytes, of the model and of a token's share of the cache."""

    window: int = 0
    cached: int = 0
    weights: int = 0
    token: int = 0


CACHED_SEQUENCES = 16  # the engines' own default of --prefix-cache-n
SMALLEST_WINDOW = 4096  # tokens
LEAN_WINDOW = 65536  # below it the client's whole tool set takes too much of the window


def _with_room(weights: int) -> int:
    """Bytes of weights, and of what else an engine needs to compute with them."""
    return weights + max(256 << 20, weights // 20)


def fit(model: Model, machine: Machine, isq: str, wanted: int = 0, widened: int = 1) -> Fit:
    """The largest window whose cache fits beside the weights: that of the running sequence, and those of the sequences
    that stay cached. Pure. `wanted`: the user's own window, which is not questioned. Raises AnyclaudeError, with the
    figures, for a model that cannot fit."""
    weights, token = model.size(isq, widened), model.cache * 2  # 16 bits a number, as the engine keeps them everywhere
    wanted = min(wanted, model.context or wanted)
    limit = wanted or model.context
    if not weights or not machine.memory or (not token and _with_room(weights) < machine.memory):
        return Fit(limit, 0, weights, token)
    tokens = max(0, machine.memory - _with_room(weights)) // token if token else 0
    if tokens < 2 * min(SMALLEST_WINDOW, limit or SMALLEST_WINDOW):
        least = 2 * SMALLEST_WINDOW * token
        needs = {name: _with_room(model.size(name, widened)) + least for name in (isq, "Q4K", "Q3K", "Q2K")}
        smaller = [name for name, size in needs.items() if size < machine.memory]
        harder = (
            f"Quantise it harder (--isq {smaller[0]}: {gigabytes(needs[smaller[0]])}), or choose"
            if smaller
            else "Choose"
        )
        more = "raise it" if machine.source == "memoryLimit" else 'set "memoryLimit" (in MB)'
        wired = (
            "\nor let macOS give the GPU more of it: sudo sysctl iogpu.wired_limit_mb=MB"
            if "macOS" in machine.source
            else ""
        )
        raise AnyclaudeError(
            f"{model.name} does not fit: its weights take {gigabytes(weights)}, with the least of a context window "
            f"{gigabytes(needs[isq])}, and the engine may have {gigabytes(machine.memory)} ({machine.source}).",
            f"{harder} a smaller model. If there is more memory than that: {more} in the backend in ~/{SETTINGS_FILE}{wired}",
        )
    share = (
        tokens // 3 if tokens // 3 >= LEAN_WINDOW else tokens // 2
    )  # two cached sequences, or one: the main session's
    window = wanted or min(limit or share, share)
    window = window if window < 2048 or window == limit else window // 1024 * 1024
    return Fit(window, max(1, min(CACHED_SEQUENCES, tokens // window - 1)), weights, token)


def command_line(
    engine: Engine,
    model: Model,
    port: int,
    isq: str = "",
    extra: Sequence[str] = (),
    plan: Fit = Fit(),
    accelerator: str = "",
) -> list[str]:
    """The argument list that serves `model` on the loopback. Pure. An `extra` flag that the model subcommand lists
    goes behind it, any other in front; what only helps is passed if the engine lists it."""
    generation = engine.generation
    front = ["--port", str(port), generation.host, LOOPBACK, "--token-source", "none"]
    if plan.cached and lists(engine.help, "--prefix-cache-n"):
        front += ["--prefix-cache-n", str(plan.cached)]
    behind = [generation.text if model.arch else generation.auto, "-m", model.path]
    if model.files:
        behind = [*generation.gguf, "-m", model.path, "-f", generation.joint.join(model.files)]
    elif model.arch:
        behind += ["-a", model.arch]
    place = behind if generation.isq_behind else front
    if isq and isq.lower() != "none" and not model.quantised:
        place.extend(["--isq", isq])
    if accelerator == "cuda":  # elsewhere it is off, and what is reused then is more
        tokens = [generation.paged_tokens, str(plan.window * (1 + plan.cached))]
        reuses = engine.version >= SINCE["reuses prompts with paged attention"]
        flags = (tokens if plan.cached else []) if reuses else list(generation.paged_off)
        place.extend(flags if flags and lists(engine.model_help + engine.help, flags[0]) else [])
    place = front
    for argument in extra:
        if argument.startswith("-"):
            place = behind if lists(engine.model_help, argument.partition("=")[0]) else front
        place.append(argument)
    return [str(engine.program), *generation.front, *front, *behind]


def shadow_folder(model: Model) -> str:
    """Where a model quantised for MLX lies as mistral.rs reads it; any other is where it is."""
    name = f"{Path(model.path).name}-{hashlib.sha256(os.fsencode(model.path)).hexdigest()[:8]}"
    return str(state_path("cache", "models", name)) if model.mlx == "shadow" else model.path


def make_shadow(model: Model) -> None:
    """Make a folder of links to the files of a model quantised for MLX, but for a config.json that says
    `quantization_config` where MLX says `quantization`. The original stays as it is, and so does what an engine that runs
    may be reading."""
    if model.mlx != "shadow":
        return
    original, shadow = Path(model.path), Path(shadow_folder(model))
    shadow.mkdir(mode=0o700, exist_ok=True)
    with contextlib.closing(os.fdopen(lock(shadow.with_suffix(".lock"), fcntl.LOCK_EX))):
        config = read_json(original / "config.json")
        config["quantization_config"] = config.get("quantization")
        shared = {path.name for path in original.iterdir()} - {"config.json", "params.json", "consolidated.safetensors"}
        for link in {path.name for path in shadow.iterdir()} - {"config.json"}:
            if (
                link not in shared
                or not (shadow / link).is_symlink()
                or os.readlink(shadow / link) != str(original / link)
            ):
                (shadow / link).unlink()
        for name in shared - {path.name for path in shadow.iterdir()}:
            (shadow / name).symlink_to(original / name)
        if not (shadow / "config.json").exists() or read_json(shadow / "config.json") != config:
            write_json(shadow / "config.json", config)


def dialect_on(dialect: Dialect, version: Version) -> Dialect:
    """The dialect with what this engine leaves to us. Pure. Calls go into the text where the engine would drop them, or
    hand them to the template in a form that it cannot use."""
    can = {name: version >= since for name, since in SINCE.items()}
    unpacked = can["arguments as objects"] or dialect.takes_text
    hidden = dialect.hides_tools or dialect.hides_calls or dialect.wants_text
    writes = (hidden or not can["calls in the history"] or not unpacked) and dialect.calls != "harmony"
    return dataclasses.replace(
        dialect,
        writes_calls=writes,
        writes_results=writes and (dialect.alternates or dialect.hides_tools or dialect.ties_results),
        opens_thinking=dialect.opens_thinking and not can["thinking apart from text"],
    )


def probe_engine(program: Path) -> Engine | None:
    """Ask a program for its generation and version; None if it is no mistral.rs that runs here."""
    found = re.search(r"(?m)^(mistralrs(?:-server)?) \d+\.\d+\.\d+", output_of(str(program), "--version"))
    if not found:
        return None
    generation = next(row for row in GENERATIONS if row.program == found[1])
    front = (str(program), *generation.front)
    helps = output_of(*front, generation.text, "--help"), output_of(*front, "--help")
    return Engine(program, generation, version_in(found[0]), *helps)


def find_engine(settings: Settings, environ: Mapping[str, str]) -> Engine:
    """The program to use: the setting, else the newest generation, in the first folder that has it. One that was built
    here comes first."""
    if settings.binary:
        engine = probe_engine(Path(settings.binary)) if is_program(Path(settings.binary)) else None
        if engine is None:
            message = f"binary {settings.binary} is not a mistral.rs program that runs here."
            raise AnyclaudeError(message, 'Correct "binary" in the settings, or remove it.')
        return engine
    home, release = Path.home(), Path(os.path.expanduser(settings.source_dir)) / "target" / "release"
    places = [home / ".local/bin", home / ".mistralrs", home / ".cargo/bin"]
    folders = [home / ".anyclaude/bin", *search_path(environ), release, *places]
    for generation in GENERATIONS:
        for program in filter(None, (which(generation.program, [folder]) for folder in folders)):
            engine = probe_engine(program)
            if engine:
                return engine
            say(f"passing over {program}: it does not run here")
    raise AnyclaudeError(
        "mistral.rs was not found: no mistralrs or mistralrs-server on PATH or where its installers put it.",
        'anyclaude build   (10 to 40 minutes, once)\nor say where it is: "binary" in ~/.anyclauderc.json',
    )


REPOSITORY = "https://github.com/EricLBuehler/mistral.rs"
TESTED_TAG = "v0.9.2"  # what is built where nothing else is asked for; every test of a real engine passes with it
REGISTRY = "0.8.1"  # the newest that crates.io has, for machines without git
BUILD_DISK = 6 << 30  # bytes that a build writes, at the most
RUST = "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
BUILD_TOOLS = "xcode-select --install" if sys.platform == "darwin" else "sudo apt install build-essential git"
# What cargo says when it fails -> what to do.
BUILD_HINTS = (
    (r"linker `?cc`? not found|`cc`.{0,40}not found|ToolNotFound", BUILD_TOOLS),
    (r"[Nn]o space left", "Make room on the disk, and build again: what is compiled stays."),
    (r"signal: 9|SIGKILL", "The machine ran out of memory. One compiler at a time: CARGO_BUILD_JOBS=1 anyclaude build"),
    (r"requires rustc|rustc .* is not supported", "rustup update stable"),
    (r"unable to find utility .metal|missing Metal Toolchain", "xcodebuild -downloadComponent MetalToolchain"),
    (r"[Cc]ould not find .{0,20}openssl|pkg-config", "sudo apt install pkg-config libssl-dev"),
    (r"nvcc|cuda", "Check that nvcc and the driver fit together (nvidia-smi), or build without: PATH without nvcc."),
    (
        r"[Cc]ould not resolve|failed to download|network",
        "Check the connection, and build again: it goes on where it stopped.",
    ),
)


@dataclass(frozen=True)
class Check:
    """One line of `anyclaude doctor`. `state`: "ok", "warning" or "failure"."""

    name: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Build:
    """How mistral.rs would be built. `source`: the checkout, None for the registry's crate; `tag`: what is cloned there
    first, "" for a checkout of the user's own; `program`: what comes out."""

    source: Path | None
    tag: str
    generation: Generation
    features: tuple[str, ...]
    program: Path

    @property
    def words(self) -> str:
        """What is built from what."""
        place = f"from {self.source}" if self.source and not self.tag else f"{self.tag} from {REPOSITORY}"
        where = place if self.source else f"{REGISTRY} from crates.io"
        return f"{self.generation.program} {where}, features: {', '.join(self.features) or 'none'}"

    def command(self, cargo: Path) -> list[str]:
        """The argument list."""
        features = ["--features", ",".join(self.features)] if self.features else []
        if self.source is None:
            root = ["--root", str(self.program.parent.parent)]
            return [str(cargo), "install", "--locked", "--force", *root, f"mistralrs-cli@{REGISTRY}", *features]
        locked = ["--locked"] if self.tag else []
        return [str(cargo), "build", "--release", *locked, "-p", self.generation.package, *features]


def plan_build(settings: Settings, environ: Mapping[str, str], tag: str = "") -> Build:
    """What to build: the user's checkout, else a clone of the tag, else the registry's crate."""
    features = {"metal": ("metal",), "cuda": ("cuda",), "": ()}[read_machine().accelerator]
    if features == ("cuda",) and not which("nvcc", [*search_path(environ), "/usr/local/cuda/bin"]):
        features = ()
    own = Path(os.path.expanduser(settings.source_dir))
    if (own / "Cargo.toml").is_file() and not tag:
        generation = next((row for row in GENERATIONS if (own / row.package / "Cargo.toml").is_file()), GENERATIONS[0])
        return Build(own, "", generation, features, own / "target" / "release" / generation.program)
    home = state_path("bin", "")
    if which("git", search_path(environ)):
        tag = tag or TESTED_TAG
        numbers = re.match(r"v?(\d{1,4})\.(\d{1,4})", tag)
        modern = not numbers or (int(numbers[1]), int(numbers[2])) >= (0, 7)
        generation = GENERATIONS[0] if modern else GENERATIONS[1]
        return Build(
            state_path("src", f"mistral.rs-{urllib.parse.quote(tag, safe='')}"),
            tag,
            generation,
            features,
            home / generation.program,
        )
    if tag:
        raise AnyclaudeError(f"git was not found, and {tag} must be cloned.", BUILD_TOOLS)
    return Build(None, "", GENERATIONS[0], features, home / GENERATIONS[0].program)


def check_build(plan: Build, environ: Mapping[str, str]) -> list[Check]:
    """Whether all that a build needs is there."""
    path = [*search_path(environ), Path.home() / ".cargo/bin"]
    cargo = which("cargo", path)
    checks = [
        Check("cargo", "ok", str(cargo)) if cargo else Check("cargo", "failure", "Rust's cargo was not found", RUST)
    ]
    manifest = plan.source / "Cargo.toml" if plan.source else None
    text = manifest.read_text(encoding="utf-8", errors="replace") if manifest and manifest.is_file() else ""
    wanted = re.search(r'(?m)^rust-version *= *"(\d+)\.(\d+)', text)
    rustc = which("rustc", path)
    has = re.search(r"rustc (\d+)\.(\d+)", output_of(str(rustc), "--version")) if rustc else None
    if cargo and has:
        least = (int(wanted[1]), int(wanted[2])) if wanted else (1, 88)
        good = (int(has[1]), int(has[2])) >= least
        words = f"{has[0]}, {least[0]}.{least[1]} or newer is needed"
        checks.append(Check("rustc", "ok" if good else "failure", words, "" if good else "rustup update stable"))
    compiler = which("cc", path)
    if sys.platform == "darwin" and not output_of("xcode-select", "-p").strip():
        compiler = None  # what lies there only offers to install the command line tools
    checks.append(
        Check("compiler", "ok", str(compiler))
        if compiler
        else Check("compiler", "failure", "there is no C compiler", BUILD_TOOLS)
    )
    if "metal" in plan.features:
        metal = output_of("xcrun", "--find", "metal").strip()
        fix = "xcodebuild -downloadComponent MetalToolchain"
        modern = plan.generation is GENERATIONS[0]
        late = Check("metal", "warning", "no Metal toolchain: kernels are compiled at the first use", fix)
        none = Check("metal", "failure", "there is no Metal toolchain", fix)
        checks.append(Check("metal", "ok", metal) if metal.startswith("/") else late if modern else none)
    place = next(folder for folder in (plan.program, *plan.program.parents) if folder.is_dir())
    free, memory = shutil.disk_usage(place).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = f"{gigabytes(free)} free, a build takes up to {gigabytes(BUILD_DISK)}"
    checks.append(
        Check("disk", "ok" if free > BUILD_DISK else "failure", disk, "" if free > BUILD_DISK else "Make room.")
    )
    if memory < 4 << 30:
        few = f"{gigabytes(memory)} of memory are few for rustc"
        checks.append(Check("memory", "warning", few, "If it is killed: CARGO_BUILD_JOBS=1 anyclaude build"))
    return checks


class CannotBuild(AnyclaudeError):
    """Something that a build needs is not there."""


def _tell_what_is_missing(checks: Iterable[Check], why: str = "") -> None:
    """Raises CannotBuild with everything that a build lacks. `why`: the beginning of what is said."""
    missing = [check for check in checks if check.state == "failure"]
    if missing:
        words = "; ".join(check.text for check in missing)
        fixes = [*(check.fix for check in missing), "then the same command again"]
        raise CannotBuild(f"{why}it cannot be built yet: {words}.", "\n".join(fixes))


def build(settings: Settings, environ: Mapping[str, str], tag: str = "") -> Path:
    """Build mistral.rs -> the program. What is compiled stays when it is interrupted. Raises AnyclaudeError."""
    if tag and not re.fullmatch(r"\w[\w./+-]{0,99}", tag, re.ASCII):
        raise AnyclaudeError(f"{tag!r} is no tag.", f"anyclaude build --tag {TESTED_TAG}")
    plan = plan_build(settings, environ, tag)
    try:
        building = lock(state_path("src", "building.lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AnyclaudeError("another build runs.", "Wait until it is done, or end it, then build again.") from None
    with contextlib.closing(os.fdopen(building)):
        return _build(plan, environ, bool(tag))


def _build(plan: Build, environ: Mapping[str, str], chosen: bool) -> Path:
    say(f"building {plan.words}")
    log_path = state_path("logs", "build.log")
    log = rotated_log(log_path)
    more = [str(Path.home() / ".cargo/bin"), *(["/usr/local/cuda/bin"] if "cuda" in plan.features else [])]
    path = os.pathsep.join([environ.get("PATH", os.defpath), *more])
    env = {**environ, "PATH": path, "CARGO_TERM_PROGRESS_WHEN": "always", "CARGO_TERM_PROGRESS_WIDTH": "100"}
    _tell_what_is_missing(check_build(plan, environ))
    if plan.tag and plan.source and not (plan.source / "Cargo.toml").is_file():
        for left in (plan.source, *plan.source.parent.glob("tmp*")):  # of a clone that was ended
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=plan.source.parent) as folder:  # half a clone is none
            git = which("git", search_path(environ))
            clone = [str(git), "clone", "--quiet", "--depth", "1", "--branch", plan.tag, REPOSITORY, f"{folder}/source"]
            try:
                run_build(clone, folder, env, log, log_path)
                os.replace(f"{folder}/source", plan.source)
            except (AnyclaudeError, OSError) as failure:
                error = failure if isinstance(failure, AnyclaudeError) else unexpected(failure)
                if chosen or "stopped" in error.message:
                    raise error from None
                plan = dataclasses.replace(plan, source=None, tag="")
                say(f"{error.message}\nwithout it: building {plan.words}")
        _tell_what_is_missing(check_build(plan, environ))  # the clone says how new Rust must be
    late = "metal" in plan.features and any(check.name == "metal" and check.fix for check in check_build(plan, environ))
    env.update({"MISTRALRS_METAL_PRECOMPILE": "0"} if late else {})
    cargo = which("cargo", path.split(os.pathsep))
    assert cargo is not None
    target = plan.program.parent.parent if plan.source and not plan.tag else state_path("build", "")
    begun = time.monotonic()
    made = target / "release" / plan.program.name if plan.tag else plan.program
    if plan.tag:
        made.unlink(missing_ok=True)  # of another tag
    run_build(plan.command(cargo), str(plan.source or target), {**env, "CARGO_TARGET_DIR": str(target)}, log, log_path)
    if not made.is_file():
        raise AnyclaudeError(f"cargo made no {made}.", f"Read the log: less {log_path}")
    if plan.tag:
        fresh = plan.program.with_name(f".{plan.program.name}")  # in one step: an engine may run from there
        shutil.copy2(made, fresh)
        os.replace(fresh, plan.program)
    say(f"built in {(time.monotonic() - begun) / 60:.0f} min: {plan.program}")
    return plan.program


def run_build(command: Sequence[str], folder: str, env: Mapping[str, str], log: int, log_path: Path) -> None:
    """Run one step of a build, its output in the log and how far it is on the terminal. Raises AnyclaudeError."""
    begun = time.monotonic()
    pipe, joined, null = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
    process: subprocess.Popen[bytes] | None = None
    rest, tail = b"", list[str]()
    try:
        with signals_wait():
            process = subprocess.Popen(
                command, cwd=folder, env=dict(env), stdin=null, stdout=pipe, stderr=joined, start_new_session=True
            )
        assert process.stdout is not None
        while True:
            if not select.select([process.stdout], [], [], 0.5)[0]:
                if process.poll() is None:
                    continue
                break  # it is gone, and what it started holds the pipe
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            *lines, rest = re.split(rb"[\r\n]", rest + data)
            for line in filter(None, (plain(line.decode("utf-8", "replace")).strip() for line in lines)):
                progress = re.match(r"Building \[.*\] (\d+)/(\d+)", line)
                if not progress:
                    os.write(log, f"{line}\n".encode())
                    tail = [*tail[-40:], line]
                elapsed = time.monotonic() - begun
                done = f"{progress[1]} of {progress[2]} crates, " if progress else ""
                words = f"building: {done}{elapsed // 60:.0f}:{elapsed % 60:02.0f}"
                TERMINAL.waiting(words if progress else f"{words} {line}")
        status = process.wait()
    except KeyboardInterrupt:
        raise AnyclaudeError("stopped; what is compiled stays.", "To go on: the same command again") from None
    finally:
        TERMINAL.waiting("")
        if process and process.poll() is None:
            terminate(process, os.killpg)
        if process and process.stdout:
            process.stdout.close()
    if status:
        first = next((at for at, line in enumerate(tail) if line.startswith("error")), max(0, len(tail) - 8))
        shown = tail[first : first + 8]
        hints = (hint for line in shown for pattern, hint in BUILD_HINTS if re.search(pattern, line))
        message = f"{Path(command[0]).name} failed ({ending(status)}):" + "".join(f"\n  {line}" for line in shown)
        raise AnyclaudeError(message, next(hints, f"Read the whole log: less {log_path}"))


STATE_TYPES: dict[str, tuple[type, ...]] = {  # what is not of its type in a state file is passed over
    **dict.fromkeys(("port", "pid", "parent", "crashes", "window", "keep_alive", "exit", "weights"), (int,)),
    **dict.fromkeys(("started", "ready"), (int, float)),
    **dict.fromkeys(("born", "parent_born", "log", "model", "engine", "reason"), (str,)),
    "version": (list,),
}


class _Files:
    """The files by which sessions and the engine's parent find each other, one set a port.

    `sessions`: each session holds it shared; the parent waits to hold it alone, which it does when nobody is left.
    `alive`: the parent holds it as long as the engine runs. `starting`: held while a session starts or joins."""

    def __init__(self, port: int) -> None:
        names = ("sessions", "alive", "starting", "json", "heard")
        self.port = port
        paths = (state_path("run", f"engine-{port}.{name}") for name in names)
        self.sessions, self.alive, self.starting, self.state, self.heard = paths

    def read_state(self) -> Json:
        """What the parent wrote of its engine; empty when there is nothing usable."""
        with contextlib.suppress(AnyclaudeError):
            state = read_json(self.state)
            return {key: value for key, value in state.items() if type(value) in STATE_TYPES.get(key, (type(value),))}
        return {}

    def engine_runs(self) -> bool:
        """Whether the engine has a parent, which holds `alive`. While it is being restarted, too."""
        return not can_lock(self.alive, fcntl.LOCK_SH)

    def engine(self) -> int:
        """The engine's pid, 0 if it is gone. A pid counts only with the time at which that process was born."""
        state = self.read_state()
        pid, born = state.get("pid"), state.get("born")
        return pid if born and isinstance(pid, int) and birth(pid) == born else 0

    def cards(self) -> list[Json]:
        """What the open sessions say of themselves. Each holds its card locked; a card that nobody holds is removed."""
        found = []
        for path in sorted(self.state.parent.glob(f"session-{self.port}-*.json")):
            with contextlib.suppress(OSError, AnyclaudeError):
                if can_lock(path, fcntl.LOCK_EX):
                    path.unlink()
                else:
                    found.append(read_json(path))
        return found


def lock(path: Path, kind: int) -> int:
    """Take a flock on `path` -> a file descriptor that holds it until closed, which the kernel does however a process
    ends. Raises BlockingIOError if LOCK_NB is set and it is taken."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, kind)
    except BaseException:
        os.close(handle)
        raise
    return handle


def can_lock(path: Path, kind: int) -> bool:
    """Whether a flock on `path` is to be had now."""
    try:
        os.close(lock(path, kind | fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except FileNotFoundError:  # its folder was removed
        pass
    return True


RESTARTS, RESTART_SECONDS = 3, 600.0  # so many times in so long; then it is given up
RESTART_PAUSE = 1.0  # seconds, doubled each time


class _Supervisor:
    """The engine's parent: it starts the engine, restarts it when it dies after it has served, and stops it when no session
    is left. Threads wait for what can happen, and `watch` decides: "ready", "ended", "unused" (no session is left), or
    "told" (to end)."""

    def __init__(self, spec: Json) -> None:
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._spec, self._files = spec, _Files(spec["port"])
        self.alive = lock(self._files.alive, fcntl.LOCK_EX)
        self._served = False
        self._state: Json = {**spec, "parent": os.getpid(), "parent_born": birth(os.getpid()), "crashes": 0}
        if not can_lock(Path(spec["log"]), fcntl.LOCK_EX):  # the log of an engine on another port
            log = Path(spec["log"])
            self._state["log"] = str(log.with_name(f"{log.stem}-{spec['port']}.log"))
        self._log = rotated_log(Path(self._state["log"]))
        fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def start(self) -> None:
        """Start the engine. Raises OSError."""
        env, log, null = {**os.environ, "NO_COLOR": "1"}, self._log, subprocess.DEVNULL
        line = self._spec["command"]
        self.engine = subprocess.Popen(
            line, stdin=null, stdout=log, stderr=log, cwd=Path.home(), env=env, start_new_session=True
        )
        pid = self.engine.pid
        try:
            self._tell(pid=pid, born=birth(pid), started=time.time(), ready=0, reason="")
        except BaseException:
            terminate(self.engine, os.killpg)
            raise
        for target in (self._wait_for_engine, self._wait_until_ready):
            threading.Thread(target=target, args=(self.engine,), daemon=True).start()

    def _tell(self, **changes: Any) -> None:
        self._state.update(changes)
        try:
            write_json(self._files.state, self._state)
        except OSError:  # a full disk does not end an engine that serves
            if not self._served:
                raise

    def _wait_for_engine(self, engine: subprocess.Popen[bytes]) -> None:
        engine.wait()
        self.events.put("ended")

    def _wait_until_ready(self, engine: subprocess.Popen[bytes]) -> None:
        while engine.poll() is None:
            if serves(self._spec["port"]) and owns(engine.pid, self._spec["port"]):
                return self.events.put("ready")
            time.sleep(0.2)

    def wait_for_last_session(self) -> None:
        """When nobody has held a session for `keepAlive` seconds, say so. The lock is kept then: a new session waits
        until the port is free again."""
        while True:
            try:
                seat = lock(self._files.sessions, fcntl.LOCK_EX)
            except OSError:  # the folder was removed: nobody can come any more
                return self.events.put("unused")
            until = time.monotonic() + self._spec["keep_alive"] * self._has_served()
            while seat >= 0 and (left := until - time.monotonic()) > 0:
                os.close(seat)
                time.sleep(min(left, 0.5))  # nothing tells of a lock that is taken
                try:
                    seat = lock(self._files.sessions, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    seat = -1
            if seat >= 0:
                return self.events.put("unused")

    def _has_served(self) -> bool:
        """Whether the engine was ever ready, be it a moment ago."""
        self._served = self._served or any(map(READY_LINE.search, last_lines(Path(self._state["log"]), 99)))
        return self._served

    def watch(self) -> None:
        """Look after the engine until it is no longer wanted, or not to be started again."""
        deaths = list[float]()
        while (event := self._next_event(bool(deaths))) in ("ready", "ended"):
            if event == "ready":
                self._served = True
                self._tell(ready=time.time())
                continue
            deaths = [*(one for one in deaths if time.monotonic() - one < RESTART_SECONDS), time.monotonic()]
            self._tell(exit=self.engine.returncode, ready=0, crashes=len(deaths))
            if not self._has_served() or len(deaths) > RESTARTS:
                return
            until = time.monotonic() + RESTART_PAUSE * 2 ** (len(deaths) - 1)
            with contextlib.suppress(queue.Empty):
                while self.events.get(timeout=max(0.0, until - time.monotonic())) == "ready":
                    pass  # of the one that died
                break
            try:
                self.start()
            except OSError as error:
                return self._tell(reason=f"{error.filename or self._spec['command'][0]}: {error.strerror}")
        terminate(self.engine, os.killpg)
        self._files.state.unlink(missing_ok=True)

    def _next_event(self, restarted: bool) -> str:
        """What happens next. An engine that does not come back in time is killed, which is one more death."""
        while True:
            waits = restarted and not self._state["ready"]
            try:
                return self.events.get(timeout=self._spec["start_timeout"] if waits else None)
            except queue.Empty:
                self._tell(reason=f"it did not answer within {self._spec['start_timeout']} s")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.engine.pid, signal.SIGKILL)


def stop_engine(files: _Files) -> None:
    """Stop an engine, whoever uses it, through its parent if it has one."""
    state = files.read_state()
    parent = state.get("parent")
    if files.engine_runs() and type(parent) is int and parent > 1 and birth(parent) == state.get("parent_born", "none"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS + 3
        while files.engine_runs() and time.monotonic() < deadline:
            time.sleep(0.02)
    if not files.engine_runs():
        stop_orphan(files)


def supervise() -> int:
    """The process of the engine's parent, which stdin describes. It tells the session on stdout that the engine was
    started, or why not."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the engine would inherit
    spec = json.load(sys.stdin)
    try:
        parent = _Supervisor(spec)
        signal.signal(signal.SIGTERM, lambda *_: parent.events.put("told"))
        parent.start()
    except OSError as error:
        print(f"{error.filename or spec['command'][0]}: {error.strerror}", flush=True)
        return 1
    try:
        with contextlib.suppress(OSError):  # the session may be gone already
            print("started", flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        threading.Thread(target=parent.wait_for_last_session, daemon=True).start()
        parent.watch()
    finally:  # whatever happens here, no engine is left without a parent
        terminate(parent.engine, os.killpg)
        os.close(parent.alive)  # before `sessions`, so that who gets that one finds this one free
        os._exit(0)  # a thread may still wait


def birth(pid: int) -> str:
    """When the process was started, in the system's words; "" if there is none. It tells whether a pid was given anew."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]  # in ticks since the machine's start
    return "" if os.path.isdir("/proc/self") else output_of("ps", "-o", "lstart=", "-p", str(pid)).strip()


def memory_of(group: int) -> int:
    """The bytes of memory that the processes of a group have; 0 if there is none."""
    rows = re.findall(r"(?m)^\s*(\d+)\s+(\d+)$", output_of("ps", "-A", "-o", "pgid=,rss="))
    return sum(int(size) << 10 for number, size in rows if int(number) == group and group)


def port_owner(port: int) -> tuple[int, str]:
    """Who listens on `port` -> (pid, name); (0, "") if that cannot be known."""
    asked = (
        (("ss", "-Hltnp", f"sport = :{port}"), r'\(\("(?P<name>[^"]+)",pid=(?P<pid>\d+)'),
        (("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"), r"p(?P<pid>\d+)\nc(?P<name>.+)"),
    )
    found = (re.search(pattern, output_of(*command)) for command, pattern in asked)
    return next(((int(match["pid"]), match["name"]) for match in found if match), (0, ""))


def owns(pid: int, port: int) -> bool:
    """Whether an engine, or a process of its group, is who listens on `port`, as far as that can be known."""
    owner = port_owner(port)[0]
    with contextlib.suppress(ProcessLookupError):
        return not owner or not pid or os.getpgid(owner) == pid
    return True


class PortTaken(AnyclaudeError):
    """Another program listens on a port."""


def port_taken(whose: str, port: int, option: str, why: str = "") -> AnyclaudeError:
    """The error that `port` cannot be had, with its owner if that is known."""
    pid, name = port_owner(port)
    who = f"by {name} (pid {pid})" if pid else f"({why or 'by a program that cannot be seen'})"
    return PortTaken(f"{whose}port {port} is taken {who}.", f"Choose another: {option} {other_port(port)}")


def other_port(port: int) -> int:
    """One to propose in place of `port`."""
    return port + 1 if port < 65535 else 8081


def port_is_free(port: int) -> bool:
    """Whether an engine could listen on the loopback at `port`."""
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
        return False  # macOS lets two programs bind one port when one of them has all addresses
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the engine does: TIME_WAIT is no owner
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port on the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET on the loopback is answered with 200. The system's HTTP proxies are left aside."""
    try:
        with DIRECTLY.open(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def serves(port: int) -> bool:
    """Whether an engine on the loopback answers."""
    return any(answers(f"http://{LOOPBACK}:{port}{path}") for path in ("/health", "/v1/models"))


def stop_orphan(files: _Files) -> None:
    """Stop an engine whose parent was killed, and remove what it left."""
    pid = files.engine()
    for number in (signal.SIGTERM, signal.SIGKILL) if pid else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not port_is_free(files.port):
            time.sleep(0.05)
    files.state.unlink(missing_ok=True)


def own_command() -> list[str]:
    """The command line of another process of this program. Where this one was imported, that one is, too: it is not compiled
    anew, and has 28 MB of memory instead of 45."""
    if __name__ == "__main__":
        return [sys.executable, "-I", os.path.abspath(__file__)]
    folder, prefix = os.path.dirname(os.path.abspath(__file__)), sys.pycache_prefix
    code = f"import sys; sys.path.insert(0, {folder!r}); import {__name__}; {__name__}.entry()"
    return [sys.executable, "-I", *(["-X", f"pycache_prefix={prefix}"] if prefix else []), "-c", code]


class EngineShare:
    """This session's share in an engine: made by starting or joining one, given back by `close`."""

    def __init__(self, port: int, command: list[str], model: Model, **told: Any) -> None:
        """`told`: what the state says of the engine, for `status` and for those that join: engine (in words), keep_alive
        and start_timeout (seconds), version, window, weights (bytes)."""
        self.port, self.log = port, state_path("logs", "mistralrs-server.log")
        self._files, self._heard, self._served = _Files(port), 0.0, False
        self._spec = {"engine": "mistral.rs", "keep_alive": 0, "start_timeout": 600, **told}
        starting = lock(self._files.starting, fcntl.LOCK_EX)
        try:
            self._seat = lock(self._files.sessions, fcntl.LOCK_SH)  # waits while an engine here is being stopped
            try:
                used, other = self._files.cards(), self.state.get("model") not in (None, model.place)
                if other and used and self._files.engine():
                    raise self._other_model()
                if other and self._files.engine_runs():
                    stop_engine(self._files)  # nobody uses it, it was only kept alive
                self.joined = self._files.engine_runs()
                if not self.joined:
                    self._start(command, model)
                if self.state.get("model") != model.place:
                    raise self._other_model()
                self.log = Path(str(self.state.get("log")))
                self._card_path = state_path("run", f"session-{port}-{os.getpid()}.json")
                self._card = lock(self._card_path, fcntl.LOCK_EX)
                os.write(self._card, json.dumps({"pid": os.getpid(), "folder": os.getcwd()}).encode())
            except BaseException:
                os.close(self._seat)
                raise
        finally:
            os.close(starting)

    @property
    def state(self) -> Json:
        """What the engine's parent says of it now."""
        return self._files.read_state()

    def _other_model(self) -> AnyclaudeError:
        message = f"port {self.port} is taken: another session of yours serves {self.state.get('model')} there."
        return AnyclaudeError(
            message, f"Close that session, or choose another port: --engine-port {other_port(self.port)}"
        )

    def _others(self) -> bool:
        """Whether other sessions have a share (then it is to be had shared, and not alone)."""
        return not can_lock(self._files.sessions, fcntl.LOCK_EX) and can_lock(self._files.sessions, fcntl.LOCK_SH)

    def _start(self, command: list[str], model: Model) -> None:
        stop_orphan(self._files)
        if not port_is_free(self.port):
            error = port_taken("", self.port, "--engine-port")
            use = f"--base-url http://localhost:{self.port}/v1"
            error.fix += f"\nor use that server, if it speaks OpenAI's protocol: {use}"
            raise error
        spec = {**self._spec, "port": self.port, "command": command, "model": model.place, "log": str(self.log)}
        line = [*own_command(), SUPERVISE]
        pipe = subprocess.PIPE
        parent = subprocess.Popen(line, stdin=pipe, stdout=pipe, cwd=Path.home(), start_new_session=True)
        assert parent.stdin is not None and parent.stdout is not None
        with parent.stdin, parent.stdout:
            parent.stdin.write(json.dumps(spec).encode())
            parent.stdin.close()
            answer = parent.stdout.readline().decode().strip()
        if answer != "started":
            stop_orphan(self._files)
            message = f"mistral.rs could not be started: {answer or 'its parent process died'}."
            raise AnyclaudeError(message, 'Check that program, or name another as "binary" in ~/.anyclauderc.json.')

    def wait_until_ready(self, seconds: float) -> str:
        """Wait until the engine answers over HTTP -> the line of its log that says so, or "". Raises AnyclaudeError with
        the log's last lines when it died or the time is over."""
        started = looked = time.monotonic()
        loaded = ""
        while not serves(self.port):
            elapsed = time.monotonic() - started
            if not self._files.engine_runs():
                if "exit" not in self.state:
                    raise AnyclaudeError("mistral.rs was stopped while it started (anyclaude stop).", "Start it again.")
                raise self._failure(f"ended while it started ({ending(self.state.get('exit'))})")
            if elapsed > seconds:
                raise self._failure(f'did not answer within {seconds:.0f} s ("startTimeout" in ~/.anyclauderc.json)')
            if time.monotonic() - looked > 1:
                looked, loaded = time.monotonic(), self._loaded()
            TERMINAL.waiting(f"waiting for mistral.rs: {elapsed:.0f} s{loaded}: {''.join(last_lines(self.log, 1))}")
            time.sleep(0.1)
        TERMINAL.waiting("")
        if not owns(self._files.engine(), self.port):  # one that took the port while ours was loading
            raise port_taken("", self.port, "--engine-port")
        self._served = True
        return next((line for line in reversed(last_lines(self.log, 20)) if READY_LINE.search(line)), "")

    def _loaded(self) -> str:
        """How much of the weights is in memory, in words."""
        weights, memory = self.state.get("weights", 0), memory_of(self._files.engine())
        return f", {min(99, memory * 100 // weights)} % loaded" if weights > 0 and memory else ""

    def trouble(self) -> str:
        """Why there is no engine any more, and what to do; "" as long as there is one, or it is being restarted."""
        if self._files.engine_runs() or self._files.engine():
            return ""
        state = self.state
        if "exit" not in state or "model" not in state:
            return "mistral.rs was stopped from outside (anyclaude stop).\nTo go on: start anyclaude again, with --continue."
        why = state.get("reason") or ending(state["exit"])
        often = f"ended {times(state.get('crashes'))} and is not started any more ({why})"
        error = self._failure(often)
        return f"{error.message}\n{error.fix}\nThen go on: start anyclaude again, with --continue."

    def is_started_again(self) -> bool:
        """Whether the engine ended, and is not back yet."""
        state = self.state
        return bool(state.get("crashes")) and not state.get("ready")

    def history(self) -> str:
        """What a person should know of the engine at the end of a session; "" if all was well."""
        crashes = self.state.get("crashes")
        return f"mistral.rs ended {times(crashes)} and is started again. Its log: {self.log}" if crashes else ""

    def tell_of_crashes(self) -> None:
        """Tell a person who has nothing else on the terminal of each crash, for ever."""
        told = news = ""
        while True:
            time.sleep(0.5)  # nothing tells of a file that is replaced
            with contextlib.suppress(OSError, AnyclaudeError):
                news = self.trouble() or self.history()
            if news != told and news:
                say(news)
            told = news

    def restart(self, silent: float) -> None:
        """Kill an engine that was silent for so many seconds, to every session; its parent starts it anew. One that is
        younger than that was restarted already."""
        heard, started = 0.0, self.state.get("started", 0)
        with contextlib.suppress(OSError):
            heard = self._files.heard.stat().st_mtime
        pid = self._files.engine()
        if pid and time.time() - max(started, heard) > silent:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def hear(self) -> None:
        """Note for all sessions that the engine said something to this one."""
        if time.monotonic() - self._heard > 1:
            self._heard = time.monotonic()
            with contextlib.suppress(OSError):
                self._files.heard.touch(0o600)

    def _failure(self, what: str) -> AnyclaudeError:
        lines = [line for line in last_lines(self.log, 99) if not BACKTRACE.match(line)]
        hints = (hint for line in reversed(lines) for pattern, hint in LOG_HINTS if re.search(pattern, line))
        tail = "".join(f"\n  {line}" for line in lines[-8:])
        memory = "It takes less memory with a smaller --context-window, a harder --isq, or a smaller model.\n"
        fix = next(hints, memory * ("memory runs out" in what) + f"Read the whole log: less {self.log}")
        return AnyclaudeError(f"mistral.rs {what}. Its log ends:{tail}", fix)

    def close(self) -> None:
        """Give the share back. If it was the last, return when the engine is gone."""
        self._card_path.unlink(missing_ok=True)
        os.close(self._card)
        os.close(self._seat)
        if self.state.get("keep_alive") and self._served:
            return
        deadline = time.monotonic() + STOP_SECONDS + 3
        while self._files.engine_runs() and not self._others() and time.monotonic() < deadline:
            time.sleep(0.02)
        starting = lock(self._files.starting, fcntl.LOCK_EX)
        if not self._files.engine_runs() and not self._others():
            stop_orphan(self._files)
        os.close(starting)


def demo_reply(request: Json) -> str:
    """What the demo engine says to an OpenAI request: one tool call, then its result in words. Pure."""
    messages = request.get("messages") or [{}]
    offered = {tool.get("function", {}).get("name") for tool in request.get("tools") or []}
    if messages[-1].get("role") == "tool":
        listing = str(messages[-1].get("content", "")).strip()
        listing = (
            "(nothing: this folder is empty)"
            if re.fullmatch(r"\(?\w+ completed with no output\)?|", listing)
            else listing
        )
        return f"This is the demo engine: no model runs, all else is real. The tool call answered:\n\n{listing}\n"
    calls = {"Bash": {"command": "ls -1", "description": "List the files here"}, "Glob": {"pattern": "*"}}
    for name in filter(offered.__contains__, calls):
        call = json.dumps({"name": name, "arguments": calls[name]})
        return f"Let me see which files are here.\n\n<tool_call>\n{call}\n</tool_call>"
    return "anyclaude demo"


class _DemoHandler(BaseHTTPRequestHandler):
    """The OpenAI protocol, as much of it as the proxy uses."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pieces = re.findall(r"\s*\S{1,12}|\s+", demo_reply(request))
        usage = {"prompt_tokens": len(json.dumps(request)) // 4, "completion_tokens": len(pieces)}
        chunks: list[Json] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage})
        with contextlib.suppress(OSError):  # the client may leave
            for chunk in chunks:
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                time.sleep(0.005)  # so that one sees it stream
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


def start_demo_engine() -> str:
    """An engine in this process with no model behind it -> its URL."""
    server = ThreadingHTTPServer((LOOPBACK, 0), _DemoHandler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{LOOPBACK}:{server.server_address[1]}/v1"


# === 5 Request ================================================================================
# Rule: pure. The same input gives the same bytes, and a conversation that grew by a turn gives a translation that
# begins with the earlier one: that is what lets the engine's prefix cache read a prompt once.

ERROR_KINDS = {  # HTTP status -> Anthropic's name for it. Source: the Anthropic API reference, "Errors"
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
BILLING_BLOCK = "x-anthropic-billing-header:"  # the client's first system text; it differs per conversation

# Tools that the client runs and that have no schema of their own in the request: prefix of their type -> what they do,
# and their parameters as `name: kind`, * marks what is required. Source: Anthropic's documentation of these tools.
CLIENT_TOOLS = {
    "bash_": (
        "Run a command in a shell that stays open between calls; restart: start the shell anew instead.",
        "command: string, restart: boolean",
    ),
    "text_editor_": (
        (
            "View, create and edit text files. path is absolute. create writes file_text; str_replace replaces old_str, which must "
            "occur once, by new_str; insert puts insert_text behind line insert_line; view_range: first and last line, -1: the end."
        ),
        (
            "command*: view|create|str_replace|insert, path*: string, file_text: string, old_str: string, new_str: string, "
            "insert_line: integer, insert_text: string, view_range: integers"
        ),
    ),
    "memory_": (
        "View and edit the files in /memories, which last from session to session; as a text editor, with delete and rename.",
        (
            "command*: view|create|str_replace|insert|delete|rename, path: string, old_path: string, new_path: string, "
            "file_text: string, old_str: string, new_str: string, insert_line: integer, insert_text: string, view_range: integers"
        ),
    ),
    "computer_2": (
        "Use the screen, mouse and keyboard of the computer. coordinate is [x, y] in pixels, duration in seconds.",
        (
            "action*: key|type|mouse_move|left_click|left_click_drag|right_click|middle_click|double_click|triple_click|screenshot|"
            "cursor_position|hold_key|left_mouse_down|left_mouse_up|scroll|wait, coordinate: integers, start_coordinate: integers, "
            "text: string, scroll_direction: up|down|left|right, scroll_amount: integer, duration: number"
        ),
    ),
}
# In content that is no text of its own, the keys under which there is something to read. All others are identifiers,
# or encrypted. Source: the request types of Anthropic's SDK 2.12.0.
_READABLE = """title url source context query name tool_name input text content stdout stderr return_code lines error_code
    error_message tool_references tabs"""
READABLE = _READABLE.split()


class ApiError(Exception):
    """An error in the client's own words: an HTTP status, and the message that Anthropic's API would give."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def body(self) -> Json:
        """The JSON of the error, the same as HTTP body and as `event: error`."""
        kind = ERROR_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


@dataclass(frozen=True)
class Target:
    """What the proxy must know of the engine behind it. `name`: what the client calls the model; `model`: what the
    engine does; `own_tools`: calls are parsed here, from the model's text, and not by the engine; `window`: tokens."""

    url: str
    name: str = "local"
    model: str = "default"
    key: str = ""
    own_tools: bool = True
    forces_calls: bool = False  # the engine obeys tool_choice
    sees: bool = False
    counts: bool = False  # the engine has /messages/count_tokens
    window: int = 0
    max_tokens: int = 32768
    stall: float = 900.0  # seconds without a byte, after which it is taken for hung
    sampling: Mapping[str, float] = field(default_factory=dict)
    dialect: Dialect = Dialect()


def _blocks(content: Any, where: str) -> list[Json]:
    """Content as a list of blocks: a string is one text block."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ApiError(400, f"{where}: Input should be a string or a list of content blocks")
    return content


def _join(texts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, texts))


def _reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>" if text else ""


def _readable(value: Any) -> str:
    """All that there is to read in a value, a line each."""
    if isinstance(value, dict):
        if set(value) & set(READABLE):
            return "\n".join(filter(None, (_readable(value[key]) for key in READABLE if key in value)))
        return to_json(value)
    return "\n".join(filter(None, map(_readable, value))) if isinstance(value, list) else str(value or "")


class _Prompt:
    """The OpenAI messages of a conversation, turn by turn."""

    def __init__(self, target: Target) -> None:
        self.messages: list[Json] = []
        self._target, self._dialect = target, target.dialect
        self._open: dict[str, str] = {}  # calls that have no result yet: id -> name
        self._held: list[str] = []  # reminders that came between a call and its result
        self._ids: dict[str, str] = {}  # id of the client -> id for the engine
        self._later: dict[str, Json] = {}  # calls behind the first, where each needs a turn of its own
        self._calls = self._images = 0

    # What the model reads of blocks. What it cannot read is named, never dropped in silence.

    def _read(self, blocks: Iterable[Json], images: list[str]) -> str:
        """-> the text of `blocks`. The images in them are added to `images`."""
        return _join(self._read_block(block, images) for block in blocks)

    def _read_block(self, block: Json, images: list[str]) -> str:
        kind = str(block.get("type"))
        if kind == "text":
            return str(block.get("text") or "")
        if kind in ("thinking", "redacted_thinking"):
            return ""
        if kind == "image":
            return self._read_image(as_object(block.get("source")), images)
        if kind == "document":
            return self._read_document(block, images)
        text = _readable(block)
        return text if kind == "compaction" else f"[{kind}]\n{text}".strip()

    def _read_image(self, source: Json, images: list[str]) -> str:
        url = source.get("url")
        if source.get("type") == "base64":
            url = f"data:{source.get('media_type')};base64,{source.get('data')}"
        if not self._target.sees:
            return "[image: this model cannot see images]"
        if not isinstance(url, str):
            return "[image: its file is not available here]"
        images.append(url)
        self._images += 1
        return f"[image {self._images}]"

    def _read_document(self, block: Json, images: list[str]) -> str:
        source = as_object(block.get("source"))
        title = " ".join(str(block.get(key) or "") for key in ("title", "context")).strip()
        kind, content, data = source.get("type"), source.get("content"), str(source.get("data") or "")
        if kind == "base64" and str(source.get("media_type")).startswith("text/"):
            with contextlib.suppress(ValueError):
                kind, data = "text", base64.b64decode(data, validate=True).decode("utf-8", "replace")
        if kind == "text":
            return _join((title, data))
        if kind == "content":
            return _join((title, self._read(_blocks(content, "document.source.content"), images)))
        what = source.get("url") or source.get("media_type") or kind
        how = (
            "Its text can be had with a tool such as pdftotext."
            if kind == "base64"
            else "It can be fetched with a tool."
        )
        return f"[document {title} ({what}): this model cannot read it in this form. {how}]".replace("  ", " ")

    # Turns.

    def add_user(self, text: str, images: Sequence[str] = ()) -> None:
        """Append to the user turn that stands last, or begin one."""
        last = self.messages[-1] if self.messages else {}
        if not text and not images:
            return
        if last.get("role") == "tool" and self._dialect.alternates:
            if not images:
                last["content"] = _join((last["content"], text))
                return
            self.messages.append({"role": "assistant", "content": "I look at it."})
        if last.get("role") != "user":
            last = {"role": "user", "content": ""}
            self.messages.append(last)
        content = last["content"]
        if isinstance(content, str) and not images:
            last["content"] = _join((content, text))
            return
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        parts += [{"type": "text", "text": text}] if text or not parts else []  # mistral.rs wants a text beside images
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in images]
        last["content"] = parts

    def user_turn(self, blocks: list[Json]) -> None:
        """A user turn; its tool results come first, each as a message of its own, next to the calls they answer."""
        images: list[str] = []
        results: dict[str, str] = {}
        for block in blocks:
            if block.get("type") == "tool_result":
                text = self._read(_blocks(block.get("content"), "tool_result.content"), images)
                if block.get("is_error") and not re.match(r"(?i)\W*(tool_use_)?error", text):
                    text = f"Error: {text}"
                identity = str(block.get("tool_use_id") or "")
                if identity in self._open and identity not in results:
                    results[identity] = text
                else:
                    self._held.append(f"[result of an earlier tool call]\n{text}")
        self.close_calls(results)
        numbers = range(self._images - len(images) + 1, self._images + 1)
        seen = _join(f"[image {number}] of the tool result:" for number in numbers)
        text = self._read((block for block in blocks if block.get("type") != "tool_result"), images)
        self.add_user(_join((seen, text)), images)

    def close_calls(self, results: Mapping[str, str]) -> None:
        """Give every open call its result, in the order of the calls: the client sends them as they ended, and most
        templates tell them apart by their order alone. A call that was broken off gets one, too; templates insist."""
        for identity, name in self._open.items():
            text = results.get(identity, "[no result: the call was interrupted]")
            if self._dialect.writes_results:
                self.add_user(f"<tool_response>\n{text}\n</tool_response>")
                continue
            if identity in self._later:
                self.messages.append({"role": "assistant", "content": "", "tool_calls": [self._later.pop(identity)]})
            named = {"name": name} if self._dialect.names_results else {}
            result = {"role": "tool", "tool_call_id": self._ids.get(identity, identity), **named, "content": text}
            self.messages.append(result)
        for text in self._held:
            self.add_user(text)
        self._open, self._held = {}, []

    def system_turn(self, blocks: list[Json]) -> None:
        """A system turn in mid-conversation, folded where it stands: moved to the front it would change the head of
        the prompt on every turn, and many chat templates refuse it anywhere else."""
        text = _reminder(self._read(blocks, []))
        if self._open and text:
            self._held.append(text)
        else:
            self.add_user(text)

    def assistant_turn(self, blocks: list[Json]) -> None:
        """An assistant turn. `content` is "" and never null beside calls: mistral.rs 0.7.0 to 0.9.1 would render them twice."""
        text = self._read((block for block in blocks if block.get("type") != "tool_use"), [])
        uses = [block for block in blocks if block.get("type") == "tool_use"]
        calls = [
            (str(block.get("id") or ""), str(block.get("name") or ""), as_object(block.get("input"))) for block in uses
        ]
        if not text and not calls:
            return
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        last["content"] = _join((last["content"], text))
        self._open.update((identity, name) for identity, name, _ in calls)
        numbered = [(self._calls + number, name, arguments) for number, (_, name, arguments) in enumerate(calls)]
        if calls and self._dialect.writes_calls:
            last["content"] = "\n".join(filter(None, (last["content"], write_calls(self._dialect.calls, numbered))))
        elif calls:
            for (number, name, arguments), (identity, _, _) in zip(numbered, calls):
                self._ids[identity] = call_id(self._dialect, identity, name, number)
                function = {"name": name, "arguments": to_json(arguments)}
                call = {"id": self._ids[identity], "type": "function", "function": function}
                if self._dialect.one_call and last.get("tool_calls"):
                    self._later[identity] = call
                else:
                    last.setdefault("tool_calls", []).append(call)
        self._calls += len(calls)


_TURNS = {"user": _Prompt.user_turn, "assistant": _Prompt.assistant_turn, "system": _Prompt.system_turn}


def _objects(body: Json, key: str) -> list[Json]:
    """The list of objects that `key` holds."""
    values = body.get(key) or []
    if not isinstance(values, list):
        raise ApiError(400, f"{key}: Input should be a valid array")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise ApiError(400, f"{key}.{number}: Input should be an object")
    return values


def _client_tools(body: Json) -> dict[str, tuple[str, Json]]:
    """The tools that the client runs: name -> (description, schema). Those of Anthropic's servers are left out."""
    tools: dict[str, tuple[str, Json]] = {}
    for number, tool in enumerate(_objects(body, "tools")):
        kind, schema, name = str(tool.get("type") or "custom"), tool.get("input_schema"), tool.get("name")
        if isinstance(schema, dict) or kind == "custom":
            for key, kinds in (("name", str), ("input_schema", dict)):
                if not isinstance(tool.get(key), kinds):
                    raise ApiError(400, f"tools.{number}.custom.{key}: Field required")
            tools[str(name)] = (str(tool.get("description") or ""), as_object(schema))
            continue
        known = next((row for prefix, row in CLIENT_TOOLS.items() if kind.startswith(prefix)), None)
        if known and isinstance(name, str):
            tools[name] = (known[0], _published_schema(known[1]))
    return tools


def _published_schema(parameters: str) -> Json:
    """The JSON schema of parameters as in CLIENT_TOOLS."""
    pairs = [part.split(": ") for part in parameters.split(", ")]
    integers: Json = {"type": "array", "items": {"type": "integer"}}

    def schema(kind: str) -> Json:
        return {"type": "string", "enum": kind.split("|")} if "|" in kind else {"type": kind}

    properties = {name.rstrip("*"): integers if kind == "integers" else schema(kind) for name, kind in pairs}
    return {"type": "object", "properties": properties, "required": [name[:-1] for name, _ in pairs if name[-1] == "*"]}


def callable_tools(body: Json) -> dict[str, Json]:
    """The tools that the reply may call: name -> input schema."""
    forbidden = as_object(body.get("tool_choice")).get("type") == "none"
    return {} if forbidden else {name: schema for name, (_, schema) in _client_tools(body).items()}


def unavailable_tool(body: Json) -> str:
    """The kind of tool that a request is only made for and that only Anthropic's servers have; otherwise "". The client
    takes any answer for its result, and a model would make one up."""
    tools = _objects(body, "tools")
    kinds = [re.sub(r"_\d+\Z", "", str(tool.get("type") or tool.get("name"))) for tool in tools]
    return "" if not tools or _client_tools(body) else kinds[0].replace("_", " ")


def _openai_tool(name: str, description: str, schema: Json) -> Json:
    parameters = {key: value for key, value in schema.items() if key != "$schema" and value is not None}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _tools_as_text(tools: Sequence[Json], calls: str) -> str:
    """For templates that do not show the tools."""
    example = write_calls(calls, [(0, "TOOL_NAME", {"PARAMETER": "VALUE"})])
    listed = "\n".join(to_json(tool["function"]) for tool in tools)
    return f"# Tools\n\nThese tools can be called:\n\n{listed}\n\nTo call one, write exactly this:\n\n{example}"


def _forced(body: Json, tools: Sequence[Json]) -> str:
    """What a tool_choice that asks for a call says in words; "" for any other."""
    choice = as_object(body.get("tool_choice"))
    if choice.get("type") not in ("any", "tool") or not tools:
        return ""
    named = f"the tool {choice.get('name')}" if choice["type"] == "tool" else "one of the tools"
    return f"Answer by calling {named} now."


def _tool_fields(body: Json, target: Target, tools: list[Json]) -> Json:
    """With our own parser tool_choice is always "none": the template still shows the tools, but the engine's parser and
    its grammar, which corrupt calls that are correct, stay off (mistral.rs 0.6 and 0.7: without tools, too)."""
    choice = as_object(body.get("tool_choice"))
    if target.own_tools:
        return {} if target.dialect.hides_tools or not tools else {"tools": tools, "tool_choice": "none"}
    if not tools:
        return {}
    wanted: Any = {"any": "required", "none": "none"}.get(str(choice.get("type")), "auto")
    if choice.get("type") == "tool":
        wanted = {"type": "function", "function": {"name": choice.get("name")}}
    if wanted not in ("auto", "none") and not target.forces_calls:
        wanted = "auto"
    single = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    return {"tools": tools, "tool_choice": wanted, **single}


def _thinking_fields(body: Json, dialect: Dialect, plain: bool) -> Json:
    """Whether and how much to think, where the model has a switch for it. `plain`: the answer must be without."""
    kind = as_object(body.get("thinking")).get("type", "disabled")
    effort = as_object(body.get("output_config")).get("effort")
    if dialect.thinking == "enable_thinking":
        return {"enable_thinking": kind != "disabled" and not plain}
    if dialect.thinking == "reasoning_effort" and kind == "disabled" and "thinking" in body:
        return {"reasoning_effort": "low"}
    if dialect.thinking == "reasoning_effort":
        return {"reasoning_effort": {"low": "low", "medium": "medium"}.get(str(effort), "high" if effort else "medium")}
    return {}


def _numbers_of(body: Json) -> Json:
    """The sampling that the client asks for."""
    found = {}
    for name, kinds in (("temperature", (int, float)), ("top_p", (int, float)), ("top_k", (int,))):
        value = body.get(name)
        if value is not None and (type(value) not in kinds or value < 0):
            raise ApiError(400, f"{name}: Input should be a valid number")
        if value is not None:
            found[name] = value
    return found


def stop_sequences(body: Json) -> list[str]:
    """The texts at which the reply shall end."""
    stops = body.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ApiError(400, "stop_sequences: Input should be a valid array of strings")
    return [stop for stop in stops if stop]  # mistral.rs would end at once for an empty one


def _system_text(system: Any) -> str:
    texts = (str(block.get("text") or "") for block in _blocks(system, "system"))
    kept = (re.sub(rf"\A{BILLING_BLOCK}[^\n]*\n*", "", text) for text in texts)
    return _join(text for text in kept if text.strip())


def _messages(body: Json, target: Target, system: str, order: str) -> list[Json]:
    """The conversation. `order`: a last word to the model."""
    turns = body.get("messages")
    if not isinstance(turns, list):
        problem = "Field required" if turns is None else "Input should be a valid array"
        raise ApiError(400, f"messages: {problem}")
    prompt = _Prompt(target)
    if system and target.dialect.no_system:
        prompt.add_user(system)
    elif system:
        prompt.messages.append({"role": "system", "content": system})
    read: list[tuple[str, list[Json]]] = []
    for number, turn in enumerate(turns):
        role = str(as_object(turn).get("role"))
        if role not in _TURNS:
            raise ApiError(400, f"messages.{number}.role: Input should be 'user', 'assistant' or 'system'")
        if "content" not in turn and role != "system":
            raise ApiError(400, f"messages.{number}.content: Field required")
        read.append((role, _blocks(turn.get("content"), f"messages.{number}.content")))
    for role, group in itertools.groupby(read, key=lambda turn: turn[0]):
        _TURNS[role](prompt, [block for _, blocks in group for block in blocks])
    prompt.close_calls({})
    if all(message["role"] == "system" for message in prompt.messages):
        raise ApiError(400, "messages: at least one message with text content is required")
    if prompt.messages[-1]["role"] == "assistant":  # no engine lets a model go on in the middle of a turn
        prompt.add_user(_reminder("Go on exactly where your last message ends, without repeating any of it."))
    prompt.add_user(_reminder(order))
    return prompt.messages


def translate_request(body: Any, target: Target) -> Json:
    """An Anthropic Messages request -> an OpenAI chat completions request, always streamed.

    Raises ApiError 400 that names the field which is not as it must be."""
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    tools = [_openai_tool(name, *tool) for name, tool in _client_tools(body).items()]
    system = _system_text(body.get("system"))
    if tools and target.dialect.hides_tools and target.own_tools:
        system = _join((system, _tools_as_text(tools, target.dialect.calls)))
    order = "" if target.forces_calls and not target.own_tools else _forced(body, tools)
    shape = as_object(as_object(body.get("output_config")).get("format")) or as_object(body.get("output_format"))
    schema = shape.get("schema") if shape.get("type") == "json_schema" else None
    wanted, stops = body.get("max_tokens", target.max_tokens), stop_sequences(body)
    if type(wanted) is not int or wanted < 0:
        raise ApiError(400, "max_tokens: Input should be a valid integer")
    request: Json = {
        "model": target.model,
        "messages": _messages(body, target, system, order),
        "max_tokens": max(1, min(wanted, target.max_tokens)),
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.sampling,
        **_numbers_of(body),
        **_tool_fields(body, target, tools),
        **_thinking_fields(body, target.dialect, schema is not None),
        **({"stop": stops} if stops else {}),
    }
    if isinstance(schema, dict) and target.dialect.calls != "harmony":  # its grammar would forbid the channels
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    return request


def prompt_too_long(tokens: int, limit: int) -> ApiError:
    """The one wording that makes the client compact the conversation and go on."""
    return ApiError(400, f"prompt is too long: {max(tokens, limit + 1)} tokens > {limit} maximum")


def fit_to_window(request: Json, tokens: int, doubt: float, window: int) -> Json:
    """The request with max_tokens held to what the window still has behind a prompt of about `tokens`; `doubt`: the
    part by which that may be too much. Raises ApiError for a prompt that surely does not fit."""
    least = int(tokens * (1 - doubt))
    if window and least >= window:
        raise prompt_too_long(tokens, window)
    rest = window - (tokens if tokens < window else least)
    return {**request, "max_tokens": rest} if 0 < rest < request["max_tokens"] else request


_LETTERS, _DIGITS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0123456789"
_NO_SIGNS = _LETTERS + _DIGITS + b" " + bytes(range(128, 256))
_IMAGE, _AS_LONG_AS_AN_IMAGE = re.compile(r'"data:image/[^"]{99,}"'), '"' + "9 " * 830 + '"'  # about 1,000 tokens
# Tokens in JSON by what can be counted fast: letters, digits, single spaces, signs, bytes of characters that are not
# ASCII behind their first, line ends. Fitted to o200k, Llama 3 and Mistral (times 0.85) on requests of Claude Code with
# code, logs, prose and Chinese: 1 % off for the first two, before anything was learned.
TOKEN_WEIGHTS = (0.2, 1.02, 0.18, 0.5, 0.37, 0.57)


def estimate_tokens(request: str) -> int:
    """About how many tokens the prompt in the JSON of an OpenAI request has. Some 0.4 ms for 80 kB."""
    request = _IMAGE.sub(_AS_LONG_AS_AN_IMAGE, request) if "data:image/" in request else request
    data = request.encode("utf-8", "replace")
    lines = data.count(b"\\n")
    counts: tuple[int, ...] = (
        len(data) - len(data.translate(None, _LETTERS)) - lines,
        len(data) - len(data.translate(None, _DIGITS)),
        data.count(b" ") - data.count(b"  "),
        len(data.translate(None, _NO_SIGNS)) - lines,
        len(data) - len(request),
        lines,
    )
    return max(1, round(sum(count * weight for count, weight in zip(counts, TOKEN_WEIGHTS))))


class TokenCount:
    """Estimates, corrected by what the engine counted for earlier prompts. `pairs`: the latest (estimate, tokens).

    A prompt mostly continues another one, so the nearest pair is taken, and only the difference is estimated: 1 % of
    error in the mean over six kinds of content and three tokenizers, 4 % at the most."""

    KEPT = 32

    def __init__(self, pairs: Iterable[Any] = ()) -> None:
        self.pairs: list[tuple[int, int]] = [(pair[0], pair[1]) for pair in pairs if _is_pair(pair)][-self.KEPT :]

    def corrected(self, estimate: int) -> int:
        """The number of tokens to expect."""
        if not self.pairs:
            return estimate
        ratio = sum(tokens for _, tokens in self.pairs) / sum(guess for guess, _ in self.pairs)
        guess, tokens = min(self.pairs, key=lambda pair: abs(pair[0] - estimate))
        if not 0.5 < guess / estimate < 2:
            return max(1, round(ratio * estimate))
        return max(1, round(tokens + ratio * (estimate - guess)))

    @property
    def doubt(self) -> float:
        """The part by which an expectation may be too high."""
        return 0.1 if self.pairs else 0.4

    def learn(self, estimate: int, tokens: int) -> bool:
        """The engine counted `tokens` -> whether that was news."""
        if (estimate, tokens) in self.pairs or not estimate / 10 < tokens < estimate * 10:
            return False
        self.pairs = [pair for pair in self.pairs if pair[0] != estimate][1 - self.KEPT :] + [(estimate, tokens)]
        return True


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and 0 < number < 10**9 for number in value)
    )


def count_request(request: Json) -> Json:
    """An OpenAI request back in Anthropic's form, without all that engines refuse: for those that count tokens so."""
    system, messages = "", []
    for message in request["messages"]:
        content = message["content"]
        text = content if isinstance(content, str) else _join(part.get("text", "") for part in content)
        blocks: list[Json] = [{"type": "text", "text": text}] if text else []
        if message["role"] == "system":
            system = text
            continue
        if message["role"] == "tool":
            blocks = [{"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": text}]
        for call in message.get("tool_calls", ()):
            arguments = json.loads(call["function"]["arguments"])
            blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments})
        messages.append({"role": "assistant" if message["role"] == "assistant" else "user", "content": blocks})
    functions = (tool["function"] for tool in request.get("tools", ()))
    keys = {"name": "name", "description": "description", "input_schema": "parameters"}
    tools = [{new: function[old] for new, old in keys.items()} for function in functions]
    return {"model": request["model"], "system": system, "messages": messages, "tools": tools}


# === 6 Tool text ==============================================================================
# Rule: pure. Text goes in as it is generated, in pieces cut anywhere; text, thinking and calls come out, the arguments
# as they are generated. What a call looks like is said by the rows of TOOL_FORMATS alone.

TextEvent = tuple[str, str]  # ("text", s), ("thinking", s), ("call", tool name) or ("arguments", a fragment of JSON)
Reader = Generator[None, None, Any]  # a parser that yields when it needs more text
Grown = tuple[re.Pattern[str], re.Pattern[str]]  # matches a whole thing, and all that can still become one

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# The opening fence of a code block, as in CommonMark, also behind the marker of a list.
_FENCE = re.compile(r"[ \t]*(?:(?:[-*+>]|\d+[.)])[ \t]+)*(`{3,}(?=[^`]*\Z)|~{3,})")
_PLAIN_JSON = re.compile(r"[^\"'\\\x00-\x1f]+|'")  # inside a string, up to what needs a look
_HEX = frozenset("0123456789abcdefABCDEF")
_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    **{word: f'"{word}"' for word in ("NaN", "Infinity", "-Infinity")},
}
_IS_JSON_WORD = re.compile(r"true|false|null|-?\d+(\.\d+)?([eE][+-]?\d+)?").fullmatch


class JsonRepair:
    """One JSON value as a stream: what is correct passes through, what has exactly one sensible reading is corrected
    (trailing comma, single quotes, bare key, raw newline or invalid escape in a string, Python's words), the rest passes
    as it is. `quote`: what stands around strings in place of the JSON quote, and what they contain is then no JSON.

    `done`: the value is complete; `stopped`: it was ended by "<", which no JSON has outside a string."""

    def __init__(self, quote: str = "") -> None:
        self.done = self.stopped = False
        self._own_quote = quote
        self._stack: list[str] = []
        self._quote = ""
        self._escaped = False
        self._held = ""  # a comma and the space behind it, until it is known that it does not trail
        self._word = ""

    def feed(self, text: str) -> tuple[int, str]:
        """-> (characters used, JSON to hand on). What is not used must come again, with more behind it."""
        out: list[str] = []
        at = before = 0
        while at < len(text) and not (self.done or self.stopped):
            at = self._in_string(text, at, out) if self._quote else self._outside(text, at, out)
            if at == before:
                break
            before = at
        return at, "".join(out)

    def close(self) -> str:
        """What completes a value that ended naturally but for its last brackets; "" inside a string."""
        if self._quote:
            return ""
        out: list[str] = []
        self._end_word(out, "")
        closers = "".join("}" if bracket == "{" else "]" for bracket in reversed(self._stack))
        self._stack, self._held, self.done = [], "", True
        return "".join(out) + closers

    @property
    def nested(self) -> bool:
        """Whether a bracket is open."""
        return bool(self._stack)

    def _end_word(self, out: list[str], following: str) -> None:
        if self._word:
            word = _WORDS.get(self._word, self._word)
            bare = self._own_quote and not _IS_JSON_WORD(word)
            out.append(json.dumps(word) if bare or following == ":" else word)
            self._word = ""
            self.done = not self._stack

    def _outside(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        if char.isalnum() or char in "+-._":
            out.append(self._held)
            self._held = ""
            self._word += char
            return at + 1
        self._end_word(out, char)
        if self.done:
            return at
        opens = self._own_quote and self._own_quote.startswith(text[at : at + len(self._own_quote)])
        if opens and len(text) - at < len(self._own_quote):
            return at  # perhaps a quote: more text will tell
        if char == "<" and not opens:
            self.stopped = True
            return at
        if char == "," or (self._held and char.isspace()):
            self._held += char
            return at + 1
        if char in "}]":
            self._held = ""
        out.append(self._held)
        self._held = ""
        if opens:
            self._quote = self._own_quote
            out.append('"')
            return at + len(self._quote)
        if char in "\"'":
            self._quote, char = char, '"'
        elif char in "{[":
            self._stack.append(char)
        elif char in "}]" and self._stack:
            self._stack.pop()
            self.done = not self._stack
        out.append(char)
        return at + 1

    def _in_string(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        if len(self._quote) > 1:
            return self._in_raw_string(text, at, out)
        if self._escaped:
            code = text[at + 1 : at + 5]
            if char == "u" and len(code) < 4 and all(digit in _HEX for digit in code):
                return at  # more text will tell whether that is a character's code
            self._escaped = False
            if char == "u" and not all(digit in _HEX for digit in code):
                out.append("\\")
            out.append(
                "\\" + char if char in '"\\/bfnrtu' else "'" if char == "'" else "\\\\" + _ESCAPES.get(char, char)
            )
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""
            out.append('"')
            self.done = not self._stack
        elif char == '"':
            out.append('\\"')
        elif char < " ":
            out.append(_ESCAPES.get(char, f"\\u{ord(char):04x}"))
        else:
            plain_text = _PLAIN_JSON.match(text, at)
            assert plain_text is not None  # what it does not match was handled above
            out.append(plain_text[0])
            return plain_text.end()
        return at + 1

    def _in_raw_string(self, text: str, at: int, out: list[str]) -> int:
        """Up to the quote, which nothing in the string can escape."""
        end = _finder((self._quote,)).search(text, at)
        out.append(_json_text(text[at : end.start() if end else len(text)]))
        if not end or not end[1]:
            return end.start() if end else len(text)
        self._quote = ""
        self.done = not self._stack
        out.append('"')
        return end.end()


def _json_text(text: str) -> str:
    """`text` as the inside of a JSON string."""
    return to_json(text)[1:-1]


def _types(schema: Any, root: Json, depth: int = 0) -> set[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    schema = as_object(schema)
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else {name for name in as_list(named) if isinstance(name, str)}
    values = [*as_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    types |= {"string" if isinstance(value, str) else "other" for value in (values if not types else [])}
    inner = [part for key in ("anyOf", "oneOf", "allOf") for part in as_list(schema.get(key))]
    reference = str(schema.get("$ref", ""))
    if reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = as_object(target).get(step)
        inner.append(target)
    return types.union(*(_types(part, root, depth + 1) for part in inner)) if depth < 8 else types


def _coerce(value: str) -> str:
    """A parameter's text as the JSON that it is, repaired if need be; what is none stays a string: the client tells the
    model what it should have been."""
    repair = JsonRepair()
    used, text = repair.feed(value.strip())
    text += repair.close() if not repair.stopped and not repair.nested else ""
    with contextlib.suppress(ValueError, RecursionError):
        if used == len(value.strip()):
            return to_json(json.loads(text))
    return to_json(value)


# How thinking is written: its opener and its closer. Source: the chat templates of Qwen3, DeepSeek-R1 and GLM-4.5 (the
# first), Magistral, Seed-OSS, gpt-oss (harmony), Gemma 4, Kimi.
THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("◁think▷", "◁/think▷"),
)
# What also ends thinking, because it is one token and never meant: Kimi-K2 and DeepSeek forget to close.
CALLS_BEGIN = ("<|tool_calls_section_begin|>", "<｜tool▁calls▁begin｜>")
# Special tokens that engines let through, and never part of an answer. Longer ones first.
_LEAKS = """
    <|im_start|>assistant <|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|>
    <|start_header_id|>assistant<|end_header_id|> <end_of_turn> <start_of_turn>model <turn|> <|turn>model
    <|tool_response> <｜end▁of▁sentence｜> <|startoftext|> <|begin_of_text|> <|start|>assistant<|channel|>final<|message|>
    <|start|>assistant<|channel|>commentary<|message|> <|channel|>final<|message|> <|channel|>commentary<|message|>
    <|return|> <|call|> <|end|> <|user|> <|assistant|> <|observation|> <|END_OF_TURN_TOKEN|> <|eot|> [e~[ <|endofturn|> <eos> <|python_tag|>"""
_CONSTRAINED = "<|channel|>final <|constrain|>json<|message|>"
LEAKS = ("<|start|>assistant" + _CONSTRAINED, _CONSTRAINED, *_LEAKS.split(), *(closer for _, closer in THINKING))


# What a row of TOOL_FORMATS consists of: a {field}, what may be missing (in parentheses), white space, a literal.
_ATOM = re.compile(r"\{(?P<field>\w+)\}|\(\??(?P<option>[^()]*)\)|(?P<space>\s+)|(?P<literal>[^{}()\s]+)")
_SPACE = r"\s{0,99}(?!\s)"  # bounded and all of it, or a model that falls into line ends would cost cubic time
_FIELDS = {
    "name": r"(?P<name>[\w.-]*)",
    "key": r"(?P<key>[^<>\"\n]*)",
    "number": r"\d*",
    "id": r"[\w-]*",
    "text": r"\w*",
}


def _prefixes(word: str) -> str:
    """A regular expression for every beginning of `word` that is not the whole."""
    return "".join(f"(?:{re.escape(char)}" for char in word[:-1]) + ")?" * (len(word) - 1)


def _grown(pattern: str, followers: Sequence[str] = ()) -> Grown:
    """The regular expressions of (a part of) a row; `followers`: literals, one of which must come next."""
    whole, partial = _expressions(pattern)
    if followers:
        whole += _SPACE + "(?=" + "|".join(map(re.escape, followers)) + ")"
        partial += _SPACE + "(?:" + "|".join(map(_prefixes, followers)) + r")\Z"
    return re.compile(whole), re.compile(partial)


def _expressions(pattern: str) -> tuple[str, str]:
    whole = partial = ""
    for atom in _ATOM.finditer(pattern):
        if atom["field"]:
            more = _FIELDS[atom["field"]]
            whole, partial = whole + more, partial + more
        elif atom["option"]:
            inner_whole, inner_partial = _expressions(atom["option"])
            whole, partial = f"{whole}(?:{inner_whole})?", f"{partial}(?:{inner_partial})?"
        elif atom["space"]:
            whole, partial = whole + _SPACE, partial + _SPACE
        else:
            literal = re.escape(atom["literal"])
            whole, partial = whole + literal, f"{partial}(?:{literal}|{_prefixes(atom['literal'])}\\Z)"
    return whole, partial


def _literals(pattern: str) -> tuple[str, ...]:
    """The literals in (a part of) a row, those that may be missing included."""
    return tuple(atom["literal"] for atom in _ATOM.finditer(re.sub(r"\(\??|\)", " ", pattern)) if atom["literal"])


@functools.cache
def _finder(words: tuple[str, ...], at_the_end: bool = False) -> re.Pattern[str]:
    """Finds the first of `words`, as group 1, or else (but not `at_the_end`) what could become one with more text."""
    longest_first = sorted(words, key=len, reverse=True)
    whole = "|".join(map(re.escape, longest_first)) or "(?!)"
    begun = "|".join(re.escape(word[0]) + _prefixes(word[1:]) for word in longest_first if word[1:]) or "(?!)"
    return re.compile(f"({whole})" if at_the_end else rf"({whole})|(?:{begun})\Z")


def _fence_behind(fence: str, line: str) -> str:
    """The fence of the code block that is open behind `line`, if `fence` was open in front of it."""
    if fence:
        return "" if line.rstrip().endswith(fence) else fence  # CommonMark wants it alone, models forget that
    found = _FENCE.match(line)
    return found[1] if found else ""


class _Shape:
    """A row of TOOL_FORMATS as it is read. `head`: up to the arguments; `body`: what they are; `tail`: the literals behind
    them, any of which may be missing; `openers`: what begins it anywhere; `bare_starts`: first characters of a call without
    opener, which is only looked for before any text."""

    def __init__(self, row: ToolFormat) -> None:
        call = (f"({row.before}) " if row.before else "") + row.call + (f" ({row.after})" if row.after else "")
        head, self.body, tail = re.split(r"\{(arguments|json|parameters)\}", call)
        self.tail, self.quote = _literals(tail), row.quote
        followers: tuple[str, ...] = ("{",)
        if self.body == "parameters":
            before, value_end = row.parameter.split("{value}")
            self.starts, self.end = _literals(before)[0], _literals(value_end)[0]
            self.parameter = _grown(before.rstrip("\n"))
            self.own_line = before.endswith("\n")
            followers = (self.starts, self.tail[0])
        self.head = _grown(head + " ", followers)
        openers: list[str] = []
        first = "{"
        for atom in _ATOM.finditer(head):
            openers += _literals(atom["option"] or "")[:1]
            if atom["literal"]:
                first = atom["literal"]
                break
        bare = first[0].isalpha() or first == "{"  # nothing tells it from text but that it comes first
        self.bare_starts = {first[0], *(openers if first == "{" else ())} if bare else set()
        self.openers = () if first == "{" else tuple(openers) if bare else (*openers, first)


@functools.cache
def _shapes(first: str) -> tuple[_Shape, ...]:
    """The rows of TOOL_FORMATS, that of the model's own template in front."""
    return tuple(_Shape(row) for row in sorted(TOOL_FORMATS, key=lambda row: row.name != first))


ANY_BYTE = bytes(range(256))


class ToolText:
    """The text of one reply, parsed as it comes. `tools`: name -> input schema; only these names start a call. `first`:
    the row of TOOL_FORMATS to try first; `thinks`: the prompt ended with the opener of a thinking block (until the first
    text came it may be taken back).

    The parser is one generator over a growing buffer: each step either has what it needs or yields for more, so
    where the stream was cut makes no difference. A reader looks ahead from `_at` and takes nothing away before it
    knows that a call begins; until then it may return False, and what it saw stays text."""

    def __init__(self, tools: Mapping[str, Json], first: str = "", thinks: bool = False) -> None:
        self._tools, self.thinks = tools, thinks
        self._shapes = _shapes(first) if tools else ()
        openers = (opener for shape in self._shapes for opener in shape.openers)
        self._bare_starts = {start for shape in self._shapes for start in shape.bare_starts}
        self._stops = tuple(sorted({*openers, *(opener for opener, _ in THINKING), *LEAKS}))
        self._buffer, self._at = "", 0
        self._final = self._natural = False
        self._undecided = False  # the end came while a reader waited for more
        self._fresh = True  # no text since the beginning, the last call or the last thinking
        self._said: list[str] = []  # since `_in_code` was last asked
        self._line, self._ticks = "", 0  # the line that is being said: how it begins, its backticks
        self._spanned, self._fence = False, ""  # in code between backticks; the fence of the code block that is open
        self._shown: set[str] = set()  # closers of thinking whose opener was shown as text
        self._events: list[TextEvent] = []
        self._is_free = False  # it waits for one of `_stops` in text, and holds nothing back
        self._harmless = ANY_BYTE.translate(None, bytes(stop.encode()[0] for stop in self._stops))
        self._parser = self._run()
        next(self._parser)

    def feed(self, text: str) -> list[TextEvent]:
        """The next piece of the model's output -> what is now known."""
        self._buffer += text
        return self._advance()

    @property
    def free(self) -> bytes:
        """A next piece that consists of these bytes only (in UTF-8) is text in any case: `pass_on` is enough for it."""
        return self._harmless if self._is_free else b""

    def pass_on(self, text: str) -> None:
        """Take such a piece."""
        self._said.append(text)

    def end(self, natural: bool) -> list[TextEvent]:
        """The output is over -> the rest. `natural`: the model ended it, so that a missing last bracket may be added."""
        self._final, self._natural = True, natural
        return self._advance()

    def _advance(self) -> list[TextEvent]:
        next(self._parser, None)
        events, self._events = self._events, []
        return events

    def _run(self) -> Reader:
        yield
        if self.thinks:
            yield from self._think_from_the_start()
        while True:
            bare = self._fresh and (yield from self._space()) in self._bare_starts
            self._say(self._take(self._at))
            if not bare and not (yield from self._flow(self._say, self._stops)):
                return
            self._undecided = False
            if not (yield from self._read_markup()):
                cut = self._undecided and not self._natural and not bare
                text = self._take(len(self._buffer) if cut else 1)
                self._say("" if cut else text)  # half a call's opening is nothing to show

    def _say(self, text: str) -> None:
        if text:
            self._fresh = self._fresh and text.isspace()
            self._said.append(text)
            self._events.append(("text", text))

    def _take(self, count: int) -> str:
        """Take `count` characters off the buffer."""
        text, self._buffer, self._at = self._buffer[:count], self._buffer[count:], 0
        return text

    def _read_markup(self) -> Reader:
        """Whether a call, thinking or a leaked token begins here; then it was read. In code only a token that ends the
        reply: there people write about calls."""
        in_code = self._in_code()
        for reader in (self._read_call, self._read_thinking) if not in_code else ():
            if (yield from reader()):
                self._fresh = True
                return True
        return (yield from self._pass_leak(in_code))

    def _in_code(self) -> bool:
        """Whether what was said so far ends in a code block, or in the code behind a backtick."""
        text = "".join(self._said)
        self._said.clear()
        *lines, last = (self._line + text).split("\n")
        for line in lines:
            self._fence = _fence_behind(self._fence, line)
        self._line = last[:99]  # enough to see a fence
        self._ticks = text.rpartition("\n")[2].count("`") + (0 if lines else self._ticks)
        self._spanned = "`" not in text if self._spanned else self._ticks % 2 == 1 and text.endswith("`")
        fence = _fence_behind(self._fence, last)
        self._spanned &= fence == self._fence  # the line of a fence has no code between backticks
        return self._spanned or bool(fence)

    # Small steps. Each looks at the buffer from `_at`, and yields when that is not enough to decide.

    def _flow(self, emit: Callable[[str], None], stops: tuple[str, ...]) -> Reader:
        """Hand text on as it comes until one of `stops` -> that one, which is left in the buffer; "" at the end."""
        find = _finder(stops)
        while True:
            if self._final and (self._natural or emit == self._say):  # a call that is cut off ends before its closer
                find = _finder(stops, at_the_end=True)
            held = find.search(self._buffer)
            count = held.start() if held else len(self._buffer)
            if count:
                emit(self._take(count))
            if self._final or (held and held[1]):
                return held[1] if held and held[1] else ""
            self._is_free = emit == self._say and not self._buffer
            yield
            self._is_free = False

    def _space(self) -> Reader:
        """Skip white space -> the character behind it, "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if self._final:
                self._undecided = True
                return ""
            yield

    def _literal(self, text: str) -> Reader:
        """Whether `text` comes next; if so it is passed."""
        while True:
            have = self._buffer[self._at : self._at + len(text)]
            if have == text:
                self._at += len(text)
                return True
            if self._final or not text.startswith(have):
                return False
            yield

    def _match(self, grown: Grown, names: Collection[str] = ()) -> Reader:
        """The match of what comes next, which is passed; None as soon as it cannot be, or names none of `names`."""
        whole, partial = grown
        while True:
            found = whole.match(self._buffer, self._at)
            if found and (not names or found["name"] in names):
                self._at = found.end()
                return found
            part = partial.fullmatch(self._buffer, self._at)
            if part and names and not any(known.startswith(part["name"] or "") for known in names):
                part = None
            if self._final or not part:
                self._undecided |= part is not None
                return None
            yield

    def _name_until(self, stop: str, names: Collection[str]) -> Reader:
        """The word up to `stop`, which is passed; None as soon as it can be none of `names`."""
        while True:
            name, found, _ = self._buffer[self._at :].partition(stop)
            if found and name in names:
                self._at += len(name) + len(stop)
                return name
            possible = not found and any(known.startswith(name) for known in names)
            if self._final or not possible:
                self._undecided |= possible
                return None
            yield

    def _value(self, repair: JsonRepair, emit: Callable[[str], None]) -> Reader:
        """Read on to the end of a JSON value, handing it on as it comes."""
        while True:
            used, fragment = repair.feed(self._buffer[self._at :])
            self._at += used
            if fragment:
                emit(fragment)
            if emit == self._argue:
                self._take(self._at)
            if repair.done or repair.stopped or self._final:
                return
            yield

    def _begin(self, name: str) -> None:
        """A call begins: what was looked at is used up."""
        self._events.append(("call", name))
        self._take(self._at)

    def _argue(self, fragment: str) -> None:
        if fragment:
            self._events.append(("arguments", fragment))

    # Readers.

    def _read_thinking(self) -> Reader:
        for opener, closer in THINKING:
            self._at = 0
            if (yield from self._literal(opener)):
                if not (self._fresh or "|" in opener):
                    self._shown.add(closer)
                    return False
                self._take(self._at)
                yield from self._think_until(closer, answers=False)
                return True
        return False

    def _think_from_the_start(self) -> Reader:
        """Thinking whose opener was the end of the prompt."""
        opener, closer = THINKING[0]
        yield from self._space()
        if not (yield from self._literal(opener)):
            self._at = 0
        self._take(self._at)
        yield from self._think_until(closer, answers=True)

    def _think_until(self, closer: str, answers: bool) -> Reader:
        """Thinking up to its closer. What is never closed is searched for calls, so that the model's turn does not end
        in silence; `answers`: without one, it was the answer."""
        said: list[str] = []

        def think(text: str) -> None:
            said.append(text)
            self._events.append(("thinking", text))

        end = yield from self._flow(think, (closer, *CALLS_BEGIN))
        self._take(len(end) if end == closer else 0)
        if end or not self._natural:
            return
        inner = ToolText(self._tools)
        found = inner.feed("".join(said).strip()) + inner.end(natural=True)
        calls = [event for event in found if event[0] in ("call", "arguments")]
        self._events += calls or (found if answers else [])

    def _pass_leak(self, only_at_the_end: bool) -> Reader:
        """A special token that the engine should have kept, or the closer of a thinking block that was never opened."""
        undecided = self._undecided
        for token in LEAKS if self._natural or not undecided else ():
            self._at = 0
            if token not in self._shown and (yield from self._literal(token)):
                end = self._at
                if not only_at_the_end or not (yield from self._space()):
                    self._take(end)
                    return True
        self._undecided = undecided
        return False

    def _read_call(self) -> Reader:
        for shape in self._shapes:
            self._at = 0
            if not shape.openers and not self._fresh:
                continue
            found = yield from self._match(shape.head, self._tools if shape.body != "json" else ())
            if not found:
                continue
            if shape.body == "json":
                called = yield from self._read_objects(bare=not shape.openers)
            else:
                self._begin(found["name"])
                called = True
                if shape.body == "arguments":
                    yield from self._read_arguments("{", shape.quote)
                elif not (yield from self._read_parameters(shape, as_object(self._tools[found["name"]]))):
                    self._take(len(self._buffer))  # it was cut off
            if called:
                yield from self._pass_tail(shape.tail)
                return True
        return False

    def _pass_tail(self, tail: Sequence[str]) -> Reader:
        """Pass what stands behind a call, whatever of it is there."""
        end = self._at
        for literal in tail:
            self._at = end
            yield from self._space()
            if (yield from self._literal(literal)):
                end = self._at
        rest = self._buffer[end:].strip()
        cut = self._final and rest and any(literal.startswith(rest) for literal in tail)
        self._take(len(self._buffer) if cut else end)

    def _read_objects(self, bare: bool) -> Reader:
        """Objects with a tool's name and arguments, one after the other -> whether there was one."""
        called = False
        while (yield from self._space()) == "{" and (yield from self._read_object(bare)):
            called, end = True, self._at
            while (char := (yield from self._space())) and char in ("," if bare else "}],"):
                self._at += 1
                end = self._at
            self._take(end)
        self._at = 0
        return called

    def _read_object(self, bare: bool) -> Reader:
        """`{"name": N, "arguments": {...}}`, the keys in either order."""
        self._at += 1
        name = early = key = ""
        while not (name and early):
            quote = yield from self._space()
            if quote == "," and key:
                self._at += 1
                continue
            if quote == "}" and name:  # a call without arguments
                break
            if not quote or quote not in "\"'":
                return False
            self._at += 1
            key = yield from self._name_until(quote, ("name", "arguments", "parameters", "id", "type"))
            if key is None or (yield from self._space()) != ":":
                return False
            self._at += 1
            first = yield from self._space()
            if key == "name":
                self._at += 1
                name = ((yield from self._name_until(first, self._tools)) if first and first in "\"'" else None) or ""
                if not name:
                    return False
            elif key in ("arguments", "parameters") and name:
                self._begin(name)
                yield from self._read_arguments(first)
                yield from self._end_object()
                return True
            elif bare and not (key == "type" and (yield from self._literal('"function"'))):
                return False  # some JSON, not to be held back
            elif not (bare and key == "type"):
                parts: list[str] = []
                yield from self._value(JsonRepair(), parts.append)
                early = "".join(parts) if key in ("arguments", "parameters") else early
        self._begin(name)
        self._argue(_object_text(early))
        yield from self._end_object()
        return True

    def _read_arguments(self, first: str, quote: str = "") -> Reader:
        """The arguments' value, handed on as it comes; an object written as a JSON string is unpacked when whole."""
        repair = JsonRepair(quote)
        parts: list[str] = []
        if first != "{":
            yield from self._value(repair, parts.append)
            cut = self._final and not (repair.done or (self._natural and first))
            self._argue("{" if cut else _object_text("".join(parts)))  # "{": not to be run
            return
        yield from self._value(repair, self._argue)
        if repair.stopped or (self._natural and not repair.done):
            self._argue(repair.close())
        self._take(self._at)

    def _end_object(self) -> Reader:
        """Pass what stands between the arguments and the end of the object around them."""
        rest = JsonRepair()
        rest.feed('{"": 0')
        yield from self._value(rest, lambda fragment: None)

    def _read_parameters(self, shape: _Shape, schema: Json) -> Reader:
        """One parameter after the other -> whether the call came to its end."""
        properties, before = as_object(schema.get("properties")), ""
        self._argue("{")
        while True:
            yield from self._space()
            found = yield from self._match(shape.parameter)
            if not found:
                break
            key = found["key"]
            self._argue(f"{before}{to_json(key)}: ")
            before = ", "
            self._take(self._at)
            if not (yield from self._read_value(shape, _types(properties.get(key), schema))):
                return False
        closed = yield from self._literal(shape.tail[0])
        if self._final and not closed and (not self._natural or self._buffer[self._at :].strip()):
            return False  # cut off, or in the middle of a parameter
        self._argue("}")
        return True

    def _read_value(self, shape: _Shape, types: Collection[str]) -> Reader:
        """One parameter's value up to its end -> whether it has one. A string is handed on as it comes.

        Its closer ends it only where the next parameter or the call's end follows: code may contain the tag. The two
        closers of the call end it too: that of the value is sometimes forgotten."""
        streamed = not types or "string" in types
        parts: list[str] = []
        take = (lambda text: self._argue(_json_text(text))) if streamed else parts.append
        if streamed:
            self._argue('"')
        if shape.own_line and (yield from self._literal("\n")):
            self._take(self._at)
        ends = (shape.end, shape.tail[0])
        stops = tuple(("\n" if shape.own_line else "") + end for end in ends) + ends
        while stop := (yield from self._flow(take, stops)):
            ends = yield from self._ends_value(shape, stop)
            if ends or (self._undecided and not self._natural):
                break
            take(self._take(len(stop)))
        if not stop or not ends:
            return False
        self._take(self._at)
        self._argue('"' if streamed else _coerce("".join(parts)))
        return True

    def _ends_value(self, shape: _Shape, stop: str) -> Reader:
        """Whether the tag at the beginning of the buffer really ends a value; `_at` is then where the call goes on."""
        self._at = len(stop)
        own = stop.endswith(shape.end)
        char = yield from self._space()
        behind = self._at
        ends = not char and self._natural
        followers = (shape.starts, *shape.tail) if own else shape.tail[1:]
        for follower in followers:
            ends = ends or (yield from self._literal(follower))
        rest = self._buffer[behind:]
        self._undecided = self._final and not ends and any(follower.startswith(rest) for follower in followers)
        self._at = behind if own or not ends else 0
        return ends


def _object_text(value: str) -> str:
    """The arguments of a call as an object: unpacked from a JSON string, {} for nothing."""
    with contextlib.suppress(ValueError):
        content = json.loads(value) if value else None
        if isinstance(content, str):
            return content
        if content is None:
            return "{}"
    return value


# === 7 Reply ==================================================================================
# Rule: pure. OpenAI chunks in, Anthropic events out, in the one legal order: message_start, then blocks that are opened,
# filled and closed one after the other, then message_delta and message_stop; or an error, after which nothing comes.

Event = Json  # as in the data line of the client's stream; its "type" is the event's name

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
# How engines say that a prompt is too long: `limit` and, where it is told, `prompt` in tokens; with `output` it is the sum
# that is. Source: mistralrs-core at v0.6.0 to v0.9.2; vLLM 0.9 to 0.33; llama.cpp's server; SGLang 0.5; LM Studio, TGI,
# OpenAI and Ollama as quoted in their issues.
OVERFLOWS = (
    r"Prompt sequence length is greater than (?P<limit>\d+)",
    r"exceeds the total KV cache capacity of (?P<limit>\d+)",
    r"context length is (?P<limit>\d+) tokens.{0,40}requested \d+ tokens \((?P<prompt>\d+) in .{0,20}?, (?P<output>\d+) in",
    r"context length is (?P<limit>\d+) tokens.{0,40}requested (?P<output>\d+) output tokens and your prompt contains (?P<prompt>\d+) input",
    r"max_(?:completion_)?tokens=(?P<output>\d+) cannot be greater than max_model_len=(?P<limit>\d+)",
    r"too large: (?P<output>\d+)\. This model's maximum context length is (?P<limit>\d+) tokens and your request has (?P<prompt>\d+)",
    r"maximum context length of (?P<limit>\d+) tokens\..{0,60}: (?P<prompt>\d+) tokens from the input.{0,20} and (?P<output>\d+) tokens",
    r"(?P<prompt>\d+) (?:prompt|`inputs` tokens) (?:\+|and) (?P<output>\d+).{0,60}?(?:MAX_KV_SIZE is (?P<limit>\d+))",
    r"must be <= (?P<limit>\d+)\. Given: (?P<prompt>\d+) `inputs` tokens and (?P<output>\d+)",
    r"must have less than (?P<limit>\d+) tokens\. Given: (?P<prompt>\d+)",
    r"context length is (?P<limit>\d+) tokens.{0,50}?(?:has|contains|resulted in|requested)(?: about)? (?P<prompt>\d+) (?:input )?tokens",
    r"context length is (?P<limit>\d+) tokens",
    r"[Ii]nput length \(?(?P<prompt>\d+)(?: tokens)?\)? exceeds .{0,40}?length \(?(?P<limit>\d+)",
    r"\(length (?P<prompt>\d+)\).{0,90}?maximum model length of (?P<limit>\d+)",
    r"\(total length (?P<prompt>\d+)\).{0,60}?context length (?P<limit>\d+)",
    r"input \((?P<prompt>\d+) tokens\) is (?:longer|larger) than .{0,40}?\((?P<limit>\d+) tokens\)",
    r"request \((?P<prompt>\d+) tokens\) exceeds the available context size \((?P<limit>\d+)",
    r"n_keep:? \(?(?P<prompt>\d+)\)? *>= n_ctx:? \(?(?P<limit>\d+)",
    r"first (?P<prompt>\d+) tokens when context the overflows.{0,60}?length of only (?P<limit>\d+)",
    r"Requested tokens \((?P<prompt>\d+)\) exceed context window of (?P<limit>\d+)",
    r"configured limit of (?P<limit>\d+) tokens\. Your messages resulted in (?P<prompt>\d+)",
    (
        r"too long and exceeds KV cache size|exceeds the available context size|[Cc]ontext size has been exceeded|"
        r"exceeds the context (?:window|length)|(?:longer|greater) than the context length|context_length_exceeded"
    ),
)


class EventStream:
    """Server-sent events from bytes cut anywhere -> the text of each `data:` line (and of `error:`, as some builds of
    llama.cpp send it). Comments and other fields are passed over."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.pending = False  # a line has begun that is not whole: `_parts`

    def feed(self, data: bytes) -> list[str]:
        """More bytes -> the payloads that are now whole."""
        if b"\n" not in data:
            self._parts.append(data)
            self.pending |= bool(data)
            return []
        *lines, rest = b"".join((*self._parts, data)).split(b"\n")
        self._parts, self.pending = [rest], bool(rest)
        fields = (line.partition(b":") for line in lines if line.startswith((b"data:", b"error:")))
        return [value.strip().decode("utf-8", "replace") for _, _, value in fields if value.strip()]


def _error_text(value: Any) -> str:
    """The message in an error, which servers wrap in different ways."""
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            return _error_text(value[key])
    return value if isinstance(value, str) else to_json(value) if value else ""


def engine_error(status: int, text: str, prompt_tokens: int, window: int = 0) -> ApiError:
    """An engine's error (JSON or plain text) in the client's words. An overflow makes the client compact and go on."""
    whole = text
    with contextlib.suppress(ValueError, RecursionError):
        text = _error_text(json.loads(text)) or text
    for pattern in OVERFLOWS:
        found = re.search(pattern, text, re.DOTALL) or re.search(pattern, whole, re.DOTALL)
        if found:
            numbers = {name: int(number) for name, number in found.groupdict().items() if number}
            limit = numbers.get("limit", window or prompt_tokens - 1)
            prompt, output = numbers.get("prompt", prompt_tokens), numbers.get("output", 0)
            if output and prompt < limit - 1000:  # the client asks for limit - prompt - 1000 then
                sums = f"{prompt} + {output} > {limit}"
                return ApiError(400, f"input length and `max_tokens` exceed context limit: {sums}")
            return prompt_too_long(prompt, limit)
    message = f"the engine: {text.strip() or f'HTTP status {status}'}"
    if status in (401, 403):
        message += " (check apiKey in ~/.anyclauderc.json)"
    refused = 400 <= status < 500 and status not in (413, 429)  # its 401 is none of the client's: no cause to log in
    return ApiError(400 if refused else 529 if status == 503 else status if status >= 400 else 500, message)


def read_chunk(payload: str) -> Json | None:
    """A chunk of the engine; None for an error, which older generations send as plain text."""
    try:
        chunk = from_json(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(chunk, dict) or chunk.get("error"):
        return None
    return chunk if chunk.get("choices") or not chunk.keys() & {"message", "detail"} else None


class StopText:
    """A text up to the first of `stops`, wherever it is cut: engines let the stop itself through, in whole or in part."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._rest = ""
        self.found = ""

    def feed(self, text: str) -> str:
        """More text -> what surely stands before any stop."""
        text = self._rest + text
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            end, self.found = min(places)
        else:
            longest = max(map(len, self._stops))
            held = (size for size in range(min(longest - 1, len(text)), 0, -1) if self._begins(text[-size:]))
            end = len(text) - next(held, 0)
        self._rest = text[end:]
        return text[:end]

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def end(self) -> str:
        """What was held back, and is no stop."""
        return "" if self.found else self._rest


class Reply:
    """One reply, as a state machine. `text`: reads what the model writes; `prompt_tokens`: an estimate, until the engine
    says it exactly; `new_id`: a fresh text for an id; `stops`: texts that end the reply; `one_call`: no call after the first."""

    def __init__(
        self, model: str, text: ToolText, new_id: Callable[[], str], stops: Sequence[str] = (), one_call: bool = False
    ) -> None:
        self._model, self._text, self._new_id = model, text, new_id
        self._stop = StopText(stops)
        self._stops, self._one_call = stops, one_call
        self._events: list[Event] = []
        self._state = "new"  # -> "open" -> "ended"
        self._block = ""  # the type of the open block
        self._index = -1  # of the block that was opened last
        self._space = ""  # white space that shows only if text follows
        self._calls = 0
        self._muted = False  # the call behind the only one that is allowed has begun
        self._engine_calls: list[Json] = []
        self.reason = ""
        self.stop_reason = ""  # once it has ended
        self._output = 0
        self.counted = False  # the engine has told the prompt's tokens
        self.tells_cached = False  # and how many of them it had cached
        self.prompt_seconds = 0.0  # for which it says it read the prompt
        self.prompt = self._cached = 0

    @property
    def begun(self) -> bool:
        """Whether anything was said."""
        return self._state != "new"

    @property
    def ended(self) -> bool:
        """Whether all was said."""
        return self._state == "ended"

    @property
    def writes(self) -> bool:
        """Whether the model has begun to write."""
        return self._index >= 0

    @property
    def usage(self) -> Json:
        """Tokens so far. What the engine had cached is not counted as input a second time."""
        return {
            "input_tokens": max(0, self.prompt - self._cached),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached,
            "output_tokens": self._output,
        }

    def start(self) -> list[Event]:
        """message_start, once."""
        if self._state == "new":
            self._state = "open"
            message: Json = {"id": "msg_" + self._new_id(), "type": "message", "role": "assistant"}
            message.update(model=self._model, content=[], stop_reason=None, stop_sequence=None, usage=self.usage)
            self._emit("message_start", message=message)
        return self._take()

    def feed(self, chunk: Json) -> list[Event]:
        """One OpenAI chunk -> its events."""
        if self._state == "ended":
            return []
        choice = as_object(next(iter(as_list(chunk.get("choices"))), None))
        if not choice and not chunk.get("usage"):
            return []
        if choice.get("error") or choice.get("finish_reason") in ("error", "abort"):
            return self.fail(ApiError(500, f"the engine: {_error_text(choice) or 'it broke off'}"))
        first = self.start()
        delta = as_object(choice.get("delta"))
        for kind, text in _said_in(delta):
            self._output += 1  # a token, most likely, until the engine tells
            self._text.thinks &= kind == "text"  # an engine may tell thinking from text itself
            if kind == "text" and self._stops:
                text = "" if self._stop.found else self._stop.feed(text)
            self._apply(self._text.feed(text) if kind == "text" else [(kind, text)])
        if chunk.get("usage"):
            self._count(as_object(chunk["usage"]))
        if delta.get("tool_calls") or delta.get("function_call"):
            for call in as_list(delta.get("tool_calls")) or [{"function": delta.get("function_call")}]:
                self._call_of_engine(as_object(call))
        self.reason = str(choice.get("finish_reason") or self.reason)
        if self._stops:
            matched = choice.get("stop_reason") or choice.get("matched_stop")  # vLLM, SGLang
            self._stop.found = str(matched) if matched in self._stops else self._stop.found
        return first + self._take()

    def free(self, kind: str) -> bytes:
        """A next text of `kind` ("text" or "thinking") that consists of these bytes only (in UTF-8) just makes the open block
        longer: `pass_on` is enough, until something is fed."""
        if not kind or kind != self._block or self._stops or self._muted or self.ended:
            return b""
        return self._text.free if kind == "text" else ANY_BYTE

    def pass_on(self, texts: Sequence[str]) -> Event:
        """Take such texts, one a chunk -> their one event."""
        self._output += len(texts)
        text = "".join(texts)
        if self._block == "text":
            self._text.pass_on(text)
        return self.longer(text)

    def longer(self, text: str) -> Event:
        """What makes the open block, of text or thinking, longer by `text`."""
        delta = {"type": f"{self._block}_delta", self._block: text}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def finish(self, done: bool) -> list[Event]:
        """The engine's stream is over; `done`: it said so, and was not cut off."""
        if self._state == "ended":
            return []
        if not self.reason and (not done or self._state == "new"):
            return self.fail(ApiError(500, "the engine's answer was " + ("empty" if done else "cut off")))
        first = self.start()
        self._apply(self._text.feed(self._stop.end()))
        self._apply(self._text.end(natural=self.reason != "length" and not self._stop.found))
        self._hand_on_calls(final=True)
        self._close()
        self._state = "ended"
        reason = STOP_REASONS.get(self.reason, "end_turn")
        if any(call.get("cut") for call in self._engine_calls):  # whatever the engine calls it
            reason = "max_tokens"
        if self._stop.found:
            reason = "stop_sequence"
        elif self._calls and reason != "max_tokens":
            reason = "tool_use"
        elif reason == "tool_use" and not self._calls:
            reason = "end_turn"
        self.stop_reason = reason
        delta = {"stop_reason": reason, "stop_sequence": self._stop.found or None}
        self._emit("message_delta", delta=delta, usage=self.usage)
        self._emit("message_stop")
        return first + self._take()

    def fail(self, error: ApiError) -> list[Event]:
        """The reply ends with an error. Nothing is completed: an open call stays open."""
        if self._state == "ended":
            return []
        self._state, self.stop_reason = "ended", f"error {error.status}"
        self._events.append(error.body())
        return self._take()

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, **fields})

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _count(self, usage: Json) -> None:
        details = as_object(usage.get("prompt_tokens_details"))
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))
        pairs = zip(counts, (self.prompt, self._output, self._cached))
        self.counted |= type(counts[0]) is int and counts[0] > 0
        self.tells_cached |= type(counts[2]) is int
        seconds = usage.get("total_prompt_time_sec")  # mistral.rs
        self.prompt_seconds = seconds if isinstance(seconds, (int, float)) and seconds > 0 else self.prompt_seconds
        self.prompt, self._output, self._cached = (new if type(new) is int and new > 0 else old for new, old in pairs)

    def _apply(self, events: Iterable[TextEvent]) -> None:
        for kind, text in events:
            if kind == "call":
                self._begin_call(text, "")
            elif self._muted:
                continue
            elif kind == "text":
                self._say(text)
            elif kind == "thinking":
                self._open("thinking", thinking="", signature="")
                self._events.append(self.longer(text))
            else:
                self._delta("input_json_delta", partial_json=text)

    def _say(self, text: str) -> None:
        """Text. White space opens no block and leading empty lines do not show, as around calls and behind thinking."""
        if self._block != "text":
            text = self._space + text
            if not text.strip():
                self._space = text
                return
            text = text.lstrip("\r\n")
        self._open("text", text="")
        self._events.append(self.longer(text))

    def _begin_call(self, name: str, call_id: str) -> None:
        self._muted |= self._one_call and self._calls > 0
        if not self._muted:
            self._close()
            self._calls += 1
            self._open("tool_use", id=call_id or "toolu_" + self._new_id(), name=name, input={})

    def _call_of_engine(self, delta: Json) -> None:
        """A call that the engine parsed: whole or as deltas; index and id may be missing, the name come late or again and
        again, several calls share an index, and their deltas be mixed."""
        function = as_object(delta.get("function"))
        call = next((call for call in reversed(self._engine_calls) if _continues(delta, function, call)), None)
        if call is None:
            call = {"index": delta.get("index"), "arguments": "", "json": JsonRepair()}
            self._engine_calls.append(call)
        call["id"], call["name"] = call.get("id") or delta.get("id"), call.get("name") or function.get("name")
        arguments = function.get("arguments") or ""
        call["arguments"] += arguments if isinstance(arguments, str) else to_json(arguments)
        self._hand_on_calls(final=False)

    def _hand_on_calls(self, final: bool) -> None:
        """Hand on the engine's calls one after the other, each as far as it came; the next begins when one is whole."""
        for call in self._engine_calls:
            if not call.get("begun") and call.get("name"):
                call["begun"] = True
                self._begin_call(str(call["name"]), str(call.get("id") or ""))
            if call.get("begun") and call["arguments"] and self._block == "tool_use" and not self._muted:
                self._delta("input_json_delta", partial_json=call["arguments"])
            if call.get("begun"):
                call["json"].feed(call["arguments"])
                call["arguments"] = ""
                call["cut"] = final and call["json"].nested
            if not final and not call["json"].done:
                return

    def _open(self, kind: str, **content: Any) -> None:
        if self._block != kind:
            self._close()
            self._block = kind
            self._index += 1
            self._emit("content_block_start", index=self._index, content_block={"type": kind, **content})

    def _delta(self, kind: str, **content: Any) -> None:
        self._emit("content_block_delta", index=self._index, delta={"type": kind, **content})

    def _close(self) -> None:
        if self._block:
            self._emit("content_block_stop", index=self._index)
        self._block = self._space = ""


def _said_in(delta: Json) -> Iterator[TextEvent]:
    """What a delta says. Its content may be a list (Mistral's servers): of texts and of thinking, which is a list again."""
    thought, content = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
    for kind, text in (("thinking", thought), ("text", content)):
        if text and isinstance(text, str):
            yield kind, text
    for part in map(as_object, as_list(content)):
        for kind in ("text", "thinking"):
            texts = [as_object(inner).get("text") for inner in as_list(part.get(kind))] or [part.get(kind)]
            yield from ((kind, text) for text in texts if text and isinstance(text, str))


def _continues(delta: Json, function: Json, call: Json) -> bool:
    """Whether a delta of an engine's call belongs to `call`."""
    if delta.get("id") and call.get("id"):
        return bool(delta["id"] == call["id"])
    if delta.get("index") is not None:
        return bool(delta["index"] == call["index"])
    return not (function.get("name") and call.get("name"))  # nothing tells it but that it has no name again


_ESCAPED = bytes(range(0x20)) + b'"\\'  # do not stand for themselves in a JSON string


def _lone_text(payload: str) -> TextEvent | None:
    """What a chunk says that says it and nothing else; None for others."""
    chunk = read_chunk(payload) or {}
    choice = as_object(next(iter(as_list(chunk.get("choices"))), None))
    delta = as_object(choice.get("delta"))
    told = {key for key, value in (*choice.items(), *delta.items()) if value} - {"delta", "index", "logprobs", "role"}
    texts = list(_said_in(delta))
    return texts[0] if len(told) == len(texts) == 1 and not chunk.get("usage") else None


class KnownChunk(NamedTuple):
    """A chunk of the engine that is like one before but for its text: `before`, a text of `free` bytes only, `behind`.
    `event`: what the client gets for it, %b in place of the text."""

    before: bytes
    free: bytes
    behind: bytes
    event: bytes

    def partition(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Bytes -> (what stands before such a chunk, its text, what stands behind it); the text is empty if there is none."""
        head, _, rest = data.partition(self.before)
        text, found, tail = rest.partition(self.behind)
        try:
            text.decode()
        except UnicodeDecodeError:
            found = b""
        return head, text if found and not text.lstrip(self.free) else b"", tail

    def texts_in(self, data: bytes) -> tuple[list[str], bytes]:
        """Bytes -> the texts of such chunks with which they begin, and the rest."""
        texts: list[str] = []
        while True:
            head, text, rest = self.partition(data)
            if head or not text:
                return texts, data
            texts.append(text.decode())
            data = rest


class ReplyStream:
    """The engine's answer, bytes cut anywhere -> the events of `reply`. `window`: in tokens, for an error's words.

    Nearly every chunk differs from one before in its text alone. How such a one looks is `known`, and it need not be parsed
    (`pass_on`): at 200 chunks a second, each finds cold caches, and parsing it would take longer than all the rest."""

    def __init__(self, reply: Reply, window: int = 0) -> None:
        self._reply, self._window, self._lines = reply, window, EventStream()
        self._kind = ""  # of the text in the chunk that is known
        self._before, self._behind = b"", b""  # what stands around it
        self._tries = 4  # to know one; some engines may write them all differently

    @property
    def known(self) -> KnownChunk | None:
        """How the next chunk would look if it needs no parsing: `pass_on` is enough for its text, until something is fed."""
        free = b"" if self._lines.pending else self._reply.free(self._kind).translate(None, _ESCAPED)
        if not free:
            return None
        return KnownChunk(self._before, free, self._behind, encode_events([self._reply.longer("%b")]))

    def pass_on(self, texts: Sequence[str]) -> Event:
        """Take texts of such chunks -> their one event."""
        self._tries = 4
        return self._reply.pass_on(texts)

    def feed(self, data: bytes, last: bool = False) -> list[Event]:
        """More bytes -> their events; known chunks that come together have one. `last`: nothing follows."""
        events: list[Event] = []
        if self._lines.pending:
            line, end, data = data.partition(b"\n\n")
            events = self._parsed(line + end)
        known = self.known
        texts, data = known.texts_in(data) if known else ([], data)
        events += [self.pass_on(texts)] if texts else []
        return events + (self._parsed(data, last) if data or last else [])

    def _parsed(self, data: bytes, last: bool = False) -> list[Event]:
        """The same, all lines parsed."""
        events: list[Event] = []
        payloads = self._lines.feed(data + b"\n" * last)  # the last line may lack its end
        for payload in payloads:
            chunk = {} if payload == "[DONE]" else read_chunk(payload)
            if chunk is None and payload.startswith("{") and not payload.endswith("}"):
                last = True  # half a line: the stream ends here
                break
            if chunk is None:
                return events + self._reply.fail(self.error(500, payload))
            events += self._reply.finish(done=True) if payload == "[DONE]" else self._reply.feed(chunk)
        if payloads and self._tries:
            end = data.rfind(b"\n\n") + 2 if self._lines.pending else len(data)
            self._know(data[data.rfind(b"\ndata:", 0, end) + 1 : end], payloads[-1])
        return events + (self._reply.finish(done=False) if last else [])

    def error(self, status: int, text: str) -> ApiError:
        """An engine's error in the client's words."""
        return engine_error(status, text, self._reply.prompt, self._window)

    def _know(self, data: bytes, payload: str) -> None:
        """Know chunks like this one (`data`, with its `payload`), if all that it has is a text."""
        kind, text = _lone_text(payload) or ("", "")
        parts = data.split(to_json(text).encode("utf-8", "replace"))
        if kind and len(parts) == 2:
            self._tries -= 1
            lines, other = EventStream(), to_json(text + "?").encode("utf-8", "replace")
            if [_lone_text(one) for one in lines.feed(other.join(parts))] == [(kind, text + "?")] and not lines.pending:
                self._kind, self._before, self._behind = kind, parts[0] + b'"', b'"' + parts[1]


def encode_events(events: Iterable[Event]) -> bytes:
    """Events as server-sent events."""
    lines = (f"event: {event['type']}\ndata: {to_json(event)}\n\n" for event in events)
    return "".join(lines).encode("utf-8", "replace")


def collect(events: Iterable[Event]) -> Json:
    """The message that a whole stream of events describes. Raises ApiError if it ended in an error."""
    message: Json = {}
    arguments: dict[int, str] = {}  # of the calls, by the number of their block
    for event in events:
        kind, blocks = event["type"], message.get("content", [])
        if kind == "message_start":
            message = {**event["message"], "content": []}
        elif kind == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            (name, fragment) = next((key, value) for key, value in event["delta"].items() if key != "type")
            if name == "partial_json":
                arguments[event["index"]] = arguments.get(event["index"], "") + fragment
            else:
                blocks[-1][name] += fragment
        elif kind == "message_delta":
            message.update(event["delta"], usage=event["usage"])
            for number, text in arguments.items():
                blocks[number]["input"] = _arguments_of(text)
            if message["stop_reason"] != "tool_use":  # a call that was cut off must not look like one to run
                message["content"] = [block for block in blocks if "invalid_json" not in block.get("input", ())]
        elif kind == "error":
            statuses = {name: status for status, name in ERROR_KINDS.items()}
            raise ApiError(statuses.get(event["error"]["type"], 500), event["error"]["message"])
    return message


def _arguments_of(text: str) -> Json:
    """The input of a call. What is no JSON object is handed over under a name that no tool knows: the client tells the
    model."""
    with contextlib.suppress(ValueError, RecursionError):
        value = from_json(text)
        if isinstance(value, dict):
            return value
    return {"invalid_json": text}


# === 8 Proxy ==================================================================================
# Rule: sockets and threads around sections 5 to 7, and nothing else. Each request has one thread, which waits for the
# engine and for the client leaving at the same time.

FIRST_WORD_SECONDS = 2.0  # before the reply is begun: an error can still have its HTTP status
PING_SECONDS = 5.0
NEXT_CHUNK_SECONDS = 0.1  # while chunks come faster, the client is looked after only so often
COUNT_SECONDS = 0.01  # for the engine's own count of tokens
BODY_LIMIT = 64 << 20  # bytes
NOT_AVAILABLE = "{} is not available here: a local model answers, and no such service is behind it. Nothing was done."
DEBUG_LOG_LIMIT = 10 << 20


class DebugLog:
    """`~/.anyclaude/logs/debug.log`. Level 1: a line a request; 2: bodies; 3: every event. Secrets at no level."""

    def __init__(self, level: int, hidden: Iterable[str]) -> None:
        self.level, self._hidden = level, [secret for secret in hidden if secret]
        self._path = state_path("logs", "debug.log") if level else Path()
        self._file = rotated_log(self._path) if level else -1
        self._lock = threading.Lock()

    def __call__(self, level: int, text: str | Callable[[], str]) -> None:
        """Write `text` (or what it returns, so that nothing is made in vain) if this level is wanted."""
        if level > self.level:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text if isinstance(text, str) else text()}\n"
        for secret in self._hidden:
            line = line.replace(secret, "[secret]")
        with self._lock:
            if os.fstat(self._file).st_size > DEBUG_LOG_LIMIT:
                os.close(self._file)
                self._file = rotated_log(self._path)
            os.write(self._file, line.encode("utf-8", "replace"))


class ChunkedBody:
    """The content of an HTTP body in chunks, from bytes cut anywhere. `ended`: its last chunk was seen."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._left = 0  # of the chunk that is being read, with the line end behind it

    @property
    def is_between(self) -> bool:
        """Whether the next byte begins a chunk."""
        return not (self._rest or self._left or self.ended)

    def feed(self, data: bytes) -> bytes:
        """More bytes -> the content in them."""
        data, at, out = self._rest + data, 0, []
        while not self.ended:
            if self._left:
                piece = data[at : at + self._left]
                out.append(piece[: max(0, self._left - 2)])
                at, self._left = at + len(piece), self._left - len(piece)
            end = data.find(b"\n", at)
            if self._left or end < 0:
                break
            size = int(data[at:end].partition(b";")[0], 16)
            if size < 0:
                raise ValueError("a chunk of negative size")
            at, self._left, self.ended = end + 1, size + 2, size == 0
        self._rest = data[at:]
        return b"".join(out)


class _ClientLeft(Exception):
    """The client closed its connection."""


class _EngineLost(Exception):
    """The engine broke off, in words."""


def _broken(error: Exception) -> _EngineLost:
    return _EngineLost(f"the connection to the engine broke: {error!r}")


class _Upstream:
    """One streamed chat completion of the engine, read while the client is watched: when that leaves, in prefill too,
    the engine's connection is closed, which is how it learns to stop.

    The reply is read from the socket itself: http.client would wait for bytes where the client must be watched."""

    def __init__(self, target: Target, client: socket.socket) -> None:
        parts = urllib.parse.urlsplit(target.url)
        key = f"Authorization: Bearer {target.key}\r\n" * bool(target.key)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=10)
        self._request = (
            f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nAccept-Encoding: identity\r\nConnection: close\r\n{key}Content-Length: "
        )
        self.status, self.ended, self.body = 0, False, b""  # `body`: its beginning, or the whole of an error
        self._head, self._chunks = b"", ChunkedBody()
        self._is_chunked = False
        self._ahead = b""  # was read, and is not yet taken
        self._client = client
        self.asked = False  # it has the request
        self.trouble: Exception | None = None  # for which it has not

    def ask(self, payload: bytes) -> None:
        """Connect, and send the request; `asked` and `trouble` say how that went."""
        try:
            self._connection.close()  # of an earlier try
            self._connection.connect()
            self._socket = self._connection.sock
            self._socket.sendall(f"{self._request}{len(payload)}\r\n\r\n".encode() + payload)
        except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no host can have
            self.trouble = error
            if not self._is_refused():
                return
        self.asked = True
        self.now = self._look = time.monotonic()  # of the last read, also one in vain; when to look after the client
        self._socket.settimeout(NEXT_CHUNK_SECONDS)
        self._poll = select.poll()
        for one in (self._socket, self._client):
            self._poll.register(one, select.POLLIN)

    def _is_refused(self) -> bool:
        """Whether the engine has answered though it has not the whole request: that is too large, or has the wrong key."""
        if self._connection.sock:
            with contextlib.suppress(OSError, ValueError):  # ValueError: nobody can peek through TLS
                self._connection.sock.setblocking(False)
                return bool(self._connection.sock.recv(1, socket.MSG_PEEK))
        return False

    def read(self, seconds: float) -> bytes | None:
        """Read once -> the content that came; None if none came within `seconds` (or 0.1, if that is longer). `status` is 0
        until the head is whole. Raises _ClientLeft and _EngineLost."""
        if self.now >= self._look:
            self._wait(0)
        try:
            try:
                data, self._ahead = self._ahead or self._socket.recv(1 << 16), b""
            except socket.timeout:
                if not self._wait(seconds - NEXT_CHUNK_SECONDS):
                    return None
                data = self._socket.recv(1 << 16)
            self.now = time.monotonic()
            return self._content(data)
        except socket.timeout:  # what came was TLS' own
            return b""
        except (OSError, ValueError, IndexError) as error:
            raise _broken(error) from None

    def pass_on(self, stream: ReplyStream) -> bool:
        """Send on to the client what `stream` knows, as long as each read is one such chunk, and for NEXT_CHUNK_SECONDS at most
        -> whether there was one. What else was read is left for `read`. Raises as that.

        Before a chunk is sent little is called: at 200 chunks a second each finds cold caches."""
        passed, known = False, stream.known
        if not known or self._ahead or not self._is_chunked or not self._chunks.is_between:
            return False
        if self.now >= self._look:
            self._wait(0)
        until = self.now + NEXT_CHUNK_SECONDS
        event, around = b"%x\r\n" + known.event + b"\r\n", len(known.event) - len(b"%b")
        while self.now < until:
            try:
                data = self._socket.recv(1 << 16)
            except socket.timeout:
                self.now = time.monotonic()
                break
            except OSError as error:
                raise _broken(error) from None
            head, text, tail = known.partition(data)
            if not text or tail != b"\r\n" or head.lower() != b"%x\r\n" % (len(data) - len(head) - 2):
                self._ahead = data
                break
            try:
                self._client.sendall(event % (around + len(text), text))
            except OSError:
                raise _ClientLeft from None
            stream.pass_on([text.decode()])  # its event is sent
            self.now, passed = time.monotonic(), True
        return passed

    def _content(self, data: bytes) -> bytes:
        """The content in the bytes that were read."""
        self.ended = not data
        if not self.status:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            while found and int(head.split(None, 2)[1]) < 200:  # only an interim answer
                head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._head = head
                return b""
            self.status = int(head.split(None, 2)[1])
            self._is_chunked = bool(re.search(rb"(?i)\ntransfer-encoding:[^\n]*chunked", head))
            length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            self._left = int(length[1]) if length and not self._is_chunked else -1
        if self._is_chunked:
            data = self._chunks.feed(data)
            self.ended = self.ended or self._chunks.ended
        elif self._left >= 0:
            self._left -= len(data)
            self.ended = self.ended or self._left <= 0
        if self.status != 200 or len(self.body) < 4096:
            self.body += data
        return data

    def _wait(self, seconds: float) -> bool:
        """Whether there is something to read within `seconds`. Raises _ClientLeft."""
        deadline = time.monotonic() + seconds
        while True:
            ready = [number for number, _ in self._poll.poll(max(0, round((deadline - time.monotonic()) * 1000)))]
            if self._client.fileno() in ready:
                try:
                    left = not self._client.recv(1, socket.MSG_PEEK)
                except OSError:
                    left = True
                if left:
                    raise _ClientLeft
                self._poll.unregister(self._client)  # its next request, which waits its turn
            elif self._socket.fileno() in ready or not ready:
                self.now = time.monotonic()
                self._look = self.now + NEXT_CHUNK_SECONDS
                return bool(ready)

    def close(self) -> None:
        """Leave; the engine sees it at once."""
        if self._connection.sock:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _new_id() -> str:
    return secrets.token_hex(12)


REQUESTS_LOG = ("logs", "requests.jsonl")
REQUESTS_LOG_LIMIT = 4 << 20  # bytes; some 15,000 requests
MEASURABLE = 500  # tokens of a prompt whose reading can be timed


@dataclass(eq=False)
class Measured:
    """One request while it runs. Times in seconds on the monotonic clock; `first`: when the model began to write."""

    reply: Reply
    is_main: bool  # of the conversation itself, and not of a subagent
    began: float
    first: float = 0.0
    alone: bool = True  # no other request of this session ran beside it

    def watching(self, batches: Iterator[list[Event]]) -> Iterator[list[Event]]:
        """The same events; the first that the model wrote is noted."""
        for events in batches:
            if not self.first and self.reply.writes:
                self.first = time.monotonic()
            yield events

    @property
    def tokens_a_second(self) -> float:
        """Of what the model writes, so far; 0 before there is something to tell."""
        output, seconds = self.reply.usage["output_tokens"], time.monotonic() - self.first
        return output / seconds if self.first and output > 1 and seconds > 0 else 0.0


class Meter:
    """What the requests of a session take: a JSON line each in REQUESTS_LOG, figures only, and in `line`, a file that Claude
    Code's status line shows, what happens now. `line`: None without one."""

    def __init__(self, target: Target, share: EngineShare | None, line: Path | None) -> None:
        self._target, self._share, self._line = target, share, line
        self._session = f"{os.getpid()}-{time.time():.0f}"
        self._running: list[Measured] = []
        self._last: Json = {}
        self._context = 0  # tokens
        self._rates: list[tuple[int, float]] = []  # tokens of a prompt, and tokens a second at which it was read
        self._lock, self._changed = threading.Lock(), threading.Event()
        if line:
            threading.Thread(target=self._show, daemon=True).start()

    @contextlib.contextmanager
    def measuring(self, reply: Reply, is_main: bool, began: float) -> Iterator[Measured]:
        """Measure one request, however it ends."""
        one, outcome = Measured(reply, is_main, began), "error 500"
        with self._lock:
            self._running.append(one)
            for other in self._running if len(self._running) > 1 else ():
                other.alone = False
        self._changed.set()
        try:
            yield one
            outcome = reply.stop_reason
        except ApiError as error:
            outcome = f"error {error.status}"
            raise
        except (_ClientLeft, OSError):
            outcome = "left"
            raise
        finally:
            with self._lock:
                self._running.remove(one)
                self._note(one, outcome)
            self._changed.set()

    def _reused(self, one: Measured, prompt: int) -> int | None:
        """How many of the prompt's tokens the engine had cached; None if that cannot be told. mistral.rs up to 0.9.4 says only
        for how long it read. Then it is a guess: it read as fast as it was slowest with prompts at least half as long."""
        if one.reply.tells_cached:
            return int(one.reply.usage["cache_read_input_tokens"])
        if not one.reply.prompt_seconds or prompt < MEASURABLE or not one.alone:
            return None
        self._rates = [*self._rates[-99:], (prompt, prompt / one.reply.prompt_seconds)]
        slowest = min(rate for length, rate in self._rates if length >= prompt / 2)
        reused = prompt - one.reply.prompt_seconds * slowest
        return int(reused) // 100 * 100 if reused > prompt / 10 else 0

    def _note(self, one: Measured, outcome: str) -> None:
        usage, now = one.reply.usage, time.monotonic()
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        self._last = {
            "time": round(time.time(), 3),
            "session": self._session,
            "model": self._target.name,
            "subagent": not one.is_main,
            "prompt_tokens": prompt,
            "cached_tokens": self._reused(one, prompt),
            "cached_is_estimated": not one.reply.tells_cached,
            "output_tokens": usage["output_tokens"],
            "time_to_first_token": round(one.first - one.began, 3) if one.first else None,
            "tokens_per_second": round(one.tokens_a_second, 2) or None,
            "seconds": round(now - one.began, 3),
            "outcome": outcome,
        }
        if one.is_main and one.first:
            self._context = self._last["prompt_tokens"] + self._last["output_tokens"]
        with contextlib.suppress(OSError, AnyclaudeError):  # a full disk ends no session
            path, line = state_path(*REQUESTS_LOG), f"{to_json(self._last)}\n".encode("utf-8", "replace")
            if path.exists() and path.stat().st_size > REQUESTS_LOG_LIMIT:
                alone = fcntl.LOCK_EX | fcntl.LOCK_NB  # else another session is at it
                with contextlib.suppress(BlockingIOError), os.fdopen(lock(path.with_suffix(".lock"), alone)):
                    if path.stat().st_size > REQUESTS_LOG_LIMIT:
                        os.close(rotated_log(path))
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(log, "wb", buffering=0) as file:
                file.write(line)  # at once: several sessions write here

    def words(self) -> str:
        """What happens now, and what the last request took, in one line, of which Claude Code cuts the end: on a terminal of
        80 columns all but 76."""
        running, last, parts = self._running[-1:], self._last, [self._target.name[:20]]
        if self._context and self._target.window:
            parts.append(f"context {self._context * 100 // self._target.window} %")
        if running and self._share and self._share.is_started_again():
            parts.append("mistral.rs is started again")
        elif running and not running[0].first:
            waited = time.monotonic() - running[0].began
            parts.append(f"reading {in_thousands(running[0].reply.prompt)}, {waited:.0f} s")
        elif running:
            parts.append(f"writing {running[0].tokens_a_second:.3g} tokens/s")
        elif last.get("tokens_per_second"):
            parts.append(f"{last['tokens_per_second']:.3g} tokens/s")
        if (first := last.get("time_to_first_token")) is not None:
            parts.append(f"first {first:.1f} s" if first >= 1 else f"first {first * 1000:.0f} ms")
            about = "about " * last["cached_is_estimated"]
            reused = (
                f", {about}{in_thousands(last['cached_tokens'])} reused" if last["cached_tokens"] is not None else ""
            )
            parts.append(f"prompt {in_thousands(last['prompt_tokens'])}{reused}")
        return " | ".join(parts)

    def _show(self) -> None:
        while self._line:
            self._changed.clear()
            with self._lock, contextlib.suppress(OSError):
                if self._line:
                    write_text(self._line, f"{self.words()}\n")
            self._changed.wait(1.0 if self._running else None)

    def close(self) -> None:
        """The session is over."""
        with self._lock:
            if self._line:
                self._line.unlink(missing_ok=True)
            self._line = None
        self._changed.set()


class ProxyHandler(BaseHTTPRequestHandler):
    """The Anthropic API, as much of it as Claude Code uses; anything else is a 404 and goes nowhere."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a chunk is sent when it is there
    timeout = 120  # seconds that a connection may stay idle, and a client may leave its reply unread
    server: Proxy
    _began = False  # the head of the answer is out
    _body = b""

    def do_HEAD(self) -> None:
        self._send(200 if self.path in ("/", "/api/hello") else 404, b"")

    def do_GET(self) -> None:
        """Any other method: answer, whatever happens, and write one line about it."""
        started, self._began = time.monotonic(), False
        path, _, _ = self.path.partition("?")
        outcome = "ok"
        try:
            self._body = self._read_body()
            self._route(path)
        except ApiError as error:
            outcome = f"{error.status} {error.message}"
            self._send_json(error.status, error.body())
        except (_ClientLeft, ConnectionError, TimeoutError, socket.timeout) as error:
            outcome, self.close_connection = f"the client left {error}", True
        except Exception as error:  # noqa: BLE001  a defect: the client gets an error, the person a traceback in the log
            outcome, self.close_connection = f"internal error: {error!r}", True
            self.server.debug(1, traceback.format_exc)
            if not self._began:
                self._send_json(500, ApiError(500, f"anyclaude: {error!r}").body())
        self.server.debug(1, f"{self.command} {path} {time.monotonic() - started:.3f} s: {outcome}")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _route(self, path: str) -> None:
        if (self.command, path) == ("GET", "/health"):
            return self._send_json(200, {"status": "ok"})
        self._authorize()
        routes = {
            ("POST", "/v1/messages"): self._messages,
            ("POST", "/v1/messages/count_tokens"): self._count_tokens,
            ("GET", "/v1/models"): self._models,
        }
        if (self.command, path) not in routes:
            raise ApiError(404, f"{self.command} {path} is not served here")
        routes[self.command, path]()

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        keep, self.close_connection = not self.close_connection, True  # until the whole body is read
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,18}", length):
            raise ApiError(400, "a Content-Length header is required")
        if int(length) > BODY_LIMIT:
            raise ApiError(413, f"the request has {length} bytes, and {BODY_LIMIT} is the maximum")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _ClientLeft
        self.close_connection = not keep
        return body

    def _authorize(self) -> None:
        bearer = re.sub(r"(?i)\Abearer +", "", self.headers.get("Authorization", ""))
        for given in (bearer, self.headers.get("x-api-key", "")):
            if hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
                return
        raise ApiError(401, "this proxy serves only the session it was started for (wrong or missing token)")

    def _translated(self) -> tuple[Json, Json]:
        """-> (the client's request, its translation)."""
        try:
            request = from_json(self._body.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request body is not valid JSON: {error}") from None
        self.server.debug(2, lambda: f"from the client: {to_json(request)}")
        try:
            translated = translate_request(request, self.server.target)
        except RecursionError:
            raise ApiError(400, "messages: nested too deeply") from None
        self.server.debug(2, lambda: f"to the engine: {to_json(translated)}")
        return request, translated

    def _models(self) -> None:
        name = self.server.target.name
        entry = {"type": "model", "id": name, "display_name": name, "created_at": "2025-01-01T00:00:00Z"}
        self._send_json(200, {"data": [entry], "has_more": False, "first_id": name, "last_id": name})

    def _count_tokens(self) -> None:
        translated = self._translated()[1]
        counted = self._counted_by_engine(translated) if self.server.target.counts else 0
        estimate = counted or self.server.tokens.corrected(estimate_tokens(to_json(translated)))
        self._send_json(200, {"input_tokens": estimate})

    def _counted_by_engine(self, translated: Json) -> int:
        """The engine's own count, if it answers in time; 0 otherwise."""
        request = urllib.request.Request(
            f"{self.server.target.url}/messages/count_tokens",
            to_json(count_request(translated)).encode("utf-8", "replace"),
            {"Content-Type": "application/json"},
        )
        try:
            with DIRECTLY.open(request, timeout=COUNT_SECONDS) as answer:
                count = as_object(json.load(answer)).get("input_tokens")
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.server.debug(1, f"count_tokens of the engine: {error!r}")
            return 0
        return count if type(count) is int else 0

    def _messages(self) -> None:
        began, share = time.monotonic(), self.server.share
        request, translated = self._translated()
        sent, has_tools, streamed = self._payload(translated), "tools" in translated, bool(request.get("stream"))
        missing = "" if has_tools else unavailable_tool(request)
        if missing:
            reply = self._new_reply(request)
            answer = {"choices": [{"delta": {"content": NOT_AVAILABLE.format(missing)}, "finish_reason": "stop"}]}
            return self._answer(streamed, iter([[*reply.feed(answer), *reply.finish(done=True)]]))
        with contextlib.closing(_Upstream(self.server.target, self.connection)) as upstream:
            if not (share and share.is_started_again()):
                upstream.ask(sent[-1])  # the rest is done while the engine works
            reply = self._new_reply(request)
            self._body = b""
            del request, translated  # a reply may take long
            is_main = has_tools and "x-claude-code-agent-id" not in self.headers
            with self.server.meter.measuring(reply, is_main, began) as measured:
                self._answer(streamed, measured.watching(self._batches(upstream, sent, reply, streamed)))

    def _payload(self, translated: Json) -> list[Any]:
        """A request for the engine, as text and as bytes, in a list: whoever pops one frees its memory. Raises ApiError for a
        prompt that surely does not fit."""
        window, counter, text = self.server.target.window, self.server.tokens, to_json(translated)
        data = text.encode("utf-8", "replace")
        if window and len(data) + translated["max_tokens"] > window:  # a token has a byte at least
            fitting = fit_to_window(translated, counter.corrected(estimate_tokens(text)), counter.doubt, window)
            data = to_json(fitting).encode("utf-8", "replace")
        return [text, data]

    def _new_reply(self, request: Json) -> Reply:
        dialect = self.server.target.dialect
        text = ToolText(callable_tools(request), dialect.calls, dialect.opens_thinking)
        one_call = bool(as_object(request.get("tool_choice")).get("disable_parallel_tool_use"))
        return Reply(self.server.target.name, text, _new_id, stop_sequences(request), one_call)

    def _answer(self, streamed: bool, batches: Iterator[list[Event]]) -> None:
        """Send a reply's events, as a stream or collected."""
        if not streamed:
            return self._send_json(200, collect(event for events in batches for event in events))
        head = self._head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        for events in batches:
            self._send_chunk(encode_events(events), head)
            head = b""
        self.connection.sendall(b"0\r\n\r\n")

    def _send_chunk(self, data: bytes, head: bytes = b"") -> None:
        if self.server.debug.level >= 3:
            self.server.debug(3, f"to the client: {data.decode()}")
        self._began = True
        self.connection.sendall(b"%s%x\r\n%s\r\n" % (head, len(data), data))

    def _batches(self, upstream: _Upstream, sent: list[Any], reply: Reply, streamed: bool) -> Iterator[list[Event]]:
        """The reply's events, from when the engine serves. Raises as `_relay`. `sent`: of `_payload`."""
        try:
            yield from self._asked(upstream, sent.pop(), reply)
        except ApiError as error:
            if not reply.begun:
                raise
            yield reply.fail(error)
            return
        estimate = estimate_tokens(sent.pop())  # while the engine works
        reply.prompt = self.server.tokens.corrected(estimate)
        yield from self._relay(upstream, reply, streamed)
        if reply.counted:
            self.server.learn(estimate, reply.prompt)

    def _asked(self, upstream: _Upstream, data: bytes, reply: Reply) -> Iterator[list[Event]]:
        """Pings, until the engine has the request. Raises ApiError."""
        share, patient = self.server.share, True
        while not upstream.asked:
            if upstream.trouble:
                trouble = share.trouble() if share else ""  # with 400 the client does not try again
                if trouble or not share or not patient:
                    words = trouble or f"the engine does not answer at {self.server.target.url} ({upstream.trouble})"
                    raise ApiError(400 if trouble else 529, words)
                patient = False
                time.sleep(0.3)  # that it ended may not have been noticed yet
            if share:
                yield from self._held(share, reply)
            upstream.ask(data)

    def _held(self, share: EngineShare, reply: Reply) -> Iterator[list[Event]]:
        """Pings, as long as the engine is being started again: loading may take longer than a client tries."""
        said = time.monotonic() + FIRST_WORD_SECONDS - PING_SECONDS
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        while share.is_started_again():
            if share.trouble():
                raise ApiError(400, share.trouble())
            if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                raise _ClientLeft
            time.sleep(0.1)
            if time.monotonic() - said >= PING_SECONDS:
                said = time.monotonic()
                yield [*reply.start(), {"type": "ping"}]

    def _relay(self, upstream: _Upstream, reply: Reply, streamed: bool) -> Iterator[list[Event]]:
        """The reply's events as the engine answers, one batch a read; a ping after silence. What needs no parsing is `streamed`
        to the client from here. Raises ApiError as long as nothing was yielded, and _ClientLeft."""
        stream, begun = ReplyStream(reply, self.server.target.window), reply.begun
        share, stall = self.server.share, self.server.target.stall
        streamed &= self.server.debug.level < 3  # which shows all events
        heard = said = upstream.now
        while not reply.ended:
            patience = PING_SECONDS if begun else FIRST_WORD_SECONDS
            events = []
            try:
                if streamed and upstream.pass_on(stream):
                    heard = said = upstream.now
                    if share:
                        share.hear()
                    continue
                data = upstream.read(said + patience - upstream.now)
                if data is not None:
                    heard = upstream.now
                    if share:
                        share.hear()
                    events = self._events(upstream, stream, data)
                elif reply.reason:  # it is whole, though the engine neither says so nor leaves
                    events = reply.finish(done=True)
                elif upstream.now - heard > stall:
                    if share:
                        share.restart(stall)
                    raise _EngineLost(f'the engine was silent for {stall:.0f} s ("stallTimeout")')
            except ApiError as error:
                events = reply.fail(error)
            except _EngineLost as error:
                events = reply.fail(ApiError(500 if begun else 529, str(error)))  # with 529 the client tries again
            except _ClientLeft:
                raise
            except Exception as error:  # noqa: BLE001  a defect here must not leave the client without an end
                self.server.debug(1, traceback.format_exc)
                events = reply.fail(ApiError(500, f"anyclaude: {error!r}"))
            if not events and upstream.now - said >= patience:
                events = [*reply.start(), {"type": "ping"}]
            if events and not begun and events[0]["type"] == "error":
                collect(events)  # raises it, as an HTTP status
            if events:
                begun, said = True, upstream.now
                yield events

    def _events(self, upstream: _Upstream, stream: ReplyStream, data: bytes) -> list[Event]:
        """One read of the engine, all its lines translated. Raises ApiError."""
        self.server.debug(3, lambda: f"from the engine: {data!r}")
        if upstream.ended and not upstream.status:
            raise ApiError(529, "the engine closed the connection without an answer")
        if upstream.status not in (0, 200) or upstream.body.lstrip().startswith(b"{"):  # no stream, but an error
            if not upstream.ended:
                return []
            raise stream.error(upstream.status, upstream.body.decode("utf-8", "replace"))
        return stream.feed(data, upstream.ended)

    def _send_json(self, status: int, content: Json) -> None:
        self._send(status, to_json(content).encode("utf-8", "replace"))

    def _send(self, status: int, body: bytes) -> None:
        head = self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self._began = True
        self.connection.sendall(head + body)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head of an answer."""
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Connection: close"] if self.close_connection else []
        return "\r\n".join([*lines, "", ""]).encode()

    def log_message(self, format: str, *args: object) -> None:
        pass  # the debug log has its own line


class Proxy(ThreadingHTTPServer):
    """The proxy of one session, on the loopback, for those who have its token."""

    request_queue_size = 128

    def __init__(
        self,
        port: int,
        target: Target,
        debug_level: int = 0,
        memory: Path | None = None,
        share: EngineShare | None = None,
        line: Path | None = None,
    ) -> None:
        self.target, self.token = target, secrets.token_urlsafe(32)
        self.share, self.meter = share, Meter(target, share, line)
        self._memory, self._learning = memory, threading.Lock()
        known: Json = {}
        with contextlib.suppress(AnyclaudeError):
            known = read_json(memory) if memory else {}
        self.tokens = TokenCount(as_list(known.get(target.name)))
        self.debug = DebugLog(debug_level, (self.token, target.key))
        try:
            super().__init__((LOOPBACK, port), ProxyHandler)
        except OSError as error:
            raise port_taken("the proxy's ", port, "--proxy-port", str(error.strerror)) from None
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def learn(self, estimate: int, tokens: int) -> None:
        """Keep what the engine counted, for this session and the next."""
        with self._learning, contextlib.suppress(OSError, AnyclaudeError):
            if self.tokens.learn(estimate, tokens) and self._memory:
                known = {}
                with contextlib.suppress(AnyclaudeError):  # none yet, or broken: begun anew
                    known = read_json(self._memory)
                write_json(self._memory, {**known, self.target.name: self.tokens.pairs})

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection; unlike the base class do not wait until it runs."""
        _thread.start_new_thread(self.process_request_thread, (request, client_address))

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Without file descriptors left the listener stays ready: not to be asked at once again."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def server_close(self) -> None:
        """Stop serving; the thread would otherwise go on polling a socket that is closed."""
        self.meter.close()
        if hasattr(self, "url"):
            self.shutdown()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.debug(1, traceback.format_exc)


# === 9 Claude Code ============================================================================
# Rule: Claude Code runs in the foreground with the terminal's signals; what the user has set wins, but for what makes
# this session go to this model.

DEFAULT_WINDOW = 32768  # tokens, where nothing says how many
SMALL_WINDOW = 30000
INSTALL_CLAUDE = ("npm", "install", "-g", "@anthropic-ai/claude-code@latest")  # without @latest, by Node.js' age
CLAUDE_INSTALLER = "https://claude.ai/install.sh"  # source: Claude Code's documentation, "Set up"
CLAUDE_BY_HAND = f"curl -fsSL {CLAUDE_INSTALLER} | bash\nor, with Node.js: {' '.join(INSTALL_CLAUDE)}"
LEAN_TOOLS = "Bash,Read,Edit,Write,Glob,Grep,WebFetch"  # 13 kB of tools, not 50 to 86 (measured, 2.1.197 and 2.1.330)
SKIP_PERMISSIONS = ("--dangerously-skip-permissions", "--allow-dangerously-skip-permissions")
STABLE_PROMPT = "--exclude-dynamic-system-prompt-sections"  # the head of the prompt is then the same in every session


@dataclass(frozen=True)
class Session:
    """What Claude Code must know of this session. `window` and `output`: tokens."""

    url: str
    token: str
    model: str
    window: int
    output: int

    @property
    def fields(self) -> dict[str, object]:
        """What the tables of variables are filled with. One tool result may have an eighth of the window, and no more
        than Claude Code itself allows (25,000 tokens, 30,000 characters)."""
        eighth = max(1000, self.window // 8)
        limits = {"result": min(25_000, eighth), "characters": min(30_000, eighth * 3)}
        return {**dataclasses.asdict(self), **limits}


_TIERS = ("", "DEFAULT_OPUS_", "DEFAULT_SONNET_", "DEFAULT_HAIKU_", "DEFAULT_FABLE_", "SMALL_FAST_")
_PROVIDERS = ("BEDROCK", "VERTEX", "FOUNDRY", "MANTLE", "GATEWAY", "ANTHROPIC_AWS", "ANTHROPIC_GOOGLE_CLOUD")
# Variable -> value, with the fields of Session filled in. All were measured or read in 2.1.197 and 2.1.330.
OUR_VARIABLES = {  # these make it this session, whatever the user has set
    "ANTHROPIC_BASE_URL": "{url}",
    "ANTHROPIC_AUTH_TOKEN": "{token}",
    "ANTHROPIC_API_KEY": "",  # one of the user's would win, and ask
    **dict.fromkeys(map("ANTHROPIC_{}MODEL".format, _TIERS), "{model}"),  # every tier is the one model that is there
    "CLAUDE_CODE_SUBAGENT_MODEL": "{model}",
    **dict.fromkeys(map("CLAUDE_CODE_USE_{}".format, _PROVIDERS), ""),  # these would send the prompts elsewhere
}
NO_PROXIES = ("NO_PROXY", "no_proxy")  # the loopback is not reached through the company's proxy
DEFAULT_VARIABLES = {  # here the user's own value wins
    "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "{window}",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "{output}",
    "CLAUDE_CODE_FILE_READ_MAX_OUTPUT_TOKENS": "{result}",  # from here: no single tool result ends a session
    "MAX_MCP_OUTPUT_TOKENS": "{result}",
    "BASH_MAX_OUTPUT_LENGTH": "{characters}",
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # from here: a prompt that only ever grows
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
    "CLAUDE_CODE_MODEL_CAPABILITIES": "-mid_conv_system,-total_tokens_reminder,-mid_conv_tool_change",
    "ENABLE_TOOL_SEARCH": "false",
    "API_TIMEOUT_MS": "3000000",  # from here: a long prefill is not an error
    "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
    "API_FORCE_IDLE_TIMEOUT": "0",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",  # nothing leaves the machine
    "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",  # no request for a title at the start of a conversation
}


def claude_environment(environ: Mapping[str, str], session: Session) -> dict[str, str]:
    """The environment of Claude Code for this session. Pure."""
    ours, defaults = (
        {name: value.format_map(session.fields) for name, value in table.items()}
        for table in (OUR_VARIABLES, DEFAULT_VARIABLES)
    )
    direct = {name: ",".join(filter(None, (environ.get(name), f"{LOOPBACK},localhost"))) for name in NO_PROXIES}
    return {**defaults, **environ, **ours, **direct}


@functools.lru_cache(1)
def npm_prefix(npm: Path) -> Path:
    """Where npm installs programs for all; it may say more than that."""
    lines = re.findall(r"(?m)^/.*$", output_of(str(npm), "prefix", "-g"))
    return Path(lines[-1].strip()) if lines else Path("/")


def find_claude(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Claude Code: the setting, PATH, ~/.local/bin, ~/.claude/local."""
    if settings.claude_binary:
        if is_program(Path(settings.claude_binary)):
            return Path(settings.claude_binary)
        message = f"claudeBinary {settings.claude_binary} is not a program."
        raise AnyclaudeError(message, 'Correct "claudeBinary" in ~/.anyclauderc.json, or remove it.')
    folders = [*search_path(environ), Path.home() / ".local/bin", Path.home() / ".claude/local"]
    found, npm = which("claude", folders), which("npm", search_path(environ))
    if not found and npm:  # npm's own folder need not be on the PATH
        found = which("claude", [npm_prefix(npm) / "bin"])
    if not found:
        message = "Claude Code (claude) was not found on PATH, in ~/.local/bin or in ~/.claude/local."
        raise AnyclaudeError(message, CLAUDE_BY_HAND)
    return found


def set_up_claude(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Claude Code; if it is missing, it is installed by npm, or else by its own installer, when the user agrees."""
    try:
        return find_claude(settings, environ)
    except AnyclaudeError:
        path = search_path(environ)
        npm, bash = which("npm", path), which("bash", path)
        way = " ".join(INSTALL_CLAUDE) if npm else f"its own installer, {CLAUDE_INSTALLER}"
        question = f"Claude Code was not found. Install it now?\n({way})"
        if settings.claude_binary or not (npm or bash) or not agrees(question, settings.yes):
            raise
    with tempfile.TemporaryDirectory() as folder:
        command = [str(npm), *INSTALL_CLAUDE[1:]]
        if npm:
            shared = npm_prefix(npm) / "lib"
            if not os.access(shared if shared.exists() else shared.parent, os.W_OK):  # the system's own Node.js
                command[3:3] = ["--prefix", str(Path.home() / ".local")]
        else:
            command = [str(bash), f"{folder}/install.sh"]
            try:
                with urllib.request.urlopen(CLAUDE_INSTALLER, timeout=30) as reply:
                    Path(command[1]).write_bytes(reply.read(1 << 20))
            except (OSError, http.client.HTTPException) as error:
                raise AnyclaudeError(f"{CLAUDE_INSTALLER} cannot be had: {error}.", CLAUDE_BY_HAND) from None
        say(shlex.join(command))
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), check=False).returncode
    if ended:
        message = f"Claude Code was not installed ({ending(ended)}); what went wrong stands above."
        raise AnyclaudeError(message, f"{CLAUDE_BY_HAND}\nthen start anyclaude again.")
    return find_claude(settings, environ)


def claude_help(program: Path) -> str:
    """The text of `claude --help`, kept by the program's path, size and time: asking takes half a second."""
    status = program.resolve().stat()
    identity = f"{program.resolve()} {status.st_size} {status.st_mtime_ns}"
    cache, kept = state_path("cache", "claude-help.json"), {}
    with contextlib.suppress(AnyclaudeError):
        kept = read_json(cache)
    if not kept.get(identity):
        kept = {identity: output_of(str(program), "--help")}
        with contextlib.suppress(OSError):
            write_json(cache, kept)
    return str(kept[identity])


def claude_commands(help_text: str) -> set[str]:
    """Claude Code's own commands (mcp, update, ...), which talk to no model. Pure."""
    commands = re.findall(r"(?m)^  ([a-z][^\s]*)", help_text.partition("\nCommands:")[2])
    return {name for command in commands for name in command.split("|")}


def claude_settings(
    arguments: Sequence[str], environ: Mapping[str, str], cwd: Path, home: Path
) -> tuple[Json, list[Json]]:
    """Claude Code's own settings -> (those named by --settings, a file or JSON; those of the project and the user).
    What cannot be read is left for Claude Code to complain of."""
    folder = Path(environ.get("CLAUDE_CONFIG_DIR") or home / ".claude")
    files = (cwd / ".claude/settings.local.json", cwd / ".claude/settings.json", folder / "settings.json")
    found: list[Json] = []
    for source in (option_value(arguments, "--settings"), *files):
        content: Any = {}
        with contextlib.suppress(AnyclaudeError, ValueError, RecursionError):
            inline = isinstance(source, str) and source.lstrip().startswith("{")
            content = json.loads(str(source)) if inline else read_json(Path(source)) if source else {}
        found.append(as_object(content))
    return found[0], found[1:]


def option_value(arguments: Sequence[str], name: str) -> str:
    """The last value of an option of claude's, "" if it is not given."""
    values = [following for argument, following in zip(arguments, arguments[1:]) if argument == name]
    values += [argument.partition("=")[2] for argument in arguments if argument.startswith(name + "=")]
    return values[-1] if values else ""


def chosen_mode(arguments: Sequence[str], settings: Iterable[Json]) -> str:
    """The permission mode that the user chose, on the command line or in Claude Code's settings; "" for none. Pure."""
    if any(name in arguments for name in SKIP_PERMISSIONS):
        return "bypassPermissions"
    modes = (str(as_object(content.get("permissions")).get("defaultMode") or "") for content in settings)
    return option_value(arguments, "--permission-mode") or next(filter(None, modes), "")


def claude_arguments(arguments: Sequence[str], help_text: str, mode: str, prompt: str, settings: Path) -> list[str]:
    """Claude Code's arguments: ours in front, the user's unchanged behind. Pure. `settings`: our file for --settings,
    of which only the last one counts: it stands right behind one of the user's, whose content it repeats.

    Ours are written with "=": several take any number of values, and would swallow the user's prompt."""
    given = {argument.partition("=")[0] for argument in arguments}
    ours = {
        "--permission-mode=default": not mode,  # the client's own default, auto, is checked on Anthropic's servers
        "--disallowedTools=WebSearch": True,  # a model without search would make the results up
        f"--tools={LEAN_TOOLS}": prompt == "lean" and "--tools" not in given,
        STABLE_PROMPT: STABLE_PROMPT in help_text and not given & {STABLE_PROMPT, "--system-prompt"},
    }
    place = 0
    for at, argument in enumerate(arguments):
        if argument.partition("=")[0] == "--settings":
            place = at + 1 + ("=" not in argument)
    chosen = [argument for argument, wanted in ours.items() if wanted]
    return [*chosen, *arguments[:place], f"--settings={settings}", *arguments[place:]]


@contextlib.contextmanager
def session_settings(named: Json, environment: Mapping[str, str], line: Path | None) -> Iterator[Path]:
    """A private file with the settings that the user named and our variables: `env` in Claude Code's settings, which
    may have come with a cloned project, wins over the environment and could send the session elsewhere. `line`: the file
    that the status line shows, None for no such line of ours."""
    ours = {name: environment[name] for name in (*OUR_VARIABLES, *NO_PROXIES)}
    content = {**named, "env": {**as_object(named.get("env")), **ours}}
    if line:
        command = f"cat {shlex.quote(str(line))}"
        content["statusLine"] = {"type": "command", "command": command, "refreshInterval": 1, "padding": 0}
    path = state_path("run", f"claude-{os.getpid()}.json")
    for older in path.parent.glob("claude-[0-9]*"):  # of a session that was killed
        if not birth(int(re.sub(r"\D.*", "", older.stem.partition("-")[2]))):
            older.unlink(missing_ok=True)
    write_json(path, content)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def explain_mode(mode: str) -> None:
    """Say once what the permission mode means here; a chosen "auto" is named each time."""
    told = state_path("cache", "told-permission-mode")
    if mode == "auto":
        say("permission mode auto: its safety check runs on Anthropic's servers, and cannot work with a local model.")
    elif not mode and not told.exists():
        say("permission mode: default, Claude Code asks before it acts (auto mode's check needs Anthropic's servers).")
        write_json(told, {})


def run_claude(program: Path, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run Claude Code in the foreground -> its exit status (128 + n for signal n). Ctrl-C and Ctrl-\\ are its own;
    when it stops itself (Ctrl-Z), so do we, so that the shell comes back."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which it would inherit; SIGCHLD is to wake us
    claude: subprocess.Popen[bytes] | None = None
    with next_signal() as wait:
        try:
            with signals_wait():
                try:
                    claude = subprocess.Popen([str(program), *arguments], env=dict(environ))
                except OSError as error:
                    message = f"{program} cannot be run: {error.strerror}."
                    raise AnyclaudeError(message, " ".join(INSTALL_CLAUDE)) from None
            while True:
                pid, status = os.waitpid(claude.pid, os.WUNTRACED | os.WNOHANG)
                if pid and os.WIFSTOPPED(status):
                    time.sleep(0.05)  # the shell may be continuing us both just now, us first
                    pid, status = os.waitpid(claude.pid, os.WCONTINUED | os.WNOHANG)
                    if not pid:
                        os.kill(os.getpid(), signal.SIGSTOP)
                        os.kill(claude.pid, signal.SIGCONT)  # not send_signal, which may take its status
                elif not pid:
                    wait()
                if pid and not os.WIFCONTINUED(status):
                    claude.returncode = os.waitstatus_to_exitcode(status)
                    return claude.returncode if claude.returncode >= 0 else 128 - claude.returncode
        finally:
            if claude and claude.returncode is None:
                terminate(claude)


# === 10 Commands ==============================================================================
# Rule: the command line; each command is a short function.

USAGE = f"""\
anyclaude {__version__}: Claude Code on your own model

  anyclaude [options] [anything for claude]

Model
  --model-path PATH        a folder, a .gguf file, or a Hugging Face name
  --arch NAME              its architecture, where config.json does not tell
  --isq NAME               quantise while loading (Q4K; none: not at all)
  --context-window TOKENS  use less than the model has
Server
  --engine-port PORT       mistral.rs' port (8081; 0: any free one)
  --base-url URL           use the OpenAI-compatible server there, start none
  --proxy-only             no Claude Code: print how to reach the proxy
  --proxy-port PORT        the proxy's port (any free one)
Session
  --prompt lean            fewer tools, a shorter prompt
  --demo                   see it work with no model at all
  --yes                    set up what is missing without a question
  --config-file FILE       settings, in place of the .anyclauderc.json found
  --help, --version
Commands
  models   those on this disk, and some to download   (--json)
  init     write the settings file, or change it
  doctor   what is there, what is missing, what would be run   (--json)
  build    build mistral.rs   (--tag TAG: that version of it)
  status   the engine that runs: model, memory, sessions, speed   (--json)
  stats    speed and tokens of the last sessions   (--json)
  stop     stop the engine   (--force: with sessions open)
  logs     its log   (-f: and what comes)
Everything else, and all behind --, goes to claude unchanged.

  anyclaude --demo -p "Which files are here?"
  anyclaude --model-path ~/models/Qwen3-Coder-30B-A3B-Instruct
  anyclaude -p "Explain this repository" --output-format json
"""


def client_name(name: str) -> str:
    """The model's name as Claude Code sees it. One that begins with "claude" would get Anthropic's own window."""
    name = re.sub(r"[^\w.:-]+", "-", name.rpartition("/")[2]).strip("-") or "local"
    return f"local-{name}" if name.lower().startswith("claude") else name


@dataclass(frozen=True)
class Plan:
    """What would be run for the settings: found out before anything is started."""

    model: Model
    engine: Engine
    machine: Machine
    fit: Fit

    def command(self, settings: Settings, port: int) -> list[str]:
        """The engine's command line."""
        model = dataclasses.replace(self.model, path=shadow_folder(self.model))
        return command_line(
            self.engine, model, port, settings.isq, settings.extra_args, self.fit, self.machine.accelerator
        )


def named_template(extra: Sequence[str]) -> str:
    """The chat template that the engine's extra arguments name; "" if they name none."""
    for flag, value in zip(extra, extra[1:]):
        if flag in ("--chat-template", "-c", "--jinja-explicit", "-j"):
            try:
                text = Path(os.path.expanduser(value)).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise AnyclaudeError(
                    f"the chat template {value} cannot be read: {error}.", 'Correct "extraArgs".'
                ) from None
            with contextlib.suppress(ValueError):
                text = str(as_object(json.loads(text)).get("chat_template") or text)
            return text
    return ""


NO_MODEL = """\
anyclaude models   (those that are here, and some to download)
anyclaude --model-path /path/to/model
or, to see it work with no model: anyclaude --demo"""


def look_at_model(settings: Settings) -> Model:
    """The model of the settings, as far as it can be seen before it is loaded. Raises AnyclaudeError."""
    if not settings.model_path:
        raise AnyclaudeError("no model is configured.", NO_MODEL)
    return read_model(settings.model_path, settings.arch, named_template(settings.extra_args))


def make_plan(settings: Settings, model: Model, engine: Engine, machine: Machine | None = None) -> Plan:
    """How the engine will serve the model. Raises AnyclaudeError for what is known to fail. `machine`: this one, if it was
    asked already."""
    if engine.version < model.since:
        message = f"{model.name} needs mistral.rs {dotted(model.since)}, and this is {engine}."
        raise AnyclaudeError(message, "anyclaude build\nor choose another model.")
    for message, fix in model.flaws:
        raise AnyclaudeError(message, fix)
    isq = settings.isq
    if isq.upper() not in ISQ_BITS and isq.lower() != "none" and not lists(engine.help + engine.model_help, isq):
        raise AnyclaudeError(f"there is no quantisation {isq}.", f"One of: {', '.join(ISQ_BITS)}, none.")
    machine = machine or read_machine(settings.memory_limit)
    if model.mlx == "experts" and (engine.version >= MLX_EXPERTS_BEFORE or machine.accelerator != "metal"):
        raise AnyclaudeError(
            f"{model.name} is a mixture of experts quantised for MLX, which {engine} does not load: only mistral.rs 0.6 does, "
            "on a Mac.",
            ORIGINAL,
        )
    # on a processor these engines compute with 32 bits: mistralrs-core/src/utils/normal.rs at v0.9.2
    widened = 2 if not machine.accelerator and engine.version >= (0, 9, 0) else 1
    for name in model.files:
        if engine.generation.joint in name or name.startswith("-"):
            raise AnyclaudeError(
                f"{engine.generation.program} cannot be given the file name {name!r}.", "Rename the file."
            )
    return Plan(model, engine, machine, fit(model, machine, settings.isq, settings.context_window, widened))


@dataclass(frozen=True)
class Choice:
    """A model that could be used. `path`: as --model-path takes it; `size`: bytes, on the disk or to download; `kind`: its
    architecture and how it is stored; `window`: tokens that fit, 0 if unknown; `problem`: why it cannot be used; `note`: what
    is good to know."""

    path: str
    size: int = 0
    kind: str = ""
    window: int = 0
    problem: str = ""
    note: str = ""

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """Better ones are larger: it can be used, nothing stands against it, it leaves room for a window, and is large."""
        return not self.problem, not self.note, min(self.window, LEAN_WINDOW) // 8192, self.size


# GGUF architectures with experts. Source: mistralrs-quant/src/gguf/mod.rs at v0.7.0 to v0.9.2, and mistral.rs#2365
MIXTURES = re.compile(r"\w*moe|gpt-oss|qwen3next|deepseek2")


def weigh(settings: Settings, model: Model, engine: Engine, machine: Machine, path: str) -> Choice:
    """How a model would do here."""
    kind = " ".join(filter(None, (model.arch, model.stored)))
    note = "its chat template knows no tools" if model.dialect.hides_tools and not model.hub else ""
    if model.files and MIXTURES.fullmatch(model.arch) and machine.accelerator == "metal":
        note = "slow on a Mac: the experts of a GGUF file are computed by the processor"
    choice = Choice(path, model.weights, kind, note=note)
    if engine.version < model.since:
        return dataclasses.replace(choice, problem=f"needs mistral.rs {dotted(model.since)} (anyclaude build)")
    try:
        return dataclasses.replace(choice, window=make_plan(settings, model, engine, machine).fit.window)
    except AnyclaudeError as error:
        return dataclasses.replace(choice, problem=error.message)


def likely_engine(settings: Settings, environ: Mapping[str, str]) -> Engine:
    """The engine that is here, else the one that a build would give."""
    with contextlib.suppress(AnyclaudeError):
        return find_engine(settings, environ)
    return Engine(Path("mistralrs"), GENERATIONS[0], version_in(TESTED_TAG))


def choices(settings: Settings, environ: Mapping[str, str], engine: Engine) -> tuple[list[Choice], list[Choice]]:
    """-> (the models on this disk, those worth downloading), the best of each first."""
    settings = dataclasses.replace(settings, arch="")  # of the model that is set
    machine, here = read_machine(settings.memory_limit), []
    for path in models_on_disk(environ):
        try:
            place = _hub_snapshot(path) if not os.path.isabs(path) else None
            here.append(weigh(settings, read_model(str(place or path)), engine, machine, path))
        except (AnyclaudeError, OSError) as error:
            here.append(Choice(path, problem=error.message if isinstance(error, AnyclaudeError) else str(error)))
    listed = {os.path.basename(one.path) for one in here if not one.problem}
    missing = {path: model for path, model in KNOWN_MODELS.items() if os.path.basename(path) not in listed}
    known = [weigh(settings, model, engine, machine, path) for path, model in missing.items()]
    here, known = (sorted(rows, key=lambda one: one.rank, reverse=True) for rows in (here, known))
    return here, known


def show_choices(here: Sequence[Choice], known: Sequence[Choice], current: str, all_of_them: bool = True) -> list[str]:
    """The list of `anyclaude models`, for 80 columns: what can be used is numbered. `current`: the model that is set;
    `all_of_them`: what cannot be used is not only counted."""
    lines, number, left_out = [f"{'size':>12}  {'window':>7}  {'kind':15}  model"], 0, 0
    for title, rows in (("On this disk:", here), ("To download, made for tool calls:", known)):
        lines += [title] if rows else ["On this disk: none"] * (rows is here)
        for row in rows:
            number += not row.problem
            left_out += bool(row.problem) and not all_of_them
            if row.problem and not all_of_them:
                continue
            size, window = gigabytes(row.size) if row.size else "", str(row.window or "?" * (not row.problem))
            org, _, name = row.path.partition("/")
            where = short_path(row.path) if rows is here else f"{_GGUF_KIND.sub('', Path(name).name)[:-5]} ({org})"
            facts = f"{size:>8}  {window:>7}  {row.kind.replace('GGUF ', ''):15}  {where}"
            lines.append(f"{'-' if row.problem else number:>3} {facts}" + " *" * (row.path == current))
            told = (row.problem.replace(row.path, "", 1).strip(), row.note)
            lines += [f"{'':14}{text}" for text in told if text]
    lines += [f"{left_out} more cannot be used here, and why: anyclaude models"] if left_out else []
    lines.append("window: the tokens that fit; from 65536 on Claude Code has all its tools")
    return [*lines, *(["*: the one that is set"] if any(line.endswith(" *") for line in lines) else [])]


def short_path(path: str) -> str:
    """A path as people write it."""
    home = str(Path.home())
    return "~" + path[len(home) :] if path.startswith(home + os.sep) else path


def choose_model(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Ask which model to use, keep the answer in the settings file, and use it. With --yes it is the first of the
    list. Raises AnyclaudeError if there is none."""
    engine = likely_engine(settings, environ)
    here, known = choices(settings, environ, engine)
    usable = [one.path for one in (*here, *known) if not one.problem]
    if settings.yes and not usable:
        raise AnyclaudeError("no model on this disk can be used, and none that could be downloaded fits.", NO_MODEL)
    default = 1 + (usable.index(settings.model_path) if settings.model_path in usable else 0)
    path = usable[0] if settings.yes else ""
    if not path:
        TERMINAL.show(["", "Which model?", *map(as_called, show_choices(here, known, settings.model_path, False))])
    while not path:
        first = f" [{default}]" if usable else ""
        answer = ask(f"A number, a folder, a .gguf file, or a Hugging Face name{first}:")
        try:
            path = picked(settings, answer or str(default), usable, engine)
        except AnyclaudeError as error:
            listed = re.findall(r"(?m)^  --model-path (.*)", error.fix)
            say("\n  ".join([error.message, *listed]))
        except (OSError, ValueError) as error:
            say(f"that cannot be a model: {error}")
    say(f"model: {short_path(path)}")
    if settings.yes and (model := look_at_model(dataclasses.replace(settings, model_path=path))).hub:
        fetch_model(model)  # what nobody chose is kept only when it is there
    values = [(("backends", backend, "modelPath"), short_path(path)) for backend in settings.model_backends]
    keep_settings(settings, [(("backend",), settings.model_backends[0]), *values])
    say(as_called("to choose another: anyclaude init"))
    return dataclasses.replace(settings, model_path=path)


def picked(settings: Settings, answer: str, usable: Sequence[str], engine: Engine) -> str:
    """The model that an answer means. Raises AnyclaudeError, also for one that cannot be used, and ValueError for no path."""
    if answer.isdecimal() and not 0 < int(answer) <= len(usable):
        raise AnyclaudeError(f"the list has no number {answer}.", "")
    path = usable[int(answer) - 1] if answer.isdecimal() else str(checked("path", answer, Path.cwd()))
    settings = dataclasses.replace(settings, model_path=path)
    make_plan(settings, look_at_model(settings), engine)
    return path


def keep_settings(settings: Settings, values: Iterable[tuple[Sequence[str], Any]]) -> None:
    """Write values, each with its keys, into the user's settings file; everything else in it stays as it is, and where there
    is no file a commented one is begun. Raises AnyclaudeError."""
    path = Path(os.path.realpath(settings.file))  # not the link that may lead to it
    with contextlib.closing(os.fdopen(lock(state_path("run", "settings.lock"), fcntl.LOCK_EX))):
        _keep_settings(path, list(values))


def _keep_settings(path: Path, values: Sequence[tuple[Sequence[str], Any]]) -> None:
    text, mode = COMMENTED_SETTINGS, 0o600
    if path.exists():
        read_json(path, comments=True)
        text, mode = path.read_bytes().decode(), path.stat().st_mode & 0o777
    wanted, end = "{}", "\r\n" if "\r\n" in text else "\n"
    text = text.replace("\r\n", "\n")
    for keys, value in values:
        text, wanted = (with_setting(one, keys, value) for one in (text, wanted))
    text = text.replace("\n", end)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, mode)
    except OSError as error:
        fix = f"Make it writable, or write into another, for --config-file:\n{wanted}"
        raise AnyclaudeError(f"{path} cannot be written: {error.strerror}.", fix) from None
    say(f"wrote {short_path(str(path))}")


def what_is_missing(settings: Settings, environ: Mapping[str, str]) -> tuple[Engine | None, list[AnyclaudeError]]:
    """-> (the engine, what a start of the engine lacks)."""
    engine, missing = None, []
    try:
        engine = find_engine(settings, environ)
    except AnyclaudeError as error:
        if settings.binary:
            raise
        missing.append(error)
        try:
            _tell_what_is_missing(check_build(plan_build(settings, environ), environ), "mistral.rs was not found, and ")
        except CannotBuild as why:
            missing = [why]
    if not settings.model_path:
        missing.append(AnyclaudeError("no model is configured.", NO_MODEL))
    return engine, missing


def all_missing(errors: Sequence[AnyclaudeError]) -> AnyclaudeError:
    """One error for several, where nobody can be asked."""
    fixes = ["The same command with --yes sets up what it can. By hand:", *(one.fix for one in errors)]
    return AnyclaudeError("\n".join(one.message for one in errors), "\n".join(fixes))


def set_up(settings: Settings, environ: Mapping[str, str]) -> tuple[Settings, Engine]:
    """The engine, and the settings with a model. What is missing is set up if the user agrees; both questions come before the
    build and the download. Raises AnyclaudeError with everything that is missing, if nobody can be asked."""
    engine, missing = what_is_missing(settings, environ)
    if missing and not (settings.yes or can_ask()):
        raise all_missing(missing)
    if not engine:
        question = "mistral.rs was not found. Build it now? 10 to 40 minutes, once."
        if isinstance(missing[0], CannotBuild) or not agrees(question, settings.yes):
            raise missing[0]
    if not settings.model_path:
        settings = choose_model(settings, environ)
    return settings, engine or built_engine(settings, environ)


def built_engine(settings: Settings, environ: Mapping[str, str], tag: str = "") -> Engine:
    """Build mistral.rs -> what came out. Raises AnyclaudeError."""
    program = build(settings, environ, tag)
    engine = probe_engine(program)
    if not engine:
        log = state_path("logs", "build.log")
        raise AnyclaudeError(f"{program} was built, and does not run.", f"Read the log: less {log}")
    say(f"ready: {engine}")
    return engine


@contextlib.contextmanager
def serving_target(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[Target, EngineShare | None]]:
    """Make an engine serve -> what the proxy must know of it. What was started is gone afterwards."""
    target = Target("", "anyclaude-demo", window=settings.context_window, max_tokens=settings.max_tokens)
    target = dataclasses.replace(target, stall=settings.stall_timeout)
    if settings.demo:
        say("demo: a small engine inside anyclaude answers, no model is loaded")
        yield dataclasses.replace(target, url=start_demo_engine(), window=settings.context_window or 200_000), None
    elif settings.kind == "remote":
        served, window = check_remote(settings)
        say(f"using the server at {settings.base_url}, model {served}")
        yield remote_target(target, settings, settings.base_url, served, window), None
    elif settings.server_script:
        port = settings.port or free_port()
        with contextlib.closing(start_server_script(settings, port)) as share:
            window = settings.context_window
            with contextlib.suppress(AnyclaudeError):  # it may load what mistral.rs does not
                window = window or look_at_model(settings).context
            url = f"http://{LOOPBACK}:{port}/v1"
            yield remote_target(target, settings, url, settings.model, window), share
    else:
        settings, engine = set_up(settings, environ)
        plan = make_plan(settings, look_at_model(settings), engine)
        if plan.model.hub:
            fetch_for(settings, plan.model)
            plan = make_plan(settings, look_at_model(settings), engine)
        with contextlib.closing(start_engine(plan, settings)) as share:
            yield engine_target(target, settings, plan, share), share


def fetch_for(settings: Settings, model: Model) -> None:
    """Download a model that the user chose; one that a project's file chose only if the user agrees."""
    size = gigabytes(model.to_download)
    question = f"This project's {SETTINGS_FILE} wants {model.hub} from Hugging Face ({size}). Download it?"
    if settings.project_model and not agrees(question, settings.yes):
        message = f"{model.hub}, which this project's file names, is not on this disk."
        raise AnyclaudeError(message, "The same command with --yes downloads it.")
    fetch_model(model)


def engine_target(target: Target, settings: Settings, plan: Plan, share: EngineShare) -> Target:
    """A mistral.rs of ours, which serves."""
    model, version, window = plan.model, plan.engine.version, plan.fit.window
    if share.joined:  # one that another session started, as that session wanted it
        told = [one for one in share.state.get("version", []) if type(one) is int]
        version = (told[0], told[1], told[2]) if len(told) == 3 else version
        window = settings.context_window or share.state.get("window") or window
    can = {name: version >= since for name, since in SINCE.items()}
    family = "engine" if model.dialect.calls == "harmony" else "text"  # gpt-oss' parser is part of how it is decoded
    return dataclasses.replace(
        target,
        url=f"http://{LOOPBACK}:{share.port}/v1",
        name=client_name(model.name),
        window=window,
        own_tools=(settings.tool_calls or family) == "text",
        forces_calls=can["forced calls"],
        counts=can["counts tokens"],
        sees=settings.vision or (model.sees and can["images"]),
        sampling={**model.sampling, **settings.sampling},
        dialect=dialect_on(model.dialect, version),
    )


def remote_target(target: Target, settings: Settings, url: str, model: str, window: int) -> Target:
    """A server of which only the protocol is known."""
    return dataclasses.replace(
        target,
        url=url,
        name=client_name(model),
        model=model,
        window=window,
        key=settings.api_key,
        own_tools=settings.tool_calls == "text",
        forces_calls=True,
        sees=settings.vision,
        sampling=settings.sampling,
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the server that the user named, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


WINDOW_NAMES = ("max_model_len", "context_length", "max_context_length", "context_window")  # vLLM, routers, LM Studio


def check_remote(settings: Settings) -> tuple[str, int]:
    """Ask a remote server for its models -> (the model to use, its window). Raises AnyclaudeError if it cannot be reached,
    refuses the key, or does not have the model. A server that has no list is taken as it is."""
    url, found = f"{settings.base_url}/models", list[Json]()
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    direct = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    opener = urllib.request.build_opener(_NoRedirects, *direct)
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            found = [as_object(one) for one in as_list(as_object(json.loads(reply.read(4 << 20))).get("data"))]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            key = "the apiKey that is set" if settings.api_key else "requests without a key"
            fix = f'Set "apiKey" of the backend in ~/{SETTINGS_FILE}, or ANYCLAUDE_API_KEY.'
            raise AnyclaudeError(f"{settings.base_url} refuses {key} (HTTP {error.code}).", fix) from None
        if error.code == 404 and is_loopback(url) and answers(f"{settings.base_url}/v1/models"):
            message = f"{settings.base_url} has no list of models, but {settings.base_url}/v1 has."
            raise AnyclaudeError(message, f"--base-url {settings.base_url}/v1") from None
        if error.code not in (400, 404, 405, 501):  # those have no such list
            where = f" to {error.headers['Location']}" if error.headers.get("Location") else ""
            message = f"{settings.base_url} answers with HTTP {error.code}{where[:200]}, and not with its models."
            raise AnyclaudeError(message, "Look at that server, or correct baseUrl (or --base-url).") from None
    except (OSError, http.client.HTTPException) as error:
        message = f"no server answers at {settings.base_url}: {getattr(error, 'reason', error)}."
        raise AnyclaudeError(message, "Start that server, or correct baseUrl (or --base-url).") from None
    except (ValueError, RecursionError):
        pass
    names = [str(one["id"])[:200] for one in found if one.get("id")]
    model = names[0] if settings.model == "default" and len(names) == 1 else settings.model
    if names and model not in names:
        listed = ", ".join(names[:9]) + (f" and {len(names) - 9} more" if len(names) > 9 else "")
        message = f'{settings.base_url} has no model "{model}". It has: {listed}.'
        raise AnyclaudeError(
            message, f'Set "model" of the backend to one of them, or ANYCLAUDE_MODEL={shlex.quote(names[0])}'
        )
    entry = next((one for one in found if one.get("id") == model), {})
    windows = (entry.get(name) for name in WINDOW_NAMES)
    return model, settings.context_window or next((one for one in windows if type(one) is int and one > 0), 0)


def start_server_script(settings: Settings, port: int) -> EngineShare:
    """Start the deprecated Python server, as earlier versions did: `python serverScript --model PATH --port PORT`."""
    say(
        '"serverScript" is deprecated: mistral.rs serves the model with tool calls that work. To change: remove that key.'
    )
    model = Model(settings.model_path, Path(settings.model_path).name)
    command = server_command(settings, port)
    share = EngineShare(port, command, model, engine=Path(settings.server_script).name, keep_alive=settings.keep_alive)
    return start_share(share, settings, model)


def server_command(settings: Settings, port: int) -> list[str]:
    """The argument list of the deprecated server."""
    if not settings.model_path:
        look_at_model(settings)  # says so
    script, venv = Path(settings.server_script), settings.python_venv
    python = Path(venv) / "bin" / "python3" if venv else Path(sys.executable)
    for path, name in ((script, "serverScript"), (python, "pythonVenv")):
        if not path.is_file():
            raise AnyclaudeError(
                f"{name}: {path} does not exist.", f'Correct "{name}" in ~/{SETTINGS_FILE}, or remove it.'
            )
    command = [str(python), "-u", str(script), "--model", settings.model_path, "--port", str(port)]
    return command + (["--host", LOOPBACK] if lists(output_of(str(python), str(script), "--help"), "--host") else [])


def start_engine(plan: Plan, settings: Settings) -> EngineShare:
    """Start the engine or join the one that runs, and wait until it serves. Where any port will do, one that another program
    took meanwhile is no error."""
    for _ in range(0 if settings.port else 2):
        with contextlib.suppress(PortTaken):
            return start_engine_at(free_port(), plan, settings)
    return start_engine_at(settings.port or free_port(), plan, settings)


def start_engine_at(port: int, plan: Plan, settings: Settings) -> EngineShare:
    """The same, at this port."""
    command = plan.command(settings, port)
    make_shadow(plan.model)
    told = {"keep_alive": settings.keep_alive, "start_timeout": settings.start_timeout}
    told.update(window=plan.fit.window, weights=plan.fit.weights)
    share = EngineShare(port, command, plan.model, **told, engine=str(plan.engine), version=plan.engine.version)
    laid = plan.fit
    if laid.token and laid.weights + 2 * laid.window * laid.token > plan.machine.memory:
        say(f"warning: a window of {laid.window} tokens may take more memory than there is, once it is full")
    isq = settings.isq if "--isq" in command else ""
    size = f"{gigabytes(laid.weights)} of weights" if laid.weights else ""
    window = f"window {laid.window} tokens" if laid.window else ""
    return start_share(share, settings, plan.model, ", ".join(filter(None, (plan.model.arch, isq, size, window))))


def start_share(share: EngineShare, settings: Settings, model: Model, details: str = "") -> EngineShare:
    """Tell of an engine that was started or joined, and wait until it serves."""
    try:
        words = share.state.get("engine")
        say(f"joining the mistral.rs that runs: {words}" if share.joined else f"starting mistral.rs: {words}")
        say(f"model: {model.place}" + (f" ({details})" if details else ""))
        say(f"port: {share.port}\nwaiting until it serves (log: {share.log})")
        line = share.wait_until_ready(settings.start_timeout)
    except BaseException:
        share.close()
        raise
    say("ready" + (f": {line}" if line else ""))
    return share


def run(settings: Settings, arguments: list[str], environ: Mapping[str, str]) -> int:
    """The session: engine, proxy, Claude Code -> the exit status."""
    claude = None if settings.proxy_only else claude_for(settings, environ)  # before a model is loaded in vain
    if settings.proxy_port and not port_is_free(settings.proxy_port):
        raise port_taken("the proxy's ", settings.proxy_port, "--proxy-port")
    commands = {"-v", "--version", "-h", "--help"} | (claude_commands(claude_help(claude)) if claude else set())
    if claude and arguments and arguments[0] in commands:  # with an option of ours before it
        return run_claude(claude, arguments, environ)
    memory = state_path("cache", "tokens.json")
    named, others = claude_settings(arguments, environ, Path.cwd(), Path.home())
    talks = claude is not None and can_ask() and sys.stdout.isatty() and not {"-p", "--print"} & {*arguments}
    has_line = any("statusLine" in one for one in (named, *others))
    line = state_path("run", f"claude-{os.getpid()}.txt") if talks and not has_line else None
    with (
        serving_target(settings, environ) as (target, share),
        Proxy(settings.proxy_port, target, settings.debug, memory, share, line) as proxy,
    ):
        say(f"Proxy URL: http://localhost:{proxy.server_address[1]}")
        window, prompt = window_and_prompt(settings, target)
        session = Session(proxy.url, proxy.token, target.name, window, max(256, min(settings.max_tokens, window // 4)))
        environment = claude_environment(environ, session)
        if claude is None:
            return serve_until_stopped(proxy, environment)
        mode = chosen_mode(arguments, [named, *others])
        explain_mode(mode)
        with session_settings(named, environment, line) as path:
            arguments = claude_arguments(arguments, claude_help(claude), mode, prompt, path)
            ended = run_claude(claude, arguments, environment)
        if share and (told := share.trouble() or share.history()):
            say(told)
        elif talks:
            again = "that was the demo; with a model of yours: anyclaude" * settings.demo
            say(as_called(again or "to go on with this conversation: anyclaude --continue"))
            say("(claude by itself would talk to Anthropic's servers)")
        return ended


def claude_for(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Claude Code, set up if need be. Raises AnyclaudeError, where nobody can be asked with all else that is missing."""
    try:
        return set_up_claude(settings, environ)
    except AnyclaudeError as error:
        if settings.yes or can_ask() or settings.claude_binary:
            raise
        starts = settings.kind == "mistralrs" and not settings.demo and not settings.server_script
        raise all_missing([error, *(what_is_missing(settings, environ)[1] if starts else [])]) from None


def window_and_prompt(settings: Settings, target: Target) -> tuple[int, str]:
    """-> (tokens of the window, which prompt of Claude Code's suits it); says what a person should know of them."""
    if not target.window:
        say(f"context window unknown, taken for {DEFAULT_WINDOW} tokens. If it has more: --context-window TOKENS")
    window = target.window or DEFAULT_WINDOW
    prompt = settings.prompt or ("lean" if window < LEAN_WINDOW else "full")
    if window < SMALL_WINDOW:
        full = "about 25,000" if prompt == "full" else "about 8,000"
        more = " Try --prompt lean" if prompt == "full" else " Give it more, if you can: --context-window 32768"
        say(f"the window of {window} tokens is small: Claude Code's own prompt takes {full} of them.{more}")
    elif not settings.prompt and prompt == "lean":
        say(f"window of {window} tokens: fewer tools, a shorter prompt (--prompt full: all of them)")
    return window, prompt


def serve_until_stopped(proxy: Proxy, environment: Mapping[str, str]) -> int:
    """--proxy-only: say how to reach the proxy, and wait for a signal, which is a good end."""
    by_hand = {name: environment[name] for name in ("ANTHROPIC_MODEL", *DEFAULT_VARIABLES)}
    exports = shlex.join(f"{name}={text}" for name, text in by_hand.items())
    say(f"for Claude Code by hand, also: export {exports}")
    if proxy.share:
        threading.Thread(target=proxy.share.tell_of_crashes, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, SystemExit), next_signal() as wait:
        say("Ctrl-C ends it")
        print(f"export ANTHROPIC_BASE_URL={proxy.url}\nexport ANTHROPIC_AUTH_TOKEN={proxy.token}", flush=True)
        while True:
            wait()
    return 0


def engines() -> list[_Files]:
    """Those of the engines that run here, by port. What a dead engine left is removed on the way."""
    found = []
    names = (path.name for path in state_path("run", "").glob("engine-*.json") if path.is_file())
    ports = (re.fullmatch(r"engine-(\d{1,5})\.json", name, re.ASCII) for name in names)
    for port in sorted(int(found[1]) for found in ports if found):
        files = _Files(port)
        if files.engine_runs() or files.engine():  # one without a parent is still an engine
            found.append(files)
        elif "exit" not in files.read_state() or not files.cards():  # open sessions tell of its end
            stop_orphan(files)
    return found


THROUGHPUT = re.compile(r"Throughput \(T/s\) ([\d.]+), Prefix cache hitrate ([\d.]+)%.*?, (\d+) running, (\d+) waiting")


def engine_status(files: _Files) -> Json:
    """What can be said of an engine that runs. Bytes, seconds, tokens a second, percent."""
    state, pid = files.read_state(), files.engine()
    said = [found for found in map(THROUGHPUT.search, last_lines(Path(str(state.get("log"))), 200)) if found]
    metrics = ""
    with contextlib.suppress(OSError, http.client.HTTPException):  # mistral.rs before 0.9.2 has none that help here
        metrics = (
            DIRECTLY.open(f"http://{LOOPBACK}:{files.port}/metrics", timeout=2).read(1 << 20).decode("utf-8", "replace")
        )
    lookups, hits = (
        sum(
            float(value)
            for value in re.findall(rf"(?m)^mistralrs_prefix_cache_{name}_total(?:\{{.*\}})? ([\d.eE+]+)$", metrics)
        )
        for name in ("lookups", "hits")
    )
    ready = "ready" if state.get("ready") and pid else "restarting" if state.get("crashes") else "starting"
    return {
        "engine": state.get("engine"),
        "model": state.get("model"),
        "port": files.port,
        "pid": pid,
        "state": ready if files.engine_runs() else "without a parent",
        "uptime": round(max(0.0, min(1e9, time.time() - state.get("started", time.time())))),
        "crashes": state.get("crashes", 0),
        "memory": memory_of(pid),
        "sessions": files.cards(),
        "tokens_per_second": float(said[-1][1]) if said else None,
        "prefix_cache_hits": round(100 * hits / lookups, 1) if lookups else float(said[-1][2]) if said else None,
        "running": int(said[-1][3]) if said else None,
        "keep_alive": state.get("keep_alive", 0),
        "log": state.get("log"),
    }


def status(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude status`: the engines that run. Exit status 1 if there is none."""
    found = [engine_status(files) for files in engines()]
    if "--json" in options:
        print(json.dumps({"engines": found}, indent=2))
    elif not found:
        print("no engine runs")
    for one in [] if "--json" in options else found:
        speed = one["tokens_per_second"]
        hits = one["prefix_cache_hits"]
        rows = {
            "engine": one["engine"],
            "model": one["model"],
            "port": f"{one['port']}, {one['state']}" + (f", pid {one['pid']}" if one["pid"] else ""),
            "uptime": duration(one["uptime"]) + (f", {one['crashes']} crashes" if one["crashes"] else ""),
            "memory": gigabytes(one["memory"]),
            "sessions": "".join(f"pid {card.get('pid')} in {card.get('folder')}; " for card in one["sessions"]).rstrip(
                "; "
            )
            or "none",
            "speed": f"{speed:g} tokens a second, read and written, when it last worked"
            if speed is not None
            else "nothing was asked yet",
            "prefix cache": f"{hits:g} % hits" if hits is not None else "nothing was asked yet",
            "log": one["log"],
        }
        print("".join(f"{name:13}{plain(str(text))}\n" for name, text in rows.items()))
    return 0 if found else 1


def stop(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude stop [--force]`: stop the engines that run; with sessions open only if forced."""
    found = engines()
    used = [(files, card) for files in found for card in files.cards()]
    if used and "--force" not in options:
        listed = "".join(
            f"\n  port {files.port}: pid {card.get('pid')} in {card.get('folder')}" for files, card in used
        )
        raise AnyclaudeError(f"sessions are open:{listed}", "Close them, or: anyclaude stop --force")
    for files in found:
        starting = lock(files.starting, fcntl.LOCK_EX)  # no session begins meanwhile
        if "--force" in options or not files.cards():
            stop_engine(files)
        os.close(starting)
        if files.engine_runs():
            parent = files.read_state().get("parent") or "PID"
            raise AnyclaudeError(
                f"the engine on port {files.port} does not stop.",
                f"kill -9 {parent}   (its parent), and again: anyclaude stop",
            )
        say(f"stopped the engine on port {files.port}")
    if not found:
        say("no engine runs")
    return 0


def logs(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude logs [-f]`: the engine's log; -f: and what comes, until Ctrl-C."""
    running = [Path(str(files.read_state().get("log"))) for files in engines()]
    path = next(iter(running), state_path("logs", "mistralrs-server.log"))
    if not path.is_file():
        raise AnyclaudeError(f"there is no log yet: {path}.", "anyclaude   (starts an engine, which writes it)")
    follow = "-f" in options or "--follow" in options
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        while True:
            with path.open("rb") as file:
                opened = os.fstat(file.fileno()).st_ino
                while True:
                    for line in file:
                        sys.stdout.write(
                            plain(line.decode("utf-8", "replace").rstrip("\n")) + "\n" * line.endswith(b"\n")
                        )
                    sys.stdout.flush()
                    if not follow:
                        return 0
                    time.sleep(0.1)
                    with contextlib.suppress(OSError):
                        if path.stat().st_ino != opened:  # rotated: a new engine
                            break
    return 0


def check_port(settings: Settings, model: Model | None) -> Check:
    """Whether the engine's port can be had."""
    files = _Files(settings.port)
    if settings.port and files.engine_runs():
        runs, mine = files.read_state().get("model"), model.place if model else ""
        state = "failure" if runs != mine and files.cards() else "ok"
        words = (
            "which a new session joins"
            if runs == mine
            else "used by other sessions"
            if files.cards()
            else "which nobody uses"
        )
        fix = f"Close them, or: --engine-port {other_port(settings.port)}" if state == "failure" else ""
        return Check("port", state, f"{settings.port}: an engine of yours runs there with {runs}, {words}", fix)
    if settings.port and not port_is_free(settings.port):
        error = port_taken("", settings.port, "--engine-port")
        return Check("port", "failure", error.message, error.fix)
    return Check("port", "ok", f"{settings.port or 'any'}: free")


def diagnose(settings: Settings, environ: Mapping[str, str]) -> tuple[list[Check], str]:
    """What `anyclaude doctor` finds, and the command line that would be run."""
    checks, line = [], ""

    def examine(name: str, look: Callable[[], Any], words: Callable[[Any], str]) -> Any:
        try:
            found = look()
        except Exception as error:  # noqa: BLE001  the other checks are still wanted
            problem = error if isinstance(error, AnyclaudeError) else unexpected(error)
            checks.append(Check(name, "failure", problem.message, problem.fix))
            return None
        checks.append(Check(name, "ok", words(found)))
        return found

    python = ".".join(map(str, sys.version_info[:3]))
    checks.append(Check("python", "ok", f"{python} ({sys.executable})"))
    examine(
        "claude",
        lambda: find_claude(settings, environ),
        lambda found: f"{found} {output_of(str(found), '--version').strip()}",
    )
    if settings.kind == "remote":
        examine(
            "server",
            lambda: check_remote(settings),
            lambda found: f"{settings.base_url}, model {found[0]}, window {found[1] or 'unknown'}",
        )
        return checks, f"the server at {settings.base_url}"
    if settings.server_script:
        script = examine("server", lambda: server_command(settings, settings.port or 8081), shlex.join)
        return checks, shlex.join(script or [])
    model = examine("model", lambda: look_at_model(settings), describe_model)
    for message, fix in model.flaws if model else ():
        checks.append(Check("model", "failure", message, fix))
    engine = examine("engine", lambda: find_engine(settings, environ), str)
    if engine is None:
        plan = plan_build(settings, environ)
        needs = [Check("build", "ok", f"anyclaude build would build {plan.words}"), *check_build(plan, environ)]
        checks[-1:-1] = needs  # what it needs is to be mended first
    machine = read_machine(settings.memory_limit)
    usable = f"{gigabytes(machine.memory)} for the engine ({machine.source}), {machine.accelerator or 'processor only'}"
    checks.append(Check("memory", "ok", usable))
    if model and engine and not model.flaws:
        laid = examine("fit", lambda: make_plan(settings, model, engine), describe_plan)
        line = shlex.join(laid.command(settings, settings.port or 8081)) if laid else ""
        if laid and laid.fit.window and laid.fit.window < LEAN_WINDOW:
            checks.append(
                Check(
                    "window",
                    "warning",
                    f"{laid.fit.window} tokens are few for Claude Code: it gets fewer tools",
                    SMALL_FIX,
                )
            )
    checks.append(check_port(settings, model))
    return checks, line


SMALL_FIX = "A smaller model, or a harder --isq, leaves more memory for the window."


def describe_model(model: Model) -> str:
    """A model in one line."""
    facts = {
        "": model.place,
        "architecture": model.arch or "found by the engine",
        "weights": gigabytes(model.weights) if model.weights else "",
        "context": f"{model.context} tokens" if model.context else "",
        "calls": model.dialect.calls,
        "quantised": "already" if model.quantised else "",
        "in": "GGUF" if model.files else "MLX, read through a folder of links" if model.mlx == "shadow" else "",
        "to be downloaded from Hugging Face first:": gigabytes(model.to_download) if model.hub else "",
    }
    return ", ".join(f"{name} {text}".strip() for name, text in facts.items() if text)


def describe_plan(plan: Plan) -> str:
    """How a model is laid into memory, in one line."""
    laid = plan.fit
    if not laid.token:
        return f"cannot be told before it is loaded; window {laid.window or 'unknown'}"
    caches = laid.window * laid.token * (1 + laid.cached)
    return (
        f"{gigabytes(laid.weights)} of weights, window {laid.window} tokens, {laid.cached} cached conversations "
        f"(at most {gigabytes(caches)} of caches)"
    )


def doctor(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude doctor [--json]`: every check before a start. Exit status 1 if one fails."""
    checks, line = diagnose(settings, os.environ)
    failed = any(check.state == "failure" for check in checks)
    if "--json" in options:
        print(
            json.dumps(
                {"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks], "command": line}, indent=2
            )
        )
        return int(failed)
    marks = {"ok": "ok", "warning": "warning", "failure": "FAILURE"}
    for check in checks:
        fixes = as_called(f"fix: {check.fix}" * bool(check.fix)).replace("\n", "\n     ")
        lines = [*check.text.split("\n"), *fixes.split("\n")] if fixes else check.text.split("\n")
        print(
            "".join(
                f"{marks[check.state] if not at else '':9}{check.name if not at else '':10}{plain(text)}\n"
                for at, text in enumerate(lines)
            ),
            end="",
        )
    print(
        f"would run: {plain(line)}"
        if line and not failed
        else as_called("Mend the failures from the top, then: anyclaude doctor")
    )
    return int(failed)


def build_command(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude build [--tag TAG]`: build mistral.rs."""
    tag = option_value(options, "--tag")
    if options and not tag:
        raise AnyclaudeError("--tag needs a value.", f"anyclaude build --tag {TESTED_TAG}")
    program = built_engine(settings, os.environ, tag).program
    used = find_engine(settings, os.environ)
    if not used.program.samefile(program):
        say(
            f'but {used} is found before it. To use the new one: "binary": "{program}" in the backend in ~/{SETTINGS_FILE}'
        )
    return 0


def models(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude models [--json]`: what is on this disk, and what is worth downloading."""
    here, known = choices(settings, os.environ, likely_engine(settings, os.environ))
    if "--json" in options:
        listed = {"on_disk": here, "to_download": known}
        print(json.dumps({name: [dataclasses.asdict(one) for one in rows] for name, rows in listed.items()}, indent=2))
        return 0
    print("\n".join(map(one_line, show_choices(here, known, settings.model_path))))
    print(as_called("to choose one of them: anyclaude init"))
    return 0


def init(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude init [own options]`: write the settings file, or change in it what the options say; on a terminal, and if they
    say nothing of the model, ask for it."""
    remote, chosen = "base_url" in settings.given, "model_path" in settings.given
    backends = ["remote"] if remote else settings.model_backends if chosen else [settings.home_backend]
    values = [
        (("backends", backend, key.json), short_path(value) if isinstance(value, str) else value)
        for backend in backends
        for key in KEYS
        if key.field in settings.given and key.json and (value := getattr(settings, key.field)) is not None
    ]
    asks = can_ask() and not values
    if not asks and not values and Path(settings.file).exists():
        fix = "anyclaude init --model-path /path/to/model   (all else in it stays as it is)"
        raise AnyclaudeError(f"{short_path(settings.file)} is there already.", fix)
    if chosen:
        look_at_model(settings)  # a wrong one is not kept
    if values or not asks:
        keep_settings(settings, [*([(("backend",), backends[0])] if remote or chosen else []), *values])
    if asks:
        choose_model(settings, os.environ)
    elif not settings.model_path and not remote:
        say(as_called("no model is set yet; those that are here: anyclaude models"))
    else:
        say(as_called(f"what else may be set stands in {short_path(settings.file)}; to start: anyclaude"))
    return 0


def read_requests() -> list[Json]:
    """What REQUESTS_LOG and the one before it hold, oldest first; what is not of its shape is passed over."""
    path, found = state_path(*REQUESTS_LOG), []
    for file in filter(Path.is_file, (path.with_name(f"{path.name}.1"), path)):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found.append(as_object(from_json(line)))
    return [
        one for one in found if all(map(is_figure, map(one.get, ("time", "prompt_tokens", "output_tokens", "seconds"))))
    ]


def is_figure(value: Any) -> bool:
    """Whether `value` is a number that a request can have."""
    return type(value) in (int, float) and 0 <= value < 1e12


def session_figures(requests: Sequence[Json]) -> Json:
    """The figures of one session's requests; medians, of those that have them. Pure."""

    def middle(name: str) -> float | None:
        values = sorted(one[name] for one in requests if is_figure(one.get(name)))
        return values[len(values) // 2] if values else None

    told = [one for one in requests if is_figure(one.get("cached_tokens"))]
    read = sum(one["prompt_tokens"] for one in told)
    return {
        "session": requests[0].get("session"),
        "began": requests[0]["time"] - requests[0]["seconds"],
        "model": requests[-1].get("model"),
        "requests": len(requests),
        "failed": sum(str(one.get("outcome")).startswith("error") for one in requests),
        "prompt_tokens": max(one["prompt_tokens"] for one in requests),
        "reused_percent": round(100 * sum(one["cached_tokens"] for one in told) / read, 1) if read else None,
        "output_tokens": sum(one["output_tokens"] for one in requests),
        "time_to_first_token": middle("time_to_first_token"),
        "tokens_per_second": middle("tokens_per_second"),
    }


SHOWN_SESSIONS = 10
STATS_COLUMNS = "began        model              asked  prompt reused   first  tokens/s"


def stats(settings: Settings, options: Sequence[str]) -> int:
    """`anyclaude stats [--json]`: the figures of the last sessions."""
    sessions: dict[str, list[Json]] = {}
    for one in read_requests():
        sessions.setdefault(str(one.get("session")), []).append(one)
    rows = [session_figures(requests) for requests in sessions.values()][-SHOWN_SESSIONS:]
    if "--json" in options:
        print(json.dumps({"sessions": rows}, indent=2))
        return 0
    if not rows:
        print(as_called("no request was answered yet; a first one: anyclaude --demo -p hi"))
        return 0
    fastest = max(row["tokens_per_second"] or 0 for row in rows) or 1
    block = "\u2588" if "utf" in str(sys.stdout.encoding).lower() else "#"
    print(STATS_COLUMNS)
    for row in rows:
        speed, first, reused = row["tokens_per_second"], row["time_to_first_token"], row["reused_percent"]
        cells = (
            f"{time.strftime('%b %d %H:%M', time.localtime(row['began']))} {plain(str(row['model']))[:18]:18}",
            f"{row['requests']:5} {row['prompt_tokens']:7} {'-' if reused is None else f'{reused:.0f} %':>6}",
            f"{'-' if first is None else f'{first:.2f} s':>7} {'-' if speed is None else f'{speed:.3g}':>9}",
            block * math.ceil(8 * (speed or 0) / fastest),
        )
        print(" ".join(cells) + f" {row['failed']} failed" * bool(row["failed"]))
    print("prompt: tokens of the longest; first: seconds to the first token, and tokens/s:")
    print("the median of the session; reused: not told by mistral.rs, and so a guess of it")
    return 0


# Name -> (what it does, its options, whether each takes a value).
COMMANDS: dict[str, tuple[Callable[[Settings, Sequence[str]], int], dict[str, bool]]] = {
    "doctor": (doctor, {"--json": False}),
    "build": (build_command, {"--tag": True}),
    "models": (models, {"--json": False}),
    "init": (init, {}),
    "stats": (stats, {"--json": False}),
    "status": (status, {"--json": False}),
    "stop": (stop, {"--force": False}),
    "logs": (logs, {"-f": False, "--follow": False}),
}


def command_options(name: str, rest: Sequence[str]) -> list[str]:
    """The options behind a command's name. Raises AnyclaudeError for one that it does not have."""
    known, queued = COMMANDS[name][1], list(rest)
    while queued:
        option, equals, _ = queued.pop(0).partition("=")
        if option not in known or (equals and not known[option]):
            has = " ".join(flag + " VALUE" * takes for flag, takes in known.items())
            raise AnyclaudeError(
                f"anyclaude {name} has no {option}.",
                f"anyclaude {name} {has}\nor, for claude: anyclaude -- {name} {option}",
            )
        if known[option] and not equals:
            if not queued:
                raise AnyclaudeError(f"{option} needs a value.", f"anyclaude {name} {option} VALUE")
            queued.pop(0)
    return list(rest)


def near_miss(arguments: Sequence[str], claude_help: str) -> tuple[str, str]:
    """What looks like an option or a command of ours, and is none of claude's -> (it, the one that is meant); else ("", "").
    Pure. `claude_help`: "" if there is no claude to ask, which calls for more likeness."""
    own = [*OWN_OPTIONS, "--config-file", "--help", "--version"]
    for argument in arguments:
        given = argument.partition("=")[0]
        name = "--" + given.lstrip("-").lower()
        near = difflib.get_close_matches(name, own, 1, 0.78 if claude_help else 0.9)
        near = near or [one for one in own if len(name) > 5 and one.startswith(name) and claude_help]
        if len(given) > 3 and given[0] == "-" and near and given not in near and not lists(claude_help, given):
            return given, near[0]
    alone = [one.startswith("-") for one in arguments] == [False] + [True] * (len(arguments) - 1)
    word = arguments[0] if arguments and alone else ""
    near = difflib.get_close_matches(word, list(COMMANDS), 1, 0.75)
    return (word, near[0]) if near and word not in claude_commands(claude_help) else ("", "")


def check_typos(settings: Settings, arguments: Sequence[str]) -> None:
    """Raises AnyclaudeError for a near miss of an option or a command of ours."""
    if not near_miss(arguments, "")[0] and not any(argument.startswith("-") for argument in arguments):
        return
    known = ""
    with contextlib.suppress(AnyclaudeError):
        known = claude_help(find_claude(settings, os.environ))
    given, meant = near_miss(arguments, known)
    if given:
        name = "option" if given.startswith("-") else "command"
        fix = f"anyclaude {meant}" + (" ..." if name == "option" else "")
        raise AnyclaudeError(f"anyclaude has no {name} {given}.", f"{fix}\nor, for claude: anyclaude -- {given}")


def claude_for_command(arguments: Sequence[str]) -> Path | None:
    """Claude Code, if it is asked for a command of its own (mcp, update, ...), which talks to no model and has options of
    its own; None otherwise."""
    word = arguments[0] if arguments else ""
    if not re.fullmatch(r"[a-z][a-z-]*", word) or word in COMMANDS or word == "help":
        return None
    settings = Settings()
    with contextlib.suppress(AnyclaudeError):  # it needs none of them but where claude is
        settings = load_settings({}, os.environ, working_folder(), Path.home())[0]
    with contextlib.suppress(AnyclaudeError):
        claude = find_claude(settings, os.environ)
        return claude if word in claude_commands(claude_help(claude)) else None
    return None


def working_folder() -> Path:
    """The working directory. Raises AnyclaudeError if it was removed."""
    try:
        return Path.cwd()
    except OSError:
        raise AnyclaudeError("the folder that you are in does not exist any more.", "cd ~") from None


def exit_on_signals() -> None:
    """Let INT, TERM and HUP end the process as an exception does, so that all is stopped on the way out. The first decides."""
    numbers = [signal.SIGINT, signal.SIGTERM]  # a script's background jobs inherit INT ignored
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup

    def leave(number: int, frame: Any) -> None:
        for each in numbers:
            signal.signal(each, lambda *_: None)  # a second one would end the way out itself
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)


def as_called(fix: str) -> str:
    """A fix whose commands begin as this one was called: not everybody has `anyclaude` on the PATH."""
    program, called = sys.argv[0], "anyclaude"
    found = which(called, search_path(os.environ))
    if program.endswith(".py"):
        called = f"python3 {shlex.quote(program)}"
    elif os.path.isfile(program) and not (found and found.samefile(program)):
        called = shlex.quote(program)
    return re.sub(rf"(?m)(?<![\w./-])anyclaude(?=$| (?:--|again|{'|'.join(COMMANDS)}))", lambda _: called, fix)


def open_standard_streams() -> None:
    """Give the streams that the caller closed (`2>&-`) to /dev/null, before another file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.dup(number), "w" if number else "r"))
        if number and hasattr(getattr(sys, name), "reconfigure"):  # what it cannot print is written out
            getattr(sys, name).reconfigure(errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == [SUPERVISE]:
        return supervise()
    open_standard_streams()
    exit_on_signals()
    try:
        own, rest = split_arguments(arguments)
        if (
            rest[:1] in (["--help"], ["-h"], ["--version"]) or rest in (["help"], ["version"])
        ) and "--" not in arguments:
            print(f"anyclaude {__version__}" if rest[0].endswith("version") else USAGE.rstrip())
            return 0
        if not os.path.isabs(os.path.expanduser("~")):
            raise AnyclaudeError(
                "your home folder is not known: HOME is unset or relative.", "export HOME=/path/to/home"
            )
        if (claude := claude_for_command(arguments)) is not None:
            return run_claude(claude, arguments, os.environ)
        command = rest[0] if rest and rest[0] in COMMANDS and arguments[-len(rest) - 1 : -len(rest)] != ["--"] else ""
        if command in ("status", "stop", "logs", "stats"):  # these need no settings, and work with broken ones
            return COMMANDS[command][0](Settings(), command_options(command, rest[1:]))
        settings, warnings = load_settings(own, os.environ, working_folder(), Path.home(), begins=command == "init")
        for warning in warnings:
            say(f"warning: {warning}")
        if command:
            return COMMANDS[command][0](settings, command_options(command, rest[1:]))
        behind = len(arguments) - arguments.index("--") - 1 if "--" in arguments else 0
        check_typos(settings, rest[: len(rest) - behind])
        return run(settings, rest, os.environ)
    except BrokenPipeError:  # `| head` has seen enough
        return 0
    except Exception as error:  # noqa: BLE001  a person gets words, never a traceback
        problem = error if isinstance(error, AnyclaudeError) else unexpected(error)
        say(f"error: {problem.message}")
        say("fix: " + as_called(problem.fix).replace("\n", "\n     "))
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130


def entry() -> None:
    """The program: what a script, a wheel's command and an installed copy do."""
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.exit(code)
    os._exit(code)  # the reader of stdout is gone; not even the interpreter need say so


if __name__ == "__main__":
    entry()
