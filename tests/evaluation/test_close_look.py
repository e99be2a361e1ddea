"""The closer look on tiny models: its figures are the evaluator's, its parts add up, and each token stands where it belongs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_distill.data.batch import Batch
from mini_distill.errors import DataError
from mini_distill.evaluation import differences, logit_chunks
from mini_distill.evaluation.close_look import CloseLook, Groups, rank_correlation, topk_agreement, write_details
from mini_distill.evaluation.evaluator import Evaluator
from mini_distill.evaluation.samples import Sample


class Origins:
    """Sequences of one document each, called after their number."""

    def origins(self, index: int) -> list[str]:
        return [f"rows.jsonl:{index}"]


@pytest.fixture
def look(tiny_tokenizer: Any, tiny_llama: Any, batches: list[Batch]) -> Callable[..., CloseLook]:
    """`look(teacher=…)` at both batches, done."""

    def build(student: Any = None, teacher: Any = None, given: list[Batch] | None = None, **settings: Any) -> CloseLook:
        found = CloseLook(student or tiny_llama(seed=0), teacher, tiny_tokenizer, Origins(), **settings)  # type: ignore[arg-type]
        found.over(batches if given is None else given, nullcontext)
        return found

    return build


def test_its_figures_are_those_of_the_evaluator(
    look: Callable[..., CloseLook], make_evaluator: Callable[..., Evaluator], tiny_llama: Any, batches: list[Batch]
) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    found = look(student, teacher).metrics()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert set(found) - set(expected) == {"eval/topk_agreement", "eval/rank_correlation"}


def test_chunks_change_nothing(look: Callable[..., CloseLook], tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_llama(seed=1)
    whole = look(teacher=teacher)
    monkeypatch.setattr(logit_chunks, "MAX_CHUNK_TOKENS", 5)
    in_chunks = look(teacher=teacher)
    assert in_chunks.metrics() == pytest.approx(whole.metrics(), rel=1e-6)
    assert [d["row"] for d in in_chunks.details()["differences"]] == [d["row"] for d in whole.details()["differences"]]


@pytest.mark.parametrize("name", ["position", "teacher_entropy", "even"])
def test_the_parts_of_a_slice_add_up_to_the_whole(look: Callable[..., CloseLook], tiny_llama: Any, name: str) -> None:
    found = look(teacher=tiny_llama(seed=1, initializer_range=0.5), group_of=Groups("even", lambda index, origin: str(index % 2 == 0)))
    parts, whole = found.details()["slices"][name], found.metrics()
    assert sum(part["tokens"] for part in parts) == whole["eval/tokens"] and len(parts) > 1
    for metric in ("student_nll", "teacher_nll", "forward_kl", "reverse_kl", "top1_agreement"):
        mean = sum(part["tokens"] * part[metric] for part in parts) / whole["eval/tokens"]
        assert mean == pytest.approx(whole[f"eval/{metric}"], rel=1e-9)


def test_positions_count_the_tokens_before_the_predicted_one(look: Callable[..., CloseLook], make_batch: Any) -> None:
    batch = make_batch(0, rows=1, seq=16)
    batch.labels.fill_(-100)
    batch.labels[0, [7, 8, 15]] = batch.input_ids[0, [7, 8, 15]]  # 7, 8 and 15 tokens before them
    found = look(given=[batch]).details()["slices"]["position"]
    assert [(part["label"], part["tokens"]) for part in found] == [("1–7", 1.0), ("8–15", 2.0)]


def test_documents_of_one_sequence_belong_to_their_own_groups(tiny_tokenizer: Any, tiny_llama: Any, make_batch: Any) -> None:
    class Two:
        def origins(self, index: int) -> list[str]:
            return ["german", "french"]

    batch = make_batch(0, rows=1, seq=16, prompt=1)
    batch.position_ids[0] = torch.tensor([*range(10), *range(6)])
    batch.labels[0, 10] = -100
    found = CloseLook(tiny_llama(seed=0), None, tiny_tokenizer, Two(), group_of=Groups("language", lambda index, origin: origin))  # type: ignore[arg-type]
    found.over([batch], nullcontext)
    assert {part["label"]: part["tokens"] for part in found.details()["slices"]["language"]} == {"german": 9.0, "french": 5.0}


def test_reliability_adds_up_to_the_calibration_error(look: Callable[..., CloseLook], tiny_llama: Any) -> None:
    found = look(teacher=tiny_llama(seed=1))
    for name in ("student", "teacher"):
        bins, tokens = found.details()["reliability"][name], found.metrics()["eval/tokens"]
        assert sum(of_bin["tokens"] for of_bin in bins) == tokens
        error = sum(of_bin["tokens"] * abs(of_bin["accuracy"] - of_bin["confidence"]) for of_bin in bins) / tokens
        assert error == pytest.approx(found.metrics()[f"eval/{name}_ece"], rel=1e-9)
        assert all(of_bin["low"] <= of_bin["confidence"] <= of_bin["high"] for of_bin in bins)


def test_the_text_with_the_greatest_difference_comes_first_with_its_tokens(
    look: Callable[..., CloseLook], tiny_llama: Any, tiny_tokenizer: Any, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    monkeypatch.setattr(differences, "FEWEST", 1)
    found = look(student, teacher, given=batches[:1]).details()["differences"]
    means = []
    for row in range(len(batches[0])):
        one = Batch(**{name: value[row : row + 1] for name, value in vars(batches[0]).items()})
        means.append((look(student, teacher, given=[one]).metrics()["eval/forward_kl"], row))
    assert [(d["forward_kl"], d["row"]) for d in found] == [
        (pytest.approx(mean), f"rows.jsonl:{row}") for mean, row in sorted(means, reverse=True)
    ]
    assert [(d["sequence"], d["token"]) for d in found] == [(row, 0) for _, row in sorted(means, reverse=True)]
    worst = batches[0].input_ids[max(means)[1]].tolist()
    assert "".join(token["text"] for token in found[0]["tokens"]) == tiny_tokenizer.decode(worst)
    shown = [token for token in found[0]["tokens"] if "forward_kl" in token]
    assert len(shown) == 12 and not any("forward_kl" in token for token in found[0]["tokens"][:4])  # the prompt
    assert sum(token["forward_kl"] for token in shown) / 12 == pytest.approx(found[0]["forward_kl"])
    with torch.no_grad():
        logits = teacher(torch.tensor([worst])).logits[0, 4, :62]
    assert found[0]["tokens"][5]["teacher_top"] == tiny_tokenizer.decode([int(logits.argmax())])
    assert found[0]["tokens"][5]["teacher_nll"] == pytest.approx(-float(logits.log_softmax(-1)[worst[5]]), rel=1e-5)


def test_no_more_differences_are_kept_than_asked_for(
    look: Callable[..., CloseLook], tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "FEWEST", 1)
    teacher = tiny_llama(seed=1)
    all_of_them = look(teacher=teacher, num_differences=9).details()["differences"]
    assert look(teacher=teacher, num_differences=2).details()["differences"] == all_of_them[:2]
    assert look(teacher=teacher, num_differences=0).details()["differences"] == []


def test_without_a_teacher_there_is_nothing_to_differ_from(look: Callable[..., CloseLook]) -> None:
    found = look()
    assert found.details()["differences"] == [] and set(found.details()["slices"]) == {"position"}
    assert not any("teacher" in name or "kl" in name for name in found.metrics())


def test_nothing_supervised_is_an_error(look: Callable[..., CloseLook]) -> None:
    with pytest.raises(DataError, match="supervised"):
        look(given=[])


def test_top_k_agreement_is_the_share_of_common_tokens() -> None:
    student = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    teacher = torch.tensor([[4.0, 5.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert topk_agreement(student, teacher, 2).tolist() == [1.0, 1.0]
    assert topk_agreement(student, teacher, 3).tolist() == [pytest.approx(2 / 3), 1.0]
    assert topk_agreement(student, teacher, 99).tolist() == [1.0, 1.0]


def test_rank_correlation_is_one_for_the_same_order_and_minus_one_for_the_opposite() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(3 * logits + 1, logits).tolist() == [1.0] * 4
    assert rank_correlation(-logits, logits).tolist() == [-1.0] * 4


def test_rank_correlation_is_that_of_pearson_between_ranks() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 40, generator=draw), torch.randn(3, 40, generator=draw)
    ranks = [logits.argsort(-1).argsort(-1).double() for logits in (student, teacher)]
    expected = [torch.corrcoef(torch.stack([ranks[0][i], ranks[1][i]]))[0, 1].item() for i in range(3)]
    assert rank_correlation(student, teacher).tolist() == pytest.approx(expected, rel=1e-9)


def test_details_are_strict_json(tmp_path: Path) -> None:
    write_details(tmp_path, {"slices": {"position": [{"student_nll": math.inf}]}}, [Sample("a", {"student": "b"})])
    found = json.loads((tmp_path / "details.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found == {"slices": {"position": [{"student_nll": None}]}, "samples": [{"prompt": "a", "continuations": {"student": "b"}}]}


def test_tokens_that_spell_a_character_together_show_it_once() -> None:
    from transformers import AutoTokenizer

    from mini_distill.models.loading import embedded_path

    tokenizer = AutoTokenizer.from_pretrained(embedded_path())
    text = "def naïve(): # 日本 → ok"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = differences.token_texts(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text and "\ufffd" not in "".join(pieces)
