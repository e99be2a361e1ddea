"""What flows through a training step."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """Token sequences with their supervision, the same for teacher and student.

    Documents that share a row of `input_ids` are kept apart by `position_ids` alone: they restart at 0 with each document, and
    transformers builds the block-diagonal causal mask from the restarts. Padding sits on the right, and every padding position
    has position 0, so that it attends to itself only. There is therefore no attention mask to pass around, and none to get wrong.

    Attributes:
        input_ids: `(batch, seq)` int64.
        labels: `(batch, seq)` int64, unshifted; `IGNORE_INDEX` where nothing is supervised (prompt, padding, the first token
            of a document).
        position_ids: `(batch, seq)` int64.
        row_ids: `(batch,)` int64, the stable number of each sequence in the prepared data, whatever the batch size, shuffle or
            number of processes.
        num_bytes: `(batch, seq)` int64, the bytes of UTF-8 text that each token stands for (0 for special tokens and padding),
            so that bits per byte can be measured.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    row_ids: Tensor
    num_bytes: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    @classmethod
    def concatenate(cls, batches: list[Batch]) -> Batch:
        """Several batches of the same sequence length as one."""
        return cls(**{f.name: torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(cls)})

    def row(self, i: int) -> Batch:
        """Row i without its batch axis: fields of shape `(seq,)`."""
        return Batch(**{f.name: getattr(self, f.name)[i] for f in fields(self)})

    def split_rows(self) -> list[Batch]:
        """Each row as a batch of one."""
        return [Batch(**{f.name: getattr(self, f.name)[i : i + 1] for f in fields(self)}) for i in range(len(self))]

    def __len__(self) -> int:
        return self.input_ids.shape[0]
