"""The page as a browser gets it: nothing fetched, nothing run, every text escaped, every figure traceable."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from measured_folders import HOSTILE, details, status, summary, write_run

from mini_distill.report import report
from mini_distill.reporting.figures import text_of
from mini_distill.reporting.page import breakable

VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Elements of a page with their attributes and the text directly in them; raises where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        assert not self.open, f"<{self.elements[self.open[-1]][0]}> is never closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        opened = self.elements[self.open.pop()][0]
        assert opened == tag, f"<{opened}> is closed by </{tag}> in line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of every element of a kind."""
        return [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]

    @property
    def text(self) -> str:
        """All there is to read."""
        return "".join(text for name, _, texts in self.elements if name != "style" for text in texts)


def page_of(*folders: Path) -> str:
    """The report on these folders."""
    return report(folders, folders[0].parent / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page of each kind, on folders whose texts are hostile."""
    tmp_path = tmp_path_factory.mktemp("folders")
    hostile = {"details": details(HOSTILE), "summary": summary(3.5, 8) | {"note": HOSTILE, f"task/{HOSTILE}/student": 0.5}}
    run = write_run(tmp_path / "run", **hostile)
    other = write_run(
        tmp_path / "other & <b>", "objective=jsd", "data=text", f"data.path={tmp_path}", f'data.document_separator="{"<i>$"}"'
    )
    write_run(tmp_path / "sweep" / "a<b>", **hostile)
    write_run(tmp_path / "sweep" / "c", "objective.temperature=2", nll=3.2)
    write_run(tmp_path / "sweep" / "d", summary=None, details=None, status=status(3, "failed", error=HOSTILE))
    return {"run": page_of(run), "several": page_of(run, other), "sweep": page_of(tmp_path / "sweep")}


def test_every_page_is_well_formed_and_says_what_it_is(pages: dict[str, str]) -> None:
    for html in pages.values():
        page = Page(html)
        assert html.startswith("<!DOCTYPE html>") and page.all("html")[0][0]["lang"] == "en"
        assert len(page.all("h1")) == 1 and page.all("title")[0][1].endswith("mini_distill")


def test_nothing_is_fetched_and_nothing_runs(pages: dict[str, str]) -> None:
    for html in pages.values():
        page = Page(html)
        tags = {name for name, _, _ in page.elements}
        assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
        for _, attributes, _ in page.elements:
            assert not {name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")}
            assert all(attributes.get(name, "#").startswith("#") for name in ("href", "xlink:href"))
            assert "url(" not in attributes.get("style", "") and attributes.get("clip-path", "url(#").startswith("url(#")
        style = page.all("style")[0][1]
        assert "url(" not in style and "@import" not in style
        assert "default-src 'none'" in next(a["content"] for a, _ in page.all("meta") if "http-equiv" in a)


def test_text_of_models_and_data_is_shown_and_never_obeyed(pages: dict[str, str]) -> None:
    for html in pages.values():
        assert not any(character in html for character in "\x1b\x00\u202e\u2066")
    for kind in ("run", "sweep"):
        text = Page(pages[kind]).text
        assert "<script>alert(1)</script>" in text and "{{ 7 * 7 }}{% raw %}" in text and "&amp;" in text
        assert r"\x1b[31m\u202e\u2066\x00" in text
    assert "other & <b>" in Page(pages["several"]).text and "<i>$" in Page(pages["several"]).text


def test_the_path_of_a_setting_goes_on_in_the_next_line_between_words() -> None:
    """On a telephone `objective.divergence_options` broke within a word."""
    assert breakable("objective.top_k <1.") == Markup("objective.<wbr>top_<wbr>k &lt;1.")


def test_three_samples_are_open_and_the_others_folded(tmp_path: Path) -> None:
    """Sixteen samples made the page of a run 17,000 pixels long."""
    samples = [{"prompt": f"prompt {i}", "continuations": {"student": "text"}} for i in range(5)]
    page = page_of(write_run(tmp_path / "run", details={"samples": samples}))
    before, _, folded = page.partition("<summary>2 more samples</summary>")
    assert "prompt 2" in before and "prompt 3" not in before and "prompt 4" in folded and "Sample 5" in folded
    few = page_of(write_run(tmp_path / "few", details={"samples": samples[:3]}))
    assert "prompt 2" in few and "more samples" not in few


def test_half_of_a_character_and_other_scripts_survive(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "run", details=details("عربي 漢字 \ud83d")))
    assert "عربي 漢字 \\ud83d" in Page(html).text


def sources(folder: Path) -> dict[str, float]:
    """Every number of summary.json and details.json by the key that the page gives it."""
    found = dict(json.loads((folder / "summary.json").read_text()))
    look = json.loads((folder / "details.json").read_text())
    for name, parts in look["slices"].items():
        found |= {f"slices/{name}/{part['label']}/{key}": value for part in parts for key, value in part.items()}
    for i, entry in enumerate(look["differences"]):
        found[f"differences/{i}/forward_kl"] = entry["forward_kl"]
        for j, token in enumerate(entry["tokens"]):
            found |= {f"differences/{i}/tokens/{j}/{key}": value for key, value in token.items()}
    for name, task in look["tasks"].items():
        found |= {f"tasks/{name}/{group['label']}/items": group["items"] for group in task["groups"]}
        found[f"tasks/{name}/chance"] = task["chance"]
    return found


def test_every_figure_of_a_run_can_be_traced_to_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", details=details("def"))
    known, page = sources(run), Page(page_of(run))
    shown = page.all("data")
    assert len(shown) > 100
    for attributes, text in shown:
        key, value = attributes["data-key"], float(attributes["value"])
        if key in known:
            assert value == known[key]
            if key in json.loads((run / "summary.json").read_text()):
                assert text == text_of(key, value)
            continue
        first, second, *more = (known[part] for part in key.split())
        by_hand = (first - more[0] and (first - second) / (first - more[0])) if more else first / second
        assert value in (pytest.approx(by_hand), pytest.approx(abs(first - second)), pytest.approx(first - second)), key
    assert {key for key, value in json.loads((run / "summary.json").read_text()).items() if not isinstance(value, str)} <= {
        part for attributes, _ in shown for part in attributes["data-key"].split()
    }


def test_every_chart_names_its_source_and_says_in_words_what_it_shows(pages: dict[str, str]) -> None:
    for name, html in pages.items():
        page = Page(html)
        assert all(attributes["data-key"] for attributes, _ in page.all("figure"))
        drawings = [attributes for attributes, _ in page.all("svg") if attributes.get("aria-hidden") != "true"]
        assert len(drawings) == len(page.all("figure")) >= {"run": 8, "several": 3, "sweep": 4}[name]
        assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 30 for attributes in drawings)


def test_every_table_has_headings_and_can_be_scrolled_by_keyboard(pages: dict[str, str]) -> None:
    for html in pages.values():
        page = Page(html)
        assert len(page.all("table")) == len(page.all("caption")) == sum(a.get("role") == "region" for a, _ in page.all("div")) > 0
        assert {attributes["scope"] for attributes, _ in page.all("th")} == {"row", "col"}
        assert all(attributes.get("tabindex") == "0" for attributes, _ in page.all("div") if attributes.get("role") == "region")


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_their_background(pages: dict[str, str], scheme: int) -> None:
    block = pages["run"].split(":root {")[scheme + 1].split("}")[0]
    colours = {
        name.strip(): value.strip()
        for name, _, value in (entry.partition(":") for entry in block.split(";"))
        if value.strip().startswith("#")
    }
    background = luminance(colours["--card"])
    for name in ("--ink", "--soft", "--student", "--teacher", "--control", *(f"--run{i}" for i in range(8)), "--other"):
        low, high = sorted((luminance(colours[name]), background))
        assert (high + 0.05) / (low + 0.05) >= (2.5 if name == "--other" else 4.5), name


def test_a_page_stays_small_however_long_the_run_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20_000)
    assert len(page_of(run)) < 200_000
