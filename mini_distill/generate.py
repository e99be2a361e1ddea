"""A model goes on from the prompts of the data: what the teacher writes becomes the text that a student is trained on.

python -m mini_distill.generate teacher=… data=… output_dir=answers                  write, or go on writing: answers/rows.jsonl
python -m mini_distill.generate model=runs/default                                   a run's student, from the run's own data
python -m mini_distill.train objective=ce data=jsonl data.path=answers/rows.jsonl …  train on it (sequence-level: Kim & Rush 2016)
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.cli import run_command
    from mini_distill.config import GenerateCommand

    run_command("mini_distill.generate:generate", config_name="generate", schema=GenerateCommand)

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import GenerateCommand
from .contract import shown
from .data.prompts import Prompt, Prompts
from .data.tokenizers import tokenizer_fingerprint
from .errors import ConfigError, DataError, Preempted, Problem
from .folder_lock import FolderLock
from .models.generation import complete
from .models.identity import model_identity
from .models.loading import load_causal_lm, load_tokenizer
from .onlooker import bar
from .out_of_memory import memory_errors
from .redaction import redact
from .run import CallableGenerate
from .storage import atomic_folder, atomic_write_text, check_writable, remove_folder, remove_stale_temporaries, verify_folder
from .teachers.load import check_vocabulary, load_teacher, load_teacher_tokenizer
from .training.process_group import ending_together, start_processes
from .training.signals import StopRequest
from .written import read_object

CONFIG, IDENTITY, PARTS, ROWS, SUMMARY = "config.yaml", "identity.json", "parts", "rows.jsonl", "summary.json"
BATCHES_OF_A_PART = 8
"""What is written again when it is interrupted; its prompts are sorted by length into batches."""

logger = logging.getLogger(__name__)


def generate(config: GenerateCommand) -> dict[str, Any]:
    """Write a completion of every prompt, or those that are missing, into `<output_dir>/rows.jsonl`.

    However often it is stopped, the file ends the same, byte for byte: what is drawn depends on the seed and the row, and batches on the
    data and the settings alone.

    Returns:
        The summary, also in `<output_dir>/summary.json`: prompts, rows, tokens, completions cut off and left out, seconds.

    Raises:
        MiniDistillError: any problem that is the user's to mend; a bad row before anything is written.
        Preempted: SIGTERM or Ctrl-C; whole parts stay.
    """
    folder = Path(str(config.output_dir)).expanduser()
    with ending_together(), StopRequest() as stop, ExitStack() as held:
        accelerator = start_processes(config.precision, config.num_threads)
        model, tokenizer = _load(config, accelerator.device)
        prompts = Prompts(config.data, tokenizer, config.generate.prompt_tokens, _room(model, config))
        check_stop = partial(_check_stop, stop, folder)
        share = accelerator.process_index, accelerator.num_processes
        writer = Writer(folder, config, model, tokenizer, prompts, accelerator.autocast, check_stop, *share)
        count = _count(prompts)
        if accelerator.is_main_process:
            check_writable(folder)
            held.enter_context(FolderLock(folder))  # another writer gets one line
            _begin(folder, config, writer.identity(accelerator.mixed_precision))
        accelerator.wait_for_everyone()
        if (summary := _finished(folder)) is None:
            started = time.perf_counter()
            with bar(total=count * config.generate.num_samples, desc="writing", unit=" rows", show=accelerator.is_main_process) as progress:
                writer.write(progress)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                summary = _finish(writer, time.perf_counter() - started)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process and summary is not None:
            if (folder / PARTS).exists():
                remove_folder(folder / PARTS)
            print(_result(folder, config, summary))
        return summary or {}


# ----------------------------------------------------------------------------------------------------------------------- writing


@dataclass
class Writer:
    """Writes the parts of this process.

    Attributes:
        folder: Where.
        config: What is written, and how.
        model: Who writes.
        tokenizer: The model's.
        prompts: From what.
        autocast: The context of forward passes.
        check_stop: Called between batches; raises when the process was asked to stop.
        rank: This process.
        world_size: All processes.
    """

    folder: Path
    config: GenerateCommand
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    autocast: Callable[[], AbstractContextManager[Any]]
    check_stop: Callable[[], None]
    rank: int = 0
    world_size: int = 1

    def identity(self, precision: str) -> dict[str, Any]:
        """Everything that the rows depend on, as nested JSON values."""
        return {
            "generate": dataclasses.asdict(self.config.generate),
            "seed": self.config.seed,
            "precision": precision,
            "model": model_identity(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "data": self.prompts.fingerprint(),
        }

    def parts(self) -> Iterator[tuple[Path, list[Prompt]]]:
        """Each part's folder and prompts, in the order of the source."""
        prompts, number = iter(self.prompts), 0
        while some := list(islice(prompts, self.config.generate.batch_size * BATCHES_OF_A_PART)):
            yield self.folder / PARTS / f"part-{number:06d}", some
            number += 1

    def write(self, progress: tqdm[Any]) -> None:
        """Every part that is missing or damaged, of those that fall to this process.

        Raises:
            Preempted: the process was asked to stop.
        """
        for number, (folder, prompts) in enumerate(self.parts()):
            problems = verify_folder(folder)
            if not problems or number % self.world_size != self.rank:  # by number: what is missing changes while others write
                progress.update(len(prompts) * self.config.generate.num_samples)
                continue
            if folder.exists():
                logger.warning("%s: %s; it is written again", folder, problems[0])
            rows, counts = self._part(prompts, progress)
            with atomic_folder(folder) as temporary:
                (temporary / ROWS).write_text("".join(rows), encoding="utf-8", newline="\n")
                (temporary / "counts.json").write_text(json.dumps(counts), encoding="utf-8")

    def _part(self, prompts: list[Prompt], progress: tqdm[Any]) -> tuple[list[str], Counter[str]]:
        """The lines of a part, and what became of its completions."""
        wanted = [(prompt, sample) for prompt in prompts for sample in range(self.config.generate.num_samples)]
        order = sorted(range(len(wanted)), key=lambda i: (len(wanted[i][0].ids), i))  # those of like length together: little padding
        lines, counts = [""] * len(wanted), Counter(prompts=len(prompts))
        for start in range(0, len(order), self.config.generate.batch_size):
            chosen = order[start : start + self.config.generate.batch_size]
            self.check_stop()
            for i, (line, found) in zip(chosen, self._batch([wanted[i] for i in chosen]), strict=True):
                lines[i] = line
                counts.update(found)
            progress.update(len(chosen))
        return lines, counts

    def _batch(self, wanted: list[tuple[Prompt, int]]) -> Iterator[tuple[str, dict[str, int]]]:
        """A line for each, empty where the completion is left out, and what there is to count."""
        ids = [prompt.ids.tolist() for prompt, _ in wanted]
        seeds = [_seed(self.config.seed, prompt.number, sample) for prompt, sample in wanted]
        size = f"with {len(ids)} rows of {max(map(len, ids)) + self.config.generate.max_new_tokens} tokens"
        remedies = ["lower generate.batch_size", "set teacher.dtype=bfloat16", "lower generate.max_new_tokens"]
        with memory_errors("generate.batch_size", size, remedies), self.autocast():
            completions = complete(self.model, self.tokenizer, ids, self.config.generate, seeds)
        for (prompt, sample), completion in zip(wanted, completions, strict=True):
            left_out = not self.prompts.text(completion.ids).strip() or not (completion.finished or self._keeps_unfinished)
            about = {"row": prompt.number, "sample": sample, "finished": completion.finished}
            row = about | self.prompts.completed(prompt, completion.ids)
            counts = {"cut_off": int(not completion.finished), "left_out": int(left_out), "rows": int(not left_out)}
            yield "" if left_out else json.dumps(row, ensure_ascii=False) + "\n", counts | {"tokens": len(completion.ids)}

    @property
    def _keeps_unfinished(self) -> bool:
        choice = self.config.generate.on_unfinished
        return choice == "keep" or (choice == "auto" and not self.prompts.renderer.has_prompt)


def _seed(seed: int, row: int, sample: int) -> int:
    """Of one completion: any 63 bits that no other one has."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {sample}".encode()).digest()[:8], "big") >> 1


def _check_stop(stop: StopRequest, folder: Path) -> None:
    if stop.requested:
        what = f"stopped by {stop.signal_name}; whole parts stay"
        raise Preempted(str(folder), what, "The same command goes on from here.", stop.exit_code or 143)


# ------------------------------------------------------------------------------------------------------------ before and after it


def _load(config: GenerateCommand, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.model is not None:
        tokenizer = load_tokenizer(config.model, where="model")
        model: Any = load_causal_lm(config.model, where="model").to(device)  # type: ignore[arg-type]
    else:
        tokenizer, model = load_teacher_tokenizer(config.teacher), load_teacher(config.teacher, device)
    check_vocabulary(model, tokenizer, "teacher" if config.model is None else "model")
    return model.eval(), tokenizer


def _room(model: PreTrainedModel, config: GenerateCommand) -> int | None:
    """The longest prompt that leaves room for a completion; None where the model sets no limit."""
    positions, wanted = getattr(model.config.get_text_config(), "max_position_embeddings", None), config.generate.max_new_tokens
    if positions is not None and positions <= wanted:
        what = f"got {wanted}, and the model has {positions} positions for prompt and completion together"
        raise ConfigError("generate.max_new_tokens", what, "Lower it.")
    return None if positions is None else positions - wanted


def _count(prompts: Prompts) -> int:
    """How many there are; whatever is wrong with one is said here."""
    count = sum(1 for _ in prompts)
    if count == 0:
        dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(prompts.dropped.items())) or "there are no rows"
        setting = "data.path" if prompts.config.path else "data.source"
        raise DataError(setting, f"no prompt to go on from ({dropped})", "Look at the rows, their columns and data.eval_fraction.")
    return count


def _begin(folder: Path, config: GenerateCommand, wanted: dict[str, Any]) -> None:
    """Write down what the folder is, or find that it is that already; what killed writers left half written is cleared away.

    Raises:
        ConfigError: it is the folder of something else, or was begun with other settings, another model or other data.
    """
    wanted = json.loads(json.dumps(wanted))
    if found := read_object(folder / IDENTITY):
        if problems := list(_differences(found, wanted)):
            raise ConfigError.from_problems(problems)
    elif others := [name for name in (ROWS, SUMMARY, CONFIG) if (folder / name).exists()]:
        raise ConfigError("output_dir", f"'{folder}' holds something else already ({others[0]})", "Choose another folder.")
    else:
        atomic_write_text(folder / IDENTITY, json.dumps(wanted, indent=2) + "\n")
    for parent in (folder, folder / PARTS):
        remove_stale_temporaries(parent)
    settings = redact(dataclasses.asdict(config))
    atomic_write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[Problem]:
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{path}{key}.")
        elif before != now:
            what = f"got {shown(now)}, and what is in the folder was begun with {shown(before)}"
            yield Problem(f"{path}{key}", what, "Give the old value back, or choose another output_dir.")


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a folder in which no row is missing."""
    return (read_object(folder / SUMMARY) or None) if (folder / ROWS).is_file() else None


def _finish(writer: Writer, seconds: float) -> dict[str, Any]:
    """The parts as one file, and what it holds in numbers.

    Raises:
        DataError: every completion was left out, or the data is not what it was.
    """
    folder, generate = writer.folder, writer.config.generate
    if json.loads(json.dumps(writer.prompts.fingerprint())) != read_object(folder / IDENTITY)["data"]:
        raise DataError("data.path", "the data was changed while it was read", "Begin again in another folder.")
    parts = sorted((folder / PARTS).glob("part-*"))
    counts = sum((Counter(read_object(part / "counts.json")) for part in parts), Counter())
    if not counts["rows"]:
        what = f"none of {counts['prompts']} prompts has a completion that ends within generate.max_new_tokens={generate.max_new_tokens}"
        raise DataError("generate.on_unfinished", what, "Raise that in another folder, or set on_unfinished=keep.")
    atomic_write_text(folder / ROWS, ((part / ROWS).read_text(encoding="utf-8") for part in parts))
    names = ("prompts", "rows", "tokens", "cut_off", "left_out")
    summary: dict[str, Any] = {f"generate/{name}": counts[name] for name in names} | {"generate/seconds": seconds}
    summary |= {f"data/rows_dropped_{reason.replace(' ', '_')}": number for reason, number in sorted(writer.prompts.dropped.items())}
    atomic_write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _result(folder: Path, config: GenerateCommand, summary: dict[str, Any]) -> str:
    data, written = config.data, summary["generate/rows"] + summary["generate/left_out"]
    columns = {"prompt_column": data.prompt_column, "completion_column": data.completion_column, "text_column": data.text_column}
    columns |= {"messages_column": data.messages_column, "tools_column": data.tools_column}
    given = " ".join(["data=jsonl", f"data.path={folder / ROWS}", *(f"data.{name}={value}" for name, value in columns.items() if value)])
    return (
        f"{folder / ROWS}: {summary['generate/rows']:,} rows from {summary['generate/prompts']:,} prompts, "
        f"{summary['generate/tokens'] / written:.0f} tokens each; {summary['generate/cut_off']:,} cut off at "
        f"{config.generate.max_new_tokens}, {summary['generate/left_out']:,} left out.\n"
        f"Train on them: python -m mini_distill.train objective=ce {given} …"
    )


sys.modules[__name__].__class__ = CallableGenerate  # import mini_distill as md; md.generate(["output_dir=answers"])
