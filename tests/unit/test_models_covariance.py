"""Covariance priors against torch's multivariate Normal, and what they bound."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.guides import BLoB
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import FullRank, LoRA
from pyrolora.models.covariance import Covariance, RowNormal
from pyrolora.models.moments import SecondMoments, second_moments
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.priors import Prior
from pyrolora.models.sites import Site, SiteTable

SITE = Site("w", torch.Size((2, 3, 5)), ("layer", "rank", "in_feature"), ("a", "b"), (), (0, 1))


@pytest.fixture
def moments(tmp_path):
    found = {}
    for path in "ab":
        rows = torch.randn(50, 5, dtype=torch.float64) * torch.logspace(0, -1, 5, dtype=torch.float64)
        found[path] = rows.mT @ rows / 50
    return found, str(SecondMoments(found, 50).save(tmp_path / "moments.safetensors"))


def expected(moment, scale=0.3, damping=0.01):
    precision = (moment / moment.diagonal().mean() + damping * torch.eye(5, dtype=torch.float64)) / scale**2
    return MultivariateNormal(torch.zeros(5, dtype=torch.float64), precision_matrix=precision)


def made(file):
    return Covariance(file, 0.3).distribution(SITE, torch.device("cpu"), torch.float64)


def test_densities_are_those_of_torchs_multivariate_normal(moments):
    found, file = moments
    value = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    whole = sum(expected(found[path]).log_prob(value[:, i]).sum(-1) for i, path in enumerate("ab"))
    torch.testing.assert_close(made(file).log_prob(value), whole, atol=1e-9, rtol=0)
    variance = torch.stack([expected(found[path]).variance for path in "ab"])[:, None].expand(2, 3, 5)
    torch.testing.assert_close(made(file).variance, variance, atol=1e-9, rtol=0)


def test_the_kl_of_independent_normals_is_exact(moments):
    found, file = moments
    loc, scale = torch.randn(2, 3, 5, dtype=torch.float64), 0.1 + torch.rand(2, 3, 5, dtype=torch.float64)
    exact = sum(
        kl_divergence(MultivariateNormal(loc[i], torch.diag_embed(scale[i] ** 2)), expected(found[path])).sum()
        for i, path in enumerate("ab")
    )
    torch.testing.assert_close(kl_divergence(dist.Normal(loc, scale).to_event(3), made(file)), exact, atol=1e-9, rtol=0)


def test_draws_have_the_declared_covariance(moments):
    found, file = moments
    draws = made(file).sample((20_000,))
    for i, path in enumerate("ab"):
        rows = draws[:, i].flatten(0, 1)
        covariance = expected(found[path]).covariance_matrix
        spread = covariance.diagonal().sqrt()
        correlation = (rows.mT @ rows / len(rows)) / spread / spread[:, None]
        exact = covariance / spread / spread[:, None]
        # 60,000 rows: standard error at most sqrt(2 / 60000) = 0.0058; six of them over 25 entries fail once in 10^7
        assert (correlation - exact).abs().max() < 0.035


def test_it_bounds_the_change_on_the_text_and_not_off_it(three_topics_model, tmp_path):
    """What knowledge-preserved directions stand for: outputs on the text keep still, others may move."""
    model = three_topics_model(adapter=FullRank(targets=["down_proj"]), prior=Flat())
    path = "model.layers.1.mlp.down_proj"
    batches = list(model.encode(model.task.train).batches(4))
    sites = list(model.adapter_sites.values())
    moments = second_moments(model.backbone, batches, sites[0].modules)
    file = str(moments.save(tmp_path / "moments.safetensors"))
    prior = Covariance(file, 0.1, damping=1e-3).distribution(sites[0], torch.device("cpu"), torch.float64)
    change = prior.sample((300,))[:, 1]
    size = moments[path].diagonal().mean()
    on_text = torch.einsum("doi,ij,doj->", change, moments[path], change) / (300 * 32 * size)
    white = change.square().sum() / (300 * 32)
    # E |dW x|^2 = scale^2 tr(C (C + damping)^-1) an output; 300 * 32 rows of 64 give it to one per cent
    normalised = moments[path] / size
    trace = torch.linalg.solve(normalised + 1e-3 * torch.eye(64), normalised).trace()
    assert float(on_text) == pytest.approx(0.01 * float(trace), rel=0.03)
    assert float(white) > 20 * float(on_text)


def test_it_fits_and_is_described_by_its_file(three_topics_model, moments, tmp_path):
    plain = three_topics_model(adapter=LoRA(rank=2, targets=["q_proj"]))
    paths = plain.adapter_sites["q_proj.lora_A"].modules
    batches = plain.encode(plain.task.train).batches(4)
    file = str(second_moments(plain.backbone, batches, paths).save(tmp_path / "own.safetensors"))
    prior = {"*.lora_A": Covariance(file, 0.1), "*.lora_B": Flat()}
    model = three_topics_model(adapter=LoRA(rank=2, targets=["q_proj"]), prior=prior)
    posterior = SVI(guide=BLoB(), steps=3).fit(model, model.task.train, progress=False)
    assert all(entry["kl"] > 0 for entry in posterior.record["history"])
    described = model.prior.to_dict()
    again = Prior(Prior.specification_from_dict(described), model.adapter_sites)
    assert again.to_dict() == described
    assert isinstance(again(model.adapter_sites["q_proj.lora_A"]), RowNormal)


def test_refusals(moments, tmp_path):
    with pytest.raises(ValueError, match="scale of a covariance prior must be positive"):
        Covariance("x", 0.0)
    columns = Site("w", torch.Size((1, 2, 3)), ("layer", "out_feature", "channel"), ("a",), (), (0,))
    with pytest.raises(ValueError, match="over input features, and the dims of 'w' are layer, out_feature, channel"):
        Prior(Covariance(moments[1], 0.1), SiteTable([columns]))
    with pytest.raises(FileNotFoundError, match="No second moments"):
        Prior(Covariance(str(tmp_path / "no.safetensors"), 0.1), SiteTable([SITE]))
