"""Who may import whom, and what no file may be called or contain."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mini_distill"
FILES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = {
    "errors",
    "storage",
    "folder_lock",
    "imported_code",
    "onlooker",
    "out_of_memory",
    "processes",
    "redaction",
    "starting",
    "written",
}
"""Modules of the standard library's kind: they import nothing of ours but each other."""

MAY_IMPORT = {
    "losses": set(),
    "config": set(),
    "contract": {"config", "relations", "losses.catalogue"},
    "targets": {"config"},
    "relations": {"config", "contract", "targets", "losses.catalogue"},  # the names of the divergences, read without importing them
    "data": {"losses", "config", "contract"},
    "models": {"losses", "config", "data"},
    "teachers": {"losses", "config", "data", "models"},
    "students": {"losses", "config", "data", "models"},
    "training": {"losses", "config", "contract", "data", "models", "teachers", "students"},
    "evaluation": {"losses", "config", "contract", "data", "models", "teachers", "students"},
}


def imports(file: Path, *, in_functions: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a file that are executed, not only seen by a type checker; without those of functions, at once."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    passed_over: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    if not in_functions:
        passed_over += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(inner) for node in passed_over for inner in ast.walk(node)}
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside)


def own_imports(file: Path) -> Iterator[str]:
    """`losses.objective` for every import of a module of the package, resolved to its path within it."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    for node in imports(file):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            yield from (".".join([*base, *(node.module or name.name).split(".")]) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("mini_distill."):
            yield (node.module or "").removeprefix("mini_distill").lstrip(".")
        elif isinstance(node, ast.Import):
            yield from (name.name.removeprefix("mini_distill.") for name in node.names if name.name.startswith("mini_distill."))


def foreign_imports(file: Path, *, in_functions: bool = True) -> set[str]:
    """The packages that a file imports and that are neither ours nor Python's."""
    names = set()
    for node in imports(file, in_functions=in_functions):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif not node.level:
            names.add((node.module or "").split(".")[0])
    return names - sys.stdlib_module_names - {"mini_distill"}


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
    """Else the tests here would prove nothing."""
    assert {"losses.objective", "losses.reduction"} <= set(own_imports(PACKAGE / "train.py"))
    assert "config" in set(own_imports(PACKAGE / "training" / "optimizer.py"))
    assert "torch" in foreign_imports(PACKAGE / "train.py")
    assert "hydra" in foreign_imports(PACKAGE / "cli.py") - foreign_imports(PACKAGE / "cli.py", in_functions=False)


@pytest.mark.parametrize("file", sorted((PACKAGE / "losses").glob("*.py")), ids=lambda file: file.name)
def test_losses_import_torch_only(file: Path) -> None:
    assert foreign_imports(file) <= {"torch"}


ANSWERING = ("__init__", "config", "contract", "overrides", "cli", "errors", "losses/__init__", "losses/catalogue")


@pytest.mark.parametrize(
    "file", [*(PACKAGE / f"{name}.py" for name in ANSWERING), *(PACKAGE / "relations").glob("*.py")], ids=lambda file: file.stem
)
def test_what_answers_help_and_configuration_errors_needs_omegaconf_only(file: Path) -> None:
    assert foreign_imports(file, in_functions=False) <= {"omegaconf"}
    assert foreign_imports(file) <= {"omegaconf", "hydra", "yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_heavy_packages_are_imported_by_the_function_that_needs_them(file: Path) -> None:
    heavy = {"datasets", "wandb", "tensorboard", "pandas", "pyarrow", "matplotlib", "vllm", "torchao", "lm_eval"}
    assert not foreign_imports(file, in_functions=False) & heavy


def test_files_are_named_for_a_subject() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "helper", "common", "misc")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_nothing_is_unpickled(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = {name.name for node in imports(file) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module or "" for node in imports(file) if isinstance(node, ast.ImportFrom)}
    assert not modules & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert ast.unparse(call.func) != "torch.save"
        assert ast.unparse(call.func) != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("allow_pickle", "False") == "False"
