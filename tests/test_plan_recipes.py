"""The table of docs/recipes.md: a line for each training of the page, as the script prints it."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_recipes import HEADER, ROOT, duration, model_folder, recipes, row, settings

from mini_distill.data.tokenizers import vocabulary_size
from mini_distill.models.loading import load_tokenizer, weightless_causal_lm

PAGE = ROOT / "docs" / "recipes.md"


def lines() -> list[str]:
    """Those of the table, without its header."""
    return PAGE.read_text(encoding="utf-8").partition(HEADER + "\n")[2].partition("\n\n")[0].splitlines()


def test_every_training_of_the_page_has_its_line_in_order() -> None:
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines()]
    assert [line[:4] for line in found] == [settings(recipe) for recipe in recipes(PAGE)]
    assert all(all(line) for line in found)


@pytest.mark.slow
def test_a_line_is_what_the_script_prints(tmp_path: Path) -> None:
    every = recipes(PAGE)
    number = next(i for i, recipe in enumerate(every) if recipe.given["teacher"] == "mistral_7b")
    assert row(every[number], tmp_path) == lines()[number]


@pytest.mark.parametrize(
    ("repository", "millions"),
    [
        *(("meta-llama/Meta-Llama-3-8B", 8030), ("meta-llama/Llama-3.2-1B", 1236), ("mistralai/Mistral-7B-v0.3", 7248)),
        *(("google/gemma-2-9b", 9242), ("google/gemma-2-2b", 2614), ("Qwen/Qwen3-8B", 8191), ("Qwen/Qwen3-0.6B", 596)),
    ],
)
def test_the_models_have_the_published_sizes(repository: str, millions: int, tmp_path: Path) -> None:
    model = weightless_causal_lm(str(model_folder(repository, tmp_path)), where="teacher.path")
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=1)


def test_a_tokenizer_has_as_many_entries_as_the_real_one(tmp_path: Path) -> None:
    assert vocabulary_size(load_tokenizer(str(model_folder("mistralai/Mistral-7B-v0.3", tmp_path)))) == 32_768


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (0.8, 12.3, 119.6, 600, 7000, 7200, 1e6)] == [
        *("0.8 s", "12 s", "120 s", "10 min", "117 min", "2.0 h", "12 days"),
    ]
