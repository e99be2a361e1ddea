"""Opening a source by its settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import DataConfig
from mini_distill.contract import build_config
from mini_distill.data.row import Row, RowError
from mini_distill.data.sources import checked_rows, columns_of, find_files, open_source
from mini_distill.errors import ConfigError, DataError


class Squares:
    """A user's own source."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def rows(self) -> Iterator[Any]:
        yield from (
            {"text": "bare"} if n == 9 and self.config.name == "bare" else Row(f"square {n}", {"text": str(n * n)}) for n in range(10)
        )

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "squares"}


class NoSource:
    def __init__(self, config: DataConfig) -> None: ...


class Raises:
    """A source that cannot be made."""

    def __init__(self, config: DataConfig) -> None:
        if config.name == "known":
            raise DataError("data.name", "its own line")
        raise KeyError("no such table\nin the database")


def rows(config: DataConfig, **options: Any) -> list[Row | RowError]:
    return list(checked_rows(open_source(config, **options), config))


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "in/c.TXT", "in/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(path: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find_files(str(tmp_path / path), (".txt",), "data.path")]

    assert names("b.txt") == ["b.txt"] and names("in/d.md") == ["in/d.md"]
    assert names(".") == ["a.txt", "b.txt", "in/c.TXT"]
    assert names("**/*.md") == ["in/d.md"]
    with pytest.raises(DataError, match=r"data\.path: no \.txt file in the folder"):
        (tmp_path / "empty").mkdir()
        names("empty")
    with pytest.raises(DataError, match=r"data\.path: no file matches"):
        names("*.nothing")


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n{"text": "t"}\n')
    bad, good = rows(DataConfig(source="jsonl", path=str(file)))
    assert isinstance(good, Row) and isinstance(bad, RowError)
    assert f"{file}:1: no column 'text' (there are: question, answer)" in str(bad) and "data.prompt_column" in str(bad)


def test_the_columns_are_what_the_settings_name() -> None:
    assert columns_of(DataConfig()) == ("text",)
    assert columns_of(DataConfig(text_column="body")) == ("body",)
    assert columns_of(DataConfig(prompt_column="q", completion_column="a")) == ("q", "a")
    assert columns_of(DataConfig(messages_column="turns")) == ("turns",)


def test_the_held_out_path_is_opened_by_the_same_settings(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    config = DataConfig(source="jsonl", path=str(tmp_path / "train.csv"), eval_path=str(tmp_path / "eval.csv"))
    (row,) = rows(config, held_out=True)
    assert isinstance(row, Row) and row.columns == {"text": "eval"}
    with pytest.raises(DataError, match=r"data\.eval_path: no file matches"):
        open_source(DataConfig(source="text", path=str(tmp_path / "train.csv"), eval_path=str(tmp_path / "none*")), held_out=True)


def test_a_user_s_own_class_is_a_source() -> None:
    squares = rows(DataConfig(source=f"{__name__}.Squares"))
    assert [row.columns["text"] for row in squares if isinstance(row, Row)][:4] == ["0", "1", "4", "9"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module.Source", "cannot import 'no_such_module.Source'"),
        (f"{__name__}.Missing", "cannot import"),
        (f"{__name__}.NoSource", "has no method rows()"),
        ("os.path", "'os.path' is a module, expected a class"),
        ("os.getcwd", "'os.getcwd' is a builtin_function_or_method, expected a class"),
        ("pathlib.Path", "pathlib.Path cannot be made (TypeError: "),
        (f"{__name__}.Raises", "Raises cannot be made (KeyError: 'no such table"),
    ],
)
def test_a_class_that_is_no_source_is_one_line(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source=source))
    assert str(caught.value).startswith("data.source: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_user_s_class_raised_keeps_its_traceback() -> None:
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source=f"{__name__}.Raises"))
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.__cause__.__traceback__
    with pytest.raises(DataError, match=r"data\.name: its own line"):
        open_source(DataConfig(source=f"{__name__}.Raises", name="known"))


def test_a_user_s_module_that_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_that_raises.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"data\.source: cannot import 'module_that_raises\.Source' \(ZeroDivisionError: "):
        open_source(DataConfig(source="module_that_raises.Source"))


def test_a_user_s_rows_have_to_be_rows() -> None:
    with pytest.raises(DataError, match=r"rows\(\) of .*Squares gave dict, expected"):
        rows(DataConfig(source=f"{__name__}.Squares", name="bare"))


@pytest.mark.parametrize(
    ("settings", "where", "remedy"),
    [
        ({"path": "x.txt"}, "data.path", "data=text or data=jsonl or data=hub"),
        ({"source": "text", "path": __file__, "text_column": "body"}, "data.text_column", "data=jsonl or data=hub"),
        ({"source": "jsonl", "path": __file__, "eval_split": "test"}, "data.eval_split", "data=hub"),
        (
            {"source": "mixture", "mixture": {"a": {"source": "python_stdlib"}}, "max_rows": 5},
            "data.max_rows",
            "data.mixture.<name>.max_rows",
        ),
        ({"source": "text", "path": __file__, "document_separator": "("}, "data.document_separator", "no regular expression"),
    ],
)
def test_a_setting_that_the_source_would_pass_over_is_refused(settings: dict[str, Any], where: str, remedy: str) -> None:
    """`data.path=corpus.txt` without data=text trained on the standard library."""
    with pytest.raises(ConfigError) as caught:
        build_config({"data": settings})
    (problem,) = [problem for problem in caught.value.problems if problem.where.startswith("data")]
    assert problem.where == where and remedy in str(problem)


# ------------------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    parts["train"].save_to_disk(str(tmp_path / "single"))
    return tmp_path


def test_a_saved_data_set_is_read_by_split(saved: Path) -> None:
    config = DataConfig(source="hub", path=str(saved / "saved"), eval_split="test")
    for held_out, text in ((False, "train 0"), (True, "test 0")):
        row = rows(config, held_out=held_out)[0]
        assert isinstance(row, Row) and row.columns == {"text": text}
    assert open_source(config).fingerprint() == open_source(config).fingerprint() != open_source(config, held_out=True).fingerprint()
    assert len(rows(DataConfig(source="hub", path=str(saved / "single")))) == 3


def test_another_data_set_may_be_held_out(saved: Path) -> None:
    """`eval_path` of a hub data set was passed over: the training rows were opened again."""
    config = DataConfig(source="hub", path=str(saved / "single"), eval_path=str(saved / "saved"), split="test")
    row = rows(config, held_out=True)[0]
    assert isinstance(row, Row) and row.columns == {"text": "test 0"}


def test_files_of_a_folder_can_be_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    streamed = rows(DataConfig(source="hub", path=str(tmp_path), streaming=True))
    assert [row.columns["text"] for row in streamed if isinstance(row, Row)] == ["a", "b"]


def test_a_split_that_is_not_there_or_a_hub_that_is_not_reached_is_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.path: cannot load the data set .*, split 'validation'"):
        open_source(DataConfig(source="hub", path=str(saved / "saved"), split="validation"))
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source="hub", path="org/name"))
    assert "Couldn't reach 'org/name'" in str(caught.value) and "save_to_disk" in str(caught.value) and "\n" not in str(caught.value)


def test_a_stream_that_breaks_names_the_row(saved: Path) -> None:
    source = open_source(DataConfig(source="hub", path=str(saved / "single")))

    def breaking() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    source.data = breaking()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"single\[train\]\[1\]: cannot be read \(ConnectionError: reset by peer\)"):
        list(source.rows())
