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
from mini_distill.storage import make_readable
from mini_distill.train import train

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SHAPE = [
    "student.hidden_size=192",
    "student.num_layers=10",
    "student.num_heads=3",
    "student.num_kv_heads=1",
    "student.intermediate_size=512",
]

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The embedded teacher

A Llama of {parameters:,} parameters (10 layers of width 192, grouped-query attention, vocabulary of 4,096) that has read the source
text of Python's standard library, so that `python -m mini_distill.train` has a teacher without any download.

- **Data**: the modules of the standard library of Python 3.11, without tests; one file in twenty, chosen by a hash of its path, was
  held out from the tokenizer and from the training.
- **Training**: cross-entropy with mini_distill itself, `python scripts/make_embedded_teacher.py`: {passes:.1f} passes, learning rate 3e-3
  falling to zero along a cosine, weight decay 1.0. Of the weights evaluated on the way, those that were best on held-out files.
- **Held-out files**: perplexity {perplexity:.2f}, {bits_per_byte:.3f} bits per byte, calibration error {ece:.1f} %, over
  {held_out_tokens:,.0f} tokens.
- **Limits**: it continues Python source in its manner and knows nothing else. It has read some files so often that it knows parts of
  them by heart. It is made for trying out distillation.
"""


def main() -> None:
    """Tokenizer, training, and the folder that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/embedded_teacher"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "mini_distill" / "embedded")
    parser.add_argument("--passes", type=float, default=10.3, help="passes over the training files")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()

    tokenizer_folder = arguments.work_dir / "tokenizer"
    if not tokenizer_folder.exists():
        make_tokenizer(tokenizer_folder)
    student = train_teacher(
        arguments,
        "student=mini_2m",
        f"student.tokenizer={tokenizer_folder}",
        *SHAPE,
        "trainer.learning_rate=3e-3",
        "trainer.schedule=cosine",
        "trainer.warmup_steps=150",
        "trainer.min_lr_ratio=0",
        # Ten times the usual decay: what keeps a model that sees its text ten times from learning it by heart.
        "trainer.weight_decay=1.0",
        "trainer.eval_every=380",
    )
    export(student, arguments.output, arguments.passes)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the training files: no unknown token, and indentation in one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = (row.columns["text"] for row in training_rows(DataConfig(source="python_stdlib")))
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)


def train_teacher(arguments: argparse.Namespace, *overrides: str) -> Path:
    """The main job with `objective=ce` and no teacher; gives the folder of the weights that were best on held-out files."""
    run_folder = arguments.work_dir / "run"
    config = load_config(
        [
            "teacher=none",
            "objective=ce",
            "data.seq_len=256",
            "trainer.micro_batch_size=32",
            "trainer.max_steps=100000",  # set below, once the tokens are counted
            "trainer.precision=bf16",
            "trainer.compile=true",
            "trainer.save_every=100",
            "trainer.log_every=10",
            "trainer.export=best",
            "evaluation.batch_size=32",
            *overrides,
            f"output_dir={run_folder}",
        ]
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(config.student.tokenizer or config.student.path))
    tokens = prepare_data(config.data, tokenizer).report["train_supervised_tokens"]
    steps = math.ceil(arguments.passes * tokens / (config.trainer.micro_batch_size * config.data.seq_len))
    config.trainer = dataclasses.replace(config.trainer, max_steps=steps, num_threads=arguments.threads)
    train(config)
    return run_folder / "student"


def export(student: Path, output: Path, passes: float) -> None:
    """The student in bfloat16 as the package's teacher, with its own card."""
    if output.exists():
        shutil.rmtree(output)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    model.save_pretrained(output)
    Tokenizer.from_file(str(student / "tokenizer.json")).save(str(output / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    summary = json.loads((student.parent / "summary.json").read_text(encoding="utf-8"))
    (output / "README.md").write_text(CARD.format(parameters=model.num_parameters(), passes=passes, **_figures(summary)), encoding="utf-8")
    make_readable(output)
    print(json.dumps({"folder": str(output), "parameters": model.num_parameters(), "bytes": (output / "model.safetensors").stat().st_size}))


def _figures(summary: dict[str, float]) -> dict[str, float]:
    return {
        "perplexity": summary["eval/student_perplexity"],
        "bits_per_byte": summary["eval/student_bits_per_byte"],
        "ece": 100 * summary["eval/student_ece"],
        "held_out_tokens": summary["eval/tokens"],
    }


if __name__ == "__main__":
    main()
