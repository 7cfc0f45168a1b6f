"""Adversarial meta-tuning: plain meta-tuning as its case, gradients at perturbed weights, attacks, resuming."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional

from pyrolora.guides import BLoB, MeanField
from pyrolora.inference.meta_tuning import MetaTuning, robust_logits
from pyrolora.inference.perturbations import PGD, PyramidPGD, WeightPerturbation, divergence
from pyrolora.inference.retaining import QualityRetaining
from pyrolora.models.adapters import LoRA, LoRAPool, MoEfiedLoRA, PiSSA
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import episodic

NONE = WeightPerturbation("none", 0.0)


@pytest.fixture
def model(three_shapes, tiny_vision):
    source = episodic(three_shapes(train=30, validation=9, test=9), ways=2, shots=2, queries=3, counts=(8, 2, 4))
    return BayesianModel(tiny_vision(torch.float64), source, adapter=PiSSA(rank=2, targets="all-linear"), prior=Flat())


def fitted(model, **settings):
    settings = {"steps": 6, "learning_rate": 0.02, "adversarial_weight": 2.0, **settings}
    return MetaTuning(**settings).fit(model, model.task.train, progress=False)


def run_of(model, **settings):
    settings = {"steps": 6, "learning_rate": 0.02, "adversarial_weight": 2.0, **settings}
    return MetaTuning(**settings).iterate(model, model.task.train)


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def moved(run, scale=0.05):
    """Put a run's parameters somewhere, since at the start every change is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.guide.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return run


class TestPlain:
    def test_without_attack_and_perturbation_it_is_sgd_on_the_factors(self, model):
        found = fitted(model, attack=None, perturbation=NONE, batch_size=12).mean()
        shapes = {name: site.shape for name, site in model.sites.items()}
        values = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
        optimiser = torch.optim.SGD(values.values(), lr=0.02, momentum=0.9)
        batches = model.encode(model.task.train).stream(12, seed=0)
        for step in range(6):
            optimiser.param_groups[0]["lr"] = 0.02 * (
                1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 5))
            )
            optimiser.zero_grad()
            batch = next(batches)
            functional.cross_entropy(model.row_logits(batch, values), batch["labels"]).backward()
            optimiser.step()
        for name, value in values.items():
            torch.testing.assert_close(found[name], value.detach(), atol=1e-12, rtol=0)

    def test_nothing_to_attack_with_is_the_same_trajectory_bit_by_bit(self, model):
        plain = fitted(model, attack=None, perturbation=NONE).mean()
        for settings in (
            {"attack": PGD(0.0), "perturbation": WeightPerturbation("awp", 0.0)},
            {"attack": PGD(0.1), "adversarial_weight": 0.0, "perturbation": WeightPerturbation("paper", 0.0)},
            {"attack": PyramidPGD(0.0), "perturbation": WeightPerturbation("gauss", 0.0)},
        ):
            assert_same(fitted(model, **settings).mean(), plain)

    def test_an_attack_and_a_perturbation_each_change_it(self, model):
        plain = fitted(model, attack=None, perturbation=NONE).mean()
        attacked = fitted(model, attack=PGD(0.1), perturbation=NONE).mean()
        perturbed = fitted(model, attack=None, perturbation=WeightPerturbation("awp", 0.05)).mean()
        for other in (attacked, perturbed):
            assert any(not torch.equal(value, plain[name]) for name, value in other.items())


class TestWeights:
    @pytest.mark.parametrize("size", [5e-3, 0.05])
    def test_awp_is_relative_to_the_factors_raises_the_objective_and_touches_no_parameter(self, model, size):
        run = moved(run_of(model, attack=PGD(0.05), perturbation=WeightPerturbation("awp", size)))
        batch = run._attacked(next(run._stream(0)))
        before = {name: value.clone() for name, value in run.guide.state_dict().items()}
        deltas = run._deltas(batch)
        centres, values = model.centres(), run.guide.mean()
        for name, delta in deltas.items():
            lengths = torch.linalg.matrix_norm(values[name] + centres[name])
            torch.testing.assert_close(torch.linalg.matrix_norm(delta), size * lengths, atol=0, rtol=1e-10)

        def objective(draw):
            clean, attacked = robust_logits(model, batch, draw)
            return float(functional.cross_entropy(clean, batch["labels"]) + 2 * divergence(clean, attacked).mean())

        assert objective({name: values[name] + deltas[name] for name in values}) > objective(values)
        run._backward(next(run._stream(0)))
        assert_same(dict(run.guide.state_dict()), before)

    def test_the_gradient_is_the_one_at_the_perturbed_weights(self, model):
        run = moved(run_of(model, attack=None, perturbation=WeightPerturbation("awp", 0.05)))
        batch = next(run._stream(0))
        deltas = run._deltas(batch)
        run._backward(batch)
        values = {name: (value + deltas[name]).requires_grad_() for name, value in run.guide.mean().items()}
        loss = functional.cross_entropy(model.row_logits(batch, values), batch["labels"])
        expected = dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))
        for name, factor in run.guide.items():
            torch.testing.assert_close(factor.value.grad, expected[name], atol=1e-12, rtol=1e-9)

    def test_the_papers_form_perturbs_one_factor_at_a_time_on_attacked_queries(self, model):
        run = moved(run_of(model, attack=PGD(0.05), perturbation=WeightPerturbation("paper", 0.5)))
        batch = next(run._stream(0))
        with run._same_draws():
            given = run._attacked(batch)
        run._backward(batch)
        values = {name: value.requires_grad_() for name, value in run.guide.mean().items()}
        attacked = functional.cross_entropy(robust_logits(model, given, values)[1], batch["labels"])
        ascent = dict(zip(values, torch.autograd.grad(attacked, list(values.values())), strict=True))
        for factor in ("lora_A", "lora_B"):
            there = {
                name: (value + 0.5 * ascent[name] if name.endswith(factor) else value).detach().requires_grad_()
                for name, value in values.items()
            }
            clean, other = robust_logits(model, given, there)
            loss = functional.cross_entropy(clean, batch["labels"]) + 2 * divergence(clean, other).mean()
            gradients = dict(zip(there, torch.autograd.grad(loss, list(there.values())), strict=True))
            for name, posterior in run.guide.items():
                if name.endswith(factor):
                    torch.testing.assert_close(posterior.value.grad, gradients[name], atol=1e-12, rtol=1e-9)

    def test_the_rows_of_a_factor_are_not_orthogonal_any_more(self, model):
        run = run_of(model, perturbation=WeightPerturbation("awp", 0.05))
        deltas = run._deltas(next(run._stream(0)))
        a = model.centres()["fc1.lora_A"]
        gram, perturbed = a @ a.mT, (a + deltas["fc1.lora_A"]) @ (a + deltas["fc1.lora_A"]).mT
        assert gram[0, 0, 1].abs() < 1e-12
        assert perturbed[0, 0, 1].abs() > 1e-6

    def test_prior_densities_are_those_at_the_weights_themselves(self, model):
        normal = BayesianModel(model.backbone, model.task, adapter=model.adapters, prior=dist.Normal(0.0, 0.25))
        run = moved(run_of(normal, perturbation=WeightPerturbation("awp", 0.1)))
        run._backward(next(run._stream(0)))
        mean = run.guide.mean()
        scale = torch.tensor(0.25, dtype=torch.float64)
        expected = -sum(dist.Normal(0.0, scale).log_prob(value).sum() for value in mean.values()) / len(run.data)
        found = sum(value for name, value in run.elbo.terms.items() if name in mean)
        assert found == pytest.approx(float(expected), rel=1e-9)


class TestAttack:
    def test_queries_stay_in_the_box_and_the_prediction_diverges(self, model):
        run = moved(run_of(model, attack=PGD(0.1, steps=3)))
        batch = next(run._stream(0))
        given = run._attacked(batch)
        assert (given["attacked"] - batch["pixel_values"]).abs().max() <= 0.1 + 1e-6
        clean, attacked = robust_logits(model, given, run.guide.mean())
        noise = (batch["pixel_values"] + 0.1 * torch.randn(batch["pixel_values"].shape).sign()).clamp(0, 1)
        _, random = robust_logits(model, {**batch, "attacked": noise}, run.guide.mean())
        assert divergence(clean, attacked).sum() > 3 * divergence(clean, random).sum()

    def test_its_factor_is_the_weighted_divergence_for_each_query(self, model):
        run = moved(run_of(model, attack=PGD(0.1), perturbation=NONE))
        batch = next(run._stream(0))
        with run._same_draws():
            given = run._attacked(batch)
        run._backward(batch)
        clean, attacked = robust_logits(model, given, run.guide.mean())
        assert run.elbo.terms["adversarial"] == pytest.approx(float(2 * divergence(clean, attacked).mean()), rel=1e-9)
        assert run.elbo.terms["label"] == pytest.approx(
            float(functional.cross_entropy(clean, batch["labels"])), rel=1e-9
        )
        history = fitted(model, attack=PGD(0.1)).record["history"]
        assert all(entry["adversarial"] > 0 for entry in history)
        assert all("adversarial" not in entry for entry in fitted(model, attack=None).record["history"])

    def test_robust_training_makes_predictions_diverge_less(self, model):
        # the factors of the network's largest components, moved for long enough; the effect is tenfold, not a chance
        settings = {"steps": 40, "learning_rate": 0.05, "perturbation": NONE, "batch_size": 24}
        clean = fitted(model, attack=None, **settings)
        robust = fitted(model, attack=PGD(0.1), adversarial_weight=4.0, **settings)
        run = run_of(model, attack=PGD(0.1), batch_size=48)
        found = []
        for posterior in (clean, robust):
            with torch.no_grad():
                for mine, other in zip(run.guide.parameters(), posterior.guide.parameters(), strict=True):
                    mine.copy_(other)
            given = run._attacked(next(run._stream(0)))
            found.append(float(divergence(*robust_logits(model, given, posterior.mean())).mean()))
        assert found[1] < 0.7 * found[0]


class TestPosteriors:
    @pytest.mark.parametrize("noise", ["weight", "example"])
    @pytest.mark.parametrize("mode", ["awp", "paper", "gauss"])
    def test_random_guides_are_perturbed_at_the_draw_of_the_step(self, model, noise, mode):
        normal = BayesianModel(model.backbone, model.task, adapter=model.adapters, prior=dist.Normal(0.0, 0.1))
        run = run_of(
            normal,
            guide=BLoB(),
            attack=PGD(0.05),
            noise=noise,
            batch_size=12,
            perturbation=WeightPerturbation(mode, 0.01),
        )
        stats = [entry for entry, _ in zip(run.steps(), range(3), strict=False)]
        assert all(math.isfinite(entry.loss) for entry in stats)
        # the same state gives the same draw to the perturbation and to the objective
        with run._same_draws():
            first = run._scoped(run.guide.__call__, next(run._stream(0)))(next(run._stream(0)))
        with run._same_draws():
            again = run._scoped(run.guide.__call__, next(run._stream(0)))(next(run._stream(0)))
        assert_same(first, again)

    def test_adam_moves_widths_at_a_rate_of_their_own(self, model):
        normal = BayesianModel(model.backbone, model.task, adapter=model.adapters, prior=dist.Normal(0.0, 0.1))
        settings = {
            "guide": MeanField(),
            "attack": PGD(0.05),
            "scale_learning_rate": 0.02,
            "momentum": None,
            "steps": 3,
        }
        widths = [factor.scale.detach() for _, factor in fitted(normal, **settings).guide.items()]
        assert max(float((width / 0.1 - 1).abs().max()) for width in widths) > 0.02

    def test_a_pool_is_tuned_as_a_whole_too(self, model):
        pool = LoRAPool(members=2, rank=2, targets="all-linear", concentration=1.0)
        whole = BayesianModel(model.backbone, model.task, adapter=pool, prior=dist.Normal(0.0, 0.1))
        posterior = fitted(whole, guide=MeanField(init_scale=0.01), attack=PGD(0.05), steps=3)
        assert float(posterior.mean()["pool.weights"].sum()) == pytest.approx(1.0)


class TestFadedRouter:
    @pytest.mark.parametrize("mode", ["awp", "paper"])
    def test_a_weight_that_the_objective_does_not_hold_is_not_perturbed(self, model, mode):
        adapter = MoEfiedLoRA(rank=2, experts=4, fade_end=0.5)
        faded = BayesianModel(model.backbone, model.task, adapter=adapter, prior=dist.Normal(0.0, 0.1))
        perturbation = WeightPerturbation(mode, 0.01)
        run = moved(run_of(faded, steps=4, attack=PGD(0.1), perturbation=perturbation))
        batch = next(run._stream(0))
        for progress, names in ((0.25, set(faded.sites)), (0.75, set(faded.sites) - {"fc1.router"})):
            deltas = run._deltas(run._attacked({**batch, "progress": torch.tensor(progress)}))
            assert set(deltas) == names
        assert [math.isfinite(stats.loss) for stats in run] == [True] * 4


class TestResuming:
    def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(self, model, tmp_path):
        settings = {"attack": PGD(0.05), "perturbation": WeightPerturbation("awp", 0.01), "checkpoint_every": 2}
        whole = fitted(model, **settings).mean()
        run = run_of(model, checkpoint=tmp_path, **settings)
        for stats in run:
            if stats.step == 4:
                break
        resumed = run_of(model, checkpoint=tmp_path, **settings)
        assert resumed.step == 4
        for _ in resumed:
            pass
        assert_same(resumed.posterior().mean(), whole)

    def test_the_state_of_another_attack_is_refused(self, model, tmp_path):
        fitted(model, attack=PGD(0.05), checkpoint=tmp_path, checkpoint_every=1, steps=2)
        with pytest.raises(ValueError, match=r"settings\.attack\.epsilon was 0\.05 and is now 0\.1"):
            run_of(model, attack=PGD(0.1), checkpoint=tmp_path, checkpoint_every=1, steps=2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"adversarial_weight": -1.0}, "must not be negative; got -1.0"),
            ({"momentum": 1.0}, r"in \[0, 1\), or None for Adam; got 1.0"),
            ({"direction": "papr"}, "Did you mean 'paper'"),
            ({"noise": "token"}, "draws no weights that could be perturbed"),
            ({"particles": 2}, "no particles but 1"),
            ({"retaining": QualityRetaining()}, "nothing of theirs to retain. Leave retaining out, or use MAP"),
        ],
    )
    def test_bad_settings(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            MetaTuning(**settings)

    def test_bad_objects(self):
        with pytest.raises(TypeError, match="The attack is a float"):
            MetaTuning(attack=0.03)
        with pytest.raises(TypeError, match="The perturbation is a str"):
            MetaTuning(perturbation="awp")

    def test_an_attack_on_a_network_that_reads_no_pixels(self, three_topics_model):
        text = three_topics_model(adapter=LoRA(rank=2))
        engine = MetaTuning(attack=PGD(0.1), steps=1)
        for refused in (lambda: engine.fit(text, text.task.train), lambda: engine.check(text, 12)):
            with pytest.raises(
                ValueError, match=r"The attack PGD\(epsilon=0.1, .* moves pixels, and 'tiny' reads none"
            ):
                refused()
