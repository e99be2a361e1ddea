"""The texts in which the student is furthest from its teacher, token by token."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
        batch, masks = batch.to("cpu"), loss_mask(batch.labels).cpu()
        about: dict[str, Tensor] = {}
        for name in (*SHOWN, "student_top", "teacher_top"):  # by position, as they stand in the batch
            about[name] = torch.full(masks.shape, math.nan, dtype=torch.float64)
            about[name][masks] = values[name].double().cpu()
        for row, of_row in enumerate(origins):
            window = max(_windows(batch, row, masks[row], about["forward_kl"][row]), key=lambda found: found.score, default=None)
            if window is not None and self._is_worse(window.score):
                origin = of_row[window.document] if window.document < len(of_row) else ""
                text = self._spell(batch, row, window, masks[row], {name: value[row] for name, value in about.items()})
                self._keep(window.score, {"row": origin, "forward_kl": window.score, "tokens": text})

    def _is_worse(self, score: float) -> bool:
        return self.count > 0 and (len(self._kept) < self.count or score > self._kept[0][0])

    def _keep(self, score: float, entry: dict[str, Any]) -> None:
        heapq.heappush(self._kept, (score, next(self._number), entry))
        if len(self._kept) > self.count:
            heapq.heappop(self._kept)

    def worst_first(self) -> list[dict[str, Any]]:
        """As `details.json` has them."""
        return [entry for _, _, entry in sorted(self._kept, key=lambda kept: (-kept[0], kept[1]))]

    def _spell(self, batch: Batch, row: int, window: Window, predicts: Tensor, about: dict[str, Tensor]) -> list[dict[str, Any]]:
        texts = token_texts(self.tokenizer, batch.input_ids[row, window.begin : window.end].tolist())
        tokens = []
        for position, text in zip(range(window.begin, window.end), texts, strict=True):
            token: dict[str, Any] = {"text": text}
            if position > 0 and predicts[position - 1]:  # position t predicts token t + 1
                token |= {name: about[name][position - 1].item() for name in SHOWN}
                token |= {name: self.tokenizer.decode([int(about[name][position - 1])]) for name in ("student_top", "teacher_top")}
            tokens.append(token)
        return tokens


@dataclass(frozen=True)
class Window:
    """Some tokens of one document: their mean forward KL, begin and end in the sequence, and the document's number in it."""

    score: float
    begin: int
    end: int
    document: int


def _windows(batch: Batch, row: int, supervised: Tensor, kl: Tensor) -> Iterator[Window]:
    """The windows of a sequence in which enough is supervised."""
    starts = (batch.position_ids[row] == 0).nonzero()[:, 0].tolist()
    for document, (begin, end) in enumerate(zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True)):
        for first in range(begin, end, WINDOW):
            last = min(first + WINDOW, end)
            predicts = slice(max(begin, first - 1), last - 1)  # the positions that predict the window's tokens
            counted = kl[predicts][supervised[predicts]]
            if len(counted) >= FEWEST:
                yield Window(float(counted.mean()), first, last, document)


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
