# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # When should the model abstain?
#
# A model that knows when it does not know can hand the question back. Three tests of that: errors should sit where it
# is unsure, foreign questions should make it unsure, and it should be unsure where *people* disagree. The tweets of
# `crowd_tweets` keep how many of their annotators agreed.
#
# With `SMOKE=1` in the environment every loop is cut short, which is how the test suite runs this notebook.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

import pyrolora as pl
from pyrolora.inference.evaluation import (
    conformalise,
    decompose,
    human_disagreement,
    temperature_scaled,
)
from pyrolora.inference.evaluation.curves import risk_coverage_diagram

SMOKE = os.environ.get("SMOKE") == "1"
STEPS, TEST, DRAWS = (3, 24, 2) if SMOKE else (80, 200, 8)

backbone = pl.load_backbone("smollm2-135m", dtype="auto")
task = pl.task("crowd_tweets", train_size=240)
test, held_out = task.test.subset(TEST), task.validation.subset(TEST)
headlines = pl.task("bbc_headlines").test.subset(TEST)
print(test.examples[0])

# %% [markdown]
# ## Three candidates
#
# A MAP estimate; the same with its logits divided by a temperature chosen on validation data, the baseline to beat; and
# a posterior over the adapter.

# %%
import pyro.distributions as dist

map_model = pl.BayesianModel(backbone, task, prior=dist.Normal(0.0, 1.0))
map_estimate = pl.MAP(steps=STEPS).fit(map_model, task.train, progress=False)
scaled = temperature_scaled(map_estimate, held_out)
blob_model = pl.BayesianModel(backbone, task, prior=dist.Normal(0.0, 0.05))
blob = pl.SVI(guide=pl.BLoB(), steps=STEPS, kl_weight=0.01).fit(blob_model, task.train, progress=False)
posteriors = {"map": map_estimate, "map, scaled": scaled, "blob": blob}
print(f"temperature {scaled.logit_temperature:.2f}")

# %%
report = pl.evaluate(
    posteriors,
    test,
    ood={"headlines": headlines},
    calibration=held_out,
    disagreement=human_disagreement(test),
    draws=DRAWS,
    progress=False,
)
report

# %% [markdown]
# ## Errors sit where it is unsure
#
# Answer the most confident share and count the errors among them.

# %%
figure, _ = risk_coverage_diagram({summary.method: summary.risk_coverage for summary in report.summaries()}, risk=0.2)
figure

# %% [markdown]
# ## Foreign questions, and two kinds of not knowing
#
# Total uncertainty splits into what every adapter of the posterior agrees is undecided (aleatoric) and what they
# disagree about (epistemic). Headlines asked with the tweets' prompt are foreign.

# %%
generator = torch.Generator().manual_seed(0)
familiar = blob.predict(test, draws=DRAWS, generator=generator)
foreign = blob.predict(headlines, draws=DRAWS, generator=torch.Generator().manual_seed(0))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.3), constrained_layout=True)
for axis, part in zip(axes, ("aleatoric", "epistemic"), strict=True):
    values = [getattr(decompose(one.probs), part).numpy() for one in (familiar, foreign)]
    bins = np.linspace(0, max(np.quantile(value, 0.99) for value in values), 25)
    for value, colour, name in zip(values, ("#0072B2", "#D55E00"), ("tweets", "headlines"), strict=True):
        axis.hist(value, bins, density=True, histtype="stepfilled", alpha=0.35, color=colour, label=name)
        axis.axvline(np.median(value), color=colour, linewidth=1.4)
    axis.set(xlabel=f"{part} uncertainty (nats)", title=part)
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
axes[0].legend(frameon=False)
# %% [markdown]
# ## Unsure where people disagree
#
# If aleatoric uncertainty is what its name says, it should be larger for tweets on which the crowd was split.

# %%
disagreement = human_disagreement(test).numpy()
groups = [(0.0, 0.001, "all agreed"), (0.001, 0.35, "most agreed"), (0.35, 1.01, "split")]
figure, axis = plt.subplots(figsize=(7, 3.2), constrained_layout=True)
width = 0.26
for index, (name, posterior) in enumerate(posteriors.items()):
    predictive = posterior.predict(test, draws=DRAWS, generator=torch.Generator().manual_seed(0))
    aleatoric = decompose(predictive.probs).aleatoric.numpy()
    inside = [(disagreement >= low) & (disagreement < high) for low, high, _ in groups]
    means = [aleatoric[rows].mean() if rows.any() else np.nan for rows in inside]
    errors = [aleatoric[rows].std() / max(1, rows.sum()) ** 0.5 if rows.any() else np.nan for rows in inside]
    places = np.arange(len(groups)) + (index - 1) * width
    axis.bar(
        places, means, width * 0.92, yerr=errors, capsize=2, label=name, color=("#0072B2", "#56B4E9", "#E69F00")[index]
    )
axis.set_xticks(
    range(3), [f"{name}\n({int(rows.sum())} tweets)" for (*_, name), rows in zip(groups, inside, strict=True)]
)
axis.set(
    ylabel="aleatoric uncertainty (nats)",
    title="Aleatoric uncertainty by agreement of the crowd (mean, standard error)",
)
axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Or answer with a set
#
# A conformal set holds the right class with a promised probability, whatever the model's faults; a good model pays for
# the promise with small sets.

# %%
print(f"{'':14s}{'coverage':>10s}{'classes':>9s}   (split conformal, 90 % promised)")
for name, posterior in posteriors.items():
    calibration = posterior.predict(held_out, draws=DRAWS, generator=torch.Generator().manual_seed(0))
    predictive = posterior.predict(test, draws=DRAWS, generator=torch.Generator().manual_seed(0))
    quality = conformalise(calibration.mean_probs, calibration.labels, miscoverage=0.1).judge(
        predictive.mean_probs, predictive.labels
    )
    print(f"{name:14s}{quality.coverage:10.2f}{quality.mean_size:9.2f}")

# %% [markdown]
# ## Answer
#
# Abstain by the uncertainty of the averaged prediction; the curves say how many questions that costs. Temperature scaling
# changes how sure a point estimate says it is and hardly the order in which it would abstain. The split into two kinds says
# *why*: uncertainty about a tweet that people disagree about will not go away with more data, disagreement between
# adapters will.
