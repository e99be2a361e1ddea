"""A GPU's rounding, on a CPU: what can be said of the gradients' error where there is no GPU.

    with emulated_gpu(autocast=torch.bfloat16):
        loss = objective.fused(hidden, head, teacher, targets).loss

The branches that `mini_distill/losses/linear.py` takes on a GPU are taken: factors are rounded as there, the gradient of the logits among
them, and their products summed in float32 (in another order than tensor cores do).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from mini_distill.losses import linear


@contextmanager
def emulated_gpu(autocast: torch.dtype | None = None) -> Iterator[None]:
    """Within, `linear.py` computes as on a GPU.

    Args:
        autocast: What autocast rounds factors to; None: no autocast.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", autocast is not None)
    torch.set_autocast_dtype("cuda", autocast or before[1])
    try:
        with patch.object(linear, "on_gpu", lambda tensor: True), patch.object(linear, "narrow_product", _exact_product):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _exact_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two bfloat16 is exact in float32."""
    return torch.mm(left.float(), right.float(), out=out)
