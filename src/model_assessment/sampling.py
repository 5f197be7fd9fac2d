"""Generate text from a model: continue prompts from the command line, interactively or from Python.

The model sees at most n_ctx tokens. When a text outgrows that, its older half is dropped and the rest is read again.

Shapes: B sequences, T positions, D width, V vocabulary, K candidates for the next token.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F

from src.attention import KVCache
from src.data_processing.tokenizer import Tokenizer, load_tokenizer
from src.model import LLM
from src.model_configs.arguments import Parser, whole
from src.model_utils.debugging import count_parameters
from src.model_utils.load_model import WEIGHT_DTYPES, LoadedModel, load_model, pack_linears
from src.params import ABOVE_0, MAX_NEW_TOKENS, MAX_SAMPLES, MAX_VOCAB, PositiveOr0, Seed, Share, outside
from src.utils.errors import UserError, exit_with, harmless, print_result, say
from src.utils.hardware import attention_for_any_shape

# Sorting the whole vocabulary takes longer than a small model's token. This many nearly always reach top_p.
CANDIDATES = 1_024
LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow


@dataclass(frozen=True)
class SamplingConfig:
    """The rules for choosing the next token. Raises UserError listing all impossible values.

    The penalty comes first, then the temperature, then top_k, top_p and min_p, each applied to the remaining tokens.
    """

    max_new_tokens: Annotated[int, 1, MAX_NEW_TOKENS] = 50
    temperature: PositiveOr0 = 1.0
    """Divides the logits. 0, or anything below LEAST_TEMPERATURE, takes the likeliest token."""
    top_k: Annotated[int, 0, MAX_VOCAB] = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, ABOVE_0, 1] = 1.0
    """Keep the likeliest tokens that together reach this probability (nucleus sampling, arXiv:1904.09751)."""
    seed: Seed = 0
    min_p: Share = 0.0
    """Keep tokens at least this share as likely as the likeliest one (arXiv:2407.01082)."""
    repetition_penalty: Annotated[float, 0.001, 1_000] = 1.0
    """Divides positive logits of tokens already in the text, multiplies negative ones (arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation at their first occurrence and are not part of it."""

    def __post_init__(self) -> None:
        problems = outside(self) if all(self.stop) else [*outside(self), "stop must be without an empty text"]
        if problems:
            raise UserError(f"Cannot sample: {'; '.join(problems)}. Change these settings.")


@dataclass(repr=False)
class Sample:
    """One continuation of a prompt. `str()` gives both."""

    prompt: str
    text: str = ""
    """The continuation alone, up to the stop text."""
    tokens: list[int] = field(default_factory=list)
    """All generated ids, including those of a stop text, without the end-of-text token."""
    log_probs: list[float] = field(default_factory=list)
    """The model's log-probability of each token in nats, before temperature, penalty and cuts."""
    finish_reason: str = "length"
    """"end_of_text" (chosen by the model), "stop" (a stop text) or "length"."""
    tokens_per_second: float = field(default=0.0, compare=False)
    """Total for all samples of the prompt."""

    def __str__(self) -> str:
        return self.prompt + self.text

    def __repr__(self) -> str:
        return f"<{self.prompt!r} + {self.text!r}, {len(self.tokens)} tokens, ended by {self.finish_reason}>"


class TextModel(LoadedModel):
    """A trained model for Python and notebooks, made by `load`.

    `settings` of its methods are fields of SamplingConfig, such as temperature=0.8, top_k=50 or max_new_tokens=100.
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto", weights: str = "auto") -> None:
        if weights not in WEIGHT_DTYPES:
            raise UserError(f"Cannot load weights as {weights!r}: it must be one of {', '.join(WEIGHT_DTYPES)}.")
        super().__init__(**vars(load_model(checkpoint, device, weights)))
        self.tokenizer = load_tokenizer()
        self.parameters = count_parameters(self.model)
        if self.precision == torch.bfloat16:
            pack_linears(self.model)

    def __repr__(self) -> str:
        shape = f"{self.parameters:,} parameters, context {self.config.model.n_ctx:,} tokens"
        precision = str(self.precision).removeprefix("torch.")
        return f"<{self.path}: step {self.step:,}, {shape}, {precision} on {self.device}>"

    def generate(self, prompt: str = "", n: int = 1, **settings: Any) -> list[Sample]:
        """Continues the prompt `n` times. An empty prompt starts a new document. Raises UserError."""
        with self.autocast():
            return sample(self.model, self.tokenizer, [prompt], _sampling_config(settings), n)

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[str]:
        """Yields a continuation in pieces during generation. Raises UserError."""
        return stream(self.model, self.tokenizer, prompt, _sampling_config(settings), self.autocast)

    @torch.inference_mode()
    def logits(self, text: str) -> torch.Tensor:
        """The logits after each token of `text`, float32 on the CPU, shape (T, V); the last row is for the next token.

        If a text exceeds the context, its last n_ctx tokens count. An empty text is the beginning of a document.
        """
        ids = _encode(self.tokenizer, text, self.model)[-self.config.model.n_ctx :]
        with self.autocast():
            return self.model(torch.tensor([ids], device=self.device))[0].float().cpu()

    @torch.inference_mode()
    def loss(self, text: str) -> float:
        """The mean loss of the tokens of `text` as a document, in nats.

        A text that exceeds the context is split into pieces of n_ctx tokens, each read without the previous ones.
        Raises UserError for an empty text.
        """
        ids = [*_encode(self.tokenizer, "", self.model), *_encode(self.tokenizer, text, self.model, quiet=True)]
        if not text:
            raise UserError("Cannot compute the loss of an empty text.")
        n_ctx, total = self.config.model.n_ctx, 0.0
        for begin in range(0, len(ids) - 1, n_ctx):
            window_T = torch.tensor(ids[begin : begin + n_ctx + 1], device=self.device)
            with self.autocast():
                logits_TV = self.model(window_T[None, :-1])[0].float()
            total += F.cross_entropy(logits_TV, window_T[1:], reduction="sum").item()
        return total / (len(ids) - 1)


def _sampling_config(settings: dict[str, Any]) -> SamplingConfig:
    names = [each.name for each in fields(SamplingConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise UserError(f"Cannot sample with {', '.join(unknown)}. The settings are {', '.join(names)}.")
    stop = settings.get("stop", ())
    return SamplingConfig(**settings | {"stop": tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)})


def sample(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    num_samples: int = 1,
    between_tokens: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """Continues each prompt `num_samples` times, in one batch per prompt. The model must be in eval mode.

    An empty prompt starts a new document. The caller sets autocast. `between_tokens` may raise to give up. Raises
    UserError for a prompt with tokens unknown to the model, and for an impossible number of samples.
    """
    _check_number(num_samples)
    samples: list[Sample] = []
    for prompt in prompts:  # a batch holds only one prompt, so that all its rows are equally long
        started = time.perf_counter()
        ids, batch = _encode(tokenizer, prompt, model), [Sample(prompt) for _ in range(num_samples)]
        for tokens, log_probs in generate(model, [ids] * num_samples, config, range(num_samples), tokenizer.n_vocab):
            between_tokens()
            for each, token, log_prob in zip(batch, tokens, log_probs, strict=True):
                _add(each, token, log_prob, tokenizer, config.stop)
            if all(each.finish_reason != "length" for each in batch):
                break
        rate = sum(len(each.tokens) for each in batch) / (time.perf_counter() - started)
        samples += [replace(each, tokens_per_second=rate) for each in batch]
    return samples


def _check_number(num_samples: int) -> None:
    if not isinstance(num_samples, int) or not 1 <= num_samples <= MAX_SAMPLES:
        raise UserError(
            f"Cannot draw {num_samples!r} samples of a prompt: it must be a whole number from 1 to {MAX_SAMPLES:,}."
        )


def stream(
    model: LLM,
    tokenizer: Tokenizer,
    prompt: str,
    config: SamplingConfig,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[str]:
    """Yields the text of `sample`'s first continuation in pieces during generation, cut only between characters.

    `autocast` makes the context in which the model is called. The caller's code between two pieces is outside it.
    """
    ids, made, shown = _encode(tokenizer, prompt, model), Sample(prompt), 0
    steps = generate(model, [ids], config, [0], tokenizer.n_vocab)

    def one_step() -> tuple[list[int], list[float]] | None:
        with autocast():  # only here: around a `yield` it would stay on in the caller's code between two pieces
            return next(steps, None)

    for (token,), (log_prob,) in iter(one_step, None):
        _add(made, token, log_prob, tokenizer, config.stop)
        if made.finish_reason != "length":
            break
        certain = _certain(made.text, config.stop)
        yield made.text[shown:certain]
        shown = certain
    yield made.text[shown:]


@torch.inference_mode()
def generate(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    samples: Sequence[int],
    n_tokens: int | None = None,
) -> Iterator[tuple[list[int], list[float]]]:
    """Yields the next token of each row and the model's log-probability of it in nats, config.max_new_tokens times.

    prompts: token ids, at least one per row, equally many in all rows. samples: the number of each row among the
    samples of its prompt, which seeds its random numbers. n_tokens: ids from this one up are never chosen, because they
    have logits but are not tokens. The model must be in eval mode.
    """
    rows = [list(prompt) for prompt in prompts]
    weight, device = model.embedding.weight, model.embedding.weight.device
    # The dtype of attention's projections.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    generators = [_generator(config.seed, number) for number in samples]
    start, caches = -1, list[KVCache]()
    for _ in range(config.max_new_tokens):
        if start != (moved := _window_start(len(rows[0]), model.config.n_ctx)):
            # Every token has a new position, so all keys change.
            start, caches = moved, model.new_caches(len(rows), dtype)
        unread_BT = torch.tensor([row[start + caches[0].length :] for row in rows], device=device)
        with attention_for_any_shape():
            # Only the last position's: the logits of a long prompt take gigabytes.
            logits_BV = model.head(model.hidden(unread_BT, caches)[:, -1])[:, :n_tokens].float().cpu()
        log_probs_BV = logits_BV - logits_BV.logsumexp(dim=-1, keepdim=True)
        tokens = []
        for row, logits_V, generator in zip(rows, logits_BV, generators, strict=True):
            draw = torch.rand(1, dtype=torch.float64, generator=generator)
            tokens.append(_choose(logits_V, row, draw, config))
            row.append(tokens[-1])
        yield tokens, [log_probs_V[token].item() for log_probs_V, token in zip(log_probs_BV, tokens, strict=True)]


def _window_start(length: int, n_ctx: int) -> int:
    """The first token of a sequence of `length` tokens that the model sees. It moves in strides of n_ctx / 2."""
    stride = max(1, n_ctx // 2)
    return max(0, -(-(length - n_ctx) // stride) * stride)


def _generator(seed: int, sample: int) -> torch.Generator:
    """Random numbers on the CPU, so that every device draws the same."""
    mixed = np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def _choose(logits_V: torch.Tensor, row: list[int], draw: torch.Tensor, config: SamplingConfig) -> int:
    """The next token of `row`: the one at which the cumulative probability passes `draw`, between 0 and 1."""
    used = torch.tensor(sorted(set(row)))
    values, penalty = logits_V[used], config.repetition_penalty
    logits_V = logits_V.index_copy(0, used, torch.where(values > 0, values / penalty, values * penalty))
    if config.temperature < LEAST_TEMPERATURE:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V.double() / config.temperature, dim=-1)
    probs_K, ids_K = _candidates(probs_V, config) if config.top_k or config.top_p < 1 else (probs_V, None)
    probs_K[probs_K < config.min_p * probs_K.max()] = 0
    cumulative_K = probs_K.cumsum(dim=-1)
    # The kept probabilities need not add up to 1. From the right: a draw of 0 must not hit a token of probability 0.
    place = torch.searchsorted(cumulative_K, draw * cumulative_K[-1], right=True).clamp(max=len(probs_K) - 1)
    return int(place if ids_K is None else ids_K[place])


def _candidates(probs_V: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids of the likeliest tokens in descending order; top_p sets the rest to probability 0."""
    probs_K, ids_K = probs_V.topk(min(config.top_k or CANDIDATES, len(probs_V)))
    if config.top_k:
        probs_K /= probs_K.sum()
    elif probs_K.sum() < config.top_p:
        probs_K, ids_K = probs_V.sort(descending=True)
    before_K = probs_K.cumsum(dim=-1) - probs_K
    probs_K[before_K >= config.top_p] = 0  # never the first, where before_K is 0
    return probs_K, ids_K


def _add(sample: Sample, token: int, log_prob: float, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """Appends a token to a sample that has not finished, up to a stop text."""
    if sample.finish_reason != "length":
        return
    if token == tokenizer.end_of_text:
        sample.finish_reason = "end_of_text"
        return
    sample.tokens.append(token)
    sample.log_probs.append(log_prob)
    sample.text = tokenizer.decode(sample.tokens)
    if places := [place for place in map(sample.text.find, stop) if place >= 0]:
        sample.text, sample.finish_reason = sample.text[: min(places)], "stop"


def _certain(text: str, stop: tuple[str, ...]) -> int:
    """The number of characters of `text` that further tokens cannot change."""
    text = text.rstrip("\ufffd")  # a token may end inside a character
    beginnings = (size for each in stop for size in range(1, len(each)) if text.endswith(each[:size]))
    return len(text) - max(beginnings, default=0)


def _encode(tokenizer: Tokenizer, prompt: str, model: LLM, quiet: bool = False) -> list[int]:
    """Token ids of a prompt; the end-of-text token for an empty one."""
    if not isinstance(prompt, str):  # from a notebook
        raise UserError(f"Cannot read {prompt!r}: a prompt must be one text.")
    ids, n_vocab, n_ctx = tokenizer.encode(prompt) or [tokenizer.end_of_text], model.config.n_vocab, model.config.n_ctx
    if max(ids) >= n_vocab:
        raise UserError(
            f"Cannot read {prompt!r}: it needs token {max(ids)} of {tokenizer.name}, and the model knows the tokens "
            f"below {n_vocab}. Choose another prompt, or a model trained with this tokenizer."
        )
    if len(ids) > n_ctx and not quiet:
        say(f"note: the prompt has {len(ids)} tokens; the model sees only the end of it, at most {n_ctx} tokens")
    return ids


def main() -> int:
    args = _parser().parse_args()
    prompts = args.prompt or [""]
    if (args.stream or args.interactive) and len(prompts) * args.num_samples > 1:
        raise UserError("Cannot draw several samples: --stream and --interactive show one. Leave them out.")
    values = {each.name: getattr(args, each.name) for each in fields(SamplingConfig)}
    config = SamplingConfig(**values | {"stop": tuple(args.stop)})
    _check_number(args.num_samples)
    loaded = TextModel(args.checkpoint, args.device, args.weights)

    def show(prompt: str, config: SamplingConfig) -> Iterator[str]:
        _show(prompt)
        for piece in loaded.stream(prompt, **vars(config)):
            _show(piece)
            yield piece
        _show("\n")

    if args.interactive:
        converse(show, config, prompts[0])
    elif args.stream:
        list(show(prompts[0], config))
    else:
        try:
            samples = [each for text in prompts for each in loaded.generate(text, args.num_samples, **vars(config))]
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise UserError(f"Cannot draw {args.num_samples} samples at once: {error}. Lower --num-samples.") from None
        for each in samples:
            _show(f"{each.prompt}{each.text}\n{'-' * 40}\n")
        print_result({"checkpoint": str(loaded.path), "samples": [asdict(each) for each in samples]})
    return 0


def converse(show: Callable[[str, SamplingConfig], Iterator[str]], config: SamplingConfig, text: str = "") -> None:
    """Reads texts until the input ends and shows a continuation of each, increasing the seed each time.

    An empty line continues the last text, initially `text`. Ctrl-C ends a continuation.
    """
    say("Type a text to continue, nothing to continue the last one, or Ctrl-D.")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "") or text
        except EOFError:
            return
        try:
            for piece in show(text, config):
                text += piece
        except KeyboardInterrupt:
            print(flush=True)
        config = replace(config, seed=(config.seed + 1) % 2**63)


def _show(text: str) -> None:
    """Prints a model's text with its lines and tabs, but with escapes, so that it cannot control a terminal."""
    print(harmless(text, keep="\n\t"), end="", flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m src.model_assessment.sampling",
        description="Continue a prompt with a trained model. Prints the texts, then one JSON object as the last line "
        "(not on a terminal); with --stream or --interactive only the text. Control characters are shown as escapes; "
        "the JSON has the exact texts. Without --prompt a new document begins.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run (folder or name), a step_* folder or an export")
    add("--prompt", action="append", help="text to continue; may be repeated")
    add("--num-samples", type=whole, default=1, help="continuations of each prompt (default: 1)")
    add("--stream", action="store_true", help="print the continuation during generation")
    add("--interactive", action="store_true", help="read one prompt after the other")
    add("--max-new-tokens", type=whole, default=50, help="length of a continuation (default: 50)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    add("--top-k", type=whole, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    add("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    add("--min-p", type=float, default=0.0, help="keep tokens this share as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=whole, default=0, help="the same seed gives the same text (default: 0)")
    weights = "dtype of the weights; bf16 takes half the memory (default: bf16 if the device computes in it)"
    add("--weights", default="auto", choices=WEIGHT_DTYPES, help=weights)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


if __name__ == "__main__":
    exit_with(main)
