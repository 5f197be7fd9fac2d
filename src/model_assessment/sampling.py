"""Text from a model: continuations of prompts, as a command, as a conversation and from Python.

The model sees at most n_ctx tokens. When a text outgrows that, its older half is dropped and the rest is read again. So
the window moves in strides of n_ctx / 2, and the key-value cache serves between them.

Shapes: B sequences, T positions, V vocabulary, K candidates for the next token.
"""

import argparse
import codecs
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from src.attention import KVCache
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model import LLM
from src.model_utils.load_model import WEIGHT_DTYPES, convert_weights, load_model
from src.model_utils.packed_linear import pack_linears
from src.utils.errors import UserError, exit_with, harmless, say
from src.utils.hardware import autocast

MOST_ROWS = 64  # of a batch: each holds keys and values of the whole context in every layer

# Sorting the whole vocabulary takes longer than a small model needs for a token. This many candidates nearly always
# hold the probability top_p.
CANDIDATES = 1_024


@dataclass(frozen=True)
class SamplingConfig:
    """The rules that choose the next token. Raises UserError listing all impossible values.

    The penalty comes first, then the temperature, then top_k, top_p and min_p, each on the remaining tokens.
    """

    max_new_tokens: int = 50
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability (nucleus sampling, arXiv:1904.09751)."""
    seed: int = 0
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already in the text, multiplies negative ones (arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts at whose first appearance a continuation ends, without them."""

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 turns it off)"),
            "seed": (0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            "stop": (all(self.stop), "without an empty text"),
        }
        problems = [f"{name} = {getattr(self, name)} must be {rule}" for name, (ok, rule) in rules.items() if not ok]
        if problems:
            raise UserError(f"Cannot sample: {'; '.join(problems)}. Change these settings.")


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt."""

    prompt: str
    text: str
    """The continuation alone, up to the stop text."""
    tokens: tuple[int, ...]
    """All generated ids, those of a stop text included, the end-of-text token excluded."""
    log_probs: tuple[float, ...]
    """The model's own log-probability of each token in nats, before temperature, penalty and cuts."""
    finish_reason: str
    """"end_of_text" (chosen by the model), "stop" (a stop text) or "length"."""
    tokens_per_second: float
    """Of all samples of one call together."""


def sample(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    num_samples: int = 1,
    autocast: AbstractContextManager[Any] | None = None,
    between_tokens: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Continues each prompt `num_samples` times. Prompts of equal length run together, up to MOST_ROWS in a batch.

    An empty prompt starts a new document. The model sees only the end of a prompt longer than its context.
    `autocast` is the context to call the model in. `between_tokens` may raise to give up. Raises UserError for a
    prompt with tokens unknown to the model.
    """
    ids = [encoded for prompt in prompts for encoded in [_encode(tokenizer, prompt, model)] * num_samples]
    texts = [_Text(tokenizer, config.stop) for _ in ids]
    started = time.perf_counter()
    with autocast or nullcontext():
        for group in _groups(ids):
            batch = [texts[i] for i in group]
            numbers = [i % num_samples for i in group]
            for tokens, log_probs in generate(model, [ids[i] for i in group], config, numbers, tokenizer.n_vocab):
                between_tokens()
                for text, token, log_prob in zip(batch, tokens, log_probs, strict=True):
                    if not text.finish_reason:
                        text.add(token, log_prob)
                if all(text.finish_reason for text in batch):
                    break
    rate = sum(len(text.tokens) for text in texts) / (time.perf_counter() - started)
    for text in texts:
        text.finish()
    return [
        Sample(prompt, text.text, tuple(text.tokens), tuple(text.log_probs), text.finish_reason or "length", rate)
        for prompt, text in zip((prompt for prompt in prompts for _ in range(num_samples)), texts, strict=True)
    ]


def stream(
    model: LLM,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    autocast: AbstractContextManager[Any] | None = None,
) -> Iterator[str]:
    """Yields the text of `sample`'s first continuation in pieces during generation, cut only between characters."""
    ids, text = _encode(tokenizer, prompt, model), _Text(tokenizer, config.stop)
    with autocast or nullcontext():
        for (token,), (log_prob,) in generate(model, [ids], config, [0], tokenizer.n_vocab):
            yield text.add(token, log_prob)
            if text.finish_reason:
                break
    yield text.finish()


@torch.inference_mode()
def generate(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    samples: Sequence[int],
    n_tokens: int | None = None,
) -> Iterator[tuple[list[int], list[float]]]:
    """Yields the next token of each row and the model's log-probability of it in nats, config.max_new_tokens times.

    prompts: token ids, equally many in all rows, at least one. samples: the number of each row among the samples of
    its prompt, which seeds its random numbers. n_tokens: ids from there on are never chosen, because they have logits
    but are not tokens.
    """
    was_training = model.training
    model.eval()
    rows = [list(prompt) for prompt in prompts]
    device, dtype = model.embedding.weight.device, _cache_dtype(model)
    generators = [_generator(config.seed, number) for number in samples]
    start, caches = -1, list[KVCache]()
    try:
        for _ in range(config.max_new_tokens):
            if start != (moved := _window_start(len(rows[0]), model.config.n_ctx)):
                # Every token has another position now, so all keys change.
                start, caches = moved, model.new_caches(len(rows), dtype)
            unread_BT = torch.tensor([row[start + caches[0].length :] for row in rows], device=device)
            logits_BV = _last_logits(model, unread_BT, caches)[:, :n_tokens].float().cpu()
            log_norms_B = logits_BV.logsumexp(dim=-1)
            draws_B = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
            next_B = _choose(_penalize(logits_BV, rows, config.repetition_penalty), draws_B, config)
            log_probs_B = logits_BV.gather(1, next_B[:, None]).squeeze(1) - log_norms_B
            for row, token in zip(rows, next_B.tolist(), strict=True):
                row.append(token)
            yield next_B.tolist(), log_probs_B.tolist()
    finally:
        model.train(was_training)


def _window_start(length: int, n_ctx: int) -> int:
    """The first token that the model sees of a sequence of `length` tokens."""
    stride = max(1, n_ctx // 2)
    return max(0, -(-(length - n_ctx) // stride) * stride)


def _last_logits(model: LLM, ids_BT: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
    """`model(ids_BT, caches=caches)[:, -1]`, without computing the other positions' logits: they take gigabytes."""
    x_BTD = model.embedding(ids_BT)
    for block, cache in zip(model.blocks, caches, strict=True):
        x_BTD = block(x_BTD, cache)
    return model.head(model.norm(x_BTD[:, -1]))


def _cache_dtype(model: LLM) -> torch.dtype:
    """The dtype of the attention's projections: that of autocast, or of the weights."""
    weight = model.embedding.weight
    return (
        torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else weight.dtype
    )


def _generator(seed: int, sample: int) -> torch.Generator:
    """Random numbers on the CPU, so that every device draws the same."""
    mixed = np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def _penalize(logits_BV: torch.Tensor, rows: list[list[int]], penalty: float) -> torch.Tensor:
    if penalty == 1:
        return logits_BV
    logits_BV = logits_BV.clone()  # the log-probabilities are of the model's own
    for logits_V, row in zip(logits_BV, rows, strict=True):
        used = torch.tensor(sorted(set(row)))
        logits_V[used] = torch.where(logits_V[used] > 0, logits_V[used] / penalty, logits_V[used] * penalty)
    return logits_BV


def _choose(logits_BV: torch.Tensor, draws_B: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The next token of each row, (B,) int64: the one at which the cumulative probability passes the row's draw."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = torch.softmax(logits_BV.double() / config.temperature, dim=-1)
    probs_BK, ids_BK = _candidates(probs_BV, config) if config.top_k or config.top_p < 1 else (probs_BV, None)
    probs_BK[probs_BK < config.min_p * probs_BK.amax(dim=-1, keepdim=True)] = 0
    cumulative_BK = probs_BK.cumsum(dim=-1)
    targets_B1 = draws_B[:, None] * cumulative_BK[:, -1:]  # the kept probabilities need not add up to 1
    # From the right, because a token of probability 0 must not be hit by a draw of 0.
    place_B1 = torch.searchsorted(cumulative_BK, targets_B1, right=True).clamp(max=probs_BK.shape[1] - 1)
    return (place_B1 if ids_BK is None else ids_BK.gather(1, place_B1)).squeeze(1)


def _candidates(probs_BV: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids of the likeliest tokens in falling order; top_k and top_p set others to probability 0."""
    n_vocab = probs_BV.shape[1]
    probs_BK, ids_BK = probs_BV.topk(min(config.top_k or CANDIDATES, n_vocab), dim=-1)
    if config.top_k:
        probs_BK /= probs_BK.sum(dim=-1, keepdim=True)
    elif (short_B := probs_BK.sum(dim=-1) < config.top_p).any():
        # Only the short rows are sorted whole: ties fall differently there, and a batch must not change its rows.
        rest = n_vocab - probs_BK.shape[1]
        probs_BK, ids_BK = F.pad(probs_BK, (0, rest)), F.pad(ids_BK, (0, rest))
        probs_BK[short_B], ids_BK[short_B] = probs_BV[short_B].sort(dim=-1, descending=True)
    before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    probs_BK[before_BK >= config.top_p] = 0  # never the first, which has nothing before it
    return probs_BK, ids_BK


class _Text:
    """The text of a growing list of tokens, up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.text = self.finish_reason = ""
        # A token may end inside a character; its first bytes wait in the decoder for the others.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._returned = 0  # characters

    def add(self, token: int, log_prob: float) -> str:
        """Returns the text that has become certain."""
        if token == self.tokenizer.end_of_text:
            self.finish_reason = "end_of_text"
            return ""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        self.text += self._decoder.decode(self.tokenizer.decode_bytes([token]))
        if places := [place for place in map(self.text.find, self.stop) if place >= 0]:
            self.text, self.finish_reason = self.text[: min(places)], "stop"
            return self._rest(0)
        # The end of the text waits while it may be the beginning of a stop text.
        return self._rest(max((_overlap(self.text, stop) for stop in self.stop), default=0))

    def finish(self) -> str:
        """Returns the rest of the text, after the last token."""
        if self.finish_reason != "stop":
            self.text += self._decoder.decode(b"", final=True)
        return self._rest(0)

    def _rest(self, held: int) -> str:
        piece = self.text[self._returned : len(self.text) - held]
        self._returned += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that begin `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))


def _groups(rows: list[list[int]]) -> Iterator[list[int]]:
    """Yields the indices of rows of equal length, up to MOST_ROWS at a time."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for indices in by_length.values():
        yield from (indices[first : first + MOST_ROWS] for first in range(0, len(indices), MOST_ROWS))


def _encode(tokenizer: Tokenizer, prompt: str, model: LLM) -> list[int]:
    """Token ids of a prompt, at least one."""
    ids, n_vocab, n_ctx = tokenizer.encode(prompt) or [tokenizer.end_of_text], model.config.n_vocab, model.config.n_ctx
    if max(ids) >= n_vocab:
        raise UserError(
            f"Cannot read {prompt!r}: it needs token {max(ids)} of {tokenizer.name}, and the model knows the tokens "
            f"below {n_vocab}. Choose another prompt, or a model trained with this tokenizer."
        )
    if len(ids) > n_ctx:
        say(f"note: the prompt has {len(ids)} tokens; the model sees only the end of it, at most {n_ctx} tokens")
    return ids


def main() -> int:
    """Runs the command line."""
    args = _parser().parse_args()
    if args.num_samples < 1:
        raise UserError(f"Cannot draw {args.num_samples} samples. Set --num-samples to at least 1.")
    one = args.num_samples == 1 and len(args.prompt or []) <= 1
    if args.stream and not one:
        raise UserError("Cannot use --stream: it shows one continuation of one prompt. Leave it out, or ask for one.")
    if args.interactive and (args.prompt or args.stream or not one):
        raise UserError("Cannot use --interactive with a prompt. Leave out --prompt, --stream and --num-samples.")
    config = _config(args)
    loaded, tokenizer = load_model(args.checkpoint, args.device), load_tokenizer()
    model = loaded.model
    precision = convert_weights(model, args.weights, loaded.precision)
    if precision == torch.bfloat16:
        pack_linears(model)

    def pieces(prompt: str, config: SamplingConfig) -> Iterator[str]:
        return stream(model, tokenizer, prompt, config, autocast(loaded.device, precision))

    if args.interactive or (one and not args.prompt and not args.stream and sys.stdin.isatty()):
        converse(pieces, config)
        return 0
    prompts = [prompt.encode("utf-8", "replace").decode() for prompt in args.prompt or [""]]
    if args.stream:
        _show(prompts[0])
        for piece in pieces(prompts[0], config):
            _show(piece)
        print()
        return 0
    samples = sample(model, tokenizer, prompts, config, args.num_samples, autocast(loaded.device, precision))
    for each in samples:
        _show(f"{each.prompt}{each.text}\n{'-' * 40}\n")
    print(json.dumps({"checkpoint": str(loaded.path), "samples": [asdict(each) for each in samples]}))
    return 0


def converse(pieces: Callable[[str, SamplingConfig], Iterator[str]], config: SamplingConfig) -> None:
    """Reads texts until the input ends and prints the continuation of each, given by `pieces`, with the next seed.

    An empty line continues the last text. A line of options changes `config`.
    """
    text = ""
    say("Type a text to continue, nothing to continue the last one, options such as --temperature 0.5, or Ctrl-D.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.startswith("--"):
            config = _changed(config, line)
            continue
        text = line or text
        _show(text)
        try:
            for piece in pieces(text, config):
                _show(piece)
                text += piece
        except KeyboardInterrupt:
            pass  # ends this continuation only; at the prompt, Ctrl-C ends the command
        print(flush=True)
        config = replace(config, seed=(config.seed + 1) % 2**63)


def _changed(config: SamplingConfig, line: str) -> SamplingConfig:
    try:
        args = _options().parse_args(shlex.split(line), argparse.Namespace(**asdict(config) | {"stop": None}))
        args.stop = config.stop if args.stop is None else args.stop
        return _config(args)
    except (UserError, ValueError) as error:
        say(str(error))
    except SystemExit:  # argparse has said what is wrong
        pass
    return config


def _show(text: str) -> None:
    """Prints text that a model wrote: escaped, so that it cannot control a terminal, but with its lines and tabs."""
    print(harmless(text, keep="\n\t"), end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.sampling",
        parents=[_options()],
        description="Continue a prompt with a trained model. Prints the texts, then one JSON object as the last line; "
        "with --stream or --interactive only the text. Control characters are shown as escapes; the JSON has the exact "
        "texts. Without --prompt: --interactive on a terminal, elsewhere a new document.",
    )
    parser.add_argument("--checkpoint", required=True, help="a run (folder or name), a step_* folder or an export")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    parser.add_argument("--stream", action="store_true", help="print the continuation while it is generated")
    parser.add_argument("--interactive", action="store_true", help="read one prompt after the other")
    weights = "dtype of the weights; bf16 takes half of the memory (default: bf16 where the device computes with it)"
    parser.add_argument("--weights", default="auto", choices=WEIGHT_DTYPES, help=weights)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


def _options() -> argparse.ArgumentParser:
    """The options of SamplingConfig, on the command line and in a conversation."""
    parser = argparse.ArgumentParser(prog="", add_help=False)
    parser.add_argument("--max-new-tokens", type=int, default=50, help="length of a continuation (default: 50)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="keep tokens this share as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    return parser


def _config(args: argparse.Namespace) -> SamplingConfig:
    values = {field.name: getattr(args, field.name) for field in fields(SamplingConfig)}
    return SamplingConfig(**values | {"stop": tuple(args.stop or ())})


if __name__ == "__main__":
    exit_with(main)
