"""How near `python -m mini_distill.plan` comes: predicts memory and step time of several runs, then runs them and measures.

python scripts/check_plan.py [--threads 1] [--steps 8] [--repeats 3] [--only name]

Memory is the most that the process held resident from beginning to end, above what it held when everything was imported. Time is the
median over the steps after the first two, of the processor where there is one thread, so that a machine with other work tells nearly the
same. Plan and run take turns, in so many passes over all runs as --repeats says; the table has the medians of the passes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

LARGE = (
    "student=mini_2m student.hidden_size=384 student.num_layers=6 student.num_heads=6 student.num_kv_heads=2 student.intermediate_size=1024"
)
RUNS = {
    "embedded default": "",
    "from scratch": "student=mini_2m",
    "wider and deeper": LARGE,
    "checkpointing": f"{LARGE} trainer.gradient_checkpointing=true",
    "vocabulary of 32,768": "{vocabulary} student=mini_2m trainer.micro_batch_size=8",
    "packing off": "data.packing=false student=mini_2m",
    "teacher in bfloat16": "teacher.dtype=bfloat16 student=mini_2m",
    "no teacher, long": f"{LARGE} objective=ce data.seq_len=512 trainer.micro_batch_size=8",
}
WARM_STEPS = 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, in plan and run")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run")
    parser.add_argument("--repeats", type=int, default=3, help="passes, of which the medians are shown")
    parser.add_argument("--only", choices=list(RUNS), help="one of the runs")
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--predict", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
    elif arguments.predict is not None:
        print(json.dumps(predict(arguments.predict)))
    else:
        print_table(arguments)


def print_table(arguments: argparse.Namespace) -> None:
    """A row for each run."""
    runs = {name: settings for name, settings in RUNS.items() if arguments.only in (None, name)}
    passes: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = f"teacher=hf teacher.path={make_teacher(Path(folder) / 'teacher')}"
        for number in range(arguments.repeats):
            for name, settings in runs.items():
                overrides = settings.format(vocabulary=vocabulary).split()
                overrides += [f"trainer.max_steps={arguments.steps}", "trainer.warmup_steps=1", f"trainer.num_threads={arguments.threads}"]
                overrides += ["evaluation.max_batches=2", "evaluation.num_samples=0"]
                plan = in_own_process("--predict", overrides)
                real = in_own_process("--measure", [*overrides, f"output_dir={folder}/run"])
                shutil.rmtree(Path(folder) / "run")
                passes[name].append({"plan": plan, "real": real})
                print(f"pass {number + 1}, {name}: {plan['seconds']:.2f} s predicted, {real['seconds']:.2f} s measured", file=sys.stderr)
    print("| run | memory: predicted | measured | | step: predicted | measured | |\n|:--|" + 6 * "--:|")
    for name, of_run in passes.items():
        memory, seconds = ([median(one[who][what] for one in of_run) for who in ("plan", "real")] for what in ("bytes", "seconds"))
        print(f"| {' | '.join([name, *compared(memory, '{:.0f} MB', 1e-6), *compared(seconds, '{:.2f} s')])} |")


def compared(both: list[float], text: str, unit: float = 1.0) -> list[str]:
    """What was predicted and what was measured, and how much more was predicted."""
    predicted, measured = both
    return [text.format(predicted * unit), text.format(measured * unit), f"{predicted / measured - 1:+.0%}"]


def in_own_process(what: str, overrides: list[str]) -> dict[str, float]:
    """The figures that this script prints when called so."""
    command = [sys.executable, "-W", "ignore", __file__, what, *overrides]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def predict(overrides: list[str]) -> dict[str, float]:
    """What the plan says, once the data are tokenised, which is not what is measured here."""
    import mini_distill as md
    from mini_distill.teachers.load import load_shared_tokenizer

    config = md.load_config(overrides)
    md.prepare_data(config.data, load_shared_tokenizer(config))
    plan = md.plan(overrides)
    return {"bytes": plan.memory["total"], "seconds": plan.seconds["step"]}


def measure(overrides: list[str]) -> dict[str, float]:
    """What a run takes."""
    from importlib import import_module

    from transformers.models.llama import modeling_llama  # noqa: F401 - the architecture of all models here

    from mini_distill.cli import load_config

    train: Any = import_module("mini_distill.train")
    config = load_config(overrides)
    seconds: list[float] = []
    clock = time.process_time if config.trainer.num_threads == 1 else time.perf_counter
    step = train.optimizer_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        result = step(*args, **kwargs)
        seconds.append(clock() - started)
        return result

    train.optimizer_step = timed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = _kilobytes("VmRSS")
    train.train(config)
    return {"bytes": 1024 * (_kilobytes("VmHWM") - before), "seconds": median(seconds[WARM_STEPS:])}


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def make_teacher(folder: Path, vocab_size: int = 32_768) -> Path:
    """A random Llama with the embedded teacher's tokenizer and an embedding padded to `vocab_size`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mini_distill.models.loading import embedded_path, load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(embedded_path()))
    tokenizer.add_tokens([f"<{number}>" for number in range(vocab_size - len(tokenizer))])
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
