"""Laplace posteriors: widths, covariances and predictions against dense linear algebra, and what the engine refuses."""

import logging

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import BLoB, Point, build_guide
from pyrolora.inference.laplace import Laplace, LaplacePosterior
from pyrolora.inference.laplace import engine as laplace_engine
from pyrolora.inference.laplace.curvature import LogitGradients, diagonal_curvature, full_curvature
from pyrolora.inference.laplace.engine import CurvatureFit, logit_covariance
from pyrolora.inference.laplace.precision import LOG_PRECISION_BOUNDS, declared_prior
from pyrolora.inference.laplace.predictive import LOGIT_DRAWS, softmax_draws
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.priors import Flat

LORA = LoRA(rank=2, alpha=4.0, layers=(1, 2))
NORMAL = dist.Normal(0.0, 0.5)  # a precision of 4


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(adapter=[LORA, LastLayer()], prior=NORMAL)


def point_at(model, scale=0.2):
    """A point posterior away from zero, as a MAP fit would return it."""
    generator = torch.Generator().manual_seed(1)
    start = {
        name: scale * torch.randn(site.shape, generator=generator, dtype=torch.float64)
        for name, site in model.sites.items()
    }
    return Posterior(model, build_guide(Point(), model, start=start), {"engine": "MAP", "seed": 3})


def fitted(model, estimate=None, **settings):
    validation = model.task.validation if settings.get("precision") == "validation" else None
    estimate = point_at(model) if estimate is None else estimate
    return Laplace(**settings).fit(model, model.task.train, progress=False, estimate=estimate, validation=validation)


def test_diagonal_sd_is_one_over_root_curvature_plus_precision(model):
    estimate = point_at(model)
    gradients = LogitGradients(model, estimate.mean(), tuple(model.sites))
    curvature = diagonal_curvature(gradients, model.encode(model.task.train).batches(16))
    posterior = fitted(model, estimate, structure="diag")
    draws = posterior.sample(4000, generator=torch.Generator().manual_seed(0))
    for name, factor in posterior.guide.items():
        wanted = (curvature[name] + 4.0).rsqrt()
        assert wanted.min() < 0.95 * wanted.max(), "data that say nothing would make this the prior's sd"
        torch.testing.assert_close(factor.scale, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(posterior.mean()[name], estimate.mean()[name], rtol=0, atol=0)
        # the sd of 4000 draws is 1.1 % off; the largest of some 300 such errors stays below 6 of them
        torch.testing.assert_close(draws[name].std(0), wanted, rtol=0.067, atol=0)


def test_last_layer_covariance_is_the_inverse_of_the_dense_precision(model):
    estimate = point_at(model)
    gradients = LogitGradients(model, estimate.mean(), ("head.weight",))
    curvature = full_curvature(gradients, model.encode(model.task.train).batches(16))["head.weight"]
    wanted = torch.linalg.inv(curvature + 4.0 * torch.eye(len(curvature), dtype=torch.float64))
    posterior = fitted(model, estimate, structure="last_layer")
    factors = dict(posterior.guide.items())
    root = factors["head.weight"].scale_tril
    torch.testing.assert_close(root @ root.mT, wanted, rtol=0, atol=1e-9 * float(wanted.max()))
    assert (wanted - wanted.diagonal().diag()).abs().max() > 1e-3 * wanted.max()
    assert posterior.guide.parameters_by_role()["scale"] == [
        factors["head.weight"].log_diag,
        factors["head.weight"].lower,
    ]
    torch.testing.assert_close(posterior.mean()["q_proj.lora_A"], estimate.mean()["q_proj.lora_A"], rtol=0, atol=0)


@pytest.mark.parametrize("structure", ["diag", "last_layer"])
def test_logit_covariance_is_j_sigma_j(model, structure):
    posterior = fitted(model, structure=structure)
    names = tuple(model.sites) if structure == "diag" else ("head.weight",)
    encoded = model.encode(model.task.test)
    batch = encoded.batch(list(range(5)))
    gradients = LogitGradients(model, posterior.mean(), names)
    _, jacobian = gradients.jacobian(batch)
    factors = dict(posterior.guide.items())
    wanted = torch.zeros(5, 3, 3, dtype=torch.float64)
    scales = {}
    for name in names:
        factor = factors[name]
        scales[name] = (factor.scale if structure == "diag" else factor.scale_tril).detach()
        sigma = scales[name].flatten().square().diag() if structure == "diag" else scales[name] @ scales[name].mT
        flat = jacobian[name].flatten(2).transpose(0, 1)
        wanted += torch.einsum("rci,ij,rdj->rcd", flat, sigma, flat)
    torch.testing.assert_close(logit_covariance(jacobian, scales.__getitem__), wanted, rtol=1e-9, atol=1e-12)
    # and the engine's own fit, on which the validation search runs, says the same
    curvature = (diagonal_curvature if structure == "diag" else full_curvature)(
        gradients, model.encode(model.task.train).batches(16)
    )
    fit = CurvatureFit(structure, posterior.mean(), curvature, declared_prior(model, names))
    torch.testing.assert_close(fit.logit_covariances([1.0])(jacobian)[:, 0], wanted, rtol=1e-6, atol=1e-10)
    doubled = fit.rescaled(2.0).logit_covariances([1.0])(jacobian)
    torch.testing.assert_close(fit.logit_covariances([1.0, 2.0])(jacobian)[:, 1:], doubled)


def test_linearised_predictions_push_gaussian_logits_through_the_softmax(model):
    posterior = fitted(model, structure="diag")
    batch = model.encode(model.task.test).batch(list(range(4)))
    names = tuple(model.sites)
    mean, jacobian = LogitGradients(model, posterior.mean(), names).jacobian(batch)
    scales = {name: factor.scale.detach() for name, factor in posterior.guide.items()}
    covariance = logit_covariance(jacobian, scales.__getitem__)
    root = torch.linalg.cholesky(covariance)
    normal = torch.randn(100_000, 4, 3, 1, dtype=torch.float64)
    wanted = (mean + (root @ normal)[..., 0]).softmax(-1)
    found = posterior.predict(batch, generator=torch.Generator().manual_seed(0))
    assert (found.kind, found.probs.shape) == ("linearised", (LOGIT_DRAWS, 4, 3))
    torch.testing.assert_close(found.mean_probs.double(), wanted.mean(0), rtol=0, atol=0.02)
    plain = posterior.predict(batch, kind="mean").mean_probs
    assert (plain - found.mean_probs).abs().max() > 0.03, (
        "the covariance must matter for the comparison to mean anything"
    )


def test_softmax_draws_have_the_moments_of_monte_carlo():
    mean = torch.tensor([[0.5, -1.0, 0.2], [2.0, 0.0, -2.0]], dtype=torch.float64)
    root = torch.tensor(
        [[[1.0, 0, 0], [0.6, 0.8, 0], [-0.5, 0.3, 0.4]], [[0.1, 0, 0], [0, 2.0, 0], [0, 0, 1.0]]]
    ).double()
    found = softmax_draws(mean, root @ root.mT, torch.Generator().manual_seed(0))
    brute = (mean + (root @ torch.randn(200_000, 2, 3, 1, dtype=torch.float64))[..., 0]).softmax(-1)
    # 256 independent draws would have a standard error of sd / 16; six of them at 12 numbers fail once in 4e7 runs,
    # and quasi-random points are several times better
    error = brute.std(0) / 16
    assert ((found.mean(0) - brute.mean(0)).abs() < 6 * error).all()
    assert ((found.mean(0) - brute.mean(0)).abs() < error).all(), (
        "worse than a third of what plain Monte Carlo would do"
    )
    torch.testing.assert_close(found.std(0), brute.std(0), rtol=0.15, atol=0)


def test_zero_covariance_gives_the_softmax_and_missing_options_none():
    mean = torch.tensor([[0.5, -1.0, -torch.inf], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = softmax_draws(mean, torch.zeros(2, 3, 3, dtype=torch.float64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, mean.softmax(-1).expand(LOGIT_DRAWS, -1, -1), rtol=0, atol=1e-15)
    spread = torch.diag_embed(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64))
    assert (softmax_draws(mean, spread, torch.Generator().manual_seed(0))[:, 0, 2] == 0).all()


def test_predictions_depend_on_the_generator_and_not_on_the_batch_size(model):
    posterior = fitted(model, structure="diag")
    first, again, small, other = (
        posterior.predict(model.task.test, batch_size=size, generator=torch.Generator().manual_seed(seed)).probs
        for size, seed in ((32, 0), (32, 0), (2, 0), (32, 1))
    )
    assert torch.equal(first, again)
    torch.testing.assert_close(first, small, rtol=0, atol=1e-5)
    assert not torch.allclose(first, other, atol=1e-3)


def test_kinds_of_prediction(model):
    posterior = fitted(model, structure="diag")
    assert isinstance(posterior, LaplacePosterior)
    assert posterior.kinds == ("linearised", "mc", "mean")
    assert posterior.default_kind == "linearised"
    assert not posterior.is_point
    assert posterior.predict(model.task.test, kind="mc", draws=3).probs.shape == (3, 9, 3)
    assert posterior.predict(model.task.test, kind="mean").probs.shape == (1, 9, 3)
    with pytest.raises(ValueError, match=r"no prediction of kind 'linear'. Did you mean 'linearised'"):
        posterior.predict(model.task.test, kind="linear")


def test_a_given_estimate_is_not_refitted(model, monkeypatch):
    monkeypatch.setattr(MAP, "fit", lambda *args, **kwargs: pytest.fail("MAP was fitted again"))
    posterior = fitted(model, structure="diag")
    assert posterior.record["estimate"] == {"engine": "MAP", "seed": 3}
    assert posterior.record["seed"] == 3


def test_without_an_estimate_map_is_fitted_with_the_given_settings(three_topics_model):
    model = three_topics_model(dtype=torch.float32, prior=NORMAL)
    posterior = Laplace(estimate=MAP(steps=2, batch_size=4)).fit(model, model.task.train, progress=False)
    assert posterior.record["estimate"]["steps_done"] == 2
    alone = MAP(steps=2, batch_size=4).fit(model, model.task.train, progress=False)
    for name, value in alone.mean().items():
        assert torch.equal(posterior.mean()[name], value)


def test_evidence_chooses_precisions_of_higher_evidence_site_by_site(model):
    declared, chosen = (fitted(model, structure="diag", precision=how) for how in ("declared", "evidence"))
    assert chosen.record["log_evidence"] > declared.record["log_evidence"] + 1
    assert len({round(value, 3) for value in chosen.record["prior_precision"].values()}) > 1


def test_validation_takes_the_best_factor_of_the_grid(model, monkeypatch):
    # a coarse grid, so that brute force over whole fits is cheap
    monkeypatch.setattr(laplace_engine, "CANDIDATES", 5)
    scores = {}
    for factor in torch.linspace(*LOG_PRECISION_BOUNDS, 5).exp().tolist():
        model.prior.declared = dict.fromkeys(model.adapter_sites, dist.Normal(0.0, 0.5 / factor**0.5))
        predictive = fitted(model, structure="diag").predict(model.task.validation)
        labels = predictive.labels[:, None]
        scores[4 * factor] = -float(predictive.mean_probs.gather(-1, labels).log().sum())
    model.prior.declared = dict.fromkeys(model.adapter_sites, NORMAL)
    found = fitted(model, structure="diag", precision="validation").record["prior_precision"]
    best = min(scores, key=scores.get)
    assert list(found.values()) == [pytest.approx(best, rel=1e-4)] * len(found)
    assert max(scores.values()) > scores[best] + 0.1


def test_a_best_factor_at_the_edge_is_reported(model, monkeypatch, caplog):
    monkeypatch.setattr(laplace_engine, "CANDIDATES", 2)  # a grid of nothing but edges
    with caplog.at_level(logging.WARNING):
        fitted(model, structure="diag", precision="validation")
    assert "lies at the edge of the search" in caplog.text


class TestRefusals:
    def test_validation_without_data(self, model):
        with pytest.raises(ValueError, match=r"pass validation=task.validation to fit"):
            Laplace(precision="validation").fit(model, model.task.train, estimate=point_at(model))

    def test_last_layer_without_the_adapter(self, three_topics_model):
        model = three_topics_model(adapter=LORA, prior=NORMAL)
        with pytest.raises(ValueError, match=r"Add LastLayer\(\) to the model's adapters"):
            fitted(model, structure="last_layer")

    def test_a_pattern_that_matches_nothing(self, model):
        with pytest.raises(ValueError, match=r"'q_proj.lora_C'.*Did you mean 'q_proj.lora_"):
            fitted(model, sites="q_proj.lora_C")

    @pytest.mark.parametrize(
        ("setting", "value", "near"), [("structure", "diagonal", "diag"), ("precision", "evidenc", "evidence")]
    )
    def test_unknown_choices(self, setting, value, near):
        with pytest.raises(ValueError, match=f"Unknown {setting} '{value}'.*Did you mean '{near}'"):
            Laplace(**{setting: value})

    def test_a_prior_that_is_not_normal(self, three_topics_model):
        model = three_topics_model(prior={"*.lora_A": NORMAL, "*.lora_B": Flat()})
        with pytest.raises(ValueError, match=r"'q_proj.lora_B' has Flat"):
            fitted(model)
        assert fitted(model, sites="*.lora_A").record["sites"] == ["q_proj.lora_A", "v_proj.lora_A"]

    def test_an_estimate_of_other_sites(self, model, three_topics_model):
        other = point_at(three_topics_model(adapter=LORA, prior=NORMAL))
        with pytest.raises(ValueError, match=r"no value for the site 'head.weight'"):
            fitted(model, other, structure="last_layer")

    def test_a_dense_covariance_of_too_many_weights(self, model, monkeypatch):
        monkeypatch.setattr(laplace_engine, "MOST_WEIGHTS", 50)
        with pytest.raises(ValueError, match=r"at most 50 weights; 'head.weight' has 96"):
            fitted(model, structure="last_layer")

    def test_a_dense_covariance_under_unequal_scales(self, three_topics_model):
        scales = torch.full((3, 1), 0.2)
        model = three_topics_model(
            adapter=[LORA, LastLayer()], prior={"*.lora_*": NORMAL, "head.*": dist.Normal(0.0, scales)}
        )
        with pytest.raises(ValueError, match=r"one prior scale for the whole site 'head.weight'"):
            fitted(model, structure="last_layer")

    def test_a_blob_estimate_is_taken_at_its_mean(self, model):
        guide = build_guide({"*.lora_A": BLoB(), "*.lora_B": Point(), "head.*": Point()}, model)
        posterior = fitted(model, Posterior(model, guide, {}))
        assert torch.equal(posterior.mean()["q_proj.lora_A"], guide.mean()["q_proj.lora_A"])
