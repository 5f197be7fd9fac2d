"""The texts that each protocol asks with, written out by hand; test_lm_eval.py compares them with lm-eval's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from src.model_assessment.hellaswag_items import Item, load_items
from src.model_assessment.hellaswag_protocols import lm_eval_choices, lm_eval_lacks, lm_eval_texts, reference_texts
from tests.model_assessment.choices import ITEMS, encode

WIKIHOW = Item(
    ind=1,
    ctx="[header] How to wait [title] Sit down. [step] Any chair will do.",
    endings=("[substeps] One with [blue] arms.", " Stand  up. [title] Walk", "no", "A  b   c"),
    label=0,
    activity_label="Home and Garden",
    ctx_a="[header] How to wait [title] Sit down. [step] Any chair will do.",
    ctx_b="",
)
CLEANED = [" One with arms.", "Stand up.. Walk", "no", "A b  c"]


def test_the_reference_asks_with_the_raw_texts() -> None:
    assert reference_texts(WIKIHOW) == (WIKIHOW.ctx, [" " + ending for ending in WIKIHOW.endings])


def test_lm_eval_asks_with_the_activity_and_without_brackets() -> None:
    context, endings = lm_eval_texts(WIKIHOW)
    assert context == "Home and Garden: How to wait. Sit down. Any chair will do."
    assert lm_eval_choices(WIKIHOW) == CLEANED
    assert endings == [" " + choice for choice in CLEANED]
    sitting = replace(WIKIHOW, activity_label="Sitting", ctx_a="A man sits.", ctx_b="then HE")
    assert lm_eval_texts(sitting)[0] == "Sitting: A man sits. Then he"


def test_white_space_at_the_contexts_end_goes_to_the_endings() -> None:
    context, endings = lm_eval_texts(replace(WIKIHOW, ctx_a="He waits [title]"))
    assert context == "Home and Garden: He waits."
    assert endings[2] == "  no"


def test_what_cannot_be_asked_is_named() -> None:
    assert lm_eval_lacks([WIKIHOW]) == ""
    assert lm_eval_lacks([WIKIHOW, ITEMS[1]]) == "item ind 1 has no activity_label, ctx_a, ctx_b"
    assert lm_eval_lacks([replace(WIKIHOW, ctx_b=None)]) == "item ind 1 has no ctx_b"
    for empty in ({"endings": ("a", "b", "c", "[step]")}, {"activity_label": "[a", "ctx_a": "b]"}):
        assert "of item ind 1 a text is empty" in lm_eval_lacks([replace(WIKIHOW, **empty)])


@pytest.mark.parametrize("texts", [reference_texts, lm_eval_texts])
def test_context_and_ending_encoded_apart_are_what_they_are_together(shared: Path, texts) -> None:
    """As lm-eval encodes them; of every fiftieth item."""
    for item in load_items(shared / "eval" / "hellaswag_val.jsonl.gz")[::50]:
        context, endings = texts(item)
        for ending in endings:
            assert encode(context) + encode(ending) == encode(context + ending)
