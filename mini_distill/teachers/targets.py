"""What a teacher says about a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from ..losses.linear import Scratch, TeacherRows
from ..models.head import OutputHead


class Teacher(Protocol):
    """Where the signal comes from: `OnlineTeacher`, `CachedTeacher`, `ServerTeacher`."""

    def __call__(self, batch: Batch) -> TeacherRows:
        """The targets at the supervised positions of `batch`, in row-major order."""
        ...


@dataclass
class DenseTargets:
    """The teacher's whole distribution at every supervised position, kept as hidden states.

    Hidden states are smaller than logits by vocab / hidden, and the logits of any rows are made from them on demand, exactly.

    Attributes:
        hidden: `(supervised, hidden)`, the input of the teacher's output head; no gradient.
        head: The teacher's output head.
        device: Where the logits are wanted: that of the student.
        scratch: Where they lie.
    """

    hidden: Tensor
    head: OutputHead
    device: torch.device
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def rows(self, rows: slice, vocab_size: int | None = None) -> Tensor:
        """Some rows' logits `(n, vocab)` before temperature, in float32 or wider; valid until the next call with the same scratch.

        Args:
            rows: Which of the supervised positions.
            vocab_size: Leave out the columns beyond it, which only pad the embedding.
        """
        return self.head.wide_logits(self.hidden[rows], vocab_size, self.scratch).to(self.device)

    def logits(self) -> Tensor:
        """`(supervised, vocab)`: those of all rows at once."""
        return self.head.logits(self.hidden).to(self.device)
