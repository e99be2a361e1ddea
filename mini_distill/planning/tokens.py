"""How many tokens the data are: counted where they are tokenised already, else estimated from their first rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..contract import mixture_parts
from ..data.packing import cut, pack
from ..data.prepare import is_prepared, prepare_data, training_rows
from ..data.render import Renderer
from ..data.row import Rendered, Row
from ..data.sources import open_source

SAMPLED_ROWS = 200
BYTES_OF_TOKEN = 7
"""On disk: its id in two or four bytes, whether it is supervised, and the bytes of text it stands for."""


@dataclass(frozen=True)
class DataSize:
    """The training side of the data.

    Attributes:
        sequences: Of `data.seq_len` tokens, padding included; None where nobody knows how many rows there are.
        supervised_share: Supervised tokens over all positions of the sequences.
        counted: Whether this was counted; else it follows from the first rows.
        held_out_sequences: The same of the held-out side.
    """

    sequences: float | None
    supervised_share: float
    counted: bool
    held_out_sequences: float | None


def data_size(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataSize:
    """Of the data of a run, without tokenising them.

    Raises:
        DataError: the source cannot be read, or no row of its beginning can be trained on.
    """
    if is_prepared(config, tokenizer):
        data = prepare_data(config, tokenizer, show_progress=False)
        supervised = sum(count for name, count in data.report.items() if name.endswith("train_supervised_tokens"))
        share = supervised / max(1, len(data.train) * config.seq_len)
        return DataSize(len(data.train), share, True, len(data.held_out) if data.held_out is not None else 0)
    if config.source != "mixture":
        return _estimated(config, tokenizer, "data")
    parts = {name: (_estimated(part, tokenizer, f"data.mixture.{name}"), weight) for name, (part, weight) in mixture_parts(config).items()}
    share = sum(size.supervised_share * weight for size, weight in parts.values()) / sum(weight for _, weight in parts.values())
    sizes = [size for size, _ in parts.values()]
    return DataSize(_sum([s.sequences for s in sizes]), share, False, _sum([s.held_out_sequences for s in sizes]))


def _estimated(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> DataSize:
    renderer = Renderer(config, tokenizer, where)
    rows = list(islice(training_rows(config), SAMPLED_ROWS))
    rendered = [row for row in renderer.render_many(rows) if isinstance(row, Rendered) and len(row.input_ids) > 1]
    if not rendered:
        return DataSize(None, 1.0, False, None)
    lengths = np.array([len(row.input_ids) for row in rendered])
    split = config.on_long_row == "split" or (config.on_long_row == "auto" and not renderer.has_prompt)
    document, start, length = cut(lengths, config.seq_len, split=split)
    sequences = len(pack(document, start, length, config.seq_len, config.packing).offset) - 1
    supervised = sum(int(rendered[d].supervised[s + 1 : s + n].sum()) for d, s, n in zip(document, start, length, strict=True))
    times = _times_the_sample(config, rows, where)
    train = None if times is None else times * sequences
    held_out = None if train is None else train * (1 - _train_share(config)) / _train_share(config)
    return DataSize(train, supervised / (sequences * config.seq_len), False, held_out)


def _train_share(config: DataConfig) -> float:
    """Of the rows of `data.path`."""
    return 1 - config.eval_fraction if config.eval_path is None and config.eval_split is None else 1.0


def _times_the_sample(config: DataConfig, rows: list[Row], where: str) -> float | None:
    """How often the sample goes into the training side, by rows where the source knows their number, else by bytes; None: unknown."""
    if len(rows) < SAMPLED_ROWS:
        return 1.0
    source = open_source(config, where)
    train = _train_share(config)
    if (total := getattr(source, "total", None)) is not None:
        return max(1.0, train * min(total, config.max_rows or total) / len(rows))
    files = getattr(source, "files", None)
    by_rows = config.max_rows * train / len(rows) if config.max_rows is not None else None
    if files is None:
        return by_rows
    of_sample = sum(len(text.encode("utf-8", "surrogatepass")) for row in rows for text in _texts(row))
    by_bytes = max(1.0, train * sum(Path(file).stat().st_size for file in files) / max(1, of_sample))
    return by_bytes if by_rows is None else min(by_bytes, by_rows)


def _texts(row: Row) -> Iterator[str]:
    """All of its columns, named as JSON names them."""
    return (f"{name}{value}      " for name, value in row.columns.items())


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
