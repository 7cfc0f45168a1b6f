"""Pyro's own NUTS on a model as it stands."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyrolora.models.adapters import LastLayer, LoRA

DRAWS = 3


@pytest.mark.parametrize("adapter", [LoRA(rank=1), [LoRA(rank=1, layers=(2,)), LastLayer()]], ids=["lora", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nuts_runs_on_a_tiny_llama(three_topics_model, adapter, dtype):
    model = three_topics_model(dtype, adapter=adapter, prior=dist.Normal(0.0, 0.2))
    batch = next(iter(model.encode(model.task.train).batches(12)))
    sampler = MCMC(
        NUTS(model, max_tree_depth=3, step_size=0.01, adapt_step_size=False),
        num_samples=DRAWS,
        warmup_steps=1,
        disable_progbar=True,
    )
    sampler.run(batch)
    draws = sampler.get_samples()
    assert set(draws) == set(model.sites)
    for name, site in model.sites.items():
        assert draws[name].shape == (DRAWS, *site.shape)
        assert draws[name].dtype == dtype
        assert draws[name].isfinite().all()
        assert not torch.equal(draws[name][0], draws[name][-1])
    # NUTS draws are draws like any other: they go through the batched forward
    assert model.logits(batch, draws).softmax(-1).sum(-1).allclose(torch.ones(DRAWS, 12, dtype=dtype))


def test_a_mini_batch_needs_the_number_of_data_that_it_is_all_of(three_topics_model):
    """Pyro refuses a subsampled plate under NUTS; a part of the data is a data set of its own if the model is told so."""
    model = three_topics_model(adapter=LoRA(rank=1, layers=(2,)))
    batch = next(iter(model.encode(model.task.train).batches(6)))
    sampler = MCMC(NUTS(model, step_size=0.01), num_samples=1, warmup_steps=1, disable_progbar=True)
    with pytest.raises(NotImplementedError, match="subsample"):
        sampler.run(batch)
    sampler.run(batch, num_data=6)
    assert set(sampler.get_samples()) == set(model.sites)
