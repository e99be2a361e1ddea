"""Rows become tokens, with a mark on every token that is to be predicted."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..errors import DataError
from .chat import ChatRenderer
from .row import Rendered, Row, RowError
from .sources import columns_of
from .text_tokens import TextTokens
from .tokenizers import tokenizer_fingerprint

MEND = "Mend the row, or set data.on_bad_row=skip."


class Renderer:
    """Renders the rows of a source: plain text, prompt and completion, or chat messages, as the configuration says.

    - Text: every token is supervised.
    - Prompt and completion: tokenised apart, so that the boundary does not depend on their contents; the completion is supervised.
    - Messages: by the chat template; the assistant's turns are supervised.

    Each ends with the end-of-sequence token (of the turn, in a chat), which is supervised by its place, whatever the padding token
    is. Special tokens written inside a row's own text are text: a row cannot end a turn or begin a document.

    Args:
        config: Columns, template and beginning-of-sequence.
        tokenizer: Of teacher and student.
        where: The path of the data settings, for messages.

    Raises:
        DataError: there is no chat template where one is needed, or the tokenizer has no end-of-sequence token.
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str = "data") -> None:
        self.config, self.where, self.columns = config, where, columns_of(config)
        self.text = TextTokens(tokenizer)
        if tokenizer.eos_token_id is None:
            raise DataError(
                "tokenizer", "has no end-of-sequence token, so no model could learn to stop", "Set eos_token in its tokenizer_config.json."
            )
        self.eos = [int(tokenizer.eos_token_id)]
        self.bos = _bos(config, tokenizer, where)
        self.chat = ChatRenderer(config, tokenizer, self.text, where) if config.messages_column else None
        self._tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)

    @property
    def has_prompt(self) -> bool:
        """Whether a part of the row is not supervised."""
        return len(self.columns) == 2 or self.chat is not None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the tokens, besides the rows themselves, as plain JSON values."""
        return {
            "kind": "messages" if self.chat else "prompt and completion" if self.has_prompt else "text",
            "tokenizer": self._tokenizer_fingerprint,
            "columns": list(self.columns),
            "tools_column": self.config.tools_column,
            "chat_template": hashlib.sha256(self.chat.template.encode()).hexdigest() if self.chat else None,
            "bos": self.config.add_bos if self.chat else self.bos,  # of a chat, null leaves it to the template
            "eos": self.eos,
        }

    def render_many(self, rows: list[Row]) -> list[Rendered | DataError]:
        """Each row's tokens, or what is wrong with it."""
        if self.chat is not None:
            return [*self.chat.render_many(rows)]
        checked = [self._check(row) for row in rows]
        good = [row for row, error in zip(rows, checked, strict=True) if error is None]
        texts = [self.text.encode([row.columns[name] for row in good]) for name in self.columns]
        rendered = iter([self._join(row, parts) for row, *parts in zip(good, *texts, strict=True)])
        return [error if error is not None else next(rendered) for error in checked]

    def prompts(self, rows: list[Row], num_tokens: int) -> list[np.ndarray | RowError]:
        """What a model is to go on from, `(tokens,)`, or what is wrong with the row.

        Of a text its first `num_tokens` tokens, of prompt and completion the prompt, of a conversation all up to its last answer; each
        as it stands at the beginning of the rendered row.
        """
        if self.chat is not None:
            return self.chat.prompts(rows)
        checked = [check_text(row, self.columns[0]) for row in rows]
        good = [row for row, error in zip(rows, checked, strict=True) if error is None]
        texts = zip(good, self.text.encode([row.columns[self.columns[0]] for row in good]), strict=True)
        prompts = iter([self._prompt(row, ids, num_tokens) for row, (ids, _) in texts])
        return [error if error is not None else next(prompts) for error in checked]

    def _prompt(self, row: Row, ids: np.ndarray, num_tokens: int) -> np.ndarray | RowError:
        if self.text.is_control[ids].any():
            return self._special_token(row, self.columns[0])
        if not self.has_prompt:
            ids = ids[:num_tokens]
        if len(self.bos) + len(ids) == 0:
            return RowError(row.origin, f"column '{self.columns[0]}' gives no token to begin with", reason="empty")
        return np.concatenate([np.array(self.bos, dtype=np.int64), ids])

    def _special_token(self, row: Row, column: str) -> RowError:
        what = f"column '{column}' holds a special token, which this tokenizer cannot write as text"
        return RowError(row.origin, what, MEND, "special token")

    def _check(self, row: Row) -> RowError | None:
        for name in self.columns:
            if (error := check_text(row, name)) is not None:
                return error
        if not row.columns[self.columns[-1]]:
            return RowError(row.origin, f"column '{self.columns[-1]}' is empty", reason="empty")
        return None

    def _join(self, row: Row, parts: list[tuple[np.ndarray, np.ndarray]]) -> Rendered | RowError:
        """Beginning, prompt if there is one, supervised text, end."""
        for name, (ids, _) in zip(self.columns, parts, strict=True):
            if self.text.is_control[ids].any():  # vocabularies of whole words or of the Unigram kind know no other spelling
                return self._special_token(row, name)
        *prompt, (ids, num_bytes) = parts
        if len(ids) == 0:
            return RowError(row.origin, f"column '{self.columns[-1]}' holds nothing that the tokenizer keeps", reason="empty")
        prompt_ids = np.concatenate([np.array(self.bos, dtype=np.int64), *(part for part, _ in prompt)])
        supervised = np.arange(len(prompt_ids) + len(ids) + 1) >= len(prompt_ids)
        all_bytes = np.concatenate([np.zeros(len(self.bos), dtype=np.int64), *(part for _, part in prompt), num_bytes, [0]])
        return Rendered(np.concatenate([prompt_ids, ids, self.eos]), supervised, all_bytes)


def check_text(row: Row, column: str) -> RowError | None:
    """What is wrong with a column that has to be text, or None."""
    if column not in row.columns:
        return RowError(row.origin, f"has no column '{column}' (there: {', '.join(map(str, row.columns))})", MEND, "missing column")
    value = row.columns[column]
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        return RowError(row.origin, f"column '{column}' holds {found}, expected text", MEND, "wrong type")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return RowError(row.origin, f"column '{column}' holds half a character (a lone surrogate at {error.start})", MEND, "lone surrogate")
    return None


def _bos(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """The tokens that begin a document: the beginning-of-sequence token where the tokenizer has one of its own, or as told."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    wanted = config.add_bos if config.add_bos is not None else bos is not None and bos != eos
    if wanted and bos is None:
        raise DataError(f"{where}.add_bos", "true, and the tokenizer has no beginning-of-sequence token", f"Set {where}.add_bos=false.")
    return [int(bos)] if wanted and bos is not None else []
