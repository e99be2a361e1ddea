"""Checks of the rows: what of them is learned, and what was lost on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data.batch import Batch
from ..data.prepare import PreparedData
from ..data.sequences import Sequences
from ..evaluation.differences import token_texts
from ..losses.reduction import IGNORE_INDEX
from .finding import DOUBTFUL, GOOD, WRONG, Finding, judged

LEAST_SUPERVISED = 0.02
SHOWN_TOKENS = 60


def check_rows(config: Config, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """What of the rows reached the loss."""
    yield from _losses_on_the_way(data)
    train = data.train
    if not isinstance(train, Sequences):
        yield Finding("documents", GOOD, "a mixture: run the doctor on each part for what concerns its rows")
        return
    yield _supervised_share(train)
    yield _ends(config, train, tokenizer)
    yield _duplicates(train)
    yield _padding(train, tokenizer)


def _losses_on_the_way(data: PreparedData) -> Iterator[Finding]:
    report = data.report
    read = sum(value for key, value in report.items() if key.endswith("rows_read"))
    dropped = {key: value for key, value in report.items() if "rows_dropped_" in key and value}
    what = ", ".join(f"{value} {key.partition('rows_dropped_')[2].replace('_', ' ')}" for key, value in dropped.items())
    harmless = all(key.endswith(("empty", "other_encoding")) for key in dropped)
    measured = f"{read:,} read, {sum(dropped.values()):,} dropped" + (f" ({what})" if what else "")
    yield judged("rows used", harmless, measured, "Mend the rows, raise data.seq_len, or see data.on_bad_row.", DOUBTFUL)
    unanswered = sum(value for key, value in dropped.items() if "nothing_supervised" in key)
    if unanswered:
        what = f"{unanswered:,} rows lost their whole answer to data.seq_len"
        yield Finding("answers", WRONG if unanswered > 0.05 * read else DOUBTFUL, what, "Raise data.seq_len: nothing is learned from them.")
    truncated = sum(value for key, value in report.items() if key.endswith("rows_truncated"))
    if truncated:
        advice = "Raise data.seq_len: the student never sees how they end." if truncated > 0.1 * read else ""
        yield Finding("cut rows", DOUBTFUL if advice else GOOD, f"{truncated:,} of {read:,} rows lose their end", advice)


def _supervised_share(train: Sequences) -> Finding:
    tokens = int(train.plan.length.sum())
    share = train.num_supervised / max(1, tokens)
    measured = f"{share:.1%} of {tokens:,} tokens are learned"
    return judged(
        "supervised tokens",
        share >= LEAST_SUPERVISED,
        measured,
        "Are prompt and completion columns, or the template's assistant turns, the right way round?",
        DOUBTFUL,
    )


def _ends(config: Config, train: Sequences, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """A student that never sees where a text ends never stops."""
    rows, tokens = train.rows, train.rows.tokens
    last = rows.offset[1:][rows.lengths > 0] - 1
    ends = {tokenizer.eos_token_id} | set(_turn_ends(tokenizer))
    learned = np.isin(tokens["input_ids"][last], [i for i in ends if i is not None]) & tokens["supervised"][last]
    if config.data.messages_column:  # a blank or a line break may follow the mark
        before = np.maximum(last - 1, 0)
        learned |= np.isin(tokens["input_ids"][before], [i for i in ends if i is not None]) & tokens["supervised"][before]
    share = float(learned.mean()) if len(learned) else 0.0
    advice = "The student will not learn to stop: check the tokenizer's eos_token and the chat template."
    return judged("ends of documents", share > 0.99, f"{share:.1%} end in a learned end-of-sequence token", advice)


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a turn in common templates."""
    known = tokenizer.get_vocab()
    return [known[name] for name in ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>", "<|end|>") if name in known]


def _duplicates(train: Sequences) -> Finding:
    rows = train.rows
    texts = Counter(rows.tokens["input_ids"][rows.offset[i] : rows.offset[i + 1]].tobytes() for i in range(len(rows)))
    repeated = sum(count - 1 for count in texts.values())
    share = repeated / max(1, len(rows))
    return judged(
        "duplicates",
        share <= 0.05,
        f"{repeated:,} of {len(rows):,} rows are copies of another",
        "Remove them, or count them as epochs.",
        DOUBTFUL,
    )


def _padding(train: Sequences, tokenizer: PreTrainedTokenizerBase) -> Finding:
    share = 1 - int(train.plan.length.sum()) / (len(train) * train.seq_len)
    advice = "data.packing=true fills the sequences with several documents." if share > 0.3 else ""
    return Finding("padding", DOUBTFUL if advice else GOOD, f"{share:.1%} of the positions are padding", advice)


def check_epochs(config: Config, data: PreparedData, rows_limited: bool) -> Finding:
    """How often the training reads the data."""
    sequences = len(data.train)
    if rows_limited:
        return Finding("passes", GOOD, "not known: only the first rows were read here")
    step = config.trainer.micro_batch_size * config.trainer.grad_accum_steps
    passes = config.trainer.max_steps * step / max(1, sequences)
    advice = "Fewer steps, more data, or a stronger weight of the teacher: it learns by heart." if passes > 10 else ""
    return Finding("passes", DOUBTFUL if advice else GOOD, f"{passes:.2f} passes over {sequences:,} sequences in one process", advice)


def learned_text(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of the first sequence, what is learned in brackets: the quickest way to see a wrong mask or template."""
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    start = max(0, first - SHOWN_TOKENS // 3)
    ids, labels = ids[start : start + SHOWN_TOKENS], labels[start : start + SHOWN_TOKENS]
    pieces, inside = [], False
    for text, label in zip(token_texts(tokenizer, ids), labels, strict=True):
        if (label != IGNORE_INDEX) != inside:
            pieces.append("⟦" if not inside else "⟧")
            inside = not inside
        pieces.append(text)
    return "".join([*pieces, "⟧" if inside else ""])


def unigram_entropy(batches: list[Batch], vocab_size: int) -> float:
    """Nats per token of a model that knows nothing but how often each token is there, on these very tokens."""
    tokens = torch.cat([batch.labels[batch.labels != IGNORE_INDEX] for batch in batches])
    counts = torch.bincount(tokens, minlength=vocab_size).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum()) if len(shares) else math.nan
