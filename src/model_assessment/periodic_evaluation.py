"""Everything that is measured while a model trains: what is due at a step, and its records."""

import time
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data_processing.shards import Manifest
from src.data_processing.tokenizer import Tokenizer
from src.data_processing.training_data_loader import WindowDataset
from src.model import LLM
from src.model_assessment import hellaswag, sampling, validation
from src.model_assessment.hellaswag_protocols import reference_texts
from src.params import Config
from src.utils.errors import StoppedError, UserError

SEED = 0  # of samples: the same at every step, so that steps can be compared
ASK_EVERY_S = 0.2  # the other processes, while the first samples: often enough to stop soon, and no cost a token


@dataclass(frozen=True)
class Record:
    """One line for metrics.jsonl, and the same in words."""

    kind: str
    values: dict[str, Any]
    words: str


class Assessment:
    """Validation, multiple choice and samples, on data chosen once. Raises UserError where that data is missing."""

    def __init__(self, config: Config, folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.windows = WindowDataset(folder, manifest.validation, config.model.n_ctx, config.model.n_vocab, at_least=1)
        self.n_windows = min(max(1, config.eval.val_tokens // config.model.n_ctx), self.windows.n_windows)
        self.unigram_entropy = validation.unigram_entropy(self.windows, self.n_windows)
        held_out = manifest.validation[0]
        self.bytes_per_token = held_out.text_bytes / held_out.tokens
        self.note = ""
        """What could not be prepared and is left out, in words."""
        self.protocol: str = "none"
        self.items: list[hellaswag.Item] = []
        if limit := config.eval.hellaswag_items:
            data = config.eval.hellaswag_data
            try:
                self.protocol, self.items = hellaswag.choose_items(data, limit, folder / held_out.file, tokenizer)
            except UserError as error:
                if data != "held-out":
                    raise
                self.note = f"no multiple choice in this run: {error}"  # a small corpus can still be trained on
        self.encode = hellaswag.encoder(self.items, reference_texts, tokenizer, hellaswag.REFERENCE)

    def due(self, step: int) -> list[str]:
        """The kinds of records to make after `step` steps; all of them before the first and after the last step."""
        settings = self.config.eval
        every = {
            "validation": settings.val_every_steps,
            "hellaswag": settings.hellaswag_every_steps if self.items else 0,
            "sample": settings.sample_every_steps if settings.sample_prompts else 0,
        }
        last = step == self.config.total_steps
        return [kind for kind, steps in every.items() if steps and (step % steps == 0 or last)]

    def missing(self, step: int, recorded: Container[tuple[str, int]]) -> list[str]:
        """Those that are due after `step` steps and not among the kinds and steps of `recorded`."""
        return [kind for kind in self.due(step) if (kind, step) not in recorded]

    def run(
        self,
        kind: str,
        model: LLM,
        batch_size: int,
        autocast: AbstractContextManager[Any],
        rank: int,
        world_size: int,
        sum_over_ranks: Callable[[Sequence[float]], Sequence[float]],
        stop: Callable[[], bool],
    ) -> list[Record]:
        """The records of one kind; all processes call it together, with the same model.

        `batch_size`: windows that validation takes at once.

        Soon after `stop()` is true in any process, raises StoppedError in all.
        """

        def check_all() -> None:
            if sum_over_ranks([float(stop())])[0]:
                raise StoppedError("stopped while measuring")

        with autocast:
            if kind == "validation":
                return [self._validation(model, batch_size, rank, world_size, sum_over_ranks, check_all)]
            if kind == "hellaswag":
                return [self._multiple_choice(model, rank, world_size, sum_over_ranks, check_all)]
            return self._samples(model, rank, world_size, sum_over_ranks, stop)

    def _validation(
        self,
        model: LLM,
        batch_size: int,
        rank: int,
        world_size: int,
        sum_over_ranks: Callable,
        check: Callable[[], None],
    ) -> Record:
        result = validation.validate(
            model,
            self.windows,
            n_windows=self.n_windows,
            batch_size=batch_size,
            bytes_per_token=self.bytes_per_token,
            rank=rank,
            world_size=world_size,
            sum_over_ranks=sum_over_ranks,
            between_batches=check,
        )
        values = {**vars(result), "unigram_entropy": self.unigram_entropy}
        error = "" if result.stderr is None else f" +- {result.stderr:.4f}"
        words = (
            f"validation loss {result.loss:.4f}{error}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.3f} bits a byte (unigram entropy {self.unigram_entropy:.4f})"
        )
        return Record("validation", values, words)

    def _multiple_choice(
        self, model: LLM, rank: int, world_size: int, sum_over_ranks: Callable, check: Callable[[], None]
    ) -> Record:
        result = hellaswag.evaluate(
            model,
            self.items,
            self.encode,
            protocol=self.protocol,
            rank=rank,
            world_size=world_size,
            sum_over_ranks=sum_over_ranks,
            between_batches=check,
        )
        words = f"{self.protocol}: {result.correct}/{result.total} = {result.acc_norm:.2%} +- {result.stderr:.2%}"
        return Record("hellaswag", vars(result), words)

    def _samples(
        self, model: LLM, rank: int, world_size: int, sum_over_ranks: Callable, stop: Callable[[], bool]
    ) -> list[Record]:
        """Made by the first process alone; now and then it asks the others, which wait for that, whether to stop."""
        last = time.monotonic()

        def is_done(done: bool) -> bool:
            """Whether the first process is; all processes call it together."""
            asked, finished = sum_over_ranks([float(stop()), float(done)])
            if asked and not finished:
                raise StoppedError("stopped while sampling")
            return bool(finished)

        def check() -> None:
            nonlocal last
            if world_size == 1 or time.monotonic() - last >= ASK_EVERY_S:
                is_done(False)
                last = time.monotonic()

        if rank != 0:
            while not is_done(False):
                pass
            return []
        records = self._sampled(model, check)
        is_done(True)
        return records

    def _sampled(self, model: LLM, check: Callable[[], None]) -> list[Record]:
        settings = self.config.eval
        chosen = sampling.SamplingConfig(max_new_tokens=settings.sample_tokens, top_k=50, seed=SEED)
        samples = sampling.sample(
            model,
            self.tokenizer,
            settings.sample_prompts,
            chosen,
            num_samples=settings.samples_per_prompt,
            between_tokens=check,
        )
        return [
            Record(
                "sample",
                {"prompt": s.prompt, "text": s.prompt + s.text, "tokens_per_second": s.tokens_per_second},
                f"sample: {s.prompt}|{' '.join(s.text.split())}",
            )
            for s in samples
        ]
