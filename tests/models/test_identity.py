"""Two models have the same fingerprint only if every bit of every weight, and all else that they compute with, is the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mini_distill.models.identity import architecture, weights_fingerprint

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


# ---------------------------------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize(
    "settings", [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}]
)
def test_what_a_model_computes_with_besides_its_weights_shows(
    settings: dict[str, Any], tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    """An epsilon changes every logit and no weight."""
    one, other = tiny_llama(), tiny_llama(**settings)
    assert weights_fingerprint(one) == weights_fingerprint(other)
    assert architecture(one) == architecture(tiny_llama()) != architecture(other)


def test_where_a_model_came_from_does_not_show(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    loaded.config.auto_map = {"AutoModel": "org/name--modeling.Own"}
    loaded.config.transformers_version = "5.0.0"
    assert architecture(loaded) == architecture(tiny_llama())
    assert json.loads(json.dumps(architecture(loaded))) == architecture(loaded)


def test_code_of_a_models_own_repository_shows(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in (1, 2):
        (tmp_path / f"own_{number}.py").write_text(
            f"from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM): scale = {number}\n"
        )
        spec = importlib.util.spec_from_file_location("transformers_modules.own", tmp_path / f"own_{number}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "transformers_modules.own", module)
        spec.loader.exec_module(module)
        found.append(architecture(module.Own(tiny_llama().config)))
    assert found[0].keys() == found[1].keys() and [name for name in found[0] if found[0][name] != found[1][name]] == ["code"]
