"""Several sources in given shares."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import DataConfig
from mini_distill.data.prepare import prepare_data


@pytest.fixture
def mixture(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """Parts of 40, 7 and 3 sequences in shares of 0.5, 0.3 and 0.2."""
    parts = {}
    for name, rows, weight in (("a", 40, 5), ("b", 7, 3), ("c", 3, 2)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(rows)))
        parts[name] = {"source": "jsonl", "path": str(file), "weight": weight}
    config = DataConfig(source="mixture", mixture=parts, eval_fraction=0.0, seq_len=8, packing=False, cache_dir=str(tmp_path / "cache"))
    return prepare_data(config, tiny_tokenizer, show_progress=False)


def part_of(mixture: Any, index: int) -> str:
    return mixture.train.origins(index)[0].rsplit("/", 1)[1][0]


def test_the_fullest_sequences_are_those_of_all_parts(mixture: Any) -> None:
    found = mixture.train.fullest(5)
    supervised = [int((mixture.train[index].labels >= 0).sum()) for index in range(50)]
    assert [tokens for tokens, _ in found] == sorted(supervised, reverse=True)[:5]
    assert all(supervised[index] == tokens for tokens, index in found)


def test_shares_hold_over_any_stretch(mixture: Any) -> None:
    draw = mixture.train.order(seed=1)
    names = [part_of(mixture, draw(k)) for k in range(3000)]
    for begin, size in ((0, 50), (17, 100), (1234, 300), (0, 3000)):
        counted = Counter(names[begin : begin + size])
        for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(counted[name] - share * size) <= 6


def test_each_part_runs_through_epochs_of_its_own(mixture: Any) -> None:
    draw = mixture.train.order(seed=1)
    drawn: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for k in range(400):
        index = draw(k)
        drawn[part_of(mixture, index)].append(index)
    for name, size in (("a", 40), ("b", 7), ("c", 3)):
        for begin in range(0, len(drawn[name]) - size + 1, size):
            assert len(set(drawn[name][begin : begin + size])) == size


def test_a_mixture_can_be_entered_anywhere_and_again(mixture: Any) -> None:
    whole = [mixture.train.order(seed=1)(k) for k in range(60)]
    draw = mixture.train.order(seed=1)
    assert [draw(k) for k in (59, 3, 30, 3)] == [whole[59], whole[3], whole[30], whole[3]]


def test_row_ids_are_the_numbers_in_the_mixture_and_unique(mixture: Any) -> None:
    batch = mixture.train.batch(list(range(len(mixture.train))))
    assert len(mixture.train) == 50
    assert batch.row_ids.tolist() == list(range(50))
    assert len({tuple(row) for row in batch.input_ids.tolist()}) == 50


def test_the_report_names_the_part(mixture: Any) -> None:
    assert (mixture.report["a_rows_read"], mixture.report["c_rows_used"]) == (40, 3)
