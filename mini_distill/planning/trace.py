"""Watching a computation on tensors without memory: what it would hold, and what it would compute.

`FakeTensorMode` of torch runs a model on tensors that have a shape, a type and a device and nothing else. Every operation of the
real forward and backward passes goes by, with gradient checkpointing, tied weights and the kernel of attention that torch would
choose, so that nothing has to be known of the architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


HEAP_BLOCK = 2**25
"""The C library of Linux keeps smaller blocks in a heap, in whose gaps memory is held that nobody uses; larger ones stand alone."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """That of any tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Of its elements; an expanded axis, of stride 0, counts once."""
        count = self.dtype.itemsize
        for size, stride in zip(self.shape, self.stride, strict=True):
            count *= size if stride else min(size, 1)
        return count


@dataclass
class Operation:
    """A kernel called with tensors of certain shapes, once or many times.

    Attributes:
        function: The kernel.
        leaves: Its arguments, flat, with a `TensorSpec` for each tensor.
        structure: How they lie in `(args, kwargs)`.
        flops: Floating-point operations of one call: of matrix products and attention, nothing else.
        num_bytes: Read and written by one call.
        count: Calls.
    """

    function: Any
    leaves: list[Any]
    structure: TreeSpec
    flops: int
    num_bytes: int
    count: float = 0


class Trace(TorchDispatchMode):
    """Sums the bytes that are alive at a time, by storage, and keeps the operations apart by phase.

    Only storages made within are counted: weights that were there before are not.

    Attributes:
        live: Bytes alive now, and `small` those of them in storages below HEAP_BLOCK.
        peaks: The most within each phase.
        small_peaks: The same of the storages below HEAP_BLOCK alone.
        after: Bytes alive at the end of each phase.
        phases: Name of a phase -> its operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.small = 0, 0
        self.peaks: dict[str, int] = {}
        self.small_peaks: dict[str, int] = {}
        self.after: dict[str, int] = {}
        self.phases: dict[str, dict[Any, Operation]] = {}
        self._phase, self._times = "", 1.0
        self._known: set[int] = set()

    @contextmanager
    def phase(self, name: str, times: float = 1.0) -> Iterator[None]:
        """Operations within are counted under this name, each as often as `times` says."""
        before, self._phase, self._times = (self._phase, self._times), name, times
        try:
            yield
        finally:
            self._phase, self._times = before
            self.after[name] = self.live

    def flops(self, phase: str) -> float:
        """All of a phase."""
        return sum(operation.flops * operation.count for operation in self.phases.get(phase, {}).values())

    def operations(self, phase: str) -> list[Operation]:
        """Those of a phase that move or compute anything."""
        return list(self.phases.get(phase, {}).values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, and note what it made."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view:  # a view of a weight, such as its transpose, makes nothing
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._note_storage(tensor)
        if not function.is_view and function not in FREE and function.namespace not in FREE_NAMESPACES:
            self._note_operation(function, args, kwargs, result)
        return result

    def _note_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self._add(size)
        weakref.finalize(storage, self._forget, key, size)

    def _add(self, size: int) -> None:
        self.live += size
        self.small += size if abs(size) < HEAP_BLOCK else 0
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.live)
        self.small_peaks[self._phase] = max(self.small_peaks.get(self._phase, 0), self.small)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._add(-size)

    def _note_operation(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [TensorSpec.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        operations = self.phases.setdefault(self._phase, {})
        key = (function, *map(repr, leaves))
        if key not in operations:
            made = [TensorSpec.of(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
            read = [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]
            moved = sum(spec.num_bytes for spec in [*read, *made])
            operations[key] = Operation(function, leaves, structure, _flops(function, args, kwargs, result), moved)
        operations[key].count += self._times


FREE = {aten.detach.default, aten._unsafe_view.default, aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
"""Operations that touch no element, besides views."""
FREE_NAMESPACES = {"prim", "profiler"}
"""Of operations that ask for a tensor's device, or note a time."""


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet: Any = getattr(function, "_overloadpacket", None)
    count = FLOPS.get(packet) or flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two products: scores, and the mean of the values; the causal half is not left out."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """The scores again, and two products for each of the two."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _grouped(tokens: Tensor, experts: Tensor, *args: Any, **kwargs: Any) -> int:
    """Each token with the matrix of one expert, in the forward pass; `(tokens, in)` and `(experts, in, out)`."""
    return 2 * tokens.numel() * experts.shape[-1]


FLOPS = {
    aten._grouped_mm: _grouped,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Kernels that torch's own counter does not know."""


def without_memory(model: nn.Module) -> None:
    """Give a model of the meta device tensors that look as if they lay on the CPU; to be called within a FakeTensorMode.

    What two modules share stays shared.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _like(buffer))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
