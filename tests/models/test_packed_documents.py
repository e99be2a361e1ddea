"""A model either keeps packed documents apart or is refused where they are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from mini_distill.errors import ModelError
from mini_distill.models.packed_documents import check_documents_kept_apart

IDS: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES: dict[str, Any] = {**IDS, "hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GOOD: list[PreTrainedConfig] = [
    LlamaConfig(**HEADS),
    MistralConfig(**HEADS, sliding_window=4),
    MixtralConfig(**HEADS, num_local_experts=2, num_experts_per_tok=1),
    Gemma2Config(**HEADS, sliding_window=4),
    Qwen3Config(**HEADS),
    GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4),
    GPTNeoXConfig(**SIZES, intermediate_size=64, num_attention_heads=4),
]
LEAKING: list[PreTrainedConfig] = [
    GptOssConfig(**HEADS, num_local_experts=2, num_experts_per_tok=1),
    OPTConfig(**SIZES, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=128),
    FalconConfig(**SIZES, num_attention_heads=4),
    BloomConfig(**SIZES, n_head=4, initializer_range=0.2),
    FalconMambaConfig(**SIZES),
]


def build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def name(config: PreTrainedConfig) -> str:
    return config.model_type


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", GOOD, ids=name)
def test_a_model_that_masks_by_positions_passes(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    for attention in ("eager", "sdpa") if config.model_type != "gemma2" else ("eager",):
        model = build(config).to(dtype)
        model.set_attn_implementation(attention)
        check_documents_kept_apart(model, "teacher.path")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", LEAKING, ids=name)
def test_a_model_in_which_documents_see_each_other_is_refused(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """transformers says nothing: attention, recurrence or ALiBi go on over the border."""
    model = build(config).to(dtype)
    with pytest.raises(ModelError) as caught:
        check_documents_kept_apart(model, "teacher.path")
    line = str(caught.value)
    assert line.startswith(f"teacher.path: {type(model).__name__} lets a packed document see") and "data.packing=false" in line


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4), LEAKING[1]], ids=name)
def test_mode_gradients_and_random_state_stay(config: PreTrainedConfig, training: bool) -> None:
    """Both have dropout, which would tell the two readings of a document apart."""
    model = build(config).train(training)
    before = torch.get_rng_state()
    try:
        check_documents_kept_apart(model, "teacher.path")
    except ModelError:
        assert config.model_type == "opt"
    assert all(module.training is training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())


def test_no_teacher_is_nothing_to_check() -> None:
    check_documents_kept_apart(None, "teacher.path")


def test_a_run_packs_only_for_models_that_keep_documents_apart(
    tiny_command: list[str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """An OPT teacher saw the document before, its student too, and the metrics looked fine."""
    build(LEAKING[1]).save_pretrained(tmp_path / "opt")
    tiny_tokenizer.save_pretrained(tmp_path / "opt")
    command = [*tiny_command, f"teacher.path={tmp_path / 'opt'}", "trainer.max_steps=2"]
    with pytest.raises(ModelError, match=r"teacher\.path: OPTForCausalLM lets a packed document see .* data\.packing=false") as caught:
        run(command, tmp_path / "packed", "data.packing=true")
    assert caught.value.exit_code == 4
    assert json.loads((tmp_path / "packed" / "status.json").read_text())["exit_code"] == 4
    run(command, tmp_path / "alone", "data.packing=false")


def test_a_student_that_lets_documents_see_each_other_is_refused_too(
    tiny_command: list[str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    build(LEAKING[1]).save_pretrained(tmp_path / "opt")
    tiny_tokenizer.save_pretrained(tmp_path / "opt")
    command = [word for word in tiny_command if not word.startswith("student.")]
    with pytest.raises(ModelError, match=r"student\.path: OPTForCausalLM lets a packed document see"):
        run([*command, "student=hf", f"student.path={tmp_path / 'opt'}"], tmp_path / "run")
