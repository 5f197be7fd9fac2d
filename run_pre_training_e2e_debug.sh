#!/usr/bin/env bash
# The whole pipeline on a laptop, offline, in minutes: a small model on the documentation that comes with Python.
# Only a variable differs from run_pre_training_e2e.sh.
export DEBUG_MODE=True
exec "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/run_pre_training_e2e.sh" "$@"
