"""Antithetic and stratified draws: exact identities of a set of draws, unbiased moments, and smaller errors."""

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import FullCovariance, KroneckerNormal, LowRank, MeanField, Point, build_guide
from pyrolora.guides.samplers import SAMPLERS, draws_of
from pyrolora.inference import posterior as posterior_module
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import DRAWS_A_ROUND, Predictive, monte_carlo_error
from pyrolora.models.adapters import LoRA
from pyrolora.models.sites import Site
from pyrolora.models.trunk import TrunkCache

SITE = Site("x", torch.Size((2, 3, 4)), ("layer", "out", "in"), ("a", "b"))
NORMALS = [MeanField(), LowRank(rank=2), FullCovariance(), KroneckerNormal(rank=2)]
# chance that a test of moments fails although the draws are right: |z| > 5.5 in any of 24 weights, two-sided, 12 tests
FALSE_ALARM_RATE = 2e-5
MOST_STANDARD_ERRORS = 5.5


def distribution_of(family):
    prior = dist.Normal(0.0, torch.tensor(0.5, dtype=torch.float64)).expand(SITE.shape).to_event(3)
    return family.factor(SITE, torch.randn(SITE.shape, dtype=torch.float64), prior).distribution()


@pytest.mark.parametrize("family", NORMALS, ids=str)
def test_antithetic_pairs_mirror_at_the_mean(family):
    distribution = distribution_of(family)
    draws = draws_of(distribution, 7, "antithetic")
    assert draws.shape == (7, 2, 3, 4)
    for first in (0, 2, 4):
        torch.testing.assert_close(draws[first] + draws[first + 1], 2 * distribution.mean.detach())
    assert (draws[0] - draws[2]).abs().min() > 0


def test_strata_hold_one_value_each():
    distribution = distribution_of(MeanField())
    draws = draws_of(distribution, 8, "stratified")
    base = distribution.base_dist
    strata = (torch.special.ndtr((draws - base.loc) / base.scale) * 8).floor()
    assert torch.equal(
        strata.sort(0).values, torch.arange(8.0, dtype=torch.float64).reshape(8, 1, 1, 1).expand(8, 2, 3, 4)
    )
    assert not torch.equal(strata[:, 0, 0, 0], strata[:, 0, 0, 1]), "each weight has its own order"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", NORMALS, ids=str)
@torch.no_grad()
def test_every_single_draw_has_the_marginal_distribution(family, sampler):
    """The third of seven draws, over many repetitions; taken alone it must be as good as an independent one."""
    distribution, repetitions = distribution_of(family), 2000
    third = torch.stack([draws_of(distribution, 7, sampler)[3] for _ in range(repetitions)])
    variance = distribution.variance
    assert ((third.mean(0) - distribution.mean).abs() / (variance / repetitions).sqrt()).max() < MOST_STANDARD_ERRORS
    error = (third.var(0) - variance).abs() / (variance * (2 / repetitions) ** 0.5)
    assert error.max() < MOST_STANDARD_ERRORS


@pytest.mark.parametrize("sampler", ["antithetic", "stratified"])
def test_the_mean_of_draws_is_nearer_than_that_of_independent_ones(sampler):
    distribution = distribution_of(MeanField())
    plain, better = (draws_of(distribution, 10, name).mean(0) - distribution.mean for name in ("independent", sampler))
    # the mean of a Latin hypercube of 10 has about a tenth of the error; that of mirrored pairs has none
    assert better.detach().square().mean() < plain.detach().square().mean() / 10


def test_where_a_sampler_means_nothing_draws_are_independent():
    point = distribution_of(Point())
    for sampler in SAMPLERS:
        assert draws_of(point, 4, sampler).shape == (4, 2, 3, 4)
    assert draws_of(distribution_of(LowRank()), 4, "stratified").shape == (4, 2, 3, 4)


class TestPredicting:
    def posterior(self, three_topics_model, scale=0.2):
        model = three_topics_model(adapter=LoRA(rank=2, alpha=4.0, layers=(2,)))
        guide = build_guide(MeanField(init_scale=scale), model)
        return model, Posterior(model, guide, {})

    def test_an_unknown_sampler_is_refused(self, three_topics_model):
        model, posterior = self.posterior(three_topics_model)
        for ask in (posterior.sample, lambda *a, **k: posterior.predict(model.task.test, **k)):
            with pytest.raises(ValueError, match=r"Unknown sampler 'antithetc'. Did you mean 'antithetic'"):
                ask(3, sampler="antithetc")

    def test_antithetic_predictions_are_those_of_the_mirrored_draws(self, three_topics_model):
        model, posterior = self.posterior(three_topics_model)
        found = posterior.predict(
            model.task.test, draws=4, sampler="antithetic", generator=torch.Generator().manual_seed(3)
        ).probs
        draws = posterior.sample(4, sampler="antithetic", generator=torch.Generator().manual_seed(3))
        batch = model.encode(model.task.test).batch(list(range(9)))
        with torch.no_grad():
            wanted = model.logits(batch, draws).softmax(-1)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_drawing_stops_when_the_error_is_small(self, three_topics_model, sampler):
        model, posterior = self.posterior(three_topics_model)

        def predict(tolerance, draws=64):
            return posterior.predict(
                model.task.test,
                draws=draws,
                tolerance=tolerance,
                sampler=sampler,
                generator=torch.Generator().manual_seed(0),
            )

        coarse, fine = predict(0.05), predict(0.02)
        assert len(coarse.probs) < len(fine.probs) < 64
        assert len(fine.probs) % DRAWS_A_ROUND == 0
        assert torch.equal(coarse.probs, fine.probs[: len(coarse.probs)]), "a round more must not change the first ones"
        rounds = [Predictive(part, "mc") for part in fine.probs.split(DRAWS_A_ROUND)]
        assert monte_carlo_error(rounds, sampler) < 0.02 <= monte_carlo_error(rounds[:-1], sampler)
        assert len(predict(1e-9, draws=6).probs) == 6, "never more than were asked for"

    def test_few_units_have_no_standard_error(self):
        probs = torch.rand(16, 5, 3, generator=torch.Generator().manual_seed(0))
        for sampler, draws in (("independent", 4), ("antithetic", 8), ("stratified", 16)):
            rounds = [Predictive(part, "mc") for part in probs[:draws].split(DRAWS_A_ROUND)]
            assert monte_carlo_error(rounds, sampler) < 1
            assert len(rounds) == 1 or monte_carlo_error(rounds[:-1], sampler) == float("inf")

    def test_hidden_states_are_kept_only_where_more_draws_may_follow(self, three_topics_model, monkeypatch):
        model = three_topics_model(torch.float32, adapter=LoRA(rank=2, layers=(2,)))
        posterior = Posterior(model, build_guide(MeanField(init_scale=0.1), model), {})
        caches = []

        class Watched(TrunkCache):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                caches.append(self)

        monkeypatch.setattr(posterior_module, "TrunkCache", Watched)
        for tolerance in (None, 1e-9):
            posterior.predict(model.task.test, draws=8, tolerance=tolerance)
        once, again = ([row is not None for row in cache._rows] for cache in caches)
        assert not any(once)
        assert all(again)

    def test_draws_are_counted_and_samplers_need_them(self, three_topics_model):
        model, posterior = self.posterior(three_topics_model)
        for draws in (0, 2.5, 10.0, float("nan"), None, "3"):
            with pytest.raises(ValueError, match="at least one draw, a whole number; got"):
                posterior.predict(model.task.test, draws=draws)
        with pytest.raises(ValueError, match="spreads weight draws, and kind='mean' takes none"):
            posterior.predict(model.task.test, kind="mean", sampler="antithetic")

    def test_a_tolerance_without_draws_is_refused(self, three_topics_model):
        model, posterior = self.posterior(three_topics_model)
        for settings in ({"kind": "mean", "tolerance": 0.1}, {"tolerance": 0.0}):
            with pytest.raises(ValueError, match="A tolerance must be positive and needs kind='mc'"):
                posterior.predict(model.task.test, **settings)

    def test_the_error_is_the_standard_error_of_independent_draws(self):
        probs = torch.rand(12, 5, 3)
        wanted = (probs.var(0) / 12).sqrt().mean()
        found = monte_carlo_error([Predictive(part, "mc") for part in probs.split(4)], "independent")
        assert found == pytest.approx(float(wanted))
        assert monte_carlo_error([Predictive(probs[:1], "mc")], "independent") == float("inf")
