"""Backbones: hooks, the answer position, and the mask of shared prompts."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pyrolora.models.backbones import Backbone
from pyrolora.models.heads import LabelHead
from pyrolora.models.tasks import encode

PATH = "model.layers.1.self_attn.q_proj"
ROWS = {"input_ids": torch.tensor([[5, 9, 17, 30]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


def plain_logits(network, row):
    """The full model's logits after one row without padding."""
    ids = row["input_ids"][row["attention_mask"].bool()][None]
    return network(input_ids=ids).logits[0, -1]


class TestAnswerPosition:
    @pytest.mark.parametrize("padding", ["left", "right"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
    def test_label_logits_equal_the_full_models(
        self, tiny_llama, tiny_tokenizer, three_topics, padding, dtype, tolerance
    ):
        task, network = three_topics(), tiny_llama(dtype)
        encoded = encode(task.train, task.format, tiny_tokenizer, padding=padding)
        batch = encoded.batch([0, 1, 2, 3])
        head = LabelHead(Backbone(network, tiny_tokenizer, "tiny"), torch.tensor(encoded.label_ids))
        logits = head(batch, (), None, 0)
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        expected = torch.stack([plain_logits(network, row)[list(encoded.label_ids)] for row in rows])
        assert logits.dtype == dtype
        assert batch["attention_mask"].sum(1).unique().numel() > 1, "rows of one length would show nothing"
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)

    def test_a_row_of_one_token_is_found_under_right_padding(self, backbone):
        batch = {
            "input_ids": torch.tensor([[7, 0, 0], [7, 8, 9]]),
            "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]]),
        }
        hidden = backbone.body(input_ids=batch["input_ids"]).last_hidden_state
        torch.testing.assert_close(
            backbone.features(batch), torch.stack([hidden[0, 0], hidden[1, 2]]), atol=1e-12, rtol=0
        )

    def test_a_bfloat16_backbone_gives_float32_logits_near_its_own(self, tiny_llama, tiny_tokenizer):
        network = tiny_llama(torch.bfloat16)
        backbone = Backbone(network, tiny_tokenizer, "tiny")
        logits = LabelHead(backbone, torch.arange(128))(ROWS, (), None, 0)
        assert (backbone.site_dtype, logits.dtype) == (torch.float32, torch.float32)
        # the same features times the same rows: only the rounding of the product to 8 bits differs
        torch.testing.assert_close(logits[0], plain_logits(network, ROWS).float(), rtol=2**-7, atol=2**-7)

    def test_the_real_models_label_logits_equal_its_full_logits(self, smollm2):
        ids = smollm2.tokenizer("Topic:", return_tensors="pt").input_ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = torch.tensor([300, 4000, 49000])
        with torch.no_grad():
            expected = smollm2.network(input_ids=ids).logits[0, -1, labels]
            torch.testing.assert_close(LabelHead(smollm2, labels)(batch, (), None, 0)[0], expected, atol=1e-4, rtol=0)


class TestHooks:
    def test_a_bound_change_is_added_to_the_projections_output_until_release(self, backbone):
        before = backbone.features(ROWS)
        weight = torch.randn(32, 32, dtype=torch.float64)
        changed = copy.deepcopy(backbone.network)
        changed.get_submodule(PATH).weight += weight
        expected = Backbone(changed, None, "changed").features(ROWS)
        for _ in range(2):  # bound twice, added once
            backbone.bind({PATH: lambda rows: rows @ weight.T})
        torch.testing.assert_close(backbone.features(ROWS), expected, atol=1e-12, rtol=0)
        assert (backbone.features(ROWS) - before).abs().max() > 1e-3
        backbone.release()
        assert torch.equal(backbone.features(ROWS), before)

    def test_binding_another_projection_unbinds_the_first(self, backbone):
        other = PATH.replace("q_proj", "v_proj")
        backbone.bind({other: lambda rows: rows[..., :16]})
        expected = backbone.features(ROWS)
        backbone.bind({PATH: lambda rows: rows})
        backbone.bind({other: lambda rows: rows[..., :16]})
        assert torch.equal(backbone.features(ROWS), expected)

    def test_the_network_is_frozen_and_keeps_its_parameter_names(self, tiny_llama, tiny_tokenizer):
        network = tiny_llama().train()
        names = list(network.state_dict())
        backbone = Backbone(network, tiny_tokenizer, "tiny")
        backbone.bind({PATH: lambda rows: rows})
        assert list(network.state_dict()) == names
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())

    def test_the_fingerprint_ignores_the_type_but_not_the_weights(self, tiny_llama, tiny_tokenizer):
        prints = [
            Backbone(tiny_llama(dtype, seed), tiny_tokenizer, "tiny").fingerprint
            for dtype, seed in [(torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 1)]
        ]
        assert prints[0] == prints[1] != prints[2]


def small(kind, **config):
    sizes = {"vocab_size": 64, "initializer_range": 0.3, **config}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).double().eval()


GPTJ = {"n_embd": 32, "n_head": 4, "n_layer": 3, "rotary_dim": 4, "n_positions": 64}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}


class TestOtherArchitectures:
    @pytest.mark.parametrize(("kind", "config"), [("gptj", GPTJ), ("mpt", MPT)])
    @pytest.mark.parametrize("first_block", [1, "all"])
    def test_blocks_that_return_tuples_can_be_resumed(self, kind, config, first_block):
        backbone = Backbone(small(kind, **config), None, kind)
        first_block = len(backbone.blocks) if first_block == "all" else first_block
        trunk = backbone.trunk(ROWS, first_block)
        resumed = backbone.features(ROWS, trunk=trunk, first_block=first_block)
        torch.testing.assert_close(resumed, backbone.features(ROWS), rtol=0, atol=0 if first_block == 1 else 1e-6)

    def test_options_are_refused_where_positions_cannot_be_given(self):
        backbone = Backbone(small("mpt", **MPT), None, "mpt")
        with pytest.raises(ValueError, match="MptModel takes no position_ids, so options cannot share a prompt"):
            backbone.hidden_states({**ROWS, "segment_ids": torch.tensor([[1, 1, 2, 3]])})
