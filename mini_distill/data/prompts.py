"""What a model is to go on from, row by row of a source, and the row that comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..imported_code import code_fingerprint
from .chat import to_answer
from .held_out import TRAIN, split_rows
from .prepare import HARMLESS
from .render import Renderer
from .row import Row, RowError
from .sources import Source, open_source

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Prompt:
    """A row of the training side.

    Attributes:
        number: Which one, counted from 0.
        row: As the source gave it.
        ids: `(tokens,)` int64.
    """

    number: int
    row: Row
    ids: np.ndarray


class Prompts:
    """The prompts of a source, in its order, from the first one at every iteration.

    Rows that a training with the same data settings would hold out are none: its evaluation stays on text that nobody was trained on.

    Args:
        config: Source, columns, template; what concerns sequences (`seq_len`, packing) is not looked at.
        tokenizer: Of the model that goes on.
        num_tokens: Of a text, this many first tokens are the prompt.
        most_tokens: A prompt of more is an error of its row; None: any length is fine.

    Attributes:
        dropped: Reason -> rows, of the last iteration that went to its end.

    Raises:
        DataError: the source, the template or the tokenizer cannot be used.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_tokens: int, most_tokens: int | None) -> None:
        has_own = config.eval_path is not None or config.eval_split is not None
        self.config = (
            replace(config, eval_fraction=0.0) if has_own else config
        )  # what is held out lies elsewhere: all of this is trained on
        self.tokenizer, self.num_tokens, self.most_tokens = tokenizer, num_tokens, most_tokens
        self.renderer = Renderer(config, tokenizer)
        self.dropped: Counter[str] = Counter()

    def fingerprint(self) -> dict[str, Any]:
        """What the prompts are made of, as plain JSON values."""
        own = {name: getattr(self.config, name) for name in ("eval_fraction", "max_rows", "on_bad_row")}
        code = {"code": code_fingerprint(self.config.source)} if "." in self.config.source else {}
        return {"source": open_source(self.config).fingerprint(), "rendering": self.renderer.fingerprint, **own, **code}

    def __iter__(self) -> Iterator[Prompt]:
        """Every prompt.

        Raises:
            DataError: a row is bad, and `data.on_bad_row` is error; or the source cannot be read.
        """
        dropped: Counter[str] = Counter()
        numbered = enumerate(self._rows())
        while some := list(islice(numbered, ROWS_AT_ONCE)):
            good = [(number, row) for number, row in some if isinstance(row, Row)]
            prompts = self.renderer.prompts([row for _, row in good], self.num_tokens)
            errors = [row for _, row in some if isinstance(row, RowError)]
            errors += [found for found in prompts if isinstance(found, RowError)]
            found = [Prompt(number, row, ids) for (number, row), ids in zip(good, prompts, strict=True) if isinstance(ids, np.ndarray)]
            errors += [self._too_long(prompt) for prompt in found if self._is_too_long(prompt)]
            for error in errors:
                self._leave_out(error, dropped)
            yield from (prompt for prompt in found if not self._is_too_long(prompt))
        self.dropped = dropped

    def completed(self, prompt: Prompt, completion: list[int]) -> dict[str, Any]:
        """The row that a training reads in place of the prompt's: these tokens, but for special ones, instead of what the data had.

        Its columns are those of the data settings, or `text`.
        """
        columns = prompt.row.columns
        if self.renderer.chat is not None:
            name, tools = str(self.config.messages_column), self.config.tools_column
            asked = to_answer(prompt.row, self.renderer.chat.conversation(prompt.row))
            answer = {"role": "assistant", "content": self.text(completion)}
            return {name: [*asked, answer]} | ({tools: columns[tools]} if tools in columns else {})
        if self.renderer.has_prompt:
            question, answer_column = self.renderer.columns
            return {question: columns[question], answer_column: self.text(completion)}
        whole = [*prompt.ids.tolist(), *completion]  # at once: the text of tokens is not always the sum of their texts
        return {self.renderer.columns[0]: self.text(whole)}

    def _rows(self) -> Iterator[Row | RowError]:
        source = _WithAnswers(open_source(self.config), self.config.completion_column)
        return (row for side, row in split_rows(self.config, source, None) if side == TRAIN)

    def text(self, ids: list[int]) -> str:
        """Tokens as text, without special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _is_too_long(self, prompt: Prompt) -> bool:
        return self.most_tokens is not None and len(prompt.ids) > self.most_tokens

    def _too_long(self, prompt: Prompt) -> RowError:
        what = f"has a prompt of {len(prompt.ids)} tokens, and the model's positions leave room for {self.most_tokens}"
        remedy = "Lower generate.max_new_tokens, or set data.on_bad_row=skip."
        return RowError(prompt.row.origin, what, remedy, "longer than the model")

    def _leave_out(self, error: RowError, dropped: Counter[str]) -> None:
        if error.reason not in HARMLESS and self.config.on_bad_row == "error":
            raise error
        dropped[error.reason] += 1


class _WithAnswers:
    """A source whose rows may lack the column of completions: who asks for them need not have any."""

    def __init__(self, source: Source, column: str | None) -> None:
        self.source, self.column = source, column
        if (split_key := getattr(source, "split_key", None)) is not None:
            self.split_key = split_key

    def rows(self) -> Iterator[Row | RowError]:
        return map(self._with_answer, self.source.rows())

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint()

    def _with_answer(self, row: Row | RowError) -> Row | RowError:
        if self.column is None or not isinstance(row, Row) or self.column in row.columns:
            return row
        return Row(row.origin, {**row.columns, self.column: ""})
