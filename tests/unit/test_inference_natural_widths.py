"""Natural widths where the optimum is known: a likelihood that is quadratic in the weights."""

import types

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import BLoB, LowRank, MeanField, Point, build_guide
from pyrolora.inference.natural_widths import NaturalWidths
from pyrolora.inference.released import ReleasedBLoB
from pyrolora.inference.schedules import BlockSchedule
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import LastLayer
from pyrolora.models.prior_declarations import Flat, learned

ROWS, NOISE, PRIOR = 24, 0.5, 0.7
# 1200 draws estimate the log width of one weight to 0.13 (measured) and their mean over 96 weights
# to 0.013: the bounds are six standard errors away, fewer than 1 run in 1,000,000 passes them by chance
FALSE_ALARM_RATE = 1e-6
MEAN_ERROR, SQUARED_ERROR = 0.08, 0.2


@pytest.fixture
def head(three_topics_model):
    return three_topics_model(adapter=LastLayer(), prior=dist.Normal(0.0, PRIOR))


def quadratic(head):
    """Minimum and second derivative of a likelihood, per example."""
    source = torch.Generator().manual_seed(0)
    shape = head.sites["head.weight"].shape
    return torch.randn(shape, generator=source).double(), 3 * torch.rand(shape, generator=source).double()


@pytest.mark.parametrize("start", [0.002, 0.2, 2.0])
@pytest.mark.parametrize("family", [MeanField, BLoB])
@pytest.mark.parametrize("kl_weight", [1.0, 0.01])
def test_one_step_reaches_the_optimum_of_a_quadratic_likelihood(head, family, start, kl_weight):
    guide = build_guide(family(init_scale=start, **({"sites": "*"} if family is BLoB else {})), head)
    (_, factor), (best, curvature) = next(guide.items()), quadratic(head)
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), PRIOR)

    def loss():
        expected = 0.5 * (curvature * ((factor.mean() - best).square() + factor.scale.square())).sum()
        q = torch.distributions.Normal(factor.mean(), factor.scale)
        return expected + kl_weight / ROWS * torch.distributions.kl_divergence(q, prior).sum()

    loss().backward()
    NaturalWidths(guide, head, ROWS, kl_weight).step(1)
    optimum = (PRIOR**-2 + ROWS / kl_weight * curvature).rsqrt()
    torch.testing.assert_close(factor.scale.detach(), optimum, rtol=1e-9, atol=0)
    guide.zero_grad()
    loss().backward()
    assert factor.log_scale_gradient().abs().max() < 1e-10


def regression(model):
    """Put a linear regression on fixed inputs in the place of the model's likelihood."""
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, 32, generator=source).double() * torch.linspace(0.1, 1.5, 32)
    targets = torch.randn(ROWS, 3, generator=source).double()

    def program(self, batch, num_data):
        weights = self.sample_sites()["head.weight"]
        x, y = inputs[batch["index"]], targets[batch["index"]]
        mean = torch.einsum("nci,ni->nc", weights.expand(len(x), 3, 32), x)
        with pyro.plate("data", size=num_data, subsample_size=len(x), dim=-1):
            pyro.sample("label", dist.Normal(mean, NOISE).to_event(1), obs=y)

    model.__call__ = types.MethodType(program, model)
    return inputs.square().mean(0) / NOISE**2


def test_the_engine_finds_the_known_widths_from_any_start(three_topics_model, three_topics):
    fitted = {}
    for start in (0.002, 0.2):
        model = three_topics_model(adapter=LastLayer(), prior=dist.Normal(0.0, PRIOR), task=three_topics(train=ROWS))
        curvature = regression(model)
        settings = {"steps": 50, "batch_size": ROWS, "learning_rate": 0.1, "kl_weight": 0.5}
        for width in ("natural", "gradient"):
            engine = SVI(guide=MeanField(init_scale=start), width=width, **settings)
            ((_, factor),) = engine.fit(model, model.task.train, progress=False).guide.items()
            fitted[width, start] = factor.scale.detach()
    optimum = (PRIOR**-2 + ROWS / 0.5 * curvature).rsqrt().expand(3, 32)
    errors = {key: (scale / optimum).log() for key, scale in fitted.items()}
    for start in (0.002, 0.2):
        assert errors["natural", start].mean().abs() < MEAN_ERROR
        assert errors["natural", start].square().mean().sqrt() < SQUARED_ERROR
    # what a rate does not reach in so few steps is decided by where it started
    assert errors["gradient", 0.002].max() < -10 * SQUARED_ERROR


def test_a_weight_that_the_data_do_not_touch_keeps_its_own_prior_scale(three_topics_model):
    model = three_topics_model(prior={"*_A": learned(0.1, per="layer", strength=0.5, after=0.0), "*_B": Flat()})
    guide = build_guide(BLoB(init_scale=0.01), model)
    widths = NaturalWidths(guide, model, 12, 1.0)
    scale = model.prior.scales["q_proj.lora_A"]
    scale.copy_(torch.tensor([0.05, 0.3], dtype=torch.float64)[:, None, None])
    total = sum(
        torch.distributions.kl_divergence(factor.distribution(), model.prior(model.sites[name])).sum() / 12
        for name, factor in widths.factors.items()
    )
    total.backward()
    widths.step(1)
    factor = widths.factors["q_proj.lora_A"]
    torch.testing.assert_close(factor.scale.detach(), scale.expand(factor.loc.shape), rtol=1e-9, atol=0)


def test_widths_of_a_learned_prior_do_not_run_away_with_it(three_topics_model, three_topics):
    scales = {}
    for width in ("gradient", "natural"):
        prior = learned(0.1, per=("layer", "rank"), strength=0.0, after=0.0)
        model = three_topics_model(torch.float32, prior=prior, task=three_topics(train=48))
        engine = SVI(guide=MeanField(), steps=100, kl_weight=0.01, width=width)
        fitted = engine.fit(model, model.task.train, progress=False)
        scales[width] = max(float(value.max()) for value in fitted.model.prior.scales.values())
    assert scales["natural"] < 2 * scales["gradient"]


class TestRefusals:
    def test_what_has_no_best_width_is_refused_before_the_first_step(self, three_topics_model):
        for prior, guide, message in (
            (
                dist.Normal(0.0, 0.1),
                LowRank(),
                "is the optimum of independent Normals; 'q_proj.lora_A' has a LowRankFactor",
            ),
            (dist.Normal(0.0, 0.1), Point(), "every site is a point"),
            (
                dist.Laplace(0.0, 0.1),
                MeanField(),
                "needs a Normal prior with a scale of its own at 'q_proj.lora_A'; it is Laplace",
            ),
            (lambda site: dist.Normal(0.0, 0.1), MeanField(), "it is callable"),
            (Flat(), BLoB(), "it is Flat"),
        ):
            model = three_topics_model(prior=prior)
            with pytest.raises(ValueError, match=message):
                SVI(guide=guide, width="natural").iterate(model, model.task.train)

    def test_settings(self):
        with pytest.raises(ValueError, match=r"Unknown width 'nautral'. Did you mean 'natural'"):
            SVI(width="nautral")
        with pytest.raises(ValueError, match="a schedule lets blocks rest"):
            SVI(width="natural", schedule=BlockSchedule())
        with pytest.raises(ValueError, match="has no width but 'gradient'"):
            ReleasedBLoB(width="natural")
        with pytest.raises(ValueError, match="VBLL integrates the last layer out"):
            VBLL(width="natural")
