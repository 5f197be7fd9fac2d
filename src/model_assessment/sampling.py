"""Text from a model: continuations of prompts, all at once or piece by piece."""

import argparse
import codecs
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model import LLM
from src.model_assessment.generation import SamplingConfig, generate
from src.model_assessment.interactive import converse
from src.model_utils.load_model import WEIGHT_DTYPES, convert_weights, load_model
from src.utils.errors import UserError, exit_with, harmless, say
from src.utils.hardware import autocast

MOST_ROWS = 64  # of a batch: each has keys and values of its own, of the whole context in every layer


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt."""

    prompt: str
    text: str
    """The continuation alone, without a stop text and what comes after it."""
    tokens: tuple[int, ...]
    """The ids that were made, with those of a stop text, but without the end-of-text token."""
    log_probs: tuple[float, ...]
    """What the model itself gave each of them, in nats, whatever the settings left of it."""
    finish_reason: str
    """Why it ended: "end_of_text" (the model ended it), "stop" (a stop text) or "length"."""
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
    """`num_samples` continuations of each prompt, in order; up to MOST_ROWS of them run as one batch.

    An empty prompt starts a new document; of one longer than the model's context, it sees the end. `autocast` is the
    context to call the model in. `between_tokens` may raise to give up. Raises UserError for a prompt with tokens that
    the model does not know.
    """
    encoded = [
        _encode_prompt(tokenizer, prompt, model.config.n_vocab) for prompt in prompts for _ in range(num_samples)
    ]
    numbers = [number for _ in prompts for number in range(num_samples)]
    made = [_Continuation(tokenizer, config.stop) for _ in encoded]
    started = time.perf_counter()
    with autocast or nullcontext():
        for group in _groups(encoded):
            ended = set[int]()
            prompts_ids, samples = [encoded[i] for i in group], [numbers[i] for i in group]
            for tokens, log_probs in generate(model, prompts_ids, config, samples, ended, tokenizer.n_vocab):
                between_tokens()
                for row, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
                    if row not in ended:
                        made[group[row]].add(token, log_prob)
                        if made[group[row]].finish_reason:
                            ended.add(row)
    rate = sum(len(each.tokens) for each in made) / (time.perf_counter() - started)
    for each in made:
        each.finish()
    return [
        Sample(
            prompt=prompts[i // num_samples],
            text=each.text,
            tokens=tuple(each.tokens),
            log_probs=tuple(each.log_probs),
            finish_reason=each.finish_reason or "length",
            tokens_per_second=rate,
        )
        for i, each in enumerate(made)
    ]


def stream(
    model: LLM,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    autocast: AbstractContextManager[Any] | None = None,
) -> Iterator[str]:
    """The text of `sample`'s first continuation, piece by piece as it is made, cut only between characters."""
    prompts = [_encode_prompt(tokenizer, prompt, model.config.n_vocab)]
    made = _Continuation(tokenizer, config.stop)
    ended: set[int] = set()
    with autocast or nullcontext():
        for (token,), (log_prob,) in generate(model, prompts, config, [0], ended, tokenizer.n_vocab):
            yield made.add(token, log_prob)
            if made.finish_reason:
                ended.add(0)
    yield made.finish()


def _groups(encoded: list[list[int]]) -> Iterator[list[int]]:
    """Indices of prompts of equal length, up to MOST_ROWS at a time."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    for indices in by_length.values():
        for first in range(0, len(indices), MOST_ROWS):
            yield indices[first : first + MOST_ROWS]


class _Continuation:
    """Tokens as they come, and what is certain of their text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.text = ""
        self.finish_reason = ""
        # A token may end inside a character; the bytes so far wait in the decoder for the rest of it.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        """Text that may be the beginning of a stop text."""

    def add(self, token: int, log_prob: float) -> str:
        """The text that is certain from now on."""
        if token == self.tokenizer.end_of_text:
            self.finish_reason = "end_of_text"
            return ""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        return self._take(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self.finish_reason == "stop":
            return ""
        piece = self._take(self.decoder.decode(b"", final=True))
        rest, self.held = self.held, ""
        self.text += rest
        return piece + rest

    def _take(self, piece: str) -> str:
        self.held += piece
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            certain, self.held, self.finish_reason = self.held[: min(found)], "", "stop"
        else:
            keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
            certain = self.held[: len(self.held) - keep]
            self.held = self.held[len(certain) :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))


def _encode_prompt(tokenizer: Tokenizer, prompt: str, n_vocab: int) -> list[int]:
    """At least one id. Raises UserError for one that a model of a smaller vocabulary than the tokenizer's lacks."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    if (unknown := max(ids)) >= n_vocab:
        raise UserError(
            f"the model knows the tokens below {n_vocab}, and {prompt!r} needs token {unknown} of {tokenizer.name}; "
            "choose another prompt, or a model that was trained with this tokenizer"
        )
    return ids


def _readable(text: str) -> str:
    """Text for a terminal, which a model must not control; its lines and tabs stay. JSON has the exact text."""
    return harmless(text, keep="\n\t")


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    if args.num_samples < 1:
        raise UserError(f"--num-samples is {args.num_samples}; it must be at least 1")
    if args.stream and (args.num_samples > 1 or len(args.prompt or []) > 1):
        raise UserError("--stream shows one continuation of one prompt; leave it out, or ask for one")
    if args.interactive and (args.prompt or args.stream or args.num_samples > 1):
        raise UserError("--interactive asks for its prompts itself; leave out --prompt, --stream and --num-samples")
    config = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop or ()),
        seed=args.seed,
    )
    loaded, tokenizer = load_model(args.checkpoint, args.device), load_tokenizer()
    model = loaded.model
    precision = convert_weights(model, args.weights, loaded.precision)

    def context() -> AbstractContextManager[Any]:
        return autocast(loaded.device, precision)

    def pieces(prompt: str, config: SamplingConfig) -> Iterator[str]:
        _note_long(tokenizer, prompt, model.config.n_ctx)
        return stream(model, tokenizer, prompt, config, context())

    if args.interactive:
        converse(pieces, config)
        return 0
    prompts = [prompt.encode("utf-8", "replace").decode() for prompt in args.prompt or [""]]
    if args.stream:
        print(_readable(prompts[0]), end="")
        for piece in pieces(prompts[0], config):
            print(_readable(piece), end="", flush=True)
        print()
        return 0
    for prompt in prompts:
        _note_long(tokenizer, prompt, model.config.n_ctx)
    samples = sample(model, tokenizer, prompts, config, args.num_samples, context())
    for each in samples:
        print(f"{_readable(each.prompt + each.text)}\n{'-' * 40}")
    print(json.dumps({"checkpoint": str(loaded.path), "samples": [asdict(each) for each in samples]}))
    return 0


def _note_long(tokenizer: Tokenizer, prompt: str, n_ctx: int) -> None:
    if (length := len(tokenizer.encode(prompt))) > n_ctx:
        say(f"note: a prompt has {length} tokens; the model sees {n_ctx} at most, and reads on from the end of it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m src.model_assessment.sampling",
        description="Continue a prompt with a trained model. Prints the texts, then one JSON object as the last line; "
        "with --stream or --interactive the text alone. Control characters are shown as escapes; the JSON has the "
        "exact texts.",
    )
    parser.add_argument("--checkpoint", required=True, help="a run (folder or name), a step_* folder or an export")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="length of a continuation (default: 50)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="keep tokens this share as likely as the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens already there become less likely"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    parser.add_argument("--stream", action="store_true", help="print the first continuation as it is made")
    parser.add_argument("--interactive", action="store_true", help="ask for one prompt after the other")
    parser.add_argument(
        "--weights",
        default="auto",
        choices=WEIGHT_DTYPES,
        help="dtype of the weights; bf16 takes half of the memory (default: bf16 where the device computes with it)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


if __name__ == "__main__":
    exit_with(main)
