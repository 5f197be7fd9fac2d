"""The two protocols of HellaSwag: what each asks of a model, as texts, and what a result is called.

The reference's takes an item's raw `ctx`. lm-evaluation-harness, with which most published figures are made, puts the
activity before it and cleans the texts; here as its task `hellaswag` does in version 0.4.13
(https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/hellaswag).
"""

import re
from collections.abc import Sequence

from src.model_assessment.hellaswag_items import PARTS, Item

# What a result says about itself. The last is never to be read as the first.
HELLASWAG_PROTOCOL = (
    "hellaswag-ctx-mean-logprob (HellaSwag: raw ctx, ending of the highest mean log-probability a token)"
)
LM_EVAL_PROTOCOL = (
    "hellaswag-lm-eval (HellaSwag as lm-evaluation-harness asks it, without examples: activity and cleaned texts; acc: "
    "ending of the highest log-probability, acc_norm: of the highest log-probability a character)"
)
HELD_OUT_PROTOCOL = "held-out-ctx-mean-logprob (not HellaSwag: a stand-in from held-out text, scored the same way)"


def reference_texts(item: Item) -> tuple[str, list[str]]:
    """The context, and each ending after a single space; to be encoded one by one."""
    return item.ctx, [" " + ending for ending in item.endings]


def lm_eval_texts(item: Item) -> tuple[str, list[str]]:
    """The same by lm-eval's protocol, for an item of which `lm_eval_lacks` nothing.

    White space at the context's end goes to the endings. lm-eval encodes context and ending together, and takes for the
    ending what is beyond the length of the context's own encoding; that is encoding them one by one, since for
    r50k_base white space after other text always begins a piece.
    """
    query = _query(item)
    context = query.rstrip()
    return context, [f"{query[len(context) :]} {choice}" for choice in lm_eval_choices(item)]


def lm_eval_choices(item: Item) -> list[str]:
    """The endings, cleaned: acc_norm divides by their characters."""
    return [_clean(ending) for ending in item.endings]


def lm_eval_lacks(items: Sequence[Item]) -> str:
    """Why `items` cannot all be asked by lm-eval's protocol, in words; empty where they can."""
    for item in items:
        if missing := [name for name in PARTS if getattr(item, name) is None]:
            return f"item ind {item.ind} has no {', '.join(missing)}"
        if not _query(item).strip() or not all(lm_eval_choices(item)):
            return f"of item ind {item.ind} a text is empty once what stands in brackets is removed"
    return ""


def _query(item: Item) -> str:
    assert item.ctx_b is not None
    return _clean(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")


def _clean(text: str) -> str:
    """Without what WikiHow's pages leave in HellaSwag: [title], [step] and the like."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
