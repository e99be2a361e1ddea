"""What a run leaves on the disk."""

from __future__ import annotations

from pathlib import Path

from ..config import PlanCommand
from .models import Models
from .tokens import BYTES_OF_TOKEN, DataSize


def disk_needs(config: PlanCommand, models: Models, data: DataSize) -> dict[str, float]:
    """Bytes by what they are for; `total` leaves out what is there already.

    A checkpoint holds the student and both moments of AdamW in float32; besides the newest, the best one is kept, and one more is
    there while it is written.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in models.student.parameters())
    saved = 1 if config.trainer.save_every is None else -(-config.trainer.max_steps // config.trainer.save_every)
    checkpoints = min(config.trainer.keep_checkpoints + 1, saved) + (config.trainer.eval_every is not None)
    found = {"checkpoint": 3.0 * weights, "checkpoints": 3.0 * weights * checkpoints, "student": float(weights)}
    sequences = None if data.sequences is None else data.sequences + (data.held_out_sequences or 0)
    if sequences is not None:
        found["tokenised_data"] = BYTES_OF_TOKEN * sequences * config.data.seq_len * _filled(config, data)
    new = [found["checkpoints"], found["student"], 0.0 if data.counted else found.get("tokenised_data", 0.0)]
    if config.teacher.cache_dir is not None and (folder := Path(config.teacher.cache_dir).expanduser()).is_dir():
        found["teacher_cache"] = float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    return found | {"total": sum(new)}


def _filled(config: PlanCommand, data: DataSize) -> float:
    """Share of the positions that hold a token; without packing, about those that are supervised."""
    return 1.0 if config.data.packing else data.supervised_share
