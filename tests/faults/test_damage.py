"""Damaged files of every kind: named, skipped or made again, and never used as if nothing were wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from caches import from_cache
from runs import before_step, checked, checkpoint_steps, copy_of, fork, forks, run, status, wait
from torch import Tensor

from faults.record import record
from faults.twins import Twins, crash_before
from mini_distill.data.order import Stream
from mini_distill.data.prepare import prepare_data
from mini_distill.digest import digest_run
from mini_distill.errors import DataError, MiniDistillError, StorageError
from mini_distill.models.loading import load_causal_lm, load_tokenizer
from mini_distill.run import Run
from mini_distill.storage import MANIFEST, verify_folder
from mini_distill.teachers.cache_identity import read_description
from mini_distill.teachers.cached import CachedTeacher
from mini_distill.training.checkpoint import Checkpoints

FLIPS = 6
"""Bits that are flipped in each file, one at a time, at seeded places."""


@dataclass
class Store:
    """Something on disk that is read back.

    Attributes:
        folder: Where it lies, whole.
        part: The folder within it whose files are damaged.
        use: Reads all of it from a folder and gives a digest of what it got; raises MiniDistillError where it refuses.
        mends: Reading warns and takes, or makes, another; else it raises.
    """

    folder: Path
    part: str
    use: Callable[[Path], str]
    mends: bool = False


def digest_of(*values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()


def tensors_of(tensors: dict[str, Any]) -> list[bytes]:
    values = {name: value for name, value in sorted(tensors.items()) if isinstance(value, Tensor)}
    return [name.encode() + tensor.contiguous().double().numpy().tobytes() for name, tensor in values.items()]


def use_checkpoint(folder: Path) -> str:
    found = Checkpoints(folder, keep=9).newest()
    assert found is not None
    return digest_of(found.step, found.state, *(part for name in found.names for part in tensors_of(found.tensors(name))))


def use_student(folder: Path) -> str:
    tokenizer, model = load_tokenizer(str(folder)), load_causal_lm(str(folder))
    settings = (model.config.to_json_string(), model.generation_config)
    return digest_of(sorted(tokenizer.get_vocab().items()), *settings, *tensors_of(model.state_dict()))


def use_cache(data: Any, folder: Path) -> str:
    """The targets of every sequence of both sides, and the tokenizer."""
    parts: list[Any] = [sorted(load_tokenizer(str(folder / "tokenizer")).get_vocab().items()), read_description(folder)["teacher"]]
    sides: dict[str, Stream] = {"train": data.train, "held_out": data.held_out}
    for side, stream in sides.items():
        teacher, batch = CachedTeacher(folder, {}, side), stream.batch(list(range(len(stream))))
        targets = teacher(batch)
        about = teacher.about_teacher(batch) or {} if side == "held_out" else {}
        parts += [targets.rows(slice(None)).numpy().tobytes()] if teacher.is_dense else tensors_of(vars(targets)) + tensors_of(about)
    return digest_of(*parts)


def use_tokens(command: list[str], folder: Path) -> str:
    """As a run reads them; they are made again where they are damaged."""
    config = copy.deepcopy(checked(tuple(command)))
    config.data.cache_dir = str(folder)
    prepared = prepare_data(config.data, load_tokenizer(str(config.teacher.path)), show_progress=False)
    assert prepared.held_out is not None
    batches = [stream.batch(list(range(len(stream)))) for stream in (prepared.train, prepared.held_out)]
    return digest_of(prepared.report, *(value.numpy().tobytes() for batch in batches for value in vars(batch).values()))


@pytest.fixture(scope="module")
def stores(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Store]:
    """A store of each kind, whole."""
    made = tmp_path_factory.mktemp("stores")

    def store(kind: str) -> Store:
        command = twins.command("plain")
        if kind == "checkpoint":
            return Store(twins.undisturbed("plain") / "checkpoints", "step-00000006", use_checkpoint, mends=True)
        if kind == "student":
            return Store(twins.undisturbed("plain") / "student", "", use_student)
        if kind == "tokens":
            use_tokens(command, made / "tokens")
            (part,) = [file.parent.relative_to(made / "tokens") for file in (made / "tokens").rglob(MANIFEST)]
            return Store(made / "tokens", str(part), lambda folder: use_tokens(command, folder), mends=True)
        config = checked(tuple(command))
        data = prepare_data(config.data, load_tokenizer(str(config.teacher.path)), show_progress=False)
        return Store(twins.cache(kind.split()[0]), "", lambda folder: use_cache(data, folder))

    return store


# ------------------------------------------------------------------------------------------------------------------- every damage


def damages(file: Path, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What may happen to a file, and its content afterwards; None: it is gone."""
    content = file.read_bytes()
    yield "deleted", None
    yield "emptied", b""
    yield "cut", content[: draw.randrange(len(content))]
    yield "longer", content + bytes([draw.randrange(256)])
    for _ in range(FLIPS):
        place, flipped = draw.randrange(len(content)), bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield f"bit in byte {place}", bytes(flipped)


def what_happens(store: Store, file: Path, content: bytes | None, wanted: str, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """How a damage is met: refused, mended with a warning, harmless (what is read is the same), or silent."""
    damaged = copy_of(store.folder, folder) / file
    damaged.unlink() if content is None else damaged.write_bytes(content)
    caplog.clear()
    try:
        found = store.use(folder)
    except MiniDistillError as error:
        return "refused" if "\n" not in str(error) else "silent"
    warned = any("damaged" in entry.getMessage() or "damaged" in entry.message for entry in caplog.records)
    if store.mends and warned:
        return "mended"
    return "harmless" if found == wanted else "silent"


def damage_many(store: Store, folder: Path, caplog: pytest.LogCaptureFixture, most: int) -> Counter[str]:
    """What came of each damage to each file of a store, or of as many as `most`, drawn by lot."""
    caplog.set_level(logging.WARNING)
    wanted, outcomes = store.use(copy_of(store.folder, folder / "whole")), Counter[str]()
    draw = random.Random(0)
    files = sorted(file.relative_to(store.folder) for file in (store.folder / store.part).rglob("*") if file.is_file())
    cases = [(file, *damage) for file in files if file.name not in UNREAD for damage in damages(store.folder / file, draw)]
    for file, damage, content in cases if len(cases) <= most else draw.sample(cases, most):
        outcome = what_happens(store, file, content, wanted, folder / "damaged", caplog)
        outcomes[outcome] += 1
        assert outcome != "silent", (file, damage)
        assert outcome != "harmless" or file.name in MAY_BE_HARMLESS, (file, damage)
        shutil.rmtree(folder / "damaged")
    return outcomes


UNREAD = {"summary.json"}
"""For people: nothing is computed from it."""
MAY_BE_HARMLESS = {MANIFEST, "cache.json", ".lock"}
"""White space between values, or the manifest of a student gone: what is read is the same."""
STORES = ("checkpoint", "student", "tokens", "sampled cache", "topk cache", "full cache", "hidden cache")


def note(kind: str, outcomes: Counter[str]) -> None:
    total = sum(outcomes.values())
    record(
        f"damaged files: {kind}",
        injected=total,
        fired=total,
        **{name: outcomes[name] for name in ("refused", "mended", "harmless", "silent")},
    )


@pytest.mark.parametrize("kind", ["checkpoint", "student", "tokens", "sampled cache"])
def test_some_damage_to_files_is_never_silent(
    kind: str, stores: Callable[[str], Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = damage_many(stores(kind), tmp_path, caplog, most=8)
    note(kind, outcomes)
    assert outcomes["refused"] + outcomes["mended"] > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", STORES)
def test_no_damage_to_any_file_is_silent(
    kind: str, stores: Callable[[str], Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = damage_many(stores(kind), tmp_path, caplog, most=150)
    note(kind, outcomes)
    assert outcomes["refused"] + outcomes["mended"] > 30


# ------------------------------------------------------------------------------------------------- links, strangers, other folders


def link_out_of_the_folder(part: Path) -> None:
    """The same bytes, from a file that anybody may change."""
    file = next(
        file for file in sorted(part.rglob("*")) if file.is_file() and file.name not in (MANIFEST, ".lock", "cache.json", "summary.json")
    )
    outside = part.parent.parent / "outside"
    shutil.move(file, outside)
    os.symlink(outside, file)


def name_a_file_outside(part: Path) -> None:
    """Which would have the right checksum."""
    (part.parent / "x").write_bytes(b"")
    for file in part.rglob(MANIFEST):
        content = json.loads(file.read_bytes())
        content["files"]["../x"] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("change", [link_out_of_the_folder, name_a_file_outside])
@pytest.mark.parametrize("kind", ["checkpoint", "student", "tokens", "sampled cache"])
def test_nothing_outside_a_folder_is_read(
    kind: str, change: Callable[[Path], None], stores: Callable[[str], Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = stores(kind)
    folder = copy_of(store.folder, tmp_path / "a" / "b")
    change(folder / store.part)
    with caplog.at_level(logging.WARNING):
        try:
            store.use(folder)
            said = caplog.text if store.mends else ""
        except MiniDistillError as error:
            said = str(error)
    assert "leaves the folder" in said or "names a file outside" in said
    record("links and names that leave a folder", injected=1, fired=1, refused=1)


@pytest.mark.parametrize("kind", ["checkpoint", "student", "tokens", "sampled cache"])
def test_what_a_killed_process_left_beside_is_in_nobodys_way(kind: str, stores: Callable[[str], Store], tmp_path: Path) -> None:
    store = stores(kind)
    folder = copy_of(store.folder, tmp_path / "store")
    wanted = store.use(folder)
    for beside in {(folder / store.part).parent, folder} - {tmp_path}:
        stray = beside / ".tmp-step-00000009-4000000-0a"
        stray.mkdir()
        (stray / "model.safetensors").write_bytes(b"half of it")
    assert store.use(folder) == wanted
    record("stray temporary folders", injected=1, fired=1, exact=1)


# ------------------------------------------------------------------------------------------------------ pipes, devices and folders


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_device(file: Path) -> None:
    os.symlink("/dev/zero", file)


INSTEAD: list[Callable[[Path], None]] = [a_pipe, a_device, Path.mkdir]
OF_A_RUN = ("metrics.jsonl", "status.json", "config.yaml", "summary.json", ".lock", "checkpoints/step-00000006/state.json")


@forks
@pytest.mark.timeout(60)
@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("name", OF_A_RUN)
def test_what_is_no_file_in_place_of_a_runs_file_hangs_nobody(
    name: str,
    instead: Callable[[Path], None],
    twins: Twins,
    tmp_path: Path,
    undisturbed: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A run whose metrics.jsonl was a pipe waited for ever for somebody to write into it."""
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    instead(folder / name)
    code = seconds_limited(lambda: run(twins.command("plain"), folder))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (6, 1)), (code, lines)
    assert code == 0 or (str(folder / name) in lines[0] and ("not a regular file" in lines[0] or "Is a directory" in lines[0])), lines
    readers: list[Callable[[], object]] = [lambda: Run(folder).metrics, lambda: Run(folder).summary, lambda: Run(folder).status]
    for reader in [*readers, lambda: digest_run(folder), lambda: Checkpoints(folder / "checkpoints", 2).newest()]:
        assert seconds_limited(reader) in (0, 2, 6)
    record("pipes, devices and folders instead of files", injected=1, fired=1, **{"refused" if code else "mended": 1})


def seconds_limited(body: Callable[[], object]) -> int:
    """How `body` ends in a process of its own, which is killed after ten seconds."""
    child = fork(lambda: (signal.alarm(10), body()))
    return wait(child)


@forks
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["cache.json", "MANIFEST.json"])
def test_a_pipe_in_place_of_a_caches_file_hangs_nobody(name: str, tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    for file in list(small.rglob(name)):
        file.unlink()
        os.mkfifo(file)
    assert seconds_limited(lambda: run(from_cache(tiny_command, small), tmp_path / "run")) in (4, 5)
    record("pipes, devices and folders instead of files", injected=1, fired=1, refused=1)


# ---------------------------------------------------------------------------------------------------------------------- whole runs


def test_damaged_newest_checkpoint_is_skipped_and_the_end_is_the_same(
    twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    command = twins.command("plain")
    crash_before(5, command, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        run(command, tmp_path / "run")
    assert "step-00000004" in caplog.text and "skipped" in caplog.text
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))
    record("damaged newest checkpoint, the run goes on", injected=1, fired=1, exact=1)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zeroed(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(256)
        opened.write(bytes(file.stat().st_size - 256))


@pytest.mark.parametrize("damage", [cut_short, zeroed])
@pytest.mark.parametrize(("kind", "side"), [("plain", "train"), ("workers", "train"), ("evaluation", "held_out")])
def test_tokens_that_change_while_a_run_reads_them_end_it_before_the_next_update(
    kind: str, side: str, damage: Callable[[Path], None], twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """Half of the file was gone: zeros were trained on to the end, and the next run ended with other numbers."""
    command = [*twins.command(kind), f"data.cache_dir={tmp_path / 'tokens'}"]

    def harm() -> None:
        (file,) = (tmp_path / "tokens").rglob(f"{side}.tokens.npy")
        damage(file)

    with before_step(2, harm), pytest.raises(DataError, match="no longer what was written") as caught:
        run(command, tmp_path / "run")
    assert caught.value.exit_code == 3 and len(caught.value.problems) == 1
    assert status(tmp_path / "run")["exit_code"] == 3 and checkpoint_steps(tmp_path / "run")[-1] < 6
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed(kind))
    record("tokens changed while a run reads them", injected=1, fired=1, exact=1)


def test_run_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(tiny_command: list[str], tmp_path: Path) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(StorageError, match="resume=never"):
        run(tiny_command, tmp_path / "run")


METRICS: dict[str, Callable[[list[str]], list[str] | None]] = {
    "deleted": lambda lines: None,
    "emptied": lambda lines: [],
    "a row gone": lambda lines: [*lines[:2], *lines[3:]],
    "a digit changed": lambda lines: [lines[0], lines[1].replace("0.", "1.", 1), *lines[2:]],
    "a row twice": lambda lines: [*lines[:2], lines[1], *lines[2:]],
}


@pytest.mark.parametrize("damage", METRICS)
def test_a_run_whose_rows_are_not_those_it_wrote_does_not_go_on_silently(
    damage: str, twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Without its metrics.jsonl, or a row of it, a run went on and ended with 0, and rows were missing for ever."""
    command, file = twins.command("plain"), tmp_path / "run" / "metrics.jsonl"
    crash_before(5, command, tmp_path / "run")
    whole = file.read_text()
    changed = METRICS[damage](whole.splitlines(keepends=True))
    file.unlink() if changed is None else file.write_text("".join(changed))
    for _ in range(2):  # the refusal changes nothing that would let the next start pass
        with pytest.raises(StorageError, match=r"metrics\.jsonl: .* the run had written.* resume_allow=\[metrics\]"):
            run(command, tmp_path / "run")
    copy = copy_of(tmp_path / "run", tmp_path / "copy")
    with caplog.at_level(logging.WARNING):
        run(command, copy, "resume_allow=[metrics]")
    assert "the run goes on with what is there" in caplog.text and status(copy)["state"] == "finished"
    file.write_text(whole)
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))
    record("damaged metrics.jsonl", injected=1, fired=1, refused=1)


def test_where_the_row_of_the_best_step_is_gone_its_figures_are_measured_again(twins: Twins, tmp_path: Path) -> None:
    command = [*twins.command("evaluation"), "evaluation.best_is=highest"]  # an early step is the best
    crash_before(6, command, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    found = run(command, tmp_path / "run", "resume_allow=[metrics]")
    wanted = run(command, tmp_path / "undisturbed")
    assert found["train/exported_step"] < 5 and found["eval/student_nll"] == wanted["eval/student_nll"]


def test_a_run_whose_checkpoints_are_gone_is_not_silently_begun_anew(
    twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """Weeks of training were begun anew at step 0, without a word."""
    command = twins.command("plain")
    crash_before(2, command, tmp_path / "run")  # one step has been saved, a moment ago
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"checkpoints: no checkpoint is there, and the run has saved step 1\. .*resume=never"):
        run(command, tmp_path / "run")
    shutil.move(tmp_path / "elsewhere", tmp_path / "run" / "checkpoints")
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))
    record("checkpoints of a run gone", injected=1, fired=1, refused=1)


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_anew(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    command = [*tiny_command, "trainer.save_every=null"]
    crash_before(4, command, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run(command, tmp_path / "run")
    assert "stopped after step 3, before its first checkpoint, and begins anew" in caplog.text
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


@pytest.mark.parametrize("name", ["student/model.safetensors", "student/tokenizer.json", "summary.json"])
def test_a_damaged_result_of_a_finished_run_is_written_again(
    name: str, twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """The same command said that there was nothing to do, and a student with a flipped bit went on being used."""
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 2]) if "student" in name else before[: len(before) // 2])
    run(twins.command("plain"), folder)
    assert not verify_folder(folder / "student") and digest_run(folder) == digest_run(undisturbed("plain"))
    assert json.loads((folder / "summary.json").read_bytes())["train/steps"] == 6
    record("damaged results of a finished run", injected=1, fired=1, mended=1)
