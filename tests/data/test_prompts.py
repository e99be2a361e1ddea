"""Prompts are the beginnings of the rows that a training renders, and what comes of them is read back as such rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_chat import CONVERSATION, TOOL, WITH_TOOLS, byte_level
from transformers import PreTrainedTokenizerFast

from mini_distill.config import DataConfig
from mini_distill.data.prepare import training_rows
from mini_distill.data.prompts import Prompts
from mini_distill.data.render import Renderer
from mini_distill.data.row import Rendered, Row, RowError
from mini_distill.errors import DataError

CHAT = {"messages_column": "messages", "tools_column": "tools"}
PAIRS = {"prompt_column": "question", "completion_column": "answer"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prompts(tokenizer: Any, file: Path, num_tokens: int = 8, most_tokens: int | None = None, **settings: Any) -> Prompts:
    config = DataConfig(**{"source": "jsonl", "path": str(file), "eval_fraction": 0.0, **settings})
    return Prompts(config, tokenizer, num_tokens, most_tokens)


def rendered(tokenizer: Any, row: dict[str, Any], **settings: Any) -> Rendered:
    (found,) = Renderer(DataConfig(**settings), tokenizer).render_many([Row("rows.jsonl:1", row)])
    assert isinstance(found, Rendered), found
    return found


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("tools", [False, True])
def test_a_conversation_begins_as_it_is_trained_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str, tools: bool) -> None:
    """A prompt that differs by a blank or a newline is one that the model has never seen."""
    if tools and template not in ("chatml", "llama3"):
        pytest.skip(f"{template} has no place for tools")
    messages = WITH_TOOLS if tools else CONVERSATION[template == "gemma" :]  # Gemma knows no system
    row = {"messages": messages, **({"tools": [TOOL]} if tools else {})}
    (prompt,) = prompts(tokenizer, written(tmp_path, row), chat_template=template, **CHAT)
    whole = rendered(tokenizer, row, chat_template=template, **CHAT)
    begin = int(np.flatnonzero(whole.supervised)[-1])
    while whole.supervised[begin - 1]:
        begin -= 1
    assert prompt.ids.tolist() == whole.input_ids[: len(prompt.ids)].tolist()
    assert len(prompt.ids) == begin


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_the_beginning_of_a_document_is_that_of_the_rendering(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, add_bos: bool | None
) -> None:
    for row, settings in (({"messages": CONVERSATION}, {**CHAT, "chat_template": "chatml"}), ({"question": "one", "answer": "two"}, PAIRS)):
        (prompt,) = prompts(tokenizer, written(tmp_path, row), add_bos=add_bos, **settings)
        whole = rendered(tokenizer, row, add_bos=add_bos, **settings)
        assert prompt.ids.tolist() == whole.input_ids[: len(prompt.ids)].tolist()


def test_a_text_begins_with_its_first_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = prompts(tokenizer, written(tmp_path, {"text": "abcdefghijkl"}, {"text": "abc"}), num_tokens=5)
    assert [tokenizer.decode(prompt.ids) for prompt in found] == ["<s>abcde", "<s>abc"]
    assert [prompt.ids.tolist() for prompt in prompts(tokenizer, written(tmp_path, {"text": "abc"}), num_tokens=0)] == [
        [tokenizer.bos_token_id]
    ]


def test_what_was_written_is_read_back_as_a_row_of_the_same_kind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    answer = tokenizer("New.</s>").input_ids  # no special token comes into a row
    for row, settings, expected in (
        ({"text": "abcdefgh", "id": 3}, {}, {"text": "abcdefghNew."}),
        ({"body": "abcd"}, {"text_column": "body"}, {"body": "abcdNew."}),
        ({"question": "Why?", "answer": "Old."}, PAIRS, {"question": "Why?", "answer": "New."}),
        ({"question": "Why?"}, PAIRS, {"question": "Why?", "answer": "New."}),  # who asks for an answer need not have one
        ({"messages": CONVERSATION}, CHAT, {"messages": [*CONVERSATION[:4], {"role": "assistant", "content": "New."}]}),
        ({"messages": CONVERSATION[:2]}, CHAT, {"messages": [*CONVERSATION[:2], {"role": "assistant", "content": "New."}]}),
        (
            {"messages": json.dumps(WITH_TOOLS), "tools": [TOOL]},
            CHAT,
            {"messages": [*WITH_TOOLS[:4], {"role": "assistant", "content": "New."}], "tools": [TOOL]},
        ),
        (
            {"messages": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Old."}]},
            CHAT,
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "New."}]},
        ),
    ):
        found = prompts(tokenizer, written(tmp_path, row), chat_template="chatml", **settings)
        (prompt,) = found
        assert found.completed(prompt, answer) == expected
        rendered(tokenizer, expected, chat_template="chatml", **settings)


def test_rows_that_are_held_out_are_no_prompts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A student would be measured on what its teacher was asked."""
    rows = [{"question": f"what is {i}", "answer": str(i)} for i in range(60)]
    settings = {**PAIRS, "eval_fraction": 0.3}
    file = written(tmp_path, *rows)
    asked = [prompt.row.columns["question"] for prompt in prompts(tokenizer, file, **settings)]
    assert asked == [row.columns["question"] for row in training_rows(DataConfig(source="jsonl", path=str(file), **settings))]
    assert 20 < len(asked) < 60
    everything = prompts(tokenizer, file, **settings, eval_path=str(file))  # of which nothing here is held out
    assert len(list(everything)) == 60


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"question": 3}, PAIRS, "column 'question' holds int '3', expected text"),
        ({"q": "x"}, PAIRS, "no column 'question'"),
        ({"messages": []}, CHAT, ""),  # empty: counted, and nobody's mistake
        ({"messages": CONVERSATION[:1]}, CHAT, "has nothing that could be answered"),
        ({"messages": [CONVERSATION[2]]}, CHAT, "has nothing that could be answered"),
        ({"messages": "none"}, CHAT, "holds str, expected a list of messages"),
        ({"text": "abcdefgh"}, {"most_tokens": 5}, "has a prompt of 9 tokens, and the model's positions leave room for 5"),
    ],
)
def test_a_bad_row_is_named_or_skipped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    settings = {"chat_template": "chatml", **settings}
    if words:
        with pytest.raises(DataError, match=words) as raised:
            list(prompts(tokenizer, written(tmp_path, row), **settings))
        assert isinstance(raised.value, RowError) and "rows.jsonl:1" in str(raised.value)
    skipped = prompts(tokenizer, written(tmp_path, row), on_bad_row="skip", **settings)
    assert list(skipped) == [] and sum(skipped.dropped.values()) == 1


def test_numbers_do_not_depend_on_what_was_skipped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = prompts(tokenizer, written(tmp_path, {"text": "a"}, {"text": 3}, {"text": "b"}), on_bad_row="skip")
    assert [prompt.number for prompt in found] == [0, 2] == [prompt.number for prompt in found]
