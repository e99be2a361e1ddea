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
# # Distil your own text in five minutes
#
# From a folder of text files to a student a third of its teacher's size, with the curve of its training, a table of what was kept, and a
# model that `transformers` loads. Two CPU cores, no download, no key.

# %% tags=["parameters"]
STEPS = 100  # optimizer steps; a few hundred are better, and take as many times longer
BATCHES = 11  # of four held-out sequences, at each evaluation

# %%
from pathlib import Path

import mini_distill as md

# %% [markdown]
# ## The text
#
# Any folder of `.txt` files; a file is a document. So that this page runs everywhere, here is one: the chapters of the language reference
# that `help()` shows, English prose with a little code. The embedded teacher has not seen them.

# %%
from pydoc_data.topics import topics

folder = Path("my_text")
folder.mkdir(exist_ok=True)
for name, text in topics.items():
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
print(f"{len(topics)} files, {sum(map(len, topics.values())):,} characters")

# %% [markdown]
# ## The run
#
# One call. What is given is what differs from the defaults, and reads the same on a command line:
# `python -m mini_distill.train data=text data.path=my_text …`. With `control=true` the same student is trained a second time without the
# teacher: the same first weights, batches and learning rates, on cross-entropy alone. It is the only way to know what the teacher was
# good for.

# %%
run = md.train([
    "data=text",
    f"data.path={folder}",
    "data.eval_fraction=0.1",  # a tenth of the files is held out
    "data.seq_len=128",
    f"trainer.max_steps={STEPS}",
    f"trainer.eval_every={max(1, STEPS // 5)}",
    "trainer.micro_batch_size=8",
    "evaluation.batch_size=4",
    f"evaluation.max_batches={BATCHES}",
    "evaluation.sample_tokens=32",
    "control=true",
    "output_dir=runs/my_text",
])  # fmt: skip

# %% [markdown]
# ## What came out

# %%
run

# %%
run.plot()

# %% [markdown]
# Read it from the left: the loss that was minimised; the student's loss on held-out text, with the teacher's as a dashed line; the distance
# to the teacher; how often both would choose the same next token. If the held-out loss turns up while the training loss still falls, the
# student learns the text by heart: more text, or fewer steps.
#
# A student that crosses the dashed line is no mistake here. It learns from the text as well as from the teacher, and this teacher, who only
# ever read Python, does not know this text.
#
# The control beside it:

# %%
import matplotlib.pyplot as plt

control = md.load_run("runs/my_text-control")
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for of, label, colour in ((run, "with the teacher", "#0b6e99"), (control, "without", "#888888")):
    curve = of.metrics["eval/student_nll"].dropna()
    axes.plot(curve.index, curve, "o-", color=colour, label=label)
axes.axhline(run.summary["eval/teacher_nll"], color="#c4500c", ls="--", lw=1, label="the teacher itself")
axes.set(title="loss on held-out text", xlabel="optimizer step", ylabel="nats per token")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False);

# %% [markdown]
# ## Using it
#
# The folder `student/` is an ordinary Hugging Face model.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(run.path / "student")
tokenizer = AutoTokenizer.from_pretrained(run.path / "student")
prompt = tokenizer("The import statement", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))

# %% [markdown]
# It writes like what it is: 1.6 M parameters after a few minutes. What makes it better, in this order: a teacher that knows your text
# (`teacher=hf teacher.path=…`; this one learned Python source and is itself not good at prose), more text, more steps, a larger student
# (`student.num_layers=4`).
#
# Run the cell with `md.train` again and it returns at once, since that run is finished; change a setting and the folder refuses, since a
# run is of one set of settings. Give another `output_dir`, or `resume=never`, which moves the old run aside.
