"""Signal-to-noise of rank-one parts against draws, and what pruning leaves."""

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import BLoB, KroneckerNormal, MeanField, Point, build_guide
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.pruning import prune_ranks, rank_reports
from pyrolora.models.adapters import LabelLoRA, LastLayer, LoRA, PiSSA
from pyrolora.models.prior_declarations import learned

# chance that a Monte-Carlo ratio misses by a tenth although it is right: below 1e-6 at 20,000 draws
FALSE_ALARM_RATE = 1e-6


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(adapter=LoRA(rank=3, alpha=4.0, layers=(1, 2)))


def posterior_of(model, family, scale=1.0):
    guide = build_guide(family, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, factor in guide.items():
            loc = factor.loc if hasattr(factor, "loc") else factor.value
            loc.copy_(scale * torch.randn(loc.shape, generator=generator, dtype=torch.float64))
    return Posterior(model, guide, {"engine": "test"})


def test_signal_to_noise_is_that_of_draws(model):
    posterior = posterior_of(model, MeanField(init_scale=0.5))
    draws = posterior.sample(20_000, generator=torch.Generator().manual_seed(1))
    report = rank_reports(posterior, 1.0)["v_proj"]
    a, b = draws["v_proj.lora_A"], draws["v_proj.lora_B"]
    parts = b.mT[..., None] * a[..., None, :]
    mean = parts.mean(0)
    noise = (parts - mean).square().mean(0).sum((-2, -1)).sqrt()
    wanted = mean.square().sum((-2, -1)).sqrt() / noise
    torch.testing.assert_close(report.signal_to_noise, wanted, rtol=0.1, atol=0)
    assert report.layers == (1, 2)


def test_pruning_takes_out_what_is_below_and_nothing_else(model):
    posterior = posterior_of(model, BLoB(init_scale=0.5))
    with torch.no_grad():
        dict(posterior.guide.items())["q_proj.lora_A"].loc[0, 1] *= 1e-3
    pruned, reports = prune_ranks(posterior, 0.2)
    assert reports["q_proj"].kept.tolist() == [[True, False, True], [True, True, True]]
    assert reports["q_proj"].effective_ranks == [2, 3]
    assert "| 1 | 2 of 3 |" in reports["q_proj"].to_markdown()
    draw = pruned.sample(5)
    assert draw["q_proj.lora_A"][:, 0, 1].abs().max() < 1e-6
    assert (draw["q_proj.lora_B"][:, 0, :, 1] == 0).all()
    before, after = dict(posterior.guide.items()), dict(pruned.guide.items())
    for name in before:
        for key, value in before[name].named_parameters():
            changed = (dict(after[name].named_parameters())[key] != value).nonzero()[:, 0].unique().tolist()
            assert changed == ([0] if name.startswith("q_proj") else [])
    assert pruned.record["pruned"]["q_proj"]["kept"] == reports["q_proj"].kept.tolist()
    assert pruned.log_prob(draw).isfinite().all()
    assert not torch.equal(pruned.predict(model.task.test).probs, posterior.predict(model.task.test).probs)


def test_label_rows_lose_a_rank_and_no_class(three_topics_model):
    model = three_topics_model(adapter=[LoRA(rank=2), LabelLoRA(rank=3)])  # as many ranks as classes
    posterior = posterior_of(model, BLoB(init_scale=0.01))
    with torch.no_grad():
        dict(posterior.guide.items())["lm_head.lora_A"].loc[0] *= 1e-6
    pruned, reports = prune_ranks(posterior, 0.2)
    assert reports["lm_head"].kept.tolist() == [[False, True, True]]
    assert reports["lm_head"].effective_ranks == [2]
    assert reports["lm_head"].to_markdown().splitlines()[-1].startswith("| 3 | 2 of 3 |")
    for side, name in enumerate(("lm_head.lora_A", "lm_head.lora_B")):
        before, after = posterior.mean()[name], pruned.mean()[name]
        assert not after.select(side, 0).any()
        assert torch.equal(after.narrow(side, 1, 2), before.narrow(side, 1, 2))


def test_points_have_infinite_signal_and_empty_parts_none(model):
    posterior = posterior_of(model, Point())
    with torch.no_grad():
        dict(posterior.guide.items())["q_proj.lora_B"].value[1, :, 2] = 0
    ratio = rank_reports(posterior, 1.0)["q_proj"].signal_to_noise
    assert ratio[1, 2] == 0
    assert ratio.isinf().sum() == 5


def test_refusals(model, three_topics_model):
    posterior = posterior_of(model, KroneckerNormal())
    assert rank_reports(posterior, 1.0)["q_proj"].signal_to_noise.shape == (2, 3)
    with pytest.raises(ValueError, match="pruned from independent Normals and points"):
        prune_ranks(posterior, 1.0)
    with pytest.raises(ValueError, match="The threshold must be positive"):
        rank_reports(posterior, 0.0)
    other = three_topics_model(adapter=PiSSA(rank=2, iterations=4))
    with pytest.raises(ValueError, match="do not start at zero"):
        rank_reports(posterior_of(other, MeanField()), 1.0)
    head = three_topics_model(adapter=LastLayer())
    with pytest.raises(ValueError, match=r"in pairs of sites lora_A and lora_B; this posterior has head.weight"):
        rank_reports(posterior_of(head, MeanField()), 1.0)


def test_the_report_shows_the_learned_scale_of_every_part(three_topics_model):
    prior = {"*.lora_A": learned(0.1, per=("layer", "rank")), "*.lora_B": dist.Normal(0.0, 1.0)}
    model = three_topics_model(adapter=LoRA(rank=3, alpha=4.0, layers=(1, 2)), prior=prior)
    wanted = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.prior.scales["q_proj.lora_A"].copy_(wanted[..., None])
    report = rank_reports(posterior_of(model, MeanField()), 1.0)["q_proj"]
    assert list(report.prior_scales) == ["lora_A"]
    torch.testing.assert_close(report.prior_scales["lora_A"], wanted)
    first = f"{float(wanted[0].min()):.3g} to {float(wanted[0].max()):.3g}"
    assert report.to_markdown().splitlines()[2].endswith(f"| {first} |")
    assert "prior scale of lora_A" in report.to_markdown()
