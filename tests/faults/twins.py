"""Tiny runs of many kinds, and of each kind the twin that nothing ever disturbed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from caches import KINDS as CACHES
from caches import SCRATCH, SMALL, build
from runs import before_step, run

from mini_distill import result
from mini_distill.digest import digest_run

KEEP_ALL = ["trainer.save_every=1", "trainer.keep_checkpoints=99"]
KINDS: dict[str, list[str]] = {
    "plain": KEEP_ALL,
    "accumulation of 2": [*KEEP_ALL, "trainer.grad_accum_steps=2", "trainer.micro_batch_size=2"],
    "accumulation of 5": ["trainer.grad_accum_steps=5", "trainer.micro_batch_size=1", "trainer.save_every=2"],
    "dropout": [*KEEP_ALL, *SCRATCH, "student.dropout=0.3"],
    "bf16": [*KEEP_ALL, "trainer.precision=bf16"],
    "unpacked": [*KEEP_ALL, "data.packing=false", "trainer.micro_batch_size=5"],  # several epochs, with ragged ends
    "workers": [*KEEP_ALL, "data.num_workers=2"],
    "evaluation": [*KEEP_ALL, "trainer.eval_every=2", "trainer.export=best", "evaluation.sampling_temperature=1.0"],
    "jsd": [*KEEP_ALL, "objective=jsd", "trainer.schedule=wsd", "trainer.log_every=2"],
    "reverse KL at 2": ["objective=reverse_kl", "objective.temperature=2", "trainer.save_every=3"],
    "hidden states": ["objective=hidden_mse", "trainer.save_every=2"],
    "cross-entropy": ["objective=ce", "trainer.save_every=2"],
    "cached": ["cache:sampled", *SCRATCH, "trainer.save_every=2"],
    "cached hidden states": ["cache:hidden", *SCRATCH, "trainer.save_every=1", "data.num_workers=1"],
}
"""What a kind adds to the tiny command; `cache:<kind>` puts a cache in the teacher's place."""


class Crash(Exception):
    """Stands for any sudden end."""


def crash() -> None:
    """An action: the run ends here."""
    raise Crash


def crash_before(step: int, command: list[str], folder: Path) -> None:
    """A run that got as far as `step`, and no further."""
    with before_step(step, crash), pytest.raises(Crash):
        run(command, folder)


def without_timing() -> None:
    """The speed that a run reports is measured for two seconds otherwise."""
    result.forward_tokens_per_second = partial(result.forward_tokens_per_second, seconds=0.0)


class Twins:
    """The commands of all kinds and, made once, their undisturbed runs.

    Args:
        tiny_command: Overrides of a run of six steps; all but `output_dir`.
        root: Where undisturbed runs and caches go.
    """

    def __init__(self, tiny_command: list[str], root: Path) -> None:
        self.tiny_command, self.root = tiny_command, root

    def command(self, kind: str) -> list[str]:
        """The overrides of a run of this kind."""
        added = KINDS[kind]
        cache = next((text.partition(":")[2] for text in added if text.startswith("cache:")), None)
        replaced = tuple(group for group in ("student", "teacher") if (group == "student" and "student=mini_2m" in added) or cache)
        kept = [text for text in self.tiny_command if not text.startswith(replaced)] if replaced else self.tiny_command
        teacher = ["teacher=cached", f"teacher.cache_dir={self.cache(cache)}"] if cache else []
        return [*kept, *teacher, *(text for text in added if not text.startswith("cache:"))]

    def cache(self, kind: str) -> Path:
        """A cache of the tiny teacher's targets, `small` or of a kind; not to be changed."""
        folder = self.root / f"cache-{kind}"
        if not (folder / "summary.json").exists():
            build(
                self.tiny_command, folder, *(SMALL if kind == "small" else [*CACHES[kind], "cache.batch_size=7", "cache.shard_sequences=9"])
            )
        return folder

    def undisturbed(self, kind: str) -> Path:
        """The folder of the run that was never stopped; not to be changed."""
        folder = self.root / kind
        if not folder.exists():
            run(self.command(kind), folder)
        return folder

    def digest(self, kind: str) -> str:
        """Of the run that was never stopped."""
        return digest_run(self.undisturbed(kind))
