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
# # What does a prior over adapter weights imply?
#
# A standard deviation of 0.2 on a weight says nothing to anybody. What it says about *answers* can be looked at before
# any data: draw adapters from the prior, run the language model with each, and see what it answers. Then let the data
# choose the scale, rank by rank.
#
# With `SMOKE=1` in the environment every loop is cut short, which is how the test suite runs this notebook.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyrolora as pl
from pyrolora.inference.evaluation import decompose
from pyrolora.inference.predictive import Predictive, logits_of_draws

SMOKE = os.environ.get("SMOKE") == "1"
DRAWS, ROWS, STEPS = (2, 4, 2) if SMOKE else (12, 24, 60)

backbone = pl.load_backbone("smollm2-135m", dtype="auto")
task = pl.task("bbc_headlines", train_size=200)
headlines = task.test.subset(ROWS)

# %% [markdown]
# ## Prior predictive
#
# `posterior.predict` averages over a posterior; here the draws come from the prior. The pretrained model is the case of
# scale zero.


# %%
def prior_predictive(scale):
    """Class probabilities of headlines under adapters drawn from Normal(0, scale)."""
    model = pl.BayesianModel(backbone, task, prior=dist.Normal(0.0, scale))
    torch.manual_seed(0)
    with torch.no_grad():
        draw = {name: model.prior(site).sample((DRAWS,)) for name, site in model.adapter_sites.items()}
        batch = model.encode(headlines).batch(list(range(ROWS)))
        logits = logits_of_draws(model, batch, draw, DRAWS)
    model.release()
    return Predictive(logits.float().softmax(-1), "mc", batch["labels"])


scales = [0.01, 0.03, 0.1, 0.3, 1.0]
predictives = {scale: prior_predictive(scale) for scale in scales}

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
parts = {scale: decompose(predictive.probs) for scale, predictive in predictives.items()}
aleatoric = [float(split.aleatoric.mean()) for split in parts.values()]
epistemic = [float(split.epistemic.mean()) for split in parts.values()]
places = np.arange(len(scales))
axes[0].bar(places, aleatoric, color="#0072B2", label="each adapter's own entropy")
axes[0].bar(places, epistemic, bottom=aleatoric, color="#E69F00", label="disagreement of adapters")
axes[0].axhline(np.log(5), color="0.3", linestyle="--", linewidth=1)
axes[0].text(-0.45, np.log(5) + 0.02, "log 5: no idea", fontsize=8)
axes[0].set_xticks(places, [f"{scale:g}" for scale in scales])
axes[0].set(
    xlabel="prior standard deviation of a weight", ylabel="nats", title="How unsure before any data", ylim=(0, 2.15)
)
axes[0].legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
for scale, colour in zip(scales, plt.cm.cividis(np.linspace(0, 0.9, len(scales))), strict=True):
    confidence = predictives[scale].probs.amax(-1).flatten().sort().values
    axes[1].plot(confidence, np.linspace(0, 1, len(confidence)), color=colour, label=f"{scale:g}")
axes[1].set(
    xlabel="top probability of one adapter", ylabel="share of answers below", title="How confident each adapter is"
)
axes[1].legend(title="scale", frameon=False, fontsize=8)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# A product of two weights has the scale *squared*, so there is a cliff rather than a slope: below it every adapter is
# the pretrained model, above it adapters are confident and contradict each other. A prior far beyond the cliff is a
# belief that the model is certain of random answers, which nobody holds.

# %% [markdown]
# ## Let the data choose: automatic relevance determination over ranks
#
# A prior may be a function of the site and may itself sample. Every rank gets a scale of its own, shared by the layers,
# with a half-Normal prior; the scales are sites with a posterior like any other.


# %%
def relevance(site):
    """Every rank has its own scale, shared by the layers."""
    rank = site.shape[site.dims.index("rank")]
    scale = pyro.sample(f"{site.name}.scale", dist.HalfNormal(0.1 * torch.ones(rank)).to_event(1))
    return dist.Normal(0.0, scale[:, None] if site.dims[-1] == "in_feature" else scale)


model = pl.BayesianModel(backbone, task, prior={"*.lora_A": relevance, "*.lora_B": dist.Normal(0.0, 0.05)})
guide = {"*.lora_A": pl.MeanField(0.02), "*.lora_B": pl.Point(), "*.scale": pl.MeanField(0.1)}
posterior = pl.SVI(guide=guide, steps=STEPS, kl_weight=0.05, batch_size=8).fit(model, task.train, progress=False)

# %%
tree = posterior.to_arviz(sites="*.scale", draws=400)
scales_of_ranks = tree["posterior"]["q_proj.lora_A.scale"].isel(chain=0)
half_normal = np.abs(np.random.default_rng(0).normal(0, 0.1, 4000))
figure, axis = plt.subplots(figsize=(7.5, 3.2), constrained_layout=True)
boxes = [half_normal, *scales_of_ranks.values.T]
drawn = axis.boxplot(
    boxes, whis=(5, 95), showfliers=False, patch_artist=True, widths=0.6, medianprops={"color": "black"}
)
for patch, colour in zip(drawn["boxes"], ["0.85", *["#56B4E9"] * 8], strict=True):
    patch.set_facecolor(colour)
axis.set_xticks(range(1, 10), ["prior", *(f"rank {i}" for i in range(8))], fontsize=8)
axis.set(
    ylabel="scale of A",
    title="Scale of each rank of the query adapters: prior and posterior (5 to 95 %)",
    ylim=(0, None),
)
axis.spines[["top", "right"]].set_visible(False)

# %%
shares = {name: float(value.mean()) for name, value in posterior.mean().items() if name.endswith(".scale")}
spread = float(scales_of_ranks.mean("draw").max() / scales_of_ranks.mean("draw").min())
print({name: round(value, 3) for name, value in shares.items()})
print(f"largest over smallest rank of q_proj: {spread:.2f}")

# %% [markdown]
# ## Answer
#
# A prior on adapter weights is a belief about answers with a cliff in it: under it every adapter is the pretrained model,
# over it the adapters contradict each other. Look at it before fitting. A scale can be learned from the data; the boxes
# say how sure the posterior is of each rank's, and a second seed says whether that is the data's doing or the start's.
