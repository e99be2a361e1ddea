"""What a model is, as a short text that two runs can compare."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..imported_code import module_fingerprint

CHUNK = 2**22
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")
"""Settings of a model that say where it came from, or what its class and its weights say themselves."""


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """`weights`, `dtype` and `config`, which together decide what the model computes; plain JSON values."""
    return {
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": architecture(model),
    }


def architecture(model: PreTrainedModel) -> dict[str, Any]:
    """What the model computes with besides its weights: its class, and the settings of its config.json.

    An epsilon, an activation or the base of the rotary positions changes every logit and no weight. Where the class comes from the
    model's own repository (`trust_remote_code`), the source of its module counts too.
    """
    kind = type(model)
    code = {"code": module_fingerprint(kind.__module__)} if kind.__module__.startswith("transformers_modules.") else {}
    return {"class": kind.__name__, **code, **_computed_with(json.loads(model.config.to_json_string()))}


def _computed_with(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {key: _computed_with(value) for key, value in settings.items() if key not in NOT_COMPUTED_WITH}


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
