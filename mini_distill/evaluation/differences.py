"""The texts in which the student is furthest from its teacher, token by token."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..losses.reduction import loss_mask

WINDOW = 64  # tokens of a text that is shown
FEWEST = 8  # supervised tokens that a window needs for its mean to say something
SHARED = 20  # letters and digits in a row: windows that share as many say much the same
SHOWN = ("forward_kl", "student_nll", "teacher_nll")


@dataclass(frozen=True)
class _Kept:
    """A window that is among the worst so far: its mean forward KL, its runs of letters, and what `details.json` has of it."""

    score: float
    runs: frozenset[str]
    entry: dict[str, Any]


class Differences:
    """Keeps the windows of text with the highest mean forward KL: the worst of each document before a second one of any.

    Of windows that share their wording only the worst is kept: all stories that begin alike would be the same finding many times.

    Args:
        count: How many.
        tokenizer: Spells them.
    """

    def __init__(self, count: int, tokenizer: Any) -> None:
        self.count, self.tokenizer = count, tokenizer
        self._kept: list[_Kept] = []

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
            if window is None:
                continue
            origin = of_row[window.document] if window.document < len(of_row) else ""
            if self._would_keep(window.score, origin):
                text = self._spell(batch, row, window, masks[row], {name: value[row] for name, value in about.items()})
                place = {"row": origin, "sequence": int(batch.row_ids[row]), "token": window.begin}
                self._keep(window.score, place | {"forward_kl": window.score, "tokens": text})

    def _would_keep(self, score: float, origin: str) -> bool:
        new = _Kept(score, frozenset(), {"row": origin})
        return new in self._worst([*self._kept, new])

    def _keep(self, score: float, entry: dict[str, Any]) -> None:
        new = _Kept(score, runs_of_letters("".join(token["text"] for token in entry["tokens"])), entry)
        alike = [kept for kept in self._kept if kept.runs & new.runs]
        if all(kept.score < score for kept in alike):
            self._kept = self._worst([*(kept for kept in self._kept if kept not in alike), new])

    def _worst(self, windows: list[_Kept]) -> list[_Kept]:
        """As many as are kept: by how many of the same document are worse, then by their score."""
        of_document: Counter[str] = Counter()
        ranked = []
        for window in sorted(windows, key=lambda kept: -kept.score):
            ranked.append((of_document[window.entry["row"]], window))
            of_document[window.entry["row"]] += 1
        return [window for _, window in sorted(ranked, key=lambda pair: pair[0])][: self.count]

    def worst_first(self) -> list[dict[str, Any]]:
        """As `details.json` has them."""
        return [kept.entry for kept in sorted(self._kept, key=lambda kept: -kept.score)]

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


def runs_of_letters(text: str) -> frozenset[str]:
    """Every run of `SHARED` letters and digits, whatever stands between them; of a shorter text, all of it."""
    letters = "".join(re.findall(r"\w", text.casefold()))
    return frozenset(letters[i : i + SHARED] for i in range(max(1, len(letters) - SHARED + 1)))


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
