"""A stand-in for HellaSwag that needs no network: the model chooses the continuation of a held-out passage.

The passages come from the validation text of the model's own dataset, so that a small model can learn to answer. The
result says nothing about common sense or HellaSwag, and carries a separate protocol name.

A passage is a context and the ENDING_TOKENS tokens after it. An item is one passage with the endings of three others,
from other documents. Right and wrong endings are drawn alike, so that only the context tells which one is right.
"""

from collections.abc import Iterator

import numpy as np

from src.data_processing.tokenizer import Tokenizer
from src.model_assessment.hellaswag_items import Item
from src.utils.errors import UserError

ENDING_TOKENS = 16
# The first word cut in this range. With its ending a passage fits a model with 80 positions.
MIN_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS = 40, 64
CHOICES = 4

# A shard can hold a hundred million tokens; this part of it has tens of thousands of passages.
_MOST_TOKENS = 4_000_000


def held_out_items(tokens: np.ndarray, tokenizer: Tokenizer, count: int, seed: int) -> list[Item]:
    """At most `count` items from `tokens`, uint16 ids of documents that each follow an end-of-text token.

    A pure function of its arguments. The right ending's place is uniform, and an item's endings differ. Raises
    UserError where fewer than four documents are long enough.
    """
    # Boilerplate of two documents would be right and wrong at once, so only the first passage of an ending counts.
    passages: dict[str, tuple[str, int]] = {}
    for context, ending, document in _passages(np.asarray(tokens[:_MOST_TOKENS]), tokenizer):
        passages.setdefault(ending, (context, document))
    all_endings, document_of = list(passages), np.array([document for _, document in passages.values()])
    if (n_documents := len(set(document_of.tolist()))) < CHOICES:
        raise UserError(
            f"Cannot make multiple-choice items: {n_documents} held-out documents with at least "
            f"{MAX_CONTEXT_TOKENS + ENDING_TOKENS} tokens of running text are too few. Prepare a dataset of more "
            "documents, give a HellaSwag file with --eval.hellaswag-data FILE, or use --eval.hellaswag-items 0."
        )
    rng = np.random.default_rng(seed)
    items = []
    for ind, right in enumerate(rng.permutation(len(passages))[:count].tolist()):
        others = np.flatnonzero(document_of != document_of[right])
        endings = [all_endings[i] for i in rng.choice(others, CHOICES - 1, replace=False)]
        label = int(rng.integers(CHOICES))
        endings.insert(label, all_endings[right])
        items.append(Item(ind, passages[all_endings[right]][0], tuple(endings), label))
    return items


def _passages(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, str, int]]:
    """Contexts, endings and documents of passages in the text's order, none of which overlap."""
    is_cut = _word_cuts(tokens, tokenizer)
    cuts = np.flatnonzero(is_cut)
    middles = cuts[cuts < len(tokens) - ENDING_TOKENS]
    ends = middles + ENDING_TOKENS
    # For each token the position of the end-of-text token that its document follows.
    document_at = np.maximum.accumulate(np.where(tokens == tokenizer.end_of_text, np.arange(len(tokens)), 0))
    starts = cuts[np.searchsorted(cuts, np.maximum(document_at[middles], middles - MAX_CONTEXT_TOKENS))]
    good = is_cut[ends] & (middles - starts >= MIN_CONTEXT_TOKENS) & (document_at[middles] == document_at[ends])
    free_from = 0
    for start, middle, end in np.stack([starts, middles, ends], axis=1)[good].tolist():
        if start >= free_from:
            context, ending = (tokenizer.decode(part.tolist()) for part in (tokens[start:middle], tokens[middle:end]))
            yield context.removeprefix(" "), ending.removeprefix(" "), int(document_at[start])
            free_from = end


def _word_cuts(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Shape (len(tokens),): True where a token is a single space and the beginning of a word."""
    begins_word = np.zeros(tokenizer.n_vocab, dtype=bool)
    ends_word = np.zeros(tokenizer.n_vocab, dtype=bool)
    for token in np.unique(tokens).tolist():
        text = tokenizer.decode([token])
        begins_word[token] = len(text) > 1 and text[0] == " " and not text[1].isspace()
        ends_word[token] = not text[-1].isspace() and token != tokenizer.end_of_text
    is_cut = begins_word[tokens]
    is_cut[1:] &= ends_word[tokens[:-1]]
    is_cut[:1] = False
    return is_cut
