"""A causal LM cut into its trunk and its output head, so that only supervised positions reach the vocabulary.

With a vocabulary of 128k entries and prompts in the batch, most of the time and memory of a naive step goes into logits that
nobody looks at. Axes: B batch, S sequence, N supervised positions of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from math import isfinite
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..errors import ModelError
from ..losses.linear import Scratch, is_plain, matmul_dtype, project
from ..losses.reduction import at_least_float32, loss_mask


class OutputHead:
    """Everything a model does between its last hidden state and its logits: head, bias, scaling, soft-capping.

    Args:
        module: The output embedding; called, not copied, so that tied, quantised or adapted heads stay what they are.
        scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: Bound c of c · tanh(logits / c) (Gemma 2), or None.
    """

    def __init__(self, module: nn.Module, scale: float = 1.0, softcap: float | None = None) -> None:
        self.module, self.scale, self.softcap = module, scale, softcap

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead:
        """The head of `model`, from its configuration.

        Raises:
            ModelError: the model has no output embedding.
        """
        config = model.config.get_text_config()
        module = model.get_output_embeddings()
        if module is None:
            raise ModelError(type(model).__name__, "has no output head", "Use a causal language model.")
        scale = getattr(config, "logit_scale", None) or 1.0
        scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(module, scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor) -> Tensor:
        """`(…, hidden)` -> `(…, vocab)`: the model's own logits."""
        return self.adjust(self.module(hidden))

    def adjust(self, logits: Tensor) -> Tensor:
        """What follows the matrix product: scaling and soft-capping."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def adjust_(self, logits: Tensor) -> Tensor:
        """The same in the place of logits that nobody else has and no gradient goes through: a chunk of them is large."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    @torch.no_grad()
    def wide_logits(self, hidden: Tensor, vocab_size: int | None, scratch: Scratch) -> Tensor:
        """The logits summed in float32 or wider, whatever the head is stored in; no gradient.

        Args:
            hidden: `(n, hidden)`.
            vocab_size: Columns beyond it are left out; None: none are.
            scratch: What they may lie in, until the next call with it.

        Returns:
            `(n, vocab)`.
        """
        if not is_plain(self.module):
            return self.adjust(at_least_float32(self.module(hidden)[:, :vocab_size]))
        weight, bias = self.module.weight[:vocab_size], self.module.bias
        dtype = matmul_dtype(hidden, weight)
        return self.adjust_(project(hidden.to(dtype), weight.to(dtype), None if bias is None else bias[:vocab_size], scratch))


def output_head(student: nn.Module) -> OutputHead:
    """The head of a `LanguageModel`, also of one that is wrapped for several processes."""
    inner = getattr(student, "module", student)
    assert isinstance(inner, LanguageModel)
    return inner.head


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding: at least the tokens, often padded beyond them."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


class LanguageModel(nn.Module):
    """A causal LM that answers a batch with hidden states or logits at its supervised positions only.

    It is the module that training wraps (DDP, FSDP): whatever the loss needs comes out of its `forward`, so that gradients are
    reduced over processes.

    Args:
        model: Any causal LM of transformers whose logits are its head applied to its trunk's last hidden state.
        where: The setting to name in errors.

    Raises:
        ModelError: trunk and head together do not give the model's own logits.
    """

    def __init__(self, model: PreTrainedModel, where: str = "student.path") -> None:
        super().__init__()
        self.model = model
        self.head = OutputHead.of(model)
        self.projections = nn.ModuleDict()  # what the matching of hidden states learns besides; not part of the model
        self._check_head(where)

    def hidden(self, batch: Batch) -> Tensor:
        """The head's input at the supervised positions: `(supervised, hidden)`, in row-major order."""
        trunk = self.model.base_model
        hidden = trunk(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state  # (B, S, H)
        return hidden[loss_mask(batch.labels)]  # (N, H)

    def forward(self, batch: Batch) -> Tensor:
        """As `hidden`: what training wraps and calls."""
        return self.hidden(batch)

    def logits(self, batch: Batch) -> Tensor:
        """The logits that predict the supervised tokens: `(supervised, vocab)`."""
        return self.head.logits(self.hidden(batch))

    @torch.no_grad()
    def _check_head(self, where: str) -> None:
        """Compare with the model's own logits on a few tokens: an unknown scaling must be refused, not trained against.

        Those of random weights are too small for soft-capping to show, which would be missed here and matter later; so they are
        compared once more with the head's outputs amplified to a hundred.
        """
        name = type(self.model).__name__
        if self.model.base_model is self.model:
            raise ModelError(where, f"{name} does not keep its trunk apart from its head", "Use another architecture.")
        largest, plain = self._difference(gain=1.0)
        if not isfinite(largest):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ModelError(
                where,
                f"{name} gives logits that are not finite in {dtype}",
                "Load it in float32; else its weights are damaged: download it again.",
            )
        _, amplified = self._difference(gain=max(1.0, 100.0 / max(largest, 1e-4)))
        worst = max(plain, amplified)
        if not worst < 0.02:  # half precision rounds by less
            what = f"{name} changes its logits in a way that is not known here (worst relative difference {worst:.3g})"
            raise ModelError(where, what, "Use another architecture.")

    def _difference(self, gain: float) -> tuple[float, float]:
        """The model's largest own logit, and the largest difference of ours to them relative to it."""
        device, training = next(self.model.parameters()).device, self.model.training
        vocab = self.model.config.get_text_config().vocab_size
        ids = (torch.arange(8, device=device) * 7919 % vocab).unsqueeze(0)
        amplifier = self.head.module.register_forward_hook(lambda module, inputs, logits: logits * gain)
        self.model.eval()
        try:
            own = self.model(input_ids=ids, use_cache=False).logits.float()
            ours = self.head.logits(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        finally:
            self.model.train(training)
            amplifier.remove()
        largest = own.abs().max().item()
        return largest, (own - ours).abs().max().item() / max(largest, 1e-12)
