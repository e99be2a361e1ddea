"""Relations and attention probabilities against references written as loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_distill.losses.attention import attention_kl, attention_mse, relation_kl
from mini_distill.losses.catalogue import matching_parameters

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])  # two documents; one, then padding
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 2]]


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax_of(row: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def relations(rows: list[list[float]], documents: list[int], query: int, head: int, num_heads: int) -> list[float]:
    """Of one query to what it sees, in one relation head."""
    width = len(rows[0]) // num_heads
    channels = range(head * width, (head + 1) * width)
    seen = [key for key in range(query + 1) if documents[key] == documents[query]]
    return softmax_of([sum(rows[query][c] * rows[key][c] for c in channels) / math.sqrt(width) for key in seen])


def reference_relation_kl(student: Tensor, teacher: Tensor, num_heads: int) -> Tensor:
    value = torch.zeros(student.shape[:2], dtype=torch.float64)
    for b, documents in enumerate(DOCUMENTS):
        for query in range(len(documents)):
            for head in range(num_heads):
                q = relations(student[b].tolist(), documents, query, head, num_heads)
                p = relations(teacher[b].tolist(), documents, query, head, num_heads)
                value[b, query] += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / num_heads
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_width", [8, 12])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_relations_equal_a_reference_loop_in_value_and_gradient(num_heads: int, teacher_width: int, dtype: torch.dtype) -> None:
    student, teacher = states(2, 7, 8, dtype=dtype).requires_grad_(), states(2, 7, teacher_width, seed=1, dtype=dtype)
    value = relation_kl(student, teacher, POSITIONS, num_relation_heads=num_heads)
    assert value.dtype == dtype and value.shape == (2, 7)
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(value.double(), reference_relation_kl(student.detach(), teacher, num_heads), **tolerance)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    for b, position, channel in ((0, 0, 0), (0, 2, 3), (0, 4, 5), (0, 6, 7), (1, 1, 2), (1, 4, 7), (1, 5, 0)):
        nudge = torch.zeros(student.shape, dtype=torch.float64)
        nudge[b, position, channel] = 1e-3

        def moved(steps: int, nudge: Tensor = nudge) -> float:
            return reference_relation_kl(student.detach().double() + steps * nudge, teacher, num_heads).sum().item()

        slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / 12e-3
        assert gradient[b, position, channel].item() == pytest.approx(slope, rel=tolerance["rtol"], abs=10 * tolerance["atol"])


def test_relations_gradcheck() -> None:
    teacher = states(2, 7, 6, seed=1)
    check = (states(2, 7, 4).requires_grad_(),)
    assert torch.autograd.gradcheck(lambda s: relation_kl(s, teacher, POSITIONS, num_relation_heads=2), check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relations_are_zero_at_equality_and_never_negative(dtype: torch.dtype) -> None:
    same = states(2, 7, 32, dtype=dtype).requires_grad_()
    value = relation_kl(same, same.detach(), POSITIONS)
    value.sum().backward()
    assert value.abs().max() < 1e-6 and same.grad is not None and same.grad.abs().max() < 1e-5
    other = relation_kl(same, states(2, 7, 32, seed=1, dtype=dtype), POSITIONS)
    assert other.min() > -1e-6 and other.max() > 1e-3


def test_the_order_of_channels_within_a_head_and_a_rotation_of_them_change_nothing() -> None:
    student, teacher = states(2, 7, 8), states(2, 7, 8, seed=1)
    turned = torch.cat([teacher[..., :4].flip(-1), -teacher[..., 4:]], dim=-1)
    one, other = (relation_kl(student, t, POSITIONS, num_relation_heads=2) for t in (teacher, turned))
    torch.testing.assert_close(one, other)


def test_a_position_that_sees_itself_alone_has_nothing_to_compare() -> None:
    """The first of each document, and padding."""
    value = relation_kl(states(2, 7, 16), states(2, 7, 16, seed=1), POSITIONS)
    alone = POSITIONS == 0
    assert value[alone].abs().max() == 0 and value[~alone].min() > 0


def test_packed_documents_do_not_see_one_another() -> None:
    """Each has the value and the gradient that it has alone."""
    student, teacher = states(1, 7, 16).requires_grad_(), states(1, 7, 16, seed=1)
    packed = relation_kl(student, teacher, POSITIONS[:1])
    (gradient,) = torch.autograd.grad(packed.sum(), student)
    for part in (slice(0, 3), slice(3, 7)):
        alone = student.detach()[:, part].requires_grad_()
        value = relation_kl(alone, teacher[:, part], POSITIONS[:1, part])
        torch.testing.assert_close(packed[:, part], value)
        torch.testing.assert_close(gradient[:, part], torch.autograd.grad(value.sum(), alone)[0])


def test_a_query_does_not_see_what_comes_after_it() -> None:
    student, teacher = states(1, 7, 16), states(1, 7, 16, seed=1)
    changed = torch.cat([student[:, :5], states(1, 2, 16, seed=2)], dim=1)
    positions = torch.arange(7)[None]
    one, other = relation_kl(student, teacher, positions), relation_kl(changed, teacher, positions)
    torch.testing.assert_close(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_what_a_position_cannot_see_changes_nothing_even_if_it_is_not_a_number(filling: float, broken: str) -> None:
    """0 · NaN is NaN: a mask on the scores alone leaves the gradient of the product open."""
    plain = states(2, 7, 16).requires_grad_()
    teacher, first = states(2, 7, 16, seed=1), torch.zeros(2, 7, dtype=torch.bool)
    first[0, :3] = first[1, :5] = True
    expected = relation_kl(plain, teacher, POSITIONS)
    (slopes,) = torch.autograd.grad(expected[first].sum(), plain)

    elsewhere = {name: x.detach().masked_fill(~first[..., None], filling) for name, x in (("student", plain), ("teacher", teacher))}
    student = (elsewhere["student"] if broken == "student" else plain.detach()).requires_grad_()
    value = relation_kl(student, elsewhere["teacher"] if broken == "teacher" else teacher, POSITIONS)
    (gradient,) = torch.autograd.grad(value[first].sum(), student)
    assert torch.equal(value[first], expected[first]) and torch.equal(gradient, slopes)
    assert value[~first].isnan().all()  # and what is broken where it is looked at is not hidden


def test_what_is_not_a_number_is_seen_by_what_comes_after_it() -> None:
    student = states(1, 7, 16)
    student[0, 3] = math.nan
    value = relation_kl(student, states(1, 7, 16, seed=1), torch.arange(7)[None])
    assert value[0].isnan().tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_are_related_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    student, teacher = states(2, 7, 32, dtype=dtype).requires_grad_(), states(2, 7, 48, seed=1, dtype=dtype)
    wide = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = relation_kl(student, teacher, POSITIONS)
        expected = relation_kl(wide, teacher.float(), POSITIONS)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert torch.equal(expected, relation_kl(wide, teacher.float(), POSITIONS))
    value.sum().backward()
    expected.sum().backward()
    assert student.grad is not None and wide.grad is not None and torch.equal(student.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_states_and_zeros_are_finite_in_value_and_gradient(dtype: torch.dtype) -> None:
    student, teacher = states(2, 7, 32, dtype=dtype) * 300, states(2, 7, 32, seed=1, dtype=dtype) * 300
    student[0, 1], teacher[1, 2] = 0, 0
    student.requires_grad_()
    value = relation_kl(student, teacher, POSITIONS)
    value.sum().backward()
    assert value.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_no_relation_outlives_its_sequence() -> None:
    """R · S · S numbers for each sequence of the batch, several times over, are more than the model itself holds."""
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    student = states(3, 64, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        relation_kl(student, states(3, 64, 16, seed=1), torch.arange(64).expand(3, 64))
    assert not [shape for shape in kept if len(shape) == 3 and shape[-2:] == (64, 64)]


def test_no_gradient_reaches_the_teachers_states() -> None:
    student, teacher = states(2, 7, 16).requires_grad_(), states(2, 7, 16, seed=1).requires_grad_()
    relation_kl(student, teacher, POSITIONS).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("heads", [0, 3, 16])
def test_relation_heads_that_do_not_divide_both_widths_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"num_relation_heads: got {heads}, .* student's 8 and the teacher's 24"):
        relation_kl(states(2, 7, 8), states(2, 7, 24), POSITIONS, num_relation_heads=heads)


def test_states_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        relation_kl(states(2, 7, 8), states(2, 6, 8), POSITIONS)
    with pytest.raises(ValueError, match="shapes"):
        relation_kl(states(2, 7, 8), states(2, 7, 8), POSITIONS[:1])


# ------------------------------------------------------------------------------------------------------------- probabilities


def attention(batch: int = 2, heads: int = 3, seq: int = 5, seed: int = 0) -> Tensor:
    """Causal, so that half of it is exactly 0."""
    scores = states(batch, heads, seq, seq, seed=seed) * 2
    return scores.masked_fill(~torch.ones(seq, seq, dtype=torch.bool).tril(), -math.inf).softmax(dim=-1)


def reference_attention(function: str, student: Tensor, teacher: Tensor) -> Tensor:
    batch, heads, seq, _ = student.shape
    value = torch.zeros(batch, seq, dtype=torch.float64)
    for b in range(batch):
        for query in range(seq):
            for head in range(heads):
                for q, p in zip(student[b, head, query].tolist(), teacher[b, head, query].tolist(), strict=True):
                    if function == "mse":
                        value[b, query] += (q - p) ** 2 / heads
                    elif p > 0:
                        value[b, query] += p * math.log(p / q) / heads
    return value


FUNCTIONS = {"mse": attention_mse, "kl": attention_kl}


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_equals_a_reference_loop_in_value_and_gradient(function: str, dtype: torch.dtype) -> None:
    """The gradient is that of the scores, which is what reaches the model."""
    visible, teacher = torch.ones(5, 5, dtype=torch.bool).tril(), attention(seed=1)
    scores = states(2, 3, 5, 5)

    def student(scores: Tensor) -> Tensor:
        return scores.masked_fill(~visible, -math.inf).softmax(dim=-1)

    leaf = scores.to(dtype).requires_grad_()
    value = FUNCTIONS[function](student(leaf), teacher.to(dtype))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    assert value.dtype == dtype and value.shape == (2, 5)
    torch.testing.assert_close(value.double(), reference_attention(function, student(scores), teacher), **tolerance)
    for index in ((0, 0, 0, 0), (0, 1, 3, 2), (1, 2, 4, 4), (1, 0, 2, 1), (0, 2, 1, 4)):
        nudge = torch.zeros_like(scores)
        nudge[index] = 1e-3

        def moved(steps: int, nudge: Tensor = nudge) -> float:
            return reference_attention(function, student(scores + steps * nudge), teacher).sum().item()

        slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / 12e-3
        assert gradient[index].item() == pytest.approx(slope, rel=1e-4, abs=tolerance["atol"])


def test_attention_is_zero_at_equality_and_positive_elsewhere(function: str) -> None:
    same = attention().requires_grad_()
    value = FUNCTIONS[function](same, same.detach())
    value.sum().backward()
    assert torch.equal(value, torch.zeros(2, 5, dtype=torch.float64)) and same.grad is not None and same.grad.isfinite().all()
    assert FUNCTIONS[function](same, attention(seed=1))[:, 1:].min() > 1e-3


def test_attention_rounded_to_bfloat16_is_finite_and_never_negative(function: str) -> None:
    """Rows that sum to 1 only up to rounding made the KL negative."""
    teacher = attention(4, 3, 60).bfloat16()
    student = (teacher.float() * (1 + 0.01 * states(4, 3, 60, 60, seed=2))).bfloat16().requires_grad_()
    value = FUNCTIONS[function](student, teacher)
    value.sum().backward()
    assert value.dtype == torch.float32 and value.min() >= -1e-7 and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_zero_are_finite_in_value_and_in_the_gradient_of_the_scores(function: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.0, 1000, -1000], [80, 0, -80], [-9, 0, 9], [0, -16, 0]], dtype=torch.float32, requires_grad=True)
    student = scores.softmax(dim=-1).to(dtype)[None, None]
    rows = [[1.0, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 1, 0]]
    value = FUNCTIONS[function](student, torch.tensor(rows, dtype=dtype)[None, None])
    value.sum().backward()
    assert value.isfinite().all() and value.min() > 0 and scores.grad is not None and scores.grad.isfinite().all()


def test_where_the_student_has_almost_no_mass_the_gradient_of_the_scores_keeps_its_size() -> None:
    """A floor of 1e-6 under the probabilities takes the gradient from where it is needed most."""
    scores = torch.tensor([[[[40.0, 0.0]]]], requires_grad=True)
    attention_kl(scores.softmax(dim=-1), torch.tensor([[[[0.0, 1.0]]]])).sum().backward()
    assert scores.grad is not None and scores.grad.flatten().tolist() == pytest.approx([1, -1], rel=1e-3)


def test_more_padding_changes_nothing(function: str) -> None:
    """A mean over keys would."""
    student, teacher = attention(), attention(seed=1)
    pad = (0, 3, 0, 3)
    longer = FUNCTIONS[function](torch.nn.functional.pad(student, pad), torch.nn.functional.pad(teacher, pad))
    torch.testing.assert_close(longer[:, :5], FUNCTIONS[function](student, teacher))


def test_heads_of_different_numbers_are_averaged_on_both_sides(function: str) -> None:
    student, teacher = attention(heads=2).requires_grad_(), attention(heads=6, seed=1)
    value = FUNCTIONS[function](student, teacher)
    expected = reference_attention(function, student.detach().mean(1, keepdim=True), teacher.mean(1, keepdim=True))
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_no_gradient_reaches_the_teachers_attention(function: str) -> None:
    student, teacher = attention().requires_grad_(), attention(seed=1).requires_grad_()
    FUNCTIONS[function](student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("other", [(2, 3, 6, 6), (1, 3, 5, 5), (2, 5, 5)])
def test_attention_of_other_shapes_is_refused_not_broadcast(function: str, other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shapes"):
        FUNCTIONS[function](attention(), torch.zeros(other))


def test_the_catalogue_offers_these_with_their_options() -> None:
    offered = matching_parameters()
    assert offered["relation_kl"] == ("num_relation_heads",) and offered["attention_mse"] == offered["attention_kl"] == ()
