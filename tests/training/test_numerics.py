"""Clipping, and what becomes of memory that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_distill.config import Config
from mini_distill.errors import OutOfMemory
from mini_distill.relations.objective import LOGGED_BESIDES
from mini_distill.training.numerics import clip_gradient, memory_errors, step_metrics


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError("no"),
    ],
)
def test_memory_that_is_not_there_is_one_line_with_ordered_remedies(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as caught, memory_errors(7, Config()):
        raise error
    assert caught.value.exit_code == 9
    line = str(caught.value.problems[0])
    assert line.startswith("step 7: out of memory with 16 sequences of 256 tokens") and "\n" not in line
    assert (
        line.index("micro_batch_size")
        < line.index("gradient_checkpointing")
        < line.index("seq_len=" if "seq_len=" in line else "data.seq_len")
    )


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors(1, Config()):
        raise RuntimeError("shape mismatch")


def test_an_allocation_of_the_cpu_that_cannot_succeed_is_recognised() -> None:
    with pytest.raises(OutOfMemory), memory_errors(1, Config()):
        torch.empty(2**60, dtype=torch.uint8)


def test_the_norm_is_that_before_clipping() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    for limit, left in ((None, 5.0), (1.0, 1.0), (10.0, 5.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradient(model, limit).item() == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(left, rel=1e-4)


def test_no_term_may_have_the_name_of_what_every_step_logs_besides() -> None:
    """A term called grad_norm was overwritten by it, and one called loss overwrote what was optimised."""
    d: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), config=Config())
    one = torch.ones(())
    logged = step_metrics(d, {"loss": one, "ce": one}, one, one, step=1)
    assert {key.removeprefix("train/") for key in logged} == set(LOGGED_BESIDES)
