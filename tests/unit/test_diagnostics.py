"""k-hat, leave-one-out, layers and predictive checks; oracles: closed forms, numpy's refits, ArviZ, direct sums."""

import math

import arviz
import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray
from scipy import stats

from pyrolora.guides import BLoB, FullCovariance, LowRank, MeanField, Point, build_guide
from pyrolora.inference import diagnostics
from pyrolora.inference.diagnostics import (
    compare_loo,
    layer_summary,
    loo,
    pareto_smooth,
    posterior_khat,
    posterior_predictive_check,
)
from pyrolora.inference.diagnostics.importance import threshold
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import Predictive, log_likelihood
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.tasks import Split

NORMAL = dist.Normal(0.0, 0.3)


@pytest.fixture
def head(three_topics_model):
    """A last layer of 3 x 32 weights with the posterior of a mean-field fit long enough to be one."""
    model = three_topics_model(torch.float64, LastLayer(), NORMAL)
    engine = SVI(
        guide=MeanField(), steps=400, batch_size=12, learning_rate=0.02, scale_learning_rate=0.02, noise="weight"
    )
    return engine.fit(model, model.task.train, progress=False)


def posterior_of(model, guide, **record):
    return Posterior(model, build_guide(guide, model), record)


class TestKhat:
    def test_smoothing_is_arvizs_and_equal_ratios_are_the_truth(self):
        ratios = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
        weights, khat = pareto_smooth(ratios)
        expected, shape = arviz.psislw(ratios.numpy())
        np.testing.assert_allclose(weights, expected - np.logaddexp.reduce(expected), atol=1e-10)
        assert khat == pytest.approx(float(shape))
        assert float(weights.logsumexp(0)) == pytest.approx(0, abs=1e-12)
        same, none = pareto_smooth(torch.zeros(200))
        assert none == -math.inf
        assert float(same.exp().sum()) == pytest.approx(1)
        assert threshold(100) == 0.5
        assert threshold(100_000) == 0.7

    def test_a_fitted_last_layer_is_close_and_a_narrow_one_is_not(self, head):
        good = posterior_khat(head, head.model.task.train, sites="head.weight", draws=2000)
        assert good.dimensions == 96
        assert good.good, str(good)
        # the labels say little, so the prior is nearly the posterior and a third of its width is far too narrow
        narrow = posterior_of(head.model, MeanField(0.1))
        bad = posterior_khat(narrow, head.model.task.train, sites="head.weight", draws=2000)
        assert not bad.good
        assert bad.khat > good.khat + 0.3
        assert "not close to the true posterior" in str(bad)

    def test_one_layer_is_conditional_on_the_rest(self, three_topics_model):
        model = three_topics_model(torch.float64, LoRA(rank=1, layers=(0, 1, 2)), NORMAL)
        posterior = posterior_of(model, MeanField(0.3))
        whole = posterior_khat(posterior, model.task.train, sites="q_proj.lora_A", draws=200)
        one = posterior_khat(posterior, model.task.train, sites="q_proj.lora_A", layer=1, draws=200)
        assert (whole.dimensions, one.dimensions) == (96, 32)
        # written out: one layer drawn, everything else at its mean
        values = {name: value.expand(200, *value.shape).clone() for name, value in posterior.mean().items()}
        drawn = posterior.sample(200, generator=torch.Generator().manual_seed(0))["q_proj.lora_A"][:, 1]
        values["q_proj.lora_A"][:, 1] = drawn
        mean = posterior.mean()["q_proj.lora_A"][1]
        log_p = log_likelihood(model, model.task.train, values).sum(1)
        log_p = log_p + torch.distributions.Normal(0.0, 0.3).log_prob(drawn).flatten(1).sum(1)
        log_q = torch.distributions.Normal(mean, 0.3).log_prob(drawn).flatten(1).sum(1)
        # the guide's scale passes through float32
        assert one.khat == pytest.approx(pareto_smooth(log_p - log_q)[1], abs=1e-4)

    def test_layers_of_low_rank_are_independent_and_dependent_ones_are_refused(self, three_topics_model):
        model = three_topics_model(torch.float64, LoRA(rank=1, layers=(0, 1), targets=["q_proj"]), NORMAL)
        patterns = {"*.lora_A": LowRank(2, 0.3), "*.lora_B": Point()}
        posterior_khat(posterior_of(model, patterns), model.task.train, sites="*.lora_A", layer=1, draws=100)
        patterns = {"*.lora_A": FullCovariance(0.3), "*.lora_B": Point()}
        dependent = posterior_of(model, patterns)
        with torch.no_grad():
            for parameter in dict(dependent.guide.items())["q_proj.lora_A"].parameters():
                if parameter.dim() > 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        with pytest.raises(ValueError, match="depend on each other"):
            posterior_khat(dependent, model.task.train, sites="*.lora_A", layer=1, draws=100)

    @pytest.mark.parametrize(
        ("guide", "arguments", "message"),
        [
            (MeanField(0.1), {"sites": "k_proj.*"}, "No site matches"),
            (Point(), {"sites": "q_proj.*"}, "is a point in this posterior"),
            (MeanField(0.1), {"sites": "q_proj.lora_A", "layer": 7}, "has no layer 7; it has 0, 1, 2"),
            (MeanField(0.1), {"sites": "q_proj.lora_A", "draws": 50}, "at least 100 draws"),
        ],
    )
    def test_refusals(self, three_topics_model, guide, arguments, message):
        model = three_topics_model(torch.float32, LoRA(rank=2), NORMAL)
        with pytest.raises(ValueError, match=message):
            posterior_khat(posterior_of(model, guide), model.task.train, **arguments)

    def test_too_many_dimensions_and_priors_without_a_density(self, three_topics_model, monkeypatch):
        model = three_topics_model(torch.float32, LoRA(rank=2), NORMAL)
        monkeypatch.setattr(Posterior, "sample", lambda *args, **kwargs: pytest.fail("they were drawn"))
        monkeypatch.setattr(diagnostics.importance, "MOST_DIMENSIONS", 300)
        with pytest.raises(ValueError, match="k-hat of 384 dimensions would judge their number"):
            posterior_khat(posterior_of(model, MeanField(0.1)), model.task.train, sites="*.lora_A")
        model = three_topics_model(torch.float32, LoRA(rank=1), lambda site: dist.Normal(0.0, 0.1))
        with pytest.raises(ValueError, match="depends on other sites"):
            posterior_khat(posterior_of(model, MeanField(0.1)), model.task.train, sites="q_proj.lora_A")
        with pytest.raises(ValueError, match="3 of 200 are not finite"):
            pareto_smooth(torch.tensor([math.inf] * 3 + [0.0] * 197))


class TestLeaveOneOut:
    def test_it_equals_arvizs(self, head):
        train = head.model.task.train
        found = loo(head, train, draws=500)
        expected = arviz.loo(
            arviz.from_datatree(head.to_arviz(sites="head.weight", draws=500, data=train)), pointwise=True
        )
        assert found.elpd == pytest.approx(float(expected.elpd_loo), abs=1e-4)
        assert found.effective_parameters == pytest.approx(float(expected.p_loo), abs=1e-4)
        assert found.standard_error == pytest.approx(float(expected.se), rel=0.05), "divided by n - 1, not n"
        np.testing.assert_allclose(found.khat, expected.pareto_k.values, atol=1e-3)

    def test_the_correction_turns_another_width_into_the_same_posterior(self, head):
        """A posterior that is a little too wide, once corrected, gives the cross-validation of the right one."""
        train = head.model.task.train
        right = loo(head, train, draws=4000, corrected=True)
        wide = Posterior(head.model, build_guide(MeanField(0.33), head.model, start=head.mean()), {})
        plain, corrected = loo(wide, train, draws=4000), loo(wide, train, draws=4000, corrected=True)
        assert abs(corrected.elpd - right.elpd) < 0.35
        assert abs(plain.elpd - right.elpd) > 2 * abs(corrected.elpd - right.elpd)

    def test_comparison_is_arvizs_and_orders_by_fit(self, head):
        far = Posterior(head.model, build_guide(MeanField(3.0), head.model), {})
        table = compare_loo({"far": far, "fitted": head}, head.model.task.train, draws=300)
        assert table.index.tolist() == ["fitted", "far"]

    def test_refusals(self, head, three_topics_model):
        train = head.model.task.train
        point = posterior_of(head.model, Point())
        with pytest.raises(ValueError, match="cannot leave an example out"):
            loo(point, train)
        with pytest.raises(ValueError, match="'map' is a point estimate"):
            compare_loo({"a": head, "map": point}, train, draws=100)
        with pytest.raises(ValueError, match="at least two"):
            compare_loo({"a": head}, train)
        model = three_topics_model(torch.float32, LoRA(rank=8), NORMAL)
        with pytest.raises(ValueError, match="weighs draws in 2,688 dimensions"):
            loo(posterior_of(model, MeanField(0.1)), model.task.train, corrected=True)


class TestLayers:
    def test_shrinkage_and_signal_are_the_ratios_of_moments(self, three_topics_model):
        prior = {"*.lora_A": dist.Normal(0.0, 0.4), "*.lora_B": Flat()}
        model = three_topics_model(torch.float64, LoRA(rank=2, layers=(1, 2)), prior)
        posterior = posterior_of(model, BLoB(0.1))
        with torch.no_grad():
            dict(posterior.guide.items())["q_proj.lora_A"].loc[1].fill_(0.5)
        table = layer_summary(posterior)
        assert isinstance(table, xarray.Dataset)
        a = table.sel(site="q_proj.lora_A")
        # the guide's scale passes through float32
        np.testing.assert_allclose(a["shrinkage"], 1 - 0.1**2 / 0.4**2, rtol=1e-5)
        np.testing.assert_allclose(a["prior_sd"], 0.4, rtol=1e-6)
        assert float(a["signal_to_noise"].sel(layer=2)) == pytest.approx(5, rel=1e-5)
        b = table.sel(site="q_proj.lora_B")
        assert np.isnan(b["prior_sd"]).all()
        assert np.isnan(b["signal_to_noise"]).all()
        assert (b["posterior_sd"] < 1e-6).all()
        assert table["change_norm"].dims == ("projection", "layer")
        assert (table["change_norm"] == 0).all(), "B starts at zero"

    def test_a_site_without_layers_and_a_prior_without_variance(self, three_topics_model):
        prior = {"*.lora_*": NORMAL, "head.weight": dist.Cauchy(0.0, 1.0)}
        model = three_topics_model(torch.float32, [LoRA(rank=1, layers=(2,)), LastLayer()], prior)
        table = layer_summary(posterior_of(model, MeanField(0.1)))
        head = table.sel(site="head.weight")
        assert float(head["posterior_sd"].sel(layer=-1)) == pytest.approx(0.1, rel=1e-5)
        assert np.isnan(head["shrinkage"]).all()
        assert np.isnan(head["posterior_sd"].sel(layer=2))


class TestPredictiveChecks:
    def predictive(self, sharpness, rows=400):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return Predictive((sharpness * logits).softmax(-1).expand(5, -1, -1), "mc", labels)

    def test_a_right_model_passes_and_an_overconfident_one_does_not(self):
        right = posterior_predictive_check(self.predictive(1.0))
        assert set(right) == {"accuracy", "log_score", "share_of_0", "share_of_1", "share_of_2"}
        # five checks of a right model: one in 1e3 falls outside by chance, and the seed is fixed
        assert all(1e-4 < check.p_value < 1 - 1e-4 for check in right.values())
        over = posterior_predictive_check(self.predictive(4.0))
        assert over["log_score"].p_value > 0.99
        assert over["log_score"].observed < float(over["log_score"].replicated.min())

    def test_replicated_shares_are_binomial(self):
        probs = torch.tensor([0.2, 0.8]).expand(1, 50, 2)
        check = posterior_predictive_check(
            Predictive(probs, "mc", torch.zeros(50, dtype=torch.int64)), "share_of_0", replications=2000
        )["share_of_0"]
        assert check.observed == 1
        assert check.p_value == 0
        counts = (check.replicated * 50).round().long().tolist()
        # a true binomial fails this once in a thousand seeds, and the seed is fixed
        expected = stats.binom(50, 0.2).pmf(np.arange(51))
        cells = [slice(0, 7), slice(7, 9), slice(9, 11), slice(11, 13), slice(13, 51)]
        observed = np.bincount(counts, minlength=51)
        found = stats.chisquare([observed[c].sum() for c in cells], [2000 * expected[c].sum() for c in cells])
        assert found.pvalue > 1e-3

    def test_one_row_one_draw_and_own_statistics(self):
        predictive = Predictive(torch.tensor([[[0.5, 0.5]]]), "mean", torch.tensor([1]))
        found = posterior_predictive_check(predictive, {"sum": lambda labels, mean: labels.double().sum(-1)})
        assert found["sum"].observed == 1
        with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
            posterior_predictive_check(predictive, "acuracy")
        with pytest.raises(ValueError, match="without labels"):
            posterior_predictive_check(Predictive(predictive.probs, "mean"))
        with pytest.raises(ValueError, match="replications: got 0"):
            posterior_predictive_check(predictive, replications=0)


def test_simulated_labels_of_one_class_are_fitted_like_others(three_topics_model):
    model = three_topics_model(torch.float32, adapter=LastLayer(), prior=dist.Normal(0.0, 3.0))
    found = diagnostics.calibrate_engine(
        SVI(guide=MeanField(), steps=2, batch_size=2),
        model,
        model.encode(Split("train", "three_topics", model.task.train.examples[:2], 3)),
        simulations=20,
        draws=19,
        progress=False,
    )
    # two rows under so wide a prior agree in most simulations, and none of the twenty is refused
    assert len(found.ranks) == 20
