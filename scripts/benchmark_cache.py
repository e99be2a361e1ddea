"""What a cache costs: a training step from it against a cross-entropy step of the same student, and building it against the teacher alone.

    python scripts/benchmark_cache.py --out runs/benchmark_cache --threads 2 -- teacher=embedded data=python_stdlib data.max_rows=200

Steps are taken in turns in one process (A B C A B C …), so that all see the same noise; a ratio is the median of the rounds' ratios.
Prints a Markdown table for docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from compare_arms import _split
from transformers import PreTrainedModel

from mini_distill.cache import build
from mini_distill.cli import load_config
from mini_distill.config import CacheCommand
from mini_distill.data.loader import TrainingBatches
from mini_distill.data.prepare import prepare_data
from mini_distill.data.tokenizers import vocabulary_size
from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.objective import Objective
from mini_distill.models.head import LanguageModel
from mini_distill.students.build import build_student
from mini_distill.teachers.cached import CachedTeacher
from mini_distill.teachers.load import load_teacher, load_teacher_tokenizer
from mini_distill.teachers.online import OnlineTeacher
from mini_distill.teachers.targets import Teacher
from mini_distill.train import distill_step

KINDS = {
    "sampled, k = 16": ["cache.kind=sampled", "cache.k=16"],
    "sampled, k = 64": ["cache.kind=sampled", "cache.k=64"],
    "topk, k = 32": ["cache.kind=topk", "cache.k=32"],
    "hidden": ["cache.kind=hidden"],
    "full": ["cache.kind=full"],
}


def main() -> None:
    """Build a cache of each kind, then step from each in turns."""
    own, common = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", default="mini_2m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(own)
    torch.set_num_threads(arguments.threads)

    config = load_config([*common, f"student={arguments.student}", "output_dir=unused"])
    tokenizer = load_teacher_tokenizer(config.teacher)
    model = load_teacher(config.teacher, torch.device("cpu"))
    assert model is not None
    data = prepare_data(config.data, tokenizer)
    batches = TrainingBatches(data.train, seed=0, micro_batch_size=config.trainer.micro_batch_size, grad_accum_steps=1)

    built = {}
    for name, overrides in KINDS.items():
        folder = arguments.out / name.replace(" ", "").replace(",", "_").replace("=", "")
        command = load_config([*common, *overrides, f"cache.dir={folder}", f"num_threads={arguments.threads}"], "cache", CacheCommand)
        built[name] = build(command) | {"folder": folder}

    student = build_student(config.student, teacher=model, tokenizer=tokenizer, seq_len=config.data.seq_len, seed=0)
    teachers: dict[str, Teacher] = {"the teacher online": OnlineTeacher(model)}
    teachers |= {name: CachedTeacher(facts["folder"], {"data": data.fingerprint_parts}) for name, facts in built.items()}
    seconds = steps_in_turns(student, teachers, batches, vocabulary_size(tokenizer), arguments.rounds)
    forward = forward_tokens_per_second(OnlineTeacher(model), batches)
    print(table(seconds, built, forward))


def steps_in_turns(
    student: PreTrainedModel, teachers: dict[str, Teacher], batches: TrainingBatches, vocab_size: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round's step: batch, teacher's targets, forward, backward, update."""
    language_model = LanguageModel(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ce = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=1.0, vocab_size=vocab_size)
    kl = Objective(forward_kl, "forward_kl", kl_weight=1.0, ce_weight=0.0, vocab_size=vocab_size)
    variants: dict[str, tuple[Teacher | None, Objective]] = {"cross-entropy": (None, ce)} | {name: (t, kl) for name, t in teachers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number, (batch,) in zip(range(rounds + 2), batches.steps(), strict=False):
        for name, (teacher, objective) in variants.items():
            started = perf_counter()
            distill_step(language_model, teacher, batch, objective).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if round_number >= 2:  # the first ones warm caches up
                seconds[name].append(perf_counter() - started)
    return seconds


def forward_tokens_per_second(teacher: OnlineTeacher, batches: TrainingBatches, passes: int = 5) -> float:
    """The teacher's trunk and head on every supervised token, with nothing written down."""
    tokens, started = 0, perf_counter()
    for _, (batch,) in zip(range(passes), batches.steps(), strict=False):
        with torch.no_grad():
            tokens += len(teacher(batch).logits())
    return tokens / (perf_counter() - started)


def table(seconds: dict[str, list[float]], built: dict[str, dict[str, Any]], forward: float) -> str:
    """Markdown."""
    floor = seconds["cross-entropy"]
    lines = [
        "| targets | step / CE step | bytes per token | scored tokens/s | share of the teacher's forward speed |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, own in seconds.items():
        ratio = median(a / b for a, b in zip(own, floor, strict=True))
        facts = built.get(name)
        rest = "– | – | –"
        if facts:
            speed = facts["cache/tokens"] / facts["cache/seconds"]
            rest = f"{facts['cache/bytes_per_token']:.1f} | {speed:,.0f} | {100 * speed / forward:.0f} %"
        lines.append(f"| {name} | {ratio:.3f} | {rest} |")
    lines.append(f"\nCross-entropy step: {1000 * median(floor):.0f} ms (median). The teacher's forward alone: {forward:,.0f} tokens/s.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
