"""Build the student: from scratch, from the teacher's own layers, or from a folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..config import StudentConfig
from ..data.tokenizers import vocabulary_size
from ..errors import ConfigError
from ..models.head import embedding_rows
from ..models.loading import load_causal_lm, one_line
from .initialise import from_teacher_layers

VOCABULARY_MULTIPLE = 64  # matrix kernels like round sizes; the padding rows get no probability


@dataclass(frozen=True)
class TeacherSizes:
    """What a student from scratch takes from a teacher that need not be there.

    Attributes:
        embedding_rows: Of the teacher, padding included, so that the logits line up.
        positions: The longest sequence it can read; 0 when it does not say.
    """

    embedding_rows: int
    positions: int

    @classmethod
    def of(cls, teacher: PreTrainedModel) -> TeacherSizes:
        """Those of a live teacher."""
        return cls(embedding_rows(teacher), getattr(teacher.config.get_text_config(), "max_position_embeddings", 0))


def build_student(
    config: StudentConfig,
    *,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    seed: int,
    sizes: TeacherSizes | None = None,
) -> PreTrainedModel:
    """The student in float32.

    Args:
        config: Kind and config.
        teacher: Gives layers, or the size of the embedding; None when there is none.
        sizes: Those of a teacher that is not there, from its cache.
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
        student = from_scratch(config, TeacherSizes.of(teacher) if teacher is not None else sizes, tokenizer, seq_len, seed)
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
        raise ConfigError(
            "student.attn_implementation",
            f"'{name}' cannot be had for {type(student).__name__} ({one_line(error)})",
            "sdpa or eager need nothing.",
        ) from error


def from_scratch(
    config: StudentConfig, sizes: TeacherSizes | None, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights and the tokenizer's vocabulary."""
    assert config.hidden_size and config.num_layers and config.num_heads and config.intermediate_size
    llama = LlamaConfig(
        vocab_size=sizes.embedding_rows if sizes is not None else _rounded_up(vocabulary_size(tokenizer)),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=config.max_positions or max(sizes.positions if sizes is not None else 0, seq_len),
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta or 10000.0},
        attention_dropout=config.dropout or 0.0,
        initializer_range=config.initializer_range or config.hidden_size**-0.5,  # 0.02 is far too little for narrow models
        tie_word_embeddings=config.tie_embeddings is not False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng([]):  # a model is made on the CPU: the generators of accelerators stay untouched
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(llama)


def _rounded_up(tokens: int) -> int:
    """To what matrix kernels like."""
    return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
