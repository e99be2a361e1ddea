"""From a source to training and held-out sequences: rendered once, kept on disk, reused between runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig, mixture_parts
from ..errors import DataError
from ..storage import atomic_folder, verify_folder
from .mixing import Mixture
from .packing import cut, pack
from .render import Renderer
from .row import Rendered, Row
from .sequences import Sequences, TokenRows
from .sources import Source, open_source

FORMAT = 1  # of the prepared folder
ROWS_AT_ONCE = 256
SIDES = ("train", "held_out")
END_OF_TEXT = " (its end)"  # marks the held-out end of a text that is the only one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """What training and evaluation read.

    Attributes:
        train: The training sequences, or a mixture of several.
        held_out: The held-out ones; None when nothing is held out.
        report: What became of the rows: read, used, dropped by reason, tokens. Rows read = rows used + rows dropped.
        fingerprint_parts: What the sequences depend on, as plain JSON values: compared when a run is resumed.
    """

    train: Sequences | Mixture
    held_out: Sequences | Mixture | None
    report: dict[str, Any]
    fingerprint_parts: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `fingerprint_parts`."""
        return _digest(self.fingerprint_parts)


def prepare_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, show_progress: bool = True, where: str = "data") -> PreparedData:
    """Read, render, split, store and pack the data of a run.

    Raises:
        DataError: the source cannot be read, a row is malformed (with `on_bad_row=error`), or nothing is left to train on.
    """
    if config.source == "mixture":
        return _prepare_mixture(config, tokenizer, show_progress, where)
    renderer = Renderer(config, tokenizer, where)
    source = open_source(config, where)
    held_out_source = open_source(config, where, held_out=True) if config.eval_path or config.eval_split else None
    parts = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "held_out_source": held_out_source.fingerprint() if held_out_source else None,
        "rendering": renderer.fingerprint,
        "eval_fraction": config.eval_fraction,
        "max_rows": config.max_rows,
        "on_bad_row": config.on_bad_row,
    }
    folder = cache_folder(config) / _digest(parts)[:32]
    if not _is_good(folder):
        _build(folder, config, source, held_out_source, renderer, len(tokenizer), show_progress)
    return _pack_sides(folder, config, renderer, tokenizer, parts, where)


def training_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of the training side, not yet rendered: what a tokenizer may be trained on."""
    source = open_source(config)
    split = _Split(config, source, explicit=False)
    return (row for row in source.rows() if isinstance(row, Row) and split.side(row) == "train")


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised data is kept: `data.cache_dir`, $MINI_DISTILL_CACHE, or ~/.cache/mini_distill."""
    default = os.environ.get("MINI_DISTILL_CACHE") or Path.home() / ".cache" / "mini_distill"
    return Path(config.cache_dir or default).expanduser() / "tokens"


# ------------------------------------------------------------------------------------------------------------------- rendering


def _is_good(folder: Path) -> bool:
    if not folder.exists():
        return False
    problems = verify_folder(folder)
    if problems:
        logger.warning("%s: tokenised data is damaged (%s); it is made again", folder, problems[0])
    return not problems


def _build(
    folder: Path, config: DataConfig, source: Source, held_out_source: Source | None, renderer: Renderer, vocab: int, show_progress: bool
) -> None:
    """Render every row into the prepared folder; two processes that do so at once write the same."""
    split = _Split(config, source, held_out_source is not None)
    counts: Counter[str] = Counter()
    with atomic_folder(folder) as temporary, tqdm(desc="tokenising", unit=" rows", disable=None if show_progress else True) as bar:
        writers = {side: _RowWriter(temporary, side, vocab) for side in SIDES}
        rows = _hold_out_the_end(source.rows(), config) if held_out_source is None else source.rows()
        for row, rendered in _render(islice(rows, config.max_rows), renderer, config, counts, bar):
            writers[split.side(row)].add(row.origin, rendered)
        if held_out_source is not None:
            for row, rendered in _render(held_out_source.rows(), renderer, config, counts, bar):
                if split.seen_in_training(row):
                    counts["dropped: held-out row is in the training data too"] += 1
                else:
                    writers["held_out"].add(row.origin, rendered)
        for writer in writers.values():
            writer.close()
        (temporary / "report.json").write_text(json.dumps(dict(counts)), encoding="utf-8")


def _render(
    rows: Iterable[Row | DataError], renderer: Renderer, config: DataConfig, counts: Counter[str], bar: tqdm
) -> Iterator[tuple[Row, Rendered]]:
    """Rows with their tokens; a bad row stops the preparation, or is counted and skipped."""
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        counts["rows read"] += len(chunk)
        good = [row for row in chunk if isinstance(row, Row)]
        for error in (row for row in chunk if isinstance(row, DataError)):
            _bad_row(error, config, counts)
        for row, rendered in zip(good, renderer.render_many(good), strict=True):
            if isinstance(rendered, DataError):
                _bad_row(rendered, config, counts)
            else:
                yield row, rendered
        bar.update(len(chunk))


def _bad_row(error: DataError, config: DataConfig, counts: Counter[str]) -> None:
    reason = getattr(error, "reason", "malformed")
    if config.on_bad_row == "error" and reason not in ("empty",):
        raise error
    counts[f"dropped: {reason}"] += 1


def _hold_out_the_end(rows: Iterator[Row | DataError], config: DataConfig) -> Iterator[Row | DataError]:
    """One text alone is held out by its end instead of by a hash: it becomes two rows, the second marked by its origin."""
    first_two = list(islice(rows, 2))
    if len(first_two) != 1 or not isinstance(first_two[0], Row) or config.eval_fraction == 0 or not _is_text(config):
        yield from first_two
        yield from rows
        return
    row = first_two[0]
    text = row.columns.get(config.text_column or "text")
    if not isinstance(text, str):
        yield row
        return
    at = text.find("\n", round(len(text) * (1 - config.eval_fraction))) + 1 or len(text)
    yield Row(row.origin, {**row.columns, config.text_column or "text": text[:at]})
    yield Row(row.origin + END_OF_TEXT, {**row.columns, config.text_column or "text": text[at:]})


def _is_text(config: DataConfig) -> bool:
    return config.prompt_column is None and config.messages_column is None


class _Split:
    """Which side a row is on: by a hash, so that it depends on the row alone and duplicates stay together."""

    def __init__(self, config: DataConfig, source: Source, explicit: bool) -> None:
        self.fraction = 0.0 if explicit else config.eval_fraction
        self._key = getattr(source, "split_key", _content_key)
        self._seen: set[bytes] | None = set() if explicit else None

    def side(self, row: Row) -> str:
        if row.origin.endswith(END_OF_TEXT):
            return "held_out"
        digest = self._hash(row)
        if self._seen is not None:
            self._seen.add(digest)
        return "held_out" if int.from_bytes(digest[:8], "big") / 2**64 < self.fraction else "train"

    def seen_in_training(self, row: Row) -> bool:
        return self._seen is not None and self._hash(row) in self._seen

    def _hash(self, row: Row) -> bytes:
        return hashlib.sha256(self._key(row).encode("utf-8", "surrogatepass")).digest()


def _content_key(row: Row) -> str:
    return json.dumps(row.columns, sort_keys=True, ensure_ascii=True, default=str)


class _RowWriter:
    """Appends token rows to flat files that numpy maps into memory."""

    def __init__(self, folder: Path, side: str, vocab: int) -> None:
        self.folder, self.side = folder, side
        self.dtypes = {"input_ids": np.uint16 if vocab <= 2**16 else np.uint32, "supervised": np.bool_, "num_bytes": np.uint32}
        self.files = {name: open(folder / f"{side}.{name}.raw", "wb") for name in self.dtypes}
        self.lengths: list[int] = []
        self.origins: list[str] = []

    def add(self, origin: str, row: Rendered) -> None:
        for name, dtype in self.dtypes.items():
            self.files[name].write(getattr(row, name).astype(dtype).tobytes())
        self.lengths.append(len(row.input_ids))
        self.origins.append(origin)

    def close(self) -> None:
        """Give the raw files numpy's header."""
        offset = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        np.save(self.folder / f"{self.side}.offset.npy", offset)
        for name, dtype in self.dtypes.items():
            self.files[name].close()
            raw = self.folder / f"{self.side}.{name}.raw"
            out = np.lib.format.open_memmap(self.folder / f"{self.side}.{name}.npy", mode="w+", dtype=dtype, shape=(int(offset[-1]),)) if offset[-1] else None
            if out is None:
                np.save(self.folder / f"{self.side}.{name}.npy", np.zeros(0, dtype=dtype))
            else:
                out[:] = np.memmap(raw, dtype=dtype, mode="r")
                out.flush()
            raw.unlink()
        (self.folder / f"{self.side}.origins.json").write_text(json.dumps(self.origins), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------- packing


def _pack_sides(folder: Path, config: DataConfig, renderer: Renderer, tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any], where: str) -> PreparedData:
    """The prepared rows of both sides as sequences, with a report of what became of them."""
    counts: Counter[str] = Counter(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    on_long_row = config.on_long_row if config.on_long_row != "auto" else ("truncate" if renderer.has_prompt else "split")
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    sides = {side: _sequences(TokenRows(folder, side), config, on_long_row, pad_id, counts, where) for side in SIDES}
    train, held_out = sides["train"], sides["held_out"]
    if len(train) == 0:
        raise DataError(f"{where}.path", f"nothing to train on ({_reasons(counts)})", "Look at the rows, their columns and data.seq_len.")
    asks_for_held_out = config.eval_fraction > 0 or config.eval_path or config.eval_split
    if asks_for_held_out and len(held_out) == 0:
        remedy = "Raise data.eval_fraction, name data.eval_path, or set data.eval_fraction=0 for none."
        raise DataError(f"{where}.eval_fraction", f"none of {counts['rows read']} rows is held out", remedy)
    packing = {"seq_len": config.seq_len, "packing": config.packing, "on_long_row": on_long_row}
    report = _report(counts, train, held_out)
    return PreparedData(train, held_out if len(held_out) else None, report, {**parts, **packing})


def _sequences(rows: TokenRows, config: DataConfig, on_long_row: str, pad_id: int, counts: Counter[str], where: str) -> Sequences:
    """Cut and pack the rows of a side; count what is dropped."""
    lengths = rows.lengths
    usable = np.ones(len(rows), dtype=bool)
    too_long = lengths > config.seq_len
    if on_long_row == "error" and too_long.any():
        first = int(np.flatnonzero(too_long)[0])
        raise DataError(rows.origins[first], f"has {lengths[first]} tokens, and {where}.seq_len is {config.seq_len}", f"Raise {where}.seq_len, or set {where}.on_long_row=split, truncate or drop.")
    if on_long_row == "drop":
        usable &= ~too_long
        counts["dropped: longer than seq_len"] += int(too_long.sum())
    document, start, length = cut(np.where(usable, lengths, 0), config.seq_len, split=on_long_row == "split")
    supervised = _supervised_in(rows, document, start, length)
    document, start, length = (array[supervised] for array in (document, start, length))
    kept = np.isin(np.arange(len(rows)), document)
    counts["dropped: nothing supervised within seq_len"] += int((usable & ~kept).sum())
    counts["rows used"] += int(kept.sum())
    counts["rows split" if on_long_row == "split" else "rows truncated"] += int((too_long & kept).sum())
    return Sequences(rows, pack(document, start, length, config.seq_len, config.packing), config.seq_len, pad_id)


def _supervised_in(rows: TokenRows, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`(pieces,)` bool: some token after the piece's first is supervised."""
    counted = np.concatenate([[0], np.cumsum(rows.supervised, dtype=np.int64)])
    begin = rows.offset[document] + start
    return counted[begin + length] > counted[begin + 1]


def _report(counts: Counter[str], train: Sequences, held_out: Sequences) -> dict[str, Any]:
    dropped = {key: value for key, value in sorted(counts.items()) if key.startswith("dropped: ") and value}
    assert counts["rows read"] == counts["rows used"] + sum(dropped.values()), counts
    changed = {key.replace(" ", "_"): counts[key] for key in ("rows split", "rows truncated") if counts[key]}
    if dropped:
        logger.warning("data: %d of %d rows dropped (%s)", sum(dropped.values()), counts["rows read"], _reasons(counts))
    return {
        "rows_read": counts["rows read"],
        "rows_used": counts["rows used"],
        **{f"rows_dropped_{key.removeprefix('dropped: ').replace(' ', '_')}": value for key, value in dropped.items()},
        **changed,
        "train_sequences": len(train),
        "train_supervised_tokens": train.num_supervised,
        "held_out_sequences": len(held_out),
        "held_out_supervised_tokens": held_out.num_supervised,
    }


def _reasons(counts: Counter[str]) -> str:
    dropped = [f"{value} {key.removeprefix('dropped: ')}" for key, value in sorted(counts.items()) if key.startswith("dropped: ") and value]
    return ", ".join(dropped) or f"{counts['rows read']} rows read"


# -------------------------------------------------------------------------------------------------------------------- mixtures


def _prepare_mixture(config: DataConfig, tokenizer: PreTrainedTokenizerBase, show_progress: bool, where: str) -> PreparedData:
    parts = mixture_parts(config)
    prepared = {
        name: prepare_data(part, tokenizer, show_progress=show_progress, where=f"{where}.mixture.{name}") for name, (part, _) in parts.items()
    }
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
