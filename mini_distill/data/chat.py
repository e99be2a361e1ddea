"""Conversations become tokens by the chat template, supervised on the assistant's turns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..errors import DataError
from .row import Rendered, Row, RowError
from .text_tokens import TextTokens

TEMPLATES = Path(__file__).parent / "chat_templates"
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "function_response": "tool", "user": "user", "assistant": "assistant"}
"""ShareGPT's names of the roles."""
MARKED = "generation %}"
SENTINEL = "\ue000{}\ue001"
"""Private-use characters stand in for a special token that a user wrote, while the template is rendered."""


class ChatRenderer:
    """Renders conversations, with tools, and finds the assistant's turns in them.

    A template that marks them with `{% generation %}` is believed. For any other, a turn is what the conversation up to and with
    it has more than the conversation before it with the generation prompt; a template that rewrites earlier turns later on
    (dropping old thoughts, say) cannot be used that way and is refused by name.

    Args:
        config: The columns and `chat_template`: a shipped name, a .jinja file, or None for the tokenizer's own.
        tokenizer: Of teacher and student.
        text: Encodes text in which special tokens mean nothing.
        where: The path of the data settings, for messages.

    Raises:
        DataError: there is no template, or it cannot be read.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, text: TextTokens, where: str) -> None:
        self.config, self.tokenizer, self.text = config, tokenizer, text
        self.template = _load_template(config.chat_template, tokenizer, where)
        self.special = sorted(set(tokenizer.all_special_tokens) | set(_added_tokens(tokenizer)), key=len, reverse=True)
        self._special_ids = set(tokenizer.convert_tokens_to_ids(self.special))
        self.ends = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(t) for t in self.special if t in END_OF_TURN)}

    def render(self, row: Row) -> Rendered | RowError:
        """The conversation's tokens, or what is wrong with the row."""
        try:
            messages = _messages(row, self.config.messages_column or "")
            tools = _tools(row, self.config.tools_column)
            if tools and "tools" not in self.template:
                raise RowError(row.origin, "has tools, and the chat template has no place for them", "Give another data.chat_template, such as chatml or llama3.", "template")
            text, spans = self._spans(row, self._hide(messages), self._hide(tools))
        except RowError as error:
            return error
        except (TemplateError, ValueError, TypeError) as error:
            return RowError(row.origin, f"the chat template cannot render it ({error})", "Mend the row, or give another data.chat_template.", "template")
        rendered = self._tokens(text, spans)
        if not rendered.supervised.any():
            return RowError(row.origin, "no turn of the assistant, so nothing to learn from", "Leave the row out, or set data.on_bad_row=skip.", "nothing supervised")
        return rendered

    # ------------------------------------------------------------------------------------------------- where the assistant speaks

    def _spans(self, row: Row, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the character ranges of the assistant's turns."""
        if MARKED in self.template:
            return self._render(messages, tools, marked=True)
        whole, _ = self._render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:i], tools, add_generation_prompt=True)
            until, _ = self._render(messages[: i + 1], tools)
            if not until.startswith(before) or not whole.startswith(until.rstrip()):
                what = f"the chat template renders message {i + 1} differently once others follow, so the assistant's words cannot be found"
                raise RowError(row.origin, what, "Give a template with {% generation %} marks: data.chat_template=chatml, llama3, gemma, mistral or a .jinja file.", "template")
            spans.append((len(before), len(until.rstrip())))
        return whole, spans

    def _render(self, messages: list[dict[str, Any]], tools: Any, marked: bool = False, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """By transformers' sandbox."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=marked,
            **{**self.tokenizer.special_tokens_map, **options},
        )
        return rendered[0], [(int(a), int(b)) for a, b in spans[0]] if marked else []

    # ------------------------------------------------------------------------------------------------------------------- tokens

    def _hide(self, value: Any) -> Any:
        """The value with special tokens inside its strings replaced by sentinels."""
        if isinstance(value, str):
            for number, token in enumerate(self.special):
                value = value.replace(token, SENTINEL.format(chr(0xE100 + number)))
            return value
        if isinstance(value, dict):
            return {key: self._hide(inner) for key, inner in value.items()}
        return [self._hide(inner) for inner in value] if isinstance(value, list) else value

    def _tokens(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Piece by piece: what the template wrote with its special tokens, what a user wrote as text."""
        ids: list[int] = []
        supervised: list[bool] = []
        num_bytes: list[int] = []
        at = 0
        for piece in re.split("(\ue000.\ue001)", text):
            pieces = self._written_by_user(piece) if piece.startswith("\ue000") else self._written_by_template(piece)
            for token, start, end, size in pieces:
                follows_turn = bool(supervised) and supervised[-1] and token in self.ends and ids[-1] not in self.ends
                ids.append(token)
                num_bytes.append(size)
                supervised.append(follows_turn or any(a < at + end and at + start < b for a, b in spans))
            at += len(piece)
        return Rendered(np.array(ids, dtype=np.int64), np.array(supervised, dtype=bool), np.array(num_bytes, dtype=np.int64))

    def _written_by_user(self, sentinel: str) -> list[tuple[int, int, int, int]]:
        ids, num_bytes = self.text.encode([self.special[ord(sentinel[1]) - 0xE100]])[0]
        return [(int(token), 0, len(sentinel), int(size)) for token, size in zip(ids, num_bytes, strict=True)]

    def _written_by_template(self, piece: str) -> list[tuple[int, int, int, int]]:
        encoding = self.tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False)
        tokens, until = [], 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            is_special = token in self._special_ids
            tokens.append((token, start, end, 0 if is_special else len(piece[max(until, start) : end].encode())))
            until = max(until, end)
        return tokens


END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<|endoftext|>")


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _load_template(name: str | None, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if name is None:
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise DataError(f"{where}.chat_template", "missing, and the tokenizer has none", "Give chatml, llama3, gemma, mistral or a .jinja file.")
        return template
    file = TEMPLATES / f"{name}.jinja" if not name.endswith(".jinja") else Path(name).expanduser()
    if not file.is_file():
        shipped = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
        raise DataError(f"{where}.chat_template", f"no template '{name}' (shipped: {shipped})", "Give one of them, or a .jinja file.")
    return file.read_text(encoding="utf-8")


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    """The conversation with `role` and `content`, from that form, from ShareGPT's, or from JSON text of either."""
    value = _parsed(row.columns[column])
    if not isinstance(value, list) or not value:
        raise RowError(row.origin, f"column '{column}' holds {type(value).__name__}, expected a list of messages", reason="wrong type")
    return [_message(row, column, number, message) for number, message in enumerate(value, start=1)]


def _message(row: Row, column: str, number: int, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and "from" in message:
        message = {"role": SHAREGPT.get(message["from"], message["from"]), "content": message.get("value")}
    if not isinstance(message, dict) or "role" not in message:
        raise RowError(row.origin, f"message {number} of '{column}' is not {{role, content}}", reason="wrong type")
    if message["role"] not in ROLES:
        raise RowError(row.origin, f"message {number} has the role {message['role']!r} (known: {', '.join(ROLES)})", reason="wrong type")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise RowError(row.origin, f"message {number} has {type(content).__name__} as content, expected text", reason="wrong type")
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError) as error:
        raise RowError(row.origin, f"message {number} is not plain text ({error})", reason="wrong type") from error
    return message


def _tools(row: Row, column: str | None) -> list[dict[str, Any]] | None:
    if column is None or row.columns.get(column) in (None, "", []):
        return None
    tools = _parsed(row.columns[column])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(row.origin, f"column '{column}' is not a list of tool schemas", reason="wrong type")
    return tools


def _parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
