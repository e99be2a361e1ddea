"""What the blocks of a causal LM compute, watched during its ordinary forward pass.

Hooks see what a model does anyway: nothing is computed twice, and the loss's graph leads through the very tensors. Axes: B batch,
S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, ModelError, Problem

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""State -> the module that gives it, in nearly all architectures."""

STATES = ("hidden", *PROJECTIONS, "attention")


def _falcon_groups(config: PreTrainedConfig) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


FUSED: dict[str, tuple[str, Callable[[PreTrainedConfig], int]]] = {
    "gpt2": ("c_attn", lambda config: 1),
    "gpt_bigcode": ("c_attn", lambda config: 1 if config.multi_query else config.num_attention_heads),
    "phi3": ("qkv_proj", lambda config: 1),
    "mpt": ("Wqkv", lambda config: 1),
    "dbrx": ("Wqkv", lambda config: 1),
    "gpt_neox": ("query_key_value", lambda config: config.num_attention_heads),
    "gpt_neox_japanese": ("query_key_value", lambda config: config.num_attention_heads),
    "bloom": ("query_key_value", lambda config: config.num_attention_heads),
    "persimmon": ("query_key_value", lambda config: config.num_attention_heads),
    "falcon": ("query_key_value", _falcon_groups),
}
"""Architecture -> the one projection of queries, keys and values, and into how many groups its output is cut.

Each group holds its queries, its keys and its values in this order: one group is [queries | keys | values], as many groups as heads
is [query, key, value] head by head.
"""


class InnerStates:
    """What chosen blocks compute in a model's forward passes within a `with` block.

        with InnerStates(student, [("hidden", 3), ("query", 3)]) as states:
            logits = student(input_ids).logits
            loss = hidden_mse(states["hidden", 3][mask], …)
        loss.backward()

    The tensors are the model's own: neither copied nor detached, with a graph where the pass has one. Those of the latest pass are
    kept, until the next one or the end of the `with` block, which takes all hooks away, also on an exception. It can be entered
    again. Recomputation under gradient checkpointing is not recorded. Wrapped for several processes (DDP, FSDP2), the model's
    own forward pass still calls the hooks: give the model that is inside.

    State            what                                                                              shape
    hidden           output of the block: the residual stream, before the final norm                   (batch, seq, hidden)
    query key value  output of the projection, before norms, clipping and rotary embedding; keys and   (batch, seq, width)
                     values of grouped-query attention are not repeated, so their width may be less
    attention        probabilities, of eager attention only                                            (batch, heads, seq, seq)

    Args:
        model: Any causal LM of transformers with one list of blocks.
        wanted: (state, block) pairs, blocks counted from 0.
        group: `student` or `teacher`, to name settings in errors.

    Raises:
        ValueError: there is no such state or block.
        ModelError: the architecture does not show it, or the attention implementation does not.
    """

    def __init__(self, model: PreTrainedModel, wanted: Iterable[tuple[str, int]], group: str | None = None) -> None:
        self.model, self.group = model, group
        path, self.wanted = blocks_path(model, self._where("path")), sorted(set(wanted))
        blocks, self._caller = _module_list(model, path), _caller_of(model, path)
        self._watched: dict[tuple[str, int], nn.Module] = {}
        self._source: dict[tuple[str, int], tuple[str, int]] = {}  # queries, keys and values of one projection come together
        for state, i in self.wanted:
            if state not in STATES or not 0 <= i < len(blocks):
                raise ValueError(f"got {(state, i)}, expected one of {', '.join(STATES)} and a block from 0 to {len(blocks) - 1}")
            source, module = self._find(state, blocks[i], i)
            self._watched[source], self._source[state, i] = module, source
        self._recorded: dict[tuple[str, int], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._in_pass = self._with_gradient = False

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        """The state of a block in the latest forward pass.

        Raises:
            KeyError: it is not among those that were wanted.
            RuntimeError: there was no forward pass within this `with` block.
        """
        source = self._source[key]
        if source not in self._recorded:
            raise RuntimeError(f"no forward pass of {type(self.model).__name__} within the with block has shown {key}")
        recorded = self._recorded[source]
        return self._part(recorded, key[0]) if source[0] == "fused" else recorded

    # ------------------------------------------------------------------------------------------------------------- watching

    def __enter__(self) -> InnerStates:
        if self._handles:
            raise RuntimeError("entered a second time: the states of one pass would replace those of another")
        self._handles = [
            self._caller.register_forward_pre_hook(self._begin),
            self._caller.register_forward_hook(self._end, always_call=True),  # else a pass that fails would stay open
            *(module.register_forward_hook(self._hook(*key)) for key, module in self._watched.items()),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorded.clear()
        self._in_pass = False

    def _begin(self, caller: nn.Module, inputs: Any) -> None:
        if caller.training and any(state == "attention" for state, _ in self.wanted):
            self._check_attention_dropout()
        self._recorded.clear()
        self._in_pass, self._with_gradient = True, torch.is_grad_enabled()

    def _end(self, caller: nn.Module, inputs: Any, output: Any) -> None:
        self._in_pass = False

    def _hook(self, state: str, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._in_pass:  # gradient checkpointing computes the block again, during backward
                return
            if self._with_gradient and not torch.is_grad_enabled():
                raise RuntimeError("reentrant gradient checkpointing cuts inner states off from the graph: use use_reentrant=False")
            if (state, i) in self._recorded:
                raise self._error(f"runs block {i} more than once in a pass", "Use another architecture.")
            self._recorded[state, i] = self._attention(output) if state == "attention" else _first(output)

        return record

    def _attention(self, output: Any) -> Tensor:
        """The attention probabilities in what an attention module returns: the second thing."""
        second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(second, Tensor) or second.dim() != 4:
            raise self._error("does not hand out attention probabilities", "Use relation_kl or hidden states instead.")
        return second

    def _part(self, fused: Tensor, state: str) -> Tensor:
        """Queries, keys or values out of the output of one projection for all: `(B, S, width)`."""
        config = self.model.config.get_text_config()
        groups = FUSED[config.model_type][1](config)
        queries = config.num_attention_heads * _head_width(config)
        keys = (fused.shape[-1] - queries) // 2
        parts = fused.unflatten(-1, (groups, -1)).split([queries // groups, keys // groups, keys // groups], dim=-1)
        return parts[list(PROJECTIONS).index(state)].flatten(-2)

    # -------------------------------------------------------------------------------------------------------------- finding

    def _find(self, state: str, block: nn.Module, i: int) -> tuple[tuple[str, int], nn.Module]:
        """(what the module gives, of which block), and the module to watch."""
        if state == "hidden":
            return (state, i), block
        if state == "attention":
            return (state, i), self._attention_module(block, i)
        return self._projection(state, block, i)

    def _projection(self, state: str, block: nn.Module, i: int) -> tuple[tuple[str, int], nn.Module]:
        config = self.model.config.get_text_config()
        if config.model_type in FUSED:
            name, key = FUSED[config.model_type][0], ("fused", i)
        else:
            name, key = PROJECTIONS[state], (state, i)
        found = [module for path, module in block.named_modules() if path.rpartition(".")[2] == name]
        if len(found) != 1:
            what = f"has {len(found) or 'no'} modules called {name} in block {i}, so that its {state} states are not known"
            raise self._error(what, "Match hidden states instead, or blocks that have them.")
        expected = config.num_attention_heads * _head_width(config)
        width = getattr(found[0], "out_features", expected)
        if key[0] == "query" and width != expected:  # Qwen3-Next: a gate lies between them
            what = f"has a {name} of width {width} in block {i}, expected {expected}: there is more in it than queries"
            raise self._error(what, "Match keys, values or hidden states instead.")
        return key, found[0]

    def _attention_module(self, block: nn.Module, i: int) -> nn.Module:
        implementation = self.model.config.get_text_config()._attn_implementation
        if implementation != "eager":
            raise ModelError(
                self._where("attn_implementation"),
                f"got {implementation}, with which {type(self.model).__name__} never holds attention probabilities",
                f"Set {self._setting('attn_implementation')}=eager.",
            )
        found = [module for module in block.children() if "Attention" in type(module).__name__]
        if len(found) != 1:
            raise self._error(f"has {len(found) or 'no'} attention modules in block {i}", "Match hidden states instead.")
        return found[0]

    def _check_attention_dropout(self) -> None:
        """In training, what is handed out has been through dropout: neither probabilities nor what the teacher's are like."""
        config = self.model.config.get_text_config()
        for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
            if getattr(config, name, None):
                what = f"drops attention probabilities at random in training ({name}={getattr(config, name)}), and they cannot be matched"
                raise self._error(what, f"Set {name} to 0 in its config.json.")

    def _error(self, what: str, remedy: str) -> ModelError:
        config = self.model.config.get_text_config()
        return ModelError(self._where("path"), f"{type(self.model).__name__} ({config.model_type}) {what}", remedy)

    def _where(self, setting: str) -> str:
        return f"{self.group}.{setting}" if self.group else "model"

    def _setting(self, setting: str) -> str:
        return f"{self.group}.{setting}" if self.group else setting


def blocks_of(model: PreTrainedModel, where: str | None = None) -> nn.ModuleList:
    """The list of a model's decoder blocks.

    Args:
        model: Any causal LM of transformers.
        where: The setting to name in the error; None: the class of the model.

    Raises:
        ModelError: it has none, or more than one list could be it.
    """
    return _module_list(model, blocks_path(model, where))


def blocks_path(model: PreTrainedModel, where: str | None = None, remedy: str = "Use another architecture.") -> str:
    """The path of the list of blocks, `model.layers` for Llama, `transformer.h` for GPT-2.

    Raises:
        ModelError: there is none, or more than one list could be it.
    """
    of, name = model.config.get_text_config().num_hidden_layers, type(model).__name__
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == of]
    outermost = [path for path in lists if not any(path.startswith(other + ".") for other in lists)]
    if len(outermost) != 1:
        raise ModelError(where or name, f"cannot tell which list of {name} holds its {of} blocks", remedy)
    return outermost[0]


def _module_list(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _caller_of(model: nn.Module, path: str) -> nn.Module:
    """The module that calls the blocks: the next one around them that is more than a container.

    Its passes are the model's, whoever asks for them; `base_model` is passed over by OPT's own `forward`.
    """
    while path:
        path = path.rpartition(".")[0]
        if not isinstance(around := model.get_submodule(path), nn.ModuleDict | nn.ModuleList):
            return around
    return model


def layer_map(spec: str | Mapping[int, int], student_layers: int, teacher_layers: int, where: str = "layers") -> list[tuple[int, int]]:
    """Which block of the student is matched with which of the teacher.

    Args:
        spec: `uniform`: each of the student's, spread over the teacher's so that the last meets the last (TinyBERT's
            g(m) = m · T / S, counted from 1); `last`: the last with the last; or {student block: teacher block}, counted from 0,
            negative from the end.
        student_layers: How many blocks the student has.
        teacher_layers: How many blocks the teacher has.
        where: The setting to name in errors.

    Returns:
        (student block, teacher block), counted from 0, in the order of the student's.

    Raises:
        ConfigError: the specification is empty or unknown, or names a block that is not there or the same one twice.
    """
    if isinstance(spec, Mapping):
        return _explicit_map(spec, student_layers, teacher_layers, where)
    if spec == "last":
        return [(student_layers - 1, teacher_layers - 1)]
    if spec == "uniform":
        # A student that is deeper than its teacher has several blocks before the teacher's first: they meet it.
        return [(i, max(0, round((i + 1) * teacher_layers / student_layers) - 1)) for i in range(student_layers)]
    raise ConfigError(where, f"got {spec!r}, expected uniform, last, or {{student block: teacher block}}")


def _explicit_map(spec: Mapping[int, int], student_layers: int, teacher_layers: int, where: str) -> list[tuple[int, int]]:
    if not spec:
        raise ConfigError(where, "is empty", "Name at least one {student block: teacher block}, or use uniform or last.")
    problems, pairs = [], {}
    for pair in spec.items():
        resolved = []
        for side, block, of in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if isinstance(block, bool) or not isinstance(block, int) or not -of <= block < of:
                what = f"got {side} block {block!r}, expected a whole number from 0 to {of - 1}, or from {-of} to -1 counted from the end"
                problems.append(Problem(where, what))
            else:
                resolved.append(block % of)
        if len(resolved) == 2 and resolved[0] in pairs:
            problems.append(Problem(where, f"names student block {resolved[0]} twice", "Give each one block of the teacher."))
        elif len(resolved) == 2:
            pairs[resolved[0]] = resolved[1]
    if problems:
        raise ConfigError.from_problems(problems)
    return sorted(pairs.items())


def _head_width(config: PreTrainedConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _first(output: Any) -> Tensor:
    """The tensor in what a module returns, whether alone or first among others."""
    return output[0] if isinstance(output, tuple) else output
