#!/bin/sh
# Install anyclaude from a checkout: copy the one file to ~/.local/bin/anyclaude.
set -eu

say() { printf 'anyclaude: %s\n' "$*" >&2; }
err() { say "$*"; exit 1; }

main() {
    here=$(cd "$(dirname "$0")" && pwd) || err "cannot find the folder of this script"
    source="$here/anyclaude.py"
    target="${HOME:?set HOME first}/.local/bin/anyclaude"
    [ -f "$source" ] || err "$source is not there: run this from a checkout, as sh install.sh"
    command -v python3 >/dev/null || err "python3 was not found: install Python 3.9 or newer, then run this again"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' || err "python3 is too old: anyclaude needs Python 3.9 or newer"
    mkdir -p "${target%/*}" || err "cannot make ${target%/*}"
    temporary="$target.$$"
    trap 'rm -f "$temporary"' EXIT
    cp "$source" "$temporary" || err "cannot write to ${target%/*}"
    chmod 755 "$temporary"
    mv -f "$temporary" "$target"
    say "installed $target"
    case ":$PATH:" in
        *":${target%/*}:"*) say "run: anyclaude --demo" ;;
        *) say "add ${target%/*} to your PATH, or run: $target --demo" ;;
    esac
}

main "$@"
