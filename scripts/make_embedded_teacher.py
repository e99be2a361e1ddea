"""Make the teacher that ships inside the package: a tokenizer and a small Llama of Python source text, trained by the framework.

    python scripts/make_embedded_teacher.py                     hours on a CPU; killed, it goes on when started again

The tokenizer is trained on the training files of the standard library only; the held-out files are held out from it, from the
teacher, and later from every student, since the split is a hash of each file's path.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mini_distill.cli import load_config
from mini_distill.config import DataConfig
from mini_distill.data.prepare import prepare_data, training_rows
from mini_distill.train import train

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SHAPE = ["student.hidden_size=192", "student.num_layers=10", "student.num_heads=3", "student.num_kv_heads=1", "student.intermediate_size=512"]


def main() -> None:
    """Tokenizer, training, and the folder that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/embedded_teacher"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "mini_distill" / "embedded")
    parser.add_argument("--passes", type=float, default=11.0, help="passes over the training files")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()

    tokenizer_folder = arguments.work_dir / "tokenizer"
    if not tokenizer_folder.exists():
        make_tokenizer(tokenizer_folder)
    run_folder = train_teacher(tokenizer_folder, arguments)
    export(run_folder / "student", arguments.output)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the training files: no unknown token, and indentation in one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (row.columns["text"] for row in training_rows(DataConfig(source="python_stdlib")))
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)


def train_teacher(tokenizer_folder: Path, arguments: argparse.Namespace) -> Path:
    """The main job with `objective=ce` and no teacher; gives the run's folder."""
    run_folder = arguments.work_dir / "run"
    overrides = [
        "teacher=none",
        "student=mini_2m",
        f"student.tokenizer={tokenizer_folder}",
        *SHAPE,
        "student.max_positions=1024",
        "objective=ce",
        "data.seq_len=256",
        "trainer.micro_batch_size=32",
        "trainer.learning_rate=3e-3",
        "trainer.schedule=cosine",
        "trainer.max_steps=100000",  # set below, once the tokens are counted
        "trainer.warmup_steps=150",
        "trainer.min_lr_ratio=0.03",
        "trainer.precision=bf16",
        "trainer.compile=true",
        "trainer.save_every=100",
        "trainer.eval_every=400",
        "trainer.log_every=10",
        "trainer.export=best",
        "evaluation.batch_size=32",
        "evaluation.max_batches=20",
        f"output_dir={run_folder}",
    ]
    config = load_config(overrides)
    tokens = prepare_data(config.data, PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)).train.num_supervised
    steps = math.ceil(arguments.passes * tokens / (config.trainer.micro_batch_size * config.data.seq_len))
    config.trainer = dataclasses.replace(config.trainer, max_steps=steps, num_threads=arguments.threads)
    train(config)
    return run_folder


def export(student: Path, output: Path) -> None:
    """The student of that run in bfloat16 as the package's teacher, without what only a run needs."""
    if output.exists():
        shutil.rmtree(output)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    model.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        shutil.copy(student / name, output / name)
    size = (output / "model.safetensors").stat().st_size
    print(json.dumps({"folder": str(output), "parameters": model.num_parameters(), "bytes": size}))


if __name__ == "__main__":
    main()
