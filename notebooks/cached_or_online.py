# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Cached or online?
#
# *Online*, the teacher reads every batch beside the student. *Cached*, it reads the corpus once, its targets are written down, and every
# later student learns from the file. The catch is size: a whole distribution over the vocabulary at each token is thousands of numbers.
# This page shows what is kept instead, what it costs, and when it pays.

# %% tags=["parameters"]
STEPS = 40  # optimizer steps of each student
BATCHES = 8  # of four held-out sequences, at each evaluation
ROWS = 12  # files of the corpus

# %%
import matplotlib.pyplot as plt
import torch

import mini_distill as md
from mini_distill.models.loading import embedded_path, load_causal_lm, load_tokenizer
from mini_distill.teachers.sampling import threshold_sample

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
teacher, tokenizer = load_causal_lm(str(embedded_path())).eval(), load_tokenizer(str(embedded_path()))

# %% [markdown]
# ## A distribution in a few bytes
#
# The customary answer is the top k: keep the likeliest tokens, drop the rest, and let what is kept sum to one. The student then learns that
# everything else is impossible, and learns it from every token. By default a cache here keeps something else: each token of at least 1/k
# exactly, and of all others a few, drawn so that *in expectation* nothing is missing. The same weight of ink, another kind of error: noise,
# which training averages out, instead of a bias, which it learns.

# %%
with torch.no_grad():
    text = "import os\n\n\ndef walk(folder):\n    for "
    p = teacher(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)

k, order = 8, p.argsort(descending=True)


def kept(number: int) -> torch.Tensor:
    """One sample of the distribution, laid out over the vocabulary."""
    entries = threshold_sample(p[None], k, torch.Generator().manual_seed(number))
    weights = torch.zeros_like(p)
    weights[entries.head_ids] = entries.head_weights
    share = (1 - entries.head_weights.sum()) / max(1, len(entries.tail_ids))
    return weights.index_add(0, entries.tail_ids, share.expand(len(entries.tail_ids)))


top = torch.zeros_like(p).scatter(0, order[:k], p[order[:k]] / p[order[:k]].sum())
mean = torch.stack([kept(number) for number in range(2000)]).mean(0)
rank = torch.arange(1, len(p) + 1)
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), sharey=True)
for axes, (title, values) in zip(
    panels, {f"top {k}, renormalised": top, "one sample": kept(0), "mean of 2,000 samples": mean}.items(), strict=True
):
    axes.plot(rank, p[order], color="#888", lw=1, label="the teacher")
    shown = values[order] > 0
    axes.plot(rank[shown], values[order][shown], "o", ms=3, color="#c4500c" if "top" in title else "#0b6e99", label="kept")
    axes.set(xscale="log", yscale="log", title=title, xlabel="tokens, likeliest first", ylim=(1e-7, 1))
panels[0].set_ylabel("probability")
panels[0].legend(frameon=False);

# %% [markdown]
# The left one is cut off behind its eighth token, and too high before. The sample in the middle has about as many points; some of them
# stand high above the curve, each for many others. On the right, their mean lies on the curve as far down as two thousand samples can
# see.
#
# ## Writing it down
#
# `python -m mini_distill.cache …` on a command line. It says size and time before it begins.

# %%
CORPUS = [f"data.max_rows={ROWS}", "data.eval_fraction=0.2", "data.seq_len=128"]
cache = md.cache([*CORPUS, "cache.dir=targets", "cache.k=16"])

# %% [markdown]
# ## Training from it
#
# The same student, first batches and steps, with the teacher beside it and from the cache. (The cached run has a live teacher as well,
# but only to begin with its layers and to be measured against; no step asks it.)

# %%
COMMON = [
    *CORPUS,
    "objective=forward_kl",
    f"trainer.max_steps={STEPS}",
    "trainer.micro_batch_size=8",
    "evaluation.batch_size=4",
    f"evaluation.max_batches={BATCHES}",
    "evaluation.num_samples=0",
]
runs = {
    "online": md.train([*COMMON, "output_dir=runs/cache/online"]),
    "cached": md.train([*COMMON, "teacher.cache_dir=targets", "output_dir=runs/cache/cached"]),
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
seconds = {}
for (name, run), colour in zip(runs.items(), ("#888888", "#0b6e99"), strict=True):
    steps = run.metrics.iloc[1:]
    seconds[name] = (steps["train/tokens"] / steps["perf/tokens_per_second"]).cumsum()
    left.plot(steps.index, steps["train/forward_kl"], color=colour, label=name)
    right.plot(seconds[name], steps["train/forward_kl"], color=colour)
left.set(title="against steps: the same curve", xlabel="optimizer step", ylabel="forward KL (nats)")
right.set(title="against the clock", xlabel="seconds of training")
left.legend(frameon=False);

# %%
import pandas as pd

pd.DataFrame({
    name: {
        "held-out forward KL": f"{run.summary['eval/forward_kl']:.3f}",
        "milliseconds a step": f"{1000 * seconds[name].iloc[-1] / STEPS:.0f}",
        "bytes per token": "–" if name == "online" else f"{cache['cache/bytes_per_token']:.1f}",
    }
    for name, run in runs.items()
})  # fmt: skip

# %% [markdown]
# ## When does it pay?
#
# Writing the cache costs one pass of the teacher over the corpus. Against it stands what each epoch of each student saves. With the
# figures of this very run:

# %%
tokens = cache["cache/tokens"]
per_token = {name: float(seconds[name].iloc[-1]) / runs[name].summary["train/tokens_seen"] for name in runs}
epochs = range(9)
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(epochs, [n * tokens * per_token["online"] for n in epochs], "o-", color="#888888", label="online")
axes.plot(
    epochs, [cache["cache/seconds"] + n * tokens * per_token["cached"] for n in epochs], "o-", color="#0b6e99", label="cache, then train"
)
axes.set(xlabel="epochs, over all students", ylabel="seconds")
axes.legend(frameon=False);

# %% [markdown]
# - One student, one epoch, a teacher that fits: online. Nothing is saved by writing down what is read once.
# - Several students, temperatures, seeds or epochs: the cache. So too where teacher and student do not fit together, or the teacher sits
#   on another machine.
# - A sampled cache knows the forward KL at the temperature it was written for, and refuses anything else; `cache.kind=hidden` keeps the
#   input of the teacher's head, from which every divergence is exact, for some hundred bytes a token and as many products as the head
#   costs.
# - A cache belongs to one teacher, tokenizer, template, corpus and sequence length. Change one, and training from it is refused by name.
#
# [What each kind keeps of the gain, over three seeds](../docs/experiments.md).
