"""A draw through the network: under gradient checkpointing, and many draws on the batch axis."""

import pytest
import torch
from torch.func import functional_call, vmap

from pyrolora.guides import BLoB, MeanField
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.tasks import encode

DRAWS = 5


def forwards_of(block):
    """A list that grows with each forward of a block: checkpointing adds one during backward."""
    seen = []
    block.self_attn.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize("layers", [None, (2,)], ids=["all blocks", "last block, cached trunk"])
@pytest.mark.parametrize("noise", ["weight", "example"])
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("guide", [BLoB(), MeanField()], ids=str)
def test_checkpointing_changes_no_gradient_of_a_whole_step(three_topics_model, guide, particles, noise, layers):
    found = []
    for switch in (False, True):
        model = three_topics_model(torch.float32, adapter=[LoRA(rank=2, layers=layers), LastLayer()])
        if switch:
            model.backbone.checkpoint_gradients()
        seen = forwards_of(model.backbone.blocks[-1])
        start = {name: 0.1 * torch.ones(site.shape) for name, site in model.sites.items()}
        engine = SVI(guide=guide, steps=2, particles=particles, noise=noise)
        run = TrainingRun(engine, model, model.task.train, start=start)
        stats = list(run.steps())
        # a forward without gradients belongs to the trunk, not to the step
        assert sum(seen) == 2 * particles * (2 if switch else 1)
        found.append((stats, [parameter.grad for parameter in run.optimiser.parameters]))
    (plain, expected), (saved, gradients) = found
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)
    assert [stats.loss for stats in saved] == pytest.approx([stats.loss for stats in plain], rel=1e-6)


def test_checkpointing_leaves_everything_but_the_checkpointing_modules_in_eval_mode(three_topics_model):
    backbone = three_topics_model(torch.float32).backbone
    backbone.checkpoint_gradients()
    training = [module for module in backbone.network.modules() if module.training]
    assert len(training) >= len(backbone.blocks)
    assert all(hasattr(module, "gradient_checkpointing") for module in training)


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all blocks", "trunk shared"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_draws_on_the_batch_axis_equal_vmap_over_merged_weights(three_topics_model, padding, layers):
    adapter = LoRA(rank=2, alpha=6.0, layers=layers)
    model = three_topics_model(torch.float32, adapter=[adapter, LastLayer()])
    data = encode(model.task.train, model.task.format, model.backbone.tokenizer, padding=padding)
    batch = next(iter(data.batches(6)))
    assert batch["attention_mask"].min() == 0
    draw = {name: 0.2 * torch.randn(DRAWS, *site.shape) for name, site in model.sites.items()}
    network, label_ids = model.backbone.network, torch.tensor(data.label_ids)
    # eager attention: fused kernels have no batching rule on every torch
    network.set_attn_implementation("eager")
    frozen = {name: value.detach() for name, value in network.state_dict().items()}
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last = (mask * torch.arange(mask.shape[1])).argmax(1)

    def one(weights):
        merged = dict(frozen)
        for kind in ("q_proj", "v_proj"):
            for place, path in enumerate(model.sites[f"{kind}.lora_A"].modules):
                change = weights[f"{kind}.lora_B"][place] @ weights[f"{kind}.lora_A"][place]
                merged[f"{path}.weight"] = frozen[f"{path}.weight"] + 6.0 / 2 * change
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        hidden = functional_call(network.model, {k[6:]: v for k, v in merged.items() if k.startswith("model.")},
                                 (batch["input_ids"],), inputs).last_hidden_state  # fmt: skip
        features = hidden[torch.arange(len(last)), last]
        return features @ (frozen["lm_head.weight"][label_ids] + weights["head.weight"]).T

    with torch.no_grad():
        found = model.logits(batch, draw)
        model.release()
        torch.testing.assert_close(found, vmap(one)(draw), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1
