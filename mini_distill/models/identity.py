"""What a model is, as a short text that two runs can compare."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

CHUNK = 2**22
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's and buffer's name, shape, dtype and a checksum of its bits.

    One changed bit, or two weights that changed places, change it. The checksum is taken where the weights are, in one pass over
    memory, so that a model on an accelerator need not be copied to be hashed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_checksum(tensor)}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Σ bits · (an odd number that differs for every place), modulo 2⁶⁴: odd, so that no single bit can vanish."""
    bits = tensor.detach().contiguous().flatten().view(INTEGER_OF_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        total += (part * (2 * torch.arange(start, start + len(part), device=part.device) + 1)).sum()
    return int(total.item())
