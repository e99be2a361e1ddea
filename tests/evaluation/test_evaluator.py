"""The evaluator on tiny models: what counts, what does not, and that the training cannot notice it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mini_distill.data.batch import Batch
from mini_distill.errors import ConfigError, DataError
from mini_distill.evaluation import logit_chunks
from mini_distill.evaluation.evaluator import Evaluator

MakeEvaluator = Callable[..., Evaluator]


def reference_nll(model: Any, batches: list[Batch], vocab: int) -> float:
    """Position by position, in float64, from the model's own logits."""
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.double()[..., :vocab]
        for row in range(len(batch)):
            for t in range(1, batch.labels.shape[1]):
                if batch.labels[row, t] != -100:
                    total -= float(logits[row, t - 1].log_softmax(-1)[batch.labels[row, t]])
                    count += 1
    return total / count


def test_perplexities_are_those_of_a_reference_loop(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1, num_hidden_layers=3)
    found = make_evaluator(batches, teacher)(student, step=0)
    assert found["eval/student_nll"] == pytest.approx(reference_nll(student, batches, 62), rel=1e-6)
    assert found["eval/teacher_nll"] == pytest.approx(reference_nll(teacher, batches, 62), rel=1e-6)
    assert found["eval/student_perplexity"] == pytest.approx(math.exp(found["eval/student_nll"]))
    assert found["eval/tokens"] == 3 * 12 + 5 + 12


def test_bytes_are_those_of_the_predicted_tokens(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    num_bytes = sum(int(batch.num_bytes[batch.labels != -100].sum()) for batch in batches)
    for batch in batches:
        batch.num_bytes[batch.labels == -100] = 10**6  # prompts must not count
    found = make_evaluator(batches)(tiny_llama(), step=0)
    assert found["eval/student_bits_per_byte"] == pytest.approx(found["eval/student_nll"] * found["eval/tokens"] / math.log(2) / num_bytes)


def test_a_student_equal_to_its_teacher_has_no_divergence(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    found = make_evaluator(batches, tiny_llama(seed=3))(tiny_llama(seed=3), step=0)
    assert found["eval/forward_kl"] == found["eval/reverse_kl"] == 0.0
    assert found["eval/top1_agreement"] == 1.0
    assert found["eval/student_nll"] == found["eval/teacher_nll"]


def test_without_a_teacher_only_the_student_is_measured(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    names = {"perplexity", "nll", "bits_per_byte", "ece"}
    assert set(make_evaluator(batches)(tiny_llama(), step=0)) == {"eval/tokens"} | {f"eval/student_{name}" for name in names}


def widen(model: Any, columns: int, value: float) -> Any:
    """The same model with an embedding padded by rows that would win every prediction."""
    old = model.get_output_embeddings().weight.detach().clone()
    model.resize_token_embeddings(old.shape[0] + columns, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[: old.shape[0]] = old
        model.get_output_embeddings().weight[old.shape[0] :] = value
    return model


def test_columns_that_pad_the_vocabulary_change_nothing(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    """Students padded with logits that take probability were compared with teachers padded to another size (Qwen 2.5)."""
    expected = make_evaluator(batches, tiny_llama(seed=1))(tiny_llama(seed=0), step=0)
    teacher, student = widen(tiny_llama(seed=1), 8, 50.0), widen(tiny_llama(seed=0), 64, -50.0)
    assert make_evaluator(batches, teacher)(student, step=0) == pytest.approx(expected, rel=1e-6)


def test_positions_that_are_not_supervised_change_nothing(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    """Prompt and padding tokens in an evaluation hid what a method really did (optipfair#34): here their hidden states are NaN."""
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    current: list[Batch] = []
    evaluator = make_evaluator(batches, teacher)
    evaluator.batches = lambda: (current.__setitem__(slice(None), [batch]) or batch for batch in batches)

    def spoil(module: Any, arguments: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        if not current:  # the check of the head
            return None
        predicts = torch.zeros_like(current[0].labels, dtype=torch.bool)
        predicts[:, :-1] = current[0].labels[:, 1:] != -100
        return hidden.masked_fill(~predicts[..., None], math.nan)

    for model in (student, teacher):
        model.model.norm.register_forward_hook(spoil)
    assert evaluator(student, step=0) == expected


def test_a_batch_with_nothing_supervised_is_no_nan(
    make_evaluator: MakeEvaluator, make_batch: Any, tiny_llama: Any, batches: list[Batch]
) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    empty = make_batch(7)
    empty.labels.fill_(-100)
    assert make_evaluator([empty, *batches, empty], teacher)(student, step=0) == expected


def test_held_out_text_with_nothing_supervised_is_an_error(make_evaluator: MakeEvaluator, make_batch: Any, tiny_llama: Any) -> None:
    empty = make_batch(7)
    empty.labels.fill_(-100)
    for nothing in ([empty], []):
        with pytest.raises(DataError, match="supervised"):
            make_evaluator(nothing)(tiny_llama(), step=0)


def test_small_chunks_give_the_same_numbers(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch], monkeypatch: Any) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    monkeypatch.setattr(logit_chunks, "MAX_CHUNK_TOKENS", 5)
    assert make_evaluator(batches, teacher)(student, step=0) == pytest.approx(expected, rel=1e-6)


def test_no_more_logits_than_a_chunk_exist_at_once(
    make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch], monkeypatch: Any
) -> None:
    monkeypatch.setattr(logit_chunks, "MAX_CHUNK_LOGITS", 62 * 4)
    student, seen = tiny_llama(seed=0), []
    student.lm_head.register_forward_hook(lambda module, arguments, logits: seen.append(logits.shape[0]))
    make_evaluator(batches)(student, step=0)
    assert max(seen[2:]) == 4  # after the two passes that check the head


def test_two_processes_agree_with_one(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    """A mean of the processes' means would give the shorter batch too much weight."""
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    sent: list[torch.Tensor] = []
    make_evaluator(batches[:1], teacher, gather_sum=lambda value: sent.append(value) or value)(student, step=0)
    found = make_evaluator(batches[1:], teacher, gather_sum=lambda value: value + sent[0])(student, step=0)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_process_without_a_batch_takes_part(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    sent: list[torch.Tensor] = []
    make_evaluator(batches, teacher, gather_sum=lambda value: sent.append(value) or value)(student, step=0)
    assert make_evaluator([], teacher, gather_sum=lambda value: value + sent[0])(student, step=0) == expected


def test_no_more_than_max_batches_are_read(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    student = tiny_llama()
    first = make_evaluator(batches[:1])(student, step=0)
    assert make_evaluator(batches, max_batches=1)(student, step=0) == first


def test_an_evaluation_is_cut_short_after_the_batch_that_is_under_way(
    make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]
) -> None:
    student, read, evaluator = tiny_llama(), [], make_evaluator(batches)
    evaluator.batches = lambda: (read.append(batch) or batch for batch in batches)
    evaluator.stop = lambda: len(read) > 1
    assert evaluator(student, step=0) == {} and len(read) == 2


def test_an_evaluation_that_another_process_cuts_short_ends_here_too(
    make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook may exchange with the others: it is called on all processes or on none."""
    sent: list[torch.Tensor] = []
    stopped = make_evaluator(batches, gather_sum=lambda value: sent.append(value) or value)
    stopped.stop = lambda: True
    assert stopped(tiny_llama(), step=0) == {} and len(sent) == 1
    other = make_evaluator(batches, gather_sum=lambda value: value + sent[0])
    other.hooks = [lambda context: pytest.fail("a hook was called")]
    assert other(tiny_llama(), step=0) == {}


def test_a_stop_between_hooks_calls_no_further_one(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    evaluator, called = make_evaluator(batches), []
    evaluator.stop = lambda: bool(called)
    evaluator.hooks = [lambda context: called.append(1) or {"one": 1.0}, lambda context: pytest.fail("it was called")]
    assert evaluator(tiny_llama(), step=0) == {} and called


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def noisy_hook(context: Any) -> dict[str, float]:
    """A user's hook that draws from every global generator, with other seeds."""
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    return {"noise": draw()[2], "was_training": float(context.student.training or context.teacher.training)}


def seed_all() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def test_evaluation_leaves_random_numbers_and_modes_as_they_were(
    make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]
) -> None:
    student = tiny_llama(seed=0, attention_dropout=0.5).train()
    student.model.layers[0].eval()  # a part that somebody froze
    modes = [module.training for module in student.modules()]
    evaluator = make_evaluator(batches, tiny_llama(seed=1), hooks=[f"{__name__}.noisy_hook"])
    seed_all()
    expected = draw()
    seed_all()
    found = evaluator(student, step=0)
    assert draw() == expected
    assert [module.training for module in student.modules()] == modes
    assert found["eval/was_training"] == 0.0
    assert all(parameter.grad is None for parameter in student.parameters())


def test_dropout_is_off_while_measuring(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    student = tiny_llama(seed=0, attention_dropout=0.5).train()
    evaluator = make_evaluator(batches)
    assert evaluator(student, step=0) == evaluator(student, step=1)


def failing_hook(context: Any) -> dict[str, float]:
    raise ValueError("on purpose")


def test_modes_and_random_numbers_are_restored_after_a_failure_too(
    make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]
) -> None:
    student = tiny_llama().train()
    seed_all()
    expected = draw()
    seed_all()
    with pytest.raises(Exception, match="on purpose"):
        make_evaluator(batches, hooks=[f"{__name__}.failing_hook"])(student, step=0)
    assert draw() == expected and student.training


def test_capped_logits_are_the_models_own(make_evaluator: MakeEvaluator, batches: list[Batch]) -> None:
    """Gemma 2 bends its logits after the head; metrics from the head alone were wrong (trl#6629)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, final_logit_softcapping=1.5, initializer_range=0.3,
    )  # fmt: skip
    student = Gemma2ForCausalLM(config).eval()
    found = make_evaluator(batches)(student, step=0)
    assert found["eval/student_nll"] == pytest.approx(reference_nll(student, batches, 62), rel=1e-5)


def test_mixed_precision_stays_near_full_precision(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    expected = make_evaluator(batches, teacher)(student, step=0)
    evaluator = make_evaluator(batches, teacher.to(torch.bfloat16))
    evaluator.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    found = evaluator(student, step=0)
    assert found != expected  # it was on
    assert found["eval/student_nll"] == pytest.approx(expected["eval/student_nll"], rel=0.02)
    assert found["eval/forward_kl"] == pytest.approx(expected["eval/forward_kl"], rel=0.05)


def overwriting_hook(context: Any) -> dict[str, float]:
    return {"student_nll": 0.0}


def test_a_hook_cannot_replace_a_measured_number(make_evaluator: MakeEvaluator, tiny_llama: Any, batches: list[Batch]) -> None:
    with pytest.raises(ConfigError, match="eval/student_nll"):
        make_evaluator(batches, hooks=[f"{__name__}.overwriting_hook"])(tiny_llama(), step=0)
