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
# # Reading a run: where does the student differ?
#
# Perplexity is one number for a whole text. This page takes a run apart: its curves, its worst texts token by token, where the distance
# to the teacher comes from, and whether the student knows what it does not know.

# %% tags=["parameters"]
STEPS = 60  # optimizer steps
BATCHES = 16  # of four held-out sequences, at each evaluation

# %%
import matplotlib.pyplot as plt
import torch

import mini_distill as md

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
run = md.train([
    f"trainer.max_steps={STEPS}",
    f"trainer.eval_every={max(1, STEPS // 4)}",
    "data.seq_len=128",
    "trainer.micro_batch_size=8",
    "evaluation.batch_size=4",
    f"evaluation.max_batches={BATCHES}",
    "output_dir=runs/reading",
])  # fmt: skip

# %% [markdown]
# Any run will do: `run = md.load_run("runs/…")`. Its folder has all that follows.
#
# ## The curves

# %%
run.plot("train/loss", "train/forward_kl", "train/ce", "train/grad_norm")

# %%
run.plot("eval/student_nll", "eval/forward_kl", "eval/top1_agreement", "eval/student_ece")

# %% [markdown]
# What to look for: a gradient norm that grows (learning rate too high; it is clipped at 1, so the loss hides it); the KL flat while the
# cross-entropy falls (the teacher does not know the text); held-out curves that turn while training ones do not (too many epochs).
#
# ## The worst texts, token by token
#
# `details.json` keeps the windows with the highest KL. Red is distance to the teacher, in nats.

# %%
from html import escape

from IPython.display import HTML


def coloured(entry: dict) -> str:
    """A window of text, each token on a red as deep as its KL."""
    spans = []
    for token in entry["tokens"]:
        kl = token.get("forward_kl", 0.0)
        about = f"KL {kl:.2f}; teacher: {token.get('teacher_top', '')!r}, student: {token.get('student_top', '')!r}"
        spans.append(
            f'<span title="{escape(about)}" style="background:rgba(196,60,12,{min(kl / 8, 0.9):.2f})">{escape(token["text"])}</span>'
        )
    return f"<p><b>{escape(entry['row'])}</b>, {entry['forward_kl']:.2f} nats per token</p><pre>{''.join(spans)}</pre>"


HTML("".join(coloured(entry) for entry in run.details["differences"][:3]))

# %% [markdown]
# Hover over a token to see what each of them would have written. Then by kind: of all tokens in these windows, those on which both would
# go on differently, with the student's choice beside the teacher's.

# %%
import pandas as pd

tokens = pd.DataFrame([token for entry in run.details["differences"] for token in entry["tokens"] if "forward_kl" in token])
tokens[tokens.student_top != tokens.teacher_top].nlargest(12, "forward_kl")[["text", "teacher_top", "student_top", "forward_kl"]].map(
    lambda value: repr(value) if isinstance(value, str) else round(value, 2)
)

# %% [markdown]
# ## Where the distance comes from
#
# Split by what the teacher knows: how certain it is, and how far into the text the token stands. Bars are shares of the *whole* distance,
# the line is the distance of such a token. Much distance where the teacher is certain means that the student is missing facts or syntax;
# where it is uncertain, that the student has not learned the shape of the distribution.

# %%
slices = run.details["slices"]
titles = {"teacher_entropy": "by the teacher's entropy (nats)", "position": "by position in the document"}
figure, panels = plt.subplots(1, 2, figsize=(11, 3.2))
for axes, (name, title) in zip(panels, titles.items(), strict=True):
    frame = pd.DataFrame(slices[name])
    weight = frame.tokens * frame.forward_kl
    axes.bar(frame.label, weight / weight.sum(), color="#b8d3e0")
    axes.set(title=title, ylabel="share of the distance")
    axes.tick_params(axis="x", rotation=45)
    twin = axes.twinx()
    twin.plot(frame.label, frame.forward_kl, "o-", color="#c4500c")
    twin.set_ylabel("nats per token", color="#c4500c")
    twin.set_ylim(0, 1.1 * frame.forward_kl.max())

# %% [markdown]
# And how unevenly it is spread: all tokens of some held-out text, sorted by their KL.

# %%
from mini_distill.models.head import LanguageModel

held_out = md.prepare_data(md.load_config(["data.seq_len=128"]).data, run.tokenizer).held_out.batch(range(16))
with torch.no_grad():
    student_logits, teacher_logits = (LanguageModel(model).logits(held_out) for model in (run.student, run.teacher))
    kl = md.divergences.forward_kl(student_logits, teacher_logits).sort(descending=True).values

share = kl.cumsum(0) / kl.sum()
half = int((share < 0.5).sum()) / len(share)
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(torch.linspace(0, 1, len(share)), share, color="#0b6e99")
axes.plot([0, 1], [0, 1], color="#aaa", lw=1, ls="--")
axes.plot([half, half, 0], [0, 0.5, 0.5], color="#c4500c", lw=1)
axes.annotate(f"half of the distance\nis in {half:.0%} of the tokens", (half, 0.5), (half + 0.08, 0.3), color="#c4500c")
axes.set(xlabel="share of tokens, worst first", ylabel="share of the distance", xlim=(0, 1), ylim=(0, 1));

# %% [markdown]
# ## Does it know what it does not know?
#
# A model is calibrated when, of the tokens it gives 70 %, seven in ten come. Distillation hands on the teacher's calibration to the
# extent that the student can afford; a student trained on the data alone for many epochs tends to lie below the diagonal, too sure of
# itself.

# %%
figure, axes = plt.subplots(figsize=(4, 3.6))
axes.plot([0, 1], [0, 1], color="#aaa", lw=1, ls="--")
for name, colour in (("teacher", "#c4500c"), ("student", "#0b6e99")):
    bins = pd.DataFrame(run.details["reliability"][name])
    bins = bins[bins.tokens > 20]
    axes.plot(bins.confidence, bins.accuracy, "o-", ms=4, color=colour, label=f"{name}, error {run.summary[f'eval/{name}_ece']:.1%}")
axes.set(xlabel="confidence", ylabel="share that was right", xlim=(0, 1), ylim=(0, 1))
axes.legend(frameon=False);

# %% [markdown]
# ## Side by side

# %%
for sample in run.details["samples"]:
    print(sample["prompt"][-120:])
    for name in ("teacher", "student"):
        print(f"── {name}: {sample['continuations'][name]!r}")
    print()

# %% [markdown]
# `python -m mini_distill.evaluate model=runs/reading` measures these figures again and more (with `evaluation.max_batches=null` on all of
# the held-out text); `python -m mini_distill.compare` sets runs against their controls over seeds, which is what a claim needs.
