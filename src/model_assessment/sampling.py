"""Text from a model: temperature, top-k and top-p sampling with a key-value cache.

The model sees at most n_ctx tokens. When a sequence grows past that, its older half is forgotten and
the rest is read anew, so the window moves in strides of n_ctx / 2 and the cache stays useful between
them. Which tokens a position sees depends on its length alone: with or without a cache, the same.
Shapes: B sequences, T positions, V vocabulary.
"""

import argparse
import codecs
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model import LLM
from src.model_utils.load_model import load_model
from src.utils.errors import UserError, exit_with
from src.utils.terminal import harmless


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Raises UserError for values that cannot work."""

    max_new_tokens: int = 50
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability (nucleus sampling)."""
    seed: int = 0
    """Sample i of a prompt depends on the prompt, the seed and i, not on what else is in the batch."""

    def __post_init__(self) -> None:
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            wrong.append(f"temperature = {self.temperature} must be 0 or above")
        if self.top_k < 0:
            wrong.append(f"top_k = {self.top_k} must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed = {self.seed} must be between 0 and 2^63 - 1")
        if wrong:
            raise UserError("; ".join(wrong))


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt."""

    prompt: str
    text: str
    """The continuation alone."""
    tokens: tuple[int, ...]
    """Its token ids, without the end-of-text token."""
    finished: bool
    """True if the model ended the text itself."""
    tokens_per_second: float
    """Over the whole call that made it."""


def sample(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    num_samples: int = 1,
    autocast: AbstractContextManager[Any] | None = None,
    between_tokens: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """`num_samples` continuations of each prompt, in order. An empty prompt starts a new document.

    Prompts of equal length run as one batch. `autocast` is the context to call the model in. `between_tokens` may
    raise to give up.
    """
    encoded = [_encode_prompt(tokenizer, prompt) for prompt in prompts]
    new_tokens: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
    started = time.perf_counter()
    with autocast or nullcontext():
        for length in sorted({len(ids) for ids in encoded}):
            rows = [i for i in range(len(new_tokens)) if len(encoded[i // num_samples]) == length]
            batch_BT = torch.tensor([encoded[i // num_samples] for i in rows])
            samples = [i % num_samples for i in rows]
            for step in generate(model, batch_BT, config, samples, tokenizer.end_of_text):
                between_tokens()
                for i, token in zip(rows, step, strict=True):
                    if token is not None:
                        new_tokens[i].append(token)
    rate = sum(map(len, new_tokens)) / (time.perf_counter() - started)
    return [_as_sample(tokenizer, prompts[i // num_samples], ids, rate) for i, ids in enumerate(new_tokens)]


def stream(
    model: LLM,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    autocast: AbstractContextManager[Any] | None = None,
) -> Iterator[str]:
    """The text of `sample`'s first continuation, piece by piece as it is made, cut only between characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    prompt_BT = torch.tensor([_encode_prompt(tokenizer, prompt)])
    with autocast or nullcontext():
        for (token,) in generate(model, prompt_BT, config, [0], tokenizer.end_of_text):
            if token is not None and token != tokenizer.end_of_text:
                yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


@torch.inference_mode()
def generate(
    model: LLM,
    prompt_BT: torch.Tensor,
    config: SamplingConfig,
    samples: Sequence[int],
    end_of_text: int,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """One new token id for each row at a time, None for a row that has ended; stops when all have.

    prompt_BT: int64, T >= 1. samples: which sample of its prompt each row is. Without the cache every token
    reads its whole window again, which gives the same tokens and takes longer.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    ids_BT = prompt_BT.to(device)
    generators = [_generator(config.seed, i) for i in samples]
    ended = [False] * len(samples)
    caches, start = None, -1
    try:
        for _ in range(config.max_new_tokens):
            new_start = _window_start(ids_BT.shape[1], model.config.n_ctx)
            if use_cache and start == new_start:
                unread_BT = ids_BT[:, -1:]
            else:
                caches = model.new_caches(len(ids_BT), _cache_dtype(model)) if use_cache else None
                start, unread_BT = new_start, ids_BT[:, new_start:]
            logits_BV = model.logits(model.hidden(unread_BT, caches)[:, -1]).float()
            draws_B = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
            next_B = _choose(logits_BV.cpu(), draws_B, config)
            ids_BT = torch.cat((ids_BT, next_B.to(device)[:, None]), dim=1)
            yield [None if done else token for done, token in zip(ended, next_B.tolist(), strict=True)]
            ended = [done or token == end_of_text for done, token in zip(ended, next_B.tolist(), strict=True)]
            if all(ended):
                break
    finally:
        model.train(was_training)


def _choose(logits_BV: torch.Tensor, draws_B: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The next token of each row, (B,) int64: the one at which the cumulated probability passes the row's draw."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV.double() / config.temperature, dim=-1)
    probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    if config.top_k:
        probs_BV[:, config.top_k :] = 0
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    probs_BV[before_BV >= config.top_p] = 0  # never the first: nothing comes before it
    cumulated_BV = probs_BV.cumsum(dim=-1)
    targets_B1 = draws_B[:, None] * cumulated_BV[:, -1:]
    rank_B1 = torch.searchsorted(cumulated_BV, targets_B1, right=True)
    return order_BV.gather(1, rank_B1.clamp(max=order_BV.shape[1] - 1)).squeeze(1)


def _window_start(length: int, n_ctx: int) -> int:
    """The first token that the model sees of a sequence of `length` tokens."""
    stride = max(1, n_ctx // 2)
    return max(0, -(-(length - n_ctx) // stride) * stride)


def _generator(seed: int, sample: int) -> torch.Generator:
    """Random numbers on the CPU, so that every device draws the same."""
    mixed = np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def _cache_dtype(model: LLM) -> torch.dtype:
    """What the attention's projections come in: the autocast dtype, or the weights' own."""
    device = model.embedding.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.embedding.weight.dtype


def _encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode(prompt) or [tokenizer.end_of_text]


def _readable(text: str) -> str:
    """Text for a terminal, which a model must not control; its lines and tabs stay. JSON has the exact text."""
    return harmless(text, keep="\n\t")


def _as_sample(tokenizer: Tokenizer, prompt: str, ids: list[int], rate: float) -> Sample:
    finished = bool(ids) and ids[-1] == tokenizer.end_of_text
    ids = ids[:-1] if finished else ids
    return Sample(prompt, tokenizer.decode(ids), tuple(ids), finished, rate)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.sampling",
        description="Continue a prompt with a trained model. Prints the texts, then one JSON object as the last line; "
        "with --stream the text alone. Control characters are shown as escapes; the JSON has the exact texts.",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run (folder or name) or a step_* folder")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="length of a continuation (default: 50)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    parser.add_argument("--stream", action="store_true", help="print the first continuation as it is made")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    if args.num_samples < 1:
        raise UserError(f"--num-samples is {args.num_samples}; it must be at least 1")
    if args.stream and (args.num_samples > 1 or len(args.prompt or []) > 1):
        raise UserError("--stream shows one continuation of one prompt; leave it out, or ask for one")
    config = SamplingConfig(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    loaded, tokenizer = load_model(args.checkpoint, args.device), load_tokenizer()
    prompts = args.prompt if args.prompt is not None else [""]
    if args.stream:
        print(_readable(prompts[0]), end="")
        for piece in stream(loaded.model, tokenizer, prompts[0], config, loaded.autocast()):
            print(_readable(piece), end="", flush=True)
        print()
        return 0
    samples = sample(loaded.model, tokenizer, prompts, config, args.num_samples, loaded.autocast())
    for each in samples:
        print(f"{_readable(each.prompt + each.text)}\n{'-' * 40}")
    print(json.dumps({"checkpoint": str(loaded.path), "samples": [asdict(each) for each in samples]}))
    return 0


if __name__ == "__main__":
    exit_with(main)
