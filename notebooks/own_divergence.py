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
# # Write your own divergence
#
# A divergence is one function: two tensors of logits in, a value per token out. This notebook writes the squared Hellinger distance,
# tests it, trains with it, and compares the student with one that learned by forward KL.

# %% tags=["parameters"]
STEPS = 40  # optimizer steps of each student
BATCHES = 8  # of four held-out sequences, at each evaluation

# %%
import matplotlib.pyplot as plt
import torch

import mini_distill as md

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}

# %% [markdown]
# ## The function
#
#     H²(p, q) = 1 − Σ √(pᵢ qᵢ)
#
# It is symmetric, and at most 1: a token on which the student is hopeless cannot dominate a batch.
#
# Two things are worth some care. Softmax first and logarithm later loses the small probabilities; here everything stays in logarithms:
# √(pᵢ qᵢ) = exp(½ log pᵢ + ½ log qᵢ). And the sum runs over the last axis only: what supervised
# tokens there are, and how their values are added up, is not the divergence's affair.

# %%
def hellinger(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Squared Hellinger distance, a value per token in [0, 1].

    Args:
        student_logits: `(tokens, vocabulary)`, before temperature.
        teacher_logits: The same shape.
        temperature: Softens both.
    """
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    return -torch.expm1((0.5 * (log_p + log_q)).logsumexp(-1))

# %% [markdown]
# ## Does it hold?
#
# Zero when the two are equal, never negative, blind to a constant added to the logits, finite where the two have nothing in common, and
# its gradient that of finite differences: five lines that find most mistakes.

# %%
torch.manual_seed(0)
student, teacher = torch.randn(2, 5, 50)
assert torch.allclose(hellinger(student, student), torch.zeros(5), atol=1e-6)
assert (hellinger(student, teacher) > 0).all()
assert torch.allclose(hellinger(student + 7, teacher), hellinger(student, teacher), atol=1e-6)
assert hellinger(80 * student, -80 * student).isfinite().all()


def in_double(logits: torch.Tensor) -> torch.Tensor:
    """The same formula in float64, for finite differences."""
    p, q = teacher[:2, :6].double().softmax(-1), logits.softmax(-1)
    return 1 - (p * q).sqrt().sum(-1)


small = student[:2, :6].clone().requires_grad_()
hellinger(small, teacher[:2, :6]).sum().backward()
reference = student[:2, :6].double().requires_grad_()
assert torch.autograd.gradcheck(in_double, reference)
in_double(reference).sum().backward()
assert torch.allclose(small.grad.double(), reference.grad, atol=1e-6)

# %% [markdown]
# ## What it pushes at
#
# Before spending minutes on a run it is worth seeing where a divergence pushes. A student that gives the teacher's favourite (here with
# 60 %) the probability q: how strong is the pull towards it? The forward KL pulls ever harder the more wrong the student is; Hellinger's
# pull fades, since far away its curve is flat. A student from random weights has much to say about that.

# %%
chosen = torch.linspace(-9, 9, 181, requires_grad=True)
two_tokens = torch.stack([chosen, torch.zeros_like(chosen)], -1)
teacher_two = torch.tensor([0.6, 0.4]).log().expand_as(two_tokens)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name, divergence, colour in (
    ("forward KL", md.divergences.forward_kl, "#0b6e99"),
    ("reverse KL", md.divergences.reverse_kl, "#3f9b5b"),
    ("Hellinger", hellinger, "#c4500c"),
):
    values = divergence(two_tokens, teacher_two)
    (slope,) = torch.autograd.grad(values.sum(), chosen, retain_graph=True)
    q = chosen.sigmoid().detach()
    left.plot(q, values.detach(), color=colour, label=name)
    right.plot(q, slope, color=colour)
left.set(title="value", xlabel="student's probability q (teacher: 0.6)", ylabel="nats, or distance", ylim=(0, 2))
right.set(title="gradient to the student's logit", xlabel="student's probability q")
right.axhline(0, color="#888", lw=0.8)
left.legend(frameon=False);

# %% [markdown]
# ## A run by its name
#
# `objective.divergence` takes the name of what a cell defines, or the import path of a function in a file. Before the first step it is
# tried out on a few numbers: a wrong shape or a lost gradient is one line of error, not a strange curve.

# %%
SHORT = [
    f"trainer.max_steps={STEPS}",
    "data.seq_len=128",
    "trainer.micro_batch_size=8",
    "evaluation.batch_size=4",
    f"evaluation.max_batches={BATCHES}",
    "evaluation.num_samples=0",
]


def distilled(name: str, divergence: str, weight: float = 1.0) -> md.Run:
    """A student that learns by this divergence alone; the cell run again trains anew, since the function may have changed."""
    objective = [f"objective.divergence={divergence}", f"objective.kl_weight={weight}", "objective.ce_weight=0"]
    return md.train([*objective, *SHORT, f"output_dir=runs/own_divergence/{name}", "resume=never"])


runs = {
    "forward KL": distilled("forward_kl", "forward_kl"),
    "Hellinger": distilled("hellinger", "hellinger"),
    "Hellinger × 4": distilled("hellinger4", "hellinger", weight=4.0),
}

# %% [markdown]
# For two distributions close to each other, Hellinger is a quarter of the KL: hence the third run, with four times the weight.

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3))
shown = {"eval/forward_kl": "forward KL (nats)", "eval/reverse_kl": "reverse KL (nats)", "eval/top1_agreement": "top-1 agreement"}
for axes, (key, title) in zip(panels, shown.items(), strict=True):
    values = [run.summary[key] for run in runs.values()]
    bars = axes.bar(list(runs), values, color=["#0b6e99", "#c4500c", "#e0a080"])
    axes.bar_label(bars, fmt="%.3f", fontsize=9)
    axes.set(title=title)
    axes.margins(y=0.12)

# %% [markdown]
# The forward KL wins here, and by figures that neither was trained on. The curves above say why: the student begins far from its teacher,
# and there Hellinger's pull has faded. That would be different for a student that begins close. And a weight of four changes next to
# nothing: the gradient is clipped, and the optimizer divides by its size.
#
# Forty steps and one seed are a hint and no result; `scripts/compare_arms.py` runs such a comparison over seeds.
#
# ## From here
#
# - In a package of your own: `objective.divergence=my_package.hellinger`, from the command line as well.
# - Options: keyword arguments of the function, given as `objective.divergence_options`.
# - As one term among others: `objective.terms.<name>.kind=…`, with a weight and a schedule of its own.
# - To share it: one function in `mini_distill/losses/divergences.py` and one YAML file; the table of properties finds it by its name.
