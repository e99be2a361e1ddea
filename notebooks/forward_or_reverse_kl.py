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
# # Forward or reverse KL: what does the student keep?
#
# A student has too little room for all of its teacher. The divergence decides what it gives up.
#
# - `forward_kl`, Σ p log(p/q): expensive wherever the teacher (p) gives something probability and the student (q) does not.
#   The student covers everything, and gives probability to things the teacher would never say.
# - `reverse_kl`, Σ q log(q/p): expensive wherever the student says something that the teacher would not. The student picks
#   what it can do well, and drops the rest.
# - `jsd` lies between the two.

# %% tags=["parameters"]
STEPS = 60  # optimizer steps of the first student; the others go on for two thirds of them
KINDS = ("forward_kl", "jsd", "reverse_kl")
BATCHES = 8  # of four held-out sequences, at each evaluation

# %%
import matplotlib.pyplot as plt
import torch

import mini_distill as md
from mini_distill.models.head import LanguageModel

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
COLOURS = {"forward_kl": "#0b6e99", "jsd": "#3f9b5b", "reverse_kl": "#c4500c"}

# %% [markdown]
# ## A teacher with two peaks, a student with one
#
# Sixty tokens in a row, and a student that can only draw a bell: two numbers, its middle and its width. Gradient descent on the three
# divergences, from the same start.

# %%
tokens = torch.arange(60.0)
peaks = torch.logaddexp(-(((tokens - 14) / 3) ** 2) / 2 + 0.4, -(((tokens - 42) / 4) ** 2) / 2)
teacher = torch.logaddexp(peaks, torch.tensor(-8.0)).log_softmax(-1)  # and a little everywhere


def bell(middle: torch.Tensor, log_width: torch.Tensor) -> torch.Tensor:
    """The student's logits."""
    return -(((tokens - middle) / log_width.exp()) ** 2) / 2


fitted = {}
for name in COLOURS:
    divergence = getattr(md.divergences, name)
    middle, log_width = torch.tensor(24.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": middle, "lr": 0.3}, {"params": log_width, "lr": 0.03}])
    for _ in range(600):
        optimizer.zero_grad()
        divergence(bell(middle, log_width)[None], teacher[None]).sum().backward()
        optimizer.step()
    fitted[name] = bell(middle, log_width).softmax(-1).detach()

figure, axes = plt.subplots(figsize=(8, 3))
axes.fill_between(tokens, teacher.exp(), color="#ddd", step="mid", label="teacher")
for name, probabilities in fitted.items():
    axes.plot(tokens, probabilities, color=COLOURS[name], label=name, lw=2)
axes.set(xlabel="token", ylabel="probability")
axes.legend(frameon=False);

# %% [markdown]
# The forward KL puts its largest probability into the valley, on tokens the teacher hardly uses. The reverse KL takes one peak and
# forgets the other (begun further to the right, it takes the right one). Neither is wrong: a model that is measured by its loss on text
# must not forget; one that writes text had better not invent. The JSD, from this start, covers as the forward KL does.
#
# ## Three language models
#
# The same on the source of Python's standard library. First a student of two of the teacher's ten layers, by forward KL. From that one,
# three go on, each with its own divergence and over the same text. They share a beginning for a reason: far from the teacher the reverse
# KL hardly pulls, since it weighs everything by the *student's* probabilities, and these are still wrong. Straight from the teacher's
# layers, fifty steps of it came out behind fifty of the forward KL by every figure, its own included (2.94 nats against 2.80).

# %%
SHORT = ["data.seq_len=128", "trainer.micro_batch_size=8"]
SHORT += ["evaluation.batch_size=4", f"evaluation.max_batches={BATCHES}", "evaluation.num_samples=0"]
first = md.train(["objective=forward_kl", f"trainer.max_steps={STEPS}", *SHORT, "output_dir=runs/kl/first"])
onwards = [f"student.path={first.path}/student", "student=hf", "seed=1", f"trainer.max_steps={max(1, 2 * STEPS // 3)}", "trainer.learning_rate=1e-3"]
runs = {
    name: md.train([f"objective.divergence={name}", "objective.kl_weight=1", "objective.ce_weight=0", *onwards, *SHORT, f"output_dir=runs/kl/{name}"])
    for name in KINDS
}

# %%
import pandas as pd

of_interest = {
    "eval/forward_kl": "forward KL",
    "eval/reverse_kl": "reverse KL",
    "eval/student_nll": "loss on text",
    "eval/top1_agreement": "top-1 agreement",
}
pd.DataFrame({name: [run.summary[key] for key in of_interest] for name, run in runs.items()}, index=list(of_interest.values())).round(3)

# %% [markdown]
# Each KL is lowest where it was asked for. What that means is easier to see at the level of tokens. Over held-out text:
#
# - **dropped**: how much of the teacher's probability lies on tokens to which the student gives less than a tenth of it;
# - **invented**: how much of the student's probability lies on tokens to which the teacher gives less than a tenth of it;
# - **entropy**: how sure the student is, beside the teacher (dashed).

# %%
held_out = md.prepare_data(md.load_config(SHORT).data, first.tokenizer).held_out.batch(range(16))
with torch.no_grad():
    p = LanguageModel(first.teacher).logits(held_out).softmax(-1)
    students = {name: LanguageModel(run.student).logits(held_out).softmax(-1) for name, run in runs.items()}

found = {
    "dropped": {name: p.where(q < 0.1 * p, 0).sum(-1).mean().item() for name, q in students.items()},
    "invented": {name: q.where(p < 0.1 * q, 0).sum(-1).mean().item() for name, q in students.items()},
    "entropy (nats)": {name: torch.special.entr(q).sum(-1).mean().item() for name, q in students.items()},
}
figure, panels = plt.subplots(1, 3, figsize=(10, 3))
for axes, (title, values) in zip(panels, found.items(), strict=True):
    axes.margins(y=0.12)
    bars = axes.bar(list(values), list(values.values()), color=[COLOURS[name] for name in values])
    axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.set(title=title)
panels[2].axhline(torch.special.entr(p).sum(-1).mean(), color="#333", ls="--", lw=1);

# %% [markdown]
# ## Where the teacher is certain, and where it is not
#
# The mean of a whole text hides that many of its tokens are easy. The same split by the teacher's entropy:

# %%
edges = torch.tensor([0, 0.5, 1.5, 2.5, 3.5, 9.0])
entropy = torch.special.entr(p).sum(-1)
group = torch.bucketize(entropy, edges[1:-1])
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
for name, q in students.items():
    dropped, invented = p.where(q < 0.1 * p, 0).sum(-1), q.where(p < 0.1 * q, 0).sum(-1)
    for axes, values in ((left, dropped), (right, invented)):
        axes.plot([values[group == g].mean().item() for g in range(5)], "o-", color=COLOURS[name], label=name)
left.set(title="dropped", ylabel="probability", xlabel="entropy of the teacher (nats)", ylim=(0, None))
right.set(title="invented", xlabel="entropy of the teacher (nats)", ylim=(0, None))
left.set_xticks(range(5), ["< ½", "½–1½", "1½–2½", "2½–3½", "> 3½"])
left.legend(frameon=False);

# %% [markdown]
# ## What they write
#
# Greedy, so that nothing is left to chance. After so few steps they write something that looks like Python; look at how each of them fails.

# %%
prompt = "def read(path):\n    with open("
for name, run in runs.items():
    print(f"── {name}\n{prompt}{run.generate(prompt, max_new_tokens=32)}\n")

# %% [markdown]
# The two sharper students repeat themselves, as small models do when the likeliest token is taken every time; the forward KL's writes on,
# and invents.
#
# ## Which one, then?
#
# - Measured by likelihood, or distilled further later, or from random weights: `forward_kl`, the default.
# - A student that is good already, far smaller than its teacher, and has to write rather than to be able to say everything: `reverse_kl`,
#   or `jsd` with `objective.divergence_options.jsd_beta` towards 1.
# - Undecided: `symmetric_kl`, or two terms with weights of their own, of which one grows (`objective.terms.reverse_kl.weight=0.5`,
#   `objective.schedules.reverse_kl={0: 0, 500: 1}`).
#
# [All thirteen, with formulas and sources](../docs/divergences.md).
