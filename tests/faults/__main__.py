"""Run the fault suite and say in numbers what was tried and what came of it.

python -m tests.faults --report runs/faults.json [--quick]
python -m tests.faults numbers security                       only test_numbers.py and test_security.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

VARIABLE = "MINI_DISTILL_FAULT_REPORT"  # as in record.py
TESTS = Path(__file__).parent.parent
BESIDE = [
    *("test_resume.py", "test_storage.py", "test_folder_lock.py", "test_distributed.py", "test_cache.py", "data/test_read_ahead.py"),
    *("teachers/test_cached.py", "training/test_checkpoint.py", "training/test_run_folder.py", "training/test_signals.py"),
    "training/test_tracking.py",
]
"""Tests of single modules that are about faults too: they stand where their module's tests stand, and belong to the report."""


def main() -> None:
    """Exit code 1 if a test failed, or none of a family's faults fired; whether each had to, its test says."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="only these files of tests/faults: numbers is test_numbers.py")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="only what the default test run has")
    arguments = parser.parse_args()
    files = [TESTS / "faults" / f"test_{name}.py" for name in arguments.names]
    if unknown := [file.name for file in files if not file.is_file()]:
        parser.error(f"no {', '.join(unknown)} in {TESTS / 'faults'}")
    report = measure(arguments.quick, files or [TESTS / "faults", *(TESTS / name for name in BESIDE)])
    print(table(report))
    if arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(json.dumps(report, indent=2) + "\n")
    fired = all(family["fired"] > 0 for family in report["families"].values())
    sys.exit(0 if fired and report["families"] and report["passed"] and not report["failed"] else 1)


def measure(quick: bool, files: Sequence[Path]) -> dict[str, Any]:
    """Run the tests; their counts by family, and where and how long they ran."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, results = Path(folder) / "lines.jsonl", Path(folder) / "results.xml"
        chosen = "not gpu and not network" + (" and not slow" if quick else "")
        command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, f"--junitxml={results}", *map(str, files)]
        subprocess.run(command, env={**os.environ, VARIABLE: str(lines)}, cwd=TESTS.parent)
        recorded = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        counts = outcomes(results) if results.exists() else {"passed": 0, "failed": 1, "skipped": 0}
    return {
        "quick": quick,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "mini_distill": importlib.metadata.version("mini_distill"),
        "seconds": round(time.monotonic() - started),
        **counts,
        "families": by_family(recorded),
    }


def outcomes(results: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    suites = [suite.attrib for suite in ElementTree.parse(results).iter("testsuite")]
    total, skipped = (sum(int(suite[name]) for suite in suites) for name in ("tests", "skipped"))
    failed = sum(int(suite["failures"]) + int(suite["errors"]) for suite in suites)
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def by_family(recorded: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The recorder's lines, summed."""
    families: dict[str, Counter[str]] = {}
    for line in recorded:
        counts = {key: value for key, value in line.items() if key != "family"}
        sums = families.setdefault(line["family"], Counter())
        for key, value in counts.items():
            sums[key] += value
    return {name: dict(families[name]) for name in sorted(families)}


def table(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    rows = ["| faults | injected | fired | what came of them |", "|---|---:|---:|---|"]
    for name, counts in report["families"].items():
        came = ", ".join(f"{value} {key}" for key, value in counts.items() if key not in ("injected", "fired"))
        rows.append(f"| {name} | {counts['injected']:,} | {counts['fired']:,} | {came} |")
    total = [sum(counts[key] for counts in report["families"].values()) for key in ("injected", "fired")]
    rows.append(f"| **all** | {total[0]:,} | {total[1]:,} | |")
    tests = f"{report['passed']} tests passed, {report['failed']} failed, {report['skipped']} skipped"
    where = f"{report['seconds']} s, Python {report['python']}, torch {report['torch']}, mini_distill {report['mini_distill']}"
    return "\n".join([*rows, "", f"{tests} in {where}."])


if __name__ == "__main__":
    main()
