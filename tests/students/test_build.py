"""Students from scratch, from the teacher and from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mini_distill.config import StudentConfig
from mini_distill.errors import ConfigError, ModelError
from mini_distill.students.build import VOCABULARY_MULTIPLE, build_student

Build = Callable[..., LlamaForCausalLM]
TINY = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24}


@pytest.fixture
def build(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    def student(config: StudentConfig, teacher: PreTrainedModel | None = None, seq_len: int = 16, seed: int = 0) -> PreTrainedModel:
        return build_student(config, teacher=teacher, tokenizer=tiny_tokenizer, seq_len=seq_len, seed=seed)

    return student


def scratch(**settings: object) -> StudentConfig:
    return StudentConfig(kind="scratch", **(TINY | settings))  # type: ignore[arg-type]


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_seed_alone_decides_the_weights(build: Callable[..., PreTrainedModel]) -> None:
    first = build(scratch(), seed=5)
    torch.rand(3)  # another global state
    assert same(first, build(scratch(), seed=5))
    assert not same(first, build(scratch(), seed=6))


@pytest.mark.parametrize("config", [scratch(), StudentConfig(kind="from_teacher", num_layers=1)], ids=lambda config: config.kind)
def test_the_global_random_state_is_untouched(build: Callable[..., PreTrainedModel], tiny_llama: Build, config: StudentConfig) -> None:
    teacher = tiny_llama()
    before = torch.get_rng_state()
    build(config, teacher)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_student_from_scratch_has_the_sizes_asked_for(
    build: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = build(scratch(rope_theta=500.0, dropout=0.25, max_positions=48, initializer_range=0.3)).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (16, 2, 24)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.rope_parameters["rope_theta"] == 500.0
    assert (config.attention_dropout, config.max_position_embeddings, config.initializer_range) == (0.25, 48, 0.3)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    assert len(tiny_tokenizer) <= config.vocab_size and config.vocab_size % VOCABULARY_MULTIPLE == 0


def test_without_kv_heads_every_head_has_its_own(build: Callable[..., PreTrainedModel]) -> None:
    assert build(scratch(num_kv_heads=None)).config.num_key_value_heads == 2


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_one_matrix_when_tied(build: Callable[..., PreTrainedModel], tied: bool) -> None:
    model = build(scratch(tie_embeddings=tied))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_student_takes_the_vocabulary_of_its_teacher(build: Callable[..., PreTrainedModel], tiny_llama: Build) -> None:
    """A teacher whose rows are padded for speed: the student's logits must have as many, or no divergence can be taken."""
    assert build(scratch(), tiny_llama(vocab=80)).config.vocab_size == 80


def test_positions_are_the_teachers_and_at_least_the_training_sequence(build: Callable[..., PreTrainedModel], tiny_llama: Build) -> None:
    assert build(scratch(), tiny_llama(max_position_embeddings=128), seq_len=16).config.max_position_embeddings == 128
    assert build(scratch(), tiny_llama(max_position_embeddings=128), seq_len=256).config.max_position_embeddings == 256
    assert build(scratch(), seq_len=33).config.max_position_embeddings == 33


def test_too_few_positions_are_refused(build: Callable[..., PreTrainedModel], tiny_llama: Build) -> None:
    build(scratch(max_positions=16), seq_len=16)
    with pytest.raises(ConfigError, match=r"data\.seq_len: got 17, and the student has 16 positions"):
        build(scratch(max_positions=16), seq_len=17)
    with pytest.raises(ConfigError, match=r"data\.seq_len: got 129, and the student has 128 positions"):
        build(StudentConfig(kind="from_teacher"), tiny_llama(), seq_len=129)


def test_positions_that_go_by_another_name_are_counted_too(build: Callable[..., PreTrainedModel]) -> None:
    """GPT-2 calls them n_positions, and beyond them its embedding would be read out of bounds."""
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=20))
    with pytest.raises(ConfigError, match="has 20 positions"):
        build(StudentConfig(kind="from_teacher"), teacher, seq_len=21)


def test_a_student_from_a_folder_is_that_model_in_float32(build: Callable[..., PreTrainedModel], tiny_llama: Build, tmp_path: Path) -> None:
    original = tiny_llama(seed=3).to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    student = build(StudentConfig(kind="hf", path=str(tmp_path), attn_implementation="eager"))
    assert same(student, original.float())
    assert student.config._attn_implementation == "eager"


def test_a_student_folder_that_is_wrong_is_named_by_its_own_setting(build: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^student\.path: no config\.json"):
        build(StudentConfig(kind="hf", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["scratch", "from_teacher"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_students_attention_is_the_one_asked_for(
    build: Callable[..., PreTrainedModel], tiny_llama: Build, kind: str, attention: str
) -> None:
    sizes = TINY if kind == "scratch" else {}
    config = StudentConfig(kind=kind, attn_implementation=attention, **sizes)  # type: ignore[arg-type]
    assert build(config, tiny_llama()).config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["scratch", "from_teacher"])
def test_an_attention_that_is_not_there_is_named(build: Callable[..., PreTrainedModel], tiny_llama: Build, kind: str) -> None:
    sizes = TINY if kind == "scratch" else {}
    with pytest.raises(ConfigError, match=r"^student\.attn_implementation: 'lightning' cannot be had") as caught:
        build(StudentConfig(kind=kind, attn_implementation="lightning", **sizes), tiny_llama())  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400


def test_a_student_from_scratch_saves_and_loads_the_same(build: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    student = build(scratch())
    student.save_pretrained(tmp_path)
    assert same(student, LlamaForCausalLM.from_pretrained(tmp_path))
