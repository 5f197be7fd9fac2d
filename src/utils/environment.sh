# Sourced by the launchers with ROOT set: choose_python FILE sets PYTHON to an interpreter that has
# the packages FILE pins: the active environment's if it has them, else that of .venv, made if need be.
# shellcheck source=src/utils/as_child.sh
. "$ROOT/src/utils/as_child.sh"

_python_version_ok() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

_satisfies() {
    "$1" "$ROOT/src/utils/check_environment.py" "$ROOT/$2"
}

_find_python() { # the first interpreter of a version we support
    local candidate
    if [ -n "${PYTHON:-}" ] && ! _python_version_ok "$PYTHON"; then
        echo "error: PYTHON is '$PYTHON', which is no Python 3.10 to 3.13; give the path of one, or unset it" >&2
        return 2
    fi
    for candidate in "${PYTHON:-}" python python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && _python_version_ok "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 found; install one, or set PYTHON to its path" >&2
    return 2
}

choose_python() {
    local requirements=$1 base missing venv_python="$ROOT/.venv/bin/python"
    base=$(_find_python) || exit 2
    if missing=$(_satisfies "$base" "$requirements"); then
        PYTHON=$base
        echo "environment: the active Python has what $requirements asks for ($PYTHON)" >&2
        return
    fi
    if command -v flock >/dev/null; then # one at a time, where several machines share the folder
        exec 9>"$ROOT/.venv.lock"
        flock --nonblock 9 || echo "environment: waiting for another launcher that makes .venv" >&2
        as_child flock 9 || exit
    fi
    if [ -x "$venv_python" ] && missing=$(_satisfies "$venv_python" "$requirements"); then
        PYTHON=$venv_python
        echo "environment: .venv has what $requirements asks for" >&2
        exec 9>&-
        return
    fi
    echo "environment: installing $requirements into .venv (missing: $missing); this takes a minute or more" >&2
    local code=0
    as_child "$base" -m venv "$ROOT/.venv" >&2 || code=$?
    [ "$code" != "$STOPPED" ] || exit "$code"
    if [ "$code" != 0 ]; then
        echo "error: $base cannot make a virtual environment in $ROOT/.venv; on Debian and Ubuntu, install python3-venv" >&2
        exit 2
    fi
    as_child "$venv_python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$requirements" >&2 || code=$?
    [ "$code" != "$STOPPED" ] || exit "$code"
    if [ "$code" != 0 ]; then
        echo "error: pip could not install $requirements; see its message above, then start the same command again" >&2
        exit 2
    fi
    exec 9>&-
    PYTHON=$venv_python
}
