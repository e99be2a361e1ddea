"""One table of properties that every divergence passes; a new one is picked up by its name."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_distill.losses import divergences
from mini_distill.losses.catalogue import FALL_AS_ONE_OVER_T, divergence_parameters

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in divergence_parameters()),
    *(("jsd", {"jsd_beta": beta}) for beta in (0.0, 0.1, 0.9, 1.0)),
    *((name, {"skew": 0.0}) for name in ("skew_forward_kl", "skew_reverse_kl")),
    ("adaptive_kl", {"head_mass": 0.9}),
    *(("alpha_beta", {"ab_alpha": a, "ab_beta": b}) for a, b in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 2.0), (1.0, 1.0))),
    ("ranking_hinge", {"top_k": 3, "margin": 0.2}),
    ("ranking_logistic", {"top_k": 3}),
]
CROSS_ENTROPIES = ("teacher_argmax_ce", "teacher_sample_ce")  # their floor is an entropy, not 0
RANKINGS = ("ranking_hinge", "ranking_logistic")  # 0 already where the ranks agree
FIRST_ORDER = ("total_variation", "ranking_hinge")  # the slope at equality has a step
RANDOM = ("teacher_sample_ce",)


def not_for(case: tuple[str, dict[str, Any]], *groups: tuple[str, ...]) -> None:
    """The property does not hold for these, as their docstrings say."""
    if case[0] in itertools.chain(*groups):
        pytest.skip(f"{case[0]} has no such property")


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{''.join(f'-{v}' for v in case[1].values())}")
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


@pytest.fixture
def divergence(case: tuple[str, dict[str, Any]]) -> Callable[..., Tensor]:
    name, options = case
    function = getattr(divergences, name)

    def seeded(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        torch.manual_seed(0)
        return function(student, teacher, temperature, **options)

    return seeded


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def log_softmax_of(row: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    normaliser = max(scaled) + math.log(sum(math.exp(value - max(scaled)) for value in scaled))
    return [value - normaliser for value in scaled]


def kl(log_p: list[float], log_q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def log_mixture(weight: float, log_p: list[float], log_q: list[float]) -> list[float]:
    """log(weight · p + (1 − weight) · q), also where both underflow."""
    rows = zip(log_p, log_q, strict=True)
    return [max(a, b) + math.log(weight * math.exp(a - max(a, b)) + (1 - weight) * math.exp(b - max(a, b))) for a, b in rows]


def reference(name: str, options: dict[str, Any], student: list[float], teacher: list[float], temperature: float) -> float:
    """The definitions for one token, in Python's float64, word by word of the vocabulary."""
    log_q, log_p = log_softmax_of(student, temperature), log_softmax_of(teacher, temperature)
    p, q = [math.exp(v) for v in log_p], [math.exp(v) for v in log_q]
    if name == "alpha_beta":
        return alpha_beta(options.get("ab_alpha", 0.2), options.get("ab_beta", 0.7), log_p, log_q)
    if name == "adaptive_kl":
        weight = options.get("weight", adaptive_weight(p, q, options.get("head_mass", 0.5)))
        return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)
    if name in RANKINGS:
        return ranking(name, options, log_p, log_q)
    beta, skew = options.get("jsd_beta", 0.5), options.get("skew", 0.1)
    definitions = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "symmetric_kl": lambda: (kl(log_p, log_q) + kl(log_q, log_p)) / 2,
        "jsd": lambda: jsd(beta, log_p, log_q),
        "skew_forward_kl": lambda: kl(log_p, log_mixture(skew, log_p, log_q)) if skew else kl(log_p, log_q),
        "skew_reverse_kl": lambda: kl(log_q, log_mixture(skew, log_q, log_p)) if skew else kl(log_q, log_p),
        "total_variation": lambda: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "teacher_argmax_ce": lambda: -log_q[p.index(max(p))],
    }
    assert name in definitions, f"write the definition of {name} here, as a loop"
    return definitions[name]()


def jsd(beta: float, log_p: list[float], log_q: list[float]) -> float:
    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = log_mixture(beta, log_p, log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def alpha_beta(alpha: float, beta: float, log_p: list[float], log_q: list[float]) -> float:
    """Equation 5 of ABKD; on an edge by its limit, written from the series of a power."""
    if alpha == 0:
        return alpha_beta(beta, 0.0, log_q, log_p)
    total = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        if beta == 0:
            total += (math.exp(alpha * a) * (alpha * (a - b) - 1) + math.exp(alpha * b)) / alpha**2
            continue
        both = alpha + beta
        middle = alpha / both * math.exp(both * a) + beta / both * math.exp(both * b)
        total -= (math.exp(alpha * a + beta * b) - middle) / (alpha * beta)
    return total


def adaptive_weight(p: list[float], q: list[float], head_mass: float) -> float:
    head, tail, mass = 0.0, 0.0, 0.0
    for word in sorted(range(len(p)), key=lambda i: -p[i]):
        gap = abs(p[word] - q[word])
        head, tail = (head + gap, tail) if mass < head_mass else (head, tail + gap)
        mass += p[word]
    return head / (head + tail) if head + tail > 0 else 0.5


def ranking(name: str, options: dict[str, Any], log_p: list[float], log_q: list[float]) -> float:
    top = sorted(range(len(log_p)), key=lambda i: -log_p[i])[: options.get("top_k", 16)]
    values = []
    for i, j in itertools.combinations(top, 2):
        teacher, student = log_p[i] - log_p[j], log_q[i] - log_q[j]
        if name == "ranking_hinge":
            values.append(max(0.0, min(options.get("margin", 1.0), teacher) - student) if teacher > 0 else 0.0)
        else:
            sure, unsure = log_sigmoid(teacher), log_sigmoid(-teacher)
            values.append(math.exp(sure) * (sure - log_sigmoid(student)) + math.exp(unsure) * (unsure - log_sigmoid(-student)))
    return sum(values) / len(values)


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def reference_values(case: tuple[str, dict[str, Any]], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return torch.tensor([reference(*case, s, t, temperature) for s, t in rows], dtype=torch.float64)


def reference_slopes(case: tuple[str, dict[str, Any]], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The gradient of the sum of `reference_values`, by central differences of fourth order."""
    slopes, step = torch.zeros(student.shape, dtype=torch.float64), 1e-3 * temperature
    for token, word in itertools.product(*map(range, student.shape)):
        row = student[token].tolist()
        name, options = case
        if name == "adaptive_kl":  # its weight takes no gradient: it stays what it is here
            p, q = ([math.exp(v) for v in log_softmax_of(values, temperature)] for values in (teacher[token].tolist(), row))
            options = {"weight": adaptive_weight(p, q, options.get("head_mass", 0.5))}

        def moved(steps: int, row: list[float] = row, token: int = token, word: int = word, options: dict[str, Any] = options) -> float:
            there = [*row[:word], row[word] + steps * step, *row[word + 1 :]]
            return reference(case[0], options, there, teacher[token].tolist(), temperature)

        slopes[token, word] = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    return slopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_a_reference_loop(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], temperature: float, dtype: torch.dtype
) -> None:
    """Divided by the vocabulary (trl#4105), without the teacher's entropy (torchtune), or 100 times too small (easydistill#34)."""
    not_for(case, RANDOM)
    student, teacher = logits(5, 7, dtype=dtype).requires_grad_(), logits(5, 7, seed=1, dtype=dtype)
    value = divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.dtype == gradient.dtype == dtype
    tolerance = {"rtol": 3e-5, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(value.double(), reference_values(case, student, teacher, temperature), **tolerance)
    torch.testing.assert_close(gradient.double(), reference_slopes(case, student, teacher, temperature), **tolerance)


def test_gradcheck(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]) -> None:
    not_for(case, ("adaptive_kl",))
    teacher = logits(3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 1.5), (logits(3, 6).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_exactly_when_the_distributions_are_equal(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    not_for(case, CROSS_ENTROPIES, RANKINGS, FIRST_ORDER)
    same = logits(4, 9, dtype=dtype).requires_grad_()
    value = divergence(same, same.detach() + 5, 2.0)
    value.sum().backward()
    smallest = torch.finfo(dtype).eps * 50
    assert value.abs().max() < smallest and same.grad is not None and same.grad.abs().max() < smallest
    assert divergence(same, logits(4, 9, seed=1, dtype=dtype)).min() > 1e-3


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2, 1.0, 10.0])
def test_never_negative(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], noise: float) -> None:
    student, teacher = logits(200, 1000, dtype=torch.float32), logits(200, 1000, dtype=torch.float32)
    student += noise * logits(200, 1000, seed=1, dtype=torch.float32)
    assert divergence(student, teacher).min() >= 0  # whatever rounds
    if noise and case[0] not in RANKINGS:
        assert divergence(student.double(), teacher.double()).min() > 0


def test_the_gradient_near_equality_is_not_clamped_away(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]) -> None:
    """A value that rounding makes negative, clamped to 0, loses its gradient (verl#7856)."""
    not_for(case, CROSS_ENTROPIES, FIRST_ORDER)
    teacher = logits(50, 100, dtype=torch.float32)
    student = (teacher + 1e-4 * logits(50, 100, seed=1, dtype=torch.float32)).requires_grad_()
    exact = student.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(student, teacher).sum(), student)
    (expected,) = torch.autograd.grad(divergence(exact, teacher.double()).sum(), exact)
    assert ((gradient - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.05


def test_a_constant_added_to_the_logits_changes_nothing(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    torch.testing.assert_close(divergence(student + 7, teacher - 3), divergence(student, teacher))


def test_a_second_derivative_is_right_or_refused(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]) -> None:
    """That of the forward KL, whose gradient is written by hand, was 0 in silence."""
    not_for(case, ("adaptive_kl",))  # whose weight takes no gradient
    student, teacher = logits(3, 6).requires_grad_(), logits(3, 6, seed=1)
    if case[0] == "forward_kl":
        with pytest.raises(RuntimeError, match="there is no second derivative"):
            torch.autograd.grad(divergence(student, teacher, 1.5).sum(), student, create_graph=True)
    else:
        assert torch.autograd.gradgradcheck(lambda s: divergence(s, teacher, 1.5), (student,))


def test_no_gradient_reaches_the_teacher(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 9).requires_grad_(), logits(4, 9, seed=1).requires_grad_()
    divergence(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(divergence: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A log-softmax in bfloat16 made gradients 3–31 % wrong (speculators#788) and KL negative (EasyDeL#267)."""
    student, teacher = logits(4, 99, dtype=dtype).requires_grad_(), logits(4, 99, seed=1, dtype=dtype)
    wide = student.detach().float().requires_grad_()
    value, expected = divergence(student, teacher, 2.0), divergence(wide, teacher.float(), 2.0)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    value.sum().backward()
    expected.sum().backward()
    assert student.grad is not None and wide.grad is not None and torch.equal(student.grad, wide.grad.to(dtype))


def test_autocast_does_not_narrow_the_computation(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 99, dtype=torch.float32), logits(4, 99, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = divergence(student, teacher)
    assert torch.equal(value, divergence(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e4])
def test_extreme_logits_stay_right_in_value_and_finite_in_gradient(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], dtype: torch.dtype, temperature: float
) -> None:
    """Reverse KL and JSD with a finite value had a NaN gradient when probabilities underflowed (Soup#719)."""
    one_hot, other, flat, steep = [80.0, -80, -80, -80], [-80.0, 80, -80, -80], [0.0, 0, 0, 0], [1e4, 0.0, -1e4, 0]
    pairs = list(itertools.product([one_hot, other, flat, steep], repeat=2))
    student = torch.tensor([s for s, _ in pairs], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([t for _, t in pairs], dtype=dtype)
    value = divergence(student, teacher, temperature)
    value.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all() and value.isfinite().all()
    if case[0] not in (*RANKINGS, *RANDOM):  # which of several equal tokens are on top is left open
        torch.testing.assert_close(value.double(), reference_values(case, student, teacher, temperature), rtol=1e-5, atol=1e-6)


def test_the_vocabulary_is_the_last_axis_whatever_stands_before(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]
) -> None:
    """With dim=1 hard-coded, (N, C) is right and (batch, seq, vocab) wrong (torchdistill)."""
    student, teacher = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    value = divergence(student, teacher)
    assert value.shape == (2, 3)
    torch.testing.assert_close(value.flatten(), divergence(student.flatten(0, 1), teacher.flatten(0, 1)))
    if case[0] not in RANDOM:  # whose draws for one token are others
        torch.testing.assert_close(value[1, 2], divergence(student[1, 2], teacher[1, 2]))


def test_forward_and_reverse_are_not_swapped() -> None:
    """Peers had them swapped in code or documents (ms-swift#6334). p = (½, ½), q = (0.9, 0.1)."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergences.forward_kl(student, teacher).item() == pytest.approx(forward)
    assert divergences.reverse_kl(student, teacher).item() == pytest.approx(reverse)
    assert divergences.jsd(student, teacher, jsd_beta=0.0).item() == pytest.approx(forward)
    assert divergences.jsd(student, teacher, jsd_beta=1.0).item() == pytest.approx(reverse)


def test_the_mixture_of_jsd_gives_beta_to_the_teacher() -> None:
    """A reversed mixture agrees at one half and nowhere else (trl#3043)."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    m = [0.1 * 0.5 + 0.9 * 0.9, 0.1 * 0.5 + 0.9 * 0.1]
    to_teacher = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    to_student = 0.9 * math.log(0.9 / m[0]) + 0.1 * math.log(0.1 / m[1])
    expected = 0.1 * to_teacher + 0.9 * to_student
    assert divergences.jsd(student, teacher, jsd_beta=0.1).item() == pytest.approx(expected)


def test_total_variation_is_zero_at_equality_and_at_most_one() -> None:
    same = logits(4, 9)
    assert divergences.total_variation(same, same + 5).max() < 1e-12
    assert divergences.total_variation(torch.tensor([90.0, 0, 0]), torch.tensor([0, 90.0, 0])).item() == pytest.approx(1)


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_are_zero_at_equality_and_see_a_wrong_order(name: str) -> None:
    teacher = logits(4, 9).requires_grad_()
    function = getattr(divergences, name)
    assert function(teacher.detach() + 3, teacher).abs().max() < 1e-12
    assert (function(-teacher.detach(), teacher) > 0.1).all()
    assert (function(logits(50, 99, seed=2), logits(50, 99, seed=3)) > 0).all()


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_expectation_of_samples_is_the_forward_kl_and_the_entropy(num_samples: int) -> None:
    torch.manual_seed(0)
    student, teacher = logits(3, 5), logits(3, 5, seed=1)
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    many = [t.expand(40_000, 3, 5) for t in (student, teacher)]
    drawn = divergences.teacher_sample_ce(*many, num_samples=num_samples)
    error = drawn.mean(0) - divergences.forward_kl(student, teacher) - entropy
    assert (error.abs() < 5 * drawn.std(0) / 200).all()


@pytest.mark.parametrize("where", ["teacher", "student", "both"])
def test_an_impossible_token_leaves_value_and_gradient_finite(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], where: str
) -> None:
    """0 · (−∞) is NaN: a vocabulary padded with −∞, or a constrained teacher."""
    student, teacher = logits(4, 9, dtype=torch.float32), logits(4, 9, seed=1, dtype=torch.float32)
    for name, tensor in (("teacher", teacher), ("student", student)):
        if where in (name, "both"):
            tensor[:, 5:7] = -math.inf
    student.requires_grad_()
    value = divergence(student, teacher)
    value.sum().backward()
    assert value.isfinite().all() and student.grad is not None and student.grad[:, :5].isfinite().all()
    if where == "both" and case[0] not in RANKINGS:
        keep = [i for i in range(9) if i not in (5, 6)]
        if case[0] not in RANDOM:
            torch.testing.assert_close(value, divergence(student[:, keep], teacher[:, keep]))


def test_no_token_gives_no_value(divergence: Callable[..., Tensor]) -> None:
    assert divergence(torch.zeros(0, 9, requires_grad=True), torch.zeros(0, 9)).shape == (0,)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("skew_forward_kl", {"skew": value}) for value in (-0.1, 1.0, math.nan)),
        *(("skew_reverse_kl", {"skew": value}) for value in (-0.1, 1.0)),
        *(("adaptive_kl", {"head_mass": value}) for value in (0.0, 1.0)),
        ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 0.0}),
        ("alpha_beta", {"ab_beta": -1.0}),
        *(("ranking_hinge", {"top_k": value}) for value in (1, 2.5, "abc", True)),
        ("ranking_hinge", {"margin": 0.0}),
        ("ranking_logistic", {"top_k": 1}),
        *(("teacher_sample_ce", {"num_samples": value}) for value in (0, 1.5, None)),
        ("jsd", {"jsd_beta": "half"}),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"({'|'.join(options)}): got .*, expected "):
        getattr(divergences, name)(logits(2, 9), logits(2, 9, seed=1), **options)


def test_every_divergence_has_a_preset_and_a_row_in_the_documentation() -> None:
    root = Path(__file__).parent.parent.parent
    documented = (root / "docs" / "divergences.md").read_text(encoding="utf-8")
    for name in divergence_parameters():
        assert (root / "configs" / "objective" / f"{name}.yaml").exists() and f"| `{name}` |" in documented, name
        row = next(line for line in documented.splitlines() if line.startswith(f"| `{name}` |"))
        papers = re.findall(r"arXiv\s+(\d+\.\d+)", getattr(divergences, name).__doc__ or "")
        assert all(f"](https://arxiv.org/abs/{paper})" in row for paper in papers) and "](https://" in row, row


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_mixture_outside_zero_to_one_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="jsd_beta"):
        divergences.jsd(logits(2, 3), logits(2, 3, seed=1), jsd_beta=beta)


def test_logits_of_different_vocabularies_are_refused_with_their_shapes(divergence: Callable[..., Tensor]) -> None:
    """Some broadcast, some ended in torch's own words about dimension 1."""
    with pytest.raises(ValueError, match=r"student_logits \[2, 5\] and teacher_logits \[2, 6\]: expected one shape"):
        divergence(logits(2, 5), logits(2, 6))
    with pytest.raises(TypeError, match="teacher_logits: got list, expected a tensor"):
        divergence(logits(2, 5), [[1.0]])


def test_with_temperature_squared_the_gradient_keeps_its_size(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]) -> None:
    """A temperature that was accepted and never used, or used without T², changes the size (TRL's GKD, several others)."""
    not_for(case, CROSS_ENTROPIES, FIRST_ORDER)
    sizes = []
    for temperature in (1.0, 4.0, 16.0):
        student = logits(50, 9, scale=0.05).requires_grad_()
        (temperature**2 * divergence(student, logits(50, 9, seed=1, scale=0.05), temperature)).sum().backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert max(sizes) / min(sizes) < 1.05


def test_the_gradient_falls_with_the_temperature_as_it_is_said(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]) -> None:
    """T² is for those that fall as 1/T². The gradient of total variation or of a teacher's hard labels grew as T with it."""
    sizes = []
    for temperature in (16.0, 64.0):
        student = logits(50, 99, scale=1.0).requires_grad_()
        divergence(student, logits(50, 99, seed=1, scale=1.0), temperature).sum().backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    slope = math.log(sizes[1] / sizes[0]) / math.log(64 / 16)
    assert slope == pytest.approx(-1 if case[0] in FALL_AS_ONE_OVER_T else -2, abs=0.02)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_equals_that_of_trl(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    student, teacher = logits(2, 3, 7, dtype=torch.float32), logits(2, 3, 7, seed=1, dtype=torch.float32)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0, reduction="sum")
    torch.testing.assert_close(divergences.jsd(student, teacher, 2.0, jsd_beta=beta).sum(), theirs)
