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
#   MAX_RESTARTS=3        starts again a run that died (exit code 1, or killed), so many times; 0: never
#   NNODES=1 NODE_RANK=0 MASTER_ADDR MASTER_PORT=29500     for several machines that share this folder, on each of them
#   DATA_WAIT=21600       seconds that the other machines wait for node 0 to prepare the data
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
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3} DATA_WAIT=${DATA_WAIT:-21600}
number() { # NAME VALUE PATTERN-OF-MISTAKES WHAT-IT-IS
    # shellcheck disable=SC2254
    case "$2" in
        '' | *[!0-9]* | $3)
            echo "error: $1 is '$2'; it must be $4" >&2
            exit 2
            ;;
    esac
}
number NPROC "${NPROC:-1}" '0*' "a number of processes"
number NNODES "$NNODES" '0*' "a number of machines"
number NODE_RANK "$NODE_RANK" '0?*' "this machine's number, from 0 to NNODES - 1"
number MASTER_PORT "$MASTER_PORT" '0*' "the number of a free port on the machine of NODE_RANK=0"
number MAX_RESTARTS "$MAX_RESTARTS" '0?*' "how many times a run that died is started again"
number DATA_WAIT "$DATA_WAIT" '0?*' "a number of seconds"
if [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "error: NODE_RANK is '$NODE_RANK'; it must be this machine's number, from 0 to $((NNODES - 1)) with NNODES=$NNODES" >&2
    exit 2
fi
if [ "$NNODES" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "error: MASTER_ADDR is not set; with NNODES=$NNODES it must name the machine of NODE_RANK=0, on all of them" >&2
    exit 2
fi
case "$PRESET" in
    debug | laptop | lf_llm_269m) ;;
    *)
        echo "error: PRESET is '$PRESET'; use debug, laptop or lf_llm_269m" >&2
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

stage() { printf '\n== %s\n' "$*" >&2 || true; } # a console without room ends no run

module() { # for as_child: a module of ours; the folder it runs in must not hold another package named src
    cd "$ROOT" && exec "$PYTHON" -m "$@"
}

absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }

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
if [ "$prepare_data" = yes ] && [ "$NODE_RANK" = 0 ] && [ "$DATA_SOURCE" = files ] && [ -z "${DATA_PATH:-}" ]; then
    echo "error: DATA_PATH is not set; it names your text: a file, folder or pattern, or several, one a line" >&2
    exit 2
fi
# A misspelt setting or a full disk should not be found after hours of preparing data.
(
    export WORLD_SIZE=$((NPROC * NNODES)) NPROC DATA_SOURCE DATA_PATH DATA_MAX_TOKENS STARTED_IN="$PWD"
    export PREPARES_DATA=$prepare_data
    [ "$NODE_RANK" = 0 ] || DATA_SOURCE="node 0" # this machine waits for it
    [ "$prepare_data" = no ] || set -- --data.dir "$DATA_DIR" "$@"
    module src.preflight "$PRESET" --run-name "$RUN_NAME" "$@" >/dev/null
)

if [ "$prepare_data" = yes ] && [ "$NODE_RANK" != 0 ]; then
    stage "2/5 data: $DATA_DIR, as node 0 prepares it"
    case "$DATA_DIR" in
        */*) folder=$DATA_DIR ;;
        *) folder="${TEMP_DATA_DIR:-$ROOT/temp_data}/datasets/$DATA_DIR" ;;
    esac
    [ -e "$folder/manifest.json" ] || echo "waiting for $folder/manifest.json, at most $DATA_WAIT s" >&2
    until [ -e "$folder/manifest.json" ]; do
        if [ "$SECONDS" -ge "$DATA_WAIT" ]; then
            echo "error: no $folder/manifest.json after $DATA_WAIT s; see what node 0 says, whether this machine sees the" \
                "same folder, or set DATA_WAIT to more seconds; then start the same command again" >&2
            exit 2
        fi
        sleep 1
    done
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
    as_child module src.data_processing.data_downloader "${preparation[@]}" || exit
    set -- --data.dir "$DATA_DIR" "$@"
else
    stage "2/5 data: the dataset that --data.dir names, as it is"
fi

stage "3/5 train: preset $PRESET, run $RUN_NAME, $NPROC process(es) on $NNODES machine(s)"
training=("$ROOT/pretrain.py" "$PRESET" --run-name "$RUN_NAME" "$@")
before=$(cat "$RUN_DIR/status.json" 2>/dev/null || true)
code=0
if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ] && [ "$MAX_RESTARTS" = 0 ]; then
    as_child "$PYTHON" "${training[@]}" || code=$?
else
    machines=()
    [ "$NNODES" = 1 ] ||
        machines=(--machines "$NNODES" --machine "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    as_child module src.utils.launch --folder "$PWD" --processes "$NPROC" --max-restarts "$MAX_RESTARTS" \
        ${machines[@]+"${machines[@]}"} "${training[@]}" || code=$?
fi
[ "$NODE_RANK" = 0 ] || exit "$code"

if [ "$code" = 0 ] && [ "$(cat "$RUN_DIR/status.json")" = "$before" ] && [ -e "$RUN_DIR/report.html" ]; then
    echo "the run is complete; its report is $RUN_DIR/report.html" >&2 || true
    exit 0
fi
if [ "$code" = 0 ]; then
    stage "4/5 a text from the saved model"
    text=$(mktemp)
    as_child module src.model_assessment.sampling --checkpoint "$RUN_DIR" --prompt "The" --max-new-tokens 60 \
        --temperature 0.8 --top-k 50 >"$text" || exit
    sed '$d' "$text" # the last line is JSON for programs
    rm -f "$text"
else
    stage "4/5 a text from the saved model: left out, because training ended with exit code $code"
fi

if [ -s "$RUN_DIR/metrics.jsonl" ]; then
    stage "5/5 report"
    as_child module src.model_assessment.report "$RUN_DIR" || exit
fi
exit "$code"
