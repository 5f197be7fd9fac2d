"""Evaluations during training: which ones are due at a step, and their records.

A new evaluation is a method that returns records, and a row in `Assessment.evaluations`.
"""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from src.data_processing.shards import Manifest
from src.data_processing.tokenizer import Tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model import LLM
from src.model_assessment import hellaswag, sampling, validation
from src.params import Config
from src.utils.errors import StoppedError, UserError
from src.utils.handle_ddp import Processes


@dataclass(frozen=True)
class Record:
    """One line for metrics.jsonl, and a line for the log."""

    kind: str
    values: dict[str, Any]
    words: str


Check = Callable[..., bool]
"""Called between batches, equally often in all processes. Raises StoppedError in all of them once one should stop."""
MakeRecords = Callable[[LLM, int, Processes, Check], list[Record]]


class Assessment:
    """Validation, multiple choice and samples, on data chosen once. Raises UserError if that data is missing."""

    def __init__(self, config: Config, folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.windows = WindowDataset(folder, manifest.validation, config.model.n_ctx, config.model.n_vocab, at_least=1)
        self.n_windows = min(max(1, config.eval.val_tokens // config.model.n_ctx), self.windows.n_windows)
        self.unigram_entropy = validation.unigram_entropy(self.windows, self.n_windows)
        held_out = manifest.validation[0]
        self.bytes_per_token = held_out.text_bytes / held_out.tokens
        self.note = ""
        """The reason why an evaluation is left out of this run."""
        self.protocol, self.items = self._choose_items(folder / held_out.file)
        self.encode = cache(tokenizer.encode)  # encoding all items takes a second each time

    def evaluations(self) -> dict[str, tuple[int, MakeRecords]]:
        """The evaluations in order: kind -> steps between two (0 turns it off), function."""
        settings = self.config.eval
        return {
            "validation": (settings.val_every_steps, self._validation),
            "hellaswag": (settings.hellaswag_every_steps if self.items else 0, self._multiple_choice),
            "sample": (settings.sample_every_steps if settings.sample_prompts else 0, self._samples),
        }

    def missing(self, step: int, recorded: Container[tuple[str, int]]) -> list[str]:
        """The kinds that are due after `step` steps and not in `recorded`, which holds pairs of kind and step.

        All are due before the first and after the last step.
        """
        last = step == self.config.total_steps
        due = [kind for kind, (every, _) in self.evaluations().items() if every and (step % every == 0 or last)]
        return [kind for kind in due if (kind, step) not in recorded]

    def run(
        self,
        kind: str,
        model: LLM,
        batch_size: int,
        autocast: AbstractContextManager[Any],
        procs: Processes,
        stop: Callable[[], bool],
    ) -> list[Record]:
        """The records of one kind. All processes call it together, with the same model, left in training mode.

        `batch_size`: windows per batch of validation. Soon after `stop()` is true in one process, raises StoppedError
        in all.
        """

        def check(*_: object, done: bool = False) -> bool:
            """True once a process calls it with `done`. All must call it equally often, because they wait in it."""
            # Every process decides from these sums, not from its own `stop`, so that all leave at the same call.
            stopped, finished = procs.sum([float(stop()), float(done)])
            if stopped and not finished:
                raise StoppedError("stopped during an evaluation")
            return bool(finished)

        model.eval()
        try:
            with autocast:
                return self.evaluations()[kind][1](model, batch_size, procs, check)
        finally:
            model.train()

    def _choose_items(self, validation_shard: Path) -> tuple[str, list[hellaswag.Item]]:
        settings = self.config.eval
        if not settings.hellaswag_items:
            return "none", []
        try:
            return hellaswag.choose_items(
                settings.hellaswag_data, settings.hellaswag_items, validation_shard, self.tokenizer
            )
        except UserError as error:
            if settings.hellaswag_data != "held-out":
                raise
            self.note = f"no multiple choice in this run: {error}"  # a small corpus can still be trained on
            return "none", []

    def _validation(self, model: LLM, batch_size: int, procs: Processes, check: Check) -> list[Record]:
        result = validation.validate(
            model,
            self.windows,
            n_windows=self.n_windows,
            batch_size=batch_size,
            bytes_per_token=self.bytes_per_token,
            procs=procs,
            between_batches=check,
        )
        error = "" if result.stderr is None else f" +- {result.stderr:.4f}"
        words = (
            f"validation loss {result.loss:.4f}{error}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.3f} bits per byte (unigram entropy {self.unigram_entropy:.4f})"
        )
        return [Record("validation", {**vars(result), "unigram_entropy": self.unigram_entropy}, words)]

    def _multiple_choice(self, model: LLM, _: int, procs: Processes, check: Check) -> list[Record]:
        result = hellaswag.evaluate(model, self.items, self.encode, self.protocol, procs=procs, between_batches=check)
        is_hellaswag = self.protocol == hellaswag.HELLASWAG_PROTOCOL
        name = "HellaSwag" if is_hellaswag else "held-out choice (not HellaSwag)"
        right = f"{result['correct']:,} of {result['total']:,} right"
        words = f"{name}: {right}, {result['acc_norm']:.2%} +- {result['stderr']:.2%}"
        return [Record("hellaswag", result, words)]

    def _samples(self, model: LLM, _: int, procs: Processes, check: Check) -> list[Record]:
        if not procs.is_main:  # joins the checks of the main process, which samples
            while not check():
                pass
            return []
        settings = self.config.eval
        # The seed is the same at every step, so that steps can be compared.
        rules = sampling.SamplingConfig(max_new_tokens=settings.sample_tokens, top_k=50, seed=0)
        texts, count = settings.sample_prompts, settings.samples_per_prompt
        samples = sampling.sample(model, self.tokenizer, texts, rules, num_samples=count, between_tokens=check)
        check(done=True)
        records = []
        for each in samples:
            values = {"text": each.prompt + each.text, "tokens_per_second": each.tokens_per_second}
            words = f"sample: {each.prompt}|{' '.join(each.text.split())}"
            records.append(Record("sample", {"prompt": each.prompt, **values}, words))
        return records
