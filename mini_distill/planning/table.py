"""The plan for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..storage import size_text

if TYPE_CHECKING:
    from ..plan import Plan


def format_plan(plan: Plan) -> str:
    """All that a plan says, in lines of at most a hundred characters."""
    blocks = [_memory(plan), _time(plan), _tokens_and_disk(plan), _devices(plan), "\n".join(f"Note: {note}" for note in plan.notes)]
    return "\n\n".join(block for block in blocks if block)


def _memory(plan: Plan) -> str:
    memory, parameters = plan.memory, plan.parameters
    rows = [
        ("teacher's weights", memory["teacher_weights"], _count(parameters.get("teacher", 0))),
        ("student's weights", memory["student_weights"], _count(parameters["student"])),
        ("moments of AdamW", memory["moments"], "float32, two for each weight"),
        ("buckets of the exchange", memory["exchange"], "a copy of the gradients"),
        ("libraries, tokenizer", memory["process"], ""),
        ("step at its peak", memory["step"], _step_note(plan)),
        ("or evaluation", memory["evaluation"], "the larger of the two counts"),
        ("gaps of the heap", memory["gaps"], "held by the process, used by nobody: an estimate"),
    ]
    lines = [f"{label:<26}{size_text(size):>10}   {note}".rstrip() for label, size, note in rows if size]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    total = f"{'together':<26}{size_text(memory['total']):>10}   of {size_text(memory['available'])}: {verdict}"
    return "\n".join(["Memory of a device", *lines, total, _advice(plan)])


def _step_note(plan: Plan) -> str:
    names = ("activations", "logits", "gradients")
    return "of which " + ", ".join(f"{name} {size_text(plan.memory[name])}" for name in names)


def _advice(plan: Plan) -> str:
    if plan.largest_micro_batch == 0:
        return (
            "Not even one sequence fits. In this order: trainer.gradient_checkpointing=true, teacher.dtype=bfloat16, a shorter"
            " data.seq_len, a smaller student."
        )
    used, there = size_text(plan.largest_micro_batch_bytes), size_text(plan.memory["available"])
    return f"trainer.micro_batch_size: the largest that fits is {plan.largest_micro_batch} (uses {used} of {there})."


def _time(plan: Plan) -> str:
    seconds, flops = plan.seconds, plan.flops
    labels = {"teacher": "teacher forward", "student": "student forward", "loss": "both heads, loss", "backward": "student backward"}
    lines = [
        f"{label:<26}{_duration(seconds[phase]):>10}   {_count(flops.get(phase, 0))} FLOPs"
        for phase, label in labels.items()
        if seconds.get(phase)
    ]
    lines += [
        f"{'update':<26}{_duration(seconds['update']):>10}",
        f"{'step':<26}{_duration(seconds['step']):>10}   {_count(flops['step'])} FLOPs, "
        f"{plan.tokens['supervised_step'] / max(seconds['step'], 1e-9):,.0f} supervised tokens/s",
        f"{'an evaluation':<26}{_duration(seconds['evaluation']):>10}",
        f"{'the run':<26}{_duration(seconds['run']):>10}   without loading, tokenising and samples",
    ]
    return "\n".join(["Time of an optimizer step", *lines])


def _tokens_and_disk(plan: Plan) -> str:
    tokens, disk = plan.tokens, plan.disk
    seen = f"{_count(tokens['run'])} tokens in the run"
    if "epoch" in tokens:
        seen += f": {tokens['epochs']:.3g} times the {_count(tokens['epoch'])} of the data"
    names = {"checkpoints": "checkpoints", "student": "student", "tokenised_data": "tokenised data", "teacher_cache": "cache (is there)"}
    parts = ", ".join(f"{label} {size_text(disk[name])}" for name, label in names.items() if name in disk)
    return f"Tokens: {seen}.\nDisk: {size_text(disk['total'])} to be written; {parts}."


def _devices(plan: Plan) -> str:
    memory = plan.memory
    replicated = sum(memory[name] for name in ("teacher_weights", "student_weights", "moments", "gradients"))
    return (
        f"More devices (torchrun, DDP): each holds weights, gradients and moments ({size_text(replicated)}) and, while it exchanges them,"
        f" a copy of the gradients ({size_text(memory['gradients'])});\nthe sequences divide: N devices read N times the tokens in a step."
    )


def _count(number: float) -> str:
    """1.57 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
