"""Checks of the models on the user's own rows: the loss against its definition, the shift, the mask, accumulation, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.batch import Batch
from ..data.tokenizers import vocabulary_size
from ..losses.objective import Objective
from ..losses.reduction import IGNORE_INDEX, loss_mask, supervised_targets
from ..models.head import LanguageModel, embedding_rows
from ..teachers.online import OnlineTeacher
from ..teachers.targets import DenseTargets, Teacher
from .finding import DOUBTFUL, GOOD, Finding, judged
from .rows import unigram_entropy

NOT_ZERO_AT_EQUALITY = ("teacher_argmax_ce", "teacher_sample_ce", "ranking_hinge", "ranking_logistic")
Step = Callable[..., Any]


def check_tokens(models: dict[str, LanguageModel], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Ids, padding columns and the end of a text."""
    size = vocabulary_size(tokenizer)
    for name, model in models.items():
        rows = embedding_rows(model.model)
        padding = f", {rows - size} more columns pad it and get no probability" if rows > size else ""
        yield judged(f"{name}'s embedding", rows >= size, f"{rows:,} rows for {size:,} tokens{padding}", "Use the model's own tokenizer.")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id  # a tokenizer without an end is refused with the rows
    same = " (padding is the same token, and is never learned as padding)" if pad == eos else ""
    yield Finding("end of sequence", GOOD, f"'{tokenizer.decode([eos])}' is token {eos}{same}")
    for name, model in models.items():
        own = model.model.generation_config.eos_token_id if model.model.generation_config is not None else None
        ids = own if isinstance(own, list) else [own]
        if own is not None and eos not in ids:
            measured = f"generation of the {name} stops at {ids}, the tokenizer's end is {eos}"
            yield Finding("generation's end", DOUBTFUL, measured, "Check generation_config.json: texts may not stop, or too early.")


@torch.no_grad()
def check_shift(model: LanguageModel, name: str, batch: Batch) -> Finding:
    """The next token has to be what the logits predict best: not this one, nor the one after."""
    ids, positions = batch.input_ids[:2], batch.position_ids[:2]
    hidden = model.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    learned = batch.labels[:2] != IGNORE_INDEX
    losses = {}
    for shift in (0, 1, 2):
        # the token `shift` ahead, where the next one is learned
        predicts = learned.roll(-1, dims=1)
        predicts[:, max(1, ids.shape[1] - 2) :] = False
        logits = model.head.logits(hidden[predicts][:512]).float()
        targets = ids.roll(-shift, dims=1)[predicts][:512]
        losses[shift] = float(nn.functional.cross_entropy(logits, targets)) if len(targets) else math.nan
    measured = f"{name}: {losses[1]:.2f} nats for the next token, {losses[0]:.2f} for this one, {losses[2]:.2f} for the one after"
    best = losses[1] <= min(losses[0], losses[2]) or math.isnan(losses[1])
    advice = "The model does not predict the next token best here: it is untrained on such text, or not a causal language model."
    return judged("shift", best, measured, advice, DOUBTFUL)


def check_identity(objective: Objective, teacher: OnlineTeacher, batch: Batch, vocab_size: int) -> Iterator[Finding]:
    """A student that equals its teacher has no divergence and no gradient."""
    targets = teacher(batch.to(teacher.device))
    for term in objective.divergences:
        if term.name in NOT_ZERO_AT_EQUALITY:
            continue
        alone = Objective(None, "", kl_weight=0.0, ce_weight=0.0, vocab_size=vocab_size, further=[term])
        hidden = targets.hidden.detach().clone().requires_grad_()
        sums = alone.fused(hidden, targets.head, targets, supervised_targets(batch.labels).to(hidden.device))
        sums.loss.backward()
        assert hidden.grad is not None
        tokens = max(1, len(hidden))
        value, slope = abs(float(sums.loss.detach())) / tokens, float(hidden.grad.abs().max())
        measured = f"{term.name} of the teacher with itself: {value:.1e} nats per token, gradient {slope:.1e} (expected 0)"
        yield judged("identity", value < 1e-4 and slope < 1e-3, measured, "The divergence is not zero at equality: look at its formula.")


def check_fused(objective: Objective, student: LanguageModel, teacher: Teacher | None, batch: Batch) -> Finding:
    """The loss from hidden states, a few tokens at a time, against its definition on whole logits."""
    few = _first_tokens(batch, 256)
    targets = teacher(few) if teacher is not None and objective.needs_teacher else None
    if targets is not None and not isinstance(targets, DenseTargets):
        return Finding("fused loss", GOOD, "not compared: the teacher's targets are no whole distributions")
    labels = supervised_targets(few.labels)
    hidden = student.hidden(few).detach()
    gradients, values = [], []
    for fused in (True, False):
        leaf = hidden.clone().requires_grad_()
        if fused:
            loss = objective.fused(leaf, student.head, targets, labels).loss
        else:
            loss = objective(student.head.logits(leaf), None if targets is None else targets.logits(), labels).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        values.append(float(loss.detach()))
        gradients.append(gradient.float())
    difference = abs(values[0] - values[1]) / max(abs(values[1]), 1e-9)
    slope = float((gradients[0] - gradients[1]).norm() / gradients[1].norm().clamp(min=1e-12))
    half = hidden.dtype != torch.float32
    measured = f"differs from the plain loss by {difference:.1e}, its gradient by {slope:.1e}"
    return judged(
        "fused loss",
        difference < (1e-2 if half else 1e-4) and slope < (5e-2 if half else 1e-3),
        measured,
        "Please report it, with the names of the models.",
    )


def check_mask(student: LanguageModel, teacher: Teacher | None, objective: Objective, batch: Batch, step: Step) -> Finding:
    """What is not learned may hold anything, even no number, and changes nothing."""
    clean = float(step(student, teacher, batch, objective).loss.detach())
    mask = loss_mask(batch.labels)
    trunk = student.model.base_model

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.masked_fill(~mask[..., None], math.nan)
        return output

    handle = trunk.register_forward_hook(spoil)
    try:
        spoilt = float(step(student, teacher, batch, objective).loss.detach())
    finally:
        handle.remove()
    unlearned = 1 - float(mask.float().mean())
    measured = f"{unlearned:.1%} of the positions made NaN change the loss by {abs(spoilt - clean):.1e}"
    return judged("mask", spoilt == clean, measured, "Positions that are not learned reach the loss: please report it.")


def check_accumulation(student: LanguageModel, teacher: Teacher | None, objective: Objective, batch: Batch, step: Step) -> Finding:
    """One pass over n sequences and n passes over one have the same gradient."""
    whole = _gradient(student, lambda: [step(student, teacher, batch, objective).loss])
    parts = _gradient(student, lambda: [step(student, teacher, row, objective).loss for row in batch.split_rows()])
    error = float((whole - parts).norm() / whole.norm().clamp(min=1e-12))
    measured = f"one pass of {len(batch)} and {len(batch)} of one differ by {error:.1e} of the gradient"
    return judged(
        "accumulation",
        error < 1e-3,
        measured,
        "The gradient depends on how a batch is cut: a layer mixes rows (batch norm?), or drops at random.",
    )


def check_precision(
    student: LanguageModel,
    teacher: Teacher | None,
    objective: Objective,
    batch: Batch,
    step: Step,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Finding:
    """What mixed precision does to the gradient of the first step."""
    exact = _gradient(student, lambda: [step(student, teacher, batch, objective).loss])
    with autocast():
        mixed = _gradient(student, lambda: [step(student, teacher, batch, objective).loss])
    error = float((mixed - exact).norm() / exact.norm().clamp(min=1e-12))
    advice = "Train with trainer.precision=fp32, or look for layers that overflow."
    return judged("precision", error < 0.1, f"bf16 moves the gradient by {error:.1%}", advice, DOUBTFUL)


@torch.no_grad()
def check_quality(models: dict[str, LanguageModel], batches: list[Batch], vocab_size: int) -> Iterator[Finding]:
    """The teacher has to know more of this text than how often each token is there."""
    unigram, uniform = unigram_entropy(batches, vocab_size), math.log(vocab_size)
    for name, model in models.items():
        losses = [
            nn.functional.cross_entropy(model.logits(batch)[:, :vocab_size].float(), supervised_targets(batch.labels), reduction="sum")
            for batch in batches
        ]
        nll = float(sum(losses)) / max(1, sum(int(loss_mask(batch.labels).sum()) for batch in batches))
        measured = f"{nll:.2f} nats per token; token counts alone {unigram:.2f}, guessing {uniform:.2f}"
        if name == "teacher":
            advice = "The teacher knows nothing of this text: wrong tokenizer, template, language, or a damaged model."
            yield judged("teacher on the data", nll < unigram, measured, advice)
        else:
            yield Finding("student before", GOOD, measured)


def _gradient(student: LanguageModel, losses: Callable[[], list[Tensor]]) -> Tensor:
    parameters = [p for p in student.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    for loss in losses():
        loss.backward()
    flat = torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return flat


def _first_tokens(batch: Batch, count: int) -> Batch:
    """The same with no more than `count` supervised tokens."""
    labels = batch.labels.clone()
    places = (labels != IGNORE_INDEX).nonzero()[count:]
    labels[places[:, 0], places[:, 1]] = IGNORE_INDEX
    return Batch(batch.input_ids, labels, batch.position_ids, batch.row_ids, batch.num_bytes)
