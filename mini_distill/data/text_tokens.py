"""Plain text as token ids, with the bytes that each token stands for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


class TextTokens:
    """Encodes text in which special tokens mean nothing, many texts at a time.

    Args:
        tokenizer: A fast tokenizer (of the `tokenizers` library).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.table = _bytes_per_token(tokenizer)

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids and bytes, both `(tokens,)` int64. The bytes sum to the length of the text in UTF-8."""
        encodings = self._encode(texts, self.backend.encode_batch_fast)
        return [self._with_bytes(text, np.array(encoding.ids, dtype=np.int64)) for text, encoding in zip(texts, encodings, strict=True)]

    def _encode(self, texts: list[str], encode: Any) -> list[Any]:
        backend, before = self.backend, self.backend.encode_special_tokens
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" inside a text is four characters
        try:
            encodings: list[Any] = encode(texts, add_special_tokens=False)
            return encodings
        finally:
            backend.encode_special_tokens = before

    def _with_bytes(self, text: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_bytes = self.table[ids]
        excess = int(num_bytes.sum()) - len(text.encode())
        if excess == 1 and len(ids) and num_bytes[0] > 0:  # the blank that SentencePiece puts in front
            num_bytes[0] -= 1
        elif excess:
            num_bytes = self._bytes_by_offsets(text)
        return ids, num_bytes

    def _bytes_by_offsets(self, text: str) -> np.ndarray:
        """The slow way, for normalisers and unknown tokens: a token stands for the text between its end and the one before."""
        encoding = self._encode([text], self.backend.encode_batch)[0]
        until = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])])
        ends = np.maximum.accumulate([end for _, end in encoding.offsets])
        ends[-1] = len(text)
        return np.diff(until[ends], prepend=0).astype(np.int64)


def _bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """`(vocab,)` bytes of text by token, as far as its name tells: exact for byte-level BPE and byte-fallback vocabularies."""
    vocabulary = tokenizer.get_vocab()
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    table = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        if byte_level:
            table[index] = len(token)  # every character stands for a byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[index] = 1
        else:
            table[index] = len(token.replace("▁", " ").encode())
    return table
