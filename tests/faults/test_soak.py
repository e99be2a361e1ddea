"""A long run that is harmed in every way, again and again, ends as the one that nothing disturbed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runs import checked, forks, run, steps_of

from faults.record import record
from faults.soak import SETTINGS, STEPS_PER_MINUTE, Punisher
from mini_distill.digest import digest_run


@forks
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_punished_run_ends_as_undisturbed(tiny_command: list[str], tmp_path: Path) -> None:
    minutes, seed = (float(text) for text in os.environ.get(SETTINGS, "1 0").split())
    long = [f"trainer.max_steps={max(30, int(STEPS_PER_MINUTE * minutes))}", "trainer.save_every=5", "trainer.keep_checkpoints=4"]
    command = [*tiny_command, *long, "data.num_workers=1", "trainer.eval_every=50", "evaluation.num_samples=0"]
    checked(tuple(command))  # composed once, here
    punisher = Punisher(lambda: run(command, tmp_path / "run"), tmp_path / "run", int(seed))
    punisher.punish(seconds=60 * minutes)
    run(command, tmp_path / "twin")
    exact = digest_run(tmp_path / "run") == digest_run(tmp_path / "twin")
    counts = punisher.counts()
    record("a run punished for minutes", **counts, exact=int(exact))
    assert exact and punisher.finished and counts["fired"] > 5 * min(1.0, minutes)
    assert counts["skipped"] == counts["flipped"], (punisher.flipped, punisher.skipped)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "twin")
