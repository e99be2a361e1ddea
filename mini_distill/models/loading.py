"""Load models and tokenizers of transformers, with one clear line for everything that can be wrong with them."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import ModelError
from ..storage import MANIFEST, read_regular, verify_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
OFFLINE = "Without network: download it where there is one (hf download), and give the folder as path."


def embedded_path() -> Path:
    """The folder of the teacher that ships inside the package."""
    folder = Path(__file__).parent.parent / "embedded"
    if not (folder / "model.safetensors").exists():
        raise ModelError("teacher", "the embedded teacher is not in this checkout", "Make it: python scripts/make_embedded_teacher.py")
    return folder


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, where: str = "teacher.path"
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a hub repository.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    folder = _folder(path, where)
    if folder is not None and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(
            where,
            f"no tokenizer in '{path}' (expected {', '.join(TOKENIZER_FILES[:3])})",
            "Save it there: tokenizer.save_pretrained(folder).",
        )
    if folder is not None:
        check_as_written(folder)
    with _library_errors(where, path, folder is None), quiet(downloads=folder is None):
        return AutoTokenizer.from_pretrained(
            path if folder is None else str(folder),
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=folder is not None,
        )


def load_causal_lm(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    gated: bool = False,
    where: str = "teacher.path",
) -> PreTrainedModel:
    """A causal language model from a folder or a hub repository, in eval mode.

    Args:
        path: Folder or hub id.
        revision: Commit, tag or branch on the hub.
        dtype: `float32`, `bfloat16` or `float16`: the weights in memory.
        attn_implementation: `sdpa`, `eager`, …; None: what transformers picks.
        trust_remote_code: Whether code of the repository may run.
        gated: The repository asks for a licence; only changes the message.
        where: The setting to name in errors.

    Raises:
        ModelError: the folder, its files, the architecture, the hub or a weight is missing or wrong.
    """
    folder = _folder(path, where)
    if folder is not None:
        _check_folder(folder, where)
    with _library_errors(where, path, folder is None, gated), quiet(downloads=folder is None):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path if folder is None else str(folder),
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=folder is not None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the weight's name
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    _check_weights(model, loaded[1], path, where)
    return model.eval()


def weightless_causal_lm(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    gated: bool = False,
    where: str = "teacher.path",
) -> PreTrainedModel:
    """What `load_causal_lm` gives, on the meta device: its parameters have shapes and no values, and config.json alone is read.

    Raises:
        ModelError: the folder, its configuration, the architecture or the hub is missing or wrong.
    """
    folder = _folder(path, where)
    if folder is not None:
        _check_config_file(folder, where)
    origin = path if folder is None else str(folder)
    with _library_errors(where, path, folder is None, gated), quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            origin, revision=revision, trust_remote_code=trust_remote_code, local_files_only=folder is not None
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    return model.eval()


def _folder(path: str, where: str) -> Path | None:
    """The folder that `path` names; None when it can only be a hub id.

    The functions of `os.path` answer where those of `Path` raise: a name that is too long, ~nobody.
    """
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        raise ModelError(where, f"'{path}' is a file, expected a folder", f"Give the folder it is in: {os.path.dirname(expanded) or '.'}.")
    return Path(expanded) if os.path.isdir(expanded) else None


def _check_weights(model: PreTrainedModel, info: Mapping[str, Any], path: str, where: str) -> None:
    """Refuse what transformers would fill with random numbers, or leave out of the blocks, and only warn about."""
    wrong = [f"{name} is {list(stored)}, expected {list(expected)}" for name, stored, expected in sorted(info["mismatched_keys"])]
    if wrong:
        raise ModelError(
            where,
            f"{len(wrong)} weights in '{path}' have another size than config.json says ({_some(wrong)})",
            "Give the config.json that belongs to them.",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        untied = any("lm_head" in name or "embed_out" in name for name in missing) and len(missing) == 1
        remedy = (
            "If its head is its embedding, set tie_word_embeddings to true in config.json."
            if untied
            else "It is incomplete, or of another architecture."
        )
        raise ModelError(where, f"the checkpoint in '{path}' lacks {len(missing)} of the model's weights ({_some(missing)})", remedy)
    if left_out := _without_place(model, info["unexpected_keys"]):
        raise ModelError(
            where,
            f"the checkpoint in '{path}' holds {len(left_out)} weights that config.json leaves no place for ({_some(left_out)})",
            "Give the config.json that belongs to them.",
        )
    if broken := [name for name, weight in model.named_parameters() if not _is_finite(weight)]:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            where,
            f"{len(broken)} weights in '{path}' are not finite in {dtype} ({_some(broken)})",
            "They are damaged, unless they fit into float32 or bfloat16.",
        )


def _is_finite(weight: Tensor) -> bool:
    """Whether a weight holds numbers only. Nothing as large as it is made; those of eight bits and fewer know no infinity worth a look."""
    if not weight.is_floating_point() or weight.element_size() == 1 or weight.is_meta or not weight.numel():
        return True
    return bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())


def _without_place(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Weights of the model's own stack of blocks that it does not have: config.json names too few layers, or none of the biases.

    A language model can do without what lies elsewhere (a vision tower, a value head), without the blocks after its last that
    predict further tokens (DeepSeek-V3), and without the causal masks that older checkpoints hold as `attn.bias`.
    """
    prefix, text = model.base_model_prefix + ".", model.config.get_text_config()

    def block(name: str) -> tuple[str, int]:
        stack = re.match(r"(.*?)\.(\d+)\.", name.removeprefix(prefix))
        return (stack[1], int(stack[2])) if stack else ("", 0)

    stacks = {block(name)[0] for name in model.state_dict()} - {""}
    further = range(text.num_hidden_layers, text.num_hidden_layers + (getattr(text, "num_nextn_predict_layers", None) or 0))
    weights = [name for name in unexpected if name.endswith((".weight", ".bias")) and not name.endswith((".attn.bias", ".attention.bias"))]
    return sorted(name for name in weights if block(name)[0] in stacks and block(name)[1] not in further)


def _check_folder(folder: Path, where: str) -> None:
    """What can be told from the files before a weight is read."""
    check_as_written(folder)
    _check_config_file(folder, where)
    _check_weight_files(folder, where)


def check_as_written(folder: Path) -> None:
    """A folder with a manifest of ours, as a run's student has, holds what was written; others are believed.

    Raises:
        ModelError: it does not.
    """
    if (folder / MANIFEST).exists() and (problems := verify_folder(folder, may_grow=True)):
        remedy = f"Run the run's command again to write the student again; or, if the change is meant, delete {folder / MANIFEST}."
        raise ModelError(str(folder), f"damaged: {problems[0]}", remedy)


def _check_config_file(folder: Path, where: str) -> None:
    config_file = folder / "config.json"
    if not config_file.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise ModelError(where, f"no config.json in '{folder}' (found {found})", "Give the folder that save_pretrained wrote.")
    _read_object(config_file)
    if (generation_file := folder / "generation_config.json").exists():
        _read_object(generation_file)  # transformers passes over one that it cannot read, and with it over the ends of a text


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(file).decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(str(file), f"not valid JSON ({one_line(error)})", "Download it again.") from error
    except OSError as error:
        raise ModelError(str(file), f"cannot be read ({error.strerror})", "Check the file and its permissions.") from error
    if not isinstance(content, dict):
        raise ModelError(str(file), f"got a JSON {type(content).__name__}, expected an object", "Download it again.")
    return content


def _own_code(where: str, path: str) -> ModelError:
    setting = where.rpartition(".")[0] + ".trust_remote_code"
    return ModelError(where, f"'{path}' brings its own code (auto_map), and it is not run", f"Read it, then set {setting}=true.")


def _check_weight_files(folder: Path, where: str) -> None:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        _check_shards(index, {file.name for file in files}, where)
    if not files:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise ModelError(
                where,
                f"'{folder}' holds pickled weights only, and a pickle can run code",
                "Convert them: model.save_pretrained(folder) writes safetensors.",
            )
        raise ModelError(where, f"no weights in '{folder}' (expected model.safetensors)", "Give the folder that save_pretrained wrote.")
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(str(file), f"not a whole safetensors file ({error})", "Download it again.") from error


def _check_shards(index: Path, present: set[str], where: str) -> None:
    """Every file that the index names lies beside it."""
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(str(index), "has no weight_map from weights to files", "Download it again.")
    shards = set(weight_map.values())
    if absent := sorted(shards - present):
        what = f"'{index.parent}' lacks {len(absent)} of {len(shards)} weight files ({_some(absent)})"
        raise ModelError(where, what, "Download the rest.")


@contextmanager
def _library_errors(where: str, path: str, from_hub: bool, gated: bool = False) -> Iterator[None]:
    """The libraries' many exceptions as one line each."""
    try:
        with _offline_where_no_hub_is() if from_hub else nullcontext():
            yield
    except Exception as error:  # whatever transformers and the hub raise is about what the user named
        if from_hub and (problem := _hub_error(error, where, path, gated)):
            raise problem from error
        if "trust_remote_code" in str(error):
            raise _own_code(where, path) from error
        raise ModelError(where, f"transformers cannot load '{path}' ({type(error).__name__}: {one_line(error)})") from error


def _hub_error(error: Exception, where: str, path: str, gated: bool) -> ModelError | None:
    """What the hub, or the way to it, has to do with `error`; None: nothing."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    causes = {type(cause): cause for cause in _causes(error)}
    if RevisionNotFoundError in causes:
        return ModelError(where.rpartition(".")[0] + ".revision", f"'{path}' has no such commit, tag or branch", "Look at its page.")
    if RepositoryNotFoundError in causes or HFValidationError in causes:
        what = f"'{path}' is neither a folder nor a repository on the hub"
        return ModelError(where, what, "Check the spelling; a private one needs hf auth login.")
    refused = causes.get(HfHubHTTPError)
    if isinstance(refused, HfHubHTTPError) and refused.response.status_code == 401:
        return ModelError(where, f"the hub refuses the token that was sent for '{path}'", "Log in again (hf auth login), or mend HF_TOKEN.")
    if not isinstance(error, OSError):
        return None
    why = "HF_HUB_OFFLINE is set, and the cache lacks it" if is_offline_mode() else one_line(error)
    if not is_offline_mode() and not _hub_answers():
        why = "no connection to the hub, and the cache lacks it"
    if gated or GatedRepoError in causes:
        remedy = f"Accept the licence on the repository's page and log in (hf auth login, or HF_TOKEN). {OFFLINE}"
        return ModelError(where, f"cannot load the gated repository '{path}' ({why})", remedy)
    if "`use_safetensors=True`" in str(error) and not is_offline_mode():  # transformers advises to set it otherwise
        what = f"the hub gives no model.safetensors of '{path}', and pickled weights, which can run code, are not read"
        return ModelError(where, what, f"Choose a revision that has it, or convert it: model.save_pretrained(folder). {OFFLINE}")
    return ModelError(where, f"cannot load '{path}' from the hub ({why})", OFFLINE)


@contextmanager
def _offline_where_no_hub_is() -> Iterator[None]:
    """As with HF_HUB_OFFLINE where there is no way to the hub: its library would try for a minute, and then look into its cache."""
    from huggingface_hub import constants

    chosen, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE or not _hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = chosen


def _hub_answers() -> bool:
    """Whether there is a way to it."""
    from huggingface_hub.constants import ENDPOINT

    return bool(getproxies()) or _connects(ENDPOINT, minute=int(time.monotonic() // 60))


@functools.cache
def _connects(endpoint: str, minute: int) -> bool:
    """Asked once a minute at most."""
    address = urlsplit(endpoint)
    try:
        with socket.create_connection((address.hostname, address.port or (80 if address.scheme == "http" else 443)), timeout=5):
            return True
    except OSError:
        return False


def _causes(error: BaseException | None) -> list[BaseException]:
    """An exception and those behind it, which may lead back to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def quiet(downloads: bool = False) -> Iterator[None]:
    """Without transformers' own bars and warnings, which repeat what we check.

    Args:
        downloads: Keep the bars of downloads, which can take an hour, in the first process of a machine.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    level, bars, hub_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    transformers_logging.set_verbosity(logging.ERROR)
    _show_bars(False, downloads and hub_bars and os.environ.get("LOCAL_RANK", "0") == "0")
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        _show_bars(bars, hub_bars)


def _show_bars(loading: bool, downloads: bool) -> None:
    """Switch the bars of transformers and those of the hub, which transformers switches with its own."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    with warnings.catch_warnings(action="ignore"):  # where HF_HUB_DISABLE_PROGRESS_BARS has the last word
        (transformers_logging.enable_progress_bar if loading else transformers_logging.disable_progress_bar)()
        (enable_progress_bars if downloads else disable_progress_bars)()


def one_line(error: BaseException) -> str:
    """The beginning of what a library said, without its line breaks."""
    return shorten(str(error), width=200, placeholder=" …") or type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
