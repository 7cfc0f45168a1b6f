"""Laplace posteriors: widths, covariances and predictions against dense linear algebra, and what the engine refuses."""

import logging

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyrolora.guides import BLoB, Point, build_guide
from pyrolora.inference.laplace import Laplace, LaplacePosterior
from pyrolora.inference.laplace import engine as laplace_engine
from pyrolora.inference.laplace import validation as laplace_validation
from pyrolora.inference.laplace.precision import LOG_PRECISION_BOUNDS, declared_prior, evidence_precision
from pyrolora.inference.laplace.structures import logit_covariance
from pyrolora.inference.laplace.summation import flat_eigenvalues, new_structures, sum_curvature
from pyrolora.inference.linearised import Linearised
from pyrolora.inference.links import LOGIT_DRAWS, mean_field_softmax
from pyrolora.inference.logit_gradients import LogitGradients, each_logit
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.prior_declarations import Flat, learned

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


def sums(model, mean, names, structure, rank=3):
    structures = new_structures(model, names, structure, rank)
    data = model.encode(model.task.train)
    sum_curvature(LogitGradients(model, mean, names), structures, data, batch_size=16, checkpoint=None, progress=False)
    return structures


def dense_covariance(structure, precision):
    """The covariance of a whole site by dense inverses in float64, ``(weights, weights)``."""
    kind, precision = type(structure).__name__, torch.as_tensor(precision, dtype=torch.float64)
    if kind == "Diagonal":
        return (1 / (structure.total + precision)).flatten().diag()
    if kind == "Dense":
        return torch.linalg.inv(structure.total + precision * torch.eye(len(structure.total), dtype=torch.float64))
    blocks = []
    for entry in range(len(structure.inputs)):
        outputs, inputs = structure.outputs[entry], structure.inputs[entry] / structure.tokens
        if structure.rank is not None:
            outputs, inputs = (truncate(matrix, structure.rank) for matrix in (outputs, inputs))
        whole = torch.kron(outputs, inputs)
        own = precision.flatten()[entry] if precision.numel() > 1 else precision
        blocks.append(torch.linalg.inv(whole + own * torch.eye(len(whole), dtype=torch.float64)))
    return torch.block_diag(*blocks)


def truncate(matrix, rank):
    values, vectors = torch.linalg.eigh(matrix)
    values[:-rank] = 0
    return vectors @ values.diag() @ vectors.mT


STRUCTURES = ["diag", "kron", "kron_lowrank", "full"]


def test_diagonal_sd_is_one_over_root_curvature_plus_precision(model):
    estimate = point_at(model)
    curvature = {name: found.total for name, found in sums(model, estimate.mean(), tuple(model.sites), "diag").items()}
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
    curvature = sums(model, estimate.mean(), ("head.weight",), "full")["head.weight"].total
    wanted = torch.linalg.inv(curvature + 4.0 * torch.eye(len(curvature), dtype=torch.float64))
    posterior = fitted(model, estimate, structure="last_layer")
    factors = dict(posterior.guide.items())
    root = factors["head.weight"].scale_tril
    torch.testing.assert_close(root @ root.mT, wanted, rtol=0, atol=1e-9 * float(wanted.max()))
    assert (wanted - wanted.diagonal().diag()).abs().max() > 1e-3 * wanted.max()
    assert posterior.guide.parameters_by_role()["scale"] == [
        factors["head.weight"].log_diag,
        factors["head.weight"].relative_lower,
    ]
    torch.testing.assert_close(posterior.mean()["q_proj.lora_A"], estimate.mean()["q_proj.lora_A"], rtol=0, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_guide_has_the_dense_covariance(model, structure):
    """Marginal variances, entropy and density of the Pyro guide against a MultivariateNormal, site by site."""
    estimate, names = point_at(model), ("v_proj.lora_A", "v_proj.lora_B", "head.weight")
    posterior = fitted(model, estimate, structure=structure, sites="*", rank=3, temperature=0.5)
    structures = sums(model, estimate.mean(), names, structure)
    factors = dict(posterior.guide.items())
    draws = posterior.sample(3, generator=torch.Generator().manual_seed(0))
    for name in names:
        wanted = MultivariateNormal(estimate.mean()[name].flatten(), 0.5 * dense_covariance(structures[name], 4.0))
        found = factors[name].distribution()
        torch.testing.assert_close(found.variance.flatten(), wanted.variance, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            found.log_prob(draws[name]), wanted.log_prob(draws[name].flatten(1)), rtol=1e-9, atol=0
        )
        if structure != "diag":
            torch.testing.assert_close(found.entropy(), wanted.entropy(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_logit_covariance_is_j_sigma_j(model, structure):
    """The guide's, which predicts, and the structures', on which the validation search runs, against dense algebra."""
    estimate, names = point_at(model), tuple(model.sites)
    posterior = fitted(model, estimate, structure=structure, rank=3)
    structures = sums(model, estimate.mean(), names, structure)
    batch = model.encode(model.task.test).batch(list(range(5)))
    _, jacobians = LogitGradients(model, estimate.mean(), names).jacobians(batch, each_logit)
    wanted = torch.zeros(2, 5, 3, 3, dtype=torch.float64)
    for name in names:
        flat = jacobians[name].flatten(2)
        for index, factor in enumerate((1.0, 3.0)):
            covariance = dense_covariance(structures[name], 4.0 * factor)
            wanted[index] += torch.einsum("cri,ij,drj->rcd", flat, covariance, flat)
    _, found = Linearised(model, posterior.guide)(batch)
    torch.testing.assert_close(found, wanted[0], rtol=1e-8, atol=1e-12)
    precisions = {name: prior.precision for name, prior in declared_prior(model, names).items()}
    both = logit_covariance(structures, jacobians, precisions, (1.0, 3.0))
    torch.testing.assert_close(both.transpose(0, 1), wanted, rtol=1e-8, atol=1e-12)


def test_contrasts_are_the_differences_to_the_first_logit(model):
    posterior = fitted(model, structure="kron")
    batch = model.encode(model.task.test).batch(list(range(5)))
    mean, covariance = Linearised(model, posterior.guide)(batch)
    same, found = Linearised(model, posterior.guide)(batch, contrasts=True)
    to_first = torch.eye(3, dtype=torch.float64) - torch.tensor([[1.0, 0, 0]] * 3, dtype=torch.float64)
    torch.testing.assert_close(same, mean, rtol=0, atol=1e-12)
    # Llama normalises in float32 even here, so gradients are linear to 1e-7 only
    torch.testing.assert_close(
        found, to_first @ covariance @ to_first.mT, rtol=1e-6, atol=1e-6 * float(covariance.detach().max())
    )
    closed = posterior.predict(batch, kind="linearised_mf1").mean_probs
    torch.testing.assert_close(closed.double(), mean_field_softmax(mean, covariance), rtol=0, atol=1e-6)


def test_a_prior_scale_for_each_layer_is_used(three_topics_model):
    scales = torch.tensor([0.2, 0.5]).reshape(2, 1, 1)
    model = three_topics_model(adapter=LORA, prior=dist.Normal(0.0, scales))
    estimate = point_at(model)
    posterior = fitted(model, estimate, structure="kron")
    structures = sums(model, estimate.mean(), ("v_proj.lora_A",), "kron")
    wanted = dense_covariance(structures["v_proj.lora_A"], scales.double().square().reciprocal())
    found = dict(posterior.guide.items())["v_proj.lora_A"].distribution().variance
    torch.testing.assert_close(found.flatten(), wanted.diagonal(), rtol=1e-6, atol=0)


def test_temperature_multiplies_the_covariance(model):
    estimate = point_at(model)
    batch = model.encode(model.task.test).batch(list(range(3)))
    for structure in STRUCTURES:
        plain, warm = (
            Linearised(model, fitted(model, estimate, structure=structure, temperature=t).guide)(batch)[1]
            for t in (1.0, 2.5)
        )
        torch.testing.assert_close(warm, 2.5 * plain, rtol=1e-9, atol=0)


def test_linearised_predictions_push_gaussian_logits_through_the_softmax(model):
    posterior = fitted(model, structure="diag")
    batch = model.encode(model.task.test).batch(list(range(4)))
    mean, covariance = Linearised(model, posterior.guide)(batch)
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
    assert posterior.kinds == (
        "mc",
        "mean",
        "linearised",
        "linearised_mf1",
        "linearised_probit",
        "linearised_bridge",
        "token",
        "flipout",
    )
    assert posterior.default_kind == "linearised"
    assert not posterior.is_point
    assert posterior.predict(model.task.test, kind="mc", draws=3).probs.shape == (3, 9, 3)
    assert posterior.predict(model.task.test, kind="mean").probs.shape == (1, 9, 3)
    with pytest.raises(ValueError, match=r"no prediction of kind 'linearized'. Did you mean 'linearised'"):
        posterior.predict(model.task.test, kind="linearized")


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
    monkeypatch.setattr(laplace_validation, "CANDIDATES", 5)
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
    monkeypatch.setattr(laplace_validation, "CANDIDATES", 2)  # a grid of nothing but edges
    with caplog.at_level(logging.WARNING):
        fitted(model, structure="diag", precision="validation")
    assert "lies at the edge of the search" in caplog.text


class TestOnlineEvidence:
    """MacKay's updates of learned prior scales while MAP is fitted."""

    MAP = MAP(steps=9, batch_size=4, learning_rate=0.03)

    def fit(self, three_topics_model, **settings):
        model = three_topics_model(adapter=LORA, prior=learned(0.5))
        posterior = Laplace(structure="kron", estimate=self.MAP, **settings).fit(
            model, model.task.train, progress=False
        )
        return model, posterior

    def test_each_stop_moves_the_scales_to_the_best_evidence_there(self, three_topics_model):
        model = three_topics_model(adapter=LORA, prior=learned(0.5))
        run = self.MAP.iterate(model, model.task.train)
        run.learns_scales = False
        for stats in run:
            if stats.step in (3, 6):
                structures = sums(model, run.guide.mean(), tuple(model.sites), "kron")
                best = evidence_precision(
                    run.guide.mean(), declared_prior(model, tuple(model.sites)), flat_eigenvalues(structures)
                )
                model.prior.set_scales({name: float(prior.precision.rsqrt()) for name, prior in best.items()})
        wanted = run.posterior().mean()
        model, found = self.fit(three_topics_model, online=2)
        for name in wanted:
            assert torch.equal(found.mean()[name], wanted[name])
            scale = float(model.prior.scales[name])
            assert scale != 0.5
            assert found.record["prior_precision"][name] == pytest.approx(scale**-2, rel=1e-6)

    def test_the_evidence_ends_higher_than_under_the_declared_scale(self, three_topics_model):
        fixed = three_topics_model(adapter=LORA, prior=dist.Normal(0.0, 0.5))
        plain = Laplace(structure="kron", estimate=self.MAP).fit(fixed, fixed.task.train, progress=False)
        _, online = self.fit(three_topics_model, online=2)
        assert online.record["log_evidence"] > plain.record["log_evidence"] + 1

    def test_fixed_priors_and_given_estimates_are_refused(self, model, three_topics_model):
        with pytest.raises(ValueError, match=r"that of 'q_proj.lora_A' is fixed. Declare learned"):
            Laplace(online=1).fit(model, model.task.train)
        free = three_topics_model(adapter=LORA, prior=learned(0.5))
        with pytest.raises(ValueError, match="online acts during the MAP fit, and an estimate was passed"):
            Laplace(online=1).fit(free, free.task.train, estimate=point_at(free))
        with pytest.raises(ValueError, match="online must not be negative"):
            Laplace(online=-1)


class TestLearnedScalesOfAnEstimate:
    @pytest.fixture
    def prior(self):
        return {"*.lora_*": NORMAL, "head.weight": learned(0.1, after=0.0)}

    def test_they_are_the_estimates_and_not_those_of_a_later_fit(self, three_topics_model, prior):
        model = three_topics_model(adapter=[LORA, LastLayer()], prior=prior)
        estimate = MAP(steps=5).fit(model, model.task.train, progress=False)
        expected = float(estimate.model.prior.scales["head.weight"]) ** -2
        MAP(steps=5, learning_rate=0.3).fit(model, model.task.train, progress=False)
        posterior = fitted(model, estimate, structure="last_layer", precision="declared")
        assert posterior.record["prior_precision"]["head.weight"] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("fitted_before", [False, True])
    def test_an_estimate_under_another_prior_leaves_the_declared_ones(self, three_topics_model, prior, fitted_before):
        other = three_topics_model(adapter=[LORA, LastLayer()], prior=NORMAL)
        model = three_topics_model(adapter=[LORA, LastLayer()], prior=prior)
        if fitted_before:
            MAP(steps=5, learning_rate=0.3).fit(model, model.task.train, progress=False)
        posterior = fitted(model, point_at(other), structure="last_layer", precision="declared")
        assert posterior.record["prior_precision"]["head.weight"] == pytest.approx(100.0)

    @pytest.mark.parametrize(
        ("structure", "site", "per"),
        [
            ("kron", "*.lora_A", ("layer", "rank")),
            ("kron", "*.lora_A", "rank"),
            ("last_layer", "head.weight", "feature"),
        ],
    )
    def test_several_scales_are_refused_before_they_have_moved_apart(self, three_topics_model, structure, site, per):
        normal = dict.fromkeys(("*.lora_A", "*.lora_B", "head.weight"), NORMAL)
        prior = {**normal, site: learned(0.1, after=0.0, per=per)}
        model = three_topics_model(adapter=[LORA, LastLayer()], prior=prior)
        with pytest.raises(ValueError, match="needs one prior scale"):
            Laplace(structure=structure, estimate=MAP(steps=2)).fit(model, model.task.train, progress=False)

    def test_one_scale_a_layer_is_kept_a_layer_under_kron(self, three_topics_model):
        model = three_topics_model(adapter=[LORA], prior=learned(0.1, after=0.0, per="layer"))
        posterior = Laplace(structure="kron", estimate=MAP(steps=3)).fit(model, model.task.train, progress=False)
        assert declared_prior(posterior.model, ("q_proj.lora_A",))["q_proj.lora_A"].precision.shape == (2, 1, 1)


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
        ("setting", "value", "near"),
        [("structure", "diagonal", "diag"), ("precision", "evidenc", "evidence"), ("group", "sites", "site")],
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
        scales = torch.tensor([[0.2], [0.3], [0.4]])
        model = three_topics_model(
            adapter=[LORA, LastLayer()], prior={"*.lora_*": NORMAL, "head.*": dist.Normal(0.0, scales)}
        )
        with pytest.raises(ValueError, match=r"one prior scale for the whole site 'head.weight'"):
            fitted(model, structure="last_layer")

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"rank": 0}, "rank and batch_size must be at least 1"),
            ({"temperature": 0.0}, "temperature must be positive"),
        ],
    )
    def test_settings_out_of_range(self, settings, words):
        with pytest.raises(ValueError, match=words):
            Laplace(**settings)

    def test_a_blob_estimate_is_taken_at_its_mean(self, model):
        guide = build_guide({"*.lora_A": BLoB(), "*.lora_B": Point(), "head.*": Point()}, model)
        posterior = fitted(model, Posterior(model, guide, {}))
        assert torch.equal(posterior.mean()["q_proj.lora_A"], guide.mean()["q_proj.lora_A"])
