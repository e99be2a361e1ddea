"""How likely a causal language model finds a text: what minimal pairs and multiple choice are decided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.tokenizers import vocabulary_size
from ..errors import DataError
from ..losses.reduction import IGNORE_INDEX, loss_mask
from ..models.head import LanguageModel
from ..onlooker import bar
from .isolation import without_side_effects
from .logit_chunks import logit_chunks, real_vocabulary

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Continuation:
    """Tokens of which those from `first` on are scored, given all that stand before them."""

    input_ids: tuple[int, ...]
    first: int


def encode(tokenizer: Any, context: str, continuation: str) -> Continuation:
    """A continuation after its context, as lm-evaluation-harness cuts it.

    Both are tokenised together, since a tokenizer may join what meets at the seam, and cut where the context alone ends; blanks at the
    end of the context belong to the continuation. Without a context the beginning-of-sequence token is one (else the end-of-sequence
    token). It also stands before a context where the tokenizer puts it there by itself.

    Raises:
        DataError: the continuation has no token.
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not text:
        prefix = [begin] if begin is not None else []
        whole = prefix + _ids(tokenizer, continuation)
        first = max(1, len(prefix))  # without any such token the first of the text is given
    else:
        prefix = [begin] if begin is not None and tokenizer(text).input_ids[:1] == [begin] else []
        whole, first = prefix + _ids(tokenizer, text + continuation), len(prefix) + len(_ids(tokenizer, text))
    if len(whole) <= first:
        raise DataError("evaluation", f"nothing to score in {continuation!r}", "Give a text of at least one token.")
    return Continuation(tuple(whole), first)


def log_likelihoods(
    model: LanguageModel,
    tokenizer: Any,
    texts: Sequence[Continuation],
    *,
    batch_size: int = 16,
    autocast: Autocast,
    show_progress: bool = False,
    name: str = "scoring",
) -> list[float]:
    """The sum over a text's scored tokens of log p(token | all before), in nats; log-softmax in float32.

    Args:
        model: On its device.
        tokenizer: Its; columns of the logits that only pad the embedding get no probability.
        texts: What to score; equal ones are scored once.
        batch_size: Texts read at a time, of similar length.
        autocast: Makes the context of a forward pass.
        show_progress: Whether to draw a progress bar.
        name: What it says.

    Raises:
        DataError: a text is longer than the model's positions.
    """
    device = next(model.parameters()).device
    longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    different = sorted(
        set(texts), key=lambda text: (-len(text.input_ids), text.input_ids)
    )  # the longest first: what does not fit shows at once
    if different and longest is not None and len(different[0].input_ids) > longest:
        shown = tokenizer.decode(list(different[0].input_ids[:12]))
        what = f"a text has {len(different[0].input_ids)} tokens, and the model has {longest} positions ('{shown}…')"
        raise DataError("evaluation", what, "Leave it out.")
    vocab_size = min(vocabulary_size(tokenizer), real_vocabulary(tokenizer, model))
    found: dict[Continuation, float] = {}
    starts = range(0, len(different), batch_size)
    with without_side_effects(model.model), autocast():
        for start in bar(starts, desc=name, unit="batch", leave=False, show=show_progress):
            some = different[start : start + batch_size]
            found |= zip(some, _score(model, _batch(some).to(device), vocab_size), strict=True)
    return [found[text] for text in texts]


def _batch(texts: Sequence[Continuation]) -> Batch:
    """Padded on the right, where no token before can see it."""
    shape = (len(texts), max(len(text.input_ids) for text in texts))
    ids, labels, positions = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX), torch.zeros(shape, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens = torch.tensor(text.input_ids)
        ids[row, : len(tokens)], positions[row, : len(tokens)] = tokens, torch.arange(len(tokens))
        labels[row, text.first : len(tokens)] = tokens[text.first :]
    return Batch(ids, labels, positions, torch.arange(len(texts)), torch.zeros(shape, dtype=torch.int64))


def _score(model: LanguageModel, batch: Batch, vocab_size: int) -> list[float]:
    log_probs: list[Tensor] = []
    for chunk in logit_chunks(model, None, batch, vocab_size):
        log_probs.append(chunk.student_logits.float().log_softmax(-1).gather(-1, chunk.targets[:, None])[:, 0].double())
    rows = loss_mask(batch.labels).nonzero()[:, 0]
    sums = torch.zeros(len(batch), dtype=torch.float64, device=rows.device).index_add(0, rows, torch.cat(log_probs))
    return [float(value) for value in sums]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
