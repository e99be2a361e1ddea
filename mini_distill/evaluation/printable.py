"""Text of models and data, made safe to show."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"
"""Invisible, but Persian, Hindi and many emoji are misspelt without them."""


def printable(text: str) -> str:
    """The text with control and invisible format characters spelt out (`\\x1b`), so that it cannot drive a terminal."""
    return "".join(_printable(c) for c in text.replace("\r\n", "\n").expandtabs(4))


def _printable(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or char == "\n" or char in JOINERS:
        return char
    return char.encode("unicode_escape").decode()
