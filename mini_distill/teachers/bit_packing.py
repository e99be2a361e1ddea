"""Whole numbers in as few bits as they need, written and read many at a time.

Packed numbers take `width` bits each, one after the other, least significant bit first; what belongs together begins at a byte. Rows of
numbers that never fall take fewer: a list of k numbers below 256 in order says less than k bytes can.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """The numbers of several calls of `pack`, one after the other: int64.

    Eight numbers take `width` bytes. So the first numbers of all groups of eight stand that many bytes apart, and so do the second ones:
    each of the eight is cut out of all groups at once.

    Args:
        pieces: What `pack` gave.
        counts: How many numbers each of them holds.
        width: Bits of a number.
    """
    groups = -(-counts // 8)
    ends = np.cumsum(groups).tolist()
    total = ends[-1] if ends else 0
    raw = np.zeros(
        max(1, total) * width + 8, dtype=np.uint8
    )  # every piece begins with a group; the last number is read with what follows it
    for piece, start in zip(pieces, [0, *ends], strict=False):
        raw[start * width : start * width + len(piece)] = piece
    numbers = np.empty((total, 8), dtype=np.uint64)
    for place in range(8):
        byte, shift = divmod(place * width, 8)
        eight_bytes = np.ndarray((total,), "<u8", raw, offset=byte, strides=(width,))
        np.right_shift(eight_bytes, np.uint64(shift), out=numbers[:, place])
    numbers &= np.uint64((1 << width) - 1)
    flat = numbers.view(np.int64).reshape(-1)
    if not (counts % 8).any():
        return flat
    return np.concatenate([flat[8 * start : 8 * start + count] for start, count in zip([0, *ends], counts.tolist(), strict=False)])


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
