"""What a user's own code is, by its fingerprint: the same in every process, another after every change."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mini_distill.imported_code import code_fingerprint, code_fingerprints

CELL = """
from functools import partial

def helper(x): return x

def function(x, factor=2.0):
    "What it does."
    names = {"a", "b", "c", "d"}
    return [helper(y) * factor for y in x if y not in {"e", "f", "g"}]

class Source:
    size = 3
    def __init__(self, config): self.config = config
    @property
    def rows(self): return range(self.size)
    @staticmethod
    def other(x): return x + 1

given = partial(function, factor=3.0)
"""


def fingerprint_of(name: str, cell: str, patch: pytest.MonkeyPatch) -> str:
    module = ModuleType("__main__")
    exec(cell, module.__dict__)
    patch.setitem(sys.modules, "__main__", module)
    return code_fingerprint(f"__main__.{name}")


@pytest.mark.parametrize("name", ["function", "Source", "given"])
def test_a_cell_that_is_run_again_elsewhere_in_a_notebook_is_the_same_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint_of(name, CELL, monkeypatch)
    assert fingerprint_of(name, "\n\nx = 1\n" + CELL.replace("    return", "    # why\n    return"), monkeypatch) == first


@pytest.mark.parametrize("name", ["function", "Source"])
def test_the_fingerprint_of_a_cell_is_the_same_in_every_process(name: str) -> None:
    """The order of a set of texts differs from process to process."""
    code = f"{CELL}\nfrom mini_distill.imported_code import code_fingerprint\nprint(code_fingerprint('__main__.{name}'))"
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(found) == 1 and len(found.pop()) == 65


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("function", "factor=2.0", "factor=2.5"),
        ("function", "* factor", "+ factor"),
        ("function", '"b"', '"bb"'),
        ("function", '"e", "f"', '"e", "h"'),
        ("function", "helper(y)", "other(y)"),
        ("Source", "size = 3", "size = 4"),
        ("Source", "range(self.size)", "range(2)"),
        ("Source", "x + 1", "x + 2"),
        ("given", "factor=3.0", "factor=4.0"),
        ("given", "* factor", "+ factor"),
    ],
)
def test_every_change_of_a_cell_shows(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert old in CELL
    assert fingerprint_of(name, CELL.replace(old, new), monkeypatch) != fingerprint_of(name, CELL, monkeypatch)


def test_of_a_module_its_whole_source_counts_also_where_a_package_hands_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`my_package.mine` is what `my_package/__init__.py` imports from the file in which it is written."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import mine\n")
    found = set()
    for factor in (1, 2):
        (package / "inner.py").write_text(f"def helper(x): return {factor} * x\n\ndef mine(x): return helper(x)\n")
        for name in ("my_package", "my_package.inner"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        found.add(code_fingerprint("my_package.mine"))
    assert len(found) == 2


def test_what_is_ours_or_has_no_source_is_no_trouble() -> None:
    assert code_fingerprints(["forward_kl", "jsd"]) == {}
    assert code_fingerprint("math.sqrt") == code_fingerprint("math.sqrt") != code_fingerprint("time.time")
