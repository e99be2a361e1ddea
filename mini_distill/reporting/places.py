"""Paths as the page shows them: whoever gets the page need not learn how somebody's disk is laid out."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

KEPT = 2  # last parts of a path
_IN_A_TEXT = re.compile(r"""(?<![^\s'"(=\[,])(?:/[^/\s'",()\[\]]+){3,}""")


def place_of(path: Path) -> str:
    """A folder: from the current one, where it lies within it; else its last parts."""
    whole, here = path.resolve(), Path.cwd()
    return str(whole.relative_to(here)) if here.name and whole.is_relative_to(here) else short_path(str(whole))


def short_path(text: str, kept: int = KEPT) -> str:
    """`…/tinystories/stories.txt` of an absolute path; anything else as it is."""
    parts = PurePath(text).parts
    return "/".join(["…", *parts[-kept:]]) if text.startswith("/") and len(parts) > kept + 1 else text


def without_paths(text: str, kept: int = KEPT) -> str:
    """A sentence in which each absolute path is short."""
    return _IN_A_TEXT.sub(lambda path: short_path(path[0], kept), text)
