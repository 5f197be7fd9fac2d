#!/usr/bin/env bash
# The whole pipeline on a laptop, offline, in minutes: a small model on the documentation Python brings.
# Everything is as in run_pre_training_e2e.sh; only variables differ.
export DEBUG_MODE=True
exec "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/run_pre_training_e2e.sh" "$@"
