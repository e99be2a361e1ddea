"""A teacher that runs beside the student."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..losses.linear import Scratch
from ..models.head import LanguageModel
from .targets import DenseTargets


class OnlineTeacher:
    """A causal LM that is asked for its distribution on every batch.

    It is deliberately not an `nn.Module`: nothing that walks the student's modules can put it into train mode, move its weights
    into the optimizer or save it with the student. It stays in eval mode and requires no gradient.

    Args:
        model: The teacher.
        where: The setting to name in errors.
    """

    def __init__(self, model: PreTrainedModel, where: str = "teacher.path") -> None:
        self.model = model.eval().requires_grad_(False)
        self.language_model = LanguageModel(model, where).eval()
        self._scratch = Scratch()

    @property
    def device(self) -> torch.device:
        """Where its weights are; may differ from the student's device."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, batch: Batch) -> DenseTargets:
        """The teacher's targets at the supervised positions of `batch`; their logits come out on the batch's device."""
        hidden: Tensor = self.language_model.hidden(batch.to(self.device))
        return DenseTargets(hidden, self.language_model.head, batch.labels.device, Scratch.on(self.device, self._scratch))
