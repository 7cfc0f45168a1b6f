"""Calibration by simulation: passes for what is right, fails for a posterior of half the width."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy import stats

from pyrolora.guides import MeanField
from pyrolora.inference.diagnostics import (
    SimulationBasedCalibration,
    calibrate_engine,
    simulation_based_calibration,
)
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LastLayer
from pyrolora.models.prior_declarations import learned

# a right posterior is rejected at this rate; seeds are fixed, so a failure is a change and not chance
FALSE_ALARM_RATE = 1e-3
NOISE, PRIOR = 0.7, 1.5


def regression(features):
    """Bayesian linear regression with a known posterior: ``simulate`` and ``fit(narrowing)``."""

    def simulate(generator):
        weights = PRIOR * torch.randn(features.shape[1], generator=generator, dtype=torch.float64)
        return weights, features @ weights + NOISE * torch.randn(
            len(features), generator=generator, dtype=torch.float64
        )

    def fit(narrowing, draws=200):
        def conjugate(targets, generator):
            covariance = (features.T @ features / NOISE**2 + torch.eye(features.shape[1]).double() / PRIOR**2).inverse()
            mean = covariance @ features.T @ targets / NOISE**2
            root = torch.linalg.cholesky(covariance)
            noise = torch.randn(draws, len(mean), generator=generator, dtype=torch.float64)
            return mean + narrowing * noise @ root.T

        return conjugate

    return simulate, fit


@pytest.fixture(scope="module")
def features():
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_exact_posterior_passes_and_half_its_scale_fails(features):
    simulate, fit = regression(features)
    right = simulation_based_calibration(simulate, fit(1.0), simulations=150)
    assert right.passes(FALSE_ALARM_RATE), right.p_values()
    half = simulation_based_calibration(simulate, fit(0.5), simulations=150)
    assert not half.passes(FALSE_ALARM_RATE)
    assert max(half.p_values().values()) < 1e-2, "every quantity is too narrow"
    double = simulation_based_calibration(simulate, fit(2.0), simulations=150)
    assert not double.passes(FALSE_ALARM_RATE)


def test_nuts_passes(features):
    """Pyro's NUTS on the same regression, thinned to what is nearly independent."""
    simulate, _ = regression(features[:6, :2])
    few = features[:6, :2]

    def program(targets):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), PRIOR).to_event(1))
        pyro.sample("targets", dist.Normal(few @ weights, NOISE).to_event(1), obs=targets)

    def fit(targets, generator):
        pyro.set_rng_seed(int(torch.randint(2**31, (), generator=generator)))
        sampler = MCMC(NUTS(program, step_size=0.5), num_samples=60, warmup_steps=30, disable_progbar=True)
        sampler.run(targets)
        return sampler.get_samples()["weights"][::3]

    found = simulation_based_calibration(simulate, fit, simulations=60, names=("slope", "other slope"))
    assert found.passes(FALSE_ALARM_RATE), found.p_values()
    assert set(found.p_values()) == {"slope", "other slope"}


def test_p_values_of_uniform_ranks_are_uniform():
    """400 p-values of right ranks; Kolmogorov and Smirnov reject them at the declared rate."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.randint(51, (60, 400), generator=generator)
    calibration = SimulationBasedCalibration(tuple(map(str, range(400))), ranks, draws=50)
    p_values = list(calibration.p_values().values())
    assert stats.kstest(p_values, "uniform").pvalue > FALSE_ALARM_RATE
    points, low, high = calibration.band(0.95)
    inside = [
        bool(((column[:, None] <= torch.from_numpy(points)).double().mean(0) >= torch.from_numpy(low) - 1e-12).all())
        and bool(
            ((column[:, None] <= torch.from_numpy(points)).double().mean(0) <= torch.from_numpy(high) + 1e-12).all()
        )
        for column in calibration.uniform.T
    ]
    # 400 bands of 95 %: between 4.5 standard errors
    assert abs(sum(inside) / 400 - 0.95) < 4.5 * (0.05 * 0.95 / 400) ** 0.5


class FromPrior:
    """An engine that returns the prior, narrowed: right when the labels say nothing and the width is the prior's."""

    def __init__(self, scale):
        self.scale = scale

    def fit(self, model, data, *, progress=True, generator=None):
        from pyrolora.guides import build_guide

        zero = {name: torch.zeros(site.shape, dtype=torch.float64) for name, site in model.sites.items()}
        return Posterior(model, build_guide(MeanField(self.scale), model, start=zero), {})


@pytest.fixture
def silent(three_topics_model):
    """A last layer over features of zero: labels are random whatever the weights, the posterior is the prior."""
    model = three_topics_model(torch.float64, LastLayer(), dist.Normal(0.0, 0.5))
    model.backbone.features = lambda batch, **kwargs: torch.zeros(len(batch["input_ids"]), 32, dtype=torch.float64)
    return model


def test_an_engine_is_calibrated_on_a_model(silent):
    train = silent.task.train
    right = calibrate_engine(FromPrior(0.5), silent, train, simulations=60, draws=40, progress=False)
    assert right.names == ("head.weight squared", "log likelihood")
    assert right.passes(FALSE_ALARM_RATE), right.p_values()
    half = calibrate_engine(FromPrior(0.25), silent, train, simulations=60, draws=40, progress=False)
    assert half.p_values()["head.weight squared"] < 1e-3
    one = {"first": lambda draw: draw["head.weight"][:, 0, 0]}
    own = calibrate_engine(FromPrior(0.25), silent, train, quantities=one, simulations=80, draws=40, progress=False)
    assert own.names == ("first",)
    assert not own.passes(0.05)


def test_a_posterior_that_ignores_the_labels_is_seen_by_the_log_likelihood(three_topics_model):
    model = three_topics_model(torch.float64, LastLayer(), dist.Normal(0.0, 1.5))
    found = calibrate_engine(FromPrior(1.5), model, model.task.train, simulations=60, draws=40, progress=False)
    p_values = found.p_values()
    assert p_values["head.weight squared"] > FALSE_ALARM_RATE, "the prior is calibrated on average over itself"
    assert p_values["log likelihood"] < 1e-3, "but it fits the data worse than the truth does"


def test_every_truth_comes_from_the_declared_scale_whatever_was_fitted_before(three_topics_model):
    model, seen = three_topics_model(torch.float64, LastLayer(), learned(0.3, after=0.0, strength=0.0)), []

    class Watched:
        def fit(self, model, data, **arguments):
            seen.append(float(model.prior.scales["head.weight"]))
            return SVI(guide=MeanField(), steps=2).fit(model, data, **arguments)

    calibrate_engine(Watched(), model, model.task.train, simulations=20, draws=5, progress=False)
    assert seen == [pytest.approx(0.3)] * 20


def test_images_are_simulated_too(three_shapes_model):
    model = three_shapes_model(adapter=LastLayer(), prior=dist.Normal(0.0, 0.5))
    engine = SVI(guide=MeanField(), steps=2)
    found = calibrate_engine(engine, model, model.task.train, simulations=20, draws=9, progress=False)
    assert found.ranks.shape == (20, 2)


def test_refusals(silent, three_topics_model, features):
    simulate, fit = regression(features)
    with pytest.raises(ValueError, match="at least 20"):
        simulation_based_calibration(simulate, fit(1.0), simulations=5)
    with pytest.raises(ValueError, match=r"got draws of shape \(3,\)"):
        simulation_based_calibration(simulate, lambda data, generator: torch.zeros(3), simulations=20)
    with pytest.raises(ValueError, match="not finite"):
        simulation_based_calibration(simulate, lambda data, generator: torch.full((9, 3), torch.nan), simulations=20)
    with pytest.raises(ValueError, match="names: got 1"):
        simulation_based_calibration(simulate, fit(1.0), simulations=20, names=("a",))
    from pyrolora.models.prior_declarations import Flat

    with pytest.raises(ValueError, match=r"Flat\(\) and cannot be sampled"):
        calibrate_engine(FromPrior(1.0), three_topics_model(prior=Flat()), silent.task.train)
