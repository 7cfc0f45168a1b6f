"""Adapters: LoRA against PEFT and against merged weights under vmap, its stacks, and what is refused."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.func import functional_call, vmap

from pyrolora.models.adapters import Adapter, LabelLoRA, LastLayer, LoRA
from pyrolora.models.backbones import Backbone
from pyrolora.models.sites import SiteTable

IDS = torch.tensor([[5, 9, 17, 30], [40, 41, 42, 43]])
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
KINDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


def sites_of(backbone, **settings):
    return LoRA(**settings).sites(backbone, None)


def random_draw(sites, *draws):
    return {site.name: 0.3 * torch.randn(*draws, *site.shape, dtype=torch.float64) for site in sites}


class TestAgainstPEFT:
    @pytest.mark.parametrize(
        ("targets", "layers"),
        [
            (["q_proj", "v_proj"], None),
            (["o_proj", "down_proj"], [0, 2]),
            ("all-linear", None),
            (r".*\.[12]\.mlp\.(up|down)_proj", None),
        ],
    )
    def test_outputs_and_keys_equal_pefts_with_the_same_factors(self, backbone, targets, layers):
        adapter = LoRA(rank=3, alpha=5.0, targets=targets, layers=layers)
        sites = adapter.sites(backbone, None)
        draw = random_draw(sites)
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, layers_to_transform=layers)
        peft = get_peft_model(copy.deepcopy(backbone.network), config).double().eval()
        state = {key: draw[site.name][i] for site in sites for i, key in enumerate(site.keys)}
        assert state.keys() == get_peft_model_state_dict(peft).keys()
        loaded = set_peft_model_state_dict(peft, state)
        assert not loaded.unexpected_keys
        expected = peft(input_ids=IDS).logits
        untouched = backbone.network(input_ids=IDS).logits
        backbone.bind(adapter.deltas(sites, draw))
        assert (untouched - expected).abs().max() > 0.1
        torch.testing.assert_close(backbone.network(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)

    def test_the_start_is_pefts_and_leaves_the_network_as_it_was(self, backbone):
        adapter = LoRA(rank=8)
        sites = adapter.sites(backbone, None)
        start = adapter.initial(backbone, sites, torch.Generator().manual_seed(1))
        again = adapter.initial(backbone, sites, torch.Generator().manual_seed(1))
        peft = get_peft_model(copy.deepcopy(backbone.network), LoraConfig(target_modules=["q_proj", "v_proj"]))
        theirs = torch.stack([value for key, value in peft.state_dict().items() if "q_proj.lora_A" in key]).double()
        ours = start["q_proj.lora_A"]
        assert ours.dtype == torch.float64
        assert all(torch.equal(start[name], again[name]) for name in start)
        assert ours.abs().max() <= 32**-0.5 < 1.05 * ours.abs().max()
        # 768 uniform numbers each: standard deviations differ by more than a tenth once in 10^5 runs
        assert ours.std() / theirs.std() == pytest.approx(1.0, abs=0.1)
        assert not start["q_proj.lora_B"].any()
        before = backbone.features(ROWS)
        backbone.bind(adapter.deltas(sites, start))
        assert torch.equal(backbone.features(ROWS), before)

    def test_label_rows_change_as_pefts_head_does(self, three_topics_model):
        model = three_topics_model(adapter=LabelLoRA(rank=3, alpha=5.0))
        draw = random_draw(model.sites.values())
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"])
        peft = get_peft_model(copy.deepcopy(model.backbone.network), config).double().eval()
        encoded = model.encode(model.task.test)
        ids = list(encoded.label_ids)
        rows = torch.zeros(peft.get_output_embeddings().weight.shape[0], 3, dtype=torch.float64)
        rows[ids] = draw["lm_head.lora_B"]
        keys = (f"base_model.model.lm_head.lora_{name}.weight" for name in "AB")
        loaded = set_peft_model_state_dict(peft, dict(zip(keys, (draw["lm_head.lora_A"], rows), strict=True)))
        assert not loaded.unexpected_keys
        batch = encoded.batch([0, 1, 2])
        whole = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = model.row_logits(batch, draw)
        assert (found - model.row_logits(batch, model.initial())).abs().max() > 0.1
        torch.testing.assert_close(found, whole[:, -1, ids], atol=1e-5, rtol=0)


class TestDraws:
    def test_draws_on_the_batch_axis_equal_vmap_over_merged_weights(self, backbone):
        adapter, draws = LoRA(rank=2, alpha=6.0, targets=["q_proj", "down_proj"]), 3
        sites = adapter.sites(backbone, None)
        draw = random_draw(sites, draws)
        weights = dict(backbone.network.named_parameters())

        def merged(one):
            new = {}
            for a, b in (sites[:2], sites[2:]):
                for layer, path in enumerate(a.modules):
                    key = f"{path}.weight"
                    new[key] = weights[key] + 3.0 * one[b.name][layer] @ one[a.name][layer]
            return functional_call(backbone.network, new, (IDS,), {"use_cache": False}).logits

        expected = vmap(merged)(draw)
        backbone.bind(adapter.deltas(sites, draw))
        logits = backbone.network(input_ids=IDS.repeat(draws, 1)).logits.unflatten(0, (draws, 2))
        assert (expected[0] - expected[1]).abs().max() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    def test_one_projection_is_changed_by_the_scaled_product(self, backbone):
        adapter = LoRA(rank=2, alpha=6.0)
        sites = adapter.sites(backbone, None)
        draw, rows = random_draw(sites), torch.randn(2, 4, 32, dtype=torch.float64)
        delta = adapter.deltas(sites, draw)["model.layers.2.self_attn.v_proj"]
        product = 3.0 * draw["v_proj.lora_B"][2] @ draw["v_proj.lora_A"][2]
        torch.testing.assert_close(delta(rows), rows @ product.T, atol=1e-12, rtol=0)

    def test_sites_stay_float32_over_a_bfloat16_backbone(self, tiny_llama):
        backbone, adapter = Backbone(tiny_llama(torch.bfloat16), None, "tiny"), LoRA(rank=2)
        sites = adapter.sites(backbone, None)
        draw = {name: value.float().requires_grad_() for name, value in random_draw(sites).items()}
        features = backbone.features(ROWS)
        deltas, rows = adapter.deltas(sites, draw), torch.randn(1, 4, 32).bfloat16()
        exact = rows.float() @ draw["q_proj.lora_A"][0].T @ (8 * draw["q_proj.lora_B"][0]).T
        assert torch.equal(deltas["model.layers.0.self_attn.q_proj"](rows), exact.bfloat16()), (
            "rounded once, at the end"
        )
        backbone.bind(deltas)
        changed = backbone.features(ROWS)
        changed.float().pow(2).sum().backward()
        assert changed.dtype == features.dtype == torch.bfloat16
        assert not torch.equal(changed, features)
        assert {value.dtype for value in adapter.initial(backbone, sites).values()} == {torch.float32}
        assert {value.grad.dtype for value in draw.values()} == {torch.float32}
        assert all(value.grad.abs().max() > 0 for value in draw.values())


class TestSites:
    def test_all_linear_names_every_kind_with_its_dims(self, backbone):
        sites = SiteTable(sites_of(backbone, rank=4, targets="all-linear"))
        assert sorted({name.split(".")[0] for name in sites}) == KINDS
        down = sites["down_proj.lora_A"]
        assert (down.shape, down.dims) == (torch.Size((3, 4, 64)), ("layer", "rank", "in_feature"))
        up = sites["down_proj.lora_B"]
        assert (up.shape, up.dims) == (torch.Size((3, 32, 4)), ("layer", "out_feature", "rank"))

    def test_negative_layers_count_from_the_last(self, backbone):
        sites = sites_of(backbone, rank=1, targets=["q_proj"], layers=[-1, 0, 0])
        assert sites[0].layers == (0, 2)
        assert sites[0].modules == tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2))

    def test_projections_of_one_kind_with_other_shapes_form_a_stack_each(self, backbone):
        for block, width in ((1, 48), (2, 48)):
            backbone.blocks[block].mlp.up_proj = torch.nn.Linear(32, width, bias=False)
        shapes = {
            site.name: (tuple(site.shape), site.layers) for site in sites_of(backbone, rank=2, targets=["up_proj"])
        }
        assert shapes == {
            "up_proj_32x64.lora_A": ((1, 2, 32), (0,)),
            "up_proj_32x64.lora_B": ((1, 64, 2), (0,)),
            "up_proj_32x48.lora_A": ((2, 2, 32), (1, 2)),
            "up_proj_32x48.lora_B": ((2, 48, 2), (1, 2)),
        }


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank must be at least 1; got 0"),
            ({"rank": 17}, "Rank 17 exceeds the smaller side of v_proj (32 x 16). Choose a rank of at most 16"),
            ({"alpha": 0.0}, "alpha must be positive; got 0.0"),
            ({"targets": ["q_prj"]}, "'q_prj' of tiny does not exist in its blocks. Did you mean 'q_proj'"),
            ({"targets": ["q_proj", "lm_head"]}, "'lm_head' of tiny does not exist in its blocks"),
            ({"targets": ["input_layernorm"]}, "is a LlamaRMSNorm, and only nn.Linear can be adapted"),
            ({"targets": "q_proj"}, "is one string, and so a regular expression.* give a list: ['q_proj']"),
            ({"targets": r".*\.query"}, "does not exist in its blocks"),
            ({"targets": "*_proj"}, "'*_proj' is no regular expression: nothing to repeat"),
            ({"targets": []}, "targets is empty"),
            ({"layers": [3]}, "tiny has no block 3; its blocks are 0 to 2, or -3 to -1 from the end"),
            ({"layers": [-4]}, "tiny has no block -4"),
            ({"layers": []}, "layers is empty"),
        ],
    )
    def test_settings_that_do_not_fit_the_network(self, backbone, settings, message):
        with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
            sites_of(backbone, **settings)

    def test_the_label_rows_need_to_exist_and_to_be_wide_enough(self, backbone):
        with pytest.raises(ValueError, match="LabelLoRA needs label rows, and this task scores options instead"):
            LabelLoRA().sites(backbone, None)
        with pytest.raises(ValueError, match=r"Rank 33 exceeds the 32 features of the network"):
            LabelLoRA(rank=33).sites(backbone, 3)
        with pytest.raises(ValueError, match=r"must be positive; got 0 and 16.0"):
            LabelLoRA(rank=0)

    def test_the_last_layer_needs_label_rows(self, backbone):
        with pytest.raises(ValueError, match="LastLayer needs label rows, and this task scores options"):
            LastLayer().sites(backbone, None)
        (site,) = LastLayer().sites(backbone, 5)
        assert (site.name, site.shape, site.dims) == ("head.weight", torch.Size((5, 32)), ("class", "feature"))


class TestDescription:
    @pytest.mark.parametrize("adapter", [LoRA(rank=2, layers=[1]), LoRA(targets="all-linear"), LastLayer()])
    def test_an_adapter_survives_its_json_description(self, adapter):
        described = {
            key: list(value) if isinstance(value, tuple) else value for key, value in adapter.to_dict().items()
        }
        assert Adapter.from_dict(described) == adapter

    @pytest.mark.parametrize(
        ("described", "message"),
        [
            ({"adapter": "Lora"}, "Unknown adapter 'Lora'. Did you mean 'LoRA'"),
            ({"adapter": "LoRA", "rnak": 2}, "LoRA has no setting 'rnak'. Did you mean 'rank'"),
            ({}, "Unknown adapter None"),
        ],
    )
    def test_unknown_names_offer_the_nearest(self, described, message):
        with pytest.raises(ValueError, match=message):
            Adapter.from_dict(described)
