"""The cache of teacher targets as users meet it: built, killed, damaged, looked at, and trained from."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from caches import (
    KINDS,
    SMALL,
    build,
    cache_command,
    cache_config,
    cache_module,
    change_column,
    change_numbers,
    content,
    from_cache,
    live,
    one_weight_changed,
    refused,
    without,
)
from faults.injection import count_operations, in_child
from runs import before_step, checked, copy_of, fork, forks, in_processes, rows, run, send, wait

from mini_distill.cli import load_config, report
from mini_distill.config import CacheCommand, CacheLookCommand, Config
from mini_distill.data.batch import Batch
from mini_distill.data.prepare import prepare_data
from mini_distill.digest import digest_run
from mini_distill.errors import CacheError, ConfigError, MiniDistillError, ModelError, Preempted, StorageError
from mini_distill.folder_lock import FolderLock
from mini_distill.models.loading import load_tokenizer
from mini_distill.teachers import cache_files
from mini_distill.teachers.cache_build import CacheBuilder
from mini_distill.teachers.cache_identity import read_description
from mini_distill.teachers.online import OnlineTeacher
from mini_distill.teachers.targets import DenseTargets

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"

# ------------------------------------------------------------------------------------------------ the same as the live teacher


@pytest.fixture(scope="module")
def online(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs beside the live teacher, four sequences a step."""
    folder = tmp_path_factory.mktemp("online") / "run"
    run(live(tiny_command), folder, "trainer.max_steps=39")
    return folder


def losses(folder: Path, *names: str) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows(folder) if name in row] for name in names}


TRAINED = ("train/loss", "train/forward_kl", "train/ce", "train/tokens", "eval/student_nll", "eval/forward_kl", "eval/teacher_nll")
BATCHES = {
    "as online": ["trainer.micro_batch_size=4"],
    "accumulated": ["trainer.micro_batch_size=1", "trainer.grad_accum_steps=4"],
    "workers": ["trainer.micro_batch_size=2", "trainer.grad_accum_steps=2", "data.num_workers=1"],
}


@pytest.mark.parametrize("batches", [pytest.param(name, marks=pytest.mark.slow if name != "accumulated" else []) for name in BATCHES])
def test_three_epochs_from_hidden_states_are_those_of_the_live_teacher(
    batches: str, tiny_command: list[str], online: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    """Scored seven at a time; the teacher's float32 rounds differently there, by parts in a million."""
    run(from_cache(tiny_command, caches("hidden")), tmp_path / "run", "trainer.max_steps=39", *BATCHES[batches])
    sequences = read_description(caches("hidden"))["sides"]["train"]["sequences"]
    assert 3 * sequences <= 39 * 4
    found, wanted = losses(tmp_path / "run", *TRAINED), losses(online, *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-5), name


@forks
def test_two_processes_train_from_a_cache_as_one_beside_the_teacher(
    tiny_command: list[str], online: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    command = [*from_cache(tiny_command, caches("hidden")), "trainer.max_steps=39", "trainer.micro_batch_size=2"]
    assert in_processes(2, lambda rank: run(command, tmp_path / "run")) == [0, 0]
    found, wanted = losses(tmp_path / "run", *TRAINED), losses(online, *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=5e-5, abs=5e-5), name


@forks
@pytest.mark.parametrize(("kind", "tolerance"), [("hidden", 1e-5), ("full", 1e-3)])
def test_three_epochs_of_real_stories_are_the_same_from_a_cache_in_other_batches_and_on_two_processes(
    kind: str, tolerance: float, tmp_path: Path
) -> None:
    """But for the rounding of sums in another order, and that of log-probabilities to bfloat16."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here")
    stories = (SHARED / "corpora/tinystories/stories.txt").read_text(encoding="utf-8")[:60_000]
    (tmp_path / "stories.txt").write_text(stories, encoding="utf-8")
    teacher = SHARED / "models/stories260K"
    command = [
        "experiment=tinystories_75k",
        "objective=forward_kl",
        "trainer.num_threads=1",
        "trainer.log_every=1",
        "trainer.eval_every=null",
    ]
    command += ["teacher=hf", f"teacher.path={teacher}", "data=text", f"data.path={tmp_path / 'stories.txt'}", "data.seq_len=128"]
    sequences = len(prepare_data(cache_config(command, tmp_path).data, load_tokenizer(str(teacher)), show_progress=False).train)
    command += [f"trainer.max_steps={3 * sequences // 16}", "trainer.warmup_steps=2"]
    run(command, tmp_path / "online")
    build(command, tmp_path / "cache", f"cache.kind={kind}")
    cached = [
        *without(command, "teacher"),
        "teacher=cached",
        f"teacher.cache_dir={tmp_path / 'cache'}",
        "trainer.micro_batch_size=4",
        "trainer.grad_accum_steps=2",
    ]
    assert in_processes(2, lambda rank: run(cached, tmp_path / "cached")) == [0, 0]
    found, wanted = losses(tmp_path / "cached", *TRAINED), losses(tmp_path / "online", *TRAINED)
    assert len(wanted["train/loss"]) == 3 * sequences // 16 > 20 and wanted["train/loss"][-1] < 0.8 * wanted["train/loss"][0]
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], abs=tolerance), name


@forks
def test_two_processes_look_through_a_cache_together_and_both_refuse_what_one_found(
    tiny_command: list[str], small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each of them read every byte of it at every start."""
    command = [*from_cache(tiny_command, small), "trainer.micro_batch_size=2"]

    def noted(rank: int) -> None:
        verify = cache_files.verify_folder
        with pytest.MonkeyPatch.context() as patch, (tmp_path / f"read-{rank}").open("w") as file:
            patch.setattr(cache_files, "verify_folder", lambda folder: print(folder, file=file, flush=True) or verify(folder))
            run(command, tmp_path / "run")

    assert in_processes(2, noted) == [0, 0]
    read = [(tmp_path / f"read-{rank}").read_text().splitlines() for rank in range(2)]
    assert all(read) and sorted(read[0] + read[1]) == sorted(str(shard) for shard in small.glob("*/shard-*"))
    (small / "train" / "shard-00001" / "mark.npy").write_bytes(b"")
    assert in_processes(2, noted) == [5, 5]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and all(line.startswith(f"error: {small}/train/shard-00001: mark.npy: 0 bytes") for line in lines)


def test_full_is_the_live_teacher_to_the_rounding_of_bfloat16(
    tiny_command: list[str], online: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    run(from_cache(tiny_command, caches("full")), tmp_path / "run", "trainer.max_steps=39")
    found, wanted = losses(tmp_path / "run", *TRAINED), losses(online, *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=5e-3, abs=2e-3), name


@pytest.mark.parametrize("written_at", [1, 2])
def test_a_cached_temperature_is_that_of_the_run(written_at: int, tiny_command: list[str], tmp_path: Path) -> None:
    """Full targets, written at 2 or at 1 and trained at 2, are those of the live teacher at 2, not at 4."""
    at_two = ["objective.temperature=2"]
    run(live(tiny_command), tmp_path / "live", *at_two)
    build(tiny_command, tmp_path / "full", "cache.kind=full", f"cache.temperature={written_at}")
    run(from_cache(tiny_command, tmp_path / "full"), tmp_path / "cached", *at_two)
    found, wanted = losses(tmp_path / "cached", *TRAINED), losses(tmp_path / "live", *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=5e-3, abs=2e-3), name


def test_a_cache_serves_a_mixture_in_any_order(tiny_command: list[str], tiny_corpus: Path, tmp_path: Path) -> None:
    part = f"source: jsonl, path: {tiny_corpus}, text_column: text, eval_fraction: 0.2"
    mixture = f"data.mixture={{a: {{{part}, max_rows: 20}}, b: {{{part}, max_rows: 50, weight: 2}}}}"
    command = [*without(tiny_command, "data"), "data=mixture", mixture, "data.seq_len=32"]
    build(command, tmp_path / "cache", "cache.kind=hidden", "cache.shard_sequences=9")
    run(live(command), tmp_path / "live", "trainer.max_steps=12")
    run(from_cache(command, tmp_path / "cache"), tmp_path / "cached", "trainer.max_steps=12")
    found, wanted = losses(tmp_path / "cached", *TRAINED), losses(tmp_path / "live", *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-5), name


def test_padded_rows_have_the_targets_of_each_document_alone(tiny_command: list[str], tmp_path: Path) -> None:
    command = [*tiny_command, "data.packing=false"]
    build(command, tmp_path / "padded", "cache.kind=full", "cache.batch_size=16")
    build(command, tmp_path / "alone", "cache.kind=full", "cache.batch_size=1")
    padded, alone = content(tmp_path / "padded"), content(tmp_path / "alone")
    assert padded.keys() == alone.keys()
    for name in padded:
        one, other = (np.load(tmp_path / which / name) if name.endswith(".npy") else None for which in ("padded", "alone"))
        if name.endswith("log_probs.npy"):
            wide = [torch.from_numpy(values).view(torch.bfloat16).float() for values in (one, other)]
            torch.testing.assert_close(*wide, rtol=2**-7, atol=1e-5)  # one step of bfloat16, where the last bit of float32 decides
        elif one is not None and one.dtype == np.float32:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        elif one is not None:
            assert np.array_equal(one, other), name


EVALUATED = {"hidden": 2e-5, "full": 2e-3, "sampled": 0.15}
"""How far the held-out KL may be from the live one; sampled: a few standard errors over some hundred tokens."""


@pytest.mark.parametrize("kind", ["hidden", "full", "topk", "sampled"])
def test_the_evaluation_from_a_cache_is_that_of_the_live_teacher(
    kind: str, tiny_command: list[str], online: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    run(from_cache(tiny_command, caches(kind)), tmp_path / "run", "trainer.max_steps=1", "trainer.warmup_steps=0")
    found, wanted = rows(tmp_path / "run")[0], rows(online)[0]  # before the first step
    assert found["eval/top1_agreement"] == wanted["eval/top1_agreement"] and found["eval/tokens"] == wanted["eval/tokens"]
    for name in ("student_nll", "student_ece", "teacher_nll", "teacher_ece", "teacher_perplexity", "teacher_bits_per_byte"):
        loose = kind == "full" and name.startswith("teacher")
        assert found[f"eval/{name}"] == pytest.approx(wanted[f"eval/{name}"], rel=3e-3 if loose else 1e-4), name
    if kind in EVALUATED:
        assert found["eval/forward_kl"] == pytest.approx(wanted["eval/forward_kl"], abs=EVALUATED[kind])
    else:
        assert "eval/forward_kl" not in found
    assert ("eval/reverse_kl" in found) == (kind in ("hidden", "full"))


def test_a_live_teacher_may_stand_beside_its_cache(
    tiny_command: list[str], tiny_teacher: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    """For a student made of the teacher's own layers, which a cache has not got."""
    run(tiny_command, tmp_path / "live")
    run([*tiny_command, f"teacher.cache_dir={caches('hidden')}"], tmp_path / "cached")
    found, wanted = losses(tmp_path / "cached", *TRAINED), losses(tmp_path / "live", *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-5), name


# ------------------------------------------------------------------------------------------------- written on the way to training


def shards(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the targets of runs are found that name no folder."""
    monkeypatch.setenv("MINI_DISTILL_CACHE", str(tmp_path / "shared"))
    checked.cache_clear()  # the folder is part of the configuration
    return tmp_path / "shared" / "targets"


def test_runs_of_one_teacher_write_its_targets_once(tiny_command: list[str], shared: Path, tmp_path: Path) -> None:
    """At another temperature, with another divergence, and again when they have finished."""
    command = [*tiny_command, "teacher.cache_kind=hidden"]
    run(command, tmp_path / "first")
    (folder,) = shared.iterdir()
    written = shards(folder)
    assert read_description(folder)["complete"] and len(written) > 3
    run([*command, "objective=reverse_kl", "objective.temperature=2"], tmp_path / "second")
    run(command, tmp_path / "first")
    assert list(shared.iterdir()) == [folder] and shards(folder) == written

    run([*tiny_command, "objective=reverse_kl", "objective.temperature=2"], tmp_path / "live")
    found, wanted = (losses(tmp_path / name, "train/loss", "eval/reverse_kl") for name in ("second", "live"))
    assert len(found["train/loss"]) >= 2
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-5), name


def test_targets_of_another_temperature_kind_or_data_are_others(tiny_command: list[str], shared: Path) -> None:
    def folder(*more: str) -> str | None:
        config: Config = load_config([*tiny_command, "teacher.cache_kind=topk", *more])
        return config.teacher.cache_dir

    assert folder() == folder("trainer.max_steps=2", "student.num_layers=2", "objective=reverse_kl", "data.num_workers=1")
    others = ["objective.temperature=2", "teacher.cache_k=8", "teacher.cache_kind=full", "data.seq_len=16", "data.max_rows=3"]
    others += ["trainer.precision=bf16"]
    assert len({folder(), *(folder(other) for other in others)}) == 1 + len(others)
    assert folder("teacher.cache_k=32") == folder()
    for kind in ("full", "hidden"):
        assert folder(f"teacher.cache_kind={kind}") == folder(f"teacher.cache_kind={kind}", "objective.temperature=2")
    assert folder("teacher.cache_dir=here") == "here"


def test_a_run_says_how_many_tokens_its_targets_keep(tiny_command: list[str], shared: Path, tmp_path: Path) -> None:
    command = [*tiny_command, "teacher.cache_kind=topk"]
    run([*command, "teacher.cache_k=5"], tmp_path / "run")
    (folder,) = shared.iterdir()
    assert read_description(folder)["identity"]["cache"]["k"] == 5
    line = refused(lambda: run([*command, "teacher.cache_k=63"], tmp_path / "other"), ConfigError)
    assert line == "teacher.cache_k: got 63, expected at most the 62 tokens of the vocabulary."


def test_only_what_is_damaged_is_written_again(tiny_command: list[str], shared: Path, tmp_path: Path) -> None:
    command = [*tiny_command, "teacher.cache_kind=topk"]
    run(command, tmp_path / "first")
    before = shards(shared)
    damaged = sorted(before)[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    run(command, tmp_path / "second")
    changed = {file.parent for file, time in shards(shared).items() if before[file] != time}
    assert changed == {damaged.parent}
    assert digest_run(tmp_path / "first") == digest_run(tmp_path / "second")


@forks
def test_a_run_waits_for_another_that_writes_its_targets(
    tiny_command: list[str], shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [*tiny_command, "teacher.cache_kind=topk"]
    folder = Path(load_config(command).teacher.cache_dir)
    folder.mkdir(parents=True)
    holds, may_leave = os.pipe(), os.pipe()

    def other() -> None:
        with FolderLock(folder):
            os.write(holds[1], b"!")
            os.read(may_leave[0], 1)

    process = fork(other)
    os.read(holds[0], 1)
    threading.Timer(1.5, os.write, (may_leave[1], b"!")).start()
    run(command, tmp_path / "run")
    assert wait(process) == 0
    assert f"waiting: {folder}: in use by process" in capfd.readouterr().err
    assert read_description(folder)["complete"]


@forks
def test_a_run_that_waits_for_targets_can_be_stopped(tiny_command: list[str], shared: Path, tmp_path: Path) -> None:
    command = [*tiny_command, "teacher.cache_kind=topk"]
    folder = Path(load_config(command).teacher.cache_dir)
    folder.mkdir(parents=True)
    with FolderLock(folder):
        process = fork(lambda: run(command, tmp_path / "run"))
        while not (status := tmp_path / "run" / "status.json").exists():  # the test's time limit ends it
            time.sleep(0.05)
        os.kill(process, signal.SIGTERM)
        assert wait(process) == 143
    assert json.loads(status.read_text())["state"] == "preempted"


@forks
def test_two_processes_write_and_share_their_targets(tiny_command: list[str], shared: Path, tmp_path: Path) -> None:
    command = [*tiny_command, "teacher.cache_kind=full"]
    assert in_processes(2, lambda rank: run(command, tmp_path / "two", "trainer.micro_batch_size=2")) == [0, 0]
    run(command, tmp_path / "one")
    found, wanted = losses(tmp_path / "two", *TRAINED), losses(tmp_path / "one", *TRAINED)
    for name in TRAINED:
        assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-5), name


def test_a_run_goes_on_with_its_targets_moved(tiny_command: list[str], shared: Path, tmp_path: Path) -> None:
    command = [*tiny_command, "teacher.cache_kind=topk", f"teacher.cache_dir={tmp_path / 'here'}"]
    run(command, tmp_path / "whole")
    with before_step(4, send(signal.SIGTERM)), pytest.raises(Preempted):
        run(command, tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    run([*command, f"teacher.cache_dir={tmp_path / 'there'}"], tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------- what trains from it


@pytest.mark.parametrize("kind", ["topk", "full", "hidden"])
def test_other_divergences_train_from_targets_that_have_them(
    kind: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    summary = run([*from_cache(tiny_command, caches(kind)), "objective=reverse_kl"], tmp_path / "run")
    assert all(np.isfinite(row["train/reverse_kl"]) for row in rows(tmp_path / "run") if "train/reverse_kl" in row) and summary


@pytest.mark.parametrize(
    "divergence", [["objective=teacher_argmax_ce"], ["objective=ranking_hinge", "objective.divergence_options.top_k=8"]]
)
def test_what_looks_at_the_likeliest_tokens_needs_no_more_than_a_list(
    divergence: list[str], tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    """A teacher that is hardly certain: the tail outweighed its first choice, and became the label."""
    run([*live(tiny_command), *divergence], tmp_path / "live")
    run([*from_cache(tiny_command, caches("topk")), *divergence], tmp_path / "cached")
    found, wanted = losses(tmp_path / "cached", "train/loss"), losses(tmp_path / "live", "train/loss")
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=2e-3)


def test_a_student_of_the_teachers_layers_needs_the_teacher(tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path) -> None:
    command = [
        *without(tiny_command, "teacher", "student"),
        "teacher=cached",
        f"teacher.cache_dir={caches('full')}",
        "student=from_teacher",
    ]
    assert "student.kind: from_teacher, and a cache has no layers" in refused(lambda: run(command, tmp_path / "run"), ConfigError)


def test_more_tokens_than_the_vocabulary_has_are_one_line(tiny_command: list[str], tmp_path: Path) -> None:
    lines = refused(lambda: build(tiny_command, tmp_path / "cache", "cache.kind=topk", "cache.k=63"), ConfigError)
    assert lines == "cache.k: got 63, expected at most the 62 tokens of the vocabulary."
    build(tiny_command, tmp_path / "all", "cache.kind=topk", "cache.k=62")
    summary = run(from_cache(tiny_command, tmp_path / "all"), tmp_path / "run")
    assert np.isfinite(summary["after/student_nll"] if "after/student_nll" in summary else summary["eval/student_nll"])


# --------------------------------------------------------------------------------------------------------------------- storage


def test_two_builds_are_equal_and_a_second_one_does_nothing(tiny_command: list[str], small: Path, caches: Callable[[str], Path]) -> None:
    times = {file: file.stat().st_mtime_ns for file in small.rglob("shard-*")}
    before = (small / "summary.json").read_bytes()
    summary = build(tiny_command, small, *SMALL)
    assert {file: file.stat().st_mtime_ns for file in small.rglob("shard-*")} == times
    assert (small / "summary.json").read_bytes() == before and json.loads(before) == summary
    again = small.parent / "again"
    build(tiny_command, again, *SMALL)
    assert content(again) == content(caches("small"))


def test_a_damaged_shard_is_made_again_alone(
    tiny_command: list[str],
    small: Path,
    caches: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = small / "train" / "shard-00001"
    others = [folder for folder in small.rglob("shard-*") if folder != shard and folder.is_dir()]
    times = [folder.stat().st_mtime_ns for folder in others]
    data = bytearray((shard / "levels.npy").read_bytes())
    data[-7] ^= 4
    (shard / "levels.npy").write_bytes(data)
    assert f"{shard}: levels.npy: wrong checksum" in refused(lambda: run(from_cache(tiny_command, small), tmp_path / "run"))
    before = read_description(small)["summary"]
    with caplog.at_level(logging.WARNING):
        summary = build(tiny_command, small, *SMALL)
    assert f"{shard}: levels.npy: wrong checksum; it is made again" in caplog.text
    assert content(small) == content(caches("small")) and [folder.stat().st_mtime_ns for folder in others] == times
    assert summary["cache/scored_sequences"] == before["cache/scored_sequences"] + 20  # the repair's own figures took the build's place
    assert summary["cache/seconds"] > before["cache/seconds"]
    assert all(summary[key] == value for key, value in before.items() if key.startswith("cache/predicted"))
    assert "Left to be scored: 20 of 67 sequences, " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer", "head"])
def test_a_damaged_tokenizer_or_head_is_made_again(
    name: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(caches("hidden"), tmp_path / "hidden")
    (file,) = (file for file in (folder / name).iterdir() if file.name in ("tokenizer.json", "head.safetensors"))
    os.truncate(file, 100)
    line = refused(lambda: cache_module.info(cache_config(tiny_command, folder)))
    assert line.startswith(f"{folder / name}: {file.name}: 100 bytes")
    assert name in refused(lambda: run(from_cache(tiny_command, folder), tmp_path / "run"), MiniDistillError)
    assert build(tiny_command, folder, *KINDS["hidden"])["cache/scored_sequences"] > 0  # of the build that scored them
    assert content(folder) == content(caches("hidden"))


def test_shards_of_another_teacher_are_not_taken_over(tiny_command: list[str], tiny_teacher: Path, small: Path, tmp_path: Path) -> None:
    """cache.json deleted by hand, and built again with another teacher: what lay there looked whole."""
    other = copy_of(tiny_teacher, tmp_path / "teacher")
    one_weight_changed(other)
    (small / "cache.json").unlink()
    command = [*tiny_command, f"teacher.path={other}"]
    build(command, small, *SMALL)
    build(command, tmp_path / "fresh", *SMALL)
    assert content(small) == content(tmp_path / "fresh")


def operations_of_a_build(command: list[str], folder: Path) -> int:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        count_operations(seen.append, patch)
        build(command, folder, *SMALL)
    return len(seen)


def killed_at(number: int, command: list[str], folder: Path) -> int:
    """How a build ended that gets kill -9 before its file operation `number`."""

    def body() -> None:
        count_operations(lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == number else None)
        build(command, folder, *SMALL)

    return wait(fork(body))


def assert_ends_undisturbed(numbers: list[int], command: list[str], folder: Path, wanted: Path) -> None:
    """Killed at each of these operations of one build after the other, it ends as if it had not been."""
    for number in numbers:
        assert killed_at(number, command, folder) == -signal.SIGKILL, number
    build(command, folder, *SMALL)
    assert content(folder) == content(wanted), numbers
    assert not [path.name for path in folder.rglob("*") if path.name.startswith(".")]
    for which in (folder, wanted):
        description = read_description(which)
        assert description["complete"] and description["identity"] == read_description(wanted)["identity"]


@forks
def test_killed_at_file_operations_it_ends_byte_identical(tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path) -> None:
    count = operations_of_a_build(tiny_command, tmp_path / "counted")
    numbers = sorted(random.Random(0).sample(range(count), 3))
    assert count > 60
    for number in numbers:
        assert_ends_undisturbed([number], tiny_command, tmp_path / str(number), caches("small"))


@forks
@pytest.mark.parametrize("limit", [2000, 4000])
def test_a_full_disk_is_one_line_and_the_build_goes_on(
    limit: int, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond the limit: the kernel refuses the write, as a full disk does."""

    def body() -> None:
        import resource

        build([*tiny_command], tmp_path / "warm", *SMALL)  # so that nothing but the cache is written
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        build(tiny_command, tmp_path / "cache", *SMALL)

    assert wait(fork(body)) == 6
    errors = capfd.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "File too large" in line and "Traceback" not in errors
    build(tiny_command, tmp_path / "cache", *SMALL)
    assert content(tmp_path / "cache") == content(caches("small"))


def test_too_little_disk_is_refused_before_scoring(tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(CacheBuilder, "build", lambda *_, **__: pytest.fail("it was scored"))
    line = refused(lambda: build(tiny_command, tmp_path / "cache", *SMALL), StorageError)
    assert "10 kB of free space, expected at least" in line and "cache.dir" in line and "keep_checkpoints" not in line


def test_the_prediction_stands_before_the_scoring_and_is_near(
    tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    original = CacheBuilder.build

    def watched(*args: Any, **kwargs: Any) -> int:
        printed.append(capsys.readouterr().out)
        return original(*args, **kwargs)

    monkeypatch.setattr(CacheBuilder, "build", watched)
    summary = build(tiny_command, tmp_path / "cache", *KINDS["sampled"])
    (before,) = printed
    assert "bytes per token" in before and "minutes" in before and "the tokens that are always listed hold" in before
    assert summary["cache/predicted_seconds"] > 0
    assert 0 < summary["cache/captured_mass"] < 1 and summary["cache/tokens"] > 1000
    assert "Train from it: python -m mini_distill.train teacher=cached" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_is_what_is_written(kind: str, tiny_command: list[str], tmp_path: Path) -> None:
    """The first batch of a corpus stood for all of it, nothing for the held-out side, and a column that is never written was counted."""
    corpus = tmp_path / "growing.jsonl"
    texts = ["a cat", "the cat sat", "birds " * 40, "the mat and the cat saw two birds " * 10]
    corpus.write_text("".join(json.dumps({"text": f"{texts[i // 40]} {i}"}) + "\n" for i in range(160)))
    command = [*tiny_command, f"data.path={corpus}", "data.packing=false", "data.seq_len=64"]
    summary = build(command, tmp_path / "cache", *KINDS[kind], "cache.batch_size=4")
    for predicted, written in (("predicted_bytes_per_token", "bytes_per_token"), ("predicted_bytes", "bytes")):
        assert summary[f"cache/{predicted}"] == pytest.approx(summary[f"cache/{written}"], rel=0.1), predicted


def test_a_folder_without_the_right_to_write_is_one_line(tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path) -> None:
    def as_nobody() -> None:
        locked = Path("/tmp") / f"locked-{os.getpid()}"
        locked.mkdir(mode=0o555)
        config = cache_config(tiny_command, locked / "cache", *SMALL)
        try:
            with pytest.MonkeyPatch.context() as patch:
                prepare = cache_module._prepare(config, cache_module.start_processes("fp32", 1), cache_module.StopRequest())
                patch.setattr(cache_module, "_prepare", lambda *_: prepare)
                if os.geteuid() == 0:
                    os.seteuid(65534)  # permissions do not bind root
                assert "Permission denied" in refused(lambda: cache_module.build(config), StorageError)
        finally:
            os.seteuid(os.getuid())
            locked.rmdir()

    assert in_child(as_nobody) == 0


def test_a_cache_that_cannot_be_written_can_be_read(tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    """On a shared, read-only disk: reading leaves no trace."""
    before = {path: path.stat().st_mtime_ns for path in [small, *small.rglob("*")]}
    run(from_cache(tiny_command, small), tmp_path / "run")
    cache_module.info(cache_config(tiny_command, small))
    assert {path: path.stat().st_mtime_ns for path in [small, *small.rglob("*")]} == before


@contextmanager
def in_mid_build(action: Callable[[], object], at: int) -> Iterator[None]:
    """Call `action` before the scoring of batch `at`, those of the prediction not among them."""
    score, build, calls = CacheBuilder._score, CacheBuilder.build, -1

    def watched(self: CacheBuilder, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += calls >= 0
        if calls == at:
            action()
        return score(self, *args, **kwargs)

    def begun(self: CacheBuilder, *args: Any, **kwargs: Any) -> int:
        nonlocal calls
        calls = 0
        return build(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheBuilder, "_score", watched)
        patch.setattr(CacheBuilder, "build", begun)
        yield


@forks
def test_a_second_builder_gets_one_line_and_harms_nothing(
    tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    with in_mid_build(lambda: codes.append(wait(fork(lambda: build(tiny_command, tmp_path / "cache", *SMALL)))), at=1):
        build(tiny_command, tmp_path / "cache", *SMALL)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert codes == [6] and len(errors) == 1 and f"in use by process {os.getpid()}" in errors[0]
    assert content(tmp_path / "cache") == content(caches("small"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_one_line_and_whole_shards_stay(
    number: signal.Signals, code: int, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    with in_mid_build(send(number), at=4), pytest.raises(Preempted) as caught:
        build(tiny_command, tmp_path / "cache", *SMALL)
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(f"{tmp_path / 'cache'}: stopped by {number.name}; finished shards stay. The same command goes on")
    kept = {shard: shard.stat().st_mtime_ns for shard in (tmp_path / "cache" / "train").glob("shard-*")}
    assert len(kept) == 1 and not read_description(tmp_path / "cache")["complete"]
    summary = build(tiny_command, tmp_path / "cache", *SMALL)
    assert content(tmp_path / "cache") == content(caches("small"))
    assert {shard: shard.stat().st_mtime_ns for shard in kept} == kept
    sides = read_description(tmp_path / "cache")["sides"].values()
    assert summary["cache/scored_sequences"] == sum(side["sequences"] for side in sides) - 20


def test_an_unfinished_cache_is_not_trained_from(tiny_command: list[str], tmp_path: Path) -> None:
    with in_mid_build(send(signal.SIGTERM), at=4), pytest.raises(Preempted):
        build(tiny_command, tmp_path / "cache", *SMALL)
    line = refused(lambda: run(from_cache(tiny_command, tmp_path / "cache"), tmp_path / "run"))
    assert "missing" in line and "Build it again with the same command" in line


@forks
def test_two_processes_write_the_shards_of_one(
    tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_processes(2, lambda rank: build(tiny_command, tmp_path / "cache", *SMALL)) == [0, 0]
    assert content(tmp_path / "cache") == content(caches("small"))
    summary = json.loads((tmp_path / "cache" / "summary.json").read_text())
    sides = read_description(tmp_path / "cache")["sides"].values()
    assert summary["cache/scored_sequences"] == sum(side["sequences"] for side in sides)
    assert capfd.readouterr().out.count("bytes per token of the training side") == 1


@forks
def test_one_process_of_two_that_is_killed_leaves_whole_shards(
    tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    def body(rank: int) -> None:
        with in_mid_build(send(signal.SIGKILL) if rank == 1 else (lambda: None), at=2):
            build(tiny_command, tmp_path / "cache", *SMALL)

    codes = in_processes(2, body)
    assert codes[1] == -signal.SIGKILL and codes[0] == 8, codes
    build(tiny_command, tmp_path / "cache", *SMALL)
    assert content(tmp_path / "cache") == content(caches("small"))


def test_a_teacher_that_is_not_finite_is_one_line(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    other = copy_of(tiny_teacher, tmp_path / "teacher")
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(lambda: build([*tiny_command, f"teacher.path={other}"], tmp_path / "cache", *SMALL), ModelError)


# --------------------------------------------------------------------------------------------------------------- info and verify


def test_info_says_what_it_is_and_what_of_it_is_not_whole(
    tiny_command: list[str], tiny_teacher: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It named the first of the missing parts, and ended with 0 as if there were none."""
    cache_module.info(cache_config(tiny_command, small))
    out = capsys.readouterr().out
    assert '"kind": "topk"' in out and str(tiny_teacher) in out and out.endswith("whole\n")
    figures = r"bytes per token of the training side; the 8 tokens that are listed hold \d\d\.\d % .*\n\d+ sequences scored in \d+ s\n"
    assert re.search(figures, out)
    shutil.rmtree(small / "train" / "shard-00001")
    (small / "held_out" / "shard-00000" / "mark.npy").write_bytes(b"")
    lines = refused(lambda: cache_module.info(cache_config(tiny_command, small))).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(small / part) for part in ("train/shard-00001", "held_out/shard-00000")]
    assert lines[0].endswith("missing. Build it again with the same command: only what is missing or damaged is made anew.")
    assert "whole" not in capsys.readouterr().out and CacheError.exit_code == 5


@pytest.mark.parametrize("kind", ["sampled", "draws", "hidden"])
def test_settings_that_are_left_out_are_those_of_the_cache(kind: str, tiny_command: list[str], caches: Callable[[str], Path]) -> None:
    """`verify` wanted all of them again, and without them named five that differ."""
    arguments = [*cache_command(tiny_command), f"cache.dir={caches(kind)}", "cache.num_verify=2"]
    config = load_config(arguments, "cache", CacheLookCommand)
    assert cache_module.verify(config)["verify/sequences"] == 4
    said = [text for text in KINDS[kind] if not text.startswith("cache.sampling")]
    assert load_config([*arguments, *said], "cache", CacheLookCommand) == config


def test_settings_that_are_not_those_of_the_cache_are_named(tiny_command: list[str], caches: Callable[[str], Path]) -> None:
    folder = caches("small")

    def lines(*more: str, kind: type[MiniDistillError] = CacheError) -> str:
        arguments = [*cache_command(tiny_command), f"cache.dir={folder}", *more]
        return refused(lambda: load_config(arguments, "cache", CacheLookCommand), kind)

    assert lines("cache.k=32") == f"{folder}: cache.k: the cache has 8, this run 32. Leave it out, or give the folder of another cache."
    assert [line.split(": ")[1] for line in lines("cache.kind=full", "cache.temperature=2").splitlines()] == [
        "cache.kind",
        "cache.temperature",
    ]
    assert "cache.proposal: given, and cache.kind is topk" in lines("cache.proposal=0.5", kind=ConfigError)
    assert "Interpolation key 'oops' not found" in lines("cache.k=${oops}", kind=ConfigError)


def test_info_of_no_cache_is_one_line(tiny_command: list[str], tmp_path: Path) -> None:
    line = refused(lambda: cache_module.info(cache_config(tiny_command, tmp_path / "nothing")))
    assert "no cache of teacher targets. Build it: python -m mini_distill.cache" in line


VERIFIED = {
    **KINDS,
    "spread": ["cache.kind=topk", "cache.k=8", "cache.tail=spread"],
    "sampled at 2": [*KINDS["sampled"], "cache.temperature=2"],
    "full at 2": ["cache.kind=full", "cache.temperature=2"],
    "hidden in bfloat16": ["cache.kind=hidden", "teacher.dtype=bfloat16"],
}


@pytest.mark.parametrize("kind", VERIFIED)
def test_verify_finds_a_good_cache_good(kind: str, tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tiny_command, tmp_path / "cache", *VERIFIED[kind])
    found = cache_module.verify(cache_config(tiny_command, tmp_path / "cache", *VERIFIED[kind]))
    assert found["verify/sequences"] > 32 and found["verify/tokens"] > 500  # of both sides
    assert abs(found["verify/mean_kl"]) < (1e-2 if "sampled" not in kind and kind != "draws" else 0.2)
    assert "verify/mean_kl" in capsys.readouterr().out


def shuffled(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(values)


def others(ids: np.ndarray) -> np.ndarray:
    """Each token another, those of a row still distinct."""
    return (ids + 17) % 62


CHANGED: dict[str, Callable[[Path], None]] = {
    "sampled": lambda shard: change_numbers(shard, "ids", 6, others),
    "topk": lambda shard: change_numbers(shard, "ids", 6, others),
    "full": lambda shard: change_column(shard, "log_probs", shuffled),
    "hidden": lambda shard: change_column(shard, "hidden", shuffled),
    "draws": lambda shard: change_numbers(shard, "ids", 6, others),
}


@pytest.mark.parametrize("side", ["train", "held_out"])
@pytest.mark.parametrize("kind", CHANGED)
def test_verify_finds_targets_that_were_changed_consistently(
    kind: str, side: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing but the live teacher can tell: every checksum fits, and every row is a distribution."""
    folder = copy_of(caches(kind), tmp_path / "cache")
    for shard in (folder / side).glob("shard-*"):
        CHANGED[kind](shard)
    lines = refused(lambda: cache_module.verify(cache_config(tiny_command, folder, *KINDS[kind])))
    assert "nats away from what was written" in lines or "nats per token away from what was written" in lines


@contextmanager
def another_text_scored_for(number: int) -> Iterator[None]:
    """The builder is told the targets of another text for one sequence of each side."""
    original = OnlineTeacher.__call__

    def deceived(self: OnlineTeacher, batch: Batch) -> DenseTargets:
        ids, wrong = batch.input_ids.clone(), batch.row_ids == number
        ids[wrong] = (ids[wrong] + 7) % 62
        return original(self, dataclasses.replace(batch, input_ids=ids))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineTeacher, "__call__", deceived)
        yield


ONE_WRONG = {kind: KINDS[kind] for kind in ("topk", "full", "hidden")} | {
    "hidden in bfloat16": VERIFIED["hidden in bfloat16"],
    "sampled": ["cache.kind=sampled", "cache.k=64"],
    "draws": ["cache.kind=sampled", "cache.k=200", "cache.sampling=draws"],
}


@pytest.mark.parametrize("kind", ONE_WRONG)
def test_verify_finds_a_single_sequence_of_another_text(kind: str, tiny_command: list[str], tmp_path: Path) -> None:
    """The mean over all sequences hid it: worst_kl was 12, and the cache was called good."""
    command = [*without(tiny_command, "data.seq_len"), "data.seq_len=16", "data.eval_fraction=0"]
    with another_text_scored_for(5):
        build(command, tmp_path / "cache", *ONE_WRONG[kind])
    line = refused(lambda: cache_module.verify(cache_config(command, tmp_path / "cache", *ONE_WRONG[kind], "cache.num_verify=1000")))
    assert re.search(r"train/shard-00000: the live teacher is [\d.]+ nats away from what was written of sequence 5\. Delete", line)


# ------------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("kind", ["sampled"])
def test_a_run_from_a_cache_that_was_stopped_goes_on_to_the_bit(
    kind: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    command = [*from_cache(tiny_command, caches(kind)), "trainer.save_every=1"]
    run(command, tmp_path / "undisturbed")
    for step in (3, 5):
        with before_step(step, crash), pytest.raises(Crash):
            run(command, tmp_path / "run")
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")


def test_a_run_does_not_go_on_from_another_cache(tiny_command: list[str], tmp_path: Path) -> None:
    command = from_cache(tiny_command, tmp_path / "cache")
    build(tiny_command, tmp_path / "cache", *KINDS["sampled"])
    with before_step(4, send(signal.SIGTERM)), pytest.raises(Preempted):
        run(command, tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    build(tiny_command, tmp_path / "cache", *KINDS["sampled"], "cache.seed=1")
    line = refused(lambda: run(command, tmp_path / "run"), MiniDistillError)
    assert "cache: got" in line and "the run to be resumed has" in line


# ------------------------------------------------------------------------------------------------------------ the command line


def cache_process(arguments: list[str], torchrun: int = 0) -> subprocess.Popen[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    command = [sys.executable, *start, "-m", "mini_distill.cache", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_command_ends_in_exit_code_and_one_line(tmp_path: Path) -> None:
    process = cache_process(["info", f"cache.dir={tmp_path}"])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 5 and output == "", errors
    assert errors == f"error: {tmp_path}: no cache of teacher targets. Build it: python -m mini_distill.cache cache.dir=….\n"


@pytest.mark.slow
def test_every_verb_works_from_the_command_line(tiny_command: list[str], tmp_path: Path) -> None:
    arguments = [*cache_command(tiny_command), f"cache.dir={tmp_path / 'cache'}", *SMALL]
    looks = [*cache_command(tiny_command), f"cache.dir={tmp_path / 'cache'}"]
    for verb, given, words in (
        ([], arguments, "Train from it"),
        (["build"], arguments, "Train from it"),
        (["verify"], looks, "verify/mean_kl"),
        (["info"], looks[-1:], "whole"),
    ):
        process = cache_process([*verb, *given])
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and words in output, errors
    process = cache_process(["verify", *arguments, "cache.k=9"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5 and "Traceback" not in errors, errors
    assert errors.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'cache'}: cache.k: the cache has 8, this run 9.")


def test_settings_of_the_command_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["teacher=none", "cache.kind=full", "cache.k=3", "cache.proposal=0.5"], "cache", CacheCommand)
    assert {problem.where for problem in caught.value.problems} >= {"cache.dir", "teacher", "cache.k", "cache.proposal"}
    assert report(caught.value) == 2
    assert dataclasses.is_dataclass(load_config(["cache.dir=x"], "cache", CacheCommand))


@pytest.mark.slow
def test_torchrun_builds_as_one_process_and_its_end_is_one_line(
    tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = [*cache_command(tiny_command), f"cache.dir={tmp_path / 'cache'}", *SMALL]
    process = cache_process(arguments, torchrun=2)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert content(tmp_path / "cache") == content(caches("small"))
    process = cache_process([*arguments, "cache.k=9"], torchrun=2)
    _, errors = process.communicate(timeout=200)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and any("cache.k: the cache has 8, this run 9" in line for line in lines), errors


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2])
def test_sigterm_to_the_command_ends_in_143_and_one_line(torchrun: int, tiny_command: list[str], tmp_path: Path) -> None:
    corpus = tmp_path / "long.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"the cat {i} sat on a mat and saw two birds " * 5}) + "\n" for i in range(4000)))
    arguments = [*cache_command(tiny_command), f"data.path={corpus}", f"cache.dir={tmp_path / 'cache'}", *SMALL]
    process = cache_process(arguments, torchrun)
    for _ in range(1200):
        if list((tmp_path / "cache" / "train").glob("shard-*")):
            break
        assert process.poll() is None, process.communicate()
        signal.sigtimedwait([], 0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    stopped = [line for line in errors.splitlines() if "stopped by SIGTERM; finished shards stay" in line]
    assert len(stopped) == max(1, torchrun) and (torchrun or process.returncode == 143), errors
    assert torchrun or "Traceback" not in errors
