"""The plan of a run: what can be counted by hand, measured on a real model, or has to grow."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mini_distill as md
from mini_distill.cli import load_config
from mini_distill.config import PlanCommand
from mini_distill.data.prepare import prepare_data
from mini_distill.data.tokenizers import vocabulary_size
from mini_distill.errors import ConfigError, ModelError
from mini_distill.models.loading import load_causal_lm, weightless_causal_lm
from mini_distill.planning import machine
from mini_distill.planning import needs as needs_module
from mini_distill.planning.machine import Stopwatch, given_rates
from mini_distill.planning.models import weightless_models
from mini_distill.planning.needs import Needs, largest_micro_batch
from mini_distill.planning.table import format_plan
from mini_distill.planning.tokens import data_size
from mini_distill.students.build import build_student
from mini_distill.teachers.load import load_shared_tokenizer

RATES = ("plan.matmul_tflops=0.1", "plan.memory_gb_per_second=10")  # nothing is timed
DOUBLED = ("plan.matmul_tflops=0.2", "plan.memory_gb_per_second=20")
BATCH, SEQ, HIDDEN, WIDE, LAYERS, VOCAB = 4, 32, 32, 64, 2, 64  # of the tiny teacher
HEADS, KV_HEADS = 4, 2


@pytest.fixture
def command(tiny_command: list[str]) -> list[str]:
    """The settings of the tiny run, and the rates of a device."""
    return [*tiny_command, *RATES]


@pytest.fixture(scope="module")
def made(tiny_command: list[str]) -> Any:
    """The plan of the tiny run."""
    return md.plan([*tiny_command, *RATES])


def needs_of(command: list[str], *more: str, share: float = 1.0) -> Needs:
    return _needs((*command, *more), share)


@cache
def _needs(command: tuple[str, ...], share: float) -> Needs:
    """Once for all tests that look at the same settings: a trace takes a while."""
    config = load_config(command, "plan", PlanCommand)
    tokenizer = load_shared_tokenizer(config)
    models = weightless_models(config, tokenizer, None, on_gpu=False)
    return Needs(models, config, config.trainer.micro_batch_size, share, vocabulary_size(tokenizer), on_gpu=False)


def total(command: list[str], *more: str) -> int:
    return needs_of(command, *more).memory()["total"]


# ------------------------------------------------------------------------------------------------------------------------ exact


def test_parameters_are_those_of_the_real_models(command: list[str], made: Any) -> None:
    config = load_config(command, "plan", PlanCommand)
    teacher = load_causal_lm(str(config.teacher.path))
    student = build_student(config.student, teacher=teacher, tokenizer=load_shared_tokenizer(config), seq_len=SEQ, seed=0)
    assert made.parameters == {"teacher": teacher.num_parameters(), "student": student.num_parameters()}


@pytest.mark.parametrize("dtype,itemsize", [("float32", 4), ("bfloat16", 2)])
def test_weights_take_their_number_times_their_size(command: list[str], dtype: str, itemsize: int) -> None:
    needs = needs_of(command, f"teacher.dtype={dtype}")
    assert needs.models.teacher is not None
    memory, student = needs.memory(), needs.models.student.num_parameters()
    assert memory["teacher_weights"] == itemsize * needs.models.teacher.num_parameters()
    assert (memory["student_weights"], memory["moments"], memory["gradients"]) == (4 * student, 8 * student, 4 * student)


def test_operations_are_those_counted_by_hand(command: list[str]) -> None:
    """Two for each weight of a matrix and token; attention two products more, five in the backward pass; the causal half included."""
    tokens, head = BATCH * SEQ, HIDDEN // HEADS
    matrices = HIDDEN * HIDDEN * 2 + HIDDEN * KV_HEADS * head * 2 + 3 * HIDDEN * WIDE
    product = 2 * BATCH * HEADS * SEQ * SEQ * head
    flops = needs_of(command, "data.packing=true").flops()
    assert flops["teacher"] == LAYERS * (2 * tokens * matrices + 2 * product)
    assert flops["student"] == 1 * (2 * tokens * matrices + 2 * product)
    assert flops["backward"] == 1 * (4 * tokens * matrices + 5 * product)
    columns = 62  # tokens of the tokenizer: what pads the embedding is left out
    assert flops["loss"] == pytest.approx(4 * 2 * tokens * columns * HIDDEN)  # teacher's and student's logits, two gradients


def test_the_head_is_reckoned_for_supervised_tokens_alone(command: list[str]) -> None:
    whole, half = (needs_of(command, share=share).flops() for share in (1.0, 0.5))
    assert half["loss"] == pytest.approx(whole["loss"] / 2) and half["student"] == whole["student"]


def test_checkpointing_costs_another_forward_pass(command: list[str]) -> None:
    """But for each block's last product, on which no gradient depends."""
    plain, checkpointed = (needs_of(command, f"trainer.gradient_checkpointing={on}").flops() for on in ("false", "true"))
    assert checkpointed["backward"] == plain["backward"] + plain["student"] - 2 * BATCH * SEQ * WIDE * HIDDEN


def test_the_activations_are_what_autograd_keeps_of_the_real_model(command: list[str], tiny_teacher: Path) -> None:
    """Summed on a real forward pass by the hooks of autograd, each storage once, weights left out."""
    command = [text for text in command if not text.startswith("student.")]
    needs = needs_of(command, "student=hf", f"student.path={tiny_teacher}", "data.seq_len=64", "objective=ce")
    model: Any = AutoModelForCausalLM.from_pretrained(str(needs.config.student.path)).train()
    weights = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids, mask = torch.zeros(BATCH, 64, dtype=torch.long), torch.ones(BATCH, 1, 64, 64, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    expected = sum(storage.nbytes() for storage in kept.values())
    assert needs.memory()["activations"] == pytest.approx(expected, rel=0.1)  # besides: the mask and the hidden states


# ---------------------------------------------------------------------------------------------------------------- what must grow


@pytest.mark.parametrize(
    "larger", ["trainer.micro_batch_size=256", "data.seq_len=128", "student.num_layers=2", "plan.num_devices=2", "objective.kl_weight=0.5"]
)
def test_memory_grows_with(command: list[str], larger: str) -> None:
    base = [*command, "trainer.micro_batch_size=128", "objective.kl_weight=0", "objective.logits_memory_mib=1"]
    if larger.startswith("objective"):
        assert needs_of(base, larger).step.peaks["teacher"] > 0 == needs_of(base).step.peaks.get("teacher", 0)
    else:
        assert total(base, larger) > total(base)


def test_memory_shrinks_with_checkpointing_and_a_narrow_teacher(command: list[str]) -> None:
    base = [*command, "student.num_layers=2", "trainer.micro_batch_size=256", "evaluation.batch_size=1", "objective.logits_memory_mib=1"]
    assert total(base, "trainer.gradient_checkpointing=true") < total(base)
    assert total(base, "teacher.dtype=bfloat16") < total(base)


def test_the_largest_micro_batch_fits_and_a_somewhat_larger_one_does_not(command: list[str]) -> None:
    needs, available = needs_of(command), 100_000_000
    size, taken = largest_micro_batch(needs, available)
    assert taken == needs.resized(size).memory()["total"] <= available
    assert needs.resized(size + max(2, size // 16)).memory()["total"] > available


def test_a_run_that_does_not_fit_is_said_not_refused(command: list[str]) -> None:
    made = md.plan([*command, "plan.memory_gib=0.01"])
    assert not made.fits and made.largest_micro_batch == 0
    assert "DOES NOT FIT" in str(made) and "Not even one sequence fits" in str(made)


# ------------------------------------------------------------------------------------------------------------------------- time


def test_time_at_given_rates_is_bound_by_arithmetic_or_memory(command: list[str]) -> None:
    needs = needs_of(command)
    operation = max(needs.step.operations("student"), key=lambda operation: operation.flops)
    slow_arithmetic, slow_memory = given_rates(1e-6, 1e6), given_rates(1e6, 1e-6)
    assert slow_arithmetic.seconds(operation) == operation.flops / 1e6
    assert slow_memory.seconds(operation) == operation.num_bytes / 1e3


def test_asking_a_tensor_for_its_device_takes_no_time(command: list[str]) -> None:
    trace = needs_of(command).step
    assert {operation.function.namespace for phase in trace.phases for operation in trace.operations(phase)} == {"aten"}


def test_twice_the_rates_are_half_the_time(command: list[str]) -> None:
    needs, device = needs_of(command), torch.device("cpu")
    slow, fast = needs.seconds(device), replace(needs, config=load_config([*command, *DOUBLED], "plan", PlanCommand)).seconds(device)
    assert slow == pytest.approx({phase: 2 * seconds for phase, seconds in fast.items()})


def test_every_operation_of_a_step_can_be_tried_out(command: list[str]) -> None:
    """Else its time would be that of an exception."""
    needs = needs_of(command, "trainer.gradient_checkpointing=true", "trainer.precision=bf16")
    clock = Stopwatch(torch.device("cpu"))
    for phase in ("teacher", "student", "loss", "backward", "update"):
        assert needs.step.operations(phase)
        assert all(clock.seconds(operation) > 0 for operation in needs.step.operations(phase))


class Counting:
    """An objective that notes how many rows it is called with."""

    def __init__(self, objective: Any, seen: list[int]) -> None:
        self.objective, self.seen, self.names = objective, seen, objective.names

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> Any:
        self.seen.append(len(student))
        return self.objective(student, teacher, targets)


def test_a_call_takes_the_median_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest was taken: one whose memory lies in a cache by luck, which no step is. Plans came out a tenth too fast."""
    ends = iter([0.0, 1.0, 0.0, 9.0, 0.0, 2.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(thread_time=lambda: next(ends), perf_counter=itertools.count(0, 0.01).__next__))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine.seconds_of([lambda: None] * 3, torch.device("cpu")) == 2.0


def test_the_terms_are_timed_over_as_many_tiles_as_a_step_has(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile was timed again and again, from a cache, without its gradient being written: half of what a step needs."""
    seen: list[int] = []
    objective = needs_module.build_objective
    monkeypatch.setattr(needs_module, "build_objective", lambda *arguments, **options: Counting(objective(*arguments, **options), seen))
    monkeypatch.setattr(needs_module, "TILE", 4 * 62)
    monkeypatch.setattr(needs_module, "seconds_of", lambda call, device: call() or 1.0)
    needs = needs_of(command)
    seconds = needs._seconds_of_terms(torch.device("cpu"))
    rows = 4 * 62 // needs.vocab_size
    assert seen == [rows] * (needs.tokens // rows) and seconds == needs.tokens / (len(seen) * rows)


def test_accumulation_repeats_all_but_the_update(command: list[str], made: Any) -> None:
    once, thrice = made, md.plan([*command, "trainer.grad_accum_steps=3"])
    assert thrice.seconds["backward"] == pytest.approx(3 * once.seconds["backward"])
    assert thrice.seconds["update"] == pytest.approx(once.seconds["update"])
    assert thrice.memory["total"] == once.memory["total"] and thrice.tokens["step"] == 3 * once.tokens["step"]


# ------------------------------------------------------------------------------------------------------------------------- data


def test_tokens_are_estimated_first_and_counted_once_they_are_prepared(command: list[str], tmp_path: Path) -> None:
    config = load_config([*command, f"data.cache_dir={tmp_path}"], "plan", PlanCommand)
    tokenizer = load_shared_tokenizer(config)
    estimated = data_size(config.data, tokenizer)
    data = prepare_data(config.data, tokenizer, show_progress=False)
    counted = data_size(config.data, tokenizer)
    assert not estimated.counted and counted.counted
    assert counted.sequences == len(data.train) and data.held_out is not None and counted.held_out_sequences == len(data.held_out)
    assert estimated.sequences == pytest.approx(counted.sequences, rel=0.15)
    assert estimated.supervised_share == pytest.approx(counted.supervised_share, rel=0.1)


def test_the_disk_is_what_a_run_then_writes(tiny_command: list[str], made: Any, tmp_path: Path) -> None:
    md.train([*tiny_command, f"output_dir={tmp_path / 'run'}"])
    one = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert made.disk["checkpoint"] == pytest.approx(
        sum(f.stat().st_size for f in one.glob("*.safetensors")), rel=0.15
    )  # headers of tiny tensors
    assert made.disk["checkpoints"] == 3 * made.disk["checkpoint"]  # two are kept, and the next is written before one goes


# ---------------------------------------------------------------------------------------------------------------- how it is used


def test_no_weight_is_needed(command: list[str], made: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    assert md.plan([*command, f"teacher.path={folder}"]).parameters == made.parameters


def test_a_model_without_weights_takes_no_memory(tiny_teacher: Path) -> None:
    assert all(parameter.is_meta for parameter in weightless_causal_lm(str(tiny_teacher)).parameters())


def test_tied_weights_stay_one(command: list[str]) -> None:
    needs = needs_of(command, "student=mini_2m")
    assert needs.memory()["student_weights"] == 4 * needs.models.student.num_parameters()
    student: Any = needs.models.student
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_folder_that_is_no_model_is_one_line(command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(ModelError, match=r"^teacher\.path: no config\.json"):
        md.plan([*command, f"teacher.path={folder}"])


def test_one_rate_without_the_other_is_refused(tiny_command: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"plan\.memory_gb_per_second: missing"):
        md.plan([*tiny_command, "plan.matmul_tflops=1"])


def test_a_gpu_that_is_not_here_has_to_be_described(command: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ConfigError, match=r"plan\.memory_gib: missing, and there is no GPU here"):
        md.plan([*command, "plan.device=cuda"])


def test_on_a_gpu_the_teacher_is_in_bfloat16_and_nothing_is_held_by_a_heap(command: list[str], made: Any) -> None:
    on_gpu = md.plan([*command, "plan.device=cuda", "plan.memory_gib=0.01"])
    assert 2 * on_gpu.memory["teacher_weights"] == made.memory["teacher_weights"]
    assert on_gpu.memory["process"] == 0 < made.memory["process"]


def test_a_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a list of overrides"):
        md.plan("student=mini_2m")


def test_the_plan_is_printed_and_written_where_output_dir_is_given(
    command: list[str], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(md.plan, "make_plan", lambda config: made)
    md.plan.plan(load_config(command, "plan", PlanCommand))
    assert not list(tmp_path.iterdir())
    md.plan.plan(load_config([*command, "output_dir=here/plan"], "plan", PlanCommand))
    summary = json.loads((tmp_path / "here" / "plan" / "summary.json").read_text())
    assert summary["memory/total"] == made.memory["total"] and summary["largest_micro_batch"] == made.largest_micro_batch
    assert (tmp_path / "here" / "plan" / "config.yaml").exists()
    assert capsys.readouterr().out == 2 * f"{format_plan(made)}\n"


def test_what_is_left_out_is_said(command: list[str]) -> None:
    assert any("hidden_mse" in note for note in md.plan([*command, "objective=hidden_mse"]).notes)


def test_the_table_of_the_docs_is_of_the_medians_of_several_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows of one pass lay beyond the 15 % that the page names: what else ran on the machine had changed between plan and run."""
    spec = importlib.util.spec_from_file_location("check_plan", Path(__file__).parent.parent / "scripts" / "check_plan.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    measured = {"--predict": iter([1.0, 5.0, 1.2]), "--measure": iter([1.0, 1.1, 9.0])}
    turns = []

    def in_own_process(what: str, overrides: list[str]) -> dict[str, float]:
        turns.append(what)
        if what == "--measure":
            Path(overrides[-1].partition("=")[2]).mkdir()
        return {"bytes": 2e8, "seconds": next(measured[what])}

    monkeypatch.setattr(script, "in_own_process", in_own_process)
    monkeypatch.setattr(script, "make_teacher", lambda folder: folder)
    monkeypatch.setattr("sys.argv", ["check_plan.py", "--repeats", "3", "--only", "from scratch"])
    script.main()
    assert turns == ["--predict", "--measure"] * 3
    assert capsys.readouterr().out.splitlines()[-1] == "| from scratch | 200 MB | 200 MB | +0% | 1.20 s | 1.10 s | +9% |"
