"""The fullest batch is tried before the first step, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.record import record
from faults.twins import Twins, crash_before
from runs import checked, checkpoint_steps, forks, in_processes, run, train_module

from mini_distill.data.prepare import prepare_data
from mini_distill.digest import digest_run
from mini_distill.errors import OutOfMemory
from mini_distill.losses.reduction import count_valid_tokens
from mini_distill.models.loading import load_tokenizer
from mini_distill.training import rehearsal


def where_memory_is_refused(patch: pytest.MonkeyPatch) -> list[Any]:
    """Let runs rehearse as on an accelerator; gives the steps before which they did."""
    rehearsed: list[Any] = []
    original = train_module.rehearse

    def noting(d: Any, score: Callable[[Any], Any], step: int) -> None:
        original(d, lambda batch: (rehearsed.append(step), score(batch))[1], step)

    patch.setattr(rehearsal, "NEVER_REFUSE", ())
    patch.setattr(train_module, "rehearse", noting)
    return rehearsed


@pytest.mark.parametrize("kind", ["plain", "accumulation of 2", "dropout", "hidden states", "cached"])
def test_a_run_that_rehearses_is_the_same_run(kind: str, twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, wanted = twins.command(kind), twins.digest(kind)
    rehearsed = where_memory_is_refused(monkeypatch)
    crash_before(4, command, tmp_path / "run")
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == wanted
    assert len(rehearsed) == 2 and rehearsed[0] == 1 < rehearsed[1]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_memory_that_is_enough_for_all_but_the_fullest_batch_is_found_before_the_first_step(
    packing: str, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of few supervised tokens passed, and the first full one ended the run hours later."""
    command = [*tiny_command, f"data.packing={packing}"]
    config = checked(tuple(command))
    train = prepare_data(config.data, load_tokenizer(str(config.teacher.path)), show_progress=False).train
    fullest = train.fullest(len(train))
    counts = [int(count_valid_tokens(train[i].labels[None])) for i in range(len(train))]
    assert [tokens for tokens, _ in fullest] == sorted(counts, reverse=True)
    limit = sum(tokens for tokens, _ in fullest[: config.trainer.micro_batch_size])
    original = train_module.distill_step

    def limited(student: Any, teacher: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        if int(count_valid_tokens(batch.labels)) >= limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return original(student, teacher, batch, *rest, **named)

    where_memory_is_refused(monkeypatch)
    monkeypatch.setattr(train_module, "distill_step", limited)
    monkeypatch.setattr(train_module, "optimizer_step", lambda *_, **__: pytest.fail("a step was done"))
    with pytest.raises(OutOfMemory) as caught:
        run(command, tmp_path / "run")
    line = str(caught.value)
    assert line.startswith("step 1: out of memory with 4 sequences of 32 tokens, the fullest from ")
    assert train.origins(fullest[0][1])[0] in line and not checkpoint_steps(tmp_path / "run")
    record("memory that runs out", injected=1, fired=1, refused=1)


@forks
def test_two_processes_rehearse_without_exchanging_anything(tiny_command: list[str], tmp_path: Path) -> None:
    command = [*tiny_command, "trainer.micro_batch_size=2"]
    assert in_processes(2, lambda rank: run(command, tmp_path / "undisturbed")) == [0, 0]

    def rehearsing(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            rehearsed = where_memory_is_refused(patch)
            run(command, tmp_path / "run")
            assert rehearsed == [1]

    assert in_processes(2, rehearsing) == [0, 0]
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")
