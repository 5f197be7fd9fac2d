"""The README.md of an exported model, from what its run recorded. What is not known is left out."""

import math
from typing import Any

from src.model_utils.export_folder import EXPORT, Origin
from src.params import ModelConfig

_SOURCES = {  # by the manifest's name: what it is, and its licence
    "fineweb-edu": "[FineWeb-Edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu), under ODC-By 1.0",
    "pydocs": "the documentation in Python (PSF License 2), NumPy (BSD 3-Clause) and PyTorch (BSD 3-Clause)",
    "files": "files of whoever trained it, whose licence is not recorded",
}
_SHAPE = {  # by ModelConfig's name
    "n_layer": "layers",
    "n_embd": "width",
    "n_head": "attention heads",
    "ffn_hidden": "hidden size of the feed-forward network",
    "n_ctx": "context, tokens",
    "n_vocab": "vocabulary, tokens",
    "rope_theta": "base of the rotary positions",
}
_IN_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER OR OWNER/NAME")
tokenizer = AutoTokenizer.from_pretrained("FOLDER OR OWNER/NAME")
inputs = tokenizer("The", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=50)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```

The end-of-text token, which stands before each document in training, is put nowhere by itself. The text `<|endoftext|>`
becomes that token; with `split_special_tokens=True` it stays text, as it was in training."""
_IN_LLAMA_CPP = """```
llama-completion -m {file} -p "The" -n 40 -no-cnv
```

llama.cpp puts the end-of-text token, which stands before each document in training, nowhere by itself."""
_WITHOUT_TOKENIZER = (
    "The model works on token ids; its vocabulary is not that of the tokenizer that LF_LLM-269M uses, so none is here."
)


def model_card(origin: Origin, config: ModelConfig, parameters: int, dtype: str, file: str, tokenizer: bool) -> str:
    """Markdown, after the hub's metadata. `file`: the one with the weights; `tokenizer`: whether one is exported.

    The metadata name no licence: that of the weights is for whoever publishes them.
    """
    is_gguf = file.endswith(".gguf")
    use = _IN_LLAMA_CPP.format(file=file) if is_gguf else _IN_TRANSFORMERS
    sections = [
        _metadata(origin, "gguf" if is_gguf else "transformers"),
        f"# {origin.config['run_name']}",
        f"A language model of {parameters:,} parameters ({parameters - config.n_vocab * config.n_embd:,} without the "
        "embedding). It continues text. It was not taught to follow instructions, and what it says may be wrong.",
        "## Architecture",
        "A decoder of the architecture Llama, with biases in all projections: RMSNorm, rotary positions, causal "
        "attention, SwiGLU, and a head that shares the embedding's weight. "
        f"{'Matrices' if is_gguf else 'Weights'} are stored as {dtype}.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {text} | {getattr(config, n):,} |" for n, text in _SHAPE.items())]),
        *_training(origin),
        *_measured(origin.figures),
        "## Use",
        use if tokenizer else _WITHOUT_TOKENIZER,
        "## Licence",
        "The program that trained it, LF_LLM-269M, is under the GNU GPL v3. The text it was trained on is under "
        "licences of its own. The licence of these weights is for their publisher to say.",
        f"`{EXPORT}` holds the settings of the training run.",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(origin: Origin, library: str) -> str:
    fineweb = any(source.get("name") == "fineweb-edu" for source in origin.sources)
    dataset = ["datasets:", "- HuggingFaceFW/fineweb-edu"] if fineweb else []
    return "\n".join(["---", f"library_name: {library}", "pipeline_tag: text-generation", *dataset, "---"])


def _training(origin: Origin) -> list[str]:
    lines = []
    if origin.step:
        lines.append(f"- Optimizer steps: {origin.step:,}.")
    train = origin.figures.get("train", {})
    if _number(train.get("tokens_seen")):
        until = "" if train["step"] == origin.step else f" (by step {train['step']:,})"
        lines.append(f"- Tokens seen: {train['tokens_seen']:,}{until}.")
    for source in origin.sources:
        name = str(source.get("name"))
        revision = f", revision {source['revision']}" if source.get("revision") else ""
        size = f"; {source['tokens']:,} tokens" if _number(source.get("tokens")) else ""
        lines.append(f"- Text: {_SOURCES.get(name, name)}{revision}{size}.")
    return ["## Training", "\n".join(lines)] if lines else []


def _measured(figures: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    if (validation := figures.get("validation")) and _number(validation.get("loss")):
        error = f" ± {validation['stderr']:.4f}" if _number(validation.get("stderr")) else ""
        others = [
            f"{name} {validation[key]:.{digits}f}"
            for key, name, digits in (("perplexity", "perplexity", 2), ("bits_per_byte", "bits a byte", 4))
            if _number(validation.get(key))
        ]
        text = ", ".join([f"loss {validation['loss']:.4f}{error} nats a token", *others])
        on = f", on {validation['tokens']:,} tokens of held-out text" if _number(validation.get("tokens")) else ""
        lines.append(f"- Validation at step {validation['step']:,}: {text}{on}.")
    choice = figures.get("hellaswag")
    if choice and _number(choice.get("acc_norm")) and choice.get("protocol"):
        error = f" ± {choice['stderr']:.2%}" if _number(choice.get("stderr")) else ""
        total = f" of {choice['total']:,} items" if _number(choice.get("total")) else ""
        lines.append(
            f"- Multiple choice at step {choice['step']:,}: {choice['acc_norm']:.2%}{error}{total}, where guessing "
            f"gives 25%. Protocol: {choice['protocol']}."
        )
    return ["## Measured while training", "\n".join(lines)] if lines else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
