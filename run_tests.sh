#!/usr/bin/env bash
# Sets up what the tests need, then runs lint, types and all tests. Arguments go to pytest, which then
# runs alone: ./run_tests.sh tests/test_model.py -k rope
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$ROOT"
# shellcheck source=src/utils/environment.sh
. "$ROOT/src/utils/environment.sh"
choose_python requirements-dev.txt
if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m ruff check .
    "$PYTHON" -m mypy
    # Files side by side, one more than there are cores, since many tests wait for time to pass.
    workers=$("$PYTHON" -c 'from src import available_cores; print(min(available_cores(), 4) + 1)')
    set -- --numprocesses "$workers" --dist loadfile
fi
exec "$PYTHON" -m pytest "$@"
