"""Who gets live bars."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import pytest

from mini_distill.onlooker import is_watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminals_and_notebooks_are_watched_and_log_files_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not is_watched()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_watched()
    kernel = ModuleType("ipykernel.iostream")
    kernel.OutStream = type("OutStream", (io.StringIO,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", kernel)
    monkeypatch.setattr(sys, "stderr", kernel.OutStream())
    assert is_watched()
