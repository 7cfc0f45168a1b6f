"""Attacks on pixels and weights: boxes and lengths, gradients that vanish, prior densities that stay where they were."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.nn import functional

from pyrolora.inference.perturbations import (
    PGD,
    PerturbedSites,
    PyramidPGD,
    WeightPerturbation,
    cross_entropy_objective,
    divergence,
    divergence_objective,
)


@pytest.fixture
def images():
    return torch.rand(6, 3, 28, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(6) % 4


@pytest.fixture
def predict():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3 * 28 * 20, 16, generator=generator) / 40
    last = torch.randn(16, 4, generator=generator)
    return lambda batch: torch.tanh(batch.flatten(1) @ first) @ last


def seeded():
    return torch.Generator().manual_seed(7)


class TestPixels:
    @pytest.mark.parametrize("start", ["uniform", "normal", "zero"])
    def test_it_stays_in_the_box_and_in_range(self, images, labels, predict, start):
        attacked = PGD(0.03, steps=5, start=start)(images, cross_entropy_objective(predict, labels), seeded())
        assert (attacked - images).abs().max() <= 0.03 + 1e-7
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert not attacked.requires_grad

    def test_it_finds_the_worst_case_of_a_linear_objective(self, images):
        direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(3))
        attacked = PGD(0.02, steps=4)(images, lambda batch: (batch * direction).sum(), seeded())
        expected = (images + 0.02 * direction.sign()).clamp(0, 1)
        torch.testing.assert_close(attacked, expected, atol=1e-7, rtol=0)

    def test_a_start_beyond_the_range_does_not_hold_a_pixel_there(self):
        black = torch.zeros(1, 1, 8, 8)
        for attack in (PGD(0.1, steps=4), PyramidPGD(0.01, steps=4)):
            attacked = attack(black, lambda batch: batch.sum(), seeded())
            torch.testing.assert_close(attacked, torch.full_like(black, attack.reach(black)), atol=1e-6, rtol=0)

    def test_the_loss_rises_with_steps_and_more_than_by_noise(self, images, labels, predict):
        objective = cross_entropy_objective(predict, labels)
        clean = objective(images)
        noise = objective((images + 0.05 * (2 * torch.rand(images.shape, generator=seeded()) - 1)).clamp(0, 1))
        one, ten = (objective(PGD(0.05, steps=steps)(images, objective, seeded())) for steps in (1, 10))
        assert clean < one <= ten
        assert ten - clean > 3 * (noise - clean).abs()

    def test_the_divergence_has_no_gradient_at_the_clean_images(self, images, labels, predict):
        double, heads = images.double(), lambda batch: predict(batch.float()).double()
        leaf = double.clone().requires_grad_()
        (flat,) = torch.autograd.grad(divergence_objective(heads, double)(leaf), leaf)
        (steep,) = torch.autograd.grad(cross_entropy_objective(heads, labels)(leaf), leaf)
        assert flat.abs().max() < 1e-6 * steep.abs().max()

    def test_a_random_start_lets_the_divergence_rise(self, images, predict):
        objective = divergence_objective(predict, images)
        assert objective(images) == pytest.approx(0.0, abs=1e-6)
        for start in ("uniform", "normal"):
            attacked = PGD(0.05, steps=3, step_size=0.02, start=start)(images, objective, seeded())
            random = (images + 0.05 * (2 * torch.rand(images.shape, generator=seeded()) - 1)).clamp(0, 1)
            assert objective(attacked) > 2 * objective(random)

    def test_no_parameter_collects_a_gradient_and_the_seed_decides(self, images, labels):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 28 * 20, 4))
        objective = cross_entropy_objective(network, labels)
        before = torch.get_rng_state()
        first, again = (PGD(0.03)(images, objective, seeded()) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, again)
        assert not torch.equal(first, PGD(0.03)(images, objective, torch.Generator().manual_seed(8)))
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_no_distance_is_no_attack(self, images, labels, predict):
        objective = cross_entropy_objective(predict, labels)
        for attack in (PGD(0.0), PyramidPGD(0.0)):
            assert torch.equal(attack(images, objective), images)

    def test_leading_dimensions_are_rows(self, images, labels, predict):
        def stacked(batch):
            return predict(batch.flatten(0, 1)).unflatten(0, (2, 3))

        objective = cross_entropy_objective(predict, labels)
        for attack in (PGD(0.03, start="zero"), PyramidPGD(0.003, start="zero")):
            found = attack(images.unflatten(0, (2, 3)), cross_entropy_objective(stacked, labels.unflatten(0, (2, 3))))
            torch.testing.assert_close(found.flatten(0, 1), attack(images, objective))


class TestPyramid:
    def test_it_reaches_31_epsilon_and_no_more(self, images):
        grey = torch.full_like(images, 0.5)
        attack = PyramidPGD(0.002, steps=4)
        attacked = attack(grey, lambda batch: batch.sum(), seeded())
        assert attack.reach(grey) == pytest.approx(31 * 0.002)
        torch.testing.assert_close(attacked, grey + 31 * 0.002, atol=1e-6, rtol=0)

    def test_levels_are_blocks_of_any_image_size(self, images):
        grey = torch.full((1, 1, 28, 20), 0.5)
        pattern = torch.randn(1, 1, 4, 4, generator=seeded()).sign()
        blocks = functional.interpolate(pattern, size=(28, 20), mode="nearest")
        attacked = PyramidPGD(0.001, steps=4, blocks=(4,), multipliers=(20.0,))(
            grey, lambda batch: (batch * blocks).sum(), seeded()
        )
        torch.testing.assert_close(attacked - grey, 0.021 * blocks, atol=1e-6, rtol=0)
        assert [size for size, _ in PyramidPGD(0.1).levels(torch.zeros(1, 1, 6, 6))] == [(4, 4), (6, 6), (6, 6)]

    @pytest.mark.parametrize("start", ["uniform", "normal"])
    def test_every_level_stays_in_a_box_of_its_own(self, images, start):
        seen = []

        class Watched(PyramidPGD):
            def _moved(self, images, deltas, levels):
                seen.append([delta.detach() for delta in deltas])
                return super()._moved(images, deltas, levels)

        # steps longer than the box, up and down by turns
        chance = seeded()
        attack = Watched(0.004, steps=5, step_size=0.01, start=start)
        attacked = attack(images, lambda batch: (batch * torch.randn(batch.shape, generator=chance)).sum(), seeded())
        assert [tuple(delta.shape[-2:]) for delta in seen[-1]] == [(4, 4), (8, 8), (28, 20)]
        assert max(float(delta.abs().max()) for deltas in seen for delta in deltas) <= 0.004 + 1e-7
        for level in range(3):
            assert float(seen[-1][level].abs().max()) == pytest.approx(0.004, abs=1e-7)
        assert (attacked - images).abs().max() <= 31 * 0.004 + 1e-6

    def test_every_level_is_cut_to_the_pixel_range(self, images):
        attacked = PyramidPGD(0.03)(images, lambda batch: batch.sum(), seeded())
        assert attacked.max() <= 1
        assert attacked.min() >= 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"epsilon": -0.1}, r"in \[0, 1\]; got -0.1"),
            ({"epsilon": 8.0}, r"8 / 255 = 0.031"),
            ({"epsilon": float("nan")}, "got nan"),
            ({"epsilon": 0.1, "steps": 0}, "at least 1 step"),
            ({"epsilon": 0.1, "step_size": 0.0}, "must be positive"),
            ({"epsilon": 0.1, "start": "unifrom"}, "Did you mean 'uniform'"),
        ],
    )
    def test_bad_settings(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            PGD(**settings)

    def test_levels_without_multipliers(self):
        with pytest.raises(ValueError, match="2 coarser levels and 1 multipliers"):
            PyramidPGD(0.1, multipliers=(20.0,))

    @pytest.mark.parametrize(
        "settings",
        [{"blocks": (4.5, 8)}, {"blocks": (0, 8)}, {"multipliers": (20.0, math.inf)}, {"multipliers": (-20.0, 10.0)}],
    )
    def test_levels_that_are_none(self, settings):
        with pytest.raises(ValueError, match="Blocks are whole numbers of at least 1 and multipliers positive; got"):
            PyramidPGD(0.1, **settings)

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            (torch.full((1, 1, 4, 4), 1.5), r"must lie in \[0, 1\]; these lie in \[1.5, 1.5\]"),
            (torch.full((1, 1, 4, 4), -0.5), "must lie in"),
            (torch.full((1, 1, 4, 4), float("nan")), "must lie in"),
            (torch.zeros(4, 4), "float tensors"),
            (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "Divide integers by 255"),
        ],
    )
    def test_bad_images(self, bad, reason):
        with pytest.raises(ValueError, match=reason):
            PGD(0.1)(bad, lambda batch: batch.sum())

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [({"mode": "apw"}, "Did you mean 'awp'"), ({"size": -1.0}, "must not be negative; got -1.0")],
    )
    def test_bad_weight_perturbations(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            WeightPerturbation(**settings)

    def test_an_unknown_direction(self):
        with pytest.raises(ValueError, match="Did you mean 'paper'"):
            divergence(torch.zeros(1, 2), torch.zeros(1, 2), "papers")


def test_directions_of_the_divergence_are_those_of_torch_distributions():
    clean, attacked = torch.randn(2, 5, 4, dtype=torch.float64)
    p, q = torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=attacked)
    torch.testing.assert_close(divergence(clean, attacked), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(divergence(clean, attacked, "paper"), torch.distributions.kl_divergence(q, p))


class TestWeights:
    @pytest.fixture
    def factors(self):
        generator = torch.Generator().manual_seed(2)
        made = {"a": torch.randn(3, 2, 8, generator=generator), "b": 5 * torch.randn(3, 6, 2, generator=generator)}
        return {name: value.double() for name, value in made.items()}

    @pytest.fixture
    def gradients(self, factors):
        return {name: torch.randn_like(value) * 1e-4 for name, value in factors.items()}

    def test_awp_has_a_length_relative_to_each_factor_along_its_gradient(self, factors, gradients):
        found = WeightPerturbation("awp", 5e-3).deltas(factors, gradients)
        for name, factor in factors.items():
            lengths = found[name].flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, 5e-3 * factor.flatten(1).norm(dim=1), atol=0, rtol=1e-12)
            cosines = functional.cosine_similarity(found[name].flatten(1), gradients[name].flatten(1), dim=1)
            torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))

    def test_the_scale_of_the_gradient_plays_no_part_in_awp_and_all_in_the_papers_form(self, factors, gradients):
        larger = {name: 1e3 * gradient for name, gradient in gradients.items()}
        for name in factors:
            awp, paper = (WeightPerturbation(mode, 1e-2) for mode in ("awp", "paper"))
            first, second = awp.deltas(factors, gradients)[name], awp.deltas(factors, larger)[name]
            torch.testing.assert_close(first, second, atol=0, rtol=1e-12)
            assert torch.equal(paper.deltas(factors, gradients)[name], 1e-2 * gradients[name])

    def test_a_vanishing_gradient_moves_nothing(self, factors):
        found = WeightPerturbation("awp", 0.1).deltas(factors, {"a": torch.zeros_like(factors["a"])})
        assert torch.equal(found["a"], torch.zeros_like(factors["a"]))

    def test_gauss_has_the_same_length_on_average(self, factors):
        # a chi with 16 degrees of freedom over 3000 draws: the mean square is off by 1.9 % at 3 sigma
        draws = [
            WeightPerturbation("gauss", 0.1).deltas(factors, {}, torch.Generator().manual_seed(seed))["a"]
            for seed in range(3000)
        ]
        square = torch.stack(draws).square().sum((-1, -2)).mean(0)
        expected = (0.1 * torch.linalg.matrix_norm(factors["a"])).square()
        torch.testing.assert_close(square, expected, atol=0, rtol=0.025)

    @pytest.mark.parametrize(("mode", "size"), [("none", 0.1), ("awp", 0.0), ("paper", 0.0), ("gauss", 0.0)])
    def test_none_and_nothing_are_inactive(self, factors, gradients, mode, size):
        perturbation = WeightPerturbation(mode, size)
        assert not perturbation.active
        assert perturbation.deltas(factors, gradients) == {}


class TestPerturbedSites:
    @staticmethod
    def program(data):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("seen", dist.Normal(data @ weight, 1.0).to_event(1), obs=torch.ones(len(data)))

    def test_the_likelihood_sees_the_perturbed_value_and_the_prior_the_sampled_one(self):
        data, value, delta = torch.randn(5, 3), torch.randn(3, requires_grad=True), torch.randn(3)
        conditioned = poutine.condition(PerturbedSites({"weight": delta})(self.program), {"weight": value})
        trace = poutine.trace(conditioned).get_trace(data)
        trace.compute_log_prob()
        prior = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(value)
        likelihood = dist.Normal(data @ (value + delta), 1.0).to_event(1).log_prob(torch.ones(5))
        assert torch.equal(trace.nodes["weight"]["value"], value)
        torch.testing.assert_close(trace.nodes["weight"]["log_prob"], prior)
        torch.testing.assert_close(trace.nodes["seen"]["log_prob"], likelihood)
        (found,) = torch.autograd.grad(trace.log_prob_sum(), value)
        torch.testing.assert_close(found, -value.detach() + data.T @ (torch.ones(5) - data @ (value + delta).detach()))

    def test_sites_without_a_perturbation_are_left_alone(self):
        data, value = torch.randn(5, 3), torch.randn(3)
        plain = poutine.trace(poutine.condition(self.program, {"weight": value})).get_trace(data)
        handled = poutine.trace(poutine.condition(PerturbedSites({"other": value})(self.program), {"weight": value}))
        assert torch.equal(handled.get_trace(data).log_prob_sum(), plain.log_prob_sum())


def test_a_graph_built_before_a_perturbation_in_place_cannot_be_used_after_it():
    # why no parameter is touched here: this is what perturbing in place does to features that were kept
    weight = torch.randn(3, 3, requires_grad=True)
    support = torch.tanh(torch.randn(4, 3) @ weight) @ weight
    with torch.no_grad():
        weight.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        support.sum().backward()
