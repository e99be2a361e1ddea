"""The teacher beside the student: always in eval mode, never with a gradient, and its own logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mini_distill.data.batch import Batch
from mini_distill.errors import ModelError
from mini_distill.losses.reduction import IGNORE_INDEX, loss_mask
from mini_distill.models.identity import weights_fingerprint
from mini_distill.teachers.online import OnlineTeacher

Build = Callable[..., LlamaForCausalLM]


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(4, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = IGNORE_INDEX
    return Batch(ids, labels, torch.arange(8).expand(3, -1), torch.arange(3), torch.ones_like(ids))


def own_logits(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[loss_mask(batch.labels)]


def test_its_targets_are_the_models_own_logits_without_a_graph(tiny_llama: Build, batch: Batch) -> None:
    model = tiny_llama()
    targets = OnlineTeacher(model)(batch)
    logits = targets.logits()
    torch.testing.assert_close(logits, own_logits(model, batch), rtol=1e-6, atol=1e-6)
    assert targets.hidden.shape == (15, 32) and logits.shape == (15, 64)
    assert not targets.hidden.requires_grad and not logits.requires_grad


def test_a_teacher_in_train_mode_is_put_into_eval_mode(tiny_llama: Build, batch: Batch) -> None:
    """A teacher whose dropout is on gives another distribution at every step."""
    model = tiny_llama(attention_dropout=0.5).train()
    teacher = OnlineTeacher(model)
    assert not any(module.training for module in [*model.modules(), *teacher.language_model.modules()])
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(teacher(batch).logits(), teacher(batch).logits())


def test_nothing_that_walks_the_students_modules_finds_it(tiny_llama: Build) -> None:
    """Teacher back in train mode after student.train(); teacher saved into the checkpoint."""
    teacher = OnlineTeacher(tiny_llama(seed=1))
    student = nn.Module()
    student.model, student.teacher = tiny_llama(), teacher
    student.train().requires_grad_(True)
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert not [name for name in student.state_dict() if "teacher" in name]
    assert len(list(student.parameters())) == len(list(student.model.parameters()))


def test_scoring_leaves_the_teacher_and_the_batch_as_they_were(tiny_llama: Build, batch: Batch) -> None:
    teacher = OnlineTeacher(tiny_llama())
    before, ids, labels = weights_fingerprint(teacher.model), batch.input_ids.clone(), batch.labels.clone()
    state = torch.get_rng_state()
    teacher(batch).logits()
    assert weights_fingerprint(teacher.model) == before and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch.input_ids, ids) and torch.equal(batch.labels, labels)


def test_no_supervised_token_asks_for_nothing(tiny_llama: Build, batch: Batch) -> None:
    batch.labels.fill_(IGNORE_INDEX)
    assert OnlineTeacher(tiny_llama())(batch).logits().shape == (0, 64)


def test_a_teacher_that_changes_its_logits_in_an_unknown_way_is_named(tiny_llama: Build) -> None:
    model = tiny_llama()
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(ModelError, match=r"teacher\.path"):
        OnlineTeacher(model)


def test_its_device_is_that_of_its_weights(tiny_llama: Build) -> None:
    assert OnlineTeacher(tiny_llama()).device == torch.device("cpu")
