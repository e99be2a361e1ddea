"""Numbers in as few bits as they need: what is written is what is read, in whatever company."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mini_distill.teachers.bit_packing import bits_for, pack, pack_rising, packed_bytes, rising_bytes, unpack, unpack_rising


@pytest.mark.parametrize(
    ("largest", "bits"), [(0, 0), (1, 1), (255, 8), (256, 9), (31_999, 15), (65_535, 16), (128_255, 17), (262_143, 18)]
)
def test_numbers_take_the_bits_of_the_largest(largest: int, bits: int) -> None:
    """Those of a vocabulary of 32,000 were written in 16 bits, of one of 128,256 in 24."""
    assert bits_for(largest) == bits


@pytest.mark.parametrize("width", range(33))
def test_packed_numbers_come_back(width: int) -> None:
    """Of several sequences, of which some are empty and none need end with a byte."""
    random = np.random.default_rng(width)
    numbers = [random.integers(0, 1 << width, count) for count in (3, 0, 8, 1, 17, 64, 100)]
    for one in numbers:
        one[-1:] = (1 << width) - 1
    counts = np.array([len(one) for one in numbers])
    pieces = [pack(one, width) for one in numbers]
    assert [piece.dtype for piece in pieces] == [np.uint8] * 7 and [len(piece) for piece in pieces] == packed_bytes(counts, width).tolist()
    found = unpack(pieces, counts, width)
    assert found.dtype == (np.uint32 if width <= 25 else np.uint64) and np.array_equal(found, np.concatenate(numbers))
    for piece, one in zip(pieces, numbers, strict=True):
        assert np.array_equal(unpack([piece], np.array([len(one)]), width), one)


def test_nothing_is_unpacked_from_nothing() -> None:
    assert unpack([], np.zeros(0, dtype=np.int64), 15).shape == unpack([pack(np.zeros(0), 15)], np.array([0]), 15).shape == (0,)


def test_bits_lie_from_the_lowest_on() -> None:
    """The layout is part of the format: other machines read the files."""
    assert pack(np.array([1, 2, 4, 7]), 3).tolist() == [0b00_010_001, 0b0000_1111]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16, 32, 36, 37, 50, 64, 128, 129, 200, 255])
def test_rising_rows_come_back(count: int) -> None:
    random = np.random.default_rng(count)
    rows = np.sort(random.integers(0, 256, (50, count), dtype=np.uint8), axis=1)
    rows[0], rows[1], rows[2] = 0, 255, np.linspace(0, 255, count)
    packed = pack_rising(rows)
    assert packed.dtype == np.uint8 and packed.shape == (50, rising_bytes(count))
    assert np.array_equal(unpack_rising(packed, count), rows)
    assert np.array_equal(unpack_rising(packed[7:8], count), rows[7:8])
    assert unpack_rising(packed[:0], count).shape == (0, count)


def test_rising_rows_are_shorter_than_a_byte_a_number_from_eight_on() -> None:
    """As differences in unary a row of 64 takes 40 bytes, and only rows of more than 36 are shorter than plain ones."""
    assert [rising_bytes(count) for count in (8, 16, 32, 50, 64, 128, 255)] == [7, 12, 20, 27, 32, 48, 64]
    assert all(rising_bytes(count) <= count for count in range(4, 256))


@pytest.mark.parametrize("change", [lambda row: row * 0, lambda row: row * 0 + 255, lambda row: np.roll(row, 1), lambda row: row | 1 << 6])
def test_what_is_no_rising_row_is_found(change: Callable[[np.ndarray], np.ndarray]) -> None:
    packed = pack_rising(np.array([[1] * 8, [3, 3, 4, 9, 9, 200, 210, 255], [0] * 7 + [90]], dtype=np.uint8))
    packed[1] = change(packed[1])
    with pytest.raises(ValueError) as caught:
        unpack_rising(packed, 8)
    assert caught.value.args == (1,)
    packed[0], packed[1] = packed[1], packed[0].copy()
    with pytest.raises(ValueError):
        unpack_rising(packed, 8)


def test_a_mark_too_few_here_and_one_too_many_there_are_found() -> None:
    """Their number is right."""
    packed = pack_rising(np.array([[1] * 8, [2] * 8], dtype=np.uint8))
    packed[0, 0] &= 0xFE
    packed[1, 1] |= 0x40
    assert np.unpackbits(packed[:, :2], bitorder="little", axis=1)[:, :15].sum() == 16
    with pytest.raises(ValueError):
        unpack_rising(packed, 8)
