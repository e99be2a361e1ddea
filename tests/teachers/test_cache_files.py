"""Shards on disk: what is written is what is read, and nothing damaged or foreign is taken for ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import change_column
from faults.injection import killed_before_operation, with_file_size_limit

from mini_distill.errors import CacheError, StorageError
from mini_distill.storage import atomic_folder, remove_stale_temporaries
from mini_distill.teachers.bit_packing import pack
from mini_distill.teachers.cache_files import (
    CHECKSUMS,
    MARK,
    SEQUENCE_STARTS,
    Columns,
    Reading,
    Shard,
    Side,
    join,
    to_array,
    to_tensor,
    write_columns,
)


def columns_of(side: Side, shard: int) -> Columns:
    """Sequence i has i supervised tokens, each with its number as the value, and packed in five bits."""
    numbers = side.sequences_of(shard)
    values = np.concatenate([np.full(i, i, dtype=np.float32) for i in numbers])
    packed = np.concatenate([pack(np.full(i, i), 5) for i in numbers])
    starts = np.concatenate([[0], np.cumsum(list(numbers))]).astype(np.int64)
    sums = np.array(list(numbers), dtype=np.uint32)
    return {"values": values, "packed": packed, SEQUENCE_STARTS: starts, CHECKSUMS: sums, MARK: side.mark(shard)}


def check(shard: Shard) -> None:
    """That the columns are these."""
    shard.check_rows("values", np.float32)
    shard.check_packed("packed", shard.tokens_of_each, 5)


def write(side: Side, shard: int) -> None:
    remove_stale_temporaries(side.folder(shard).parent)
    with atomic_folder(side.folder(shard)) as temporary:
        write_columns(temporary, columns_of(side, shard))


@pytest.fixture
def side(tmp_path: Path) -> Side:
    """Ten sequences in shards of four: 4, 4 and 2."""
    side = Side(tmp_path, "train", 10, 4, "identity", check)
    for number in range(side.num_shards):
        write(side, number)
    return side


# --------------------------------------------------------------------------------------------------------------------- addresses


def test_every_sequence_is_found_in_its_shard(side: Side) -> None:
    assert side.num_shards == 3 and side.sequences_of(2) == range(8, 10) and side.damaged() == {}
    for number in (9, 0, 5, 4, 3, 9):
        shard, place = side.locate(number)
        assert shard.checksums[place] == number and shard.part("values", place).tolist() == [number] * number


@pytest.mark.parametrize("numbers", [[3], [0], [7, 2, 9], [0, 5, 5, 0], list(range(10)), []])
def test_sequences_are_read_in_the_order_asked_for_from_whatever_shards(side: Side, numbers: list[int]) -> None:
    reading = Reading([side.locate(number) for number in numbers])
    wanted = [number for number in numbers for _ in range(number)]
    assert reading.num_tokens == len(wanted) and reading.of_sequences(CHECKSUMS).tolist() == numbers
    assert reading.packed("packed", reading.tokens_of_each, 5).tolist() == wanted
    if numbers:
        assert reading.rows("values").tolist() == wanted
        assert [int(reading.shard_of(token).folder.name[-1]) for token in range(len(wanted))] == [number // 4 for number in wanted]


def test_what_was_read_and_is_not_good_is_said_of_its_own_shard(side: Side) -> None:
    reading = Reading([side.locate(number) for number in (2, 5, 9)])
    reading.check(reading.rows("values") > 0, "values", lambda _: "are not numbers")
    with pytest.raises(CacheError, match=r"shard-00001: values hold 5\.0\. Delete this folder"):
        reading.check(reading.rows("values") != 5, "values", lambda token: f"hold {reading.rows('values')[token]}")
    with pytest.raises(CacheError, match=r"shard-00002: values are of nine"):
        reading.check_sequences(np.array([True, True, False]), "values", "are of nine")


def test_one_shard_may_hold_more_than_there_is(tmp_path: Path) -> None:
    side = Side(tmp_path, "train", 3, 100, "identity")
    write(side, 0)
    assert side.num_shards == 1 and side.damaged() == {} and side.locate(2)[1] == 2


# ------------------------------------------------------------------------------------------------------------------------ damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda shard: shutil.rmtree(shard),
    "a file deleted": lambda shard: (shard / "values.npy").unlink(),
    "emptied": lambda shard: (shard / "values.npy").write_bytes(b""),
    "truncated": lambda shard: os.truncate(shard / "values.npy", 100),
    "one bit flipped": lambda shard: flip(shard / "values.npy"),
    "without manifest": lambda shard: (shard / "MANIFEST.json").unlink(),
    "without mark": lambda shard: change_column(shard, MARK, lambda mark: mark[:0]),
    "a file in its place": lambda shard: (shutil.rmtree(shard), shard.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_made_again_alone(side: Side, damage: str) -> None:
    before = side.folder(1) / "values.npy"
    wanted, others = before.read_bytes(), [side.folder(number).stat().st_mtime_ns for number in (0, 2)]
    DAMAGE[damage](side.folder(1))
    assert list(side.damaged()) == [1] and side.damaged()[1]
    write(side, 1)
    assert side.damaged() == {} and before.read_bytes() == wanted
    assert [side.folder(number).stat().st_mtime_ns for number in (0, 2)] == others
    assert sorted(os.listdir(side.folder(0).parent)) == ["shard-00000", "shard-00001", "shard-00002"]


def test_a_shard_in_the_place_of_another_is_found(side: Side) -> None:
    """Its checksums are right: only what it says of itself tells."""
    shutil.rmtree(side.folder(1))
    shutil.copytree(side.folder(0), side.folder(1))
    assert side.damaged() == {1: "of another cache, or of other sequences"}


@pytest.mark.parametrize(
    "other",
    [("train", 10, 4, "another teacher"), ("held_out", 10, 4, "identity"), ("train", 10, 5, "identity"), ("train", 11, 4, "identity")],
)
def test_a_shard_of_another_cache_is_not_taken_for_ours(side: Side, tmp_path: Path, other: tuple[str, int, int, str]) -> None:
    """cache.json deleted and built again with another teacher: the shards that lay there looked whole."""
    elsewhere = Side(tmp_path / "other", *other)
    last = elsewhere.num_shards - 1
    write(elsewhere, last)
    shutil.rmtree(side.folder(2))
    shutil.copytree(elsewhere.folder(last), side.folder(2))
    assert side.damaged() == {2: "of another cache, or of other sequences"}


@pytest.mark.parametrize("change", [lambda s: s + 1, lambda s: s[::-1].copy(), lambda s: s[:-1], lambda s: s.astype(np.int32)])
def test_sequences_without_a_place_of_their_own_are_refused(side: Side, change: Callable[[np.ndarray], np.ndarray]) -> None:
    change_column(side.folder(0), SEQUENCE_STARTS, change)
    with pytest.raises(CacheError, match=r"shard-00000: starts (has shape|does not begin at 0 and rise).*Delete this folder"):
        side.locate(0)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("values", lambda v: v[:-1], r"values has shape \(5,\) of float32, expected \(6,\)"),
        ("values", lambda v: v.astype(np.float64), "values has shape .* of float64"),
        ("packed", lambda v: v[:-1], r"packed has shape \(4,\) of uint8, expected \(5,\)"),
        ("packed", lambda v: np.append(v, v[:1]), r"packed has shape \(6,\)"),
        ("packed", lambda v: v.astype(np.int8), "packed has shape .* of int8"),
    ],
)
def test_columns_of_another_length_or_type_are_refused(
    side: Side, name: str, change: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    change_column(side.folder(0), name, change)
    with pytest.raises(CacheError, match=words):
        side.locate(3)


def test_what_cannot_be_mapped_is_one_line(side: Side) -> None:
    change_column(side.folder(0), "values", lambda v: v.astype("<U3"))
    (side.folder(0) / "values.npy").write_bytes(b"not an array")
    with pytest.raises(CacheError, match=r"values.npy: cannot be read"):
        side.locate(0)


# ----------------------------------------------------------------------------------------------------------------------- writing


def test_files_are_those_of_numpy(tmp_path: Path) -> None:
    columns: Columns = {
        "bytes": np.arange(5, dtype=np.uint8),
        "nothing": np.zeros(0, dtype=np.uint16),
        "no_row": np.zeros((0, 7), dtype=np.float16),
        "table": np.arange(12, dtype=np.float32).reshape(3, 4),
        "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    }
    write_columns(tmp_path, columns)
    for name, values in columns.items():
        for mode in (None, "r"):
            found = np.load(tmp_path / f"{name}.npy", mmap_mode=mode)
            assert found.dtype == values.dtype and np.array_equal(found, values), name
    shard_like = tmp_path / "reference.npy"
    np.save(shard_like, columns["table"])
    assert shard_like.read_bytes() == (tmp_path / "table.npy").read_bytes()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """numpy's own save cut files below its buffer's size without a word; above, its error `… requested and … written` had no number."""
    side = Side(tmp_path, "train", 100, 100, "identity")

    def full() -> None:
        with pytest.raises(StorageError, match="shard-00000: cannot write: File too large"):
            write(side, 0)
        assert os.listdir(side.folder(0).parent) == []

    assert with_file_size_limit(3000, full) == 0


def test_a_shard_killed_anywhere_in_its_writing_is_whole_or_missing(tmp_path: Path) -> None:
    side = Side(tmp_path, "train", 5, 100, "identity")
    outcomes = set()
    for number in range(200):
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        status = killed_before_operation(number, lambda: write(side, 0))
        outcomes.add(side.damaged().get(0, "whole"))
        if status == 0:
            break
    assert status == 0 and number > 8 and outcomes == {"missing", "whole"}


# ------------------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_back_to_the_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 3).to(dtype)
    assert torch.equal(to_tensor(to_array(tensor)), tensor) and to_tensor(to_array(tensor)).dtype == dtype


def test_what_was_read_is_a_copy(side: Side) -> None:
    """A view of the file would change when the shard is made again, and a write to it would end the process."""
    reading = Reading([side.locate(3)])
    to_tensor(reading.rows("values")).zero_()
    assert reading.rows("values").tolist() == [3, 3, 3]


def test_joining_keeps_the_order() -> None:
    assert join([{"a": np.array([1])}, {"a": np.array([2, 3])}])["a"].tolist() == [1, 2, 3] and join([]) == {}
