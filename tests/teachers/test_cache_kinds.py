"""What each kind keeps of a distribution, in how many bytes, and how near to it what is read back is."""

from __future__ import annotations

import math

import pytest
import torch
from caches import read_back
from torch import Tensor

from mini_distill.config import CacheConfig
from mini_distill.losses.divergences import forward_kl, reverse_kl
from mini_distill.losses.sparse import Divergence, TopKRows
from mini_distill.teachers.cache_files import join
from mini_distill.teachers.cache_kinds import LEAST, Sampled, TopK

VOCAB = 32_000
DRAW = torch.Generator().manual_seed(0)


def peaked(tokens: int, vocab_size: int = VOCAB) -> Tensor:
    """Logits as uncertain as a language model's: some tokens likely, many hardly."""
    return 2.5 * torch.randn(tokens, vocab_size, generator=torch.Generator().manual_seed(0))


def topk(k: int, vocab_size: int = VOCAB) -> TopK:
    return TopK(CacheConfig(kind="topk", k=k), vocab_size)


def listed(kind: TopK, logits: Tensor) -> TopKRows:
    """Read back."""
    return read_back(kind, kind.encode(logits, torch.zeros(len(logits), 1), DRAW), len(logits))


# ------------------------------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(("k", "vocab_size", "most"), [(64, 32_000, 158), (50, 128_256, 140), (64, 128_256, 174), (128, 128_256, 326)])
def test_a_list_takes_so_many_bytes_a_token(k: int, vocab_size: int, most: int) -> None:
    """Token numbers in two or three bytes each, levels in one and a tail in four made 200 bytes of 64 entries, where plain arrays take 192."""
    kind = topk(k, vocab_size)
    packed = kind.pack(kind.encode(peaked(64, vocab_size), torch.zeros(64, 1), DRAW))
    assert sum(column.nbytes for column in packed.values()) <= most * 64


@pytest.mark.parametrize("sampling", ["threshold", "draws"])
def test_a_sample_takes_the_bits_of_its_numbers(sampling: str) -> None:
    kind = Sampled(CacheConfig(kind="sampled", k=50, sampling=sampling), VOCAB)
    columns = kind.encode(peaked(64), torch.zeros(64, 1), DRAW)
    heads = len(columns["head_levels"])
    tails = len(columns["ids"]) - heads
    bits = 64 * (8 + 2 * 6) + heads * (15 + 8) + tails * 15 if sampling == "threshold" else 64 * (8 + 6) + heads * (15 + 6)
    size = sum(column.nbytes for column in kind.pack(columns).values())
    assert bits / 8 <= size <= bits / 8 + 5 + 8  # every column begins at a byte; two numbers say how many entries there are


# --------------------------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("k", [1, 2, 8, 50, 64, 128, 255])
def test_a_list_is_right_to_half_of_one_of_255_levels(k: int) -> None:
    logits = peaked(40)
    rows, wanted = listed(topk(k), logits), logits.log_softmax(-1).topk(k, -1)
    assert torch.equal(rows.ids, wanted.indices) and rows.ids.dtype == torch.int64
    level = (wanted.values[:, :1] - wanted.values[:, -1:]) / 255
    assert ((rows.log_probs - wanted.values).abs() <= level / 2 + 2**-10 * wanted.values.abs()).all()
    assert (rows.log_probs.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(rows.tail, 1 - wanted.values.exp().sum(-1), rtol=5e-3, atol=1e-6)


def test_chunks_of_a_sequence_are_packed_as_one() -> None:
    kind, logits = topk(5), peaked(7)
    parts = [kind.encode(part, torch.zeros(len(part), 1), DRAW) for part in logits.split(3)]
    rows, whole = read_back(kind, join(parts), 7), listed(kind, logits)
    assert torch.equal(rows.ids, whole.ids) and torch.equal(rows.log_probs, whole.log_probs)


def test_a_tiny_tail_stays_what_it_is_and_none_stays_none() -> None:
    """In half precision as it is, whatever is below 3e-8 would be 0; a student's own tail is judged by the logarithm of it."""
    tails = torch.tensor([0.0, 1e-37, 1e-20, 1e-8, 1e-3, 0.3, 1.0, 1 + 1e-7])
    kind = topk(1, 10)
    columns = kind.encode_rows(TopKRows(torch.zeros(8, 1, dtype=torch.int64), torch.full((8, 1), LEAST), tails, False))
    found = read_back(kind, columns, 8).tail
    assert found[0] == 0 and found[-1] == found[-2] == 1
    torch.testing.assert_close(found[1:-1].log(), tails[1:-1].log(), rtol=2**-11, atol=0)
    torch.testing.assert_close(found[4:6], tails[4:6], rtol=3e-3, atol=0)  # hardly more than a thousandth: its logarithm is rounded


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_certain_teacher_is_as_far_from_a_student_as_before_it_was_written(divergence: Divergence) -> None:
    """The reverse KL asks for the logarithm of a tail of 1e-13."""
    logits = torch.zeros(4, 100)
    logits[:, 3] = 35.0
    student = torch.randn(4, 100, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    kind = topk(4, 100)
    top = logits.log_softmax(-1).topk(4, -1)
    rest = logits.log_softmax(-1).exp().scatter(-1, top.indices, 0.0).sum(-1)
    exact = TopKRows(top.indices, top.values, rest, False).compare("", divergence, student, {})
    torch.testing.assert_close(listed(kind, logits).compare("", divergence, student, {}), exact, rtol=5e-3, atol=1e-5)


def test_impossible_tokens_in_a_list_can_be_written_and_read() -> None:
    """Their logarithm is no number of half precision: the whole cache was written, and then refused."""
    logits = peaked(6, 100)
    logits[:, 5:] = -math.inf
    rows = listed(topk(20, 100), logits)
    assert rows.log_probs.isfinite().all() and rows.log_probs.min() == LEAST
    torch.testing.assert_close(rows.log_probs[:, :5].exp().sum(-1), torch.ones(6), rtol=0.1, atol=0)
    assert (rows.tail == 0).all()
