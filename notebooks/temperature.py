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
# # What does temperature do?
#
# The objective of a distillation is
#
#     kl_weight · T² · divergence(student, teacher; T)  +  ce_weight · CE(student, data)
#
# where both distributions are softened: logits are divided by T before the softmax. This page shows what that does to a
# distribution, to the gradient, and to a student. It needs no download: the teacher is a small model of Python source that ships with
# the package.

# %% tags=["parameters"]
STEPS = 30  # optimizer steps of each student
TEMPERATURES = (1, 2, 4)
BATCHES = 8  # of four held-out sequences, at each evaluation

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator, NullFormatter

import mini_distill as md
from mini_distill.models.head import LanguageModel
from mini_distill.models.loading import embedded_path, load_causal_lm, load_tokenizer

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
teacher, tokenizer = load_causal_lm(str(embedded_path())).eval(), load_tokenizer(str(embedded_path()))

# %% [markdown]
# ## On one distribution
#
# What may come after `if x is not None:`? The teacher gives each of its 4,096 tokens a probability. Temperature does not change their order,
# only how much the first ones stand out.

# %%
prompt = "def show(x):\n    if x is not None:\n       "
with torch.no_grad():
    logits = teacher(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]

likeliest = logits.topk(12).indices
labels = [repr(tokenizer.decode([token]))[1:-1] for token in likeliest.tolist()]
figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True)
for axes, temperature in zip(panels, (0.5, 1, 2, 4), strict=True):
    probabilities = (logits / temperature).softmax(-1)
    axes.barh(labels, probabilities[likeliest], color="#0b6e99")
    rest = 1 - probabilities[likeliest].sum().item()
    axes.set(title=f"T = {temperature}", xlabel="probability", xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.text(0.97, 0.05, f"all other tokens:\n{rest:.0%}", transform=axes.transAxes, ha="right", fontsize=9)
panels[0].invert_yaxis();

# %% [markdown]
# ## On the text as a whole
#
# The same over held-out text: the entropy of the teacher's distribution, and how much of its probability lies outside of the ten
# likeliest tokens. Already at T = 2 most of what the student is asked to match is the tail, and the tail of a model this small is mostly
# noise. Large temperatures come from image classification with ten classes; language models are distilled with T near 1.

# %%
data = md.prepare_data(md.load_config(["data.seq_len=128"]).data, tokenizer)
held_out = data.held_out.batch(range(16))
with torch.no_grad():
    teacher_logits = LanguageModel(teacher).logits(held_out)  # (supervised tokens, vocabulary)

temperatures = [0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8]
softened = [(teacher_logits / temperature).softmax(-1) for temperature in temperatures]
entropy = [torch.special.entr(p).sum(-1).mean().item() for p in softened]
tail = [1 - p.topk(10).values.sum(-1).mean().item() for p in softened]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(temperatures, entropy, "o-", color="#0b6e99")
left.axhline(torch.tensor(float(teacher_logits.shape[1])).log(), color="#888", ls="--", lw=1)
left.annotate("uniform", (0.5, 8.1), color="#666", va="top")
left.set(xscale="log", xlabel="T", ylabel="nats", title="entropy of the teacher")
right.plot(temperatures, tail, "o-", color="#c4500c")
right.set(xscale="log", xlabel="T", ylim=(0, 1), title="probability outside of the top ten")
for axes in (left, right):
    axes.set_xticks([0.5, 1, 2, 4, 8], ["½", "1", "2", "4", "8"])
    axes.xaxis.set_minor_formatter(NullFormatter())

# %% [markdown]
# ## On a student
#
# Three students, alike but for the temperature of the KL they learn from; no cross-entropy, so that nothing else teaches them. Each is
# measured as it will be used, at T = 1.

# %%
SHORT = [
    f"trainer.max_steps={STEPS}",
    "data.seq_len=128",
    "trainer.micro_batch_size=8",
    "evaluation.batch_size=4",
    f"evaluation.max_batches={BATCHES}",
    "evaluation.num_samples=0",
]
runs = {
    temperature: md.train(
        ["objective=forward_kl", f"objective.temperature={temperature}", *SHORT, f"output_dir=runs/temperature/{temperature}"]
    )
    for temperature in TEMPERATURES
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
colours = {1: "#0b6e99", 2: "#3f9b5b", 4: "#c4500c"}
for temperature, run in runs.items():
    curve = run.metrics["train/forward_kl"].dropna().rolling(5, min_periods=1).mean()
    left.plot(curve.index, curve, color=colours[temperature], label=f"T = {temperature}")
left.set(title="forward KL of training, each at its own T", xlabel="optimizer step", ylabel="nats", yscale="log", ylim=(0.03, None))
left.legend(frameon=False, ncols=3, loc="lower left")
right.bar([f"T = {t}" for t in runs], [run.summary["eval/forward_kl"] for run in runs.values()], color=[colours[t] for t in runs])
right.axhline(runs[1].summary["before/forward_kl"], color="#888", ls="--", lw=1, label="before training")
right.set(title="forward KL on held-out text, all at T = 1", ylabel="nats", ylim=(0, 1.25 * runs[1].summary["before/forward_kl"]))
right.legend(frameon=False);

# %% [markdown]
# The losses on the left cannot be compared with each other: at T = 4 both distributions are nearly flat, and so nearly equal. (The
# curves are without the factor T².) Only the right panel compares the students. A run that reports its training loss at another
# temperature has not become better by it.
#
# ## On the gradient: where the T² comes from
#
# Dividing the logits by T divides the gradient by T, and flatter distributions differ less, by another T. So without a
# correction a KL at T = 4 would count for a sixteenth beside the cross-entropy, and `kl_weight` would mean something else at every
# temperature. Multiplied by T² the gradient keeps its size once T is large (Hinton et al. 2015); where distributions are peaked, as these
# are near T = 1, it still falls. In the limit of a high temperature it becomes the difference of the two models' centred logits:
# distillation turns into regression.

# %%
with torch.no_grad():
    student_logits = LanguageModel(runs[1].student).logits(held_out)[:256]
targets = teacher_logits[:256]


def gradient(temperature: float) -> torch.Tensor:
    """Of the forward KL, with respect to the student's logits."""
    leaf = student_logits.clone().requires_grad_()
    md.divergences.forward_kl(leaf, targets, temperature).sum().backward()
    return leaf.grad


wide = [0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 16, 32]
gradients = {temperature: gradient(temperature) for temperature in wide}
centred = (student_logits - targets) - (student_logits - targets).mean(-1, keepdim=True)
likeness = [torch.cosine_similarity(g, centred, dim=-1).mean().item() for g in gradients.values()]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for power, colour, label in ((0, "#888888", "without T²"), (2, "#0b6e99", "times T²")):
    left.plot(wide, [t**power * g.norm(dim=-1).mean().item() for t, g in gradients.items()], "o-", color=colour, label=label)
left.set(xscale="log", yscale="log", xlabel="T", title="size of the gradient, per token")
left.legend(frameon=False)
right.plot(wide, likeness, "o-", color="#c4500c")
right.set(xscale="log", xlabel="T", ylim=(0, 1.05), title="its likeness to the difference of logits (cosine)")
for axes in (left, right):
    axes.set_xticks([0.5, 1, 2, 4, 8, 32], ["½", "1", "2", "4", "8", "32"])

# %% [markdown]
# ## What to take along
#
# - T = 1 is the default, and for text that is read once it is hard to beat: the student is used at T = 1, too. (Thirty steps of one seed,
#   as above, are a hint; `scripts/compare_arms.py` runs comparisons over seeds.)
# - Raise it to 2 where the data repeats over many epochs and the teacher has become certain of it.
# - `objective.temperature` is not the temperature of sampling; that is `evaluation.sampling_temperature`.
# - Compare runs by `eval/…`, which is always at T = 1.
