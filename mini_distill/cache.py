"""Score a corpus with the teacher once, and train students from it as often as wished.

python -m mini_distill.cache teacher=… data=… cache.dir=…            build, or go on building
python -m mini_distill.cache verify teacher=… data=… cache.dir=…     score a random sample again with the live teacher, and compare
python -m mini_distill.cache info cache.dir=…                        what it is, and what of it is missing or damaged
python -m mini_distill.train teacher=cached teacher.cache_dir=… …    train from it
python -m mini_distill.train teacher.cache_kind=hidden …             build it, unless another run has, and train from it
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

    import sys

    from mini_distill.cli import run_command
    from mini_distill.config import CacheCommand, CacheLookCommand

    action = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in ("build", "verify", "info") else "build"
    run_command(f"mini_distill.cache:{action}", config_name="cache", schema=CacheCommand if action == "build" else CacheLookCommand)

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from .config import CacheCommand, CacheConfig, Config
from .data.order import Stream
from .data.prepare import prepare_data
from .data.tokenizers import tokenizer_fingerprint, vocabulary_size
from .errors import CacheError, ConfigError, Preempted, Problem
from .folder_lock import FolderLock
from .models.head import embedding_rows
from .models.identity import model_identity
from .models.packed_documents import check_documents_kept_apart
from .run import CallableCache
from .storage import atomic_write_text, size_text
from .targets import cache_command
from .teachers.cache_build import CacheBuilder
from .teachers.cache_files import Side
from .teachers.cache_forecast import effort
from .teachers.cache_identity import identity, read_description, write_description
from .teachers.cache_verify import EXACT, ROUNDED, ScoredAgain, figures, how_far, refuse_what_is_far
from .teachers.cached import REBUILD, CachedTeacher, damaged_parts, open_side
from .teachers.load import check_vocabulary, load_teacher, load_teacher_tokenizer, teacher_path
from .teachers.online import OnlineTeacher
from .teachers.server import ServerTeacher, open_server
from .training.process_group import ending_together, start_processes
from .training.signals import StopRequest


def build(config: CacheCommand, wait: bool = False) -> dict[str, Any]:
    """Score what is not scored yet, and describe the whole.

    Args:
        config: What to ask whom, and where to write it.
        wait: For another process that builds there, instead of refusing.

    Returns:
        The summary, also in `<cache.dir>/summary.json`: tokens, bytes per token on disk, captured mass; what was predicted; the seconds
        and scored sequences of the build that finished it and of all that mended it since.

    Raises:
        MiniDistillError: any problem that is the user's to mend.
        Preempted: SIGTERM or Ctrl-C; finished shards stay.
    """
    folder = _folder(config)
    with ending_together(), StopRequest() as stop, ExitStack() as held:
        with stop.at_once():
            accelerator = start_processes(config.precision, config.num_threads)
        builder, wanted, facts = _prepare(config, accelerator, stop)
        if accelerator.is_main_process:
            builder.check_space(0)
            held.enter_context(FolderLock(folder, builder.check_stop if wait else None))  # another builder gets one line
            builder.describe(wanted, facts, load_teacher_tokenizer(config.teacher))
        accelerator.wait_for_everyone()
        description = read_description(folder)
        sides = {name: open_side(folder, description, name) for name in description["sides"]}
        missing = {name: side.damaged() for name, side in sides.items()} if accelerator.is_main_process else {}
        left: dict[str, dict[int, str]] = broadcast_object_list([missing])[0]  # one reader of it all, one opinion
        if description["complete"] and not any(left.values()):
            if accelerator.is_main_process:
                print(f"Nothing is left to be scored.\n{_result(folder, description['summary'])}")
            return description["summary"]
        predicted = _predict(builder, sides, left, accelerator.num_processes) if accelerator.is_main_process else {}
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        own = builder.build(sides, left, show_progress=accelerator.is_main_process)
        scored = int(accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").item())
        seconds = time.perf_counter() - started
        summary: dict[str, Any] = {}
        if accelerator.is_main_process:
            summary = _finish(folder, description, predicted, scored, seconds)
            print(_result(folder, summary))
        accelerator.wait_for_everyone()
        return summary


def write_targets(config: Config) -> None:
    """The cache of a run with `teacher.cache_kind`, unless it is there and whole.

    Runs that want the same one at the same time, such as the jobs of a sweep, wait for the first of them.

    Raises:
        MiniDistillError, Preempted: as `build`.
    """
    command = cache_command(config)
    accelerator = start_processes(command.precision, command.num_threads)
    if broadcast_object_list([accelerator.is_main_process and _is_whole(_folder(command))])[0]:  # the main process decides for all
        return
    try:
        build(command, wait=True)
    except ConfigError as error:  # of the cache command's settings; the run has others for them
        raise ConfigError.from_problems(replace(p, where=p.where.replace("cache.", "teacher.cache_")) for p in error.problems) from error


def _is_whole(folder: Path) -> bool:
    try:
        description = read_description(folder)
    except CacheError:
        return False
    return description["complete"] and not damaged_parts(folder, description)


def verify(config: CacheCommand) -> dict[str, float]:
    """Score a random sample of each side again with the live teacher, and compare it with what the cache gives.

    Returns:
        `verify/mean_kl` and `verify/worst_kl` in nats per token: of the live teacher from the cached distribution (full, hidden), from
        what is listed of it (topk); for sampled, of the mean over the sample from the expectation, with the standard error.

    Raises:
        CacheError: the cache is damaged, of something else, or far from the live teacher: on the whole, or in one sequence.
    """
    folder = _folder(config)
    with StopRequest() as stop:
        accelerator = start_processes(config.precision, config.num_threads)
        builder, wanted, _ = _prepare(config, accelerator, stop)
        scored: list[ScoredAgain] = []
        for side, stream in builder.streams.items():
            cached = CachedTeacher(folder, wanted, side)
            numbers = np.random.default_rng(config.cache.seed).permutation(len(stream))[: config.cache.num_verify].tolist()
            temperature = 1.0 if side == "held_out" else config.cache.temperature  # the evaluation's is always 1
            for number in numbers:
                batch = stream.batch([number]).to(builder.teacher.device)
                with builder.autocast():
                    differences = how_far(builder.teacher, cached, batch, builder.vocab_size, temperature)
                scored.append(ScoredAgain(cached.side.locate(number)[0].folder, number, differences))
    found = figures(scored)
    print("\n".join(f"{name:<24} {value:.4g}" for name, value in found.items()))
    is_exact = wanted["teacher"]["dtype"] == "float32" and wanted["scoring"]["precision"] == "no"
    refuse_what_is_far(folder, scored, EXACT if is_exact else ROUNDED, is_sampled=config.cache.kind == "sampled")
    return found


def info(config: CacheCommand) -> dict[str, Any]:
    """Print what the cache is, and whether it is whole.

    Raises:
        CacheError: one problem for each part that is missing or damaged.
    """
    folder = _folder(config)
    description = read_description(folder)
    print(json.dumps({key: description[key] for key in ("cache", "teacher", "sides", "identity")}, indent=2, ensure_ascii=False))
    print(f"{folder}: {size_text(_bytes_on_disk(folder))}")
    if summary := description.get("summary"):
        captured = _captured(CacheConfig(**description["cache"]), summary["cache/captured_mass"])
        print(f"{summary['cache/bytes_per_token']:.1f} bytes per token of the training side; {captured}")
        print(f"{summary['cache/scored_sequences']:,} sequences scored in {summary['cache/seconds']:,.0f} s")
    if damaged := damaged_parts(folder, description):
        raise CacheError.from_problems(Problem(str(part), problem, REBUILD) for part, problem in damaged.items())
    print("whole")
    return description


# --------------------------------------------------------------------------------------------------------------------- preparing


def _folder(config: CacheCommand) -> Path:
    assert config.cache.dir is not None
    return Path(config.cache.dir).expanduser()


def _prepare(config: CacheCommand, accelerator: Accelerator, stop: StopRequest) -> tuple[CacheBuilder, dict[str, Any], dict[str, Any]]:
    """Who scores what, the identity of the result, and what is worth knowing of the teacher."""
    tokenizer = load_teacher_tokenizer(config.teacher)
    teacher, who, facts = _open_teacher(config, accelerator, tokenizer)
    with accelerator.main_process_first():
        data = prepare_data(config.data, tokenizer, show_progress=accelerator.is_main_process)
    streams: dict[str, Stream] = {"train": data.train} | ({"held_out": data.held_out} if data.held_out is not None else {})
    wanted = identity(
        config.cache,
        data=data.fingerprint_parts,
        tokenizer=tokenizer_fingerprint(tokenizer),
        precision=accelerator.mixed_precision,
        teacher=who,
    )
    builder = CacheBuilder(
        _folder(config),
        config.cache,
        teacher,
        streams,
        vocabulary_size(tokenizer),
        partial(_check_stop, stop, _folder(config)),
        accelerator.autocast,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return builder, wanted, facts


def _open_teacher(
    config: CacheCommand, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> tuple[OnlineTeacher | ServerTeacher, dict[str, Any], dict[str, Any]]:
    """The teacher, its part of the identity, and what is worth knowing of it."""
    if (server := open_server(config.teacher, tokenizer)) is not None:
        server.check_length(config.data.seq_len)
        facts: dict[str, Any] = {"name": server.model, "parameters": None, "embedding_rows": None, "positions": server.positions}
        return server, server.identity, facts
    model = load_teacher(config.teacher, accelerator.device)
    assert model is not None
    check_vocabulary(model, tokenizer, "teacher")
    if config.data.packing:
        check_documents_kept_apart(model, "teacher.path")
    facts = {
        "name": teacher_path(config.teacher) if config.teacher.kind == "hf" else "the embedded teacher",
        "parameters": model.num_parameters(),
        "embedding_rows": embedding_rows(model),
        "positions": getattr(model.config.get_text_config(), "max_position_embeddings", 0),
    }
    return OnlineTeacher(model), model_identity(model), facts


def _check_stop(stop: StopRequest, folder: Path) -> None:
    if stop.requested:
        what = f"stopped by {stop.signal_name}; finished shards stay"
        raise Preempted(str(folder), what, "The same command goes on from here.", stop.exit_code or 143)


# --------------------------------------------------------------------------------------------------------------------- reporting


def _predict(builder: CacheBuilder, sides: dict[str, Side], left: dict[str, dict[int, str]], num_processes: int) -> dict[str, float]:
    """Say what the cache will take, and what is left of it; gives the figures of the whole.

    Raises:
        StorageError: there is no space for what is left.
    """
    every = {name: list(range(side.num_shards)) for name, side in sides.items()}
    forecasts = {name: builder.forecast(side, list(left[name]) or every[name]) for name, side in sides.items()}
    whole, to_do = (effort(forecasts, shards, num_processes) for shards in (every, left))
    besides = _bytes_on_disk(builder.folder) - sum(_bytes_on_disk(builder.folder / name) for name in sides)  # the tokenizer, say
    train = effort({"train": forecasts["train"]}, every, 1).num_bytes / max(1, forecasts["train"].tokens)
    tokens, mass = sum(found.tokens for found in forecasts.values()), forecasts["train"].captured_mass
    print(
        f"{tokens:,} tokens, kind {builder.config.kind}: about {train:.1f} bytes per token, {size_text(whole.num_bytes + besides)}, "
        f"{whole.seconds / 60:.1f} minutes; {_captured(builder.config, mass)}.",
        flush=True,
    )
    if to_do.sequences < whole.sequences:
        rest = f"{to_do.sequences:,} of {whole.sequences:,} sequences, {size_text(to_do.num_bytes)}, {to_do.seconds / 60:.1f} minutes"
        print(f"Left to be scored: {rest}.", flush=True)
    builder.check_space(to_do.num_bytes)
    return {
        "cache/tokens": tokens,
        "cache/predicted_bytes_per_token": train,
        "cache/predicted_bytes": whole.num_bytes + besides,
        "cache/predicted_seconds": whole.seconds,
        "cache/captured_mass": mass,
    }


def _captured(cache: CacheConfig, mass: float) -> str:
    """What targets of these settings tell of the teacher's distribution, of which they list so much."""
    share = f"{100 * mass:.1f} % of the probability"
    if cache.kind == "topk":
        return f"the {cache.k} tokens that are listed hold {share}, and of all others the sum is kept"
    if cache.kind == "sampled" and cache.sampling == "threshold":
        return f"the tokens that are always listed hold {share}, and the others are sampled"
    if cache.kind == "sampled":
        return f"the tokens that are drawn hold {share} on average"
    return "every token's probability is kept" + (", rounded to bfloat16" if cache.kind == "full" else "")


def _finish(folder: Path, description: dict[str, Any], predicted: dict[str, float], scored: int, seconds: float) -> dict[str, Any]:
    """The description with its figures; a build that mends a whole cache adds to what that took."""
    before: dict[str, Any] = description.get("summary", {})
    tokens = sum(int(np.load(file, mmap_mode="r")[-1]) for file in (folder / "train").rglob("starts.npy"))
    summary = {
        **predicted,
        **before,
        "cache/bytes": _bytes_on_disk(folder),
        "cache/bytes_per_token": _bytes_on_disk(folder / "train") / max(1, tokens),
        "cache/seconds": before.get("cache/seconds", 0.0) + seconds,
        "cache/scored_sequences": before.get("cache/scored_sequences", 0) + scored,
    }
    atomic_write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_description(folder, description | {"complete": True, "summary": summary})
    return summary


def _result(folder: Path, summary: dict[str, Any]) -> str:
    return (
        f"{size_text(summary['cache/bytes'])} on disk, {summary['cache/bytes_per_token']:.1f} bytes per token of the training side, "
        f"{summary['cache/seconds']:.0f} s.\nTrain from it: python -m mini_distill.train teacher=cached teacher.cache_dir={folder} student=mini_2m …"
    )


def _bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


sys.modules[__name__].__class__ = CallableCache  # import mini_distill as md; md.cache(["cache.dir=targets"])
