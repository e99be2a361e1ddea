"""A run with a teacher, or a student, that is broken: one line before any step, and no run that looks as if it had gone well."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import checked, copy_of, status
from runs import train_module as module
from safetensors.torch import load_file, save_file

from faults.answers import answer_to
from faults.record import record


def config_of(**settings: Any) -> Callable[[Path], None]:
    """Other settings in config.json; None deletes one."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        whole = json.loads(file.read_text()) | settings
        file.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))

    return change


def text_of(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Another content of a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def without(*names: str) -> Callable[[Path], None]:
    """Files deleted."""
    return lambda folder: [(folder / name).unlink() for name in names] and None


def weights_of(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other weights."""

    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut_weights(share: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])

    return edit


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor_header(**about: Any) -> bytes:
    whole = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | about
    return header(json.dumps({"model.embed_tokens.weight": whole}).encode()) + bytes(16)


Q = "model.layers.0.self_attn.q_proj.weight"
BROKEN: dict[str, Callable[[Path], Any]] = {
    "no config": without("config.json"),
    "an empty config": text_of("config.json", ""),
    "half a config": text_of("config.json", '{"model_type": "lla'),
    "a config that is a list": text_of("config.json", "[]"),
    "a config that is a number": text_of("config.json", "7"),
    "a config that is no text": text_of("config.json", b"\xff\xfe\x00"),
    "no model type": config_of(model_type=None, architectures=None),
    "an unknown model type": config_of(model_type="nosuch"),
    "a model type that is a number": config_of(model_type=7),
    "a model that is no language model": config_of(model_type="bert", architectures=["BertModel"]),
    "a vision model": config_of(model_type="vit", architectures=["ViTModel"]),
    "a width that is a text": config_of(hidden_size="wide"),
    "a width of nothing": config_of(hidden_size=0),
    "a negative width": config_of(hidden_size=-32),
    "another width": config_of(hidden_size=48),
    "heads that do not divide the width": config_of(num_attention_heads=5, head_dim=None),
    "more layers than weights": config_of(num_hidden_layers=3),
    "fewer layers than weights": config_of(num_hidden_layers=1),
    "layers that are a list": config_of(num_hidden_layers=[2]),
    "another vocabulary": config_of(vocab_size=100),
    "a vocabulary smaller than the tokenizer": config_of(vocab_size=10),
    "an activation that does not exist": config_of(hidden_act="nosuch"),
    "a dtype that does not exist": config_of(dtype="float7", torch_dtype="float7"),
    "no weights": without("model.safetensors"),
    "empty weights": text_of("model.safetensors", ""),
    "weights that are text": text_of("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"),
    "weights cut short": cut_weights(0.6),
    "half a header of weights": cut_weights(0.01),
    "a header longer than the file": text_of("model.safetensors", header(b"{}", 2**40)),
    "a header of zeros": text_of("model.safetensors", bytes(100)),
    "a header that is no JSON": text_of("model.safetensors", header(b"{no json")),
    "a header that is a list": text_of("model.safetensors", header(b"[]")),
    "offsets outside the file": text_of("model.safetensors", tensor_header(data_offsets=[0, 2**33])),
    "negative offsets": text_of("model.safetensors", tensor_header(data_offsets=[-16, 0])),
    "a shape that does not fit": text_of("model.safetensors", tensor_header(shape=[2**31, 2**31])),
    "a dtype unknown to weights": text_of("model.safetensors", tensor_header(dtype="F7")),
    "a weight that is missing": weights_of(lambda weights: weights.pop(Q)),
    "a weight of another shape": weights_of(lambda weights: weights.update({Q: torch.zeros(3, 3)})),
    "a weight that is not finite": weights_of(lambda weights: weights[Q].fill_(torch.nan)),
    "an infinite weight": weights_of(lambda weights: weights[Q].view(-1)[:1].fill_(torch.inf)),
    "pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "an index of a shard that is not there": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "model-00001-of-00002.safetensors"}})),
    ),
    "no tokenizer": without("tokenizer.json", "tokenizer_config.json"),
    "an empty tokenizer": text_of("tokenizer.json", ""),
    "half a tokenizer": text_of("tokenizer.json", '{"version": "1.0", "model": {'),
    "a tokenizer that is a list": text_of("tokenizer.json", "[1]"),
    "a tokenizer without a model": text_of("tokenizer.json", '{"version": "1.0"}'),
    "tokenizer settings that are no JSON": text_of("tokenizer_config.json", "{"),
    "tokenizer settings that are a list": text_of("tokenizer_config.json", "[]"),
    "generation settings that are no JSON": text_of("generation_config.json", "{"),
    "generation settings that are a list": text_of("generation_config.json", "[]"),
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
}
HARMLESS = {"fewer layers than weights", "a dtype that does not exist"}
"""May be used: asked for by whoever wrote the config, or overruled by the settings of the run."""


@pytest.mark.parametrize("role", ["teacher", pytest.param("student", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BROKEN)
def test_a_run_with_a_broken_model_is_refused_in_a_line(
    name: str, role: str, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_teacher, tmp_path / "model")
    BROKEN[name](folder)
    command = [text for text in tiny_command if text != "student.num_layers=1"]
    config = copy.deepcopy(checked((*command, "student=hf", f"student.path={tiny_teacher}") if role == "student" else tuple(tiny_command)))
    getattr(config, role).path = str(folder)
    config.output_dir = str(tmp_path / "run")
    answer = answer_to(lambda: module.train(config), 2, 4, 7)
    assert answer.error is not None or name in HARMLESS, name
    if answer.error is not None:
        assert status(tmp_path / "run")["state"] == "failed" if (tmp_path / "run" / "status.json").exists() else True
        assert not list((tmp_path / "run").glob("checkpoints/step-*"))
        record("malformed models", injected=1, fired=1, refused=1, lines=len(answer.error.problems))
    else:
        record("malformed models", injected=1, fired=1, accepted=1)
