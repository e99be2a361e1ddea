"""What a model writes: transformers' `generate()` with the settings given, and with nothing that a checkpoint adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopPLogitsWarper as TopP

from ..config import GenerateConfig
from ..data.tokenizers import vocabulary_size


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt.

    Attributes:
        ids: Without the token that ends it.
        finished: Whether the model ended it itself; else it was cut off.
    """

    ids: list[int]
    finished: bool


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], config: GenerateConfig, seeds: list[int]
) -> list[Completion]:
    """Let the model go on from each prompt, all at once.

    Args:
        model: In eval mode.
        tokenizer: The model's.
        prompts: Of at least a token each; shorter ones are padded on the left.
        config: Length, greedy or beams, or temperature and top-p of what is drawn.
        seeds: One for each prompt: what is drawn depends on it and on the prompt, not on what else is in the batch (up to rounding).
    """
    ends = end_ids(model, tokenizer)
    pad = ends[0] if ends else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
    processors = LogitsProcessorList([OnlyRealTokens(vocabulary_size(tokenizer))])
    if config.sampling_temperature > 0:
        processors += [Temperature(config.sampling_temperature), *([TopP(config.top_p)] if config.top_p < 1 else [])]
        processors += [DrawnByRow(seeds, model.device)]
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens, num_beams=config.num_beams, do_sample=False, eos_token_id=ends or None, pad_token_id=pad
    )
    with generating_with(model, settings):
        written = model.generate(ids, attention_mask=mask, logits_processor=processors)  # type: ignore[operator]
    return [_up_to_the_end(row, ends) for row in written[:, width:].tolist()]


def _up_to_the_end(ids: list[int], ends: list[int]) -> Completion:
    """What comes after the first end pads the row to the longest of the batch."""
    at = next((i for i, token in enumerate(ids) if token in ends), None)
    return Completion(ids[:at], finished=at is not None)


class OnlyRealTokens(LogitsProcessor):
    """Forbids the columns that only pad the embedding: no tokenizer can spell them."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(batch, vocab)` -> the same, -inf beyond the real tokens."""
        return scores.index_fill(-1, torch.arange(self.num_tokens, scores.shape[-1], device=scores.device), -torch.inf)


class DrawnByRow(LogitsProcessor):
    """Makes the likeliest token one that is drawn: with noise of Gumbel's distribution added, argmax(scores) ~ softmax(scores).

    (Gumbel 1954.) `generate()` itself draws all rows from one generator, so that each depends on the others.

    Args:
        seeds: Of each row's own generator.
        device: Of the scores.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(batch, vocab)` -> the same, with noise."""
        noise = [torch.empty_like(scores[0], dtype=torch.float64).exponential_(generator=of_row).log() for of_row in self.generators]
        return scores - torch.stack(noise).to(scores.dtype)  # −log of an exponential variable is Gumbel's


@contextmanager
def generating_with(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """These settings alone: generate() would fill the gaps of an argument with the penalties and filters that a checkpoint
    brings along, and what is written could not be compared."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Chat models end a turn with other tokens than a document (Llama 3): all of them count."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
