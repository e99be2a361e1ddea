"""Does a model repeat itself? Figures of its generations that need no reference text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NGRAM = 4


def diversity(texts: Sequence[str], tokenizer: Any) -> dict[str, float]:
    """Repetition within texts, and diversity over all of them, in tokens: words are not told apart by blanks in every language.

    Args:
        texts: Generations of one model.
        tokenizer: Cuts them.

    Returns:
        `repetition`: share of a text's 4-grams that stood in it before, over all texts (rep-4 of Welleck et al. 2020, arXiv 1908.04319;
        0 is no repetition); `distinct_1`, `distinct_2`: different tokens and pairs of tokens over all there are (Li et al. 2016,
        arXiv 1510.03055); `tokens`: the mean length. What no text is long enough for is left out.
    """
    tokens: list[list[int]] = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    found = {"tokens": sum(map(len, tokens)) / max(1, len(tokens))}
    grams = [_ngrams(text, NGRAM) for text in tokens]
    if total := sum(map(len, grams)):
        found["repetition"] = 1 - sum(len(set(of_text)) for of_text in grams) / total
    for n in (1, 2):
        if all_grams := [gram for text in tokens for gram in _ngrams(text, n)]:
            found[f"distinct_{n}"] = len(set(all_grams)) / len(all_grams)
    return found


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
