"""What a machine can do: its memory, and the seconds that operations take on it, measured here or at rates that are given."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from .trace import Operation, TensorSpec

TIMED_SECONDS = 0.3
"""An operation that would take longer is not tried out: its time follows from the rates."""
COLD_BYTES = 2**26
"""Arguments are made this large together and used in turn: in a step, too, they come from memory and not from a cache."""


@dataclass(frozen=True)
class Rates:
    """Of one device.

    Attributes:
        flops: Operations a second of large matrix products, by dtype; float32 stands in for what is not listed.
        bytes: Bytes a second, read and written together.
    """

    flops: dict[torch.dtype, float]
    bytes: float

    def seconds(self, operation: Operation) -> float:
        """One call, bound by the arithmetic or by the memory, whichever is slower."""
        dtypes = [leaf.dtype for leaf in operation.leaves if isinstance(leaf, TensorSpec)]
        rate = next((self.flops[dtype] for dtype in dtypes if dtype in self.flops), self.flops[torch.float32])
        return max(operation.flops / rate, operation.num_bytes / self.bytes)


def given_rates(tflops: float, gb_per_second: float) -> Rates:
    """The same for every dtype."""
    return Rates({torch.float32: tflops * 1e12}, gb_per_second * 1e9)


def measured_rates(device: torch.device, size: int = 1024) -> Rates:
    """Of this machine, in about a second."""
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        flops[dtype] = 2 * size**3 / seconds_of(partial(torch.mm, left, right), device)
    source = torch.rand(2**24, device=device)
    return Rates(flops, 2 * source.nbytes / seconds_of(lambda: source.clone(), device))


class Stopwatch:
    """Seconds of operations on this machine: each kind is tried out on made-up numbers, once for all its calls.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rates = device, measured_rates(device)
        self._known: dict[Any, float] = {}

    def seconds(self, operation: Operation) -> float:
        """One call."""
        key = (operation.function, *map(repr, operation.leaves))
        if key not in self._known:
            self._known[key] = self._measure(operation)
        return self._known[key]

    def _measure(self, operation: Operation) -> float:
        expected = self.rates.seconds(operation)
        if expected > TIMED_SECONDS:
            return expected
        copies = min(8, 1 + COLD_BYTES // max(1, operation.num_bytes))
        try:
            return seconds_of([_call(operation, self.device) for _ in range(copies)], self.device)
        except RuntimeError:  # it does not take made-up numbers
            return expected


def _call(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """The operation on tensors of its own."""
    leaves = [_made_up(leaf, device) if isinstance(leaf, TensorSpec) else leaf for leaf in operation.leaves]
    args, kwargs = tree_unflatten(leaves, operation.structure)
    return lambda: operation.function(*args, **kwargs)


def _made_up(spec: TensorSpec, device: torch.device) -> Tensor:
    """Numbers from 0 to 1; 0 and 1 alone where they may be indices."""
    size = 1 + sum((count - 1) * stride for count, stride in zip(spec.shape, spec.stride, strict=True)) if 0 not in spec.shape else 0
    if spec.dtype.is_floating_point:
        flat = torch.rand(size, device=device).to(spec.dtype)
    else:
        flat = (torch.arange(size, device=device) % 2).to(spec.dtype)
    return flat.as_strided(spec.shape, spec.stride)


@torch.no_grad()
def seconds_of(calls: Callable[[], Any] | list[Callable[[], Any]], device: torch.device) -> float:
    """The median of several calls, after one that does not count; with one thread of the processor's time, in which others have no part.

    The fastest call is one whose memory happens to lie in a cache and on pages that are there: a step has no such luck.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    calls = calls if isinstance(calls, list) else [calls]
    times: list[float] = []
    calls[0]()
    started = time.perf_counter()
    while len(times) < max(3, len(calls)) or (time.perf_counter() - started < 0.01 and len(times) < 50):
        _wait(device)
        begun = clock()
        calls[len(times) % len(calls)]()
        _wait(device)
        times.append(clock() - begun)
        if time.perf_counter() - started > 3 * TIMED_SECONDS:
            break
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take: of the GPU, or of this machine and of the limit that a container sets."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        available.append(int(limit[0]) - int(used[0]))
    return min(available, default=0)


def _lines(file: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(file).read_text(encoding="utf-8").splitlines()
    return []
