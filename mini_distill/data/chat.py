"""Conversations become tokens by the chat template, supervised on the assistant's turns."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..config import DataConfig
from ..contract import did_you_mean
from ..errors import DataError
from .row import Rendered, Row, RowError
from .text_tokens import TextTokens, bytes_by_offsets, control_ids
from .time_limit import time_limit

TEMPLATES = Path(__file__).parent / "chat_templates"
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "function_response": "tool", **{role: role for role in ROLES}}
"""ShareGPT's names of the roles; it uses the ordinary ones too."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIXED_DATE = "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') }}{%- endmacro -%}"
"""For templates that write today's date: the same rows have to be the same tokens tomorrow."""
OPEN, CLOSE = "\ue000", "\ue001"
HIDDEN = re.compile(f"({OPEN}.{CLOSE})")
"""Private-use characters stand in for a special token that a user wrote, while the template is rendered."""
FIRST_CODE = 0xE100
MOST_SECONDS = 10.0
"""For a conversation, which takes a template a thousandth of one."""
MEND = "Mend the row, or set data.on_bad_row=skip."


@dataclass(frozen=True)
class _Written:
    """A conversation as the template writes it, and the ranges of characters where the assistant speaks."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class _Encoded:
    """A text's ids `(tokens,)`, their ranges of characters `(tokens, 2)` and their bytes `(tokens,)`, all int64."""

    ids: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray


class ChatRenderer:
    """Renders conversations, with tools, and finds the assistant's turns in them.

    A template that marks them with `{% generation %}` is believed. For any other, a turn is what the conversation up to and with
    it has more than the conversation before it with the generation prompt; a template that rewrites earlier turns later on
    (dropping old thoughts, say) cannot be used that way and is refused by name. The special token that follows a turn is
    supervised with it; blanks that follow are not.

    Args:
        config: The columns and `chat_template`: a shipped name, a .jinja file, or None for the tokenizer's own. `add_bos`: None
            leaves the beginning-of-sequence token to the template, true or false sees to it that there is one or none.
        tokenizer: Of teacher and student; it has an end-of-sequence token.
        text: Encodes text in which special tokens mean nothing.
        where: The path of the data settings, for messages.

    Raises:
        DataError: there is no template, or it is not one.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, text: TextTokens, where: str) -> None:
        self.config, self.tokenizer, self.text, self.where = config, tokenizer, text, where
        self.template = _load_template(config, tokenizer, where)
        special = {*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(control_ids(tokenizer)), OPEN, CLOSE} - {""}
        self.hidden = sorted(special, key=lambda token: (-len(token), token))  # the longest first: one may begin another
        self._hidden_pattern = re.compile("|".join(map(re.escape, self.hidden)))
        self._code = {token: f"{OPEN}{chr(FIRST_CODE + number)}{CLOSE}" for number, token in enumerate(self.hidden)}

    def render_many(self, rows: list[Row]) -> list[Rendered | RowError]:
        """Each conversation's tokens, or what is wrong with the row."""
        written = [self._write(row) for row in rows]
        encoded = iter(self._encode([item.text for item in written if isinstance(item, _Written)]))
        return [
            self._join(row, item, next(encoded)) if isinstance(item, _Written) else item for row, item in zip(rows, written, strict=True)
        ]

    def written(self, row: Row, *, without_last: bool = False, prompt: bool = False) -> str:
        """A conversation as the template writes it, for who wants to look at that.

        Args:
            row: The conversation.
            without_last: Leave its last message out.
            prompt: Add the generation prompt.

        Raises:
            RowError: there is no conversation in it, or the template cannot render it.
        """
        messages, tools = self.conversation(row), _tools(row, self.config.tools_column)
        return self._render(row, messages[:-1] if without_last else messages, tools, add_generation_prompt=prompt).text

    def conversation(self, row: Row) -> list[dict[str, Any]]:
        """The messages of a row with `role` and `content`.

        Raises:
            RowError: there are none.
        """
        return conversation(row, self.config.messages_column or "")

    def prompts(self, rows: list[Row]) -> list[np.ndarray | RowError]:
        """The tokens `(tokens,)` of each conversation up to its last answer and with what begins that, or what is wrong with the row."""
        written = [self._write_prompt(row) for row in rows]
        encoded = iter(self._encode([item.text for item in written if isinstance(item, _Written)]))
        return [
            self._prompt(row, item, next(encoded)) if isinstance(item, _Written) else item for row, item in zip(rows, written, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------- where the assistant speaks

    def _write(self, row: Row) -> _Written | RowError:
        try:
            messages, tools = self._conversation(row)
            if GENERATION.search(self.template):
                return self._render(row, messages, tools, return_assistant_tokens_mask=True)
            return self._by_prefixes(row, messages, tools)
        except RowError as error:
            return error
        except RecursionError:
            return RowError(row.origin, "is nested too deeply", MEND, "wrong type")

    def _write_prompt(self, row: Row) -> _Written | RowError:
        try:
            messages, tools = self._conversation(row)
            return self._render(row, to_answer(row, messages), tools, " without its last answer", add_generation_prompt=True)
        except RowError as error:
            return error
        except RecursionError:
            return RowError(row.origin, "is nested too deeply", MEND, "wrong type")

    def _conversation(self, row: Row) -> tuple[list[dict[str, Any]], Any]:
        """Messages and tools, with the special tokens inside their texts hidden. Raises RowError."""
        messages, tools = conversation(row, self.config.messages_column or ""), _tools(row, self.config.tools_column)
        if tools and "tools" not in self.template:
            remedy = f"Give another {self.where}.chat_template, such as chatml or llama3."
            raise RowError(row.origin, "has tools, and the chat template has no place for them", remedy, "template")
        return self._hide(messages), self._hide(tools)

    def _by_prefixes(self, row: Row, messages: list[dict[str, Any]], tools: Any) -> _Written:
        """For a template without marks: where each turn of the assistant begins and ends in the whole."""
        whole = self._render(row, messages, tools).text
        spans = []
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before = self._render(row, messages[:i], tools, f" up to message {i}", add_generation_prompt=True).text
            until = self._render(row, messages[: i + 1], tools, f" up to message {i + 1}").text
            if not until.startswith(before) or not whole.startswith(until.rstrip()):
                what = f"the chat template renders message {i + 1} differently once others follow, so the assistant's words cannot be found"
                remedy = f"Give a template with {{% generation %}} marks: {self.where}.chat_template=chatml, llama3, gemma, mistral or a .jinja file."
                raise RowError(row.origin, what, remedy, "template")
            spans.append((len(before), len(until.rstrip())))
        return _Written(whole, spans)

    def _render(self, row: Row, messages: list[dict[str, Any]], tools: Any, part: str = "", **options: Any) -> _Written:
        """By the template, in transformers' sandbox."""
        context = {"date_string": "26 Jul 2024", **self.tokenizer.special_tokens_map, **options}
        try:
            with time_limit(MOST_SECONDS):
                result: Any = render_jinja_template([messages], tools=tools, chat_template=self.template, **context)
        except Exception as error:  # a template is a program, and may raise anything
            remedy = f"Mend the row, or give another {self.where}.chat_template."
            raise RowError(row.origin, f"the chat template cannot render it{part} ({error})", remedy, "template") from error
        (text,), spans = result
        return _Written(text, spans[0] if spans else [])

    def _hide(self, value: Any) -> Any:
        """The value with the special tokens inside its strings replaced, so that those in the rendered text are the template's."""
        if isinstance(value, str):
            return self._hidden_pattern.sub(lambda found: self._code[found[0]], value)
        if isinstance(value, dict):
            return {self._hide(key): self._hide(inner) for key, inner in value.items()}
        return [self._hide(inner) for inner in value] if isinstance(value, list) else value

    # ------------------------------------------------------------------------------------------------------------------- tokens

    def _encode(self, texts: list[str]) -> list[_Encoded]:
        """The texts without anything hidden, so nearly all, at once."""
        plain = [text for text in texts if OPEN not in text]
        at_once = zip(plain, self.text.encode_with_offsets(plain, specials_are_text=False), strict=True)
        return [self._encode_pieces(text) if OPEN in text else _encoded(*next(at_once)) for text in texts]

    def _encode_pieces(self, text: str) -> _Encoded:
        """What the template wrote, with its special tokens, and what a user wrote in their likeness, as text."""
        pieces, at = [], 0
        for number, piece in enumerate(HIDDEN.split(text)):
            by_user = number % 2 == 1
            original = self.hidden[ord(piece[1]) - FIRST_CODE] if by_user else piece
            encoded = _encoded(original, self._encode_piece(original, at == 0, by_user))
            offsets = np.tile([0, len(piece)], (len(encoded.ids), 1)) if by_user else encoded.offsets
            pieces.append((encoded.ids, offsets + at, encoded.num_bytes))
            at += len(piece)
        ids, all_offsets, num_bytes = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return _Encoded(ids, all_offsets, num_bytes)

    def _encode_piece(self, piece: str, is_first: bool, by_user: bool) -> tuple[np.ndarray, np.ndarray]:
        """A later piece is encoded behind a newline that is then taken off, or SentencePiece would put a blank in front of it."""
        if not is_first:
            ids, offsets = self.text.encode_with_offsets(["\n" + piece], by_user)[0]
            later = offsets[:, 1] > 1
            if (offsets[later, 0] >= 1).all():
                return ids[later], offsets[later] - 1
        return self.text.encode_with_offsets([piece], by_user)[0]

    def _join(self, row: Row, written: _Written, encoded: _Encoded) -> Rendered | RowError:
        """The encoded text with what is supervised in it."""
        ids, offsets = encoded.ids, encoded.offsets
        is_control = self.text.is_control[ids]
        if self._holds_special_token(written, encoded):
            return _special_token(row)
        supervised = _touched(offsets, written)
        if not any(written.text[begin:end].strip() for begin, end in offsets[supervised & ~is_control]):
            what = "no turn in which the assistant says something, so nothing to learn from"
            return RowError(row.origin, what, MEND, "nothing supervised")
        supervised = supervised | self._ends_turn(ids, supervised, is_control)
        return self._with_ends(Rendered(ids, supervised, np.where(is_control, 0, encoded.num_bytes)))

    def _prompt(self, row: Row, written: _Written, encoded: _Encoded) -> np.ndarray | RowError:
        if self._holds_special_token(written, encoded):
            return _special_token(row)
        ids, bos = encoded.ids, self.tokenizer.bos_token_id
        has_bos = ids[:1].tolist() == [bos]
        if self.config.add_bos is True and not has_bos:
            return np.concatenate([[bos], ids])
        return ids[1:] if self.config.add_bos is False and has_bos else ids

    def _holds_special_token(self, written: _Written, encoded: _Encoded) -> bool:
        """Whether a hidden one came out as itself: a vocabulary that knows no other spelling."""
        is_control = self.text.is_control[encoded.ids]
        return any(written.text[begin] == OPEN for begin in encoded.offsets[is_control, 0])

    def _ends_turn(self, ids: np.ndarray, supervised: np.ndarray, is_control: np.ndarray) -> np.ndarray:
        """`(tokens,)` bool: the special token right behind a turn, when the turn does not hold its end itself."""
        behind = np.zeros(len(ids), dtype=bool)
        behind[1:] = supervised[:-1] & ~is_control[:-1] & ~supervised[1:] & is_control[1:]
        return behind & (ids != self.tokenizer.bos_token_id)

    def _with_ends(self, row: Rendered) -> Rendered:
        """The beginning-of-sequence token as `add_bos` says; an end-of-sequence token where the template writes no end at all."""
        bos, eos, ids = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, row.input_ids
        last = int(np.flatnonzero(row.supervised)[-1])
        if not self.text.is_control[ids[last:]].any():  # <|im_end|> is mere text to this tokenizer: nothing would ever end
            row = _edited(row, slice(0, last + 1), after=[eos])
        if self.config.add_bos is True and ids[0] != bos:
            return _edited(row, slice(0, None), before=[bos])
        if self.config.add_bos is False and ids[0] == bos:
            return _edited(row, slice(1, None))
        return row


def _encoded(text: str, ids_and_offsets: tuple[np.ndarray, np.ndarray]) -> _Encoded:
    ids, offsets = ids_and_offsets
    return _Encoded(ids, offsets, bytes_by_offsets(text, offsets))


def _touched(offsets: np.ndarray, written: _Written) -> np.ndarray:
    """`(tokens,)` bool: some character of the token is the assistant's."""
    by_assistant = np.zeros(len(written.text) + 1, dtype=np.int64)
    for begin, end in written.spans:
        by_assistant[begin + 1 : end + 1] = 1
    until = np.cumsum(by_assistant)
    return until[offsets[:, 1]] > until[offsets[:, 0]]


def _edited(row: Rendered, kept: slice, before: list[int] | None = None, after: list[int] | None = None) -> Rendered:
    """A part of the row, with tokens put before (not supervised) and after it (supervised)."""
    before, after = before or [], after or []
    return Rendered(
        np.concatenate([before, row.input_ids[kept], after]).astype(np.int64),
        np.concatenate([np.zeros(len(before), dtype=bool), row.supervised[kept], np.ones(len(after), dtype=bool)]),
        np.pad(row.num_bytes[kept], (len(before), len(after))),
    )


# ---------------------------------------------------------------------------------------------------------------------- template


def _load_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The template's text, known to compile."""
    where = f"{where}.chat_template"
    template = _own_template(config, tokenizer, where) if config.chat_template is None else _template_file(config.chat_template, where)
    try:
        render_jinja_template([], chat_template=template)
    except Exception as error:  # the compiler's many
        raise DataError(where, f"is not a chat template ({error})", "Give chatml, llama3, gemma, mistral or a .jinja file.") from error
    return FIXED_DATE + template if "strftime_now" in template else template


def _own_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        raise DataError(where, "missing, and the tokenizer has none", "Give chatml, llama3, gemma, mistral or a .jinja file.")
    try:
        return str(tokenizer.get_chat_template(tools=[] if config.tools_column else None))
    except ValueError as error:  # several, and none is the default
        raise DataError(where, f"missing ({error})", "Give chatml, llama3, gemma, mistral or a .jinja file.") from error


def _template_file(name: str, where: str) -> str:
    shipped = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    file = Path(name).expanduser() if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    if name not in shipped and not (name.endswith(".jinja") and file.is_file()):
        what = f"no template '{name}' (shipped: {', '.join(shipped)})"
        raise DataError(where, what, did_you_mean(name, shipped) or "Give one of them, or a .jinja file.")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(where, f"cannot read '{name}' ({error})", "Give a UTF-8 text file.") from error


# ------------------------------------------------------------------------------------------------------------------ conversation


def conversation(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages with `role` and `content`, from that form, from ShareGPT's, or from JSON text of either.

    Raises:
        RowError: the column holds something else.
    """
    value = _value(row, column)
    if isinstance(value, list) and not value:
        raise RowError(row.origin, f"column '{column}' is empty", reason="empty")
    if not isinstance(value, list):
        found = "null" if value is None else type(value).__name__
        raise RowError(row.origin, f"column '{column}' holds {found}, expected a list of messages", MEND, "wrong type")
    return [_message(row, f"message {number} of '{column}'", message) for number, message in enumerate(value, start=1)]


def to_answer(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without the assistant's last words, if they end with those.

    Raises:
        RowError: nobody has said anything then.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked or asked[-1]["role"] not in ("user", "tool"):
        raise RowError(
            row.origin, "has nothing that could be answered", "Expected a message of the user before the last answer.", "no prompt"
        )
    return asked


def _special_token(row: Row) -> RowError:
    return RowError(row.origin, "holds a special token, which this tokenizer cannot write as text", MEND, "special token")


def _message(row: Row, name: str, message: Any) -> dict[str, Any]:
    role, content = _role_and_content(row, name, message)
    known = {role: role for role in ROLES} if "role" in message else SHAREGPT
    if not isinstance(role, str) or role not in known:
        raise RowError(row.origin, f"{name} has the role {role!r} (known: {', '.join(known)})", MEND, "wrong type")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        found = "null" if content is None else type(content).__name__
        raise RowError(row.origin, f"{name} has {found} as content, expected text", MEND, "wrong type")
    others = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    return {**others, "role": known[role], "content": content}


def _role_and_content(row: Row, name: str, message: Any) -> tuple[Any, Any]:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and role in message:
            return message[role], message.get(content)
    raise RowError(row.origin, f'{name} is neither {{"role", "content"}} nor {{"from", "value"}}', MEND, "wrong type")


def _tools(row: Row, column: str | None) -> list[dict[str, Any]] | None:
    """Tool schemas: a list of objects, or JSON text of the list or of each."""
    if column is None or row.columns.get(column) in (None, "", []):
        return None
    value = _value(row, column)
    tools = [_parsed(tool) for tool in value] if isinstance(value, list) else None
    if tools is None or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(row.origin, f"column '{column}' is not a list of tool schemas", MEND, "wrong type")
    return tools


def _value(row: Row, column: str) -> Any:
    """A column's lists and objects, whether it holds them or their JSON text; only what could stand in a JSON file in UTF-8."""
    if column not in row.columns:
        raise RowError(row.origin, f"has no column '{column}' (there: {', '.join(map(str, row.columns))})", MEND, "missing column")
    value = _parsed(row.columns[column])
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(row.origin, f"column '{column}' holds half a character (a lone surrogate)", MEND, "lone surrogate") from error
    except (TypeError, ValueError) as error:
        raise RowError(row.origin, f"column '{column}' is not plain text, lists and objects ({error})", MEND, "wrong type") from error
    return value


def _parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
