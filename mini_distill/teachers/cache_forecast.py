"""What a build will take, foretold from sequences spread over what there is to score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .cache_files import Columns, Side

SEQUENCE_BYTES = 12
"""Of each sequence besides what its kind keeps: where its tokens begin, and their checksum."""

FILE_BYTES = 256
"""Of each column of a shard besides its content: its header, and its line in the manifest."""


@dataclass
class Forecast:
    """What a side takes, as far as some of its sequences tell.

    Attributes:
        side: The side.
        tokens: Its supervised ones.
        bytes_per_token: On disk.
        bytes_per_shard: On disk, besides.
        seconds_per_token: Of one process.
        captured_mass: The share of the distribution that is listed.
    """

    side: Side
    tokens: int
    bytes_per_token: float
    bytes_per_shard: float
    seconds_per_token: float
    captured_mass: float

    def tokens_of(self, shard: int) -> float:
        """As if all sequences had as many."""
        return self.tokens * len(self.side.sequences_of(shard)) / max(1, self.side.num_sequences)


@dataclass
class Effort:
    """What shards of several sides take together: their sequences, bytes on disk, and seconds with so many processes."""

    sequences: int
    num_bytes: float
    seconds: float


def forecast(side: Side, tokens: int, sample: list[Columns], sample_tokens: int, seconds: float, captured_mass: float) -> Forecast:
    """From the columns of the sequences of a sample, with the seconds that it took."""
    written = [array for columns in sample for name, array in columns.items() if not name.startswith("_")]
    files = len(written) // max(1, len(sample)) + 3  # and where sequences begin, their checksums, the mark
    size = sum(array.nbytes for array in written) + SEQUENCE_BYTES * len(sample)
    known = max(1, sample_tokens)
    return Forecast(side, tokens, size / known, FILE_BYTES * files, seconds / known, captured_mass)


def effort(forecasts: Mapping[str, Forecast], shards: Mapping[str, Iterable[int]], num_processes: int) -> Effort:
    """Of these shards of each side; it ends with the process that has the most to score of them."""
    total, of_process = Effort(0, 0.0, 0.0), [0.0] * num_processes
    for found, shard in ((forecasts[name], shard) for name in forecasts for shard in shards[name]):
        total.sequences += len(found.side.sequences_of(shard))
        total.num_bytes += found.bytes_per_token * found.tokens_of(shard) + found.bytes_per_shard
        of_process[shard % num_processes] += found.seconds_per_token * found.tokens_of(shard)
    total.seconds = max(of_process)
    return total


def spread_over(side: Side, shards: list[int], count: int) -> list[int]:
    """The numbers of up to so many sequences of these shards, as far apart as may be."""
    total = sum(len(side.sequences_of(shard)) for shard in shards)
    places = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    return [shards[place // side.shard_sequences] * side.shard_sequences + place % side.shard_sequences for place in places]
