"""Measured folders made up for tests of the report: what a run leaves behind, without running."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import yaml

from mini_distill.cli import config_dir, load_config
from mini_distill.config import Config
from mini_distill.overrides import GROUPS

HOSTILE = "<script>alert(1)</script><img src=\"http://evil.example/x\" onerror='x'>&amp;\x1b[31m\u202e\u2066\x00{{ 7 * 7 }}{% raw %}"
"""Markup, control characters, marks that turn the reading direction, a template's own syntax."""


@functools.cache
def settings(*overrides: str) -> Config:
    """The configuration of a command line."""
    return load_config(list(overrides))


def changed(*overrides: str) -> dict[str, Any]:
    """The same as plain values, without composing them anew, which takes long."""
    config = dataclasses.asdict(settings())
    for override in overrides:
        key, _, text = override.partition("=")
        group, _, name = key.rpartition(".")
        if key in GROUPS:
            preset = yaml.safe_load((config_dir() / key / f"{text}.yaml").read_text(encoding="utf-8"))
            config[key] = dataclasses.asdict(Config())[key] | (preset or {})
        else:
            place, value = config[group] if group else config, yaml.safe_load(text)
            place[name] = float(value) if isinstance(place[name], float) else value
    return config


def write_run(folder: Path, *overrides: str, nll: float = 3.5, steps: int = 8, **changes: Any) -> Path:
    """A finished run with every file. `changes` replaces whole files: `summary={…}`, `status={…}`, `details={…}`; None leaves one out."""
    folder.mkdir(parents=True)
    config = changed(*overrides) | {"output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    files = {"status": status(steps), "summary": summary(nll, steps), "details": details()} | changes
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(nll, steps)), encoding="utf-8")
    return folder


def status(steps: int, state: str = "finished", **more: Any) -> dict[str, Any]:
    """status.json."""
    return {"state": state, "step": steps, "exit_code": 0, "updated": "2026-01-02T03:04:05+00:00", "pid": 1, **more}


def rows(nll: float, steps: int) -> list[dict[str, Any]]:
    """metrics.jsonl: a loss at every step, held-out figures at every other."""
    made: list[dict[str, Any]] = [{"step": 0, **evaluated(nll + 1)}]
    for step in range(1, steps + 1):
        logged = nll + (steps - step) / steps
        made.append({"step": step, "train/loss": logged, "train/learning_rate": 1e-3, "perf/tokens_per_second": 900.0})
        if step % 2 == 0:
            made.append({"step": step, **evaluated(logged)})
    return made


def evaluated(nll: float) -> dict[str, float]:
    """What an evaluation logs of the student."""
    return {
        "eval/student_nll": nll,
        "eval/student_perplexity": math.exp(nll),
        "eval/forward_kl": nll - 2.5,
        "eval/top1_agreement": 1 - nll / 6,
        "eval/student_ece": 0.021,
    }


def summary(nll: float, steps: int) -> dict[str, Any]:
    """summary.json, with a figure of every family."""
    measured = {"eval/teacher_nll": 2.5, "eval/teacher_perplexity": math.exp(2.5), "eval/teacher_ece": 0.015, "eval/tokens": 40960.0}
    before = {key.replace("eval/", "before/"): value for key, value in evaluated(nll + 1).items()}
    control = {"control/student_nll": nll + 0.4, "control/student_perplexity": math.exp(nll + 0.4), "control/kl_reduction": 0.25}
    models: dict[str, Any] = {}
    for model, factor in (("teacher", 3), ("student", 1)):
        models |= {
            f"model/{model}_parameters": 1_570_000 * factor,
            f"model/{model}_file_bytes": 6_280_000 * factor,
            f"model/{model}_flops_per_token": 3.1e6 * factor,
            f"perf/{model}_tokens_per_second": 12000.0 / factor,
            f"perf/{model}_time_to_first_token": 0.0123 * factor,
            f"perf/{model}_generation_tokens_per_second": 150.0 / factor,
            f"perf/{model}_generation_tokens_per_second_batch8": 700.0 / factor,
            f"perf/{model}_peak_memory_bytes": 52_000_000 * factor,
            f"cost/{model}_per_million_tokens": 0.42 * factor,
            f"energy/{model}_joules_per_million_tokens_estimate": 91_000.0 * factor,
            f"text/{model}_repetition": 0.12,
            f"text/{model}_distinct_2": 0.61,
            f"text/{model}_tokens": 31.5,
            f"task/blimp/{model}": 0.7 + 0.05 * factor,
            f"task/blimp/agreement/{model}": 0.6 + 0.1 * factor,
        }
    gap = {"control/gap_closed": 0.4 / (nll + 0.4 - 2.5)}
    return {**evaluated(nll), **measured, **before, **control, **gap, **models, "train/steps": steps, "data/train_rows": 310}


def details(text: str = " def") -> dict[str, Any]:
    """details.json; `text` stands wherever text of models or data does."""
    bins = [{"low": i / 5, "high": (i + 1) / 5, "tokens": 10 * i, "confidence": i / 5 + 0.1, "accuracy": i / 5 + 0.08} for i in range(5)]
    parts = [
        {"label": label, "tokens": 512, "student_nll": 3.4 - i, "teacher_nll": 2.1 - i, "forward_kl": 0.7 + i, "top1_agreement": 0.5}
        for i, label in enumerate(("below 0.1", "0.1–0.5", "0.5 and more"))
    ]
    column = [part | {"label": f"{text} {i}"} for i, part in enumerate(parts)]
    token = {"text": text, "forward_kl": 1.25, "student_nll": 2.3, "teacher_nll": 0.4, "student_top": text, "teacher_top": text}
    tokens = [{"text": text}, token, token | {"text": "\n", "forward_kl": 6.5}]
    return {
        "reliability": {"student": bins, "teacher": bins},
        "slices": {"position": parts, "teacher_entropy": parts, f"language {text}": column},
        "differences": [{"row": f"a.py {text}", "forward_kl": 3.875, "tokens": tokens}],
        "tasks": {
            "blimp": {"kind": "accuracy", "items": 100, "chance": 0.5, "groups": [{"label": "agreement", "items": 40, "student": 0.7}]}
        },
        "device": f"an abacus{text}",
        "samples": [{"prompt": f"import {text}", "continuations": {"teacher": f"os {text}", "student": f"re {text}"}}],
    }
