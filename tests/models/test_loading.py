"""Whatever is wrong with a model or its tokenizer ends in one clear line."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.utils.hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mini_distill.errors import ModelError
from mini_distill.models import loading
from mini_distill.models.loading import load_causal_lm, load_tokenizer, quiet

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


@pytest.mark.parametrize("text", ["{", "", "[]", '"llama"', "\xff\xfe", "[" * 100_000], ids=range(6))
def test_a_config_that_is_no_json_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    line = the_error(load_causal_lm, folder)
    assert line.startswith(str(folder / "config.json")) and "JSON" in line


def test_a_config_that_is_no_file_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert the_error(load_causal_lm, folder).startswith(f"{folder / 'config.json'}: cannot be read (not a regular file)")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_file_instead_of_its_folder(folder: Path, load: Callable[..., object]) -> None:
    line = the_error(load, folder / "model.safetensors")
    assert "is a file, expected a folder" in line and str(folder) in line


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


def put(folder: Path, *names: str) -> None:
    """Further weights, all zero, into the checkpoint."""
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(4, 4) for name in names}))


@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.bias", "model.layers.0.attn.masked_bias"),
        ("mtp.layers.0.fc.weight", "model.mtp.layers.0.fc.weight"),
        ("vision_tower.encoder.layers.0.mlp.weight", "model.visual.blocks.0.mlp.weight"),
        ("v_head.summary.weight", "score.weight"),
    ],
)
def test_weights_that_a_language_model_can_do_without_are_left_out(folder: Path, names: tuple[str, ...]) -> None:
    put(folder, *names)
    load_causal_lm(str(folder))


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_no_matter(tmp_path: Path, tiny_llama: Build) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    model = load_causal_lm(str(tmp_path))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_blocks_that_predict_further_tokens_may_follow_the_last(folder: Path) -> None:
    """DeepSeek-V3 stores them as if they were blocks of the model."""
    put(folder, "model.layers.2.eh_proj.weight", "model.layers.2.self_attn.o_proj.weight")
    assert "holds 2 weights" in the_error(load_causal_lm, folder)
    edit_config(folder, num_nextn_predict_layers=1)
    load_causal_lm(str(folder))


def test_blocks_that_the_config_does_not_count_are_not_cut_off(folder: Path) -> None:
    """transformers only warns, and half a teacher would teach."""
    edit_config(folder, num_hidden_layers=1)
    line = the_error(load_causal_lm, folder)
    assert "holds 9 weights that config.json leaves no place for" in line and "model.layers.1." in line


def test_blocks_are_told_by_names_with_and_without_the_models_prefix(tmp_path: Path) -> None:
    """The first checkpoints of GPT-2 call them `h.0`, the model calls them `transformer.h.0`."""
    config = GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    edit_weights(tmp_path, rename)
    load_causal_lm(str(tmp_path))
    edit_config(tmp_path, n_layer=1)
    assert "holds 11 weights" in (line := the_error(load_causal_lm, tmp_path)) and "h.1.attn.c_attn.weight" in line


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight", "q_proj.lora_A.weight"])
def test_a_weight_within_a_block_that_the_model_has_no_place_for_is_named(folder: Path, name: str) -> None:
    put(folder, f"model.layers.0.self_attn.{name}")
    assert f"model.layers.0.self_attn.{name}" in the_error(load_causal_lm, folder)


def test_a_shard_that_was_not_downloaded_is_named(folder: Path, tiny_llama: Build) -> None:
    shutil.rmtree(folder)
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    load_causal_lm(str(folder))
    shards[1].unlink()
    line = the_error(load_causal_lm, folder)
    assert f"lacks 1 of {len(shards)} weight files" in line and shards[1].name in line


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}'])
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


def test_code_beside_a_known_architecture_is_not_needed(folder: Path, tmp_path: Path) -> None:
    """Many repositories still carry the code they had before transformers knew them."""
    canary = tmp_path / "canary"
    (folder / "modeling_mine.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    edit_config(folder, auto_map={"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"})
    assert isinstance(load_causal_lm(str(folder)), LlamaForCausalLM)
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


# ------------------------------------------------------------------------------------------------------------------------- hub


def answered(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"the hub says {status}", response=response)


@pytest.fixture
def hub_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """`hub_raises(error)`: what every download ends in."""

    def set_error(error: Exception) -> None:
        def download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", download)

    return set_error


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize(
    ("error", "where", "words"),
    [
        (answered(RepositoryNotFoundError, 404), "student.path", "neither a folder nor a repository"),
        (answered(GatedRepoError, 403), "student.path", "Accept the licence"),
        (answered(RevisionNotFoundError, 404), "student.revision", "no such commit, tag or branch"),
        (answered(HfHubHTTPError, 401), "student.path", "refuses the token"),
        (answered(HfHubHTTPError, 502), "student.path", loading.OFFLINE),
        (LocalEntryNotFoundError("no connection"), "student.path", loading.OFFLINE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_answers_is_one_line(
    hub_raises: Callable[[Exception], None], load: Callable[..., object], error: Exception, where: str, words: str
) -> None:
    hub_raises(error)
    line = the_error(load, "org/name", where="student.path")
    assert line.startswith(f"{where}: ") and words in line


def test_a_misspelt_revision_of_a_gated_repository_is_no_matter_of_its_licence(hub_raises: Callable[[Exception], None]) -> None:
    hub_raises(answered(RevisionNotFoundError, 404))
    assert "licence" not in the_error(load_causal_lm, "org/name", gated=True)


def test_a_repository_with_pickled_weights_only(
    folder: Path, hub_raises: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice of transformers is to set use_safetensors otherwise, which would open the pickle."""

    def cached(_: str, filename: str, **__: Any) -> str | None:
        return str(folder / filename) if filename == "config.json" else None

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the environment of the tests may say otherwise
    monkeypatch.setattr(transformers.utils.hub, "try_to_load_from_cache", cached)
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a service on the hub for them
    hub_raises(answered(RemoteEntryNotFoundError, 404))
    line = the_error(load_causal_lm, "org/name")
    assert "gives no model.safetensors" in line and "use_safetensors" not in line


@pytest.mark.usefixtures("offline")
def test_a_chosen_lack_of_network_is_named() -> None:
    assert "HF_HUB_OFFLINE is set" in the_error(load_causal_lm, "org/name")


def test_without_a_connection_nothing_is_tried_again_and_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`model=org/name` without network ended after a minute and twenty-three lines of `Retrying in 8s`."""
    import huggingface_hub.constants

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")  # asked for anew: not what was cached of another
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "create_connection", refused)
    started = time.monotonic()
    for load in (load_tokenizer, load_causal_lm, loading.weightless_causal_lm):
        line = the_error(load, "nobody-at-all/no-such-model")
        assert "(no connection to the hub, and the cache lacks it)" in line and loading.OFFLINE in line
    assert time.monotonic() - started < 20 and not caplog.messages


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_downloads_show_their_bar_once_a_machine(monkeypatch: pytest.MonkeyPatch, rank: str, shown: bool) -> None:
    """Without it a download of an hour looks like a hang."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    with quiet(downloads=True):
        assert are_progress_bars_disabled() is not shown
        assert not transformers_logging.is_progress_bar_enabled()
    with quiet():
        assert are_progress_bars_disabled()


def test_bars_that_were_switched_off_stay_off() -> None:
    disable_progress_bars()
    try:
        with quiet(downloads=True):
            assert are_progress_bars_disabled()
        assert are_progress_bars_disabled() and transformers_logging.is_progress_bar_enabled()
    finally:
        enable_progress_bars()


@pytest.mark.parametrize("name", ["two words", "a/b/c", "name*", "~nobody-at-all/x/y", "x" * 300])
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
