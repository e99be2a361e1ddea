"""Side-by-side samples: same prompts, reproducible, harmless to a terminal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mini_distill.config import EvaluationConfig
from mini_distill.evaluation.samples import PROMPT_TOKENS, Sample, format_samples, printable, side_by_side


class Documents(list[str]):
    """Held-out documents."""

    tokenizer: Any

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        return [self.tokenizer(text).input_ids[:length] for text in self[:count]]


@pytest.fixture
def rows(tiny_tokenizer: Any) -> Documents:
    documents = Documents(f"{i} once upon a time there was a little model" for i in range(6))
    documents.tokenizer = tiny_tokenizer
    return documents


def test_the_prompts_are_beginnings_of_held_out_documents(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    samples = side_by_side(EvaluationConfig(num_samples=3, sample_tokens=4), tiny_tokenizer, {"student": tiny_llama()}, rows, seed=0)
    assert [sample.prompt for sample in samples] == [f"{i} once upon a time there was a little model"[:PROMPT_TOKENS] for i in range(3)]


def test_prompts_of_the_configuration_come_first_and_a_missing_teacher_is_left_out(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    config = EvaluationConfig(prompts=["hello", "", "never used"], num_samples=2, sample_tokens=4)
    samples = side_by_side(config, tiny_tokenizer, {"teacher": None, "student": tiny_llama()}, rows, seed=0)
    assert [sample.prompt for sample in samples] == ["hello", ""]
    assert all(list(sample.continuations) == ["student"] for sample in samples)


def test_no_samples_are_made_when_none_are_wanted(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    assert side_by_side(EvaluationConfig(num_samples=0), tiny_tokenizer, {"student": tiny_llama()}, rows, seed=0) == []
    assert side_by_side(EvaluationConfig(), tiny_tokenizer, {"student": tiny_llama()}, Documents(), seed=0) == []


def greedy(model: Any, ids: list[int], count: int, vocab: int) -> list[int]:
    """The most probable token, again and again, without a cache."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1, :vocab].argmax())]
        if ids[-1] == 2:
            break
    return ids


def test_greedy_continuations_are_the_most_probable_tokens(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    model = tiny_llama(seed=5).eval()
    sample = side_by_side(EvaluationConfig(num_samples=1, sample_tokens=10), tiny_tokenizer, {"student": model}, rows, seed=0)[0]
    prompt = torch.tensor(rows.beginnings(9, 99)[0])[:PROMPT_TOKENS].tolist()
    expected = tiny_tokenizer.decode(greedy(model, prompt, 10, 62), skip_special_tokens=True)
    assert sample.prompt + sample.continuations["student"] == expected


def favour(model: Any, token: int) -> Any:
    """A model that always predicts `token`: a head with a bias, which nothing before it can outweigh."""
    head = torch.nn.Linear(32, 64)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    head.bias.data[token] = 30.0
    model.set_output_embeddings(head)
    return model


def test_generation_ends_at_the_end_of_sequence_token(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    model = favour(tiny_llama(), tiny_tokenizer.eos_token_id)
    sample = side_by_side(EvaluationConfig(num_samples=1), tiny_tokenizer, {"student": model}, rows, seed=0)[0]
    assert sample.continuations == {"student": ""}


def test_generation_ends_at_any_of_the_models_own_end_tokens(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    """Llama 3 ends turns and documents with different tokens."""
    letter = tiny_tokenizer("q").input_ids[0]
    model = favour(tiny_llama(), letter)
    config = EvaluationConfig(num_samples=1, sample_tokens=5)
    assert side_by_side(config, tiny_tokenizer, {"student": model}, rows, seed=0)[0].continuations == {"student": "qqqqq"}
    model.generation_config.eos_token_id = [2, letter]
    assert side_by_side(config, tiny_tokenizer, {"student": model}, rows, seed=0)[0].continuations == {"student": "q"}


def test_settings_of_a_checkpoint_do_not_change_the_samples(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    """Chat models bring sampling and penalties along; side by side they would not be compared on equal terms."""
    config = EvaluationConfig(num_samples=2, sample_tokens=12)
    expected = side_by_side(config, tiny_tokenizer, {"student": tiny_llama()}, rows, seed=0)
    model = tiny_llama()
    settings = {"repetition_penalty": 3.0, "do_sample": True, "temperature": 5.0, "top_k": 2, "no_repeat_ngram_size": 1, "max_length": 26}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert side_by_side(config, tiny_tokenizer, {"student": model}, rows, seed=0) == expected


def test_columns_that_pad_the_vocabulary_are_never_generated(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    model = favour(tiny_llama(), 63)  # the tokenizer has 62 tokens
    model.lm_head.bias.data[tiny_tokenizer("q").input_ids[0]] = 20.0
    config = EvaluationConfig(num_samples=1, sample_tokens=3)
    assert side_by_side(config, tiny_tokenizer, {"student": model}, rows, seed=0)[0].continuations == {"student": "qqq"}


def test_sampling_depends_on_the_seed_alone_and_leaves_no_trace(tiny_tokenizer: Any, tiny_llama: Any, rows: Any) -> None:
    config = EvaluationConfig(num_samples=2, sample_tokens=12, sampling_temperature=1.0)
    models = {"student": tiny_llama().train()}
    torch.manual_seed(3)
    expected_draw = torch.rand(4)
    torch.manual_seed(3)
    first = side_by_side(config, tiny_tokenizer, models, rows, seed=0)
    assert torch.equal(torch.rand(4), expected_draw) and models["student"].training
    assert side_by_side(config, tiny_tokenizer, models, rows, seed=0) == first
    assert side_by_side(config, tiny_tokenizer, models, rows, seed=1) != first


def test_a_prompt_longer_than_the_models_context_is_cut_on_the_left(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))
    config = EvaluationConfig(prompts=["a prompt of more than sixteen tokens"], num_samples=1, sample_tokens=4)
    assert len(side_by_side(config, tiny_tokenizer, {"student": model}, [], seed=0)) == 1
    assert len(side_by_side(EvaluationConfig(prompts=["abc"], sample_tokens=400), tiny_tokenizer, {"student": model}, [], seed=0)) == 1


def test_control_characters_are_spelt_out() -> None:
    assert printable("a\x1b[31mb\x07\x00\rc\x9b\u202e\u2028") == "a\\x1b[31mb\\x07\\x00\\rc\\x9b\\u202e\\u2028"
    assert printable("line\r\nline\tend é 漢 \u200d") == "line\nline    end é 漢 \u200d"


def test_samples_fit_the_terminal_and_carry_no_escape_but_ours() -> None:
    sample = Sample("prompt\x1b[2J", {"teacher": "word " * 60, "student after": "x" * 300 + "\n\x1b]0;title\x07"})
    plain = format_samples([sample, sample], width=80)
    assert "\x1b" not in plain and "\x07" not in plain
    assert max(map(len, plain.splitlines())) <= 80
    assert plain.count("x") >= 600  # nothing is cut off
    colored = format_samples([sample], width=80, color=True)
    assert colored.replace("\x1b[2m", "").replace("\x1b[0m", "") == format_samples([sample], width=80)
