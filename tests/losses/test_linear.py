"""The objective from hidden states, a few tokens at a time, is the objective from whole logits."""

from __future__ import annotations

import copy
import faulthandler
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_gpu import emulated_gpu
from fused_cases import (
    EXACT,
    NAMES,
    STOCHASTIC,
    TOLERANCE,
    VOCAB,
    Case,
    Found,
    assert_near,
    case,
    distance,
    found,
    fused,
    objective_of,
    plain,
    rows_mib,
    wide_head,
)
from runs import forks, in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from mini_distill.data.batch import Batch
from mini_distill.losses import divergences, linear
from mini_distill.losses.linear import Scratch
from mini_distill.losses.objective import DivergenceTerm, Objective
from mini_distill.losses.reduction import IGNORE_INDEX, loss_mask, supervised_targets
from mini_distill.models.head import LanguageModel, OutputHead, output_head
from mini_distill.teachers.online import OnlineTeacher

LARGE: dict[str, Any] = {"tokens": 192, "vocab": 4096, "hidden": 64, "teacher_hidden": 48, "dtype": torch.bfloat16}
"""A case with enough numbers for roundings to average out."""

WITH_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("jsd", {"jsd_beta": beta}) for beta in (0.0, 0.1, 1.0)),
    *((name, {"skew": skew}) for name in ("skew_forward_kl", "skew_reverse_kl") for skew in (0.0, 0.5)),
    ("adaptive_kl", {"head_mass": 0.9}),
    *(("alpha_beta", {"ab_alpha": alpha, "ab_beta": beta}) for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))),
    ("ranking_hinge", {"top_k": 3, "margin": 0.2}),
    ("ranking_logistic", {"top_k": 3}),
]

# --------------------------------------------------------------------------------------------------------- the definition is met


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_are_those_of_whole_logits(name: str, dtype: torch.dtype) -> None:
    given = case(tokens=23, bias=True, dtype=dtype)
    assert_near(fused(given, objective_of(name, memory_mib=rows_mib(5))), plain(given, objective_of(name)), TOLERANCE[dtype])


@pytest.mark.parametrize("name", EXACT)
def test_the_gradients_have_the_dtype_of_what_they_belong_to(name: str) -> None:
    for dtype in TOLERANCE:
        given = case(dtype=dtype, bias=True)
        result = given, fused(given, objective_of(name))
        assert {gradient.dtype for gradient in result[1].gradients.values()} == {dtype}
        wide = torch.promote_types(dtype, torch.float32)
        assert result[1].loss.dtype == wide and {term.dtype for term in result[1].terms.values()} == {wide}


@pytest.mark.parametrize("factor", [1.0, 1 / 192])
@pytest.mark.parametrize("std", [2.0, 8.0])
def test_bfloat16_keeps_the_gradient_of_float64(std: float, factor: float) -> None:
    """A log-softmax in bfloat16: gradients 3–31 % wrong against 0.15 % in float32 (speculators#788)."""
    given = case(**LARGE, std=std)
    objective = objective_of(temperature=1.0, kl_weight=1.0, ce_weight=0.0)
    exact = plain(given, objective, factor)
    assert_near(fused(given, objective, factor), exact, 2e-3)

    narrow = [
        head.logits(hidden).log_softmax(-1) for head, hidden in ((given.head, given.hidden), (given.teacher.head, given.teacher.hidden))
    ]
    assert narrow[0].dtype == torch.bfloat16
    loss = (narrow[1].detach().exp() * (narrow[1].detach() - narrow[0])).sum()
    for gradient, name in zip(torch.autograd.grad(loss, [given.hidden, given.head.module.weight]), ("hidden", "weight"), strict=True):
        assert distance(gradient * factor, exact.gradients[name]) > 2e-3


@pytest.mark.parametrize("name", [name for name in EXACT if name != "forward_kl"])
def test_bfloat16_keeps_the_gradient_of_float64_for_every_divergence(name: str) -> None:
    given, objective = case(**LARGE), objective_of(name, temperature=1.0, kl_weight=1.0, ce_weight=0.0)
    assert_near(fused(given, objective), plain(given, objective), 2e-3)


@pytest.mark.parametrize(("name", "options"), WITH_OPTIONS, ids=[f"{name}-{options}" for name, options in WITH_OPTIONS])
def test_options_reach_the_divergence(name: str, options: dict[str, Any]) -> None:
    given, objective = case(tokens=23), objective_of(name, options=options, memory_mib=rows_mib(5))
    assert_near(fused(given, objective), plain(given, objective), 1e-11)
    assert fused(given, objective).loss.item() != pytest.approx(fused(given, objective_of(name)).loss.item(), rel=1e-4)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_samples_are_those_of_whole_logits_in_one_chunk(num_samples: int) -> None:
    given, objective = case(tokens=23, bias=True), objective_of("teacher_sample_ce", options={"num_samples": num_samples})
    both = []
    for path in (fused, plain):
        torch.manual_seed(0)
        both.append(path(given, objective))
    assert_near(*both, 1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in EXACT if not name.endswith("_ce")])
def test_equal_models_are_nothing_apart_and_near_ones_never_less(name: str, dtype: torch.dtype) -> None:
    given, values = case(tokens=40, vocab=300, hidden=8, teacher_hidden=8, dtype=dtype), []
    objective = objective_of(name, temperature=1.0, kl_weight=1.0, ce_weight=0.0, memory_mib=rows_mib(15, 300))
    given.teacher.head.module = given.head.module
    for noise in (0.0, 1e-3, 1e-2):
        given.teacher.hidden = (given.hidden.detach().double() * (1 + noise)).to(dtype)
        values.append(objective.fused(given.hidden.detach(), given.head, given.teacher, given.targets).loss.item())
    assert min(values) >= 0 and values[0] < 40 * 50 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_reaches_the_divergence_and_not_the_cross_entropy(name: str, temperature: float) -> None:
    given, objective = case(), objective_of(name, temperature)
    assert_near(fused(given, objective), plain(given, objective), 1e-11)
    assert fused(given, objective).terms["ce"].item() == pytest.approx(fused(given, objective_of(name, 3.0)).terms["ce"].item())


def test_several_terms_are_added_up() -> None:
    given = case(tokens=9)
    further = [
        DivergenceTerm("jsd", divergences.jsd, 0.3, temperature=3.0, options={"jsd_beta": 0.2}),
        DivergenceTerm("reverse_kl", divergences.reverse_kl, 0.2, temperature=0.5, scale_by_temperature_squared=False),
    ]
    for settings in ({}, {"ce_weight": 0.0}, {"kl_weight": 0.0}, {"kl_weight": 0.0, "ce_weight": 0.0}):
        objective = objective_of(further=further, memory_mib=rows_mib(4), **settings)
        assert_near(fused(given, objective), plain(given, objective), 1e-11)


# -------------------------------------------------------------------------------------------------------------------- chunking


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7, 1000])
def test_any_budget_gives_the_same(rows: int, bias: bool) -> None:
    given = case(bias=bias)
    assert_near(fused(given, objective_of(memory_mib=rows_mib(rows))), plain(given, objective_of()), 1e-11)


def test_a_budget_below_one_row_takes_one_row() -> None:
    given = case()
    assert_near(fused(given, objective_of(memory_mib=1e-9)), plain(given, objective_of()), 1e-11)


@pytest.mark.parametrize("name", EXACT)
def test_chunks_of_several_tiles_give_the_same(name: str) -> None:
    """On a CPU the terms are taken 2¹⁸ logits at a time."""
    given = case(tokens=150, vocab=4096)  # tiles of 64 rows; the budget allows for two and a half
    assert_near(fused(given, objective_of(name, memory_mib=rows_mib(150, 4096))), plain(given, objective_of(name)), 1e-11)
    assert_near(fused(given, objective_of(name, memory_mib=rows_mib(140, 4096))), plain(given, objective_of(name)), 1e-11)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_any_number_of_tokens(tokens: int) -> None:
    given = case(tokens=tokens, bias=True)
    assert_near(fused(given, objective_of(memory_mib=rows_mib(3))), plain(given, objective_of()), 1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["plain", "called"])
@pytest.mark.parametrize("name", NAMES)
def test_no_token_is_exactly_zero_with_a_graph_even_where_weights_are_not_finite(name: str, kind: str, dtype: torch.dtype) -> None:
    """An empty completion gave 0/0 (trl#5885); a rank without a supervised token hung or divided by zero (trl#6698)."""
    given = case(tokens=0, bias=True, dtype=dtype)
    if kind == "called":
        given.head.module = Subclass.of(given.head.module)
    with torch.no_grad():
        for parameter in (*given.head.module.parameters(), *given.teacher.head.module.parameters()):
            parameter.fill_(math.nan)
    result = fused(given, objective_of(name))
    assert result.loss.item() == 0 and {key: value.item() for key, value in result.terms.items()} == {name: 0, "ce": 0}
    assert result.gradients.keys() == {"hidden", "weight", "bias"} and result.gradients["hidden"].shape == (0, 6)
    assert not any(gradient.any() for gradient in result.gradients.values())


def test_the_sums_of_parts_are_the_sum_of_the_whole() -> None:
    """Gradient accumulation: two calls into the same parameters."""
    given = case(bias=True)
    whole = fused(given, objective_of())
    for leaf in (given.hidden, *given.head.module.parameters()):
        leaf.grad = None
    for rows in (slice(0, 3), slice(3, 7)):
        teacher = replace(given.teacher, hidden=given.teacher.hidden[rows])
        objective_of().fused(given.hidden[rows], given.head, teacher, given.targets[rows]).loss.backward()
    for name, leaf in {"hidden": given.hidden, **dict(given.head.module.named_parameters())}.items():
        torch.testing.assert_close(leaf.grad, whole.gradients[name])


# -------------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.5, 4.0)])
def test_scaling_and_soft_capping_belong_to_the_logits(scale: float, softcap: float | None, bias: bool) -> None:
    """Ignored by peers' fused losses: Gemma 2, Cohere (trl#6629)."""
    given = case(scale=scale, softcap=softcap, bias=bias)
    expected = plain(given, objective_of())
    assert_near(fused(given, objective_of(memory_mib=rows_mib(3))), expected, 1e-11)
    if (scale, softcap) != (1.0, None):
        assert expected.loss.item() != pytest.approx(plain(case(bias=bias), objective_of()).loss.item(), rel=1e-3)


@pytest.mark.parametrize("frozen", [{"weight"}, {"bias"}, {"weight", "bias"}, {"hidden"}, {"hidden", "bias"}, {"hidden", "weight"}])
@pytest.mark.parametrize("kind", ["plain", "called"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: set[str], kind: str) -> None:
    given = case(bias=True)
    if kind == "called":
        given.head.module = Subclass.of(given.head.module)
    for name, leaf in {"hidden": given.hidden, **dict(given.head.module.named_parameters())}.items():
        leaf.requires_grad_(name not in frozen)
    result = fused(given, objective_of(memory_mib=rows_mib(3)))
    assert_near(result, plain(given, objective_of()), 1e-11)
    assert result.gradients.keys() == {"hidden", "weight", "bias"} - frozen


@pytest.mark.parametrize("kind", ["plain", "called"])
def test_with_everything_frozen_there_is_a_value_and_no_graph(kind: str) -> None:
    given = case(bias=True)
    if kind == "called":
        given.head.module = Subclass.of(given.head.module)
    given.head.module.requires_grad_(False)
    given.hidden.requires_grad_(False)
    result = objective_of().fused(given.hidden, given.head, given.teacher, given.targets)
    assert not result.loss.requires_grad and result.loss.item() == pytest.approx(plain(given, objective_of()).loss.item())


@pytest.mark.parametrize("rows", [2, 1000])
def test_a_weight_that_is_used_before_gets_both_gradients(rows: int) -> None:
    """Tied embeddings: the same parameter at both ends of the graph."""
    given, ids = case(), torch.tensor([3, 1, 3, 16, 0, 2, 2])
    weight = given.head.module.weight

    def trunk(weight: Tensor) -> Tensor:
        return torch.tanh(nn.functional.embedding(ids, weight)).roll(1, -1)

    objective_of(memory_mib=rows_mib(rows)).fused(trunk(weight), given.head, given.teacher, given.targets).loss.backward()
    wide = given.wide()
    objective_of()(wide.head.logits(trunk(wide.head.module.weight)), wide.teacher.logits(), wide.targets).loss.backward()
    torch.testing.assert_close(weight.grad, wide.head.module.weight.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [(4, 0), (0, 3), (4, 3)], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("bad", [1.0, 50.0, math.nan, math.inf, -math.inf])
def test_rows_that_pad_a_vocabulary_change_nothing(bad: float, padding: tuple[int, int], bias: bool) -> None:
    """Qwen pads 151,643 tokens to 151,936 or 152,064 by size; a student padded with zero logits gave them probability (Liger)."""
    given, padded = case(bias=bias), case(bias=bias)
    for head, rows in zip((padded.head, padded.teacher.head), padding, strict=True):
        old, head.module = head.module, nn.Linear(head.module.in_features, VOCAB + rows, bias=bias).double()
        with torch.no_grad():
            for name, parameter in head.module.named_parameters():
                parameter.fill_(bad)
                parameter[:VOCAB] = getattr(old, name)
    objective = objective_of(vocab_size=VOCAB, memory_mib=rows_mib(3))
    result, expected = fused(padded, objective), fused(given, objective)
    for name in {"weight", "bias"} & result.gradients.keys():
        assert not result.gradients[name][VOCAB:].any()
        result.gradients[name] = result.gradients[name][:VOCAB]
    assert_near(result, expected, 1e-12)


def test_vocabularies_of_unexplained_widths_are_not_cut_to_fit() -> None:
    given = case(teacher_vocab=VOCAB + 2)
    with pytest.raises(ValueError, match="expected one shape"):
        fused(given, objective_of())


@pytest.mark.parametrize(("student", "teacher"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_student_and_teacher_may_be_stored_differently(student: torch.dtype, teacher: torch.dtype) -> None:
    given = case(dtype=student, teacher_dtype=teacher, bias=True)
    assert_near(fused(given, objective_of(memory_mib=rows_mib(3))), plain(given, objective_of()), TOLERANCE[student])


@pytest.mark.parametrize(("hidden", "weight"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_states_and_head_may_be_stored_differently(hidden: torch.dtype, weight: torch.dtype, bias: bool) -> None:
    given = case(dtype=weight, teacher_dtype=weight, bias=bias)
    given.hidden = given.hidden.detach().to(hidden).requires_grad_()
    given.teacher.hidden = given.teacher.hidden.to(hidden)
    result, expected = fused(given, objective_of(memory_mib=rows_mib(3))), plain(given, objective_of())
    assert_near(result, expected, TOLERANCE[torch.bfloat16])
    assert result.gradients["hidden"].dtype == hidden and result.gradients["weight"].dtype == weight


# ------------------------------------------------------------------------------------------------------ heads that are not plain


class Subclass(nn.Linear):
    """A linear layer that does something else; what a subclass computes cannot be known from its weights."""

    @classmethod
    def of(cls, module: nn.Linear) -> Subclass:
        copied = copy.deepcopy(module)
        copied.__class__ = cls
        return copied

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden * 1.5)


class Adapted(nn.Module):
    """A low-rank adapter beside a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_(False)
        like = {"dtype": base.weight.dtype}
        draw = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=draw, dtype=torch.float64).to(**like))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=draw, dtype=torch.float64).to(**like))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + 0.5 * (hidden @ self.down.T) @ self.up.T


def with_replaced_forward(module: nn.Linear) -> nn.Linear:
    """On the object, as Accelerate does to a model that is spread over devices."""
    module, original = copy.deepcopy(module), type(module).forward
    module.forward = lambda hidden: original(module, hidden) * 1.5
    return module


def with_hook(module: nn.Linear) -> nn.Linear:
    module = copy.deepcopy(module)
    module.register_forward_hook(lambda module, inputs, logits: logits * 1.5)
    return module


def with_pre_hook(module: nn.Linear) -> nn.Linear:
    module = copy.deepcopy(module)
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    return module


def parametrised(module: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(copy.deepcopy(module))


MODULES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass": Subclass.of,
    "adapter": Adapted,
    "hook": with_hook,
    "pre_hook": with_pre_hook,
    "parametrised": parametrised,
    "replaced_forward": with_replaced_forward,
}


def plain_of_module(given: Case, objective: Objective, build: Callable[[nn.Linear], nn.Module], which: str) -> Found:
    """From whole logits in float64; the module is built again there, since a copy of it may refer to the original."""
    wide = given.wide()
    if which in ("student", "both"):
        wide.head.module = build(wide.head.module)
    if which in ("teacher", "both"):
        wide.teacher.head.module = build(wide.teacher.head.module)
    return found(wide, objective(wide.head.logits(wide.hidden), wide.teacher.logits(), wide.targets), 1.0)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_module_that_is_not_plain_is_called(kind: str, which: str) -> None:
    given = case(bias=True)
    expected = plain_of_module(given, objective_of(), MODULES[kind], which)
    untouched = plain(given, objective_of()).loss.item()
    if which in ("student", "both"):
        given.head.module = MODULES[kind](given.head.module)
    if which in ("teacher", "both"):
        given.teacher.head.module = MODULES[kind](given.teacher.head.module)
    assert_near(fused(given, objective_of(memory_mib=rows_mib(3))), expected, 1e-11)
    assert kind == "parametrised" or expected.loss.item() != pytest.approx(untouched, rel=1e-3)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["subclass", "adapter"])
def test_every_divergence_reaches_a_module_that_is_called(kind: str, name: str) -> None:
    given = case(vocab=VOCAB, student_vocab=VOCAB + 3, teacher_vocab=VOCAB + 2, softcap=5.0)
    objective = objective_of(name, vocab_size=VOCAB, memory_mib=rows_mib(3))
    expected = plain_of_module(given, objective, MODULES[kind], "student")
    given.head.module = MODULES[kind](given.head.module)
    assert_near(fused(given, objective), expected, 1e-11)


@pytest.mark.parametrize("kind", ["subclass", "adapter"])
def test_a_called_module_in_bfloat16_sums_its_chunks_exactly(kind: str) -> None:
    """A sum of hundreds of chunks kept in bfloat16 stops growing; the logits themselves are the module's own, in bfloat16."""
    given = case(tokens=600, dtype=torch.bfloat16)
    given.head.module = MODULES[kind](given.head.module)
    whole = fused(given, objective_of(memory_mib=rows_mib(600)))
    chunks = fused(given, objective_of(memory_mib=rows_mib(1)))
    assert_near(chunks, whole, 4e-3)


@pytest.mark.parametrize("kind", ["subclass", "adapter"])
def test_a_called_module_gets_its_gradients_under_autocast(kind: str) -> None:
    """Autocast keeps the narrow copy of a weight; one that was made without a graph would be used again where one is wanted."""
    given = case(tokens=40, dtype=torch.float32)
    given.head.module = MODULES[kind](given.head.module)
    expected = plain(given, objective_of())
    with torch.autocast("cpu", torch.bfloat16):
        result = objective_of(memory_mib=rows_mib(7)).fused(given.hidden, given.head, given.teacher, given.targets)
    assert_near_under_autocast(found(given, result, 1.0), expected)


# -------------------------------------------------------------------------------------------------------------------- backward


@pytest.mark.parametrize("kind", ["plain", "called"])
@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_is_refused(retain: bool, kind: str) -> None:
    given = case()
    if kind == "called":
        given.head.module = Subclass.of(given.head.module)
    loss = objective_of().fused(given.hidden, given.head, given.teacher, given.targets).loss
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    given = case()
    loss = objective_of().fused(given.hidden, given.head, given.teacher, given.targets).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, given.hidden, create_graph=True)


@pytest.mark.parametrize("kind", ["plain", "called"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_gradient_follows_what_is_done_to_the_loss(dtype: torch.dtype, kind: str) -> None:
    """The loss is divided by the tokens of the step before backward."""
    given = case(tokens=30, dtype=dtype, bias=True)
    if kind == "called":
        given.head.module = Subclass.of(given.head.module)
    loss = objective_of().fused(given.hidden, given.head, given.teacher, given.targets).loss
    whole = fused(given, objective_of())
    for leaf in (given.hidden, *given.head.module.parameters()):
        leaf.grad = None
    (loss * 3 / 7 + given.hidden.sum() * 0).backward()
    for name, leaf in {"hidden": given.hidden, **dict(given.head.module.named_parameters())}.items():
        assert leaf.grad is not None
        assert distance(leaf.grad, whole.gradients[name].double() * 3 / 7) <= 2 * TOLERANCE[dtype]  # the whole is rounded too


def test_the_gradient_in_bfloat16_has_the_factor_of_the_loss_and_not_a_rounded_one() -> None:
    """A factor rounded to eight bits would make all gradients of a step too large or too small together."""
    given = case(tokens=512, vocab=256, hidden=32, dtype=torch.bfloat16)
    factor = 1 / 509  # 0.19 % above the nearest bfloat16
    exact, result = (path(given, objective_of(memory_mib=rows_mib(64, 256)), factor) for path in (plain, fused))
    assert_near(result, exact, 2e-3)
    for name, gradient in result.gradients.items():
        wanted = exact.gradients[name]
        size = (gradient.double() * wanted).sum() / (wanted * wanted).sum()
        assert size.item() == pytest.approx(1, abs=5e-4), name


def test_nothing_else_holds_the_gradients_that_were_handed_out() -> None:
    given = case(bias=True)
    first = fused(given, objective_of()).gradients
    again = fused(given, objective_of()).gradients
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name])
    kept = given.head.module.weight.grad
    assert kept is not None
    objective_of().fused(given.hidden, given.head, given.teacher, given.targets).loss.backward()
    torch.testing.assert_close(kept, 2 * first["weight"])


def test_the_inputs_are_left_as_they_were() -> None:
    given = case(bias=True)
    before = [tensor.detach().clone() for tensor in inputs_of(given)]
    fused(given, objective_of(memory_mib=rows_mib(2)))
    assert all(torch.equal(old, new) for old, new in zip(before, inputs_of(given), strict=True))


def inputs_of(given: Case) -> list[Tensor]:
    parameters = [*given.head.module.parameters(), *given.teacher.head.module.parameters()]
    return [given.hidden, given.teacher.hidden, given.targets, *parameters]


def test_hidden_states_that_do_not_lie_in_order() -> None:
    given = case(tokens=6, hidden=6)
    given.hidden = given.hidden.detach().T.requires_grad_()
    assert_near(fused(given, objective_of(memory_mib=rows_mib(2))), plain(given, objective_of()), 1e-11)


def test_one_head_for_student_and_teacher_does_not_mix_their_logits() -> None:
    """Self-distillation: both write into memory that is used again."""
    given = case(hidden=5, teacher_hidden=5)
    expected = plain(replace(given, teacher=replace(given.teacher, head=wide_head(given.head))), objective_of())
    teacher = replace(given.teacher, head=given.head)
    result = objective_of(memory_mib=rows_mib(2)).fused(given.hidden, given.head, teacher, given.targets)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected.loss.item())
    torch.testing.assert_close(given.head.module.weight.grad, expected.gradients["weight"])


# --------------------------------------------------------------------------------------------------- without gradients, autocast


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["plain", "called"])
def test_without_gradients_it_is_the_value_alone(kind: str, without: Callable[[], Any]) -> None:
    given = case(bias=True)
    if kind == "called":
        given.head.module = Subclass.of(given.head.module)
    expected = plain(given, objective_of())
    with without(), Recorded() as recorded:
        result = objective_of(memory_mib=rows_mib(5)).fused(given.hidden, given.head, given.teacher, given.targets)
    assert not result.loss.requires_grad and result.loss.grad_fn is None
    assert result.loss.item() == pytest.approx(expected.loss.item())
    assert all(leaf.grad is None for leaf in given.head.module.parameters())
    products = [name for name in recorded.names if name.startswith(("aten.mm", "aten.addmm", "aten.linear"))]
    assert len(products) <= 2 * 3 + 2, products  # one for the student and one for the teacher in each of at most three chunks: no backward


def assert_near_under_autocast(one: Found, other: Found) -> None:
    assert one.loss.dtype == torch.float32 and one.gradients.keys() == other.gradients.keys()
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=0.02)
    for name, gradient in one.gradients.items():
        assert gradient.isfinite().all() and distance(gradient, other.gradients[name]) < 0.03, name


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_loss_is_float32_and_near(name: str) -> None:
    given = case(tokens=40, dtype=torch.float32, bias=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        result = objective_of(name, memory_mib=rows_mib(7)).fused(given.hidden, given.head, given.teacher, given.targets)
    result = found(given, result, 1.0)
    if name in STOCHASTIC:
        assert result.loss.dtype == torch.float32 and all(gradient.isfinite().all() for gradient in result.gradients.values())
    else:
        assert_near_under_autocast(result, plain(given, objective_of(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    given = case(dtype=dtype, std=80.0)
    result = fused(given, objective_of(name, 1.0))
    assert result.loss.isfinite() and all(gradient.isfinite().all() for gradient in result.gradients.values())


# ---------------------------------------------------------------------------------------------------------------------- memory


class Recorded(TorchDispatchMode):
    """The largest tensor that any operation gave, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        given = function(*arguments, **(keywords or {}))
        self.names.append(str(function))
        for tensor in given if isinstance(given, tuple | list) else [given]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return given


@pytest.mark.parametrize("kind", ["plain", "called"])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_larger_than_a_chunk(name: str, kind: str) -> None:
    """TRL with Liger cut the batch axis alone, so that one long sequence was one chunk."""
    largest = []
    for tokens in (64, 512):
        given = case(tokens=tokens, vocab=4096, hidden=8, teacher_hidden=8, dtype=torch.float32)
        if kind == "called":
            given.head.module = Subclass.of(given.head.module)
        objective = objective_of(name, memory_mib=rows_mib(32, 4096) * (1.5 if kind == "called" else 1))  # what it gives is copied
        with Recorded() as recorded:
            objective.fused(given.hidden, given.head, given.teacher, given.targets).loss.backward()
        assert given.hidden.grad is not None and given.hidden.grad.any()
        largest.append(recorded.largest)
    assert largest == [32 * 4096] * 2
    with Recorded() as recorded:  # whole logits would show
        objective(given.head.logits(given.hidden), given.teacher.logits(), given.targets).loss.backward()
    assert recorded.largest >= 512 * 4096


class Alive(TorchDispatchMode):
    """The most bytes that the results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.now, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        given = function(*arguments, **(keywords or {}))
        for tensor in given if isinstance(given, tuple | list) else [given]:
            if isinstance(tensor, Tensor) and (place := tensor.untyped_storage()._cdata) not in self.known:
                size = tensor.untyped_storage().nbytes()
                self.known.add(place)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, place, size)
        return given

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def most_alive(name: str, given: Case, budget: float, further: list[DivergenceTerm] | None = None) -> float:
    """In MiB."""
    objective = objective_of(name, memory_mib=budget, further=further or [])
    with Alive() as alive:
        objective.fused(given.hidden, given.head, given.teacher, given.targets).loss.backward()
    return alive.most / 2**20


WIDE: dict[str, Any] = {"tokens": 512, "vocab": 8192, "hidden": 8, "teacher_hidden": 8, "dtype": torch.float32}  # 32 MiB of logits
BUDGET = 16.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "plain") for name in NAMES), *itertools.product(("forward_kl", "adaptive_kl"), ("soft-capped", "called"))],
)
def test_what_is_alive_at_once_is_the_budget_and_a_few_tiles(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft-capped teacher's logits stood there three times: two and a half times the budget, with every divergence."""
    given = case(**WIDE, softcap=30.0 if kind == "soft-capped" else None)
    if kind == "called":
        for head in (given.head, given.teacher.head):
            head.module = Subclass.of(head.module)
    monkeypatch.setattr(linear, "TILE", 2**17)
    tiles = 20 * linear.TILE * 4 / 2**20
    assert 0.9 * BUDGET < most_alive(name, given, BUDGET) < BUDGET + tiles == 1.625 * BUDGET


def test_on_a_gpu_too_terms_that_are_not_compiled_see_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They saw a whole chunk, of which one divergence makes eight times the budget, and all of them twenty times."""
    monkeypatch.setattr(linear, "GPU_TILE", 2**16)
    further = [DivergenceTerm(other, getattr(divergences, other), 0.1) for other in EXACT if other != "forward_kl"]
    with emulated_gpu():
        assert most_alive("forward_kl", case(**WIDE), BUDGET, further) < 2 * BUDGET


def test_a_narrow_head_is_never_widened_as_a_whole() -> None:
    given = case(tokens=4, vocab=40_000, hidden=8, teacher_hidden=8, dtype=torch.bfloat16)
    given.head.module.requires_grad_(False)  # its gradient is as large, in float32
    wide = set()

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            tensor = function(*arguments, **(keywords or {}))
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                wide.add(tensor.numel())
            return tensor

    with Wide():
        objective_of().fused(given.hidden, given.head, given.teacher, given.targets).loss.backward()
    assert max(wide) < 40_000 * 8


def test_hidden_states_come_per_token() -> None:
    """A third axis is refused rather than cut along the wrong one."""
    given = case(tokens=6)
    teacher = replace(given.teacher, hidden=given.teacher.hidden.view(2, 3, -1))
    for head in (given.head, OutputHead(Subclass.of(given.head.module))):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            objective_of().fused(given.hidden.detach().view(2, 3, -1), head, teacher, given.targets.view(2, 3))


# -------------------------------------------------------------------------------------------------------------- wide_logits, rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_wide_logits_are_the_exact_logits_whatever_the_head_is_stored_in(
    dtype: torch.dtype, scale: float, softcap: float | None, bias: bool
) -> None:
    given = case(dtype=dtype, scale=scale, softcap=softcap, bias=bias)
    expected = wide_head(given.head).logits(given.hidden.detach().double())
    for width in (None, VOCAB, VOCAB - 4, VOCAB + 9):
        logits = given.head.wide_logits(given.hidden, width, Scratch())
        assert logits.dtype == torch.promote_types(dtype, torch.float32) and not logits.requires_grad
        assert distance(logits, expected[:, :width]) < min(TOLERANCE[dtype], 1e-6)


def test_the_memory_of_the_last_rows_is_used_again() -> None:
    given = case(tokens=12)
    expected = given.teacher.logits().detach()
    places = set()
    for rows in (slice(0, 5), slice(5, 10), slice(10, 12), slice(0, 2), slice(0, 5), slice(0, 12)):
        logits = given.teacher.rows(rows, VOCAB)
        torch.testing.assert_close(logits, expected[rows])
        places.add(logits.data_ptr())
    assert len(places) <= 3
    torch.testing.assert_close(given.teacher.rows(slice(2, 7), VOCAB - 3), expected[2:7, : VOCAB - 3])
    torch.testing.assert_close(given.teacher.rows(slice(2, 7)), expected[2:7])


def test_the_memory_of_the_last_step_is_used_again_on_a_cpu() -> None:
    """Mapped anew in each step, the logits cost a tenth of it."""
    objective, places = objective_of(), set[int | None]()
    for tokens in (12, 9, 12):
        given = case(tokens=tokens)
        assert_near(fused(given, objective), plain(given, objective_of()), 1e-11)
        memory = objective.scratch._memory
        places.add(None if memory is None else memory.data_ptr())
    assert len(places) == 1 and None not in places


def test_memory_that_is_too_small_or_of_another_kind_is_replaced() -> None:
    scratch = Scratch()
    first = scratch.take(2, 6, torch.float32, torch.device("cpu"))
    assert scratch.take(3, 4, torch.float32, torch.device("cpu")).data_ptr() == first.data_ptr()
    assert scratch.take(3, 5, torch.float32, torch.device("cpu")).shape == (3, 5)
    assert scratch.take(3, 5, torch.float64, torch.device("cpu")).dtype == torch.float64
    assert Scratch.on(torch.device("cpu"), scratch) is scratch and Scratch.on(torch.device("meta"), scratch) is not scratch


def test_rows_in_bfloat16_are_nearer_to_the_exact_ones_than_the_module() -> None:
    given = case(tokens=64, vocab=512, teacher_hidden=64, dtype=torch.bfloat16)
    exact = given.wide().teacher.logits().detach()
    assert distance(given.teacher.rows(slice(0, 64)), exact) < 1e-6 < 1e-3 < distance(given.teacher.logits().detach(), exact)


# ------------------------------------------------------------------------------------------------------------- with whole models


Build = Callable[..., LlamaForCausalLM]


def documents(supervised: tuple[int, ...] = (9, 4, 1, 7)) -> Batch:
    """Rows of ten tokens; the last `supervised` of each have a label."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 64, (len(supervised), 10), generator=draw)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, count in enumerate(supervised):
        labels[row, 10 - count :] = ids[row, 10 - count :]
    positions = torch.arange(10).expand_as(ids).contiguous()
    return Batch(ids, labels, positions, torch.arange(len(ids)), torch.ones_like(ids))


def step(student: nn.Module, teacher: OnlineTeacher, batch: Batch, objective: Objective) -> Any:
    """What a training step does; `student` may be wrapped."""
    targets = teacher(batch)
    return objective.fused(student(batch), output_head(student), targets, supervised_targets(batch.labels))


def from_whole_logits(student: LanguageModel, teacher: OnlineTeacher, batch: Batch, objective: Objective) -> Any:
    mask = loss_mask(batch.labels)
    logits = [
        model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[mask]
        for model in (student.model, teacher.model)
    ]
    return objective(logits[0], logits[1], supervised_targets(batch.labels))


def gradients_of(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gets_the_gradients_of_its_own_whole_logits(tiny_llama: Build, tied: bool) -> None:
    student = LanguageModel(tiny_llama(seed=0, tie_word_embeddings=tied, vocab_size=67).double())
    teacher = OnlineTeacher(tiny_llama(seed=1, hidden_size=48).double())
    objective = objective_of(vocab_size=64, memory_mib=rows_mib(4, 64))
    result, expected = step(student, teacher, documents(), objective), from_whole_logits(student, teacher, documents(), objective)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(gradients_of(student, result.loss), gradients_of(student, expected.loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_supervised_may_hold_anything(tiny_llama: Build, name: str, dtype: torch.dtype) -> None:
    """Prompt or padding tokens in the loss (Liger#974, Model-Optimizer#1009, optipfair#34); 0 · NaN is NaN."""
    student, teacher = LanguageModel(tiny_llama(seed=0).to(dtype)), OnlineTeacher(tiny_llama(seed=1).to(dtype))
    objective, batch = objective_of(name, memory_mib=rows_mib(4, 64)), documents()
    result = step(student, teacher, batch, objective)
    expected, unsupervised = gradients_of(student, result.loss), ~loss_mask(batch.labels)[..., None]

    def spoil(module: nn.Module, inputs: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state.masked_fill(unsupervised, math.nan)

    for model in (student.model, teacher.model):
        model.base_model.register_forward_hook(spoil)
    spoilt = step(student, teacher, batch, objective)
    assert torch.equal(spoilt.loss, result.loss)
    torch.testing.assert_close(gradients_of(student, spoilt.loss), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16), (True, torch.float64)])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_label_is_zero_with_a_gradient_for_every_parameter(
    tiny_llama: Build, name: str, tied: bool, dtype: torch.dtype
) -> None:
    student = LanguageModel(tiny_llama(seed=0, tie_word_embeddings=tied).to(dtype))
    result = step(student, OnlineTeacher(tiny_llama(seed=1).to(dtype)), documents((0, 0)), objective_of(name))
    assert result.loss.item() == 0 and not any(term.any() for term in result.terms.values())
    found = gradients_of(student, result.loss)
    assert found.keys() == dict(student.named_parameters()).keys() and not any(gradient.any() for gradient in found.values())


def test_the_hidden_states_of_a_model_are_one_row_per_supervised_token(tiny_llama: Build) -> None:
    """Kept as (batch, seq, hidden), peers cut them along the batch alone (TRL with Liger)."""
    student = LanguageModel(tiny_llama())
    assert student(documents()).shape == (9 + 4 + 1 + 7, 32)


# --------------------------------------------------------------------------------------------------------------- several processes


@contextmanager
def process_group(rank: int, count: int = 2) -> Iterator[None]:
    faulthandler.dump_traceback_later(120, exit=True)  # one that waits for ever for another would outlive the tests
    torch.set_num_threads(1)  # those of the parent were not forked
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    yield
    torch.distributed.barrier()  # the group ends with the process


Models = Callable[[], tuple[LanguageModel, OnlineTeacher]]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tiny_llama: Build) -> Models:
    def build() -> tuple[LanguageModel, OnlineTeacher]:
        student = LanguageModel(tiny_llama(seed=0, tie_word_embeddings=request.param).double())
        return student, OnlineTeacher(tiny_llama(seed=1, hidden_size=48).double())

    return build


def rows_of_rank(rank: int, supervised: tuple[int, ...]) -> Batch:
    rows = documents(supervised).split_rows()
    return Batch.concatenate(rows[2 * rank : 2 * rank + 2])


def expected_gradients(models: Models, supervised: tuple[int, ...]) -> dict[str, Tensor]:
    """Of one process, from whole logits."""
    student, teacher = models()
    return gradients_of(student, from_whole_logits(student, teacher, documents(supervised), objective_of()).loss)


SHARES = pytest.mark.parametrize("supervised", [(9, 4, 1, 7), (9, 4, 0, 0)], ids=["both", "one_without_a_label"])


@forks
@SHARES
@pytest.mark.parametrize("accumulate", [False, True])
def test_ddp_gives_the_gradients_of_one_process(models: Models, supervised: tuple[int, ...], accumulate: bool) -> None:
    """The unwrapped model called under DDP: no all-reduce of gradients (trl#5282, trl#7246)."""
    expected = expected_gradients(models, supervised)

    def body(rank: int) -> None:
        with process_group(rank):
            student, teacher = models()
            wrapped = DistributedDataParallel(student)
            batch = rows_of_rank(rank, supervised)
            parts = batch.split_rows() if accumulate else [batch]
            for part in parts:
                with nullcontext() if part is parts[-1] else wrapped.no_sync():
                    (step(wrapped, teacher, part, objective_of(memory_mib=rows_mib(4, 64))).loss * 2).backward()  # DDP takes the mean
            for name, parameter in student.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)

    assert in_processes(2, body) == [0, 0]


def sharded(student: LanguageModel, head_apart: bool = False, **root: Any) -> LanguageModel:
    """With FSDP2, in groups of a layer each, and of all that is left."""
    mesh = init_device_mesh("cpu", (2,))
    for module in [*student.model.model.layers, *([student.model.lm_head] if head_apart else [])]:
        fully_shard(module, mesh=mesh)
    fully_shard(student, mesh=mesh, **root)
    return student


@forks
@SHARES
@pytest.mark.parametrize("how", ["at once", "accumulated", "recomputed"])
@pytest.mark.parametrize(
    "root",
    [
        {},
        pytest.param(
            {"reshard_after_forward": True},
            marks=pytest.mark.xfail(strict=True, reason="the head's weights are sharded again before the loss"),
        ),
    ],
    ids=["default", "resharded"],
)
def test_fsdp_gives_the_gradients_of_one_process(models: Models, supervised: tuple[int, ...], root: dict[str, bool], how: str) -> None:
    expected = expected_gradients(models, supervised)

    def body(rank: int) -> None:
        with process_group(rank):
            student, teacher = models()
            if how == "recomputed":
                student.model.activation_checkpointing_enable({"use_reentrant": False})
            sharded(student, **root)
            batch = rows_of_rank(rank, supervised)
            parts = batch.split_rows() if how == "accumulated" else [batch]
            for _ in range(2):  # a second step begins from what the first has left
                student.zero_grad()
                for part in parts:
                    student.set_requires_gradient_sync(part is parts[-1])
                    (step(student, teacher, part, objective_of(memory_mib=rows_mib(4, 64))).loss * 2).backward()
                for name, parameter in student.named_parameters():
                    assert parameter.grad is not None, name
                    torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], msg=name)

    assert in_processes(2, body) == [0, 0]


@forks
@pytest.mark.parametrize("how", [{"reshard_after_forward": True}, {"head_apart": True}], ids=["resharded", "head_apart"])
def test_a_sharded_head_is_refused_rather_than_left_without_a_gradient(tiny_llama: Build, how: dict[str, bool]) -> None:
    """A head that is a group of its own is whole only inside its `forward`: the parameters that are sharded got a gradient of zero."""

    def body(rank: int) -> None:
        with process_group(rank):
            student = sharded(LanguageModel(tiny_llama(seed=0)), **how)
            with pytest.raises(RuntimeError, match="sharded over processes"):
                step(student, OnlineTeacher(tiny_llama(seed=1)), documents(), objective_of())

    assert in_processes(2, body) == [0, 0]


# --------------------------------------------------------------------------------------------------------------------- compiled


def can_compile() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:
        return False


@pytest.mark.skipif(not can_compile(), reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_compiled_terms_are_the_same(name: str) -> None:
    given = case(tokens=23, dtype=torch.float32, bias=True)
    compiled = objective_of(name, memory_mib=rows_mib(5), compile=True)
    assert_near(fused(given, compiled), plain(given, objective_of(name)), 2e-5)
    other = case(tokens=9, dtype=torch.float32, bias=True)
    assert_near(fused(other, compiled.at_step(3)), plain(other, objective_of(name)), 2e-5)
    with torch.no_grad():
        result = compiled.fused(given.hidden, given.head, given.teacher, given.targets)
    assert result.loss.item() == pytest.approx(plain(given, objective_of(name)).loss.item(), rel=2e-5)
    empty = case(tokens=0, dtype=torch.float32)
    assert fused(empty, compiled).loss.item() == 0


def test_every_divergence_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """And differentiated as for every compiler; it is then torch that runs them, which takes no minute."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **settings: original(*args, **settings, backend="aot_eager"))
    further = [DivergenceTerm(name, getattr(divergences, name), 0.3, 1.5) for name in NAMES if name != "forward_kl"]
    given, both = case(tokens=23, dtype=torch.float32, bias=True), []
    for compiled in (True, False):
        torch.manual_seed(0)
        both.append(fused(given, objective_of(further=further, memory_mib=rows_mib(5), compile=compiled)))
    assert_near(*both, 2e-5)
