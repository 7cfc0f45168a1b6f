"""PoLAR: merged weights, gradients, gauge, stacks, priors, and what is refused."""

import copy

import pyro.distributions as dist
import pytest
import torch

import pyrolora as pl
from pyrolora.guides import BLoB, MeanField, Point
from pyrolora.guides.build import build_guide
from pyrolora.inference.diagnostics import layer_summary
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import Adapter, PoLAR
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import Flat, Relative
from pyrolora.models.stiefel import stable_rank, uniform_point
from pyrolora.models.uniform_stiefel import UniformStiefel

IDS = torch.tensor([[5, 9, 17, 30], [40, 41, 42, 43]])
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


def random_draw(sites, *draws):
    return {
        site.name: (
            uniform_point(*draws, *site.shape, dtype=torch.float64)
            if site.prior is not None
            else torch.randn(*draws, *site.shape, dtype=torch.float64)
        )
        for site in sites
    }


def merged(backbone, sites, draw, scale, index=()):
    network = copy.deepcopy(backbone.network)
    for site in sites:
        if site.name.endswith("theta"):
            x, y = draw[site.name.replace("theta", "X")][index], draw[site.name.replace("theta", "Y")][index]
            for i, path in enumerate(site.modules):
                network.get_submodule(path).weight.data += scale * x[i] @ draw[site.name][index][i] @ y[i].mT
    return network


class TestMath:
    @pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), "all-linear"])
    def test_outputs_equal_those_of_merged_weights(self, backbone, targets):
        adapter = PoLAR(rank=3, alpha=5.0, targets=targets)
        sites = adapter.sites(backbone, None)
        draw = random_draw(sites)
        expected = merged(backbone, sites, draw, 5 / 3)(input_ids=IDS).logits
        backbone.bind(adapter.deltas(sites, draw))
        torch.testing.assert_close(backbone.network(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
        backbone.release()
        assert (backbone.network(input_ids=IDS).logits - expected).abs().max() > 0.1

    def test_draws_on_the_batch_axis_equal_draws_one_by_one(self, backbone):
        adapter = PoLAR(rank=2, layers=(1, 2))
        sites = adapter.sites(backbone, None)
        draw = random_draw(sites, 3)
        backbone.bind(adapter.deltas(sites, draw))
        together = backbone.network(input_ids=IDS.repeat(3, 1)).logits.unflatten(0, (3, 2))
        backbone.release()
        for k in range(3):
            expected = merged(backbone, sites, draw, 8.0, (k,))(input_ids=IDS).logits
            torch.testing.assert_close(together[k], expected, atol=1e-5, rtol=0)

    def test_the_start_leaves_the_network_as_it_was_to_the_bit(self, backbone):
        adapter = PoLAR(rank=4)
        sites = adapter.sites(backbone, None)
        start = adapter.initial(backbone, sites, torch.Generator().manual_seed(0))
        before = backbone.features(ROWS)
        backbone.bind(adapter.deltas(sites, start))
        assert torch.equal(backbone.features(ROWS), before)
        for name, value in start.items():
            assert torch.equal(value, adapter.initial(backbone, sites, torch.Generator().manual_seed(0))[name])

    def test_rotations_that_the_core_undoes_leave_the_outputs_as_they_were(self, backbone):
        adapter = PoLAR(rank=4, targets=("q_proj",))
        sites = adapter.sites(backbone, None)
        draw = random_draw(sites)
        backbone.bind(adapter.deltas(sites, draw))
        before = backbone.features(ROWS)
        left, right = (uniform_point(3, 4, 4, dtype=torch.float64) for _ in range(2))
        turned = {
            "q_proj.polar_X": draw["q_proj.polar_X"] @ left,
            "q_proj.polar_Y": draw["q_proj.polar_Y"] @ right,
            "q_proj.polar_theta": left.mT @ draw["q_proj.polar_theta"] @ right,
        }
        backbone.bind(adapter.deltas(sites, turned))
        torch.testing.assert_close(backbone.features(ROWS), before, atol=1e-5, rtol=0)

    def test_gradients_equal_finite_differences(self, backbone):
        adapter = PoLAR(rank=2, targets=("v_proj",), layers=(2,))
        sites = adapter.sites(backbone, None)
        names = [site.name for site in sites]

        def features(*values):
            backbone.bind(adapter.deltas(sites, dict(zip(names, values, strict=True))))
            return backbone.features(ROWS).sum(0)[:3]

        values = [value.requires_grad_() for value in random_draw(sites).values()]
        assert torch.autograd.gradcheck(features, values, eps=1e-3, atol=5e-3)  # the norms compute in float32


class TestSites:
    def test_shapes_dims_and_priors(self, three_topics_model):
        model = three_topics_model(adapter=PoLAR(rank=2, targets=["v_proj"]), prior=dist.Normal(0.0, 0.1))
        shapes = {name: tuple(site.shape) for name, site in model.sites.items()}
        assert shapes == {"v_proj.polar_X": (3, 16, 2), "v_proj.polar_theta": (3, 2, 2), "v_proj.polar_Y": (3, 32, 2)}
        assert all(len(site.dims) == 3 and len(site.keys) == 3 for site in model.sites.values())
        assert isinstance(model.prior(model.sites["v_proj.polar_X"]), UniformStiefel)
        assert "UniformStiefel" in model.site_table()

    @pytest.mark.parametrize(
        "prior", [Flat(), {"*": dist.Normal(0.0, 1.0)}, {"*theta": Flat()}, {"*X": Flat(), "*theta": Flat()}]
    )
    def test_factors_keep_their_uniform_prior(self, three_topics_model, prior):
        model = three_topics_model(adapter=PoLAR(rank=2, targets=["v_proj"]), prior=prior)
        assert isinstance(model.prior(model.sites["v_proj.polar_X"]), UniformStiefel)
        assert isinstance(model.prior(model.sites["v_proj.polar_Y"]), UniformStiefel)

    def test_any_guide_of_the_core_goes_with_points_at_the_factors(self, three_topics_model):
        model = three_topics_model(adapter=PoLAR(rank=2))
        both = {"*theta": MeanField(), "*_[XY]": Point()}
        for specification in (MeanField(), {"*theta": MeanField()}, both, {"*.polar_*": MeanField()}):
            guide = build_guide(specification, model)
            draws = guide.sample(2)
            assert torch.equal(*draws["q_proj.polar_X"])
            assert not torch.equal(*draws["q_proj.polar_theta"])
            assert len(guide.parameters_by_role()["manifold"]) == 4

    def test_a_posterior_survives_saving_with_no_registration(self, three_topics_model, tmp_path):
        model = three_topics_model(torch.float32, adapter=PoLAR(rank=2))
        posterior = SVI(guide=MeanField(), steps=3).fit(model, model.task.train, progress=False)
        loaded = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "p"), model=model)
        assert Adapter.from_dict(PoLAR(rank=2).to_dict()) == PoLAR(rank=2)
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        for name, value in posterior.sample(2, generator=seeds[0]).items():
            assert torch.equal(value, loaded.sample(2, generator=seeds[1])[name]) or name.endswith("theta")
        probs = [p.predict(model.task.test, kind="mean").probs for p in (posterior, loaded)]
        assert torch.equal(*probs)

    def test_relative_scales_give_the_declared_change(self, three_topics_model):
        """X and Y keep the norm of Theta: 3 layers of 400 draws of 9 squares, relative standard error 1.4 %; five of them."""
        adapter = PoLAR(rank=3, alpha=5.0, targets=["down_proj"])
        model = three_topics_model(adapter=adapter, prior=Relative(0.2))
        (site,) = (site for site in model.sites.values() if site.prior is None)
        cores = model.prior(site).sample((400,))
        start = model.initial(torch.Generator().manual_seed(0))
        for layer in range(3):
            weight = model.backbone.network.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
            x, y = (start[site.name.replace("theta", factor)][layer] for factor in ("X", "Y"))
            change = 5.0 / 3 * x @ cores[:, layer] @ y.mT
            ratio = (change.square().sum((1, 2)).mean() / weight.square().sum()).sqrt()
            assert ratio == pytest.approx(0.2, rel=0.07)

    def test_spectra_and_widths_by_layer_know_the_factors(self, three_topics_model):
        model = three_topics_model(torch.float32, adapter=PoLAR(rank=2))
        posterior = MAP(steps=3, learning_rate=1e-2).fit(model, model.task.train, progress=False)
        summary = layer_summary(posterior)
        cores = posterior.mean()["v_proj.polar_theta"]
        found = torch.as_tensor(summary["stable_rank"].sel(projection="v_proj").values)
        torch.testing.assert_close(found, stable_rank(cores).double(), atol=1e-4, rtol=0)
        prior = summary["prior_sd"].sel(site="q_proj.polar_Y").values
        assert prior == pytest.approx(32**-0.5)

    def test_it_is_public(self):
        assert pl.PoLAR is PoLAR


class TestRefusals:
    def test_a_rank_above_a_dimension(self, backbone):
        with pytest.raises(ValueError, match=r"Rank 17 exceeds the smaller side of v_proj \(32 x 16\).*at most 16"):
            PoLAR(rank=17).sites(backbone, None)

    def test_a_square_matrix_is_no_special_case(self, three_topics_model):
        # q is 32 x 32 and the rank is all of it
        model = three_topics_model(torch.float32, adapter=PoLAR(rank=32, targets=["q_proj"], layers=(2,)))
        posterior = MAP(steps=3).fit(model, model.task.train, progress=False)
        assert posterior.record["history"][-1]["orthogonality_error"] < 2e-5

    def test_settings_out_of_range(self):
        with pytest.raises(ValueError, match="The rank must be at least 1; got 0"):
            PoLAR(rank=0)
        with pytest.raises(ValueError, match="alpha must be positive; got -1"):
            PoLAR(alpha=-1)

    def test_a_prior_over_real_numbers_on_a_factor(self, three_topics_model):
        with pytest.raises(ValueError, match=r"a Normal with support Real\(\).*lives on Stiefel\(\)"):
            three_topics_model(adapter=PoLAR(rank=2), prior={"*X": dist.Normal(0.0, 1.0), "*theta": Flat()})

    def test_a_guide_over_real_numbers_on_a_factor(self, three_topics_model):
        with pytest.raises(ValueError, match=r"MeanField is a posterior over real numbers.*Use Point\(\)"):
            build_guide({"*": Point(), "*X": MeanField()}, three_topics_model(adapter=PoLAR(rank=2)))

    def test_blob_that_would_make_no_site_bayesian(self, three_topics_model):
        with pytest.raises(ValueError, match="BLoB makes sites that match"):
            build_guide(BLoB(), three_topics_model(adapter=PoLAR(rank=2)))
