"""Checks of a chat template on the user's own conversations: what is learned has to be what is asked for later."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..data.chat import ChatRenderer
from ..data.render import Renderer
from ..data.row import Rendered, Row, RowError
from ..errors import DataError
from .finding import DOUBTFUL, GOOD, WRONG, Finding, judged

MOST_CONVERSATIONS = 50


def check_template(
    config: DataConfig,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    others: Mapping[str, PreTrainedTokenizerBase],
    where: str = "data",
) -> Iterator[Finding]:
    """Of conversations that end with an answer: their beginning, their generation prompt, what of them is learned, and other templates.

    Args:
        config: Of the data; nothing is found where they are no conversations.
        rows: The user's own.
        tokenizer: Shared by teacher and student.
        others: Tokenizers whose own templates should write the same, by whose they are.
        where: The path of the settings, for messages.
    """
    renderer = Renderer(config, tokenizer, where)
    if renderer.chat is None:
        return
    answered = [row for row in rows if _is_answered(renderer.chat, row)][:MOST_CONVERSATIONS]
    if not answered:
        yield Finding("template", DOUBTFUL, "no conversation ends with an answer", "Look at the roles of the messages.")
        return
    yield _beginning(renderer.chat, answered, str(tokenizer.eos_token))
    yield _generation_prompt(renderer.chat, answered)
    yield _assistant_turns(renderer, renderer.chat, answered, tokenizer)
    for whose, other in others.items():
        yield _other_template(config, renderer.chat, answered, whose, other, where)


def _is_answered(chat: ChatRenderer, row: Row) -> bool:
    """Whether the conversation ends with the assistant, after somebody else, and can be rendered with and without that."""
    try:
        messages = chat.conversation(row)
        for options in ({}, {"without_last": True, "prompt": True}):
            chat.written(row, **options)
    except RowError:
        return False  # told among the rows
    return len(messages) > 1 and messages[-1]["role"] == "assistant" and bool(messages[-1]["content"].strip())


def _beginning(chat: ChatRenderer, rows: list[Row], end: str) -> Finding:
    """What stands before an answer may not depend on whether there is one."""
    other = [row for row in rows if not chat.written(row).startswith(chat.written(row, without_last=True).rstrip().removesuffix(end))]
    measured = f"{len(rows) - len(other)} of {len(rows)} conversations begin the same with and without their last answer"
    advice = (
        "Once an answer follows, the template writes what stands before it otherwise: the student is asked in a form it never learned from."
    )
    return judged("template's beginning", not other, measured, f"{advice}{_first(other)}")


def _generation_prompt(chat: ChatRenderer, rows: list[Row]) -> Finding:
    """Generation prompt and answer are the whole conversation."""
    wrong, between = [], []
    for row in rows:
        prompt, whole = chat.written(row, without_last=True, prompt=True), chat.written(row)
        answer = chat.conversation(row)[-1]["content"].strip()
        if not whole.startswith(prompt) or answer not in whole[len(prompt) :]:
            wrong.append(row)
        elif inserted := whole[len(prompt) :].partition(answer)[0].strip():
            between.append((row, inserted))
    good = len(rows) - len(wrong) - len(between)
    measured = f"{good} of {len(rows)} conversations are their generation prompt and the answer"
    if wrong:
        advice = "The template asks for an answer (add_generation_prompt) otherwise than it writes one: the student is asked in a form it never learned from."
        return Finding("generation prompt", WRONG, measured, f"{advice}{_first(wrong)}")
    if between:
        row, inserted = between[0]
        measured += f"; between them stands {inserted[:40]!r} ({row.origin})"
        return Finding("generation prompt", DOUBTFUL, measured, "The student learns to write that itself. Is it meant?")
    return Finding("generation prompt", GOOD, measured)


def _assistant_turns(renderer: Renderer, chat: ChatRenderer, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Finding:
    """What is learned are the assistant's turns, each whole, and nothing else."""
    faults: dict[str, list[Row]] = {}
    for row, rendered in zip(rows, renderer.render_many(rows), strict=True):
        if isinstance(rendered, Rendered) and (fault := _fault(_learned(rendered, tokenizer), chat.conversation(row))):
            faults.setdefault(fault, []).append(row)
    number = len(rows) - sum(map(len, faults.values()))
    what = "".join(f"; in {len(some)} {fault}" for fault, some in faults.items())
    measured = f"in {number} of {len(rows)} conversations exactly the assistant's turns are learned{what}"
    if not faults:
        return Finding("assistant's turns", GOOD, measured)
    advice = "Look at ⟦what is learned⟧ and at the template's {% generation %} marks, or set data.chat_template."
    verdict = DOUBTFUL if set(faults) == {MORE} else WRONG
    return Finding("assistant's turns", verdict, measured, f"{advice}{_first(next(iter(faults.values())))}")


MISSING, OTHERS, MORE = "a turn is not learned whole", "somebody else's words are learned", "a turn's own frame is learned"
FRAME = re.compile(r"(<think>.*?</think>)?\s*", re.DOTALL), re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])?\s*")
"""What may stand before and after the assistant's words: thoughts, and an end that this tokenizer writes as text."""


def _fault(learned: list[str], messages: list[dict[str, Any]]) -> str:
    """What is wrong with what is learned of a conversation; "" where each stretch is a turn of the assistant."""
    turns = [
        message for message in messages if message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
    ]
    others = [text for message in messages if message["role"] != "assistant" and (text := message["content"].strip())]
    said = [message["content"].strip() for message in turns]
    if any(text in stretch and not any(text in own for own in said) for stretch in learned for text in others):
        return OTHERS
    if len(learned) != len(turns) or not all(own in stretch for own, stretch in zip(said, learned, strict=True)):
        return MISSING
    for message, own, stretch in zip(turns, said, learned, strict=True):
        before, _, after = stretch.partition(own) if own else ("", "", stretch)
        if not FRAME[0].fullmatch(before) or not (FRAME[1].fullmatch(after) or message.get("tool_calls")):
            return MORE
    return ""


def _learned(row: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each stretch of tokens that are learned, without special tokens."""
    places = groupby(range(len(row.input_ids)), key=lambda i: bool(row.supervised[i]))
    stretches = [row.input_ids[list(stretch)].tolist() for learned, stretch in places if learned]
    return [str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip() for ids in stretches]


def _other_template(
    config: DataConfig, chat: ChatRenderer, rows: list[Row], whose: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> Finding:
    """The template that belongs to a model writes these conversations the same."""
    name = f"{whose}'s template"
    if not tokenizer.chat_template:
        return Finding(name, GOOD, "none of its own")
    try:
        own = Renderer(replace(config, chat_template=None), tokenizer, where).chat
        assert own is not None
        other = [row for row in rows if own.written(row).strip() != chat.written(row).strip()]
    except DataError as error:
        return Finding(name, DOUBTFUL, error.problems[0].what, f"Set {where}.chat_template.")
    measured = f"{len(rows) - len(other)} of {len(rows)} conversations are written as by the {whose}'s own"
    advice = f"The {whose} knows conversations in another form: leave {where}.chat_template out, or be sure that it is meant."
    return judged(name, not other, measured, f"{advice}{_first(other)}", DOUBTFUL)


def _first(rows: list[Row]) -> str:
    return f" The first: {rows[0].origin}." if rows else ""
