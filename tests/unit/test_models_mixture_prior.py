"""The joint mixture prior: the chain of conditionals adds up to its density, and engines fit under it."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrolora.guides import BLoB, MeanField
from pyrolora.inference.map import MAP
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import PiSSA
from pyrolora.models.mixture_prior import MemberMixture

MEMBERS = 3


@pytest.fixture
def mixture(three_topics_model):
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2))
    generator = torch.Generator().manual_seed(0)

    def build(spread=0.01, scale=0.3, weights=(0.5, 0.3, 0.2)):
        means = {
            name: spread * torch.randn(MEMBERS, *site.shape, dtype=torch.float64, generator=generator)
            for name, site in model.sites.items()
        }
        scales = {name: torch.full((MEMBERS, *[1] * len(site.shape)), scale) for name, site in model.sites.items()}
        return MemberMixture(means, scales, torch.tensor(weights))

    return build


def test_the_conditionals_add_up_to_the_joint_density(three_topics_model, mixture):
    prior = mixture()
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2), prior=prior)
    values = {name: 0.3 * torch.randn(site.shape, dtype=torch.float64) for name, site in model.sites.items()}
    trace = poutine.trace(poutine.condition(model.sample_sites, values)).get_trace()
    scale = torch.tensor(0.3).double()
    terms = [
        sum(dist.Normal(prior.means[name][member], scale).log_prob(values[name]).sum() for name in values)
        for member in range(MEMBERS)
    ]
    expected = torch.logsumexp(torch.stack(terms) + torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(), 0)
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), rel=1e-8)
    assert float(prior.log_prob(values)) == pytest.approx(float(trace.log_prob_sum()), rel=1e-12)


def test_one_draw_takes_all_its_sites_from_one_member(three_topics_model, mixture):
    prior = mixture(spread=1.0, scale=1e-3)
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2), prior=prior)
    seen = set()
    for _ in range(12):
        drawn = model.sample_sites()
        nearest = {int((prior.means[name] - value).flatten(1).norm(dim=1).argmin()) for name, value in drawn.items()}
        assert len(nearest) == 1
        seen |= nearest
    # all twelve from one member has a probability below 0.5^11
    assert len(seen) > 1


def test_one_member_is_a_normal_prior(three_topics_model, mixture):
    prior = mixture(weights=(1.0, 0.0, 0.0))
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2), prior=prior)
    values = {name: 0.3 * torch.randn(site.shape, dtype=torch.float64) for name, site in model.sites.items()}
    trace = poutine.trace(poutine.condition(model.sample_sites, values)).get_trace()
    scale = prior.scales[next(iter(values))][0].double()
    expected = sum(dist.Normal(prior.means[name][0], scale).log_prob(value).sum() for name, value in values.items())
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), rel=1e-12)


def test_a_map_estimate_without_data_to_speak_of_stays_at_the_member_where_it_starts(three_topics_model, mixture):
    prior = mixture(spread=0.1, scale=1e-3)
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2), prior=prior)
    start = {name: mean[1] for name, mean in prior.means.items()}
    found = MAP(steps=5, learning_rate=1e-4).fit(model, model.task.train, progress=False, start=start).mean()
    for name, value in found.items():
        assert (value - start[name]).abs().max() < 2e-3


def test_a_posterior_is_fitted_under_it(three_topics_model, mixture):
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2), prior=mixture())
    posterior = SVI(guide=MeanField(init_scale=0.05), noise="weight", steps=3).fit(
        model, model.task.train, progress=False
    )
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in posterior.record["history"])


def test_draws_for_every_example_are_refused(three_topics_model, mixture):
    model = three_topics_model(torch.float64, adapter=PiSSA(rank=2), prior=mixture())
    with pytest.raises(ValueError, match="Fit with noise='weight'"):
        SVI(guide=BLoB(init_scale=0.1), steps=1).fit(model, model.task.train, progress=False)


@pytest.mark.parametrize("weights", [(0.5, 0.6, 0.2), (1.2, -0.2, 0.0)])
def test_weights_that_are_no_probabilities_are_refused(mixture, weights):
    with pytest.raises(ValueError, match="non-negative and sum to 1"):
        mixture(weights=weights)


def test_scales_that_are_not_positive_are_refused(mixture):
    with pytest.raises(ValueError, match="must be positive"):
        mixture(scale=0.0)


def test_another_adapter_is_refused(three_topics_model, mixture):
    with pytest.raises(ValueError, match=r"q_proj.lora_A.*expected \(3, 3, 4, 32\)"):
        three_topics_model(torch.float64, adapter=PiSSA(rank=4), prior=mixture())
    with pytest.raises(ValueError, match=r"no member values for the site 'k_proj.lora_A'"):
        three_topics_model(torch.float64, adapter=PiSSA(rank=2, targets=("q_proj", "k_proj")), prior=mixture())
