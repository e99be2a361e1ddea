"""Secrets taken out of whatever is written: configuration, tracebacks, what goes to a tracker."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

MASK = "***"

_SECRET = re.compile(r"token|secret|passw(or)?d|credential|api_?key|(^|[^a-z])keys?($|[^a-z])", re.IGNORECASE)
_HARMLESS = re.compile(
    r"tokeniz|tokens_|(max|min|num|new|special|stop|added|extra)_?tokens|(bos|eos|pad|unk|sep|cls|mask|image)_token|token_(column|id)|key_column",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)[^/?#\s]+@")
_IN_QUERY = re.compile(r"(?P<name>[?&][^=&\s]*(token|key|secret|password|signature)[^=&\s]*=)[^&#\s]+", re.IGNORECASE)
_IN_HEADER = re.compile(r"(?P<name>\b(Bearer|Authorization['\"]?\s*:\s*['\"]?\w+)\s+)[\w.~+/=-]{12,}", re.IGNORECASE)
_KNOWN_FORM = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b")


def redact(value: Any, key: str = "") -> Any:
    """The same plain value with its secrets replaced by `***`.

    Secret are texts under a key that speaks of a token, key, secret or password (not `tokenizer`, `max_tokens` or `eos_token`,
    nor any number), and within any text what `redact_text` finds.
    """
    if isinstance(value, Mapping):
        return {name: redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, key) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if _SECRET.search(key) and not _HARMLESS.search(key) else redact_text(value)


def redact_text(text: str) -> str:
    """`text` without credentials in URLs and headers, tokens of well-known form, and values of the environment's own secrets (HF_TOKEN, …)."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, MASK)
    text = _IN_URL.sub(rf"\g<scheme>{MASK}@", text)
    text = _IN_QUERY.sub(rf"\g<name>{MASK}", text)
    text = _IN_HEADER.sub(rf"\g<name>{MASK}", text)
    return _KNOWN_FORM.sub(MASK, text)


def print_traceback() -> None:
    """That of the exception being handled to stderr, as `traceback.print_exc` does."""
    print(redact_text(traceback.format_exc()), end="", file=sys.stderr)


def _secrets_of_environment() -> list[str]:
    values = (v for name, v in os.environ.items() if _SECRET.search(name) and not _HARMLESS.search(name))
    return sorted((v for v in values if len(v) >= 8 and not v.startswith("/")), key=len, reverse=True)
