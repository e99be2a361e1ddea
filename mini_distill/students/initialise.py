"""Students that begin with their teacher's own weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError, ModelError
from ..models.inner_states import blocks_path
from ..models.loading import one_line


def evenly_spaced(num_layers: int, of: int) -> list[int]:
    """Which of a teacher's layers to keep: the first, the last, and the others as evenly as can be between them.

    One layer alone is the first: it is the one that reads the embedding it was trained on.
    """
    if num_layers == 1:
        return [0]
    return [round(i * (of - 1) / (num_layers - 1)) for i in range(num_layers)]


def from_teacher_layers(teacher: PreTrainedModel, num_layers: int | None) -> PreTrainedModel:
    """A float32 copy of `teacher` with `num_layers` of its own blocks, evenly spaced (as DistilBERT, arXiv 1910.01108, began).

    Embedding, norms and head are copied whole; the copy shares no storage with the teacher.

    Args:
        teacher: Any model with one list of blocks.
        num_layers: How many; None: a quarter of them.

    Raises:
        ConfigError: more layers than the teacher has.
        ModelError: the teacher's blocks cannot be told apart from the rest, or are of several kinds that its configuration does not list.
    """
    of = teacher.config.get_text_config().num_hidden_layers
    num_layers = num_layers or max(1, of // 4)
    if num_layers > of:
        raise ConfigError("student.num_layers", f"got {num_layers}, and the teacher has {of}")
    kept = evenly_spaced(num_layers, of)
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == of and not name.endswith("token_id"):  # layer_types and the like: one entry a layer
            setattr(text, name, [value[i] for i in kept])
    with torch.random.fork_rng([]):  # the random weights are all overwritten
        student = type(teacher)(config).float()
    try:
        student.load_state_dict(_kept_weights(teacher, kept))
    except RuntimeError as error:  # which blocks are of which kind is said elsewhere than in a list with one entry a layer
        raise ModelError(
            "student.num_layers",
            f"blocks {', '.join(map(str, kept))} of {type(teacher).__name__} do not fit its configuration for {num_layers} ({one_line(error)})",
            f"Keep all {of}, or use student=mini_2m or another preset.",
        ) from error
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _kept_weights(teacher: PreTrainedModel, kept: list[int]) -> dict[str, Tensor]:
    """The teacher's state dict without the other blocks, the kept ones renumbered."""
    prefix = blocks_path(teacher, "student.kind", "Use student=mini_2m or another preset.") + "."
    new_number = {str(old): str(new) for new, old in enumerate(kept)}
    state = {}
    for key, value in teacher.state_dict().items():
        if not key.startswith(prefix):
            state[key] = value
            continue
        number, _, rest = key.removeprefix(prefix).partition(".")
        if number in new_number:
            state[f"{prefix}{new_number[number]}.{rest}"] = value
    return state
