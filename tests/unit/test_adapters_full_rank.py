"""FullRank: merged weights as oracle, tied embeddings counted once, every float type."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call

from pyrolora.guides import MeanField
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import FullRank, LastLayer
from pyrolora.models.adapters.base import LinearTape
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import Flat, Relative
from pyrolora.models.program import BayesianModel


@pytest.fixture
def tied(tiny_llama, tiny_tokenizer, three_topics):
    """Return ``build(adapter, tie=True, dtype=torch.float64)``: a model whose embeddings may be one matrix."""

    def build(adapter, tie=True, dtype=torch.float64):
        network = tiny_llama(dtype, tie_word_embeddings=tie)
        return BayesianModel(Backbone(network, tiny_tokenizer, "tied"), three_topics(), adapter)

    return build


def random_draw(model, *draws):
    return {
        name: 0.1 * torch.randn(*draws, *s.shape, dtype=model.backbone.site_dtype) for name, s in model.sites.items()
    }


def merged_logits(model, batch, draw):
    """Logits of the network with the changed weights in place."""
    model.release()
    network = copy.deepcopy(model.backbone.network)
    with torch.no_grad():
        for name, site in model.adapter_sites.items():
            for entry, path in enumerate(site.modules):
                network.get_submodule(path).weight += draw[name][entry]
    found = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = batch["attention_mask"].shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)
    return found[torch.arange(len(last)), last][:, list(model.label_ids)]


class TestChange:
    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize("embeddings", [True, False])
    def test_it_is_the_network_with_changed_weights(self, tied, tie, embeddings):
        model = tied(FullRank(embeddings=embeddings), tie)
        batch = next(iter(model.encode(model.task.train).batches(1)))
        draw = random_draw(model, 2)
        found = model.logits(batch, draw)
        assert (found[0] - found[1]).abs().max() > 0.01
        for group in range(2):
            expected = merged_logits(model, batch, {name: value[group] for name, value in draw.items()})
            torch.testing.assert_close(found[group], expected, atol=1e-10, rtol=0)

    def test_a_tied_matrix_is_one_site(self, tied):
        model = tied(FullRank(embeddings=True, targets=["q_proj"]))
        assert {name: tuple(site.shape) for name, site in model.sites.items()} == {
            "q_proj.weight": (3, 32, 32),
            "embed_tokens.weight": (1, 128, 32),
        }
        draw = {name: value.requires_grad_() for name, value in random_draw(model).items()}
        batch = next(iter(model.encode(model.task.train).batches(4)))
        model.logits(batch, draw).square().sum().backward()
        model.release()
        weights = {name: parameter.detach() for name, parameter in model.backbone.network.named_parameters()}
        matrix = (weights["model.embed_tokens.weight"] + draw["embed_tokens.weight"][0].detach()).requires_grad_()
        changed = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix}
        for layer in range(3):
            key = f"model.layers.{layer}.self_attn.q_proj.weight"
            changed[key] = weights[key] + draw["q_proj.weight"][layer].detach()
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = functional_call(model.backbone.network, changed, (), inputs).logits
        logits[:, -1, list(model.label_ids)].square().sum().backward()
        torch.testing.assert_close(draw["embed_tokens.weight"].grad[0], matrix.grad, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_start_changes_nothing_in_any_float_type(self, tied, dtype):
        model = tied([FullRank(embeddings=True), LastLayer()], dtype=dtype)
        batch = next(iter(model.encode(model.task.train).batches(4)))
        plain = tied(LastLayer(), dtype=dtype)
        assert torch.equal(model.logits(batch, model.initial()), plain.logits(batch, plain.initial()))
        assert not torch.equal(model.logits(batch, random_draw(model)), plain.logits(batch, plain.initial()))


class TestFits:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
    def test_the_product_is_taken_in_the_type_of_the_backbone_and_its_gradient_kept_in_that_of_the_site(
        self, tied, dtype, tolerance
    ):
        model = tied(FullRank(targets=["q_proj"]), dtype=dtype)
        # far below what W + V could hold in bfloat16
        draw = {name: 1e-4 * value for name, value in random_draw(model).items()}
        value = draw["q_proj.weight"].requires_grad_()
        path = model.sites["q_proj.weight"].modules[1]
        rows = torch.randn(2, 7, 32).to(dtype)
        with LinearTape() as tape:
            change = model.deltas(draw)[path](rows)
        change.double().sum().backward()
        expected = rows.double() @ value[1].detach().double().mT
        assert tape.products["q_proj.weight"][1][1].dtype == dtype
        assert (change.double() - expected).norm() < tolerance * expected.norm()
        assert value.grad.dtype == torch.float32
        wanted = rows.double().sum((0, 1)).expand(32, -1)
        assert (value.grad[1].double() - wanted).norm() < tolerance * wanted.norm()

    def test_map_and_laplace_and_reloading(self, three_topics_model, tmp_path):
        model = three_topics_model(adapter=FullRank(targets=["v_proj", "down_proj"]), prior=Relative(0.1))
        estimate = MAP(steps=3).fit(model, model.task.train, progress=False)
        posterior = Laplace(structure="kron").fit(model, model.task.train, estimate=estimate, progress=False)
        again = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "x"), model=model)
        assert torch.equal(again.mean()["v_proj.weight"], posterior.mean()["v_proj.weight"])
        assert not (tmp_path / "x" / "adapter_config.json").exists()

    def test_curvature_and_linearised_predictions_of_a_network_in_bfloat16(self, three_topics_model):
        """The products' gradients come in bfloat16; those of float32 are the oracle, to the backbone's own rounding."""
        adapter, prior, found = FullRank(targets=["v_proj"]), dist.Normal(0.0, 0.05), {}
        for dtype in (torch.float32, torch.bfloat16):
            model = three_topics_model(dtype, adapter=adapter, prior=prior)
            estimate = MAP(steps=2).fit(model, model.task.train, progress=False)
            for structure in ("kron", "diag"):
                posterior = Laplace(structure=structure).fit(model, model.task.train, estimate=estimate, progress=False)
                found[structure, dtype] = posterior.predict(model.task.test, kind="linearised_mf1").mean_probs
            mean_field = SVI(guide=MeanField(), steps=2).fit(model, model.task.train, progress=False)
            for kind in ("linearised", "linearised_mf1", "linearised_probit"):
                probs = mean_field.predict(model.task.test, kind=kind, generator=torch.Generator().manual_seed(0))
                found[kind, dtype] = probs.mean_probs
        for name in {name for name, _ in found}:
            assert (found[name, torch.float32] - found[name, torch.bfloat16]).abs().max() < 0.02

    def test_a_tied_embedding_has_no_linear_curvature_and_says_so(self, tied):
        model = tied(FullRank(embeddings=True, targets=["q_proj"]))
        estimate = MAP(steps=1).fit(model, model.task.train, progress=False)
        with pytest.raises(ValueError, match=r"'embed_tokens.weight' is not a stack of weights of linear maps"):
            Laplace(structure="kron").fit(model, model.task.train, estimate=estimate, progress=False)

    def test_relative_scales_give_the_declared_change(self, three_topics_model):
        model = three_topics_model(adapter=FullRank(targets=["down_proj"]), prior=Flat())
        scale = model.relative_scales(0.2)["down_proj.weight"].expand(3, 32, 64)
        for layer in range(3):
            weight = model.backbone.network.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
            torch.testing.assert_close(scale[layer].norm() / weight.norm(), torch.tensor(0.2, dtype=torch.float64))


def test_options_are_refused_over_a_tied_embedding(tiny_llama, tiny_tokenizer):
    backbone = Backbone(tiny_llama(tie_word_embeddings=True), tiny_tokenizer, "tied")
    with pytest.raises(ValueError, match="The embeddings of tied are its output embedding too"):
        FullRank(embeddings=True).sites(backbone, None)
