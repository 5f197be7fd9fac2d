# shellcheck shell=bash
# Sourced by the launchers with ROOT set. choose_python FILE sets PYTHON to an interpreter that has the packages pinned
# in FILE: the active environment's if it has them, else that of .venv, which is created if necessary.
say() { printf '%s\n' "$*" >&2 || true; } # a closed console does not end a run
unset PYTHONSAFEPATH # python -m finds our modules in the folder it runs in

_first_python() {
    local candidate candidates=(python python3 python3.13 python3.12 python3.11 python3.10)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "error: Cannot find Python 3.10 to 3.13${PYTHON:+: PYTHON is '$PYTHON'}. Install one, or set PYTHON to its path."
    return 2
}

_missing() { # INTERPRETER FILE: prints the pins of FILE that the interpreter lacks, and fails if there are any
    "$1" - "$ROOT/$2" <<'END'
import os, sys
from importlib.metadata import distributions

def pins(file):
    for line in open(file, encoding="utf-8"):
        pin, _, marker = line.split("#")[0].strip().partition(";")
        if pin.startswith("-r "):
            yield from pins(os.path.join(os.path.dirname(file), pin[3:].strip()))
        elif pin and (not marker or eval(marker, {"python_version": "3.%d" % sys.version_info[1]})):
            yield pin

# Without build tags such as +cpu.
installed = {f"{d.name}=={d.version.split('+')[0]}".lower().replace("_", "-") for d in distributions()}
missing = [pin for pin in pins(sys.argv[1]) if pin.lower().replace("_", "-") not in installed]
print(*missing)
sys.exit(bool(missing))
END
}

choose_python() {
    local requirements=$1 base missing venv="$ROOT/.venv"
    base=$(_first_python) || exit 2
    if missing=$(_missing "$base" "$requirements"); then
        PYTHON=$base
        [ -n "${QUIET:-}" ] || say "environment: the active Python has the packages of $requirements ($PYTHON)"
        return
    fi
    PYTHON=$venv/bin/python
    if command -v flock >/dev/null; then # several machines may share this folder
        exec 9>"$ROOT/.venv.lock"
        flock --nonblock 9 || { say "environment: waiting for another launcher that creates .venv" && flock 9; }
    fi
    if [ -x "$PYTHON" ] && missing=$(_missing "$PYTHON" "$requirements"); then
        [ -n "${QUIET:-}" ] || say "environment: .venv has the packages of $requirements"
    else
        say "environment: installing $requirements into .venv, which takes minutes; missing: $missing"
        _install "$base cannot make $venv. On Debian and Ubuntu, install python3-venv." "$base" -m venv "$venv"
        _install "pip cannot install $requirements: its message is above. Fix that and rerun the same command." \
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$requirements"
    fi
    exec 9>&-
}

_install() { # MESSAGE COMMAND...
    "${@:2}" >&2 9>&- && return
    say "error: $1"
    exit 2
}
