"""Two models have the same fingerprint only if every bit of every weight is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mini_distill.models.identity import weights_fingerprint

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def one_matrix(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("weight", weight)
    return module


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_same_weights_have_the_same_fingerprint(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    assert weights_fingerprint(tiny_llama()) == weights_fingerprint(tiny_llama()) != weights_fingerprint(tiny_llama(seed=1))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_flipped_bit_shows(dtype: torch.dtype) -> None:
    original = weights_fingerprint(one_matrix(weight(dtype)))
    for position in (0, 1, 6, 15):
        for bit in range(8 * weight(dtype).element_size()):
            flipped = weight(dtype).view(INTEGERS[dtype]).flatten()
            flipped[position] ^= torch.tensor(1).bitwise_left_shift(bit).to(INTEGERS[dtype])
            assert weights_fingerprint(one_matrix(flipped.view(dtype).view(4, 4))) != original, (position, bit)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[[1, 0, 2, 3]],
        lambda w: w[:, [1, 0, 2, 3]],
        lambda w: w[[3, 2, 1, 0]],
        lambda w: w.T.contiguous(),
        lambda w: w.reshape(2, 8),
        lambda w: w.double(),
        lambda w: w.view(torch.int32),
    ],
    ids=["rows swapped", "columns swapped", "rows reversed", "transposed", "other shape", "other dtype", "same bits, other dtype"],
)
def test_a_rearrangement_shows(change: Callable[[Tensor], Tensor]) -> None:
    """An embedding whose rows are permuted is another teacher; a sum of rows does not see it."""
    assert weights_fingerprint(one_matrix(change(weight()))) != weights_fingerprint(one_matrix(weight()))


def test_minus_zero_and_nan_have_bits_too() -> None:
    prints = {weights_fingerprint(one_matrix(torch.tensor([value]))) for value in (0.0, -0.0, float("nan"), float("inf"))}
    assert len(prints) == 4


def test_names_matter(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    assert weights_fingerprint(model) != weights_fingerprint(nn.ModuleDict({"inner": model}))


def test_memory_layout_mode_and_gradients_do_not_matter(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    expected = weights_fingerprint(model)
    model.train()(torch.arange(6)[None]).logits.sum().backward()
    assert weights_fingerprint(model) == expected
    assert weights_fingerprint(one_matrix(weight().T.contiguous().T)) == weights_fingerprint(one_matrix(weight()))


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.zeros(0, 4), torch.tensor([True, False]), torch.tensor([-1, 2])])
def test_scalars_empty_tensors_and_integers_have_fingerprints(value: Tensor) -> None:
    assert weights_fingerprint(one_matrix(value)) != weights_fingerprint(one_matrix(torch.tensor(4.0)))
