"""Every preset composes, and the architecture behind every named teacher does what the rest of the code relies on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mini_distill.cli import config_dir, load_config
from mini_distill.config import Config
from mini_distill.data.batch import Batch
from mini_distill.errors import ConfigError
from mini_distill.losses.reduction import IGNORE_INDEX
from mini_distill.models.head import LanguageModel
from mini_distill.students.build import from_scratch
from mini_distill.students.initialise import from_teacher_layers

VOCAB, WINDOW = 64, 4
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, GQA),
    "smollm2": (LlamaConfig, GQA | {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, GQA | {"sliding_window": WINDOW}),
    "gemma": (GemmaConfig, GQA),
    "gemma2": (Gemma2Config, GQA | MIXED | {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.2}),
    "gemma3": (Gemma3TextConfig, GQA | MIXED),
    "qwen2": (Qwen2Config, {k: v for k, v in GQA.items() if k != "head_dim"}),
    "qwen3": (Qwen3Config, GQA),
    "pythia": (GPTNeoXConfig, {"num_attention_heads": 4, "intermediate_size": 64, "hidden_act": "gelu"}),
    "gpt2": (GPT2Config, {"n_head": 4}),
}
TEACHERS = sorted(path.stem for path in (config_dir() / "teacher").glob("*.yaml"))
UNNAMED = ("embedded", "hf", "cached", "server", "none")
NAMED_TEACHERS = [name for name in TEACHERS if name not in UNNAMED]
STUDENTS = sorted(path.stem for path in (config_dir() / "student").glob("*.yaml"))
SCRATCH_STUDENTS = [name for name in STUDENTS if name.startswith("mini_")]
ALL_PRESETS = sorted(path for path in config_dir().glob("*/*.yaml") if path.parent.name in ("student", "teacher"))
NEEDED = {
    "teacher": {
        "hf": ["teacher.path=some/model"],
        "cached": ["teacher.cache_dir=.", "student=mini_2m"],
        "server": ["teacher.url=http://localhost:8000", "teacher.path=some/model", "student=mini_2m"],
        "none": ["student=hf", "student.path=some/model", "objective=ce"],
    },
    "student": {"hf": ["student.path=some/model"]},
}
"""What a preset that leaves something open needs besides."""


def family_of(teacher: str) -> str:
    """`llama3_2_1b` -> `llama`: the longest family that the preset's name begins with."""
    return max((family for family in FAMILIES if teacher.startswith(family)), key=len)


def tiny(family: str, attention: str = "eager", layers: int = 2, **settings: Any) -> PreTrainedModel:
    """The family's own model class, in eval mode, with weights large enough that nothing is almost linear."""
    kind, sizes = FAMILIES[family]
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": layers, "max_position_embeddings": 64, "initializer_range": 0.3}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = kind(**(common | sizes | ids | settings))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def preset(group: str, name: str) -> Config:
    return load_config([f"{group}={name}", *NEEDED[group].get(name, [])])


# --------------------------------------------------------------------------------------------------------------------- the YAML


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_preset_composes(name: str) -> None:
    teacher = preset("teacher", name).teacher
    assert teacher.kind == (name if name in UNNAMED else "hf")
    assert not teacher.trust_remote_code


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_preset_composes(name: str) -> None:
    assert preset("student", name).student.kind == {"from_teacher": "from_teacher", "hf": "hf"}.get(name, "scratch")


@pytest.mark.parametrize("overrides", [["teacher=hf"], ["student=hf"]])
def test_a_preset_without_its_path_says_so(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"(teacher|student)\.path: missing"):
        load_config(overrides)


@pytest.mark.parametrize("path", ALL_PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_preset_begins_by_saying_what_it_is(path: Path) -> None:
    assert re.match(r"# \w.*\.\n", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMED_TEACHERS)
def test_every_named_teacher_is_a_hub_repository_with_its_licence(name: str) -> None:
    teacher = preset("teacher", name).teacher
    first_line = (config_dir() / "teacher" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"[\w-]+/[\w.-]+", teacher.path or "")
    assert re.search(r"\((Apache 2\.0|MIT|.*(License|Terms).*)\)", first_line)
    assert teacher.gated == ("accept" in first_line)
    assert teacher.attn_implementation == ("eager" if family_of(name) == "gemma2" else None)


@pytest.mark.parametrize("name", SCRATCH_STUDENTS)
def test_a_student_preset_has_the_size_it_says(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = preset("student", name).student
    first_line = (config_dir() / "student" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    match = re.search(r"of ([\d.]+) M parameters .*vocabulary of (4096|32k)", first_line)
    assert match and config.num_heads
    vocabulary = 4096 if match[2] == "4096" else 32_000
    with torch.device("meta"):
        padded = from_scratch(config, None, tiny_tokenizer, seq_len=256, seed=0)
    rows = padded.get_input_embeddings().weight.shape[0]
    parameters = sum(p.numel() for p in padded.parameters()) + (vocabulary - rows) * padded.config.hidden_size
    assert parameters / 1e6 == pytest.approx(float(match[1]), rel=0.01)  # what the comment says
    in_name = re.fullmatch(r"mini_(\d+)([mb])", name)
    assert in_name and parameters == pytest.approx(
        int(in_name[1]) * {"m": 1e6, "b": 1e9}[in_name[2]], rel=0.1 if name != "mini_2m" else 0.25
    )


@pytest.mark.parametrize("name", SCRATCH_STUDENTS)
def test_student_presets_have_grouped_heads_of_width_64_and_tied_embeddings(name: str) -> None:
    config = preset("student", name).student
    assert config.hidden_size and config.num_heads and config.num_kv_heads
    assert config.hidden_size / config.num_heads == 64
    assert config.num_kv_heads < config.num_heads
    assert config.tie_embeddings is not False


# ------------------------------------------------------------------------------------------- the architectures behind the names


def documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, VOCAB, (1, length), generator=generator) for length in lengths]


def as_batch(ids: torch.Tensor, positions: torch.Tensor) -> Batch:
    return Batch(ids, ids.clone(), positions, torch.arange(len(ids)), torch.ones_like(ids))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def attentions_of(family: str) -> list[str]:
    return ["eager"] if family == "gemma2" else ["eager", "sdpa"]


@pytest.mark.parametrize("name", NAMED_TEACHERS)
def test_every_named_teacher_has_a_family_that_is_tested_here(name: str) -> None:
    assert logits(tiny(family_of(name)), documents(7)[0]).shape == (1, 7, VOCAB)


@pytest.mark.parametrize(("family", "attention"), [(family, attention) for family in FAMILIES for attention in attentions_of(family)])
def test_packed_documents_give_the_logits_of_the_documents_alone(family: str, attention: str) -> None:
    """A known trap: packed documents that see each other. Restarting positions alone must keep them apart, in every architecture."""
    model = LanguageModel(tiny(family, attention))
    parts = documents(9, 2, 7)
    padding = torch.full((1, 4), 3)
    ids = torch.cat([*parts, padding], dim=1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts] + [torch.zeros(4, dtype=torch.long)])[None]
    unpadded = documents(22)[0]  # a second row that is one document: rows of both sorts meet in a batch
    batch = as_batch(torch.cat([ids, unpadded]), torch.cat([positions, torch.arange(22)[None]]))
    for row, column, length in ((0, 0, 9), (0, 9, 2), (0, 11, 7), (1, 0, 22)):
        labels = torch.full_like(batch.labels, IGNORE_INDEX)
        labels[row, column + 1 : column + length] = 5
        batch.labels = labels
        with torch.no_grad():
            packed = model.logits(batch)
        alone = logits(model.model, batch.input_ids[row : row + 1, column : column + length])[0, :-1]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_packed_documents_can_fail(family: str) -> None:
    model = tiny(family)
    first, second = documents(9, 7)
    run_together = logits(model, torch.cat([first, second], dim=1))[:, 9:]
    assert (run_together - logits(model, second)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_gives_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    ids = documents(12)[0]
    with torch.no_grad():
        ours = LanguageModel(model).logits(as_batch(ids, torch.arange(12)[None]))
    torch.testing.assert_close(ours, logits(model, ids)[0, :-1])


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_gemma_2_soft_caps_its_logits_and_its_attention(setting: str) -> None:
    ids = documents(12)[0]
    capped, free = tiny("gemma2"), tiny("gemma2", **{setting: None})
    assert (logits(capped, ids) - logits(free, ids)).abs().max() > 1e-3
    assert logits(capped, ids).abs().max() <= 0.5


def test_gemma_2_with_sdpa_is_refused_rather_than_left_uncapped() -> None:
    """Were it to run one day, the presets' `attn_implementation: eager` could go."""
    with pytest.raises(ValueError, match=r"(?i)sdpa|scaled_dot_product"):
        logits(tiny("gemma2", "sdpa"), documents(5)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_the_teacher_are_the_teacher(family: str) -> None:
    teacher = tiny(family)
    student = from_teacher_layers(teacher, 2)
    ids = documents(12)[0]
    assert torch.equal(logits(student, ids), logits(teacher, ids))
    own = {p.data_ptr() for p in teacher.parameters()}
    assert not own & {p.data_ptr() for p in student.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_one_layer_is_the_same_after_saving_and_loading(family: str, tmp_path: Path) -> None:
    student = from_teacher_layers(tiny(family), 1)
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded.eval().set_attn_implementation("eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.num_hidden_layers == 1
    torch.testing.assert_close(logits(loaded, documents(12)[0]), logits(student, documents(12)[0]), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_kept_layers_keep_their_kind_of_attention(family: str) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    student = from_teacher_layers(tiny(family, layers=4, layer_types=kinds), 2)
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
