"""Laplace against laplace-torch 0.3 on the same network, factors and data: curvature, posterior, evidence, predictions.

laplace-torch weighs Kronecker factors batch by batch and counts padding as tokens, so all rows have one length here and
are one batch there; `test_laplace_curvature.py` covers the rest.
"""

import copy
import math
import random

import pyro.distributions as dist
import pytest
import torch
from laplace import Laplace as LaplaceTorch
from laplace.curvature.curvlinops import CurvlinopsGGN
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyrolora.guides import Point, build_guide
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.linearised import Linearised
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.tasks import Example, Split, Task, Verbaliser

# a scale of a half, which float32 holds exactly
PRECISION = 4.0
WORDS = [
    "man",
    "woman",
    "child",
    "dog",
    "cat",
    "house",
    "tree",
    "river",
    "road",
    "car",
    "sun",
    "moon",
    "rain",
    "fire",
    "water",
    "red",
    "blue",
    "green",
    "run",
    "walk",
    "eat",
]
CLOSE = {"rtol": 1e-8, "atol": 1e-12}
STRUCTURES = ["diag", "kron", "full"]


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch):
    """Llama normalises in float32 even in a float64 network: keep float64, so that 1e-8 can be asked for."""

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def task():
    chance, labels = random.Random(0), ("sport", "business", "politics")
    splits = {
        name: Split(
            name,
            "equal_lengths",
            tuple(
                Example({"text": " ".join(chance.choices(WORDS, k=3))}, row % 3, id=f"{name}/{row}")
                for row in range(size)
            ),
            3,
        )
        for name, size in (("train", 12), ("validation", 3), ("test", 6))
    }
    return Task(
        "equal_lengths",
        labels,
        Verbaliser("text : {text} topic :", labels=labels),
        **splits,
        description="",
        licence="",
    )


def posterior_at(model, estimate, **settings):
    point = Posterior(model, build_guide(Point(), model, start=estimate), {})
    return Laplace(**settings).fit(model, model.task.train, progress=False, estimate=point)


def somewhere(model, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    return {
        name: scale * torch.randn(site.shape, generator=generator, dtype=torch.float64)
        for name, site in model.sites.items()
    }


class Wrapped(nn.Module):
    """What laplace-torch wants: a module from a dictionary to logits."""

    def __init__(self, peft, label_weight):
        super().__init__()
        self.peft, self.label_weight = peft, label_weight

    def forward(self, data):
        hidden = self.peft.base_model.model.model(input_ids=data["input_ids"]).last_hidden_state
        return hidden[:, -1] @ self.label_weight.T


class Head(nn.Module):
    """The network frozen into features, and a linear layer of differences to its own label rows."""

    def __init__(self, label_weight, weight):
        super().__init__()
        self.label_weight = label_weight
        self.change = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        self.change.weight.data.copy_(weight)

    def forward(self, data):
        return data["features"] @ self.label_weight.T + self.change(data["features"])


def theirs(module, inputs, labels, structure, weights="all"):
    laplace = LaplaceTorch(
        module,
        "classification",
        subset_of_weights=weights,
        hessian_structure=structure,
        prior_precision=PRECISION,
        backend=CurvlinopsGGN,
        dict_key_x=next(iter(inputs)),
    )
    whole = {**inputs, "labels": labels}
    # the oracle makes an identity matrix of the default type on its way to a dense curvature
    torch.set_default_dtype(torch.float64)
    rows = [{key: value[i] for key, value in whole.items()} for i in range(len(labels))]
    laplace.fit(DataLoader(rows, batch_size=len(rows)))
    torch.set_default_dtype(torch.float32)
    return laplace


@pytest.fixture
def lora(three_topics_model, task):
    """Our model, an estimate, its PEFT twin, and the sites in the order of PEFT's parameters."""
    adapter = LoRA(rank=2, alpha=4.0, layers=(1, 2))
    model = three_topics_model(adapter=adapter, task=task, prior=dist.Normal(0.0, PRECISION**-0.5))
    estimate = somewhere(model)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2])
    peft = get_peft_model(copy.deepcopy(model.backbone.network), config).double().eval()
    state = {key: estimate[name][i] for name, site in model.sites.items() for i, key in enumerate(site.keys)}
    set_peft_model_state_dict(peft, state)
    label_ids = model.encode(task.train).label_ids
    wrapped = Wrapped(peft, model.backbone.label_weight(torch.tensor(label_ids)).detach())
    keys = [
        name.removeprefix("peft.").replace(".default", "") for name, p in wrapped.named_parameters() if p.requires_grad
    ]
    places = {key: (name, i) for name, site in model.sites.items() for i, key in enumerate(site.keys)}
    return model, estimate, wrapped, [places[key] for key in keys]


def inputs_of(model, split):
    data = model.encode(split)
    batch = data.batch(list(range(len(data))))
    assert batch["attention_mask"].all()
    return {"input_ids": batch["input_ids"]}, batch["labels"], batch


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_lora_posterior_evidence_and_linearised_logits(lora, structure):
    model, estimate, wrapped, places = lora
    inputs, labels, _ = inputs_of(model, model.task.train)
    oracle = theirs(wrapped, inputs, labels, structure)
    posterior = posterior_at(model, estimate, structure=structure)
    factors = dict(posterior.guide.items())

    if structure == "diag":
        ours = torch.cat([factors[name].scale[i].flatten() for name, i in places])
        torch.testing.assert_close(ours.detach(), oracle.posterior_variance.sqrt(), **CLOSE)
    else:
        # the logarithm of every eigenvalue of the posterior precision, entry by entry
        precision = oracle.posterior_precision
        for (name, i), pair in zip(places, precision.eigenvalues, strict=True):
            wanted = (torch.outer(*pair).flatten() + PRECISION).sort().values
            found = factors[name].log_scale[i].mul(-2).exp().flatten().sort().values.detach()
            torch.testing.assert_close(found, wanted, **CLOSE)

    # laplace-torch leaves out no constant: its log likelihood plus its own half log determinants
    wanted = float(oracle.log_marginal_likelihood())
    assert posterior.record["log_evidence"] == pytest.approx(wanted, rel=1e-8)

    inputs, _, batch = inputs_of(model, model.task.test)
    mean, covariance = Linearised(model, posterior.guide)(batch)
    f_var = oracle._glm_predictive_distribution(inputs)
    torch.testing.assert_close(mean, f_var[0].detach(), **CLOSE)
    torch.testing.assert_close(covariance, f_var[1].detach(), rtol=1e-8, atol=1e-10)
    found = posterior.predict(batch, kind="linearised_probit").mean_probs
    torch.testing.assert_close(found.double(), oracle(inputs, link_approx="probit").detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_last_layer(three_topics_model, task, structure):
    model = three_topics_model(adapter=LastLayer(), task=task, prior=dist.Normal(0.0, PRECISION**-0.5))
    estimate = somewhere(model, 0.1)
    weight = model.backbone.label_weight(torch.tensor(model.encode(task.train).label_ids)).detach()
    module = Head(weight, estimate["head.weight"])

    def features(split):
        data = model.encode(split)
        batch = data.batch(list(range(len(data))))
        with torch.no_grad():
            return {"features": model.backbone.features(batch)}, batch

    inputs, batch = features(task.train)
    oracle = theirs(module, inputs, batch["labels"], structure)
    ours = "last_layer" if structure == "full" else structure
    posterior = posterior_at(model, estimate, structure=ours, sites="head.weight")
    assert posterior.record["log_evidence"] == pytest.approx(float(oracle.log_marginal_likelihood()), rel=1e-8)
    factor = dict(posterior.guide.items())["head.weight"]
    if structure == "full":
        root = factor.scale_tril.detach()
        torch.testing.assert_close(root @ root.T, oracle.posterior_covariance, rtol=1e-7, atol=1e-10)
    inputs, batch = features(task.test)
    mean, covariance = Linearised(model, posterior.guide)(batch)
    wanted_mean, wanted = oracle._glm_predictive_distribution(inputs)
    torch.testing.assert_close(mean, wanted_mean.detach(), **CLOSE)
    torch.testing.assert_close(covariance, wanted.detach(), rtol=1e-7, atol=1e-10)


def test_evidence_precision_is_at_least_as_good_as_theirs(lora):
    """Their 100 Adam steps from 1 on one shared precision, and our bounded search for the same maximum."""
    model, estimate, wrapped, _ = lora
    inputs, labels, _ = inputs_of(model, model.task.train)
    oracle = theirs(wrapped, inputs, labels, "kron")
    oracle.optimize_prior_precision(method="marglik", n_steps=300)
    posterior = posterior_at(model, estimate, structure="kron", precision="evidence", group="model")
    wanted = float(oracle.log_marginal_likelihood())
    assert posterior.record["log_evidence"] >= wanted - 1e-8 * abs(wanted)
    found = set(posterior.record["prior_precision"].values())
    assert len(found) == 1
    assert math.log(found.pop()) == pytest.approx(math.log(float(oracle.prior_precision)), abs=0.1)
