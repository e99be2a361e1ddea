"""The same terms against a teacher that was written down sparsely: a few tokens of the vocabulary at each position.

Two kinds of rows, both given out in chunks by whoever holds them (`teachers/cached.py`):

- `SampledRows`: an unbiased random estimate of the whole distribution. The gradient of the forward KL is linear in the teacher's
  distribution (it is q − p), so its expectation is that of the full teacher. That of no other divergence is.
- `TopKRows`: the most likely tokens exactly, and the mass of all others, in one bucket or spread evenly over them. Never
  renormalised: a teacher whose tail is cut off teaches that what is rare is impossible, which is worse than no teacher
  (Anshumann et al. 2025, arXiv 2503.16870).

Axes: n tokens, k entries of each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Divergence = Callable[..., Tensor]

SMALLEST_TAIL = 1e-30
"""In place of a tail that rounds to 0: its logarithm would be infinite, and 0 · ∞ no number."""


@dataclass
class SampledRows:
    """Weights on a few tokens whose expectation is the teacher's distribution p.

    Attributes:
        offsets: `(n + 1,)` int64 on the CPU: the entries of token i are `offsets[i] : offsets[i + 1]`.
        ids: `(entries,)` int64.
        weights: `(entries,)`, E[weights at id v] = p_v.
        entropy: `(n,)` of p, in nats.
    """

    offsets: Tensor
    ids: Tensor
    weights: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> SampledRows:
        start, stop, _ = rows.indices(len(self))
        offsets = self.offsets[start : stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        return SampledRows(offsets - offsets[0], self.ids[entries], self.weights[entries], self.entropy[rows])

    def to(self, device: torch.device) -> SampledRows:
        """On `device`, but for the offsets, which are only counted with."""
        return SampledRows(self.offsets, self.ids.to(device), self.weights.to(device), self.entropy.to(device))

    def compare(self, name: str, divergence: Divergence, student_log_probs: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The forward KL of each token, `(n,)`: Σ w · (−log q) − entropy. Its expectation is KL(p ‖ q).

        A single token's value can be negative: it is an estimate.
        """
        assert name == "forward_kl", name  # anything else was refused with the configuration
        token = torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff()).to(self.ids.device)
        cross_entropy = student_log_probs.new_zeros(len(self))
        cross_entropy = cross_entropy.index_add(0, token, -self.weights.to(student_log_probs) * student_log_probs[token, self.ids])
        return cross_entropy - self.entropy.to(student_log_probs)


@dataclass
class TopKRows:
    """The teacher's most likely tokens, and the mass of all others.

    Attributes:
        ids: `(n, k)` int64, distinct in each row.
        log_probs: `(n, k)`.
        tail: `(n,)`, the mass of all tokens that are not listed.
        spread: Whether the tail is laid evenly over the tokens that are not listed (the distribution is then whole, and wrong in
            its tail); else they are one outcome, on the student's side too (then nothing is said of how the tail is divided).
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    spread: bool

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> TopKRows:
        return TopKRows(self.ids[rows], self.log_probs[rows], self.tail[rows], self.spread)

    def to(self, device: torch.device) -> TopKRows:
        """On `device`."""
        return TopKRows(self.ids.to(device), self.log_probs.to(device), self.tail.to(device), self.spread)

    def compare(self, name: str, divergence: Divergence, student_log_probs: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Any divergence between the student and what is listed, `(n,)`.

        With one bucket it is the divergence of two distributions over k + 1 outcomes; a KL is then never more than the full one.
        One that looks at the likeliest tokens alone finds them listed: the tail is nothing that it could take for one.
        """
        log_p, rest = self.log_probs.to(student_log_probs), student_log_probs.shape[-1] - self.ids.shape[-1]
        log_tail = self.tail.to(student_log_probs).clamp(min=SMALLEST_TAIL).log()[:, None]
        of_likeliest = getattr(divergence, "looks_at", None) == "likeliest"
        if self.spread and not of_likeliest:
            dense = (log_tail - math.log(max(1, rest))).expand_as(student_log_probs).scatter(-1, self.ids, log_p)
            return divergence(student_log_probs, dense, 1.0, **options)
        listed = student_log_probs.gather(-1, self.ids)
        if rest == 0:
            return divergence(listed, log_p, 1.0, **options)
        others = student_log_probs.scatter(-1, self.ids, -math.inf).logsumexp(-1, keepdim=True)
        bucket = torch.full_like(log_tail, -math.inf) if of_likeliest else log_tail
        return divergence(torch.cat([listed, others], -1), torch.cat([log_p, bucket], -1), 1.0, **options)


SparseRows = SampledRows | TopKRows
