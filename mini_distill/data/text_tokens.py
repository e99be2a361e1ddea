"""Plain text as token ids, with the bytes that each token stands for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError

NEVER = 2**36  # bytes of a token whose name does not tell them: no text is as long, so that the total exposes it


class TextTokens:
    """Encodes text in which special tokens mean nothing, many texts at a time.

    Args:
        tokenizer: A fast tokenizer (of the `tokenizers` library).

    Attributes:
        is_control: `(ids,)` bool by token id: a special token (the unknown token aside, which stands for text).

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            what = f"{type(tokenizer).__name__} is not a fast tokenizer"
            raise ModelError("tokenizer", what, "Save it once with a tokenizer.json (AutoTokenizer does so for most models).")
        self.backend = backend
        self.table = _bytes_per_token(tokenizer)
        self.is_control = np.zeros(len(self.table), dtype=bool)
        self.is_control[control_ids(tokenizer)] = True

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids and bytes, both `(tokens,)` int64. The bytes sum to the length of the text in UTF-8."""
        encodings = self._as_text(self.backend.encode_batch_fast, texts)  # without offsets, which take as long again
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        num_bytes = [self._bytes_by_names(text, of_text) for text, of_text in zip(texts, ids, strict=True)]
        others = [i for i, found in enumerate(num_bytes) if found is None]
        for i, (_, offsets) in zip(others, self.encode_with_offsets([texts[i] for i in others], specials_are_text=True), strict=True):
            num_bytes[i] = bytes_by_offsets(texts[i], offsets)
        return [(of_text, found) for of_text, found in zip(ids, num_bytes, strict=True) if found is not None]

    def encode_with_offsets(self, texts: list[str], specials_are_text: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids `(tokens,)` and their ranges of characters `(tokens, 2)`, both int64."""
        self._whole_texts()
        encode = self.backend.encode_batch
        encodings = self._as_text(encode, texts) if specials_are_text else encode(texts, add_special_tokens=False)
        return [(np.array(e.ids, dtype=np.int64), np.array(e.offsets, dtype=np.int64).reshape(-1, 2)) for e in encodings]

    def _as_text(self, encode: Any, texts: list[str]) -> list[Any]:
        self._whole_texts()
        before = self.backend.encode_special_tokens
        self.backend.encode_special_tokens = True  # "</s>" inside a text is four characters
        try:
            encodings: list[Any] = encode(texts, add_special_tokens=False)
            return encodings
        finally:
            self.backend.encode_special_tokens = before

    def _whole_texts(self) -> None:
        """A tokenizer may come with the truncation and padding of whoever saved it."""
        self.backend.no_truncation()
        self.backend.no_padding()

    def _bytes_by_names(self, text: str, ids: np.ndarray) -> np.ndarray | None:
        """`(tokens,)` bytes, or None where the names of the tokens do not add up to the text (normalisers, unknown tokens)."""
        num_bytes = self.table[ids]
        excess = int(num_bytes.sum()) - len(text.encode())
        if excess == 1 and num_bytes[0] > 0:  # the blank that SentencePiece puts in front
            num_bytes[0] -= 1
            return num_bytes
        return None if excess else num_bytes


def bytes_by_offsets(text: str, offsets: np.ndarray) -> np.ndarray:
    """`(tokens,)` bytes of UTF-8, for any tokenizer: a token stands for the text from its beginning to that of the next.

    Args:
        text: What was encoded.
        offsets: `(tokens, 2)` ranges of characters.

    Returns:
        int64, which sums to the bytes of the text if there is a token at all. Of the tokens that share a character, the last one has it.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    until = np.concatenate([[0], np.cumsum(1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000), dtype=np.int64)])
    begins = np.maximum.accumulate(offsets[:, 0])
    begins[:1] = 0
    return np.diff(until[begins], append=until[-1:])[: len(begins)]


def control_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens, which text must never become. The unknown token does stand for text."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}  # GPT-2: one token for all three
    return sorted(special - unknown)


def _bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """`(ids,)` bytes of text by token, as far as its name tells: exact for byte-level BPE and byte-fallback vocabularies."""
    vocabulary = tokenizer.get_vocab()
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([pipeline.get("decoder"), pipeline.get("pre_tokenizer")])
    table = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        if byte_level:
            table[index] = len(token)  # every character stands for a byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[index] = 1
        else:
            table[index] = len(token.replace("▁", " ").encode())
    if tokenizer.unk_token_id is not None:
        table[tokenizer.unk_token_id] = NEVER
    return table
