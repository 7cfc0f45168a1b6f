"""SVI where the posterior is known: the prior itself when the data say nothing, and NUTS on frozen features."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyrolora.guides import BLoB, FullCovariance, LowRank, MeanField
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LastLayer
from pyrolora.models.backbones import Backbone
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Example, Split, Task, Verbaliser

PRIOR_MEAN, PRIOR_SCALE, PRIOR_WIDE = 0.3, 0.5, 0.6
# a posterior equal to the prior has no noise in its KL gradient: what is left is where Adam's decayed rate stops
LEFT_BY_ADAM = 0.02

# 900 draws of NUTS with an effective size above 400 (checked) know a mean to 0.05 and a standard deviation to 0.035 of one
# standard deviation; the guide itself is a Normal, which a logistic posterior is not quite. Of 2 x 8 comparisons at five
# standard errors plus that gap (0.05) fewer than 1 run in 10,000 fails by chance.
FALSE_ALARM_RATE = 1e-4
DRAWS, LEAST_EFFECTIVE = 900, 400
MEAN_TOLERANCE, SCALE_TOLERANCE = 0.3, 0.22


def fit(model, guide, **settings):
    engine = SVI(guide=guide, batch_size=len(model.task.train), warmup=0.0, noise="weight", **settings)
    return engine.fit(model, model.task.train, progress=False).guide


@pytest.mark.parametrize("guide", [MeanField(0.1), BLoB(0.1, sites="*"), LowRank(2, 0.1), FullCovariance(0.1)], ids=str)
def test_labels_that_say_nothing_leave_the_prior(three_topics_model, guide):
    model = three_topics_model(adapter=LastLayer(), prior=dist.Normal(PRIOR_MEAN, PRIOR_SCALE))
    # features of zero give equal logits whatever the weights: the likelihood is constant
    model.backbone.features = lambda batch, **kwargs: torch.zeros(len(batch["labels"]), 32, dtype=torch.float64)
    fitted = fit(model, guide, steps=600, learning_rate=0.02, scale_learning_rate=0.02)
    factor = dict(fitted.items())["head.weight"]
    deviation = (factor.second_moment() - factor.mean().square()).sqrt()
    assert (factor.mean() - PRIOR_MEAN).abs().max() < LEFT_BY_ADAM
    assert (deviation - PRIOR_SCALE).abs().max() < LEFT_BY_ADAM


@pytest.fixture(scope="module")
def nuts_draws():
    """Posterior draws of NUTS, kept for both guides."""
    return {}


@pytest.fixture
def two_classes(tiny_llama, tiny_tokenizer, three_topics):
    """A last layer of 2 x 4 weights over fixed standard Normal features of 24 examples, float64."""
    labels = ("sport", "business")
    examples = tuple(
        Example(example.fields, int(row % 3 == 0), id=example.id)
        for row, example in enumerate(three_topics(train=24).train.examples)
    )
    split = Split("train", "two_topics", examples, 2)
    task = Task("two_topics", labels, Verbaliser("text : {text} topic :", labels), split, split, split, "", "")
    network = tiny_llama(torch.float64, hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    model = BayesianModel(Backbone(network, tiny_tokenizer, "tiny"), task, LastLayer(), dist.Normal(0.0, PRIOR_WIDE))
    features = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # no site changes the features, so the network need not run thousands of times
    model.backbone.features = lambda batch, **kwargs: features[batch["index"]]
    return model


@pytest.mark.parametrize("guide", [FullCovariance(), MeanField()], ids=str)
def test_a_fitted_guide_agrees_with_nuts(two_classes, nuts_draws, guide):
    model = two_classes
    batch = next(iter(model.encode(model.task.train).batches(24)))
    if not nuts_draws:
        sampler = MCMC(NUTS(model, full_mass=True), num_samples=DRAWS, warmup_steps=150, disable_progbar=True)
        sampler.run(batch)
        nuts_draws["effective"] = sampler.diagnostics()["head.weight"]["n_eff"]
        nuts_draws["head.weight"] = sampler.get_samples()["head.weight"].flatten(1)
    draws = nuts_draws["head.weight"]
    assert nuts_draws["effective"].min() > LEAST_EFFECTIVE
    pyro.set_rng_seed(0)
    fitted = fit(model, guide, steps=1000, learning_rate=0.02, scale_learning_rate=0.02, particles=2)
    factor = dict(fitted.items())["head.weight"]
    deviation = (factor.second_moment() - factor.mean().square()).sqrt().flatten().detach()
    covariance = draws.T.cov()
    # a factorised Normal at its optimum has the conditional widths, a dense one the marginal widths
    expected = covariance.diagonal().sqrt()
    if isinstance(guide, MeanField):
        expected = covariance.inverse().diagonal().rsqrt()
    assert ((factor.mean().flatten() - draws.mean(0)).abs() / draws.std(0)).max() < MEAN_TOLERANCE
    assert (deviation / expected - 1).abs().max() < SCALE_TOLERANCE
    # the data did teach something, so this does not compare the prior with itself
    assert (expected < 0.9 * PRIOR_WIDE).any()
    assert draws.mean(0).abs().max() > 0.2
