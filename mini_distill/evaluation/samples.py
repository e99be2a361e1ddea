"""What the models write after the same prompts, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..config import EvaluationConfig, FullEvaluationConfig
from ..data.tokenizers import vocabulary_size
from ..models.generation import OnlyRealTokens, end_ids, generating_with
from .isolation import without_side_effects
from .printable import printable

Settings = EvaluationConfig | FullEvaluationConfig
PROMPT_TOKENS = 24
DIM, RESET = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Sample:
    """A prompt and how each model goes on.

    Attributes:
        prompt: As text.
        continuations: Model's name -> text, in the order in which the models were given.
    """

    prompt: str
    continuations: dict[str, str]


def side_by_side(config: Settings, tokenizer: Any, models: Mapping[str, PreTrainedModel | None], held_out: Any, seed: int) -> list[Sample]:
    """Let every model continue every prompt.

    The prompts are `config.prompts`, or the beginnings of held-out documents; always the same ones. Generation is greedy, or
    sampled with `config.sampling_temperature` from the plain distribution; it ends at an end-of-sequence token. The global
    random state is left as it was.

    Args:
        config: Prompts, `num_samples`, `sample_tokens`, `sampling_temperature`.
        tokenizer: The tokenizer of all models.
        models: By the name to show; None (no teacher) is left out.
        held_out: The held-out sequences, whose `beginnings` are the prompts.
        seed: Of sampling; each model starts from it at each prompt.
    """
    present = {name: model for name, model in models.items() if model is not None}
    samples = []
    for prompt_ids in _prompts(config, tokenizer, held_out):
        texts = {name: _continue(model, tokenizer, prompt_ids, config, seed) for name, model in present.items()}
        samples.append(Sample(_decode(tokenizer, prompt_ids), texts))
    return samples


def _prompts(config: Settings, tokenizer: Any, held_out: Any) -> Iterator[list[int]]:
    if config.num_samples == 0:
        return
    if config.prompts:
        for text in config.prompts[: config.num_samples]:
            yield tokenizer(text).input_ids or [tokenizer.eos_token_id or 0]
        return
    yield from held_out.beginnings(config.num_samples, PROMPT_TOKENS)


def _continue(model: Any, tokenizer: Any, prompt_ids: list[int], config: Settings, seed: int) -> str:
    """The text that `model` adds to the prompt, without special tokens."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(prompt_ids) + config.sample_tokens
    prompt_ids = prompt_ids[-max(1, longest - config.sample_tokens) :]
    ids = torch.tensor([prompt_ids], device=model.device)
    settings = _generation_config(model, tokenizer, config, min(config.sample_tokens, longest - len(prompt_ids)))
    with without_side_effects(model), generating_with(model, settings):
        torch.manual_seed(seed)  # generate() knows no generator of its own; the global one is put back on leaving
        real_tokens = LogitsProcessorList([OnlyRealTokens(vocabulary_size(tokenizer))])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=real_tokens)[0].tolist()
    before, after = _decode(tokenizer, prompt_ids), _decode(tokenizer, written)
    # decoded as a whole, because some tokenizers drop the leading space of a piece
    return after[len(before) :] if after.startswith(before) else _decode(tokenizer, written[len(prompt_ids) :])


def _generation_config(model: PreTrainedModel, tokenizer: Any, config: Settings, max_new_tokens: int) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if config.sampling_temperature > 0:
        sampling = {"do_sample": True, "temperature": config.sampling_temperature, "top_k": 0, "top_p": 1.0}
    ends = end_ids(model, tokenizer)
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **sampling)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------------------------------- for the terminal


def format_samples(samples: list[Sample], width: int = 80, color: bool = False) -> str:
    """The samples for a terminal: the prompt (dim, with `color`), then each model's continuation under its name.

    Args:
        width: Columns; longer lines are wrapped.
        color: Whether the terminal understands escape sequences. The texts themselves can never contain one.
    """
    names = ["prompt", *dict.fromkeys(name for sample in samples for name in sample.continuations)]
    margin = max(map(len, names)) + 2
    blocks = []
    for number, sample in enumerate(samples, start=1):
        lines = [f"sample {number}"]
        lines += [f"{DIM}{line}{RESET}" if color else line for line in _block("prompt", sample.prompt, margin, width)]
        for name, text in sample.continuations.items():
            lines += _block(name, text, margin, width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _block(name: str, text: str, margin: int, width: int) -> Iterator[str]:
    """The text's lines, wrapped, beside the name on the first one."""
    for i, line in enumerate(_wrapped(printable(text), max(20, width - margin - 4))):
        yield f"  {name if i == 0 else '':<{margin}}│ {line}".rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    lines = [textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""] for line in text.split("\n")]
    return [piece for pieces in lines for piece in pieces]
