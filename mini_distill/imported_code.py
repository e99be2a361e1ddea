"""Code that the settings name by its import path: a divergence, a data source, a hook. A change of it is a change of the run."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

CELLS = "__main__"
"""The module of a notebook's cells, and of the script that was started."""


def code_fingerprints(paths: Iterable[str]) -> dict[str, str]:
    """Import path -> fingerprint of what it names; a plain name is one of ours, and has none."""
    return {path: code_fingerprint(path) for path in paths if "." in path}


def code_fingerprint(path: str) -> str:
    """SHA-256 of the code that an import path leads to.

    Of a module it is the source, so that helpers beside the object count; what the module imports from elsewhere is not looked at.
    In a notebook, whose cells are all one module, it is the object alone.

    Args:
        path: `package.module.name`, which can be imported.
    """
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    homes = sorted({module, str(getattr(found, "__module__", None) or module)})  # a package may hand on what another module defines
    return _digest("".join(_compiled(found) if home == CELLS else module_fingerprint(home) for home in homes))


def module_fingerprint(name: str) -> str:
    """SHA-256 of the source of a module that has been imported; of its file where there is no source."""
    module = sys.modules.get(name)
    if not isinstance(module, ModuleType):
        return _digest(name)
    try:
        return _digest(inspect.getsource(module))
    except (OSError, TypeError):
        file = getattr(module, "__file__", None)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file is not None and Path(file).is_file() else _digest(name)


def _compiled(found: Any) -> str:
    """What a function or class of a notebook was compiled to: instructions, names and constants, in no process others than in the next."""
    if isinstance(found, CodeType):
        return repr([found.co_code.hex(), found.co_names, found.co_varnames, *map(_compiled, found.co_consts)])
    if isinstance(found, frozenset | tuple | list):
        parts = map(_compiled, found)
        return repr(sorted(parts) if isinstance(found, frozenset) else list(parts))  # texts are hashed with a salt of the process
    if isinstance(found, dict):
        return repr([(key, _compiled(value)) for key, value in found.items()])
    if isinstance(found, staticmethod | classmethod):
        return _compiled(found.__func__)
    if isinstance(found, property):
        return _compiled(found.fget)
    if isinstance(found, partial):
        return _compiled([found.func, found.args, found.keywords])
    if (code := getattr(found, "__code__", None)) is not None:
        return repr([_compiled(code), _compiled(found.__defaults__), _compiled(found.__kwdefaults__)])
    if isinstance(found, type) and found.__module__ == CELLS:
        return repr([(name, _compiled(value)) for name, value in vars(found).items() if callable(value) or not name.startswith("__")])
    if isinstance(found, bool | int | float | complex | str | bytes | None):
        return repr(found)
    return _compiled(type(found)) if type(found).__module__ == CELLS else type(found).__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
