"""Guides: parameters at once, composition by pattern, copies, states, draws."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints

from pyrolora.guides import BLoB, Family, FullCovariance, KroneckerNormal, LowRank, MeanField, Point, build_guide
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.prior_declarations import Flat

FAMILIES = [
    Point(),
    MeanField(),
    BLoB(),
    LowRank(rank=2),
    KroneckerNormal(rank=2),
    {"*.lora_A": BLoB(), "*.lora_B": Point(), "head.weight": FullCovariance()},
]


def ard(site):
    """A scale for each rank, half-Normal, and a real-valued log scale for the head."""
    if site.name == "head.weight":
        return dist.Normal(0.0, pyro.sample("head.log_scale", dist.Normal(-1.0, 0.5)).exp())
    if site.name.endswith("lora_B"):
        return dist.Normal(0.0, 0.2)
    scale = pyro.sample(f"{site.name}.scale", dist.HalfNormal(0.2).expand([site.shape[1]]).to_event(1))
    return dist.Normal(0.0, scale[:, None])


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(torch.float32, adapter=[LoRA(rank=2), LastLayer()])


@pytest.fixture
def hierarchical(three_topics_model):
    return three_topics_model(torch.float32, adapter=[LoRA(rank=2), LastLayer()], prior=ard)


def batch_of(model):
    return next(iter(model.encode(model.task.train).batches(6)))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestEveryFamily:
    def test_parameters_exist_before_any_forward(self, model, family):
        model.backbone.network.forward = None
        guide = build_guide(family, model)
        assert guide.state_dict()
        assert all(isinstance(parameter, torch.nn.Parameter) for parameter in guide.parameters())

    @pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
    def test_pyros_own_elbo_reaches_every_parameter_without_the_param_store(self, model, family, elbo):
        guide = build_guide(family, model)
        elbo().loss_and_grads(model, guide, batch_of(model))
        dead = [name for name, parameter in guide.named_parameters() if parameter.grad is None]
        assert dead == []
        assert list(pyro.get_param_store().keys()) == []

    def test_a_deep_copy_is_independent_and_leaves_the_original_usable(self, model, family):
        guide = build_guide(family, model)
        before = {key: value.clone() for key, value in guide.state_dict().items()}
        twin = copy.deepcopy(guide)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(value, before[key]) for key, value in guide.state_dict().items())
        assert [factor.family for _, factor in twin.items()] == [factor.family for _, factor in guide.items()]
        for either in (guide, twin):
            TraceMeanField_ELBO().loss_and_grads(model, either, batch_of(model))

    def test_a_state_dict_carries_the_whole_posterior(self, model, family):
        fitted = build_guide(family, model, generator=torch.Generator().manual_seed(1))
        fresh = build_guide(family, model, generator=torch.Generator().manual_seed(2))
        fresh.load_state_dict(fitted.state_dict())
        draws = [guide.sample(3, torch.Generator().manual_seed(0)) for guide in (fitted, fresh)]
        assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])

    def test_draws_follow_the_generator_and_leave_the_global_state_alone(self, model, family):
        guide = build_guide(family, model, generator=torch.Generator().manual_seed(0))
        before = torch.get_rng_state()
        first, again, other = (guide.sample(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        for name, factor in guide.items():
            assert first[name].shape == (4, *model.sites[name].shape)
            assert torch.equal(first[name], again[name])
            assert torch.equal(first[name], other[name]) == ("scale" not in factor.roles.values())
        assert guide.log_prob(first).shape == (4,)

    def test_roles_divide_the_parameters_among_learning_rates(self, model, family):
        guide = build_guide(family, model)
        by_role = guide.parameters_by_role()
        assert set(by_role) == {"loc", "scale", "point", "manifold"}
        assert sorted(id(parameter) for role in by_role.values() for parameter in role) == sorted(
            map(id, guide.parameters())
        )

    def test_second_moments_are_those_of_the_draws(self, model, family):
        guide = build_guide(family, model)
        drawn = guide.sample(4000, torch.Generator().manual_seed(0))
        for name, moment in guide.second_moments().items():
            assert moment.shape == model.sites[name].shape
            assert drawn[name].square().mean().item() == pytest.approx(moment.mean().item(), rel=0.03, abs=1e-12)
        assert list(guide.second_moments(["q_proj.lora_A"])) == ["q_proj.lora_A"]

    def test_a_family_survives_json(self, model, family):
        for single in family.values() if isinstance(family, dict) else [family]:
            assert Family.from_dict(single.to_dict()) == single


class TestComposition:
    @pytest.mark.parametrize(
        ("patterns", "named"),
        [
            ({"*.lora_A": BLoB(), "*.lora_B": Point()}, "No guide for the site 'head.weight'"),
            ({"*": Point(), "q_proj.*": BLoB()}, "'q_proj.lora_A' matches two guide patterns, '\\*' and 'q_proj.\\*'"),
            ({"*.lora_?": Point(), "head.wieght": BLoB()}, "Did you mean 'head.weight'"),
        ],
        ids=["gap", "overlap", "unknown"],
    )
    def test_patterns_that_do_not_partition_the_sites_are_refused(self, model, patterns, named):
        with pytest.raises(ValueError, match=named):
            build_guide(patterns, model)

    @pytest.mark.parametrize("what", [BLoB, {"*": BLoB}, "blob"], ids=["class", "class in a mapping", "text"])
    def test_a_class_instead_of_an_instance_is_a_type_error(self, model, what):
        with pytest.raises(TypeError, match=r"as in BLoB\(\)"):
            build_guide(what, model)

    @pytest.mark.parametrize(
        ("start", "named"),
        [({"q_proj.lora_a": torch.zeros(1)}, "q_proj.lora_A"), ({"head.weight": torch.zeros(2)}, "3")],
    )
    def test_a_start_that_does_not_fit_is_refused(self, model, start, named):
        with pytest.raises(ValueError, match=named):
            build_guide(Point(), model, start=start)

    def test_means_begin_at_the_start(self, model):
        start = {"head.weight": torch.randn(3, 32)}
        assert torch.equal(build_guide(MeanField(), model, start=start).mean()["head.weight"], start["head.weight"])

    def test_an_unknown_family_or_setting_offers_the_nearest(self):
        with pytest.raises(ValueError, match="'BLoB'"):
            Family.from_dict({"family": "Blob"})
        with pytest.raises(ValueError, match="'init_scale'"):
            Family.from_dict({"family": "BLoB", "initscale": 1.0})

    @pytest.mark.parametrize("make", [lambda: BLoB(init_scale=0.0), lambda: MeanField(-1.0), lambda: LowRank(rank=0)])
    def test_settings_out_of_range_are_refused(self, make):
        with pytest.raises(ValueError, match=r"must be (positive|at least 1); got"):
            make()


class TestBLoB:
    def test_a_model_with_nothing_for_it_to_make_bayesian_is_refused(self, three_topics_model):
        head_only = three_topics_model(torch.float32, adapter=LastLayer())
        with pytest.raises(ValueError, match=r"none of head.weight does.*BLoB\(sites='head.weight'\)"):
            build_guide(BLoB(), head_only)
        assert not build_guide(BLoB(sites="head.weight"), head_only).parameters_by_role()["point"]

    def test_the_standard_deviation_is_the_square_of_its_parameter(self, model):
        factor = dict(build_guide(BLoB(init_scale=0.09), model).items())["q_proj.lora_A"]
        assert torch.allclose(factor.root_scale, torch.full_like(factor.root_scale, 0.3))
        normal = factor.distribution()
        assert isinstance(normal.base_dist, dist.Normal)
        assert torch.equal(normal.stddev, factor.root_scale**2)
        with torch.no_grad():
            factor.root_scale.neg_()
        assert torch.all(factor.distribution().stddev > 0)

    def test_a_is_normal_b_and_head_are_points(self, model):
        kinds = {name: type(factor).__name__ for name, factor in build_guide(BLoB(), model).items()}
        assert kinds["q_proj.lora_A"] == kinds["v_proj.lora_A"] == "SquaredScaleFactor"
        assert kinds["q_proj.lora_B"] == kinds["head.weight"] == "PointFactor"

    def test_the_width_starts_at_the_priors_own(self, model):
        factor = dict(build_guide(BLoB(), model).items())["v_proj.lora_A"]
        assert torch.allclose(factor.scale, torch.tensor(0.2))

    def test_hyper_sites_get_a_mean_field_posterior_whatever_their_support(self, hierarchical):
        factors = dict(build_guide(BLoB(), hierarchical).items())
        assert type(factors["q_proj.lora_A.scale"]).__name__ == "TransformedNormalFactor"
        assert type(factors["head.log_scale"]).__name__ == "NormalFactor"


class TestHyperSites:
    @pytest.mark.parametrize("family", [Point(), MeanField(), BLoB()], ids=str)
    def test_draws_satisfy_the_constraint(self, hierarchical, family):
        guide = build_guide(family, hierarchical)
        assert constraints.positive.check(guide.sample(20)["q_proj.lora_A.scale"]).all()
        assert constraints.positive.check(guide.mean()["q_proj.lora_A.scale"]).all()
        TraceMeanField_ELBO().loss_and_grads(hierarchical, guide, batch_of(hierarchical))
        assert all(parameter.grad is not None for parameter in guide.parameters())

    @pytest.mark.parametrize("family", [LowRank(), FullCovariance()], ids=str)
    def test_families_of_real_weights_refuse_a_constrained_site(self, hierarchical, family):
        patterns = {"*.scale": family, "*.lora_?": Point(), "head.*": Point()}
        with pytest.raises(ValueError, match="MeanField there"):
            build_guide(patterns, hierarchical)

    def test_low_rank_refuses_a_scalar_site(self, hierarchical):
        with pytest.raises(ValueError, match=r"head\.log_scale.*MeanField there"):
            build_guide({"head.log_scale": LowRank(), "*.lora_*": Point(), "head.weight": Point()}, hierarchical)

    def test_the_generator_decides_where_hyper_sites_start(self, hierarchical):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first = build_guide(MeanField(), hierarchical, generator=torch.Generator().manual_seed(0)).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(4)
        again = build_guide(MeanField(), hierarchical, generator=torch.Generator().manual_seed(0)).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)

    def test_a_hyper_site_under_a_plate_is_refused_with_the_remedy(self, three_topics_model):
        def plated(site):
            with pyro.plate(f"{site.name}.rank", 2):
                pyro.sample(f"{site.name}.scale", dist.HalfNormal(1.0))
            return dist.Normal(0.0, 0.2)

        with pytest.raises(ValueError, match=r"to_event\(1\)"):
            three_topics_model(prior=plated)


def test_families_without_a_prior_width_start_at_a_tenth(three_topics_model):
    guide = build_guide(MeanField(), three_topics_model(prior=Flat()))
    assert all(torch.allclose(factor.scale, torch.tensor(0.1, dtype=torch.float64)) for _, factor in guide.items())
