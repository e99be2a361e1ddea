"""A few weighted tokens whose expectation is the teacher's distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from caches import read_back
from torch import Tensor

from mini_distill.config import CacheConfig
from mini_distill.teachers.bit_packing import unpack
from mini_distill.teachers.cache_kinds import Sampled
from mini_distill.teachers.sampling import Entries, draw, entropy, level_table, threshold_sample, to_levels

VOCAB = 40
K = 8


def random_rows(tokens: int = 5) -> Tensor:
    return (1.5 * torch.randn(tokens, VOCAB, generator=torch.Generator().manual_seed(0))).softmax(-1)


def one_hot() -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([0, 7, VOCAB - 1]), VOCAB).float()


def uniform() -> Tensor:
    return torch.full((3, VOCAB), 1 / VOCAB)


def tiny_tail() -> Tensor:
    """One token has nearly everything; the others have 1e-9 to 1e-12, and some nothing at all."""
    probs = torch.zeros(3, VOCAB)
    probs[:, 5:20] = torch.logspace(-9, -12, 15)
    probs[:, 3] = 1 - probs.sum(-1)
    return probs


def halves() -> Tensor:
    """Two tokens that share all but a thousandth."""
    probs = torch.full((2, VOCAB), 0.001 / (VOCAB - 2))
    probs[:, 1], probs[:, 2] = 0.6, 0.399
    return probs


def on_the_threshold() -> Tensor:
    """Exactly 1 / k each."""
    probs = torch.zeros(2, VOCAB)
    probs[:, :K] = 1 / K
    return probs


ROWS: dict[str, Callable[[], Tensor]] = {f.__name__: f for f in (random_rows, one_hot, uniform, tiny_tail, halves, on_the_threshold)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(entries: Entries, tokens: int) -> Tensor:
    """The weights laid out over the vocabulary, `(tokens, VOCAB)` float64."""
    found = torch.zeros(tokens, VOCAB, dtype=torch.float64)
    heads = torch.arange(tokens).repeat_interleave(entries.head_counts)
    found.index_put_((heads, entries.head_ids), entries.head_weights.double(), accumulate=True)
    left = 1 - found.sum(-1)
    tails = torch.arange(tokens).repeat_interleave(entries.tail_counts)
    found.index_put_((tails, entries.tail_ids), (left / entries.tail_counts.clamp(min=1))[tails], accumulate=True)
    return found


TIMES = 4000


def many(probs: Tensor) -> Tensor:
    """Every row TIMES times, as that many positions."""
    return probs.repeat(TIMES, 1)


def assert_mean_is(wanted: Tensor, weights: Tensor, slack: float = 1e-6) -> None:
    """The mean of `(TIMES · tokens, VOCAB)` weights, within a few standard errors."""
    stacked = weights.view(TIMES, *wanted.shape)
    error = stacked.std(0) / TIMES**0.5
    distance = (stacked.mean(0) - wanted.double()).abs()
    seldom = wanted.double() * TIMES * K < 20  # drawn too seldom for a standard error to mean anything
    assert (distance <= 5 * error + slack + seldom * wanted).all(), (distance - 5 * error).max()
    assert ((stacked.mean(0) - wanted).sum(-1).abs() < 1e-6 + 5 * stacked.sum(-1).std(0) / TIMES**0.5).all()


# ------------------------------------------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize("name", ROWS)
def test_likely_tokens_are_kept_exactly_and_the_weights_sum_to_one(name: str) -> None:
    probs = ROWS[name]()
    entries = threshold_sample(probs, K, generator())
    heads = probs >= 1 / K
    assert entries.head_counts.tolist() == heads.sum(-1).tolist()
    assert torch.equal(entries.head_weights, probs[heads]) and torch.equal(entries.head_ids, heads.nonzero()[:, 1])
    counts = entries.head_counts + entries.tail_counts
    assert (counts <= K + 1).all() and (counts >= 1).all()
    weights = dense(entries, len(probs))
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(probs), dtype=torch.float64), rtol=0, atol=1e-6)
    tails = torch.arange(len(probs)).repeat_interleave(entries.tail_counts)
    assert (probs[tails, entries.tail_ids] > 0).all() and (probs[tails, entries.tail_ids] < 1 / K).all()


@pytest.mark.parametrize("name", ROWS)
def test_the_mean_of_many_samples_is_the_distribution(name: str) -> None:
    probs = many(ROWS[name]())
    assert_mean_is(ROWS[name](), dense(threshold_sample(probs, K, generator(1)), len(probs)))


def test_a_certain_teacher_needs_one_entry() -> None:
    entries = threshold_sample(one_hot(), K, generator())
    assert entries.head_counts.tolist() == [1, 1, 1] and entries.tail_counts.tolist() == [0, 0, 0]
    assert entries.head_ids.tolist() == [0, 7, VOCAB - 1]


def test_a_flat_teacher_is_k_different_tokens_of_the_whole_vocabulary() -> None:
    entries = threshold_sample(uniform(), K, generator())
    assert entries.head_counts.sum() == 0 and entries.tail_counts.tolist() == [K] * 3
    assert all(len(set(ids.tolist())) == K for ids in entries.tail_ids.split(K))


@pytest.mark.parametrize("sample", [lambda p, g: threshold_sample(p, K, g), lambda p, g: draw(p, K, 0.8, g)], ids=["threshold", "draws"])
def test_the_generator_decides_everything(sample: Callable[[Tensor, torch.Generator], Entries]) -> None:
    state = torch.get_rng_state()
    first, again, other = (sample(random_rows(), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    fields = ("head_counts", "head_ids", "head_weights", "tail_counts", "tail_ids")
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in fields)
    assert not all(torch.equal(getattr(first, name), getattr(other, name)) for name in fields if name != "head_counts")


@pytest.mark.parametrize("sample", [lambda p, g: threshold_sample(p, K, g), lambda p, g: draw(p, K, 1.0, g)], ids=["threshold", "draws"])
def test_no_token_at_all_gives_no_entry(sample: Callable[[Tensor, torch.Generator], Entries]) -> None:
    entries = sample(torch.zeros(0, VOCAB), generator())
    assert [len(part) for part in vars(entries).values()] == [0] * 5


@pytest.mark.parametrize("k", [1, 2, 255])
def test_the_smallest_and_the_largest_k(k: int) -> None:
    probs = (2 * torch.randn(20, 5000, generator=generator())).softmax(-1)
    entries = threshold_sample(probs, k, generator())
    counts = entries.head_counts + entries.tail_counts
    assert counts.min() >= 1 and counts.max() <= k + 1 and entries.tail_counts.max() <= 255


def test_probabilities_that_rounding_made_sum_to_less_or_more_than_one_stay_in_range() -> None:
    for factor in (1 - 3e-7, 1 + 3e-7):
        entries = threshold_sample(uniform() * factor, K, generator())
        assert entries.tail_counts.max() <= K and entries.tail_ids.max() < VOCAB
        assert threshold_sample(one_hot() * factor, K, generator()).tail_counts.sum() == 0


# ----------------------------------------------------------------------------------------------------------- independent draws


@pytest.mark.parametrize("proposal", [1.0, 0.8])
@pytest.mark.parametrize("name", ["random_rows", "halves", "one_hot", "uniform"])
def test_the_mean_of_independent_draws_is_the_distribution(name: str, proposal: float) -> None:
    probs = many(ROWS[name]())
    entries = draw(probs, K, proposal, generator(2))
    assert entries.tail_counts.sum() == 0
    assert_mean_is(ROWS[name](), dense(entries, len(probs)))


def test_draws_are_counted_and_listed_once() -> None:
    entries = draw(random_rows(), 50, 1.0, generator())
    for ids, weights in zip(
        entries.head_ids.split(entries.head_counts.tolist()), entries.head_weights.split(entries.head_counts.tolist()), strict=True
    ):
        assert len(set(ids.tolist())) == len(ids)
        counts = weights.double() * 50
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
        assert counts.sum().round() == 50
    assert entries.tail_counts.sum() == 0


# ---------------------------------------------------------------------------------------------------------------------- levels


def test_rounding_to_levels_is_unbiased() -> None:
    table = level_table(1 / 32)
    weights = torch.tensor([1 / 32, 0.0401, 0.1, 0.25, 0.777, 0.9999, 1.0])
    random = generator(5)
    found = torch.stack([table[to_levels(weights, table, random).long()] for _ in range(4000)])
    error = found.std(0) / 4000**0.5
    assert ((found.mean(0) - weights.double()).abs() <= 5 * error + 1e-7).all()
    neighbour = 32 ** (1 / 255)
    assert (found / weights <= neighbour + 1e-6).all() and (weights / found <= neighbour + 1e-6).all()


def test_levels_are_kept_by_a_second_rounding() -> None:
    table = level_table(1e-6, 16.0)
    assert torch.equal(to_levels(table, table, generator()).long(), torch.arange(256))


def test_weights_outside_the_table_become_its_ends() -> None:
    table = level_table(0.1)
    assert to_levels(torch.tensor([0.0, 2.0]), table, generator()).tolist() == [0, 255]
    assert to_levels(torch.zeros(0), table, generator()).dtype == torch.uint8


def test_entropy_of_impossible_tokens_is_nothing() -> None:
    torch.testing.assert_close(entropy(one_hot()), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(entropy(uniform()), torch.full((3,), float(np.log(VOCAB)), dtype=torch.float64), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------- what comes off the disk


def through_the_cache(kind: Sampled, probs: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The weights over the vocabulary, and the entropies, after encoding and decoding."""
    rows = read_back(kind, kind.encode(probs.log(), torch.zeros(len(probs), 1), random), len(probs))
    found = torch.zeros(len(probs), VOCAB, dtype=torch.float64)
    tokens = torch.arange(len(probs)).repeat_interleave(rows.offsets.diff())
    return found.index_put_((tokens, rows.ids), rows.weights.double(), accumulate=True), rows.entropy.double()


@pytest.mark.parametrize(
    "settings", [{}, {"sampling": "draws"}, {"sampling": "draws", "proposal": 0.8}, {"sampling": "draws", "proposal": 0.3}]
)
@pytest.mark.parametrize("name", ["random_rows", "halves", "one_hot", "uniform"])
def test_what_is_read_back_is_unbiased_too(name: str, settings: dict[str, object]) -> None:
    """Weights rounded to a byte each; a head that rounding lifted above 1 must not leave the tail too much on average."""
    probs = ROWS[name]()
    kind = Sampled(CacheConfig(kind="sampled", k=K, **settings), VOCAB)
    weights, entropies = through_the_cache(kind, many(probs), generator(6))
    assert_mean_is(probs, weights, slack=1e-5)
    entropies = entropies.view(TIMES, -1)
    error = entropies.std(0) / TIMES**0.5
    assert ((entropies.mean(0) - entropy(probs)).abs() <= 5 * error + 1e-5).all()
    if not settings:
        assert (weights.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [{}, {"sampling": "draws"}])
@pytest.mark.parametrize("k", [1, 15, 16, 255])
def test_as_many_entries_as_the_bits_of_a_count_can_hold(k: int, settings: dict[str, object]) -> None:
    """A flat row with k = 255: rounding made 256 tail entries of it, which a byte holds as 0, and all later entries moved."""
    kind = Sampled(CacheConfig(kind="sampled", k=k, **settings), 30_000)
    flat = torch.full((2, 30_000), 1 / 30_000) * (1 + 2e-7)
    columns = kind.encode(flat.log(), torch.zeros(2, 1), generator())
    packed = kind.pack(columns)
    counts = unpack([packed["counts"]], np.array([2 * kind.streams]), kind.count_bits)
    assert counts.sum() == len(columns["ids"]) == packed["entries"].sum()


def test_fifty_draws_take_as_many_bits_as_they_need() -> None:
    """Counts up to 50 are 6 bits, and a token of 128,256 is 17: a dozen entries are published as 36 bytes."""
    kind = Sampled(CacheConfig(kind="sampled", k=50, sampling="draws"), 128_256)
    assert (kind.count_bits, kind.level_bits, kind.id_bits) == (6, 6, 17)
