"""Items and a small model for tests of multiple choice, and slow readings of what is to be computed."""

from typing import Any

import torch
from torch import nn

from src.data_processing.tokenizer import load_tokenizer
from src.model import LLM
from src.model_assessment.hellaswag_items import Item
from src.params import ModelConfig

encode = load_tokenizer().encode

RECORD: dict[str, Any] = {
    "ind": 7,
    "ctx": "A man sits. then HE",
    "endings": ["stands up.", "is a roof.", "sings it.", "ate."],
    "label": 2,
    "activity_label": "Sitting",
    "ctx_a": "A man sits.",
    "ctx_b": "then HE",
}
ITEMS = [
    Item(0, "The cat sat on the mat and", ("looked around.", "flew to the moon in a red rocket.", "ate", "sang"), 0),
    Item(1, "Rain", ("falls.", "is made of iron and wool, as everybody knows.", "sleeps a while.", "runs"), 2),
    Item(2, "She opened the old book slowly; then she", ("read it aloud.", "read it.", "drank the sea.", "barked"), 1),
    Item(3, "Naïve café owners, 10,042 of them,", ("served ☕ all day.", "slept.", "counted to ten.", "left"), 3),
    Item(4, "word " * 40 + "end", ("of the line.", "and so on and on.", "word word", "of it all"), 2),
]


def make_model(n_ctx: int = 64, seed: int = 0) -> LLM:
    """Weights far from their initial scale, so that scores differ between endings and depend on the context."""
    torch.manual_seed(seed)
    model = LLM(ModelConfig(n_ctx=n_ctx, n_embd=16, n_head=2, n_layer=2, residual_dropout=0.5, ffn_dropout=0.5))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@torch.no_grad()
def slow_log_probs(model: LLM, context: str, ending: str) -> list[float]:
    """Those of the ending's tokens, one ending at a time, through the whole float64 log-softmax."""
    before, scored = encode(context), encode(ending)
    tokens = (before + scored)[-(model.config.n_ctx + 1) :]
    log_probs = torch.log_softmax(model.eval()(torch.tensor([tokens[:-1]]))[0].double(), dim=-1)
    return [log_probs[t - 1, tokens[t]].item() for t in range(max(1, len(tokens) - len(scored)), len(tokens))]


def slow_means(model: LLM, items: list[Item]) -> dict[int, list[float]]:
    """The reference's scores of the endings of each item."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {i: [mean(slow_log_probs(model, it.ctx, " " + e)) for e in it.endings] for i, it in enumerate(items)}


class FixedTaste(nn.Module):
    """Gives the same logits everywhere: those of some words, and 0 for the rest."""

    def __init__(self, logits: dict[str, float]) -> None:
        super().__init__()
        self.config = ModelConfig(n_ctx=32)
        self.embedding = nn.Embedding(self.config.n_vocab, 1)
        nn.init.zeros_(self.embedding.weight)
        for word, value in logits.items():
            (token,) = encode(word)
            self.embedding.weight.data[token] = value
        self.blocks: list[nn.Module] = []

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(*x.shape[:-1], 1)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.embedding.weight.T
