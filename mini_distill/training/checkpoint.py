"""Checkpoints: written whole, checked when read, never pickled."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import NumericsError, StorageError
from ..storage import (
    atomic_folder,
    check_writable,
    free_name,
    read_regular,
    remove_folder,
    remove_stale_temporaries,
    storage_errors,
    verify_folder,
)
from .fingerprints import compare_fingerprints as compare_fingerprints

STATE = "state.json"
FORMAT = 1
ANOTHER = "Delete this checkpoint: the one before it is used."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was whole when it was opened.

    Attributes:
        path: Its folder.
        step: The optimizer step after which it was saved.
        state: What was saved besides tensors.
        best_step: The step of the best checkpoint at that time; None if there was none.
        aliases: For each entry of tensors, name -> the name that holds its values (tied weights).
    """

    path: Path
    step: int
    state: dict[str, Any]
    best_step: int | None
    aliases: dict[str, dict[str, str]]

    @property
    def names(self) -> list[str]:
        """The entries of tensors that were saved, such as model and optimizer."""
        return sorted(self.aliases)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`, on the CPU, in their own dtypes; tied ones are one tensor under two names.

        Raises:
            StorageError: there is no such entry, or its file cannot be read.
        """
        if name not in self.aliases:
            raise StorageError(str(self.path), f"holds no '{name}' (it holds {', '.join(self.names)})")
        file = self.path / f"{name}.safetensors"
        try:
            tensors = safetensors.torch.load_file(file)
            return tensors | {alias: tensors[target] for alias, target in self.aliases[name].items()}
        except (OSError, SafetensorError) as error:
            raise StorageError(str(file), f"not a safetensors file that can be read: {error}") from error
        except KeyError as error:
            raise StorageError(str(file), f"holds no tensor {error}") from error


class Checkpoints:
    """The checkpoints of a run: `step-00000400/` and so on in one folder.

    Args:
        folder: Made at the first save.
        keep: How many of the newest are kept; the best one is kept besides.
    """

    def __init__(self, folder: Path | str, keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bool = False) -> Checkpoint:
        """Save a checkpoint, then delete those that are no longer kept.

        Args:
            step: The optimizer step that is finished.
            tensors: One safetensors file for each entry (model, optimizer, …).
            state: Plain JSON values: counters, data position, fingerprints.
            best: This is the best checkpoint so far.

        Raises:
            NumericsError: a tensor or a number is not finite; nothing is saved.
            StorageError: the disk is full, …; nothing is saved, and what was there stays.
        """
        for name, entry in tensors.items():
            _check_tensors_finite(name, entry)
        _check_numbers_finite(STATE, state)
        path = self._path(step)
        best_step = step if best else self._best_before(step)
        aliases: dict[str, dict[str, str]] = {}
        with atomic_folder(path) as temporary:
            for name, entry in tensors.items():
                distinct, aliases[name] = _without_shared_memory(entry)
                safetensors.torch.save_file(distinct, temporary / f"{name}.safetensors")
            content = {"format": FORMAT, "step": step, "best_step": best_step, "aliases": aliases, "state": state}
            (temporary / STATE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
        self._delete_old(step, best_step)
        return Checkpoint(path, step, dict(state), best_step, aliases)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None when there is none at all. Damaged ones are named in a warning and skipped.

        Raises:
            StorageError: there are checkpoints, and every one is damaged.
        """
        remove_stale_temporaries(self.folder)
        on_disk = sorted(self._on_disk().items(), reverse=True)
        for step, path in on_disk:
            try:
                return self._open(step, path)
            except StorageError as error:
                logger.warning("%s This checkpoint is skipped.", error)
        if on_disk:
            what = f"all {len(on_disk)} checkpoints are damaged" if len(on_disk) > 1 else "the only checkpoint is damaged"
            raise StorageError(str(self.folder), what, "Bring back a copy of one, or start anew with resume=never.")
        return None

    def best(self) -> Checkpoint | None:
        """The checkpoint that was the best when the newest was saved; None where none was called the best.

        Raises:
            StorageError: it is damaged or has been deleted.
        """
        newest = self.newest()
        if newest is None or newest.best_step is None:
            return None
        return self.at(self._path(newest.best_step))

    def at(self, path: Path | str) -> Checkpoint:
        """The checkpoint in the folder `path`.

        Raises:
            StorageError: it is not there, or not as it was written.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            raise StorageError(str(path), "not a checkpoint (expected a folder such as step-00000400)")
        if problems := verify_folder(path):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise StorageError(str(path), f"damaged: {problems[0]}{more}")
        try:
            return _read_state(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(str(path), f"damaged: {STATE} is not a checkpoint's") from error

    def rewind(self, step: int) -> None:
        """Set the checkpoints beyond `step` aside (`step-00000400.old-1`): a run goes on from `step` by another way."""
        for later, path in self._on_disk().items():
            if later > step:
                with storage_errors(path, "set the checkpoint aside"):
                    os.rename(path, free_name(path))

    def check_space(self, model: nn.Module) -> None:
        """Before training: is there room for the checkpoints of AdamW on `model`?

        Raises:
            StorageError: there is not.
        """
        each = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # the weights and AdamW's two moments
        there = sum(file.stat().st_size for path in self._on_disk().values() for file in path.glob("*.safetensors"))
        needed = each * (self.keep + 2) - there  # those kept, the best, and the one being written
        check_writable(self.folder.parent, max(needed, each))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _on_disk(self) -> dict[int, Path]:
        with storage_errors(self.folder, "read the folder"):
            entries = list(self.folder.iterdir()) if self.folder.is_dir() else []
        matches = ((re.fullmatch(r"step-(\d{8,})", entry.name), entry) for entry in entries)
        return {int(match[1]): entry for match, entry in matches if match}

    def _open(self, step: int, path: Path) -> Checkpoint:
        if path.is_symlink():
            raise StorageError(str(path), "damaged: a link instead of a folder")
        checkpoint = self.at(path)
        if checkpoint.step != step:
            raise StorageError(str(path), f"damaged: it holds step {checkpoint.step}")
        return checkpoint

    def _best_before(self, step: int) -> int | None:
        """What the newest earlier checkpoint knew as the best; unverified, as it only decides what is kept."""
        for _, path in sorted(self._on_disk().items(), reverse=True):
            try:
                checkpoint = _read_state(path)
                if checkpoint.step < step:
                    return checkpoint.best_step
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def _delete_old(self, saved: int, best_step: int | None) -> None:
        """Keep `saved`, which is good, the newest before it, and the best. Later ones, being damaged, wait to be replaced."""
        earlier = sorted(step for step in self._on_disk() if step < saved)
        for step in earlier[: max(0, len(earlier) - (self.keep - 1))]:
            if step != best_step:
                remove_folder(self._path(step))


def _read_state(path: Path) -> Checkpoint:
    """Raises OSError, ValueError, KeyError or TypeError for anything but a state that `save` wrote."""
    content = json.loads(read_regular(path / STATE))
    aliases = dict(content["aliases"])
    plain_names = all(re.fullmatch(r"\w[\w.-]*", name) and isinstance(tied, dict) for name, tied in aliases.items())
    if content["format"] != FORMAT or not isinstance(content["step"], int) or not plain_names:
        raise ValueError("not a state of this format")
    return Checkpoint(path, content["step"], content["state"], content["best_step"], aliases)


# ---------------------------------------------------------------------------------------------------------------------- tensors


def _check_tensors_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
            if not torch.isfinite(wide).all():
                raise NumericsError(
                    f"{name} tensor {key}", "not finite: no checkpoint was saved", "Go on from the last one with a lower learning rate."
                )


def _check_numbers_finite(where: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_numbers_finite(f"{where}.{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_numbers_finite(f"{where}[{index}]", inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(where, f"{value} is not finite: no checkpoint was saved")


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What safetensors can write: each memory once. Gives the distinct tensors, and for every tied name the one that stands for it."""
    distinct: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    by_identity: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and identity in by_identity:
            aliases[name] = by_identity[identity]
            continue
        is_view = storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in storages
        distinct[name] = tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor.contiguous()
        by_identity[identity] = name
        storages.add(storage.data_ptr())
    return distinct, aliases


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back the weights of a model of the same shape.

    Raises:
        StorageError: the checkpoint's are not the model's.
    """
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in found.items()} for found in (model.state_dict(), tensors))
    if odd := sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)):
        raise StorageError("model of the checkpoint", f"its weights are not the model's ({odd[0]} and {len(odd) - 1} more)", ANOTHER)
    model.load_state_dict(tensors)


# -------------------------------------------------------------------------------------------------------------------- optimizer


def optimizer_to_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state by *parameter name*, which outlives a change in the order of parameters.

    Args:
        optimizer: AdamW, or another whose state is tensors and plain numbers per parameter.
        model: Whose parameters it updates; bare, so that names carry no wrapper's prefix.

    Returns:
        `<parameter>.<exp_avg|exp_avg_sq|step|…>` -> tensor, in its own dtype; and a JSON value: the remaining state, and each
        group's parameters and settings.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else others)[f"{names[parameter]}.{key}"] = value
    groups = [{**_plain_options(group), "parameters": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "others": others}


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what `optimizer_to_tensors` gave.

    torch's own `load_state_dict` casts moments to the parameter's dtype; here they keep theirs. The settings of the groups stay
    those of `optimizer`: they come from the configuration, whose changes are either refused or meant.

    Raises:
        StorageError: the checkpoint's parameters are not the model's.
    """
    parameters = dict(model.named_parameters())
    ours = {name for name, p in parameters.items() if any(p is q for group in optimizer.param_groups for q in group["params"])}
    theirs = {name for group in state["groups"] for name in group["parameters"]}
    if ours != theirs:
        odd = sorted(ours ^ theirs)
        raise StorageError("optimizer of the checkpoint", f"its parameters are not the model's ({odd[0]} and {len(odd) - 1} more)", ANOTHER)
    _check_moments(parameters, {**tensors, **state["others"]})
    on_device = {p for group in optimizer.param_groups if group.get("fused") or group.get("capturable") for p in group["params"]}
    optimizer.state.clear()
    for full_name, value in {**tensors, **state["others"]}.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        if isinstance(value, Tensor):  # a step counter lives on the CPU unless a fused kernel reads it
            value = value.clone() if key == "step" and parameter not in on_device else value.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = value


def _check_moments(parameters: Mapping[str, nn.Parameter], found: Mapping[str, Any]) -> None:
    """An optimizer that has made a step has a state, and its tensors are numbers or of their parameter's shape."""
    odd = [name for name, value in found.items() if not _is_of(parameters.get(name.rpartition(".")[0]), value)]
    if parameters and (odd or not found):
        raise StorageError(
            "optimizer of the checkpoint", f"its state is not the model's ({', '.join(odd[:2]) or 'there is none'})", ANOTHER
        )


def _is_of(parameter: nn.Parameter | None, value: Any) -> bool:
    return parameter is not None and (not isinstance(value, Tensor) or not value.dim() or value.shape == parameter.shape)


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, Tensor) else value for key, value in group.items() if key not in ("params", "param_names")
    }
