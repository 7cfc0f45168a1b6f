"""LowRankNormal and DenseNormal against torch's dense MultivariateNormal in float64, layer by layer."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.guides import FullCovariance, LowRank
from pyrolora.guides.full_covariance import DenseNormal
from pyrolora.guides.low_rank import LowRankNormal
from pyrolora.models.sites import Site

LAYERS, ROWS, COLUMNS, RANK = 3, 2, 5, 2
WEIGHTS = ROWS * COLUMNS
EXACT = {"rtol": 1e-10, "atol": 1e-10}

# chance that a sample-moment test fails although the sampler is right: z of 5.5 over fewer than 300 comparisons
FALSE_ALARM_RATE = 2e-5
MOST_STANDARD_ERRORS = 5.5
DRAWS = 20_000


@pytest.fixture
def low_rank():
    loc = torch.randn(LAYERS, ROWS, COLUMNS, dtype=torch.float64)
    factor = torch.randn(LAYERS, WEIGHTS, RANK, dtype=torch.float64)
    return LowRankNormal(loc, factor, torch.rand(LAYERS, WEIGHTS, dtype=torch.float64) + 0.1)


@pytest.fixture
def dense():
    root = torch.randn(WEIGHTS, WEIGHTS, dtype=torch.float64)
    tril = torch.linalg.cholesky(root @ root.T + torch.eye(WEIGHTS, dtype=torch.float64))
    return DenseNormal(torch.randn(ROWS, COLUMNS, dtype=torch.float64), tril)


@pytest.fixture
def prior():
    loc = torch.randn(LAYERS, ROWS, COLUMNS, dtype=torch.float64)
    return dist.Normal(loc, torch.rand(LAYERS, ROWS, COLUMNS, dtype=torch.float64) + 0.3).to_event(3)


def oracles(low_rank):
    """One dense Normal a layer."""
    return [
        MultivariateNormal(loc.flatten(), factor @ factor.T + diagonal.diag())
        for loc, factor, diagonal in zip(low_rank.loc, low_rank.cov_factor, low_rank.cov_diag, strict=True)
    ]


def factorised(prior, layer):
    base = prior.base_dist
    return MultivariateNormal(base.loc[layer].flatten(), base.scale[layer].flatten().square().diag())


class TestLowRankNormal:
    @pytest.mark.parametrize("sample_shape", [(), (4,), (2, 3)])
    def test_log_prob_is_the_sum_over_layers_of_the_dense_one(self, low_rank, sample_shape):
        value = torch.randn(*sample_shape, LAYERS, ROWS, COLUMNS, dtype=torch.float64)
        expected = sum(
            oracle.log_prob(value[..., layer, :, :].flatten(-2)) for layer, oracle in enumerate(oracles(low_rank))
        )
        assert low_rank.log_prob(value).shape == sample_shape
        torch.testing.assert_close(low_rank.log_prob(value), expected, **EXACT)

    def test_entropy(self, low_rank):
        expected = sum(oracle.entropy() for oracle in oracles(low_rank))
        torch.testing.assert_close(low_rank.entropy(), expected, **EXACT)

    def test_kl_to_a_factorised_normal(self, low_rank, prior):
        expected = sum(kl_divergence(q, factorised(prior, layer)) for layer, q in enumerate(oracles(low_rank)))
        torch.testing.assert_close(kl_divergence(low_rank, prior), expected, **EXACT)

    def test_marginal_variance(self, low_rank):
        expected = torch.stack([oracle.variance for oracle in oracles(low_rank)])
        torch.testing.assert_close(low_rank.variance.flatten(1), expected, **EXACT)

    def test_kl_to_another_family_is_left_to_sampling(self, low_rank):
        with pytest.raises(NotImplementedError):
            kl_divergence(low_rank, dist.Laplace(torch.zeros(LAYERS, ROWS, COLUMNS), 1.0).to_event(3))

    def test_a_batch_shape_is_refused(self, low_rank):
        assert low_rank.expand(()) is low_rank
        with pytest.raises(NotImplementedError, match="no batch shape"):
            low_rank.expand((2,))

    def test_draws_have_the_dense_mean_and_covariance(self, low_rank):
        value = low_rank.rsample((DRAWS,)).flatten(2)
        for layer, oracle in enumerate(oracles(low_rank)):
            check_moments(value[:, layer], oracle)

    def test_gradients_reach_all_parameters_through_a_draw(self, low_rank):
        parameters = [p.requires_grad_() for p in (low_rank.loc, low_rank.cov_factor, low_rank.cov_diag)]
        low_rank.rsample((2,)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)


class TestDenseNormal:
    def oracle(self, dense):
        return MultivariateNormal(dense.loc.flatten(), scale_tril=dense.scale_tril)

    def test_log_prob(self, dense):
        value = torch.randn(4, ROWS, COLUMNS, dtype=torch.float64)
        torch.testing.assert_close(dense.log_prob(value), self.oracle(dense).log_prob(value.flatten(1)), **EXACT)

    def test_kl_to_a_factorised_normal(self, dense, prior):
        one = dist.Normal(prior.base_dist.loc[0], prior.base_dist.scale[0]).to_event(2)
        expected = kl_divergence(self.oracle(dense), factorised(prior, 0))
        torch.testing.assert_close(kl_divergence(dense, one), expected, **EXACT)

    def test_marginal_variance(self, dense):
        torch.testing.assert_close(dense.variance.flatten(), self.oracle(dense).variance, **EXACT)

    def test_draws_have_the_dense_mean_and_covariance(self, dense):
        check_moments(dense.sample((DRAWS,)).flatten(1), self.oracle(dense))


def check_moments(value, oracle):
    covariance, variance = oracle.covariance_matrix, oracle.variance
    error = (value.mean(0) - oracle.mean).abs() / (variance / DRAWS).sqrt()
    assert error.max() < MOST_STANDARD_ERRORS
    # variance of a sample covariance of Normals: (s_ii s_jj + s_ij^2) / n
    spread = ((variance[:, None] * variance + covariance.square()) / DRAWS).sqrt()
    assert ((value.T.cov() - covariance).abs() / spread).max() < MOST_STANDARD_ERRORS


class TestFactors:
    site = Site("x", torch.Size((LAYERS, ROWS, COLUMNS)), ("layer", "row", "column"))

    def made(self, family):
        start = torch.randn(self.site.shape, dtype=torch.float64)
        prior = dist.Normal(0.0, torch.tensor(0.2, dtype=torch.float64)).expand(self.site.shape).to_event(3)
        return family.factor(self.site, start, prior)

    @pytest.mark.parametrize("family", [LowRank(rank=2), FullCovariance()], ids=str)
    def test_the_width_starts_at_the_priors_own(self, family):
        deviation = self.made(family).distribution().variance.sqrt()
        torch.testing.assert_close(deviation, torch.full_like(deviation, 0.2), rtol=1e-2, atol=0)

    @pytest.mark.parametrize("family", [LowRank(rank=2), FullCovariance()], ids=str)
    @pytest.mark.parametrize("rows", [1, 20])
    def test_one_step_of_adam_keeps_the_width_near_its_start_whatever_the_priors_scale_and_the_layers_size(
        self, family, rows
    ):
        site = Site("x", torch.Size((LAYERS, rows, COLUMNS)), ("layer", "row", "column"))
        for scale in (1e-3, 1.0):
            prior = dist.Normal(0.0, torch.tensor(scale, dtype=torch.float64)).expand(site.shape).to_event(3)
            factor = family.factor(site, torch.zeros(site.shape, dtype=torch.float64), prior)
            with torch.no_grad():  # Adam's first step is the rate itself, here all in one direction
                for name, role in factor.roles.items():
                    if role == "scale":
                        factor.get_parameter(name).add_(0.02)
            deviation = factor.distribution().variance.sqrt()
            torch.testing.assert_close(deviation, torch.full_like(deviation, scale), rtol=0.1, atol=0)

    def test_a_low_rank_entry_of_one_doubles_the_variance_along_its_column(self):
        factor = self.made(LowRank(rank=1))
        with torch.no_grad():
            factor.directions.fill_(1.0)
        low_rank = factor.distribution()
        along = torch.full((WEIGHTS,), WEIGHTS**-0.5, dtype=torch.float64)
        for oracle in oracles(low_rank):
            torch.testing.assert_close(along @ oracle.covariance_matrix @ along, torch.tensor(2 * 0.2**2).double())

    def test_building_a_low_rank_factor_leaves_the_random_state_alone(self):
        start, before = torch.zeros(self.site.shape), torch.get_rng_state()
        LowRank(init_scale=0.1).factor(self.site, start, dist.Normal(0.0, 1.0))
        assert torch.equal(before, torch.get_rng_state())

    def test_a_dense_factor_takes_over_a_cholesky_factor(self, dense):
        factor = FullCovariance().factor(
            Site("x", torch.Size((ROWS, COLUMNS)), ("a", "b")), dense.loc, dist.Normal(0.0, 1.0).expand([1])
        )
        factor.set_scale_tril(dense.scale_tril)
        torch.testing.assert_close(factor.scale_tril, dense.scale_tril, **EXACT)

    def test_a_site_too_large_for_a_dense_covariance_is_refused(self):
        site = Site("big", torch.Size((200, 200)), ("a", "b"))
        with pytest.raises(ValueError, match="40,000"):
            FullCovariance().factor(site, torch.zeros(200, 200), dist.Normal(0.0, 1.0))
