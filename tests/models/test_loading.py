"""Whatever is wrong with a model or its tokenizer ends in one clear line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mini_distill.errors import ModelError
from mini_distill.models import loading
from mini_distill.models.loading import load_causal_lm, load_tokenizer

Build = Callable[..., LlamaForCausalLM]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Build) -> Path:
    """A whole model, with which each test does something else."""
    path = tmp_path / "teacher"
    tiny_llama().save_pretrained(path)
    return path


def edit_config(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def the_error(load: Callable[..., object], path: Path | str, **settings: Any) -> str:
    """The one line, after checking that it is one."""
    with pytest.raises(ModelError) as caught:
        load(str(path), **settings)
    (problem,) = caught.value.problems
    line = str(problem)
    assert "\n" not in line and len(line) < 600
    return line


def test_a_whole_folder_loads_in_eval_mode_and_in_the_dtype_asked_for(folder: Path, tiny_llama: Build) -> None:
    model = load_causal_lm(str(folder), dtype="bfloat16")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(6)[None]
    assert torch.equal(load_causal_lm(str(folder))(ids).logits, tiny_llama().eval()(ids).logits)


def test_loading_is_silent_and_leaves_the_librarys_settings_as_they_were(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_causal_lm(str(folder))
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_loading_leaves_the_random_states_alone(folder: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    load_causal_lm(str(folder))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_the_setting_that_named_the_model_begins_the_line(tmp_path: Path) -> None:
    assert the_error(load_causal_lm, tmp_path, where="student.path").startswith("student.path: no config.json")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "neither a folder nor a repository" in the_error(load_causal_lm, tmp_path / "nothing here")
    assert "neither a folder nor a repository" in the_error(load_tokenizer, tmp_path / "nothing here")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in (line := the_error(load_causal_lm, folder)) and "model.safetensors" in line


@pytest.mark.parametrize("text", ["{", "", "[]", '"llama"', "\xff\xfe"])
def test_a_config_that_is_no_json_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    line = the_error(load_causal_lm, folder)
    assert line.startswith(str(folder / "config.json")) and "JSON" in line


def test_a_config_without_an_architecture(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert "model_type" in the_error(load_causal_lm, folder)


def test_an_architecture_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="llama9000")
    assert "llama9000" in the_error(load_causal_lm, folder)


def test_an_architecture_that_is_no_causal_language_model(folder: Path) -> None:
    edit_config(folder, model_type="vit")
    assert "ViTConfig" in the_error(load_causal_lm, folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights in" in the_error(load_causal_lm, folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.99])
def test_a_truncated_weight_file_is_named(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    line = the_error(load_causal_lm, folder)
    assert line.startswith(f"{file}: not a whole safetensors file")


def test_pickled_weights_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    """A pickle runs what its author wrote: it must not even be opened."""
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    assert "pickled weights only" in the_error(load_causal_lm, folder)
    assert not canary.exists()


def test_missing_weights_are_not_filled_with_random_numbers(folder: Path) -> None:
    """transformers only warns, and the teacher would teach noise."""
    edit_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "layers.1." in key])
    line = the_error(load_causal_lm, folder)
    assert "lacks 9 of" in line and "model.layers.1." in line


def test_a_tied_checkpoint_with_an_untied_config_lacks_its_head(tmp_path: Path, tiny_llama: Build) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    load_causal_lm(str(tmp_path))
    edit_config(tmp_path, tie_word_embeddings=False)
    line = the_error(load_causal_lm, tmp_path)
    assert "lm_head.weight" in line and "tie_word_embeddings" in line


def test_weights_of_another_size_than_the_config_says(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    line = the_error(load_causal_lm, folder)
    assert "mlp" in line and "64" in line and "96" in line


def test_a_shard_that_was_not_downloaded_is_named(folder: Path, tiny_llama: Build) -> None:
    shutil.rmtree(folder)
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    load_causal_lm(str(folder))
    shards[1].unlink()
    line = the_error(load_causal_lm, folder)
    assert f"lacks 1 of {len(shards)} weight files" in line and shards[1].name in line


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_of_shards_is_named(folder: Path, text: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert the_error(load_causal_lm, folder).startswith(str(index))


def test_code_in_the_folder_is_not_run_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "modeling_mine.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"})
    line = the_error(load_causal_lm, folder)
    assert "auto_map" in line and "trust_remote_code" in line
    assert not canary.exists()


def test_a_tokenizers_code_is_not_run_unless_asked_for(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folder, canary = tmp_path / "tokenizer", tmp_path / "canary"
    tiny_tokenizer.save_pretrained(folder)
    (folder / "mine.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "mine.T"]}, "tokenizer_class": "MyOwnTokenizer"}
    file.write_text(json.dumps(settings))
    try:
        load_tokenizer(str(folder))
    except ModelError as error:
        assert "trust_remote_code" in str(error)
    assert not canary.exists()


def test_an_unknown_attention_is_named(folder: Path) -> None:
    assert "lightning" in the_error(load_causal_lm, folder, attn_implementation="lightning")


def test_a_licence_is_not_blamed_for_a_local_folder(folder: Path) -> None:
    edit_config(folder, model_type="llama9000")
    assert "gated" not in the_error(load_causal_lm, folder, gated=True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_hub_model_without_network_says_how_to_go_on(load: Callable[..., object]) -> None:
    line = the_error(load, "nobody-at-all/no-such-model")
    assert "teacher.path: cannot load 'nobody-at-all/no-such-model' from the hub" in line and loading.OFFLINE in line


@pytest.mark.usefixtures("offline")
def test_a_gated_hub_model_says_to_accept_its_licence() -> None:
    line = the_error(load_causal_lm, "nobody-at-all/no-such-model", gated=True)
    assert "Accept the licence" in line and loading.OFFLINE in line


@pytest.mark.parametrize("name", ["two words", "a/b/c", "name*"])
def test_a_name_that_can_be_no_repository(name: str) -> None:
    assert "neither a folder nor a repository" in the_error(load_causal_lm, name)


def test_a_tokenizer_loads_from_its_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("a cat") == tiny_tokenizer.encode("a cat")


def test_a_folder_without_tokenizer(folder: Path) -> None:
    line = the_error(load_tokenizer, folder, where="student.tokenizer")
    assert line.startswith("student.tokenizer: no tokenizer in") and "tokenizer.json" in line


def test_a_damaged_tokenizer(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    assert "cannot load" in the_error(load_tokenizer, tmp_path)


def test_a_tokenizer_config_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    assert "tokenizer" in the_error(load_tokenizer, folder)
