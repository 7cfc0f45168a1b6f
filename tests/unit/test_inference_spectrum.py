"""Ranks of a change; oracles: numpy's SVD of the dense change, and matrices whose ranks are known."""

import pyro.distributions as dist
import pytest
import torch

from pyrolora.inference.spectrum import change_spectra, effective_rank, stable_rank
from pyrolora.models.adapters import LastLayer, LoRA, PiSSA


def test_ranks_of_known_matrices():
    assert float(effective_rank(torch.ones(5))) == pytest.approx(5)
    assert float(stable_rank(torch.ones(5))) == pytest.approx(5)
    one = torch.tensor([3.0, 0.0, 0.0])
    assert float(effective_rank(one)) == pytest.approx(1)
    assert float(stable_rank(one)) == 1
    assert float(effective_rank(torch.zeros(3))) == 0
    assert float(stable_rank(torch.zeros(3))) == 0
    assert float(stable_rank(torch.tensor([2.0, 1.0]))) == pytest.approx(1.25)


@pytest.mark.parametrize("rank", [1, 3])
def test_spectrum_equals_the_svd_of_the_dense_change(three_topics_model, rank):
    model = three_topics_model(torch.float64, LoRA(rank=rank, alpha=5.0), dist.Normal(0.0, 1.0))
    draw = {name: torch.randn(4, *site.shape, dtype=torch.float64) for name, site in model.sites.items()}
    found = change_spectra(model, draw)
    assert set(found) == {"q_proj", "v_proj"}
    for name, spectrum in found.items():
        dense = 5.0 / rank * draw[f"{name}.lora_B"] @ draw[f"{name}.lora_A"]
        expected = torch.linalg.svdvals(dense)[..., :rank]
        assert spectrum.values.shape == (4, 3, rank)
        torch.testing.assert_close(spectrum.values, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(spectrum.norm, torch.linalg.matrix_norm(dense))
    single = change_spectra(model, {name: value[2] for name, value in draw.items()})
    torch.testing.assert_close(single["q_proj"].values[0], found["q_proj"].values[2])


def test_zero_changes_and_models_without_any(three_topics_model):
    model = three_topics_model(torch.float32)
    start = model.initial(torch.Generator().manual_seed(0))
    assert bool((change_spectra(model, start)["q_proj"].effective_rank == 0).all()), "B starts at zero"
    head = three_topics_model(torch.float32, LastLayer(), dist.Normal(0.0, 1.0))
    assert change_spectra(head, head.initial()) == {}


def test_a_change_of_factors_that_start_away_from_zero_keeps_all_its_directions(three_topics_model):
    model = three_topics_model(adapter=PiSSA(rank=2, iterations=4, layers=(1, 2)))
    generator = torch.Generator().manual_seed(0)
    draw = {
        name: torch.randn(site.shape, generator=generator, dtype=torch.float64) for name, site in model.sites.items()
    }
    found = change_spectra(model, draw)["v_proj"].values[0]
    for place, path in enumerate(model.sites["v_proj.lora_A"].modules):
        change = model.deltas(draw)[path]
        identity = torch.eye(32, dtype=torch.float64)[None]
        wanted = torch.linalg.svdvals(change(identity)[0])
        torch.testing.assert_close(found[place], wanted[: found.shape[-1]], rtol=1e-9, atol=1e-10)
        assert found.shape[-1] == 4
