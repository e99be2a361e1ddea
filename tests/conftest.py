"""Tiny models and a tiny tokenizer that every test may build in milliseconds."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<bos>", "<eos>", "<pad>"]
CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:;!?'()=+-*/<>_#é€"


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
