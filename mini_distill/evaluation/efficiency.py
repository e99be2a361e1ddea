"""What a model costs: operations, bytes, seconds, memory, and from them money and energy."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, PreTrainedModel

from ..config import FullEvaluationConfig
from ..errors import ConfigError
from ..models.generation import generating_with
from ..redaction import redact_text
from .isolation import without_side_effects

ROUNDS = 5
MILLION = 1e6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a model can be loaded from again, as `load_causal_lm` takes it."""

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights in memory; what two modules share counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def file_bytes(origin: Origin) -> int | None:
    """Bytes of a folder's weight files; None for a model on the hub."""
    files = list(Path(origin.path).expanduser().glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


@torch.no_grad()
def flops_per_token(model: PreTrainedModel, prompt_tokens: int) -> float:
    """Floating-point operations of reading a prompt, over its tokens: matrix products alone, attention without the causal half left out."""
    ids = torch.zeros(1, prompt_tokens, dtype=torch.long, device=model.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the other kernels are not counted everywhere
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops() / prompt_tokens


def timings(
    models: Mapping[str, PreTrainedModel], config: FullEvaluationConfig, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, float]:
    """Reading and writing, the models in turn, so that what else the machine does hits all of them alike.

    Greedy generation with a key-value cache, by transformers; no measure of a serving engine. Compare the numbers of one call only.

    Returns:
        For each model, medians over five rounds: `perf/<model>_time_to_first_token` (seconds, from a prompt of `prompt_tokens`),
        `perf/<model>_generation_tokens_per_second` of one text (the tokens after the first) and the same with `_batch<n>` of n at a time.
    """
    found: dict[str, list[float]] = {}
    with without_side_effects(*models.values()), autocast():
        for number in range(ROUNDS + 1):
            for name, model in models.items():
                measured = _one_round(model, config)
                if number:  # the first is a warm-up: allocations, kernel choice
                    for key, value in measured.items():
                        found.setdefault(f"perf/{name}_{key}", []).append(value)
    return {key: median(values) for key, values in found.items()}


def _one_round(model: PreTrainedModel, config: FullEvaluationConfig) -> dict[str, float]:
    written, batch_size = config.generation_tokens - 1, config.generation_batch_size
    first = _seconds_to_write(model, 1, config.prompt_tokens, 1)
    whole = _seconds_to_write(model, 1, config.prompt_tokens, config.generation_tokens)
    found = {"time_to_first_token": first, "generation_tokens_per_second": written / max(whole - first, 1e-9)}
    if batch_size > 1:
        first = _seconds_to_write(model, batch_size, config.prompt_tokens, 1)
        whole = _seconds_to_write(model, batch_size, config.prompt_tokens, config.generation_tokens)
        found[f"generation_tokens_per_second_batch{batch_size}"] = batch_size * written / max(whole - first, 1e-9)
    return found


def _seconds_to_write(model: Any, batch_size: int, prompt_tokens: int, new_tokens: int) -> float:
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    started = time.perf_counter()
    write(model, ids, new_tokens).cpu()  # the copy waits for the device to finish
    return time.perf_counter() - started


def write(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """`(batch, prompt)` -> `(batch, prompt + new_tokens)`, greedily, to the last token whatever is written."""
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    with generating_with(model, settings):
        written: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids))
    return written


def check_length(name: str, model: PreTrainedModel, config: FullEvaluationConfig) -> None:
    """Raises ConfigError where prompt and generation are longer than a model's positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = config.prompt_tokens + config.generation_tokens
    if longest is not None and wanted > longest:
        what = f"together with generation_tokens {wanted}, and the {name} has {longest} positions"
        raise ConfigError("evaluation.prompt_tokens", what, "Choose less, or evaluation.speed=false.")


def peak_memory(name: str, origin: Origin, config: FullEvaluationConfig, device: str) -> float | None:
    """Bytes that loading the model, reading a prompt and writing take at most, in a process of their own.

    On a CPU resident memory above that of the process before loading; on a GPU what torch allocates. None where that process fails:
    beside the models here there may be no room for another; a warning says so.
    """
    task = {
        "origin": asdict(origin),
        "device": device,
        "prompt_tokens": config.prompt_tokens,
        "generation_tokens": config.generation_tokens,
    }
    command = [sys.executable, "-m", "mini_distill.evaluation.memory", json.dumps(task)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        logger.warning("the peak memory of the %s is left out: the process that measures it %s", name, _end_of(ended))
        return None
    return float(ended.stdout.strip().splitlines()[-1])


def _end_of(process: subprocess.CompletedProcess[str]) -> str:
    """How a process failed, in one line."""
    if process.returncode < 0:
        return f"was killed ({signal.Signals(-process.returncode).name}), for want of memory most likely"
    return f"ended with '{shorten(redact_text(process.stderr.strip().rpartition(chr(10))[2]), width=200, placeholder=' …')}'"


def cost_and_energy(found: Mapping[str, float], config: FullEvaluationConfig, names: list[str]) -> dict[str, float]:
    """What a million written tokens cost and take, at the batch size that was timed.

    `cost/<model>_per_million_tokens` is in the currency of `evaluation.price_per_hour`, and
    `energy/<model>_joules_per_million_tokens_estimate` an estimate: `evaluation.watts` times seconds, whatever the machine really draws.
    """
    batch = f"_batch{config.generation_batch_size}" if config.generation_batch_size > 1 else ""
    costs = {}
    for name in names:
        seconds = MILLION / found[f"perf/{name}_generation_tokens_per_second{batch}"]
        if config.price_per_hour is not None:
            costs[f"cost/{name}_per_million_tokens"] = config.price_per_hour * seconds / 3600
        if config.watts is not None:
            costs[f"energy/{name}_joules_per_million_tokens_estimate"] = config.watts * seconds
    return costs
