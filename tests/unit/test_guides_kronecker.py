"""KroneckerDistribution against a dense MultivariateNormal in float64, whole bases and truncated ones, and projections."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints, kl_divergence

from pyrolora.guides import FullCovariance, KroneckerNormal, LowRank, MeanField, Point
from pyrolora.guides.kronecker import KroneckerDistribution
from pyrolora.guides.projection import is_normal, projected_covariance
from pyrolora.models.sites import Site

ENTRIES, ROWS, COLUMNS = 3, 2, 5
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# chance that the sample-moment test fails although the sampler is right: z of 5.5 over fewer than 400 comparisons
FALSE_ALARM_RATE = 2e-5
MOST_STANDARD_ERRORS = 5.5
DRAWS = 20_000


def orthonormal(side, kept):
    return torch.linalg.qr(torch.randn(ENTRIES, side, side, dtype=torch.float64)).Q[..., :kept]


@pytest.fixture(params=[(ROWS, COLUMNS), (1, 3)], ids=["whole", "truncated"])
def kronecker(request):
    out_kept, in_kept = request.param
    return KroneckerDistribution(
        torch.randn(ENTRIES, ROWS, COLUMNS, dtype=torch.float64),
        orthonormal(ROWS, out_kept),
        orthonormal(COLUMNS, in_kept),
        torch.rand(ENTRIES, out_kept, in_kept, dtype=torch.float64) + 0.1,
        torch.rand(ENTRIES, 1, 1, dtype=torch.float64) + 0.1,
        torch.Size((ENTRIES, ROWS, COLUMNS)),
    )


def oracles(q):
    """One dense Normal an entry, its covariance summed direction by direction."""
    found = []
    for entry in range(ENTRIES):
        inside = torch.zeros(ROWS * COLUMNS, ROWS * COLUMNS, dtype=torch.float64)
        span = torch.zeros_like(inside)
        for i, u in enumerate(q.out_basis[entry].T):
            for j, v in enumerate(q.in_basis[entry].T):
                direction = u.outer(v).flatten()
                inside += q.scale[entry, i, j] ** 2 * direction.outer(direction)
                span += direction.outer(direction)
        outside = q.rest[entry, 0, 0] ** 2 * (torch.eye(ROWS * COLUMNS, dtype=torch.float64) - span)
        found.append(MultivariateNormal(q.loc[entry].flatten(), inside + outside))
    return found


@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 3)])
def test_log_prob(kronecker, sample_shape):
    value = torch.randn(*sample_shape, ENTRIES, ROWS, COLUMNS, dtype=torch.float64)
    wanted = sum(oracle.log_prob(value[..., i, :, :].flatten(-2)) for i, oracle in enumerate(oracles(kronecker)))
    assert kronecker.log_prob(value).shape == sample_shape
    torch.testing.assert_close(kronecker.log_prob(value), wanted, **EXACT)


def test_entropy_mean_and_marginal_variance(kronecker):
    dense = oracles(kronecker)
    torch.testing.assert_close(kronecker.entropy(), sum(oracle.entropy() for oracle in dense), **EXACT)
    wanted = torch.stack([oracle.variance for oracle in dense])
    torch.testing.assert_close(kronecker.variance.flatten(1), wanted, **EXACT)
    assert torch.equal(kronecker.mean, kronecker.loc)


def test_kl_to_a_factorised_normal(kronecker):
    loc = torch.randn(ENTRIES, ROWS, COLUMNS, dtype=torch.float64)
    scale = torch.rand(ENTRIES, ROWS, COLUMNS, dtype=torch.float64) + 0.3
    wanted = sum(
        kl_divergence(oracle, MultivariateNormal(loc[i].flatten(), scale[i].flatten().square().diag()))
        for i, oracle in enumerate(oracles(kronecker))
    )
    found = kl_divergence(kronecker, dist.Normal(loc, scale).to_event(3))
    torch.testing.assert_close(found, wanted, **EXACT)


def test_draws_have_the_dense_mean_and_covariance(kronecker):
    value = kronecker.rsample((DRAWS,)).flatten(2)
    for i, oracle in enumerate(oracles(kronecker)):
        covariance, variance = oracle.covariance_matrix, oracle.variance
        error = (value[:, i].mean(0) - oracle.mean).abs() / (variance / DRAWS).sqrt()
        assert error.max() < MOST_STANDARD_ERRORS
        spread = ((variance[:, None] * variance + covariance.square()) / DRAWS).sqrt()
        assert ((value[:, i].T.cov() - covariance).abs() / spread).max() < MOST_STANDARD_ERRORS


def test_a_batch_shape_is_refused(kronecker):
    assert kronecker.expand(()) is kronecker
    with pytest.raises(NotImplementedError, match="no batch shape"):
        kronecker.expand((2,))


class TestFamily:
    site = Site("x", torch.Size((ENTRIES, ROWS, COLUMNS)), ("layer", "out", "in"), ("a", "b", "c"))

    def made(self, family, site=None):
        site = self.site if site is None else site
        start = torch.randn(site.shape, dtype=torch.float64)
        prior = dist.Normal(0.0, torch.tensor(0.2, dtype=torch.float64)).expand(site.shape).to_event(len(site.shape))
        return family.factor(site, start, prior)

    @pytest.mark.parametrize("rank", [None, 1, 100])
    def test_the_width_starts_at_the_priors_own(self, rank):
        deviation = self.made(KroneckerNormal(rank=rank)).distribution().variance.sqrt()
        torch.testing.assert_close(deviation, torch.full_like(deviation, 0.2), **EXACT)

    def test_a_matrix_without_a_stack(self):
        site = Site("head.weight", torch.Size((ROWS, COLUMNS)), ("class", "feature"))
        factor = self.made(KroneckerNormal(), site)
        assert factor.distribution().sample((4,)).shape == (4, ROWS, COLUMNS)
        assert factor.mean().shape == factor.second_moment().shape == (ROWS, COLUMNS)

    @pytest.mark.parametrize(
        "site",
        [
            Site("x", torch.Size((4,)), ("weight",)),
            Site("x", torch.Size((2, 2)), ("a", "b"), support=constraints.positive),
        ],
        ids=["vector", "positive"],
    )
    def test_other_sites_are_refused(self, site):
        with pytest.raises(ValueError, match="KroneckerNormal needs matrices of real weights"):
            KroneckerNormal().factor(site, torch.ones(site.shape), dist.Normal(0.0, 1.0))

    def test_a_rank_below_one_is_refused(self):
        with pytest.raises(ValueError, match="must be at least 1; got 0"):
            KroneckerNormal(rank=0)

    @pytest.mark.parametrize(
        "family", [MeanField(), LowRank(rank=2), FullCovariance(), KroneckerNormal(), KroneckerNormal(rank=1)], ids=str
    )
    def test_projected_covariance_is_that_of_draws_in_every_direction(self, family):
        """``J Sigma J'`` from the family's own algebra against Sigma built from log densities: the Hessian of a Normal's
        log density is minus its precision."""
        factor = self.made(family)
        with torch.no_grad():
            for parameter in factor.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        distribution = factor.distribution()

        def log_prob(flat):
            return distribution.log_prob(flat.reshape(self.site.shape))

        precision = -torch.autograd.functional.hessian(log_prob, torch.zeros(self.site.numel, dtype=torch.float64))
        jacobian = torch.randn(4, 2, *self.site.shape, dtype=torch.float64)
        flat = jacobian.flatten(2)
        wanted = torch.einsum("cri,ij,drj->rcd", flat, torch.linalg.inv(precision), flat)
        torch.testing.assert_close(projected_covariance(distribution, jacobian).detach(), wanted, rtol=1e-7, atol=1e-9)
        assert is_normal(distribution)

    def test_what_is_not_normal_is_said_to_be(self):
        for distribution in (self.made(Point()).distribution(), dist.Laplace(torch.zeros(3), 1.0).to_event(1)):
            assert not is_normal(distribution)
        with pytest.raises(TypeError, match=r"covariance of a Gamma is not known.*register yours"):
            projected_covariance(dist.Gamma(1.0, 1.0), torch.zeros(1, 1))
