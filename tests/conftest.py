"""Tiny models and a tiny tokenizer that every test may build in milliseconds."""

from __future__ import annotations

import json
import random
import signal
import string
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.twins import Twins
from runs import copy_of
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<bos>", "<eos>", "<pad>"]
CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:;!?'()=+-*/<>_#é€"


def pytest_configure() -> None:
    """Programs that tests start can be interrupted, also where a script or nohup started the tests, which lets all of them ignore signals."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # the tests themselves live on when the terminal is closed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU stays among the tests where there is none, so that the reason is seen."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """62 tokens: `<unk>` 0, `<bos>` 1, `<eos>` 2, `<pad>` 3, then one per character of CHARACTERS. Adds no special tokens."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(vocab=64, seed=0, **settings)`: a random Llama, 2 layers, hidden 32; the same seed gives the same weights."""

    def build(vocab: int = 64, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
        config = LlamaConfig(**{"vocab_size": vocab, "max_position_embeddings": 128, "initializer_range": 0.2, **sizes, **ids, **settings})
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)

    return build


# ------------------------------------------------------------------------------------------------------- whole runs, in seconds


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MINI_DISTILL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_teacher(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The folder of a random teacher and its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(vocab=64, seed=1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 60 documents of 5 to 60 characters."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "birds"]
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 14))) for _ in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="session")
def tiny_command(tiny_teacher: Path, tiny_corpus: Path) -> Iterator[list[str]]:
    """The overrides of a run of six steps that takes less than a second; all but `output_dir`."""
    from mini_distill import result

    command = [
        *("teacher=hf", f"teacher.path={tiny_teacher}", "student.num_layers=1"),
        *("data=jsonl", f"data.path={tiny_corpus}", "data.text_column=text", "data.eval_fraction=0.2", "data.seq_len=32"),
        *("trainer.max_steps=6", "trainer.warmup_steps=1", "trainer.micro_batch_size=4", "trainer.save_every=2"),
        *("trainer.learning_rate=0.01", "trainer.num_threads=1", "trainer.precision=fp32"),
        *("evaluation.batch_size=4", "evaluation.max_batches=2", "evaluation.num_samples=1", "evaluation.sample_tokens=4"),
    ]
    with pytest.MonkeyPatch.context() as patch:  # speed is measured for two seconds otherwise
        patch.setattr(result, "forward_tokens_per_second", partial(result.forward_tokens_per_second, seconds=0.0))
        yield command


@pytest.fixture(scope="session")
def twins(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Tiny runs of many kinds that nothing ever disturbed, to compare others with."""
    return Twins(tiny_command, tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="session")
def undisturbed(twins: Twins) -> Callable[[str], Path]:
    """The folder of the run of a kind that was never stopped."""
    return twins.undisturbed


@pytest.fixture(scope="session")
def caches(twins: Twins) -> Callable[[str], Path]:
    """The cache of a kind, or the `small` one of a few shards; built once, not to be changed."""
    return twins.cache


@pytest.fixture
def small(caches: Callable[[str], Path], tmp_path: Path) -> Path:
    """A cache of a few shards, to be changed."""
    return copy_of(caches("small"), tmp_path / "small")
