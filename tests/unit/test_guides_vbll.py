"""Posteriors of a last layer: densities, KLs, draws and logit moments against explicit matrices and torch, in float64."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyrolora.guides import (
    BlockCovariance,
    ClassContrasts,
    FullCovariance,
    KroneckerNormal,
    LowRank,
    LowRankPrecision,
    MatrixNormal,
    MeanField,
    Point,
    build_guide,
    logit_moments,
)
from pyrolora.guides.low_rank import LowRankNormal
from pyrolora.guides.low_rank_precision import LowRankPrecisionNormal
from pyrolora.guides.projection import projected_covariance
from pyrolora.models.adapters import LastLayer
from pyrolora.models.sites import Site

CLASSES, WEIGHTS, SCALE = 3, 7, 0.7
SITE = Site("head.weight", torch.Size((CLASSES, WEIGHTS)), ("class", "feature"))
PRIOR = dist.Normal(torch.full((), 0.2, dtype=torch.float64), SCALE).expand(SITE.shape).to_event(2)
FAMILIES = [
    MeanField(), LowRank(3), LowRankPrecision(3), LowRankPrecision(20), BlockCovariance(), MatrixNormal(), FullCovariance(),
    KroneckerNormal(2), ClassContrasts(),
]  # fmt: skip


def random_factor(family):
    start = torch.randn(SITE.shape, dtype=torch.float64)
    factor = family.factor(SITE, start, PRIOR)
    with torch.no_grad():
        for parameter in factor.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return factor


def covariance_of(q):
    """All of a posterior's covariance, by projecting every pair of weights."""
    eye = torch.eye(CLASSES * WEIGHTS, dtype=torch.float64).reshape(-1, 1, CLASSES, WEIGHTS)
    return projected_covariance(q, eye)[0]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies:
    def test_density_entropy_and_kl_are_those_of_the_explicit_normal(self, family):
        q = random_factor(family).distribution()
        explicit = torch.distributions.MultivariateNormal(q.mean.flatten(), covariance_of(q))
        value = torch.randn(5, CLASSES, WEIGHTS, dtype=torch.float64)
        prior = torch.distributions.MultivariateNormal(
            torch.full((CLASSES * WEIGHTS,), 0.2, dtype=torch.float64),
            SCALE**2 * torch.eye(CLASSES * WEIGHTS, dtype=torch.float64),
        )
        assert (q.log_prob(value) - explicit.log_prob(value.flatten(1))).abs().max() < 1e-9
        assert abs(q.entropy() - explicit.entropy()) < 1e-10
        divergence = kl_divergence(q, PRIOR)
        assert abs(divergence - kl_divergence(explicit, prior)) < 1e-10
        assert divergence > 0

    def test_draws_have_the_covariance_that_is_claimed(self, family):
        q = random_factor(family).distribution()
        draws = q.rsample((40_000,)).flatten(1).detach()
        explicit = covariance_of(q).detach()
        sizes = explicit.diagonal().sqrt()
        # 231 correlations with a standard error of at most sqrt(2 / 40000) = 0.7 %: six of them, 1 run in 10^6
        assert ((draws.T.cov() - explicit) / sizes[:, None] / sizes).abs().max() < 0.045
        assert ((draws.mean(0) - q.mean.flatten()) / sizes).abs().max() < 0.035

    def test_logit_moments_are_those_of_the_explicit_normal(self, family):
        q = random_factor(family).distribution()
        features = torch.randn(4, WEIGHTS, dtype=torch.float64)
        moments = logit_moments(q, features)
        covariance = covariance_of(q).reshape(CLASSES, WEIGHTS, CLASSES, WEIGHTS)
        explicit = torch.einsum("nd,cdke,ne->nck", features, covariance, features)
        assert (moments.mean - features @ q.mean.mT).abs().max() < 1e-12
        assert (moments.covariance - explicit).abs().max() < 1e-10
        assert (moments.variance - explicit.diagonal(dim1=-2, dim2=-1)).abs().max() < 1e-10
        vectors = torch.randn(4, CLASSES, dtype=torch.float64)
        assert (moments.times(vectors) - (explicit @ vectors[..., None])[..., 0]).abs().max() < 1e-10

    def test_marginal_moments_are_those_of_the_explicit_normal(self, family):
        factor = random_factor(family)
        variance = covariance_of(factor.distribution()).diagonal().reshape(SITE.shape)
        expected = factor.mean().square() + variance
        assert (factor.second_moment() - expected).abs().max() < 1e-10

    def test_the_analytic_elbo_is_the_mean_of_the_sampled_one(self, family, three_topics_model):
        model = three_topics_model(adapter=LastLayer(), prior=dist.Normal(0.0, 0.3))
        guide = build_guide(family, model)
        batch = next(iter(model.encode(model.task.train).batches(12)))
        features = model.backbone.features(batch)
        model.backbone.features = lambda batch, **kwargs: features
        with torch.no_grad():
            losses = torch.tensor([Trace_ELBO().loss(model, guide, batch) for _ in range(400)])
            analytic = torch.tensor([TraceMeanField_ELBO().loss(model, guide, batch) for _ in range(400)])
        error = (losses.var() / 400 + analytic.var() / 400).sqrt()
        # a difference of five standard errors: 1 run in 10^6
        assert (losses.mean() - analytic.mean()).abs() < 5 * error


class TestLowRankPrecision:
    def test_it_survives_the_size_at_which_a_determinant_overflows(self):
        site = Site("head.weight", torch.Size((2, 4096)), ("class", "feature"))
        prior = dist.Normal(0.0, 1e-2).expand(site.shape).to_event(2)
        factor = LowRankPrecision(50).factor(site, torch.zeros(site.shape), prior)
        with torch.no_grad():
            factor.factor.mul_(30)
        q = factor.distribution()
        assert q.entropy().isfinite()
        assert kl_divergence(q, prior).isfinite()
        low_rank = LowRankNormal(torch.zeros(2, 4096), torch.randn(2, 4096, 50), torch.full((2, 4096), 1e-4))
        assert low_rank.entropy().isfinite()

    def test_nothing_learned_is_the_prior(self):
        zero = torch.zeros(SITE.shape, dtype=torch.float64)
        q = LowRankPrecisionNormal(zero + 0.2, zero[..., None], zero - 2 * torch.tensor(SCALE).log())
        assert kl_divergence(q, PRIOR).abs() < 1e-7


class TestRefusals:
    def test_a_dense_covariance_that_would_not_fit_names_its_memory(self):
        site = Site("head.weight", torch.Size((4, 4096)), ("class", "feature"))
        with pytest.raises(ValueError, match=r"4 covariances of 4096 x 4096: 256 MiB, 1\.0 GiB.*LowRankPrecision"):
            BlockCovariance().factor(site, torch.zeros(site.shape), PRIOR)
        wide = Site("head.weight", torch.Size((4, 8192)), ("class", "feature"))
        with pytest.raises(ValueError, match=r"8192 x 8192: 256 MiB\. Use LowRankPrecision"):
            MatrixNormal().factor(wide, torch.zeros(wide.shape), PRIOR)

    @pytest.mark.parametrize("family", [BlockCovariance(), LowRankPrecision(), MatrixNormal()], ids=str)
    def test_a_site_that_is_no_matrix(self, family):
        site = Site("q_proj.lora_A", torch.Size((3, 2, 8)), ("layer", "rank", "in_feature"))
        with pytest.raises(ValueError, match=r"needs a matrix of real weights such as head\.weight"):
            family.factor(site, torch.zeros(site.shape), PRIOR)

    def test_settings_out_of_range(self):
        with pytest.raises(ValueError, match="rank of a LowRankPrecision guide must be at least 1; got 0"):
            LowRankPrecision(rank=0)
        for family in (BlockCovariance, LowRankPrecision, MatrixNormal):
            with pytest.raises(ValueError, match="init_scale is a standard deviation and must be positive"):
                family(init_scale=0.0)

    def test_a_posterior_without_moments_names_those_that_have_them(self):
        with pytest.raises(TypeError, match="logits of a StudentT have no closed-form moments"):
            logit_moments(dist.StudentT(3.0).expand(SITE.shape).to_event(2), torch.zeros(1, WEIGHTS))

    def test_a_point_has_moments_without_spread(self):
        factor = Point().factor(SITE, torch.ones(SITE.shape), PRIOR)
        moments = logit_moments(factor.distribution(), torch.ones(2, WEIGHTS))
        assert moments.mean.tolist() == [[7.0] * 3] * 2
        assert not moments.spread.any()
