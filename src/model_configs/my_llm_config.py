"""The presets: functions that return a full Config.

`debug` is minutes on two cores, `laptop` hours, `lf_llm_269m` the published recipe. A preset names
its dataset; where that lies and what runs it is decided elsewhere.
"""

from collections.abc import Callable

from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def debug() -> Config:
    """The whole pipeline in minutes on two cores, on the documentation that Python brings."""
    return Config(
        run_name="debug",
        model=ModelConfig(n_ctx=128, n_embd=256, n_head=4, n_layer=4, residual_dropout=0.0, ffn_dropout=0.0),
        data=DataConfig(dir="pydocs"),
        optim=OptimConfig(max_lr=3e-3, warmup_ratio=0.05),
        train=TrainConfig(total_tokens=491_520, batch_tokens=2_048, micro_batch_size=16, log_every_steps=10),
        eval=EvalConfig(
            val_every_steps=40,
            val_tokens=16_384,
            hellaswag_every_steps=120,
            hellaswag_data="held-out",
            hellaswag_items=100,
            sample_every_steps=120,
            sample_prompts=("The function returns", "If the argument is", "This module provides"),
            samples_per_prompt=1,
            sample_tokens=40,
        ),
        checkpoint=CheckpointConfig(every_steps=40),
    )


def laptop() -> Config:
    """A 30M-parameter model on a corpus of your own, in hours on a CPU, sooner on a small GPU."""
    return Config(
        run_name="laptop",
        model=ModelConfig(n_ctx=256, n_embd=384, n_head=6, n_layer=6, residual_dropout=0.1, ffn_dropout=0.15),
        data=DataConfig(dir="my_text"),
        optim=OptimConfig(max_lr=2e-3, warmup_ratio=0.02),
        train=TrainConfig(total_tokens=20_000_000, batch_tokens=8_192, micro_batch_size=8, log_every_steps=10),
        eval=EvalConfig(
            val_every_steps=100,
            val_tokens=65_536,
            hellaswag_every_steps=500,
            hellaswag_data="held-out",
            hellaswag_items=200,
            sample_every_steps=250,
            sample_prompts=("The", "It is well known that", "In the beginning"),
            samples_per_prompt=2,
            sample_tokens=40,
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def lf_llm_269m() -> Config:
    """The published recipe: 10B tokens of FineWeb-Edu, 524,288 a step, on 8 GPUs of 80 GB.

    Every default of the dataclasses is this recipe's value, but eval.val_tokens, which is a quarter of it; the ones
    below are those that have no default. Checkpoints are saved more often than the recipe's five, which are the ones
    kept for good.
    """
    return Config(
        run_name="lf_llm_269m",
        data=DataConfig(dir="fineweb-edu-sample-10BT"),
        eval=EvalConfig(
            sample_prompts=(
                "Hello, I'm a language model,",
                "The water cycle begins when",
                "The most important lesson of history is",
            )
        ),
        checkpoint=CheckpointConfig(every_steps=545, keep_every_steps=3_815),
    )


PRESETS: dict[str, Callable[[], Config]] = {"debug": debug, "laptop": laptop, "lf_llm_269m": lf_llm_269m}
