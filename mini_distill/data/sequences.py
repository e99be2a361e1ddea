"""Training sequences: token rows on disk, seen through a packing plan."""

from __future__ import annotations

import numpy as np
import torch

from ..losses.reduction import IGNORE_INDEX
from .batch import Batch
from .order import ShuffledEpochs
from .packing import Plan
from .token_rows import TokenRows


class Sequences:
    """Sequences of `seq_len` tokens, by number.

    The first token of a piece is never supervised, also where a document was split: what precedes it is not in the sequence.

    Args:
        rows: The tokens.
        plan: Which pieces stand in which sequence.
        seq_len: Tokens of a sequence; shorter ones are padded on the right.
        pad_id: The token of padding; never looked at.

    Attributes:
        supervised: `(sequences,)` tokens to be predicted in each.
        num_supervised: In all.
    """

    def __init__(self, rows: TokenRows, plan: Plan, seq_len: int, pad_id: int) -> None:
        self.rows, self.plan, self.seq_len, self.pad_id = rows, plan, seq_len, pad_id
        begin = rows.offset[plan.document] + plan.start
        ascending = np.argsort(begin)
        of_piece = np.empty(len(begin), dtype=np.int64)
        of_piece[ascending] = rows.count_supervised(begin[ascending] + 1, (begin + plan.length)[ascending])
        self.supervised = np.diff(np.concatenate([[0], np.cumsum(of_piece)])[plan.offset]).astype(np.int32)
        self.num_supervised = int(of_piece.sum())

    def __len__(self) -> int:
        return len(self.plan.offset) - 1

    def __getitem__(self, index: int) -> Batch:
        """One sequence; its fields have shape `(seq,)`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.batch([index]).row(0)

    def batch(self, indices: list[int]) -> Batch:
        """The sequences with these numbers: a `Batch` of shape `(len(indices), seq_len)`.

        Raises:
            DataError: the file of the tokens was changed while it was in use.
        """
        shape = (len(indices), self.seq_len)
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids, num_bytes = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, index in enumerate(indices):
            at = 0
            for document, start, length in self._pieces(index):
                tokens, here = self.rows.read(document, start, length), slice(at, at + length)
                input_ids[row, here] = tokens["input_ids"]
                np.copyto(labels[row, here], input_ids[row, here], where=tokens["supervised"])
                labels[row, at] = IGNORE_INDEX
                position_ids[row, here] = np.arange(length)
                num_bytes[row, here] = tokens["num_bytes"]
                at += length
        arrays = (input_ids, labels, position_ids, np.asarray(indices, dtype=np.int64), num_bytes)
        return Batch(*(torch.from_numpy(array) for array in arrays))

    def origins(self, index: int) -> list[str]:
        """Where the documents of a sequence stand in their source."""
        return [self.rows.origin(document) for document, _, _ in self._pieces(index)]

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        """The first `length` tokens of up to `count` documents, evenly spread over all that are longer."""
        documents = np.unique(self.plan.document)
        documents = documents[self.rows.lengths[documents] > length]
        chosen = documents[np.arange(min(count, len(documents))) * len(documents) // max(1, count)]
        return [self.rows.read(i, 0, length)["input_ids"].tolist() for i in chosen.tolist()]

    def fullest(self, count: int) -> list[tuple[int, int]]:
        """The sequences with the most tokens to predict: (tokens, index)."""
        chosen = np.argsort(-self.supervised, kind="stable")[:count]
        return list(zip(self.supervised[chosen].tolist(), chosen.tolist(), strict=True))

    def order(self, seed: int) -> ShuffledEpochs:
        """The k-th draw of training: epochs in shuffled order."""
        return ShuffledEpochs(len(self), seed)

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        plan, pieces = self.plan, slice(self.plan.offset[index], self.plan.offset[index + 1])
        return list(zip(plan.document[pieces].tolist(), plan.start[pieces].tolist(), plan.length[pieces].tolist(), strict=True))
