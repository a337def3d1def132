#!/bin/sh
# Installs anyclaude as ~/.local/bin/anyclaude, or removes it. Beside anyclaude.py (a checkout) it takes that; piped
# into a shell it downloads the one it was made for. All is in functions, so that half a download of it runs nothing.
# shellcheck disable=SC2030,SC2031 # the PATH of theirs() is meant to be another
set -u

version=0.1.0
sha256=bf15b1e2a6f4a34e8eb685781bdf12e3ad032196c8a7b6ccde9f9f7e18c175ba
default_url=https://raw.githubusercontent.com/anyclaude/anyclaude/main/anyclaude.py
patience=30 # seconds in which nothing comes, until a download is given up

usage() {
    cat <<END
anyclaude $version: Claude Code on your own model

  curl -fsSL ${default_url%/*}/install.sh | sh
  curl -fsSL ${default_url%/*}/install.sh | sh -s -- --uninstall
  sh install.sh           in a checkout: installs the anyclaude.py beside it

  --uninstall             remove it; asks before it removes ~/.anyclaude
  --help, --version

  PREFIX=/full/path       install into /full/path/bin (without: ~/.local/bin)
  ANYCLAUDE_URL=URL       download anyclaude.py from there, a mirror
END
}

say() { printf 'anyclaude: %s\n' "$*" >&2; }

# err WHAT FIX: what happened and why; what to type.
err() {
    say "error: $1"
    say "fix: $2"
    exit 1
}

# ensure WHAT FIX COMMAND...: run it, with its output in said; if it fails, its last line is the reason.
ensure() {
    what=$1 fix=$2
    shift 2
    said=$("$@" 2>&1) || err "$what ($(printf '%s\n' "$said" | tail -n 1))." "$fix"
}

# A path as it can be pasted.
quoted() {
    case $1 in
    *[!A-Za-z0-9_./-]*) printf '%s\n' "$1" | sed "s/'/'\\\\''/g; s/^/'/; s/\$/'/" ;;
    *) printf '%s' "$1" ;;
    esac
}

# Where a program is on the PATH of the person, to which main adds.
theirs() (PATH=$their_path && command -v "$1")

is_anyclaude() { head -n 3 "$1" 2>/dev/null | grep -q "Claude Code on your own model"; }

# Sets folder and target: where it is, or will be.
find_place() {
    case ${PREFIX:=${HOME:+$HOME/.local}} in
    /*) ;;
    "") err "HOME is not set, so your home folder is not known." "export HOME=/path/to/home" ;;
    *) err "not a full path: $PREFIX." "export PREFIX=$(quoted "$(pwd)/$PREFIX")" ;;
    esac
    folder=${PREFIX%/}/bin
    target=$folder/anyclaude
    elsewhere="choose another place, export PREFIX=/full/path, and run this again"
    [ ! -d "$target" ] || err "$target is a folder." "rename it, or $elsewhere"
    [ ! -e "$target" ] || is_anyclaude "$target" ||
        err "$target is something else, not this anyclaude, and was left as it is." "rename it, or $elsewhere"
}

# Sets python: a Python that can run anyclaude.
find_python() {
    too_old=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python; do
        for python in "$(theirs "$name")" "/opt/homebrew/bin/$name" "/usr/local/bin/$name" "/usr/bin/$name"; do
            case $python in /*) ;; *) continue ;; esac
            # Without the command line tools, macOS has a stub in its place, which opens a dialog.
            [ "$system:$python" != Darwin:/usr/bin/python3 ] || xcode-select -p >/dev/null 2>&1 || continue
            found=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
            case $found in
            [012].* | 3.[0-8].* | "") too_old=${too_old:-", only $found: $python"} ;;
            *) return ;;
            esac
        done
    done
    fix="install Python from https://www.python.org/downloads/, and run this again"
    [ -n "$too_old" ] || ! command -v apt >/dev/null || fix="sudo apt install python3"
    [ "$system" != Darwin ] || fix="xcode-select --install   (or: brew install python)"
    err "anyclaude needs Python 3.9 or newer, and none was found$too_old." "$fix"
}

fetch() {
    if command -v curl >/dev/null; then
        curl -fsSL --proto "=https${ANYCLAUDE_URL:+,http}" --connect-timeout "$patience" \
            --speed-limit 1 --speed-time "$patience" -o "$2" "$1"
    elif wget --version >/dev/null; then # busybox has another, which checks no certificates and crashes on -T
        wget -nv -t 1 -T "$patience" -O "$2" "$1"
    else
        "$python" -I -c 'import sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[3])) as reply, open(sys.argv[2], "wb") as file:
    file.write(reply.read())' "$1" "$2" "$patience"
    fi
}

# Puts the anyclaude.py of this version into a file.
download() {
    source=${ANYCLAUDE_URL:-$default_url}
    say "downloading $source"
    ensure "could not download $source" "run this again, or name a mirror: export ANYCLAUDE_URL=https://..." \
        fetch "$source" "$1"
    sum='import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())'
    [ "$("$python" -I -c "$sum" "$1")" = "$sha256" ] ||
        err "$source is not the file that this install.sh belongs to: it came broken, or is of another version." \
            "fetch install.sh again, and run that"
}

# The program in the temporary file becomes what Python runs without compiling it at each start, which would cost 0.1 s and,
# for as long as it runs, 20 MB: a zip of it and of what it compiles to. Another Python than this takes the program itself.
pack() {
    ensure "could not make a program of $1" "get another anyclaude.py, or free some space: df -h $(quoted "$folder")" \
        "$python" -I -c '
import marshal, os, sys, zipfile
from importlib.util import MAGIC_NUMBER, source_hash
file, interpreter = sys.argv[1:]
with open(file, "rb") as source:
    program = source.read()
code = marshal.dumps(compile(program, "anyclaude.py", "exec", dont_inherit=True))
compiled = MAGIC_NUMBER + b"\1\0\0\0" + source_hash(program) + code  # 1: not compared with the source
parts = {"anyclaude.py": program, "anyclaude.pyc": compiled, "__main__.py": "import anyclaude\n\nanyclaude.entry()\n"}
with open(file, "wb") as out:
    out.write(b"#!" + os.fsencode(interpreter) + b"\n# anyclaude: Claude Code on your own model\n")
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # with no time in it: a clock may stand before 1980' \
        "$temporary" "$interpreter"
}

# In a subshell, as ensure runs it.
new_file() { set -C && umask 077 && : >"$1"; }

# However it ends: no temporary file is left, and no folder that was made in vain.
clean_up() {
    rm -f "$temporary" 2>/dev/null
    while [ "$folder" != "$there" ] && rmdir "$folder" 2>/dev/null; do folder=${folder%/*}; done
}

install() {
    find_place
    find_python
    temporary=$folder/.anyclaude.$$ there=$folder
    until [ -d "$there/" ]; do there=${there%/*}; done
    trap clean_up EXIT
    trap 'exit 1' HUP INT TERM
    ensure "cannot make the folder $folder" "$elsewhere" mkdir -p "$folder"
    ensure "cannot write to $folder" "$elsewhere" new_file "$temporary"
    source=${0%install.sh}anyclaude.py # piped, $0 is the shell's name, and what lies in this folder is not meant
    if [ "${0##*/}" = install.sh ] && [ -f "$source" ] && [ -z "${ANYCLAUDE_URL-}" ]; then
        ensure "cannot copy $source" "$elsewhere" cp "$source" "$temporary"
    else
        download "$temporary"
    fi
    interpreter=$python # where python3 is another, or none
    [ "$python" != "$(theirs python3)" ] || interpreter="/usr/bin/env python3"
    pack "$source"
    ensure "$source does not run with $python" "get another anyclaude.py" "$python" -I "$temporary" --version
    installed=$said
    ensure "cannot write to $folder" "$elsewhere" chmod 755 "$temporary"
    ensure "cannot write to $folder" "$elsewhere" mv -f "$temporary" "$target"
    say "installed $installed: $target"
    say_how_to_run
}

say_how_to_run() {
    run=$(quoted "$target")
    case :$their_path: in
    *":$folder:"* | *":$folder/:"*) ;;
    *)
        shown=$folder
        case $folder in "${HOME:-/dev/null}"/*) shown="\$HOME${folder#"$HOME"}" ;; esac
        line="export PATH=\"$shown:\$PATH\""
        case ${SHELL-}:$system in
        *fish:*) line="fish_add_path \"$shown\"" ;;
        *zsh:*) line="echo $(quoted "$line") >> ~/.zshrc" ;;
        *bash:Darwin) line="echo $(quoted "$line") >> ~/.bash_profile" ;;
        *bash:*) line="echo $(quoted "$line") >> ~/.bashrc" ;;
        *) line="echo $(quoted "$line") >> ~/.profile" ;;
        esac
        say "to call it anyclaude, add its folder to your PATH; this does, for terminals opened afterwards:"
        printf '\n    %s\n\n' "$line" >&2
        ;;
    esac
    first=$(theirs anyclaude)
    case $first in
    "$target" | "$folder//anyclaude") run=anyclaude ;;
    ?*) say "warning: another anyclaude comes first on your PATH: $first" ;;
    esac
    say "Try it: $run --demo"
    say "Then: $run"
}

uninstall() {
    find_place
    state=${HOME:-/nowhere}/.anyclaude
    if [ ! -e "$target" ] && [ ! -L "$target" ]; then
        say "not installed: there is no $target"
    else
        stop_engines
        ensure "cannot remove $target" "look whose it is: ls -ld $(quoted "$folder")" rm -f "$target"
        say "removed $target"
    fi
    [ ! -d "$state" ] || offer_to_remove "$state"
    [ ! -e "${state}rc.json" ] || say "left: ${state}rc.json, your settings"
}

stop_engines() {
    [ ! -d "$state" ] || said=$("$target" stop 2>&1) || case $said in
    *"[anyclaude] error: "*) # its own words; what the shell says of a Python that is gone is no reason to keep it
        printf '%s\n' "$said" >&2
        err "an engine could not be stopped, so nothing was removed." "do as it says above, and run this again"
        ;;
    esac
}

offer_to_remove() {
    answer=""
    if (: </dev/tty) 2>/dev/null; then # stdin may be the pipe that this came through
        size=$(du -sh "$1" 2>/dev/null | sed 's/[[:space:]].*//')
        printf 'anyclaude: remove %s too (logs, what it built%s)? [y/N] ' "$1" "${size:+: $size}" >/dev/tty
        read -r answer </dev/tty || echo >/dev/tty
    fi
    case $answer in
    [yY] | [yY][eE][sS])
        ensure "cannot remove $1" "look whose it is: ls -ld $(quoted "$1")" rm -rf "$1"
        say "removed $1"
        ;;
    *) say "left: $1. To remove it: rm -rf $(quoted "$1")" ;;
    esac
}

main() {
    their_path=$PATH
    PATH=$PATH:/usr/bin:/bin # for cp and the like, wherever it is run from
    system=$(uname -s)
    case $* in
    "") install ;;
    --uninstall) uninstall ;;
    --help | -h) usage ;;
    --version) echo "anyclaude $version" ;;
    *) err "there is no option $*." "sh install.sh --help" ;;
    esac
}

main "$@" || exit 1
