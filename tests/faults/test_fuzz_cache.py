"""Caches of teacher targets with random bytes in their files: refused, or found to be what they were; never other targets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import copy_of

from faults.answers import answer_to
from faults.record import record
from faults.test_damage import MAY_BE_HARMLESS, UNREAD, Store, stores  # noqa: F401 - a fixture
from faults.test_fuzz_configuration import PROFILE

CACHES = ("sampled cache", "topk cache", "full cache", "hidden cache")
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "insert", "swap", "repeat", "zero", "digit"]), st.integers(0, 2**30), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Several small harms one after the other, anywhere."""
    data = bytearray(content)
    for what, number, value in edits:
        at = number % max(1, len(data))
        if what == "cut":
            data = data[:at]
        elif what == "drop":
            del data[at : at + 1 + value % 16]
        elif what == "insert":
            data[at:at] = bytes([value])
        elif what == "repeat":
            data[at:at] = data[at : at + 1 + value]
        elif data and what == "flip":
            data[at] ^= 1 << value % 8
        elif data and what == "zero":
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif data and what == "swap":
            other = random.Random(number).randrange(len(data))
            data[at], data[other] = data[other], data[at]
        elif what == "digit":  # in the texts, another number that is as well-formed as the one before
            digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[digits[number % len(digits)]] = 48 + value % 10
    return bytes(data)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cases", [10, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CACHES)
def test_random_bytes_in_a_cache_never_give_other_targets(
    kind: str,
    cases: int,
    stores: Callable[[str], Store],  # noqa: F811
    tmp_path: Path,
) -> None:
    store = stores(kind)
    folder, counts = copy_of(store.folder, tmp_path / "cache"), Counter[str]()
    wanted: Any = store.use(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in UNREAD | {".lock"})

    @settings(max_examples=cases, **PROFILE)
    @given(st.sampled_from(files), EDITS)
    def fuzz(file: Path, edits: list[tuple[str, int, int]]) -> None:
        before = file.read_bytes()
        after = edited(before, edits)
        file.write_bytes(after)
        try:
            answer = answer_to(lambda: store.use(folder), 4, 5, 6)
        finally:
            file.write_bytes(before)
        if after == before:
            outcome = "unchanged"
            assert answer.error is None
        elif answer.error is None:
            outcome = "harmless"
            assert answer.value == wanted and file.name in MAY_BE_HARMLESS, (file, edits)
        else:
            outcome = "refused"
        counts[outcome] += 1

    fuzz()
    assert store.use(folder) == wanted and counts["refused"] > cases / 3
    injected = sum(counts.values()) - counts["unchanged"]
    record("random bytes in a cache", injected=injected, fired=injected, refused=counts["refused"], harmless=counts["harmless"], silent=0)
