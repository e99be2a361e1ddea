"""Seeds and the states of the random number generators: Python's, NumPy's and torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed all generators. Ranks draw different numbers (dropout); give every rank the same `rank` for weights they must share."""
    _seed(seed, rank, 0, 1)  # no step's: to SeedSequence a missing part is a 0, so a step's fourth part is 0


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed all generators for one optimizer step, so that its numbers depend on seed, step and rank, not on what came before.

    A run that goes on from a checkpoint then draws what the uninterrupted run drew, with no state to keep.
    """
    _seed(seed, rank, step)


def _seed(*parts: int) -> None:
    mixed = np.random.SeedSequence(parts)  # sums such as seed + rank would let rank 1 of seed 0 repeat rank 0 of seed 1
    words = [int(word) for word in mixed.generate_state(4, np.uint32)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2] << 32 | words[3])  # every device's


def rng_state() -> dict[str, Any]:
    """The state of all generators of this process, as plain JSON values."""
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy_state, "state": {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}},
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go back to a state that `rng_state` gave; CUDA devices that are not here are passed over."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": key, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(_from_hex(state["torch"]))
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(_from_hex(saved), device)


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
