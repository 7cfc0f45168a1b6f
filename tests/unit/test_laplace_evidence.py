"""Laplace's evidence where it is exact: Bayesian linear regression, against the marginal Normal density of the data."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyrolora.inference.laplace.precision import (
    LOG_PRECISION_BOUNDS,
    NormalPrior,
    declared_prior,
    evidence_precision,
    log_evidence,
)
from pyrolora.models.prior_declarations import Flat, learned

NOISE = 0.7


class Regression:
    """``y = X w + noise`` with a Normal prior on w, everything in closed form."""

    def __init__(self, prior_mean=0.0, design=None):
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(20, 5, generator=generator, dtype=torch.float64) if design is None else design
        weights = 0.8 * torch.randn(self.X.shape[1], generator=generator, dtype=torch.float64)
        noise = NOISE * torch.randn(len(self.X), generator=generator, dtype=torch.float64)
        self.y = self.X @ weights + noise
        self.curvature = self.X.mT @ self.X / NOISE**2
        self.prior_mean = torch.tensor(prior_mean, dtype=torch.float64)

    def estimate(self, precision):
        """The posterior mean, which is also the mode; precision is one number or one a weight."""
        prior = torch.as_tensor(precision, dtype=torch.float64).expand(self.X.shape[1])
        right = self.X.mT @ self.y / NOISE**2 + prior * self.prior_mean
        return torch.linalg.solve(self.curvature + prior.diag(), right)

    def log_likelihood(self, weights):
        return float(Normal(self.X @ weights, NOISE).log_prob(self.y).sum())

    def exact(self, precision):
        """``log p(y)`` with the weights integrated out."""
        variance = 1 / torch.as_tensor(precision, dtype=torch.float64).expand(self.X.shape[1])
        covariance = self.X @ variance.diag() @ self.X.mT + NOISE**2 * torch.eye(len(self.X), dtype=torch.float64)
        mean = (self.X * self.prior_mean).sum(-1)
        return float(MultivariateNormal(mean, covariance).log_prob(self.y))

    def found(self, precision, values, estimate=None):
        weights = self.estimate(precision) if estimate is None else estimate
        prior = NormalPrior(self.prior_mean, torch.as_tensor(precision, dtype=torch.float64))
        return log_evidence(self.log_likelihood(weights), {"w": weights}, {"w": prior}, {"w": values[None]})


def orthogonal_design():
    """Columns at right angles: the curvature is diagonal, and a diagonal structure leaves nothing out."""
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(20, 5, generator=generator, dtype=torch.float64))
    return basis * torch.tensor([0.3, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("precision", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("prior_mean", [0.0, 0.4])
def test_dense_evidence_is_the_density_of_the_data(precision, prior_mean):
    case = Regression(prior_mean)
    found = case.found(precision, torch.linalg.eigvalsh(case.curvature))
    assert found == pytest.approx(case.exact(precision), abs=1e-10)


@pytest.mark.parametrize("precision", [2.0, [0.2, 1.0, 3.0, 10.0, 40.0]])
def test_diagonal_evidence_is_the_density_of_the_data(precision):
    case = Regression(0.4, orthogonal_design())
    found = case.found(precision, case.curvature.diagonal())
    assert found == pytest.approx(case.exact(precision), abs=1e-10)


def test_evidence_adds_up_over_sites():
    case = Regression(design=orthogonal_design())
    weights, values = case.estimate(2.0), case.curvature.diagonal()
    prior = NormalPrior(torch.tensor(0.0), torch.tensor(2.0, dtype=torch.float64))
    parts = {"one": slice(0, 2), "two": slice(2, 5)}
    apart = log_evidence(
        case.log_likelihood(weights),
        {name: weights[part] for name, part in parts.items()},
        dict.fromkeys(parts, prior),
        {name: values[None, part] for name, part in parts.items()},
    )
    assert apart == pytest.approx(case.exact(2.0), abs=1e-10)


def test_derivative_in_the_log_precision():
    # d/dlog t of the evidence at a fixed estimate: 1/2 [ sum_i h_i / (h_i + t) - t |w - m|^2 ]  (MacKay's gamma)
    case, step, precision = Regression(0.4), 1e-4, 1.7
    weights, values = case.estimate(precision), torch.linalg.eigvalsh(case.curvature)
    above, below = (case.found(precision * math.exp(sign * step), values, weights) for sign in (1, -1))
    spread = float((weights - 0.4).square().sum())
    gamma = float((values / (values + precision)).sum())
    assert (above - below) / (2 * step) == pytest.approx(0.5 * (gamma - precision * spread), rel=1e-6)


def test_negative_eigenvalues_of_rounding_count_as_zero():
    case = Regression()
    values = torch.linalg.eigvalsh(case.curvature)
    noisy = torch.cat([torch.tensor([-1e-9], dtype=torch.float64), values[1:]])
    clean = torch.cat([torch.tensor([0.0], dtype=torch.float64), values[1:]])
    assert case.found(1e-10, noisy, case.estimate(1.0)) == case.found(1e-10, clean, case.estimate(1.0))


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_evidence_precision_is_the_best_of_a_fine_grid(scale):
    case = Regression()
    estimates = {"w": scale * case.estimate(1.0), "v": torch.full((3,), 0.1 * scale, dtype=torch.float64)}
    values = {"w": torch.linalg.eigvalsh(case.curvature), "v": torch.tensor([5.0, 50.0, 500.0], dtype=torch.float64)}
    values = {name: value[None] for name, value in values.items()}
    declared = {name: NormalPrior(torch.tensor(0.0), torch.tensor(1.0, dtype=torch.float64)) for name in values}
    chosen = evidence_precision(estimates, declared, values)
    grid = torch.linspace(*LOG_PRECISION_BOUNDS, 3601, dtype=torch.float64)  # 0.005 apart
    for name in values:

        def at(log_precision, name=name):
            prior = NormalPrior(torch.tensor(0.0), log_precision.exp())
            return log_evidence(0.0, {name: estimates[name]}, {name: prior}, {name: values[name]})

        heights = [at(point) for point in grid]
        best = int(torch.tensor(heights).argmax())
        assert 0 < best < len(grid) - 1, "the maximum must lie inside the bounds for the search to be tested"
        found = chosen[name].precision.log()
        assert float(found) == pytest.approx(float(grid[best]), abs=0.006)
        assert at(found) >= heights[best] - 1e-9


def test_evidence_precision_keeps_the_prior_mean():
    case = Regression(0.4)
    declared = {"w": NormalPrior(case.prior_mean, torch.tensor(3.0, dtype=torch.float64))}
    chosen = evidence_precision({"w": case.estimate(3.0)}, declared, {"w": torch.linalg.eigvalsh(case.curvature)[None]})
    assert chosen["w"].mean == case.prior_mean
    assert chosen["w"].precision.shape == ()


class TestDeclaredPrior:
    NAMES = ("q_proj.lora_A", "v_proj.lora_B")

    def test_a_normal_gives_its_mean_and_precision(self, three_topics_model):
        found = declared_prior(three_topics_model(prior=dist.Normal(0.5, 0.2)), self.NAMES)
        assert tuple(found) == self.NAMES
        for prior in found.values():
            assert float(prior.mean) == 0.5
            assert float(prior.precision) == pytest.approx(25.0, rel=1e-6)
            assert prior.precision.dtype == torch.float64

    def test_unequal_scales_become_one_precision_a_weight(self, three_topics_model):
        scales = torch.tensor([[0.125], [0.5]]).expand(2, 32)  # one a rank
        model = three_topics_model(prior={"*.lora_A": dist.Normal(0.0, scales).to_event(2), "*.lora_B": Flat()})
        found = declared_prior(model, ("q_proj.lora_A",))["q_proj.lora_A"]
        assert found.precision.shape == model.sites["q_proj.lora_A"].shape
        for entry in found.precision:
            assert entry[:, 0].tolist() == [64.0, 4.0]
            assert (entry == entry[:, :1]).all()

    def test_one_scale_a_layer_stays_one_number_a_layer(self, three_topics_model):
        scales = torch.tensor([0.125, 0.5]).reshape(2, 1, 1)
        model = three_topics_model(prior={"*.lora_A": dist.Normal(0.0, scales), "*.lora_B": Flat()})
        found = declared_prior(model, ("q_proj.lora_A",))["q_proj.lora_A"]
        assert found.precision.shape == (2, 1, 1)
        assert found.precision.flatten().tolist() == [64.0, 4.0]

    def test_a_learned_prior_gives_its_present_scale(self, three_topics_model):
        model = three_topics_model(prior=learned(0.05))
        model.prior.scales["q_proj.lora_A"].fill_(0.5)
        found = declared_prior(model, self.NAMES)
        assert float(found["q_proj.lora_A"].precision) == pytest.approx(4.0)
        assert float(found["v_proj.lora_B"].precision) == pytest.approx(400.0)

    @pytest.mark.parametrize(
        ("prior", "kind"),
        [
            (Flat(), "Flat"),
            (lambda site: dist.Normal(0.0, 1.0), "callable"),
            (dist.StudentT(4.0, 0.0, 0.1), "StudentT"),
        ],
        ids=["flat", "callable", "student-t"],
    )
    def test_other_priors_are_refused_with_the_remedy(self, three_topics_model, prior, kind):
        model = three_topics_model(prior=prior)
        with pytest.raises(ValueError, match=rf"'q_proj.lora_A' has {kind}\. Declare .*or use SVI"):
            declared_prior(model, self.NAMES)

    def test_sites_that_stay_points_may_have_any_prior(self, three_topics_model):
        model = three_topics_model(prior={"*.lora_A": dist.Normal(0.0, 0.2), "*.lora_B": Flat()})
        assert set(declared_prior(model, ("q_proj.lora_A",))) == {"q_proj.lora_A"}
