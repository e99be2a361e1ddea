"""Sparse targets against the dense distribution they stand for, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mini_distill.losses.divergences import forward_kl, jsd, ranking_hinge, ranking_logistic, reverse_kl, teacher_argmax_ce
from mini_distill.losses.objective import DivergenceTerm, Objective
from mini_distill.losses.sparse import SampledRows, SparseRows, TopKRows
from mini_distill.models.head import OutputHead
from mini_distill.teachers.sampling import threshold_sample

VOCAB = 23
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def distributions(tokens: int = 6, vocab: int = VOCAB, seed: int = 0, spread: float = 2.0) -> Tensor:
    """`(tokens, vocab)` float64."""
    logits = torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (spread * logits).softmax(-1)


def student_logits(tokens: int = 6, vocab: int = VOCAB) -> Tensor:
    return 2 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def top_k(probs: Tensor, k: int, spread: bool = False) -> TopKRows:
    values, ids = probs.topk(k, -1)
    return TopKRows(ids, values.log(), probs.scatter(-1, ids, 0.0).sum(-1), spread)


def sampled(probs: Tensor, k: int, generator: torch.Generator) -> SampledRows:
    """A threshold sample, head and tail of a token side by side."""
    entries, number = threshold_sample(probs, k, generator), torch.arange(len(probs))
    head, tail = number.repeat_interleave(entries.head_counts), number.repeat_interleave(entries.tail_counts)
    left = 1 - torch.zeros(len(probs), dtype=torch.float64).index_add(0, head, entries.head_weights.double())
    order = torch.cat([head, tail]).argsort(stable=True)
    ids = torch.cat([entries.head_ids, entries.tail_ids])[order]
    weights = torch.cat([entries.head_weights.double(), (left / entries.tail_counts.clamp(min=1))[tail]])[order]
    counts = entries.head_counts + entries.tail_counts
    return SampledRows(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), ids, weights, torch.special.entr(probs).sum(-1))


def ragged(counts: list[int], vocab: int = VOCAB) -> SampledRows:
    """Entries with weights that tell where they are from."""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total = int(offsets[-1])
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(vocab, (total,), generator=draw)
    weights = torch.rand(total, generator=draw, dtype=torch.float64)
    return SampledRows(offsets, ids, weights, torch.rand(len(counts), generator=draw, dtype=torch.float64))


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return found


# --------------------------------------------------------------------------------------------------------------------- sampled


def test_sampled_rows_are_the_weighted_cross_entropy_less_the_entropy() -> None:
    """Against a loop, in value and gradient, with ragged counts and a token without any entry."""
    rows, logits = ragged([3, 0, 1, 7, 0, 2]), student_logits()

    def loop(logits: Tensor) -> Tensor:
        values = []
        for token in range(len(rows)):
            value = -rows.entropy[token]
            for entry in range(int(rows.offsets[token]), int(rows.offsets[token + 1])):
                value = value - rows.weights[entry] * logits[token].log_softmax(-1)[rows.ids[entry]]
            values.append(value)
        return torch.stack(values)

    def ours(logits: Tensor) -> Tensor:
        return rows.compare("forward_kl", forward_kl, logits.log_softmax(-1), {})

    torch.testing.assert_close(ours(logits), loop(logits), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, logits), gradient(loop, logits), rtol=1e-12, atol=1e-12)


def test_entries_that_list_the_whole_vocabulary_are_the_forward_kl() -> None:
    probs, logits = distributions(), student_logits()
    ids = torch.arange(VOCAB).repeat(len(probs))
    rows = SampledRows(torch.arange(len(probs) + 1) * VOCAB, ids, probs.flatten(), torch.special.entr(probs).sum(-1))
    torch.testing.assert_close(rows.compare("forward_kl", forward_kl, logits.log_softmax(-1), {}), forward_kl(logits, probs.log()))


def test_the_same_token_twice_counts_twice() -> None:
    once = SampledRows(torch.tensor([0, 1]), torch.tensor([3]), torch.tensor([0.6]), torch.zeros(1))
    twice = SampledRows(torch.tensor([0, 2]), torch.tensor([3, 3]), torch.tensor([0.2, 0.4]), torch.zeros(1))
    log_probs = student_logits(1).float().log_softmax(-1)
    torch.testing.assert_close(*(rows.compare("forward_kl", forward_kl, log_probs, {}) for rows in (once, twice)))


@pytest.mark.parametrize("counts", [[2, 3, 1, 4, 2, 5], [0, 0, 3, 0, 4, 0], [0] * 6, [1] * 6])
def test_slices_keep_every_entry_with_its_token(counts: list[int]) -> None:
    """An offset by one gives a token the entries of its neighbour, and the loss still falls."""
    rows, log_probs = ragged(counts), student_logits().log_softmax(-1)
    whole = rows.compare("forward_kl", forward_kl, log_probs, {})
    for size in (1, 2, 4, 6):
        parts = [slice(start, start + size) for start in range(0, 6, size)]
        assert sum(len(rows[part]) for part in parts) == 6
        found = torch.cat([rows[part].compare("forward_kl", forward_kl, log_probs[part], {}) for part in parts])
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    inner = rows[1:5][1:3]  # a tile of a chunk
    torch.testing.assert_close(inner.compare("forward_kl", forward_kl, log_probs[2:4], {}), whole[2:4], rtol=0, atol=1e-12)
    assert len(rows[6:]) == 0 and rows[6:].compare("forward_kl", forward_kl, log_probs[6:], {}).shape == (0,)


def test_the_gradient_of_sampled_targets_is_unbiased() -> None:
    """Truncated and renormalised targets are not, and no number of tokens mends it (arXiv 2503.16870)."""
    probs, logits = distributions(spread=1.0), student_logits()
    exact = gradient(lambda q: forward_kl(q, probs.log()), logits)
    rows = sampled(probs.repeat(2000, 1), 8, torch.Generator().manual_seed(3))
    drawn = gradient(lambda q: rows.compare("forward_kl", forward_kl, q.log_softmax(-1), {}), logits.repeat(2000, 1))
    drawn = drawn.view(2000, *probs.shape)
    error = drawn.std(0) / 2000**0.5
    assert ((drawn.mean(0) - exact).abs() <= 5 * error + 1e-6).all()  # 138 numbers
    assert error.max() < 0.01

    values, ids = probs.topk(8, -1)
    renormalised = torch.zeros_like(probs).scatter(-1, ids, values / values.sum(-1, keepdim=True))
    biased = gradient(lambda q: -(renormalised * q.log_softmax(-1)).sum(-1), logits)
    assert (biased - exact).abs().max() > 0.02


def test_sampled_rows_refuse_any_divergence_that_is_not_linear_in_the_teacher() -> None:
    with pytest.raises(AssertionError):
        ragged([1]).compare("reverse_kl", reverse_kl, student_logits(1).log_softmax(-1), {})


# ----------------------------------------------------------------------------------------------------------------------- top k


def bucket_reference(divergence: Callable[..., Tensor], rows: TopKRows, logits: Tensor) -> Tensor:
    """Two distributions over k + 1 outcomes, token by token."""
    values = []
    for token, q in enumerate(logits.softmax(-1)):
        rest = torch.ones(VOCAB, dtype=torch.bool)
        rest[rows.ids[token]] = False
        student = torch.cat([q[rows.ids[token]], q[rest].sum()[None]])
        teacher = torch.cat([rows.log_probs[token].exp(), rows.tail[token][None]])
        values.append(divergence(student.log(), teacher.log()))
    return torch.stack(values)


def spread_reference(divergence: Callable[..., Tensor], rows: TopKRows, logits: Tensor) -> Tensor:
    values = []
    for token, q in enumerate(logits):
        teacher = torch.full((VOCAB,), float(rows.tail[token]) / (VOCAB - rows.ids.shape[1]), dtype=torch.float64)
        teacher[rows.ids[token]] = rows.log_probs[token].exp()
        values.append(divergence(q, teacher.log()))
    return torch.stack(values)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
@pytest.mark.parametrize("spread", [False, True])
def test_top_k_rows_equal_a_loop(name: str, k: int, spread: bool) -> None:
    rows, logits, divergence = top_k(distributions(), k, spread), student_logits(), DIVERGENCES[name]
    reference = spread_reference if spread else bucket_reference
    ours = lambda q: rows.compare(name, divergence, q.log_softmax(-1), {})  # noqa: E731
    wanted = lambda q: reference(divergence, rows, q)  # noqa: E731
    torch.testing.assert_close(ours(logits), wanted(logits), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(ours, logits), gradient(wanted, logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [VOCAB - 1, VOCAB])
@pytest.mark.parametrize("spread", [False, True])
def test_all_or_all_but_one_token_is_the_dense_divergence(name: str, k: int, spread: bool) -> None:
    probs, logits = distributions(), student_logits()
    rows, divergence = top_k(probs, k, spread), DIVERGENCES[name]
    ours = lambda q: rows.compare(name, divergence, q.log_softmax(-1), {})  # noqa: E731
    dense = lambda q: divergence(q, probs.log())  # noqa: E731
    torch.testing.assert_close(ours(logits), dense(logits), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(ours, logits), gradient(dense, logits), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_of_nothing_is_finite(name: str, spread: bool, dtype: torch.dtype) -> None:
    """0 · log 0: a teacher that is certain has a tail that rounds to 0, and one NaN ends the run."""
    probs = distributions().to(dtype)
    values, ids = probs.topk(4, -1)
    rows = TopKRows(ids, (values / values.sum(-1, keepdim=True)).log(), torch.zeros(len(probs), dtype=dtype), spread)
    logits = student_logits().to(dtype)
    ours = lambda q: rows.compare(name, DIVERGENCES[name], q.log_softmax(-1), {})  # noqa: E731
    assert ours(logits).isfinite().all() and gradient(ours, logits).isfinite().all()
    if name == "forward_kl":  # what has no mass adds nothing
        listed = logits.softmax(-1).gather(-1, ids)
        wanted = (rows.log_probs.exp() * (rows.log_probs - listed.log())).sum(-1)
        torch.testing.assert_close(ours(logits), wanted, rtol=1e-4, atol=1e-5)


OF_LIKELIEST: dict[str, tuple[Callable[..., Tensor], dict[str, int]]] = {
    "teacher_argmax_ce": (teacher_argmax_ce, {}),
    "ranking_hinge": (ranking_hinge, {"top_k": 4}),
    "ranking_logistic": (ranking_logistic, {"top_k": 3}),
}


@pytest.mark.parametrize("name", OF_LIKELIEST)
@pytest.mark.parametrize("k", [4, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("spread", [False, True])
def test_what_looks_at_the_likeliest_tokens_is_as_from_the_whole_distribution(name: str, k: int, spread: bool) -> None:
    """The tail was handed over as one more token: where it outweighed the first one, the student was taught the bucket as its label."""
    probs, logits = distributions(spread=0.3), student_logits()
    rows, (divergence, options) = top_k(probs, k, spread), OF_LIKELIEST[name]
    assert k > 4 or (rows.tail > rows.log_probs[:, 0].exp()).all()
    ours = lambda q: rows.compare(name, divergence, q.log_softmax(-1), options)  # noqa: E731
    dense = lambda q: divergence(q, probs.log(), **options)  # noqa: E731
    torch.testing.assert_close(ours(logits), dense(logits), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(ours, logits), gradient(dense, logits), rtol=1e-8, atol=1e-12)


def test_one_bucket_is_never_more_than_the_full_divergence() -> None:
    """Data processing: merging outcomes can only lose."""
    probs, logits = distributions(tokens=50), student_logits(50)
    for k in (1, 3, 10, 20):
        found = top_k(probs, k).compare("forward_kl", forward_kl, logits.log_softmax(-1), {})
        assert (found >= 0).all() and (found <= forward_kl(logits, probs.log()) + 1e-12).all()


def test_equal_distributions_are_at_zero_with_one_bucket() -> None:
    probs = distributions()
    assert top_k(probs, 4).compare("forward_kl", forward_kl, probs.log(), {}).abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------- through the output head


@dataclass
class Given:
    """A teacher that gives out the rows it was given."""

    all_rows: SparseRows

    def rows(self, rows: slice, vocab_size: int | None = None) -> SparseRows:
        return self.all_rows[rows]


def head_and_hidden(tokens: int, vocab: int = VOCAB) -> tuple[OutputHead, Tensor]:
    draw = torch.Generator().manual_seed(4)
    module = nn.Linear(5, vocab + 3, bias=False, dtype=torch.float64)  # three rows pad it
    with torch.no_grad():
        module.weight.copy_(torch.randn(vocab + 3, 5, generator=draw, dtype=torch.float64))
    return OutputHead(module), torch.randn(tokens, 5, generator=draw, dtype=torch.float64)


SPARSE: dict[str, Callable[[], SparseRows]] = {
    "sampled": lambda: ragged([3, 0, 1, 7, 0, 2, 5, 1, 1]),
    "nothing listed": lambda: ragged([0] * 9),
    "bucket": lambda: top_k(distributions(9), 4),
    "spread": lambda: top_k(distributions(9), 4, spread=True),
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("rows_of_a_chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_through_the_head_equal_whole_logits(kind: str, rows_of_a_chunk: int, temperature: float) -> None:
    rows = SPARSE[kind]()
    head, hidden = head_and_hidden(9)
    targets = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(5))
    memory = (rows_of_a_chunk + 0.5) * 2 * 4 * (VOCAB + 3) / 2**20
    objective = Objective(
        forward_kl, "forward_kl", temperature=temperature, kl_weight=0.7, ce_weight=0.3, vocab_size=VOCAB, memory_mib=memory
    )
    leaf = hidden.clone().requires_grad_()
    sums = objective.fused(leaf, head, Given(rows), targets)
    sums.loss.backward()
    found, weight_gradient = leaf.grad, head.module.weight.grad.clone()
    head.module.zero_grad()

    plain = hidden.clone().requires_grad_()
    logits = (plain @ head.module.weight.T)[:, :VOCAB]
    kl = rows.compare("forward_kl", forward_kl, (logits / temperature).log_softmax(-1), {}).sum()
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (0.7 * temperature**2 * kl + 0.3 * ce).backward()
    torch.testing.assert_close(sums.terms["forward_kl"], kl.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums.terms["ce"], ce.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, plain.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weight_gradient, head.module.weight.grad, rtol=1e-9, atol=1e-10)


def test_several_terms_share_the_same_sparse_rows() -> None:
    rows = top_k(distributions(9), 4)
    head, hidden = head_and_hidden(9)
    objective = Objective(
        forward_kl, "forward_kl", kl_weight=0.5, ce_weight=0.0, vocab_size=VOCAB, further=[DivergenceTerm("reverse_kl", reverse_kl, 0.25)]
    )
    sums = objective.fused(hidden.requires_grad_(), head, Given(rows), torch.zeros(9, dtype=torch.int64))
    log_probs = (hidden @ head.module.weight.T)[:, :VOCAB].log_softmax(-1)
    wanted = {name: rows.compare(name, DIVERGENCES[name], log_probs, {}).sum() for name in ("forward_kl", "reverse_kl")}
    for name, value in wanted.items():
        torch.testing.assert_close(sums.terms[name], value.detach())
    torch.testing.assert_close(sums.loss, 0.5 * wanted["forward_kl"] + 0.25 * wanted["reverse_kl"])


@pytest.mark.parametrize("kind", SPARSE)
def test_an_objective_with_compiled_terms_takes_sparse_rows_too(kind: str) -> None:
    """The number of entries differs from chunk to chunk, for which a compiler would start again each time: these terms stay as they are."""
    head, hidden = head_and_hidden(9)
    targets = torch.zeros(9, dtype=torch.int64)
    found, wanted = (
        Objective(forward_kl, "forward_kl", vocab_size=VOCAB, compile=compile).fused(hidden, head, Given(SPARSE[kind]()), targets)
        for compile in (True, False)
    )
    assert torch.equal(found.loss, wanted.loss)


@pytest.mark.parametrize("rows", [ragged([]), top_k(distributions(1), 3)[:0]], ids=["sampled", "topk"])
def test_no_token_at_all_is_zero_with_a_graph(rows: SparseRows) -> None:
    head, hidden = head_and_hidden(0)
    sums = Objective(forward_kl, "forward_kl").fused(hidden.requires_grad_(), head, Given(rows), torch.zeros(0, dtype=torch.int64))
    sums.loss.backward()
    assert sums.loss.item() == 0 and hidden.grad is not None


def test_rows_in_single_precision_stay_near_the_reference() -> None:
    probs, logits = distributions(), student_logits()
    exact = top_k(probs, 4).compare("forward_kl", forward_kl, logits.log_softmax(-1), {})
    rows = top_k(probs, 4)
    narrow = TopKRows(rows.ids, rows.log_probs.half(), rows.tail.float(), spread=False)
    found = narrow.compare("forward_kl", forward_kl, logits.float().log_softmax(-1), {})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=5e-3)
    assert math.isfinite(found.sum().item())
