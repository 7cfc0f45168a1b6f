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
# # Quickstart: a posterior over an adapter
#
# A language model of 135 million weights is adapted to sort BBC headlines into five topics from 300 examples. A plain
# fine-tune is overconfident; here the adapter's weights get a prior, two engines infer a posterior, and we look at both.
#
# With `SMOKE=1` in the environment every loop is cut short, which is how the test suite runs this notebook.

# %%
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyrolora as pl
from pyrolora.inference.arviz import to_inference_data

SMOKE = os.environ.get("SMOKE") == "1"
STEPS, TEST, DRAWS = (4, 24, 2) if SMOKE else (150, 300, 10)

# %% [markdown]
# ## Backbone, task, prior
#
# The backbone stays frozen and untouched. Each kind of projection has two *sites*, stacked over layers:
# `q_proj.lora_A` holds the A factors of all 30 query projections. The prior is declared by pattern; `pl.Flat()` and
# `pl.learned(0.05)` are allowed too.

# %%
backbone = pl.load_backbone("smollm2-135m", dtype="auto")
task = pl.task("bbc_headlines", train_size=300)
model = pl.BayesianModel(
    backbone,
    task,
    adapter=pl.LoRA(rank=8, alpha=16, targets=["q_proj", "v_proj"]),
    prior={"*.lora_A": dist.Normal(0.0, 0.05), "*.lora_B": dist.Normal(0.0, 0.05)},
)
model.print_sites()

# %% [markdown]
# A prior may also be a function of the site, and may itself sample. This one learns the relevance of each rank
# (automatic relevance determination); its scales become sites of their own, with a posterior like any other.


# %%
def relevance(site):
    """Every rank has its own scale, shared by the layers."""
    rank = site.shape[site.dims.index("rank")]
    scale = pyro.sample(f"{site.name}.scale", dist.HalfNormal(0.2 * torch.ones(rank)).to_event(1))
    return dist.Normal(0.0, scale[:, None] if site.dims[-1] == "in_feature" else scale)


pl.BayesianModel(backbone, task, prior=relevance).print_sites()

# %% [markdown]
# ## Two engines
#
# BLoB by stochastic variational inference: a Normal on every A, a point on every B. `kl_weight=0.01` is a *cold*
# posterior, a hundredth of the true weight of the KL, chosen on validation data and named as such; 1 is the true ELBO.

# %%
blob = pl.SVI(guide=pl.BLoB(), steps=STEPS, kl_weight=0.01).fit(model, task.train)

# %% [markdown]
# Laplace's approximation around a MAP estimate. It needs a Normal prior on every site that becomes Normal; the factor
# on its precision is chosen on validation data. The MAP estimate is judged too, so that the gain of the posterior over
# its own mean is visible.

# %%
normal_model = pl.BayesianModel(backbone, task, prior=dist.Normal(0.0, 1.0))
map_estimate = pl.MAP(steps=STEPS).fit(normal_model, task.train)
laplace = pl.Laplace(structure="diag", precision="validation").fit(
    normal_model, task.train, estimate=map_estimate, validation=task.validation
)

# %% [markdown]
# ## One table, one picture
#
# The test items are the same for all; tweets asked with the headline prompt are the out-of-distribution items.

# %%
test = task.test.subset(TEST)
tweets = pl.task("crowd_tweets").test.subset(TEST)
report = pl.evaluate({"map": map_estimate, "blob": blob, "laplace": laplace}, test, ood={"tweets": tweets}, draws=DRAWS)
report

# %%
figure, _ = report.reliability_diagram()
figure

# %% [markdown]
# ## The posterior in ArviZ
#
# `to_arviz` gives an `xarray.DataTree` with named dimensions: `layer`, `rank`, `in_feature`.

# %%
tree = blob.to_arviz(sites="q_proj.lora_A", draws=20, data=test)
tree

# %%
q_proj = tree["posterior"]["q_proj.lora_A"]
shrinkage = 1 - q_proj.std(["chain", "draw"]).mean(["rank", "in_feature"]) / 0.05
signal = abs(q_proj.mean(["chain", "draw"])).mean(["rank", "in_feature"])
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
axes[0].bar(shrinkage.layer, shrinkage)
axes[0].set(xlabel="layer", ylabel="1 - posterior sd / prior sd", title="What the data taught about the width")
axes[1].bar(signal.layer, signal)
axes[1].set(xlabel="layer", ylabel="mean |posterior mean|", title="Where the adapter moved")

# %%
az.summary(to_inference_data(tree), var_names=["q_proj.lora_A"], kind="stats", coords={
    "layer": [0, 29], "rank": [0], "in_feature": [0, 1]
})  # fmt: skip

# %% [markdown]
# ## Use it
#
# A headline the model has never seen, and a sentence that is no headline at all. Entropy of the mean prediction
# splits into
# what more data could remove (mutual information) and what it could not.

# %%
from pyrolora.inference.evaluation import decompose
from pyrolora.models.tasks import Example, Split

texts = ["Champions crash out of cup on penalties", "Central bank holds interest rates", "qwerty uiop asdf"]
asked = Split("asked", task.name, tuple(Example({"text": text}, label=0) for text in texts), len(task.labels))
predictive = blob.predict(asked, draws=DRAWS, generator=torch.Generator().manual_seed(0))
split = decompose(predictive.probs)
for text, probs, total, epistemic in zip(texts, predictive.mean_probs, split.total, split.epistemic, strict=True):
    print(f"{text:42s} {task.labels[probs.argmax()]:14s} p={probs.max():.2f} H={total:.2f} MI={epistemic:.2f} nats")

# %% [markdown]
# ## Keep it
#
# The folder also holds the posterior mean as a plain PEFT adapter.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "blob"
blob.save_pretrained(folder)
again = pl.Posterior.from_pretrained(folder, backbone)
print(sorted(path.name for path in folder.iterdir()))
