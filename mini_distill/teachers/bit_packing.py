"""Whole numbers in as few bits as they need, written and read many at a time.

Packed numbers take `width` bits each, one after the other, least significant bit first; what belongs together begins at a byte. Rows of
numbers that never fall take fewer: a list of k numbers below 256 in order says less than k bytes can.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

WIDEST = 32
"""Bits of a packed number; one that begins anywhere in a byte then lies within eight bytes."""


def bits_for(largest: int) -> int:
    """The bits that numbers from 0 to `largest` need."""
    return int(largest).bit_length()


def packed_bytes(counts: np.ndarray, width: int) -> np.ndarray:
    """The bytes that so many numbers take."""
    return -(-counts.astype(np.int64) * width // 8)


def pack(numbers: np.ndarray, width: int) -> np.ndarray:
    """`(n,)` numbers below 2^width, one after the other: uint8."""
    bits = np.unpackbits(numbers.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, count=width, bitorder="little")  # (n, width)
    return np.packbits(bits, bitorder="little")


def unpack(pieces: Sequence[np.ndarray], counts: np.ndarray, width: int) -> np.ndarray:
    """The numbers of several calls of `pack`, one after the other: unsigned, in 32 bits or in 64.

    Eight numbers take `width` bytes, and where 2, 4 or 8 divides the width, fewer already fill whole bytes. So the first numbers of all
    such groups stand equally far apart, and so do the second ones: each of a group is cut out of all groups at once.

    Args:
        pieces: What `pack` gave.
        counts: How many numbers each of them holds.
        width: Bits of a number.
    """
    size = 8 // gcd(width, 8)
    group_bytes = size * width // 8
    ends = np.cumsum(-(-counts // size)).tolist()
    total = ends[-1] if ends else 0
    raw = np.zeros(max(1, total) * group_bytes + 8, dtype=np.uint8)  # the last number is read with what follows it
    for piece, start in zip(pieces, [0, *ends], strict=False):  # every piece begins with a group
        raw[start * group_bytes : start * group_bytes + len(piece)] = piece
    word = np.uint32 if width <= 25 else np.uint64  # a number that begins anywhere in a byte lies within one of these
    numbers = np.empty((total, size), dtype=word)
    for place in range(size):
        byte, shift = divmod(place * width, 8)
        words = np.ndarray((total,), np.dtype(word).newbyteorder("<"), raw, offset=byte, strides=(group_bytes,))
        np.right_shift(words, word(shift), out=numbers[:, place])
    numbers &= word((1 << width) - 1)
    flat = numbers.reshape(-1)
    if not (counts % size).any():
        return flat
    return np.concatenate([flat[size * start : size * start + count] for start, count in zip([0, *ends], counts.tolist(), strict=False)])


# ------------------------------------------------------------------------------------------------------------ rows that never fall


def rising_bytes(count: int) -> int:
    """The bytes of a row of `count` bytes that never fall."""
    low = _low_bits(count)
    return -(-(_marks(count, low) + low * count) // 8)


def pack_rising(rows: np.ndarray) -> np.ndarray:
    """`(n, count)` uint8, of which no row falls -> `(n, rising_bytes(count))` uint8.

    The code of Elias and Fano (1971, 1974): of each number the lowest bits as they are, and of the rest, which rises in small steps, a
    mark at place rest + index of a bitmap. Two bits and less per number above the lowest ones, whatever the numbers are.
    """
    count = rows.shape[1]
    low = _low_bits(count)
    marks = np.zeros((len(rows), _marks(count, low)), dtype=np.uint8)
    np.put_along_axis(marks, (rows >> low) + np.arange(count), 1, axis=1)
    lowest = [(rows >> bit) & 1 for bit in reversed(range(low))]
    return np.packbits(np.concatenate([marks, *lowest], axis=1), axis=1, bitorder="little")


def unpack_rising(packed: np.ndarray, count: int) -> np.ndarray:
    """What `pack_rising` took.

    Raises:
        ValueError: a row does not hold `count` numbers; its argument is the first such row.
    """
    low = _low_bits(count)
    width = _marks(count, low)
    bits = np.unpackbits(packed, axis=1, count=width + low * count, bitorder="little")
    marks = np.ascontiguousarray(bits[:, :width])
    places, starts = np.flatnonzero(marks.view(np.bool_)), np.arange(len(packed)) * width
    if not _one_row_after_the_other(places, starts, count, width):
        raise ValueError(int(np.flatnonzero(marks.sum(axis=1) != count)[0]))
    numbers = places.astype(np.uint8).reshape(-1, count)  # in bytes, whose overflow does no harm: what comes out fits them
    numbers -= starts.astype(np.uint8)[:, None]
    numbers -= np.arange(count, dtype=np.uint8)
    for start in range(width, bits.shape[1], count):
        numbers += numbers
        numbers |= bits[:, start : start + count]
    return numbers


def _low_bits(count: int) -> int:
    """The number of lowest bits with which a row is shortest; of equals the largest, whose bitmap is."""
    return min(range(8, -1, -1), key=lambda low: _marks(count, low) + low * count)


def _marks(count: int, low: int) -> int:
    """The bits of the bitmap."""
    return count + (255 >> low)


def _one_row_after_the_other(places: np.ndarray, starts: np.ndarray, count: int, width: int) -> bool:
    """Whether every row has `count` marks."""
    if len(places) != len(starts) * count:
        return False
    rows = places.reshape(-1, count)
    return bool((rows[:, 0] >= starts).all() and (rows[:, -1] < starts + width).all())
