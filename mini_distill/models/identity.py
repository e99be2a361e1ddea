"""What a model is, as a short text that two runs can compare."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's and buffer's name, shape, dtype and sum of bit patterns.

    One changed bit in one weight changes it; it costs one pass over memory instead of hashing gigabytes of files.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        bits = tensor.detach().contiguous().view(_INTEGER_OF_SIZE[tensor.element_size()]).to(torch.int64)
        weights = torch.arange(1, bits.shape[-1] + 1, device=bits.device) if bits.dim() else 1  # so that swapped columns differ
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {(bits * weights).sum().item()}\n".encode())
    return digest.hexdigest()


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
