"""Bounds on expected log-likelihoods: order, tightness, gradients, solver and Monte Carlo, in float64."""

import pytest
import torch

from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.vbll.objectives import (
    BOUNDS,
    Objective,
    bohning,
    bouchard,
    gauss_hermite,
    jensen,
    optimal_tilt,
    sampled,
    tightest,
    tilted,
    tilted_at,
)


def random_moments(examples, classes, size, joint=False):
    mean = 2 * torch.randn(examples, classes, dtype=torch.float64)
    root = torch.randn(examples, classes, classes, dtype=torch.float64) * (size / classes) ** 0.5
    spread = root @ root.mT
    return LogitMoments(mean, spread if joint else spread.diagonal(dim1=-2, dim2=-1).contiguous())


def exact_binary(moments):
    """E[logsumexp] of two independent logits by adaptive quadrature of the difference."""
    from scipy.integrate import quad
    from scipy.special import log_expit
    from scipy.stats import norm

    values = []
    for mean, variance in zip(moments.mean.tolist(), moments.variance.tolist(), strict=True):
        loc, scale = mean[1] - mean[0], sum(variance) ** 0.5
        value, _ = quad(lambda t, loc=loc, scale=scale: -log_expit(-loc - scale * t) * norm.pdf(t), -40, 40, limit=500)
        values.append(mean[0] + value)
    return torch.tensor(values, dtype=torch.float64)


def sampled_lse(moments, draws=200_000):
    """Antithetic Monte Carlo, and its standard error."""
    noise = torch.randn(draws, *moments.mean.shape, dtype=torch.float64)
    away = moments.variance.sqrt() * noise
    pairs = 0.5 * ((moments.mean + away).logsumexp(-1) + (moments.mean - away).logsumexp(-1))
    return pairs.mean(0), pairs.std(0) / draws**0.5


class TestBounds:
    @pytest.mark.parametrize("size", [0.1, 1.0, 4.0, 16.0])
    def test_two_classes_against_exact_integrals(self, size):
        moments = random_moments(10, 2, size)
        exact = exact_binary(moments)
        assert (gauss_hermite(moments) - exact).abs().max() < (1e-7 if size <= 4 else 1e-3)
        for bound in (tilted, bohning, bouchard, tightest, jensen):
            assert (bound(moments) >= exact - 1e-9).all()
        assert (tilted(moments) <= jensen(moments) + 1e-12).all()
        # what the tilt is for: several times closer than Jensen wherever variances are moderate
        if size <= 1:
            assert (tilted(moments) - exact).mean() < 0.2 * (jensen(moments) - exact).mean()

    @pytest.mark.parametrize("size", [0.5, 4.0, 30.0])
    def test_five_classes_against_sampling(self, size):
        moments = random_moments(8, 5, size)
        exact, error = sampled_lse(moments)
        for bound in (tilted, bohning, bouchard, tightest, jensen):
            assert (bound(moments) >= exact - 6 * error).all()
        assert (tightest(moments) <= torch.minimum(tilted(moments), bouchard(moments)) + 1e-12).all()

    def test_correlated_logits_against_sampling(self):
        moments = random_moments(6, 4, 3.0, joint=True)
        root = torch.linalg.cholesky(moments.spread)
        noise = torch.randn(200_000, 6, 4, dtype=torch.float64)
        values = (moments.mean + (root @ noise[..., None])[..., 0]).logsumexp(-1)
        exact, error = values.mean(0), values.std(0) / 200_000**0.5
        for bound in (tilted, bohning, jensen):
            assert (bound(moments) >= exact - 6 * error).all()
        assert (tilted(moments) < jensen(moments)).all()
        # the shared part of the logits costs nothing once the covariance is known
        shifted = LogitMoments(moments.mean, moments.spread + 5.0)
        assert (tilted(shifted) - tilted(moments)).abs().max() < 1e-4
        assert (jensen(shifted) - jensen(moments)).min() > 2.4

    @pytest.mark.parametrize("name", [name for name in BOUNDS if name != "gauss_hermite"])
    def test_shift_one_class_and_no_variance(self, name):
        bound, moments = BOUNDS[name], random_moments(5, 3, 2.0)
        moved = LogitMoments(moments.mean + 3.0, moments.spread)
        assert (bound(moved) - bound(moments) - 3.0).abs().max() < 1e-8
        if name not in ("bouchard",):
            still = LogitMoments(moments.mean, torch.zeros_like(moments.spread))
            assert (bound(still) - moments.mean.logsumexp(-1)).abs().max() < 1e-12
        if name in ("jensen", "tilted"):
            single = LogitMoments(moments.mean[:, :1], moments.spread[:, :1])
            expected = single.mean[:, 0] + (0.5 * single.spread[:, 0] if name == "jensen" else 0.0)
            assert (bound(single) - expected).abs().max() < 1e-9

    def test_a_tilt_of_zero_is_jensen(self):
        moments = random_moments(5, 4, 3.0)
        assert torch.equal(tilted_at(moments, torch.zeros(5, 4, dtype=torch.float64)), jensen(moments))

    def test_gradients_in_the_variance_are_the_curvatures_they_stand_for(self):
        mean, spread = random_moments(6, 4, 2.0)
        moments = LogitMoments(mean.requires_grad_(), spread.requires_grad_())
        tilt = optimal_tilt(moments)
        by_mean, by_variance = torch.autograd.grad(tilted(moments).sum(), (mean, spread))
        assert (by_variance - 0.5 * tilt * (1 - tilt)).abs().max() < 1e-10
        assert (by_mean - tilt).abs().max() < 1e-9
        by_variance = torch.autograd.grad(jensen(moments).sum(), spread)[0]
        assert (by_variance - 0.5 * (mean + 0.5 * spread).softmax(-1)).abs().max() < 1e-10


class TestSolver:
    @pytest.mark.parametrize("variance", [1.0, 4.0, 16.0, 64.0, 256.0])
    def test_the_damped_fixed_point_never_gets_worse(self, variance):
        moments = LogitMoments(2 * torch.randn(20, 5, dtype=torch.float64), torch.full((20, 5), variance).double())
        values = torch.stack([tilted_at(moments, optimal_tilt(moments, steps)) for steps in range(0, 60, 3)])
        assert (values.diff(dim=0) < 1e-10).all()

    @pytest.mark.parametrize("variance", [1.0, 16.0, 64.0])
    def test_it_converges_within_200_steps(self, variance):
        moments = LogitMoments(2 * torch.randn(20, 5, dtype=torch.float64), torch.full((20, 5), variance).double())
        excess = tilted_at(moments, optimal_tilt(moments, 200)) - tilted_at(moments, optimal_tilt(moments, 20_000))
        assert excess.max() < 1e-3

    def test_undamped_it_would_oscillate(self):
        """Why it is damped: with Jensen for a start the plain iteration ends in a cycle."""
        moments = LogitMoments(torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 9.0).double())
        moments.mean[0, 0] = 1.0
        tilt, base = torch.zeros(1, 2, dtype=torch.float64), moments.mean + 0.5 * moments.variance
        for _ in range(200):
            before, tilt = tilt, (base - moments.times(tilt)).softmax(-1)
        assert (tilt - before).abs().max() > 0.1
        assert tilted_at(moments, tilt) > tilted(moments) + 0.5


class TestSampling:
    def test_it_is_right_on_average_and_its_error_falls_with_the_root_of_the_draws(self):
        moments = random_moments(2000, 4, 2.0)
        exact = sampled_lse(LogitMoments(moments.mean[:1], moments.spread[:1]))[0]
        many = LogitMoments(moments.mean[:1].expand(4000, -1), moments.spread[:1].expand(4000, -1))
        few, more = sampled(many, 8), sampled(many, 128)
        assert abs(few.mean() - exact) < 5 * few.std() / 4000**0.5 + 1e-3
        # a ratio of two standard deviations of 4000 values each is known to 1.6 %: ten of them
        assert float(few.std() / more.std()) == pytest.approx(4.0, rel=0.16)

    def test_correlated_and_independent_draws_agree(self):
        moments = random_moments(1, 3, 2.0)
        joint = LogitMoments(moments.mean, moments.covariance)
        torch.manual_seed(1)
        first = sampled(moments, 2000)
        torch.manual_seed(1)
        assert (sampled(joint, 2000) - first).abs().max() < 1e-4


def test_objectives_take_labels_and_names():
    moments = random_moments(4, 3, 1.0)
    labels = torch.tensor([0, 1, 2, 1])
    expected = moments.mean[range(4), labels] - tilted(moments)
    assert torch.equal(Objective("tilted")(moments, labels), expected)
    with pytest.raises(ValueError, match=r"Unknown objective 'tilt'\. Did you mean 'tilted'"):
        Objective("tilt")
    with pytest.raises(ValueError, match=r"Quadrature is for two classes; these data have 3\. Use 'tilted'"):
        Objective("gauss_hermite")(moments, labels)
