#!/usr/bin/env bash
# Sets up what the tests need, then runs lint, types and all tests. With arguments only pytest runs, with these:
# ./run_tests.sh tests/test_model.py -k rope
set -euo pipefail
ROOT=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
cd "$ROOT"
# shellcheck source=src/utils/environment.sh
. "$ROOT/src/utils/environment.sh"
choose_python requirements-dev.txt
if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m ruff check .
    "$PYTHON" -m mypy
    # One worker more than there are cores, because many tests wait for time to pass. An idle worker takes over tests
    # from the others, so that a long file does not end last.
    workers=$("$PYTHON" -c 'from src import available_cores; print(min(available_cores(), 4) + 1)')
    set -- --numprocesses "$workers" --dist worksteal
fi
exec "$PYTHON" -m pytest "$@"
