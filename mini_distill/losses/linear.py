"""Terms of the objective straight from hidden states: the logits exist for a chunk of tokens at a time, never for a batch.

With a vocabulary of 128k entries, the logits of 4096 tokens are 2 GB, for the student and again for the teacher, and each step
of a softmax another 2 GB; peers keep several of them until backward. Here each chunk of tokens is taken through both heads, the
terms and the gradient at once, and only the gradients of the hidden states and of the head's weights, which are small, wait for
backward. The matrix products are the same as without chunks, each done once.

Any function of logits that gives a value per token can be a term: its own gradient is taken by autograd, within a tile of a few
rows that stays in a processor's cache.

Axes: N supervised tokens, H hidden, V vocabulary, K terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from .reduction import at_least_float32

Terms = Callable[[Tensor, Any, Tensor], Tensor]
"""(student_logits `(n, V)`, what the teacher says about these rows, targets `(n,)`) -> the sum of each term `(K,)`."""

MEMORY_MIB = {"cpu": 256, "cuda": 1024}
"""Default budget for the logits of a chunk: with a vocabulary of 128k, 256 tokens on a CPU.
With half of it a step takes a tenth longer there, since each product packs the whole of the head's weights anew."""

TILE = 2**18
"""Logits, 1 MB in float32, whose terms are computed at a time on a CPU: the dozen passes of a softmax then run in its cache."""

GPU_TILE = 2**25
"""The same on a GPU, 128 MB: of a term that is not compiled each step makes a tensor of that size, and a chunk is larger."""


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and nothing else: no hook, no replaced `forward`, a weight that is an ordinary tensor.

    (Accelerate replaces `forward` on the object; torchao and tensor parallelism put tensors of their own into the layer.)
    """
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    ordinary = (nn.Parameter, Tensor)
    return not any(hooks) and all(type(p) in ordinary or hasattr(p, "fake_mode") for p in module.parameters())  # or stands for one


class Head(Protocol):
    """What turns hidden states into logits."""

    module: nn.Module

    def adjust(self, logits: Tensor) -> Tensor:
        """Whatever follows the matrix product: scaling, soft-capping."""


class TeacherRows(Protocol):
    """What a teacher says about N tokens, given out in chunks."""

    def rows(self, rows: slice, vocab_size: int | None) -> Any:
        """What it says about some of them: logits `(n, V)`, or anything else that can be sliced by rows."""


class Scratch:
    """Memory for logits that is used again from step to step: on a CPU new memory costs as much as a softmax.

    On a GPU torch's allocator keeps what is freed and lends it to the rest of the step, so there one of these lasts for one batch.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`(rows, columns)` with anything in it; the place of what was taken before."""
        size, memory = rows * columns, self._memory
        if memory is None or memory.dtype != dtype or memory.device != device or memory.numel() < size:
            self._memory = None  # given back before the larger one is asked for
            self._memory = memory = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(rows, columns)

    @classmethod
    def on(cls, device: torch.device, kept: Scratch) -> Scratch:
        """`kept`, where that is quicker; else a new one."""
        return kept if device.type == "cpu" else cls()


def linear_terms(
    hidden: Tensor,
    head: Head,
    teacher: TeacherRows | None,
    targets: Tensor,
    terms: Terms,
    weights: list[float],
    *,
    vocab_size: int | None = None,
    memory_mib: float | None = None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms over all tokens, with its gradient, and the sum of each.

    Equal to `terms(head(hidden), teacher, targets)` up to rounding. Of a plain linear layer in bfloat16 it is nearer to the exact
    value than that: the products are summed and the logits kept in float32.

    Args:
        hidden: `(N, H)`, the input of the student's head. No token at all is allowed; the loss is then exactly 0, with a graph.
        head: The student's. A plain linear layer is taken apart; any other module (adapters, quantised weights) is called.
        teacher: Its rows belong to those of `hidden`; None where no term looks at it.
        targets: `(N,)` the data's own next tokens.
        terms: The sum of each term over a few rows.
        weights: Of each term.
        vocab_size: Tokens of the vocabulary; rows of the head beyond it only pad it and are left out. None: all.
        memory_mib: Budget for the logits of a chunk of student and teacher together, in MiB. None: by the kind of device.
        scratch: Where the student's logits of a chunk lie; None: in memory of this call.

    Returns:
        The loss, a scalar with a graph to `hidden` and the head's parameters, and the terms `(K,)`, detached. Backward can run
        once.

    Raises:
        RuntimeError: the head's weights are sharded (FSDP2) at this moment.
    """
    module = head.module
    if any(hasattr(parameter, "full_tensor") for parameter in module.parameters()):  # DTensor, without importing it
        raise RuntimeError(
            "the output head's weights are sharded over processes where the loss needs them whole: shard the head together with the"
            " outermost module, and that one with reshard_after_forward=False"
        )
    plain = is_plain(module)
    parameters = [module.weight, module.bias] if plain else [p for p in module.parameters() if p.requires_grad]
    memory = (memory_mib or MEMORY_MIB.get(hidden.device.type, MEMORY_MIB["cuda"])) * 2**20
    factors = torch.tensor(weights, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    call = _Call(head, plain, teacher, targets, terms, factors, vocab_size, memory, scratch or Scratch())
    return _LinearTerms.apply(call, hidden, *parameters)


class _Call:
    """The arguments that are not differentiated."""

    def __init__(
        self,
        head: Head,
        plain: bool,
        teacher: TeacherRows | None,
        targets: Tensor,
        terms: Terms,
        weights: Tensor,
        vocab_size: int | None,
        memory: float,
        scratch: Scratch,
    ) -> None:
        self.head, self.plain, self.teacher, self.targets = head, plain, teacher, targets
        self.terms, self.weights, self.vocab_size, self.memory, self.scratch = terms, weights, vocab_size, memory, scratch
        self.need_gradient = torch.is_grad_enabled()  # inside the function it never is

    def chunks(self, tokens: int, vocab: int) -> list[slice]:
        """Even cuts of the tokens, so that the logits of a chunk fit the budget in float32: student's and teacher's, and what was called."""
        rows = max(1, int(self.memory / ((2 if self.plain else 3) * 4 * vocab)))
        count = -(-tokens // rows)
        rows = -(-tokens // count) if count else 1
        return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]

    def terms_and_gradient(self, logits: Tensor, teacher: Any, targets: Tensor, need_gradient: bool) -> Tensor:
        """The sums of the terms over a chunk `(K,)`; its logits are overwritten with their gradient."""
        rows, vocab = logits.shape
        on_cpu = logits.device.type == "cpu" and not on_gpu(logits)
        tile = max(torch.get_num_threads(), TILE // vocab) if on_cpu else max(1, GPU_TILE // vocab)
        total: Tensor | None = None
        for start in range(0, rows, tile):
            part = slice(start, start + tile)
            with torch.set_grad_enabled(need_gradient):
                leaf = logits[part].detach().requires_grad_(need_gradient)
                sums = self.terms(self.head.adjust(leaf), None if teacher is None else teacher[part], targets[part])
                if need_gradient:
                    (gradient,) = torch.autograd.grad((sums * self.weights).sum(), leaf)
                    logits[part] = gradient
            total = sums.detach() if total is None else total + sums.detach()
        assert total is not None
        return total


class _LinearTerms(torch.autograd.Function):
    """Loss and gradients together in forward; backward only hands them out."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        need = tuple(needed and call.need_gradient for needed in ctx.needs_input_grad[1:])
        head = (_PlainHead if call.plain else _AnyHead)(call, hidden, parameters, need)
        total = torch.zeros_like(call.weights)
        for rows in call.chunks(len(hidden), head.vocab):
            logits = head.logits(rows)  # (n, V)
            teacher = call.teacher.rows(rows, call.vocab_size) if call.teacher is not None else None
            total = total + call.terms_and_gradient(logits, teacher, call.targets[rows], any(need))
            if any(need):
                head.backward(rows, logits)
        ctx.gradients, ctx.dtypes = head.gradients(), [None if t is None else t.dtype for t in (hidden, *parameters)]
        ctx.mark_non_differentiable(total)
        return (total * call.weights).sum(), total  # no matrix product: autocast would round it

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward through the loss a second time: its gradients were handed out in the first")
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("the gradients of the loss were made in its forward pass, without a graph: there is no second derivative")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: nobody else has them, and those of the head are as large as the head. Rounded once, after the factor.
        scaled = [None if g is None else g.mul_(loss_gradient.to(g.dtype)) for g in gradients]
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True))


class _PlainHead:
    """A linear layer: its weight's gradient is summed in place over the chunks, in float32 or wider."""

    def __init__(self, call: _Call, hidden: Tensor, parameters: tuple[Tensor, ...], need: tuple[bool, ...]) -> None:
        weight, bias = parameters
        self.vocab = len(weight) if call.vocab_size is None else min(len(weight), call.vocab_size)
        dtype = matmul_dtype(hidden, weight)
        self.narrow_hidden = hidden.to(dtype)
        self.weight = weight[: self.vocab].to(dtype)
        self.bias = None if bias is None else at_least_float32(bias[: self.vocab])
        self.hidden_gradient = _wide(torch.empty_like, hidden) if need[0] else None
        self.weight_gradient = _wide(torch.zeros_like, weight) if need[1] else None
        self.bias_gradient = _wide(torch.zeros_like, bias) if bias is not None and need[2] else None
        self.scratch = call.scratch

    def logits(self, rows: slice) -> Tensor:
        """In float32 or wider; in the place of the last chunk's."""
        return project(self.narrow_hidden[rows], self.weight, self.bias, self.scratch)

    def backward(self, rows: slice, gradient: Tensor) -> None:
        """Add a chunk's part to the gradients."""
        hidden, narrow = self.narrow_hidden[rows], gradient
        if on_gpu(gradient):
            narrow = gradient.to(self.weight.dtype)  # tensor cores take nothing else: a rounding of 0.17 % in bfloat16
        if self.hidden_gradient is not None:
            self.hidden_gradient[rows] = _product(narrow, self.weight)
        if self.weight_gradient is not None:
            _add_product(self.weight_gradient[: self.vocab], narrow.T, hidden)
        if self.bias_gradient is not None:
            self.bias_gradient[: self.vocab] += gradient.sum(0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the hidden states, the weight and the bias, in float32 or wider."""
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient


class _AnyHead:
    """A module that is called as it is, with autograd's own gradients for each chunk."""

    def __init__(self, call: _Call, hidden: Tensor, parameters: tuple[Tensor, ...], need: tuple[bool, ...]) -> None:
        self.call, self.hidden, self.parameters, self.need = call, hidden, parameters, need
        with torch.no_grad():
            width = call.head.module(hidden[:0]).shape[-1]
        self.vocab = width if call.vocab_size is None else min(width, call.vocab_size)
        self.hidden_gradient = _wide(torch.empty_like, hidden) if need[0] else None
        self.parameter_gradients = [_wide(torch.zeros_like, p) if needed else None for p, needed in zip(parameters, need[1:], strict=True)]
        self.output: Tensor | None = None
        self.leaf: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """In float32 or wider, apart from the graph of the module, which `backward` uses."""
        with torch.set_grad_enabled(any(self.need)):
            self.leaf = self.hidden[rows].detach().requires_grad_(any(self.need))
            self.output = self.call.head.module(self.leaf)[:, : self.vocab]
        return self.output.detach().to(torch.promote_types(self.output.dtype, torch.float32), copy=True)

    def backward(self, rows: slice, gradient: Tensor) -> None:
        """Add a chunk's part to the gradients."""
        assert self.output is not None and self.leaf is not None
        inputs = [self.leaf, *self.parameters]
        found = torch.autograd.grad(self.output, inputs, gradient.to(self.output.dtype), allow_unused=True)
        if self.hidden_gradient is not None and found[0] is not None:
            self.hidden_gradient[rows] = found[0]
        for total, part in zip(self.parameter_gradients, found[1:], strict=True):
            if total is not None and part is not None:
                total += part
        self.output = self.leaf = None

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the hidden states and of each parameter, in float32 or wider."""
        return (self.hidden_gradient, *self.parameter_gradients)


def _wide(empty: Callable[..., Tensor], like: Tensor) -> Tensor:
    """Memory for a gradient, in float32 or wider: sums of many chunks stop growing in half precision."""
    return empty(like, dtype=torch.promote_types(like.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------- products, summed in float32


def on_gpu(tensor: Tensor) -> bool:
    """Whether products of narrow factors are for tensor cores. (`scripts/emulated_gpu.py` says so of a CPU's.)"""
    return tensor.is_cuda


def narrow_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """On a GPU, of factors in bfloat16 or float16: summed and given in float32."""
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the factors of a product are rounded to: under autocast on a GPU what it says, elsewhere nothing is rounded.

    (On a CPU the float32 product of float32 weights is exact and, without instructions for bfloat16, no slower.)
    """
    if on_gpu(hidden) and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(hidden.dtype, weight.dtype)


@torch.no_grad()
def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
    """hidden · weightᵀ + bias, `(n, H)` and `(V, H)` -> `(n, V)`, in float32 or wider whatever the factors are.

    Args:
        scratch: Where the result lies, until the next call with it.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = scratch.take(len(hidden), len(weight), wide, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype == wide:
            torch.mm(hidden, weight.T, out=logits)
        elif on_gpu(hidden):
            narrow_product(hidden, weight.T, out=logits)
        else:
            for block in _blocks(weight):
                torch.mm(hidden.to(wide), weight[block].to(wide).T, out=logits[:, block])
    return logits if bias is None else logits.add_(bias)


def _product(gradient: Tensor, weight: Tensor) -> Tensor:
    """`(n, V)` · `(V, H)` -> `(n, H)`."""
    with torch.autocast(gradient.device.type, enabled=False):
        if gradient.dtype not in (torch.float32, torch.float64):
            return narrow_product(gradient, weight)
        if gradient.dtype == weight.dtype:
            return gradient @ weight
        total = torch.zeros(len(gradient), weight.shape[1], dtype=gradient.dtype, device=gradient.device)
        for block in _blocks(weight):
            total.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
        return total


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += `(V, n)` · `(n, H)`."""
    with torch.autocast(total.device.type, enabled=False):
        if gradient.dtype == hidden.dtype == total.dtype:
            total.addmm_(gradient, hidden)
        elif on_gpu(gradient):
            total += narrow_product(gradient, hidden)
        else:
            total.addmm_(gradient.to(total.dtype), hidden.to(total.dtype))


def _blocks(weight: Tensor, rows: int = 8192) -> list[slice]:
    """A narrow weight is widened a block of rows at a time, so that there is never a wide copy of it."""
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
