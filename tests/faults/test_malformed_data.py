"""Files that are not what they should be, and random ones: each row is used, or counted by its reason, or named by file and line."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.answers import Answer, answer_to
from faults.record import record
from faults.test_fuzz_configuration import PROFILE, QUICK
from mini_distill.config import DataConfig
from mini_distill.data.prepare import prepare_data

GOOD = {"text": "the cat sat on a mat"}
CHAT_SETTINGS = {"messages_column": "messages", "chat_template": "chatml"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
PLACE = "file"
"""Stands for: the line begins with the file's path."""


def lines(*rows: Any, end: bytes = b"\n") -> bytes:
    return b"".join(row + end if isinstance(row, bytes) else json.dumps(row).encode() + end for row in rows)


def parquet(table: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink)
    return sink.getvalue()


def chat(*messages: Any, **more: Any) -> bytes:
    return lines({"messages": CHAT}, {"messages": list(messages), **more})


ACCEPTED: dict[str, tuple[str, bytes, int]] = {
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(GOOD), 1),
    "line ends of Windows": ("a.jsonl", lines(GOOD, GOOD, end=b"\r\n"), 2),
    "no end of the last line": ("a.jsonl", lines(GOOD).rstrip(), 1),
    "blank lines": ("a.jsonl", b"\n\n" + lines(GOOD) + b"\n \n" + lines(GOOD), 2),
    "JSON over several lines": ("a.json", json.dumps([GOOD, GOOD], indent=2).encode(), 2),
    "further columns": ("a.jsonl", lines({**GOOD, "n": [1, {"x": None}]}), 1),
    "a row far longer than a sequence": ("a.jsonl", lines({"text": "word " * 5000}), 1),
    "a text of one character": ("a.jsonl", lines({"text": "a"}, GOOD), 2),
    "unknown characters": ("a.jsonl", lines({"text": "数据 🙂"}), 1),
    "a line separator within a text": ("a.jsonl", lines({"text": "one\u2028two\x85three"}), 1),
    "special tokens as text": ("a.jsonl", lines({"text": "<eos> <pad> <bos>"}), 1),
    "CSV with a quoted line break": ("a.csv", b'text\n"one\ntwo"\nthree\n', 2),
    "CSV with a byte order mark": ("a.csv", b"\xef\xbb\xbftext\none\n", 1),
    "parquet": ("a.parquet", parquet({"text": ["one", "two"]}), 2),
    "a text file of Windows": ("a.txt", b"one\r\ntwo\r\n", 1),
    "half an empty row": ("a.jsonl", lines(GOOD, {"text": ""}), 1),
    "rows of blanks": ("a.jsonl", lines(GOOD, {"text": "  \n "}), 2),
    "the same row often": ("a.jsonl", lines(*[GOOD] * 50), 50),
    "an answer of the user last": ("a.chat.jsonl", lines({"messages": [*CHAT, {"role": "user", "content": "and?"}]}), 1),
}

REFUSED: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("a.jsonl", b"", "data"),
    "a file of blanks": ("a.jsonl", b"  \n\n \n", "data"),
    "nothing but empty rows": ("a.jsonl", lines({"text": ""}, {"text": ""}), "data"),
    "broken JSON": ("a.jsonl", lines(GOOD, b"{broken"), PLACE + ":2"),
    "JSON cut off at the end": ("a.jsonl", lines(GOOD) + b'{"text": "the ca', PLACE + ":2"),
    "not a number": ("a.jsonl", lines(GOOD, b'{"text": NaN}'), PLACE + ":2"),
    "two objects on a line": ("a.jsonl", lines(GOOD, b'{"text": "a"} {"text": "b"}'), PLACE + ":2"),
    "a number": ("a.jsonl", lines(GOOD, b"7"), PLACE + ":2"),
    "a text": ("a.jsonl", lines(GOOD, b'"text"'), PLACE + ":2"),
    "a list": ("a.jsonl", lines(GOOD, b"[1]"), PLACE + ":2"),
    "null": ("a.jsonl", lines(GOOD, b"null"), PLACE + ":2"),
    "a row without the column": ("a.jsonl", lines(GOOD, {"body": "x"}), PLACE + ":2"),
    "no row with the column": ("a.jsonl", lines({"body": "x"}), PLACE),
    "a number as text": ("a.jsonl", lines(GOOD, {"text": 7}), PLACE + ":2"),
    "null as text": ("a.jsonl", lines(GOOD, {"text": None}), PLACE + ":2"),
    "a list as text": ("a.jsonl", lines(GOOD, {"text": ["a"]}), PLACE + ":2"),
    "an object as text": ("a.jsonl", lines(GOOD, {"text": {"a": 1}}), PLACE + ":2"),
    "half a character": ("a.jsonl", lines(GOOD, b'{"text": "\\ud800"}'), PLACE + ":2"),
    "bytes that are no UTF-8": ("a.jsonl", lines(GOOD, b'{"text": "\xff\xfe"}'), PLACE + ":2"),
    "UTF-16": ("a.jsonl", json.dumps(GOOD).encode("utf-16"), PLACE),
    "a zero byte": ("a.jsonl", lines(GOOD, b'{"text": "a\x00b"}'), PLACE + ":2"),
    "nested without end": ("a.jsonl", lines(GOOD, b'{"text": ' + b"[" * 200_000), PLACE + ":2"),
    "a number of many digits": ("a.jsonl", lines(GOOD, b'{"text": "a", "n": ' + b"9" * 10_000 + b"}"), PLACE + ":2"),
    "compressed, by its name not": ("a.jsonl", gzip.compress(lines(GOOD)), PLACE),
    "a page of the web": ("a.jsonl", b"<!DOCTYPE html>\n<html></html>\n", PLACE + ":1"),
    "a pointer of Git LFS": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", PLACE + ":1"),
    "a JSON list cut off": ("a.json", b'[{"text": "a"}, {"text": ', PLACE),
    "a JSON list of numbers": ("a.json", b"[1, 2]", PLACE),
    "an unknown ending": ("a.xyz", b"what", PLACE),
    "CSV without its column": ("a.csv", b"body\none\n", PLACE),
    "CSV with more fields than columns": ("a.csv", b"text\none\ntwo,three\n", PLACE + ":3"),
    "CSV with a quote left open": ("a.csv", b'text\none\n"two\n', PLACE),
    "CSV with a column twice": ("a.csv", b"text,text\na,b\n", PLACE),
    "CSV without rows": ("a.csv", b"text\n", "data"),
    "parquet that is none": ("a.parquet", b"PAR1 nothing PAR1", PLACE),
    "parquet cut short": ("a.parquet", parquet({"text": ["one", "two"]})[:-20], PLACE),
    "parquet of numbers": ("a.parquet", parquet({"text": [1, 2]}), PLACE),
    "parquet without the column": ("a.parquet", parquet({"body": ["x"]}), PLACE),
    "parquet with nulls": ("a.parquet", parquet({"text": ["a", None]}), PLACE),
    "a text file that is none": ("a.txt", bytes(range(128, 256)), PLACE),
    "an empty text file": ("a.txt", b"", "data"),
    "messages that are none": ("a.chat.jsonl", lines({"messages": CHAT}, {"messages": "hi"}), PLACE + ":2"),
    "messages that are null": ("a.chat.jsonl", lines({"messages": CHAT}, {"messages": None}), PLACE + ":2"),
    "messages that are numbers": ("a.chat.jsonl", chat(1, 2), PLACE + ":2"),
    "a message without a role": ("a.chat.jsonl", chat({"content": "hi"}), PLACE + ":2"),
    "an unknown role": ("a.chat.jsonl", chat({"role": "boss", "content": "hi"}), PLACE + ":2"),
    "a role that is a list": ("a.chat.jsonl", chat({"role": ["user"], "content": "hi"}), PLACE + ":2"),
    "content that is null": ("a.chat.jsonl", chat(CHAT[0], {"role": "assistant", "content": None}), PLACE + ":2"),
    "content that is a number": ("a.chat.jsonl", chat({"role": "user", "content": 3}), PLACE + ":2"),
    "an assistant that says nothing": ("a.chat.jsonl", chat({"role": "user", "content": "hi"}), PLACE + ":2"),
    "calls that are a text": ("a.chat.jsonl", chat(CHAT[0], {"role": "assistant", "content": "x", "tool_calls": "weather"}), PLACE + ":2"),
    "half a character in a message": (
        "a.chat.jsonl",
        lines({"messages": CHAT}, b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}'),
        PLACE + ":2",
    ),
}


@pytest.fixture
def prepare(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Answer]:
    """`prepare(name, content, **settings)`: the answer to a file; its data source follows from the name."""

    def answer(name: str, content: bytes | None, **more: Any) -> Answer:
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        source = "text" if name.endswith(".txt") else "jsonl"
        given: dict[str, Any] = {"path": str(file), "eval_fraction": 0.0, "seq_len": 128, "cache_dir": str(tmp_path / "cache")}
        config = DataConfig(source=source, **given | (CHAT_SETTINGS if ".chat." in name else {}) | more)
        return answer_to(lambda: prepare_data(config, tiny_tokenizer, show_progress=False), 3)

    return answer


def all_counted(report: dict[str, int]) -> bool:
    return report["rows_read"] == report["rows_used"] + sum(count for name, count in report.items() if name.startswith("rows_dropped_"))


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_file_is_read_as_it_is_meant(name: str, prepare: Callable[..., Answer]) -> None:
    file, content, used = ACCEPTED[name]
    answer = prepare(file, content)
    assert answer.error is None, str(answer)
    assert answer.value.report["rows_used"] == used and all_counted(answer.value.report)
    record("malformed data", injected=1, fired=1, accepted=1)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_its_place_or_its_rows_are_counted(name: str, prepare: Callable[..., Answer], tmp_path: Path) -> None:
    file, content, place = REFUSED[name]
    answer = prepare(file, content)
    assert answer.error is not None
    wanted = place.replace(PLACE, str(tmp_path / file), 1) if place.startswith(PLACE) else place
    assert all(where.startswith(wanted) for where in answer.places), (wanted, str(answer))
    skipped = prepare(file, content, on_bad_row="skip")
    assert skipped.error is not None or (all_counted(skipped.value.report) and skipped.value.report["rows_used"] > 0)
    record("malformed data", injected=1, fired=1, refused=1, lines=len(answer.places))


@pytest.mark.parametrize("path", ["", "nowhere.jsonl", "*.nothing", "empty", "[", "a\x00b.jsonl"])
def test_a_path_that_leads_nowhere_is_refused(path: str, prepare: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    answer = prepare("a.jsonl", None, path=str(tmp_path / path) if path != "" else str(tmp_path / "empty"))
    assert answer.error is not None and all(place.startswith("data.path") for place in answer.places), str(answer)
    record("malformed data", injected=1, fired=1, refused=1, lines=len(answer.places))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_a_file_that_may_not_be_read_is_named(prepare: Callable[..., Answer], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(GOOD))
    file.chmod(0)
    assert prepare("a.jsonl", None).places == [str(file)]


# ---------------------------------------------------------------------------------------------------------------------- random rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "role", "content"]), inner, max_size=3),
    max_leaves=5,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "boss", ""])
MESSAGE = st.fixed_dictionaries({"role": ROLES | JSON, "content": st.text(max_size=12) | JSON}, optional={"tool_calls": JSON, "name": JSON})
ROW = st.fixed_dictionaries({"text": st.text(max_size=30)}) | st.fixed_dictionaries({"text": JSON}) | JSON
CONVERSATION = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4) | JSON}, optional={"tools": JSON})


@pytest.mark.parametrize("cases", [QUICK // 3, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "row", "good"), [("a.jsonl", ROW, GOOD), ("a.chat.jsonl", CONVERSATION, {"messages": CHAT})], ids=["text", "chat"]
)
def test_random_rows_are_used_or_counted_and_the_first_bad_one_is_named(
    cases: int, name: str, row: Any, good: Any, prepare: Callable[..., Answer], tmp_path: Path
) -> None:
    counts: Counter[str] = Counter()
    logging.getLogger("mini_distill").setLevel(logging.ERROR)  # a warning for each kind of bad row, six hundred times

    @settings(max_examples=cases, **PROFILE)
    @given(st.lists(row, min_size=1, max_size=4))
    def fuzz(rows: list[Any]) -> None:
        content = lines(good, *rows)
        skipped = prepare(name, content, on_bad_row="skip")
        assert skipped.error is None, str(skipped)
        report = skipped.value.report
        assert report["rows_read"] == 1 + len(rows) and all_counted(report)
        strict = prepare(name, content)
        bad = report["rows_read"] - report["rows_used"] - report.get("rows_dropped_empty", 0)
        assert (strict.error is not None) == (bad > 0), (str(strict), report)
        assert all(place.startswith(f"{tmp_path / name}:") for place in strict.places)
        counts["refused" if strict.error else "accepted"] += 1

    try:
        fuzz()
    finally:
        logging.getLogger("mini_distill").setLevel(logging.NOTSET)
    assert counts["refused"] and counts["accepted"]
    record("random rows", injected=sum(counts.values()), fired=sum(counts.values()), **counts)


@pytest.mark.parametrize("cases", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_a_file_with_damaged_bytes_is_refused_by_its_name_or_its_rows_are_counted(
    cases: int, ending: str, prepare: Callable[..., Answer], tmp_path: Path
) -> None:
    draw, counts = random.Random(0), Counter[str]()
    texts = [f"row {number} of the table" for number in range(6)]
    table = "text,n\n" + "".join(f'"{text}",{number}\n' for number, text in enumerate(texts))
    whole = {"parquet": parquet({"text": texts}), "csv": table.encode(), "json": json.dumps([{"text": text} for text in texts]).encode()}[
        ending
    ]
    for _ in range(cases):
        content, place = bytearray(whole), draw.randrange(len(whole))
        damage = draw.choice(["flip", "cut", "swap", "insert"])
        if damage == "flip":
            content[place] ^= 1 << draw.randrange(8)
        elif damage == "cut":
            content = content[:place]
        elif damage == "insert":
            content[place:place] = draw.choice([b"\n", b'"', b"\0", b"\xff", b"[", b","])
        else:
            other = draw.randrange(len(whole))
            content[place], content[other] = content[other], content[place]
        answer = prepare(f"a.{ending}", bytes(content), on_bad_row="skip")
        if answer.error is None:
            assert all_counted(answer.value.report)
        else:
            assert all(where.startswith((str(tmp_path), "data")) for where in answer.places), str(answer)
        counts["refused" if answer.error else "accepted"] += 1
    record("damaged tables", injected=cases, fired=cases, **counts)
