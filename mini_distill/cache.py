"""Score a corpus with the teacher once, and train students from it as often as wished.

python -m mini_distill.cache teacher=… data=… cache.dir=…            build, or go on building
python -m mini_distill.cache verify teacher=… data=… cache.dir=…     score a random sample again with the live teacher
python -m mini_distill.cache info cache.dir=…                        what it is
python -m mini_distill.train teacher=cached teacher.cache_dir=… …    train from it
python -m mini_distill.train teacher.cache_kind=hidden …             build it, unless another run has, and train from it
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

    import sys

    from mini_distill.cli import run_command
    from mini_distill.config import CacheCommand

    action = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in ("build", "verify", "info") else "build"
    run_command(f"mini_distill.cache:{action}", config_name="cache", schema=CacheCommand)

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
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import CacheCommand, Config
from .data.order import Stream
from .data.prepare import prepare_data
from .data.tokenizers import tokenizer_fingerprint, vocabulary_size
from .distillation import check_vocabulary, naming_the_process, start_processes
from .errors import CacheError, Preempted
from .folder_lock import FolderLock
from .losses.divergences import forward_kl
from .losses.linear import TeacherRows
from .losses.reduction import loss_mask
from .losses.sparse import SMALLEST_TAIL, SampledRows, TopKRows
from .models.head import embedding_rows
from .models.identity import model_identity
from .models.packed_documents import check_documents_kept_apart
from .run import CallableCache
from .storage import atomic_write_text, size_text, verify_folder
from .targets import cache_command
from .teachers.cache_build import CacheBuilder
from .teachers.cache_identity import identity, read_description, write_description
from .teachers.cached import CachedTeacher, open_side
from .teachers.load import load_teacher, load_teacher_tokenizer, teacher_path
from .teachers.online import OnlineTeacher
from .teachers.server import ServerTeacher, open_server
from .training.signals import StopRequest


def build(config: CacheCommand, wait: bool = False) -> dict[str, Any]:
    """Score what is not scored yet, and describe the whole.

    Args:
        config: What to ask whom, and where to write it.
        wait: For another process that builds there, instead of refusing.

    Returns:
        The summary, also in `<cache.dir>/summary.json`: tokens, bytes per token on disk, captured mass, seconds.

    Raises:
        MiniDistillError: any problem that is the user's to mend.
        Preempted: SIGTERM or Ctrl-C; finished shards stay.
    """
    folder = _folder(config)
    with naming_the_process(), StopRequest() as stop, ExitStack() as held:
        accelerator = start_processes(config.precision, config.num_threads)
        builder, wanted, facts = _prepare(config, accelerator, stop)
        if accelerator.is_main_process:
            builder.check_space(0)
            held.enter_context(FolderLock(folder, builder.check_stop if wait else None))  # another builder gets one line
            builder.describe(wanted, facts, load_teacher_tokenizer(config.teacher))
        accelerator.wait_for_everyone()
        description = read_description(folder)
        sides = {name: open_side(folder, description, name) for name in description["sides"]}
        predicted = builder.predict(sides)
        if accelerator.is_main_process:
            print(_prediction(predicted, config), flush=True)
            builder.check_space(predicted["cache/predicted_bytes"] - _bytes_on_disk(folder))
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        own = builder.build(sides, show_progress=accelerator.is_main_process)
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
    if not broadcast_object_list([accelerator.is_main_process and _is_whole(_folder(command))])[0]:  # the main process decides for all
        build(command, wait=True)


def _is_whole(folder: Path) -> bool:
    try:
        description = read_description(folder)
    except CacheError:
        return False
    return description["complete"] and not any(open_side(folder, description, side).damaged() for side in description["sides"])


def verify(config: CacheCommand) -> dict[str, float]:
    """Score a random sample of each side again with the live teacher, and compare it with what the cache gives.

    Returns:
        `verify/mean_kl` and `verify/worst_kl` in nats per token: of the live teacher from the cached distribution (full, hidden), from
        what is listed of it (topk); for sampled, of the mean over the sample from the expectation, with the standard error.

    Raises:
        CacheError: the cache is damaged, of something else, or far from the live teacher.
    """
    folder = _folder(config)
    with StopRequest() as stop:
        accelerator = start_processes(config.precision, config.num_threads)
        builder, wanted, _ = _prepare(config, accelerator, stop)
        differences, sequences = torch.zeros(0), 0
        for side, stream in builder.streams.items():
            cached = CachedTeacher(folder, wanted, side)
            numbers = np.random.default_rng(config.cache.seed).permutation(len(stream))[: config.cache.num_verify].tolist()
            temperature = 1.0 if side == "held_out" else config.cache.temperature  # the evaluation's is always 1
            differences = torch.cat([differences, *(_differences(builder, cached, stream, number, temperature) for number in numbers)])
            sequences += len(numbers)
    found = {
        "verify/sequences": float(sequences),
        "verify/tokens": float(len(differences)),
        "verify/mean_kl": differences.mean().item(),
        "verify/worst_kl": differences.abs().max().item(),
        "verify/standard_error": (differences.std() / len(differences) ** 0.5).item(),
    }
    print("\n".join(f"{name:<24} {value:.4g}" for name, value in found.items()))
    tolerance = 4 * found["verify/standard_error"] + 1e-3 if builder.config.kind == "sampled" else 0.01
    if not abs(found["verify/mean_kl"]) <= tolerance:
        what = f"the live teacher is {found['verify/mean_kl']:.3g} nats per token away from what was written (expected at most {tolerance:.2g})"
        raise CacheError(str(folder), what, "Build the cache again in another folder.")
    return found


def info(config: CacheCommand) -> dict[str, Any]:
    """Print what the cache is, and whether it is whole."""
    folder = _folder(config)
    description = read_description(folder)
    print(json.dumps({key: description[key] for key in ("cache", "teacher", "sides", "identity")}, indent=2, ensure_ascii=False))
    damaged = [
        f"{side}/{number}: {problem}"
        for side in description["sides"]
        for number, problem in open_side(folder, description, side).damaged().items()
    ]
    besides = ["tokenizer", *(["head"] if description["cache"]["kind"] == "hidden" else [])]
    damaged += [f"{name}: {problem}" for name in besides for problem in verify_folder(folder / name)[:1]]
    summary = description.get("summary", {})
    print(
        f"{folder}: {size_text(_bytes_on_disk(folder))}" + (f", {summary['cache/bytes_per_token']:.1f} bytes per token" if summary else "")
    )
    print("whole" if not damaged else f"{len(damaged)} parts missing or damaged, the first: {damaged[0]}")
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


def _prediction(predicted: dict[str, float], config: CacheCommand) -> str:
    minutes = predicted["cache/predicted_seconds"] / 60
    return (
        f"{predicted['cache/tokens']:,.0f} tokens, kind {config.cache.kind}: about {predicted['cache/predicted_bytes_per_token']:.1f} bytes per token, "
        f"{size_text(predicted['cache/predicted_bytes'])}, {minutes:.1f} minutes; "
        f"{100 * predicted['cache/captured_mass']:.1f} % of the probability is listed exactly."
    )


def _finish(folder: Path, description: dict[str, Any], predicted: dict[str, float], scored: int, seconds: float) -> dict[str, Any]:
    """The description with its figures; a build that found all shards in place keeps those of the build that made them."""
    if scored == 0 and description["complete"]:
        return description["summary"]
    size = _bytes_on_disk(folder)
    train = sum(file.stat().st_size for file in (folder / "train").rglob("*.npy"))
    tokens = sum(int(np.load(file, mmap_mode="r")[-1]) for file in (folder / "train").rglob("starts.npy"))
    summary = {
        **predicted,
        "cache/bytes": size,
        "cache/bytes_per_token": train / max(1, tokens),
        "cache/seconds": seconds,
        "cache/scored_sequences": scored,
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


def _differences(builder: CacheBuilder, cached: CachedTeacher, stream: Stream, number: int, temperature: float) -> Tensor:
    """How far the live teacher is from what was written of one sequence, per token, in nats."""
    batch = stream.batch([number]).to(builder.teacher.device)
    with torch.no_grad(), builder.autocast():
        live: TeacherRows = builder.teacher(batch)
        tokens = int(loss_mask(batch.labels).sum())
        logits = live.rows(slice(0, tokens), builder.vocab_size)
        rows = cached(batch).rows(slice(0, tokens), builder.vocab_size)
        if isinstance(logits, TopKRows):  # of a server, of which the cache lists no more
            logits = _spread(logits, builder.vocab_size)
        if isinstance(rows, TopKRows):
            rows = replace(rows, spread=False)  # a spread tail is far from the teacher's, and meant to be
        if isinstance(rows, SampledRows | TopKRows):
            return rows.compare("forward_kl", forward_kl, (logits / temperature).log_softmax(-1), {}).cpu()
        return forward_kl(logits, rows, temperature).cpu()


def _spread(rows: TopKRows, vocab_size: int) -> Tensor:
    """Log-probabilities of the whole vocabulary, those that are not listed alike."""
    rest = (rows.tail.clamp(min=SMALLEST_TAIL) / max(1, vocab_size - rows.ids.shape[1])).log()[:, None]
    return rest.repeat(1, vocab_size).scatter(-1, rows.ids, rows.log_probs)


sys.modules[__name__].__class__ = CallableCache  # import mini_distill as md; md.cache(["cache.dir=targets"])
