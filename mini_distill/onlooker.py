"""Whether somebody looks on: a terminal or a notebook gets live bars, a log file does not."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

CELL_COLUMNS = 100  # a cell has no width to ask for


def in_notebook() -> bool:
    """Whether what is written to stderr appears under a cell."""
    kernel = sys.modules.get("ipykernel.iostream")  # not imported for this: elsewhere it is not there
    return kernel is not None and isinstance(sys.stderr, kernel.OutStream)


def is_watched() -> bool:
    """Whether a bar can be drawn, and somebody may see it."""
    return in_notebook() or sys.stderr.isatty()


def bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **look: Any) -> tqdm[Any]:
    """A progress bar, drawn if `show` and somebody looks on.

    Args:
        iterable: What is counted; None: the caller does.
        show: False, for instance, in all processes but the first.
        look: As `tqdm` takes it.
    """
    if in_notebook():
        return CellBar(iterable, disable=not show, **look)
    return tqdm(iterable, disable=not (show and is_watched()), dynamic_ncols=True, **look)


class CellBar(tqdm):
    """A bar below a notebook's cell: one line, replaced in place.

    A cell is no terminal: the cursor cannot go up in it, so that each bar within another would leave lines behind, and its stderr
    is red. Here the inner bar takes the outer one's line, until that one moves on.
    """

    _line: Any = None  # the display of the outermost bar

    def __init__(self, iterable: Iterable[Any] | None, **look: Any) -> None:
        self._has_line = False
        super().__init__(iterable, ncols=CELL_COLUMNS, mininterval=0.5, ascii=False, file=io.StringIO(), **look)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar, or `msg` in its place."""
        from IPython.display import display

        text, is_inner = str(self) if msg is None else msg, bool(self.pos)
        if is_inner and not text:
            return True  # it has ended, and the outer one's line is left to it
        if is_inner or self._has_line:
            CellBar._line.update({"text/plain": text}, raw=True)
        else:
            CellBar._line = display({"text/plain": text}, raw=True, display_id=True)
        self._has_line = True
        return True
