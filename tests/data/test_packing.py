"""Documents in sequences, by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_distill.config import DataConfig
from mini_distill.data.packing import cut, pack
from mini_distill.data.prepare import prepare_data
from mini_distill.errors import DataError

IGNORE = -100


def prepared(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], **settings: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="jsonl", path=str(file), **{"eval_fraction": 0.0, "cache_dir": str(folder / "cache"), **settings})
    return prepare_data(config, tokenizer, show_progress=False)


def test_packed_fields_are_what_one_writes_by_hand(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """`ab` and `cde` share a sequence of 10: <bos> a b <eos> <bos> c d e <eos> and one padding."""
    data = prepared(tmp_path, tiny_tokenizer, [{"text": "ab"}, {"text": "cde"}], seq_len=10)
    a, b, c, d, e = tiny_tokenizer.convert_tokens_to_ids(list("abcde"))
    assert len(data.train) == 1
    row = data.train[0]
    assert row.input_ids.tolist() == [1, a, b, 2, 1, c, d, e, 2, 3]
    assert row.labels.tolist() == [IGNORE, a, b, 2, IGNORE, c, d, e, 2, IGNORE]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    assert row.num_bytes.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0]


def test_the_first_token_of_each_piece_of_a_split_document_is_not_supervised(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = prepared(tmp_path, tiny_tokenizer, [{"text": "abcdefg"}], seq_len=3, add_bos=False)  # abc def g<eos>
    _, b, c, _, e, f, _ = tiny_tokenizer.convert_tokens_to_ids(list("abcdefg"))
    labels = [data.train[i].labels.tolist() for i in range(len(data.train))]
    assert labels == [[IGNORE, b, c], [IGNORE, e, f], [IGNORE, 2, IGNORE]]
    assert [data.train[i].position_ids.tolist() for i in range(3)] == [[0, 1, 2], [0, 1, 2], [0, 1, 0]]


def test_eos_is_supervised_when_the_padding_token_is_eos(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A mask `labels == pad_id` also hid the real end of sequence, so students never learnt to stop (PITFALLS 9)."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"prompt": "ab", "completion": "cd"}]
    data = prepared(tmp_path, tokenizer, rows, seq_len=8, prompt_column="prompt", completion_column="completion")
    c, d = tokenizer.convert_tokens_to_ids(["c", "d"])
    assert data.train[0].labels.tolist() == [IGNORE, IGNORE, IGNORE, c, d, 2, IGNORE, IGNORE]


def test_without_packing_each_document_has_its_own_padded_sequence(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = prepared(tmp_path, tiny_tokenizer, [{"text": "ab"}, {"text": "c"}], seq_len=6, packing=False)
    assert [int((data.train[i].position_ids == 0).sum()) for i in range(2)] == [3, 4]
    assert len(data.train) == 2


LONG = [{"text": "ab"}, {"text": "abcdefghij"}]


@pytest.mark.parametrize(("form", "used", "tokens"), [("split", 2, 4 + 12), ("truncate", 2, 4 + 5), ("drop", 1, 4)])
def test_a_long_row_is_split_truncated_or_dropped(tmp_path: Path, tiny_tokenizer: Any, form: str, used: int, tokens: int) -> None:
    data = prepared(tmp_path, tiny_tokenizer, LONG, seq_len=5, on_long_row=form)
    assert data.report["rows_used"] == used
    assert data.report["rows_read"] == used + sum(v for k, v in data.report.items() if k.startswith("rows_dropped"))
    non_padding = sum(int((data.train[i].input_ids != 3).sum()) for i in range(len(data.train)))
    assert non_padding == tokens


def test_a_long_row_can_be_an_error_that_names_row_length_and_setting(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tiny_tokenizer, LONG, seq_len=5, on_long_row="error")
    message = str(caught.value)
    assert "rows.jsonl:2" in message and "12 tokens" in message and "data.seq_len is 5" in message and "on_long_row=split" in message


def test_a_row_whose_whole_answer_is_cut_off_is_dropped_and_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "abcdefgh", "completion": "x"}, {"prompt": "a", "completion": "y"}]
    data = prepared(tmp_path, tiny_tokenizer, rows, seq_len=6, prompt_column="prompt", completion_column="completion")
    assert data.report["rows_used"] == 1
    assert data.report["rows_dropped_nothing_supervised_within_seq_len"] == 1


def test_a_prompt_is_never_a_label(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """-100 was put among 16-bit tokens and became 65436, so that every prompt token was supervised (PITFALLS 7)."""
    rows = [{"prompt": "abc", "completion": "d"}, {"prompt": "e", "completion": "f"}]
    data = prepared(tmp_path, tiny_tokenizer, rows, seq_len=16, prompt_column="prompt", completion_column="completion")
    d, f = tiny_tokenizer.convert_tokens_to_ids(["d", "f"])
    assert [label for label in data.train[0].labels.tolist() if label != IGNORE] == [d, 2, f, 2]


@pytest.mark.parametrize("seed", range(8))
def test_packing_places_every_piece_once_and_overfills_no_sequence(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 90, size=200)
    document, start, length = cut(lengths, 32, split=True)
    plan = pack(document, start, length, 32, packing=True)
    placed = sorted(zip(plan.document.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    assert placed == sorted(zip(document.tolist(), start.tolist(), length.tolist(), strict=True))
    filled = [int(plan.length[a:b].sum()) for a, b in zip(plan.offset[:-1], plan.offset[1:], strict=True)]
    assert max(filled) <= 32 and min(filled) >= 2
    assert len(filled) <= 1.05 * length.sum() / 32 + 1  # little is wasted


def test_packing_nothing_gives_no_sequence() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert pack(empty, empty, empty, 8, packing=True).offset.tolist() == [0]
