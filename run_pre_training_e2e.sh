#!/usr/bin/env bash
# The whole pipeline: environment -> preflight -> data -> training (with validation, HellaSwag, samples and checkpoints)
# -> a sample from the saved model -> report. Run it again to resume.
#
#   ./run_pre_training_e2e.sh [PRESET [TEXT ...]] [overrides for pretrain.py, such as --train.seed 7] [--dry-run]
#   ./run_pre_training_e2e.sh laptop book.txt more_texts/
#
# --dry-run only checks whether the start can work. Variables, with their defaults; PRESET and DATA_PATH may also be
# given as the first arguments, as shown above:
#   PRESET=lf_llm_269m    a preset; python pretrain.py --help lists them. DEBUG_MODE=True means PRESET=debug
#   RUN_NAME              folder of the run under temp_data/runs; default: the preset's name, followed by the dataset's
#                         for your own text
#   DATA_SOURCE           source of text; data_downloader --help lists them. Default: files if DATA_PATH is set, hub if
#                         DATA_DATASET is set, else the preset's
#   DATA_PATH             for files: a file, folder or glob, or several with colons between them
#   DATA_DATASET          for hub: OWNER/NAME; also DATA_CONFIG and DATA_SPLIT if the dataset has several
#   DATA_TEXT_FIELD=text  for files and hub: the field or column that holds the text
#   DATA_MAX_TOKENS       at most this many tokens of data, in a dataset folder for that size; default: all
#   DATA_DIR              name or path of the dataset folder; default: named after the source, with a number if a
#                         dataset of that name holds different text
#   NPROC                 processes on this machine; default: one or one per GPU, depending on the preset
#   MAX_RESTARTS=3        restarts of a run that died of an unexpected error or was killed; 0: none
#   NNODES=1 NODE_RANK=0 MASTER_ADDR MASTER_PORT=29500     for several machines; set on each. They share this folder.
#                         Each restart uses the next port
#   DATA_WAIT=21600       seconds that the other machines wait for node 0 to prepare the data
#   PYTHON                the interpreter to start from
#   TEMP_DATA_DIR         folder of datasets and runs, instead of temp_data/
set -euo pipefail
SCRIPT=$(readlink -f "${BASH_SOURCE[0]}")
ROOT=$(dirname "$SCRIPT")
export STARTED_IN="$PWD" # relative paths start here
RESUME=                  # set with the other settings

for argument in "$@"; do
    case "$argument" in -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$SCRIPT"
        echo "For the overrides: python pretrain.py PRESET --help"
        exit 0
        ;;
    esac
done

# Otherwise a file opened later would take the number of a closed stream.
[ -e /dev/fd/0 ] || exec </dev/null
[ -e /dev/fd/1 ] || exec >/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null
# shellcheck source=src/utils/environment.sh
. "$ROOT/src/utils/environment.sh"

stage() { say "" && say "== $*"; }
module() { cd "$ROOT" && exec "$PYTHON" -m "$@"; } # any other folder might hold a package named src

# Runs a command and passes it a signal to this shell, once and as SIGTERM, because bash makes background commands
# ignore Ctrl-C. Returns the command's exit code, or 143 if the signal ended it. `stopped` is the second when a signal
# arrived. A later Ctrl-C ends the command without saving, with code 130.
child() {
    local code=0 pid= quit=
    stopped=
    trap '[ -n "$stopped" ] || kill -TERM $pid || true; stopped=${stopped:-$SECONDS}' TERM USR1 HUP
    trap 'if [ -z "$stopped" ]; then kill -TERM $pid || true; stopped=$SECONDS
          elif [ "$SECONDS" -gt "$stopped" ]; then quit=yes; kill -USR2 $pid || true; fi' INT
    "$@" 2>&3 3>&- &
    pid=$!
    [ -z "$stopped" ] || kill -TERM "$pid" || true # the signal came before the process existed
    wait "$pid" || code=$?
    while kill -0 "$pid"; do # the signal ended the wait, not the command
        code=0
        wait "$pid" || code=$?
    done
    trap 'code=143 && end' TERM INT USR1 HUP
    [ -z "$stopped" ] || [ "$code" -le 5 ] || code=143
    [ -z "$quit" ] || code=130
    return "$code"
} 3>&2 2>/dev/null # hides bash's own messages about killed processes
trap 'code=143 && end' TERM INT USR1 HUP # between commands

# Exits with $code; after a stop the last line is the command that resumes.
end() {
    case "$code" in 130 | 143) [ -z "$RESUME" ] || { say "" && say "to resume: $RESUME"; } ;; esac
    exit "$code"
}

# shellcheck disable=SC2329 # called by child
train() {
    if [ "$NPROC$NNODES" = 11 ]; then
        exec "$PYTHON" "$ROOT/pretrain.py" "$@"
    elif [ "$NNODES" = 1 ]; then # by number: a machine's own name may not resolve
        set -- --standalone --local-addr 127.0.0.1 "$ROOT/pretrain.py" "$@"
    else # a new port at each restart, so that no machine joins a group that the others are leaving
        set -- --nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-conf "timeout=$MEETING_SECONDS" \
            --master-addr "$MASTER_ADDR" --master-port $((MASTER_PORT + restarts)) "$ROOT/pretrain.py" "$@"
    fi
    module src.utils.torchrun --nproc-per-node "$NPROC" "$@"
}

stage "1/5 environment"
# Reports a missing preset or text before packages are installed, which takes minutes.
python=$(_first_python) || exit 2
(PYTHON=$python && module src.launcher_settings --early "$@") || exit
choose_python requirements.txt
settings=$(module src.launcher_settings "$@") || exit
preparation=()
eval "$settings" # the variables above; the arguments of pretrain.py as "$@"; also DATASET, `preparation` and others
export TEMP_DATA_DIR LAUNCH_ID OMP_NUM_THREADS LAUNCHER_PID=$$
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT # seconds in which stopped processes save
# A misspelt setting or a full disk should be found before hours of preparing data.
export DATA DATA_SOURCE DATA_PATH DATA_DATASET DATA_CONFIG DATA_SPLIT DATA_TEXT_FIELD DATA_MAX_TOKENS NPROC
code=0
summary=$(WORLD_SIZE=$((NPROC * NNODES)) module src.preflight "$@") || code=$?
if [ -n "$DRY_RUN" ] && [ ! -t 1 ]; then
    printf '%s\n' "$summary" || true # stdout may be closed
elif [ "$DRY_RUN$code" = yes0 ]; then
    say "" && say "all checks passed: training can start"
fi
[ "$code$DRY_RUN" = 0 ] || exit "$code"

case "$DATA" in
    prepare)
        stage "2/5 data: $DATA_SOURCE -> $DATASET"
        child module src.data_processing.data_downloader "${preparation[@]}" || { code=$? && end; }
        ;;
    wait)
        stage "2/5 data: waiting at most $DATA_WAIT s for $DATASET, which node 0 prepares"
        until [ -e "$DATASET/manifest.json" ]; do
            if [ "$SECONDS" -ge "$DATA_WAIT" ]; then
                say "error: Cannot find $DATASET/manifest.json after $DATA_WAIT s. See node 0's messages, or raise DATA_WAIT."
                exit 2
            fi
            sleep 1
        done
        ;;
    ready) stage "2/5 data: $DATASET, ready" ;;
esac

stage "3/5 training: preset $PRESET, run $RUN_NAME, $NPROC process(es) on $NNODES machine(s)"
restarts=0
while :; do
    code=0
    child train "$@" || code=$?
    case "$code" in 0 | 2 | 3 | 4 | 5 | 130 | 143) break ;; esac # a restart would end the same way, or is not wanted
    [ "$code" != 69 ] || code=1 stopped=yes # a machine is missing
    [ "$code" -le 128 ] || say "training was killed by SIG$(kill -l "$code")"
    [ -z "$stopped" ] || break
    if [ "$restarts" = "$MAX_RESTARTS" ]; then
        say "giving up after $restarts restart(s)"
        break
    fi
    restarts=$((restarts + 1))
    say "restart $restarts of $MAX_RESTARTS"
done
[ "$NODE_RANK" = 0 ] || exit "$code"
[ "$code" != 130 ] || { say "quit at once" && end; }

if [ "$code" = 0 ]; then
    stage "4/5 sample from the saved model"
    text=$(mktemp) || text=/dev/null
    # A finished run stays finished if its sample or report fails.
    child module src.model_assessment.sampling --checkpoint "$RUN_DIR" --prompt "$PROMPT" --num-samples 3 \
        --max-new-tokens 40 --temperature 0.8 --top-k 50 >"$text" || [ -z "$stopped" ] || { code=143 && end; }
    sed '$d' "$text" || true # the last line is JSON for programs
    [ "$text" = /dev/null ] || rm -f "$text"
else
    stage "4/5 sample from the saved model: skipped, because training ended with exit code $code"
fi
if [ -s "$RUN_DIR/metrics.jsonl" ]; then
    stage "5/5 report"
    child module src.model_assessment.report "$RUN_DIR" || [ -z "$stopped" ] || code=143
fi
end
