"""One distillation step of this framework against floors and against TRL, in turns: only ratios of the same minute mean anything.

    python scripts/benchmark_step.py --variants mini_distill trl_gkd --vocab 32000 --batch 4 --seq 512 --supervised 0.875 \
        --peer-python /path/to/trl/bin/python --output results.jsonl
    python scripts/benchmark_step.py --variants mini_distill plain_full --sweep vocab 4096 32000 128256 --output by_vocab.jsonl
    python scripts/benchmark_step.py --markdown results.jsonl
    python scripts/benchmark_step.py --gradient-error --vocab 32000

Every variant (`benchmark_variants.py`) is a process of its own; this one gives each its turn, step by step (A B C A B C …), so that
all see the same noise. A JSON line per variant: the median time of a step, the ratio to the first variant (the median over the rounds
of the ratio within a round, with the lowest and the highest), the peak of memory above the loaded models (`state_mib` of it are the
gradients and AdamW's moments, which every training step has to hold), the first losses. Variants
with the same objective must agree on the first loss. `scripts/plot_benchmark.py` draws what a sweep has written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

FLOOR_SUM = ("teacher_rows", "ce_fused")
"""The two floors that a step cannot be faster than together: the teacher's logits, and the student's training."""

SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the first loss within which two variants do the same work; peers sum in bf16."""

CHOICES = {"objective": ("forward_kl", "kl_ce", "ce"), "dtype": tuple(SAME_LOSS), "device": ("cpu", "cuda")}

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a variant is given.

    Attributes:
        variant: Its name in `benchmark_variants.py`.
        objective: `forward_kl`, `kl_ce` (half of each) or `ce`.
        vocab: Entries of the vocabulary.
        batch: Sequences.
        seq: Tokens of a sequence.
        supervised: Share of the tokens that are not in the prompt.
        padding: Share of the tokens that are padding.
        dtype: Of the models.
        device: cpu or cuda.
        threads: On a CPU.
    """

    variant: str = "mini_distill"
    objective: str = "forward_kl"
    vocab: int = 32000
    batch: int = 4
    seq: int = 512
    supervised: float = 0.875
    padding: float = 0.0
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 2

    def at(self, axis: str, value: float) -> Settings:
        """The same at another point of a sweep; tokens come as more sequences."""
        if axis == "tokens":
            return replace(self, batch=max(1, int(value) // self.seq))
        return replace(self, **{axis: type(getattr(self, axis))(value)})


class Variant:
    """A process that steps when it is told to."""

    def __init__(self, settings: Settings, python: str, folder: str) -> None:
        self.settings, self.seconds = settings, list[float]()
        self.final: Line = {}
        self.skipped: str | None = None
        self.log = Path(folder, f"{settings.variant}.log")
        quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(settings.threads), "TMPDIR": folder}
        command = [python, str(Path(__file__).with_name("benchmark_variants.py")), json.dumps(asdict(settings))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        self._listen()  # until it is ready: they start one after the other

    def step(self) -> None:
        """Give it its turn."""
        if self.skipped is None:
            self._tell("go")
            self._listen()

    def stop(self) -> None:
        """Ask for its last words."""
        if self.skipped is None:
            self._tell("stop")
            self._listen()
        self.process.wait()

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is heard next
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        message: Line = json.loads(said) if said else {"skipped": f"ended with {self.process.wait()}"}
        if "seconds" in message:
            self.seconds.append(message["seconds"])
        self.final = message.get("final", self.final)
        self.skipped = message.get("skipped", self.skipped)
        if "skipped" in message:
            print(f"{self.settings.variant}: {self.skipped}\n{self.log.read_text()[-2000:]}", file=sys.stderr)


def measure(names: list[str], settings: Settings, rounds: int, warmup: int, peer_python: str) -> list[Line]:
    """All variants in turns; a line for each."""
    pythons = {name: peer_python if name.startswith(("trl_", "liger_")) else sys.executable for name in names}
    with tempfile.TemporaryDirectory() as folder:  # for what peers want to write
        variants = [Variant(replace(settings, variant=name), pythons[name], folder) for name in names]
        for _ in range(warmup + rounds):
            for variant in variants:
                variant.step()
        for variant in variants:
            variant.stop()  # one by one: each measures the ceiling of its products alone
    return summarise(variants, warmup)


def summarise(variants: list[Variant], warmup: int) -> list[Line]:
    """Medians, and ratios within a round."""
    times = {v.settings.variant: v.seconds[warmup:] for v in variants if v.skipped is None}
    reference = next(iter(times), "")
    lines = [_line(v, times, reference) for v in variants]
    _compare_losses(lines)
    if all(name in times for name in FLOOR_SUM):
        sums = [sum(pair) for pair in zip(*(times[name] for name in FLOOR_SUM), strict=True)]
        own = {
            "variant": "floor_sum",
            "supervised_share": next(line["supervised_share"] for line in lines if line["variant"] == FLOOR_SUM[0]),
        }
        lines.append({**asdict(variants[0].settings), **own, **_timing(sums, times[reference], reference)})
    return [_with_speed(line) for line in lines]


def _line(variant: Variant, times: dict[str, list[float]], reference: str) -> Line:
    if variant.skipped is not None:
        return {**asdict(variant.settings), "skipped": variant.skipped}
    timing = _timing(times[variant.settings.variant], times[reference], reference)
    line = {**asdict(variant.settings), **timing, **variant.final}
    flops, ceiling = line.pop("head_flops"), line["matmul_rate"]
    return {**line, "head_share_of_ceiling": round(flops / timing["seconds"] / ceiling, 4)}


def _timing(seconds: list[float], reference_seconds: list[float], reference: str) -> Line:
    """`ratio` is this variant over the reference, `inverse_ratio` the reference over this one."""
    ratios = [own / other for own, other in zip(seconds, reference_seconds, strict=True)]
    found = {
        "reference": reference,
        "rounds": len(seconds),
        "seconds": median(seconds),
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "inverse_ratio": median(1 / ratio for ratio in ratios),
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def _with_speed(line: Line) -> Line:
    tokens = line["batch"] * line["seq"]
    return {**line, "tokens_per_second": round(tokens / line["seconds"], 1)} if "seconds" in line else line


def _compare_losses(lines: list[Line]) -> None:
    """Say of each line whether its first loss is that of the first variant with the same objective."""
    first: dict[str, float] = {}
    for line in lines:
        if not line.get("loss"):
            continue
        own_objective = "ce" if line["variant"] in ("ce_fused", "student_ce_plain") else line["objective"]
        expected = first.setdefault(own_objective, line["loss"][0])
        difference = abs(line["loss"][0] - expected) / abs(expected)
        line.update(loss_difference=round(difference, 7), same_loss=difference <= SAME_LOSS[line["dtype"]])


# ---------------------------------------------------------------------------------------------------------------------------- tables


def markdown(lines: list[Line]) -> str:
    """A table for each combination of settings that was measured."""
    if "way" in lines[0]:
        return _error_table(lines)
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line[field.name] for field in fields(Settings) if field.name != "variant"]), []).append(line)
    return "\n\n".join(_table(group) for group in groups.values())


def _table(lines: list[Line]) -> str:
    head = max(lines, key=lambda line: "supervised_share" in line)
    on_gpu, supervised = head["device"] == "cuda", head.get("supervised_share", head["supervised"])
    where = f"{head['device']}, {head['dtype']}" + ("" if on_gpu else f", {head['threads']} threads")
    title = (
        f"Vocabulary {head['vocab']:,}, {head['batch']} × {head['seq']} tokens, {supervised:.1%} supervised, {head['objective']}, {where}"
    )
    columns = ["variant", "step (s)", "tokens/s", f"time / {head.get('reference', '')}"]
    columns += ["peak above models (MiB)", "less gradients and moments (MiB)"]
    columns += ["head products, share of ceiling"] if on_gpu else []
    rows = [_row(line, on_gpu) for line in lines]
    return f"{title}:\n\n" + _pipes([columns, *([*row, *[""] * (len(columns) - len(row))] for row in rows)])


def _error_table(lines: list[Line]) -> str:
    rows = [["gradients", "hidden states", "head's weight"]]
    rows += [[line["way"], *(f"{line[name]:.3%}" for name in ("hidden_error", "weight_error"))] for line in lines]
    return f"Vocabulary {lines[0]['vocab']:,}, {lines[0]['rows']:,} tokens, {lines[0]['device']}:\n\n" + _pipes(rows)


def _pipes(rows: list[list[str]]) -> str:
    under = "|:--|" + "--:|" * (len(rows[0]) - 1)
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, under, *body])


def _row(line: Line, on_gpu: bool) -> list[str]:
    if "skipped" in line:
        return [line["variant"], "skipped: " + " ".join(line["skipped"].replace("|", "/").split())]
    memory = [f"{line[name]:,.0f}" if name in line else "" for name in ("peak_mib", "working_mib")]
    ratio = f"{line['ratio']:.2f} ({line['ratio_low']:.2f}–{line['ratio_high']:.2f})"
    ratio += f", {line['reference']} is {line['inverse_ratio']:.2f} of it" if line["variant"] == "floor_sum" else ""
    share = f"{line['head_share_of_ceiling']:.0%}" if "head_share_of_ceiling" in line else ""
    return [line["variant"], f"{line['seconds']:.3f}", f"{line['tokens_per_second']:,.0f}", ratio, *memory, *([share] if on_gpu else [])]


def read_lines(path: Path) -> list[Line]:
    """What was written; of a point that was measured again, the last. `working_mib` is the peak without gradients and moments."""
    latest: dict[str, Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "peak_mib" in line:
            line["working_mib"] = line["peak_mib"] - line["state_mib"]
        key = {name: line.get(name) for name in ("way", *(field.name for field in fields(Settings)))}
        latest[json.dumps(key)] = line
    return list(latest.values())


# --------------------------------------------------------------------------------------------------------------------- gradient error


def gradient_error(settings: Settings) -> list[Line]:
    """bf16 tensors, forward KL: the relative error of the gradients of the hidden states and of the head's weight, against float64.

    All begin with the same numbers, which bf16 can hold, so that it is the loss's own rounding that is measured.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax

    from mini_distill.losses.divergences import forward_kl
    from mini_distill.losses.objective import Objective
    from mini_distill.models.head import OutputHead
    from mini_distill.teachers.targets import DenseTargets

    torch.set_num_threads(settings.threads)
    generator, rows = torch.Generator().manual_seed(0), round(settings.batch * settings.seq * settings.supervised)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(settings.device, torch.bfloat16)

    values = [draw(rows, 256), draw(settings.vocab, 256, scale=0.08), draw(rows, 512), draw(settings.vocab, 512, scale=0.08)]

    def plain(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any, dtype: torch.dtype) -> torch.Tensor:
        own, teacher = (log_softmax((h @ w.T).to(dtype), -1) for h, w in ((hidden, weight), (teacher_hidden, teacher_weight)))
        return kl_div(own, teacher, reduction="sum", log_target=True) / rows

    def fused(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any) -> torch.Tensor:
        own, teacher = (OutputHead(_linear(w)) for w in (weight, teacher_weight))
        targets = torch.zeros(rows, dtype=torch.long, device=settings.device)
        objective = Objective(forward_kl, "forward_kl", kl_weight=1.0, ce_weight=0.0)
        return objective.fused(hidden, own, DenseTargets(teacher_hidden, teacher, hidden.device), targets).loss / rows

    def gradients(loss: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        hidden, weight, *teacher = (value.to(dtype) for value in values)
        leaves = [hidden.detach().requires_grad_(), torch.nn.Parameter(weight.detach())]
        loss(*leaves, *teacher).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    exact = gradients(partial(plain, dtype=torch.float64), torch.float64)
    ways = {
        "mini_distill": gradients(fused, torch.bfloat16),
        **_on_a_gpu(settings.device, partial(gradients, fused)),
        "plain, float32 log-softmax": gradients(partial(plain, dtype=torch.float32), torch.bfloat16),
        "plain, bf16 log-softmax": gradients(partial(plain, dtype=torch.bfloat16), torch.bfloat16),
        "exact, rounded to bf16": [gradient.bfloat16() for gradient in exact],
    }
    errors = {
        name: [((g.double() - e).norm() / e.norm()).item() for g, e in zip(found, exact, strict=True)] for name, found in ways.items()
    }
    shared = {"vocab": settings.vocab, "rows": rows, "device": settings.device}
    return [{"way": name, **shared, "hidden_error": hidden, "weight_error": weight} for name, (hidden, weight) in errors.items()]


def _on_a_gpu(device: str, gradients_in: Callable[[Any], Any]) -> dict[str, Any]:
    """Those of autocast on a GPU; where there is none, these and those of bf16 weights with a GPU's rounding emulated."""
    import torch
    from emulated_gpu import emulated_gpu

    if device == "cuda":
        with torch.autocast("cuda", torch.bfloat16):
            return {"mini_distill, autocast over float32 weights": gradients_in(torch.float32)}
    with emulated_gpu():
        found = {"mini_distill, a GPU emulated, bf16 weights": gradients_in(torch.bfloat16)}
    with emulated_gpu(autocast=torch.bfloat16):
        return found | {"mini_distill, a GPU emulated, autocast over float32 weights": gradients_in(torch.float32)}


def _linear(weight: Any) -> Any:
    import torch

    vocab, width = weight.shape
    layer = torch.nn.Linear(width, vocab, bias=False, device="meta")
    layer.weight = weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight, requires_grad=False)
    return layer


# ------------------------------------------------------------------------------------------------------------------------ command line


def main() -> None:
    """Measure, or print what was measured."""
    arguments = _parser().parse_args()
    settings = Settings(**{f.name: getattr(arguments, f.name) for f in fields(Settings) if f.name != "variant"})
    if arguments.markdown:
        print(markdown(read_lines(arguments.markdown)))
    elif arguments.gradient_error:
        _write(gradient_error(settings), arguments.output)
    else:
        axis, *values = arguments.sweep or ["seq", settings.seq]
        for value in values:
            point = settings.at(axis, float(value))
            lines = measure(arguments.variants, point, arguments.rounds, arguments.warmup, arguments.peer_python)
            _write(lines, arguments.output)
            if different := [line["variant"] for line in lines if line.get("same_loss") is False]:
                sys.exit(f"not the same work: the first loss of {', '.join(different)} differs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", default=["mini_distill", *FLOOR_SUM], help="functions of benchmark_variants.py; the first is 1"
    )
    for field in fields(Settings):
        if field.name != "variant":
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, choices=CHOICES.get(field.name))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has TRL and Liger")
    parser.add_argument("--sweep", nargs="+", metavar=("AXIS", "VALUE"), help="vocab, tokens or supervised, and its values")
    parser.add_argument("--output", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--markdown", type=Path, metavar="RESULTS", help="print its tables, and measure nothing")
    parser.add_argument("--gradient-error", action="store_true", help="print the error of bf16 gradients, and time nothing")
    return parser


def _write(lines: list[Line], path: Path | None) -> None:
    texts = [json.dumps(line) for line in lines]
    print("\n".join(texts), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in texts)


if __name__ == "__main__":
    main()
