"""Measure tokens per second of sampling, against transformers' `generate` and a loop without a cache.

python -m benchmarks.sampling PRESET [--tokens 48 --repeats 5 --weights bf16] prints a JSON object.

All models have the same initial weights and choose the likeliest token. The variants take turns. Figures are medians.

- "ours" and "transformers": one sequence, weights in the same dtype.
- "ours, four": four sequences.
- "no cache, four": the reference's loop. For each token it runs the model on the whole text and computes the logits of
  all positions (autocast, weights in float32).
- `same_tokens`: the share of tokens on which "ours" and transformers agree. Rounding may decide ties.
- `read_gb_per_s`: this device's memory bandwidth in a product of a 1 GB matrix and a vector. The weights' bytes divided
  by it are the minimum time per token.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch

from benchmarks import print_figures
from src.model import LLM
from src.model_assessment.sampling import SamplingConfig, generate
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.debugging import count_parameters
from src.model_utils.llama_format import llama_settings, llama_tensors
from src.model_utils.load_model import convert_weights, pack_linears
from src.model_utils.weight_init import init_weights
from src.utils import hardware
from src.utils.errors import exit_with

PROMPT = list(range(100, 132))


def main() -> None:
    parser = Parser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--weights", default="bf16", choices=("float32", "bf16"), help="dtype of our weights and transformers'"
    )
    args = parser.parse_args()
    config = PRESETS[args.preset]().model
    device = hardware.choose_device("auto")
    new = LLM(config)
    init_weights(new, config, seed=0)
    model = stored(new, args.weights, device)
    theirs = transformers_model(new, model.embedding.weight.dtype, device)
    new.to(device).eval()
    lists: dict[str, list[int]] = {}
    variants: dict[str, Callable[[], list[int]]] = {
        "ours": partial(ours, model, 1, args.tokens),
        "transformers": partial(transformers, theirs, args.tokens, device),
        "ours, four": partial(ours, model, 4, args.tokens),
        "no cache, four": partial(no_cache, new, 4, args.tokens, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(args.repeats + 1):  # the first is not counted
        for name, variant in variants.items():
            started = time.perf_counter()
            lists[name] = variant()
            if number:
                seconds[name].append(time.perf_counter() - started)
    rates = {
        name: (4 if "four" in name else 1) * args.tokens / statistics.median(values) for name, values in seconds.items()
    }
    pairs = zip(lists["ours"], lists["transformers"], strict=True)
    weights = (2 if args.weights == "bf16" else 4) * count_parameters(new)
    result = {
        "preset": args.preset,
        "weights": args.weights,
        "tokens_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "of_transformers": round(rates["ours"] / rates["transformers"], 3),
        "of_no_cache": round(rates["ours, four"] / rates["no cache, four"], 3),
        "same_tokens": sum(a == b for a, b in pairs) / args.tokens,
        "read_gb_per_s": round(read_gb_per_s(device), 1),
        "weight_gb": round(weights / 1e9, 3),
        "machine": hardware.describe_machine(device),
    }
    print_figures(result)


def stored(new: LLM, kind: str, device: torch.device) -> LLM:
    model = LLM(new.config)
    model.load_state_dict(new.state_dict())
    convert_weights(model.to(device), kind, torch.float32)
    pack_linears(model)
    return model.eval()


def transformers_model(new: LLM, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llama_settings(new.config)))
    model.load_state_dict(llama_tensors(dict(new.named_parameters())))
    model.generation_config.eos_token_id = None
    return model.to(device, dtype).eval()


def ours(model: LLM, rows: int, tokens: int) -> list[int]:
    """Return the new tokens of the first row."""
    config = SamplingConfig(tokens, temperature=0)
    return [chosen[0] for chosen, _ in generate(model, [PROMPT] * rows, config, range(rows))]


@torch.inference_mode()
def transformers(model: torch.nn.Module, tokens: int, device: torch.device) -> list[int]:
    prompt_BT = torch.tensor([PROMPT], device=device)
    ids_BT = cast(Any, model).generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return ids_BT[0, len(PROMPT) :].tolist()


@torch.no_grad()
def no_cache(model: LLM, rows: int, tokens: int, device: torch.device) -> list[int]:
    ids_BT = torch.tensor([PROMPT] * rows, device=device)
    for _ in range(tokens):
        with torch.autocast(device.type, torch.bfloat16):
            logits_BTV = model(ids_BT)
        ids_BT = torch.cat((ids_BT, logits_BTV[:, -1:].float().argmax(dim=-1)), dim=1)
    return ids_BT[0, len(PROMPT) :].tolist()


def read_gb_per_s(device: torch.device) -> float:
    matrix, vector = torch.ones(16_384, 16_384, device=device), torch.ones(16_384, device=device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        (matrix @ vector)[0].item()
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds) / 1e9


if __name__ == "__main__":
    exit_with(main)
