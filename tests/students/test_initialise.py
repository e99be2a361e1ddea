"""Students made of their teacher's own layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mini_distill.errors import ConfigError, ModelError
from mini_distill.students.initialise import evenly_spaced, from_teacher_layers

Build = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize(
    ("num_layers", "of", "kept"),
    [(1, 1, [0]), (1, 12, [0]), (2, 12, [0, 11]), (3, 12, [0, 6, 11]), (6, 12, [0, 2, 4, 7, 9, 11]), (4, 4, [0, 1, 2, 3])],
)
def test_layers_are_kept_from_the_first_to_the_last(num_layers: int, of: int, kept: list[int]) -> None:
    assert evenly_spaced(num_layers, of) == kept


def test_any_number_of_layers_is_distinct_and_in_order() -> None:
    for of in range(2, 41):
        for num_layers in range(2, of + 1):
            kept = evenly_spaced(num_layers, of)
            gaps = [b - a for a, b in pairwise(kept)]
            assert (kept[0], kept[-1], len(kept)) == (0, of - 1, num_layers)
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_the_kept_blocks_are_the_teachers_in_their_order(tiny_llama: Build) -> None:
    teacher = tiny_llama(num_hidden_layers=12)
    student = from_teacher_layers(teacher, 3)
    for block, original in zip(student.model.layers, [teacher.model.layers[i] for i in (0, 6, 11)], strict=True):
        for (name, weight), theirs in zip(block.named_parameters(), original.parameters(), strict=True):
            assert torch.equal(weight, theirs), name
    for part in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(student.get_parameter(part), teacher.get_parameter(part))


def test_the_student_has_its_own_storage_and_learns_without_its_teacher(tiny_llama: Build) -> None:
    teacher = tiny_llama().requires_grad_(False)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student = from_teacher_layers(teacher, 2)
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == 2


def test_a_teacher_in_bfloat16_gives_a_student_in_float32(tiny_llama: Build) -> None:
    teacher = tiny_llama().to(torch.bfloat16)
    student = from_teacher_layers(teacher, 1)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight.float())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_tied_embeddings_stay_tied(tiny_llama: Build) -> None:
    student = from_teacher_layers(tiny_llama(tie_word_embeddings=True), 1)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_quarter_of_the_layers_is_kept_by_default(tiny_llama: Build) -> None:
    assert from_teacher_layers(tiny_llama(num_hidden_layers=12), None).config.num_hidden_layers == 3
    assert from_teacher_layers(tiny_llama(num_hidden_layers=2), None).config.num_hidden_layers == 1


def test_more_layers_than_the_teacher_has_are_refused(tiny_llama: Build) -> None:
    with pytest.raises(ConfigError, match=r"student\.num_layers: got 3, and the teacher has 2"):
        from_teacher_layers(tiny_llama(), 3)


def test_several_end_tokens_are_no_list_of_layers(tiny_llama: Build) -> None:
    """A two-layer teacher with two end tokens: the list is as long as the teacher is deep, and must stay whole."""
    student = from_teacher_layers(tiny_llama(eos_token_id=[2, 3]), 1)
    assert student.config.eos_token_id == [2, 3]
    assert student.generation_config.eos_token_id == [2, 3]


def test_a_model_with_two_lists_of_blocks_is_refused(tiny_llama: Build) -> None:
    teacher = tiny_llama()
    teacher.model.others = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ModelError, match=r"student\.kind: cannot tell which list of LlamaForCausalLM holds its 2 blocks"):
        from_teacher_layers(teacher, 1)


def test_blocks_of_two_kinds_that_change_places_are_refused() -> None:
    """In Qwen3-MoE `mlp_only_layers` lists the dense blocks by number: block 3 would come into the place of a dense block 1."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    teacher = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, num_hidden_layers=4, mlp_only_layers=[1], **sizes, **experts))
    with pytest.raises(ModelError) as caught:
        from_teacher_layers(teacher, 2)
    line = str(caught.value)
    assert (
        line.startswith("student.num_layers: blocks 0, 3 of Qwen3MoeForCausalLM do not fit") and "\n" not in line and "Keep all 4" in line
    )
    assert from_teacher_layers(teacher, 4).config.num_hidden_layers == 4
