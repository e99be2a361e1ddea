"""Targets that are read or waited for while the student steps: the same ones, the same errors, and no thread at the end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import cache_config, change_numbers, from_cache, refused
from runs import before_step, checked, checkpoint_steps, run, send, steps_of
from torch import Tensor

from mini_distill.data.batch import Batch
from mini_distill.data.order import Stream
from mini_distill.data.prepare import prepare_data
from mini_distill.digest import digest_run
from mini_distill.errors import CacheError, Preempted
from mini_distill.models.loading import load_tokenizer
from mini_distill.teachers.asked_ahead import asked_ahead
from mini_distill.teachers.cached import CachedTeacher


@pytest.fixture
def sequences(tiny_command: list[str], tiny_teacher: Path) -> Stream:
    """What the caches are of."""
    return prepare_data(cache_config(tiny_command, tiny_teacher).data, load_tokenizer(str(tiny_teacher)), show_progress=False).train


def steps_of_two(sequences: Stream, count: int) -> list[list[Batch]]:
    """Steps of two micro-batches of two sequences."""
    return [[sequences.batch([4 * step, 4 * step + 1]), sequences.batch([4 * step + 2, 4 * step + 3])] for step in range(count)]


def tensors(targets: Any) -> list[Tensor]:
    rows = targets.rows(slice(None), 62)
    return [rows.clone()] if isinstance(rows, Tensor) else [value for value in vars(rows).values() if isinstance(value, Tensor)]


def readers() -> list[str]:
    """The threads that read targets."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("targets")]


@contextmanager
def noting(read: list[tuple[list[int], bool]], broken: int | None = None) -> Iterator[None]:
    """What is read, and whether by a thread; the sequence `broken` cannot be."""
    original = CachedTeacher._read

    def watched(self: CachedTeacher, batch: Batch) -> Any:
        read.append((batch.row_ids.tolist(), threading.current_thread().name.startswith("targets")))
        if broken in batch.row_ids.tolist():
            raise CacheError("shard", "is broken")
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedTeacher, "_read", watched)
        yield


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come about")


# -------------------------------------------------------------------------------------------------------------------- one cache


@pytest.mark.parametrize("kind", ["sampled", "topk", "full", "hidden"])
def test_targets_read_ahead_are_those_read_when_called_for(kind: str, caches: Callable[[str], Path], sequences: Stream) -> None:
    ahead, plain, read = CachedTeacher(caches(kind), {}), CachedTeacher(caches(kind), {}), list[tuple[list[int], bool]]()
    steps = steps_of_two(sequences, 4)
    with noting(read), asked_ahead(ahead, iter(steps)) as announced:
        given = list[Batch]()
        for step in announced:
            for batch in step:
                given.append(batch)
                found = tensors(ahead(batch))
                assert all(
                    torch.equal(*pair)
                    for pair in zip(found, tensors(plain.kind.decode(plain._reading(batch), torch.device("cpu"))), strict=True)
                )
    assert [batch for step in steps for batch in step] == given
    assert read == [([i, i + 1], True) for i in range(0, 16, 2)] and not readers()


def test_one_micro_batch_is_read_ahead_and_no_more(caches: Callable[[str], Path], sequences: Stream) -> None:
    """A step of sixty-four would hold the targets of as many."""
    teacher, read = CachedTeacher(caches("topk"), {}), list[tuple[list[int], bool]]()
    with noting(read), asked_ahead(teacher, iter(steps_of_two(sequences, 3))) as announced:
        for wanted, batch in zip([2, 3, 4, 5, 6, 6], chain.from_iterable(announced), strict=True):
            teacher(batch)
            wait_until(partial(lambda count: len(read) == count, wanted))
            time.sleep(0.02)
            assert len(read) == wanted


def test_an_error_comes_out_of_the_call_that_needs_what_could_not_be_read(caches: Callable[[str], Path], sequences: Stream) -> None:
    teacher, read = CachedTeacher(caches("topk"), {}), list[tuple[list[int], bool]]()
    with noting(read, broken=6), asked_ahead(teacher, iter(steps_of_two(sequences, 3))) as announced:
        first, second = next(announced), next(announced)
        teacher(first[0]), teacher(first[1]), teacher(second[0])
        wait_until(lambda: len(read) == 4)
        with pytest.raises(CacheError, match="shard: is broken"):
            teacher(second[1])
        with pytest.raises(CacheError, match="shard: is broken"):
            teacher(second[1])  # asked again, as for the row at fault
    assert not readers()


def test_a_batch_that_nobody_announced_is_read_there_and_then(caches: Callable[[str], Path], sequences: Stream) -> None:
    teacher, read = CachedTeacher(caches("topk"), {}), list[tuple[list[int], bool]]()
    with noting(read), asked_ahead(teacher, iter(steps_of_two(sequences, 2))) as announced:
        (first, second), other = next(announced), sequences.batch([17])
        teacher(first)
        assert len(tensors(teacher(other))[0]) and ([17], False) in read
        teacher(second)
    assert ([2, 3], True) in read and ([2, 3], False) not in read


def test_no_thread_is_left_however_the_loop_ends(caches: Callable[[str], Path], sequences: Stream) -> None:
    teacher = CachedTeacher(caches("topk"), {})
    with pytest.raises(KeyboardInterrupt), asked_ahead(teacher, iter(steps_of_two(sequences, 3))) as announced:
        teacher(next(announced)[0])
        assert readers()
        raise KeyboardInterrupt
    assert not readers() and teacher._being_read is None and not teacher._asked
    with asked_ahead(teacher, iter([])) as announced:
        assert list(announced) == []
    assert not readers()


# ---------------------------------------------------------------------------------------------------------------------- whole runs


@contextmanager
def nothing_asked_ahead() -> Iterator[None]:
    """The loop as it would be without threads."""

    @contextmanager
    def plain(_: Any, steps: Iterator[list[Batch]]) -> Iterator[Iterator[list[Batch]]]:
        yield steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_distill.distillation.asked_ahead", plain)
        yield


@pytest.mark.parametrize("kind", ["sampled", "hidden"])
def test_a_run_is_to_the_bit_what_it_is_without(kind: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path) -> None:
    command = [*from_cache(tiny_command, caches(kind)), "trainer.grad_accum_steps=3", "trainer.micro_batch_size=2", "trainer.eval_every=2"]
    read = list[tuple[list[int], bool]]()
    with noting(read):
        run(command, tmp_path / "ahead")
    assert sum(in_thread for _, in_thread in read) == 6 * 3 and not readers()
    read.clear()
    with nothing_asked_ahead(), noting(read):
        run(command, tmp_path / "plain")
    assert not any(in_thread for _, in_thread in read)
    assert digest_run(tmp_path / "ahead") == digest_run(tmp_path / "plain")


def test_damaged_targets_end_the_run_in_the_step_that_needs_them(
    tiny_command: list[str], small: Path, sequences: Stream, tmp_path: Path
) -> None:
    command = [*from_cache(tiny_command, small), "trainer.log_every=1", "trainer.save_every=1", "trainer.keep_checkpoints=9"]
    number = sequences.order(checked(tuple(command)).seed)(13)  # four in a step
    shard = small / "train" / f"shard-{number // 20:05d}"
    first = int(np.load(shard / "starts.npy")[number % 20]) * 8

    def spoil(ids: np.ndarray) -> None:
        ids[first] = 63

    change_numbers(shard, "ids", 6, spoil)
    line = refused(lambda: run(command, tmp_path / "run"))
    assert line.startswith(f"{shard}: ids hold token 63, and the vocabulary has 62.") and CacheError.exit_code == 5
    assert checkpoint_steps(tmp_path / "run") == [1, 2, 3] and steps_of(tmp_path / "run") == [0, 1, 2, 3] and not readers()


def test_a_signal_leaves_no_thread_and_the_run_goes_on_to_the_bit(
    tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    command = from_cache(tiny_command, caches("sampled"))
    run(command, tmp_path / "undisturbed")
    with before_step(3, send(signal.SIGTERM)), pytest.raises(Preempted):
        run(command, tmp_path / "run")
    assert not readers()
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")


def test_a_cache_that_no_term_looks_at_is_not_read(tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path) -> None:
    read = list[tuple[list[int], bool]]()
    command = [*from_cache(tiny_command, caches("sampled")), "objective.kl_weight=0", "objective.ce_weight=1"]
    with noting(read):
        run(command, tmp_path / "run")
    assert not [numbers for numbers, in_thread in read if in_thread]
