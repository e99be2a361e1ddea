"""Matching of inner states: the student's hidden states, attention or relations against those of the teacher's blocks.

    loss = … + Σ weight · (value per token, averaged over the pairs of blocks)

The relations of queries, of keys and of values are added up, as in MiniLMv2 (Wang et al. 2021, arXiv 2012.15828).

The states are watched during the models' ordinary forward passes. Where the widths of hidden states differ, a learned linear map
takes the student's to the teacher's (FitNets, Romero et al. 2015, arXiv 1412.6550; TinyBERT, Jiao et al. 2020, arXiv
1909.10351, equation 8); it is trained and checkpointed with the student and is not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import TermConfig
from ..data.batch import Batch
from ..errors import ConfigError
from ..losses import attention, hidden
from ..losses.reduction import loss_mask
from ..models.inner_states import InnerStates, blocks_of, layer_map

RELATIONS = ("query", "key", "value")


@dataclass(frozen=True)
class MatchingTerm:
    """One term: which states of which pairs of blocks, and how they are compared.

    Attributes:
        name: In metrics and schedules.
        kind: The function in losses/hidden.py or losses/attention.py.
        weight: Plain multiplier.
        pairs: (student block, teacher block), counted from 0.
        options: Further arguments of the function.
    """

    name: str
    kind: str
    weight: float
    pairs: list[tuple[int, int]]
    options: dict[str, Any]

    @property
    def states(self) -> tuple[str, ...]:
        """What it looks at."""
        if self.kind.startswith("hidden"):
            return ("hidden",)
        return ("attention",) if self.kind.startswith("attention") else RELATIONS


class Matching:
    """The matching terms of an objective, with their learned projections.

    Args:
        terms: Name -> settings, of the kinds that match.
        student: The bare student.
        teacher: The teacher.
        seed: Decides the projections' first weights, alone.

    Attributes:
        projections: To be trained, wrapped and checkpointed with the student.

    Raises:
        ConfigError: a block that is not there; relation heads that do not divide a width.
        ModelError: an architecture whose states cannot be watched.
    """

    def __init__(self, terms: Mapping[str, TermConfig], student: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> None:
        depths = len(blocks_of(student)), len(blocks_of(teacher))
        self.terms = [
            MatchingTerm(name, str(term.kind), term.weight, _pairs(name, term, *depths), dict(term.options)) for name, term in terms.items()
        ]
        self.student_states = InnerStates(student, self._wanted(0), "student")
        self.teacher_states = InnerStates(teacher, self._wanted(1), "teacher")
        self.projections = nn.ModuleDict()
        widths = _width(student), _width(teacher)
        if widths[0] != widths[1]:
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(seed)
                for term in self.terms:
                    for pair in term.pairs if term.states == ("hidden",) else ():
                        self.projections[_key(term, pair)] = nn.Linear(*widths, bias=False)

        self._check_relation_heads(student, teacher)

    def _check_relation_heads(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        for term in self.terms:
            if term.kind != "relation_kl":
                continue
            heads = term.options.get("num_relation_heads", 16)
            for model in (student, teacher):
                for width in _projection_widths(model):
                    if width % heads:
                        what = f"got {heads}, expected a divisor of {width}, a width of {type(model).__name__}'s queries, keys or values"
                        raise ConfigError(f"objective.terms.{term.name}.options.num_relation_heads", what, "Give a common divisor.")

    def _wanted(self, side: int) -> list[tuple[str, int]]:
        """(state, block) that the terms look at in the student (0) or the teacher (1)."""
        return sorted({(state, pair[side]) for term in self.terms for state in term.states for pair in term.pairs})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The forward passes within are watched; `sums` has to be called within, too."""
        with self.student_states, self.teacher_states:
            yield

    def weights(self) -> dict[str, float]:
        """Each term's, by name."""
        return {term.name: term.weight for term in self.terms}

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        """Each term over the batch's supervised positions, unweighted, with its graph.

        A term is the mean over its pairs of blocks, so that more pairs do not weigh more.
        """
        mask = loss_mask(batch.labels)
        return {term.name: torch.stack([self._value(term, pair, batch, mask).sum() for pair in term.pairs]).mean() for term in self.terms}

    def _value(self, term: MatchingTerm, pair: tuple[int, int], batch: Batch, mask: Tensor) -> Tensor:
        """`(supervised,)`."""
        device = batch.labels.device
        states = [(self.student_states[state, pair[0]], self.teacher_states[state, pair[1]].to(device)) for state in term.states]
        if term.states == ("hidden",):
            ((ours, theirs),) = states
            ours = ours[mask]
            if (key := _key(term, pair)) in self.projections:
                ours = self.projections[key](ours)
            return getattr(hidden, term.kind)(ours, theirs[mask], **term.options)
        if term.states == ("attention",):
            ((ours, theirs),) = states
            return getattr(attention, term.kind)(ours, theirs, **term.options)[mask]
        each = [getattr(attention, term.kind)(ours, theirs, batch.position_ids, **term.options)[mask] for ours, theirs in states]
        return torch.stack(each).sum(0)


def _pairs(name: str, term: TermConfig, student_blocks: int, teacher_blocks: int) -> list[tuple[int, int]]:
    spec = {int(ours): int(theirs) for ours, theirs in term.layer_map.items()} or term.layers or "last"
    setting = "layer_map" if term.layer_map else "layers"
    return layer_map(spec, student_blocks, teacher_blocks, where=f"objective.terms.{name}.{setting}")


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size


def _projection_widths(model: PreTrainedModel) -> list[int]:
    """Of queries, and of keys and values, which grouped-query attention makes narrower."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [config.num_attention_heads * head, (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head]


def _key(term: MatchingTerm, pair: tuple[int, int]) -> str:
    return f"{term.name}_{pair[0]}_{pair[1]}".replace(".", "_")
