"""What a model writes: transformers' own words for each prompt, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mini_distill.config import GenerateConfig
from mini_distill.models.generation import Completion, DrawnByRow, complete

Build = Callable[..., LlamaForCausalLM]
PROMPTS = [[5, 9, 20], [7], [30, 4, 4, 11, 12, 40], [9, 9]]


def alone(model: LlamaForCausalLM, prompt: list[int], **settings: Any) -> list[int]:
    """By `generate()` itself, without a batch and without us."""
    config = GenerationConfig(eos_token_id=2, pad_token_id=2, do_sample=False, suppress_tokens=[62, 63], **settings)
    model.generation_config = GenerationConfig()
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_of_a_batch_is_what_is_written_after_it_alone(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, num_beams: int
) -> None:
    """The shorter ones are padded on the left; two columns of the vocabulary only pad it."""
    model = tiny_llama(seed=3).eval()
    found = complete(model, tiny_tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12, num_beams=num_beams), [0] * 4)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        expected = alone(model, prompt, max_new_tokens=12, num_beams=num_beams)
        assert completion == Completion(expected[:-1] if 2 in expected else expected, 2 in expected)


def test_what_a_checkpoint_brings_along_is_not_looked_at_and_left_as_it_was(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(seed=3).eval()
    plain = complete(model, tiny_tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12), [0] * 4)
    own = model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0, max_new_tokens=1)
    assert complete(model, tiny_tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12), [0] * 4) == plain
    assert model.generation_config is own


def test_every_end_that_the_checkpoint_knows_ends_a_completion(tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama 3: <|eot_id|> ends a turn, <|end_of_text|> a text."""
    model, sampled = tiny_llama(seed=3).eval(), GenerateConfig(max_new_tokens=60, sampling_temperature=1.0)
    free = complete(model, tiny_tokenizer, PROMPTS, sampled, [1, 2, 3, 4])
    model.generation_config = GenerationConfig(eos_token_id=[2, free[0].ids[5]])
    cut = complete(model, tiny_tokenizer, PROMPTS, sampled, [1, 2, 3, 4])[0]
    assert cut.finished and cut.ids == free[0].ids[: free[0].ids.index(free[0].ids[5])]


def test_what_is_drawn_depends_on_the_seed_of_the_row_alone(tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, config = tiny_llama(seed=3).eval(), GenerateConfig(max_new_tokens=30, sampling_temperature=0.9, top_p=0.95)
    together = complete(model, tiny_tokenizer, PROMPTS, config, [5, 6, 7, 8])
    torch.manual_seed(99)
    apart = [complete(model, tiny_tokenizer, [prompt], config, [seed])[0] for prompt, seed in zip(PROMPTS, [5, 6, 7, 8], strict=True)]
    assert apart == together
    assert complete(model, tiny_tokenizer, PROMPTS, config, [5, 6, 7, 9])[:3] == together[:3]
    assert complete(model, tiny_tokenizer, PROMPTS, config, [1, 2, 3, 4]) != together


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    scores, count = torch.tensor([1.0, 0.0, -torch.inf, 2.5, -3.0]), 20_000
    drawn = DrawnByRow(list(range(count)), scores.device)(torch.zeros(count, 1), scores.expand(count, 5)).argmax(-1)
    share, expected = drawn.bincount(minlength=5) / count, scores.softmax(-1)
    assert share[2] == 0 and ((share - expected).abs() < 4 * (expected / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize(("top_p", "allowed"), [(1.0, 62), (0.3, 20)])
def test_temperature_and_top_p_decide_from_what_is_drawn(
    tiny_llama: Build, tiny_tokenizer: PreTrainedTokenizerFast, top_p: float, allowed: int
) -> None:
    model = tiny_llama(seed=3).eval()
    probabilities = model(torch.tensor([[5]])).logits[0, -1, :62].softmax(-1)
    order = probabilities.sort(descending=True)
    nucleus = set(order.indices[order.values.cumsum(-1) - order.values < top_p].tolist())
    config = GenerateConfig(max_new_tokens=1, sampling_temperature=1.0, top_p=top_p)
    drawn = {(found.ids or [2])[0] for found in complete(model, tiny_tokenizer, [[5]] * 2000, config, list(range(2000)))}
    assert drawn <= nucleus and len(drawn) > 0.8 * len(nucleus) and len(nucleus) <= allowed
    cold = GenerateConfig(max_new_tokens=1, sampling_temperature=0.01)
    assert [found.ids for found in complete(model, tiny_tokenizer, [[5]] * 9, cold, list(range(9)))] == [[int(order.indices[0])]] * 9
