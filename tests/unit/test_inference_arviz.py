"""Posteriors as an `xarray.DataTree`: named dims, draws that belong together, and ArviZ 0.23 on top."""

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyrolora.guides import BLoB, MeanField, Point, build_guide
from pyrolora.inference import arviz as export
from pyrolora.inference.arviz import combine_chains, to_inference_data
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.prior_declarations import Flat, learned

LORA = LoRA(rank=2, alpha=4.0, layers=(1, 2))
NORMAL = dist.Normal(0.0, 0.2)
SHORT = {"steps": 3, "batch_size": 6}


@pytest.fixture
def blob(three_topics_model):
    """A short BLoB fit whose A is proper and whose B is flat."""
    model = three_topics_model(torch.float32, LORA, {"*.lora_A": NORMAL, "*.lora_B": Flat()})
    return SVI(guide=BLoB(), kl_weight=0.5, seed=7, **SHORT).fit(model, model.task.train, progress=False)


@pytest.fixture
def head(three_topics_model):
    """A Laplace posterior of the last layer, the small site that an analyst looks at."""
    model = three_topics_model(torch.float32, [LORA, LastLayer()], NORMAL)
    return Laplace(structure="last_layer", estimate=MAP(**SHORT)).fit(model, model.task.train, progress=False)


def test_groups_dims_and_coords(blob):
    tree = blob.to_arviz(draws=4, data=blob.model.task.test)
    assert isinstance(tree, xarray.DataTree)
    assert set(tree.children) == {
        "posterior", "prior", "sample_stats", "posterior_predictive", "log_likelihood", "observed_data", "variational_stats",
    }  # fmt: skip
    posterior = tree["posterior"]
    assert posterior["q_proj.lora_A"].dims == ("chain", "draw", "layer", "rank", "in_feature")
    assert posterior["q_proj.lora_A"].shape == (1, 4, 2, 2, 32)
    assert posterior["q_proj.lora_B"].dims == ("chain", "draw", "layer", "out_feature", "rank")
    # v has half as many outputs as q, so its dim has a name of its own
    assert posterior["v_proj.lora_B"].dims == ("chain", "draw", "layer", "v_proj.lora_B_out_feature", "rank")
    assert posterior["layer"].values.tolist() == [1, 2], "layers are numbers of blocks, not positions in the stack"
    assert posterior["chain"].values.tolist() == [0]
    assert posterior["draw"].values.tolist() == [0, 1, 2, 3]
    predictive = tree["posterior_predictive"]["probability"]
    assert predictive.dims == ("chain", "draw", "example", "class")
    assert predictive["class"].values.tolist() == ["sport", "business", "politics"]
    np.testing.assert_allclose(predictive.sum("class"), 1, rtol=1e-6)
    assert tree["observed_data"]["label"].values.tolist() == [0, 1, 2] * 3
    assert tree["variational_stats"]["loss"].dims == ("step",)
    assert tree["variational_stats"]["step"].values.tolist() == [1, 2, 3]
    curves = tree["variational_stats"]
    assert set(curves.data_vars) == {"loss", "nll", "kl", "grad_norm", "elbo"}
    # 12 training rows; the loss weighs the KL by 0.5, the ELBO does not
    np.testing.assert_allclose(curves["loss"], curves["nll"] + 0.5 * curves["kl"], rtol=1e-5)
    np.testing.assert_allclose(curves["elbo"], -12 * (curves["nll"] + curves["kl"]), rtol=1e-6)


def test_without_data_there_are_no_predictions(blob):
    assert set(blob.to_arviz(draws=2).children) == {"posterior", "prior", "sample_stats", "variational_stats"}


def test_the_draws_are_those_of_the_seed(blob):
    tree = blob.to_arviz(draws=5, seed=3)
    drawn = blob.sample(5, generator=torch.Generator().manual_seed(3))
    for name, value in drawn.items():
        np.testing.assert_array_equal(tree["posterior"][name].values[0], value.numpy())
    assert not np.array_equal(
        blob.to_arviz(draws=5, seed=4)["posterior"]["q_proj.lora_A"], drawn["q_proj.lora_A"][None]
    )


def test_dims_do_not_depend_on_the_choice_of_sites_or_the_group(three_topics_model):
    # only v has a proper prior, and v comes after q
    model = three_topics_model(torch.float32, LORA, {"q_proj.*": Flat(), "v_proj.*": NORMAL})
    posterior = Posterior(model, build_guide(MeanField(0.1), model), {})
    whole, some = posterior.to_arviz(draws=2), posterior.to_arviz(draws=2, sites="v_proj.*")
    name = "v_proj.lora_B"
    assert set(whole["prior"].data_vars) == {"v_proj.lora_A", name}
    assert whole["posterior"][name].dims == whole["prior"][name].dims == some["posterior"][name].dims
    assert set(some["posterior"].data_vars) == {"v_proj.lora_A", name}


def test_log_q_and_log_prior_are_direct_sums(three_topics_model):
    model = three_topics_model(torch.float64, LORA, NORMAL)
    posterior = Posterior(model, build_guide(MeanField(0.1), model, generator=torch.Generator().manual_seed(2)), {})
    tree = posterior.to_arviz(draws=3, sites="q_proj.lora_A")
    drawn = posterior.sample(3, generator=torch.Generator().manual_seed(0))
    mean = posterior.mean()
    sums = {"log_q": 0.0, "log_prior": 0.0}
    for name, value in drawn.items():
        sums["log_q"] += torch.distributions.Normal(mean[name], 0.1).log_prob(value).flatten(1).sum(1)
        sums["log_prior"] += torch.distributions.Normal(0.0, 0.2).log_prob(value).flatten(1).sum(1)
    for name, wanted in sums.items():
        assert tree["sample_stats"][name].dims == ("chain", "draw")
        # the scale passes through float32 on its way into the guide
        np.testing.assert_allclose(tree["sample_stats"][name].values[0], wanted.numpy(), rtol=1e-6)


@pytest.mark.parametrize("which", ["blob", "head"])
def test_log_likelihood_belongs_to_the_draws_of_the_posterior_group(request, which):
    posterior = request.getfixturevalue(which)
    tree = posterior.to_arviz(draws=4, data=posterior.model.task.test, seed=5)
    batch = posterior.model.encode(posterior.model.task.test).batch(list(range(9)))
    draw = {name: torch.tensor(tree["posterior"][name].values[0]) for name in posterior.model.sites}
    with torch.no_grad():
        log_probs = posterior.model.logits(batch, draw).log_softmax(-1)
    wanted = log_probs.gather(-1, batch["labels"].expand(4, -1)[..., None])[..., 0]
    assert wanted.std(0).max() > 1e-3, "equal draws could not tell the right ones from others"
    np.testing.assert_allclose(tree["log_likelihood"]["label"].values[0], wanted.numpy(), rtol=0, atol=1e-4)


def test_lp_is_the_log_joint_density_of_pyro(three_topics_model):
    model = three_topics_model(torch.float64, LORA, NORMAL)
    posterior = Posterior(model, build_guide(MeanField(0.1), model), {})
    tree = posterior.to_arviz(draws=3, sites="q_proj.lora_A", train=model.task.train)
    batch = model.encode(model.task.train).batch(list(range(12)))
    drawn = posterior.sample(3, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        conditioned = pyro.condition(model, {name: value[i] for name, value in drawn.items()})
        with torch.no_grad():
            expected = pyro.poutine.trace(conditioned).get_trace(batch).log_prob_sum()
        # the guide's scale passes through float32
        np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0, i], float(expected), rtol=1e-6)
    assert "lp" not in posterior.to_arviz(draws=2)["sample_stats"]


def test_summaries_are_those_of_the_dense_change(three_topics_model):
    model = three_topics_model(torch.float64, LORA, NORMAL)
    posterior = Posterior(model, build_guide(MeanField(0.3), model), {})
    tree = posterior.to_arviz(draws=3, sites=[], summaries=True)["posterior"]
    assert set(tree.data_vars) == {"change_norm", "effective_rank", "stable_rank"}
    assert tree["change_norm"].dims == ("chain", "draw", "layer", "projection")
    assert tree["projection"].values.tolist() == ["q_proj", "v_proj"]
    assert tree["layer"].values.tolist() == [1, 2]
    drawn = posterior.sample(3, generator=torch.Generator().manual_seed(0))
    dense = 2.0 * drawn["v_proj.lora_B"] @ drawn["v_proj.lora_A"]
    values = torch.linalg.svdvals(dense)
    found = tree.sel(projection="v_proj")
    np.testing.assert_allclose(found["change_norm"][0], torch.linalg.matrix_norm(dense), rtol=1e-9)
    np.testing.assert_allclose(found["stable_rank"][0], values.square().sum(-1) / values[..., 0] ** 2, rtol=1e-9)
    share = values[..., :2] / values[..., :2].sum(-1, keepdim=True)
    np.testing.assert_allclose(found["effective_rank"][0], (-(share * share.log()).sum(-1)).exp(), rtol=1e-9)


def test_classes_are_named_and_layers_may_differ(three_topics_model):
    adapters = [
        LoRA(rank=2, targets=["q_proj"], layers=(0,)),
        LoRA(rank=1, targets=["v_proj"], layers=(2,)),
        LastLayer(),
    ]
    model = three_topics_model(torch.float64, adapters, NORMAL)
    posterior = Posterior(model, build_guide(MeanField(0.3), model), {})
    tree = posterior.to_arviz(draws=2, sites="head.weight", summaries=True)["posterior"]
    assert tree["class"].values.tolist() == ["sport", "business", "politics"]
    norm = tree["change_norm"].isel(chain=0, draw=0)
    assert np.isfinite(norm.sel(layer=0, projection="q_proj"))
    assert np.isnan(norm.sel(layer=2, projection="q_proj")), "there is no such change"
    assert np.isfinite(norm.sel(layer=2, projection="v_proj"))


def test_seeds_become_chains_and_rhat_tells_fits_that_differ(three_topics_model):
    model = three_topics_model(torch.float64, [LORA, LastLayer()], NORMAL)
    trees = []
    for seed in range(3):
        posterior = Posterior(model, build_guide(MeanField(0.3), model), {"seed": seed})
        trees.append(posterior.to_arviz(draws=200, sites="head.weight", seed=seed))
    same = combine_chains(trees)
    assert same["posterior"].sizes["chain"] == 3
    assert same.attrs["fit_seed"] == [0, 1, 2]
    # 96 parameters of equal fits; R-hat of 3 x 200 independent draws exceeds 1.05 about once in 1e6
    assert float(arviz.rhat(to_inference_data(same))["head.weight"].max()) < 1.05
    with torch.no_grad():
        dict(posterior.guide.items())["head.weight"].loc += 1.0
    moved = combine_chains([*trees[:2], posterior.to_arviz(draws=200, sites="head.weight", seed=2)])
    assert float(arviz.rhat(to_inference_data(moved))["head.weight"].min()) > 1.3


def test_prior_draws_are_those_of_the_declared_prior(three_topics_model):
    model = three_topics_model(torch.float32, LORA, {"q_proj.*": dist.Normal(1.0, 0.5), "v_proj.*": learned(0.01)})
    posterior = Posterior(model, build_guide(MeanField(0.1), model), {})
    prior = posterior.to_arviz(draws=200)["prior"]
    # 200 draws of 128 weights: standard errors of 0.003 and 0.0022; six of them fail once in 5e8 runs
    assert float(prior["q_proj.lora_A"].mean()) == pytest.approx(1.0, abs=0.02)
    assert float(prior["q_proj.lora_A"].std()) == pytest.approx(0.5, abs=0.014)
    assert float(prior["v_proj.lora_A"].std()) == pytest.approx(0.01, rel=0.03)


def test_the_users_random_state_is_left_alone(blob):
    before = torch.get_rng_state()
    blob.to_arviz(draws=2, data=blob.model.task.test)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_callable_prior_has_no_prior_group(three_topics_model):
    def prior(site):
        return dist.Normal(0.0, pyro.sample(f"{site.name}.tau", dist.HalfNormal(1.0)))

    model = three_topics_model(torch.float32, LORA, prior)
    posterior = Posterior(model, build_guide(MeanField(0.1), model), {})
    tree = posterior.to_arviz(draws=3)
    assert "prior" not in tree.children
    assert set(tree["sample_stats"].data_vars) == {"log_q"}
    assert tree["posterior"]["q_proj.lora_A.tau"].dims == ("chain", "draw")
    assert (tree["posterior"]["q_proj.lora_A.tau"] > 0).all()


def test_a_point_posterior(three_topics_model):
    model = three_topics_model(torch.float32, LORA, NORMAL)
    posterior = Posterior(model, build_guide(Point(), model), {"engine": "MAP"})
    tree = posterior.to_arviz(draws=3, data=model.task.test)
    assert float(tree["posterior"]["q_proj.lora_A"].std("draw").max()) < 1e-7
    likelihood = tree["log_likelihood"]["label"]
    assert likelihood.shape == (1, 3, 9)
    assert (likelihood == likelihood.isel(draw=0)).all()
    assert "variational_stats" not in tree.children


def test_arviz_works_on_it(head):
    data = to_inference_data(head.to_arviz(draws=100, sites="head.weight", data=head.model.task.test))
    summary = arviz.summary(data, var_names=["head.weight"])
    assert len(summary) == 3 * 32
    mean = head.mean()["head.weight"].flatten().numpy()
    # a mean of 100 draws of sd 0.2, rounded to 0.001: six standard errors
    np.testing.assert_allclose(summary["mean"].to_numpy(), mean, rtol=0, atol=0.12)
    loo = arviz.loo(data)
    assert np.isfinite(loo.elpd_loo)
    assert loo.n_data_points == 9


def test_netcdf_round_trip(head, tmp_path):
    tree = head.to_arviz(draws=3, data=head.model.task.test)
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as read:
        xarray.testing.assert_equal(read.load(), tree)
        assert read.attrs["task"] == "three_topics"
        assert list(read.attrs["sample_dims"]) == ["chain", "draw"]


def test_attributes_say_where_it_comes_from(blob):
    attrs = blob.to_arviz(draws=2, seed=3).attrs
    assert attrs["inference_library"] == "pyrolora"
    assert attrs["backbone"] == "tiny"
    assert attrs["engine"] == "SVI"
    assert (attrs["kl_weight"], attrs["fit_seed"], attrs["draw_seed"], attrs["num_data"]) == (0.5, 7, 3, 12)
    assert "q_proj.lora_A: BLoB" in attrs["guide"]


def test_the_layout_is_the_one_arviz_1_writes(head, tmp_path):
    """ArviZ 1 reads groups by name, draws by the dims that ``sample_dims`` names in the group, data without them."""
    head.to_arviz(draws=3, data=head.model.task.test, train=head.model.task.train).to_netcdf(tmp_path / "p.nc")
    with xarray.open_datatree(tmp_path / "p.nc") as tree:
        for name in ("posterior", "prior", "posterior_predictive", "log_likelihood", "sample_stats"):
            group = tree[name].to_dataset()
            assert list(group.attrs["sample_dims"]) == ["chain", "draw"]
            for variable in group.data_vars.values():
                assert variable.dims[:2] == ("chain", "draw"), (name, variable.name)
            assert {"chain", "draw"} <= set(group.coords)
        assert tree["observed_data"]["label"].dims == ("example",)
        assert tree["posterior"].children == {}
        assert {"lp", "log_q", "log_prior"} == set(tree["sample_stats"].data_vars)


class TestRefusals:
    def test_nothing_to_put_in(self, blob):
        with pytest.raises(ValueError, match="or summaries=True"):
            blob.to_arviz(sites=[])

    def test_chains_must_fit_together(self, blob):
        with pytest.raises(ValueError, match="at least two fits"):
            combine_chains([blob.to_arviz(draws=2)])
        with pytest.raises(ValueError, match="'posterior' do not fit together"):
            combine_chains([blob.to_arviz(draws=2), blob.to_arviz(draws=3)])

    def test_an_unknown_site_offers_the_nearest(self, blob):
        with pytest.raises(ValueError, match=r"No site matches \['q_proj.loraA'\]. Did you mean 'q_proj.lora_A'"):
            blob.to_arviz(sites="q_proj.loraA")

    def test_too_many_numbers_are_refused_before_they_are_drawn(self, blob, monkeypatch):
        monkeypatch.setattr(Posterior, "sample", lambda *args, **kwargs: pytest.fail("they were drawn"))
        monkeypatch.setattr(export, "MOST_NUMBERS", 1000)
        with pytest.raises(ValueError, match=r"10 draws of 4 sites are 4,480 numbers, more than 1,000. Choose sites="):
            blob.to_arviz(draws=10)
