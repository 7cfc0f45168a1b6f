"""Priors: every form of declaration against torch.distributions, and what is refused."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrolora.models.adapters import LoRA
from pyrolora.models.declarations import declared_prior
from pyrolora.models.prior_declarations import Flat, learned, logit_scale
from pyrolora.models.prior_distributions import fit_to_site, move
from pyrolora.models.priors import Prior
from pyrolora.models.sites import Site, SiteTable

A = Site("q_proj.lora_A", torch.Size((2, 3, 4)), ("layer", "rank", "in_feature"))
B = Site("q_proj.lora_B", torch.Size((2, 5, 3)), ("layer", "out_feature", "rank"))
SITES = SiteTable([A, B])
MIXTURE = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.25, 0.75])), dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.01]))
)
CORRELATED = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 0.5)


class TestForms:
    @pytest.mark.parametrize(
        ("declaration", "density"),
        [
            (dist.Normal(0.0, 0.2), torch.distributions.Normal(0.0, 0.2)),
            (dist.StudentT(4.0, 0.0, 0.1), torch.distributions.StudentT(4.0, 0.0, 0.1)),
            (lambda site: dist.Laplace(0.0, 0.3), torch.distributions.Laplace(0.0, 0.3)),
            (dist.Normal(torch.zeros(3, 4), 0.2).to_event(1), torch.distributions.Normal(0.0, 0.2)),
            (learned(0.05), torch.distributions.Normal(0.0, 0.05)),
            (MIXTURE, MIXTURE),
        ],
    )
    def test_a_site_is_one_event_with_the_declared_density(self, declaration, density):
        prior = Prior({"*_A": declaration, "*_B": Flat()}, SITES)(A)
        value = torch.randn(A.shape)
        assert (prior.batch_shape, prior.event_shape) == (torch.Size(), A.shape)
        assert prior.sample().shape == A.shape
        torch.testing.assert_close(prior.log_prob(value), density.log_prob(value).sum())

    def test_a_vector_distribution_is_repeated_over_the_leading_dimensions(self):
        value = torch.randn(A.shape)
        torch.testing.assert_close(fit_to_site(CORRELATED, A).log_prob(value), CORRELATED.log_prob(value).sum())

    def test_a_flat_priors_zeros_are_where_and_what_the_value_is(self):
        value = torch.zeros(A.shape, dtype=torch.float64, device="meta")
        zeros = Prior({"*_A": Flat(), "*_B": Flat()}, SITES)(A).log_prob(value)
        assert (zeros.shape, zeros.dtype, zeros.device.type) == ((), torch.float64, "meta")

    @pytest.mark.parametrize("declaration", [Flat(), lambda site: Flat()])
    def test_flat_is_zero_everywhere_and_cannot_be_sampled(self, declaration):
        prior = Prior(declaration, SITES)(A)
        assert prior.log_prob(1e3 * torch.randn(A.shape)) == 0
        with pytest.raises(NotImplementedError):
            prior.sample()

    @pytest.mark.parametrize("declaration", [dist.Normal(0.0, 0.2), lambda site: dist.Normal(0.0, 0.2), MIXTURE])
    def test_draws_have_the_type_of_the_sites(self, declaration):
        prior = Prior(declaration, SITES, dtype=torch.float64)(A)
        assert prior.sample().dtype == torch.float64
        assert prior.log_prob(prior.sample()).dtype == torch.float64

    @pytest.mark.parametrize("declaration", [MIXTURE, CORRELATED, dist.Categorical(torch.ones(3))])
    def test_moving_works_after_torch_kept_second_parameters(self, declaration):
        for name in ("logits", "scale_tril", "precision_matrix"):
            getattr(declaration, name, None)  # kept in the instance from now on
        moved = move(declaration, torch.device("cpu"), torch.float64)
        value = torch.zeros(declaration.event_shape, dtype=torch.float64)
        torch.testing.assert_close(moved.log_prob(value).float(), declaration.log_prob(value.float()))


class TestHierarchy:
    def test_a_scale_a_rank_is_sampled_and_shows_among_the_sites(self, three_topics_model):
        rank = 2

        def ard(site):
            scale = pyro.sample(f"{site.name}.scale", dist.HalfCauchy(torch.ones(rank)).to_event(1))
            return dist.Normal(0.0, scale[:, None] if site.name.endswith("lora_A") else scale)

        model = three_topics_model(torch.float32, adapter=LoRA(rank=rank, targets=["q_proj"]), prior=ard)
        names = [f"q_proj.lora_{factor}{end}" for factor in "AB" for end in (".scale", "")]
        assert list(model.sites) == names
        hyper = model.sites["q_proj.lora_A.scale"]
        assert (hyper.shape, hyper.hyper) == (torch.Size((rank,)), True)
        assert hyper.support.check(torch.tensor([0.5, 2.0]))
        assert not hyper.support.check(torch.tensor([0.5, -2.0]))
        scales = torch.tensor([0.1, 10.0])
        draw = {name: scales for name in names if name.endswith("scale")}
        trace = poutine.trace(poutine.condition(model.sample_sites, draw)).get_trace()
        nodes, expected = trace.nodes, torch.distributions.Normal(0.0, scales)
        a, b = nodes["q_proj.lora_A"], nodes["q_proj.lora_B"]
        torch.testing.assert_close(a["fn"].log_prob(a["value"]), expected.log_prob(a["value"].mT).sum())
        torch.testing.assert_close(b["fn"].log_prob(b["value"]), expected.log_prob(b["value"]).sum())

    def test_a_hyper_site_that_is_no_single_event_is_refused(self, three_topics_model):
        def ard(site):
            return dist.Normal(0.0, pyro.sample(f"{site.name}.scale", dist.HalfCauchy(torch.ones(2)))[:, None])

        with pytest.raises(ValueError, match=r"'q_proj\.lora_A\.scale' with the batch shape \(2,\)"):
            three_topics_model(torch.float32, prior={"*_A": ard, "*_B": Flat()})


class TestRefusals:
    @pytest.mark.parametrize(
        ("declaration", "error", "message"),
        [
            (dist.Normal(torch.zeros(7), 1.0), ValueError, r"shape \(7,\), which does not broadcast .*\(2, 3, 4\)"),
            (dist.Normal(torch.zeros(9, 2, 3, 4), 1.0), ValueError, "does not broadcast"),
            (dist.HalfNormal(1.0), ValueError, "is a HalfNormal with support .* use a distribution over all of them"),
            (dist.Uniform(-1.0, 1.0), ValueError, "is a Uniform with support"),
            (lambda site: dist.LogNormal(0.0, 1.0), ValueError, "is a LogNormal with support"),
            (lambda site: 0.2, TypeError, r"callable returned a float for 'q_proj\.lora_A'"),
            (0.2, TypeError, r"prior of 'q_proj\.lora_A' is a float; expected a Pyro distribution, Flat\(\)"),
            (dist.Normal, TypeError, "is the class Normal; expected"),
            (Flat, TypeError, "is the class Flat; expected"),
        ],
    )
    def test_wrong_shapes_supports_and_kinds(self, declaration, error, message):
        with pytest.raises(error, match=message):
            Prior({"*_A": declaration, "*_B": Flat()}, SITES)(A)

    def test_a_pattern_of_no_site_offers_the_nearest(self):
        with pytest.raises(ValueError, match=r"'\*\.loraA' matches no site. Did you mean 'q_proj\.lora_A'"):
            Prior({"*.loraA": Flat(), "*_B": Flat()}, SITES)

    @pytest.mark.parametrize("settings", [{"scale": 0.0}, {"strength": -1.0}, {"after": 1.0}])
    def test_learned_scales_have_limits(self, settings):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}.*got {next(iter(settings.values()))}"):
            learned(**({"scale": 0.1} | settings))


class TestLearned:
    def test_the_update_maximises_the_penalised_elbo(self):
        moment, start, strength, weights = 0.3, 0.1, 0.7, A.numel
        prior = Prior(learned(start, strength=strength, after=0.0), SITES, dtype=torch.float64)
        prior.update_scales({name: torch.tensor(moment, dtype=torch.float64) for name in SITES}, 0.0)
        variance = (prior.scales[A.name] ** 2).requires_grad_()
        # E_q[log N(w; 0, v)] of n weights, and the hyper-prior: strength * n further weights of the first scale
        objective = -0.5 * weights * (variance.log() + moment / variance)
        objective = objective - 0.5 * strength * weights * (variance.log() + start**2 / variance)
        (gradient,) = torch.autograd.grad(objective, variance, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, variance)
        assert abs(gradient.item()) < 1e-9
        assert curvature < 0
        torch.testing.assert_close(prior(A).stddev, prior.scales[A.name].expand(A.shape))

    def test_scales_stay_until_their_time_and_are_one_a_site(self):
        prior = Prior({"*_A": learned(0.1, after=0.5), "*_B": learned(0.1, after=0.0, strength=0.0)}, SITES)
        prior.update_scales({A.name: torch.tensor(4.0), B.name: torch.tensor(9.0)}, progress=0.4)
        assert [round(scale.item(), 6) for scale in prior.scales.values()] == [0.1, 3.0]

    def test_a_scale_with_nothing_to_hold_it_up_stays_positive(self):
        prior = Prior(learned(0.1, after=0.0, strength=0.0), SITES)
        prior.update_scales({A.name: torch.tensor(0.0), B.name: torch.tensor(0.0)}, progress=1.0)
        assert all(scale > 0 and prior(site).log_prob(torch.zeros(site.shape)).isfinite()
                   for scale, site in zip(prior.scales.values(), (A, B), strict=True))  # fmt: skip


class TestScalesOfAnotherPrior:
    def test_a_prior_declared_alike_gives_its_scales(self):
        mine, other = (Prior(learned(0.1, after=0.0, strength=0.0), SITES) for _ in range(2))
        other.update_scales({A.name: torch.tensor(4.0), B.name: torch.tensor(9.0)}, progress=0.0)
        assert mine.adopt(other)
        assert [float(scale) for scale in mine.scales.values()] == [2.0, 3.0]
        mine.reset_scales()
        assert [float(scale) for scale in other.scales.values()] == [2.0, 3.0], "they are copies"

    def test_a_prior_declared_otherwise_does_not(self):
        mine, other = Prior(learned(0.1), SITES), Prior(learned(0.2), SITES)
        assert not mine.adopt(other)
        assert {round(float(scale), 6) for scale in mine.scales.values()} == {0.1}

    def test_scales_of_a_logit_are_taken_once_features_have_been_seen(self):
        head = SiteTable([Site("head.weight", torch.Size((3, 16)), ("class", "feature"))])
        mine, other = (Prior(logit_scale(2.0), head) for _ in range(2))
        assert not mine.adopt(other)
        other.calibrate(mean_square=4.0)
        assert mine.adopt(other)
        assert float(mine.scales["head.weight"]) == 1.0

    def test_a_site_that_makes_no_logit_has_no_scale_of_one(self):
        with pytest.raises(ValueError, match=r"logit_scale is the width of a logit, which '.*' does not make alone"):
            Prior(logit_scale(2.0), SITES)


class TestRelevance:
    """Learned scales along the dimensions of a site."""

    @pytest.mark.parametrize("per", [("layer",), ("rank",), ("layer", "rank"), A.dims])
    def test_every_group_is_where_the_gradient_of_its_elbo_vanishes(self, per):
        strength, start = 0.7, 0.1
        prior = Prior({"*_A": learned(start, strength=strength, after=0.0, per=per), "*_B": Flat()}, SITES)
        source = torch.Generator().manual_seed(0)
        loc, width = torch.randn(A.shape, generator=source), torch.rand(A.shape, generator=source)
        prior.update_scales({A.name: loc.square() + width.square()}, progress=1.0)
        scale = prior.scales[A.name].double().requires_grad_()
        q = torch.distributions.Normal(loc.double(), width.double())
        p = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), scale)
        # as many further weights of the first scale, in expectation
        centre = torch.distributions.Normal(torch.zeros(A.shape, dtype=torch.float64), start)
        loss = (
            torch.distributions.kl_divergence(q, p).sum()
            + strength * torch.distributions.kl_divergence(centre, p).sum()
        )
        (gradient,) = torch.autograd.grad(loss, scale)
        groups = [size if name in per else 1 for name, size in zip(A.dims, A.shape, strict=True)]
        assert list(scale.shape) == groups
        assert gradient.abs().max() < 1e-4 * loss.abs()
        assert scale.flatten().unique().numel() == scale.numel()
        torch.testing.assert_close(prior(A).stddev, prior.scales[A.name].expand(A.shape))

    def test_the_fixed_point_is_the_evidence_of_a_conjugate_model(self):
        """Regression with orthogonal inputs: EM on (q, s) ends where the marginal likelihood is highest, group by group."""
        precision, source = 25.0, torch.Generator().manual_seed(0)
        spread = torch.linspace(0.5, 2.0, A.shape[0] * A.shape[1], dtype=torch.float64).reshape(*A.shape[:2], 1)
        estimate = spread * (1 + 0.1 * torch.rand(A.shape, generator=source, dtype=torch.float64))
        prior = Prior(
            {"*_A": learned(1.0, strength=0.0, after=0.0, per=("layer", "rank")), "*_B": Flat()},
            SITES,
            dtype=torch.float64,
        )
        for _ in range(100):
            variance = 1 / (precision + prior.scales[A.name].pow(-2))
            moments = (variance * precision * estimate).square() + variance
            prior.update_scales({A.name: moments}, progress=1.0)
        # an estimate of a weight is Normal(0, s^2 + 1 / precision): the variance of highest likelihood is its mean square
        best = (estimate.square().mean(-1, keepdim=True) - 1 / precision).sqrt()
        torch.testing.assert_close(prior.scales[A.name], best, rtol=1e-10, atol=0)

    def test_a_part_that_only_adds_noise_is_switched_off_down_to_the_floor_of_its_strength(self):
        """Curvature without a signal on one rank, both on another, neither on the third."""
        start, strength = 0.1, 0.01
        prior = Prior(
            {"*_A": learned(start, strength=strength, after=0.0, per="rank"), "*_B": Flat()}, SITES, dtype=torch.float64
        )
        precision = torch.tensor([1e6, 1e6, 0.0], dtype=torch.float64)[:, None]
        signal = torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64)[:, None]
        assert A.shape[1] == 3
        for _ in range(500):
            variance = 1 / (precision + prior.scales[A.name].pow(-2))
            moments = ((variance * precision * signal).square() + variance).expand(A.shape)
            prior.update_scales({A.name: moments}, progress=1.0)
        noise, used, silent = prior.scales[A.name].flatten().tolist()
        floor = start * (strength / (1 + strength)) ** 0.5
        assert floor < noise < 1.02 * floor
        assert used == pytest.approx(0.3, rel=0.01)
        assert silent == pytest.approx(start, rel=1e-6)

    def test_updates_come_every_so_many_steps(self):
        prior = Prior({"*_A": learned(0.1, after=0.25, every=3, per="rank"), "*_B": learned(0.1)}, SITES)
        due = [prior.due_scales(step / 10, step) for step in range(1, 11)]
        assert [A.name in names for names in due] == [False, False, True, False, False, True, False, False, True, False]
        assert [B.name in names for names in due] == [False] * 4 + [True] * 6
        prior.update_scales({A.name: torch.ones(A.shape)}, 0.4, step=4)
        assert (prior.scales[A.name] == 0.1).all()

    def test_a_dimension_that_the_site_lacks_offers_the_nearest(self):
        with pytest.raises(ValueError, match=r"'ranks', which is none of its dimensions .* Did you mean 'rank'"):
            Prior(learned(0.1, per=("layer", "ranks")), SITES)
        with pytest.raises(ValueError, match="`every` counts steps between updates"):
            learned(0.1, every=0)

    def test_description_and_text_keep_the_groups(self):
        declaration = declared_prior("learned(0.1, per=('layer', 'rank'), every=5)")
        assert declaration == learned(0.1, per=("layer", "rank"), every=5)
        prior = Prior(declaration, SITES)
        again = Prior.specification_from_dict(json.loads(json.dumps(prior.to_dict())))
        assert again == dict.fromkeys(SITES, declaration)
        older = {A.name: {"prior": "learned", "scale": 0.1, "strength": 1.0, "after": 0.5}}
        assert Prior.specification_from_dict(older) == {A.name: learned(0.1)}


class TestDescription:
    def test_a_specification_survives_its_json_description(self):
        sites = SiteTable([A, B, Site("head", torch.Size((4,)), ("feature",)), Site("x", torch.Size((2,)), ("y",))])
        CORRELATED.precision_matrix  # noqa: B018 - torch keeps it, the description must not
        specification = {"*_A": dist.Normal(torch.zeros(4), 0.2).to_event(1), "*_B": Flat(), "head": CORRELATED}
        prior = Prior({**specification, "x": learned(0.3, after=0.25)}, sites)
        again = Prior(Prior.specification_from_dict(prior.to_dict()), sites)
        assert again.to_dict() == prior.to_dict()
        for site in sites.values():
            value = torch.randn(site.shape)
            torch.testing.assert_close(again(site).log_prob(value), prior(site).log_prob(value))

    def test_what_a_file_cannot_hold_is_said(self):
        described = Prior({"*_A": lambda site: dist.Normal(0.0, 1.0), "*_B": MIXTURE}, SITES).to_dict()
        for name in described:
            with pytest.raises(ValueError, match=r"was the callable .* pass it as model="):
                Prior.specification_from_dict({name: described[name]})
        with pytest.raises(ValueError, match=r"Unknown prior 'Norml'.*Did you mean 'Normal'"):
            Prior.specification_from_dict({A.name: {"prior": "Norml", "parameters": {}}})
