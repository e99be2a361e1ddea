"""From a source to training and held-out sequences: rendered once, kept on disk, reused between runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..contract import mixture_parts
from ..errors import DataError
from ..imported_code import code_fingerprint
from ..onlooker import bar
from ..storage import atomic_folder, open_regular, remove_stale_temporaries, storage_errors, user_cache, verify_folder
from .held_out import HELD_OUT, OVERLAP, TRAIN, SidedRow, split_rows
from .mixing import Mixture
from .order import Stream
from .packing import cut, pack
from .render import Renderer
from .row import Rendered, Row, RowError
from .sequences import Sequences
from .sources import Source, open_source
from .token_rows import TokenRows, TokenRowsWriter

FORMAT = 2  # of the rendering: what rows become
LAYOUT = "tokens with checksums"  # of the prepared folder: where what they became is found
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 2**22
SIDES = (TRAIN, HELD_OUT)
HARMLESS = ("empty", "other encoding")
"""Reasons for which a row is left out and counted, and that no one needs to hear of."""

Opening = Callable[..., Source]
"""As `open_source`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """What training and evaluation read.

    Attributes:
        train: The training sequences, or a mixture of several.
        held_out: The held-out ones; None when nothing is held out.
        report: What became of the rows, in numbers: `rows_read` = `rows_used` + all `rows_dropped_<reason>`; `tokens` of the rows
            used, and of these `tokens_left_out` that stand in no sequence (truncated ends, last pieces of one token).
        fingerprint_parts: What the sequences depend on, as plain JSON values: compared when a run is resumed.
    """

    train: Stream
    held_out: Stream | None
    report: dict[str, int]
    fingerprint_parts: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `fingerprint_parts`."""
        return _digest(self.fingerprint_parts)


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    show_progress: bool = True,
    where: str = "data",
    to_measure: bool = False,
    opening: Opening = open_source,
) -> PreparedData:
    """Read, render, split, store and pack the data of a run.

    What is stored depends on the rows and their rendering, not on `seq_len` and packing. It is found again by the hash of both,
    verified, and made again when it is damaged.

    Args:
        config: The data settings.
        tokenizer: Of teacher and student.
        show_progress: Whether to draw a progress bar (on a terminal).
        where: The path of the settings, for messages.
        to_measure: Nobody trains on it: there need be no training rows, and of an `eval_path` without a `path` all rows are held out.
        opening: What opens the sources; another one may give some of their rows.

    Raises:
        DataError: the source cannot be read, a row is malformed (with `on_bad_row=error`), or nothing is left to train on.
        StorageError: the tokenised data cannot be written.
    """
    if config.source == "mixture":
        return _prepare_mixture(config, tokenizer, where, show_progress=show_progress, to_measure=to_measure, opening=opening)
    job = _open(_all_held_out(config) if to_measure else config, tokenizer, where, to_measure, opening)
    with _alone_with(job.folder):
        if not _is_good(job.folder):
            _build(job, show_progress)
        return _pack_sides(job)


def training_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of the training side, not yet rendered: what a tokenizer may be trained on."""
    source, held_out = _open_sources(config, "data")
    return (row for side, row in split_rows(config, source, held_out) if side == TRAIN and isinstance(row, Row))


def column_of_rows(config: DataConfig, column: str) -> dict[str, str]:
    """The values of a column by the origin of their row, of all rows that may be measured; rows without it are left out.

    Raises:
        DataError: no row has the column, or the data are a mixture.
    """
    if config.source == "mixture":
        raise DataError("evaluation.group_by", "the data are a mixture, which is split by its parts already", "Leave it out.")
    sources = [source for source in _open_sources(_all_held_out(config), "data") if source is not None]
    rows = [row for source in sources for row in source.rows() if isinstance(row, Row)]
    if not any(column in row.columns for row in rows):
        there = ", ".join(sorted({name for row in rows[:100] for name in row.columns})) or "none"
        raise DataError("evaluation.group_by", f"no row has a column '{column}'", f"There are: {there}.")
    return {row.origin: str(row.columns[column]) for row in rows if column in row.columns}


def is_prepared(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str = "data") -> bool:
    """Whether `prepare_data` would find everything tokenised."""
    if config.source == "mixture":
        return all(is_prepared(part, tokenizer, f"{where}.mixture.{name}") for name, (part, _) in mixture_parts(config).items())
    return _is_good(_open(config, tokenizer, where).folder)


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised data is kept: `data.cache_dir`, $MINI_DISTILL_CACHE, or ~/.cache/mini_distill."""
    return (Path(config.cache_dir).expanduser() if config.cache_dir else user_cache()) / "tokens"


# --------------------------------------------------------------------------------------------------------- what is to be stored


@dataclass(frozen=True)
class _Job:
    """One source to prepare, opened, and what its tokenised rows depend on."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    source: Source
    held_out: Source | None
    where: str
    sources: dict[str, Any]
    to_measure: bool = False

    @property
    def parts(self) -> dict[str, Any]:
        own = {
            "format": FORMAT,
            "rendering": self.renderer.fingerprint,
            "eval_fraction": self.config.eval_fraction if self.held_out is None else None,
            "max_rows": self.config.max_rows,
            "on_bad_row": self.config.on_bad_row,
        }
        code = {"code": code_fingerprint(self.config.source)} if "." in self.config.source else {}  # a class of the user's
        return {**self.sources, **own, **code}

    @property
    def folder(self) -> Path:
        # A copy of the same files elsewhere is the same data, but its rows have other origins.
        return cache_folder(self.config) / _digest([self.parts, self.config.path, self.config.eval_path, LAYOUT])[:32]


def _open(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str, to_measure: bool = False, opening: Opening = open_source
) -> _Job:
    renderer = Renderer(config, tokenizer, where)
    source, held_out = _open_sources(config, where, opening)
    return _Job(config, tokenizer, renderer, source, held_out, where, _fingerprints(source, held_out), to_measure)


def _all_held_out(config: DataConfig) -> DataConfig:
    """What is measured where rows to measure on are named and none to train on."""
    return config if config.path is not None or config.eval_path is None else replace(config, eval_fraction=1.0)


def _open_sources(config: DataConfig, where: str, opening: Opening = open_source) -> tuple[Source, Source | None]:
    """The source, and that of the held-out rows where they have one of their own besides."""
    if config.path is None and config.eval_path is not None and config.eval_fraction == 1:
        return opening(config, where, held_out=True), None
    has_own = config.eval_path is not None or config.eval_split is not None
    return opening(config, where), opening(config, where, held_out=True) if has_own else None


def _fingerprints(source: Source, held_out: Source | None) -> dict[str, Any]:
    return {"source": source.fingerprint(), "held_out_source": held_out.fingerprint() if held_out is not None else None}


@contextmanager
def _alone_with(folder: Path) -> Iterator[None]:
    """Other processes of this machine that want the same data wait, and then find it made.

    On a file system without locks they make it too, which costs time only: the folder is put in place as a whole.
    """
    file = folder.parent / "locks" / folder.name
    with storage_errors(file, "lock the tokenised data"):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = os.fdopen(open_regular(file, os.O_WRONLY | os.O_CREAT), "wb")
    with opened:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)  # the kernel opens it again however this process ends
        yield


def _is_good(folder: Path) -> bool:
    if not folder.exists():
        return False
    problems = verify_folder(folder)
    if problems:
        logger.warning("%s: tokenised data is damaged (%s); it is made again", folder, problems[0])
    return not problems


# ------------------------------------------------------------------------------------------------------------------- rendering


def _build(job: _Job, show_progress: bool) -> None:
    """Render every row into the folder of tokenised data."""
    counts: Counter[str] = Counter()
    remove_stale_temporaries(job.folder.parent)
    with atomic_folder(job.folder) as temporary:
        num_ids = max(job.tokenizer.get_vocab().values()) + 1
        writers = {side: TokenRowsWriter(temporary, side, num_ids) for side in SIDES}
        for side, row, rendered in _render(_rows(job, show_progress), job, counts):
            writers[side].add(row.origin, rendered)
        for writer in writers.values():
            writer.close()
        if _fingerprints(job.source, job.held_out) != job.sources:  # what is stored must be what its name says
            raise DataError(
                f"{job.where}.path", "the data was changed while it was read", "Run the same command again once it stays as it is."
            )
        (temporary / "report.json").write_text(json.dumps(dict(counts)), encoding="utf-8")


def _rows(job: _Job, show_progress: bool) -> Iterator[SidedRow]:
    """Every row with its side, with a progress bar.

    Raises:
        DataError: after the last row, if none had the column of tools: optional for a row, it is misspelt if all lack it.
    """
    tools, has_tools = job.config.tools_column, False
    rows = split_rows(job.config, job.source, job.held_out, job.where)
    total = min((count for count in (getattr(job.source, "total", None), job.config.max_rows) if count is not None), default=None)
    for side, row in bar(rows, desc="tokenising", unit=" rows", total=total, show=show_progress):
        has_tools = has_tools or (isinstance(row, Row) and tools in row.columns)
        yield side, row
    if tools and not has_tools:
        raise DataError(f"{job.where}.tools_column", f"no row has a column '{tools}'", "Name the column, or leave the setting out.")


def _render(rows: Iterable[SidedRow], job: _Job, counts: Counter[str]) -> Iterator[tuple[str, Row, Rendered]]:
    """Rows with their side and tokens; a bad row stops the preparation, or is counted and skipped."""
    for chunk in _chunks(rows):
        counts["rows read"] += len(chunk)
        for _, error in chunk:
            if isinstance(error, RowError):
                _leave_out(error, job.config, counts)
        good = [(side, row) for side, row in chunk if isinstance(row, Row)]
        for (side, row), rendered in zip(good, job.renderer.render_many([row for _, row in good]), strict=True):
            if isinstance(rendered, DataError):
                _leave_out(rendered, job.config, counts)
            else:
                yield side, row, rendered


def _chunks(rows: Iterable[SidedRow]) -> Iterator[list[SidedRow]]:
    """Enough rows to keep the tokenizer's threads busy, bounded in number and in characters."""
    chunk: list[SidedRow] = []
    characters = 0
    for side, row in rows:
        chunk.append((side, row))
        if isinstance(row, Row):
            characters += sum(len(value) for value in row.columns.values() if isinstance(value, str))
        if len(chunk) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _leave_out(error: DataError, config: DataConfig, counts: Counter[str]) -> None:
    reason = getattr(error, "reason", "malformed")
    if reason not in (*HARMLESS, OVERLAP):
        if config.on_bad_row == "error":
            raise error
        if not counts[f"dropped: {reason}"]:
            logger.warning("skipped, the first of its kind: %s", error)
    counts[f"dropped: {reason}"] += 1


# --------------------------------------------------------------------------------------------------------------------- packing


def _pack_sides(job: _Job) -> PreparedData:
    """The stored rows of both sides as sequences, with a report of what became of them."""
    config, where = job.config, job.where
    counts: Counter[str] = Counter(json.loads((job.folder / "report.json").read_text(encoding="utf-8")))
    on_long_row = config.on_long_row if config.on_long_row != "auto" else ("truncate" if job.renderer.has_prompt else "split")
    train, held_out = (_sequences(TokenRows(job.folder, side), job, on_long_row, counts) for side in SIDES)
    if len(train) == 0 and not (job.to_measure and len(held_out)):
        raise _nothing_of(job, counts)
    if len(held_out) == 0 and (config.eval_fraction > 0 or job.held_out is not None):
        raise _nothing_held_out(job, counts)
    report = _report(counts, train, held_out, where)
    packing = {"seq_len": config.seq_len, "packing": config.packing, "on_long_row": on_long_row}
    return PreparedData(train, held_out if len(held_out) else None, report, {**job.parts, **packing})


def _sequences(rows: TokenRows, job: _Job, on_long_row: str, counts: Counter[str]) -> Sequences:
    """Cut and pack the rows of a side; count what is dropped."""
    seq_len, lengths = job.config.seq_len, rows.lengths
    too_long = lengths > seq_len
    if on_long_row == "error" and too_long.any():
        raise _too_long(rows, int(np.flatnonzero(too_long)[0]), job)
    usable = ~too_long if on_long_row == "drop" else np.ones(len(rows), dtype=bool)
    document, start, length = cut(np.where(usable, lengths, 0), seq_len, split=on_long_row == "split")
    begin = rows.offset[document] + start
    supervised = rows.count_supervised(begin + 1, begin + length) > 0  # a piece's first token is never predicted
    document, start, length = (array[supervised] for array in (document, start, length))
    kept = np.isin(np.arange(len(rows)), document)
    counts["dropped: longer than seq_len"] += int((~usable).sum())
    counts["dropped: nothing supervised within seq_len"] += int((usable & ~kept).sum())
    counts["rows used"] += int(kept.sum())
    counts["rows split" if on_long_row == "split" else "rows truncated"] += int((too_long & kept).sum())
    counts["tokens"] += int(lengths[kept].sum())
    counts["tokens left out"] += int(lengths[kept].sum() - length.sum())
    pad_id = next(i for i in (job.tokenizer.pad_token_id, job.tokenizer.eos_token_id, 0) if i is not None)
    return Sequences(rows, pack(document, start, length, seq_len, job.config.packing), seq_len, pad_id)


def _too_long(rows: TokenRows, row: int, job: _Job) -> DataError:
    what = f"has {rows.lengths[row]} tokens, and {job.where}.seq_len is {job.config.seq_len}"
    return DataError(rows.origin(row), what, f"Raise {job.where}.seq_len, or set {job.where}.on_long_row=split, truncate or drop.")


def _nothing_of(job: _Job, counts: Counter[str]) -> DataError:
    """No row is of any use."""
    named = [name for name in ("path", "eval_path") if getattr(job.config, name)]
    what = f"nothing to {'measure' if job.to_measure else 'train'} on ({_reasons(counts)})"
    return DataError(f"{job.where}.{[*named, 'source'][0]}", what, f"Look at the rows, their columns and {job.where}.seq_len.")


def _nothing_held_out(job: _Job, counts: Counter[str]) -> DataError:
    where = job.where
    if job.held_out is not None:
        setting = f"{where}.eval_path" if job.config.eval_path else f"{where}.eval_split"
        remedy = "Name rows that are not in the training data."
        if job.to_measure and job.config.eval_path:
            remedy = f"Name rows that are not in {where}.path, or set {where}.path=null to measure them all the same."
        return DataError(setting, f"nothing to evaluate on ({_reasons(counts)})", remedy)
    remedy = f"Raise {where}.eval_fraction, name {where}.eval_path, or set {where}.eval_fraction=0 for no evaluation."
    if job.to_measure:
        remedy = f"Set {where}.eval_fraction=1 to measure all of them, or name {where}.eval_path."
    what = f"got {job.config.eval_fraction}, and none of the rows is held out ({_reasons(counts)})"
    return DataError(f"{where}.eval_fraction", what, remedy)


def _report(counts: Counter[str], train: Sequences, held_out: Sequences, where: str) -> dict[str, int]:
    dropped = {key: value for key, value in sorted(counts.items()) if key.startswith("dropped: ") and value}
    assert counts["rows read"] == counts["rows used"] + sum(dropped.values()), counts
    if dropped.keys() - {f"dropped: {reason}" for reason in HARMLESS}:
        logger.warning("%s: %d of %d rows dropped (%s)", where, sum(dropped.values()), counts["rows read"], _reasons(counts))
    totals = ("rows read", "rows used", "rows split", "rows truncated", "tokens", "tokens left out")
    return {
        **{key.replace(" ", "_"): counts[key] for key in totals},
        **{f"rows_dropped_{key.removeprefix('dropped: ').replace(' ', '_')}": value for key, value in dropped.items()},
        "train_sequences": len(train),
        "train_supervised_tokens": train.num_supervised,
        "held_out_sequences": len(held_out),
        "held_out_supervised_tokens": held_out.num_supervised,
    }


def _reasons(counts: Counter[str]) -> str:
    dropped = [f"{value} {key.removeprefix('dropped: ')}" for key, value in sorted(counts.items()) if key.startswith("dropped: ") and value]
    return ", ".join([f"{counts['rows read']} rows read", *dropped])


# -------------------------------------------------------------------------------------------------------------------- mixtures


def _prepare_mixture(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str, **options: Any) -> PreparedData:
    parts = mixture_parts(config)
    prepared = {name: prepare_data(part, tokenizer, where=f"{where}.mixture.{name}", **options) for name, (part, _) in parts.items()}
    weights = {name: weight for name, (_, weight) in parts.items()}
    held_out = {name: part.held_out for name, part in prepared.items() if part.held_out is not None}
    return PreparedData(
        train=Mixture({name: part.train for name, part in prepared.items()}, weights),
        held_out=Mixture(held_out, weights) if held_out else None,
        report={f"{name}_{key}": value for name, part in prepared.items() for key, value in part.report.items()},
        fingerprint_parts={name: {"weight": weights[name], **part.fingerprint_parts} for name, part in prepared.items()},
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
