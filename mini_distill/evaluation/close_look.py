"""One pass over held-out text that keeps what a single number hides: `details.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..data.mixing import Mixture
from ..data.order import Stream
from ..errors import DataError
from ..losses.reduction import loss_mask
from ..models.head import LanguageModel
from ..onlooker import bar
from ..storage import atomic_write_text
from .calibration import NUM_BINS, reliability_bins, reliability_sums
from .differences import Differences
from .isolation import without_side_effects
from .language_model import Sums, add, metrics, per_token, totals
from .logit_chunks import LogitChunk, logit_chunks, real_vocabulary
from .samples import Sample
from .slices import EntropySlices, PositionSlices, Slices

RANKED = 64  # of the teacher's most likely tokens, for the rank correlation


@dataclass(frozen=True)
class Groups:
    """A name, such as that of a column, and the label of a document by its sequence's number and its origin."""

    name: str
    label: Callable[[int, str], str]


def parts_of_mixture(held_out: Stream) -> Groups | None:
    """The parts of a mixture; None for anything else."""
    return Groups("data", lambda index, origin: held_out.part_of(index)) if isinstance(held_out, Mixture) else None


def write_details(folder: Path, details: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Write `details.json`: what is measured and is not a flat number. Strict JSON; a number that is not finite becomes null."""
    whole = details | {"samples": [asdict(sample) for sample in samples]}
    atomic_write_text(folder / "details.json", json.dumps(_finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CloseLook:
    """Student and teacher over held-out text: the same figures as `Evaluator`, further ones, and where they come from.

    Args:
        student: The model that is measured.
        teacher: Beside it, or None.
        tokenizer: Of both.
        held_out: The sequences.
        top_k: Size of the sets of most likely tokens whose overlap is `topk_agreement`.
        num_differences: Texts kept where the student is furthest from the teacher.
        group_of: The groups that the figures are split by too, such as languages.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: Any,
        held_out: Stream,
        *,
        top_k: int = 5,
        num_differences: int = 8,
        group_of: Groups | None = None,
    ) -> None:
        self.models = (student, teacher)
        self.student = LanguageModel(student, "model")
        self.teacher = None if teacher is None else LanguageModel(teacher, "teacher.path")
        self.held_out, self.group_of, self.top_k = held_out, group_of, top_k
        self.vocab_size = real_vocabulary(tokenizer, self.student, self.teacher)
        self.device = next(student.parameters()).device
        self.sums: Sums | None = None
        names = ["student", *(["teacher"] if teacher is not None else [])]
        self.reliability = {name: torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=self.device) for name in names}
        self.positions, self.entropies, self.groups = PositionSlices(), EntropySlices(), Slices()
        self.differences = Differences(num_differences, tokenizer)

    def over(self, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager[Any]], show_progress: bool = False) -> None:
        """Read the batches.

        Raises:
            DataError: nothing in them is supervised.
        """
        with without_side_effects(*self.models), autocast():
            for batch in bar(batches, desc="looking closely", unit="batch", leave=False, show=show_progress):
                self._add(batch.to(self.device))
        if self.sums is None:
            raise DataError("data", "no token of the held-out text is supervised", "Hold out more rows, or check their format.")

    def metrics(self) -> dict[str, float]:
        """`eval/…`, as of `Evaluator`, with `topk_agreement` and `rank_correlation` besides."""
        assert self.sums is not None, "nothing has been looked at"
        return {f"eval/{name}": value for name, value in metrics(self.sums).items()}

    def details(self) -> dict[str, Any]:
        """`reliability`, `slices` and `differences`, as plain values."""
        slices = {"position": self.positions.rows(), "teacher_entropy": self.entropies.rows()}
        if self.group_of is not None:
            slices[self.group_of.name] = self.groups.rows()
        return {
            "reliability": {name: reliability_bins(sums) for name, sums in self.reliability.items()},
            "slices": {name: rows for name, rows in slices.items() if rows},
            "differences": self.differences.worst_first(),
        }

    def _add(self, batch: Batch) -> None:
        chunks = [self._of_chunk(chunk) for chunk in logit_chunks(self.student, self.teacher, batch, self.vocab_size)]
        if not chunks:  # nothing supervised
            return
        values = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        mask = loss_mask(batch.labels)
        sums = totals(values, values["num_bytes"])
        self.sums = sums if self.sums is None else add(self.sums, sums)
        for name in self.reliability:
            self.reliability[name] += reliability_sums(values[f"{name}_confidence"], values[f"{name}_correct"])
        self.positions.add_positions(batch.position_ids[mask] + 1, values)  # tokens that stand before the predicted one
        origins = [self.held_out.origins(int(index)) for index in batch.row_ids]
        if self.group_of is not None:
            self.groups.add(self._group_numbers(batch, origins)[mask], values)
        if "teacher_entropy" in values:
            self.entropies.add_entropies(values["teacher_entropy"], values)
            self.differences.add(batch, values, origins)

    def _of_chunk(self, chunk: LogitChunk) -> dict[str, Tensor]:
        values = per_token(chunk.student_logits, chunk.teacher_logits, chunk.targets) | {"num_bytes": chunk.num_bytes}
        if chunk.teacher_logits is not None:
            values["topk_agreement"] = topk_agreement(chunk.student_logits, chunk.teacher_logits, self.top_k)
            values["rank_correlation"] = rank_correlation(chunk.student_logits, chunk.teacher_logits)
        return values

    def _group_numbers(self, batch: Batch, origins: list[list[str]]) -> Tensor:
        """`(batch, seq)`: the number of the group that each token's document belongs to."""
        assert self.group_of is not None
        documents = (batch.position_ids == 0).cumsum(dim=1) - 1
        longest = int(documents.max()) + 1
        numbers = []
        for index, of_row in zip(batch.row_ids.tolist(), origins, strict=True):
            known = [self.groups.number(self.group_of.label(index, origin)) for origin in of_row]
            numbers.append([*known, *[0] * (longest - len(known))])  # what follows is padding, which is never supervised
        return torch.tensor(numbers, device=documents.device).gather(1, documents)


def topk_agreement(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """Share of the teacher's k most likely tokens that are among the student's k: `(tokens,)` in [0, 1]."""
    k = min(k, student_logits.shape[-1])
    chosen = torch.zeros_like(student_logits, dtype=torch.bool).scatter_(-1, student_logits.topk(k).indices, True)
    return chosen.gather(-1, teacher_logits.topk(k).indices).double().mean(-1)


def rank_correlation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Spearman's rank correlation of both models' order of the teacher's 64 most likely tokens: `(tokens,)` in [-1, 1].

    ρ = 1 − 6 Σ d² / (n (n² − 1)), for ranks without ties (Spearman 1904); tokens of equal logits keep the order of the vocabulary.
    """
    n = min(RANKED, student_logits.shape[-1])
    if n < 2:
        return torch.full(student_logits.shape[:-1], math.nan, dtype=torch.float64)
    candidates = teacher_logits.topk(n).indices.sort(dim=-1).values  # in the order of the vocabulary, which knows no model
    ranks = [
        logits.float().gather(-1, candidates).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        for logits in (student_logits, teacher_logits)
    ]
    squares = (ranks[0] - ranks[1]).double().square().sum(-1)
    return 1 - 6 * squares / (n * (n * n - 1))
