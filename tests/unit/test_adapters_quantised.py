"""NF4 rounding against the published levels, QPiSSA and LoftQ, and where their adapters may be put."""

import pytest
import torch

from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import QPiSSA
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.program import BayesianModel
from pyrolora.models.quantisation import nf4, nf4_levels, quantised_factors

# Dettmers et al., 2023, appendix E
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
ROWS = {"input_ids": torch.tensor([[5, 9, 17, 30]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}


@pytest.fixture
def weight():
    """With a spectrum that decays, as trained weights have, so that components are worth taking out."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 64, generator=generator, dtype=torch.float64))[0] for n in (96, 128))
    return u * torch.logspace(1, -1, 64, dtype=torch.float64) @ v.mT


def nuclear(matrix):
    return float(torch.linalg.matrix_norm(matrix, "nuc"))


def reduction(weight, method, iterations, rank=8, scaling=2.0):
    q, a, b = quantised_factors(weight, rank, scaling, method=method, iterations=iterations)
    return 1 - nuclear(weight - q - scaling * b @ a) / nuclear(weight - nf4(weight))


class TestRounding:
    def test_the_levels_are_the_published_ones(self):
        torch.testing.assert_close(nf4_levels(), torch.tensor(PUBLISHED, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_each_weight_goes_to_the_nearest_level_of_its_block(self):
        weight = torch.randn(6, 40, dtype=torch.float64)  # 240 weights: three blocks and a short one
        expected = []
        for block in weight.flatten().split(64):
            grid = nf4_levels() * block.abs().max()
            expected.append(grid[(block[:, None] - grid).abs().argmin(dim=1)])
        torch.testing.assert_close(nf4(weight).flatten(), torch.cat(expected), atol=1e-12, rtol=0)

    def test_rounding_twice_is_rounding_once_and_zero_stays(self):
        weight = torch.randn(8, 64)
        assert torch.equal(nf4(nf4(weight)), nf4(weight))
        assert not nf4(torch.zeros(2, 64)).any()


class TestFactors:
    def test_both_methods_reduce_the_error_and_more_alternations_reduce_it_further(self, weight):
        for method in ("pissa", "loftq"):
            once, often = reduction(weight, method, 1), reduction(weight, method, 5)
            assert 0 < once < often, method

    def test_they_start_and_end_where_their_papers_say(self, weight):
        def residual(method, iterations):
            q, a, b = quantised_factors(weight, 8, 1.0, method=method, iterations=iterations)
            return q, b @ a

        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        q, product = residual("pissa", 1)
        torch.testing.assert_close(product, u[:, :8] * s[:8] @ vt[:8], atol=1e-12, rtol=0)
        for iterations in (1, 3):
            q, product = residual("pissa", iterations)
            assert torch.equal(q, nf4(weight - product)), "QPiSSA ends on the rounding"
            q, product = residual("loftq", iterations)
            u, s, vt = torch.linalg.svd(weight - q, full_matrices=False)
            torch.testing.assert_close(product, u[:, :8] * s[:8] @ vt[:8], atol=1e-12, rtol=0)
        assert torch.equal(residual("loftq", 1)[0], nf4(weight))


class TestAdapter:
    @pytest.mark.parametrize("method", ["pissa", "loftq"])
    def test_the_start_is_the_rounded_network_with_its_factors(self, tiny_llama, method):
        backbone = Backbone(tiny_llama(torch.float64), None, "tiny")
        before = backbone.network(**ROWS).logits
        adapter = QPiSSA(rank=4, alpha=8.0, targets=["q_proj", "down_proj"], method=method)
        quantised, constants = adapter.quantise(backbone)
        assert torch.equal(backbone.network(**ROWS).logits, before)
        assert quantised.fingerprint != backbone.fingerprint
        sites = adapter.sites(quantised, None)
        merged = Backbone(tiny_llama(torch.float64), None, "tiny")
        with torch.no_grad():
            for a, b in zip(sites[::2], sites[1::2], strict=True):
                for entry, path in enumerate(a.modules):
                    product = 2.0 * constants[f"{b.name}.start"][entry] @ constants[f"{a.name}.start"][entry]
                    weight = merged.network.get_submodule(path).weight
                    weight.copy_(quantised.network.get_submodule(path).weight + product)
        quantised.bind(adapter.deltas(sites, {**constants, **adapter.initial(quantised, sites)}))
        torch.testing.assert_close(quantised.network(**ROWS).logits, merged.network(**ROWS).logits, atol=1e-10, rtol=0)
        rounded = (merged.network(**ROWS).logits - before).abs().max()
        quantised.release()
        assert 0 < rounded < (quantised.network(**ROWS).logits - before).abs().max()

    def test_posteriors_stay_with_the_rounded_backbone(self, three_topics_model, tmp_path):
        plain = three_topics_model()
        adapter = QPiSSA(rank=2)
        quantised, constants = adapter.quantise(plain.backbone)
        model = BayesianModel(quantised, plain.task, adapter, Flat(), constants=constants)
        posterior = MAP(steps=2).fit(model, model.task.train, progress=False)
        folder = posterior.save_pretrained(tmp_path / "q")
        assert not (folder / "adapter_config.json").exists(), "PEFT would put it on the weight that was not rounded"
        again = Posterior.from_pretrained(folder, model=model)
        assert torch.equal(again.predict(model.task.test).probs, posterior.predict(model.task.test).probs)
        with pytest.raises(ValueError, match="belongs to 'tiny \\(nf4, pissa\\)'"):
            Posterior.from_pretrained(folder, plain.backbone)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"method": "loftQ"}, "Unknown method 'loftQ'. Did you mean 'loftq'"),
            ({"iterations": 0}, "iterations must be at least 1; got 0"),
            ({"form": "subspace"}, "QPiSSA has no form 'subspace'"),
        ],
    )
    def test_refusals(self, settings, message):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
            QPiSSA(**settings)
        assert message in str(refused.value)

    def test_without_constants_it_says_how_to_make_them(self, three_topics_model):
        with pytest.raises(ValueError, match=r"adapter.quantise\(backbone\)"):
            three_topics_model(adapter=QPiSSA(rank=2))
