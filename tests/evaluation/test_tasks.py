"""Tasks by likelihood on tiny models: each figure from the model's own logits, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_distill.config import FullEvaluationConfig, PairsConfig
from mini_distill.errors import ConfigError, DataError, MiniDistillError
from mini_distill.evaluation.likelihood import Continuation, encode, log_likelihoods
from mini_distill.evaluation.pairs import read_pairs
from mini_distill.evaluation.tasks import check_tasks, run_tasks
from mini_distill.models.head import LanguageModel

Rows = Sequence[dict[str, Any]]


def reference(model: Any, ids: Sequence[int], first: int, vocab: int = 62) -> float:
    """Token by token in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :, :vocab].double()
    return sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(first, len(ids)))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Rows], str]:
    """`jsonl(rows)`: the path of a file of them."""

    def write(rows: Rows) -> str:
        file = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture
def score(tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., tuple[dict[str, float], dict[str, Any]]]:
    """`score(pairs=…, choices=…)`: what teacher and student get."""

    def run(vocab: int = 64, seed: int = 0, **settings: Any) -> tuple[dict[str, float], dict[str, Any]]:
        config = FullEvaluationConfig(batch_size=3, **settings)
        check_tasks(config, seed)
        models = {"teacher": tiny_llama(seed=1, vocab=vocab), "student": tiny_llama(seed=0, vocab=vocab)}
        found: dict[str, float] = {}
        details: dict[str, Any] = {}
        for figures, of_task in run_tasks(config, models, tiny_tokenizer, torch.device("cpu"), nullcontext, seed=seed):
            found, details = found | figures, details | of_task
        return found, details

    return run


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


# -------------------------------------------------------------------------------------------------------------------- likelihood


def test_log_likelihoods_are_those_of_a_loop_whatever_stands_beside(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = tiny_llama(seed=0)
    texts = [
        encode(tiny_tokenizer, *pair) for pair in (("", "the cat"), ("a dog", " sat on a mat"), ("x", "y"), ("", "the cat"), ("", "z"))
    ]
    for batch_size in (1, 2, 16):
        found = log_likelihoods(LanguageModel(model), tiny_tokenizer, texts, batch_size=batch_size, autocast=nullcontext)
        assert found == pytest.approx([reference(model, text.input_ids, text.first) for text in texts], rel=1e-5)


def test_without_a_context_the_first_token_follows_the_beginning_of_sequence(tiny_tokenizer: Any) -> None:
    assert encode(tiny_tokenizer, "", "ab") == Continuation((1, *ids_of(tiny_tokenizer, "ab")), 1)


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation(tiny_tokenizer: Any) -> None:
    assert encode(tiny_tokenizer, "ab ", "c") == encode(tiny_tokenizer, "ab", " c")
    assert encode(tiny_tokenizer, "ab", " c").first == 2


def test_a_text_without_tokens_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        encode(tiny_tokenizer, "ab", "")


def test_a_text_longer_than_the_positions_is_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    text = encode(tiny_tokenizer, "", "a" * 200)
    with pytest.raises(DataError, match=r"201 tokens, and the model has 128 positions"):
        log_likelihoods(LanguageModel(tiny_llama()), tiny_tokenizer, [text], autocast=nullcontext)


# ------------------------------------------------------------------------------------------------------------------------- pairs


BLIMP = [
    {"sentence_good": "the cat sits", "sentence_bad": "the cat sit", "UID": "agreement"},
    {"sentence_good": "she saw herself", "sentence_bad": "she saw himself", "UID": "anaphor"},
    {"sentence_good": "two birds sit", "sentence_bad": "two birds sits", "UID": "agreement"},
]


def test_accuracy_is_the_share_of_likelier_good_sentences(score: Any, jsonl: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    found, details = score(pairs={"blimp": {"path": jsonl(BLIMP)}})
    for name, seed in (("teacher", 1), ("student", 0)):
        model = tiny_llama(seed=seed)

        def nats(text: str, model: Any = model) -> float:
            return reference(model, [1, *ids_of(tiny_tokenizer, f" {text}")], 1)

        right = [nats(row["sentence_good"]) > nats(row["sentence_bad"]) for row in BLIMP]
        assert found[f"task/blimp/{name}"] == pytest.approx(sum(right) / 3)
        assert found[f"task/blimp/agreement/{name}"] == pytest.approx((right[0] + right[2]) / 2)
        share = sum(right) / 3
        assert found[f"task/blimp/{name}_standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 3))
        share = (right[0] + right[2]) / 2
        assert found[f"task/blimp/agreement/{name}_standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 2))
    assert not any(key.endswith("_from_half") for key in found)  # right or wrong is no matter of preference
    assert found["task/blimp/items"] == 3 and details["blimp"]["kind"] == "accuracy" and details["blimp"]["chance"] == 0.5
    assert [group["label"] for group in details["blimp"]["groups"]] == ["agreement", "anaphor"]


def test_crows_pairs_are_scored_as_they_come_and_are_stereotypes(score: Any, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Which sentence stereotypes more does not depend on the direction of the pair: `sent_more` is it in both."""
    file = tmp_path / "crows.csv"
    file.write_text(
        ",sent_more,sent_less,stereo_antistereo,bias_type\n0,a dog ran,a cat ran,stereo,age\n1,we saw two,we saw one,antistereo,religion\n"
    )
    found, details = score(pairs={"crows": {"path": str(file)}})
    model = tiny_llama(seed=0)
    more, less = (reference(model, [1, *ids_of(tiny_tokenizer, text)], 1) for text in ("we saw two", "we saw one"))  # no blank before
    assert found["task/crows/religion/student"] == float(more > less) and details["crows"]["kind"] == "stereotype"
    assert set(details["crows"]["groups"][0]) == {"label", "items", "teacher", "student"}
    for key in ("task/crows", "task/crows/religion"):
        assert found[f"{key}/student_from_half"] == pytest.approx(abs(found[f"{key}/student"] - 0.5))


def test_a_limit_draws_from_all_files_with_the_seed(tmp_path: Path) -> None:
    """It took the first rows of the files one after the other: 600 pairs of BLiMP were those of three paradigms of 67."""
    for paradigm in range(6):
        rows = [{"sentence_good": f"a {i}", "sentence_bad": f"b {i}", "UID": f"paradigm {paradigm}"} for i in range(50)]
        (tmp_path / f"{paradigm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PairsConfig(path=str(tmp_path))
    drawn = [read_pairs(config, "evaluation.pairs.blimp", 60, seed)[0] for seed in (0, 0, 1)]
    assert all(len(pairs) == len(set(pairs)) == 60 and len({pair.group for pair in pairs}) == 6 for pairs in drawn)
    assert drawn[0] == drawn[1] != drawn[2]
    whole = read_pairs(config, "evaluation.pairs.blimp", 300)[0]
    assert whole == read_pairs(config, "evaluation.pairs.blimp")[0] and [pair for pair in whole if pair in drawn[0]] == drawn[0]


def test_other_columns_are_named_and_a_limit_holds(score: Any, jsonl: Any) -> None:
    rows = [{"good": "a b", "bad": "b a"}, {"good": "c d", "bad": "d c"}]
    settings = {"path": jsonl(rows), "better_column": "good", "worse_column": "bad", "prefix": "x"}
    found, _ = score(pairs={"mine": settings}, task_limit=1)
    assert found["task/mine/items"] == 1 and not any("/rows" in key for key in found)


def test_equally_likely_sentences_count_half(score: Any, jsonl: Any) -> None:
    found, _ = score(pairs={"same": {"path": jsonl([{"sentence_good": "a", "sentence_bad": "a"}])}})
    assert found["task/same/student"] == 0.5


# ----------------------------------------------------------------------------------------------------------------------- choices


QUESTIONS = [
    {"question": "who sat?", "choices": ["the cat", "a"], "answer": 0, "topic": "cats"},
    {"question": "what ran?", "choices": ["x", "y", "two big birds"], "answer": "C", "topic": "birds"},
    {"question": "how many?", "choices": ["two", "three"], "answer": "three", "topic": "birds"},
]


@pytest.mark.parametrize("normalise", ["characters", "none"])
def test_the_likeliest_answer_is_taken(score: Any, jsonl: Any, tiny_llama: Any, tiny_tokenizer: Any, normalise: str) -> None:
    found, details = score(choices={"quiz": {"path": jsonl(QUESTIONS), "group_column": "topic", "normalise": normalise}})
    assert details["quiz"]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    model, right = tiny_llama(seed=0), []
    for row, answer in zip(QUESTIONS, (0, 2, 1), strict=True):
        values = []
        for choice in row["choices"]:
            ids, first = ids_of(tiny_tokenizer, f"{row['question']} {choice}"), len(row["question"])
            values.append(reference(model, ids, first) / (len(choice) if normalise == "characters" else 1))
        right.append(values.index(max(values)) == answer)
    assert found["task/quiz/student"] == pytest.approx(sum(right) / 3)
    assert found["task/quiz/birds/student"] == pytest.approx(sum(right[1:]) / 2)


# ----------------------------------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_scored_is_one_line_before_a_model_is_loaded(jsonl: Any, tmp_path: Path) -> None:
    def line(**settings: Any) -> str:
        with pytest.raises(MiniDistillError) as error:
            check_tasks(FullEvaluationConfig(**settings))
        (problem,) = error.value.problems
        return str(problem)

    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"sentence_good": "a",\n')
    other, blank = jsonl([{"text": "a"}]), jsonl([{"sentence_good": "a", "sentence_bad": " "}])
    assert line(pairs={"a": {"path": "nowhere.jsonl"}}).startswith("evaluation.pairs.a.path: ")
    assert "no row in" in line(pairs={"a": {"path": str(tmp_path / "empty.jsonl")}})
    assert "broken.jsonl:1" in line(pairs={"a": {"path": str(tmp_path / "broken.jsonl")}})
    assert "there are: text" in line(pairs={"a": {"path": other}})
    assert f"{blank}:1: no text in the column 'sentence_bad'" in line(pairs={"a": {"path": blank}})
    assert "unknown setting" in line(pairs={"a": {"path": blank, "colour": 1}})
    assert "expected a mapping" in line(pairs={"a": blank})
    assert line(pairs={"a": {"pth": blank}}).endswith("Did you mean 'evaluation.pairs.a.path'?")  # not data.path
    good = jsonl(QUESTIONS)
    assert "no list of two answers" in line(choices={"q": {"path": good, "choices_column": "topic"}})
    assert "got 7 in the column 'answer'" in line(choices={"q": {"path": jsonl([{**QUESTIONS[0], "answer": 7}])}})
    assert "of that name" in line(pairs={"q": {"path": jsonl(BLIMP)}}, choices={"q": {"path": good}})


def test_the_harness_is_asked_for_by_the_name_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed.*mini_distill\[eval\]"):
        check_tasks(FullEvaluationConfig(tasks=["blimp"]))


# ----------------------------------------------------------------------------------------------------------------------- harness


HARNESS_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
{body}
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_accuracies_are_those_of_the_harness(score: Any, jsonl: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'mini_distill[eval]')")
    words = ["the", "cat", "sat", "two", "birds", "saw", "a", "mat"]
    draw = torch.Generator().manual_seed(0)

    def sentence() -> str:
        return " ".join(words[int(i)] for i in torch.randint(8, (4,), generator=draw))

    pairs = jsonl([{"sentence_good": sentence(), "sentence_bad": sentence()} for _ in range(30)])
    quiz = jsonl([{"question": sentence(), "choices": [sentence(), "a cat", sentence() + " saw"], "answer": i % 3} for i in range(30)])
    of_pairs = 'doc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{[sentence_good, sentence_bad]}}"'
    of_quiz = 'doc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: choices'
    files = []
    for name, file, body in (("local_pairs", pairs, of_pairs), ("local_quiz", quiz, of_quiz)):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(HARNESS_TASK.format(name=name, file=file, body=body))
    found, _ = score(
        vocab=62,  # columns that only pad the embedding get probability there
        pairs={"pairs": {"path": pairs}},
        choices={"plain": {"path": quiz, "normalise": "none"}, "per_character": {"path": quiz}},
        tasks=[str(file) for file in files],
    )
    for model in ("teacher", "student"):
        assert found[f"task/pairs/{model}"] == pytest.approx(found[f"task/local_pairs/acc/{model}"])
        assert found[f"task/plain/{model}"] == pytest.approx(found[f"task/local_quiz/acc/{model}"])
        assert found[f"task/per_character/{model}"] == pytest.approx(found[f"task/local_quiz/acc_norm/{model}"])
