"""The last block at the answer position: exact, found by structure, and off where somebody looks at the rest."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pyrolora.guides import BLoB, build_guide
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.adapters import S2FT, LoRA
from pyrolora.models.adapters.base import LinearTape
from pyrolora.models.answer_position import every_position
from pyrolora.models.backbones import Backbone

# of logits, and of gradients, which round once more in every block
TOLERANCE = {torch.float32: (1e-6, 5e-6), torch.float64: (1e-12, 1e-12)}
LAST = "model.layers.2"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 32}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2, n_positions=32)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=2)),
}
FOUND = {
    "gpt2": ["attn.c_proj", "mlp"],
    "qwen3": ["self_attn.q_proj", "self_attn.o_proj", "mlp"],
}


def batch_of(side="right", dtype=torch.long):
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5, 1)):
        if padding:
            mask[row, slice(None, padding) if side == "left" else slice(-padding, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def draw_of(model, draws=None, seed=0):
    source = torch.Generator().manual_seed(seed)
    shape = () if draws is None else (draws,)
    return {
        name: 0.3
        * torch.randn(*shape, *site.shape, generator=source, dtype=torch.float64).to(model.backbone.site_dtype)
        for name, site in model.sites.items()
    }


@pytest.fixture
def widths():
    """Return ``watch(model)``: positions that the last block's feed-forward part and keys are asked for, call by call."""

    def watch(model):
        assert paths(model.backbone), "traced before anything is counted"
        seen = {"mlp": [], "k_proj": []}
        block = model.backbone.network.get_submodule(LAST)
        for name, module in (("mlp", block.mlp), ("k_proj", block.self_attn.k_proj)):
            forward = module.forward

            def counted(rows, forward=forward, name=name):
                seen[name].append(rows.shape[1])
                return forward(rows)

            module.forward = counted
        return seen

    return watch


def paths(backbone):
    names = {module: name for name, module in backbone.network.named_modules()}
    return [names[module] for module in backbone._answer_position.modules]


def test_what_only_the_answer_needs_is_found(three_topics_model):
    backbone = three_topics_model().backbone
    assert paths(backbone) == [f"{LAST}.self_attn.q_proj", f"{LAST}.self_attn.o_proj", f"{LAST}.mlp"]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_exact_with_whatever_was_found(tiny_tokenizer, kind):
    torch.manual_seed(0)
    # float32, which is all that products of experts know
    backbone = Backbone(OTHERS[kind]().eval(), tiny_tokenizer, kind)
    found = [path.split(".", 3)[-1] for path in paths(backbone)]
    if kind in FOUND:
        assert found == FOUND[kind]
    for side in ("left", "right"):
        with torch.no_grad():
            restricted = backbone.features(batch_of(side))
            with every_position():
                whole = backbone.features(batch_of(side))
        torch.testing.assert_close(restricted, whole, atol=2e-6, rtol=0)


def test_a_network_that_cannot_be_traced_runs_whole(three_topics_model, monkeypatch):
    backbone = three_topics_model().backbone
    hidden = backbone.hidden_states(batch_of())

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr("pyrolora.models.answer_position._maps_positions_alone", fail)
    assert torch.equal(backbone.features(batch_of())[0], hidden[0, -1])
    assert paths(backbone) == []


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("draws", [None, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_logits_and_gradients_are_those_of_all_positions(
    three_topics_model, widths, dtype, side, draws, checkpointing, first
):
    layers = tuple(range(first, 3))
    model = three_topics_model(dtype, adapter=LoRA(rank=2, alpha=4.0, targets="all-linear", layers=layers))
    if checkpointing:
        model.backbone.checkpoint_gradients()
    seen, batch = widths(model), batch_of(side)
    outcomes = []
    for whole in (False, True):
        draw = {name: value.requires_grad_() for name, value in draw_of(model, draws).items()}
        if whole:
            with every_position():
                logits = model.logits(batch, draw)
                (logits.tanh() ** 2).sum().backward()
        else:
            logits = model.logits(batch, draw)
            (logits.tanh() ** 2).sum().backward()
        outcomes.append([logits.detach(), *(value.grad for value in draw.values())])
        model.release()
    # once more in backward under checkpointing
    assert seen["mlp"] == ([1, 1, 9, 9] if checkpointing else [1, 9])
    assert set(seen["k_proj"]) == {9}
    for number, (restricted, whole) in enumerate(zip(*outcomes, strict=True)):
        scale, tolerance = whole.abs().max().clamp_min(1.0), TOLERANCE[dtype][number > 0]
        torch.testing.assert_close(restricted / scale, whole / scale, atol=tolerance, rtol=0)


def test_rows_that_hold_several_segments_are_exact(three_topics_model):
    backbone = three_topics_model().backbone
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0, 0], [1, 1, 2, 2, 2, 2, 3, 3, 3]] * 2)
    batch = {**batch_of(), "segment_ids": segments, "attention_mask": (segments > 0).long()}
    restricted = backbone.features(batch)
    with every_position():
        torch.testing.assert_close(restricted, backbone.features(batch), atol=1e-12, rtol=0)


def test_a_training_step_is_the_same(three_topics_model, widths):
    model = three_topics_model(adapter=LoRA(rank=2, alpha=4.0))
    runs = [TrainingRun(SVI(guide=BLoB(), steps=9, batch_size=4), model, model.task.train) for _ in range(2)]
    seen = widths(model)
    batch = next(runs[0].data.stream(4, seed=0))
    with every_position():
        whole = [runs[0].take_step(batch) for _ in range(3)]
    assert set(seen["mlp"]) == set(seen["k_proj"]) == {batch["input_ids"].shape[1]}
    restricted = [runs[1].take_step(batch) for _ in range(3)]
    assert seen["mlp"][3:] == [1, 1, 1]
    for one, other in zip(whole, restricted, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-12)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-9)


def test_noise_for_every_token_has_its_distribution(three_topics_model):
    """Two estimates from 3000 passes each: means within six standard errors, fewer than 1 run in 1,000,000 by chance."""
    model = three_topics_model(adapter=LoRA(rank=2, alpha=4.0, targets=["q_proj", "o_proj", "down_proj"], layers=(2,)))
    guide = build_guide({"*.lora_A": BLoB(init_scale=0.3), "*.lora_B": BLoB(init_scale=0.3, sites="*")}, model)
    from pyrolora.inference.posterior import Posterior

    posterior = Posterior(model, guide, {})
    batch = {key: value[:1] for key, value in batch_of().items()}
    found = []
    for whole in (False, True):
        generator = torch.Generator().manual_seed(int(whole))
        if whole:
            with every_position():
                probs = posterior.predict(batch, kind="token", draws=3000, generator=generator).probs
        else:
            probs = posterior.predict(batch, kind="token", draws=3000, generator=generator).probs
        found.append(probs[:, 0])
    error = ((found[0].var(0) + found[1].var(0)) / 3000).sqrt()
    assert ((found[0].mean(0) - found[1].mean(0)).abs() < 6 * error).all()
    ratio = found[0].std(0) / found[1].std(0)
    assert (ratio - 1).abs().max() < 0.15
    assert found[0].std(0).min() > 1e-3


class TestWhereSomebodyLooks:
    def test_a_hook_of_others_sees_every_position(self, three_topics_model, widths):
        model = three_topics_model()
        draw, seen = draw_of(model), widths(model)
        restricted = model.row_logits(batch_of(), draw)
        for path in (f"{LAST}.mlp.down_proj", f"{LAST}.self_attn.q_proj", LAST, "model.norm"):
            lengths = []
            module = model.backbone.network.get_submodule(path)
            handle = module.register_forward_hook(
                lambda module, args, output, lengths=lengths: lengths.append(args[0].shape[1])
            )
            torch.testing.assert_close(model.row_logits(batch_of(), draw), restricted, atol=1e-12, rtol=0)
            handle.remove()
            assert lengths == [9]
        del seen["mlp"][:]
        below = model.backbone.network.get_submodule("model.layers.1.mlp")
        below.register_forward_hook(lambda *args: None)
        model.row_logits(batch_of(), draw)
        assert seen["mlp"] == [1], "hooks of other blocks lose nothing"

    def test_a_tape_records_every_position(self, three_topics_model):
        model = three_topics_model(adapter=LoRA(rank=2, layers=(2,)))
        model.row_logits(batch_of(), draw_of(model))
        with LinearTape() as tape:
            model.row_logits(batch_of(), draw_of(model))
        assert tape.products["q_proj.lora_A"][0][0].shape[1] == 9

    def test_an_adapter_that_mixes_positions_sees_them_all(self, three_topics_model):
        class MeanOfPrompt(LoRA):
            """A change that depends on the mean over positions."""

            def deltas(self, sites, draw):
                inner = super().deltas(sites, draw)
                return {path: (lambda rows, d=d: d(rows - rows.mean(1, keepdim=True))) for path, d in inner.items()}

        try:
            assert not MeanOfPrompt.by_position
            assert S2FT.by_position
            model = three_topics_model(adapter=MeanOfPrompt(rank=2, layers=(2,)))
            draw = draw_of(model)
            logits = model.row_logits(batch_of(), draw)
            with every_position():
                assert torch.equal(logits, model.row_logits(batch_of(), draw))
        finally:
            LoRA.registered.pop("MeanOfPrompt")

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_others_use_the_network_as_before(self, three_topics_model, checkpointing):
        model = three_topics_model()
        backbone, batch = model.backbone, batch_of()
        whole = backbone.hidden_states(batch)
        if checkpointing:
            backbone.checkpoint_gradients()
        model.row_logits(batch, draw_of(model))
        assert (backbone._answer_position.positions is None) != checkpointing
        model.release()
        torch.testing.assert_close(backbone.hidden_states(batch), whole, atol=1e-12, rtol=0)
        model.row_logits(batch, draw_of(model))
        backbone.release()
        assert backbone._answer_position.positions is None
        outputs = backbone.network.base_model(**backbone._inputs(batch)).last_hidden_state
        torch.testing.assert_close(outputs, whole, atol=1e-12, rtol=0)

    def test_a_copy_of_the_network_is_restricted_by_its_own_backbone(self, three_topics_model, tiny_tokenizer):
        backbone = three_topics_model().backbone
        features = backbone.features(batch_of())
        other = Backbone(copy.deepcopy(backbone.network), tiny_tokenizer, "copy")
        assert torch.equal(other.features(batch_of()), features)
        assert paths(other) == paths(backbone)
        block = copy.deepcopy(backbone.blocks[-1])
        assert sum(weight.numel() for weight in block.parameters()) < 20_000
