"""The doctor finds each fault in a set-up that has it, and none in one that has not."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mini_distill.cli import load_config
from mini_distill.data.batch import Batch
from mini_distill.diagnosis import first_rows as first_rows_module
from mini_distill.diagnosis import models as checks
from mini_distill.diagnosis import rows as rows_module
from mini_distill.diagnosis.finding import DOUBTFUL, GOOD, WRONG, Finding
from mini_distill.diagnosis.rows import learned_text
from mini_distill.errors import ConfigError
from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.objective import DivergenceTerm, Objective
from mini_distill.models.head import LanguageModel
from mini_distill.teachers.online import OnlineTeacher
from mini_distill.train import distill_step

module: Any = importlib.import_module("mini_distill.doctor")
OBJECTIVE = Objective(forward_kl, "forward_kl", vocab_size=62)


def examine(command: Sequence[str], *more: str) -> dict[str, Finding]:
    """The findings by name; of several with the same, the worst."""
    order = [GOOD, DOUBTFUL, WRONG]
    found: dict[str, Finding] = {}
    for finding in module.examine(load_config([*command, *more])):
        if finding.name not in found or order.index(finding.verdict) > order.index(found[finding.name].verdict):
            found[finding.name] = finding
    return found


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., list[str]]:
    """`rows([...])`: overrides that read them."""

    def write(given: Sequence[dict[str, Any]], *settings: str) -> list[str]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        return ["data=jsonl", f"data.path={file}", *settings]

    return write


def batch(rows: int = 3, seq: int = 16) -> Batch:
    ids = torch.randint(4, 62, (rows, seq), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 10:] = -100
    positions = torch.arange(seq).expand(rows, -1).contiguous()
    return Batch(ids, labels, positions, torch.arange(rows), torch.ones_like(ids))


def test_a_sound_set_up_has_nothing_wrong_but_a_teacher_that_knows_nothing(tiny_command: list[str]) -> None:
    found = examine(tiny_command)
    assert [name for name, finding in found.items() if finding.verdict == WRONG] == ["teacher on the data"]  # its weights are random
    expected = {"identity", "fused loss", "mask", "accumulation", "precision", "packing", "shift", "ends of documents", "end of sequence"}
    assert expected <= {name for name, finding in found.items() if finding.verdict != WRONG}


def test_what_is_wrong_ends_in_one_line_and_exit_code_two(tiny_command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"doctor: 1 of \d+ checks are wrong") as error:
        module.doctor(load_config(tiny_command))
    assert error.value.exit_code == 2
    out = capsys.readouterr().out
    assert "✗ teacher on the data" in out and "→ The teacher knows nothing" in out and "1 wrong" in out


@pytest.mark.parametrize("teacher", [["teacher=none", "objective=ce", "student=mini_2m"]])
def test_without_a_teacher_what_can_be_checked_is(tiny_command: list[str], tiny_teacher: Path, teacher: list[str]) -> None:
    sizes = [
        "student.hidden_size=16",
        "student.num_layers=1",
        "student.num_heads=2",
        "student.num_kv_heads=1",
        "student.intermediate_size=16",
    ]
    command = [text for text in tiny_command if not text.startswith(("teacher", "student"))]
    found = examine(command, *teacher, *sizes, f"student.tokenizer={tiny_teacher}")
    assert not [finding for finding in found.values() if finding.verdict == WRONG]
    assert "not checked" in found["teacher"].measured and "identity" not in found and "fused loss" in found


def test_answers_that_were_cut_off_are_found(tiny_command: list[str], rows: Callable[..., list[str]]) -> None:
    given = [{"q": "a" * (50 if i % 2 else 5), "a": "yes"} for i in range(40)]
    found = examine(
        tiny_command, *rows(given, "data.text_column=null", "data.prompt_column=q", "data.completion_column=a", "data.seq_len=32")
    )
    assert found["answers"].verdict == WRONG and "20 rows lost their whole answer" in found["answers"].measured


def test_a_small_share_of_learned_tokens_is_doubted(tiny_command: list[str], rows: Callable[..., list[str]]) -> None:
    given = [{"q": f"{i} " + "a" * 110, "a": "b"} for i in range(20)]
    found = examine(
        tiny_command, *rows(given, "data.text_column=null", "data.prompt_column=q", "data.completion_column=a", "data.seq_len=128")
    )
    assert found["supervised tokens"].verdict == DOUBTFUL


def test_copies_are_counted(tiny_command: list[str], rows: Callable[..., list[str]]) -> None:
    found = examine(tiny_command, *rows([{"text": "the same text"}] * 10 + [{"text": f"text {i}"} for i in range(10)]))
    assert found["duplicates"].verdict == DOUBTFUL and "9 of 20" in found["duplicates"].measured


def test_padding_is_seen_where_nothing_is_packed(tiny_command: list[str]) -> None:
    assert examine(tiny_command, "data.packing=false", "data.seq_len=128")["padding"].verdict == DOUBTFUL


def test_of_every_part_of_a_mixture_the_first_rows_are_read(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path
) -> None:
    """The limit of 200 rows held for all sources but a mixture, whose parts were tokenised whole."""
    monkeypatch.setattr(first_rows_module, "MOST_ROWS", 20)
    command = [text for text in tiny_command if not text.startswith("data")]
    file = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a cat"}]
    file.write_text("".join(json.dumps({"messages": talk, "id": i}) + "\n" for i in range(50)))
    parts = f"{{a: {{source: jsonl, path: {tiny_corpus}}}, b: {{source: jsonl, path: {file}, messages_column: messages, chat_template: chatml}}}}"
    found = examine(command, "data=mixture", f"data.mixture={parts}", "data.seq_len=64")
    assert found["rows used"].measured.startswith("40 read, 0 dropped")
    assert "only the first rows" in found["passes"].measured and "20 of 20" in found["generation prompt"].measured


def test_a_large_text_is_not_tokenised_whole(tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`under a minute` was hours for a file of gigabytes: a text file is one row."""
    monkeypatch.setattr(first_rows_module, "MOST_CHARACTERS", 2000)
    file = tmp_path / "large.txt"
    file.write_text("the cat sat on a mat\n" * 5000)
    found = examine([text for text in tiny_command if not text.startswith("data")], "data=text", f"data.path={file}", "data.seq_len=32")
    assert "of 2,002 tokens are learned" in found["supervised tokens"].measured
    assert "only the first rows" in found["passes"].measured


def test_where_all_rows_are_few_the_passes_are_known(tiny_command: list[str]) -> None:
    assert "passes over" in examine(tiny_command)["passes"].measured


@pytest.mark.parametrize(("last", "supervised", "verdict"), [(2, True, GOOD), (2, False, WRONG), (9, True, WRONG)])
def test_documents_whose_end_is_not_learned_are_wrong(tiny_tokenizer: Any, last: int, supervised: bool, verdict: str) -> None:
    rows = SimpleNamespace(
        tokens={"input_ids": np.array([5, 6, last] * 2), "supervised": np.array([True, True, supervised] * 2)},
        offset=np.array([0, 3, 6]),
        lengths=np.array([3, 3]),
    )
    assert rows_module._ends(load_config([]), SimpleNamespace(rows=rows), tiny_tokenizer).verdict == verdict  # type: ignore[arg-type]


def test_a_model_that_predicts_the_token_it_sees_is_doubted(tiny_llama: Any) -> None:
    """As after training on labels that were not shifted."""
    model = tiny_llama(seed=0, tie_word_embeddings=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    finding = checks.check_shift(LanguageModel(model), "teacher", batch())
    assert finding.verdict == DOUBTFUL


def test_a_divergence_that_is_not_zero_at_equality_is_wrong(tiny_llama: Any) -> None:
    def cross_entropy(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)

    term = DivergenceTerm("mine", cross_entropy, 1.0, 1.0, {}, True)
    objective = Objective(None, "", kl_weight=0.0, ce_weight=0.0, vocab_size=62, further=[term])
    teacher = OnlineTeacher(tiny_llama(seed=1))
    (finding,) = checks.check_identity(objective, teacher, batch(), 62)
    assert finding.verdict == WRONG
    (good,) = checks.check_identity(OBJECTIVE, teacher, batch(), 62)
    assert good.verdict == GOOD


class Whole:
    """Steps with a fault."""

    @staticmethod
    def mean_of_each_batch(student: Any, teacher: Any, given: Batch, objective: Objective) -> Any:
        """The mistake that gives short answers more weight when accumulating."""
        sums = distill_step(student, teacher, given, objective)
        return replace(sums, loss=sums.loss / (given.labels != -100).sum())

    @staticmethod
    def every_position(student: Any, teacher: Any, given: Batch, objective: Objective) -> Any:
        """Prompts and padding reach the loss."""
        sums = distill_step(student, teacher, given, objective)
        hidden = student.model.base_model(input_ids=given.input_ids, position_ids=given.position_ids).last_hidden_state
        return replace(sums, loss=sums.loss + 1e-3 * hidden.sum())

    @staticmethod
    def coarse_under_autocast(student: Any, teacher: Any, given: Batch, objective: Objective) -> Any:
        """Half precision where it must not be."""
        sums = distill_step(student, teacher, given, objective)
        if torch.is_autocast_enabled("cpu"):
            sums = replace(sums, loss=sums.loss + 0.5 * sum(p.sum() for p in student.parameters()))
        return sums


@pytest.mark.parametrize(
    ("check", "fault", "verdict"),
    [
        (checks.check_accumulation, Whole.mean_of_each_batch, WRONG),
        (checks.check_mask, Whole.every_position, WRONG),
        (
            partial(checks.check_precision, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
            Whole.coarse_under_autocast,
            DOUBTFUL,
        ),
    ],
    ids=["accumulation", "mask", "precision"],
)
def test_a_step_with_a_fault_is_found_out(tiny_llama: Any, check: Callable[..., Finding], fault: Any, verdict: str) -> None:
    student, teacher = LanguageModel(tiny_llama(seed=0)).eval(), OnlineTeacher(tiny_llama(seed=1))
    assert check(student, teacher, OBJECTIVE, batch(), step=distill_step).verdict == GOOD
    assert check(student, teacher, OBJECTIVE, batch(), step=fault).verdict == verdict


def test_a_fused_loss_that_differs_is_found_out(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = LanguageModel(tiny_llama(seed=0)).eval(), OnlineTeacher(tiny_llama(seed=1))
    assert checks.check_fused(OBJECTIVE, student, teacher, batch()).verdict == GOOD
    original = nn.functional.nll_loss
    monkeypatch.setattr("mini_distill.losses.objective.nll_loss", lambda *a, **k: original(*a, **k) * (1.0 if len(a[1]) > 20 else 1.1))
    monkeypatch.setattr("mini_distill.losses.linear.TILE", 62 * 4)
    assert checks.check_fused(OBJECTIVE, student, teacher, batch()).verdict == WRONG


def test_what_is_learned_stands_in_brackets(tiny_tokenizer: Any) -> None:
    ids = torch.tensor([tiny_tokenizer("who? me.").input_ids])
    labels = ids.clone()
    labels[:, :4] = -100
    given = Batch(ids, labels, torch.arange(8)[None], torch.zeros(1), torch.ones_like(ids))
    assert learned_text(given, tiny_tokenizer) == "who?⟦ me.⟧"
