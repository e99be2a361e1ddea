"""What a teacher says about a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models.head import OutputHead


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution at every supervised position, kept as hidden states.

    Hidden states are smaller than logits by vocab / hidden, and the logits of any rows are made from them on demand, exactly.

    Attributes:
        hidden: `(supervised, hidden)`, the input of the teacher's output head; no gradient.
        head: The teacher's output head.
    """

    hidden: Tensor
    head: OutputHead

    def logits(self) -> Tensor:
        """`(supervised, vocab)`, before temperature."""
        return self.head.logits(self.hidden)
