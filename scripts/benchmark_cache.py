"""What a cache costs: a training step from it against a cross-entropy step of the same student, building it against the teacher alone, and
reading it against a plain memory map.

    python scripts/benchmark_cache.py --out runs/benchmark_cache --threads 2 -- teacher=embedded data=python_stdlib data.max_rows=200

Steps and reads are taken in turns in one process (A B C A B C …), so that all see the same noise; a ratio is the median of the rounds' ratios.
Prints a Markdown table for docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from compare_arms import _split
from transformers import PreTrainedModel

from mini_distill.cache import build
from mini_distill.cli import load_config
from mini_distill.config import CacheCommand
from mini_distill.data.batch import Batch
from mini_distill.data.loader import TrainingBatches
from mini_distill.data.order import Stream
from mini_distill.data.prepare import prepare_data
from mini_distill.data.tokenizers import vocabulary_size
from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.objective import Objective
from mini_distill.losses.reduction import loss_mask
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
    "topk, k = 64": ["cache.kind=topk", "cache.k=64"],
    "hidden": ["cache.kind=hidden"],
    "full": ["cache.kind=full"],
}
STEPS_OF_A_NAT = 255 / 20  # log-probabilities from -20 to 0 in a byte
PLAIN = "a memory map, k = 64"


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

    built, online = {}, OnlineTeacher(model)
    speeds = [forward_tokens_per_second(online, batches)]  # before and after each build, so that both see the same machine
    for name, overrides in KINDS.items():
        folder = arguments.out / name.replace(" ", "").replace(",", "_").replace("=", "")
        command = load_config([*common, *overrides, f"cache.dir={folder}", f"num_threads={arguments.threads}"], "cache", CacheCommand)
        facts = build(command)
        speeds.append(forward_tokens_per_second(online, batches))
        scored = facts["cache/tokens"] / facts["cache/seconds"]
        built[name] = facts | {"folder": folder, "scored": scored, "share": scored / mean(speeds[-2:])}

    student = build_student(config.student, teacher=model, tokenizer=tokenizer, seq_len=config.data.seq_len, seed=0)
    openings = {name: partial(CachedTeacher, facts["folder"], {"data": data.fingerprint_parts}) for name, facts in built.items()}
    opened: dict[str, Teacher] = {"the teacher online": online} | {name: opening() for name, opening in openings.items()}
    seconds = steps_in_turns(student, opened, batches, vocabulary_size(tokenizer), arguments.rounds)
    opened.clear()  # what is mapped cannot be read from disk below
    print(table(seconds, built, median(speeds)))

    folders = {PLAIN: arguments.out / "memory_map"} | {name: facts["folder"] for name, facts in built.items()}
    sizes = {PLAIN: write_memory_map(folders[PLAIN], openings["topk, k = 64"](), data.train)}
    sizes |= {name: facts["cache/bytes_per_token"] for name, facts in built.items()}
    reads = reads_in_turns({PLAIN: partial(MemoryMap, folders[PLAIN]), **openings}, folders, batches)
    print("\n" + table_of_reads(reads, sizes))


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


def write_memory_map(folder: Path, lists: CachedTeacher, sequences: Stream) -> float:
    """What a `MemoryMap` reads, of all lists of a cache; its bytes per token."""
    parts: list[Any] = [lists(sequences.batch([number])) for number in range(len(sequences))]
    ids = torch.cat([part.all_rows.ids for part in parts]).numpy().astype(np.uint16)
    levels = torch.cat([part.all_rows.log_probs for part in parts]).mul(-STEPS_OF_A_NAT).round().clamp(0, 255).numpy().astype(np.uint8)
    starts = np.cumsum([0, *(len(part.all_rows) for part in parts)])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "levels.npy", levels)
    np.save(folder / "starts.npy", starts)
    return (ids.nbytes + levels.nbytes) / len(ids)


class MemoryMap:
    """The plainest way to keep lists of a fixed length: token numbers in two bytes and levels in one, mapped, and nothing checked."""

    def __init__(self, folder: Path) -> None:
        self.ids, self.levels = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("ids", "levels"))
        self.starts = np.load(folder / "starts.npy").tolist()

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers in int64 and log-probabilities in float32, as a loss wants them."""
        rows = [slice(self.starts[number], self.starts[number + 1]) for number in batch.row_ids.tolist()]
        ids = np.concatenate([self.ids[own] for own in rows]).astype(np.int64)
        log_probs = np.concatenate([self.levels[own] for own in rows]).astype(np.float32)
        log_probs *= -1 / STEPS_OF_A_NAT
        return torch.from_numpy(ids), torch.from_numpy(log_probs)


def reads_in_turns(
    openings: dict[str, Callable[[], Any]], folders: dict[str, Path], batches: TrainingBatches, rounds: int = 5, most: int = 100
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each round, in which everybody reads the same shuffled sequences: from disk, and again, from memory."""
    speeds: dict[str, dict[str, list[float]]] = {name: {"disk": [], "memory": []} for name in openings}
    of_an_epoch = max(1, min(most, len(batches.sequences) // batches.micro_batch_size))
    endless = batches.steps()
    for _ in range(rounds):
        of_round = [batch for (batch,) in islice(endless, of_an_epoch)]
        tokens = sum(int(loss_mask(batch.labels).sum()) for batch in of_round)
        for name, opening in openings.items():
            read = opening()
            gc.collect()  # of those that read before, whose files the kernel would keep as long as they are mapped
            drop_from_memory(folders[name])
            for where in speeds[name]:
                started = perf_counter()
                for batch in of_round:
                    read(batch)
                speeds[name][where].append(tokens / (perf_counter() - started))
    return speeds


def drop_from_memory(folder: Path) -> None:
    """What the kernel holds of the files of a folder that nobody has mapped; the next reading is from disk."""
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as opened:
            os.fsync(opened)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def forward_tokens_per_second(teacher: OnlineTeacher, batches: TrainingBatches, passes: int = 10) -> float:
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
            rest = f"{facts['cache/bytes_per_token']:.1f} | {facts['scored']:,.0f} | {facts['share']:.0%}".replace("%", " %")
        lines.append(f"| {name} | {ratio:.3f} | {rest} |")
    lines.append(f"\nCross-entropy step: {1000 * median(floor):.0f} ms (median). The teacher's forward alone: {forward:,.0f} tokens/s.")
    return "\n".join(lines)


def table_of_reads(speeds: dict[str, dict[str, list[float]]], sizes: dict[str, float]) -> str:
    """Markdown."""
    lines = ["| targets | bytes per token | million tokens/s from disk | from memory |", "|:--|--:|--:|--:|"]
    for name, own in speeds.items():
        disk, memory = (f"{median(own[where]) / 1e6:.1f}" for where in ("disk", "memory"))
        lines.append(f"| {name} | {sizes[name]:.1f} | {disk} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
