#!/usr/bin/env bash
# The whole pipeline: environment -> data -> train (with validation, HellaSwag, samples and
# checkpoints) -> a sample from the saved model -> report. Start it again to go on where it stopped.
#
#   ./run_pre_training_e2e.sh [overrides for pretrain.py, such as --train.micro-batch-size 8]
#
# Variables, with their defaults:
#   PRESET=lf_llm_269m    debug, laptop or lf_llm_269m; DEBUG_MODE=True means PRESET=debug
#   RUN_NAME=$PRESET      folder of the run under temp_data/runs
#   DATA_SOURCE           pydocs, files or fineweb-edu; files where DATA_PATH is set, else by preset
#   DATA_PATH             for files: a file, folder or glob, or several, one a line
#   DATA_MAX_TOKENS       no more data than this many tokens, in a dataset folder of its own; all
#   DATA_DIR              name or path of the dataset folder; by source
#   NPROC                 processes on this machine; the number of its GPUs for lf_llm_269m, else 1
#   NNODES=1 NODE_RANK=0 MASTER_ADDR MASTER_PORT=29500     for several machines, after node 0 has prepared the data
#   PYTHON                the interpreter to start from
#   TEMP_DATA_DIR         where datasets and runs go instead of temp_data/
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        echo "For the overrides: python pretrain.py PRESET --help"
        exit 0
        ;;
esac
case "${DEBUG_MODE:-}" in
    [Tt]rue | TRUE | 1) PRESET=debug ;;
    [Ff]alse | FALSE | 0 | '') PRESET=${PRESET:-lf_llm_269m} ;;
    *)
        echo "error: DEBUG_MODE is '$DEBUG_MODE'; use True or False" >&2
        exit 2
        ;;
esac
case "${NPROC:-1}" in
    *[!0-9]* | 0*)
        echo "error: NPROC is '$NPROC'; it must be a number of processes" >&2
        exit 2
        ;;
esac
[ -z "${DATA_PATH:-}" ] || DATA_SOURCE=${DATA_SOURCE:-files}
case "${DATA_MAX_TOKENS:-1}" in
    *[!0-9_]* | 0*)
        echo "error: DATA_MAX_TOKENS is '$DATA_MAX_TOKENS'; it must be a number of tokens, such as 10_000_000" >&2
        exit 2
        ;;
esac
case "$PRESET" in
    debug) DATA_SOURCE=${DATA_SOURCE:-pydocs} ;;
    laptop) DATA_SOURCE=${DATA_SOURCE:-files} ;;
    *) DATA_SOURCE=${DATA_SOURCE:-fineweb-edu} ;;
esac
case "$DATA_SOURCE" in
    pydocs) data_name=pydocs ;;
    files) data_name=my_text ;;
    fineweb-edu) data_name=fineweb-edu-sample-10BT ;;
    *)
        echo "error: DATA_SOURCE is '$DATA_SOURCE'; use pydocs, files or fineweb-edu" >&2
        exit 2
        ;;
esac
[ -z "${DATA_MAX_TOKENS:-}" ] || data_name=$data_name-max-${DATA_MAX_TOKENS//_/}-tokens
DATA_DIR=${DATA_DIR:-$data_name}
RUN_NAME=${RUN_NAME:-$PRESET}

# Overrides win over the variables, and the stages around training must know them.
prepare_data=yes
previous=
for argument in "$@"; do
    case "$previous" in --run-name | --run_name) RUN_NAME=$argument ;; esac
    case "$argument" in
        --run-name=* | --run_name=*) RUN_NAME=${argument#*=} ;;
        --data.dir | --data.dir=*) prepare_data=no ;;
    esac
    previous=$argument
done
RUN_DIR="${TEMP_DATA_DIR:-$ROOT/temp_data}/runs/$RUN_NAME"
case "$RUN_DIR" in /*) ;; *) RUN_DIR="$PWD/$RUN_DIR" ;; esac

stage() { printf '\n== %s\n' "$*" >&2; }

module() { # a module of ours; the folder it runs in must not hold another package named src
    (cd "$ROOT" && "$PYTHON" -m "$@")
}

absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }

CORES=$(getconf _NPROCESSORS_ONLN)

stage "1/5 environment"
# shellcheck source=src/utils/environment.sh
. "$ROOT/src/utils/environment.sh"
choose_python requirements.txt
if [ -n "${TEMP_DATA_DIR:-}" ]; then
    TEMP_DATA_DIR=$(absolute "$TEMP_DATA_DIR")
    export TEMP_DATA_DIR
fi

if [ -z "${NPROC:-}" ]; then
    NPROC=1
    # debug and laptop have batches too small to share between many GPUs
    if [ "$PRESET" != debug ] && [ "$PRESET" != laptop ] && command -v nvidia-smi >/dev/null; then
        NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
fi
NNODES=${NNODES:-1}
# A misspelt setting or a full disk should not be found after hours of preparing data.
(
    export WORLD_SIZE=$((NPROC * NNODES)) NPROC DATA_SOURCE DATA_PATH DATA_MAX_TOKENS STARTED_IN="$PWD" PREPARES_DATA=no
    if [ "$prepare_data" = yes ]; then
        set -- --data.dir "$DATA_DIR" "$@"
        [ "${NODE_RANK:-0}" != 0 ] || PREPARES_DATA=yes
    fi
    module src.preflight "$PRESET" --run-name "$RUN_NAME" "$@" >/dev/null
)

if [ "$prepare_data" = yes ] && [ "${NODE_RANK:-0}" != 0 ]; then
    stage "2/5 data: $DATA_DIR, as node 0 prepared it"
    set -- --data.dir "$DATA_DIR" "$@"
elif [ "$prepare_data" = yes ]; then
    stage "2/5 data: $DATA_SOURCE -> $DATA_DIR"
    case "$DATA_DIR" in */*) DATA_DIR=$(absolute "$DATA_DIR") ;; esac
    paths=()
    while IFS= read -r path; do
        [ -z "$path" ] || paths+=("$(absolute "$path")")
    done <<<"${DATA_PATH:-}"
    preparation=(--source "$DATA_SOURCE" --out "$DATA_DIR")
    [ ${#paths[@]} -eq 0 ] || preparation+=(--path "${paths[@]}")
    [ -z "${DATA_MAX_TOKENS:-}" ] || preparation+=(--max-tokens "$DATA_MAX_TOKENS")
    module src.data_processing.data_downloader "${preparation[@]}"
    set -- --data.dir "$DATA_DIR" "$@"
else
    stage "2/5 data: the dataset that --data.dir names, as it is"
fi

# Processes that share a machine share its cores; torchrun would give each of them one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > NPROC ? CORES / NPROC : 1))}

stage "3/5 train: preset $PRESET, run $RUN_NAME, $NPROC process(es) on $NNODES machine(s)"
if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ]; then
    command=("$PYTHON" "$ROOT/pretrain.py" "$PRESET" --run-name "$RUN_NAME" "$@")
else
    if [ "$NNODES" = 1 ]; then
        rendezvous=(--standalone) # a free port of its own, so that two runs don't meet
    else
        rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:?names the machine of NODE_RANK=0}" --master-port "${MASTER_PORT:-29500}")
    fi
    command=("$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC"
        "$ROOT/pretrain.py" "$PRESET" --run-name "$RUN_NAME" "$@")
    # A stopped run finishes its step, or an evaluation, and saves; torchrun would kill it after 30 seconds.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
fi
# torchrun answers every failure with 1; the processes leave their own exit code here.
EXIT_CODE_FILE=$(mktemp)
export EXIT_CODE_FILE
code=0
"${command[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # the signal ended the wait, not the training
    code=0
    wait "$child" || code=$?
done
trap - TERM INT
[ ! -s "$EXIT_CODE_FILE" ] || code=$(cat "$EXIT_CODE_FILE")
rm -f "$EXIT_CODE_FILE"
[ "${NODE_RANK:-0}" = 0 ] || exit "$code"

if [ "$code" = 0 ]; then
    stage "4/5 a text from the saved model"
    module src.model_assessment.sampling --checkpoint "$RUN_DIR" --prompt "The" --max-new-tokens 60 --temperature 0.8 --top-k 50 |
        sed '$d' # the last line is JSON for programs
else
    stage "4/5 a text from the saved model: left out, because training ended with exit code $code"
fi

if [ -s "$RUN_DIR/metrics.jsonl" ]; then
    stage "5/5 report"
    module src.model_assessment.report "$RUN_DIR"
fi
exit "$code"
