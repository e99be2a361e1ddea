"""Inner states in whole runs: terms are optimised, projections learned, checkpointed and left out of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from safetensors.torch import load_file

from mini_distill.config import ObjectiveConfig, TermConfig
from mini_distill.data.batch import Batch
from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError
from mini_distill.losses.attention import relation_kl
from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.hidden import hidden_mse
from mini_distill.losses.objective import Objective
from mini_distill.losses.reduction import loss_mask
from mini_distill.models.head import LanguageModel
from mini_distill.teachers.matching import Matching
from mini_distill.teachers.online import OnlineTeacher
from mini_distill.train import distill_step
from mini_distill.training.objective import add_matching

EAGER = ("teacher.attn_implementation=eager", "student.attn_implementation=eager")
SMALL = ("student=mini_2m", "student.hidden_size=16", "student.num_layers=2", "student.num_heads=2", "student.num_kv_heads=1")


def batch() -> Batch:
    ids = torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    labels, positions = ids.clone(), torch.arange(10).repeat(3, 1)
    labels[:, :4] = -100
    return Batch(ids, labels, positions, torch.arange(3), torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine", "relation_kl", "attention_mse", "attention_kl"])
def test_every_kind_trains_and_is_logged(tiny_command: list[str], tmp_path: Path, kind: str) -> None:
    options = [f"objective.terms.{kind}.options.num_relation_heads=2"] if kind == "relation_kl" else []
    summary = run(
        tiny_command, tmp_path / "run", *EAGER, f"objective.terms.{kind}.weight=0.5", f"objective.terms.{kind}.layers=uniform", *options
    )
    from runs import rows

    values = [row[f"train/{kind}"] for row in rows(tmp_path / "run") if f"train/{kind}" in row]
    assert len(values) == 6 and all(value >= 0 for value in values) and summary["eval/student_perplexity"] > 1
    losses = [
        (r["train/loss"], 0.5 * r["train/forward_kl"] + 0.5 * r["train/ce"] + 0.5 * r[f"train/{kind}"]) for r in rows(tmp_path / "run")[1:]
    ]
    assert all(logged == pytest.approx(expected, rel=1e-5) for logged, expected in losses)  # logged term = optimised term


def test_the_sum_is_that_over_supervised_positions_averaged_over_pairs(tiny_llama: Any) -> None:
    student, teacher = LanguageModel(tiny_llama(seed=0)), tiny_llama(seed=1)
    matching = Matching({"h": TermConfig(kind="hidden_mse", layers="uniform")}, student.model, teacher, seed=0)
    data = batch()
    with matching.watching():
        student(data)
        OnlineTeacher(teacher)(data)
        (value,) = matching.sums(data).values()
    seen: list[torch.Tensor] = []
    for model in (student.model, teacher):
        hooks = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in model.model.layers]
        model(data.input_ids, position_ids=data.position_ids, use_cache=False)
        [hook.remove() for hook in hooks]
    mask = loss_mask(data.labels)
    each = [hidden_mse(ours[mask], theirs[mask]).sum() for ours, theirs in zip(seen[:2], seen[2:], strict=True)]
    torch.testing.assert_close(value, (each[0] + each[1]) / 2)


def test_relations_of_queries_keys_and_values_are_added_up(tiny_llama: Any) -> None:
    """MiniLMv2's loss; the mean of the three was taken, a third of it."""
    student, teacher, data = LanguageModel(tiny_llama(seed=0)), tiny_llama(seed=1), batch()
    options = {"num_relation_heads": 2}
    matching = Matching({"r": TermConfig(kind="relation_kl", options=options)}, student.model, teacher, seed=0)
    with matching.watching():
        student(data)
        OnlineTeacher(teacher)(data)
        (value,) = matching.sums(data).values()
        states = [(matching.student_states[key], matching.teacher_states[key]) for key in (("query", 1), ("key", 1), ("value", 1))]
    mask = loss_mask(data.labels)
    each = [relation_kl(ours, theirs, data.position_ids, **options)[mask].sum() for ours, theirs in states]
    torch.testing.assert_close(value, torch.stack(each).sum())


def test_matching_alone_trains_every_weight_it_can_reach(tiny_llama: Any) -> None:
    student, teacher = LanguageModel(tiny_llama(seed=0, tie_word_embeddings=False)), tiny_llama(seed=1)
    objective = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=0.0)
    add_matching(objective, ObjectiveConfig(terms={"hidden_mse": {"layers": "last"}}), student, teacher, seed=0)
    sums = distill_step(student, OnlineTeacher(teacher), batch(), objective)
    sums.loss.backward()
    assert list(sums.terms) == ["hidden_mse"] and all(
        p.grad is not None for p in student.parameters() if p is not student.model.model.norm.weight
    )


def test_a_schedule_changes_the_weight_and_not_the_logged_term(tiny_llama: Any) -> None:
    student, teacher = LanguageModel(tiny_llama(seed=0)), tiny_llama(seed=1)
    objective = Objective(forward_kl, "forward_kl", kl_weight=1.0, ce_weight=0.0, schedules={"hidden_mse": {0: 0.0, 10: 1.0}})
    add_matching(objective, ObjectiveConfig(terms={"hidden_mse": {"weight": 3.0}}), student, teacher, seed=0)
    for step, factor in ((5, 0.5), (10, 1.0)):
        sums = distill_step(student, OnlineTeacher(teacher), batch(), objective.at_step(step))
        assert sums.loss.item() == pytest.approx((sums.terms["forward_kl"] + 3 * factor * sums.terms["hidden_mse"]).item(), rel=1e-5)
    assert objective.formula() == "1 · forward_kl + 3 · hidden_mse (on a schedule)"


def test_projections_are_learned_checkpointed_and_not_part_of_the_student(tiny_command: list[str], tmp_path: Path) -> None:
    command = [text for text in tiny_command if text != "student.num_layers=1"]
    term = ["objective.terms.hidden_mse.weight=1", "objective.terms.hidden_mse.layers=uniform"]
    run(command, tmp_path / "whole", *SMALL, *term)
    checkpoint = load_file(tmp_path / "whole" / "checkpoints" / "step-00000006" / "model.safetensors")
    names = [name for name in checkpoint if name.startswith("projections.")]
    assert len(names) == 2 and not any("projection" in name for name in load_file(tmp_path / "whole" / "student" / "model.safetensors"))
    run(command, tmp_path / "cut", *SMALL, *term, "trainer.max_steps=4", "trainer.schedule=constant")
    run(command, tmp_path / "cut", *SMALL, *term, "trainer.schedule=constant", "resume_allow=[trainer.max_steps]")
    run(command, tmp_path / "constant", *SMALL, *term, "trainer.schedule=constant")
    after = [load_file(tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors") for name in ("cut", "constant")]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    assert digest_run(tmp_path / "constant") != digest_run(tmp_path / "whole")


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"kind": "hidden_mse", "layer_map": {0: 9}}, r"objective\.terms\.t\.layer_map: got teacher block 9"),
        (
            {"kind": "relation_kl", "options": {"num_relation_heads": 7}},
            r"objective\.terms\.t\.options\.num_relation_heads: got 7, expected a divisor of 32",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(tiny_llama: Any, term: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Matching({"t": TermConfig(**term)}, tiny_llama(), tiny_llama(), seed=0)
