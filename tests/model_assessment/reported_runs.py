"""What tests of the report share: the files of a run, and a page as a reader and a browser find it."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 250
START = 1_750_000_000.0
PLOTS = {"loss", "multiple_choice", "learning_rate", "gradient_norm", "speed", "memory"}


def make_run(folder: Path, **settings: Any) -> Path:
    """A run of 250 steps as a laptop would leave it, with `settings` in place of parts of config.json."""
    folder.mkdir(parents=True)
    config = {
        "config": {
            "run_name": folder.name,
            "resume": "auto",
            "model": {"n_vocab": 50_257, "n_ctx": 128, "n_embd": 256, "n_head": 4, "n_layer": 4, "norm_eps": 1e-5},
            "data": {"dir": "pydocs"},
            "optim": {"max_lr": 0.002, "warmup_steps": None, "clip_grad_norm": 1.0},
            "train": {"batch_tokens": 4_096, "seed": 42, "compile": "auto"},
            "eval": {"sample_prompts": ["The function returns", "This module provides"]},
            "checkpoint": {"every_steps": 50},
        },
        "derived": {
            "total_steps": STEPS,
            "world_size": 2,
            "parameters": 17_080_832,
            "parameters_without_embedding": 4_215_040,
        },
        "versions": {"python": "3.11.7", "torch": "2.9.0"},
        "machine": {"cpu": "Intel Xeon 2.80GHz", "cores": 2, "memory_gb": 7.8, "gpu": None},
        "dataset": {
            "name": "pydocs",
            "source": "the documentation of Python 3.11",
            "documents": 506,
            "tokens": 2_817_311,
        },
        "command": "pretrain.py debug",
    }
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    status = {"state": "done", "step": STEPS, "total_steps": STEPS, "exit_code": 0, "message": "all steps are done"}
    (folder / "status.json").write_text(json.dumps(status))
    append(folder, *metrics())
    return folder


def metrics() -> list[dict[str, Any]]:
    """The lines such a run writes: losses that fall from ln(50257) to about 4, with noise."""
    noise = np.random.default_rng(0).normal(size=(STEPS + 1, 4))
    lines: list[dict[str, Any]] = [
        {"kind": "event", "step": 0, "time": START, "name": "start", "detail": "2 processes"}
    ]
    for step in range(STEPS + 1):
        time, loss = START + 1 + 0.8 * step, 4.0 + 6.8 * math.exp(-step / 45)
        at: dict[str, Any] = {"step": step, "time": time}
        if step % 10 == 0 and step:
            ms = (800 if step > 10 else 4_000) + 30 * noise[step, 0]
            lines.append(
                {"kind": "train", **at, "loss": loss + 0.05 * noise[step, 1], "lr": 0.002 * min(1, step / 12)}
                | {"grad_norm": 0.4 + 3 * math.exp(-step / 20), "tokens_per_second": 4_096e3 / ms, "step_ms": ms}
                | {"mfu": None, "memory_gb": 1.5 + step / 1000, "tokens_seen": 4_096 * step}
            )
        if step % 50 == 0:
            measured = loss + 0.1 + 0.02 * noise[step, 2]
            lines.append(
                {"kind": "validation", **at, "loss": measured, "perplexity": math.exp(measured)}
                | {"bits_per_byte": measured / math.log(2) / 3.1, "tokens": 16_384, "unigram_entropy": 6.482}
            )
            lines.append(
                {"kind": "checkpoint", **at, "path": f"checkpoints/step_{step:07d}", "seconds": 0.4, "bytes": 2e8}
            )
        if step % 125 == 0:
            correct = 24 + step // 10
            protocol = "100 stand-in items made from held-out validation documents; not HellaSwag"
            lines.append(
                {"kind": "hellaswag", **at, "acc_norm": correct / 100, "correct": correct, "total": 100}
                | {"stderr": math.sqrt(correct * (100 - correct) / 100**3), "protocol": protocol, "seconds": 2.0}
            )
            for prompt in ("The function returns", "This module provides"):
                text = f"{prompt} a new list of the items" if step else f"{prompt} gob lamps Vern 88"
                lines.append({"kind": "sample", **at, "prompt": prompt, "text": text, "tokens_per_second": 55.0})
    return lines


def append(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def rewrite(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("")
    append(folder, *lines)


class Page(HTMLParser):
    """What a reader and a browser find on a page: its text, its tags, and everything it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    def images(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "alt")]
