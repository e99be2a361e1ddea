"""Build the student: from scratch, from the teacher's own layers, or from a folder."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..config import StudentConfig
from ..errors import ConfigError
from ..models.loading import load_causal_lm, one_line
from .initialise import from_teacher_layers

VOCABULARY_MULTIPLE = 64  # matrix kernels like round sizes; the padding rows get no probability


def build_student(
    config: StudentConfig, *, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int
) -> PreTrainedModel:
    """The student in float32.

    Args:
        config: Kind and sizes.
        teacher: Gives layers, or the size of the embedding; None when there is none.
        tokenizer: Shared by teacher and student.
        seq_len: Longest training sequence, tokens.
        seed: Decides the weights of a student from scratch, alone: the global random state is neither used nor changed.

    Raises:
        ConfigError: the student's positions are fewer than `seq_len`, or its attention cannot be had.
    """
    if config.kind == "from_teacher":
        assert teacher is not None
        student = from_teacher_layers(teacher, config.num_layers)
    elif config.kind == "hf":
        assert config.path is not None
        student = load_causal_lm(
            config.path,
            revision=config.revision,
            dtype="float32",
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            where="student.path",
        )
    else:
        student = from_scratch(config, teacher, tokenizer, seq_len, seed)
    if config.attn_implementation is not None:
        _set_attention(student, config.attn_implementation)
    positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise ConfigError("data.seq_len", f"got {seq_len}, and the student has {positions} positions", "Shorten data.seq_len.")
    return student


def _set_attention(student: PreTrainedModel, name: str) -> None:
    try:
        student.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ConfigError("student.attn_implementation", f"'{name}' cannot be had for {type(student).__name__} ({one_line(error)})", "sdpa or eager need nothing.") from error


def from_scratch(
    config: StudentConfig, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights and the tokenizer's vocabulary."""
    sizes = config
    assert sizes.hidden_size and sizes.num_layers and sizes.num_heads and sizes.intermediate_size
    teacher_positions = getattr(teacher.config.get_text_config(), "max_position_embeddings", 0) if teacher is not None else 0
    rows: int = cast(nn.Embedding, teacher.get_input_embeddings()).weight.shape[0] if teacher is not None else 0
    llama = LlamaConfig(
        vocab_size=max(rows, -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if teacher is None else len(tokenizer)),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads or sizes.num_heads,
        head_dim=sizes.hidden_size // sizes.num_heads,
        max_position_embeddings=sizes.max_positions or max(teacher_positions, seq_len),
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        attention_dropout=sizes.dropout,
        initializer_range=sizes.initializer_range,
        tie_word_embeddings=sizes.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng([]):  # a model is made on the CPU: the generators of accelerators stay untouched
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(llama)
