"""The presets, and the command line that overrides any of their fields.

On two cores `debug` takes minutes and `laptop` about 21; `lf_llm_269m` is the published recipe. A preset also tells the
launcher its default source of text and number of processes.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from src.model_configs.arguments import overridden
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from src.utils.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A named Config. Calling it returns a new one."""

    make: Callable[[], Config]
    source: str
    """Default source of the dataset, a name in text_sources.SOURCES."""
    processes: Literal["one", "gpus"]
    """Default number of processes: one, or one per GPU of the machine."""

    def __call__(self) -> Config:
        return self.make()


def config_from_command_line(description: str, prog: str = "python pretrain.py", also: Collection[str] = ()) -> Config:
    """Returns the Config that sys.argv describes: the name of a preset, then overrides of any field.

    `prog`: the command's name in its help. `also`: options that it has already removed from sys.argv. Raises UserError
    or ConfigError for a preset or setting that cannot work.
    """
    first, names = (sys.argv[1:] or ["--"])[0], ", ".join(PRESETS)
    if first.partition("=")[0] == "--preset":
        name = first.partition("=")[2] or [*sys.argv[2:], "NAME"][0]
        raise UserError(f"Cannot use --preset: the preset comes first, alone. Type: {prog} {name} ...")
    if first in PRESETS:
        return overridden(PRESETS[first](), sys.argv[2:], f"{prog} {first}", description, also)
    if {"-h", "--help"} & set(sys.argv):
        return overridden(Config(), ["--help"], f"{prog} PRESET", f"{description} Presets: {names}.")
    if first.startswith("-"):
        raise UserError(f"The preset is missing. Type: {prog} PRESET ..., with one of: {names}.")
    raise UserError(f"Cannot find the preset {first!r}. Choose one of: {names}.")


FAST_OPTIM = OptimConfig(
    optimizer="muon",
    max_lr=4e-3,
    embedding_lr=3e-3,
    schedule="linear",
    decay_ratio=0.85,
    min_lr_ratio=0.0,
    warmup_ratio=0.05,
)
# In a few hundred steps the embedding learns best at a higher rate (LOG.md). Full runs keep the cited one.
SHORT_OPTIM = replace(FAST_OPTIM, embedding_lr=1e-2)


def fast_model(shape: ModelConfig) -> ModelConfig:
    """Returns `shape` with the architecture of transformers' Qwen3, no dropout and projections that start at zero."""
    return replace(shape, bias=False, qk_norm=True, zero_init=True, residual_dropout=0.0, ffn_dropout=0.0)


def debug() -> Config:
    """The whole pipeline in minutes on two cores, on the documentation that comes with Python."""
    return Config(
        run_name="debug",
        model=fast_model(ModelConfig(n_ctx=128, n_embd=128, n_head=2, n_layer=4)),
        data=DataConfig(dir="pydocs"),
        optim=SHORT_OPTIM,
        # In minutes, many small batches reach a lower loss than few large ones (LOG.md).
        train=TrainConfig(total_tokens=512_000, batch_tokens=512, micro_batch_size=4, log_every_steps=20),
        eval=EvalConfig(
            val_every_steps=100,
            val_tokens=16_384,
            hellaswag_every_steps=500,
            hellaswag_data="held-out",
            hellaswag_items=100,
            sample_every_steps=250,
            sample_prompts=("The function returns", "If the argument is", "This module provides"),
            samples_per_prompt=1,
            sample_tokens=40,
        ),
        checkpoint=CheckpointConfig(every_steps=250),
    )


def laptop() -> Config:
    """A small model on your own text, in about 21 minutes on two cores. More train.total_tokens make it better."""
    return Config(
        run_name="laptop",
        model=fast_model(ModelConfig(n_ctx=512, n_embd=256, n_head=4, n_layer=6)),
        data=DataConfig(dir="my_text"),
        optim=SHORT_OPTIM,
        train=TrainConfig(total_tokens=1_250_000, batch_tokens=2_048, micro_batch_size=4, log_every_steps=10),
        eval=EvalConfig(
            val_every_steps=100,
            val_tokens=65_536,
            hellaswag_every_steps=300,
            hellaswag_data="held-out",
            hellaswag_items=200,
            sample_every_steps=200,
            sample_prompts=("The", "It is well known that", "In the beginning"),
            samples_per_prompt=2,
            sample_tokens=40,
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def lf_llm_269m() -> Config:
    """The published recipe: 10B tokens of FineWeb-Edu, 524,288 a step, on 8 GPUs of 80 GB.

    The defaults of the dataclasses are this recipe's values, except eval.val_tokens: a quarter of the recipe's.
    Checkpoints are saved more often than the recipe's five; those five are never pruned.
    """
    return Config(
        run_name="lf_llm_269m",
        data=DataConfig(dir="fineweb-edu-sample-10BT"),
        eval=EvalConfig(
            sample_prompts=(
                "HTML stands for",
                "If animals could talk, my pet would probably say",
                "The clever fox built the strange machine with just a feather, a pebble, and a tiny twig",
            )
        ),
        checkpoint=CheckpointConfig(every_steps=545, keep_every_steps=3_815),
    )


def lf_llm_269m_fast() -> Config:
    """The published model's size and data with a faster recipe, planned for 4B tokens on 8 GPUs of 80 GB.

    A prediction, not a measurement: docs/recipes.md says what it rests on.
    """
    published = lf_llm_269m()
    return replace(
        published,
        run_name="lf_llm_269m_fast",
        model=fast_model(published.model),
        optim=FAST_OPTIM,
        train=replace(published.train, total_tokens=4_000_000_000),
        checkpoint=CheckpointConfig(every_steps=500, keep_every_steps=2_000),
    )


# The batches of debug and laptop are too small to share between many GPUs.
PRESETS: dict[str, Preset] = {
    "debug": Preset(debug, source="pydocs", processes="one"),
    "laptop": Preset(laptop, source="files", processes="one"),
    "lf_llm_269m": Preset(lf_llm_269m, source="fineweb-edu", processes="gpus"),
    "lf_llm_269m_fast": Preset(lf_llm_269m_fast, source="fineweb-edu", processes="gpus"),
}
