"""Load models and tokenizers of transformers, with one clear line for everything that can be wrong with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import ModelError

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
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(
            where,
            f"no tokenizer in '{path}' (expected {', '.join(TOKENIZER_FILES[:3])})",
            "Save it there: tokenizer.save_pretrained(folder).",
        )
    with _library_errors(where, path, gated=False), quiet():
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=folder.is_dir(),
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
    folder = Path(path).expanduser()
    is_local = folder.is_dir()
    if is_local:
        _check_folder(folder, trust_remote_code, where)
    with _library_errors(where, path, gated and not is_local), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder) if is_local else path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=is_local,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the weight's name
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    _check_weights(loaded[1], path, where)
    return model.eval()


def _check_weights(info: Mapping[str, Any], path: str, where: str) -> None:
    """Refuse what transformers would fill with random numbers and only warn about."""
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


def _check_folder(folder: Path, trust_remote_code: bool, where: str) -> None:
    """What can be told from the files before a weight is read."""
    config_file = folder / "config.json"
    if not config_file.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise ModelError(where, f"no config.json in '{folder}' (found {found})", "Give the folder that save_pretrained wrote.")
    if _read_object(config_file).get("auto_map") and not trust_remote_code:
        raise _own_code(where, str(folder))
    _check_weight_files(folder, where)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(file), f"not valid JSON ({error})", "Download it again.") from error
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
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(str(index), "has no weight_map", "Download it again.")
        shards = set(weight_map.values())
        absent = sorted(shards - {file.name for file in files})
        if absent:
            raise ModelError(where, f"'{folder}' lacks {len(absent)} of {len(shards)} weight files ({_some(absent)})", "Download the rest.")
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


@contextmanager
def _library_errors(where: str, path: str, gated: bool) -> Iterator[None]:
    """The libraries' many exceptions as one line each."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever transformers and the hub raise is about what the user named
        chain = [error, error.__cause__, error.__context__]
        if gated or any(isinstance(e, GatedRepoError) for e in chain):
            remedy = f"Accept the licence on the repository's page and log in (hf auth login, or HF_TOKEN). {OFFLINE}"
            raise ModelError(where, f"cannot load the gated repository '{path}' ({one_line(error)})", remedy) from error
        if any(isinstance(e, RepositoryNotFoundError | HFValidationError) for e in chain):
            raise ModelError(
                where, f"'{path}' is neither a folder nor a repository on the hub", "Check the spelling; a private one needs hf auth login."
            ) from error
        if "trust_remote_code" in str(error):
            raise _own_code(where, path) from error
        if isinstance(error, OSError) and not Path(path).expanduser().is_dir():
            raise ModelError(where, f"cannot load '{path}' from the hub ({one_line(error)})", OFFLINE) from error
        raise ModelError(where, f"transformers cannot load '{path}' ({type(error).__name__}: {one_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings, which repeat what we check."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The beginning of what a library said, without its line breaks."""
    return shorten(str(error), width=200, placeholder=" …") or type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
