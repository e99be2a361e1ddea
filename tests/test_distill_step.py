"""What a step computes, judged by gradients: AdamW's loss curves hide errors of scale."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import train_module
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mini_distill.config import Config, DataConfig, TrainerConfig
from mini_distill.data.batch import Batch
from mini_distill.data.prepare import prepare_data
from mini_distill.distillation import Distillation
from mini_distill.losses.divergences import forward_kl, reverse_kl
from mini_distill.losses.objective import Objective
from mini_distill.losses.reduction import IGNORE_INDEX, count_valid_tokens, loss_mask, supervised_targets
from mini_distill.models.head import LanguageModel
from mini_distill.models.identity import weights_fingerprint
from mini_distill.teachers.online import OnlineTeacher

Build = Callable[..., LlamaForCausalLM]
Gradients = dict[str, Tensor]
distill_step = train_module.distill_step

LENGTHS, PROMPTS = [12, 3, 7, 5, 12, 2, 9, 4], [5, 1, 0, 4, 1, 0, 8, 4]  # of the last row nothing is supervised
PAD = 3


@pytest.fixture
def student(tiny_llama: Build) -> LanguageModel:
    return LanguageModel(tiny_llama(seed=0).double()).train()


@pytest.fixture
def teacher(tiny_llama: Build) -> OnlineTeacher:
    return OnlineTeacher(tiny_llama(seed=1).double())


@pytest.fixture
def objective() -> Objective:
    """Every factor of the loss differs from one."""
    return Objective(forward_kl, "forward_kl", temperature=2.0, kl_weight=0.7, ce_weight=0.4)


def documents() -> list[tuple[Tensor, int]]:
    """Eight ragged ones: tokens, and the length of the prompt."""
    draw = torch.Generator().manual_seed(0)
    return [(torch.randint(4, 64, (n,), generator=draw), prompt) for n, prompt in zip(LENGTHS, PROMPTS, strict=True)]


def batch_of(rows: list[list[tuple[Tensor, int]]], seq_len: int = 12, left: int = 0) -> Batch:
    """Each row holds documents one after the other, behind `left` positions of padding, and is padded on the right."""
    ids = torch.full((len(rows), seq_len), PAD)
    labels, positions = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = left
        for tokens, prompt in row:
            ids[i, at : at + len(tokens)] = tokens
            labels[i, at + max(1, prompt) : at + len(tokens)] = tokens[max(1, prompt) :]
            positions[i, at : at + len(tokens)] = torch.arange(len(tokens))
            at += len(tokens)
    return Batch(ids, labels, positions, torch.arange(len(rows)), torch.ones_like(ids))


def ragged(seq_len: int = 12, left: int = 0) -> Batch:
    return batch_of([[document] for document in documents()], seq_len, left)


def gradients_of(student: nn.Module, loss: Tensor) -> Gradients:
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def step_gradients(
    student: nn.Module, teacher: OnlineTeacher | None, batches: list[Batch], objective: Objective
) -> tuple[float, Gradients]:
    """Loss and gradient of Σ loss / N."""
    count = sum(count_valid_tokens(batch.labels) for batch in batches)
    loss = sum((distill_step(student, teacher, batch, objective).loss for batch in batches), torch.zeros(())) / count
    return loss.item(), gradients_of(student, loss)


def assert_same(one: tuple[float, Gradients], other: tuple[float, Gradients], tolerance: float = 1e-9) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys() and any(gradient.any() for gradient in one[1].values())
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=tolerance, atol=tolerance, msg=name)


def loop_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, objective: Objective) -> Tensor:
    """The objective's definition, position by position, from the models' own full logits."""
    own = [model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits for model in (student, teacher)]
    total = torch.zeros((), dtype=own[0].dtype)
    (term,) = objective.divergences
    for row in range(len(batch)):
        for at in range(batch.labels.shape[1] - 1):
            target = int(batch.labels[row, at + 1])
            if target == IGNORE_INDEX:
                continue
            soft_q, soft_p = (torch.softmax(logits[row, at] / term.temperature, -1) for logits in own)
            divergence = sum(p * (p / q).log() for p, q in zip(soft_p.detach(), soft_q, strict=True))
            total = total + term.weight * term.temperature**2 * divergence
            total = total - objective.ce_weight * torch.softmax(own[0][row, at], -1)[target].log()
    return total


# ------------------------------------------------------------------------------------------------------------ what is computed


def test_loss_and_gradient_equal_a_loop_over_positions(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    batch = ragged()
    result = distill_step(student, teacher, batch, objective)
    expected = loop_loss(student.model, teacher.model, batch, objective)
    assert_same((result.loss.item(), gradients_of(student, result.loss)), (expected.item(), gradients_of(student, expected)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cross_entropy_alone_is_the_loss_of_transformers(tiny_llama: Build, family: str) -> None:
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = tiny_llama() if family == "llama" else GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))
    student, batch = LanguageModel(model.double()), ragged()
    ours = distill_step(student, None, batch, Objective(None, "forward_kl", kl_weight=0.0, ce_weight=1.0)).loss
    theirs = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False).loss
    theirs = theirs * count_valid_tokens(batch.labels)
    assert_same((ours.item(), gradients_of(student, ours)), (theirs.item(), gradients_of(student, theirs)), 1e-6)  # theirs is float32


def test_the_prediction_of_a_token_is_made_one_position_before_it(
    student: LanguageModel, teacher: OnlineTeacher, objective: Objective
) -> None:
    """Mask not shifted with the logits: one position late (DistillKit); logits and labels both unshifted (ms-swift#8436)."""
    batch = batch_of([[(torch.arange(10, 16), 0)]], seq_len=6)
    for label in range(1, 6):
        only = copy.copy(batch)
        only.labels = torch.full_like(batch.labels, IGNORE_INDEX)
        only.labels[0, label] = batch.labels[0, label]
        expected = distill_step(student, teacher, only, objective).loss.item()
        for model in (student.model, teacher.model):
            changed = []
            for position in range(6):
                with changed_hidden(model, lambda hidden, at=position: hidden + at_position(hidden, at)):
                    changed.append(distill_step(student, teacher, only, objective).loss.item() != expected)
            assert changed == [position == label - 1 for position in range(6)]


def at_position(hidden: Tensor, position: int) -> Tensor:
    change = torch.zeros_like(hidden)
    change[:, position] = torch.linspace(-1, 1, hidden.shape[-1])
    return change


@contextmanager
def changed_hidden(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Something else comes out of the trunk."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        output.last_hidden_state = change(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(hook)
    yield
    handle.remove()


def test_bfloat16_autocast_stays_near_and_sums_in_float32(tiny_llama: Build, objective: Objective) -> None:
    student, teacher = LanguageModel(tiny_llama(seed=0)), OnlineTeacher(tiny_llama(seed=1))
    exact = distill_step(student, teacher, ragged(), objective)
    rounded = distill_step(student, teacher, ragged(), objective, partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    assert rounded.loss.dtype == torch.float32
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.05) and rounded.loss.item() != exact.loss.item()
    assert all(gradient.isfinite().all() for gradient in gradients_of(student, rounded.loss).values())


# -------------------------------------------------------------------------------------- the same sequences, however they are cut


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    student: LanguageModel, teacher: OnlineTeacher, objective: Objective, micro_batch_size: int
) -> None:
    """Mean per micro-batch instead of the global token count (trl#4719, ms-swift#10165, axolotl#3271)."""
    whole = step_gradients(student, teacher, [ragged()], objective)
    assert_same(step_gradients(student, teacher, cut(ragged(), micro_batch_size), objective), whole)


def cut(batch: Batch, micro_batch_size: int) -> list[Batch]:
    rows = batch.split_rows()
    return [Batch.concatenate(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]


@pytest.mark.parametrize(("seq_len", "left"), [(13, 0), (29, 0), (13, 1), (24, 7)])
def test_more_padding_changes_nothing(
    student: LanguageModel, teacher: OnlineTeacher, objective: Objective, seq_len: int, left: int
) -> None:
    """Left padding confused with unpadded length (trl#5137); the longest prompt's length cut from all rows (TRL)."""
    whole = step_gradients(student, teacher, [ragged()], objective)
    assert_same(step_gradients(student, teacher, [ragged(seq_len, left)], objective), whole)


def test_the_token_of_the_padding_does_not_matter(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    whole, batch = step_gradients(student, teacher, [ragged()], objective), ragged()
    for row, length in enumerate(LENGTHS):
        batch.input_ids[row, length:] = 40 + row
    loss, found = step_gradients(student, teacher, [batch], objective)
    assert_same((loss, found), whole)


def test_the_order_of_the_rows_does_not_matter(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    shuffled = Batch.concatenate([ragged().split_rows()[i] for i in (5, 0, 7, 2, 1, 6, 4, 3)])
    assert_same(step_gradients(student, teacher, [shuffled], objective), step_gradients(student, teacher, [ragged()], objective))


@pytest.mark.parametrize("tied", [True, False])
def test_packed_documents_equal_separate_ones(tiny_llama: Build, teacher: OnlineTeacher, objective: Objective, tied: bool) -> None:
    student = LanguageModel(tiny_llama(tie_word_embeddings=tied).double())
    a, b, c, d, e, f, g, h = documents()
    packed = batch_of([[a, c, d], [b, e, g], [h, f]], seq_len=24)
    assert_same(step_gradients(student, teacher, [packed], objective), step_gradients(student, teacher, [ragged()], objective))


def test_documents_that_see_each_other_would_show(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    a, _, c, *_ = documents()
    packed = batch_of([[a, c]], seq_len=20)
    expected = distill_step(student, teacher, packed, objective).loss.item()
    packed.position_ids = torch.arange(20)[None]
    assert distill_step(student, teacher, packed, objective).loss.item() != pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------ what may not reach the loss


def test_masked_positions_filled_with_nan_change_nothing(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    """Prompt or padding tokens in the loss (Liger#974, Model-Optimizer#1009, optipfair#34); 0 · NaN is NaN."""
    batch = ragged()
    expected = step_gradients(student, teacher, [batch], objective)
    unsupervised = ~loss_mask(batch.labels)[..., None]

    def spoil(hidden: Tensor) -> Tensor:
        return hidden.masked_fill(unsupervised, float("nan"))

    with changed_hidden(student.model, spoil), changed_hidden(teacher.model, spoil):
        assert_same(step_gradients(student, teacher, [batch], objective), expected)


def test_a_batch_without_a_supervised_token_is_exactly_zero(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    """An empty completion gave 0/0 (trl#5885); a rank without a supervised token hung or divided by zero (trl#6698)."""
    batch = ragged()
    batch.labels.fill_(IGNORE_INDEX)
    result = distill_step(student, teacher, batch, objective)
    assert result.loss.item() == 0 and {name: value.item() for name, value in result.terms.items()} == {"forward_kl": 0, "ce": 0}
    found = gradients_of(student, result.loss)
    assert found.keys() == dict(student.named_parameters()).keys()  # every process has every gradient to exchange
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("packing", [False, True])
def test_the_end_of_a_completion_is_supervised_when_pad_is_eos(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, packing: bool
) -> None:
    """`pad == eos` masked out the real EOS, so that students never stopped."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    answers = ["yes", "no, not at all", "b"]
    rows = [{"question": "is it so? ", "answer": answer} for answer in answers]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_column": "question", "completion_column": "answer"}
    source = {"source": "jsonl", "path": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path), "eval_fraction": 0.0}
    data = prepare_data(DataConfig(**source, **columns, seq_len=32, packing=packing), tokenizer, show_progress=False)
    batch = data.train.batch(list(range(len(data.train))))
    targets = supervised_targets(batch.labels).tolist()
    assert targets.count(tokenizer.eos_token_id) == 3 and (batch.input_ids == tokenizer.eos_token_id).sum() > 3
    assert sorted(tokenizer.decode(targets).split("<eos>")) == sorted([*answers, ""])


# ------------------------------------------------------------------------------------------------------------------ the teacher


def test_the_divergence_reaches_the_student_and_depends_on_the_teacher(student: LanguageModel, teacher: OnlineTeacher) -> None:
    """Teacher targets fetched and then dropped: a run that distils nothing (atropos#456)."""
    alone = Objective(forward_kl, "forward_kl", kl_weight=1.0, ce_weight=0.0)
    loss, found = step_gradients(student, teacher, [ragged()], alone)
    assert loss > 0.1 and all(gradient.any() for gradient in found.values())
    itself = OnlineTeacher(copy.deepcopy(student.model))
    loss, found = step_gradients(student, itself, [ragged()], alone)
    assert loss == 0 and max(gradient.abs().max().item() for gradient in found.values()) < 1e-12


def test_the_logged_terms_are_those_that_are_optimised(student: LanguageModel, teacher: OnlineTeacher) -> None:
    objective = Objective(reverse_kl, "reverse_kl", temperature=3.0, kl_weight=0.6, ce_weight=0.3)
    result = distill_step(student, teacher, ragged(), objective)
    assert result.terms.keys() == {"reverse_kl", "ce"}
    assert result.loss.item() == pytest.approx(0.6 * 9 * result.terms["reverse_kl"].item() + 0.3 * result.terms["ce"].item())


def test_a_step_leaves_the_teacher_alone(tiny_llama: Build, objective: Objective) -> None:
    """Teacher back in train mode after `student.train()`; its dropout on; its weights moved or saved with the student's."""
    student, teacher = LanguageModel(tiny_llama(seed=0)), OnlineTeacher(tiny_llama(seed=1, attention_dropout=0.5))
    before, own_weights = weights_fingerprint(teacher.model), weights_fingerprint(student.model)
    student.train()
    losses = [distill_step(student, teacher, ragged(), objective).loss for _ in range(2)]
    assert losses[0].item() == losses[1].item()
    losses[0].backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert weights_fingerprint(teacher.model) == before and weights_fingerprint(student.model) != own_weights
    assert not teacher.model.training and all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert student.state_dict().keys() == LanguageModel(tiny_llama()).state_dict().keys()


def test_without_a_divergence_the_teacher_is_not_asked(student: LanguageModel) -> None:
    def never(batch: Batch) -> None:
        raise AssertionError("the teacher was asked")

    ce = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=1.0)
    assert distill_step(student, never, ragged(), ce).loss.item() == distill_step(student, None, ragged(), ce).loss.item() > 0


# ------------------------------------------------------------------------------------------------------------- the optimizer step


def distillation(student: LanguageModel, teacher: OnlineTeacher, objective: Objective, **trainer: Any) -> tuple[Distillation, Gradients]:
    """One process without Accelerate, and the gradient that its optimizer was last given."""
    d, given = Distillation.__new__(Distillation), {}
    d.accelerator = SimpleNamespace(
        num_processes=1,
        autocast=nullcontext,
        no_sync=lambda model: nullcontext(),
        backward=lambda loss: loss.backward(),
        reduce=lambda value, how: value,
    )
    d.language_model = d.student = student
    d.teacher, d.objective = teacher, objective
    d.config = Config(trainer=TrainerConfig(**{"max_grad_norm": None, "warmup_steps": 0, "schedule": "constant", **trainer}))
    d.optimizer = torch.optim.SGD(student.parameters(), lr=0.0)

    def keep(*_: Any) -> None:
        given.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    d.optimizer.register_step_pre_hook(keep)
    return d, given


@pytest.mark.parametrize("micro_batch_size", [8, 4, 2, 1])
def test_the_optimizer_gets_the_mean_over_all_tokens_of_the_step(
    student: LanguageModel, teacher: OnlineTeacher, objective: Objective, micro_batch_size: int
) -> None:
    """The same 8 ragged sequences as 1×8, 2×4, 4×2 and 8×1: gradient and logged numbers are those of a loop over positions."""
    loss = loop_loss(student.model, teacher.model, ragged(), objective) / count_valid_tokens(ragged().labels)
    expected = (loss.item(), gradients_of(student, loss))
    student.zero_grad()
    d, given = distillation(student, teacher, objective)
    metrics = train_module.optimizer_step(d, cut(ragged(), micro_batch_size), step=1)
    assert_same((metrics["train/loss"], given), expected)
    assert metrics["train/loss"] == pytest.approx(0.7 * 4 * metrics["train/forward_kl"] + 0.4 * metrics["train/ce"])
    assert metrics["train/tokens"] == count_valid_tokens(ragged().labels).item()
    norm = torch.cat([gradient.flatten() for gradient in expected[1].values()]).norm().item()
    assert metrics["train/grad_norm"] == pytest.approx(norm)


def test_one_step_starts_from_no_gradient(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    d, given = distillation(student, teacher, objective, learning_rate=1e-30)
    train_module.optimizer_step(d, [ragged()], step=1)
    first = dict(given)
    train_module.optimizer_step(d, [ragged()], step=2)
    assert all(torch.equal(first[name], gradient) for name, gradient in given.items())


def test_the_update_uses_the_learning_rate_of_its_step(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    settings = {"warmup_steps": 4, "max_steps": 8, "learning_rate": 0.4}
    d, given = distillation(student, teacher, objective, **settings)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    metrics = train_module.optimizer_step(d, [ragged()], step=3)
    assert metrics["train/learning_rate"] == pytest.approx(0.3)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.3 * given[name])


def test_clipping_bounds_the_update_and_logs_the_norm_before(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    free = train_module.optimizer_step(distillation(student, teacher, objective, learning_rate=1e-30)[0], [ragged()], step=1)
    d, given = distillation(student, teacher, objective, max_grad_norm=0.01, learning_rate=1e-30)
    metrics = train_module.optimizer_step(d, [ragged()], step=1)
    assert metrics["train/grad_norm"] == pytest.approx(free["train/grad_norm"]) and free["train/grad_norm"] > 0.01
    norm = torch.cat([gradient.flatten() for gradient in given.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_a_step_without_a_supervised_token_moves_nothing(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    batch, before = ragged(), weights_fingerprint(student)
    batch.labels.fill_(IGNORE_INDEX)
    metrics = train_module.optimizer_step(distillation(student, teacher, objective)[0], cut(batch, 4), step=1)
    assert metrics["train/loss"] == metrics["train/forward_kl"] == metrics["train/grad_norm"] == 0
    assert weights_fingerprint(student) == before


def test_a_step_without_a_supervised_token_counts_none(student: LanguageModel, teacher: OnlineTeacher, objective: Objective) -> None:
    """The divisor is kept from being 0; what is logged, and added up over the run, is what was trained on."""
    batch = ragged()
    batch.labels.fill_(IGNORE_INDEX)
    metrics = train_module.optimizer_step(distillation(student, teacher, objective)[0], [batch], step=1)
    assert metrics["train/tokens"] == 0
