"""Does a model repeat itself? Figures of its generations that need no reference text."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 4


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """Repetition within texts, and diversity over all of them, in words (split at white space).

    Args:
        texts: Generations of one model.

    Returns:
        `repetition`: share of a text's 4-grams that stood in it before, over all texts (rep-4 of Welleck et al. 2020, arXiv 1908.04319;
        0 is no repetition); `distinct_1`, `distinct_2`: different words and word pairs over all there are (Li et al. 2016,
        arXiv 1510.03055); `words`: the mean length. What no text is long enough for is left out.
    """
    words = [text.split() for text in texts]
    found = {"words": sum(map(len, words)) / max(1, len(words))}
    grams = [_ngrams(text, NGRAM) for text in words]
    if total := sum(map(len, grams)):
        found["repetition"] = 1 - sum(len(set(of_text)) for of_text in grams) / total
    for n in (1, 2):
        if all_grams := [gram for text in words for gram in _ngrams(text, n)]:
            found[f"distinct_{n}"] = len(set(all_grams)) / len(all_grams)
    return found


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
