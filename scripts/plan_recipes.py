"""What the recipes of docs/recipes.md need: each of its trainings through `plan`, for a GPU that is described by its memory and rates.

python scripts/plan_recipes.py [--only 3] [--commands] [--page docs/recipes.md]

The commands are read from the page, with the heading above them. No weight and no hub is needed: models are configurations with the
published sizes, without weights; tokenizers have as many entries as the real ones; in place of the data stand made-up rows of the same
form. `--commands` prints the plan's command for each, over a folder that is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
GPU = ["plan.device=cuda", "plan.memory_gib=80", "plan.matmul_tflops=400", "plan.memory_gb_per_second=2000"]

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
MISTRAL_7B = LLAMA_8B | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32_768, "sliding_window": None}
GEMMA_9B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
}
GEMMA_2B = GEMMA_9B | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
QWEN_8B = LLAMA_8B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
QWEN_06B = QWEN_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Meta-Llama-3-8B": ("Llama 3 8B", LLAMA_8B),
    "meta-llama/Llama-3.1-8B": ("Llama 3.1 8B", LLAMA_8B),
    "meta-llama/Llama-3.1-8B-Instruct": ("Llama 3.1 8B", LLAMA_8B),
    "meta-llama/Llama-3.2-1B": ("Llama 3.2 1B", LLAMA_1B),
    "meta-llama/Llama-3.2-1B-Instruct": ("Llama 3.2 1B", LLAMA_1B),
    "mistralai/Mistral-7B-v0.3": ("Mistral 7B", MISTRAL_7B),
    "google/gemma-2-9b": ("Gemma 2 9B", GEMMA_9B),
    "google/gemma-2-2b": ("Gemma 2 2B", GEMMA_2B),
    "Qwen/Qwen3-8B": ("Qwen3 8B", QWEN_8B),
    "Qwen/Qwen3-0.6B": ("Qwen3 0.6B", QWEN_06B),
}
"""Repository -> its name, and the sizes of its config.json as far as they matter here."""
TOKENS = {151_936: 151_669}
"""Entries of the tokenizer, where the embedding has more rows."""


@dataclass(frozen=True)
class Recipe:
    """A training of the page: the heading that it stands under, its GPUs, its overrides."""

    heading: str
    num_devices: int
    overrides: list[str]

    @property
    def given(self) -> dict[str, str]:
        """Setting -> value."""
        return dict(text.split("=", 1) for text in self.overrides)


def recipes(page: Path) -> list[Recipe]:
    """The trainings of the page that have a live teacher, in their order."""
    found, heading = [], ""
    for match in re.finditer(r"^#{2,3} ([^\n]+)$|^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        heading = match[1] or heading
        found += [recipe for recipe in _of_block(match[2] or "", heading) if recipe.given.get("teacher") != "cached"]
    return found


def _of_block(text: str, heading: str) -> Iterator[Recipe]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if "mini_distill.train" not in words:
            continue
        start = words.index("mini_distill.train")
        counts = [int(words[words.index(flag) + 1]) for flag in ("--nnodes", "--nproc_per_node") if flag in words[:start]]
        yield Recipe(heading, max(1, *counts, counts[0] * counts[-1] if len(counts) == 2 else 1), words[start + 1 :])


# ------------------------------------------------------------------------------------------------------------------ in their place


def overrides_of_plan(recipe: Recipe, folder: Path) -> list[str]:
    """The recipe's own settings for `plan`, about the GPU above, with models and data of `folder` in place of the real ones."""
    given, overrides = recipe.given, list(recipe.overrides)
    if (repository := teacher_of(given)) is not None:
        overrides.append(f"teacher.path={model_folder(repository, folder)}")
    if "student.path" in given:
        overrides.append(f"student.path={model_folder(given['student.path'], folder)}")
    return [*overrides, *_data(given, folder), *GPU, f"plan.num_devices={recipe.num_devices}"]


def teacher_of(given: Mapping[str, str]) -> str | None:
    """The teacher's repository: its own, or its preset's; None: there is no teacher."""
    preset = yaml.safe_load((CONFIGS / "teacher" / f"{given['teacher']}.yaml").read_text(encoding="utf-8"))
    found: str | None = given.get("teacher.path", preset.get("path"))
    return found


def model_folder(repository: str, folder: Path) -> Path:
    """A folder in which configuration and tokenizer are as large as those of the repository."""
    target = folder / repository
    if target.exists():
        return target
    _, config = MODELS[repository]
    embedded = ROOT / "mini_distill" / "embedded"
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(embedded / "tokenizer_config.json", target)
    shutil.copy(ROOT / "mini_distill" / "data" / "chat_templates" / "chatml.jinja", target / "chat_template.jinja")
    tokenizer = json.loads((embedded / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]  # further entries that no merge leads to: they are counted, and never come up
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), TOKENS.get(config["vocab_size"], config["vocab_size"]))}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return target


TEXT = "def add(first, second):\n    return first + second\n\n\n"
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}


def _data(given: dict[str, str], folder: Path) -> list[str]:
    """Settings that lead to made-up rows: in half of what a chat or a pair says the assistant, or the answer, speaks."""
    half = TEXT * 25
    turns = [{"role": "user", "content": half}, {"role": "assistant", "content": half}]
    row = {"text": TEXT * 100, "question": half, "answer": half, "content": TEXT * 100, "messages": turns, "tools": [TOOL]}
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "text.txt").write_text("\n".join([TEXT * 100] * 40), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(40)), encoding="utf-8")
    if given.get("data") == "hub":
        local = ["data.source=text", "data.name=null", "data.streaming=false", "data.max_rows=null", "data.text_column=null"]
        return [*local, f"data.path={folder / 'corpus'}"]
    if given.get("data") == "mixture":
        parts = (
            given["data.mixture"].replace("path: corpus", f"path: {folder / 'corpus'}").replace("code.jsonl", str(folder / "rows.jsonl"))
        )
        return [f"data.mixture={parts}"]
    return [f"data.path={folder / ('corpus' if given.get('data') == 'text' else 'rows.jsonl')}"]


# --------------------------------------------------------------------------------------------------------------------------- table

HEADER = (
    "| recipe | teacher → student | GPUs | sequences · passes × tokens | memory of a GPU | largest micro-batch | step | run |\n"
    "|:--|:--|--:|--:|--:|--:|--:|--:|"
)


def row(recipe: Recipe, folder: Path) -> str:
    """A recipe's line of the table."""
    import mini_distill as md
    from mini_distill.storage import size_text

    plan = md.plan(overrides_of_plan(recipe, folder))
    needs = [size_text(plan.memory["total"]), plan.largest_micro_batch, duration(plan.seconds["step"]), duration(plan.seconds["run"])]
    return "| " + " | ".join(map(str, [*settings(recipe), *needs])) + " |"


def settings(recipe: Recipe) -> list[str]:
    """What of a line is known without a plan: heading, models, devices, and the sequences of a device in a step."""
    given = recipe.given
    micro, passes, seq_len = (int(given[name]) for name in ("trainer.micro_batch_size", "trainer.grad_accum_steps", "data.seq_len"))
    anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", recipe.heading.lower()))
    return [
        f"[{recipe.heading.partition(' (')[0]}](#{anchor})",
        names(recipe),
        str(recipe.num_devices),
        f"{micro} · {passes} × {seq_len:,}",
    ]


def names(recipe: Recipe) -> str:
    """Llama 3 8B → `mini_1b`."""
    given, student = recipe.given, recipe.given["student"]
    if student == "hf":
        student = MODELS[given["student.path"]][0]
    elif student == "from_teacher":
        student = f"{given['student.num_layers']} of its layers"
    else:
        student = f"`{student}`"
    teacher = teacher_of(given)
    return f"{MODELS[teacher][0] if teacher is not None else 'its answers'} → {student}"


def duration(seconds: float) -> str:
    """0.8 s, 12 min, 7.1 h, 12 days."""
    size, unit = next((pair for pair in ((86_400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * pair[0]), (1, "s"))
    return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, help="the n-th recipe alone, from 1")
    parser.add_argument("--commands", action="store_true", help="the commands of the plans, and no table")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "recipes.md", help="where the recipes are read")
    given = parser.parse_args()
    chosen = recipes(given.page)[slice(None) if given.only is None else slice(given.only - 1, given.only)]
    if given.commands:
        folder = Path(tempfile.mkdtemp(prefix="recipes-"))
        for recipe in chosen:
            print(shlex.join(["python", "-m", "mini_distill.plan", *overrides_of_plan(recipe, folder)]))
        return
    print(HEADER)
    with tempfile.TemporaryDirectory() as made:
        for recipe in chosen:
            print(row(recipe, Path(made)), flush=True)


if __name__ == "__main__":
    main()
