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
# # Is my posterior right?
#
# A variational posterior always comes out, right or wrong. On a last layer over frozen features the true posterior can
# be had by NUTS, so approximations can be held against it; then come the checks that need no truth: k-hat,
# leave-one-out, and calibration by simulation.
#
# With `SMOKE=1` in the environment every loop is cut short, which is how the test suite runs this notebook.

# %%
import os

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch

import pyrolora as pl
from pyrolora.inference.diagnostics import calibrate_engine, loo, posterior_khat, rank_diagram

SMOKE = os.environ.get("SMOKE") == "1"
TRAIN, TEST, DRAWS, WARMUP, STEPS, SIMULATIONS = (12, 10, 20, 10, 3, 20) if SMOKE else (60, 200, 500, 200, 300, 40)

backbone = pl.load_backbone("smollm2-135m", dtype="float32")
task = pl.task("crowd_tweets", train_size=TRAIN)
test = task.test.subset(TEST, seed=0)
model = pl.BayesianModel(backbone, task, adapter=pl.LastLayer(), prior=dist.Normal(0.0, 0.1))
model.print_sites()

# %% [markdown]
# Nothing below the last layer is random, so the network runs once for each example, however many steps and draws follow.

# %% [markdown]
# ## The truth, and four approximations of it
#
# `NUTS` samples where the data say anything, the span of the features, and takes the rest from the prior, where the posterior
# is the prior. R-hat near 1 and no divergence say that the chains agree.

# %%
gold = pl.NUTS(draws=DRAWS, warmup=WARMUP).fit(model, task.train, progress=False)
truth = gold.sample(400, generator=torch.Generator().manual_seed(0))["head.weight"]
print(
    f"{truth[0].numel()} weights, R-hat {gold.record['rhat']:.3f}, effective draws {gold.record['ess']:.0f}, "
    f"divergences {gold.record['divergences']}"
)

# %%
rates = {"learning_rate": 0.02, "scale_learning_rate": 0.02}
settings = {"steps": STEPS, "batch_size": TRAIN, "noise": "weight", **rates}
estimate = pl.MAP(**settings).fit(model, task.train, progress=False)
fits = {
    "mean field": pl.SVI(guide=pl.MeanField(), **settings).fit(model, task.train, progress=False),
    "mean field, cold": pl.SVI(guide=pl.MeanField(), kl_weight=0.01, **settings).fit(model, task.train, progress=False),
    "Laplace": pl.Laplace(structure="last_layer").fit(model, task.train, estimate=estimate, progress=False),
    "VBLL": pl.VBLL().fit(model, task.train, estimate=estimate, progress=False),
}
print(pl.compare_to_gold(gold, fits, test).to_markdown())


# %%
def spread(posterior):
    draws = posterior.sample(400, generator=torch.Generator().manual_seed(0))["head.weight"]
    return draws.std(0).flatten().numpy()


figure, axes = plt.subplots(2, 4, figsize=(12, 6), constrained_layout=True)
for column, (name, posterior) in zip(axes.T, fits.items(), strict=True):
    pairs = (
        (truth.mean(0).flatten().numpy(), posterior.mean()["head.weight"].flatten().numpy(), "mean"),
        (truth.std(0).flatten().numpy(), spread(posterior), "standard deviation"),
    )
    for axis, (exact, found, what) in zip(column, pairs, strict=True):
        axis.scatter(exact, found, s=4, alpha=0.25, color="#0072B2", linewidth=0)
        ends = [min(exact.min(), found.min()), max(exact.max(), found.max())]
        axis.plot(ends, ends, color="0.3", linestyle="--", linewidth=1)
        axis.set_xlabel(f"{what}, NUTS", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    column[0].set_title(name, fontsize=10, weight="bold")
axes[0, 0].set_ylabel("mean of a weight")
axes[1, 0].set_ylabel("standard deviation of a weight")

# %% [markdown]
# Single weights hide the difference: 60 rows say little of any one of 1,728, so nearly all widths are the prior's. What the
# rows do fix is combinations of weights, the logits, and those are what the table is about: the variance of their
# differences over the true one.

# %% [markdown]
# ## Without the truth: k-hat and leave-one-out
#
# k-hat judges whether importance weights could turn the approximation into the posterior. It speaks of all dimensions
# at once and is refused above 2,000 of them, where it would only count dimensions.

# %%
for name, posterior in fits.items():
    print(f"{name:18s} {posterior_khat(posterior, task.train, sites='head.weight', draws=1000)}")
print()
for name, posterior in fits.items():
    found = loo(posterior, task.train, draws=500)
    print(
        f"{name:18s} elpd {found.elpd:7.1f} +- {found.standard_error:.1f}, p_loo {found.effective_parameters:5.1f}, "
        f"{found.unreliable} of {TRAIN} examples with a high k-hat"
    )

# %% [markdown]
# ## Calibration by simulation
#
# Draw weights from the prior, labels from the model, fit, and see where the truth ranks among the draws. A right
# posterior gives uniform ranks. The mean square of the weights tells a posterior that is too narrow; the log-likelihood
# tells one that has not looked at the data.

# %%
short = settings | {"steps": 3 if SMOKE else 150}
engines = {
    "mean field": pl.SVI(guide=pl.MeanField(), **short),
    "mean field, cold": pl.SVI(guide=pl.MeanField(), kl_weight=0.01, **short),
    "Laplace": pl.Laplace(structure="last_layer", estimate=pl.MAP(**short)),
}
calibrations = {
    name: calibrate_engine(engine, model, task.train, simulations=SIMULATIONS, draws=60, progress=False)
    for name, engine in engines.items()
}
for name, calibration in calibrations.items():
    print(name, {quantity: round(value, 4) for quantity, value in calibration.p_values().items()})

# %%
figure, _ = rank_diagram(calibrations, "head.weight squared")
figure

# %%
figure, _ = rank_diagram(calibrations, "log likelihood")
figure

# %% [markdown]
# ## Answer
#
# Laplace and the variational last layer are close here: their logits are as wide as the truth's and their predictions
# within a few thousandths of a nat. Independent weights are wrong even with nothing cold about them: a posterior that
# factorises over weights cannot say that a *sum* of 576 of them is known, and its logits have many times the true variance.
#
# Each check sees another fault. NUTS shows it all and is affordable only for a last layer; k-hat judges all 1,728 dimensions
# at once, so it may refuse what predicts perfectly well; leave-one-out asks only about predictions; simulation asks whether
# the engine is right on average: the mean square of the weights catches the cold posterior alone, the log-likelihood both
# of mean field, and even that Laplace's draws fit the data a little worse than the truth does.
