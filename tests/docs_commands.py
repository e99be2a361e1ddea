"""What the documentation tells its readers to type, taken apart as their shell would."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = (
    *("python", "python3", "torchrun", "mkdocs"),
    *(f".venv/bin/{name}" for name in ("python", "pip", "jupyter", "mkdocs")),
    *(f"peers/bin/{name}" for name in ("python", "pip")),  # beside the home of who measures: what is measured against
)
"""What a page may call; anything else is a command nobody checks, and the shell will not find it."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its line there, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of README and docs in some languages, or all of them."""
    found = [block for page in PAGES for block in _of(page)]
    return [block for block in found if not languages or block.language in languages]


def _of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


def commands(page: Path, folder: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, as a shell splits and expands them, in order; loops and variables included.

    Nothing is run: each command is a stub that writes its arguments down. Variables live from one block to the next, as they do for
    who follows the page. `<a placeholder>` is one word, and `…` is left out.

    Raises:
        AssertionError: the shell refuses a block, or does not find a command.
    """
    log = folder / "commands"
    for name in COMMANDS:
        stub = folder / name if "/" in name else folder / "bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" $\'\\n\' >> {log}\n')
        stub.chmod(0o755)
    script = "set -eu\n" + "\n".join(_plain(block.text) for block in _of(page) if block.language == "bash")
    shell = subprocess.run(
        ["/bin/bash", "-c", script], cwd=folder, env={"PATH": str(folder / "bin"), "HOME": str(folder)}, capture_output=True, text=True
    )
    assert shell.returncode == 0, f"{page.name}: {shell.stderr}"
    calls = log.read_text(encoding="utf-8").split("\n\0") if log.exists() else []
    return [call.removesuffix("\0").split("\0") for call in calls if call]


def _plain(text: str) -> str:
    return re.sub(r"(?<=[ \w])…(?=\s|$)", "", re.sub(r"<[^<>\n|]+>", "PLACEHOLDER", text), flags=re.MULTILINE)
