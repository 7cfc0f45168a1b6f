"""ReleasedBLoB against a transcription of the published equations in float64, fed with the same noise."""

import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyrolora.guides import BLoB, MeanField, build_guide
from pyrolora.guides import local as local_noise
from pyrolora.inference.released import ReleasedBLoB, ReleasedRun
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LabelLoRA, LoRA
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import Flat, learned

# M is 25 here: the run meets the heavy end of a cycle and the beginning of the next
STEPS, BATCH, RATE, SGD_RATE, BETA, GAMMA = 30, 4, 1e-3, 0.05, 0.2, 1e6
PRIOR = {"*.lora_A": dist.Normal(0.0, BETA), "*.lora_B": Flat()}
ENGINE = ReleasedBLoB(
    steps=STEPS, batch_size=BATCH, learning_rate=RATE, scale_learning_rate=SGD_RATE, gamma=GAMMA, warmup=0.4
)


class Noise:
    """Standard normal numbers and signs in the order in which they are asked for, the same again after `rewind`."""

    def rewind(self):
        self.source = torch.Generator().manual_seed(7)

    def normal(self, like):
        return torch.randn(like.shape, generator=self.source, dtype=torch.float64)

    def signs(self, like):
        return torch.randint(0, 2, like.shape, generator=self.source).double() * 2 - 1


@pytest.fixture
def noise(monkeypatch):
    made = Noise()

    class Torch:
        """The module's torch with another source of normal numbers."""

        randn_like = staticmethod(made.normal)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(local_noise, "torch", Torch())
    monkeypatch.setattr(local_noise, "signs", made.signs)
    made.rewind()
    return made


@pytest.fixture
def model(three_topics_model, monkeypatch):
    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    # the transcription draws noise for the last block's queries that nobody reads, which the library leaves out
    monkeypatch.setattr(Backbone, "_restrict", lambda self, positions: None)
    return three_topics_model(
        adapter=[LoRA(rank=2, alpha=4.0, layers=(1, 2)), LabelLoRA(rank=2, alpha=4.0)], prior=PRIOR
    )


def transcription(model, start, noise):
    """The released loop in plain torch: hooks, the whole vocabulary, autograd for the KL as well, numbers written out."""
    data = model.encode(model.task.train)
    label_ids = torch.tensor(data.label_ids)
    places = [
        (kind, i, path)
        for i in range(2)
        for kind in ("q_proj", "v_proj")
        for path in (model.sites[f"{kind}.lora_A"].modules[i],)
    ]  # in the order of the forward pass
    means = {(k, i): start[f"{k}.lora_A.loc"][i].clone().requires_grad_() for k, i, _ in places}
    roots = {(k, i): start[f"{k}.lora_A.root_scale"][i].clone().requires_grad_() for k, i, _ in places}
    ups = {(k, i): start[f"{k}.lora_B.value"][i].clone().requires_grad_() for k, i, _ in places}
    network, scale = model.backbone.network, 4.0 / 2
    vocabulary, head = network.lm_head.weight, "lm_head"
    means[head] = start["lm_head.lora_A.loc"].clone().requires_grad_()
    roots[head] = start["lm_head.lora_A.root_scale"].clone().requires_grad_()
    ups[head] = torch.zeros(vocabulary.shape[0], 2, dtype=torch.float64).requires_grad_()
    adam = torch.optim.AdamW([*means.values(), *ups.values()], lr=RATE, eps=1e-6, weight_decay=0.0)
    sgd = torch.optim.SGD([*means.values(), *ups.values(), *roots.values()], lr=SGD_RATE)

    def hook(key):
        def change(module, args, output):
            x = args[0]
            sigma = roots[key] ** 2
            e = sigma * noise.normal(sigma)
            r = noise.signs(x)
            s = noise.signs(x[..., :2])
            y = output + scale * functional.linear(functional.linear(x, means[key]), ups[key])
            return y + scale * (((x * r) @ e.T) * s) @ ups[key].T

        return change

    handles = [network.get_submodule(path).register_forward_hook(hook((k, i))) for k, i, path in places]
    # N = 12 rows, three whole batches
    cycle = int(100 * 12 ** (3.14159 / GAMMA) / BATCH)
    warm = 0.4 * STEPS
    for step in range(STEPS):
        rate = step / warm if step < warm else (STEPS - step) / (STEPS - warm)
        for optimiser, peak in ((adam, RATE), (sgd, SGD_RATE)):
            optimiser.param_groups[0]["lr"] = peak * rate
        rows = [(step % 3) * BATCH + j for j in range(BATCH)]
        batch = data.batch(rows)
        mask = batch["attention_mask"]
        states = network.model(
            input_ids=batch["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        # at the other positions the head's noise meets no loss
        features = states[torch.arange(BATCH), last][:, None]
        logits = hook(head)(None, (features,), features @ vocabulary.T)[:, 0]
        functional.cross_entropy(logits[:, label_ids], batch["labels"]).backward()
        adam.step()
        adam.zero_grad()
        i = step % cycle + 1
        weight = 2**i / (2 ** (cycle + 1) - 1)
        kl = 0
        for key, root in roots.items():
            sigma = root**2
            terms = math.log(BETA + 1e-6) - torch.log(sigma + 1e-6) - 0.5
            kl = kl + (terms + (sigma**2 + means[key] ** 2) / (2 * BETA**2 + 1e-6)).sum()
        (weight * kl).backward()
        sgd.step()
        sgd.zero_grad()
    for handle in handles:
        handle.remove()
    others = torch.ones(vocabulary.shape[0], dtype=torch.bool)
    others[label_ids] = False
    assert not ups[head][others].any(), "only rows of labels ever learn"
    return {
        "lm_head.lora_A.loc": means[head].detach(),
        "lm_head.lora_A.root_scale": roots[head].detach(),
        "lm_head.lora_B.value": ups[head][label_ids].detach(),
    } | {
        f"{kind}.{name}": torch.stack([values[kind, i].detach() for i in range(2)])
        for kind in ("q_proj", "v_proj")
        for name, values in (("lora_A.loc", means), ("lora_A.root_scale", roots), ("lora_B.value", ups))
    }


def parameters(run):
    return {
        f"{name}.{key}": value.detach().clone() for name, f in run.guide.items() for key, value in f.named_parameters()
    }


def test_every_parameter_follows_the_equations(model, noise):
    run = ENGINE.iterate(model, model.task.train)
    assert isinstance(run, ReleasedRun)
    start = parameters(run)
    for _ in run:
        pass
    found = parameters(run)
    noise.rewind()
    wanted = transcription(model, start, noise)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (value - start[name]).abs().max() > 1e-4, "nothing moved, so nothing is shown"
        # beta is a float32 number in the declared prior, and the written-out gradients meet autograd's
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


def test_the_cycle_and_its_weights():
    engine = ReleasedBLoB()
    # table of the specification of the released scripts, batch 4: WG-S 316, ARC-C 393, ARC-E 517, OBQA 706, BoolQ 909
    for rows, cycle in ((640, 316), (1119, 393), (2251, 517), (2558, 544), (4957, 706), (9427, 909)):
        assert engine.cycle(rows) == cycle
    small = ReleasedBLoB(gamma=1e6)  # M = 100 / 4
    weights = [small.kl_weight_at(step, 400) for step in range(25)]
    assert small.cycle(400) == 25
    assert weights == [pytest.approx(2 ** (i + 1) / (2**26 - 1), rel=1e-14) for i in range(25)]
    assert small.kl_weight_at(25, 400) == weights[0]
    assert engine.kl_weight_at(0, 9427) > 0, "no overflow where 2^909 is far beyond float64's neighbours"


def test_the_start_is_the_released_one(model):
    guide = build_guide(BLoB(variant="release"), model)
    roots = torch.cat([f.root_scale.flatten() for name, f in guide.items() if name.endswith("lora_A")])
    assert 0.05 / math.sqrt(2) <= roots.min() < 0.036
    assert 0.049 < roots.max() <= 0.05
    for engine in (ReleasedBLoB(batch_size=BATCH), SVI(guide=BLoB(variant="release"))):
        one, again, other = (
            parameters(dataclasses.replace(engine, seed=seed).iterate(model, model.task.train)) for seed in (0, 0, 1)
        )
        assert torch.equal(one["q_proj.lora_A.root_scale"], again["q_proj.lora_A.root_scale"])
        assert not torch.equal(one["q_proj.lora_A.root_scale"], other["q_proj.lora_A.root_scale"])
        assert not torch.equal(one["q_proj.lora_A.root_scale"], one["v_proj.lora_A.root_scale"])


def test_data_come_in_a_fixed_order_and_what_fills_no_batch_is_left_out(model):
    run = ReleasedBLoB(batch_size=5).iterate(model, model.task.train)
    stream = run._stream(0)
    seen = [next(stream)["index"].tolist() for _ in range(4)]
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert next(run._stream(3))["index"].tolist() == seen[3]


def test_an_interrupted_fit_resumes(model, tmp_path):
    whole = ENGINE.fit(model, model.task.train, progress=False)
    kept = ReleasedBLoB(**{**vars(ENGINE), "checkpoint": tmp_path, "checkpoint_every": 1})
    run = kept.iterate(model, model.task.train)
    steps = run.steps()
    for _ in range(3):
        next(steps)
    steps.close()
    resumed = kept.fit(model, model.task.train, progress=False)
    for name, value in whole.guide.state_dict().items():
        assert torch.equal(resumed.guide.state_dict()[name], value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_weight": 0.1}, "no kl_weight but 1.0; got 0.1"),
        ({"noise": "example"}, "no noise but 'flipout'"),
        ({"average": 0.5}, "no average but 0.0"),
        ({"guide": MeanField()}, "ReleasedBLoB fits BLoB"),
        ({"guide": BLoB()}, "ReleasedBLoB fits BLoB"),
        ({"gamma": 0.0}, "gamma must be at least 1"),
        ({"gamma": 1e-3}, "gamma must be at least 1"),
    ],
)
def test_what_the_release_does_not_have_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ReleasedBLoB(**settings)


def test_other_priors_and_tiny_data_are_refused(three_topics_model, model):
    for a, b, words in (
        (dist.Normal(0.1, 0.2), Flat(), r"one fixed Normal\(0, scale\) a site"),
        (learned(0.2), Flat(), r"one fixed Normal\(0, scale\) a site"),
        (dist.Laplace(0.0, 0.1), Flat(), "needs a Normal prior"),
        (dist.Normal(0.0, 0.2), dist.Normal(0.0, 0.2), "no prior on 'q_proj.lora_B', and one is declared"),
    ):
        other = three_topics_model(prior={"*.lora_A": a, "*.lora_B": b})
        with pytest.raises(ValueError, match=words):
            ENGINE.fit(other, other.task.train, progress=False)
    with pytest.raises(ValueError, match="do not fill one batch of 50"):
        ReleasedBLoB(batch_size=50).iterate(model, model.task.train)


def test_variants_of_blob():
    with pytest.raises(ValueError, match=r"Unknown variant 'released' of BLoB. Did you mean 'release'"):
        BLoB(variant="released")
    with pytest.raises(ValueError, match="The released start has no init_scale"):
        BLoB(variant="release", init_scale=0.1)
