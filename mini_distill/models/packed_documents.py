"""Whether a model reads packed documents as if each stood alone."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError


def check_documents_kept_apart(model: PreTrainedModel | None, where: str) -> None:
    """Refuse a model that lets a packed document see the one before it, which transformers does not say.

    Batches mark where a document begins by positions that start again at 0, and nothing else. Most architectures make their
    attention mask from them; some do not (GPT-OSS, OPT, Falcon), and recurrence or ALiBi cannot. A few tokens tell: the hidden
    states of a document that follows another have to be those that it has alone.

    Args:
        model: Stays in its mode and on its device; None: nothing to check.
        where: The setting to name in the error.

    Raises:
        ModelError: the document before changes the hidden states.
    """
    if model is None:
        return
    training = model.training
    model.eval()
    try:
        difference, rounding = _influence(model)
    finally:
        model.train(training)
    name = type(model).__name__
    if not isfinite(difference):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(where, f"{name} gives hidden states that are not finite in {dtype}", "Load it in float32.")
    if not difference < rounding:
        what = f"{name} lets a packed document see the one before it (relative difference {difference:.2g}, expected below {rounding})"
        raise ModelError(where, what, "Set data.packing=false, or use another architecture.")


@torch.no_grad()
def _influence(model: PreTrainedModel, first: int = 8, second: int = 5) -> tuple[float, float]:
    """How much a document of `first` tokens changes the hidden states of the `second` that follow it, and how much may be rounding.

    The median over tokens: rounding can send one of them to other experts.
    """
    vocab, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.arange(first + second, device=device) * 7919 % vocab
    alone = torch.arange(second, device=device)
    packed = torch.cat([torch.arange(first, device=device), alone])

    def hidden(ids: Tensor, positions: Tensor) -> Tensor:
        output = model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        return output.last_hidden_state[0, -second:]  # (second, hidden)

    expected = hidden(ids[first:], alone)
    change = (hidden(ids, packed) - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    return change.median().item(), 1e-3 if expected.dtype == torch.float32 else 0.05
