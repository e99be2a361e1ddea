"""What the documentation site adds to the pages in docs/: the reference of the settings, the notebooks, links into the repository.

Hooks of MkDocs, named in mkdocs.yml. Everything here is made anew at each build from the code it describes.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # MkDocs may be an environment's in which the package is not installed
    sys.path.insert(0, str(ROOT))

from mini_distill import config as settings  # noqa: E402
from mini_distill.cli import config_dir, load_config  # noqa: E402

VERBS = {
    "train": ("train", settings.Config, "python -m mini_distill.train"),
    "cache": ("cache", settings.CacheCommand, "python -m mini_distill.cache"),
    "evaluate": ("evaluate", settings.EvaluateCommand, "python -m mini_distill.evaluate"),
    "generate": ("generate", settings.GenerateCommand, "python -m mini_distill.generate"),
    "plan": ("plan", settings.PlanCommand, "python -m mini_distill.plan"),
}
WITHIN = {
    "objective.terms.<name>": settings.TermConfig,
    "evaluation.pairs.<name>": settings.PairsConfig,
    "evaluation.choices.<name>": settings.ChoicesConfig,
}
"""Mappings of names to settings of one kind."""

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


# ------------------------------------------------------------------------------------------------------------------- MkDocs calls


def on_config(config: Any) -> Any:
    """Leave out of the navigation what has not been written."""
    generated = {"configuration.md", *(f"notebooks/{script.stem}.md" for script in notebooks())}
    there = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")} | generated
    config["nav"] = list(_present(config["nav"], there))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from code."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    for script in notebooks():
        files.append(File.generated(config, f"notebooks/{script.stem}.md", content=notebook_page(script)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that lead out of docs/, to source files, lead into the repository, or are plain text where none is known."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path = posixpath.normpath(posixpath.join(folder, target))
        if "://" in target or target.startswith("mailto:") or not path.startswith(".."):
            return link[0]
        if path.startswith("../docs/"):
            return f"[{text}]({posixpath.relpath(path.removeprefix('../docs/'), folder or '.')}{link[3] or ''})"
        return f"[{text}]({config['repo_url'].rstrip('/')}/blob/HEAD/{path.removeprefix('../')})" if config["repo_url"] else text

    return LINK.sub(inside, markdown)


def _present(nav: list[Any], there: set[str]) -> Iterator[Any]:
    for entry in nav:
        [(title, target)] = entry.items()
        if isinstance(target, list):
            if inner := list(_present(target, there)):
                yield {title: inner}
        elif target in there:
            yield entry


# ------------------------------------------------------------------------------------------------------------------ the reference


def configuration_page() -> str:
    """Every setting of every verb: key, default, what it may be, what it means."""
    parts = [
        "# Configuration\n\nMade from `mini_distill/config.py` and `configs/`. A setting is given as `key=value`, a preset as `group=name`; "
        "defaults are those of the command without any. What is wrong is named before a weight is loaded."
    ]
    described: set[str] = set()
    for name, (config_name, schema, command) in VERBS.items():
        parts.append(f"## {name}\n\n`{command}`. {_first_sentence(schema)}")
        for group, text in _groups(schema, _defaults(config_name, schema)):
            if text not in described:  # the teacher's settings are the same for every verb
                described.add(text)
                parts.append(text)
            else:
                parts.append(f"### {group}\n\nAs above.")
    parts.append("## Settings by name")
    parts += [f"### {_cell(where)}\n\n{_first_sentence(schema)}\n\n{_table(schema(), where)}" for where, schema in WITHIN.items()]
    return "\n\n".join(parts) + "\n"


def _defaults(config_name: str, schema: type) -> Any:
    """What the plain command gets; what it has to be given is left as the contract has it."""
    needed = {"cache": ["cache.dir=…"], "evaluate": ["model=…"]}
    try:
        composed = load_config(needed.get(config_name, []), config_name, schema)
    except Exception:  # a verb that refuses to go without more
        composed = schema()
    for name in ("output_dir", "model"):
        if hasattr(composed, name):
            setattr(composed, name, None)
    if config_name == "cache":
        composed.cache.dir = None
    return composed


def _groups(schema: type, config: Any) -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(schema):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            text = f"### {f.name}\n\n{_first_sentence(type(value))}\n\n{_presets(f.name)}{_table(value, f.name)}"
            yield f.name, text
    plain = [f for f in dataclasses.fields(schema) if not dataclasses.is_dataclass(getattr(config, f.name))]
    if plain:
        yield "top level", "### top level\n\n" + _rows(config, plain, "")


def _table(value: Any, group: str) -> str:
    return _rows(value, list(dataclasses.fields(value)), f"{group}.")


def _rows(config: Any, fields: list[Any], prefix: str) -> str:
    rows = [
        f"| `{prefix}{f.name}` | {_default(getattr(config, f.name))} | {_cell(_allowed(f))} | {_cell(f.metadata.get('help', ''))} |"
        for f in fields
    ]
    return "\n".join(["| setting | default | may be | meaning |", "|:--|:--|:--|:--|", *rows])


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"`{value}`"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(f: Any) -> str:
    limits, words = f.metadata, []
    if "choices" in limits:
        words += [f"`{choice}`" for choice in limits["choices"]]
    if limits.get("importable"):
        words.append("an import path")
    bounds = [
        f"{word} {limits[name]}" for name, word in (("at_least", "≥"), ("above", ">"), ("at_most", "≤"), ("below", "<")) if name in limits
    ]
    kinds = {"int": "whole number", "float": "number", "str": "text", "bool": "true, false", "list[str]": "list of texts"}
    kind = next((kinds[part] for part in str(f.type).replace(" ", "").split("|") if part in kinds), "mapping")
    if not words:
        words = [" ".join([kind, *bounds])]
    return ", ".join(words) + (", null" if "None" in str(f.type) else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _presets(group: str) -> str:
    """Each YAML file of the group with what its first line says."""
    files = sorted((config_dir() / group).glob("*.yaml"))
    if len(files) < 2:
        return ""
    lines = [f"- `{group}={file.stem}`: {_cell(file.read_text(encoding='utf-8').splitlines()[0].lstrip('# '))}" for file in files]
    return "\n".join(['??? note "Presets"', *(f"    {line}" for line in lines), "", ""])


def _first_sentence(schema: type) -> str:
    return (schema.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


# ------------------------------------------------------------------------------------------------------------------ the notebooks


def notebooks() -> list[Path]:
    """The notebooks as scripts."""
    return sorted((ROOT / "notebooks").glob("*.py"))


def cells(script: Path) -> list[str]:
    """A notebook's cells, each from the rest of its `# %%` line on."""
    return re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


def notebook_page(script: Path) -> str:
    """A notebook as a page: its prose, its code, and what its cells showed, as scripts/make_notebooks.py kept it."""
    parts = []
    for number, cell in enumerate(cells(script)):
        mark, _, body = cell.partition("\n")
        if "[markdown]" in mark:
            prose = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
            parts.append(prose.replace("](../docs/", "](../"))
        elif body.strip():
            parts.append(f"```python\n{body.strip().removesuffix(';')}\n```")
            parts += _shown(f"{script.stem}_{number}")
    return "\n\n".join([*parts, f"*As a file: [notebooks/{script.name}](../../notebooks/{script.name})*"]) + "\n"


def _shown(name: str) -> list[str]:
    """The figure, table or text that a cell showed."""
    folder = ROOT / "docs" / "images" / "notebooks"
    if (folder / f"{name}.png").exists():
        return [f"![](../images/notebooks/{name}.png)"]
    if (folder / f"{name}.html").exists():
        table = (folder / f"{name}.html").read_text(encoding="utf-8").strip()
        return [table if table.startswith("|") else f'<div class="output">{table}</div>']  # Markdown, or what pandas writes
    if (folder / f"{name}.txt").exists():
        return [f"```text\n{(folder / f'{name}.txt').read_text(encoding='utf-8').rstrip()}\n```"]
    return []
