"""Every setting of a run, as frozen dataclasses, and the checks on them.

Standard library only: this file knows fields, units and limits, and nothing of torch or the command line. The string
under each field is its help text on the command line.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

MAX_STEPS = 10_000_000  # 500 times the published run's
MAX_NAME_BYTES = 200  # of run_name: file systems take 255, and folders set aside get longer names
# Far above anything this code can train. A typo is refused at once, before it takes memory.
MAX_WIDTH = MAX_VOCAB = 65_536  # token ids are uint16
MAX_LAYERS = 1_024
MAX_CONTEXT = 1_048_576
MAX_COUNT = 10**9
MAX_SAMPLES = 1_000  # of a prompt: they are one batch
MAX_NEW_TOKENS = 1_000_000
MAX_REAL = 1e12
MAX_TOKENS = 10**15
Reporter = Literal["tensorboard", "wandb"]

# Types of settings: a number with its smallest and largest value, a string with its pattern and a description.
KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "None"}
ABOVE_0, _BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)
Count = Annotated[int, 1, MAX_COUNT]
CountOr0 = Annotated[int, 0, MAX_COUNT]
Steps = Annotated[int, 1, MAX_STEPS]
StepsOr0 = Annotated[int, 0, MAX_STEPS]
Width = Annotated[int, 1, MAX_WIDTH]
Layers = Annotated[int, 1, MAX_LAYERS]
Positive = Annotated[float, ABOVE_0, MAX_REAL]
PositiveOr0 = Annotated[float, 0, MAX_REAL]
Share = Annotated[float, 0, 1]
ShareBelow1 = Annotated[float, 0, _BELOW_1]
Seed = Annotated[int, 0, 2**63 - 1]
FolderName = Annotated[str, r"(?!\.{1,2}\Z)[^/\\\0]+", "a plain folder name"]
Place = Annotated[str, r"(?s).+", "a name or path"]
Resume = Annotated[str, "auto|never|[0-9]{1,9}", "auto, never or the step of a checkpoint"]


class ConfigError(Exception):
    """Settings that cannot work. The message lists every problem, one per line."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("Cannot use this configuration:\n" + "\n".join(f"  - {p}" for p in problems))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. Everything here decides what a checkpoint holds."""

    n_vocab: Annotated[int, 1, MAX_VOCAB] = 50_257
    """Tokens in the vocabulary; r50k_base has 50,257."""
    n_ctx: Annotated[int, 1, MAX_CONTEXT] = 2_048
    """Longest sequence, in tokens."""
    n_embd: Width = 1_024
    """Width: the size of a token's vector between blocks."""
    n_head: Width = 16
    """Attention heads; n_embd / n_head is the head dimension, which must be even."""
    n_layer: Layers = 16
    """Transformer blocks."""
    ffn_mult: Annotated[int, 1, MAX_LAYERS] = 4
    """Hidden size of the feed-forward network, in multiples of n_embd; relu2 has 1.5 times as much."""
    ffn: Literal["swiglu", "relu2"] = "swiglu"
    """Kind of feed-forward network. relu2 is relu(x)^2: two matrices with as many parameters as SwiGLU's three."""
    norm_eps: Positive = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position frequencies."""
    residual_dropout: ShareBelow1 = 0.1
    """Dropout after attention, on the way into the residual stream."""
    ffn_dropout: ShareBelow1 = 0.15
    """Dropout after the activation of the feed-forward network."""
    bias: bool = True
    """Biases in the linear layers of the blocks."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, with a gain per dimension, like Qwen3."""
    zero_init: bool = False
    """Start the projections into the residual stream at zero, so that a new block changes nothing."""

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def ffn_hidden(self) -> int:
        return self.n_embd * self.ffn_mult * (3 if self.ffn == "relu2" else 2) // 2

    def problems(self) -> list[str]:
        """All reasons why this shape cannot work, each with a remedy."""
        problems = outside(self, "model.")
        sizes = type(self.n_embd) is int and type(self.n_head) is int and self.n_head > 0
        # RoPE rotates pairs inside each head.
        if sizes and self.n_embd % (pairs := 2 * self.n_head):
            nearest = max(1, round(self.n_embd / pairs)) * pairs
            problems.append(
                f"model.n_embd = {self.n_embd} is not divisible by 2 x model.n_head = {pairs}; the nearest width that "
                f"is: {nearest}"
            )
        return problems


@dataclass(frozen=True)
class DataConfig:
    """Which tokens to train on."""

    dir: Place = "pydocs"
    """Dataset folder made by src.data_processing.data_downloader; a bare name means temp_data/datasets/NAME."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule: linear warm-up, an optional constant phase, then decay."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters. muon: Muon for the matrices in blocks, AdamW for the others."""
    max_lr: Positive = 2.1e-3
    """Learning rate at the end of warm-up."""
    embedding_lr: Positive | None = None
    """With muon: the same for AdamW's parameters (embedding, biases and gains); None takes max_lr."""
    momentum: ShareBelow1 = 0.95
    """Decay of Muon's running mean of gradients."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Form of the decay."""
    decay_ratio: Share = 1.0
    """Share of the steps after warm-up, at the end of the run, during which the learning rate decays."""
    min_lr_ratio: Share = 0.1
    """Final learning rate of the decay, as a share of max_lr."""
    warmup_ratio: Share = 0.0119
    """Share of all tokens during which the learning rate rises linearly."""
    warmup_steps: StepsOr0 | None = None
    """Warm-up in steps; None derives it from warmup_ratio."""
    beta1: ShareBelow1 = 0.9
    """Decay of the running mean of gradients."""
    beta2: ShareBelow1 = 0.95
    """Decay of the running mean of squared gradients."""
    eps: Positive = 1e-8
    """Added to the denominator of AdamW's update."""
    weight_decay: PositiveOr0 = 0.1
    """Decoupled decay of matrices and the embedding; biases and norm gains have none."""
    clip_grad_norm: Positive = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    spike_z: PositiveOr0 = 0.0
    """Skip steps whose loss is this many standard deviations above recent ones; 0 turns it off."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batch and device."""

    total_tokens: Annotated[int, 1, MAX_TOKENS] = 10_000_000_000
    """Tokens to train on; the number of steps follows from it and batch_tokens."""
    total_steps: Steps | None = None
    """Optimizer steps; None derives them from total_tokens."""
    batch_tokens: Count = 524_288
    """Tokens in one optimizer step, over all processes and accumulation steps."""
    micro_batch_size: Count | Literal["auto"] = 16
    """Sequences in one forward pass of one process; determines gradient accumulation. auto: as many as fit.
    Affects only rounding and dropout's random numbers."""
    seed: Seed = 42
    """Seeds initial weights, dropout and data order."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast or float32. auto: bf16 on Ampere or newer GPUs and on CPUs with AMX, else float32; a resumed run
    keeps its precision."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks and the loss; auto: on for CUDA, off elsewhere; a resumed run keeps its choice."""
    deterministic: bool = False
    """Use deterministic, slower algorithms on CUDA, which a resumed run needs there to match an uninterrupted one bit
    for bit. No effect on a CPU, where it always matches."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto takes CUDA, else MPS, else the CPU."""
    log_every_steps: Count = 50
    """Steps between training lines in metrics.jsonl and on the console."""
    timeout_s: Annotated[float, 1, MAX_COUNT] = 600.0
    """Seconds that a process waits for another before it gives up and names the step."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations during training. All of them also run before the first and after the last step."""

    val_every_steps: Count = 100
    """Steps between validations."""
    val_tokens: Count = 2_097_152
    """Validation tokens, the same every time; fewer if shard 0 holds fewer. The published recipe uses four times as
    many, which take 5% of its time. The standard error is logged."""
    hellaswag_every_steps: Count = 500
    """Steps between multiple-choice evaluations."""
    hellaswag_data: Place = "auto"
    """A HellaSwag .jsonl or .jsonl.gz; 'auto' downloads it, 'held-out' makes items from validation documents."""
    hellaswag_items: CountOr0 = 10_042
    """Items to evaluate, from the first; 0 turns the evaluation off."""
    sample_every_steps: Count = 500
    """Steps between samples."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts to continue; none turns sampling off."""
    samples_per_prompt: Annotated[int, 1, MAX_SAMPLES] = 4
    """Continuations of each prompt."""
    sample_tokens: Annotated[int, 1, MAX_NEW_TOKENS] = 20
    """New tokens in each continuation."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The steps to save at and the checkpoints to keep. The last step is always saved."""

    every_steps: Count = 500
    """Steps between checkpoints."""
    keep_last: Annotated[int, 2, MAX_COUNT] = 2
    """Newest checkpoints to keep; at least 2, so that a damaged one has a predecessor."""
    keep_every_steps: CountOr0 = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 turns it off."""
    after_save: str = ""
    """Shell command to run in the run's folder after each save, such as a copy to another machine. Variables for it:
    CHECKPOINT (checkpoints/step_0000500), STEP, RUN_NAME. Training does not wait; a failure is a warning."""


@dataclass(frozen=True)
class Config:
    """One training run. Raises ConfigError with every problem at once."""

    run_name: FolderName = "run"
    """Folder of the run under temp_data/runs/."""
    resume: Resume = "auto"
    """auto: resume from the newest good checkpoint. never: start from scratch and set an old run aside. Or a step:
    resume from its checkpoint and set later ones aside."""
    init_from: str = ""
    """Start a new run at step 0 with the weights of this run, step_* folder or export. Default: random weights."""
    profile: CountOr0 = 0
    """Steps to record with PyTorch's profiler, near the start; the trace opens at ui.perfetto.dev."""
    report_to: tuple[Reporter, ...] = ()
    """Trackers to report to: tensorboard, wandb or both; they must be installed. Does not affect results."""
    price_per_gpu_hour: Positive | None = None
    """Dollars. Makes preflight and the report show the cost of the run; affects nothing else."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        shape = self.model.problems() if isinstance(self.model, ModelConfig) else []
        problems = list(dict.fromkeys([*shape, *outside(self)]))  # each once
        if (length := len(str(self.run_name).encode(errors="replace"))) > MAX_NAME_BYTES:
            problems.append(f"run_name = {self.run_name[:20]!r}... has {length} bytes; at most {MAX_NAME_BYTES} fit")
        if problems:  # the other checks compare numbers
            raise ConfigError(problems)
        train, n_ctx = self.train, self.model.n_ctx
        if train.batch_tokens % n_ctx:
            multiple = max(1, round(train.batch_tokens / n_ctx)) * n_ctx
            problems.append(
                f"train.batch_tokens = {train.batch_tokens} is not a multiple of model.n_ctx = {n_ctx}; the nearest "
                f"multiple is {multiple}"
            )
        elif self.total_steps < 1:
            problems.append(
                f"train.total_tokens = {train.total_tokens} is less than one step of train.batch_tokens = "
                f"{train.batch_tokens}"
            )
        elif self.warmup_steps >= self.total_steps and self.optim.warmup_steps is not None:
            problems.append(
                f"optim.warmup_steps = {self.warmup_steps} must be below the {self.total_steps} steps of the run"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def total_steps(self) -> int:
        if self.train.total_steps is not None:
            return self.train.total_steps
        return self.train.total_tokens // self.train.batch_tokens

    @property
    def warmup_steps(self) -> int:
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        if self.train.total_steps is not None:
            return int(self.optim.warmup_ratio * self.train.total_steps)
        return int(self.optim.warmup_ratio * self.train.total_tokens / self.train.batch_tokens)

    @property
    def batch_size(self) -> int:
        """Sequences in one optimizer step, over all processes."""
        return self.train.batch_tokens // self.model.n_ctx

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward pass of one process; 1, the smallest possible, until "auto" is resolved."""
        return 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_size

    def grad_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` processes accumulates for one step.

        Raises ConfigError, with settings that divide the batch evenly, if these don't.
        """
        sequences, micro = self.batch_size, self.micro_batch_size
        if sequences % (micro * world_size) == 0:
            return sequences // (micro * world_size)
        what = (
            f"train.batch_tokens = {self.train.batch_tokens} is {sequences} sequences of {self.model.n_ctx} tokens, "
            f"which {world_size} process(es) with train.micro_batch_size = {self.train.micro_batch_size} cannot "
            "share evenly"
        )
        if sequences % world_size == 0:
            share = sequences // world_size
            remedy = f"with {world_size} process(es), micro_batch_size can be {_either(sorted(divisors(share)))}"
        else:
            counts = [n for n in range(1, 2 * world_size) if sequences % (micro * n) == 0]
            step_tokens = world_size * micro * self.model.n_ctx
            nearest = max(1, round(self.train.batch_tokens / step_tokens)) * step_tokens
            remedy = f"use train.batch_tokens = {nearest}"
            if counts:
                remedy += f", or {_either(counts)} process(es)"
        raise ConfigError([f"{what}; {remedy}"])


def divisors(number: int) -> list[int]:
    """The divisors of a positive integer, the largest first."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({number // each for each in small} | set(small), reverse=True)


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """The Config that `to_dict` wrote as `data`. Raises ConfigError on unknown fields and wrong types."""
    return _from_dict(Config, data, "")


def _from_dict(kind: Any, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError([f"{prefix.rstrip('.') or 'config'} = {repr(data)[:80]} must be an object"])
    groups = {f.name: f.default_factory for f in dataclasses.fields(kind) if f.default is MISSING}
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := [name for name in data if name not in names]:
        raise ConfigError([f"{prefix}{name} is not a field of the configuration" for name in unknown[:10]])
    values = {name: _from_dict(groups[name], data[name], f"{name}.") if name in groups else data[name] for name in data}
    # JSON has no tuples.
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and annotated type of every setting, and of a group whose value has the wrong type."""
    for name, kind in get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, name)
        if isinstance(kind, type) and isinstance(value, kind) and dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield prefix + name, value, kind


def outside(group: Any, prefix: str = "") -> list[str]:
    """A problem for each value that has the wrong type or lies outside its setting's limits."""
    needed = ((name, value, _must_be(value, kind)) for name, value, kind in _leaves(group, prefix))
    return [f"{name} = {repr(value)[:80]} must be {what}" for name, value, what in needed if what]


def _must_be(value: Any, kind: Any) -> str:
    """Describes the values that a setting of this type takes; "" if `value` is one of them."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, low, high = kinds
        if what := _must_be(value, base):
            return what
        if base is str:
            return "" if re.fullmatch(low, value) else high
        if low <= value <= high:  # false for NaN
            return ""
        least = "above 0" if low == ABOVE_0 else f"at least {_short(low)}"
        return f"{least} and {'below 1' if high == _BELOW_1 else f'at most {_short(high)}'}"
    if origin is Literal:
        return "" if value in kinds else _either(kinds)
    if origin is tuple:
        members = value if isinstance(value, (list, tuple)) else [None]
        what = next(filter(None, (_must_be(member, kinds[0]) for member in members)), "")
        return f"a list of: {what}" if what else ""
    if kinds:
        needed = [_must_be(value, each) for each in kinds]
        return "" if "" in needed else _either(needed)
    # Surrogates stand for bytes of the command line that are not UTF-8; no file of the run could hold them.
    if kind is str and isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        return "UTF-8 text; set LC_ALL=C.UTF-8"
    is_number = kind is float and isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if is_number or type(value) is kind else KIND_NAMES.get(kind, f"a {kind.__name__}")


def _short(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _either(values: Any) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
