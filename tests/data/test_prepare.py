"""From files to sequences: what is counted, what is kept, what is made again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import DataConfig
from mini_distill.data import prepare
from mini_distill.data.prepare import PreparedData, cache_folder, column_of_rows, prepare_data, training_rows
from mini_distill.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
Prepare = Any


@pytest.fixture
def prepared(tmp_path: Path, tiny_tokenizer: Any) -> Prepare:
    """`prepared(rows, **settings)`: rows of a JSONL file (objects, or lines as they are) made ready."""

    def make(rows: list[Any], **settings: Any) -> PreparedData:
        return prepare_data(jsonl(tmp_path, rows, **settings), tiny_tokenizer, show_progress=False)

    return make


def jsonl(folder: Path, rows: list[Any], **settings: Any) -> DataConfig:
    file = folder / "rows.jsonl"
    file.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    defaults = {"eval_fraction": 0.0, "seq_len": 8, "cache_dir": str(folder / "cache")}
    return DataConfig(source="jsonl", path=str(file), **{**defaults, **settings})


def check_sum(report: dict[str, int]) -> None:
    dropped = sum(value for key, value in report.items() if key.startswith("rows_dropped_"))
    assert report["rows_read"] == report["rows_used"] + dropped


def contents(data: PreparedData) -> list[Any]:
    return [data.train[i].input_ids.tolist() for i in range(len(data.train))]


# -------------------------------------------------------------------------------------------------------------------- counting


def test_rows_read_are_rows_used_and_rows_dropped_by_reason(prepared: Prepare) -> None:
    bad = [{"text": ""}, {"text": None}, {"text": 7}, {"other": "x"}, b"{broken\n", b'{"text": "\\ud800"}\n', b'{"text": "cut']
    report = prepared([{"text": "good"}, {"text": "good too, and long"}, *bad], on_bad_row="skip").report
    check_sum(report)
    dropped = {key.removeprefix("rows_dropped_"): value for key, value in report.items() if key.startswith("rows_dropped_")}
    assert report["rows_used"] == 2 and report["rows_split"] == 1
    assert dropped == {"empty": 1, "wrong_type": 2, "missing_column": 1, "malformed": 1, "lone_surrogate": 1, "cut_off": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{broken\n", "rows.jsonl:2: not valid JSON"),
        (b'{"text": "cut', "rows.jsonl:2: the last line is cut off"),
        ({"other": "x"}, "rows.jsonl:2: no column 'text' (there are: other)"),
        ({"text": None}, "rows.jsonl:2: column 'text' holds null"),
        ({"text": 7}, "rows.jsonl:2: column 'text' holds int"),
        (b'{"text": "\\ud800"}\n', "rows.jsonl:2: column 'text' holds half a character"),
        (b'{"text": "\xff"}\n', "rows.jsonl:2: not UTF-8"),
    ],
)
def test_a_bad_row_stops_the_preparation_with_its_place(prepared: Prepare, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared([{"text": "good"}, row])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "tokens").glob("*/report.json"))  # nothing half-made is kept


def test_the_first_skipped_row_of_a_kind_is_named_in_a_warning(prepared: Prepare, caplog: pytest.LogCaptureFixture) -> None:
    prepared([{"text": "good"}, b"{bad\n", b"{worse\n"], on_bad_row="skip")
    assert "rows.jsonl:2: not valid JSON" in caplog.text and "rows.jsonl:3" not in caplog.text
    assert "2 of 3 rows dropped" in caplog.text


def test_tokens_that_stand_in_no_sequence_are_counted(prepared: Prepare) -> None:
    report = prepared([{"text": "abcdefgh"}], on_long_row="truncate", seq_len=5).report  # <bos> and <eos> make it 10
    assert report["tokens"] == 10 and report["tokens_left_out"] == 5 and report["rows_truncated"] == 1
    assert prepared([{"text": "abcdefg"}], seq_len=4).report["tokens_left_out"] == 1  # 9 tokens: the last piece is one


# ---------------------------------------------------------------------------------------------------------- nothing or too little


def test_nothing_to_train_on_says_why(prepared: Prepare) -> None:
    for rows, reason in (([], "0 rows read"), ([{"text": ""}, {"text": ""}], "2 empty")):
        with pytest.raises(DataError, match=rf"data\.path: nothing to train on .*{reason}"):
            prepared(rows)


def test_nothing_held_out_says_what_to_do(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.eval_fraction: got 0\.05, and none of the rows is held out .*data\.eval_path"):
        prepared([{"text": "one row alone"}], eval_fraction=0.05)
    (tmp_path / "eval.jsonl").write_text('{"text": "same"}\n')
    with pytest.raises(DataError, match=r"data\.eval_path: nothing to evaluate on .*1 held-out row is in the training data too"):
        prepared([{"text": "same"}, {"text": "other"}], eval_path=str(tmp_path / "eval.jsonl"))
    assert prepared([{"text": "one row alone"}]).held_out is None  # none was asked for


def test_a_file_that_is_only_measured_needs_no_training_rows(prepared: Prepare, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """There was no way to measure all of a file: a share was held out of it, or it lacked data.path, or there was nothing to train on."""
    rows = [{"text": f"row {i}"} for i in range(9)]
    config = jsonl(tmp_path, rows)

    def measured(**settings: Any) -> PreparedData:
        return prepare_data(replace(config, **settings), tiny_tokenizer, show_progress=False, to_measure=True)

    for settings in ({"path": None, "eval_path": config.path}, {"eval_fraction": 1.0}):
        data = measured(**settings)
        assert data.report["rows_used"] == 9 and len(data.train) == 0 and data.held_out is not None
        assert {origin for i in range(len(data.held_out)) for origin in data.held_out.origins(i)} == {
            f"{config.path}:{n}" for n in range(1, 10)
        }
    mixture = DataConfig(
        source="mixture", cache_dir=config.cache_dir, seq_len=8, mixture={"a": {"source": "jsonl", "eval_path": config.path}}
    )
    assert len(prepare_data(mixture, tiny_tokenizer, show_progress=False, to_measure=True).held_out or []) == len(data.held_out)
    (tmp_path / "a.txt").write_text("some words\n" * 40)
    alone = replace(config, source="text", path=str(tmp_path / "a.txt"), eval_fraction=1.0)
    assert len(prepare_data(alone, tiny_tokenizer, show_progress=False, to_measure=True).train) == 0  # not cut in two
    assert column_of_rows(replace(config, path=None, eval_path=config.path), "text") == {
        f"{config.path}:{i + 1}": f"row {i}" for i in range(9)
    }


def test_nothing_to_measure_says_so_and_what_to_do(prepared: Prepare, tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = jsonl(tmp_path, [{"text": "one row alone"}])
    (tmp_path / "empty.jsonl").write_text("")
    empty = str(tmp_path / "empty.jsonl")
    for settings, line in (
        ({"path": None, "eval_path": empty}, r"data\.eval_path: nothing to measure on \(0 rows read\)"),
        ({"path": empty, "eval_fraction": 0.05}, r"data\.path: nothing to measure on \(0 rows read\)"),
        ({"eval_fraction": 0.05}, r"data\.eval_fraction: got 0\.05, and none .* Set data\.eval_fraction=1 to measure all"),
        ({"eval_path": config.path}, r"data\.eval_path: nothing to evaluate on .* set data\.path=null to measure them all the same"),
    ):
        with pytest.raises(DataError, match=line):
            prepare_data(replace(config, **settings), tiny_tokenizer, show_progress=False, to_measure=True)


def test_one_text_file_is_trained_and_measured_on(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 40)
    config = DataConfig(source="text", path=str(tmp_path / "a.txt"), seq_len=16, cache_dir=str(tmp_path / "cache"))
    data = prepare_data(config, tiny_tokenizer, show_progress=False)
    assert data.held_out is not None and 0 < len(data.held_out) < len(data.train)
    assert data.held_out.origins(0) == [f"{tmp_path / 'a.txt'} (its end)"]


def test_held_out_rows_that_are_trained_on_are_dropped_counted_and_warned_about(
    prepared: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "eval.jsonl").write_text('{"text": "same"}\n{"text": "new"}\n')
    data = prepared([{"text": "same"}, {"text": "other"}], eval_path=str(tmp_path / "eval.jsonl"))
    check_sum(data.report)
    assert data.report["rows_dropped_held-out_row_is_in_the_training_data_too"] == 1 and len(data.held_out) == 1
    assert "held-out row is in the training data too" in caplog.text


def test_a_column_of_tools_that_no_row_has_is_refused(prepared: Prepare, tiny_tokenizer: Any) -> None:
    """A misspelt data.tools_column trained without tools and said nothing: a row may lack them."""
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    settings = {"messages_column": "messages", "chat_template": "chatml", "seq_len": 256}
    with pytest.raises(DataError, match=r"data\.tools_column: no row has a column 'tolls'"):
        prepared([talk, {**talk, "tools": []}], tools_column="tolls", **settings)
    assert prepared([talk, {**talk, "tools": []}], tools_column="tools", **settings).report["rows_used"] == 2


# --------------------------------------------------------------------------------------------------------------------- reuse


def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are made from now on."""
    made: list[Path] = []
    build = prepare._build
    monkeypatch.setattr(prepare, "_build", lambda job, progress: (made.append(job.folder), build(job, progress))[1])
    return made


def test_tokenised_data_is_made_once_for_any_packing(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = builds(monkeypatch), [{"text": f"row {i}"} for i in range(9)]
    first = prepared(rows)
    again, longer = prepared(rows), prepared(rows, seq_len=32, packing=False)
    assert len(made) == 1
    assert contents(first) == contents(again) and first.report == again.report and first.fingerprint == again.fingerprint
    assert longer.fingerprint != first.fingerprint and len(longer.train) == 9


@pytest.mark.parametrize("change", ["rows", "max_rows", "add_bos", "eval_fraction", "tokenizer"])
def test_whatever_changes_the_tokens_changes_the_fingerprint(tmp_path: Path, tiny_tokenizer: Any, change: str) -> None:
    import copy

    rows, tokenizer = [{"text": f"row {i}"} for i in range(60)], copy.deepcopy(tiny_tokenizer)
    before = prepare_data(jsonl(tmp_path, rows, eval_fraction=0.2), tokenizer, show_progress=False)
    settings = {"max_rows": {"max_rows": 40}, "add_bos": {"add_bos": False}, "eval_fraction": {"eval_fraction": 0.4}}.get(change, {})
    if change == "rows":
        rows[7] = {"text": "another"}
    if change == "tokenizer":
        tokenizer.add_tokens(["row"])
    after = prepare_data(jsonl(tmp_path, rows, **{"eval_fraction": 0.2, **settings}), tokenizer, show_progress=False)
    assert before.fingerprint != after.fingerprint
    assert contents(before) != contents(after)


@pytest.mark.parametrize("damage", ["flip", "delete", "add", "manifest"])
def test_damaged_tokenised_data_is_made_again(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    rows = [{"text": f"row {i}"} for i in range(9)]
    expected = contents(prepared(rows))
    (folder,) = [file.parent for file in (tmp_path / "cache" / "tokens").glob("*/report.json")]
    file = folder / ("MANIFEST.json" if damage == "manifest" else "train.tokens.npy")
    if damage == "delete":
        file.unlink()
    elif damage == "add":
        (folder / "stray").write_text("")
    else:
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    made = builds(monkeypatch)
    assert contents(prepared(rows)) == expected and made == [folder]
    assert "is damaged" in caplog.text
    assert contents(prepared(rows)) == expected and len(made) == 1


def test_copies_of_a_file_are_the_same_data_with_origins_of_their_own(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = jsonl(tmp_path, [{"text": "row"}, {"text": "two"}])
    copy = tmp_path / "elsewhere" / "rows.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(str(config.path)).read_bytes())
    one, two = (prepare_data(each, tiny_tokenizer, show_progress=False) for each in (config, replace(config, path=str(copy))))
    assert one.fingerprint == two.fingerprint
    assert one.train.origins(0)[0] == f"{config.path}:1" and two.train.origins(0)[0] == f"{copy}:1"


def test_data_that_changes_while_it_is_read_is_refused(prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = prepare._render

    def meanwhile(*arguments: Any) -> Any:
        yield from render(*arguments)
        with open(tmp_path / "rows.jsonl", "a") as file:
            file.write('{"text": "late"}\n')

    monkeypatch.setattr(prepare, "_render", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepared([{"text": "row"}])
    assert not list((tmp_path / "cache" / "tokens").glob("*/report.json"))


def _prepare_in_process(config: DataConfig, tokenizer: Any, gate: Any, results: Any) -> None:
    made: list[Path] = []
    build = prepare._build
    prepare._build = lambda job, progress: (made.append(job.folder), build(job, progress))[1]  # type: ignore[assignment]
    gate.wait()
    data = prepare_data(config, tokenizer, show_progress=False)
    results.put((len(made), data.fingerprint))


def test_processes_that_want_the_same_data_at_once_make_it_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = jsonl(tmp_path, [{"text": f"row {i}"} for i in range(500)])
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(3), context.SimpleQueue()
    processes = [context.Process(target=_prepare_in_process, args=(config, tiny_tokenizer, gate, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = [results.get() for _ in processes]
    assert sum(made for made, _ in found) == 1 and len({fingerprint for _, fingerprint in found}) == 1


def _die_while_preparing(config: DataConfig, tokenizer: Any) -> None:
    prepare._chunks = lambda rows: os._exit(9)  # type: ignore[assignment]
    prepare_data(config, tokenizer, show_progress=False)


def test_a_process_that_dies_while_preparing_leaves_nothing_behind(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config, tokens = jsonl(tmp_path, [{"text": "row"}]), tmp_path / "cache" / "tokens"
    process = multiprocessing.get_context("fork").Process(target=_die_while_preparing, args=(config, tiny_tokenizer))
    process.start()
    process.join(60)
    assert process.exitcode == 9 and list(tokens.glob(".tmp-*"))
    assert len(prepare_data(config, tiny_tokenizer, show_progress=False).train) == 1
    assert not list(tokens.glob(".tmp-*"))


def test_the_cache_is_where_the_settings_or_the_environment_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_DISTILL_CACHE", str(tmp_path / "environment"))
    assert cache_folder(DataConfig()) == tmp_path / "environment" / "tokens"
    assert cache_folder(DataConfig(cache_dir=str(tmp_path / "setting"))) == tmp_path / "setting" / "tokens"
    monkeypatch.delenv("MINI_DISTILL_CACHE")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "mini_distill" / "tokens"


def test_training_rows_are_those_that_are_not_held_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = jsonl(tmp_path, [{"text": f"row {i}"} for i in range(60)], eval_fraction=0.3)
    data = prepare_data(config, tiny_tokenizer, show_progress=False)
    trained_on = {origin for i in range(len(data.train)) for origin in data.train.origins(i)}
    assert {row.origin for row in training_rows(config)} == trained_on and 30 < len(trained_on) < 55


# ---------------------------------------------------------------------------------------------------------------- real corpora


def test_question_and_answer_pairs_are_supervised_on_the_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here")
    from transformers import AutoTokenizer

    caplog.set_level(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    config = DataConfig(
        source="jsonl",
        path=str(SHARED / "corpora/gsm8k/train.jsonl"),
        prompt_column="question",
        completion_column="answer",
        max_rows=300,
        seq_len=512,
        cache_dir=str(tmp_path),
    )
    data = prepare_data(config, tokenizer, show_progress=False)
    check_sum(data.report)
    batch = data.train[0]
    supervised = tokenizer.decode(batch.labels[batch.labels != -100])
    assert "####" in supervised and 0 < (batch.labels != -100).sum() < 0.8 * len(batch.labels)
