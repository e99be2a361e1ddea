"""An optimizer step on tensors without memory: the bytes that it holds, and its operations."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ..config import Config
from ..errors import ModelError
from ..evaluation.language_model import measure
from ..evaluation.logit_chunks import MAX_CHUNK_LOGITS, MAX_CHUNK_TOKENS
from ..losses.linear import MEMORY_MIB, linear_terms
from ..models.head import OutputHead
from ..models.loading import one_line
from ..teachers.targets import DenseTargets
from ..training.numerics import clip_gradient
from ..training.optimizer import build_optimizer
from .models import Models
from .trace import Trace, without_memory

PHASES = ("teacher", "student", "loss", "backward", "update")
"""Of a micro-batch, but for the last, which follows once a step."""


def trace_step(models: Models, config: Config, batch_size: int, tokens: int, vocab_size: int, on_gpu: bool) -> Trace:
    """Teacher, student, loss, backward pass and update for one micro-batch, as `train.distill_step` and `optimizer_step` go.

    The models end without memory on the CPU, whatever device they were on: they can be traced again.

    Args:
        models: Of the run.
        config: Of the run.
        batch_size: Sequences of the micro-batch, of `data.seq_len` tokens.
        tokens: Supervised tokens among them.
        vocab_size: Tokens of the tokenizer.
        on_gpu: Whether the run is on an accelerator: its budget for logits and its precision.

    Returns:
        The trace, with the phases of PHASES. The terms of the objective are left out of `loss`: their matrix products are in.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in (models.teacher, models.student):
            if model is not None:
                without_memory(model)
        student = models.student.train()
        for parameter in student.parameters():
            parameter.grad = None
        if config.trainer.gradient_checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = build_optimizer(student, config.trainer)
        with Trace() as trace:
            loss = _forward(models, config, batch_size, tokens, vocab_size, on_gpu, trace)
            with trace.phase("backward"):
                loss.backward()
            del loss
            with trace.phase("update"):
                clip_gradient(student, config.trainer.max_grad_norm)
                optimizer.step()
        for parameter in student.parameters():
            parameter.grad = None
    return trace


def trace_evaluation(models: Models, config: Config, tokens: int, vocab_size: int) -> Trace:
    """A batch of held-out text through both models and the metrics, in the phase `evaluation`; see `trace_step`."""
    chunk = min(tokens, MAX_CHUNK_TOKENS, max(1, MAX_CHUNK_LOGITS // vocab_size))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        both = [model for model in (models.student, models.teacher) if model is not None]
        for model in both:
            without_memory(model)
            model.eval()
        positions = torch.zeros(tokens, dtype=torch.long)
        with Trace() as trace:
            with trace.phase("evaluation"):
                hidden = [_hidden(model, config.evaluation.batch_size, config.data.seq_len)[positions] for model in both]
            with trace.phase("evaluation", times=tokens / chunk):
                logits = [OutputHead.of(model).logits(rows[:chunk]) for model, rows in zip(both, hidden, strict=True)]
                measure(logits[0], logits[1] if len(logits) > 1 else None, positions[:chunk], positions[:chunk])
    return trace


def _forward(models: Models, config: Config, batch_size: int, tokens: int, vocab_size: int, on_gpu: bool, trace: Trace) -> Tensor:
    """The loss of a micro-batch, with its graph.

    Of the tokens one chunk goes through the loss, counted as often as there are chunks; the gradient of the others' hidden states
    is made in the backward pass.
    """
    teacher, memory_mib = models.teacher, config.objective.logits_memory_mib or MEMORY_MIB["cuda" if on_gpu else "cpu"]
    chunk = min(tokens, max(1, int(memory_mib * 2**20 / (2 * 4 * vocab_size))))
    chunk = -(-tokens // -(-tokens // chunk))
    positions = torch.zeros(tokens, dtype=torch.long)
    bf16 = config.trainer.precision == "bf16" or (config.trainer.precision == "auto" and on_gpu)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        targets = None
        if teacher is not None and is_asked(config):
            with trace.phase("teacher"), torch.no_grad():
                hidden = _hidden(teacher, batch_size, config.data.seq_len)[positions]
            targets = DenseTargets(hidden[:chunk], OutputHead.of(teacher), torch.device("cpu"))
        with trace.phase("student"):
            hidden = _hidden(models.student, batch_size, config.data.seq_len)[positions]
            hidden = hidden.float() if bf16 else hidden
        with trace.phase("loss", times=tokens / chunk):
            loss, _ = linear_terms(
                hidden[:chunk],
                OutputHead.of(models.student),
                targets,
                positions[:chunk],
                _nothing,
                [1.0],
                vocab_size=vocab_size,
                memory_mib=memory_mib,
            )
    return loss


def is_asked(config: Config) -> bool:
    """Whether the objective looks at a live teacher."""
    wanted = config.objective.kl_weight > 0 or bool(config.objective.terms)
    return wanted and config.teacher.cache_dir is None


def _nothing(student_logits: Tensor, teacher: Any, targets: Tensor) -> Tensor:
    """In place of the terms."""
    return student_logits.sum()[None]


def _hidden(model: PreTrainedModel, batch_size: int, seq_len: int) -> Tensor:
    """`(batch · seq, hidden)`, with the mask that keeps packed documents apart.

    Raises:
        ModelError: what the model computes depends on numbers, or a kernel of its cannot be followed without any.
    """
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    mask = torch.ones(batch_size, 1, seq_len, seq_len, dtype=torch.bool)
    if getattr(model.config, "_attn_implementation", "sdpa") == "eager":
        mask = mask.to(next(model.parameters()).dtype)  # what eager attention adds to the scores
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    silent, logger.disabled = logger.disabled, True  # the error below says it in one line
    try:
        hidden: Tensor = model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    except RuntimeError as error:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        what = f"cannot be followed without its weights in {dtype} ({one_line(error)})"
        raise ModelError(type(model).__name__, what, "Some mixtures of experts can in bfloat16: teacher.dtype=bfloat16.") from error
    finally:
        logger.disabled = silent
    return hidden.flatten(0, 1)
