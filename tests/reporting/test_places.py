"""Paths on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from measured_folders import details, status, write_run

from mini_distill.report import report
from mini_distill.reporting.places import place_of, short_path, without_paths
from mini_distill.reporting.settings import shown, shown_apart


def test_an_absolute_path_keeps_its_last_parts() -> None:
    assert short_path("/home/me/data/tinystories/stories.txt (its end)") == "…/tinystories/stories.txt (its end)"
    assert [short_path(text) for text in ("stories.txt", "org/model", "/a/b", "/")] == ["stories.txt", "org/model", "/a/b", "/"]


def test_a_sentence_keeps_all_but_its_paths() -> None:
    said = "data.path: no such file '/home/me/data/a.jsonl:3'. See https://a.org/b/c/d, 1/2/3, <b>x</b> and /a/b."
    assert without_paths(said) == "data.path: no such file '…/data/a.jsonl:3'. See https://a.org/b/c/d, 1/2/3, <b>x</b> and /a/b."


def test_a_folder_is_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of(tmp_path / "runs" / "a") == place_of(Path("runs/a")) == "runs/a"
    monkeypatch.chdir("/")
    assert place_of(Path("/one/two/three/four")) == "…/three/four"


def test_paths_that_differ_are_shown_as_far_as_they_do() -> None:
    assert shown_apart(["/a/x/c/d", "/b/x/c/d"]) == ["/a/x/c/d", "/b/x/c/d"]
    assert shown_apart(["/q/a/x/c/d", "/q/b/x/c/d"]) == ["…/a/x/c/d", "…/b/x/c/d"]
    assert shown_apart(["/q/a/c/d", "/q/a/c/e"]) == ["…/c/d", "…/c/e"] and shown_apart([1, None]) == ["1", "null"]
    assert shown(["/q/a/c/d"]) == '["…/c/d"]'


def test_no_page_says_how_the_disk_is_laid_out(tmp_path: Path) -> None:
    """Every passage was titled with the whole path of one file, and the page is made to be passed on."""
    look = details()
    look["differences"][0] |= {"row": f"{tmp_path}/data/corpus.txt (its end)", "sequence": 7, "token": 64}
    data = ["data=text", f"data.path={tmp_path}/data/corpus.txt", "teacher=hf", f"teacher.path={tmp_path}/models/big"]
    run = write_run(tmp_path / "runs" / "a", *data, details=look)
    other = write_run(tmp_path / "runs" / "b", *data, "objective=jsd")
    failed = status(3, "failed", error=f"data.path: no such file '{tmp_path}/data/corpus.txt'.")
    write_run(tmp_path / "runs" / "c", *data, "seed=3", summary=None, status=failed)
    for folders in ([run], [run, other, tmp_path / "runs" / "c"], [tmp_path / "runs"]):
        page = report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
        assert str(tmp_path) not in page and "corpus.txt" in page
    assert "<bdi>…/data/corpus.txt (its end), held-out sequence 7, token 64</bdi>" in report([run]).read_text(encoding="utf-8")
