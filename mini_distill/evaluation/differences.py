"""The texts in which the student is furthest from its teacher, token by token."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..data.batch import Batch
from ..losses.reduction import loss_mask

WINDOW = 64  # tokens of a text that is shown
FEWEST = 8  # supervised tokens that a window needs for its mean to say something
SHOWN = ("forward_kl", "student_nll", "teacher_nll")


class Differences:
    """Keeps the windows of text with the highest mean forward KL.

    Args:
        count: How many.
        tokenizer: Spells them.
    """

    def __init__(self, count: int, tokenizer: Any) -> None:
        self.count, self.tokenizer = count, tokenizer
        self._kept: list[tuple[float, int, dict[str, Any]]] = []
        self._number = itertools.count()

    def add(self, batch: Batch, values: dict[str, Tensor], origins: list[list[str]]) -> None:
        """Look at a batch.

        Args:
            batch: The sequences, on any device.
            values: What `per_token` gives for its supervised positions, with a teacher.
            origins: For each sequence, where its documents stand in their source.
        """
        batch = batch.to("cpu")
        kl = values["forward_kl"].new_full(batch.labels.shape, float("nan"), device="cpu")
        kl[loss_mask(batch.labels)] = values["forward_kl"].cpu()
        first = 0
        for row in range(len(batch)):
            own = loss_mask(batch.labels[row : row + 1])[0]
            supervised = int(own.sum())
            of_row = {
                name: value[first : first + supervised].tolist()
                for name, value in values.items()
                if name in (*SHOWN, "student_top", "teacher_top")
            }
            first += supervised
            worst = max(_windows(batch, row, own, kl[row]), key=lambda window: window[0], default=None)
            if worst is None:
                continue
            score, begin, end, document = worst
            if len(self._kept) < self.count or score > self._kept[0][0]:
                at = own.nonzero()[:, 0].tolist()
                about = {position + 1: {name: of_row[name][i] for name in of_row} for i, position in enumerate(at)}  # t predicts t + 1
                text = self._spell(batch.input_ids[row].tolist(), begin, end, about)
                entry = {"row": origins[row][document] if document < len(origins[row]) else "", "forward_kl": score, "tokens": text}
                (heapq.heappushpop if len(self._kept) == self.count else heapq.heappush)(self._kept, (score, next(self._number), entry))

    def worst_first(self) -> list[dict[str, Any]]:
        """As `details.json` has them."""
        return [entry for _, _, entry in sorted(self._kept, key=lambda kept: (-kept[0], kept[1]))]

    def _spell(self, ids: list[int], begin: int, end: int, about: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
        texts = token_texts(self.tokenizer, ids[begin:end])
        tokens = []
        for position, text in zip(range(begin, end), texts, strict=True):
            token: dict[str, Any] = {"text": text}
            if position in about:
                token |= {name: about[position][name] for name in SHOWN}
                token |= {name: self.tokenizer.decode([int(about[position][name])]) for name in ("student_top", "teacher_top")}
            tokens.append(token)
        return tokens


def _windows(batch: Batch, row: int, supervised: Tensor, kl: Tensor) -> Iterator[tuple[float, int, int, int]]:
    """Mean KL, begin and end (tokens), and the number of the document, of each window of a sequence that is no padding."""
    starts = (batch.position_ids[row] == 0).nonzero()[:, 0].tolist()
    for document, (begin, end) in enumerate(zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True)):
        for first in range(begin, end, WINDOW):
            last = min(first + WINDOW, end)
            predicts = slice(max(begin, first - 1), last - 1)  # the positions that predict the window's tokens
            counted = kl[predicts][supervised[predicts]]
            if len(counted) >= FEWEST:
                yield float(counted.mean()), first, last, document


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text.

    Decoding tokens one by one loses spaces, and the characters that several tokens spell together: those stand with the last of them.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):  # a character that is not finished
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[end - 1]]))
        before = text
    return texts
