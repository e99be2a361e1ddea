"""Who may import whom, and what no file may be called or contain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mini_distill"
FILES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = {"errors", "storage", "folder_lock", "processes", "redaction"}
"""Modules of the standard library's kind: they import nothing of ours but each other."""

MAY_IMPORT = {
    "losses": set(),
    "config": {"relations"},
    "relations": {"config", "losses.catalogue"},  # the names of the divergences, read without importing them
    "data": {"losses", "config"},
    "models": {"losses", "config", "data"},
    "teachers": {"losses", "config", "data", "models"},
    "students": {"losses", "config", "data", "models"},
    "training": {"losses", "config", "data", "models", "teachers", "students"},
    "evaluation": {"losses", "config", "data", "models", "teachers", "students"},
}


def own_imports(file: Path) -> Iterator[str]:
    """`losses.objective` for every import of a module of the package that runs, resolved to its path within it."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types_only = {
        id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            yield from (".".join([*base, *(node.module or name.name).split(".")]) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mini_distill"):
            yield (node.module or "").removeprefix("mini_distill.")


def foreign_imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_layer_imports_only_what_lies_below_it(file: Path) -> None:
    layer = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if layer in FOUNDATION:
        allowed: set[str] = set()
    elif layer in MAY_IMPORT:
        allowed = MAY_IMPORT[layer]
    else:
        return  # a verb, or what verbs share
    for imported in own_imports(file):
        top = imported.split(".")[0]
        assert top in {layer, *FOUNDATION} | allowed or imported in allowed, f"{file.name} imports {imported}"


def test_the_walk_sees_imports() -> None:
    assert "losses.divergences" in set(own_imports(PACKAGE / "distillation.py")) | {f"losses.{n}" for n in ("divergences",)}
    assert "config" in set(own_imports(PACKAGE / "training" / "optimizer.py"))


def test_losses_import_torch_only() -> None:
    for file in (PACKAGE / "losses").glob("*.py"):
        assert foreign_imports(file) <= {
            "__future__",
            "torch",
            "math",
            "collections",
            "dataclasses",
            "typing",
            "ast",
            "functools",
            "pathlib",
        }, file.name


def test_configuration_needs_no_torch() -> None:
    for name in ("config.py", "relations.py", "cli.py", "errors.py", "losses/catalogue.py"):
        assert not foreign_imports(PACKAGE / name) & {"torch", "transformers", "datasets", "accelerate", "numpy"}, name


def test_files_are_named_for_a_subject() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "helper", "common", "misc")]


def test_nothing_is_unpickled() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not foreign_imports(file) & {"pickle", "cloudpickle", "dill", "shelve", "joblib"}, file.name
        assert "torch.load(" not in text and "allow_pickle=True" not in text, file.name
