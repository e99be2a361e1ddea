"""What the documentation tells its readers to type, taken apart as their shell would; and what of it no test can run, with the reason."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHOWN = re.compile(r"^\$ (.+\n(?:    .+\n)*)", re.MULTILINE)
PROGRAMS = (
    *("python", "python3", "torchrun", "mkdocs", "pytest", "ruff", "mypy", "hf", "vllm", ".ci/run"),
    *(f".venv/bin/{name}" for name in ("python", "pip", "jupyter", "mkdocs")),
    *(f"peers/bin/{name}" for name in ("python", "pip")),  # beside the home of who measures: what is measured against
)
"""What a page may call; anything else is a command nobody checks, and the shell will not find it."""

NOT_RUN = {
    r"-m venv |pip install ": "an environment and its packages: .ci/run makes one with the README's own lines",
    r"jupyter lab|mkdocs serve": "stays until somebody closes it",
    r"(^|/)(ruff|mypy|mkdocs) ?|^\.ci/run": "run by .ci/run; the site is built by a test of its own, too",
    r"(^| )pytest\b|-m tests\.faults": "runs tests: these",
    r"^(hf|vllm) ": "a program of others, which is not here",
    r"--device cuda": "needs a GPU",
    r"make_embedded_teacher\.py": "trains for hours",
    r"make_notebooks\.py": "writes into the checkout: what it makes is compared, and the notebooks are run, by test_notebooks.py",
}
"""Commands that are looked at, and never run: a pattern for them, and why.

All others are run, in small: models of a hub are the reader's own little ones, a server is the double of tests/teachers, and what SLURM
is asked for is in tests/test_sweeps.py.
"""


def why_not(command: list[str]) -> str | None:
    """Why a command is not run; None: it is."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, " ".join(command))), None)


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
    """The fenced blocks of all pages in some languages, or all of them."""
    found = [block for page in PAGES for block in _of(page)]
    return [block for block in found if not languages or block.language in languages]


def _of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


def commands(page: Path, folder: Path) -> list[list[str]]:
    """The commands of a page as a shell splits and expands them, in order; loops and variables included.

    They stand in bash blocks, behind a `$` in blocks of text, and within sentences, where they are a program with arguments.

    Nothing is run: each command is a stub that writes its arguments down. Variables live from one block to the next, as they do for
    who follows the page. `<a placeholder>` is one word, and `…` is left out.

    Raises:
        AssertionError: the shell refuses a block, or does not find a command.
    """
    return _split("\n".join(_scripts(page.read_text(encoding="utf-8"))), page.name, folder)


def mentions(page: Path, folder: Path) -> list[list[str]]:
    """Programs of ours that sentences name without arguments."""
    spans = [span for span in _spans(FENCE.sub("", page.read_text(encoding="utf-8"))) if _is_mention(span)]
    return _split("\n".join(re.sub(r"^scripts/", "python scripts/", span) for span in spans), page.name, folder)


def _scripts(text: str) -> Iterator[str]:
    """Parts of a shell script, in the order of the page."""
    end = 0
    for match in FENCE.finditer(text):
        yield from (span for span in _spans(text[end : match.start()]) if not _is_mention(span))
        if match[1] == "bash":
            yield match[2]
        elif match[1] == "text":
            yield from (" ".join(shown.split()).replace(",…,", ",") for shown in SHOWN.findall(match[2]))
        end = match.end()
    yield from (span for span in _spans(text[end:]) if not _is_mention(span))


def _spans(prose: str) -> Iterator[str]:
    """What sentences say is typed: it begins with a program, or with a script of ours."""
    for span in SPAN.findall(prose):
        program, _, rest = span.removeprefix("time ").partition(" ")
        if (program in PROGRAMS and rest) or (program.startswith("scripts/") and program.endswith(".py")):
            yield span.removeprefix("time ")


def _is_mention(span: str) -> bool:
    """`python -m mini_distill.plan`, `python -m mini_distill.cache verify …`, `scripts/plot_benchmark.py`: what it is called, and no more."""
    return bool(re.fullmatch(r"\S*python -m [\w.]+( \w+)?( …)?|scripts/.*", span))


def _split(script: str, name: str, folder: Path) -> list[list[str]]:
    log = folder / "commands"
    log.unlink(missing_ok=True)
    for program in PROGRAMS:
        stub = folder / program if "/" in program else folder / "bin" / program
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f'#!/bin/bash\nprintf "%s\\0" {program} "$@" $\'\\n\' >> {log}\n')
        stub.chmod(0o755)
    shell = subprocess.run(
        ["/bin/bash", "-c", "set -eu\n" + _plain(script)],
        cwd=folder,
        env={"PATH": str(folder / "bin"), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert shell.returncode == 0, f"{name}: {shell.stderr}"
    calls = log.read_text(encoding="utf-8").split("\n\0") if log.exists() else []
    return [call.removesuffix("\0").split("\0") for call in calls if call]


def _plain(text: str) -> str:
    text = re.sub(r"<[^<>\n|]+>|(?<=/)…", "PLACEHOLDER", text)
    return re.sub(r"(?<=[ \w])…(?=\s|$)", "", text, flags=re.MULTILINE)
